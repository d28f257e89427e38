"""ONNX Runtime on the CPU: the embedded default."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..bundle import Bundle, BundleError, GraphInfo
from ..machine import onnxruntime_distribution, usable_cores
from .base import Array
from .products import INTEGER_PRECISIONS, keep_products_exact

Job = tuple[Mapping[str, Array], Mapping[str, Array]]

# Precisions whose ranges are taken over a launch: only rows that are launched apart do not depend on one another.
DYNAMIC_PRECISIONS = ("int8",)
# From so many rows per thread on, threads that find no row for the last round are idle for little of the time.
MANY_ROWS = 4
# Sequence positions of one launch at most, so that its activations stay few; many more gain nothing.
LAUNCH_POSITIONS = 1024
# Graphs of thousands of tiny operations: sharing each of them out costs more than the operation. They run in one thread,
# several of them side by side.
SMALL_OPERATIONS = ("inner_token", "inner_token_guided", "mixture_sample", "mixture_sample_guided", "tokens_to_latents")
# Graphs with activations of many megabytes. Freed and taken again, as for other graphs, that memory would come as new
# pages each time, or lie about in pieces: twice what a launch needs.
LARGE_ACTIVATIONS = ("outer_step", "vae_decoder")
# What runs once the tokens of a micro-batch are made; nothing else runs then.
DECODING = ("tokens_to_latents", "vae_decoder")


class OnnxRuntimeCpu:
    """Backend whose buffers are NumPy arrays. Sessions are made when a graph is first needed, and kept.

    Independent rows (an image in one guidance branch) run side by side, a few to a launch of one thread, where there
    are enough of them for all threads: as fast as one launch on all threads, or faster, with the activations of a few
    rows in memory instead of those of all. Where ranges are taken as a graph runs, every row is a launch of its own, and
    no image's rounding depends on another.

    Parameters
    ----------
    threads : cores to use; None means the physical ones that this process may use.
    low_memory : hold the graphs of one phase at a time, those that make tokens or those that decode them. Every
        micro-batch loads both again.
    """

    name = "onnxruntime-cpu"
    synchronous = True

    def __init__(self, bundle: Bundle, precision: str, *, threads: int | None = None, low_memory: bool = False) -> None:
        if onnxruntime_distribution() is None:
            raise BundleError("ONNX Runtime is not installed; `pip install arinar[cpu]` (or arinar[gpu]) installs it")
        import onnxruntime

        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; expected at least 1")
        self._ort = onnxruntime
        self._bundle = bundle
        self._graphs: dict[str, GraphInfo] = bundle.manifest.precision_graphs(precision)
        # (A causal step reads every weight for each row: its rows stay together.)
        config, scheme = bundle.manifest.config, bundle.manifest.scheme(precision)
        self._dynamic = scheme in DYNAMIC_PRECISIONS and config.outer == "masked"
        self._integers = scheme in INTEGER_PRECISIONS
        self._large = [name for name in LARGE_ACTIVATIONS if name != "outer_step" or config.outer == "masked"]
        self._rows_per_launch = max(1, LAUNCH_POSITIONS // (config.buffer_size + config.seq_len))
        self.threads, self.low_memory = threads or usable_cores(), low_memory
        self._sessions: dict[tuple[str, int], Any] = {}
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="arinar") if self.threads > 1 else None

    def prepare(self, *graphs: str, rows: int | None = None) -> None:
        for name in graphs:
            if self.low_memory and name in DECODING:
                continue
            self._session(name, self._threads_of(name, 1 if rows is None else self.parts(name, rows)))

    def _session(self, name: str, threads: int) -> Any:
        if (name, threads) not in self._sessions:
            if name not in self._graphs:
                raise BundleError(f"the bundle has no graph {name!r}; it has {', '.join(self._graphs)}")
            if self.low_memory:
                self._release_other_phase(name)
            options = self._ort.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = threads
            if self._integers:
                keep_products_exact(options)
            # An arena keeps what its session's largest launches needed at one time; freed memory serves all sessions.
            options.enable_cpu_mem_arena = name in self._large
            # (Memory planned ahead would be taken beside the arena's, for each input shape.)
            options.enable_mem_pattern = not options.enable_cpu_mem_arena
            # Threads that wait for work by spinning would take the cores from the launches that follow.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            self._sessions[name, threads] = self._load(name, options)
        return self._sessions[name, threads]

    def _release_other_phase(self, name: str) -> None:
        other = [key for key in self._sessions if (key[0] in DECODING) != (name in DECODING)]
        for key in other:
            del self._sessions[key]
        if other:
            return_freed_memory()

    def _load(self, name: str, options: Any) -> Any:
        info = self._graphs[name]
        path = self._bundle.path(info.cpu_file or info.file)
        try:
            return self._ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises its own, undocumented types
            raise BundleError(f"ONNX Runtime cannot load graph {name!r} ({path}): {error}") from error

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.zeros(shape, dtype)

    def upload(self, array: Array) -> Array:
        return np.ascontiguousarray(array)

    def write(self, buffer: Array, array: Array) -> None:
        buffer[...] = array

    def download(self, buffer: Array) -> Array:
        return buffer

    def copy(self, source: Array, target: Array) -> None:
        target[...] = source

    def write_slots(self, rows: Array, target: Array, slot: int) -> None:
        target[:, :, slot : slot + rows.shape[2]] = rows

    def execute(self, key: tuple[Any, ...], launches: Callable[[], None]) -> None:
        launches()

    def forget(self, key: tuple[Any, ...]) -> None:
        pass

    def launch(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self._run(graph, self._threads_of(graph, 1), (inputs, outputs))

    def parts(self, graph: str, rows: int) -> int:
        if self._dynamic:
            return rows
        if graph in SMALL_OPERATIONS:
            return min(rows, self.threads)
        if rows % self.threads and rows < MANY_ROWS * self.threads:
            return 1
        needed = -(-rows // self._rows_per_launch)
        return min(rows, -(-needed // self.threads) * self.threads)

    def _threads_of(self, graph: str, parts: int) -> int:
        """Threads of each of so many launches."""
        return 1 if graph in SMALL_OPERATIONS or parts >= self.threads else self.threads

    def launch_all(self, graph: str, jobs: Sequence[Job]) -> None:
        threads = self._threads_of(graph, len(jobs))
        if (graph, threads) not in self._sessions and (graph, 1) in self._sessions:
            threads = 1  # too few jobs for all threads, this once: not worth another copy of the weights
        self._session(graph, threads)  # made once, not by each thread
        if self._pool is None or threads > 1:
            for job in jobs:
                self._run(graph, threads, job)
        else:
            for _ in self._pool.map(lambda job: self._run(graph, threads, job), jobs):
                pass

    def _run(self, graph: str, threads: int, job: Job) -> None:
        inputs, outputs = job
        results = self._session(graph, threads).run(list(outputs), dict(inputs))
        for (name, target), value in zip(outputs.items(), results, strict=True):
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise FloatingPointError(f"graph {graph!r} made non-finite values in its output {name!r}")
            target[...] = value


def return_freed_memory() -> None:
    """Give what was freed back to the system, where the C library has a call for it (glibc's keeps it otherwise)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
