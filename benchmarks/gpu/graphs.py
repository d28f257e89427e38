"""Every graph of a small model once on the GPU, beside ONNX Runtime on the CPU, on what a generation gives it: first the
outer step at its edges, where no token is visible or none stays hidden."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from arinar.measure.checks import THRESHOLDS
from arinar.runtime import Pipeline
from arinar.runtime.bundle import GraphInfo

from .session import Session

MODES = ("fused", "stepwise")


@dataclass(frozen=True)
class Launched:
    """A launch as the CPU ran it: arrays by name."""

    graph: str
    inputs: dict[str, Any]
    outputs: dict[str, Any]


def check(session: Session) -> None:
    report = session.report
    launched: dict[str, Launched] = {}
    with report.check(f"graphs: {session.demo} on the CPU", "the bundle itself is at fault: export it again"):
        for mode in MODES:
            launched = record(session, mode) | launched
    for backend in session.possible(session.demo) if launched else ():
        pipeline = session.open(session.demo, backend)
        infos = pipeline.bundle.manifest.precision_graphs(session.precision)
        for what, launch in launched.items():
            remedy = "reproduce with this graph and these shapes; at an edge of the outer step, keep that launch from the GPU"
            with report.check(f"graphs: {what} on {backend}", remedy):
                compare(session, pipeline, infos[launch.graph], what, launch)
        with report.check(f"graphs: tokens by our kernels on {backend}", "runtime/kernels/inner.cu, beside inner_token_guided"):
            tokens(session, pipeline, launched)
        on_the_cpu(session, backend, pipeline)


def record(session: Session, mode: str) -> dict[str, Launched]:
    """The first launch of every graph in a guided generation, and the outer steps at the edges; by what they are."""
    pipeline = session.open(session.demo, "onnxruntime-cpu", inner=mode, threads=2)
    pipeline.loop.outer.keep_first_step = False  # type: ignore[attr-defined]
    backend: Any = pipeline.backend
    found: dict[str, Launched] = {}
    launch = backend.launch

    def spy(graph: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], rows: Any = None) -> None:
        given = {name: np.array(value) for name, value in inputs.items()}
        launch(graph, inputs, outputs, rows)
        for what in names(graph, given):
            found.setdefault(what, Launched(graph, given, {name: np.array(value) for name, value in outputs.items()}))

    backend.launch = spy
    pipeline.generate([1, 0], seed=0, guidance_scale=session.guidance_scale, num_iter=pipeline.config.seq_len, batch_size=2)
    order = sorted(found, key=lambda what: not what.startswith("outer_step with"))
    return {what: found[what] for what in order}


def names(graph: str, inputs: Mapping[str, Any]) -> list[str]:
    """What a launch is an example of."""
    if "visible_tokens" not in inputs:
        return [graph]
    visible, hidden = len(inputs["visible_tokens"]), len(inputs["hidden_positions"])
    edges = {f"{graph} with {visible} visible tokens": visible < 2, f"{graph} with no hidden tokens": not hidden}
    return [what for what, true in edges.items() if true] or [graph]


def compare(session: Session, pipeline: Pipeline, info: GraphInfo, what: str, launch: Launched) -> None:
    """Run a launch on the GPU; a finding where it is further from the CPU's than the parity protocol allows."""
    backend = pipeline.backend
    inputs = {name: backend.upload(value) for name, value in launch.inputs.items()}
    outputs = {name: backend.empty(value.shape, str(value.dtype)) for name, value in launch.outputs.items()}
    backend.launch(launch.graph, inputs, outputs)
    errors = {}
    for name, want in launch.outputs.items():
        have = backend.download(outputs[name]).astype(np.float64)
        off = np.abs(have - want.astype(np.float64)) / max(1.0, float(np.abs(want).max(initial=0.0)))
        errors[name] = float(np.nan_to_num(off, nan=np.inf).max(initial=0.0))
    limits = THRESHOLDS[session.precision]
    limit = {"none": limits.graph, "one": limits.sampled_graph, "chain": limits.token}[info.draws]
    if info.convolutional:
        limit = 3.0 / 255  # pixels, relative to the largest
    worst = max(errors, key=lambda name: errors[name])
    session.report.add(
        "graphs", {"graph": what, "backend": backend.name, "error": errors[worst], "output": worst, "limit": limit}
    )
    if errors[worst] > limit:
        session.report.find(
            "wrong",
            f"graphs: {what} on {backend.name}",
            f"output {worst} is off by {errors[worst]:.2g} of its largest value; at most {limit:.2g} was expected",
            "find the node: run the graph with its intermediate results as outputs on both sides",
        )


def tokens(session: Session, pipeline: Pipeline, launched: Mapping[str, Launched]) -> None:
    """Whole tokens by the kernels that take the graphs' place for a few rows, beside the graph's on the CPU."""
    token, launch = getattr(pipeline.loop.head, "token", None), launched.get("inner_token_guided")
    if token is None or launch is None:
        session.report.skip(f"tokens by our kernels on {pipeline.backend.name}", "the backend has none")
        return
    backend, config, want = pipeline.backend, pipeline.config, launch.outputs["tokens"].reshape(-1, pipeline.config.token_dim)
    z = backend.upload(launch.inputs["z"].reshape(-1, config.z_width))
    uniforms = launch.inputs["uniforms"].reshape(len(want), config.token_dim, -1)
    scale, temperature = (backend.upload(launch.inputs[name].reshape(-1)) for name in ("guidance_scale", "temperature"))
    buffers = pipeline.loop.head._chain_buffers(z.shape[0])  # type: ignore[attr-defined]
    made = backend.empty(want.shape, "float32")
    backend.launch("inner_condition", {"z": z}, {"start": buffers.start, "modulation": buffers.modulation})
    given = [backend.upload(np.ascontiguousarray(uniforms[:, place])) for place in range(config.token_dim)]
    token(buffers.start, buffers.modulation, given, scale, temperature, buffers.feature, made)
    error = float(np.abs(backend.download(made) - want).max() / max(1.0, np.abs(want).max()))
    limit = THRESHOLDS[session.precision].token
    session.report.add("graphs", {"graph": "tokens by our kernels", "backend": backend.name, "error": error, "limit": limit})
    if not error <= limit:
        raise AssertionError(f"tokens are off by {error:.2g} of the largest; at most {limit:.2g} was expected")


def on_the_cpu(session: Session, backend: str, pipeline: Pipeline) -> None:
    """A finding for the nodes that ONNX Runtime leaves to the CPU."""
    for graph, nodes in pipeline.backend.describe().get("cpu_nodes", {}).items():
        told = ", ".join(f"{count} {operator}" for operator, count in nodes.items())
        session.report.find(
            "slow",
            f"graphs: {graph} on {backend}",
            f"nodes on the CPU, each with copies and waits: {told}",
            "a newer onnxruntime-gpu has kernels for them, or the graph is written without them",
        )
