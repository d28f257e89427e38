"""Ranges from streaming statistics: how far a tensor's values reach, and where to clip them.

Statistics have a fixed size, whatever they have seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Of the whole tensor's histogram, and of each channel's.
BINS, CHANNEL_BINS = 2048, 512
#: How a clipping point is chosen from the statistics.
METHODS = ("absmax", "percentile", "entropy", "mse")
PERCENTILE = 99.99
# Levels of the magnitude of a symmetric 8-bit integer.
LEVELS = 128
# Clipping points that are tried, for a tensor and for each of its channels.
CANDIDATES, CHANNEL_CANDIDATES, CHANNELS_AT_ONCE = 200, 32, 32
SMALLEST_LIMIT = 2.0**-10


@dataclass
class TensorStatistics:
    """What is kept of one tensor: extremes, moments, histograms of magnitudes, maxima per channel and per step.

    A histogram has a fixed number of bins over 0..limit; the limit is a power of two and doubles (neighbouring bins
    merge) when a larger value comes, so the result does not depend on how the values were split into updates. There is
    one of the tensor, and one of each channel with a limit of its own.
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
    channel_limit: Array = field(init=False)  # (C,)
    channel_histogram: Array = field(init=False)  # (C, CHANNEL_BINS)

    def __post_init__(self) -> None:
        self.channel_absmax = np.zeros(self.channels)
        self.step_absmax = np.zeros(self.steps)
        self.channel_limit = np.full(self.channels, SMALLEST_LIMIT)
        self.channel_histogram = np.zeros((self.channels, CHANNEL_BINS), np.uint32)

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
            self.histogram = _merged(self.histogram)
            self.limit *= 2
        bins = (size.ravel() * np.float32(BINS / self.limit)).astype(np.int32)
        self.histogram = self.histogram + np.bincount(bins, minlength=BINS)
        while (beyond := peaks >= self.channel_limit).any():
            self.channel_histogram[beyond] = _merged(self.channel_histogram[beyond])
            self.channel_limit[beyond] *= 2
        bins = (size * (CHANNEL_BINS / self.channel_limit).astype(np.float32)).astype(np.int64)
        bins += np.arange(self.channels) * CHANNEL_BINS
        counts = np.bincount(bins.ravel(), minlength=self.channel_histogram.size)
        self.channel_histogram += counts.reshape(self.channel_histogram.shape).astype(np.uint32)

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
        """Clipping point of the whole tensor by each of ``METHODS``."""
        absmax = np.array([self.absmax])
        found = _ranges(self.histogram[None], np.array([self.limit]), absmax, CANDIDATES)
        return {name: float(values[0]) for name, values in found.items()}

    def channel_ranges(self) -> dict[str, Array]:
        """Clipping point (C,) of each channel by each of ``METHODS``."""
        # A few channels at a time: their tables stay in the processor's cache, which is several times faster.
        parts = [
            _ranges(self.channel_histogram[rows], self.channel_limit[rows], self.channel_absmax[rows], CHANNEL_CANDIDATES)
            for rows in (slice(first, first + CHANNELS_AT_ONCE) for first in range(0, self.channels, CHANNELS_AT_ONCE))
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in METHODS}


ARRAYS = ("histogram", "channel_absmax", "step_absmax", "channel_limit", "channel_histogram")


def _merged(histogram: Array) -> Array:
    """Histograms (..., bins) over twice the range."""
    halved = histogram.reshape(*histogram.shape[:-1], -1, 2).sum(-1, dtype=histogram.dtype)
    return np.concatenate([halved, np.zeros_like(halved)], -1)


def _ranges(histograms: Array, limits: Array, absmax: Array, candidates: int) -> dict[str, Array]:
    return {
        "absmax": absmax.copy(),
        "percentile": np.minimum(percentile_range(histograms, limits), absmax),
        "entropy": np.minimum(entropy_range(histograms, limits, candidates=candidates), absmax),
        "mse": np.minimum(mse_range(histograms, limits, candidates=candidates), absmax),
    }


# Of histograms (H, bins) of magnitudes over 0..limits (H,) -> clipping points (H,); 0 where nothing was counted.


def percentile_range(histograms: Array, limits: Array, percentile: float = PERCENTILE) -> Array:
    """The magnitude that ``percentile`` % of the values do not exceed."""
    totals = histograms.sum(1, dtype=np.int64)
    shares = np.cumsum(histograms, 1, dtype=np.int64) / np.maximum(totals, 1)[:, None]
    first = (shares < percentile / 100 - 1e-12).sum(1)
    return np.where(totals > 0, (first + 1) * limits / histograms.shape[1], 0.0)


def mse_range(histograms: Array, limits: Array, levels: int = LEVELS, candidates: int = CANDIDATES) -> Array:
    """The clipping point with the least mean squared error of rounding to integers plus clipping."""
    bins = histograms.shape[1]
    totals = histograms.sum(1, dtype=np.float64)
    width = (limits / bins)[:, None]
    centres = (np.arange(bins) + 0.5) * width  # (H, bins)
    top = _used(histograms)[:, None] * width  # (H, 1)
    best, chosen = np.full(len(limits), np.inf), top[:, 0].copy()
    for share in np.linspace(1, 1 / candidates, candidates):
        clip = top * share
        step = np.maximum(clip, 1e-30) / (levels - 1)
        rounded = np.minimum(np.round(centres / step), levels - 1) * step
        error = (histograms * np.square(centres - rounded)).sum(1)
        # Below the bins' width the histogram cannot tell rounding errors apart: what it says is only their mean.
        error += totals * np.minimum(step, width)[:, 0] ** 2 / 12
        better = error < best
        best, chosen = np.where(better, error, best), np.where(better, clip[:, 0], chosen)
    return np.where(totals > 0, chosen, 0.0)


def entropy_range(histograms: Array, limits: Array, levels: int = LEVELS, candidates: int = CANDIDATES) -> Array:
    """The clipping point that loses least information: least KL between the clipped histogram and its quantised form.

    The method of TensorRT's entropy calibrator (S. Migacz, 8-bit inference with TensorRT, GTC 2017).
    """
    last, bins = _used(histograms), histograms.shape[1]
    best, chosen = np.full(len(limits), np.inf), last.copy()
    counts = histograms.astype(np.float64)
    for stop in range(levels, bins + 1, max(1, (bins - levels) // candidates)):
        inside = counts[:, :stop]
        reference = inside.copy()
        reference[:, -1] += counts[:, stop:].sum(1)
        group = np.arange(stop) * levels // stop
        starts = np.searchsorted(group, np.arange(levels))
        mass = np.add.reduceat(inside, starts, 1)  # (H, levels)
        filled = np.add.reduceat(inside > 0, starts, 1, dtype=np.int64)
        spread = np.where(inside > 0, (mass / np.maximum(filled, 1))[:, group], 0.0)
        p = reference / np.maximum(reference.sum(1, keepdims=True), 1)
        q = spread / np.maximum(spread.sum(1, keepdims=True), 1e-300)
        value = np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-9)), 0.0).sum(1)
        better = (value < best) & (stop <= last) & (spread.sum(1) > 0)
        best, chosen = np.where(better, value, best), np.where(better, stop, chosen)
    return chosen * limits / bins


def _used(histograms: Array) -> Array:
    """(H,): one past the last bin that counted anything."""
    bins = histograms.shape[1]
    return np.where(histograms.any(1), bins - np.argmax(histograms[:, ::-1] > 0, 1), 0)
