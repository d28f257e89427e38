"""Ranges from streaming statistics: how far a tensor's values reach, and where to clip them.

Statistics have a fixed size, whatever they have seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BINS = 2048
#: How a clipping point is chosen from the statistics.
METHODS = ("absmax", "percentile", "entropy", "mse")
PERCENTILE = 99.99
# Levels of the magnitude of a symmetric 8-bit integer.
LEVELS = 128


@dataclass
class TensorStatistics:
    """What is kept of one tensor: extremes, moments, a histogram of magnitudes, maxima per channel and per step.

    The histogram has a fixed number of bins over 0..limit; the limit is a power of two and doubles (neighbouring bins
    merge) when a larger value comes, so the result does not depend on how the values were split into updates.
    """

    channels: int
    steps: int
    low: float = np.inf
    high: float = -np.inf
    total: float = 0.0
    squares: float = 0.0
    count: int = 0
    limit: float = 2.0**-10
    histogram: Array = field(default_factory=lambda: np.zeros(BINS, np.int64))
    channel_absmax: Array = field(init=False)
    step_absmax: Array = field(init=False)

    def __post_init__(self) -> None:
        self.channel_absmax = np.zeros(self.channels)
        self.step_absmax = np.zeros(self.steps)

    @property
    def absmax(self) -> float:
        return float(self.channel_absmax.max())

    def update(self, values: Array, step: int) -> None:
        """Add values (..., channels) seen at an outer step. They must be finite."""
        if not values.size:
            return
        rows = values.reshape(-1, self.channels)
        size = np.abs(rows)
        peaks = size.max(0)
        peak = float(peaks.max())
        self.low, self.high = min(self.low, float(rows.min())), max(self.high, float(rows.max()))
        self.total += float(rows.sum(dtype=np.float64))
        self.squares += float(np.square(rows, dtype=np.float64).sum())
        self.count += rows.size
        self.channel_absmax = np.maximum(self.channel_absmax, peaks)
        self.step_absmax[step] = max(self.step_absmax[step], peak)
        while peak >= self.limit:
            self.histogram = np.concatenate([self.histogram.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.limit *= 2
        bins = (size.ravel() * np.float32(BINS / self.limit)).astype(np.int32)
        self.histogram = self.histogram + np.bincount(bins, minlength=BINS)

    def arrays(self) -> dict[str, Array]:
        """Everything, as arrays that ``np.savez`` takes."""
        scalars = [self.low, self.high, self.total, self.squares, float(self.count), self.limit]
        return {
            "scalars": np.array(scalars), "histogram": self.histogram,
            "channel_absmax": self.channel_absmax, "step_absmax": self.step_absmax,
        }  # fmt: skip

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array]) -> TensorStatistics:
        made = cls(len(arrays["channel_absmax"]), len(arrays["step_absmax"]))
        made.low, made.high, made.total, made.squares, count, made.limit = (float(v) for v in arrays["scalars"])
        made.count = int(count)
        for name in ("histogram", "channel_absmax", "step_absmax"):
            setattr(made, name, arrays[name].copy())
        return made

    def ranges(self) -> dict[str, float]:
        """Clipping point by each of ``METHODS``."""
        return {
            "absmax": self.absmax, "percentile": min(percentile_range(self.histogram, self.limit), self.absmax),
            "entropy": min(entropy_range(self.histogram, self.limit), self.absmax),
            "mse": min(mse_range(self.histogram, self.limit), self.absmax),
        }  # fmt: skip


def percentile_range(histogram: Array, limit: float, percentile: float = PERCENTILE) -> float:
    """The magnitude that ``percentile`` % of the values do not exceed."""
    if not histogram.sum():
        return 0.0
    shares = np.cumsum(histogram) / histogram.sum()
    return float((np.searchsorted(shares, percentile / 100 - 1e-12) + 1) * limit / len(histogram))


def mse_range(histogram: Array, limit: float, levels: int = LEVELS, candidates: int = 200) -> float:
    """The clipping point with the least mean squared error of rounding to integers plus clipping."""
    centres = (np.arange(len(histogram)) + 0.5) * limit / len(histogram)
    used = np.nonzero(histogram)[0]
    if not len(used):
        return 0.0
    top = (used[-1] + 1) * limit / len(histogram)
    best, chosen = np.inf, float(top)
    for clip in np.linspace(top, top / candidates, candidates):
        step = clip / (levels - 1)
        rounded = np.minimum(np.round(centres[used] / step), levels - 1) * step
        error = float((histogram[used] * np.square(centres[used] - rounded)).sum())
        # Below the bins' width the histogram cannot tell rounding errors apart: what it says is only their mean.
        error += float(histogram[used].sum()) * min(step, limit / len(histogram)) ** 2 / 12
        if error < best:
            best, chosen = error, float(clip)
    return chosen


def entropy_range(histogram: Array, limit: float, levels: int = LEVELS) -> float:
    """The clipping point that loses least information: least KL between the clipped histogram and its quantised form.

    The method of TensorRT's entropy calibrator (S. Migacz, 8-bit inference with TensorRT, GTC 2017).
    """
    used = np.nonzero(histogram)[0]
    if not len(used):
        return 0.0
    last = int(used[-1]) + 1
    if last <= levels:
        return last * limit / len(histogram)
    best, chosen = np.inf, last
    for stop in range(levels, last + 1, max(1, (last - levels) // 200)):
        reference = histogram[:stop].astype(np.float64)
        inside = reference.copy()
        reference[-1] += histogram[stop:].sum()
        group = np.arange(stop) * levels // stop
        mass = np.bincount(group, inside, levels)
        filled = np.bincount(group, inside > 0, levels)
        spread = np.where(inside > 0, (mass / np.maximum(filled, 1))[group], 0.0)
        if spread.sum() == 0:
            continue
        p, q = reference / reference.sum(), spread / spread.sum()
        keep = p > 0
        value = float((p[keep] * np.log(p[keep] / np.maximum(q[keep], 1e-9))).sum())
        if value < best:
            best, chosen = value, stop
    return chosen * limit / len(histogram)
