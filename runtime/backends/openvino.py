"""OpenVINO on the CPU: for the two large graphs, the outer step and the VAE, what ONNX Runtime has no kernels for there:
products in bfloat16, about twice as fast as float32 where the processor has them (AVX512-BF16, AMX).

The head stays with ONNX Runtime (`GraphKind.bears_bfloat16`). Nothing compiled is kept on the disk: docs/precision.md says why.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from arinar.text import install_hint, one_line

from ..bundle import Bundle, BundleError, GraphInfo
from .base import Array
from .cpu import Buffers
from .onnxruntime_cpu import OnnxRuntimeCpu

#: Largest relative error of a product in bfloat16 that is taken for rounding: eight bits a factor, 1,024 terms; 0.004 is
#: usual. Reported of some processors is garbage (github.com/openvinotoolkit/openvino/issues/38256).
PRODUCT_ERROR = 0.02
BFLOAT16 = "BF16"  # OpenVINO's name of the capability
MISSING = f"OpenVINO is not installed; {install_hint('openvino')} installs it"


class Compiled(NamedTuple):
    """A graph's compiled model, and the names of its inputs (what the graph does not use, OpenVINO leaves out)."""

    model: Any
    inputs: frozenset[str]


class OpenVino(OnnxRuntimeCpu):
    """Compiled models, made when a graph is first needed, and kept. Options: those of `CpuBackend`.

    Precision "bf16" runs the fp32 graphs with products in bfloat16. They are tried first: BundleError where the processor has
    none, or they are wrong.
    """

    name = "openvino"

    def __init__(self, bundle: Bundle, precision: str, *, threads: int | None = None, low_memory: bool = False) -> None:
        super().__init__(bundle, precision, threads=threads, low_memory=low_memory)
        if self._scheme.integers:
            raise BundleError(
                f"backend openvino runs graphs in float32 or bfloat16; precision {precision!r} is 8-bit: take backend "
                f"onnxruntime-cpu for it, or precision fp32 (or bf16) here"
            )
        self._ov = load_openvino()
        self._core = self._ov.Core()
        # (OpenVINO's own default is bf16 where there is one.)
        self._products, self._instead = "f32", "take backend onnxruntime-cpu"
        if self._scheme.runs:
            check_bfloat16()
            self._products, self._instead = "bf16", "take precision fp32, or int8"

    def _load(self, graph: GraphInfo, threads: int) -> Any:
        if not graph.bears_bfloat16:
            return super()._load(graph, threads)
        path = self._bundle.graph_path(graph)
        # Launches of one thread run side by side, each in a stream of its own.
        streams = self.threads if threads == 1 else 1
        settings = {
            "INFERENCE_PRECISION_HINT": self._products,
            "INFERENCE_NUM_THREADS": threads * streams,
            "NUM_STREAMS": streams,
            "ENABLE_CPU_PINNING": False,
        }
        try:
            model = self._core.compile_model(self._core.read_model(str(path)), "CPU", settings)
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            message = f"OpenVINO cannot load graph {graph.name!r} ({path}): {one_line(error)}; {self._instead}"
            raise self._bundle.fault(message) from error
        return Compiled(model, frozenset(port.any_name for port in model.inputs))

    def _call(self, loaded: Any, graph: GraphInfo, inputs: Buffers, outputs: list[str]) -> list[Array]:
        if not isinstance(loaded, Compiled):
            return super()._call(loaded, graph, inputs, outputs)
        try:
            request = loaded.model.create_infer_request()  # its own: launches may run side by side
            request.infer({name: value for name, value in inputs.items() if name in loaded.inputs}, share_inputs=True)
            return [np.array(request.get_tensor(name).data) for name in outputs]
        except Exception as error:
            message = f"graph {graph.name!r} did not run in OpenVINO: {one_line(error)}; {self._instead}"
            raise RuntimeError(message) from error


def load_openvino() -> Any:
    """The module. Raises BundleError, naming the extra, where it is missing."""
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise BundleError(MISSING) from error


def missing(bfloat16: bool) -> str | None:
    """What OpenVINO lacks here to run graphs (with products in bfloat16), in a line; None: nothing. Nothing is computed."""
    if importlib.util.find_spec("openvino") is None:
        return MISSING
    if bfloat16 and BFLOAT16 not in load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "this processor has no bfloat16 products (AVX512-BF16 or AMX); take precision fp32, or int8"
    return None


@lru_cache(maxsize=1)
def check_bfloat16() -> None:
    """Raise BundleError where this processor has no products in bfloat16, or OpenVINO's are wrong on it."""
    if (reason := missing(bfloat16=True)) is not None:
        raise BundleError(reason)
    openvino = load_openvino()
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 1024), (1024, 64)))
    opset = importlib.import_module("openvino.opset13")
    given = opset.parameter(left.shape, np.float32)
    model = openvino.Model([opset.matmul(given, opset.constant(right), False, False)], [given])
    made = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})(left)[0]
    exact = left.astype(np.float64) @ right
    error = float(np.sqrt(np.mean((made - exact) ** 2) / np.mean(exact**2)))
    if not error < PRODUCT_ERROR:  # NaN too
        raise BundleError(
            f"a product in bfloat16 is {error:.0%} off on this processor with OpenVINO {openvino.__version__}; take precision "
            f"fp32, or int8"
        )
