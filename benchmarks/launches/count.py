"""Counts of a recorded micro-batch: launches by phase, calls, bytes, operations, and the time that they come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from arinar.runtime import Bundle

from .gpus import CAPTURED, ISSUED, Gpu, overlapped
from .kernels import Kernel, onnxruntime_kernels, tensorrt_kernels
from .record import Item, Stretch, Walk
from .shapes import tensor_shapes

#: Phases of a launch. "fill": what goes up; "head": the work of a head but its draws; "draw": from a law to a feature.
PHASES = ("fill", "outer", "head", "draw", "decode")
#: What products are computed in where TF32 is let.
TF32 = {"float32": "tf32"}
RULES = {"onnxruntime-cuda": onnxruntime_kernels, "tensorrt": tensorrt_kernels}


@dataclass
class Count:
    """Of one stretch. ``launches`` by (phase, name): the name is a graph's, a kernel's of our own, "copy" or "memset";
    ``captured``: how many of them a CUDA graph replays; ``work``: bytes and operations by type of each kernel."""

    launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    captured: int = 0
    reads: int = 0
    writes: int = 0
    work: list[tuple[float, Mapping[str, float]]] = field(default_factory=list)

    def add(self, phase: str, name: str, captured: bool, kernel: Kernel) -> None:
        self.launches[phase, name] += kernel.launches
        self.captured += kernel.launches if captured else 0
        self.reads, self.writes = self.reads + kernel.reads, self.writes + kernel.writes
        self.work.append((kernel.reads + kernel.writes, kernel.flops))

    @property
    def total(self) -> int:
        return self.launches.total()

    def flops(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for _, flops in self.work:
            for kind, count in flops.items():
                found[kind] = found.get(kind, 0.0) + count
        return found


class GraphCounts:
    """Kernels of the launches of a bundle's graphs, by graph and input shapes."""

    def __init__(self, bundle: Bundle, precision: str, backend: str) -> None:
        self.bundle, self.rule = bundle, RULES[backend]
        self.infos = bundle.manifest.precision_graphs(precision)
        self._models: dict[str, onnx.ModelProto] = {}
        self._kernels: dict[tuple[str, Any], list[Kernel]] = {}

    def count(self, stretch: Stretch, phase: str) -> Count:
        """``phase``: of what comes before the first graph."""
        count = Count()
        for item in stretch.items:
            if item.kind != "graph":
                if item.kind == "kernel":
                    phase = "draw" if "draw" in item.name else "head"
                elif phase == "draw":
                    phase = "head"  # a copy on the way to the next feature
                count.add(phase, item.name, item.captured, Kernel(item.name, 1, *item.nbytes, {}, False))
                continue
            name = self.graph_name(item)
            info = self.infos[name]
            for kernel in self.kernels(item):
                if info.bears_tf32:  # both backends let it, unless told otherwise
                    kernel = replace(kernel, flops={TF32.get(kind, kind): count for kind, count in kernel.flops.items()})
                phase = "draw" if kernel.draws or info.draws == "one" else info.phase
                count.add(phase, name, item.captured, kernel)
        return count

    def graph_name(self, item: Item) -> str:
        """Of the graph whose file was launched, in whatever form."""
        name = Path(item.name).name.split(".")[0]
        if name not in self.infos:
            raise ValueError(f"{item.name} was launched, which is none of the bundle's graphs {', '.join(self.infos)}")
        return name

    def kernels(self, item: Item) -> list[Kernel]:
        key = item.name, item.shapes
        if key not in self._kernels:
            if item.name not in self._models:
                path = self.bundle.folder / self.infos[self.graph_name(item)].file
                self._models[item.name] = onnx.load(str(path.with_name(Path(item.name).name)), load_external_data=False)
            model = self._models[item.name]
            self._kernels[key] = self.rule(model, tensor_shapes(model, dict(item.shapes)))
        return self._kernels[key]


def row(graphs: GraphCounts, walk: Walk, batch: int, gpus: Sequence[Gpu]) -> dict[str, Any]:
    """A micro-batch of ``batch`` images, JSON-ready: what an outer step comes to, and an image; its time on each GPU."""
    stretches = [walk.fill, *walk.steps, walk.decode]
    steps = [graphs.count(stretch, "outer") for stretch in walk.steps]
    counts = [graphs.count(walk.fill, "fill"), *steps, graphs.count(walk.decode, "decode")]
    return {
        "batch": batch,
        "steps": len(steps),
        "per_step": {
            **_launches(steps, len(steps)),
            "most_launches": max(count.total for count in steps),
            **_calls(walk.steps, len(steps)),
            "most_host_waits": max(stretch.waits for stretch in walk.steps),
            "most_graph_launches": max(stretch.graph_launches for stretch in walk.steps),
        },
        "per_image": {**_launches(counts, batch), **_calls(stretches, batch)},
        "ms_per_image": {gpu.name: _milliseconds(counts, stretches, gpu, batch) for gpu in gpus},
    }


def _launches(counts: Sequence[Count], share: int) -> dict[str, Any]:
    """The sum of counts, divided."""
    phases, names, flops = Counter[str](), Counter[str](), dict[str, float]()
    for count in counts:
        for (phase, name), launches in count.launches.items():
            phases[phase] += launches
            names[name] += launches
        for kind, operations in count.flops().items():
            flops[kind] = flops.get(kind, 0.0) + operations
    return {
        "launches": _number(phases.total() / share),
        "by_phase": {phase: _number(phases[phase] / share) for phase in PHASES if phases[phase]},
        "by_name": {name: _number(launches / share) for name, launches in names.most_common()},
        "captured": _number(sum(count.captured for count in counts) / share),
        "read_mb": _number(sum(count.reads for count in counts) / share / 1e6),
        "written_mb": _number(sum(count.writes for count in counts) / share / 1e6),
        "gflop": {kind: _number(value / share / 1e9) for kind, value in flops.items()},
    }


def _calls(stretches: Sequence[Stretch], share: int) -> dict[str, Any]:
    return {
        "graph_launches": _number(sum(stretch.graph_launches for stretch in stretches) / share),
        "host_calls": _number(sum(stretch.calls.total() + stretch.library_calls for stretch in stretches) / share),
        "host_waits": _number(sum(stretch.waits for stretch in stretches) / share),
    }


def _milliseconds(counts: Sequence[Count], stretches: Sequence[Stretch], gpu: Gpu, batch: int) -> dict[str, float]:
    captured = sum(count.captured for count in counts)
    issued = sum(count.total for count in counts) - captured + sum(stretch.graph_launches for stretch in stretches)
    launching = ISSUED * issued + CAPTURED * captured
    work = [pair for count in counts for pair in count.work]
    moving, computing = (sum(part) for part in zip(*(gpu.seconds_of(*pair) for pair in work), strict=True))
    seconds = {
        "launches": launching,
        "bytes": moving,
        "operations": computing,
        "sum": launching + moving + computing,
        "overlapped": overlapped(gpu, work, launching),
    }
    return {name: round(1e3 * value / batch, 3) for name, value in seconds.items()}


def _number(value: float) -> float:
    """Three digits behind the point at most, a whole number as one."""
    rounded = round(value, 3)
    return int(rounded) if rounded == int(rounded) else rounded
