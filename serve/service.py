"""A served model: its pipeline behind a scheduler, and what the routes ask of them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from arinar.runtime import Pipeline
from arinar.runtime.images import png_bytes
from arinar.runtime.request import Sampling

from .api import ImageDatum
from .errors import ApiError, invalid, retry_after
from .logs import log
from .metrics import Metrics
from .places import Trial
from .scheduler import BatchReport, Ended, Event, Job, Scheduler, Stopping

Result = TypeVar("Result")
#: While nothing happens, a stream says so this often: what lies between server and client may close silent connections.
SIGN_OF_LIFE = 15.0


@dataclass(frozen=True)
class Options:
    """How a model is served.

    name : the model's, for clients; default the bundle's folder's. max_batch : places of a micro-batch, a power of two.
    max_wait_ms : how long an image waits for company. queue : images that may wait. timeout : seconds for a request.
    trial : try first whether a picture's bits depend on its place, and take smaller micro-batches where they do.
    """

    name: str | None = None
    max_batch: int = 8
    max_wait_ms: float = 10.0
    queue: int = 256
    timeout: float = 300.0
    trial: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.max_batch <= 4096 or self.max_batch & (self.max_batch - 1):
            raise ValueError(
                f"max_batch is {self.max_batch}; expected 1, 2, 4, 8, ... (up to 4096): at other sizes a picture's last bits "
                f"may depend on its place in a micro-batch"
            )
        for name, value, least in (
            ("max_wait_ms", self.max_wait_ms, 0),
            ("queue", self.queue, 1),
            ("timeout", self.timeout, 0),
        ):
            if not least <= value < 1e9:
                raise ValueError(f"{name} is {value}; expected a number from {least} on")


class Service:
    """A model that is being served. It takes requests once :meth:`start` has come to its end."""

    def __init__(self, pipeline: Pipeline, options: Options | None = None) -> None:
        self.pipeline, self.options = pipeline, options or Options()
        self.name = self.options.name or pipeline.bundle.folder.resolve().name
        self.classes = pipeline.classes
        self.created = int(time.time())
        self._scheduler: Scheduler | None = None
        self.metrics = Metrics(
            lambda: self._scheduler.depth if self._scheduler else 0, lambda: self._scheduler.running if self._scheduler else 0
        )
        self._closed, self._lock = False, threading.Lock()
        self.failed = False  # to become ready

    # Its life.

    def start(self) -> None:
        """Warm up, and find the sizes of the micro-batches. Takes seconds, of a large model a minute. Raises Stopping where
        it is closed meanwhile."""
        options = self.options
        sizes = Trial(self.pipeline, self._go_on).sizes(options.max_batch) if options.trial else [options.max_batch]
        if sizes[-1] != options.max_batch:
            log(
                "smaller micro-batches: at the size that was asked for a picture's last bits depend on what is beside it",
                logging.WARNING,
                asked=options.max_batch,
                taken=sizes[-1],
            )
        with self._lock:
            self._go_on()
            self._scheduler = Scheduler(
                self.pipeline,
                sizes=sizes,
                max_wait=options.max_wait_ms / 1000,
                queue=options.queue,
                timeout=options.timeout,
                observe=self._observe,
            )
        log("ready", model=self.name, micro_batches=sizes, tried=options.trial)

    def _go_on(self) -> None:
        if self._closed:
            raise Stopping("the server is shutting down")

    def _observe(self, report: BatchReport) -> None:
        self.metrics.batch(report)
        if report.error is not None:
            log("a micro-batch failed", logging.ERROR, rows=report.rows, reason=str(report.error))

    def close(self, timeout: float | None = None) -> None:
        """Finish what was begun, refuse the rest."""
        with self._lock:
            self._closed = True
        if self._scheduler is not None:
            self._scheduler.close(timeout)

    @property
    def ready(self) -> bool:
        return self._scheduler is not None and self._scheduler.alive

    @property
    def broken(self) -> bool:
        """Whether it could not be made ready, or its worker has died."""
        return self.failed or (self._scheduler is not None and self._scheduler.broken)

    @property
    def scheduler(self) -> Scheduler:
        """Raises ApiError (503) before the service is ready."""
        if self._scheduler is None:
            raise ApiError(
                503, "the model is being made ready; ask again in a moment", code="not_ready", headers=retry_after(2)
            )
        return self._scheduler

    # What it tells of itself.

    def card(self) -> dict[str, Any]:
        """The model as `/v1/models` has it."""
        config, defaults = self.pipeline.config, self.pipeline.bundle.manifest.defaults
        scheduler = self._scheduler
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "arinar",
            "size": f"{config.img_size}x{config.img_size}",
            "num_classes": config.num_classes,
            "class_names": list(self.classes.names) or None,
            "outer": config.outer,
            "tokens": config.seq_len,
            "grid": config.grid_size,
            "defaults": {
                "guidance_scale": defaults.guidance_scale,
                "cfg_schedule": defaults.cfg_schedule,
                "temperature": defaults.temperature,
                "num_iter": config.seq_len if config.outer == "causal" else defaults.num_iter,
            },
            "batch_size": scheduler.max_batch if scheduler else None,
            "backend": self.pipeline.backend.name,
            "precision": self.pipeline.precision,
            "bundle": self.pipeline.made_by["bundle"],
        }

    # Requests.

    def submit(self, sampling: Sampling, previews: Collection[int] = ()) -> Submitted:
        """A request joins the queue. To be called in the event loop. Raises ApiError, QueueFull or Stopping."""
        if len(sampling) > self.options.queue:
            raise invalid(
                f"{len(sampling)} images are more than this server takes at a time; at most {self.options.queue}", "n"
            )
        submitted = Submitted()
        submitted.job = self.scheduler.submit(sampling, submitted.tell, previews=previews)
        return submitted

    async def run(self, function: Callable[[], Result]) -> Result:
        """What a function returns that the scheduler's worker is to call. Raises what it raises, and as :meth:`submit`."""
        return await asyncio.wrap_future(self.scheduler.run(function))

    async def datum(self, sampling: Sampling, row: int, image: Image.Image, **more: Any) -> ImageDatum:
        """An image of a request, as its answer has it. ``more``: for the PNG to tell."""
        label, index = int(sampling.labels[row]), int(sampling.indices[row])
        about = {"label": label, "seed": sampling.seed, "index": index, "batch_size": self.scheduler.max_batch}
        data = await asyncio.to_thread(png_bytes, image, sampling.settings(row) | about | self.pipeline.made_by | more)
        return ImageDatum(
            b64_json=base64.b64encode(data).decode(),
            seed=sampling.seed,
            index=index,
            label=label,
            class_name=self.classes.name(label),
        )


class Submitted:
    """A request's events, from the scheduler's thread into the event loop's."""

    job: Job

    def __init__(self) -> None:
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def tell(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody is there to be told
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self, gone: Callable[[], Awaitable[None]]) -> AsyncGenerator[Event | None, None]:
        """The events to the last; None now and then while there are none. The request is cancelled when ``gone`` returns
        (then ApiError 499 is raised), or when who iterates stops."""
        watch: asyncio.Future[None] = asyncio.ensure_future(gone())
        coming: asyncio.Future[Event] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(self._events.get())
                either: list[asyncio.Future[Any]] = [coming, watch]
                await asyncio.wait(either, timeout=SIGN_OF_LIFE, return_when=asyncio.FIRST_COMPLETED)
                if watch.done():
                    raise ApiError(499, "the client has gone", code="client_gone")
                if not coming.done():
                    yield None
                    continue
                event, coming = coming.result(), None
                yield event
                if isinstance(event, Ended):
                    return
        finally:
            watch.cancel()
            if coming is not None:
                coming.cancel()
            self.job.cancel()
