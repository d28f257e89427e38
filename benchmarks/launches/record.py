"""What a generation puts on a GPU's stream: the loop and a GPU backend as they are, on the tests' fake GPU, which takes
every call and computes nothing."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from arinar.runtime import Bundle, Pipeline
from arinar.runtime.backends import tensorrt
from arinar.runtime.backends.cuda import Cuda, DeviceBuffer
from arinar.runtime.backends.engines import find_engines
from arinar.runtime.bundle import MANIFEST_NAME
from arinar.runtime.kernels import compiler
from tests.fake_gpu import FakeCudaRuntime, Function, Operation, Tensors, fake_onnxruntime, fake_tensorrt, make_engines

Shapes = Mapping[str, tuple[int, ...]]
#: Backend -> the module that a fake stands for.
LIBRARIES = {"onnxruntime-cuda": "onnxruntime", "tensorrt": "tensorrt"}
#: Micro-batches until all launches are recorded that will be: a backend warms up once or twice, and captures then.
MOST_ROUNDS = 6
#: Copies by their kind.
COPIES = {"cudaMemcpyHostToDevice": "upload", "cudaMemcpyDeviceToHost": "download", "cudaMemcpyDeviceToDevice": "copy"}
#: Calls in which the host waits for the device.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


@dataclass(frozen=True)
class Item:
    """Something on the stream. ``kind``: "graph", "kernel" (of our own), "copy" or "memset"; ``shapes`` of a graph's inputs;
    ``nbytes`` read and written by the others; ``captured``: replayed by a CUDA graph."""

    kind: str
    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    nbytes: tuple[int, int] = (0, 0)
    captured: bool = False


@dataclass
class Stretch:
    """A part of a micro-batch: what it puts on the stream, calls of CUDA's runtime by name, calls of the library's and those
    in which that waits."""

    items: list[Item] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    library_calls: int = 0
    library_waits: int = 0

    @property
    def waits(self) -> int:
        return self.library_waits + sum(self.calls[name] for name in WAITS)

    @property
    def graph_launches(self) -> int:
        return self.calls["cudaGraphLaunch"]


@dataclass
class Walk:
    """A micro-batch: what goes up before its first step, the steps, decoding with what comes down."""

    fill: Stretch
    steps: list[Stretch]
    decode: Stretch


class RecordingRuntime(FakeCudaRuntime):
    """The fake CUDA runtime, keeping what is put on the stream; what would happen on the device alone does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stretch, self.computed = Stretch(), 0
        self._captured_items: list[Item] | None = None
        self._graph_items: dict[int, list[Item]] = {}
        self._seen = 0

    def take(self) -> Stretch:
        """What has happened since the last time."""
        stretch, self.stretch = self.stretch, Stretch()
        stretch.calls.update(self.names()[self._seen :])
        self._seen = len(self.log)
        return stretch

    def note(self, item: Item) -> None:
        (self.stretch.items if self._captured_items is None else self._captured_items).append(item)

    def compute(self, function: Function, inputs: Tensors, run: Operation) -> None:
        self.computed += 1
        shapes = tuple((name, shape) for name, (_, shape, _) in inputs.items())
        self.note(Item("graph", function.path, shapes))  # type: ignore[attr-defined]

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: Any, stream: int) -> None:
        if kind != self.cudaMemcpyKind.cudaMemcpyDeviceToDevice:
            super().cudaMemcpyAsync(target, source, nbytes, kind, stream)
        self.note(Item("copy", COPIES[kind.name], nbytes=(nbytes, nbytes)))

    def cudaMemcpy2DAsync(
        self, target: int, dpitch: int, source: int, spitch: int, width: int, height: int, kind: Any, stream: int
    ) -> None:
        self.note(Item("copy", "copy of rows", nbytes=(width * height, width * height)))

    def cudaMemsetAsync(self, pointer: int, value: int, nbytes: int, stream: int) -> None:
        super().cudaMemsetAsync(pointer, value, nbytes, stream)
        self.note(Item("memset", "clear", nbytes=(0, nbytes)))

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> None:
        super().cudaStreamBeginCapture(stream, mode)
        self._captured_items = []

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> int:
        handle = super().cudaGraphInstantiate(graph, flags)
        items, self._captured_items = self._captured_items or [], None
        self._graph_items[handle] = [Item(i.kind, i.name, i.shapes, i.nbytes, captured=True) for i in items]
        return handle

    def cudaGraphLaunch(self, graph: int, stream: int) -> None:
        super().cudaGraphLaunch(graph, stream)
        self.stretch.items += self._graph_items[graph]


def _count_rows(head: Any, cuda: RecordingCuda) -> None:
    """Tell for how many rows kernels make a token, and for how many their buffers are."""
    token = getattr(head, "token", None)
    if token is None:
        return

    def counted(start: Any, *arguments: Any) -> None:
        cuda.rows, cuda.most = start.shape[0], token.most_rows
        token(start, *arguments)
        cuda.rows = cuda.most = 1

    counted.most_rows = token.most_rows  # type: ignore[attr-defined]
    head.token = counted


class Driver:
    """What loads kernels of our own, on the recording runtime: any code will do, it does not run."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)

    def cuModuleLoadData(self, code: bytes) -> tuple[int, None]:
        return 0, None

    def cuModuleGetFunction(self, module: None, name: bytes) -> tuple[int, str]:
        return 0, name.decode()


class RecordingCuda(Cuda):
    """Keeps launches of our own kernels by name. All buffers among their arguments count as read, once; of those that are
    made for ``most`` rows, the ``rows`` that there are."""

    driver: Any = Driver()
    rows = most = 1

    def launch_kernel(self, function: str, grid: Any, block: Any, arguments: Sequence[Any], *rest: Any, **more: Any) -> None:
        buffers = [value for value in arguments if isinstance(value, DeviceBuffer)]
        read = sum(b.nbytes * self.rows // self.most if self.most in b.shape[:2] else b.nbytes for b in buffers)
        self.runtime.log.append(("cuLaunchKernel", function))
        self.runtime.note(Item("kernel", function, nbytes=(read, 0)))


def record(
    bundle: Bundle, backend: str, precision: str, batch: int, *, num_iter: int | None, guidance_scale: float, **options: Any
) -> Walk:
    """A micro-batch as it is when everything that is recorded once has been: warm-ups and captures are behind it.

    options : of `Pipeline.load` and the backend (``inner``, ``cuda_graphs``). Raises BundleError and ValueError as
    `Pipeline.load` and `Pipeline.generate` do.
    """
    runtime = RecordingRuntime()
    options |= {"module": "tensorrt"} if backend == "tensorrt" else {}
    with _kernels(), _library(bundle, backend, precision, batch, runtime) as library:
        cuda = RecordingCuda(runtime=runtime)
        pipeline = Pipeline.load(bundle.folder, backend=backend, precision=precision, cuda=cuda, verify=False, **options)
        _count_rows(pipeline.loop.head, cuda)
        labels = [i % pipeline.config.num_classes for i in range(batch)]
        sampling = pipeline.resolve(labels, num_iter=num_iter, guidance_scale=guidance_scale, batch_size=batch)
        (part,) = sampling.batches()
        for round_ in range(MOST_ROUNDS):
            graphs = len(runtime.graph_sizes)
            walk = _walk(pipeline, part.batch, runtime, library)
            warm = getattr(pipeline.backend, "warm_up_runs", 1)
            if round_ >= warm and len(runtime.graph_sizes) == graphs:
                return walk
    raise RuntimeError(f"the backend still captures after {MOST_ROUNDS} micro-batches of one shape")


@contextlib.contextmanager
def _kernels() -> Iterator[None]:
    """Kernels of our own count as compiled: neither is there a compiler, nor is anything kept in the bundle."""
    nvrtc = SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0))
    with mock.patch.object(compiler, "load_nvrtc", lambda: nvrtc), mock.patch.object(compiler, "read", lambda *_: b"code"):
        yield


def _walk(pipeline: Pipeline, batch: Any, runtime: RecordingRuntime, library: Any) -> Walk:
    calls = _calls(library, runtime)

    def take() -> Stretch:
        nonlocal calls
        stretch, now = runtime.take(), _calls(library, runtime)
        stretch.library_calls, stretch.library_waits = now[0] - calls[0], now[1] - calls[1]
        calls = now
        return stretch

    filled: list[Stretch] = []
    backend: Any = pipeline.backend
    execute = backend.execute

    def first(*sequence: Any) -> None:
        """The first sequence of launches: what came before it is the filling."""
        backend.execute = execute
        filled.append(take())
        execute(*sequence)

    take()
    backend.execute = first
    walk, steps = pipeline.loop.walk(batch), []
    for _ in walk:
        steps.append(take())
    return Walk(filled[0], steps, take())


def _calls(library: Any, runtime: RecordingRuntime) -> tuple[int, int]:
    """Calls of the library's so far (tensors bound, shapes and addresses set, graphs run), and in how many it waited."""
    if hasattr(library, "engines"):
        return sum(len(engine.calls) for engine in library.engines.values()), 0
    bound = sum(binding.calls for session in library.sessions for binding in session.bindings)
    return int(bound) + runtime.computed, int(library.waits)


@contextlib.contextmanager
def _library(bundle: Bundle, backend: str, precision: str, batch: int, runtime: RecordingRuntime) -> Iterator[Any]:
    """A stand-in for the backend's library while the context lasts, with engines that lie outside the bundle."""
    with tempfile.TemporaryDirectory(prefix="arinar-launches-") as folder, contextlib.ExitStack() as stack:
        if backend == "tensorrt":
            shutil.copy(bundle.folder / MANIFEST_NAME, folder)
            beside = Bundle.open(folder)
            make_engines(beside, precision=precision, batch=(1, batch, batch))

            def found(_: Bundle, *arguments: Any, **settings: Any) -> Any:
                return find_engines(beside, *arguments, **settings)

            stack.enter_context(mock.patch.object(tensorrt, "find_engines", found))
        library: ModuleType = fake_tensorrt(runtime) if backend == "tensorrt" else fake_onnxruntime(runtime)
        stack.enter_context(mock.patch.dict(sys.modules, {LIBRARIES[backend]: library}))
        yield library
