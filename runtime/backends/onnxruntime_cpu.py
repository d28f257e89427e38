"""ONNX Runtime on the CPU: the embedded default."""

from __future__ import annotations

from typing import Any

from arinar.text import install_hint, one_line

from ..bundle import Bundle, BundleError, GraphInfo
from ..machine import onnxruntime_distribution
from .base import Array
from .cpu import Buffers, CpuBackend
from .products import keep_products_exact


class OnnxRuntimeCpu(CpuBackend):
    """Sessions of ONNX Runtime, made when a graph is first needed, and kept. Options: those of `CpuBackend`."""

    name = "onnxruntime-cpu"

    def __init__(self, bundle: Bundle, precision: str, *, threads: int | None = None, low_memory: bool = False) -> None:
        if onnxruntime_distribution() is None:
            raise BundleError(f"ONNX Runtime is not installed; {install_hint('cpu')} (for a GPU, '.[gpu]') installs it")
        import onnxruntime

        self._ort = onnxruntime
        super().__init__(bundle, precision, threads=threads, low_memory=low_memory)

    def _load(self, graph: GraphInfo, threads: int) -> Any:
        return self._session(graph, self._options(graph, threads))

    def _options(self, graph: GraphInfo, threads: int) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4  # what it would log of an error is in the exception too
        options.intra_op_num_threads = threads
        if self._scheme.integers:
            keep_products_exact(options)
        # An arena keeps what its session's largest launches needed at one time; freed memory serves all sessions.
        options.enable_cpu_mem_arena = large_activations(graph)
        # (Memory planned ahead would be taken beside the arena's, for each input shape.)
        options.enable_mem_pattern = not options.enable_cpu_mem_arena
        # Threads that wait for work by spinning would take the cores from the launches that follow.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return options

    def _session(self, graph: GraphInfo, options: Any) -> Any:
        path = self._bundle.graph_path(graph, "cpu")
        try:
            return self._ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises its own, undocumented types
            reason = one_line(error)
            message = f"ONNX Runtime cannot load graph {graph.name!r} ({path}): {reason}; export again"
            raise self._bundle.fault(message) from error

    def _call(self, loaded: Any, graph: GraphInfo, inputs: Buffers, outputs: list[str]) -> list[Array]:
        return run_session(loaded, graph.name, outputs, inputs)


def run_session(session: Any, graph: str, outputs: list[str], inputs: Buffers) -> list[Array]:
    """Run a session -> its outputs. Raises RuntimeError, one line naming the graph, for whatever ONNX Runtime raises."""
    try:
        return list(session.run(outputs, dict(inputs)))
    except Exception as error:  # ONNX Runtime raises its own, undocumented types
        reason = one_line(error)
        remedy = "use a smaller batch size" if "alloc" in reason.lower() else "export the model again"
        raise RuntimeError(f"graph {graph!r} did not run in ONNX Runtime: {reason}; {remedy}") from error


def large_activations(graph: GraphInfo) -> bool:
    """Graphs with activations of many megabytes. Freed and taken again, as for other graphs, that memory would come as
    new pages each time, or lie about in pieces: twice what a launch needs."""
    whole_sequence = graph.phase == "outer" and not graph.cached
    return whole_sequence or (graph.phase == "decode" and graph.convolutional)
