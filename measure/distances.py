"""Distances between two sets of samples, and between images, in NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Distances that are in memory at a time.
TABLE = 1 << 21
# Images that are the same count as this many dB.
MAX_PSNR = 78.0


def frechet_distance(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians, means (F,) and covariances (F, F).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), as in Heusel et al. (arXiv 1706.08500), by symmetric
    eigendecompositions: no complex numbers, singular covariances allowed.
    """
    values, vectors = np.linalg.eigh(np.asarray(cov_a, np.float64))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    middle = root @ np.asarray(cov_b, np.float64) @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((middle + middle.T) / 2), 0)).sum()
    gap = np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)
    return max(float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross), 0.0)


def frechet_between(a: Array, b: Array) -> float:
    """:func:`frechet_distance` of the Gaussians fitted to two sets of features (N, F) and (M, F)."""
    return frechet_distance(*mean_and_covariance(a), *mean_and_covariance(b))


def mean_and_covariance(features: Array) -> tuple[Array, Array]:
    """Features (N, F) -> (F,), (F, F)."""
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def mmd_test(
    a: Array, b: Array, *, permutations: int = 500, seed: int = 0, strata: tuple[Array, Array] | None = None
) -> tuple[float, float]:
    """Squared maximum mean discrepancy of two sets of features (N, F) and (M, F), and its permutation p-value.

    Gaussian kernel with the median distance of the pooled set as bandwidth, biased estimate (Gretton et al., JMLR
    2012). The p-value is the share of random relabellings with at least this discrepancy: small means different. The
    sets must be independent. ``strata``: groups (N,) and (M,), integers; samples change sides within their group only,
    as they must where both sets were made with so many of each.
    """
    pooled = np.concatenate([a, b]).astype(np.float64)
    norms = np.square(pooled).sum(1)
    square = np.maximum(norms[:, None] + norms - 2 * pooled @ pooled.T, 0)
    off_diagonal = square[~np.eye(len(pooled), dtype=bool)]
    kernel = np.exp(-square / max(float(np.median(off_diagonal)), 1e-12))
    signs = np.concatenate([np.full(len(a), 1 / len(a)), np.full(len(b), -1 / len(b))])
    rng = np.random.default_rng(seed)
    groups = np.zeros(len(pooled)) if strata is None else np.concatenate(strata).astype(np.float64)
    order = np.argsort(groups[:, None] + rng.random((len(pooled), permutations)), 0)  # (N + M, permutations)
    table = np.empty((len(pooled), 1 + permutations))
    table[:, 0] = signs
    np.put_along_axis(table[:, 1:], order, signs[np.argsort(groups, kind="stable")][:, None], 0)
    values = (table * (kernel @ table)).sum(0)
    above = int((values[1:] >= values[0] - 1e-12).sum())
    return float(values[0]), (1 + above) / (1 + permutations)


def kernel_distance(a: Array, b: Array, *, subsets: int = 100, size: int = 1000, seed: int = 2020) -> tuple[float, float]:
    """KID of two sets of features (N, F) and (M, F): mean and standard deviation over random subsets of ``size`` of each.

    Unbiased estimate with the kernel (x.y / F + 1)^3 (Binkowski et al., arXiv 1801.01401); the subsets are torch-fidelity's.
    """
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = (set_[rng.choice(len(set_), size, replace=False)].astype(np.float64) for set_ in (a, b))
        xx, yy, xy = ((p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        within = sum(float(table.sum() - np.trace(table)) for table in (xx, yy)) / (size * (size - 1))
        values.append(within - 2 * float(xy.mean()))
    return float(np.mean(values)), float(np.std(values))


def precision_and_recall(made: Array, real: Array, *, neighbours: int = 3) -> tuple[float, float]:
    """Of features (N, F) and (M, F): the share of ``made`` within the real set's manifold, and the reverse.

    A manifold is the union of balls about its points that reach to each one's k-th neighbour (Kynkaanniemi et al., arXiv
    1904.06991).
    """
    reach = [_reach(points, neighbours) for points in (made, real)]
    return _covered(made, real, reach[1]), _covered(real, made, reach[0])


def _reach(points: Array, neighbours: int) -> Array:
    """(N,): squared distance of each to its k-th neighbour. (The nearest is the point itself.)"""
    # (Copied: a column alone would keep its whole table.)
    tables = _squared_distances(points, points)
    return np.concatenate([np.partition(table, neighbours, 1)[:, neighbours].copy() for table in tables])


def _covered(points: Array, centres: Array, reach: Array) -> float:
    """The share of points that lie in a ball."""
    return sum(int((table <= reach).any(1).sum()) for table in _squared_distances(points, centres)) / len(points)


def _squared_distances(a: Array, b: Array) -> Iterator[Array]:
    """Tables (some, M) of |a - b|^2."""
    block = max(1, TABLE // len(b))
    b = b.astype(np.float64)
    norms = np.square(b).sum(1)
    for start in range(0, len(a), block):
        some = a[start : start + block].astype(np.float64)
        yield np.maximum(np.square(some).sum(1)[:, None] + norms - 2 * some @ b.T, 0)


def psnr(have: Array, want: Array) -> Array:
    """Peak signal-to-noise ratio (N,) in dB of images (N, H, W, 3) uint8, at most ``MAX_PSNR``."""
    mse = np.square(have.astype(np.float64) - want.astype(np.float64)).mean((1, 2, 3))
    return np.asarray(np.minimum(10 * np.log10(255.0**2 / np.maximum(mse, 1e-9)), MAX_PSNR))
