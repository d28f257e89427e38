"""The little of CUDA that the runtime needs: device memory, one stream, copies, graphs. Nothing else calls CUDA.

On top of `cuda.bindings.runtime` (package cuda-bindings), whose functions return ``(error, value...)``; here errors
are exceptions that name the call and the remedy. Everything goes through the module given to :class:`Cuda`, so tests
pass one that records. Reference: https://docs.nvidia.com/cuda/cuda-runtime-api/
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import math
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from arinar.text import shown
from arinar.values import is_whole

from ..bundle import BundleError

Array = npt.NDArray[Any]
INSTALL_HINT = "`pip install cuda-bindings` installs it"
NO_DRIVER = "no NVIDIA driver was found on this machine; use backend onnxruntime-cpu, or install the driver"


class NoGpuError(BundleError):
    """This machine has no GPU that can be used. The message says what is missing."""


class CudaError(RuntimeError):
    """A CUDA call failed."""


class GpuMemoryError(CudaError):
    """The GPU has too little memory."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the GPU is out of memory: {what}. Use a smaller batch size (--batch-size), or free memory that other "
            f"processes hold (nvidia-smi lists them)"
        )


@dataclass(frozen=True)
class DeviceInfo:
    """A GPU: its name, architecture as "9.0", bytes of memory, and the CUDA version that its driver supports."""

    index: int
    name: str
    compute_capability: str
    memory: int
    driver: str


class Allocation:
    """Device memory, freed when the last buffer on it is gone."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.pointer = cuda.malloc(nbytes)
        self.nbytes = nbytes
        weakref.finalize(self, cuda.free, self.pointer)


@dataclass(frozen=True)
class DeviceBuffer:
    """A contiguous array in device memory, or a view of one; views keep the memory alive."""

    owner: Allocation
    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> DeviceBuffer:
        """Some rows of the first axis. A step other than 1 would not be contiguous, and is refused."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"a device buffer cannot be sliced with step {step}")
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return DeviceBuffer(self.owner, self.pointer + start * row, (max(0, stop - start), *self.shape[1:]), self.dtype)

    def reshape(self, *shape: int) -> DeviceBuffer:
        """The same memory with another shape; one -1 is deduced, as in NumPy."""
        if shape.count(-1) == 1:
            rest = -math.prod(shape)
            shape = tuple(self.size // rest if d == -1 and rest else max(d, 0) for d in shape)
        if math.prod(shape) != self.size or min(shape, default=0) < 0:
            raise ValueError(f"cannot reshape {self.shape} to {shape}")
        return DeviceBuffer(self.owner, self.pointer, shape, self.dtype)


class Cuda:
    """One device and one non-default stream on it, in whose order everything happens.

    ``runtime`` is `cuda.bindings.runtime`, or what a test puts in its place. Raises NoGpuError where the package, a
    driver or a GPU is missing.
    """

    def __init__(self, device: int = 0, runtime: Any = None) -> None:
        self.runtime = runtime if runtime is not None else load_runtime()
        self.info = device_info(self.runtime, device)
        self.activate()
        # Not blocking: independent of the legacy default stream, on which capture is not possible. It lives as long as
        # the process: libraries hold on to it.
        self._stream = self.call("cudaStreamCreateWithFlags", self.runtime.cudaStreamNonBlocking)
        self.stream = int(self._stream)
        self.capturing = False
        self._unfinished: list[Array] = []  # host memory that copies may still read
        self._freed_in_capture: list[int] = []

    def activate(self) -> None:
        """Make this the calling thread's device: CUDA keeps one for each thread."""
        self.call("cudaSetDevice", self.info.index)

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the runtime; its value, or the tuple of its values. Raises CudaError."""
        try:
            error, *values = getattr(self.runtime, name)(*args)
        except ValueError as unknown:  # what cuda-bindings makes of an error code that it has no name for
            raise CudaError(
                f"{name} failed with an error that the installed cuda-bindings does not know: {unknown}"
            ) from unknown
        if error != self.runtime.cudaError_t.cudaSuccess:
            raise self.failure(name, error, args)
        return values[0] if len(values) == 1 else tuple(values)

    def failure(self, name: str, error: Any, args: tuple[Any, ...] = ()) -> CudaError:
        code = error_name(self.runtime, error)
        if error == self.runtime.cudaError_t.cudaErrorMemoryAllocation:
            free, total = (size / 2**20 for size in self.memory())
            wanted = f"{args[0] / 2**20:.0f} MiB wanted, " if name == "cudaMalloc" else f"{name} failed, "
            return GpuMemoryError(f"{wanted}{free:.0f} of {total:.0f} MiB free")
        _, text = self.runtime.cudaGetErrorString(error)
        text = text.decode() if isinstance(text, bytes) else str(text)
        return CudaError(f"{name} failed: {code} ({text}). Errors of earlier launches may show up here")

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        _, free, total = self.runtime.cudaMemGetInfo()
        return int(free or 0), int(total or 0)

    # Memory.

    def malloc(self, nbytes: int) -> int:
        return int(self.call("cudaMalloc", max(nbytes, 256)))

    def free(self, pointer: int) -> None:
        """Free once nothing that was launched can use it. While capturing, when the capture is over: cudaFree is not
        allowed in one, and a buffer may be collected at any time."""
        if self.capturing:
            self._freed_in_capture.append(pointer)
            return
        self.runtime.cudaStreamSynchronize(self._stream)
        self.runtime.cudaFree(pointer)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceBuffer:
        """An uninitialised buffer; its address is a multiple of 256, as cudaMalloc's are."""
        kind = np.dtype(dtype)
        owner = Allocation(self, math.prod(shape) * kind.itemsize)
        return DeviceBuffer(owner, owner.pointer, tuple(shape), kind)

    def clear(self, buffer: DeviceBuffer) -> None:
        """Fill with zeros."""
        if buffer.nbytes:
            self.call("cudaMemsetAsync", buffer.pointer, 0, buffer.nbytes, self._stream)

    # Copies, all of them in the order of the stream.

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        if nbytes:
            direction = getattr(self.runtime.cudaMemcpyKind, f"cudaMemcpy{kind}")
            self.call("cudaMemcpyAsync", target, source, nbytes, direction, self._stream)

    def upload(self, array: Array, target: DeviceBuffer) -> None:
        """Host to device. The array is kept until the stream has been waited for."""
        array = np.ascontiguousarray(array, target.dtype)
        if array.shape != target.shape:
            raise ValueError(f"the array has shape {array.shape}, the buffer {target.shape}")
        self._unfinished.append(array)
        self._copy(target.pointer, array.ctypes.data, array.nbytes, "HostToDevice")

    def download(self, source: DeviceBuffer) -> Array:
        """Device to host; waits for everything that was launched before."""
        array = np.empty(source.shape, source.dtype)
        self._copy(array.ctypes.data, source.pointer, array.nbytes, "DeviceToHost")
        self.synchronize()
        return array

    def copy(self, source: int, target: int, nbytes: int) -> None:
        """Device to device, from address to address."""
        self._copy(target, source, nbytes, "DeviceToDevice")

    def copy_rows(self, source: int, target: int, width: int, height: int, stride: int) -> None:
        """``height`` rows of ``width`` bytes that follow one another -> rows that are ``stride`` bytes apart."""
        if width and height:
            kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
            self.call("cudaMemcpy2DAsync", target, stride, source, width, width, height, kind, self._stream)

    def synchronize(self) -> None:
        """Wait until everything that was launched is done."""
        self.call("cudaStreamSynchronize", self._stream)
        self._unfinished.clear()

    # Events: how far the device is.

    def record_event(self) -> Any:
        event = self.call("cudaEventCreateWithFlags", self.runtime.cudaEventDisableTiming)
        try:
            self.call("cudaEventRecord", event, self._stream)
        except BaseException:
            self.runtime.cudaEventDestroy(event)
            raise
        return event

    def wait_event(self, event: Any) -> None:
        """Wait until what was launched before the event is done, and destroy it."""
        try:
            self.call("cudaEventSynchronize", event)
        finally:
            self.runtime.cudaEventDestroy(event)

    # Graphs.

    def begin_capture(self) -> None:
        # Thread local: what other threads of the application do with CUDA does not disturb the capture.
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self._stream, mode)
        self.capturing = True
        _no_collection.begin()

    def end_capture(self) -> Any:
        """What was launched since, as an executable graph: it has not run yet."""
        graph = self._stop_capture()
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.runtime.cudaGraphDestroy(graph)

    def abandon_capture(self) -> None:
        """Leave capture mode after a failure, without a graph."""
        if not self.capturing:
            return
        with contextlib.suppress(CudaError):  # the capture may already be invalid; ending it is all that is wanted
            self.runtime.cudaGraphDestroy(self._stop_capture())
        self.runtime.cudaGetLastError()  # so that the failed capture is not reported by a later call

    def _stop_capture(self) -> Any:
        self.capturing = False
        try:
            return self.call("cudaStreamEndCapture", self._stream)
        finally:
            _no_collection.end()
            while self._freed_in_capture:
                self.free(self._freed_in_capture.pop())

    def launch_graph(self, graph: Any) -> None:
        self.call("cudaGraphLaunch", graph, self._stream)

    def destroy_graph(self, graph: Any) -> None:
        """Destroy an executable graph once it is not running any more."""
        self.synchronize()
        self.call("cudaGraphExecDestroy", graph)

    # Kernels of our own, through the driver: it shares the device's context with the runtime.

    @property
    def driver(self) -> Any:
        """`cuda.bindings.driver`, or what a test's runtime has as ``driver_api``; where that is None, there are no kernels."""
        if isinstance(self.runtime, types.ModuleType):
            return importlib.import_module("cuda.bindings.driver")
        return self.runtime.driver_api

    def load_module(self, code: bytes, kernels: Sequence[str]) -> dict[str, Any]:
        """Kernels of a cubin, by name. It stays loaded as long as the process: recorded launches hold on to it."""
        self.activate()
        module = self.call_driver("cuModuleLoadData", code)
        return {name: self.call_driver("cuModuleGetFunction", module, name.encode()) for name in kernels}

    def launch_kernel(
        self,
        function: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[DeviceBuffer | int | float | None],
        shared_bytes: int = 0,
    ) -> None:
        """Enqueue a kernel. Buffers are passed as pointers, None as a null one, integers as int, others as float."""
        kinds = {int: ctypes.c_int, float: ctypes.c_float}
        values = tuple(value.pointer if isinstance(value, DeviceBuffer) else value or 0 for value in arguments)
        ctypes_of = tuple(kinds.get(type(value), ctypes.c_void_p) for value in arguments)
        self.call_driver("cuLaunchKernel", function, *grid, *block, shared_bytes, self.stream, (values, ctypes_of), 0)

    def call_driver(self, name: str, *args: Any) -> Any:
        """Call a function of the driver; its value. Raises CudaError."""
        error, *values = getattr(self.driver, name)(*args)
        if error != self.driver.CUresult.CUDA_SUCCESS:
            _, code = self.driver.cuGetErrorName(error)
            text = code.decode() if isinstance(code, bytes) else str(code)
            raise CudaError(f"{name} failed: {text}. Errors of earlier launches may show up here")
        return values[0] if values else None


class NoCollection:
    """Garbage collection off while any thread captures. It might free buffers of another :class:`Cuda`, which does not know
    of the capture: cudaFree by a capturing thread is refused, and breaks the capture."""

    def __init__(self) -> None:
        self._lock, self._captures, self._was_on = threading.Lock(), 0, False

    def begin(self) -> None:
        with self._lock:
            if not self._captures:
                self._was_on = gc.isenabled()
                gc.disable()
            self._captures += 1

    def end(self) -> None:
        with self._lock:
            self._captures -= 1
            if not self._captures and self._was_on:
                gc.enable()


_no_collection = NoCollection()


def load_runtime() -> Any:
    """The module `cuda.bindings.runtime`. Raises NoGpuError with the way to install it."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise NoGpuError(f"the package cuda-bindings is not installed ({error}); {INSTALL_HINT}") from error


def error_name(runtime: Any, error: Any) -> str:
    _, name = runtime.cudaGetErrorName(error)
    return name.decode() if isinstance(name, bytes) else str(name)


def device_info(runtime: Any, device: int = 0) -> DeviceInfo:
    """What the device is. Raises NoGpuError where there is none, saying what is missing."""

    def version(function: Callable[[], tuple[Any, int]]) -> str:
        number = int(function()[1] or 0)
        return f"{number // 1000}.{number % 1000 // 10}"

    try:
        driver = version(runtime.cudaDriverGetVersion)
    except RuntimeError as missing:  # before cuda-bindings 12.9, where libcuda is missing
        raise NoGpuError(f"{NO_DRIVER} ({missing})") from missing
    if driver == "0.0":
        raise NoGpuError(NO_DRIVER)
    error, count = runtime.cudaGetDeviceCount()
    codes = runtime.cudaError_t
    if error == codes.cudaErrorInsufficientDriver:
        have = version(runtime.cudaRuntimeGetVersion)
        raise NoGpuError(
            f"the NVIDIA driver supports CUDA {driver}, the package cuda-bindings is made for {have}: update the "
            f"driver, or `pip install 'cuda-bindings<{int(have.split('.')[0])}'`"
        )
    if error == codes.cudaErrorNoDevice or (error == codes.cudaSuccess and not count):
        raise NoGpuError("there is a driver but no NVIDIA GPU that this process may use (see CUDA_VISIBLE_DEVICES)")
    if error != codes.cudaSuccess:
        raise NoGpuError(f"the GPUs of this machine cannot be listed: {error_name(runtime, error)}")
    if not is_whole(device):
        raise ValueError(f"device is {shown(device)}; expected the index of a GPU, 0 for the first")
    if not 0 <= device < count:
        raise NoGpuError(f"device is {device}; this machine has GPUs 0..{count - 1}")
    error, properties = runtime.cudaGetDeviceProperties(device)
    if error != codes.cudaSuccess:
        raise NoGpuError(f"GPU {device} cannot be asked what it is: {error_name(runtime, error)}")
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    capability = f"{properties.major}.{properties.minor}"
    return DeviceInfo(int(device), name.rstrip("\0"), capability, int(properties.totalGlobalMem), driver)
