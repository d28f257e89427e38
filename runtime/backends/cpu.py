"""What backends on the CPU share: buffers that are NumPy arrays, and how a launch's rows are divided over threads.

Independent rows (an image in one guidance branch) run side by side, a few to a launch of one thread, where there are
enough of them for all threads: as fast as one launch on all threads, or faster, with the activations of a few rows in
memory instead of those of all. Where ranges are taken as a graph runs, every row is a launch of its own, and no image's
rounding depends on another.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from arinar.schemes import SCHEMES
from arinar.text import shown
from arinar.values import is_whole

from ..bundle import Bundle, BundleError, GraphInfo
from ..machine import usable_cores
from .base import Array, Rows, merged

# From so many rows per thread on, threads that find no row for the last round are idle for little of the time.
MANY_ROWS = 4
# Each session has as many, and a stack for each.
MOST_THREADS = 256
# Sequence positions of one launch at most, so that its activations stay few; many more gain nothing.
LAUNCH_POSITIONS = 1024

Buffers = Mapping[str, Array]


class CpuBackend:
    """Base of the CPU backends. A subclass says how one graph is loaded and run: `_load`, `_call`.

    Parameters
    ----------
    threads : cores to use; None means the physical ones that this process may use.
    low_memory : hold the graphs of one phase at a time, those that make tokens or those that decode them. Every
        micro-batch loads both again.
    """

    name = "cpu"
    synchronous = True

    def __init__(self, bundle: Bundle, precision: str, *, threads: int | None = None, low_memory: bool = False) -> None:
        most = max(MOST_THREADS, os.cpu_count() or 1)
        if threads is not None and not (is_whole(threads) and 1 <= threads <= most):
            raise ValueError(
                f"threads is {shown(threads)}; expected an integer from 1 to {most} (cores are what makes it faster)"
            )
        self._bundle = bundle
        self._graphs: dict[str, GraphInfo] = bundle.manifest.precision_graphs(precision)
        config, self._scheme = bundle.manifest.config, SCHEMES[bundle.manifest.scheme(precision)]
        # (A causal step reads every weight for each row: its rows stay together.)
        self._dynamic = self._scheme.ranges == "dynamic" and config.outer == "masked"
        self._rows_per_launch = max(1, LAUNCH_POSITIONS // (config.buffer_size + config.seq_len))
        self.threads, self.low_memory = int(threads or usable_cores()), low_memory
        self._ranks = {name: {t.name: len(t.shape) for t in info.inputs} for name, info in self._graphs.items()}
        self._loaded: dict[tuple[str, int], Any] = {}
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="arinar") if self.threads > 1 else None

    # Of a subclass.

    def _load(self, graph: GraphInfo, threads: int) -> Any:
        """Whatever runs the graph with so many threads."""
        raise NotImplementedError

    def _call(self, loaded: Any, graph: GraphInfo, inputs: Buffers, outputs: list[str]) -> list[Array]:
        """Run what was loaded -> the named outputs."""
        raise NotImplementedError

    # Memory.

    def describe(self) -> dict[str, Any]:
        return {"threads": self.threads, "low_memory": self.low_memory}

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.zeros(shape, dtype)

    def upload(self, array: Array) -> Array:
        return np.ascontiguousarray(array)

    def write(self, buffer: Array, array: Array) -> None:
        buffer[...] = array

    def clear(self, buffer: Array) -> None:
        buffer[...] = 0

    def download(self, buffer: Array) -> Array:
        return buffer

    def copy(self, source: Array, target: Array) -> None:
        target[...] = source

    def add(self, left: Array, right: Array, target: Array, factor: float) -> None:
        np.add(left, np.float32(factor) * right, out=target)

    def write_slots(self, rows: Array, target: Array, slot: int) -> None:
        target[:, :, slot : slot + rows.shape[2]] = rows

    # Sequences: every launch has run when it returns.

    def execute(self, owner: Hashable, key: Hashable, launches: Callable[[], None]) -> None:
        launches()

    def forget(self, owner: Hashable) -> None:
        pass

    def native_draw(self) -> None:
        return None

    def native_token(self) -> None:
        return None

    def mark(self) -> None:
        pass

    def wait(self, mark: Any) -> None:
        pass

    # Graphs.

    def prepare(self, *graphs: str, rows: int | None = None) -> None:
        for name in graphs:
            info = self._info(name)
            if not (self.low_memory and info.phase == "decode"):
                self._ready(info, self._threads_of(info, 1 if rows is None else self._parts(info, rows)))

    def _info(self, name: str) -> GraphInfo:
        if name not in self._graphs:
            raise BundleError(f"the bundle has no graph {name!r}; it has {', '.join(self._graphs)}")
        return self._graphs[name]

    def _ready(self, info: GraphInfo, threads: int) -> Any:
        key = info.name, threads
        if key not in self._loaded:
            if self.low_memory:
                self._release_other_phase(info)
            self._loaded[key] = self._load(info, threads)
        return self._loaded[key]

    def _release_other_phase(self, info: GraphInfo) -> None:
        decoding = info.phase == "decode"
        other = [key for key in self._loaded if (self._graphs[key[0]].phase == "decode") != decoding]
        for key in other:
            del self._loaded[key]
        if other:
            return_freed_memory()

    # Launches.

    def launch(self, graph: str, inputs: Buffers, outputs: Buffers, rows: Rows | None = None) -> None:
        info = self._info(graph)
        jobs = [(inputs, outputs)]
        if rows is not None:
            jobs = self._divided(info, inputs, outputs, rows)
        threads = self._threads_of(info, len(jobs))
        divided = rows is not None and (rows.apart or len(jobs) > 1)
        if divided and (graph, threads) not in self._loaded and (graph, 1) in self._loaded:
            threads = 1  # too few jobs for all threads, this once: not worth another copy of the weights
        self._ready(info, threads)  # made once, not by each thread
        if self._pool is None or threads > 1 or len(jobs) == 1:
            for job in jobs:
                self._run(info, threads, *job)
        else:
            for _ in self._pool.map(lambda job: self._run(info, threads, *job), jobs):
                pass

    def _divided(self, info: GraphInfo, inputs: Buffers, outputs: Buffers, rows: Rows) -> list[tuple[Buffers, Buffers]]:
        """One launch as several, of some of its rows each."""
        images, branches = rows.count({**inputs, **outputs})
        parts = images * branches if rows.apart else self._parts(info, images * branches)
        if parts == 1:
            return [(inputs, outputs)]
        jobs: list[tuple[Buffers, Buffers]] = []
        for some in _ranges(images, -(-parts // branches)):
            given, made = _cut(inputs, rows.images, some), _cut(outputs, rows.images, some)
            for branch in range(branches if rows.branches else 1):
                one = slice(branch, branch + 1)
                jobs.append((_cut(given, rows.branches, one), _cut(made, rows.branches, one)))
        return jobs

    def _parts(self, info: GraphInfo, rows: int) -> int:
        """Into how many launches so many independent rows had better be divided."""
        if self._dynamic:
            return rows
        if info.small:
            return min(rows, self.threads)
        if info.phase == "head":  # it reads all its weights for a few tokens
            return 1
        if rows % self.threads and rows < MANY_ROWS * self.threads:
            return 1
        needed = -(-rows // self._rows_per_launch)
        return min(rows, -(-needed // self.threads) * self.threads)

    def _threads_of(self, info: GraphInfo, parts: int) -> int:
        """Threads of each of so many launches."""
        return 1 if info.small or parts >= self.threads else self.threads

    def _run(self, info: GraphInfo, threads: int, inputs: Buffers, outputs: Buffers) -> None:
        ranks = self._ranks[info.name]
        feed = {name: value if value.ndim == ranks[name] else merged(value, ranks[name]) for name, value in inputs.items()}
        results = self._call(self._ready(info, threads), info, feed, list(outputs))
        for (name, target), value in zip(outputs.items(), results, strict=True):
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise FloatingPointError(f"graph {info.name!r} made non-finite values in its output {name!r}")
            target[...] = value.reshape(target.shape)


def _ranges(count: int, parts: int) -> Iterator[slice]:
    """Nearly equal ranges of ``count`` things, at most ``parts`` of them."""
    parts = min(count, parts)
    return (slice(part * count // parts, (part + 1) * count // parts) for part in range(parts))


def _cut(buffers: Buffers, axes: Mapping[str, int], some: slice) -> Buffers:
    """Views of some of each named buffer's axis; the others as they are."""
    views = dict(buffers)
    for name, axis in axes.items():
        if name in views:
            views[name] = views[name][(*_WHOLE[:axis], some)]
    return views


# Of the axes before the one that is cut.
_WHOLE = (slice(None),) * 8


def return_freed_memory() -> None:
    """Give what was freed back to the system, where the C library has a call for it (glibc's keeps it otherwise)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
