"""The law of a guided draw from 1-D Gaussian mixtures: what is computed, why, and its constants. NumPy only.

The published guided draw takes N = 1000 proposals x_i from the conditional mixture q (its component std times
the temperature), weights them by w(x_i) = (p_cond(x_i) / p_uncond(x_i)) ** (guidance_scale - 1), densities
without the temperature, and picks one in proportion to its weight (sampling importance resampling, SIR). Here
the law of that pick is computed, and its quantile function applied to a uniform: the draw is continuous in
every input and increases with the uniform. Rounding then moves a draw a little, where picking among random
proposals, or first a component and then a point in it, would now and then replace it by an unrelated one.

**The law for finite N.** As 1 / sum(w) = int_0^inf exp(-t sum(w)) dt, the density of the pick is

    p_N(x) = q(x) N w(x) int_0^inf exp(-t w(x)) E_q[exp(-t w)]^(N-1) dt.

Write hit(x, t) = 1 - exp(-t w(x)) and B(t) = E_q[hit]; integrate by parts, and change from t to B:

    p_N(x) = q(x) int_0^1 N (N-1) (1-B)^(N-2) hit(x, t(B)) dB.

hit rises from 0 to 1 as B does, and its mean over q is B. So it can be tabulated at a few nodes t_i and taken
as straight in between: every mass stays positive, their sum stays one, and log w is all that is needed of w.
Most of the weight is near B = 2 / N, which is how the finite N enters.

**Steps.** (1) A mesh of sorted edges that covers every Gaussian with equal steps in its own scale, and the
probability of q in each cell. (2) log w at each cell's middle. (3) Nodes t_i with even steps in log B: B(t)
may rise within a few e-folds of t or over thousands, so a wide, coarse table of it comes first. (4) The
integral, cell by cell. (5) The quantile, with a density inside each cell that leans as its neighbours
suggest. A plain draw is steps (1) and (5).

`arinar.runtime.gmm` carries it out in NumPy (float64), `arinar.mixture` in PyTorch, for the reference sampler and,
traced, for the graphs (float32).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Float64: TypeAlias = npt.NDArray[np.float64]

#: Uniforms per draw.
NUM_UNIFORMS = 1
#: Proposals per guided draw in the published code: part of the distribution, not an approximation to turn up.
NUM_CANDIDATES = 1000

# More cells sharpen the law where few proposals carry all the weight; cost is proportional.
CELLS_PER_GAUSSIAN = 64
# Half width of the mesh around each Gaussian, in std. A probability of 1.2e-7 lies beyond: one set of 1000
# proposals in 8,600 has one there.
REACH = 5.3
# Nodes in log t: of the table that finds the range, and of the integral.
TABLE_NODES, NODES = 24, 12
# Probability of Beta(2, N - 1), the law of B, below the first node and above the last.
BETA_TAIL = 1e-2
# The table starts with even steps at its upper end, and they grow geometrically beyond this many e-folds.
EVEN_RANGE = 20.0
# Exponent of the soft minimum of log w that bounds the table. Small: the mean of log w. Large: its minimum.
SOFT_MIN = 0.25
# log(t w) is cut here. Below, a float32 product with a probability would turn subnormal; above, hit is 1.
LOG_TW_MIN, LOG_TW_MAX = -60.0, 20.0
# The logistic function of ONNX Runtime is flat beyond 18: cut it ourselves, so that all backends agree.
LOGIT_MAX = 17.0
# Largest ratio of the densities on either side of a cell that the density inside it follows.
MAX_LEAN = 256.0
# Stand for zero in denominators and logarithms; both are normal numbers in float32.
TINY, SMALL = 1e-30, 1e-6


class NodePlan(NamedTuple):
    """What the search for the nodes needs to know of the number of proposals; see `node_plan`.

    targets : (NODES,) where the nodes shall be, as log E_q[tw / (1 + tw)], increasing.
    offset : where the table ends, above minus the soft minimum of log w.
    """

    targets: Float64
    offset: float


@lru_cache
def node_plan(num_candidates: int) -> NodePlan:
    """Targets of the node search for SIR with ``num_candidates`` >= 2 proposals.

    The search tabulates E_q[tw / (1 + tw)] instead of B(t) = E_q[1 - exp(-tw)]: they differ by 30 % at most,
    and the former costs one logistic function of log t + log w. Targets are translated as if w were constant.
    """
    if num_candidates < 2:
        raise ValueError(f"num_candidates is {num_candidates}; expected at least 2 (1 is a plain draw)")
    low, high = _beta_quantile(BETA_TAIL, num_candidates), _beta_quantile(1 - BETA_TAIL, num_candidates)
    hazard = -np.log1p(-np.geomspace(low, high, NODES))
    targets = np.log(hazard / (1 + hazard))

    # With c = -log(E_q[exp(-a log w)]) / a the soft minimum, how far above -c must log t go to reach the last
    # target? By Markov's inequality P(log w < v) <= exp(a (v - c)): choose v so that log w >= v with
    # probability `root`, and log t so that the logistic function of log t + v is `root` too; root * root is
    # the target.
    root = math.exp(0.5 * float(targets[-1]))
    offset = -math.log1p(-root) / SOFT_MIN + math.log(root / (1 - root))
    return NodePlan(np.asarray(targets, np.float64), offset)


def mesh_targets(num_gaussians: int) -> Float64:
    """Even steps of the count that `_mesh` inverts: (P + 1,), from -K REACH to K REACH."""
    reach = num_gaussians * REACH
    return np.linspace(-reach, reach, CELLS_PER_GAUSSIAN * num_gaussians + 1)


def _beta_quantile(probability: float, num_candidates: int) -> float:
    """Quantile of Beta(2, N - 1): bisects its distribution function 1 - (1 - b)^(N-1) (1 + (N-1) b)."""
    more = num_candidates - 1
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if 1 - (1 - middle) ** more * (1 + more * middle) < probability:
            low = middle
        else:
            high = middle
    return low
