"""Distances between 1-D Gaussian mixtures, in NumPy."""

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
