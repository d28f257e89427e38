"""A server for tests: the real one, on a free port, in a thread of this process."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arinar.runtime import Pipeline
from arinar.serve.app import create_app
from arinar.serve.server import Server, listen
from arinar.serve.service import Options, Service

JSON = {"Content-Type": "application/json"}


class Gate:
    """Holds a pipeline's every step until it is let through."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.stream, self.calls, self.closed = pipeline.stream, list[dict[str, Any]](), 0
        self.begun, self.open = threading.Semaphore(0), threading.Semaphore(0)
        self.ended = threading.Semaphore(0)
        self.error: Exception | None = None
        pipeline.stream = self._stream  # type: ignore[method-assign]

    def _stream(self, *labels: Any, **arguments: Any) -> Iterator[Any]:
        self.calls.append(arguments)
        self.begun.release()
        try:
            for progress in self.stream(*labels, **arguments):
                assert self.open.acquire(timeout=60)
                if self.error is not None:
                    raise self.error
                yield progress
        finally:
            self.closed += 1
            self.ended.release()

    def wait(self) -> None:
        """Until a micro-batch has begun."""
        assert self.begun.acquire(timeout=60)

    def let(self, steps: int = 10_000) -> None:
        self.open.release(steps)


class Served:
    """A running server. Its answers come as (status, headers, data): JSON as what it says, other bodies as bytes."""

    def __init__(self, service: Service, port: int, server: Server) -> None:
        self.service, self.port, self.server, self.url = service, port, server, f"http://127.0.0.1:{port}"

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, data, (JSON if isinstance(body, dict) else {}) | (headers or {}))
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        found = json.loads(text) if answer.headers.get_content_type() == "application/json" else text
        return answer.status, answer.headers, found

    def generate(self, headers: dict[str, str] | None = None, **body: Any) -> tuple[int, Any, Any]:
        return self.ask("POST", "/v1/images/generations", body, headers)

    def events(self, **body: Any) -> list[dict[str, Any]]:
        """A stream's events, without the last, which says that it is over."""
        status, headers, text = self.generate(stream=True, **body)
        assert status == 200 and headers.get_content_type() == "text/event-stream", text
        lines = [line.removeprefix("data: ") for line in text.decode().splitlines() if line.startswith("data: ")]
        if lines[-1] == "[DONE]":
            lines.pop()
        return [json.loads(line) for line in lines]


def pixels(datum: dict[str, Any]) -> Any:
    with Image.open(io.BytesIO(base64.b64decode(datum["b64_json"]))) as image:
        return np.asarray(image)


@contextmanager
def serving(bundle: Path | Pipeline, *, start: bool = True, options: Any = None, **rest: Any) -> Iterator[Served]:
    """A server of a bundle. ``options``: of the service, as a dict; ``start``: make it ready. ``rest``: of the application."""
    pipeline = bundle if isinstance(bundle, Pipeline) else Pipeline.load(bundle, threads=1)
    chosen = {"max_batch": 4, "max_wait_ms": 2, "trial": False, "name": "digits"} | (options or {})
    service = Service(pipeline, Options(**chosen))
    if start:
        service.start()
    service.start = lambda: None  # type: ignore[method-assign]
    with listen("127.0.0.1", 0) as listening:
        server = Server(create_app(service, **rest), service)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
        thread.start()
        try:
            yield Served(service, listening.getsockname()[1], server)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
