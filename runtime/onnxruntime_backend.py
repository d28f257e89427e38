"""ONNX Runtime on the CPU: the embedded default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .backend import Array, onnxruntime_distribution
from .bundle import Bundle, BundleError, GraphInfo


class OnnxRuntimeCpu:
    """Backend whose buffers are NumPy arrays. Sessions are made when a graph is first needed, and kept.

    Parameters
    ----------
    threads : threads of one graph; None means the number of physical cores that this process may use.
    """

    name = "onnxruntime-cpu"
    synchronous = True

    def __init__(self, bundle: Bundle, precision: str, *, threads: int | None = None) -> None:
        if onnxruntime_distribution() is None:
            raise BundleError("ONNX Runtime is not installed; `pip install arinar[cpu]` (or arinar[gpu]) installs it")
        import onnxruntime

        self._ort = onnxruntime
        self._bundle = bundle
        self._graphs: dict[str, GraphInfo] = bundle.manifest.precision_graphs(precision)
        self._sessions: dict[str, Any] = {}
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3
        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads is {threads}; expected at least 1")
            self._options.intra_op_num_threads = threads

    def prepare(self, *graphs: str) -> None:
        for name in graphs:
            self._session(name)

    def _session(self, name: str) -> Any:
        if name not in self._sessions:
            if name not in self._graphs:
                raise BundleError(f"the bundle has no graph {name!r}; it has {', '.join(self._graphs)}")
            path = self._bundle.path(self._graphs[name].file)
            try:
                self._sessions[name] = self._ort.InferenceSession(
                    str(path), self._options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # ONNX Runtime raises its own, undocumented types
                raise BundleError(f"ONNX Runtime cannot load graph {name!r} ({path}): {error}") from error
        return self._sessions[name]

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.zeros(shape, dtype)

    def upload(self, array: Array) -> Array:
        return np.ascontiguousarray(array)

    def write(self, buffer: Array, array: Array) -> None:
        buffer[...] = array

    def download(self, buffer: Array) -> Array:
        return buffer

    def copy(self, source: Array, target: Array) -> None:
        target[...] = source

    def write_slots(self, rows: Array, target: Array, slot: int) -> None:
        target[:, :, slot : slot + rows.shape[2]] = rows

    def execute(self, key: tuple[Any, ...], launches: Callable[[], None]) -> None:
        launches()

    def forget(self, key: tuple[Any, ...]) -> None:
        pass

    def launch(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        results = self._session(graph).run(list(outputs), dict(inputs))
        for (name, target), value in zip(outputs.items(), results, strict=True):
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise FloatingPointError(f"graph {graph!r} made non-finite values in its output {name!r}")
            target[...] = value
