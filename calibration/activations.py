"""How large do values get inside the graphs? Decides what may run in float16, whose largest number is 65504.

Graphs are run along real trajectories in ONNX Runtime, and every intermediate tensor watched: in a graph that computes
in float16 the float16 ones (its float32 islands cannot overflow), in a float32 graph all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, shape_inference

from arinar.runtime.backends.base import Array
from arinar.runtime.backends.cpu import Buffers
from arinar.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from arinar.runtime.bundle import Bundle, GraphInfo
from arinar.runtime.loop import Loop
from arinar.runtime.pipeline import Pipeline
from arinar.text import aligned

FLOAT16_MAX = 65504.0


@dataclass
class Peak:
    """Largest absolute value seen in a graph: of any tensor, which one, and at which launch of the graph."""

    value: float = 0.0
    tensor: str = ""
    op: str = ""
    launch: int = -1
    launches: int = 0
    # Launches with a value that is not finite, or that float16 could not hold.
    beyond: int = 0

    @property
    def headroom(self) -> float:
        """How many times larger values could get before float16 overflows."""
        return FLOAT16_MAX / self.value if self.value else float("inf")


@dataclass
class ActivationReport:
    """Peaks by graph, over ``trajectories`` images."""

    precision: str
    trajectories: int
    peaks: dict[str, Peak] = field(default_factory=dict)

    def table(self) -> str:
        rows = [("graph", "largest", "float16 room", "in", "launches", "beyond")]
        for name, peak in sorted(self.peaks.items()):
            where = f"{peak.op} {peak.tensor}"
            rows.append((name, f"{peak.value:.4g}", f"{peak.headroom:.3g} x", where, str(peak.launches), str(peak.beyond)))
        return "\n".join(aligned(rows))


def watched(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[tuple[str, str]]]:
    """Add an output that holds the largest absolute value of every watched tensor -> model, and (tensor, op that made
    it) in the order of that output."""
    inferred = shape_inference.infer_shapes(model)
    graph = model.graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*inferred.graph.value_info, *inferred.graph.output]}
    made = [
        (name, node.op_type)
        for node in graph.node
        if node.op_type not in ("Constant", "ConstantOfShape")
        for name in node.output
        if kinds.get(name) in (TensorProto.FLOAT, TensorProto.FLOAT16)
    ]
    if half := [item for item in made if kinds[item[0]] == TensorProto.FLOAT16]:
        made = half
    zero, flat = "peaks/zero", "peaks/flat"
    graph.initializer.append(helper.make_tensor(zero, TensorProto.FLOAT, [1], [0.0]))
    graph.initializer.append(helper.make_tensor(flat, TensorProto.INT64, [1], [-1]))
    singles = []
    for index, (name, _) in enumerate(made):
        prefix = f"peaks/{index}"
        # A zero is added: tensors can be empty, and have no largest value then.
        graph.node.extend(
            [
                helper.make_node("Cast", [name], [f"{prefix}/cast"], to=TensorProto.FLOAT),
                helper.make_node("Reshape", [f"{prefix}/cast", flat], [f"{prefix}/flat"]),
                helper.make_node("Concat", [f"{prefix}/flat", zero], [f"{prefix}/padded"], axis=0),
                helper.make_node("Abs", [f"{prefix}/padded"], [f"{prefix}/abs"]),
                helper.make_node("ReduceMax", [f"{prefix}/abs"], [f"{prefix}/max"], keepdims=0),
                helper.make_node("Reshape", [f"{prefix}/max", flat], [f"{prefix}/one"]),
            ]
        )
        singles.append(f"{prefix}/one")
    graph.node.append(helper.make_node("Concat", singles, ["peaks"], axis=0))
    graph.output.append(helper.make_tensor_value_info("peaks", TensorProto.FLOAT, [len(made)]))
    return model, made


class WatchingBackend(OnnxRuntimeCpu):
    """ONNX Runtime on the CPU, keeping the peaks of every launch."""

    name = "onnxruntime-cpu, watched"

    def __init__(self, bundle: Bundle, precision: str, *, threads: int | None = None) -> None:
        super().__init__(bundle, precision, threads=threads)
        self.peaks: dict[str, Peak] = {}

    def _load(self, graph: GraphInfo, threads: int) -> Any:
        model, made = watched(onnx.load(self._bundle.graph_path(graph)))
        options = self._options(graph, threads)
        session = self._ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session, made

    def _parts(self, info: GraphInfo, rows: int) -> int:
        return 1  # every launch is to be seen

    def _call(self, loaded: Any, graph: GraphInfo, inputs: Buffers, outputs: list[str]) -> list[Array]:
        session, made = loaded
        *results, peaks = session.run([*outputs, "peaks"], dict(inputs))
        self._add(graph.name, peaks, made)
        return results

    def _add(self, graph: str, peaks: Array, made: list[tuple[str, str]]) -> None:
        peak = self.peaks.setdefault(graph, Peak())
        finite = np.where(np.isfinite(peaks), peaks, np.inf)
        worst = int(finite.argmax())
        peak.beyond += int(finite[worst] > FLOAT16_MAX)
        if finite[worst] > peak.value:
            tensor, op = made[worst]
            peak.value, peak.tensor, peak.op, peak.launch = float(finite[worst]), tensor, op, peak.launches
        peak.launches += 1


def measure_activations(
    bundle: Bundle,
    labels: Sequence[int],
    *,
    precision: str = "fp16",
    seed: int = 0,
    guidance_scale: float | None = None,
    num_iter: int | None = None,
    inner: str = "stepwise",
    threads: int | None = None,
) -> ActivationReport:
    """Largest absolute value inside every graph while generating an image per label.

    inner : "stepwise" watches the graphs that the fused one is composed of.
    """
    backend = WatchingBackend(bundle, precision, threads=threads)
    pipeline = Pipeline(bundle, backend, precision, inner)
    graphs = bundle.manifest.precision_graphs(precision)
    pipeline.loop = Loop(backend, graphs, pipeline.config, inner, keep_first_step=False)  # every launch is to be seen
    pipeline.generate(list(labels), seed=seed, guidance_scale=guidance_scale, num_iter=num_iter)
    return ActivationReport(precision, len(labels), backend.peaks)


__all__ = ["FLOAT16_MAX", "ActivationReport", "Peak", "measure_activations"]
