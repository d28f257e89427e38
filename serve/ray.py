"""The same application under Ray Serve, in several replicas:

    serve run arinar.serve.ray:app bundle=/models/bundle replicas=2 threads=4

Each replica has a pipeline and a scheduler of its own; Ray gives a request to one of them. Which one does not matter for the
pictures: they depend on the seed alone (where all replicas run on machines of a kind, with as many threads; on a CPU each has
one thread unless told otherwise). ``gpus``: of each replica.

Needs the extra ``ray``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from arinar.runtime import Pipeline
from arinar.text import shown

from . import logs
from .app import create_app
from .keys import Keys
from .service import Options, Service

#: Arguments of `serve run` by what they are for: the service, the pipeline, the number of replicas and their keys.
SERVICE = {"name": str, "max_batch": int, "max_wait_ms": float, "queue": int, "timeout": float}
PIPELINE = {"precision": str, "backend": str, "threads": int}
OTHER = {"bundle": str, "replicas": int, "gpus": float, "api_key_file": str}


@serve.deployment
@serve.ingress()
class Replica:
    """One pipeline behind one scheduler. It is healthy until its worker dies; Ray then starts another."""

    def __init__(self, bundle: str, keys: Keys | None, service: dict[str, Any], pipeline: dict[str, Any]) -> None:
        logs.set_up()
        self.service, self.keys = Service(Pipeline.load(bundle, **pipeline), Options(**service)), keys
        self.service.start()  # before Ray sends requests

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.service, keys=self.keys)

    def check_health(self) -> None:
        if self.service.broken:
            raise RuntimeError("the worker has died")


def app(arguments: dict[str, Any]) -> Application:
    """What `serve run` builds. Raises ValueError for an argument that is unknown or wrong."""
    known = SERVICE | PIPELINE | OTHER
    given = {}
    for name, value in arguments.items():
        if name not in known:
            raise ValueError(f"unknown argument {shown(name)}; there are {', '.join(known)}")
        try:
            given[name] = known[name](value)
        except (TypeError, ValueError):
            raise ValueError(f"{name} is {shown(value)}; expected {known[name].__name__}") from None
    if "bundle" not in given:
        raise ValueError("bundle is missing; give the path of one: bundle=PATH")
    service = {name: given[name] for name in SERVICE if name in given}
    pipeline = {name: given[name] for name in PIPELINE if name in given}
    if "backend" not in given:
        pipeline.setdefault("threads", 1)  # not all cores for each
    keys = Keys.read(Path(given["api_key_file"])) if "api_key_file" in given else None
    replica: Any = Replica  # what the decorators made of it
    deployment = replica.options(
        num_replicas=given.get("replicas", 1),
        ray_actor_options={"num_cpus": given.get("threads", 1), "num_gpus": given.get("gpus", 0)},
        # The scheduler's queue is where requests wait, and where it is told that there are too many.
        max_ongoing_requests=2 * Options(**service).queue,
    )
    bound: Application = deployment.bind(str(Path(given["bundle"]).resolve()), keys, service, pipeline)
    return bound
