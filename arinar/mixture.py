"""Mixture sampling in PyTorch, float32, no branch that depends on data: it is also what the sampling graphs trace.

Formulas, and why it is done this way, are in `arinar.mixture_law`; functions bear the names that they have in
`arinar.runtime.gmm`, the NumPy reference.
What differs: the quantile is a sum of ramps over all cells, of which at most one is partly climbed, not a
search; 1 - exp(-x) is written with tanh, which ONNX has and which keeps its relative precision near zero.
Sums are products and reductions, not MatMul: GPU backends round the factors of a float32 MatMul to ten bits
(TF32) by default. Tables are columns (M, T, 1), cells are rows (M, 1, P).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mixture_law import (
    EVEN_RANGE,
    LOG_TW_MAX,
    LOG_TW_MIN,
    LOGIT_MAX,
    MAX_LEAN,
    NUM_CANDIDATES,
    REACH,
    SMALL,
    SOFT_MIN,
    TABLE_NODES,
    TINY,
    mesh_targets,
    node_plan,
)

_SQRT_HALF = math.sqrt(0.5)
_PDF_AT_0 = 1 / math.sqrt(2 * math.pi)


class PlainMixtureSample(nn.Module):
    """One draw per row from a mixture of ``num_gaussians``, component std times the temperature."""

    ranks: Tensor

    def __init__(self, num_gaussians: int, num_candidates: int = NUM_CANDIDATES) -> None:
        """``num_candidates`` has no part in a plain draw; accepted so that both modules are made alike."""
        super().__init__()
        _constant(self, "ranks", mesh_targets(num_gaussians))

    def forward(self, weight: Tensor, mu: Tensor, logvar: Tensor, uniforms: Tensor, temperature: Tensor) -> Tensor:
        """weight, mu, logvar (M, K), uniforms (M, NUM_UNIFORMS), temperature (M,) -> feature (M, 1)."""
        edges, _, mass = _plain_law(weight, mu, logvar, temperature, self.ranks)
        return _quantile(edges, mass, uniforms)


class MixtureSample(nn.Module):
    """One guided draw per row: SIR with ``num_candidates`` >= 2 proposals, mixtures of ``num_gaussians``."""

    ranks: Tensor
    targets: Tensor
    spread: Tensor

    def __init__(self, num_gaussians: int, num_candidates: int = NUM_CANDIDATES) -> None:
        super().__init__()
        self.num_gaussians = num_gaussians
        self.num_candidates = num_candidates
        plan = node_plan(num_candidates)
        self.low, self.offset = float(plan.targets[0]), plan.offset
        _constant(self, "ranks", mesh_targets(num_gaussians))
        _constant(self, "targets", plan.targets)
        _constant(self, "spread", np.linspace(1, 0, TABLE_NODES)[:, None])

    def forward(
        self,
        weight: Tensor,
        mu: Tensor,
        logvar: Tensor,
        weight_uncond: Tensor,
        mu_uncond: Tensor,
        logvar_uncond: Tensor,
        uniforms: Tensor,
        guidance_scale: Tensor,
        temperature: Tensor,
    ) -> Tensor:
        """Mixtures (M, K), uniforms (M, NUM_UNIFORMS), guidance_scale, temperature (M,) -> feature (M, 1)."""
        edges, middle, mass = _plain_law(weight, mu, logvar, temperature, self.ranks)
        both = torch.cat([weight, weight_uncond, mu, mu_uncond, logvar, logvar_uncond], 1)
        both = both.reshape(-1, 3, 2, self.num_gaussians, 1)
        density = _log_density(middle[:, None], both)  # (M, 2, P)
        log_w = (density[:, :1] - density[:, 1:]) * (guidance_scale - 1)[:, None, None]  # (M, 1, P)

        log_t = self._search_nodes(log_w, mass)  # (M, NODES, 1)
        tw = (log_t + log_w).clamp(LOG_TW_MIN, LOG_TW_MAX).exp()  # (M, NODES, P)
        half = torch.tanh(0.5 * tw)
        hit = half / (half + 1)  # (1 - exp(-tw)) / 2
        reached = 2 * (hit * mass).sum(2, keepdim=True)  # (M, NODES, 1)
        grid = F.pad(F.pad(reached, (0, 0, 1, 0)), (0, 0, 0, 1), value=1.0)  # (M, NODES + 2, 1)
        miss = (self.num_candidates * (1 - grid).clamp(min=TINY).log()).exp()
        slope = (miss[:, :-1] - miss[:, 1:]) / (grid[:, 1:] - grid[:, :-1]).clamp(min=TINY)
        # Over steps too small for float32 the quotient is noise; the true slope is steepest at 0.
        slope = slope.clamp(0, self.num_candidates)
        share = 2 * (slope[:, :-1] - slope[:, 1:])  # (M, NODES, 1)
        return _quantile(edges, mass * ((share * hit).sum(1, keepdim=True) + slope[:, -1:]), uniforms)

    def _search_nodes(self, log_w: Tensor, mass: Tensor) -> Tensor:
        """log_w, mass (M, 1, P) -> log t_i (M, NODES, 1), increasing."""

        def log_expect(values: Tensor) -> Tensor:
            return (values * mass).sum(2, keepdim=True).log()

        top, bottom = log_w.amax(2, keepdim=True), log_w.amin(2, keepdim=True)  # (M, 1, 1)
        log_mean = top + log_expect((log_w - top).exp())
        soft_min = bottom - log_expect((SOFT_MIN * (bottom - log_w)).exp()) / SOFT_MIN
        first, last = self.low - log_mean, self.offset - soft_min
        growth = (1 + (last - first).clamp(min=1.0) / EVEN_RANGE).log()
        log_t = last - EVEN_RANGE * ((self.spread * growth).exp() - 1)  # (M, table, 1)
        entry = log_expect(torch.sigmoid((log_t + log_w).clamp(-LOGIT_MAX, LOGIT_MAX)))
        return _inverse(log_t, entry, self.targets).transpose(1, 2)


def draw_mixture(
    cond: tuple[Tensor, Tensor, Tensor],
    uncond: tuple[Tensor, Tensor, Tensor] | None,
    uniforms: Tensor,
    *,
    guidance_scale: Tensor,
    temperature: Tensor,
    num_candidates: int = NUM_CANDIDATES,
) -> Tensor:
    """What the graphs draw, for code that holds tensors: `arinar.runtime.gmm.sample`, on any device -> (M,).

    guidance_scale, temperature : (M,); ``uncond=None``, or a guidance of 1 for all rows, draws plainly. Computed in
    float32 unless the mixtures are float64; returned in their dtype. Inputs are not checked.
    """
    mu = cond[1]
    wide = mu.dtype if mu.dtype == torch.float64 else torch.float32
    guided = uncond is not None and num_candidates > 1 and bool((guidance_scale != 1).any())
    tensors = [*cond, *uncond, uniforms, guidance_scale] if guided and uncond is not None else [*cond, uniforms]
    inputs = [tensor.to(mu.device, wide) for tensor in (*tensors, temperature)]
    module = _module(guided, mu.shape[1], num_candidates, mu.device, wide)
    return cast(Tensor, module(*inputs))[:, 0].to(mu.dtype)


@lru_cache(maxsize=16)
def _module(guided: bool, num_gaussians: int, num_candidates: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    make = MixtureSample if guided else PlainMixtureSample
    return make(num_gaussians, num_candidates).to(device, dtype)


def _plain_law(weight: Tensor, mu: Tensor, logvar: Tensor, temperature: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mixture (M, K), temperature (M,), mesh ranks (P + 1,) -> edges (M, 1, P + 1), middle and mass of the cells (M, 1, P)."""
    std = (0.5 * logvar).exp() * temperature[:, None]
    edges = _mesh(mu, std, ranks)
    low, high = edges[..., :-1], edges[..., 1:]
    middle = 0.5 * (low + high)
    per_std = 1 / std[..., None]  # (M, K, 1)
    z = (middle - mu[..., None]) * per_std  # (M, K, P)
    square = z * z
    width = (high - low) * per_std
    pdf = (-0.5 * square).exp() * (weight * _PDF_AT_0)[..., None]
    mass = (pdf * width * (1 + (square - 1) * (width * width) * (1 / 24))).sum(1, keepdim=True)
    return edges, middle, mass.clamp(min=TINY)


def _quantile(edges: Tensor, mass: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse distribution functions: edges (M, 1, P + 1), mass (M, 1, P), uniforms (M, 1) -> (M, 1)."""
    width = edges[..., 1:] - edges[..., :-1]
    mass = mass.clamp(min=TINY)
    density = mass / width.clamp(min=TINY)
    beside = torch.cat([density[..., :1], density, density[..., -1:]], 2)
    lean = (beside[..., :-2] / beside[..., 2:]).clamp(1 / MAX_LEAN, MAX_LEAN).sqrt().sqrt()
    cdf = mass.cumsum(2)
    left = ((cdf - uniforms[..., None] * cdf[..., -1:]) / mass).clamp(0, 1)
    inside = (1 - left) / (1 - left + lean * left)
    return (edges[..., :1] + (width * inside).sum(2, keepdim=True))[:, 0]


def _mesh(mu: Tensor, std: Tensor, ranks: Tensor) -> Tensor:
    """Gaussians (M, K), ranks (P + 1,) -> sorted edges (M, 1, P + 1)."""
    reach = REACH * std
    kinks = torch.cat([mu - reach, mu + reach], 1)  # (M, 2K)
    kinks = torch.topk(kinks, kinks.shape[1], largest=False, sorted=True).values[..., None]
    z = (kinks - mu[:, None]) / std[:, None]  # (M, 2K, K)
    return _inverse(kinks, z.clamp(-REACH, REACH).sum(2, keepdim=True), ranks)


def _inverse(x: Tensor, y: Tensor, wanted: Tensor) -> Tensor:
    """Piecewise linear inverse of increasing tables x, y (M, T, 1) at ``wanted`` (W,) -> (M, 1, W)."""
    start = y[:, :-1]
    rise = (y[:, 1:] - start).clamp(min=SMALL)
    ramp = ((wanted - start) / rise).clamp(0, 1)  # (M, T - 1, W)
    return x[:, :1] + (ramp * (x[:, 1:] - x[:, :-1])).sum(1, keepdim=True)


def _log_density(x: Tensor, parameters: Tensor) -> Tensor:
    """log p(x) + log(2 pi) / 2 of two mixtures: x (M, 1, 1, P), parameters (M, 3, 2, K, 1) -> (M, 2, P).

    By log-sum-exp, its maximum subtracted here: not every backend does so in its own.
    """
    weight, mu, logvar = parameters[:, 0], parameters[:, 1], parameters[:, 2]  # (M, 2, K, 1)
    peak = weight.clamp(min=TINY).log() - 0.5 * logvar
    scaled = (x - mu) * ((-0.5 * logvar).exp() * _SQRT_HALF)  # (M, 2, K, P)
    terms = peak - scaled * scaled
    top = terms.amax(2, keepdim=True)
    return top[:, :, 0] + (terms - top).exp().sum(2).log()


def _constant(module: nn.Module, name: str, values: npt.NDArray[np.float64]) -> None:
    module.register_buffer(name, torch.from_numpy(values).float(), persistent=False)
