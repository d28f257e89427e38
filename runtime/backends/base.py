"""The seam between the loop and whatever executes graphs.

A backend owns memory and executes graphs; the loop decides what runs on what. State stays where the backend keeps it:
the loop handles buffers only by slicing their first axis and reshaping, which never copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rows:
    """The independent rows of a launch: which axis of each buffer counts images, and which guidance branches, where
    those are independent too. What is not named is the same for all rows.

    apart : every row is to be computed as if it were alone, whatever is asked for beside it.
    """

    images: Mapping[str, int]
    branches: Mapping[str, int] = field(default_factory=dict)
    apart: bool = False

    def count(self, buffers: Mapping[str, Any]) -> tuple[int, int]:
        """Images, and branches that are independent (1 where they are not)."""
        name, axis = next(iter(self.images.items()))
        images = buffers[name].shape[axis]
        branches = next((buffers[name].shape[axis] for name, axis in self.branches.items()), 1)
        return images, branches


class Draw(Protocol):
    """One feature of M rows, drawn without a graph: into ``feature`` (N, 1), N = 2 M with guidance (both halves get the draw),
    and into ``tokens`` (M, D) at a position.

    mixture : weight, mu, logvar, each (N, K), conditional rows first. uniforms (M, U), guidance_scale (M,) or None where there
    is no guidance, temperature (M,): float32, and their first axis may come as several.
    """

    def __call__(
        self,
        mixture: Mapping[str, Any],
        uniforms: Any,
        guidance_scale: Any | None,
        temperature: Any,
        feature: Any,
        tokens: Any,
        position: int,
    ) -> None: ...


class Token(Protocol):
    """All features of a token of N rows, N at most ``most_rows``, from what the conditioning gave, without a graph.

    start (N, W), modulation (N, ...) ; uniforms: (M, U) for each feature; the others as in `Draw`.
    """

    most_rows: int

    def __call__(
        self,
        start: Any,
        modulation: Any,
        uniforms: Sequence[Any],
        guidance_scale: Any | None,
        temperature: Any,
        feature: Any,
        tokens: Any,
    ) -> None: ...


class Backend(Protocol):
    """What the loop needs of an execution backend.

    Buffers are the backend's own: a NumPy array, a device pointer with a shape. They have ``shape``, ``buffer[rows]`` is a
    view of a range of the first axis, ``buffer.reshape(*shape)`` a view of another shape.
    """

    name: str
    #: True where `launch` returns only when the graph has run (so phases can be timed one by one).
    synchronous: bool

    def describe(self) -> dict[str, Any]:
        """Settings that a report should tell, by name: of the CPU ``threads`` and ``low_memory``, say."""

    def prepare(self, *graphs: str, rows: int | None = None) -> None:
        """Load graphs ahead of their first launch; ``rows``: how many independent rows the launches will have, if any."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A zeroed buffer."""

    def upload(self, array: Array) -> Any:
        """A buffer with this content."""

    def write(self, buffer: Any, array: Array) -> None:
        """Replace the content of a buffer."""

    def clear(self, buffer: Any) -> None:
        """Fill a buffer with zeros."""

    def download(self, buffer: Any) -> Array:
        """The content of a buffer; waits for what was launched before."""

    def copy(self, source: Any, target: Any) -> None:
        """Copy one buffer to another of the same size."""

    def add(self, left: Any, right: Any, target: Any, factor: float) -> None:
        """left + factor * right into ``target``, all float32 and of one size."""

    def write_slots(self, rows: Any, target: Any, slot: int) -> None:
        """rows (N, H, count, d) -> target[:, :, slot : slot + count] of a cache (N, H, S, d)."""

    def execute(self, owner: Hashable, key: Hashable, launches: Callable[[], None]) -> None:
        """Carry out a fixed sequence of launches. Sequences of one owner and key are the same launches on the same
        buffers, so a backend may record the first and replay it."""

    def forget(self, owner: Hashable) -> None:
        """The owner's buffers are about to go: drop what was recorded on them."""

    def native_draw(self) -> Draw | None:
        """What draws from Gaussian mixtures by the bundle's law in one launch; None where only graphs do."""

    def native_token(self) -> Token | None:
        """What makes whole tokens of a few rows in few launches; None where only graphs do."""

    def mark(self) -> Any:
        """A point in the work that was launched so far."""

    def wait(self, mark: Any) -> None:
        """Return when the work before a mark is done."""

    def launch(self, graph: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], rows: Rows | None = None) -> None:
        """Run a graph; its outputs are written into the given buffers.

        A graph's row axis may come as several axes of a buffer, which are merged. ``rows`` tells which of them are
        independent of one another: a backend may compute them in several launches.
        """


def merged(buffer: Any, rank: int) -> Any:
    """A buffer with so many of its first axes made one that it has ``rank`` axes."""
    surplus = len(buffer.shape) - rank
    if surplus <= 0:
        return buffer
    return buffer.reshape(math.prod(buffer.shape[: surplus + 1]), *buffer.shape[surplus + 1 :])
