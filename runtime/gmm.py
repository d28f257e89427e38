"""Sampling from 1-D Gaussian mixtures, plain or guided, by one uniform per draw: the NumPy reference, in float64.

What is computed, and why, is in `arinar.mixture_law`; `arinar.mixture` is the same computation in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from arinar.mixture_law import (
    EVEN_RANGE,
    LOG_TW_MAX,
    LOG_TW_MIN,
    LOGIT_MAX,
    MAX_LEAN,
    NUM_CANDIDATES,
    NUM_UNIFORMS,
    REACH,
    SMALL,
    SOFT_MIN,
    TABLE_NODES,
    TINY,
    Float64,
    NodePlan,
    mesh_targets,
    node_plan,
)

Array: TypeAlias = npt.NDArray[np.floating[Any]]
#: (weight, mu, logvar)
Mixture: TypeAlias = Sequence[npt.ArrayLike]

_ROWS_PER_CHUNK = 256
_SQRT_HALF = math.sqrt(0.5)
_PDF_AT_0 = 1 / math.sqrt(2 * math.pi)


class Law(NamedTuple):
    """Laws of N draws as histograms: ``edges`` (N, P + 1) increasing, ``mass`` (N, P) positive, any sum."""

    edges: Float64
    mass: Float64


def sample(
    cond: Mixture,
    uncond: Mixture | None,
    uniforms: npt.ArrayLike,
    *,
    guidance_scale: npt.ArrayLike,
    temperature: npt.ArrayLike,
    num_candidates: int = NUM_CANDIDATES,
) -> Array:
    """One draw per row, plain or guided.

    Parameters
    ----------
    cond, uncond : (weight, mu, logvar), each (N, K): weights >= 0 that sum to 1 in each row, means, log variances.
        ``uncond=None`` draws plainly.
    uniforms : (N, NUM_UNIFORMS) in [0, 1). The draw increases with it.
    guidance_scale : >= 1, one for all rows or (N,). Exactly 1 for all draws plainly, from ``cond``.
    temperature : > 0, one for all rows or (N,), multiplies the component std of the proposals (not of the densities in
        their weights).
    num_candidates : >= 1, proposals of the SIR scheme whose law is drawn from. With 1 the draw is plain.

    Returns
    -------
    (N,) draws: float64 if an input mixture is float64, else float32. Computed in float64.

    Raises
    ------
    ValueError : a shape, a value that is not finite, or an argument out of range; the message names it.
    """
    scale, heat = np.asarray(guidance_scale, np.float64), np.asarray(temperature, np.float64)
    if not (np.isfinite(scale) & (scale >= 1)).all():
        raise ValueError(f"guidance_scale is {guidance_scale!r}; expected a finite number, at least 1")
    if not (np.isfinite(heat) & (heat > 0)).all():
        raise ValueError(f"temperature is {temperature!r}; expected a finite number above 0")
    if num_candidates < 1:
        raise ValueError(f"num_candidates is {num_candidates}; expected at least 1")
    p_cond = _check_mixture("cond", cond)
    p_uncond = None if uncond is None else _check_mixture("uncond", uncond, p_cond.shape[1:])
    u = np.asarray(uniforms, np.float64)
    want = (p_cond.shape[1], NUM_UNIFORMS)
    if u.shape != want:
        raise ValueError(f"uniforms has shape {u.shape}; expected (N, NUM_UNIFORMS) = {want}")
    if not ((u >= 0) & (u < 1)).all():
        raise ValueError(f"uniforms has values outside [0, 1), from {u.min()} to {u.max()}")
    for name, value in (("guidance_scale", scale), ("temperature", heat)):
        if value.shape not in ((), (len(u),)):
            raise ValueError(f"{name} has shape {value.shape}; expected one number, or (N,) = {(len(u),)}")
    scales, heats = (np.broadcast_to(value, len(u))[:, None] for value in (scale, heat))  # (N, 1)
    plain = p_uncond is None or bool((scale == 1).all()) or num_candidates == 1

    draws = np.empty(len(u))
    # Guided, a row needs NODES times its cells of memory.
    for start in range(0, len(u), _ROWS_PER_CHUNK):
        rows = slice(start, start + _ROWS_PER_CHUNK)
        law = plain_law(p_cond[:, rows], heats[rows])
        if p_uncond is not None and not plain:
            law = guided_law(law, p_cond[:, rows], p_uncond[:, rows], scales[rows], num_candidates)
        draws[rows] = quantile(law, u[rows])[:, 0]
    wide = any(np.asarray(part).dtype == np.float64 for part in (*cond, *(uncond or ())))
    return draws if wide else draws.astype(np.float32)


def plain_law(mixture: Float64, temperature: float | Float64) -> Law:
    """Law of a plain draw: mixture (3, N, K), temperature one for all or (N, 1) -> the mesh, the probability of each cell.

    A Gaussian's probability of a cell of width d around z is pdf(z) d (1 + (z^2 - 1) d^2 / 24), up to terms
    in d^4: at most 3e-4 of it, as no cell within REACH is wider than 2 REACH / CELLS_PER_GAUSSIAN std. Unlike
    a difference of distribution functions it is as precise in the tails, where single proposals win, in
    float32 too.
    """
    weight, mu, logvar = mixture
    std = np.exp(0.5 * logvar) * temperature
    edges = _mesh(mu, std)
    z = (_middle(edges)[:, None] - mu[..., None]) / std[..., None]  # (N, K, P)
    width = np.diff(edges)[:, None] / std[..., None]
    pdf = np.exp(-0.5 * z**2) * (weight[..., None] * _PDF_AT_0)
    mass = (pdf * width * (1 + (z**2 - 1) * width**2 / 24)).sum(1)  # (N, P)
    return Law(edges, np.maximum(mass, TINY))


def guided_law(
    plain: Law, cond: Float64, uncond: Float64, guidance_scale: float | Float64, num_candidates: int = NUM_CANDIDATES
) -> Law:
    """Law of a guided draw from proposals of law ``plain``; num_candidates >= 2, mixtures (3, N, K), guidance_scale one for
    all or (N, 1)."""
    edges, mass = plain
    x = _middle(edges)
    log_w = (_log_density(x, cond) - _log_density(x, uncond)) * (guidance_scale - 1)  # (N, P)

    log_t = _search_nodes(log_w, mass, node_plan(num_candidates))  # (N, NODES)
    hit = -np.expm1(-np.exp(np.clip(log_t[..., None] + log_w[:, None], LOG_TW_MIN, LOG_TW_MAX)))
    reached = (hit @ mass[..., None])[..., 0]  # the B(t_i)
    # With hit straight between B = 0, the nodes, and B = 1, where it is 0 and 1, the integral is a sum of its
    # increments, each times the mean downward slope of (1 - B)^N over the step.
    grid = np.pad(np.pad(reached, ((0, 0), (1, 0))), ((0, 0), (0, 1)), constant_values=1.0)
    slope = -np.diff((1 - grid) ** num_candidates) / np.maximum(np.diff(grid), TINY)  # (N, NODES + 1)
    share = slope[:, :-1] - slope[:, 1:]
    return Law(edges, mass * ((share[:, None] @ hit)[:, 0] + slope[:, -1:]))


def quantile(law: Law, uniforms: Float64) -> Float64:
    """Inverse distribution functions: N laws, uniforms (N, any) in [0, 1) -> draws of the same shape.

    Inside a cell the density runs from d0 to d1 as 1 / (1 + c y)^2, y in 0..1: nearly an exponential, but its
    distribution function and the inverse of that are plain fractions. Neighbouring cells say what d0 / d1 is.
    """
    edges, width = law.edges, np.diff(law.edges)
    mass = np.maximum(law.mass, TINY)
    beside = np.pad(mass / np.maximum(width, TINY), ((0, 0), (1, 1)), mode="edge")
    lean = np.clip(beside[:, :-2] / beside[:, 2:], 1 / MAX_LEAN, MAX_LEAN) ** 0.25  # sqrt(d0 / d1)
    cdf = np.cumsum(mass, 1)
    wanted = uniforms * cdf[:, -1:]
    draws: Float64 = np.empty(wanted.shape)
    for row in range(len(wanted)):
        cell = np.minimum(np.searchsorted(cdf[row], wanted[row], side="right"), mass.shape[1] - 1)
        left = np.clip((cdf[row, cell] - wanted[row]) / mass[row, cell], 0, 1)
        inside = (1 - left) / (1 - left + lean[row, cell] * left)
        draws[row] = edges[row, cell] + width[row, cell] * inside
    return draws


def _mesh(mu: Float64, std: Float64) -> Float64:
    """Sorted cell edges (N, P + 1) for Gaussians (N, K).

    count(x) = sum_k clip((x - mu_k) / std_k, -REACH, REACH) is increasing and piecewise linear with 2K kinks;
    the edges are its inverse at even steps. So cells are finest where Gaussians are narrow or overlap.
    """
    kinks = np.sort(np.concatenate([mu - REACH * std, mu + REACH * std], 1), 1)  # (N, 2K)
    z = (kinks[..., None] - mu[:, None]) / std[:, None]
    return _inverse(kinks, np.clip(z, -REACH, REACH).sum(-1), mesh_targets(mu.shape[1]))


def _inverse(x: Float64, y: Float64, wanted: Float64) -> Float64:
    """Piecewise linear inverse of increasing tables x, y (N, T) at ``wanted`` (W,) -> (N, W).

    Held at the ends. A sum of ramps, not a search, so that the same code fits a graph.
    """
    rise = np.maximum(np.diff(y), SMALL)
    ramp = np.clip((wanted[:, None] - y[:, None, :-1]) / rise[:, None], 0, 1)  # (N, W, T - 1)
    return np.asarray(x[:, :1] + (ramp @ np.diff(x)[..., None])[..., 0], np.float64)


def _search_nodes(log_w: Float64, mass: Float64, plan: NodePlan) -> Float64:
    """log_w, mass (N, P) -> log t_i (N, NODES), increasing, such that B(t_i) is near the plan's targets."""
    top, bottom = log_w.max(1, keepdims=True), log_w.min(1, keepdims=True)
    # E_q[tw / (1 + tw)] <= t E_q[w] bounds the range from below, the soft minimum (see node_plan) from above.
    log_mean = top + np.log((mass * np.exp(log_w - top)).sum(1, keepdims=True))
    soft_min = bottom - np.log((mass * np.exp(SOFT_MIN * (bottom - log_w))).sum(1, keepdims=True)) / SOFT_MIN
    first, last = plan.targets[0] - log_mean, plan.offset - soft_min
    growth = np.log1p(np.maximum(last - first, 1.0) / EVEN_RANGE)
    log_t = last - EVEN_RANGE * np.expm1(np.linspace(1, 0, TABLE_NODES) * growth)  # (N, TABLE_NODES)
    logit = np.clip(log_t[..., None] + log_w[:, None], -LOGIT_MAX, LOGIT_MAX)
    entry = np.log(((1 / (1 + np.exp(-logit))) @ mass[..., None])[..., 0])
    return _inverse(log_t, entry, plan.targets)


def _middle(edges: Float64) -> Float64:
    return np.asarray(0.5 * (edges[:, 1:] + edges[:, :-1]), np.float64)


def _log_density(x: Float64, mixture: Float64) -> Float64:
    """log p(x) + log(2 pi) / 2: x (N, P), mixture (3, N, K) -> (N, P), by log-sum-exp."""
    weight, mu, logvar = mixture
    scale = np.exp(-0.5 * logvar) * _SQRT_HALF
    peak = np.log(np.maximum(weight, TINY)) - 0.5 * logvar
    terms = peak[..., None] - ((x[:, None] - mu[..., None]) * scale[..., None]) ** 2  # (N, K, P)
    top = terms.max(1)
    return np.asarray(top + np.log(np.exp(terms - top[:, None]).sum(1)), np.float64)


def _check_mixture(name: str, mixture: Mixture, shape: tuple[int, ...] | None = None) -> Float64:
    """(weight, mu, logvar) as one (3, N, K) float64 array; ``shape`` (N, K) is what each part must have."""
    if len(mixture) != 3:
        raise ValueError(f"{name} has {len(mixture)} parts; expected 3: (weight, mu, logvar)")
    parts = [np.asarray(part) for part in mixture]
    want = parts[0].shape if shape is None else shape
    for part_name, part in zip(("weight", "mu", "logvar"), parts, strict=True):
        if part.ndim != 2 or part.shape != want or part.shape[1] == 0:
            expected = f"here {want}" if len(want) == 2 else "two axes"
            raise ValueError(f"{name} {part_name} has shape {part.shape}; expected (N, K), {expected}")
        finite = np.isfinite(part).all(1)
        if not finite.all():
            raise ValueError(
                f"{name} {part_name} has values that are not finite in {(~finite).sum()} rows, "
                f"the first is row {finite.argmin()}; expected finite numbers"
            )
    stacked = np.stack(parts).astype(np.float64)
    weight = stacked[0]
    wrong = (weight < 0).any(1) | (np.abs(weight.sum(1) - 1) > 1e-2)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"{name} weight of row {row} is {weight[row]}, sum {weight[row].sum():.6g}; expected weights >= 0 that sum to 1"
        )
    return stacked


__all__ = ["NUM_CANDIDATES", "NUM_UNIFORMS", "Law", "guided_law", "node_plan", "plain_law", "quantile", "sample"]
