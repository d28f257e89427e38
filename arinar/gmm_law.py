"""The law of a Gaussian mixture head's draws: each feature of a token follows a 1-D mixture. NumPy only.

(How a guided draw is made from two mixtures is in `arinar.mixture_law`.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .law import Law
from .mixture_law import NUM_UNIFORMS

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


def _make_uniforms(generator: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return generator.random(shape, dtype=np.float32)


def _check_uniforms(draws: Array) -> None:
    if not ((draws >= 0) & (draws < 1)).all():
        raise ValueError("noise.uniforms has values outside [0, 1)")


LAW = Law(
    draw="feature",
    parts=("weight", "mu", "logvar"),
    titles={"weight": "component weight", "mu": "component mean (mu)", "logvar": "component log variance"},
    kl=mixture_kl,
    pick=responsible_component,
    picks=lambda config: config.num_gaussians,
    noise="uniforms",
    size=lambda config: NUM_UNIFORMS,
    make=_make_uniforms,
    check=_check_uniforms,
)
