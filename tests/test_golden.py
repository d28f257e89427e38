"""Fidelity: the model, the schedule and the autoencoder against tensors of the published implementation.

float64 within 1e-12 (uint8 exactly), float32 within 1e-5. What the arrays are: golden/README.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from arinar.checkpoint import load_arinar, load_vae
from arinar.config import PRESETS, VAE_PRESETS, ArinarConfig
from arinar.inner import Mixture, log_density
from arinar.model import Arinar, denormalize, unpatchify
from arinar.sampler import StepRecord, sample
from arinar.schedule import guidance_at, mask_counts, steps
from arinar.vae import AutoencoderKL, posterior, to_uint8

DTYPES = [torch.float64, torch.float32]
VARIANTS = {"v1": 4, "head": 16}  # inner heads
TRAJECTORIES = [
    "v1_cfg1",
    "v1_cfg4p5",
    "v1_cfg3p9_t1p1",
    "head_cfg1",
    "head_cfg4p5",
    "head_cfg3p9_t1p1",
    "head_cfg2const_t0p9",
]
WITH_PROPOSALS = ["v1_cfg3p9_t1p1", "head_cfg4p5", "head_cfg3p9_t1p1"]
TINY = ArinarConfig(
    img_size=16,
    vae_stride=4,
    num_classes=10,
    buffer_size=8,
    encoder_width=64,
    encoder_depth=2,
    encoder_heads=4,
    decoder_width=64,
    decoder_depth=2,
    decoder_heads=4,
    inner_width=64,
    inner_depth=2,
    default_num_iter=8,
)


def tiny(golden: Path, variant: str, dtype: torch.dtype) -> Arinar:
    heads = VARIANTS[variant]
    model = load_arinar(golden / "tiny_masked" / "weights.safetensors", config=TINY, inner_heads=heads)
    return model.to(dtype)


def arrays(golden: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(golden / name) as file:
        return {key: file[key] for key in file.files}


def tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


def assert_close(actual: Tensor, reference: np.ndarray, name: str = "", rtol: float = 0.0) -> None:
    """1e-12 in float64 and 1e-5 in float32, absolute, or relative where ``rtol`` is 1."""
    atol = 1e-12 if actual.dtype == torch.float64 else 1e-5
    assert actual.shape == reference.shape, name
    error = np.abs(actual.detach().double().numpy() - reference)
    if rtol:
        error = error / np.maximum(np.abs(reference), 1.0)
    worst = float(error.max(initial=0.0))
    assert worst <= atol, f"{name}: max_abs_err {worst:.2e}, allowed {atol:.0e}"


def suffix(dtype: torch.dtype) -> str:
    return "f64" if dtype == torch.float64 else "f32"


# ------------------------------------------------------------------------------------------------- manifests


PUBLISHED = {
    "mar_base_v1_k4": PRESETS["base-v1"],
    "mar_large_v1_k4": PRESETS["large-v1"],
    "mar_huge_v1_k4": PRESETS["huge-v1"],
    "mar_base_k4_w768_d1": PRESETS["base"],
    "mar_base_k4_w1024_d1": PRESETS["base"].replace(inner_width=1024),
    "mar_large_k4_w1024_d1": PRESETS["large"],
    "mar_huge_k4_w1024_d1": PRESETS["huge"],
    "mar_base_k1_w1024_d1_cli_default": PRESETS["base"].replace(inner_width=1024, num_gaussians=1),
    "diffloss_mar_base_d6_w1024": PRESETS["mar_base"],
    "diffloss_mar_large_d8_w1280": PRESETS["mar_large"],
    "diffloss_mar_huge_d12_w1536": PRESETS["mar_huge"],
}


def entries(module: torch.nn.Module) -> list[tuple[str, list[int], str, str]]:
    buffers = {name for name, _ in module.named_buffers()}
    return [
        (
            name,
            list(value.shape),
            str(value.dtype).removeprefix("torch."),
            "buffer" if name in buffers else "parameter",
        )
        for name, value in module.state_dict().items()
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_order_of_every_published_model(golden: Path, name: str) -> None:
    manifest = json.loads((golden / "manifest" / f"{name}.json").read_text())
    with torch.device("meta"):
        model = Arinar(PUBLISHED[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == manifest["total_parameters"]
    assert entries(model) == [(e["name"], e["shape"], e["dtype"], e["kind"]) for e in manifest["entries"]]
    if PUBLISHED[name].head == "gmm":
        assert PUBLISHED[name].inner_heads == manifest["inner_num_heads"]
    assert PUBLISHED[name].encoder_heads == PUBLISHED[name].decoder_heads == manifest["outer_num_heads"]


def test_every_manifest_is_tested(golden: Path) -> None:
    names = {path.stem for path in (golden / "manifest").glob("*.json")}
    assert names == {*PUBLISHED, "vae_kl16", "schedules"}


def test_parameter_counts() -> None:
    with torch.device("meta"):
        base, vae = Arinar(PRESETS["base"]), AutoencoderKL(VAE_PRESETS["kl16"])
    assert sum(parameter.numel() for parameter in base.parameters()) == 212_949_516
    assert sum(parameter.numel() for parameter in vae.parameters()) == 66_456_019


def test_names_shapes_and_order_of_the_published_autoencoder(golden: Path) -> None:
    manifest = json.loads((golden / "manifest" / "vae_kl16.json").read_text())
    with torch.device("meta"):
        vae = AutoencoderKL(VAE_PRESETS["kl16"])
    assert entries(vae) == [(e["name"], e["shape"], e["dtype"], e["kind"]) for e in manifest["entries"]]


# ----------------------------------------------------------------------------------------------------- outer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", range(8))
def test_outer(golden: Path, case: int, dtype: torch.dtype) -> None:
    model, data = tiny(golden, "head", dtype), arrays(golden, "tiny_masked/outer.npz")
    tokens, mask = (tensor(data[f"case{case}_{name}"], dtype) for name in ("tokens", "mask"))
    labels = tensor(data[f"case{case}_labels"], torch.int64)
    visible = torch.stack([row.eq(0).nonzero()[:, 0] for row in mask])
    with torch.no_grad():
        encoded = model.encode(tokens, visible, labels)  # type: ignore[operator]
        z = model.condition(tokens, mask, labels)
    assert_close(encoded, data[f"case{case}_encoder_out_{suffix(dtype)}"], "outer encoder_out")
    assert_close(z, data[f"case{case}_z_{suffix(dtype)}"], "outer z")


def test_unpatchify(golden: Path) -> None:
    data = arrays(golden, "tiny_masked/outer.npz")
    assert_close(unpatchify(tensor(data["unpatchify_in"], torch.float64), 1), data["unpatchify_out"], "unpatchify")


# ----------------------------------------------------------------------------------------------------- inner


def assert_mixture(mixture: Mixture, data: dict[str, np.ndarray], ending: str, name: str) -> None:
    for field, value in zip(Mixture._fields, mixture, strict=True):
        assert_close(value, data[f"{field}{ending}"], f"{name} {field}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_inner_mixtures(golden: Path, variant: str, dtype: torch.dtype) -> None:
    model, data = tiny(golden, variant, dtype), arrays(golden, f"tiny_masked/inner_{variant}.npz")
    z, features = tensor(data["z"], dtype), tensor(data["features"], dtype)
    stepped, cache = [], None
    with torch.no_grad():
        whole = model.mixture(z, features)
        for position in range(features.shape[1]):
            previous = features[:, position - 1 : position] if position else None
            mixture, cache = model.arhead.step(z, previous, position, cache)
            stepped.append(mixture)
    assert_mixture(whole, data, f"_{suffix(dtype)}", "inner full sequence")
    columns = Mixture(*(torch.stack(values, 1) for values in zip(*stepped, strict=True)))
    assert_mixture(columns, data, f"_{suffix(dtype)}", "inner stepped")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_likelihoods(golden: Path, variant: str, dtype: torch.dtype) -> None:
    model, data = tiny(golden, variant, dtype), arrays(golden, f"tiny_masked/inner_{variant}.npz")
    outer = arrays(golden, "tiny_masked/outer.npz")
    z, features, row_mask = (tensor(data[name], dtype) for name in ("z", "features", "row_mask"))
    with torch.no_grad():
        loglik = log_density(features, model.mixture(z, features))
        # Sums over features and rows: float32 is held to its relative precision.
        assert_close(loglik, data["loglik_features_f64"], "loglik", rtol=1.0)
        assert_close(model.nll(z, features), data["nll_rows_f64"], "nll rows", rtol=1.0)
        assert_close(model.nll(z, features, row_mask), data["masked_mean_nll_f64"], "masked mean nll", rtol=1.0)
        for case in range(8):
            tokens, mask = (tensor(outer[f"case{case}_{name}"], dtype) for name in ("tokens", "mask"))
            case_z = model.condition(tokens, mask, tensor(outer[f"case{case}_labels"], torch.int64))
            loss = model.nll(case_z.flatten(0, 1), tokens.flatten(0, 1), mask.flatten())
            assert_close(loss, data[f"outer_case{case}_loss_f64"], "outer case loss", rtol=1.0)


# ---------------------------------------------------------------------------------------- whole trajectories


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", TRAJECTORIES)
def test_trajectory(golden: Path, run: str, dtype: torch.dtype) -> None:
    """The reference sampler, the recorded tokens forced, against every recorded array."""
    data = arrays(golden, f"tiny_masked/traj_{run}.npz")
    meta = json.loads(str(data["meta"]))
    model = tiny(golden, meta["variant"], dtype)
    # The first public version divides the std by the temperature.
    temperature = 1.0 / meta["temperature"] if meta["variant"] == "v1" else meta["temperature"]
    guided = meta["cfg"] != 1.0
    final = tensor(data["final_tokens"], dtype)

    records: list[StepRecord] = []
    tokens = sample(
        model,
        tensor(data["labels"], torch.int64),
        guidance_scale=meta["cfg"],
        cfg_schedule=meta["cfg_schedule"],
        temperature=temperature,
        num_iter=meta["num_iter"],
        forced=final,
        record=records.append,
        noise=SimpleNamespace(order=data["orders"], draws=np.zeros((*final.shape, 1), np.float32)),
    )
    assert_close(tokens, data["final_tokens"], "trajectory tokens")
    assert_close(unpatchify(tokens, 1), data["final_latent"], "trajectory latent")
    assert [record.step.count for record in records] == data["tokens_per_step"].tolist()

    first_row = 0
    known = torch.zeros_like(final)
    for record, mask_in, tokens_in, cfg_iter in zip(records, data["mask_in"], data["tokens_in"], data["cfg_iter"], strict=True):
        # The published schedule computes guidance in float32.
        assert record.guidance_scale.tolist() == pytest.approx([float(cfg_iter)] * len(final), abs=1e-6)
        assert (mask_in.sum(1) == record.step.masked).all()
        assert_close(known, tokens_in, "trajectory tokens at step start")
        # The recording sorts a step's rows by sample, then position; ours follow the order of generation.
        batch, count = record.positions.shape
        by_position = record.positions.argsort(1)
        rows = (by_position + torch.arange(batch)[:, None] * count).flatten()
        recorded = slice(first_row, first_row + batch * count)
        first_row += batch * count
        index = data["pred_index"][recorded]
        assert (index[:, 0] == record.step.index).all()
        assert index[:, 1].tolist() == [image for image in range(batch) for _ in range(count)]
        assert index[:, 2].tolist() == record.positions.flatten()[rows].tolist()

        assert_close(record.z_cond[rows], data["z_cond"][recorded], "trajectory z")
        assert_close(record.features[rows], data["value"][recorded], "trajectory features")
        cond = Mixture(*(value[rows] for value in record.cond))
        for field, value in zip(Mixture._fields, cond, strict=True):
            assert_close(value, data[f"{field}_cond"][recorded], f"trajectory {field}")
        assert (record.uncond is not None) == guided
        if record.uncond is not None and record.z_uncond is not None:
            assert_close(record.z_uncond[rows], data["z_uncond"][recorded], "trajectory z")
            for field, value in zip(Mixture._fields, (part[rows] for part in record.uncond), strict=True):
                assert_close(value, data[f"{field}_uncond"][recorded], f"trajectory {field}")

        component = tensor(data["component"][recorded], torch.int64)[..., None]
        mu, logvar = (part.gather(-1, component)[..., 0] for part in (cond.mu, cond.logvar))
        drawn = mu + torch.exp(0.5 * logvar) * temperature * tensor(data["eps"][recorded], dtype)
        assert_close(drawn, data["value"][recorded], "trajectory value from component and eps", rtol=1.0)

        images = torch.arange(batch)[:, None]
        known[images, record.positions] = final[images, record.positions]
    assert first_row == len(data["pred_index"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", WITH_PROPOSALS)
def test_selection_among_proposals(golden: Path, run: str, dtype: torch.dtype) -> None:
    """Log densities of the first step's proposals, which decide the pick; the recorded pick is among them."""
    data = arrays(golden, f"tiny_masked/traj_{run}.npz")
    rows = len(data["ll_cond"])
    proposals = tensor(data["proposals"][:rows], dtype)
    chances = {}
    for branch in ("cond", "uncond"):
        # Mixture parameters (R, D, K) meet proposals (R, D, 1000).
        mixture = Mixture(*(tensor(data[f"{f}_{branch}"][:rows], dtype)[:, :, None] for f in Mixture._fields))
        chances[branch] = log_density(proposals, mixture)
        assert_close(chances[branch], data[f"ll_{branch}"], "proposal log density", rtol=1.0)
    scale = float(data["cfg_iter"][0])
    probability = torch.softmax((chances["cond"] - chances["uncond"]) * (scale - 1), -1)
    reference = torch.softmax(torch.from_numpy(data["ll_cond"] - data["ll_uncond"]) * (scale - 1), -1).numpy()
    assert_close(probability, reference, "selection probability")
    selected = tensor(data["selected"][:rows], torch.int64)[..., None]
    assert_close(proposals.gather(-1, selected)[..., 0], data["value"][:rows], "selected value", rtol=1.0)


# ------------------------------------------------------------------------------------------------- schedules


def test_schedules_exactly(golden: Path) -> None:
    schedules = json.loads((golden / "manifest" / "schedules.json").read_text())
    assert len(schedules) > 3
    tested = 0
    for case in schedules:
        length, num_iter = case["seq_len"], case["num_iter"]
        if num_iter > length:  # the published loop fails there, ours refuses
            assert case["steps_with_no_token"]
            with pytest.raises(ValueError, match=f"num_iter is {num_iter}; expected 1..{length}"):
                steps(length, num_iter)
            continue
        plan = steps(length, num_iter)
        assert mask_counts(length, num_iter) == case["masked_at_step_start"]
        assert [step.masked for step in plan] == case["masked_at_step_start"]
        assert [step.count for step in plan] == case["tokens_per_step"]
        # The published mask length never falls below 1; what remains after the last step is 0.
        assert [max(step.remaining, 1) for step in plan] == case["mask_len"]
        # Computed in float32 there.
        float32 = np.float32(1) + np.float32(3.5) * (length - np.float32(case["mask_len"])) / np.float32(length)
        assert float32.tolist() == case["cfg_iter_for_cfg_4p5"]
        guidance = [guidance_at(step, length, 4.5, "linear") for step in plan]
        np.testing.assert_allclose(guidance, case["cfg_iter_for_cfg_4p5"], rtol=2e-7)
        assert {guidance_at(step, length, 4.5, "constant") for step in plan} == {4.5}
        tested += 1
    assert tested


# ----------------------------------------------------------------------------------------------- autoencoder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autoencoder(golden: Path, dtype: torch.dtype) -> None:
    vae = load_vae(golden / "tiny_vae" / "weights.safetensors").to(dtype)
    data = arrays(golden, "tiny_vae/reference.npz")
    with torch.no_grad():
        for case in range(2):
            image = vae.decode(tensor(data[f"dec{case}_z"], dtype))
            assert_close(image, data[f"dec{case}_image_{suffix(dtype)}"], "vae decode")
            moments = vae.encode(tensor(data[f"enc{case}_x"], dtype))
            assert_close(moments, data[f"enc{case}_moments_{suffix(dtype)}"], "vae encode")
            mean, std = posterior(moments)
            assert_close(mean, data[f"enc{case}_mean_f64"], "vae posterior")
            assert_close(std, data[f"enc{case}_std_f64"], "vae posterior", rtol=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_latent_to_image(golden: Path, dtype: torch.dtype) -> None:
    vae = load_vae(golden / "tiny_vae" / "weights.safetensors").to(dtype)
    data = arrays(golden, "tiny_vae/pipeline.npz")
    latents = denormalize(tensor(data["latent"], dtype), TINY)
    with torch.no_grad():
        image = vae.decode(latents)
    pixels = to_uint8(image).numpy()
    assert_close(image, data[f"image_{suffix(dtype)}"], "pipeline image")
    if dtype == torch.float64:
        assert_close(latents, data["vae_input_f64"], "pipeline vae input")
        np.testing.assert_array_equal(pixels, data["rgb_uint8"])
    else:
        assert np.abs(pixels.astype(int) - data["rgb_uint8"]).max() <= 1
