"""The seam between the loop and whatever executes graphs, and the choice of a backend.

A backend owns memory and executes graphs; the loop decides what runs on what. State stays where the backend keeps it:
the loop handles buffers only by slicing their first axis and reshaping, which never copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, Protocol

import numpy as np
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

    def prepare(self, *graphs: str) -> None:
        """Load graphs ahead of their first launch."""

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


def onnxruntime_distribution() -> str | None:
    """Which ONNX Runtime package is installed: "onnxruntime", "onnxruntime-gpu" or None.

    Raises BundleError where both are: they overwrite each other's files, and which one answers is chance.
    """
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            metadata.version(name)
            found.append(name)
        except metadata.PackageNotFoundError:
            pass
    if len(found) > 1:
        raise BundleError(
            "onnxruntime and onnxruntime-gpu are both installed; they overwrite each other's files. Uninstall both, "
            "then install one: `pip uninstall onnxruntime onnxruntime-gpu`, then `pip install arinar[cpu]` or "
            "`pip install arinar[gpu]`"
        )
    return found[0] if found else None


def _open_cpu(bundle: Bundle, precision: str, options: Mapping[str, Any]) -> Backend:
    from .onnxruntime_backend import OnnxRuntimeCpu

    return OnnxRuntimeCpu(bundle, precision, **options)


#: Backend name -> how to open it.
BACKENDS: dict[str, Callable[[Bundle, str, Mapping[str, Any]], Backend]] = {
    "onnxruntime-cpu": _open_cpu,
}


def choose_backend(bundle: Bundle) -> str:
    """The best backend that this machine and bundle offer."""
    return "onnxruntime-cpu"


def open_backend(bundle: Bundle, name: str | None, precision: str, **options: Any) -> Backend:
    """Open a backend by name (None: the best available). Raises BundleError for an unknown name."""
    name = name or choose_backend(bundle)
    if name not in BACKENDS:
        raise BundleError(f"backend is {name!r}; choose one of {', '.join(BACKENDS)}")
    return BACKENDS[name](bundle, precision, options)


def numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(name)
