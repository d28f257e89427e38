"""The seam between the loop and whatever executes graphs.

A backend owns memory and executes graphs; the loop decides what runs on what. State stays where the backend keeps it:
the loop handles buffers only by slicing their first axis and reshaping, which never copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy.typing as npt

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
