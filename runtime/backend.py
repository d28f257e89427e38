"""The seam between the loop and whatever executes graphs, and the choice of a backend.

A backend owns memory and executes graphs; the loop decides what runs on what. State stays where the backend keeps it:
the loop handles buffers only by slicing their first axis and reshaping, which never copies.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from .bundle import Bundle, BundleError

Array = npt.NDArray[Any]


class Buffer(Protocol):
    """Memory of a backend with a shape: a NumPy array on the CPU, a device pointer on a GPU."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, rows: slice) -> Any: ...  # a view of some rows
    def reshape(self, *shape: int) -> Any: ...  # a view


class Backend(Protocol):
    """What the loop needs of an execution backend."""

    name: str
    #: True where `launch` returns only when the graph has run (so phases can be timed one by one).
    synchronous: bool

    def prepare(self, *graphs: str, rows: int | None = None) -> None:
        """Load graphs ahead of their first launch; ``rows`` is what `parts` will be asked of their launches, if at all."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A zeroed buffer."""

    def upload(self, array: Array) -> Any:
        """A buffer with this content."""

    def write(self, buffer: Any, array: Array) -> None:
        """Replace the content of a buffer."""

    def download(self, buffer: Any) -> Array:
        """The content of a buffer; waits for what was launched before."""

    def copy(self, source: Any, target: Any) -> None:
        """Copy one buffer to another of the same size."""

    def write_slots(self, rows: Any, target: Any, slot: int) -> None:
        """rows (N, H, count, d) -> target[:, :, slot : slot + count] of a cache (N, H, S, d)."""

    def execute(self, key: tuple[Any, ...], launches: Callable[[], None]) -> None:
        """Carry out a fixed sequence of launches. Sequences of one key are the same launches on the same buffers, so a
        backend may record the first and replay it."""

    def forget(self, key: tuple[Any, ...]) -> None:
        """The buffers of this sequence are about to go: drop what was recorded of it."""

    def launch(self, graph: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Run a graph; its outputs are written into the given buffers."""

    def parts(self, graph: str, rows: int) -> int:
        """Into how many launches, for `launch_all`, so many independent rows had better be divided: 1 to ``rows``.
        More than 1 only where buffers are NumPy arrays, which can be sliced along any axis."""

    def launch_all(self, graph: str, jobs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
        """Run a graph on several (inputs, outputs), in any order or at the same time."""


def usable_cores() -> int:
    """Physical cores that this process may use: its affinity, one of the threads that share a core, the quota of its
    control group (containers)."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        allowed, period = quota.read_text().split()
        if allowed != "max":
            return max(1, min(len(cores), round(int(allowed) / int(period))))
    return len(cores)


def onnxruntime_distribution() -> str | None:
    """Which ONNX Runtime package is installed: "onnxruntime", "onnxruntime-gpu" or None.

    Raises BundleError where both are, in one folder: they overwrite each other's files, and which one answers is
    chance. In different folders, the one that comes first on the path answers.
    """
    found: dict[str, str] = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = os.path.realpath(str(metadata.distribution(name).locate_file("")))
    if len(found) > 1:
        if len(set(found.values())) == 1:
            raise BundleError(
                "onnxruntime and onnxruntime-gpu are both installed; they overwrite each other's files. Uninstall both, "
                "then install one: `pip uninstall onnxruntime onnxruntime-gpu`, then `pip install arinar[cpu]` or "
                "`pip install arinar[gpu]`"
            )
        path = [os.path.realpath(folder or ".") for folder in sys.path]
        return min(found, key=lambda name: path.index(found[name]) if found[name] in path else len(path))
    return next(iter(found), None)


def _open_cpu(bundle: Bundle, precision: str, options: Mapping[str, Any]) -> Backend:
    from .onnxruntime_backend import OnnxRuntimeCpu

    return OnnxRuntimeCpu(bundle, precision, **options)


def _open_cuda(bundle: Bundle, precision: str, options: Mapping[str, Any]) -> Backend:
    from .onnxruntime_cuda_backend import OnnxRuntimeCuda

    return OnnxRuntimeCuda(bundle, precision, **options)


def _open_tensorrt(bundle: Bundle, precision: str, options: Mapping[str, Any]) -> Backend:
    from .tensorrt_backend import TensorRt

    return TensorRt(bundle, precision, **options)


#: Backend name -> how to open it.
BACKENDS: dict[str, Callable[[Bundle, str, Mapping[str, Any]], Backend]] = {
    "onnxruntime-cpu": _open_cpu,
    "onnxruntime-cuda": _open_cuda,
    "tensorrt": _open_tensorrt,
}
#: Backend name -> the options that `Pipeline.load` passes on to it.
OPTIONS: dict[str, tuple[str, ...]] = {
    "onnxruntime-cpu": ("threads", "low_memory"),
    "onnxruntime-cuda": ("cuda_graphs", "tf32", "wait", "device", "log_severity", "cuda"),
    "tensorrt": ("module", "cuda_graphs", "device", "cuda"),
}


def choose_backend(bundle: Bundle, precision: str) -> str:
    """The best backend that this machine and bundle offer: engines that fit, ONNX Runtime on a GPU, else the CPU.

    Never raises: what is missing or broken is passed over. Ask for a backend by name to learn why it was.
    """
    try:
        from .cuda import device_info, load_runtime

        capability = device_info(load_runtime()).compute_capability
    except Exception:  # no driver, no GPU, no cuda-bindings, or a broken one
        return "onnxruntime-cpu"
    try:
        from .tensorrt_backend import choose_module

        choose_module(bundle, precision, capability)
        return "tensorrt"
    except Exception:  # no library, no engine, or a broken one
        pass
    try:
        from .onnxruntime_cuda_backend import load_onnxruntime

        load_onnxruntime()
        return "onnxruntime-cuda"
    except Exception:  # as above
        return "onnxruntime-cpu"


def open_backend(bundle: Bundle, name: str | None, precision: str, **options: Any) -> Backend:
    """Open a backend by name (None: the best available).

    Options of other backends are an error with a named backend, and are left out where it was chosen here. Raises
    BundleError for an unknown name, a backend that cannot run here, or an option that it does not have.
    """
    chosen = name or choose_backend(bundle, precision)
    if chosen not in BACKENDS:
        raise BundleError(f"backend is {chosen!r}; choose one of {', '.join(BACKENDS)}")
    foreign = [option for option in options if option not in OPTIONS[chosen]]
    for option in foreign:
        if name is not None or not any(option in known for known in OPTIONS.values()):
            raise BundleError(f"backend {chosen} has no option {option!r}; it has {', '.join(OPTIONS[chosen])}")
        del options[option]
    return BACKENDS[chosen](bundle, precision, options)
