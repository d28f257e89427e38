"""What the two GPU backends share: buffers in device memory, and the recording of launches in CUDA graphs.

Between the uploads before a micro-batch and the downloads after it, nothing is copied between host and device and
nothing waits: `execute` only enqueues work on one stream.

CUDA graphs. The first time that a sequence of launches is executed, it simply runs: libraries load their kernels,
allocate, and settle on shapes and addresses; one library needs two such runs. The next time it is captured, and replayed
from then on. A launch in
a captured sequence finds its inputs and outputs at fixed addresses: those of the loop's buffers, or of a staging buffer
where the loop's address differs from launch to launch or is not aligned. What a library holds for a launch (a binding)
is shared by all sequences on the same buffers: a captured graph keeps the addresses that it was captured with.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from arinar.schemes import TRACED

from ..bundle import Bundle, BundleError, GraphInfo
from ..kernels.add import AddKernel
from ..kernels.compiler import KernelError
from ..kernels.draw import DrawKernel, draw_kernel
from ..kernels.inner import TokenKernels, fits, token_kernels
from .base import Array, Rows, merged
from .cuda import Cuda, CudaError, DeviceBuffer
from .engines import kernel_folder

#: Launches recorded in one CUDA graph; longer sequences become several graphs, replayed in order. A launch is some
#: hundred kernels, and graphs of many ten thousand nodes are slow to make and to upload.
LAUNCHES_PER_GRAPH = 64
#: TensorRT asks for it of every address, and kernels that read vectors rely on it.
ALIGNMENT = 256


@dataclass
class Binding:
    """Where the tensors of a launch are.

    ``prepared`` is what the library holds for it: an execution context, an I/O binding. ``addresses`` are what the
    library has been told.
    """

    prepared: Any = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    staged: set[str] = field(default_factory=set)
    keep: dict[str, Any] = field(default_factory=dict)  # memory whose address is in use


@dataclass
class Recording:
    """One sequence of launches: how often it has run, the graphs that replay it."""

    runs: int = 0
    graphs: list[Any] = field(default_factory=list)


@dataclass
class Owned:
    """What belongs to the buffers of one owner: its sequences, whether to capture them, what their launches are bound to."""

    capture: bool = True
    sequences: dict[Hashable, Recording] = field(default_factory=dict)
    bindings: dict[Any, Binding] = field(default_factory=dict)


class CudaBackend:
    """Base of the GPU backends. A subclass says how one graph is bound and run: `_bind`, `_run`.

    Parameters
    ----------
    device : index of the GPU.
    cuda_graphs : record sequences of launches and replay them.
    cuda : the device, for tests.
    """

    name = "cuda"
    synchronous = False
    #: Rows up to which our kernels make tokens: beyond, the library's products gain more than its launches cost (counted, not
    #: timed: docs/kernels.md).
    native_rows = 256
    #: How often a sequence runs before it is captured: until the library allocates no more.
    warm_up_runs = 1

    def __init__(self, bundle: Bundle, precision: str, *, cuda_graphs: bool, device: int = 0, cuda: Cuda | None = None) -> None:
        self.cuda = cuda if cuda is not None else Cuda(device)
        self.cuda_graphs = cuda_graphs
        self._bundle, self._precision = bundle, precision
        self._graphs: dict[str, GraphInfo] = bundle.manifest.precision_graphs(precision)
        self._owned: dict[Hashable, Owned] = {}
        self._current: tuple[Owned, Recording] | None = None
        self._captured_launches = 0
        self._loose: dict[Any, Binding] = {}  # of launches outside a recorded sequence
        self._add: AddKernel | None = None
        self._pools: dict[tuple[str, int], DeviceBuffer] = {}
        weakref.finalize(self, _destroy_all, self.cuda, self._owned)

    # Of a subclass.

    def prepare(self, *graphs: str, rows: int | None = None) -> None:
        raise NotImplementedError

    def _aliases(self, graph: str) -> Mapping[str, str]:
        """Outputs that the library writes in place of an input: output name -> input name."""
        return {}

    def _bind(self, graph: str, binding: Binding, buffers: Mapping[str, DeviceBuffer], addresses: dict[str, int]) -> None:
        """Bring what the library holds in line with these shapes and addresses."""
        raise NotImplementedError

    def _run(self, graph: str, binding: Binding) -> None:
        """Enqueue the graph on the stream."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        return {"cuda_graphs": self.cuda_graphs}

    def _activate(self) -> None:
        """Every thread has a current device of its own: what may be a thread's first call says which. (In a sequence,
        `execute` has.)"""
        if self._current is None:
            self.cuda.activate()

    # Memory.

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceBuffer:
        self._activate()
        buffer = self.cuda.empty(tuple(shape), dtype)
        self.cuda.clear(buffer)
        return buffer

    def upload(self, array: Array) -> DeviceBuffer:
        self._activate()
        buffer = self.cuda.empty(array.shape, array.dtype)
        self.cuda.upload(array, buffer)
        return buffer

    def write(self, buffer: DeviceBuffer, array: Array) -> None:
        self._activate()
        self.cuda.upload(array, buffer)

    def clear(self, buffer: DeviceBuffer) -> None:
        self._activate()
        self.cuda.clear(buffer)

    def download(self, buffer: DeviceBuffer) -> Array:
        self._activate()
        return self.cuda.download(buffer)

    def copy(self, source: DeviceBuffer, target: DeviceBuffer) -> None:
        if source.nbytes != target.nbytes:
            raise ValueError(f"copy of {source.nbytes} bytes to a buffer of {target.nbytes}")
        self._activate()
        self.cuda.copy(source.pointer, target.pointer, source.nbytes)

    def add(self, left: DeviceBuffer, right: DeviceBuffer, target: DeviceBuffer, factor: float) -> None:
        """Raises BundleError where our kernels cannot be had: no graph does it."""
        self._activate()
        if self._add is None:
            try:
                if self.cuda.driver is None:
                    raise KernelError("cuda-python's driver API is not installed")
                self._add = AddKernel(self.cuda, kernel_folder(self._bundle))
            except (KernelError, CudaError) as error:
                raise BundleError(f"guidance_refresh above 1 needs a kernel that cannot be had here: {error}") from error
        self._add(left, right, target, factor)

    def write_slots(self, rows: DeviceBuffer, target: DeviceBuffer, slot: int) -> None:
        """rows (N, H, count, d) -> target[:, :, slot : slot + count]: one strided copy, on the device."""
        outer, heads, slots, width = target.shape
        count = rows.shape[2]
        if rows.shape != (outer, heads, count, width) or rows.dtype != target.dtype or not 0 <= slot <= slots - count:
            raise ValueError(f"rows {rows.shape} {rows.dtype} do not fit slot {slot} of {target.shape} {target.dtype}")
        self._activate()
        element = width * target.dtype.itemsize
        self.cuda.copy_rows(rows.pointer, target.pointer + slot * element, count * element, outer * heads, slots * element)

    def _pool(self, purpose: str, nbytes: int) -> DeviceBuffer:
        """Memory that launches use one after another, in sizes of powers of two. It stays where it is: captured graphs
        hold its address."""
        size = max(ALIGNMENT, 1 << (nbytes - 1).bit_length())
        if (purpose, size) not in self._pools:
            self._pools[purpose, size] = self.cuda.empty((size,), "uint8")
        return self._pools[purpose, size]

    # Sequences.

    def execute(self, owner: Hashable, key: Hashable, launches: Callable[[], None]) -> None:
        self.cuda.activate()
        if not self.cuda_graphs:
            launches()
            return
        owned = self._owned.setdefault(owner, Owned())
        sequence = owned.sequences.setdefault(key, Recording())
        if not sequence.graphs:
            self._current = owned, sequence
            try:
                if sequence.runs >= self.warm_up_runs and owned.capture:
                    self._capture(owned, sequence, launches)
                if not sequence.graphs:
                    launches()
                    if not sequence.runs:
                        self.cuda.synchronize()  # errors of the first run are this run's, not the capture's
            finally:
                self._current = None
            sequence.runs += 1
        for graph in sequence.graphs:
            self.cuda.launch_graph(graph)

    def _capture(self, owned: Owned, sequence: Recording, launches: Callable[[], None]) -> None:
        """Record the launches, without running them; where that fails, say so once and never try this owner's again."""
        self._captured_launches = 0
        try:
            self.cuda.begin_capture()
            launches()
            sequence.graphs.append(self.cuda.end_capture())
        except Exception as error:
            self.cuda.abandon_capture()
            _destroy_graphs(self.cuda, sequence)
            owned.capture = False
            warnings.warn(
                f"{self.name}: the launches could not be captured in a CUDA graph ({error}); they are issued one by "
                f"one instead, which is slower. cuda_graphs=False (--no-cuda-graphs) does without the attempt",
                RuntimeWarning,
                stacklevel=4,
            )
        except BaseException:
            self.cuda.abandon_capture()
            _destroy_graphs(self.cuda, sequence)
            raise

    def forget(self, owner: Hashable) -> None:
        owned = self._owned.pop(owner, None)
        if owned is not None:
            self._activate()
            self.cuda.synchronize()
            _destroy_all(self.cuda, {owner: owned})  # before the contexts and addresses that they use
            owned.bindings.clear()

    # Kernels of our own. Where they cannot be had, a warning says why, and graphs do the same in many small launches.

    def native_draw(self) -> DrawKernel | None:
        manifest = self._bundle.manifest
        if self.cuda.driver is None or manifest.config.head != "gmm":
            return None
        try:
            candidates, folder = manifest.law["num_candidates"], kernel_folder(self._bundle)
            return draw_kernel(self.cuda, manifest.config.num_gaussians, candidates, folder)
        except (KernelError, CudaError) as error:
            warnings.warn(f"{self.name}: tokens are drawn by graphs, which is slower: {error}", RuntimeWarning, stacklevel=2)
            return None

    def native_token(self) -> TokenKernels | None:
        manifest, folder = self._bundle.manifest, kernel_folder(self._bundle)
        plain = manifest.scheme(self._precision) in TRACED
        if not (self.native_rows and plain and self.cuda.driver is not None and fits(manifest.config)):
            return None
        try:
            graph, candidates = self._bundle.graph_path(self._info("inner_step")), manifest.law["num_candidates"]
            return token_kernels(self.cuda, graph, manifest.config, candidates, self.native_rows, folder)
        except (KernelError, CudaError, OSError) as error:
            warnings.warn(
                f"{self.name}: features are computed by graphs, which is slower: {error}", RuntimeWarning, stacklevel=2
            )
            return None

    def mark(self) -> Any:
        self._activate()
        return self.cuda.record_event()

    def wait(self, mark: Any) -> None:
        self._activate()
        self.cuda.wait_event(mark)

    # Launches.

    def launch(
        self,
        graph: str,
        inputs: Mapping[str, DeviceBuffer],
        outputs: Mapping[str, DeviceBuffer],
        rows: Rows | None = None,
    ) -> None:
        """Enqueue a graph, with device-to-device copies around it where an address cannot be given to the library.

        All rows go into one launch."""
        self._activate()
        self.prepare(graph)
        info = self._info(graph)
        ranks = {tensor.name: len(tensor.shape) for tensor in (*info.inputs, *info.outputs)}
        inputs = {name: merged(buffer, ranks.get(name, 0)) for name, buffer in inputs.items()}
        outputs = {name: merged(buffer, ranks.get(name, 0)) for name, buffer in outputs.items()}
        buffers = {**inputs, **outputs}
        binding = self._binding(graph, buffers)
        addresses = {name: self._address(binding, name, buffer) for name, buffer in buffers.items()}
        aliases = self._aliases(graph)
        for name, source in aliases.items():
            # The library updates in place: where the loop has two buffers, the input is copied to the output first.
            addresses[source] = addresses[name]
        taken = {addresses[name] for name in inputs}
        for name in outputs.keys() - aliases.keys():
            if outputs[name].size and addresses[name] in taken:
                # The other way round: one buffer in the loop, where the library must not write over its input.
                binding.staged.add(name)
                addresses[name] = self._pool(name, outputs[name].nbytes).pointer
        self._bind(graph, binding, buffers, addresses)
        for name, buffer in inputs.items():
            if addresses[name] != buffer.pointer:
                self.cuda.copy(buffer.pointer, addresses[name], buffer.nbytes)
        self._run(graph, binding)
        for name, buffer in outputs.items():
            if addresses[name] != buffer.pointer:
                self.cuda.copy(addresses[name], buffer.pointer, buffer.nbytes)
        if self.cuda.capturing:
            self._count_launch()

    def _binding(self, graph: str, buffers: Mapping[str, DeviceBuffer]) -> Binding:
        """In a sequence, one per graph and shapes, so that a capture finds settled what the run before it has made."""
        if self._current is None:
            return self._loose.setdefault(graph, Binding())
        key = (graph, tuple(buffer.shape for buffer in buffers.values()))
        return self._current[0].bindings.setdefault(key, Binding())

    def _address(self, binding: Binding, name: str, buffer: DeviceBuffer) -> int:
        """Where the library is to find a tensor: in the buffer itself, or in a staging buffer."""
        if not buffer.size:  # libraries want an address all the same, another for each tensor
            return self._pool(f"{name}, empty", 1).pointer
        fixed = self._current is None or binding.addresses.get(name, buffer.pointer) == buffer.pointer
        if buffer.pointer % ALIGNMENT or not fixed or (self._current is not None and name in binding.staged):
            binding.staged.add(name)
            return self._pool(name, buffer.nbytes).pointer
        return buffer.pointer

    def _count_launch(self) -> None:
        self._captured_launches += 1
        if self._captured_launches % LAUNCHES_PER_GRAPH == 0 and self._current is not None:
            self._current[1].graphs.append(self.cuda.end_capture())
            self.cuda.begin_capture()

    def _info(self, graph: str) -> GraphInfo:
        if graph not in self._graphs:
            raise BundleError(f"the bundle has no graph {graph!r}; it has {', '.join(self._graphs)}")
        return self._graphs[graph]


def _destroy_graphs(cuda: Cuda, sequence: Recording) -> None:
    while sequence.graphs:
        cuda.destroy_graph(sequence.graphs.pop())


def _destroy_all(cuda: Cuda, owned: Mapping[Hashable, Owned]) -> None:
    for owner in owned.values():
        for sequence in owner.sequences.values():
            _destroy_graphs(cuda, sequence)


def check_buffer(graph: str, name: str, buffer: DeviceBuffer, shape: tuple[int, ...], dtype: Any) -> None:
    """Raise CudaError where a buffer is not what the library is going to read or write there."""
    if buffer.shape != shape or buffer.dtype != np.dtype(dtype):
        raise CudaError(f"graph {graph!r}: {name!r} is {np.dtype(dtype)} {shape}, its buffer is {buffer.dtype} {buffer.shape}")
