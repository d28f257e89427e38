"""The application: routes over a service, for any ASGI server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from arinar import __version__

from .answers import answer
from .api import EditRequest, GenerationRequest, ImagesAnswer, parse_body, parse_form
from .door import Door, Limits, Visit
from .edits import Edit
from .errors import ApiError, as_answer, invalid
from .keys import Keys
from .logs import log
from .scheduler import QueueFull, Stopping
from .service import Service

PAGE = Path(__file__).with_name("page.html")


def create_app(
    service: Service,
    *,
    keys: Keys | None = None,
    limits: Limits | None = None,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The application. It makes the service ready in the background when it starts, and closes it when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.ensure_future(asyncio.to_thread(start, service))
        yield
        await asyncio.to_thread(service.close, service.options.timeout)
        await starting

    app = FastAPI(title="arinar", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Door, metrics=service.metrics, limits=limits or Limits(), keys=keys, hosts=hosts)
    for kind in (ApiError, HTTPException, QueueFull, Stopping):
        app.add_exception_handler(kind, answer_error)
    add_routes(app, service)
    return app


def start(service: Service) -> None:
    """Make it ready, unless it is; where that fails, the log and /healthz say so."""
    if service.ready:
        return
    try:
        service.start()
    except Stopping:
        pass
    except Exception as error:
        log("the model could not be made ready", logging.CRITICAL, error=error)
        service.failed = True


async def answer_error(request: Request, error: Exception) -> Response:
    """An error as an answer, from wherever it was raised."""
    if isinstance(error, HTTPException):  # the framework's own
        told = {404: "there is no such route", 405: f"this route does not take {request.method}"}
        codes = {404: "not_found", 405: "method_not_allowed"}
        found = ApiError(
            error.status_code,
            told.get(error.status_code, str(error.detail)),
            code=codes.get(error.status_code, "invalid_request"),
            headers=error.headers,
        )
    else:
        found = as_answer(error)
    visit: Visit = request.state.visit
    visit.error = found.code
    headers = dict(found.headers)
    if not visit.whole and request.method == "POST":
        headers["Connection"] = "close"  # what is left of the body is not read
    return JSONResponse(found.body(), found.status, headers)


def add_routes(app: FastAPI, service: Service) -> None:
    page, policy = PAGE.read_bytes(), content_policy(PAGE.read_text(encoding="utf-8"))

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})

    @app.get("/healthz")
    async def healthz() -> Response:
        """200 while there is hope; 503 where only a restart helps."""
        return PlainTextResponse("broken\n" if service.broken else "ok\n", 503 if service.broken else 200)

    @app.get("/readyz")
    async def readyz() -> Response:
        """It takes requests: 200, else 503."""
        return PlainTextResponse("ready\n" if service.ready else "not ready\n", 200 if service.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters, in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served: its size, classes and defaults."""
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        check_model(service, name)
        return service.card()

    body = {"application/json": {"schema": GenerationRequest.model_json_schema()}}

    @app.post(
        "/v1/images/generations",
        response_model=ImagesAnswer,
        openapi_extra={"requestBody": {"content": body, "required": True}},
    )
    async def generations(request: Request) -> Response:
        """Generate images of a class."""
        asked = parse_body(GenerationRequest, await request.body(), request.headers.get("content-type"))
        check_model(service, asked.model)
        sampling = asked.sampling(service.pipeline, service.classes)
        return await answer(service, request, asked, sampling, "image_generation")

    form = {"multipart/form-data": {"schema": EditRequest.model_json_schema()}}

    @app.post(
        "/v1/images/edits", response_model=ImagesAnswer, openapi_extra={"requestBody": {"content": form, "required": True}}
    )
    async def edits(request: Request) -> Response:
        """Generate a part of a picture anew: where the mask is transparent."""
        async with request.form(max_files=4, max_fields=200, max_part_size=1 << 14) as parts:
            fields, files = await split(list(parts.multi_items()))
        asked = parse_form(EditRequest, fields)
        check_model(service, asked.model)
        edit = await Edit.prepare(service, asked, files)
        return await answer(service, request, asked, edit.sampling, "image_edit", edit)


def check_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.name:
        message = f"there is no model {name[:60]!r} here; this is {service.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


async def split(items: list[tuple[str, str | UploadFile]]) -> tuple[list[tuple[str, str]], dict[str, bytes]]:
    """A form's fields and files. Raises ApiError for a file that comes twice."""
    fields: list[tuple[str, str]] = []
    files: dict[str, bytes] = {}
    for name, value in items:
        plain = name.removesuffix("[]")
        if isinstance(value, str):
            fields.append((plain, value))
        elif plain in files:
            raise invalid(f"{plain} is given twice; one picture is edited at a time", plain)
        else:
            files[plain] = await value.read()
    return fields, files


def content_policy(page: str) -> str:
    """The page's Content-Security-Policy: its own script and style, by their hashes, pictures, this server; nothing else."""

    def hashes(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src data: blob:; "
        f"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
