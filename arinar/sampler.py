"""The reference sampler: the published algorithm step by step in plain PyTorch, which parity is measured against.

Nothing here is optimised: conditioning is recomputed for each feature, every position goes through the last block,
guidance draws 1000 proposals, as the published code does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .inner import Mixture, log_density
from .mixture import draw_mixture
from .mixture_law import NUM_CANDIDATES
from .model import Arinar, CausalArinar
from .schedule import Step, steps


class NoiseLike(Protocol):
    """Every random number of a batch: what `arinar.runtime.Noise` holds."""

    @property
    def order(self) -> Any: ...  # (B, L) int64
    @property
    def uniforms(self) -> Any: ...  # (B, L, D, NUM_UNIFORMS) float32, by position in the grid


@dataclass
class StepRecord:
    """What one outer step computed; rows are (image, position), image by image. For parity and calibration.

    ``positions`` (B, P); ``z_cond``, ``z_uncond`` (B * P, C); ``cond``, ``uncond`` mixtures (B * P, D, K);
    ``features`` (B * P, D). ``*_uncond`` are None without guidance.
    """

    step: Step
    positions: Tensor
    z_cond: Tensor
    z_uncond: Tensor | None
    cond: Mixture
    uncond: Mixture | None
    features: Tensor


@torch.no_grad()
def sample(
    model: Arinar,
    labels: Tensor,
    *,
    guidance_scale: float,
    cfg_schedule: str = "linear",
    temperature: float = 1.0,
    num_iter: int | None = None,
    seed: int | None = None,
    noise: NoiseLike | None = None,
    order: Tensor | None = None,
    forced: Tensor | None = None,
    record: Callable[[StepRecord], None] | None = None,
) -> Tensor:
    """Generate tokens.

    Parameters
    ----------
    model : in ``eval()`` mode, any float dtype.
    labels : (B,) int64 class ids.
    guidance_scale : >= 1; exactly 1 runs no unconditional branch.
    temperature : > 0, multiplies the component std of the proposals.
    num_iter : outer steps, 1..L; None means the config's default. A causal model always takes L.
    seed : without ``noise``, draws are the published code's (1000 normal proposals per guided feature).
    noise : every random number, explicitly; draws then follow the deployed sampler (same law, a few uniforms per
        feature), so that a deployed pipeline given the same noise must produce the same tokens.
    order : (B, L) int64, of a masked model without ``noise``: the generation order, from its end to its start.
    forced : (B, L, D) tokens to use instead of the drawn ones (teacher forcing).
    record : called after each outer step.

    Returns
    -------
    tokens : (B, L, D), raster order.
    """
    config = model.config
    dtype, device = model.fake_latent.dtype, model.fake_latent.device
    labels = labels.to(device)
    batch, length = len(labels), config.seq_len
    causal = isinstance(model, CausalArinar)
    if num_iter is None:
        num_iter = length if causal else config.default_num_iter
    if causal and num_iter != length:
        raise ValueError(f"num_iter is {num_iter}; a causal model generates one token a step: {length}")
    if not (1 <= guidance_scale < math.inf and 0 < temperature < math.inf):  # NaN fails too
        raise ValueError(
            f"guidance_scale is {guidance_scale}, temperature is {temperature}; expected at least 1 and above 0, both finite"
        )
    plan = steps(length, num_iter, guidance_scale, cfg_schedule)
    generator = torch.Generator(device="cpu")
    if seed is not None:
        generator.manual_seed(seed)
    else:
        generator.seed()

    guided = guidance_scale != 1.0
    both_labels = torch.cat([labels, torch.full_like(labels, -1)]) if guided else labels
    if causal:
        order = torch.tensor([config.generation_order] * batch, device=device)
        # Generation runs from the end of `order` to its start; a causal model's order is given first to last.
        order = order.flip(1)
    elif noise is not None:
        order = torch.as_tensor(noise.order, device=device)
    elif order is None:
        order = torch.rand(batch, length, generator=generator).argsort(1).to(device)

    tokens = torch.zeros(batch, length, config.token_dim, dtype=dtype, device=device)
    rows = torch.arange(batch, device=device)[:, None]
    cache: Any = None
    for step in plan:
        positions = order[:, step.remaining : step.masked]  # (B, P)
        if causal:
            assert isinstance(model, CausalArinar)
            if step.index == 0:
                z, cache = model.prefill(both_labels)
            else:
                last = tokens[rows, order[:, step.masked : step.masked + 1]]  # (B, 1, D)
                z, cache = model.step(last.repeat(2 if guided else 1, 1, 1), step.index - 1, cache)
        else:
            mask = torch.zeros(batch, length, dtype=dtype, device=device)
            mask[rows, order[:, : step.masked]] = 1
            copies = 2 if guided else 1
            z = model.condition(tokens.repeat(copies, 1, 1), mask.repeat(copies, 1), both_labels)
            picked = positions.repeat(copies, 1)
            z = z[torch.arange(len(z), device=device)[:, None], picked]  # (2B, P, C)
        z = z.flatten(0, 1)  # (2BP, C)
        z_cond, z_uncond = z.chunk(2) if guided else (z, None)
        uniforms = None
        if noise is not None:
            uniforms = torch.as_tensor(noise.uniforms, device=device)[rows, positions].flatten(0, 1)
        target = None if forced is None else forced.to(device)[rows, positions].flatten(0, 1)
        features, cond, uncond = _sample_rows(
            model, z_cond, z_uncond, step.guidance_scale, temperature, generator, uniforms, target
        )
        tokens[rows, positions] = features.reshape(*positions.shape, -1)
        if record is not None:
            record(StepRecord(step, positions, z_cond, z_uncond, cond, uncond, features))
    return tokens


def _sample_rows(
    model: Arinar,
    z_cond: Tensor,
    z_uncond: Tensor | None,
    guidance_scale: float,
    temperature: float,
    generator: torch.Generator,
    uniforms: Tensor | None,
    forced: Tensor | None,
) -> tuple[Tensor, Mixture, Mixture | None]:
    """All features of M rows: z (M, C) -> features (M, D), the mixtures that they were drawn from (M, D, K)."""
    z = z_cond if z_uncond is None else torch.cat([z_cond, z_uncond])
    copies = 1 if z_uncond is None else 2
    feature, cache = None, None
    drawn: list[Tensor] = []
    conds: list[Mixture] = []
    unconds: list[Mixture] = []
    for position in range(model.config.token_dim):
        previous: Tensor | None = None if feature is None else feature.repeat(copies, 1)
        both, cache = model.arhead.step(z, previous, position, cache)
        cond = Mixture(*(value.chunk(copies)[0] for value in both))
        uncond = None if z_uncond is None else Mixture(*(value.chunk(copies)[1] for value in both))
        if forced is not None:
            value = forced[:, position]
        elif uniforms is not None:
            value = draw_mixture(
                cond,
                uncond,
                uniforms[:, position],
                guidance_scale=guidance_scale,
                temperature=temperature,
                num_candidates=NUM_CANDIDATES,
            )
        elif uncond is None:
            value = draw_plain(cond, temperature, generator)
        else:
            value = draw_guided(cond, uncond, guidance_scale, temperature, generator)
        feature = value[:, None]
        drawn.append(value)
        conds.append(cond)
        if uncond is not None:
            unconds.append(uncond)
    return torch.stack(drawn, 1), _stack(conds), _stack(unconds) if unconds else None


def _stack(mixtures: list[Mixture]) -> Mixture:
    return Mixture(*(torch.stack(values, 1) for values in zip(*mixtures, strict=True)))


def draw_plain(mixture: Mixture, temperature: float, generator: torch.Generator, count: int = 1) -> Tensor:
    """``count`` draws from each mixture (M, K) with component std * temperature -> (M,), or (count, M) for more."""
    weight, mu, logvar = mixture
    pick = torch.multinomial(weight.float().cpu(), count, replacement=True, generator=generator).to(mu.device)
    eps = torch.randn(pick.shape, generator=generator, dtype=mu.dtype).to(mu.device)
    values = mu.gather(1, pick) + torch.exp(0.5 * logvar.gather(1, pick)) * temperature * eps
    return values[:, 0] if count == 1 else values.T


def draw_guided(
    cond: Mixture, uncond: Mixture, guidance_scale: float, temperature: float, generator: torch.Generator
) -> Tensor:
    """Published guided draw, mixtures (M, K) -> (M,).

    1000 proposals from the tempered conditional mixture, one picked with probability proportional to
    (p_cond / p_uncond) ** (guidance_scale - 1), densities without the temperature.
    """
    proposals = draw_plain(cond, temperature, generator, NUM_CANDIDATES)  # (N, M)
    ratio = log_density(proposals, cond) - log_density(proposals, uncond)
    probability = torch.softmax(ratio * (guidance_scale - 1), 0).T  # (M, N)
    pick = torch.multinomial(probability.float().cpu(), 1, generator=generator).to(proposals.device)
    return proposals.T.gather(1, pick)[:, 0]
