"""Where the time of a launch goes: what the host takes to enqueue a phase of an outer step, and what the device takes to run
it. Enqueueing that takes longer is launch-bound: fewer kernels help, nothing else does."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from arinar.runtime import Pipeline

from .device import Stopwatch
from .session import Session

#: Runs that are told: the first loads kernels and takes memory, the third shows what is left.
TOLD = {"first": 0, "third": 2}
PHASES = ("outer", "head", "decode")


def check(session: Session) -> None:
    report, name = session.report, session.full
    for backend in session.possible(name):
        pipeline = session.open(name, backend)
        for batch in [size for size in session.sizes if size <= session.most]:
            with report.check(f"launching: {name} batch {batch} on {backend}", "the phase that the traceback names"):
                for phase, times in phase_times(session, pipeline, batch).items():
                    row = {"model": name, "backend": backend, "batch": batch, "phase": phase, **times}
                    report.add("launching", row)
                    third = times["third"]
                    bound = " (launch-bound)" if third["enqueue_ms"] > 0.9 * third["device_ms"] else ""
                    report.say(
                        f"{name} batch {batch} {backend}, {phase}: enqueued in {third['enqueue_ms']:.2f} ms, run in "
                        f"{third['device_ms']:.2f} ms{bound}"
                    )
        if backend == "onnxruntime-cuda":
            with report.check(f"launching: kernels by ONNX Runtime's profile of {name}", "compare with benchmarks.launches"):
                report.data["onnxruntime_profile"] = profile(session)
    with report.check(f"launching: PyTorch on {name}", ""):
        reference_times(session)


def phase_times(session: Session, pipeline: Pipeline, batch: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of each phase of an outer step in the middle of the plan, and of decoding, at its first and third run."""
    loop, clock = pipeline.loop, session.report.clock
    cuda = pipeline.backend.cuda  # type: ignore[attr-defined]
    sampling = pipeline.resolve(
        [i % pipeline.config.num_classes for i in range(batch)],
        guidance_scale=session.guidance_scale,
        num_iter=session.steps(pipeline.config),
        batch_size=batch,
    )
    made = sampling.batch()
    step = made.plan[len(made.plan) // 2]
    found: dict[str, dict[str, dict[str, float]]] = {phase: {} for phase in PHASES}
    with loop.state(made) as state:
        loop.fill(state, made, {})
        held: list[Any] = [None]

        def outer() -> None:
            held[0] = loop.outer.step(state, step)

        def head() -> None:
            loop.head.draw(state, step, held[0])

        def decode() -> None:
            loop._decode(state)

        for run in range(max(TOLD.values()) + 1):
            for phase, work in zip(PHASES, (outer, head, decode), strict=True):
                cuda.synchronize()
                watch, began = Stopwatch(cuda), clock()
                watch.mark()
                work()
                watch.mark()
                enqueued = clock() - began
                device = watch.milliseconds()[0]
                for title in (title for title, number in TOLD.items() if number == run):
                    found[phase][title] = {"enqueue_ms": round(1e3 * enqueued, 3), "device_ms": round(device, 3)}
    return found


def profile(session: Session) -> dict[str, Any]:
    """Kernels of one run of each graph that a step launches, by ONNX Runtime's own profile: GPU kernels where its build tells
    them, else nodes on the GPU."""
    pipeline = session.open(session.full, "onnxruntime-cuda", cuda_graphs=False)
    backend: Any = pipeline.backend
    backend._options.enable_profiling = True
    pipeline.loop.prepare(guided=True)
    phase_times(session, pipeline, 1)
    found = {}
    for graph, ort in backend._sessions.items():
        path = Path(ort.end_profiling())
        events = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        found[graph] = kernels_of(events)
    return found


def kernels_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a profile: runs, GPU kernels of all runs, nodes by provider, copies between host and device."""
    kinds = Counter(event.get("cat") for event in events)
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    runs = sum(event["name"] == "model_run" for event in events)
    providers = Counter(event["args"].get("provider", "?") for event in nodes)
    copies = sum(event["args"].get("op_name", "").startswith("Memcpy") for event in nodes)
    return {"runs": runs, "gpu_kernels": kinds["Kernel"], "nodes": dict(providers), "copies": copies}


def reference_times(session: Session) -> None:
    """PyTorch's own time of an outer step and of a token's draw, under autocast: where the reference spends it."""
    from .race import Reference

    reference = Reference(session.full, half_vae=False)
    for batch in [size for size in session.sizes if size <= session.most]:
        times = reference.phases(batch, session.guidance_scale, session.report.clock)
        session.report.add("launching", {"model": session.full, "backend": "pytorch", "batch": batch, **times})
        session.report.say(f"{session.full} batch {batch} pytorch: {times}")
