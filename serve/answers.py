"""The images of a request as an answer: one at its end, or a stream of events as they grow."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from arinar.runtime.request import Sampling

from .api import ImageDatum, ImageRequest, ImagesAnswer, Settings
from .door import Visit
from .edits import Edit
from .errors import ApiError, as_answer
from .logs import log
from .scheduler import Ended, Made, Stepped
from .service import Service, Submitted

#: What proxies are not to do with a stream: keep it, or wait until it is long.
STREAM_HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}


async def answer(
    service: Service, request: Request, asked: ImageRequest, sampling: Sampling, kind: str, edit: Edit | None = None
) -> Response:
    """Generate what was asked for. ``kind``: what OpenAI's events of such a stream begin with. Raises ApiError."""
    visit: Visit = request.state.visit
    visit.notes |= {"images": len(sampling), "seed": sampling.seed, "labels": sampling.labels.tolist(), "user": asked.user}
    steps = min(sampling.num_iter, int(sampling.unknown.max()))
    submitted = service.submit(sampling, asked.previews(steps) if asked.stream else ())
    work = Work(service, request, sampling, kind, edit)
    if asked.stream:
        return StreamingResponse(work.stream(submitted), media_type="text/event-stream", headers=STREAM_HEADERS)
    return JSONResponse(await work.whole(submitted))


class Work:
    """A request that is being answered."""

    def __init__(self, service: Service, request: Request, sampling: Sampling, kind: str, edit: Edit | None) -> None:
        self.service, self.request, self.sampling, self.kind, self.edit = service, request, sampling, kind, edit
        self.visit: Visit = request.state.visit

    async def whole(self, submitted: Submitted) -> dict[str, Any]:
        """The answer, when all images are made. Raises ApiError."""
        data: list[Any] = [None] * len(self.sampling)
        async with aclosing(submitted.events(self._gone)) as events:
            async for event in events:
                if isinstance(event, Made):
                    data[event.row] = await self._datum(event)
                elif isinstance(event, Ended) and event.error is not None:
                    raise self._told(event.error)
        return ImagesAnswer(**self._about(), data=data).model_dump()

    async def stream(self, submitted: Submitted) -> AsyncIterator[str]:
        """Server-sent events: `queued`, then each step's `progress` and, where asked for, its `partial_image`s, then a
        `completed` for each image, and `[DONE]`. An error on the way is the last event."""
        previews = 0
        async with aclosing(submitted.events(self._gone)) as events:
            try:
                yield self._event("queued", waiting=self.service.scheduler.depth)
                async for event in events:
                    if event is None:
                        yield ": waiting\n\n"
                    elif isinstance(event, Made):
                        yield self._picture("completed", await self._datum(event))
                    elif isinstance(event, Ended):
                        if event.error is not None:
                            raise self._told(event.error)
                        yield "data: [DONE]\n\n"
                    else:
                        indices = [int(self.sampling.indices[row]) for row in event.rows]
                        yield self._event("progress", step=event.step, num_iter=event.num_iter, indices=indices)
                        async for datum in self._previews(event):
                            yield self._picture("partial_image", datum, step=event.step, partial_image_index=previews)
                        previews += bool(event.previews)
            except ApiError as error:
                self.visit.error = error.code
                yield f"event: error\ndata: {json.dumps(error.body())}\n\n"

    async def _previews(self, event: Stepped) -> AsyncIterator[ImageDatum]:
        for row, image in zip(event.rows, event.previews, strict=False):  # of none, where nobody looked
            yield await self._datum(Made(row, image))

    async def _datum(self, event: Made) -> ImageDatum:
        if self.edit is None:
            return await self.service.datum(self.sampling, event.row, event.image)
        return await self.service.datum(self.sampling, event.row, self.edit.pasted(event.image), edit=self.edit.about)

    def _told(self, error: Exception) -> ApiError:
        """What the client is told of an error, and the log where that is less than all."""
        found = as_answer(error)
        if found.status == 500:
            log("a request failed", logging.ERROR, error=error, id=self.visit.id)
        return found

    async def _gone(self) -> None:
        """Returns when the client has gone."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def _about(self) -> dict[str, Any]:
        """What an answer says beside its images."""
        side, settings = self.service.pipeline.config.img_size, self.sampling.settings()
        return {
            "created": int(time.time()),
            "model": self.service.name,
            "size": f"{side}x{side}",
            "settings": Settings(**settings, batch_size=self.service.scheduler.max_batch),
        }

    def _picture(self, name: str, datum: ImageDatum, **facts: Any) -> str:
        """An event with an image, with what OpenAI's events of that name tell."""
        about = self._about()
        settings = about.pop("settings").model_dump()
        told = about | {"created_at": about.pop("created"), "output_format": "png", "settings": settings}
        return self._event(name, **told, **facts, **datum.model_dump())

    def _event(self, name: str, **facts: Any) -> str:
        kind = f"{self.kind}.{name}"
        return f"event: {kind}\ndata: {json.dumps({'type': kind} | facts)}\n\n"
