"""Distances between distributions, in NumPy: between Gaussian mixtures, and between two sets of samples.

Shared by parity (`arinar.export`) and calibration (`arinar.calibration`), which do not import each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def mixture_kl(p: tuple[Array, ...], q: tuple[Array, ...], nodes: int = 32) -> Array:
    """KL(p || q) of 1-D Gaussian mixtures (weight, mu, logvar), each (..., K) -> (...), in nats, at least 0.

    By Gauss-Hermite quadrature over each component of p.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    p, q = _normalized(p), _normalized(q)
    weight, mu, logvar = p
    x = mu[..., None] + np.exp(0.5 * logvar)[..., None] * points  # (..., K, nodes)
    ratio = _log_density(x, p) - _log_density(x, q)
    return np.asarray(np.maximum((weight[..., None] * weights * ratio).sum((-1, -2)), 0.0))


def responsible_component(x: Array, mixture: tuple[Array, ...]) -> Array:
    """The component that most probably drew x (...) from mixtures (..., K) -> (...) int."""
    weight, mu, logvar = _normalized(mixture)
    return np.asarray(_terms(np.asarray(x, np.float64)[..., None], (weight, mu, logvar)).argmax(-1))


def _normalized(mixture: tuple[Array, ...]) -> tuple[Array, ...]:
    """In float64, the weights summing to 1: float32 ones miss it by more than the divergences of interest."""
    weight, mu, logvar = (np.asarray(value, np.float64) for value in mixture)
    return weight / weight.sum(-1, keepdims=True), mu, logvar


def _terms(x: Array, mixture: tuple[Array, ...]) -> Array:
    """Log of each weighted component's density at x, without the constant."""
    weight, mu, logvar = mixture
    terms: Array = np.log(np.maximum(weight, 1e-300)) - 0.5 * ((x - mu) ** 2 * np.exp(-logvar) + logvar)
    return terms


def _log_density(x: Array, mixture: tuple[Array, ...]) -> Array:
    """x (..., K, nodes) under mixtures (..., K) -> (..., K, nodes)."""
    weight, mu, logvar = (value[..., None, None, :] for value in mixture)
    terms = _terms(x[..., None], (weight, mu, logvar))
    peak = terms.max(-1)
    total: Array = peak + np.log(np.exp(terms - peak[..., None]).sum(-1)) - 0.5 * np.log(2 * np.pi)
    return total


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
