"""A GPU made of host memory: stand-ins for `cuda.bindings.runtime`, TensorRT and ONNX Runtime's CUDA provider.

They are strict where the real ones are undefined. Work on the stream waits until somebody synchronises, so whatever
must outlive a call has to; memory is poisoned; addresses are checked against what is allocated; a captured execution
context must not change. Graphs are really computed, by ONNX Runtime on the CPU.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime

from arinar.runtime.backends.engines import EngineInfo, engine_key, graph_hash
from arinar.runtime.bundle import Bundle, GraphInfo, file_sha256

STREAM = 7001
CAPABILITY = "9.0"
Operation = Callable[[], None]
Function = Callable[[dict[str, np.ndarray], Sequence[str]], Sequence[np.ndarray]]
#: By name: address, shape, dtype.
Tensors = Mapping[str, tuple[int, tuple[int, ...], np.dtype]]


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


def view(pointer: int, nbytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))


class FakeCudaRuntime:
    """What `arinar.runtime.backends.cuda` uses of `cuda.bindings.runtime`, and a log of the calls."""

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
    cudaStreamNonBlocking, cudaEventDisableTiming = 1, 2

    def __init__(self, memory: int = 2**40, devices: int = 1, driver: int = 13000) -> None:
        self.total, self.devices, self.driver = memory, devices, driver
        self.log: list[tuple[Any, ...]] = []
        self.blocks: dict[int, np.ndarray] = {}
        self.queue: list[Operation] = []
        self.captured: list[Operation] | None = None
        self.graphs: dict[int, list[Operation]] = {}
        self.graph_sizes: list[int] = []
        self.fail: dict[str, Any] = {}  # function name -> the error that its next call returns
        self.handles = 100
        self.driver_api: Any = None  # a `fake_driver.FakeDriver`, where kernels are to be launched

    # Of the tests.

    @property
    def used(self) -> int:
        return sum(block.nbytes - 256 for block in self.blocks.values())

    def names(self) -> list[str]:
        return [entry[0] for entry in self.log]

    def block_of(self, pointer: int, nbytes: int) -> None:
        """Assert that [pointer, pointer + nbytes) lies in one live allocation."""
        for start, block in self.blocks.items():
            if start <= pointer and pointer + nbytes <= start + block.nbytes - 256:
                return
        raise AssertionError(f"{nbytes} bytes at {pointer:#x} are not in device memory")

    def enqueue(self, operation: Operation) -> None:
        (self.queue if self.captured is None else self.captured).append(operation)

    def compute(self, function: Function, inputs: Tensors, run: Operation) -> None:
        """A launch of a graph; a recorder does without computing it."""
        self.enqueue(run)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("cuda") or not isinstance(value, types.MethodType):
            return value

        def logged(*args: Any) -> Any:
            self.log.append((name, *args))
            if name in self.fail:
                return (self.fail.pop(name), None)
            try:
                result = value(*args)
            except MemoryError:
                return (cudaError_t.cudaErrorMemoryAllocation, None)
            return (cudaError_t.cudaSuccess, *(result if isinstance(result, tuple) else () if result is None else (result,)))

        return logged

    # Device, stream.

    def cudaDriverGetVersion(self) -> int:
        return self.driver

    def cudaRuntimeGetVersion(self) -> int:
        return 13000

    def cudaGetDeviceCount(self) -> int:
        return self.devices

    def cudaGetDeviceProperties(self, device: int) -> Any:
        return types.SimpleNamespace(name=b"Fake H200", major=9, minor=0, totalGlobalMem=self.total)

    def cudaSetDevice(self, device: int) -> None:
        assert 0 <= device < self.devices

    def cudaGetErrorName(self, error: Any) -> bytes:
        return cudaError_t(error).name.encode()

    def cudaGetErrorString(self, error: Any) -> bytes:
        return b"text of the error"

    def cudaGetLastError(self) -> None:
        pass

    def cudaMemGetInfo(self) -> tuple[int, int]:
        return self.total - self.used, self.total

    def cudaStreamCreateWithFlags(self, flags: int) -> int:
        assert flags == self.cudaStreamNonBlocking
        return STREAM

    def cudaStreamSynchronize(self, stream: int) -> None:
        assert stream == STREAM and self.captured is None, "synchronised while capturing"
        queue, self.queue = self.queue, []
        for operation in queue:
            operation()

    # Memory.

    def cudaMalloc(self, nbytes: int) -> Any:
        assert self.captured is None, "cudaMalloc while capturing"
        if self.used + nbytes > self.total:
            raise MemoryError
        block = np.full(nbytes + 512, 0xFF, np.uint8)
        pointer = -(-block.ctypes.data // 256) * 256
        self.blocks[pointer] = block[pointer - block.ctypes.data :][: nbytes + 256]
        return pointer

    def cudaFree(self, pointer: int) -> None:
        assert self.captured is None, "cudaFree while capturing"
        assert not self.queue, "freed while work was under way"
        self.blocks.pop(pointer)[:] = 0xFE

    def cudaMemsetAsync(self, pointer: int, value: int, nbytes: int, stream: int) -> None:
        assert stream == STREAM
        self.block_of(pointer, nbytes)
        self.enqueue(lambda: view(pointer, nbytes).fill(value))

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: Any, stream: int) -> None:
        assert stream == STREAM
        if kind != cudaMemcpyKind.cudaMemcpyHostToDevice:
            self.block_of(source, nbytes)
        if kind != cudaMemcpyKind.cudaMemcpyDeviceToHost:
            self.block_of(target, nbytes)
        assert target + nbytes <= source or source + nbytes <= target, "overlapping copy"
        if kind != cudaMemcpyKind.cudaMemcpyDeviceToDevice:
            assert self.captured is None, "copy between host and device while capturing"
        self.enqueue(lambda: np.copyto(view(target, nbytes), view(source, nbytes)))

    def cudaMemcpy2DAsync(
        self, target: int, dpitch: int, source: int, spitch: int, width: int, height: int, kind: Any, stream: int
    ) -> None:
        assert stream == STREAM and kind == cudaMemcpyKind.cudaMemcpyDeviceToDevice
        assert width <= dpitch and width <= spitch
        self.block_of(source, spitch * (height - 1) + width)
        self.block_of(target, dpitch * (height - 1) + width)

        def run() -> None:
            for row in range(height):
                view(target + row * dpitch, width)[:] = view(source + row * spitch, width)

        self.enqueue(run)

    # Events.

    def cudaEventCreateWithFlags(self, flags: int) -> int:
        self.handles += 1
        return self.handles

    def cudaEventRecord(self, event: int, stream: int) -> None:
        assert stream == STREAM

    def cudaEventSynchronize(self, event: int) -> None:
        self.cudaStreamSynchronize(STREAM)

    def cudaEventElapsedTime(self, first: int, second: int) -> float:
        assert first < second
        return 0.5

    def cudaEventDestroy(self, event: int) -> None:
        pass

    # Graphs.

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> None:
        assert stream == STREAM and mode == cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        assert self.captured is None
        self.captured = []

    def cudaStreamEndCapture(self, stream: int) -> list[Operation]:
        assert self.captured is not None
        captured, self.captured = self.captured, None
        return captured

    def cudaGraphInstantiate(self, graph: list[Operation], flags: int) -> int:
        assert flags == 0
        self.handles += 1
        self.graphs[self.handles] = list(graph)
        self.graph_sizes.append(len(graph))
        return self.handles

    def cudaGraphDestroy(self, graph: list[Operation]) -> None:
        pass

    def cudaGraphLaunch(self, graph: int, stream: int) -> None:
        assert stream == STREAM and self.captured is None
        self.queue += self.graphs[graph]

    def cudaGraphExecDestroy(self, graph: int) -> None:
        assert not self.queue
        del self.graphs[graph]


# ------------------------------------------------------------------------------------------------ computing graphs


class CpuGraph:
    """A graph of a bundle, computed by ONNX Runtime on the CPU, on arrays that lie at given addresses."""

    sessions: ClassVar[dict[str, Any]] = {}

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, feeds: dict[str, np.ndarray], outputs: Sequence[str]) -> Sequence[np.ndarray]:
        if self.path not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self.sessions[self.path] = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        results: Sequence[np.ndarray] = self.sessions[self.path].run(list(outputs), feeds)
        return results


def compute(runtime: FakeCudaRuntime, function: Function, inputs: Tensors, outputs: Tensors) -> None:
    """Enqueue a computation on arrays in device memory."""
    for name, (address, shape, dtype) in {**inputs, **outputs}.items():
        assert address, f"{name} has no address"
        assert address % 256 == 0, f"{name} is not aligned"
        runtime.block_of(address, math.prod(shape) * dtype.itemsize)

    def array(address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = math.prod(shape)
        return view(address, size * dtype.itemsize).view(dtype).reshape(shape) if size else np.empty(shape, dtype)

    def run() -> None:
        feeds = {name: array(*tensor).copy() for name, tensor in inputs.items()}
        results = function(feeds, list(outputs))
        for tensor, value in zip(outputs.values(), results, strict=True):
            target = array(*tensor)
            assert target.shape == value.shape and target.dtype == value.dtype
            target[...] = value

    runtime.compute(function, inputs, run)


# -------------------------------------------------------------------------------------------------------- TensorRT


def make_engines(
    bundle: Bundle,
    *,
    module: str = "tensorrt",
    version: str = "11.4.0",
    precision: str = "fp32",
    batch: tuple[int, int, int] = (1, 2, 64),
    compute_capability: tuple[str, ...] = (CAPABILITY,),
    **flags: Any,
) -> Path:
    """Engines as `arinar build` lays them out, that hold nothing but the path of their graph."""
    folder = bundle.folder / "engines" / engine_key(module, version, compute_capability, precision, bool(flags))
    folder.mkdir(parents=True, exist_ok=True)
    for name, graph in bundle.manifest.precision_graphs(precision).items():
        path = folder / f"{name}.engine"
        path.write_text(json.dumps({"graph": graph.to_dict(), "onnx": str(bundle.path(graph.file)), "most": batch[2]}))
        info = EngineInfo(
            graph=name,
            precision=precision,
            module=module,
            version=version,
            compute_capability=compute_capability,
            onnx_sha256=graph_hash(bundle, precision, name),
            opset=graph.opset,
            batch=batch,
            profiles=(),
            flags=flags,
            size=path.stat().st_size,
            sha256=file_sha256(path),
        )
        path.with_suffix(".json").write_text(info.to_json())
    return folder


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.runtime = engine, engine.runtime
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, -1)
        self.profile = 0
        self.flushed: Any = None  # shapes and addresses that it has run with outside a capture
        self.captured = False

    def _change(self, what: str) -> None:
        assert not self.captured, f"{what} of a context that a CUDA graph was captured from"

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == STREAM
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._change("shape")
        self.engine.calls.append(("set_input_shape", name, shape))
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))

    def infer_shapes(self) -> list[str]:
        return [tensor.name for tensor in self.engine.info.inputs if tensor.name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        symbols: dict[str, int] = {}
        for tensor in self.engine.info.inputs:
            for symbol, size in zip(tensor.shape, self.shapes[tensor.name], strict=True):
                if isinstance(symbol, str) and "*" not in symbol:
                    assert symbols.setdefault(symbol, size) == size, f"{symbol} is {size} and {symbols[symbol]}"
        (shape,) = (tensor.shape for tensor in self.engine.info.outputs if tensor.name == name)
        return tuple(
            size if isinstance(size, int) else math.prod(symbols[s] if s in symbols else int(s) for s in size.split("*"))
            for size in shape
        )

    def update_device_memory_size_for_shapes(self) -> int:
        return 64 * max(1, max(math.prod(shape) for shape in self.shapes.values()))

    def set_device_memory(self, pointer: int, nbytes: int) -> None:
        self._change("scratch memory")
        assert pointer % 256 == 0
        self.runtime.block_of(pointer, nbytes)
        self.scratch = (pointer, nbytes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._change("address")
        assert isinstance(address, int)
        self.engine.calls.append(("set_tensor_address", name, address))
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        if self.engine.refuse:
            self.engine.logger.log("error", self.engine.refuse)
            return False
        state = (dict(self.shapes), dict(self.addresses), self.scratch)
        if self.runtime.captured is not None:
            assert self.flushed == state, "captured with shapes or addresses that it has not run with"
            self.captured = True
        self.flushed = state
        assert self.scratch[1] >= self.update_device_memory_size_for_shapes()
        info = self.engine.info
        inputs = {t.name: (self.addresses[t.name], self.shapes[t.name], np.dtype(t.dtype)) for t in info.inputs}
        outputs = {t.name: (self.addresses[t.name], self.get_tensor_shape(t.name), np.dtype(t.dtype)) for t in info.outputs}
        for name, source in self.engine.aliases.items():
            assert self.addresses[name] == self.addresses[source], f"{name} is updated in place of {source}"
        settled = [address for name, address in self.addresses.items() if name not in self.engine.aliases]
        assert len(set(settled)) == len(settled), "two tensors at one address"
        regions = {address for address, shape, _ in inputs.values() if math.prod(shape)}
        for name, (address, shape, _) in outputs.items():
            assert name in self.engine.aliases or not math.prod(shape) or address not in regions, f"{name} is over an input"
        self.engine.calls.append(("execute_async_v3", stream))
        compute(self.runtime, self.engine.function, inputs, outputs)
        return True


class FakeEngine:
    num_optimization_profiles = 1

    def __init__(self, runtime: FakeCudaRuntime, logger: Any, info: GraphInfo, function: Any, most: int) -> None:
        self.runtime, self.logger, self.info, self.function, self.most = runtime, logger, info, function, most
        self.aliases: dict[str, str] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.contexts: list[FakeContext] = []
        self.refuse = ""

    @property
    def num_io_tensors(self) -> int:
        return len(self.info.inputs) + len(self.info.outputs)

    def get_tensor_name(self, index: int) -> str:
        return (*self.info.inputs, *self.info.outputs)[index].name

    def _tensor(self, name: str) -> Any:
        return next(t for t in (*self.info.inputs, *self.info.outputs) if t.name == name)

    def get_tensor_mode(self, name: str) -> str:
        return "input" if self._tensor(name) in self.info.inputs else "output"

    def get_tensor_dtype(self, name: str) -> str:
        return str(self._tensor(name).dtype)

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._tensor(name).shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        shape = self._tensor(name).shape
        least = tuple(size if isinstance(size, int) else 0 for size in shape)
        most = tuple(size if isinstance(size, int) else self.most if size == "B" else 2**20 for size in shape)
        return [least, least, most]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_runtime_config(self) -> Any:
        config = types.SimpleNamespace(strategy=None)
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        return config

    def create_execution_context(self, how: Any = None) -> FakeContext:
        """With a strategy (TensorRT), a configuration (RTX), or nothing: then it has scratch memory of its own."""
        if isinstance(how, types.SimpleNamespace):
            assert how.dynamic_shapes_kernel_specialization_strategy == "eager"
            how = how.strategy
        assert how in (None, "user managed")
        self.contexts.append(FakeContext(self))
        if how is None:
            self.contexts[-1].scratch = (0, 2**40)
        return self.contexts[-1]


def fake_tensorrt(runtime: FakeCudaRuntime, name: str = "tensorrt", version: str = "11.4.0") -> Any:
    """A module that stands for a TensorRT library; ``engines`` is what was deserialized, by graph."""
    module: Any = types.ModuleType(name)
    module.__version__, module.__spec__ = version, ModuleSpec(name, None)
    module.engines = {}

    class ILogger:
        Severity = types.SimpleNamespace(INTERNAL_ERROR="internal", ERROR="error", WARNING="warning")

        def __init__(self) -> None:
            self.ready = True

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            assert logger.ready, "ILogger.__init__ was not called"
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
            try:
                content = json.loads(data)
            except ValueError:
                self.logger.log("error", "Serialization assertion magic tag failed")
                return None
            info = GraphInfo.from_dict(content["graph"])
            engine = FakeEngine(runtime, self.logger, info, CpuGraph(content["onnx"]), content["most"])
            module.engines[info.name] = engine
            return engine

    module.ILogger, module.Runtime, module.IExecutionContext = ILogger, Runtime, FakeContext
    module.TensorIOMode = types.SimpleNamespace(INPUT="input", OUTPUT="output")
    module.TensorLocation = types.SimpleNamespace(DEVICE="device", HOST="host")
    module.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user managed")
    module.nptype = lambda dtype: np.dtype(dtype).type
    return module


# ---------------------------------------------------------------------------------------------------- ONNX Runtime


class FakeBinding:
    def __init__(self) -> None:
        self.inputs: dict[str, tuple[int, tuple[int, ...], np.dtype]] = {}
        self.outputs: dict[str, tuple[int, tuple[int, ...], np.dtype]] = {}
        self.calls = 0

    def _tensor(self, device: str, index: int, kind: Any, shape: list[int], address: int) -> Any:
        assert device == "cuda" and index == 0 and isinstance(address, int)
        self.calls += 1
        return address, tuple(shape), np.dtype(kind)

    def bind_input(self, name: str, device: str, index: int, kind: Any, shape: list[int], address: int) -> None:
        self.inputs[name] = self._tensor(device, index, kind, shape, address)

    def bind_output(self, name: str, device: str, index: int, kind: Any, shape: list[int], address: int) -> None:
        self.outputs[name] = self._tensor(device, index, kind, shape, address)


PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


def fake_onnxruntime(runtime: FakeCudaRuntime, active: Sequence[str] = PROVIDERS) -> Any:
    """A module that stands for ONNX Runtime with a CUDA provider; ``sessions`` are those that were made, ``refuses`` why
    it makes none on the GPU, ``on_the_cpu`` operators that it leaves to the CPU, ``waits`` runs that ended with a wait."""
    module: Any = types.ModuleType("onnxruntime")
    module.__version__, module.__spec__, module.__file__ = "1.31.1", ModuleSpec("onnxruntime", None), __file__
    module.sessions = []
    module.preloaded = []

    class RunOptions:
        def __init__(self) -> None:
            self.entries: dict[str, str] = {}

        def add_run_config_entry(self, key: str, value: str) -> None:
            self.entries[key] = value

    class SessionOptions:
        enable_mem_pattern = True

        def __init__(self) -> None:
            self.entries: dict[str, str] = {}

        def add_session_config_entry(self, key: str, value: str) -> None:
            self.entries[key] = value

    class InferenceSession:
        def __init__(self, path: str, options: SessionOptions, providers: list[Any], enable_fallback: int = 1) -> None:
            (name, settings), fallback = providers
            assert name == "CUDAExecutionProvider" and fallback == "CPUExecutionProvider"
            assert settings["user_compute_stream"] == str(STREAM)
            if module.refuses and not enable_fallback:
                raise RuntimeError(module.refuses)
            if module.refuses:  # as it does: it prints, and goes on with the CPU
                print(f"EP Error {module.refuses} when using {providers}")
            self.active = [fallback] if module.refuses else list(active)
            self.options, self.runs = options, Counter[Any]()
            self.graph, self.path, self.settings, self.fail = CpuGraph(path), path, settings, ""
            self.bindings: list[FakeBinding] = []
            module.sessions.append(self)

        def get_providers(self) -> list[str]:
            return self.active

        def get_provider_graph_assignment_info(self) -> list[Any]:
            """A record of one node each, as there are; nothing where it was not asked for."""
            if self.options.entries.get("session.record_ep_graph_assignment_info") != "1":
                return []
            parts = [("CUDAExecutionProvider", "MatMul"), ("CPUExecutionProvider", "Shape")]
            parts += [("CPUExecutionProvider", op) for op in module.on_the_cpu]
            node = types.SimpleNamespace
            return [node(ep_name=ep, get_nodes=lambda op=op: [node(op_type=op, name="n", domain="")]) for ep, op in parts]

        def io_binding(self) -> FakeBinding:
            self.bindings.append(FakeBinding())
            return self.bindings[-1]

        def run_with_iobinding(self, binding: FakeBinding, options: RunOptions) -> None:
            (entry,) = options.entries.items()
            assert entry in {("disable_synchronize_execution_providers", value) for value in "01"}
            if self.fail:
                raise RuntimeError(self.fail)
            module.waits += entry[1] == "0"
            shapes = tuple(shape for _, shape, _ in binding.inputs.values())
            if runtime.captured is not None:  # the first run traces what memory it needs, the second takes it
                assert self.runs[shapes] >= 2 and not self.options.enable_mem_pattern, "captured in a run that may allocate"
            self.runs[shapes] += 1
            compute(runtime, self.graph, dict(binding.inputs), dict(binding.outputs))

    module.RunOptions, module.InferenceSession, module.SessionOptions = RunOptions, InferenceSession, SessionOptions
    module.refuses, module.on_the_cpu, module.waits = "", [], 0
    module.get_available_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    module.preload_dlls = lambda directory=None: module.preloaded.append(directory)
    return module
