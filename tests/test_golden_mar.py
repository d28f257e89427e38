"""Fidelity of the diffusion head: model, loss, single steps and whole runs against tensors of the published MAR code.

float64 within 1e-11 (whole runs 1e-10) of the largest value, float32 as far as the published code's own float32 allows: the
first sampling step multiplies an error of the network by some hundreds. What the arrays are: golden/README.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_golden import DTYPES, TINY, arrays, tensor
from torch import Tensor

from arinar.checkpoint import load_arinar
from arinar.diffusion_head import DiffusionHead, RowConstants, guided, timestep_features
from arinar.diffusion_law import LAW, forced_states, gaussian_kl
from arinar.diffusion_schedule import kept_timesteps, noise_schedule, respacings, step_table
from arinar.head import Draw
from arinar.model import Arinar, masked_mean, patchify, unpatchify
from arinar.sampler import StepRecord, sample

RESPACINGS = ["", "250", "100", "50", "25", "10", "2", "30,20,10", "ddim100", "ddim50", "ddim25"]
TRAJECTORIES = ["cfg1_oneiter", "cfg1_t0p95", "cfg2p9_ddim10", "cfg3_s100", "cfg3p2_ddim25_t1p1", "cfg4const_t0p9"]
TINY_MAR = TINY.replace(head="diffusion", inner_width=48, inner_depth=3)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def model(golden: Path, dtype: torch.dtype) -> Arinar:
    return load_arinar(golden / "tiny_mar" / "weights.safetensors", config=TINY_MAR).to(dtype)


@pytest.fixture
def head(model: Arinar) -> DiffusionHead:
    assert isinstance(model.head, DiffusionHead)
    return model.head


@pytest.fixture(scope="module")
def data(golden: Path) -> dict[str, np.ndarray]:
    return arrays(golden, "tiny_mar/head.npz")


def assert_near(actual: Tensor, reference: np.ndarray, f64: float = 1e-11, f32: float = 1e-5) -> None:
    """Largest error, relative to the largest value (at least 1)."""
    assert actual.shape == reference.shape
    error = np.abs(actual.detach().double().numpy() - reference).max() / max(1.0, np.abs(reference).max())
    assert error <= (f64 if actual.dtype == torch.float64 else f32), error


# ------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("respacing", RESPACINGS)
def test_schedule_exactly(golden: Path, respacing: str) -> None:
    reference = arrays(golden, "tiny_mar/schedules.npz")
    prefix = (respacing or "1000").replace(",", "_")
    schedule = noise_schedule(respacing)
    for name in schedule.__dataclass_fields__:
        assert np.array_equal(getattr(schedule, name), reference[f"{prefix}__{name}"]), name


def test_every_schedule_is_tested(golden: Path) -> None:
    names = {key.split("__")[0] for key in arrays(golden, "tiny_mar/schedules.npz")}
    assert names == {(respacing or "1000").replace(",", "_") for respacing in RESPACINGS}


@pytest.mark.parametrize(
    "respacing", ["ddim60", "1001", "1", "0", "ddim1", "ddim0", "10,0", "600,600", "x", "-3", "1.5", "10,", "ddim", " ", "١٠"]
)
def test_refused_respacings(respacing: str) -> None:
    with pytest.raises(ValueError, match="sampling_steps is "):
        kept_timesteps(respacing)
    with pytest.raises(ValueError, match="sampling_steps is "):
        TINY_MAR.replace(sampling_steps=respacing)


@pytest.mark.parametrize("respacing", [100, None, 2.0, ["100"]])
def test_a_respacing_is_text(respacing: object) -> None:
    with pytest.raises(ValueError, match="expected a text"):
        respacings(respacing, 4)  # type: ignore[arg-type]


def test_annealed_steps_fall_as_disa_says() -> None:
    assert respacings("25-5", 4) == ["25", "18", "11", "5"]
    assert respacings("25-5", 1) == ["25"]  # where the published formula divides by zero
    assert respacings("5-5", 3) == ["5", "5", "5"]
    found = [int(steps) for steps in respacings("50-5", 64)]
    assert found == [5 + int((63 - step) / 63 * 45) for step in range(64)]
    for bad in ("5-25", "25-1", "1001-5", "25-5-1"):
        with pytest.raises(ValueError, match="sampling_steps is "):
            respacings(bad, 4)


@pytest.mark.parametrize("respacing", RESPACINGS)
def test_step_table_is_the_posterior_without_its_large_intermediate(respacing: str) -> None:
    schedule, (timesteps, table) = noise_schedule(respacing), step_table(respacing)
    assert timesteps.tolist() == schedule.timesteps[::-1].tolist()
    generator = np.random.default_rng(0)
    x, noise = generator.standard_normal((2, len(schedule)))
    # What a trained network answers: nearly the noise that is in x, which the first steps subtract from it.
    eps = schedule.sqrt_one_minus_alphas_cumprod[::-1] * x + 1e-3 * noise
    at = RowConstants(schedule, torch.arange(len(schedule)).flip(0), torch.zeros(1, dtype=torch.float64))
    mean, logvar, _ = at.posterior(*(torch.from_numpy(value[:, None]) for value in (x, eps, noise)))
    from_x, from_eps, log_beta, log_posterior, adds = table.T.astype(np.float64)
    assert np.allclose(from_x * x - from_eps * eps, mean[:, 0], rtol=1e-6, atol=1e-6 * np.abs(from_eps * eps))
    share = (noise + 1) / 2
    assert np.allclose(share * log_beta + (1 - share) * log_posterior, logvar[:, 0], rtol=1e-6)
    assert adds.tolist() == [1.0] * (len(schedule) - 1) + [0.0]


# ----------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("case", range(8))
def test_outer(golden: Path, model: Arinar, dtype: torch.dtype, case: int) -> None:
    data = arrays(golden, "tiny_mar/outer.npz")
    tokens, mask = (tensor(data[f"case{case}_{name}"], dtype) for name in ("tokens", "mask"))
    z = model.condition(tokens, mask, tensor(data[f"case{case}_labels"], torch.int64))
    assert_near(z, data[f"case{case}_z_f64"])


def test_patches_of_two(golden: Path) -> None:
    data = arrays(golden, "tiny_mar/outer.npz")
    for tokens, latents, size in (("unpatchify_in", "unpatchify_out", 1), ("patch2_tokens", "patch2_latent", 2)):
        assert np.array_equal(unpatchify(torch.from_numpy(data[tokens]), size), data[latents])
        assert np.array_equal(patchify(torch.from_numpy(data[latents]), size), data[tokens])


def test_network(head: DiffusionHead, data: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    kept: dict[str, Tensor] = {}
    parts = {"time_embed": head.net.time_embed, "cond_embed": head.net.cond_embed}
    parts |= {f"block{index}": block for index, block in enumerate(head.net.res_blocks)}
    for name, module in parts.items():
        module.register_forward_hook(lambda _, __, out, name=name: kept.update({name: out}))
    out = head.net(tensor(data["x_t"], dtype), tensor(data["t"], torch.int64), tensor(data["z"], dtype))
    for name, value in {**kept, "out": out}.items():
        assert_near(value, data[f"{name}_f64"])
    features = timestep_features(tensor(data["t"], torch.int64), torch.float32)
    assert_near(features, data["time_freq_embedding_f32"], f32=1e-6)


@pytest.mark.parametrize("scale", [2.9, 1.0, 0.0])
def test_guidance(head: DiffusionHead, data: dict[str, np.ndarray], dtype: torch.dtype, scale: float) -> None:
    timesteps = tensor(data["cfg_t"], torch.int64)
    cond, uncond = (
        head.net(tensor(data["cfg_x"], dtype), timesteps, tensor(data[f"cfg_z_{b}"], dtype)) for b in ("cond", "uncond")
    )
    reference = data[f"cfg_out_s{scale:.1f}_f64".replace(".", "p", 1)][: len(cond)]
    assert_near(torch.cat(guided(cond, uncond, torch.full((len(cond),), scale, dtype=torch.float64)), 1), reference)


@pytest.mark.parametrize("branch", ["", "cfg_"])
@pytest.mark.parametrize("respacing", ["", "100", "50", "25", "10", "ddim25"])
def test_single_steps(
    head: DiffusionHead, data: dict[str, np.ndarray], dtype: torch.dtype, respacing: str, branch: str
) -> None:
    prefix = f"ps_{respacing or '1000'}_"
    schedule, index = noise_schedule(respacing), tensor(data[f"{prefix}index"], torch.int64)
    x, noise = tensor(data["ps_x"], dtype), tensor(data["ps_noise"], dtype)
    timesteps = torch.from_numpy(schedule.timesteps)[index]
    cond, uncond = (head.net(x, timesteps, tensor(data[name], dtype)) for name in ("ps_z", "ps_z_uncond"))
    eps, value = guided(cond, uncond, torch.full((len(x),), 2.9, dtype=torch.float64)) if branch else cond.chunk(2, -1)
    mean, logvar, token = RowConstants(schedule, index, x).posterior(x, eps, value)
    # Relative to the largest of a row: the noisiest steps multiply by up to 2e4.
    for name, got in (("mean", mean), ("log_variance", logvar), ("pred_xstart", token)):
        reference = data[f"{prefix}{branch}{name}_f64"]
        scale = np.maximum(1.0, np.abs(reference).max(1, keepdims=True))
        assert_near((got / torch.from_numpy(scale)).to(dtype), reference / scale, f32=5e-4)
    for temperature in (1.0, 0.9):
        drawn = mean + (index != 0)[:, None] * torch.exp(0.5 * logvar) * noise * temperature
        assert_near(drawn, data[f"{prefix}{branch}sample_T{temperature}".replace(".", "p") + "_f64"], f32=5e-4)


@pytest.mark.parametrize("loop", range(2))
def test_the_draw_of_a_token(head: DiffusionHead, data: dict[str, np.ndarray], dtype: torch.dtype, loop: int) -> None:
    meta = json.loads(str(data[f"loop{loop}_meta"]))
    draws = np.concatenate([data[f"loop{loop}_x_init"][:, None], data[f"loop{loop}_noise"]], 1).swapaxes(1, 2)
    rows = torch.ones(len(draws), dtype=torch.float64)
    how = Draw(
        rows * meta["cfg"],
        rows * meta["temperature"],
        torch.Generator(),
        tensor(draws, dtype),
        sampling_steps=meta["num_sampling_steps"],
    )
    z, z_uncond = (tensor(data[name], dtype) for name in ("ps_z", "ps_z_uncond"))
    with torch.no_grad():
        drawn = head.draw(z, None if meta["cfg"] == 1 else z_uncond, how)
    assert_near(drawn.tokens, data[f"loop{loop}_final_f64"], f64=1e-10, f32=5e-4)
    # The law is that of the config's sampling steps, whatever number was taken.
    assert drawn.cond[0].shape == (len(draws), 100, draws.shape[1])


def test_training_loss(golden: Path, model: Arinar, data: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    head = model.head
    assert isinstance(head, DiffusionHead)
    z, tokens, noise, mask = (tensor(data[f"train_{name}"], dtype) for name in ("z", "x0", "noise", "mask"))
    rows = head.loss_at(z, tokens, tensor(data["train_t"], torch.int64), noise)
    assert_near(rows, data["train_loss_f64"], f32=5e-4)
    assert_near(masked_mean(rows, mask), data["train_masked_mean_loss_f64"], f32=5e-4)

    outer, case, copies = arrays(golden, "tiny_mar/outer.npz"), int(data["mar_loss_case"]), int(data["mar_loss_mul"])
    tokens, mask = (tensor(outer[f"case{case}_{name}"], dtype) for name in ("tokens", "mask"))
    z = model.condition(tokens, mask, tensor(outer[f"case{case}_labels"], torch.int64))
    z, tokens = (value.flatten(0, 1).repeat(copies, 1) for value in (z, tokens))
    rows = head.loss_at(z, tokens, tensor(data["mar_loss_t"], torch.int64), tensor(data["mar_loss_noise"], dtype))
    assert_near(masked_mean(rows, mask.flatten().repeat(copies)), data["mar_loss_f64"], f32=5e-4)


def test_the_variance_is_trained_without_moving_the_noise(
    head: DiffusionHead, data: dict[str, np.ndarray], dtype: torch.dtype
) -> None:
    """The bound's gradient reaches the variance value alone: that of eps is the squared error's."""
    z, tokens, noise = (tensor(data[f"train_{name}"], dtype) for name in ("z", "x0", "noise"))
    timesteps = tensor(data["train_t"], torch.int64)
    head.loss_at(z, tokens, timesteps, noise).sum().backward()
    bias = head.net.final_layer.linear.bias.grad
    assert bias is not None
    at = RowConstants(noise_schedule(), timesteps, tokens)
    x = at.sqrt_alphas_cumprod * tokens + at.sqrt_one_minus_alphas_cumprod * noise
    eps = head.net(x, timesteps, z).chunk(2, -1)[0]
    features = tokens.shape[1]
    assert torch.allclose(bias[:features], (2 * (eps - noise) / features).sum(0), atol=1e-4 if dtype == torch.float32 else 1e-9)
    assert bias[features:].abs().min() > 0


# ---------------------------------------------------------------------------------------- whole trajectories


@pytest.mark.parametrize("run", TRAJECTORIES)
def test_trajectory(golden: Path, model: Arinar, dtype: torch.dtype, run: str) -> None:
    """A whole run of the reference sampler on the recorded noise: nothing is forced."""
    data = arrays(golden, f"tiny_mar/traj_{run}.npz")
    meta = json.loads(str(data["meta"]))
    step, image, position = data["pred_index"].T
    draws = np.zeros((2, 16, 16, data["noise"].shape[1] + 1), np.float32)
    draws[image, position, :, 0] = data["x_init"]
    draws[image, position, :, 1:] = data["noise"].swapaxes(1, 2)
    records: list[StepRecord] = []
    tokens = sample(
        model,
        tensor(data["labels"], torch.int64),
        guidance_scale=meta["cfg"],
        cfg_schedule=meta["cfg_schedule"],
        temperature=meta["temperature"],
        num_iter=meta["num_iter"],
        sampling_steps=meta["num_sampling_steps"],
        noise=SimpleNamespace(order=data["orders"], draws=draws),
        record=records.append,
    )
    assert_near(tokens, data["final_tokens"], f64=1e-10, f32=3e-4)
    assert_near(unpatchify(tokens, 1), data["final_latent"], f64=1e-10, f32=3e-4)
    assert [record.step.count for record in records] == data["tokens_per_step"].tolist()
    if dtype == torch.float32:
        return
    for number, record in enumerate(records):
        rows = np.nonzero(step == number)[0]
        places = {(int(image[row]), int(position[row])): row for row in rows}
        where = record.positions.tolist()
        order = [places[i, place] for i in range(2) for place in where[i]]
        assert record.guidance_scale.tolist() == pytest.approx([float(data["cfg_iter"][number])] * 2, abs=1e-6)
        assert_near(record.z_cond, data["z_cond"][order])
        assert (record.z_uncond is None) == (meta["cfg"] == 1)
        if record.z_uncond is not None:
            assert_near(record.z_uncond, data["z_uncond"][order])


def test_temperature_scales_the_steps_noise_alone(golden: Path) -> None:
    """Temperature towards 0 still depends on the initial noise."""
    model = load_arinar(golden / "tiny_mar" / "weights.safetensors", config=TINY_MAR.replace(sampling_steps="10"))
    one, other = (
        sample(model, torch.tensor([1]), guidance_scale=1.0, temperature=1e-6, num_iter=1, seed=seed) for seed in (0, 1)
    )
    assert (one - other).abs().max() > 0.1


# ----------------------------------------------------------------------------------------------------- law


def test_divergence_of_gaussians_in_closed_form() -> None:
    generator = np.random.default_rng(0)
    p, q = ((generator.normal(size=(5, 3)), generator.normal(size=(5, 3)) * 0.3) for _ in range(2))
    found = gaussian_kl(p, q)
    made = p[0] + np.exp(0.5 * p[1]) * generator.normal(size=(200_000, 5, 3))

    def log_density(x: np.ndarray, parts: tuple[np.ndarray, ...]) -> np.ndarray:
        return -0.5 * ((x - parts[0]) ** 2 * np.exp(-parts[1]) + parts[1]).sum(-1)

    assert np.allclose(found, (log_density(made, p) - log_density(made, q)).mean(0), rtol=0.02)
    assert np.array_equal(gaussian_kl(p, p), np.zeros(5))
    tiny = (p[0], p[1] + 1e-9)
    assert (gaussian_kl(p, tiny) >= 0).all()


def test_forced_states_depend_on_the_row_alone() -> None:
    tokens = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    states = forced_states(tokens, "25")
    assert states.shape == (6, 25, 16)
    assert np.array_equal(states[4:], forced_states(tokens[4:], "25"))
    assert np.abs(states[:, -1] - tokens).max() < 0.2  # the last step's state is nearly the token


def test_noise_of_the_law() -> None:
    config = TINY_MAR.replace(sampling_steps="25-5")
    assert LAW.size(config) == 26
    made = LAW.make(np.random.default_rng(0), (16, 16, 26))
    assert made.dtype == np.float32 and abs(float(made.std()) - 1) < 0.02
    with pytest.raises(ValueError, match="not finite"):
        LAW.check(np.array([1.0, np.nan]))
