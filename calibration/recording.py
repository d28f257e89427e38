"""What was seen of a model that generates: statistics by layer, samples of whole steps; and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arinar.files import replacing

from .ranges import TensorStatistics

Array = npt.NDArray[Any]
# Of the file that keeps a recording.
RECORDING_VERSION = 3


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
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            head = json.loads(str(arrays.pop("head")))
            if head["version"] != RECORDING_VERSION:
                raise ValueError(f"it has version {head['version']}; this version of arinar reads {RECORDING_VERSION}")
            made = cls(head["settings"], done=head["done"], seen_steps=head["seen_steps"])
            made.tensors = head["tensors"]
            grouped: dict[str, dict[str, Array]] = {}
            feeds: dict[int, dict[str, Array]] = {}
            parts: dict[int, dict[str, Array]] = {}
            for name, value in arrays.items():
                kind, *rest = name.split("|")
                if kind == "layer":
                    grouped.setdefault(rest[0], {})[rest[1]] = value
                elif kind == "maxima":
                    made.maxima[rest[0]] = value
                elif kind == "sample" and rest[1] == "feed":
                    feeds.setdefault(int(rest[0]), {})[rest[2]] = value
                elif kind == "sample":
                    parts.setdefault(int(rest[0]), {})[rest[1]] = value
            made.layers = {name: TensorStatistics.from_arrays(value) for name, value in grouped.items()}
            made.samples = [
                StepSample(graph, step, feeds.get(i, {}), **parts[i]) for i, (graph, step) in enumerate(head["samples"])
            ]
        except Exception as error:  # what NumPy, zipfile and zlib raise for damaged files has no common type
            raise CalibrationError(
                f"{path} is damaged, or no recording of `arinar calibrate` ({error}); delete it and calibrate again"
            ) from error
        return made
