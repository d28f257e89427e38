"""Sampling from 1-D Gaussian mixtures, plain or guided, as a deterministic function of one uniform: the NumPy reference.

The published guided draw takes N = 1000 proposals x_i from the conditional mixture q (its component std times the
temperature), weights them by w(x_i) = (p_cond(x_i) / p_uncond(x_i)) ** (guidance_scale - 1), densities without the
temperature, and picks one in proportion to its weight (sampling importance resampling, SIR). Here the law of that pick is
computed instead, and its quantile function applied to the uniform: the sample is a continuous, increasing function of the
uniform and a continuous one of every other input. So rounding errors move a sample a little, where picking among random
proposals, or first a component and then a point, would now and then replace it by an unrelated one.

**The law for finite N.** With 1 / sum(w) = int_0^inf exp(-t sum(w)) dt, the density of the pick is

    p_N(x) = q(x) N w(x) int_0^inf exp(-t w(x)) E_q[exp(-t w)]^(N-1) dt.

Write B(t) = E_q[1 - exp(-t w)], integrate by parts, and change the variable from t to B:

    p_N(x) = q(x) E[(1 - exp(-t_B w(x))) / B],    B ~ Beta(2, N - 1),    t_B the t at which B(t) = B.

That is a mixture of proper laws: any nodes t_i with any probabilities give masses that are positive and sum to one, and
nothing needs w itself, only log w. The Beta law has its weight near 2 / N, which is where the finite N enters.

**Steps.** (1) A mesh of sorted edges that covers every Gaussian out to +-5.3 std with equal steps in its own scale, finest
where several overlap, and the probability of q in each cell. (2) log w at each cell's middle. (3) Nodes t_i, equal
steps in log B: B(t) may rise within a few e-folds of t or over thousands, so a first, wide table of B brackets the
interesting range, a second refines it. (4) Masses of the cells, weights of the nodes from the Beta distribution function.
(5) Inverse distribution function, with a density inside each cell that leans as its neighbours suggest.

A plain draw is steps (1) and (5). `arinar.export.mixture` holds the same computation for the graphs, in float32.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Float64: TypeAlias = npt.NDArray[np.float64]
Mixture: TypeAlias = tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike]

#: Uniforms per draw.
NUM_UNIFORMS = 1
#: Proposals per guided draw in the published code: part of the distribution, not an approximation to turn up.
NUM_CANDIDATES = 1000

# More cells per Gaussian sharpen the law where few proposals carry all the weight; cost is proportional.
CELLS_PER_GAUSSIAN = 64
# Half width of the mesh around each Gaussian, in std. Beyond it lies a probability of 1.2e-7: of 1000 proposals, one in
# 8,600 sets has one there.
REACH = 5.3
# Nodes in log t: of the table that finds the range, and of the integral.
TABLE_NODES, NODES = 24, 12
# Probability of the Beta law beyond either end of the nodes; it is given to the end nodes.
BETA_TAIL = 1e-2
# The table starts with even steps near its upper end, and grows geometrically beyond this many e-folds.
EVEN_RANGE = 20.0
# Exponent of the soft minimum of log w. Small: the mean of log w. Large: its minimum.
SOFT_MIN = 0.25
# log(t w) is cut here. Below, a float32 product with a cell's probability would turn subnormal; above, 1 - exp(-t w) is 1.
LOG_TW_MIN, LOG_TW_MAX = -60.0, 20.0
# The logistic function of ONNX Runtime is flat beyond 18: cut it ourselves, so that all backends agree.
LOGIT_MAX = 17.0
# Largest ratio of a cell's neighbouring densities that the density within the cell follows.
MAX_LEAN = 256.0
# Stand for zero in denominators and logarithms; both are normal numbers in float32.
TINY, SMALL = 1e-30, 1e-6

_ROWS_PER_CHUNK = 256
_SQRT_HALF = math.sqrt(0.5)
_PDF_AT_0 = 1 / math.sqrt(2 * math.pi)


class Law(NamedTuple):
    """Laws of N draws, as histograms: ``edges`` (N, P + 1) increasing, ``mass`` (N, P) positive, of any sum."""

    edges: Float64
    mass: Float64


class NodePlan(NamedTuple):
    """What the search for the nodes needs to know of Beta(2, N - 1); see `node_plan`.

    targets : (NODES,) where the nodes shall be, as log E_q[tw / (1 + tw)], increasing.
    offset : where the table ends, above minus the soft minimum of log w.
    """

    targets: Float64
    offset: float


@lru_cache
def node_plan(num_candidates: int) -> NodePlan:
    """Targets of the node search for SIR with ``num_candidates`` >= 2 proposals.

    The search tabulates E_q[tw / (1 + tw)] instead of B(t) = E_q[1 - exp(-tw)]: they differ by 30 % at most, and it costs
    one logistic function of log t + log w. Targets are translated as if w were constant.
    """
    if num_candidates < 2:
        raise ValueError(f"num_candidates is {num_candidates}; expected at least 2 (one proposal is a plain draw)")
    low, high = _beta_quantile(BETA_TAIL, num_candidates), _beta_quantile(1 - BETA_TAIL, num_candidates)

    hazard = -np.log1p(-np.geomspace(low, high, NODES))
    targets = np.log(hazard / (1 + hazard))

    # How far above -c, with c = -log(E_q[exp(-a log w)]) / a the soft minimum, must log t go to reach the last target? By Markov's inequality P(log w < v) <= exp(a (v - c)): choose v so that log w >= v with probability `root`,
    # and log t so that the logistic function of log t + v is `root` too; root * root is the target.
    root = math.exp(0.5 * float(targets[-1]))
    offset = -math.log1p(-root) / SOFT_MIN + math.log(root / (1 - root))
    return NodePlan(np.asarray(targets, np.float64), offset)


def sample(
    cond: Mixture,
    uncond: Mixture | None,
    uniforms: npt.ArrayLike,
    *,
    guidance_scale: float,
    temperature: float,
    num_candidates: int = NUM_CANDIDATES,
) -> Array:
    """One draw per row, plain or guided.

    Parameters
    ----------
    cond, uncond : (weight, mu, logvar), each (N, K): weights >= 0 that sum to 1 in each row, means, log variances.
        ``uncond=None`` draws plainly.
    uniforms : (N, NUM_UNIFORMS) in [0, 1). The draw increases with it.
    guidance_scale : >= 1. Exactly 1 draws plainly, from ``cond``.
    temperature : > 0, multiplies the component std of the proposals (not that of the densities in their weights).
    num_candidates : >= 1, proposals of the SIR scheme whose law is drawn from. With 1 the draw is plain.

    Returns
    -------
    (N,) draws: float64 if an input mixture is float64, else float32. Computed in float64.

    Raises
    ------
    ValueError : a shape, a value that is not finite, or an argument out of range; the message names it.
    """
    if not (math.isfinite(guidance_scale) and guidance_scale >= 1):
        raise ValueError(f"guidance_scale is {guidance_scale}; expected a finite number, at least 1")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    if num_candidates < 1:
        raise ValueError(f"num_candidates is {num_candidates}; expected at least 1")
    mixtures = [_check_mixture("cond", cond)]
    if uncond is not None:
        mixtures.append(_check_mixture("uncond", uncond, mixtures[0].shape))
    u = np.asarray(uniforms)
    want = (mixtures[0].shape[1], NUM_UNIFORMS)
    if u.shape != want:
        raise ValueError(f"uniforms has shape {u.shape}; expected (N, NUM_UNIFORMS) = {want}")
    u = u.astype(np.float64)
    if not ((u >= 0) & (u < 1)).all():
        raise ValueError(f"uniforms has values outside [0, 1), from {u.min()} to {u.max()}")

    inputs = (*cond, *(uncond or ()))
    draws = np.empty(len(u), np.float64 if any(np.asarray(v).dtype == np.float64 for v in inputs) else np.float32)
    temperature, guidance_scale = float(temperature), float(guidance_scale)
    guided = uncond is not None and guidance_scale != 1 and num_candidates > 1
    for start in range(0, len(u), _ROWS_PER_CHUNK):
        rows = slice(start, start + _ROWS_PER_CHUNK)
        law = plain_law(mixtures[0][:, rows], temperature)
        if guided:
            law = guided_law(
                law, mixtures[0][:, rows], mixtures[1][:, rows], guidance_scale, node_plan(num_candidates), num_candidates
            )
        draws[rows] = quantile(law, u[rows])[:, 0]
    return draws


def plain_law(mixture: Float64, temperature: float) -> Law:
    """Law of a plain draw: mixture (3, N, K) float64 -> the mesh, and the probability of each of its cells.

    A Gaussian's probability of a cell of width d around z is pdf(z) d (1 + (z^2 - 1) d^2 / 24) up to terms in d^4, at most
    1e-4 of it, as no cell within REACH is wider than 2 REACH / CELLS_PER_GAUSSIAN std. Unlike a difference of distribution
    functions, it is as precise in the tails as elsewhere: in float32 too, and there single proposals win.
    """
    weight, mu, logvar = mixture
    std = np.exp(0.5 * logvar) * temperature
    edges = _mesh(mu, std)
    z = (_middle(edges)[:, None] - mu[..., None]) / std[..., None]                            # (N, K, P)
    width = np.diff(edges)[:, None] / std[..., None]
    pdf = np.exp(-0.5 * z**2) * (weight[..., None] * _PDF_AT_0)
    return Law(edges, np.maximum((pdf * width * (1 + (z**2 - 1) * width**2 / 24)).sum(1), TINY))


def guided_law(
    plain: Law, cond: Float64, uncond: Float64, guidance_scale: float, plan: NodePlan, num_candidates: int
) -> Law:
    """Law of a guided draw with ``plain`` as proposals: mixtures (3, N, K) float64; formulas at the top of this file."""
    edges, mass = plain
    middle = _middle(edges)
    log_w = (_log_density(middle, cond) - _log_density(middle, uncond)) * (guidance_scale - 1)  # (N, P)

    log_t = _search_nodes(log_w, mass, plan)
    tw = np.exp(np.clip(log_t[..., None] + log_w[:, None], LOG_TW_MIN, LOG_TW_MAX))           # (N, nodes, P)
    hit = -np.expm1(-tw)
    reached = (hit @ mass[..., None])[..., 0]                                                 # (N, nodes), the B(t_i)
    # hit, as a function of B, runs from 0 at 0 to 1 at 1 through the nodes: straight in between, which is exact where
    # t w stays small. Then p_N / q = int N (N-1) (1-B)^(N-2) hit(B) dB is a sum of its increments, each times the falling
    # slope of (1-B)^N in between.
    grid = np.pad(np.pad(reached, ((0, 0), (1, 0))), ((0, 0), (0, 1)), constant_values=1.0)
    slope = -np.diff((1 - grid) ** num_candidates) / np.maximum(np.diff(grid), TINY)          # (N, nodes + 1)
    share = slope[:, :-1] - slope[:, 1:]
    return Law(edges, mass * ((share[:, None] @ hit)[:, 0] + slope[:, -1:]))


def quantile(law: Law, uniforms: Float64) -> Float64:
    """Inverse distribution functions: N laws, uniforms (N, any) in [0, 1) -> draws of the same shape.

    Inside a cell the density runs from d0 to d1 as 1 / (1 + c y)^2, y in 0..1: nearly an exponential, but its distribution
    function and the inverse of that are plain fractions. The ratio d0 / d1 comes from the densities of the cells beside it.
    """
    edges, mass = law
    width = np.diff(edges)
    mass = np.maximum(mass, TINY)
    density = mass / np.maximum(width, TINY)
    beside = np.pad(density, ((0, 0), (1, 1)), mode="edge")
    lean = np.clip(beside[:, :-2] / beside[:, 2:], 1 / MAX_LEAN, MAX_LEAN) ** 0.25
    cdf = np.cumsum(mass, 1)
    wanted = uniforms * cdf[:, -1:]
    draws = np.empty_like(wanted)
    for row in range(len(wanted)):
        cell = np.minimum(np.searchsorted(cdf[row], wanted[row], side="right"), mass.shape[1] - 1)
        inside = np.clip(1 - (cdf[row, cell] - wanted[row]) / mass[row, cell], 0, 1)
        inside = inside / (inside + lean[row, cell] * (1 - inside))
        draws[row] = edges[row, cell] + width[row, cell] * inside
    return draws


def _middle(edges: Float64) -> Float64:
    return np.asarray(0.5 * (edges[:, 1:] + edges[:, :-1]), np.float64)


def mesh_targets(num_gaussians: int) -> Float64:
    """Ranks of the edges in the count that `_mesh` equalises: (P + 1,), from -K * REACH to K * REACH."""
    reach = num_gaussians * REACH
    return np.linspace(-reach, reach, CELLS_PER_GAUSSIAN * num_gaussians + 1)


def _mesh(mu: Float64, std: Float64) -> Float64:
    """Sorted cell edges (N, P + 1) for Gaussians (N, K).

    count(x) = sum_k clip((x - mu_k) / std_k, -REACH, REACH) is increasing and piecewise linear with 2K kinks; the edges are
    its inverse at even steps. Written as a sum of ramps, not as a search, so that it is continuous and fits a graph.
    """
    kinks = np.sort(np.concatenate([mu - REACH * std, mu + REACH * std], 1), 1)               # (N, 2K)
    z = (kinks[..., None] - mu[:, None]) / std[:, None]
    count = np.clip(z, -REACH, REACH).sum(-1)
    return _inverse(kinks, count, mesh_targets(mu.shape[1]))


def _inverse(x: Float64, y: Float64, wanted: Float64) -> Float64:
    """Piecewise linear inverse of increasing tables x, y (N, T) at ``wanted`` (W,), held at the ends -> (N, W)."""
    rise = np.maximum(np.diff(y), SMALL)
    ramp = np.clip((wanted[:, None] - y[:, None, :-1]) / rise[:, None], 0, 1)                 # (N, W, T - 1)
    return np.asarray(x[:, :1] + (ramp @ np.diff(x)[..., None])[..., 0], np.float64)


def _search_nodes(log_w: Float64, mass: Float64, plan: NodePlan) -> Float64:
    """log t_i such that B(t_i) has even steps in its logarithm over the range where Beta(2, N - 1) has its weight.

    log_w, mass (N, P) -> (N, NODES), increasing.
    """

    top, bottom = log_w.max(1, keepdims=True), log_w.min(1, keepdims=True)
    # E_q[tw / (1 + tw)] <= t E_q[w] bounds the range from below, the soft minimum (see node_plan) from above.
    log_mean = top + np.log((mass * np.exp(log_w - top)).sum(1, keepdims=True))
    soft_min = bottom - np.log((mass * np.exp(-SOFT_MIN * (log_w - bottom))).sum(1, keepdims=True)) / SOFT_MIN
    first, last = plan.targets[0] - log_mean, plan.offset - soft_min
    growth = np.log1p(np.maximum(last - first, 1.0) / EVEN_RANGE)
    log_t = last - EVEN_RANGE * np.expm1(np.linspace(1, 0, TABLE_NODES) * growth)             # (N, TABLE_NODES)
    logit = np.clip(log_t[..., None] + log_w[:, None], -LOGIT_MAX, LOGIT_MAX)
    entry = np.log(((1 / (1 + np.exp(-logit))) @ mass[..., None])[..., 0])
    return _inverse(log_t, entry, plan.targets)


def _log_density(x: Float64, mixture: Float64) -> Float64:
    """log p(x) + log(2 pi) / 2: x (N, P), mixture (3, N, K) -> (N, P), by log-sum-exp."""
    weight, mu, logvar = mixture
    scale = np.exp(-0.5 * logvar) * _SQRT_HALF
    peak = np.log(np.maximum(weight, TINY)) - 0.5 * logvar
    terms = peak[..., None] - ((x[:, None] - mu[..., None]) * scale[..., None]) ** 2          # (N, K, P)
    top = terms.max(1)
    return np.asarray(top + np.log(np.exp(terms - top[:, None]).sum(1)), np.float64)


def _beta_cdf(b: Float64, num_candidates: int) -> Float64:
    """Distribution function of Beta(2, N - 1): 1 - (1 - b)^(N-1) (1 + (N-1) b)."""
    more = num_candidates - 1
    with np.errstate(divide="ignore"):
        return np.asarray(1 - np.exp(more * np.log1p(-np.minimum(b, 1))) * (1 + more * b), np.float64)


def _beta_quantile(probability: float, num_candidates: int) -> float:
    """Inverse of `_beta_cdf`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if _beta_cdf(np.array(middle), num_candidates) < probability:
            low = middle
        else:
            high = middle
    return low


def _check_mixture(name: str, mixture: Mixture, shape: tuple[int, ...] | None = None) -> Float64:
    """(weight, mu, logvar) as one (3, N, K) float64 array; ``shape`` is what the array must have."""
    if len(mixture) != 3:
        raise ValueError(f"{name} has {len(mixture)} parts; expected 3: (weight, mu, logvar)")
    parts = [np.asarray(part) for part in mixture]
    want = parts[0].shape if shape is None else shape[1:]
    for part_name, part in zip(("weight", "mu", "logvar"), parts, strict=True):
        if part.ndim != 2 or part.shape != want or part.shape[1] == 0:
            expected = want if len(want) == 2 else "two axes"
            raise ValueError(f"{name} {part_name} has shape {part.shape}; expected (N, K), here {expected}")
        if not np.isfinite(part).all():
            rows = np.nonzero(~np.isfinite(part).all(1))[0]
            raise ValueError(
                f"{name} {part_name} has values that are not finite in {len(rows)} rows, the first is row {rows[0]}; "
                "expected finite numbers"
            )
    stacked = np.stack(parts).astype(np.float64)
    total = stacked[0].sum(1)
    if (stacked[0] < 0).any() or (np.abs(total - 1) > 1e-2).any():
        raise ValueError(
            f"{name} weight is as low as {stacked[0].min():.3g} and its rows sum to {total.min():.6g}..{total.max():.6g}; "
            "expected weights >= 0 that sum to 1"
        )
    return stacked
