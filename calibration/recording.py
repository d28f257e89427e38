"""What was seen of a model that generates: statistics by layer, samples of whole steps; and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arinar.config import MAX_TOKENS
from arinar.files import replacing
from arinar.reading import parse_json, read_npz
from arinar.values import integer

from .ranges import TensorStatistics

Array = npt.NDArray[Any]
# Of the file that keeps a recording.
RECORDING_VERSION = 3
# Bytes of it, read: the kept steps of the largest causal model, each with its cache. Samples of it.
MAX_RECORDING, MAX_SAMPLES = 3 << 30, 1024


class CalibrationError(ValueError):
    """Calibration that cannot go on, or a calibration file that does not fit. The message tells the remedy."""


@dataclass
class StepSample:
    """One outer step of a real trajectory: what went into the outer graph, and the tokens drawn from its z.

    ``feed`` inputs of ``graph`` (outer_prefill or outer_step); ``labels`` (N,) of the cache rows (causal only);
    ``rows`` which rows of the z that they give; ``tokens`` (rows, D).
    """

    graph: str
    step: int
    feed: dict[str, Array]
    labels: Array
    rows: Array
    tokens: Array

    def check(self) -> None:
        """Raise ValueError where the parts do not fit each other."""
        shapes = [value.shape for value in (self.labels, self.rows, self.tokens)]
        whole = all(value.dtype.kind == "i" and value.ndim == 1 for value in (self.labels, self.rows))
        if not whole or self.tokens.ndim != 2 or len(self.tokens) != len(self.rows) or self.rows.min(initial=0) < 0:
            raise ValueError(f"a sample has labels, rows and tokens {shapes}; expected (N,), (R,), (R, D)")


@dataclass
class Recording:
    """Everything recorded so far."""

    settings: dict[str, Any]
    layers: dict[str, TensorStatistics] = field(default_factory=dict)
    maxima: dict[str, Array] = field(default_factory=dict)  # graph -> (tensors, steps)
    tensors: dict[str, list[str]] = field(default_factory=dict)  # graph -> names of those tensors
    samples: list[StepSample] = field(default_factory=list)
    done: int = 0  # images
    seen_steps: int = 0

    def save(self, path: Path) -> None:
        """Write to ``path`` (npz) in one step."""
        arrays: dict[str, Array] = {}
        for name, statistics in self.layers.items():
            arrays |= {f"layer|{name}|{key}": value for key, value in statistics.arrays().items()}
        arrays |= {f"maxima|{graph}": value for graph, value in self.maxima.items()}
        for index, sample in enumerate(self.samples):
            arrays |= {f"sample|{index}|feed|{key}": value for key, value in sample.feed.items()}
            for key in ("labels", "rows", "tokens"):
                arrays[f"sample|{index}|{key}"] = getattr(sample, key)
        head = {
            "version": RECORDING_VERSION,
            "settings": self.settings,
            "done": self.done,
            "tensors": self.tensors,
            "seen_steps": self.seen_steps,
            "samples": [[sample.graph, sample.step] for sample in self.samples],
        }
        arrays["head"] = np.array(json.dumps(head))
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Raises CalibrationError for what is not such a file."""
        try:
            arrays = read_npz(path, MAX_RECORDING)
            head = parse_json(str(arrays.pop("head")))
            if head["version"] != RECORDING_VERSION:
                raise ValueError(f"it has version {head['version']}; this version of arinar reads {RECORDING_VERSION}")
            done, seen = (integer(name, head[name], 0, 1 << 48) for name in ("done", "seen_steps"))
            made = cls(dict(head["settings"]), done=done, seen_steps=seen, tensors=dict(head["tensors"]))
            made._fill(arrays, head["samples"])
        except Exception as error:  # what NumPy, zipfile and zlib raise for damaged files has no common type
            raise CalibrationError(
                f"{path} is damaged, or no recording of `arinar calibrate` ({error}); delete it and calibrate again"
            ) from error
        return made

    def _fill(self, arrays: dict[str, Array], samples: list[tuple[str, int]]) -> None:
        """Give every array its place by its name. Raises ValueError for one that has none."""
        if len(samples) > MAX_SAMPLES:
            raise ValueError(f"it has {len(samples):,} samples; expected at most {MAX_SAMPLES}")
        layers: dict[str, dict[str, Array]] = {}
        feeds: list[dict[str, Array]] = [{} for _ in samples]
        parts: list[dict[str, Array]] = [{} for _ in samples]
        for name, value in arrays.items():
            kind, *rest = name.split("|")
            if kind == "layer" and len(rest) == 2:
                layers.setdefault(rest[0], {})[rest[1]] = value
            elif kind == "maxima" and len(rest) == 1:
                self.maxima[rest[0]] = value
            elif kind == "sample" and len(rest) in (2, 3):
                index = integer("the number of a sample", int(rest[0]), 0, len(samples) - 1)
                (parts if len(rest) == 2 else feeds)[index][rest[-1]] = value
            else:
                raise ValueError(f"it has an array {name[:60]!r}, which no recording has")
        self.layers = {name: TensorStatistics.from_arrays(value) for name, value in layers.items()}
        for (graph, step), feed, part in zip(samples, feeds, parts, strict=True):
            sample = StepSample(str(graph), integer("the step of a sample", step, 0, MAX_TOKENS), feed, **part)
            sample.check()
            self.samples.append(sample)
