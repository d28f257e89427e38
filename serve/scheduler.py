"""Requests that share micro-batches: one worker thread owns the pipeline, whoever asks waits for events.

A request's images are rows. Rows that may share a micro-batch (`_Row.kind`) join in the order of their arrival, and the oldest
row's micro-batch always comes next, so nobody starves. Micro-batches have fixed sizes, short ones are filled up: a picture is
then the same to the last bit whatever is generated beside it (where its place does not matter either: `places`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from PIL import Image

from arinar.runtime import Known, Noise, Pipeline, Progress
from arinar.runtime.request import Sampling

Result = TypeVar("Result")
#: Settings that each row of a micro-batch may have of its own.
OWN = ("guidance_scale", "temperature")


class QueueFull(Exception):
    """More rows wait than may. ``seconds``: about when there will be room."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class Stopping(Exception):
    """The scheduler takes nothing more, or a request was not begun before it stopped."""


class TookTooLong(Exception):
    """A request was not finished within the time that requests have."""


@dataclass(frozen=True)
class Stepped:
    """A step of the micro-batch that holds images ``rows`` of the request; ``previews`` of those, where asked for."""

    step: int
    num_iter: int
    rows: tuple[int, ...]
    previews: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Made:
    """Image ``row`` of the request is finished."""

    row: int
    image: Image.Image


@dataclass(frozen=True)
class Ended:
    """The last event: all images are made, or ``error`` says why not."""

    error: Exception | None = None


Event = Stepped | Made | Ended
#: Called by the worker with each event of a request, or by whoever cancels; must neither raise nor wait.
Listener = Callable[[Event], None]


@dataclass(frozen=True)
class BatchReport:
    """A micro-batch that is over: ``rows`` of ``size`` places were asked for, ``waited`` seconds by row, ``seconds`` by phase.
    ``error`` where it failed; ``cancelled`` where nobody was left to make it for."""

    rows: int
    size: int
    waited: tuple[float, ...]
    seconds: dict[str, float]
    error: Exception | None = None
    cancelled: bool = False


class Job:
    """A request in the scheduler's hands."""

    def __init__(self, scheduler: Scheduler, sampling: Sampling, listener: Listener, previews: Collection[int]) -> None:
        self.sampling, self.previews = sampling, frozenset(previews)
        self.deadline = time.monotonic() + scheduler.timeout
        self.left, self.begun, self.ended = len(sampling), False, False
        self.alone = False  # shares no micro-batch: one that it was part of failed
        self._scheduler, self._listener = scheduler, listener

    def cancel(self) -> None:
        """Nobody waits for it any more: its waiting rows are dropped now, a running micro-batch of which nothing else is
        wanted ends within a step. It gets no further event."""
        self._scheduler._cancel(self)

    def tell(self, event: Event) -> None:
        if not self.ended:
            self.ended = isinstance(event, Ended)
            self._listener(event)


@dataclass(frozen=True, eq=False)
class _Row:
    job: Job
    place: int
    arrived: float

    @property
    def shared(self) -> dict[str, Any]:
        """Settings that all rows of a micro-batch have in common."""
        settings = self.job.sampling.settings(self.place)
        return {name: value for name, value in settings.items() if name not in OWN}

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for rows that may share a micro-batch."""
        sampling, job = self.job.sampling, self.job
        guided, unknown = bool(sampling.guidance_scale[self.place] != 1.0), int(sampling.unknown[self.place])
        return tuple(self.shared.items()), guided, unknown, id(job) if job.alone else None


class Scheduler:
    """Micro-batches of requests in front of one pipeline, which nobody else may use meanwhile.

    sizes : places that a micro-batch may have, in ascending order; it takes the first that holds its rows. max_wait : seconds
    that the oldest row waits for company. queue : rows that may wait. timeout : seconds from a request's arrival to its last
    image. observe : called by the worker after each micro-batch.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        sizes: Sequence[int] = (8,),
        max_wait: float = 0.01,
        queue: int = 256,
        timeout: float = 300.0,
        observe: Callable[[BatchReport], None] | None = None,
    ) -> None:
        self.pipeline, self.sizes, self.max_batch = pipeline, tuple(sizes), sizes[-1]
        self.max_wait, self.queue, self.timeout = max_wait, queue, timeout
        self._observe = observe
        self._waiting: deque[_Row] = deque()
        self._tasks: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._running: list[_Row] = []
        self._stopping, self._pace = False, 0.0  # seconds of a micro-batch, the last few weighing most
        self._changed = threading.Condition(threading.RLock())
        self.broken = False  # the worker died
        self._worker = threading.Thread(target=self._work, name="arinar-scheduler", daemon=True)
        self._worker.start()

    # What others may ask.

    @property
    def depth(self) -> int:
        """Rows that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows of the micro-batch that is being made."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._worker.is_alive() and not self._stopping

    def submit(self, sampling: Sampling, listener: Listener, *, previews: Collection[int] = ()) -> Job:
        """A request joins the queue; ``listener`` gets its events. ``previews``: the steps (1..num_iter) at which it wants to
        see its images, each at the price of a run of the VAE.

        Raises QueueFull, or Stopping.
        """
        job, now = Job(self, sampling, listener, previews), time.monotonic()
        with self._changed:
            if not self.alive:
                raise Stopping("the server is shutting down")
            if (waiting := len(self._waiting)) + len(sampling) > self.queue:
                raise QueueFull(
                    f"{waiting} images are waiting and {len(sampling)} more were asked for; at most {self.queue} may wait",
                    (1 + waiting // self.max_batch) * self._pace,
                )
            self._waiting.extend(_Row(job, place, now) for place in range(len(sampling)))
            self._changed.notify_all()
        return job

    def run(self, function: Callable[[], Result]) -> Future[Result]:
        """Have the worker call a function that uses the pipeline, between two steps -> what it will return.

        Raises QueueFull where as many such calls wait as rows may, or Stopping.
        """
        future: Future[Result] = Future()
        with self._changed:
            if not self.alive:
                raise Stopping("the server is shutting down")
            if len(self._tasks) >= self.queue:
                raise QueueFull(f"{len(self._tasks)} pictures wait to be read; at most {self.queue} may", self._pace)
            self._tasks.append((future, function))
            self._changed.notify_all()
        return future

    def close(self, timeout: float | None = None) -> None:
        """Take nothing more, finish the requests that were begun, tell the others (Stopping), and end the worker.

        After ``timeout`` seconds (None: however long it takes) those that are not finished are told too.
        """
        with self._changed:
            self._stopping = True
            for job in {row.job: None for row in self._waiting if not row.job.begun}:
                self._end(job, Stopping("the server is shutting down; this request was not begun"))
            self._changed.notify_all()
        self._worker.join(timeout)
        if self._worker.is_alive():
            with self._changed:
                for job in {row.job: None for row in (*self._waiting, *self._running)}:
                    self._end(job, Stopping("the server is shutting down; this request was not finished in time"))
            self._worker.join()

    # The worker.

    def _work(self) -> None:
        try:
            while rows := self._take():
                self._generate(rows)
        except BaseException:  # an error of the scheduler's own
            self.broken = True
            raise
        finally:  # nobody is to wait for ever
            with self._changed:
                self._stopping = True
                for job in {row.job: None for row in (*self._waiting, *self._running)}:
                    self._end(job, Stopping("the server has stopped working"))
                while self._tasks:
                    self._tasks.popleft()[0].set_exception(Stopping("the server is shutting down"))

    def _take(self) -> list[_Row]:
        """The rows of the next micro-batch, once the oldest has waited long enough or there are enough; none at the end."""
        while True:
            self._run_tasks()
            with self._changed:
                now = time.monotonic()
                self._end_the_late(now)
                if self._tasks:
                    continue
                if not self._waiting:
                    if self._stopping:
                        return []
                    self._changed.wait()
                    continue
                oldest, kind = self._waiting[0], self._waiting[0].kind
                company = list(islice((row for row in self._waiting if row.kind == kind), self.max_batch))
                rest = min(oldest.arrived + self.max_wait, oldest.job.deadline) - now
                if len(company) == self.max_batch or rest <= 0 or self._stopping or oldest.job.alone:
                    chosen = set(map(id, company))
                    self._waiting = deque(row for row in self._waiting if id(row) not in chosen)
                    self._running = company
                    for row in company:
                        row.job.begun = True
                    return company
                self._changed.wait(rest)

    def _generate(self, rows: list[_Row]) -> None:
        """A micro-batch, from its first step to its images, or until nobody wants it."""
        began, error, seconds, wanted = time.monotonic(), None, dict[str, float](), True
        size = next(size for size in self.sizes if size >= len(rows))
        try:
            with closing(self.pipeline.stream(**joined(rows), batch_size=size)) as stream:
                for progress in stream:
                    if progress.result is not None:
                        seconds = progress.result.timings
                    self._tell(rows, progress)
                    self._run_tasks()
                    with self._changed:
                        self._end_the_late(time.monotonic())
                        wanted = any(not row.job.ended for row in rows)
                    if not wanted:
                        break
        except Exception as caught:
            error = caught
            self._failed(rows, caught)
        with self._changed:
            self._running = []
        took = time.monotonic() - began
        self._pace = took if not self._pace else 0.7 * self._pace + 0.3 * took
        if self._observe is not None:
            waited = tuple(began - row.arrived for row in rows)
            unwanted = not wanted and not seconds
            self._observe(BatchReport(len(rows), size, waited, seconds, error, unwanted))

    def _tell(self, rows: list[_Row], progress: Progress) -> None:
        """Tell every request in a micro-batch what was reached."""
        looking = progress.result is None and any(progress.step in row.job.previews and not row.job.ended for row in rows)
        previews = progress.preview() if looking else []
        images = progress.result.images if progress.result is not None else []
        with self._changed:
            for job in {row.job: None for row in rows}:
                own = [number for number, row in enumerate(rows) if row.job is job]
                shown = tuple(previews[number] for number in own) if progress.step in job.previews and looking else ()
                job.tell(Stepped(progress.step, progress.num_iter, tuple(rows[number].place for number in own), shown))
                for number in own if images else ():
                    job.tell(Made(rows[number].place, images[number]))
                    job.left -= 1
                if not job.left:
                    job.tell(Ended())

    def _failed(self, rows: list[_Row], error: Exception) -> None:
        """The request whose micro-batch failed is told; of several, each is tried again by itself, which finds the culprit."""
        with self._changed:
            jobs = [job for job in {row.job: None for row in rows} if not job.ended]
            if len(jobs) == 1:
                self._end(jobs[0], error)
                return
            for job in jobs:
                job.alone = True
            self._waiting.extendleft(row for row in reversed(rows) if not row.job.ended)

    def _run_tasks(self) -> None:
        while True:
            with self._changed:
                if not self._tasks:
                    return
                future, function = self._tasks.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

    # With the lock held.

    def _end_the_late(self, now: float) -> None:
        for job in {row.job: None for row in (*self._waiting, *self._running) if row.job.deadline <= now}:
            self._end(job, TookTooLong(f"the request was not finished within {self.timeout:g} s"))

    def _end(self, job: Job, error: Exception) -> None:
        self._waiting = deque(row for row in self._waiting if row.job is not job)
        job.tell(Ended(error))

    def _cancel(self, job: Job) -> None:
        with self._changed:
            job.ended = True
            self._waiting = deque(row for row in self._waiting if row.job is not job)
            self._changed.notify_all()


def joined(rows: Sequence[_Row]) -> dict[str, Any]:
    """Rows of several requests as the arguments of one `Pipeline.stream`."""
    batches = [row.job.sampling.batch([row.place]) for row in rows]
    known = [batch.known for batch in batches if batch.known is not None]  # of all rows, or of none
    own = {name: [float(getattr(batch, name)[0]) for batch in batches] for name in OWN}
    return {
        "labels": [int(batch.labels[0]) for batch in batches],
        "noise": Noise.joined([batch.noise for batch in batches]),
        "known": Known.joined(known) if known else None,
        **own,
        **rows[0].shared,
    }
