"""The reference sampler: the published algorithm step by step in plain PyTorch, which parity is measured against.

Nothing here is optimised: conditioning is recomputed for each draw, every position goes through the last block,
guidance draws 1000 proposals, as the published code does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .diffusion_schedule import respacings
from .head import Draw
from .model import Arinar, CausalArinar
from .schedule import (
    ALWAYS,
    COSINE,
    Step,
    check_cfg_schedule,
    check_guidance_interval,
    checkerboard,
    guidance_at,
    stages_of,
    steps,
)


class NoiseLike(Protocol):
    """Every random number of a batch: what `arinar.runtime.Noise` holds."""

    @property
    def order(self) -> Any: ...  # (B, L) int64
    @property
    def draws(self) -> Any: ...  # (B, L, D, U) float32, by position in the grid


class KnownLike(Protocol):
    """Tokens of a batch that are given: what `arinar.runtime.Known` holds."""

    @property
    def tokens(self) -> Any: ...  # (B, L, D), raster order
    @property
    def mask(self) -> Any: ...  # (B, L) bool, True = known


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
    labels: Tensor | Sequence[int | Mapping[int, float]],
    *,
    guidance_scale: float | Sequence[float],
    cfg_schedule: str = "linear",
    temperature: float | Sequence[float] = 1.0,
    num_iter: int | None = None,
    sampling_steps: str | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    noise: NoiseLike | None = None,
    order: Tensor | None = None,
    forced: Tensor | None = None,
    known: KnownLike | None = None,
    schedule: str = COSINE,
    guidance_interval: tuple[float, float] = ALWAYS,
    guidance_refresh: int = 1,
    record: Callable[[StepRecord], None] | None = None,
    law: Mapping[str, int] | None = None,
) -> Tensor:
    """Generate tokens.

    Parameters
    ----------
    model : in ``eval()`` mode, any float dtype.
    labels : (B,) int64 class ids; or a list of those and of weights by class id, whose embeddings are interpolated.
    guidance_scale : >= 1, one for all or one per label; exactly 1 for all runs no unconditional branch.
    temperature : > 0, one for all or one per label; multiplies the component std of the proposals.
    num_iter : outer steps, 1..L; None means the config's default. A causal model always takes L.
    sampling_steps : of a diffusion head (`arinar.diffusion_schedule.respacings`); None means the config's.
    seed : without ``noise``, draws are the published code's (1000 normal proposals per guided feature), made on the CPU.
    generator : takes the seed's place; draws are made on its device.
    noise : every random number, explicitly; draws then follow the deployed sampler (same law, a few uniforms per
        feature), so that a deployed pipeline given the same noise must produce the same tokens.
    order : (B, L) int64, of a masked model without ``noise``: the generation order, from its end to its start.
    forced : (B, L, D) tokens to use instead of the drawn ones (teacher forcing).
    known : tokens that are given, as many of every image; they stay as they are. Of a causal model the first of its order.
    schedule : which tokens a step generates: "cosine", as published, or staged (`arinar.schedule.stages_of`), whose steps
        ``num_iter`` does not change. Not where tokens are known, nor of a causal model.
    guidance_interval : shares of known tokens between which a step is guided.
    guidance_refresh : of so many guided steps the first computes the unconditional branch, at the positions of all of them;
        the others add what it differed by there to their conditional z.
    record : called after each outer step.
    law : what the head's draws depend on besides the config, as a bundle's manifest tells; default the published.

    Returns
    -------
    tokens : (B, L, D), raster order.
    """
    config, device = model.config, model.fake_latent.device
    length, batch = config.seq_len, len(labels)
    scales, heats = _checked(guidance_scale, batch, 1.0), _checked(temperature, batch, 0.0, strict=True)
    check_cfg_schedule(cfg_schedule)
    if generator is None:
        generator = torch.Generator(device="cpu")
        generator.seed() if seed is None else generator.manual_seed(seed)
    if isinstance(model, CausalArinar):
        # Generation runs from the end of `order` to its start; a causal model's order is given first to last.
        order = torch.tensor([config.generation_order] * batch, device=device).flip(1)
    elif noise is not None:
        order = torch.as_tensor(noise.order, device=device)
    elif order is None:
        order = torch.rand(batch, length, generator=generator, device=generator.device).argsort(1).to(device)

    tokens = torch.zeros(batch, length, config.token_dim, dtype=model.fake_latent.dtype, device=device)
    unknown = length
    if known is not None:
        unknown, order = _start_from(known, tokens, order, fixed=isinstance(model, CausalArinar))
    stages = stages_of(schedule, config.grid_size)
    if stages and (known is not None or isinstance(model, CausalArinar)):
        raise ValueError(f"schedule is {schedule}; it has no meaning where tokens are known, nor for a causal model")
    if stages:
        order = _staged(order, config.grid_size, len(stages))
    interval = check_guidance_interval(guidance_interval)
    plan = steps(
        length,
        _num_iter(model, num_iter),
        unknown,
        stages=stages,
        guidance_interval=interval,
        guidance_refresh=guidance_refresh,
    )
    chains = respacings(config.sampling_steps if sampling_steps is None else sampling_steps, len(plan))
    outer = _Outer(model, _classes(labels, config.num_classes).to(device), guided=bool((scales != 1.0).any()))
    given = None if noise is None else torch.as_tensor(noise.draws, device=device)
    rows = torch.arange(batch, device=device)[:, None]
    for step in plan:
        positions = order[:, step.remaining : step.masked]  # (B, P)
        z_cond, z_uncond = outer.step(tokens, order, step)
        draws = None if given is None else given[rows, positions].flatten(0, 1)
        target = None if forced is None else forced.to(device)[rows, positions].flatten(0, 1)
        guidance = guidance_at(step, length, scales, cfg_schedule).to(device)
        scale_rows, heat_rows = (value.repeat_interleave(step.count) for value in (guidance, heats.to(device)))
        how = Draw(scale_rows, heat_rows, generator, draws, law or {}, chains[step.index], record is not None)
        drawn = model.head.draw(z_cond, z_uncond, how, target)
        tokens[rows, positions] = drawn.tokens.reshape(*positions.shape, -1)
        if record is not None:
            record(StepRecord(step, positions, z_cond, z_uncond, drawn.cond, drawn.uncond, drawn.tokens, guidance))
    return tokens


def _classes(labels: Tensor | Sequence[int | Mapping[int, float]], num_classes: int) -> Tensor:
    """Class ids (B,), or (B, num_classes) float64 weights that sum to 1 where an image is of several classes."""
    if isinstance(labels, Tensor):
        return labels
    if not any(isinstance(label, Mapping) for label in labels):
        return torch.tensor(labels)
    weights = torch.zeros(len(labels), num_classes, dtype=torch.float64)
    for row, label in enumerate(labels):
        for name, weight in (label if isinstance(label, Mapping) else {label: 1.0}).items():
            weights[row, name] = weight
    return weights / weights.sum(1, keepdim=True)


def _staged(order: Tensor, side: int, sets: int) -> Tensor:
    """Orders (B, L) with the first set's tokens at the end, where generation starts, each set in the order it had."""
    places = torch.tensor(checkerboard(side, sets), device=order.device)
    return order.gather(1, (-places[order]).argsort(dim=1, stable=True))


def _start_from(known: KnownLike, tokens: Tensor, order: Tensor, *, fixed: bool) -> tuple[int, Tensor]:
    """Write known tokens into ``tokens`` (B, L, D), in place -> how many are left to generate, and the order (B, L) with
    those first: generation starts from its end. Raises ValueError for numbers that differ, and where a ``fixed`` order
    would have to change."""
    mask = torch.as_tensor(known.mask, device=tokens.device)
    if tuple(mask.shape) != tuple(order.shape) or mask.dtype != torch.bool:
        raise ValueError(f"known.mask is {mask.dtype} {tuple(mask.shape)}; expected torch.bool {tuple(order.shape)}")
    if len(set(mask.sum(1).tolist())) > 1:
        raise ValueError(f"known.mask has {mask.sum(1).tolist()} tokens known; expected as many of every image")
    rows = [torch.cat([row[~given[row]], row[given[row]]]) for row, given in zip(order, mask, strict=True)]
    if fixed and not torch.equal(torch.stack(rows), order):
        raise ValueError("known.mask is not a beginning of the causal model's generation order; give its first tokens")
    tokens[mask] = torch.as_tensor(known.tokens, device=tokens.device)[mask].to(tokens.dtype)
    return int((~mask[0]).sum()), torch.stack(rows)


class _Outer:
    """The outer model step by step, everything computed anew, but for a causal model's cache."""

    def __init__(self, model: Arinar, labels: Tensor, *, guided: bool) -> None:
        self.model, self.copies = model, 2 if guided else 1
        self.labels = torch.cat([labels, torch.full_like(labels, -1)]) if guided else labels
        self.cache: Any = None
        self.kept: Tensor | None = None  # what guidance changes in z at the positions of the steps that reuse it, (B, P, C)

    def step(self, tokens: Tensor, order: Tensor, step: Step) -> tuple[Tensor, Tensor | None]:
        """tokens (B, L, D) as far as they are known, order (B, L) -> z (B * P, C) of the step's positions, image by image,
        in the conditional branch and, where the step is guided, in the other."""
        cond, *uncond = self._z(tokens, order, replace(step, remaining=step.remaining - step.ahead))
        if not uncond or not step.guided:
            return cond[:, step.ahead :].flatten(0, 1), None
        if step.reuses:
            assert self.kept is not None
            self.kept, change = self.kept.tensor_split([-step.count], 1)
            return cond.flatten(0, 1), (cond + change).flatten(0, 1)
        self.kept = (uncond[0] - cond)[:, : step.ahead]
        return cond[:, step.ahead :].flatten(0, 1), uncond[0][:, step.ahead :].flatten(0, 1)

    def _z(self, tokens: Tensor, order: Tensor, step: Step) -> tuple[Tensor, ...]:
        """z (B, P, C) of the step's positions, of each branch."""
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        if not isinstance(self.model, CausalArinar):
            mask = torch.zeros(tokens.shape[:2], dtype=tokens.dtype, device=tokens.device)
            mask[rows, order[:, : step.masked]] = 1
            z = self.model.condition(tokens.repeat(self.copies, 1, 1), mask.repeat(self.copies, 1), self.labels)
            picked = order[:, step.remaining : step.masked].repeat(self.copies, 1)
            z = z[torch.arange(len(z), device=z.device)[:, None], picked]  # (G * B, P, C)
        else:
            first = tokens.shape[1] - step.masked - 1  # of the tokens to read: the last one, at first all that are given
            if self.cache is None:
                first, (z, self.cache) = 0, self.model.prefill(self.labels)
            for index in range(first, tokens.shape[1] - step.masked):
                token = tokens[rows, order[:, -1 - index, None]]  # (B, 1, D)
                z, self.cache = self.model.step(token.repeat(self.copies, 1, 1), index, self.cache)
        return z.chunk(self.copies)


def _num_iter(model: Arinar, num_iter: int | None) -> int:
    """The number of outer steps that is meant. Raises ValueError for one that a causal model does not take."""
    length = model.config.seq_len
    if not isinstance(model, CausalArinar):
        return model.config.default_num_iter if num_iter is None else num_iter
    if num_iter not in (None, length):
        raise ValueError(f"num_iter is {num_iter}; a causal model generates one token a step: {length}")
    return length


def _checked(value: float | Sequence[float], batch: int, least: float, *, strict: bool = False) -> Tensor:
    """(B,) float64. Raises ValueError for a value out of range."""
    found = torch.as_tensor(value, dtype=torch.float64).expand(batch)
    if not all(least <= one < math.inf and not (strict and one == least) for one in found):  # NaN fails too
        name = "temperature" if strict else "guidance_scale"
        raise ValueError(f"{name} is {value}; expected {'above' if strict else 'at least'} {least:g}, and finite")
    return found
