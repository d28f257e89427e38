"""What every request passes before a route sees it, and every answer on its way out: who asks, how much and how slowly, under
which id, and a line in the log."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from .errors import ApiError, as_answer
from .keys import Keys
from .logs import log
from .metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

#: What needs no key: the page (which asks for one), and what a supervisor asks.
OPEN_ROUTES = ("/", "/healthz", "/readyz", "/openapi.json")
#: Routes by which answers are counted; others are one.
ROUTES = (*OPEN_ROUTES, "/v1/models", "/v1/images/generations", "/v1/images/edits", "/metrics")
#: Ids of requests that are taken over from a proxy.
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Limits:
    """body : bytes of a JSON body. upload : of one with pictures. seconds : for a body to arrive, and for a client to take a
    piece of an answer."""

    body: int = 1 << 18
    upload: int = 1 << 24
    seconds: float = 30.0

    def of(self, path: str) -> int:
        return self.upload if path == "/v1/images/edits" else self.body


class Door:
    """ASGI middleware around the application.

    keys : None lets everyone in. hosts : the names by which this server may be asked, None for any: a page of a stranger whose
    name was made to point here comes with the stranger's name.
    """

    def __init__(
        self, app: Asgi, metrics: Metrics, limits: Limits, keys: Keys | None = None, hosts: Collection[str] | None = None
    ) -> None:
        self.app, self.metrics, self.limits, self.keys, self.hosts = app, metrics, limits, keys, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = Visit(scope, receive, send, self.limits)
        try:
            try:
                self._check(visit)
                await self.app(scope, visit.receive, visit.send)
            except ApiError as error:
                await visit.answer(error)
            except TimeoutError:
                log("a client took nothing of its answer in time", logging.WARNING, id=visit.id)
                raise
            except Exception as error:
                log("the server failed", logging.ERROR, error=error, id=visit.id)
                await visit.answer(as_answer(error))
        finally:
            self._note(visit)

    def _check(self, visit: Visit) -> None:
        """Who asks? Raises ApiError."""
        host = _address(f"//{visit.header('host') or ''}")
        if self.hosts is not None and host.hostname not in self.hosts:
            raise ApiError(
                403, f"this server is not to be asked as {host.hostname!r}; ask as {sorted(self.hosts)[-1]}", code="wrong_host"
            )
        origin = visit.header("origin")
        if origin is not None and _address(origin).netloc != host.netloc:
            raise ApiError(403, "another site's page may not use this server", code="wrong_origin")
        if self.keys is not None and visit.path not in OPEN_ROUTES and not self.keys.fits(visit.header("authorization")):
            wrong = "authorization" in visit.headers
            raise ApiError(
                401,
                "the API key is wrong" if wrong else "an API key is needed: send Authorization: Bearer KEY",
                code="invalid_api_key" if wrong else "missing_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        declared = visit.header("content-length") or "0"
        if not declared.isdigit() or len(declared) > 18 or int(declared) > visit.most:
            raise visit.too_large()

    def _note(self, visit: Visit) -> None:
        route = visit.path if visit.path in ROUTES else "other"
        seconds = time.monotonic() - visit.began
        self.metrics.requests.labels(route, str(visit.status)).inc()
        self.metrics.latency.labels(route).observe(seconds)
        if visit.error is not None:
            self.metrics.errors.labels(visit.error).inc()
        if route not in ("/healthz", "/readyz", "/metrics") or visit.status >= 500:
            facts = {"method": visit.method, "path": visit.path[:200], "status": visit.status, "seconds": round(seconds, 4)}
            log("request", id=visit.id, **facts, client=visit.client, code=visit.error, **visit.notes)


def _address(text: str) -> SplitResult:
    try:
        return urlsplit(text)
    except ValueError:  # brackets that do not close
        raise ApiError(400, "the Host or Origin header is no address", code="invalid_header") from None


class Visit:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits) -> None:
        self._receive, self._send, self._limits = receive, send, limits
        self.method, self.path = scope["method"], scope["path"]
        self.client = (scope.get("client") or (None,))[0]
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = self.header("x-request-id") or ""
        self.id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        self.began, self.most = time.monotonic(), limits.of(self.path)
        self.received, self.whole, self.status, self.error = 0, False, 0, None
        self.notes: dict[str, Any] = {}
        scope.setdefault("state", {})["visit"] = self

    error: str | None

    def header(self, name: str) -> str | None:
        return self.headers.get(name)

    def too_large(self) -> ApiError:
        message = f"the body is too large; at most {self.most:,} bytes are read here"
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})

    async def receive(self) -> Message:
        """The next piece of the body, counted and timed; once it is whole, news of the client for however long it takes."""
        if self.whole:
            return await self._receive()
        left = self.began + self._limits.seconds - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.001, left))
        except TimeoutError:
            text = f"the body did not arrive within {self._limits.seconds:g} s"
            raise ApiError(408, text, code="slow_body", headers={"Connection": "close"}) from None
        self.received += len(message.get("body", b""))
        self.whole = message["type"] != "http.request" or not message.get("more_body", False)
        if self.received > self.most:
            raise self.too_large()
        return message

    async def send(self, message: Message) -> None:
        """A piece of the answer. Raises TimeoutError where the client takes none."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = {"x-request-id": self.id, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
            given = {name.lower() for name, _ in message.get("headers", [])}
            message["headers"] = [*message.get("headers", []), *((k.encode(), v.encode()) for k, v in own.items())]
            if b"cache-control" not in given:
                message["headers"].append((b"cache-control", b"no-store"))
        await asyncio.wait_for(self._send(message), self._limits.seconds)

    async def answer(self, error: ApiError) -> None:
        """An error as the answer, where none has begun."""
        self.error = error.code
        if self.status:
            return
        body = json.dumps(error.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
        if error.status < 500 and not self.whole and self.method == "POST":
            headers["Connection"] = "close"  # what is left of the body is not read
        start = {"type": "http.response.start", "status": error.status}
        await self.send(start | {"headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()]})
        await self.send({"type": "http.response.body", "body": body})
