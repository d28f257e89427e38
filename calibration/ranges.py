"""Ranges from streaming statistics: how far a tensor's values reach, and where to clip them.

Statistics have a fixed size, whatever they have seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Of a histogram.
BINS = 2048
#: How a clipping point is chosen from the statistics.
METHODS = ("absmax", "percentile", "entropy", "mse")
PERCENTILE = 99.99
# Levels of the magnitude of a symmetric 8-bit integer.
LEVELS = 128
# Clipping points that are tried.
CANDIDATES = 200
SMALLEST_LIMIT = 2.0**-10


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
    limit: float = SMALLEST_LIMIT
    histogram: Array = field(default_factory=lambda: np.zeros(BINS, np.int64))
    channel_absmax: Array = field(init=False)  # (C,)
    step_absmax: Array = field(init=False)  # (steps,)

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
            halved = self.histogram.reshape(-1, 2).sum(1)
            self.histogram = np.concatenate([halved, np.zeros_like(halved)])
            self.limit *= 2
        bins = (size.ravel() * np.float32(BINS / self.limit)).astype(np.int32)
        self.histogram = self.histogram + np.bincount(bins, minlength=BINS)

    def arrays(self) -> dict[str, Array]:
        """Everything, as arrays that ``np.savez`` takes."""
        scalars = [self.low, self.high, self.total, self.squares, float(self.count), self.limit]
        return {"scalars": np.array(scalars)} | {name: getattr(self, name) for name in ARRAYS}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array]) -> TensorStatistics:
        """Raises KeyError or ValueError for what :meth:`arrays` did not make."""
        made = cls(len(arrays["channel_absmax"]), len(arrays["step_absmax"]))
        made.low, made.high, made.total, made.squares, count, made.limit = (float(v) for v in arrays["scalars"])
        made.count = int(count)
        for name in ARRAYS:
            if arrays[name].shape != getattr(made, name).shape:
                raise ValueError(f"{name} has shape {arrays[name].shape}; expected {getattr(made, name).shape}")
            setattr(made, name, arrays[name].copy())
        return made

    def ranges(self) -> dict[str, float]:
        """Clipping point of the tensor by each of ``METHODS``."""
        found = {"absmax": self.absmax}
        for name, method in (("percentile", percentile_range), ("entropy", entropy_range), ("mse", mse_range)):
            found[name] = min(method(self.histogram, self.limit), self.absmax)
        return found


ARRAYS = ("histogram", "channel_absmax", "step_absmax")


# Of a histogram (bins,) of magnitudes over 0..limit -> clipping point; 0 where nothing was counted.


def percentile_range(histogram: Array, limit: float, percentile: float = PERCENTILE) -> float:
    """The magnitude that ``percentile`` % of the values do not exceed."""
    total = int(histogram.sum())
    shares = np.cumsum(histogram) / max(total, 1)
    first = int((shares < percentile / 100 - 1e-12).sum())
    return (first + 1) * limit / len(histogram) if total else 0.0


def mse_range(histogram: Array, limit: float, levels: int = LEVELS, candidates: int = CANDIDATES) -> float:
    """The clipping point with the least mean squared error of rounding to integers plus clipping."""
    bins, total = len(histogram), float(histogram.sum())
    width = limit / bins
    centres = (np.arange(bins) + 0.5) * width
    top = _used(histogram) * width
    best, chosen = np.inf, top
    for share in np.linspace(1, 1 / candidates, candidates):
        clip = float(top * share)
        step = max(clip, 1e-30) / (levels - 1)
        rounded = np.minimum(np.round(centres / step), levels - 1) * step
        error = float((histogram * np.square(centres - rounded)).sum())
        # Below the bins' width the histogram cannot tell rounding errors apart: what it says is only their mean.
        error += total * min(step, width) ** 2 / 12
        if error < best:
            best, chosen = error, clip
    return chosen if total else 0.0


def entropy_range(histogram: Array, limit: float, levels: int = LEVELS, candidates: int = CANDIDATES) -> float:
    """The clipping point that loses least information: least KL between the clipped histogram and its quantised form.

    The method of TensorRT's entropy calibrator (S. Migacz, 8-bit inference with TensorRT, GTC 2017).
    """
    last, bins = _used(histogram), len(histogram)
    best, chosen = np.inf, last
    counts = histogram.astype(np.float64)
    for stop in range(levels, min(last, bins) + 1, max(1, (bins - levels) // candidates)):
        inside = counts[:stop]
        reference = inside.copy()
        reference[-1] += counts[stop:].sum()
        group = np.arange(stop) * levels // stop
        starts = np.searchsorted(group, np.arange(levels))
        mass = np.add.reduceat(inside, starts)  # (levels,)
        filled = np.add.reduceat(inside > 0, starts, dtype=np.int64)
        spread = np.where(inside > 0, (mass / np.maximum(filled, 1))[group], 0.0)
        p = reference / max(reference.sum(), 1)
        q = spread / max(spread.sum(), 1e-300)
        value = float(np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-9)), 0.0).sum())
        if value < best and spread.sum() > 0:
            best, chosen = value, stop
    return chosen * limit / bins


def _used(histogram: Array) -> int:
    """One past the last bin that counted anything."""
    filled = np.flatnonzero(histogram)
    return int(filled[-1]) + 1 if filled.size else 0
