"""ONNX Runtime on an NVIDIA GPU: the same graphs as on the CPU, bound to device memory with I/O binding.

ONNX Runtime computes on our stream (provider option ``user_compute_stream``), so its work and our copies are in one
order and nothing has to wait. References: https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html,
https://onnxruntime.ai/docs/api/python/api_summary.html (IOBinding, RunOptions, preload_dlls).

CUDA graphs are off here unless asked for. ONNX Runtime's own (``enable_cuda_graph``) want one fixed set of shapes and
addresses per graph id, where an image has some hundred; a capture of ours around its runs is safe only if no node runs
on the CPU and no run allocates, which ONNX Runtime does not promise (microsoft/onnxruntime#15002, #32081). The first run of
a shape traces what memory it needs, the second may take it as one block (#15005), so ours begins with the third, and
without that plan.

Without the wait at the end of a run ONNX Runtime keeps the pinned memory from which kernels copied small tables (#15002);
so a run now and then has it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arinar.text import one_line

from ..bundle import Bundle, BundleError
from ..machine import onnxruntime_distribution
from .cuda import Cuda, CudaError, DeviceBuffer, GpuMemoryError
from .gpu import Binding, CudaBackend

PROVIDER = "CUDAExecutionProvider"
PACKAGES = "'onnxruntime-gpu[cuda,cudnn]>=1.31' 'nvidia-cublas<14' cuda-bindings"
INSTALL_HINT = f"`pip uninstall onnxruntime`, then `pip install {PACKAGES}` installs one that has"
#: Runs of a graph without a wait before one with it. A run keeps a few kilobytes at most.
RELEASE_EVERY = 1024
#: Fused attention: flash, else CUTLASS's, else none (bits 1, 2, 16). Said at all, it holds for short sequences too.
ATTENTION_KERNELS = "19"
#: Operators that make sizes out of sizes. ONNX Runtime does that on the CPU, on purpose; for data it has CUDA kernels of each.
SHAPE_ARITHMETIC = frozenset(
    {"Add", "Cast", "Concat", "Div", "Gather", "Min", "Mul", "Reshape", "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze"}
)
#: GPU architectures that onnxruntime-gpu 1.31 holds code for; it has no PTX, which others could compile.
ARCHITECTURES = "7.5, 8.0, 8.6, 8.9, 9.0 and 12.0"


class OnnxRuntimeCuda(CudaBackend):
    """Backend that runs a bundle's graphs in ONNX Runtime's CUDA provider. Sessions are made when first needed.

    Parameters
    ----------
    cuda_graphs : capture the launches of a micro-batch and replay them. An experiment: see above.
    tf32 : let fp32 products round their factors to 10 bits of mantissa: those of the VAE's decoder (None), of all graphs
        (faster, and no longer within the fp32 thresholds of the parity protocol), of none.
    wait : wait for the GPU after every graph. Slower; only to find out whether a wrong result comes from not waiting.
    device : index of the GPU.
    log_severity : of ONNX Runtime, 0 (verbose) to 4 (fatal).

    Raises NoGpuError or BundleError where the package, the driver or a GPU is missing, and where ONNX Runtime would
    silently use the CPU.
    """

    name = "onnxruntime-cuda"
    warm_up_runs = 2

    def __init__(
        self,
        bundle: Bundle,
        precision: str,
        *,
        cuda_graphs: bool = False,
        tf32: bool | None = None,
        wait: bool = False,
        device: int = 0,
        log_severity: int = 3,
        cuda: Cuda | None = None,
    ) -> None:
        self._ort = load_onnxruntime()
        super().__init__(bundle, precision, cuda_graphs=cuda_graphs, device=device, cuda=cuda)
        self._sessions: dict[str, Any] = {}
        #: Nodes that the CPU computes, by operator, of each graph that has such.
        self.cpu_nodes: dict[str, Counter[str]] = {}
        self._options = self._ort.SessionOptions()
        self._options.log_severity_level = log_severity
        self._options.enable_mem_pattern = not cuda_graphs
        self._options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self._provider_options = {
            "device_id": str(device),
            "user_compute_stream": str(self.cuda.stream),
            "do_copy_in_default_stream": "1",
            "sdpa_kernel": ATTENTION_KERNELS,
            # The exhaustive search times every algorithm for every new shape, and what it picks varies between runs.
            "cudnn_conv_algo_search": "HEURISTIC",
        }
        # No wait at the end of a run: the loop waits once, when it downloads.
        self._tf32 = tf32
        self._run_options, self._waiting = self._options_of_runs(wait), self._options_of_runs(True)
        self._runs: Counter[str] = Counter()

    def _options_of_runs(self, wait: bool) -> Any:
        options = self._ort.RunOptions()
        options.log_severity_level = 4  # what it would log of an error is in the exception too
        options.add_run_config_entry("disable_synchronize_execution_providers", "0" if wait else "1")
        return options

    def prepare(self, *graphs: str, rows: int | None = None) -> None:
        for name in graphs:
            if name not in self._sessions:
                self._activate()
                self._sessions[name] = self._session(name)

    def _session(self, graph: str) -> Any:
        info = self._info(graph)
        path = self._bundle.graph_path(info, "cuda")
        tf32 = info.bears_tf32 if self._tf32 is None else self._tf32
        providers = [(PROVIDER, self._provider_options | {"use_tf32": str(int(tf32))}), "CPUExecutionProvider"]
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                # (With its fallback any error here would be printed, and end in a session on the CPU.)
                session = self._ort.InferenceSession(str(path), self._options, providers=providers, enable_fallback=0)
        except Exception as error:  # ONNX Runtime raises its own, undocumented types
            raise self._failure(f"ONNX Runtime cannot load graph {graph!r} ({path})", error) from error
        active = list(session.get_providers())
        if PROVIDER not in active:
            said = f" It printed: {one_line(printed.getvalue())}" if printed.getvalue().strip() else ""
            raise BundleError(
                f"ONNX Runtime would run graph {graph!r} on {', '.join(active)}, not on the GPU: a library of its CUDA "
                f"provider could not be loaded (its log on stderr names it; often cuBLAS or cuDNN of another CUDA "
                f"version).{said} `pip install {PACKAGES}` brings matching ones; or use backend onnxruntime-cpu"
            )
        self._look_for_cpu_nodes(graph, session)
        return session

    def _look_for_cpu_nodes(self, graph: str, session: Any) -> None:
        """Warn of nodes that run on the CPU: each takes copies from and to the GPU, and waits for them, in every launch."""
        if not hasattr(session, "get_provider_graph_assignment_info"):  # before 1.27
            return
        found = Counter(
            node.op_type
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name != PROVIDER
            for node in part.get_nodes()
            if node.op_type not in SHAPE_ARITHMETIC
        )
        if found:
            self.cpu_nodes[graph] = found
            told = ", ".join(f"{count} {op}" for op, count in found.most_common())
            warnings.warn(
                f"{self.name}: {found.total()} nodes of graph {graph!r} run on the CPU, each with copies and waits: {told}. "
                f"`pip install {PACKAGES}` brings a version with CUDA kernels for all of ours",
                RuntimeWarning,
                stacklevel=3,
            )

    def describe(self) -> dict[str, Any]:
        nodes = {graph: dict(found) for graph, found in self.cpu_nodes.items()}
        return super().describe() | ({"cpu_nodes": nodes} if nodes else {})

    def _bind(self, graph: str, binding: Binding, buffers: Mapping[str, DeviceBuffer], addresses: dict[str, int]) -> None:
        info = self._info(graph)
        if binding.prepared is None:
            binding.prepared = self._sessions[graph].io_binding()
            binding.keep["inputs"] = {tensor.name: np.dtype(tensor.dtype) for tensor in info.inputs}
            binding.keep["outputs"] = {tensor.name: np.dtype(tensor.dtype) for tensor in info.outputs}
        inputs = binding.keep["inputs"]
        for name, buffer in buffers.items():
            if binding.addresses.get(name) == addresses[name] and binding.shapes.get(name) == buffer.shape:
                continue
            dtype = inputs.get(name) or binding.keep["outputs"].get(name)
            if dtype is None or dtype != buffer.dtype:
                raise CudaError(f"graph {graph!r}: {name!r} is {dtype}, its buffer is {buffer.dtype}")
            bind = binding.prepared.bind_input if name in inputs else binding.prepared.bind_output
            device = self.cuda.info.index
            bind(name, "cuda", device, buffer.dtype.type, list(buffer.shape), addresses[name])
            binding.addresses[name], binding.shapes[name] = addresses[name], buffer.shape

    def _run(self, graph: str, binding: Binding) -> None:
        if self._current is not None and graph in self.cpu_nodes:
            self._current[0].capture = False  # what the CPU does would not be in a recording
        options = self._run_options
        if not self.cuda.capturing:
            self._runs[graph] += 1
            options = self._waiting if self._runs[graph] % RELEASE_EVERY == 0 else options
        try:
            self._sessions[graph].run_with_iobinding(binding.prepared, options)
        except Exception as error:
            raise self._failure(f"graph {graph!r} did not run in ONNX Runtime", error) from error

    def _failure(self, what: str, error: Exception) -> Exception:
        text = one_line(error)
        lower = text.lower()
        if "out of memory" in lower or "failed to allocate memory" in lower or "bfcarena" in lower:
            return GpuMemoryError(f"{what} ({text})")
        return CudaError(f"{what}: {text}; {self._remedy(lower)}, or use backend onnxruntime-cpu")

    def _remedy(self, reason: str) -> str:
        gpu = self.cuda.info
        if "no kernel image" in reason:
            return (
                f"the installed ONNX Runtime {self._ort.__version__} has no code for this GPU ({gpu.name}, compute capability "
                f"{gpu.compute_capability}; 1.31 has it for {ARCHITECTURES}): use backend tensorrt"
            )
        if "driver version is insufficient" in reason or "forward compatibility" in reason:
            return f"the driver supports CUDA {gpu.driver}: update it"
        if "cuda" in reason or "cublas" in reason or "cudnn" in reason or "provider" in reason:
            return f"see whether driver (CUDA {gpu.driver}), onnxruntime-gpu and its libraries fit: `pip install {PACKAGES}`"
        return "export the model again"


def load_onnxruntime() -> Any:
    """ONNX Runtime with a CUDA provider, its libraries loaded. Raises BundleError with the way to install it."""
    onnxruntime_distribution()  # refuses two packages in one place
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise BundleError(f"ONNX Runtime is not installed ({error}); {INSTALL_HINT} CUDA") from error
    if PROVIDER not in ort.get_available_providers():
        have = ", ".join(ort.get_available_providers())
        what = f"the installed ONNX Runtime {ort.__version__} has no CUDA provider (only {have})"
        raise BundleError(f"{what}; {INSTALL_HINT} one")
    preload(ort)
    return ort


def preload(ort: Any) -> None:
    """Load the CUDA libraries of NVIDIA's Python packages. Where that fails, making a session says what is missing."""
    if not hasattr(ort, "preload_dlls"):
        return
    nvidia = importlib.util.find_spec("nvidia")
    home = Path(ort.__file__).parent.parent
    folders = [""]  # the packages beside its own; those in another folder of the path have to be named
    for root in (nvidia.submodule_search_locations or []) if nvidia else []:
        if Path(root).parent != home:
            folders += [str(lib) for lib in sorted(Path(root).glob("*/lib")) if any(lib.glob("libcu*.so*"))]
    for folder in folders:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):  # it prints what is not there
            ort.preload_dlls(directory=folder)
