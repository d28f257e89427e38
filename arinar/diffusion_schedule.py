"""The noise schedule of a diffusion head: which timesteps a token passes through, and the constants of each step. NumPy.

Source: MAR's diffusion code (github.com/LTH14/mar), which is that of improved DDPM (arXiv 2102.09672): 1,000 cosine steps in
training, a subset of them (a "respacing") in sampling. All constants are computed in float64 and rounded to float32 where
they are used, in float64 runs as well, as published.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .text import shown

Float64 = npt.NDArray[np.float64]

#: Timesteps of training.
TRAIN_STEPS = 1000
# An upper and a lower number of sampling steps, for the first outer step and the last.
_ANNEALED = re.compile(r"(\d{1,4})-(\d{1,4})")


@dataclass(frozen=True)
class NoiseSchedule:
    """Constants of S kept timesteps, ascending; each (S,). Names as in the literature: ``alphas_cumprod`` is alpha-bar."""

    timesteps: npt.NDArray[np.int64]
    betas: Float64
    alphas_cumprod: Float64
    sqrt_alphas_cumprod: Float64
    sqrt_one_minus_alphas_cumprod: Float64
    sqrt_recip_alphas_cumprod: Float64
    sqrt_recipm1_alphas_cumprod: Float64
    posterior_log_variance_clipped: Float64
    posterior_mean_coef1: Float64
    posterior_mean_coef2: Float64
    log_betas: Float64

    def __len__(self) -> int:
        return len(self.timesteps)


@lru_cache
def noise_schedule(respacing: str = "") -> NoiseSchedule:
    """The schedule of a respacing as `kept_timesteps` takes it; its betas are those between kept timesteps."""
    timesteps = np.array(kept_timesteps(respacing), np.int64)
    alphas_cumprod = np.cumprod(1.0 - _cosine_betas())[timesteps]
    before = np.append(1.0, alphas_cumprod[:-1])
    betas = 1.0 - alphas_cumprod / before
    alphas_cumprod = np.cumprod(1.0 - betas)  # again, from the rounded betas, as published
    before = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = betas * (1.0 - before) / (1.0 - alphas_cumprod)
    # The first step's variance is 0: it takes the second's in its place.
    clipped = np.append(posterior_variance[1:2], posterior_variance[1:])
    return NoiseSchedule(
        timesteps=timesteps,
        betas=betas,
        alphas_cumprod=np.asarray(alphas_cumprod, np.float64),
        sqrt_alphas_cumprod=np.sqrt(alphas_cumprod),
        sqrt_one_minus_alphas_cumprod=np.sqrt(1.0 - alphas_cumprod),
        sqrt_recip_alphas_cumprod=np.sqrt(1.0 / alphas_cumprod),
        sqrt_recipm1_alphas_cumprod=np.sqrt(1.0 / alphas_cumprod - 1.0),
        posterior_log_variance_clipped=np.log(clipped),
        posterior_mean_coef1=betas * np.sqrt(before) / (1.0 - alphas_cumprod),
        posterior_mean_coef2=(1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
        log_betas=np.log(betas),
    )


def _cosine_betas() -> Float64:
    """(TRAIN_STEPS,): each beta is at most 0.999, which bites at the last alone."""

    def remaining(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = [remaining((i + 1) / TRAIN_STEPS) / remaining(i / TRAIN_STEPS) for i in range(TRAIN_STEPS)]
    return np.array([min(1.0 - ratio, 0.999) for ratio in steps])


def kept_timesteps(respacing: str) -> list[int]:
    """The timesteps that a respacing keeps, ascending, at least 2. Semantics as published:

    "" keeps all; "N": N of them, evenly from first to last, rounded half to even; "a,b,...": sections of equal length, so
    many of each; "ddimN": every s-th from 0 on, s the first whole stride that gives N. Raises ValueError for anything else.
    """
    if not isinstance(respacing, str):
        raise ValueError(f"sampling_steps is {shown(respacing)}; expected a text, such as '100', '10,20,30' or 'ddim25'")
    if not respacing:
        return list(range(TRAIN_STEPS))
    number = re.fullmatch(r"ddim(\d{1,9})", respacing)
    kept = _strided(int(number[1]), respacing) if number else _sections(respacing)
    if len(kept) < 2:
        raise ValueError(f"sampling_steps is {shown(respacing)}, {len(kept)} step; expected at least 2")
    return kept


def _strided(count: int, respacing: str) -> list[int]:
    for stride in range(1, TRAIN_STEPS):
        if len(found := range(0, TRAIN_STEPS, stride)) == count:
            return list(found)
    raise ValueError(
        f"sampling_steps is {shown(respacing)}; no whole stride over {TRAIN_STEPS} timesteps gives {count} steps: "
        f"ddim20, ddim25, ddim50 and ddim100 exist, among others"
    )


def _sections(respacing: str) -> list[int]:
    parts = [part.strip() for part in respacing.split(",")]
    if len(respacing) > 4 * TRAIN_STEPS or not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
        raise ValueError(
            f"sampling_steps is {shown(respacing)}; expected a number ('100'), numbers of sections ('10,20,30'), 'ddim25', "
            f"or an upper and a lower number for the first and the last outer step ('25-5')"
        )
    size, longer = divmod(TRAIN_STEPS, len(parts))
    kept: list[int] = []
    start = 0
    for index, count in enumerate(map(int, parts)):
        length = size + (index < longer)
        if not 1 <= count <= length:
            raise ValueError(
                f"sampling_steps is {shown(respacing)}; expected 1 to {length} steps of section {index + 1}'s {length} "
                f"timesteps, not {count}"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):  # accumulated in floating point, as published: the ties depend on it
            kept.append(start + round(position))
            position += stride
        start += length
    return kept


def respacings(sampling_steps: str, num_iter: int) -> list[str]:
    """The respacing of each of ``num_iter`` outer steps: the same for all, or, of "N-M", from N steps falling to M.

    Source of the latter: DiSA (arXiv 2505.20297), linear: M + floor((num_iter - 1 - step) / (num_iter - 1) * (N - M)). Raises
    ValueError for what is neither.
    """
    annealed = _ANNEALED.fullmatch(sampling_steps) if isinstance(sampling_steps, str) else None
    if annealed is None:
        kept_timesteps(sampling_steps)
        return [sampling_steps] * num_iter
    upper, lower = int(annealed[1]), int(annealed[2])
    if not 2 <= lower <= upper <= TRAIN_STEPS:
        raise ValueError(
            f"sampling_steps is {shown(sampling_steps)}; expected an upper and a lower number of steps, such as '25-5', "
            f"2 <= lower <= upper <= {TRAIN_STEPS}"
        )
    last = max(1, num_iter - 1)  # a single outer step takes the upper number
    return [
        str(lower + int((num_iter - 1 - step) / last * (upper - lower)) if num_iter > 1 else upper) for step in range(num_iter)
    ]


def most_steps(sampling_steps: str) -> int:
    """The largest number of sampling steps of an outer step, S."""
    return len(kept_timesteps(respacings(sampling_steps, 1)[0]))


#: What a sampling step is made of, in the order of `step_table`'s columns.
STEP_CONSTANTS = ("from_x", "from_eps", "log_beta", "log_posterior_variance", "noise")


@lru_cache
def step_table(respacing: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The S sampling steps in the order in which they are taken, from the noisiest -> their timesteps (S,), and their
    constants (S, 5):

    mean = from_x * x - from_eps * eps;  log variance = f * log_beta + (1 - f) * log_posterior_variance, f = (v + 1) / 2;
    the last step adds no noise. (The published code forms x0 = x * sqrt(1 / alpha-bar) - eps * sqrt(1 / alpha-bar - 1) on
    its way to the mean: up to 2e4 times x, beyond the range of half precision.)
    """
    schedule = noise_schedule(respacing)

    def rounded(values: Float64) -> Float64:
        return values.astype(np.float32).astype(np.float64)

    coef1, coef2 = rounded(schedule.posterior_mean_coef1), rounded(schedule.posterior_mean_coef2)
    columns = (
        coef1 * rounded(schedule.sqrt_recip_alphas_cumprod) + coef2,
        coef1 * rounded(schedule.sqrt_recipm1_alphas_cumprod),
        schedule.log_betas,
        schedule.posterior_log_variance_clipped,
        (np.arange(len(schedule)) > 0).astype(np.float64),
    )
    return schedule.timesteps[::-1].copy(), np.stack(columns, 1)[::-1].astype(np.float32)
