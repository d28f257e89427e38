"""The law of a diffusion head's draws: each sampling step of a token follows a Gaussian with a mean and a variance for each
feature. NumPy only."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .diffusion_schedule import most_steps, noise_schedule
from .law import Law

Array = npt.NDArray[Any]


def gaussian_kl(p: tuple[Array, ...], q: tuple[Array, ...]) -> Array:
    """KL(p || q) of Gaussians (mean, logvar), each (..., D) with independent features -> (...), in nats, at least 0."""
    (mean_p, logvar_p), (mean_q, logvar_q) = ([np.asarray(part, np.float64) for part in parts] for parts in (p, q))
    ratio = logvar_p - logvar_q
    per_feature = 0.5 * (np.expm1(ratio) - ratio + (mean_p - mean_q) ** 2 * np.exp(-logvar_q))
    return np.asarray(per_feature.sum(-1))


def forced_states(tokens: Array, respacing: str) -> npt.NDArray[np.float32]:
    """Tokens (N, D) -> a state x of each of S sampling steps (N, S, D), from the noisiest: what training makes of a token,
    sqrt(alpha-bar) * token + sqrt(1 - alpha-bar) * noise, with the same noise for every row, whatever rows there are."""
    schedule = noise_schedule(respacing)
    kept, lost = schedule.sqrt_alphas_cumprod[::-1], schedule.sqrt_one_minus_alphas_cumprod[::-1]
    noise = _forced_noise(len(schedule), tokens.shape[1])
    return np.asarray(kept[:, None] * tokens[:, None] + lost[:, None] * noise, np.float32)


@lru_cache
def _forced_noise(steps: int, features: int) -> Array:
    return np.random.Generator(np.random.Philox(key=0)).standard_normal((steps, features))


def _make_normals(generator: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return generator.standard_normal(shape, dtype=np.float32)


def _check_normals(draws: Array) -> None:
    if not np.isfinite(draws).all():
        raise ValueError("noise.draws has values that are not finite; expected standard normals")


LAW = Law(
    draw="sampling step",
    parts=("mean", "logvar"),
    titles={"mean": "mean of a sampling step", "logvar": "log variance of a sampling step"},
    kl=gaussian_kl,
    pick=lambda draws, parts: np.zeros(np.shape(draws), np.int64),  # there is one Gaussian to draw from
    picks=lambda config: 1,
    noise="draws",
    # The initial x, and what each sampling step adds (the last adds none of it).
    size=lambda config: most_steps(config.sampling_steps) + 1,
    make=_make_normals,
    check=_check_normals,
)
