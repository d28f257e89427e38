"""The model's own promises: caches equal full passes, nothing leaks, configs and weights survive copying."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arinar.config import PRESETS, VAE_PRESETS, ArinarConfig, VaeConfig
from arinar.gmm_head import draw_guided, draw_plain
from arinar.inner import Mixture
from arinar.mixture_law import NUM_CANDIDATES
from arinar.model import (
    Arinar,
    CausalArinar,
    MaskedArinar,
    denormalize,
    initialize,
    normalize,
    patchify,
    unpatchify,
)
from arinar.sampler import sample

MASKED = ArinarConfig(
    img_size=16,
    vae_stride=4,
    num_classes=5,
    buffer_size=3,
    vae_embed_dim=6,
    encoder_width=24,
    encoder_depth=2,
    encoder_heads=2,
    decoder_width=32,
    decoder_depth=2,
    decoder_heads=4,
    inner_width=16,
    inner_depth=2,
    inner_heads=4,
    num_gaussians=3,
    default_num_iter=4,
)
CAUSAL = MASKED.replace(outer="causal", encoder_depth=0, decoder_depth=3)
PERMUTED = CAUSAL.replace(order=tuple(int(i) for i in np.random.default_rng(0).permutation(16)))


def random_model(config: ArinarConfig, seed: int = 0) -> Arinar:
    """float64, every parameter drawn at a scale where it shows (fresh biases and gates would be zero)."""
    model = Arinar(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise)
    return model


def random_tokens(config: ArinarConfig, batch: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.seq_len, config.token_dim, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- causal outer


@pytest.mark.parametrize("config", [CAUSAL, PERMUTED], ids=["raster", "permuted"])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_causal_cache_equals_full_pass(config: ArinarConfig, batch: int) -> None:
    model = random_model(config)
    assert isinstance(model, CausalArinar)
    tokens = random_tokens(config, batch)
    labels = torch.tensor([2, -1, 0])[:batch]
    whole = model.condition(tokens, None, labels)
    order = config.generation_order

    z, cache = model.prefill(labels)
    torch.testing.assert_close(z[:, 0], whole[:, order[0]], rtol=0, atol=1e-12)
    for index in range(config.seq_len - 1):
        z, cache = model.step(tokens[:, order[index]][:, None], index, cache)
        torch.testing.assert_close(z[:, 0], whole[:, order[index + 1]], rtol=0, atol=1e-12)
    assert cache[0][0].shape[2] == config.buffer_size + config.seq_len - 1


@torch.no_grad()
def test_causal_z_ignores_later_tokens() -> None:
    model, order = random_model(PERMUTED), PERMUTED.generation_order
    labels = torch.tensor([1])
    tokens = random_tokens(PERMUTED, 1)
    before = model.condition(tokens, None, labels)
    for index in (0, 7, 15):
        changed = tokens.clone()
        changed[:, list(order[index:])] += 1.0
        after = model.condition(changed, None, labels)
        same, later = list(order[: index + 1]), list(order[index + 1 :])
        torch.testing.assert_close(after[:, same], before[:, same], rtol=0, atol=0)
        assert all((after[:, position] != before[:, position]).any() for position in later)


@torch.no_grad()
def test_causal_cache_overrun() -> None:
    model = random_model(CAUSAL)
    assert isinstance(model, CausalArinar)
    _, cache = model.prefill(torch.tensor([0]))
    token = torch.zeros(1, 1, CAUSAL.token_dim, dtype=torch.float64)
    for index in (-1, 15, 16):
        with pytest.raises(ValueError, match=f"KV cache overrun: step {index} of a model of 16 tokens"):
            model.step(token, index, cache)
    with pytest.raises(ValueError):  # the cache of another depth
        model.step(token, 0, cache[:-1])


@torch.no_grad()
def test_inner_cache_overrun() -> None:
    model = random_model(MASKED)
    z = torch.zeros(2, MASKED.z_width, dtype=torch.float64)
    for position in (-1, 6):
        with pytest.raises(ValueError, match=f"KV cache overrun: feature {position} of 6"):
            model.arhead.step(z, None, position, None)
    for feature, cache in ((None, []), (torch.zeros(2, 1, dtype=torch.float64), None)):
        with pytest.raises(ValueError, match=r"feature 3 needs the one before it and the cache of 0\.\.2"):
            model.arhead.step(z, feature, 3, cache)


@torch.no_grad()
def test_causal_forced_sampling_gives_the_full_pass() -> None:
    model = random_model(PERMUTED)
    tokens, labels = random_tokens(PERMUTED, 2), torch.tensor([3, 4])
    conditions: dict[int, Tensor] = {}
    unconditional: dict[int, Tensor] = {}

    def keep(record: object) -> None:
        positions, z_cond = record.positions, record.z_cond  # type: ignore[attr-defined]
        assert (positions == positions[0]).all() and positions.shape == (2, 1)
        conditions[int(positions[0, 0])] = z_cond
        unconditional[int(positions[0, 0])] = record.z_uncond  # type: ignore[attr-defined]

    out = sample(model, labels, guidance_scale=2.0, seed=0, forced=tokens, record=keep)
    torch.testing.assert_close(out, tokens, rtol=0, atol=0)
    for found, asked in ((conditions, labels), (unconditional, torch.tensor([-1, -1]))):
        stacked = torch.stack([found[position] for position in range(16)], 1)
        torch.testing.assert_close(stacked, model.condition(tokens, None, asked), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="num_iter is 4; a causal model generates one token a step: 16"):
        sample(model, labels, guidance_scale=1.0, num_iter=4)


# ---------------------------------------------------------------------------------------------- masked outer


@torch.no_grad()
def test_masked_z_ignores_values_at_masked_positions() -> None:
    model, tokens = random_model(MASKED), random_tokens(MASKED, 2)
    mask = torch.zeros(2, 16, dtype=torch.float64)
    mask[0, ::2] = 1
    mask[1, :8] = 1
    labels = torch.tensor([0, -1])
    before = model.condition(tokens, mask, labels)
    hidden = model.condition(torch.where(mask[..., None] == 1, 1e6, tokens), mask, labels)
    torch.testing.assert_close(hidden, before, rtol=0, atol=0)
    seen = model.condition(torch.where(mask[..., None] == 0, tokens + 1, tokens), mask, labels)
    assert ((seen - before).abs().amax((1, 2)) > 1e-3).all()


@torch.no_grad()
def test_masked_rows_do_not_see_each_other() -> None:
    model, tokens = random_model(MASKED), random_tokens(MASKED, 3)
    order = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)).argsort(1)
    mask = (order < 9).double()
    labels = torch.tensor([4, -1, 1])
    together = model.condition(tokens, mask, labels)
    for row in range(3):
        alone = model.condition(tokens[row : row + 1], mask[row : row + 1], labels[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1], rtol=0, atol=1e-12)


def test_masked_rows_must_agree_in_number() -> None:
    mask = torch.ones(2, 16)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match=r"mask leaves \[1, 0\] tokens visible per image"):
        random_model(MASKED).condition(random_tokens(MASKED, 2), mask, torch.tensor([0, 1]))


# -------------------------------------------------------------------------------------------- inner and loss


@pytest.mark.parametrize("rows", [1, 5])
@torch.no_grad()
def test_inner_cache_equals_full_pass(rows: int) -> None:
    model = random_model(MASKED)
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(rows, MASKED.z_width, generator=generator, dtype=torch.float64)
    features = torch.randn(rows, MASKED.token_dim, generator=generator, dtype=torch.float64)
    whole, cache = model.mixture(z, features), None
    for position in range(MASKED.token_dim):
        previous = features[:, position - 1 : position] if position else None
        mixture, cache = model.arhead.step(z, previous, position, cache)
        for stepped, full in zip(mixture, whole, strict=True):
            torch.testing.assert_close(stepped, full[:, position], rtol=0, atol=1e-12)
    # Feature j does not influence its own mixture nor those before it.
    changed = features.clone()
    changed[:, 3:] += 1
    for after, full in zip(model.mixture(z, changed), whole, strict=True):
        torch.testing.assert_close(after[:, :4], full[:, :4], rtol=0, atol=0)
        assert (after[:, 4:] != full[:, 4:]).any()


@pytest.mark.parametrize("config", [MASKED, CAUSAL], ids=["masked", "causal"])
def test_training_loss_is_seeded_and_reaches_every_parameter(config: ArinarConfig) -> None:
    model = random_model(config).train()
    latents = torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3])

    def loss() -> Tensor:
        value: Tensor = model(latents, labels, label_drop=0.5, generator=torch.Generator().manual_seed(5))
        return value

    first = loss()
    assert first.ndim == 0 and torch.equal(first, loss())
    torch.autograd.backward(first)
    # Nothing of the network is out of the loss' reach (a causal model hides nothing, so has no mask token).
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_training_mask() -> None:
    model = random_model(MASKED)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        mask = model.training_mask(3, generator)
        assert mask.shape == (3, 16) and bool(((mask == 0) | (mask == 1)).all())
        counts = mask.sum(1)
        assert (counts == counts[0]).all() and 12 <= counts[0] <= 16  # ceil(0.7 * 16) = 12
    assert bool(random_model(CAUSAL).training_mask(2, generator).eq(1).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 0.9}, r"guidance_scale is 0\.9"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": 1.0, "temperature": 0.0}, r"temperature is 0\.0"),
        ({"guidance_scale": 1.0, "temperature": float("nan")}, "temperature is nan"),
        ({"guidance_scale": 1.0, "num_iter": 17}, r"num_iter is 17; expected 1\.\.16"),
        ({"guidance_scale": 1.0, "num_iter": 0}, r"num_iter is 0; expected 1\.\.16"),
        ({"guidance_scale": 2.0, "cfg_schedule": "cosine"}, "choose one of linear, constant"),
    ],
)
def test_sampler_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(random_model(MASKED), torch.tensor([0]), **arguments)


@pytest.mark.parametrize("config", [MASKED, PERMUTED], ids=["masked", "causal"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sampler_is_seeded(config: ArinarConfig, guidance_scale: float) -> None:
    model, labels = random_model(config), torch.tensor([0, 3])
    first, again, other = (sample(model, labels, guidance_scale=guidance_scale, seed=s) for s in (0, 0, 1))
    assert first.shape == (2, 16, 6) and bool(first.isfinite().all())
    assert torch.equal(first, again) and not torch.equal(first, other)


# -------------------------------------------------------------------------------------------- latents, shapes


@pytest.mark.parametrize("patch_size", [1, 2])
def test_patchify_and_back(patch_size: int) -> None:
    latents = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    tokens = patchify(latents, patch_size)
    assert tokens.shape == (2, (4 // patch_size) ** 2, 3 * patch_size**2)
    torch.testing.assert_close(unpatchify(tokens, patch_size), latents, rtol=0, atol=0)
    # Token 1 is the second of the top row; its features run over channel, row, column.
    top = latents[0, :, :patch_size, patch_size : 2 * patch_size]
    torch.testing.assert_close(tokens[0, 1], top.flatten(), rtol=0, atol=0)


@torch.no_grad()
def test_patch_size_2_model() -> None:
    config = MASKED.replace(patch_size=2, img_size=32)
    model = random_model(config)
    assert (config.seq_len, config.token_dim) == (16, 24)
    latents = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.isfinite(model(latents, torch.tensor([0, 1])))


def test_normalize_and_back() -> None:
    latents = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scalar = MASKED
    torch.testing.assert_close(normalize(latents, scalar), latents * 0.2325, rtol=0, atol=0)
    channels = MASKED.replace(latent_scale=(1, 2, 3, 4, 5, 6), latent_shift=(0, 1, 0, 1, 0, 1))
    normal = normalize(latents, channels)
    torch.testing.assert_close(normal[:, 3], (latents[:, 3] - 1) * 4, rtol=0, atol=1e-12)
    for config in (scalar, channels):
        torch.testing.assert_close(denormalize(normalize(latents, config), config), latents, rtol=0, atol=1e-12)


# -------------------------------------------------------------------------------------- published guided draw


# Pairs that resemble each other (below 96) and unrelated ones, at both scales of temperature.
@pytest.mark.parametrize(("pair", "std_scale"), [(0, 1 / 1.1), (41, 1.1), (102, 1.0)])
@pytest.mark.parametrize("guidance_scale", [1.0, 1.5, 3.0, 4.5])
def test_guided_draw_follows_the_published_law(golden: Path, pair: int, std_scale: float, guidance_scale: float) -> None:
    with np.load(golden / "gmm_cfg" / "gmm_cfg.npz") as file:
        data = {key: file[key] for key in file.files}
    (row,) = np.flatnonzero(np.isclose(data["std_scale"], std_scale))
    (column,) = np.flatnonzero(np.isclose(data["cfg"], guidance_scale))
    count = 1500
    cond, uncond = (
        Mixture(*(torch.from_numpy(data[f"{f}_{branch}"][pair]).expand(count, -1) for f in Mixture._fields))
        for branch in ("cond", "uncond")
    )
    generator = torch.Generator().manual_seed(pair)
    if guidance_scale == 1.0:
        drawn = draw_plain(cond, torch.full((count,), std_scale), generator)
    else:
        scale, temperature = (torch.full((count,), value) for value in (guidance_scale, std_scale))
        drawn = draw_guided(cond, uncond, scale, temperature, generator)
    assert drawn.shape == (count,)
    quantiles = data["quantiles"][pair, row, column]
    below = (drawn.numpy()[:, None] <= quantiles).mean(0)
    allowed = 4 * np.sqrt(0.25 / count + data["cdf_se"][pair, row, column] ** 2)
    assert np.abs(below - data["levels"]).max() <= allowed


def test_draws_are_seeded() -> None:
    mixture = Mixture(torch.tensor([[0.3, 0.7]]), torch.tensor([[-1.0, 1.0]]), torch.zeros(1, 2))
    first, again = (draw_plain(mixture, torch.ones(1), torch.Generator().manual_seed(0), 7) for _ in range(2))
    assert first.shape == (7, 1) and torch.equal(first, again)
    assert NUM_CANDIDATES == 1000


# ----------------------------------------------------------------------------------------- copies and configs


@pytest.mark.parametrize("config", [MASKED, PERMUTED], ids=["masked", "causal"])
@torch.no_grad()
def test_deepcopy_and_state_dict(config: ArinarConfig) -> None:
    model = random_model(config)
    kind = MaskedArinar if config.outer == "masked" else CausalArinar
    twin = copy.deepcopy(model)
    other = Arinar(config).double().eval()
    other.load_state_dict(model.state_dict())
    assert type(model) is type(twin) is type(other) is kind
    arguments = random_tokens(config, 2), torch.zeros(2, 16), torch.tensor([1, -1])
    z = model.condition(*arguments)
    for copied in (twin, other):
        assert torch.equal(copied.condition(*arguments), z)
    next(twin.parameters()).add_(1.0)
    assert torch.equal(model.condition(*arguments), z)  # a copy shares nothing


def test_initialize_is_seeded() -> None:
    models = [initialize(Arinar(CAUSAL), seed) for seed in (0, 0, 1)]
    states = [torch.cat([value.flatten() for value in model.state_dict().values()]) for model in models]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize("config", [*PRESETS.values(), PERMUTED, MASKED], ids=lambda config: config.outer)
def test_config_json(config: ArinarConfig) -> None:
    changed = config.replace(latent_scale=tuple(range(1, config.vae_embed_dim + 1)), latent_shift=0.5)
    for each in (config, changed):
        assert ArinarConfig.from_json(each.to_json()) == each
        assert ArinarConfig.from_dict(each.to_dict()) == each


@pytest.mark.parametrize("config", VAE_PRESETS.values())
def test_vae_config_json(config: VaeConfig) -> None:
    assert VaeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outer": "both"}, "outer is 'both'; choose one of masked, causal"),
        ({"img_size": 17}, "img_size 17 is not a multiple"),
        ({"inner_heads": 5}, "inner_width 16 is not divisible by inner_heads 5"),
        ({"encoder_heads": 7}, "encoder_width 24 is not divisible by encoder_heads 7"),
        ({"latent_scale": (1.0, 2.0)}, "latent_scale has 2 values"),
        ({"order": tuple(range(16))}, "order is a causal model's"),
        ({"class_names": ("a",)}, "1 class_names for 5 classes"),
        ({"outer": "causal"}, "encoder_depth is 2, expected 0"),
    ],
)
def test_config_errors(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MASKED.replace(**changes)


@pytest.mark.parametrize(
    ("order", "message"),
    [((0, 1, 2), "order has 3 positions; expected 16"), ((0,) * 16, "not a permutation of 0..15")],
)
def test_wrong_order(order: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CAUSAL.replace(order=order)


def test_unknown_config_entry() -> None:
    with pytest.raises(ValueError, match="unknown entries flavour, shape"):
        ArinarConfig.from_dict({**MASKED.to_dict(), "shape": 1, "flavour": 2})


def test_vae_config_errors() -> None:
    with pytest.raises(ValueError, match="not divisible by norm_groups 32"):
        VaeConfig(channels=20)
