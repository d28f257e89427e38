"""The parity protocol on this GPU, and memory that stays level."""

from __future__ import annotations

import resource
from typing import Any

from arinar.measure.parity import run_parity

from .models import models
from .race import used_memory
from .session import Session

#: Of what a process may grow over so many images after the first ones.
IMAGES, MOST_GROWTH = 200, 64 * 2**20


def parity(session: Session, name: str, *, num_iter: int, images: int) -> None:
    """`arinar parity`, levels 1 to 3, of every backend."""
    report = session.report
    for backend in session.possible(name):
        with report.check(f"parity: {name} on {backend}", "levels 1 and 2 name the graph, the step and the output"):
            pipeline = session.open(name, backend)
            model, vae = models(name)
            labels = [i % model.config.num_classes for i in range(images)]
            result = run_parity(pipeline, model, vae, labels=labels, num_iter=num_iter)
            kept = ("precision", "backend", "settings", "passed", "checks")
            report.add("parity", {key: value for key, value in result.to_dict().items() if key in kept} | {"model": name})
            if not result.passed:
                report.find("wrong", f"parity: {name} on {backend}", result.table(), "the first failing check is the cause")


def memory(session: Session) -> None:
    """Host and device memory over many images of the small model."""
    report, name = session.report, session.demo
    for backend in session.possible(name):
        with report.check(f"memory: {IMAGES} images of {name} on {backend}", "buffers that a library holds until its end"):
            pipeline = session.open(name, backend)
            found: list[dict[str, Any]] = []
            for done in range(0, IMAGES, 20):
                pipeline.generate([0] * 20, seed=done, num_iter=2, batch_size=20)
                found.append({"images": done + 20, "host": resident(), "device": used_memory()})
            report.add("memory", {"model": name, "backend": backend, "growth": found})
            for kind in ("host", "device"):
                grown = found[-1][kind] - found[2][kind]
                if grown > MOST_GROWTH:
                    told = f"{kind} memory grew by {grown / 2**20:.0f} MiB from image 60 to {IMAGES}"
                    report.find("wrong", f"memory: {name} on {backend}", told, "release deferred buffers: wait now and then")


def resident() -> int:
    """Bytes of this process in memory (at most so far)."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
