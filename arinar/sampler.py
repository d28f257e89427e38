"""The reference sampler: the published algorithm step by step in plain PyTorch, which parity is measured against.

Nothing here is optimised: conditioning is recomputed for each feature, every position goes through the last block,
guidance draws 1000 proposals, as the published code does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .head import Draw
from .model import Arinar, CausalArinar
from .schedule import Step, check_cfg_schedule, guidance_at, steps


class NoiseLike(Protocol):
    """Every random number of a batch: what `arinar.runtime.Noise` holds."""

    @property
    def order(self) -> Any: ...  # (B, L) int64
    @property
    def draws(self) -> Any: ...  # (B, L, D, U) float32, by position in the grid


@dataclass
class StepRecord:
    """What one outer step computed; rows are (image, position), image by image. For parity and calibration.

    ``positions`` (B, P); ``z_cond``, ``z_uncond`` (B * P, C); ``cond``, ``uncond``: the parts of the law of each draw
    (`arinar.law`), of a Gaussian mixture head weight, mu and logvar (B * P, D, K); ``features`` (B * P, D).
    ``guidance_scale`` (B,) of this step. ``*uncond`` are None without guidance.
    """

    step: Step
    positions: Tensor
    z_cond: Tensor
    z_uncond: Tensor | None
    cond: tuple[Tensor, ...]
    uncond: tuple[Tensor, ...] | None
    features: Tensor
    guidance_scale: Tensor


@torch.no_grad()
def sample(
    model: Arinar,
    labels: Tensor,
    *,
    guidance_scale: float | Sequence[float],
    cfg_schedule: str = "linear",
    temperature: float | Sequence[float] = 1.0,
    num_iter: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    noise: NoiseLike | None = None,
    order: Tensor | None = None,
    forced: Tensor | None = None,
    record: Callable[[StepRecord], None] | None = None,
    law: Mapping[str, int] | None = None,
) -> Tensor:
    """Generate tokens.

    Parameters
    ----------
    model : in ``eval()`` mode, any float dtype.
    labels : (B,) int64 class ids.
    guidance_scale : >= 1, one for all or one per label; exactly 1 for all runs no unconditional branch.
    temperature : > 0, one for all or one per label; multiplies the component std of the proposals.
    num_iter : outer steps, 1..L; None means the config's default. A causal model always takes L.
    seed : without ``noise``, draws are the published code's (1000 normal proposals per guided feature), made on the CPU.
    generator : takes the seed's place; draws are made on its device.
    noise : every random number, explicitly; draws then follow the deployed sampler (same law, a few uniforms per
        feature), so that a deployed pipeline given the same noise must produce the same tokens.
    order : (B, L) int64, of a masked model without ``noise``: the generation order, from its end to its start.
    forced : (B, L, D) tokens to use instead of the drawn ones (teacher forcing).
    record : called after each outer step.
    law : what the head's draws depend on besides the config, as a bundle's manifest tells; default the published.

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
    scales, heats = (_per_label(value, batch) for value in (guidance_scale, temperature))
    # NaN fails too.
    if not (all(1 <= scale < math.inf for scale in scales) and all(0 < heat < math.inf for heat in heats)):
        raise ValueError(
            f"guidance_scale is {guidance_scale}, temperature is {temperature}; expected at least 1 and above 0, both finite"
        )
    plan = steps(length, num_iter)
    check_cfg_schedule(cfg_schedule)
    if generator is None:
        generator = torch.Generator(device="cpu")
        if seed is not None:
            generator.manual_seed(seed)
        else:
            generator.seed()

    given = None if noise is None else noise.draws
    guided = bool((scales != 1.0).any())
    both_labels = torch.cat([labels, torch.full_like(labels, -1)]) if guided else labels
    if causal:
        order = torch.tensor([config.generation_order] * batch, device=device)
        # Generation runs from the end of `order` to its start; a causal model's order is given first to last.
        order = order.flip(1)
    elif noise is not None:
        order = torch.as_tensor(noise.order, device=device)
    elif order is None:
        order = torch.rand(batch, length, generator=generator, device=generator.device).argsort(1).to(device)

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
        draws = None if given is None else torch.as_tensor(given, device=device)[rows, positions].flatten(0, 1)
        target = None if forced is None else forced.to(device)[rows, positions].flatten(0, 1)
        guidance = guidance_at(step, length, scales, cfg_schedule).to(device)
        scale_rows, heat_rows = (value.repeat_interleave(step.count) for value in (guidance, heats.to(device)))
        drawn = model.head.draw(z_cond, z_uncond, Draw(scale_rows, heat_rows, generator, draws, law or {}), target)
        tokens[rows, positions] = drawn.tokens.reshape(*positions.shape, -1)
        if record is not None:
            record(StepRecord(step, positions, z_cond, z_uncond, drawn.cond, drawn.uncond, drawn.tokens, guidance))
    return tokens


def _per_label(value: float | Sequence[float], batch: int) -> Tensor:
    """(B,) float64."""
    return torch.as_tensor(value, dtype=torch.float64).expand(batch)
