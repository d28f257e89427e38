"""Tasks shared out to workers on Ray, on one machine or many: each worker is an actor that is asked for one task at a time.

Ray Data's `map_batches` has such actors too. It is not used: it needs pyarrow and pandas, starts no work before a whole
operator's actors can be placed, and a task that kills its worker each time is begun again without end. What is needed here is
this one loop.

A worker that dies, with its process or its machine, or fails in a way that may be its machine's, is replaced, and its task
given to another one. Needs the extra ``ray``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from arinar import __version__
from arinar.text import install_hint, one_line, shown

Task = TypeVar("Task")
Result = TypeVar("Result")

#: How often a task is begun before the run ends: what kills three workers would kill the fourth.
TRIES = 3
SECONDS_TO_ANSWER = 10.0


class _Worker:
    """What runs in a worker's process."""

    work: Callable[[Any], Any] | None = None

    def ready(self) -> str:
        """That it runs, and with which version."""
        return __version__

    def do(self, make: Callable[[], Callable[[Any], Any]], task: Any) -> Any:
        if self.work is None:  # here, so that what is wrong comes back as the task's own error
            self.work = make()
        return self.work(task)


class RayPool:
    """Workers of `arinar.runtime.sampling.sample`: a context manager that joins a cluster, or starts one on this machine.

    workers : how many; those that find no room wait until there is some. cpus, gpus : of each. address : of a running
    cluster (host:port, ray://host:10001, auto); None: this machine alone. on_loss : is told of every worker that is replaced.

    Raises ValueError where Ray is missing, the address does not answer, or the cluster has no room for a single worker.
    """

    def __init__(
        self,
        workers: int,
        address: str | None = None,
        *,
        cpus: float = 1,
        gpus: float | None = None,
        on_loss: Callable[[str], object] = lambda reason: None,
    ) -> None:
        self.workers, self.address, self.cpus, self.gpus, self.on_loss = workers, address, cpus, gpus, on_loss

    def __enter__(self) -> RayPool:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report home
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError:
            raise ValueError(
                f"workers need the package ray: {install_hint('ray')} installs it; --workers 0 needs none"
            ) from None
        self.ray, self._kind = ray, ray.remote(_Worker)
        if self.address is not None:
            _check_answers(self.address)
        local = {} if self.address else {"num_cpus": max(1, round(self.workers * self.cpus)), "include_dashboard": False}
        try:
            ray.init(address=self.address or "local", logging_level=logging.ERROR, log_to_driver=False, **local)
        except Exception as error:  # Ray's own types, and gRPC's
            raise ValueError(_no_answer(self.address or "this machine", error)) from None
        try:
            self._check_room()
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ray.shutdown()

    def _check_room(self) -> None:
        """Decide how many GPUs a worker takes: one, where there are any."""
        there = self.ray.cluster_resources()
        if self.gpus is None:
            self.gpus = 1.0 if there.get("GPU") else 0.0
        for name, wanted in (("CPU", self.cpus), ("GPU", self.gpus)):
            if there.get(name, 0) < wanted:
                raise ValueError(f"a worker needs {wanted:g} {name}s, and the cluster has {there.get(name, 0):g}")

    def __call__(self, make: Callable[[], Callable[[Task], Result]], tasks: Sequence[Task]) -> Iterator[Result]:
        """Results as they come. What a task itself raises as ValueError or OSError ends it; other errors, and the end of a
        worker, when they have come TRIES times for one task."""
        work = _Work(self, self.ray.put(make), tasks)
        try:
            while work.waiting or work.busy:
                yield from work.step()
        finally:
            work.close()

    def start(self) -> Any:
        """A new worker, as soon as there is room."""
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus or 0, "max_restarts": 0}
        return self._kind.options(**options).remote()


def _check_answers(address: str) -> None:
    """Raise ValueError where nobody listens: Ray itself would wait without end."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"address is {shown(address)}; expected auto, host:port or ray://host:10001")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise ValueError(_no_answer(address, error)) from None


def _no_answer(address: str, error: Exception) -> str:
    return (
        f"no Ray cluster answers at {address} ({one_line(error)[:200]}); `ray start --head` starts one, without --address this "
        f"machine is used"
    )


class _Work:
    """Who does what of one list of tasks."""

    def __init__(self, pool: RayPool, make: Any, tasks: Sequence[Any]) -> None:
        self.pool, self.make = pool, make
        self.waiting, self.tries = deque(enumerate(tasks)), Counter[Any]()  # tasks by their numbers
        self.starting: dict[Any, Any] = {}  # promise that a worker is ready -> the worker
        self.busy: dict[Any, tuple[Any, tuple[int, Any]]] = {}  # promise of a result -> the worker, its task
        for _ in range(min(pool.workers, len(tasks))):
            self._start()

    def _start(self) -> None:
        worker = self.pool.start()
        self.starting[worker.ready.remote()] = worker

    def _give(self, worker: Any) -> None:
        """A task to a worker that is idle, or its leave."""
        if self.waiting:
            task = self.waiting.popleft()
            self.busy[worker.do.remote(self.make, task[1])] = worker, task
        else:
            self.pool.ray.kill(worker)

    def step(self) -> Iterator[Any]:
        """Wait for whatever happens next -> the result, if it is one."""
        (promise,), _ = self.pool.ray.wait([*self.starting, *self.busy], num_returns=1)
        if promise in self.starting:
            self._started(promise)
            return
        worker, task = self.busy.pop(promise)
        try:
            result = self.pool.ray.get(promise)
        except Exception as error:
            self._lost(worker, task, error)
            return
        self._give(worker)
        yield result

    def _started(self, promise: Any) -> None:
        worker = self.starting.pop(promise)
        try:
            version = self.pool.ray.get(promise)
        except Exception as error:
            self._count(None, error)
            self._start()
            return
        if version != __version__:
            raise ValueError(f"a worker has arinar {version}, this machine {__version__}; install the same on all")
        self._give(worker)

    def _lost(self, worker: Any, task: tuple[int, Any], error: Exception) -> None:
        """A task has failed: what it raised, if more tries would raise it too; else it waits again, for a new worker."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, (ValueError, OSError)):
            raise cause from None
        self._count(task[0], cause or error)
        self.pool.on_loss(one_line(cause or error)[:300])
        self.waiting.insert(self.pool.workers, task)  # not first: a broken machine's next worker would have it again
        with contextlib.suppress(Exception):
            self.pool.ray.kill(worker)
        self._start()

    def _count(self, number: int | None, error: BaseException) -> None:
        """Of a task, or of a worker's start."""
        self.tries[number] += 1
        if self.tries[number] >= TRIES:
            if isinstance(error, self.pool.ray.exceptions.RayError):
                raise RuntimeError(f"a worker ended {TRIES} times over the same work: {one_line(error)[:300]}") from None
            raise error from None

    def close(self) -> None:
        for worker in (*self.starting.values(), *(worker for worker, _ in self.busy.values())):
            with contextlib.suppress(Exception):
                self.pool.ray.kill(worker)
