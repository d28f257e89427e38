"""What executes graphs on a CPU: ONNX Runtime against OpenVINO, in float32, in bfloat16 and in 8 bits.

    python -m benchmarks.cpu_engines [--model base|digits] [--bundle DIR]

Writes ``benchmarks/results/cpu-engines-MODEL.json`` and ``.md``. Without ``--bundle`` one is made for the purpose, fp32 and
int8: `base` with random weights (minutes, 3 GB of memory), `digits` as shipped.

Timed are the two graphs that OpenVINO takes over, the outer network and the VAE, along an image that ONNX Runtime generated in
float32. All engines are in one process and take every outer step, then the decoding, in turn, so that whatever else the machine
does slows all alike; a round is a whole image. A ratio is that of a round's sums, and the median of the rounds is reported.
Errors are against ONNX Runtime in float32 on the same tokens. Start and memory are a fresh process's, which makes an image of
two steps, heads included.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from arinar.files import check_writable, write_text
from arinar.measure.bench import fresh_process
from arinar.runtime import Bundle, Pipeline
from arinar.runtime.backends import obstacle
from arinar.runtime.loop import Loop
from arinar.runtime.machine import machine, usable_cores
from arinar.runtime.request import Batch
from arinar.schedule import Step
from arinar.schemes import SCHEMES

from .precision import RESULTS, load
from .scaling import FRESH

Array = npt.NDArray[Any]
#: Name -> backend, precision. All are compared with the first.
ENGINES = {
    "ONNX Runtime, fp32": ("onnxruntime-cpu", "fp32"),
    "OpenVINO, fp32": ("openvino", "fp32"),
    "OpenVINO, bf16": ("openvino", "bf16"),
    "ONNX Runtime, int8": ("onnxruntime-cpu", "int8"),
}
EXACT = next(iter(ENGINES))
PHASES = ("outer", "vae")


def make(model: str, folder: Path) -> None:
    """A bundle of a model that comes with the package, or of a preset with random weights, in fp32 and int8."""
    from arinar.export.bundle import export_bundle
    from arinar.export.quantize import quantize_bundle

    network, vae, _ = load(model)
    export_bundle(network, vae, folder, progress=click.echo)
    quantize_bundle(folder, "int8", progress=click.echo)


def left_out(bundle: Bundle) -> dict[str, str]:
    """The engines that cannot be compared here, and why."""
    found = {}
    for name, (backend, precision) in ENGINES.items():
        held = precision in bundle.precisions or SCHEMES[precision].runs in bundle.precisions
        reason = obstacle(bundle, precision, backend) if held else f"the bundle has no {precision} graphs"
        if reason is not None:
            found[name] = reason
    return found


class Contender:
    """An engine with an image's state in it, all its tokens known: any step can be taken, and the image decoded."""

    def __init__(self, stack: contextlib.ExitStack, pipeline: Pipeline, batch: Batch, tokens: Array) -> None:
        graphs = pipeline.bundle.manifest.precision_graphs(pipeline.precision)
        # A loop of its own that keeps no first step: every round computes all of them.
        self.loop = Loop(pipeline.backend, graphs, pipeline.config, keep_first_step=False)
        self.state = stack.enter_context(self.loop.state(batch))
        self.loop.fill(self.state, batch, {})
        ordered = np.take_along_axis(tokens, batch.noise.order[:, :, None], 1).swapaxes(0, 1)  # (L, B, D)
        pipeline.backend.write(self.state.tokens, np.ascontiguousarray(ordered))

    def z(self, step: Step) -> Array:
        """(G, P, B, C) of the tokens of a step."""
        return self.loop.backend.download(self.loop.outer.step(self.state, step)).copy()

    def images(self) -> Array:
        """(B, H, W, 3) uint8."""
        self.loop.decode(self.state)
        return self.loop.backend.download(self.state.images).copy()


def measure(pipelines: dict[str, Pipeline], *, batch: int, num_iter: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each pipeline, those of ENGINES: seconds of every round by phase, their medians, ratios and errors."""
    exact = pipelines[EXACT]
    labels = [index % exact.config.num_classes for index in range(batch)]
    tokens = exact.generate(labels, num_iter=num_iter).tokens
    one = exact.resolve(labels, num_iter=num_iter).batch()
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in pipelines}
    made: dict[str, tuple[list[Array], Array]] = {}
    with contextlib.ExitStack() as stack:
        contenders = {name: Contender(stack, pipeline, one, tokens) for name, pipeline in pipelines.items()}
        for number in range(-1, rounds):  # the first warms up
            taken = {name: dict.fromkeys(PHASES, 0.0) for name in contenders}
            found: dict[str, list[Array]] = {name: [] for name in contenders}
            for step in one.plan:
                for name, contender in contenders.items():
                    found[name].append(_timed(taken[name], "outer", partial(contender.z, step)))
            for name, contender in contenders.items():
                made[name] = found[name], _timed(taken[name], "vae", contender.images)
                if number >= 0:
                    seconds[name].append(taken[name])
            click.echo(f"round {number + 1} of {rounds}: " + ", ".join(f"{name} {_sum(taken[name]):.3g} s" for name in taken))
    return [as_row(name, seconds[name], seconds[EXACT], made[name], made[EXACT]) for name in pipelines]


def _timed(taken: dict[str, float], phase: str, work: Callable[[], Array]) -> Array:
    start = time.perf_counter()
    result = work()
    taken[phase] += time.perf_counter() - start
    return result


def _sum(taken: dict[str, float]) -> float:
    return sum(taken.values())


def as_row(
    name: str,
    rounds: list[dict[str, float]],
    exact_rounds: list[dict[str, float]],
    made: tuple[list[Array], Array],
    exact: tuple[list[Array], Array],
) -> dict[str, Any]:
    """Medians of seconds by phase, of their ratios to the exact engine's in the same round; errors of z and images."""
    row: dict[str, Any] = {"engine": name, "backend": ENGINES[name][0], "precision": ENGINES[name][1]}
    for phase in PHASES:
        ours, theirs = [taken[phase] for taken in rounds], [taken[phase] for taken in exact_rounds]
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        row[f"{phase}_s"] = statistics.median(ours)
        row[f"{phase}_ratio"] = statistics.median(ratios)
        row[f"{phase}_s_of_rounds"], row[f"{phase}_ratios_of_rounds"] = ours, ratios
    z, true = (np.concatenate([part.ravel() for part in parts]).astype(np.float64) for parts in (made[0], exact[0]))
    grey = np.abs(made[1].astype(np.int64) - exact[1])
    return row | {
        "z_error": float(np.sqrt(np.mean((z - true) ** 2) / np.mean(true**2))),
        "grey_mean": float(grey.mean()),
        "grey_largest": int(grey.max()),
    }


def fresh(bundle: Bundle, row: dict[str, Any]) -> dict[str, float]:
    """Of a fresh process: seconds to open the bundle, of the first image (two steps, no guidance), peak memory in GB."""
    found = fresh_process(FRESH, str(bundle.folder), row["precision"], row["backend"], "2", "1")
    return {"open_s": found["open_s"], "first_image_s": found["first_image_s"], "peak_gb": found["peak_mb"] / 1e3}


def markdown(result: dict[str, Any]) -> str:
    where, (before, after) = result["machine"], result["load_average"]
    packages = ("onnxruntime", "openvino", "numpy", "python")
    versions = [f"{name} {where['versions'][name].partition('-')[0]}" for name in packages if name in where["versions"]]
    head = ["engine", "outer, s", "times as fast", "VAE, s", "times as fast", "z error", "grey levels: mean, largest"]
    lines = [
        f"# CPU engines: {result['model']}, {result['weights']}",
        "",
        f"{where['cpu']}, {where['cores']} cores, {result['threads']} threads; {', '.join(versions)}; {where['date']}. Batch "
        f"{result['batch']}, {result['num_iter']} outer steps, guidance {result['guidance_scale']:g}; medians of "
        f"{result['rounds']} rounds, engines in turn. Load average {before:.1f} before, {after:.1f} after (of a quiet machine "
        f"0 and {result['threads']}).",
        "",
        f"| {' | '.join([*head, 'first image, s', 'peak, GB'])} |",
        f"|{' --- |' * (len(head) + 2)}",
    ]
    for row in result["engines"]:
        cells = [
            row["engine"],
            f"{row['outer_s']:.3g}",
            f"{row['outer_ratio']:.2f}",
            f"{row['vae_s']:.3g}",
            f"{row['vae_ratio']:.2f}",
            f"{row['z_error']:.2g}",
            f"{row['grey_mean']:.2g}, {row['grey_largest']}",
            f"{row['first_image_s']:.3g}",
            f"{row['peak_gb']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "z error: root mean square, relative. Grey levels: of the VAE alone, from the same tokens. First image, peak memory: a",
        "fresh process, two steps without guidance.",
        "",
    ]
    lines += [f"Left out, {name}: {reason}." for name, reason in result["left_out"].items()]
    return "\n".join(lines) + "\n"


def run(bundle: Bundle, *, batch: int, num_iter: int, rounds: int, threads: int) -> dict[str, Any]:
    """All that can be compared here, ready for JSON."""
    absent = left_out(bundle)
    if EXACT in absent:
        raise click.UsageError(f"nothing to compare with: {absent[EXACT]}")
    before = os.getloadavg()[0]
    pipelines = {
        name: Pipeline.load(bundle.folder, backend=backend, precision=precision, threads=threads)
        for name, (backend, precision) in ENGINES.items()
        if name not in absent
    }
    rows = measure(pipelines, batch=batch, num_iter=num_iter, rounds=rounds)
    after, where = os.getloadavg()[0], machine()
    pipelines.clear()  # the fresh processes need the memory
    return {
        "machine": where,
        "batch": batch,
        "num_iter": num_iter,
        "guidance_scale": bundle.manifest.defaults.guidance_scale,
        "threads": threads,
        "rounds": rounds,
        "load_average": [before, after],
        "engines": [row | fresh(bundle, row) for row in rows],
        "left_out": absent,
    }


@click.command()
@click.option("--model", type=click.Choice(["base", "digits"]), default="base", show_default=True)
@click.option("--bundle", "folder", type=click.Path(path_type=Path), help="Of that model. [default: one is made]")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--num-iter", type=click.IntRange(min=1), default=6, show_default=True, help="Outer steps of an image.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Of all engines. [default: all cores]")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the results.")
def main(model: str, folder: Path | None, batch: int, num_iter: int, rounds: int, threads: int | None, out: Path) -> None:
    """Compare what executes graphs on this machine's CPU."""
    path = out / f"cpu-engines-{model}.json"
    check_writable(path, make_folder=True)
    with tempfile.TemporaryDirectory(prefix="arinar-engines-") as scratch:
        if folder is None:
            folder = Path(scratch) / model
            make(model, folder)
        settings: dict[str, Any] = {"batch": batch, "num_iter": num_iter, "rounds": rounds}
        found = run(Bundle.open(folder), threads=threads or usable_cores(), **settings)
    weights = "the shipped weights" if model == "digits" else "random weights"
    result = {"model": model, "weights": weights} | found
    write_text(path, json.dumps(result, indent=2) + "\n")
    write_text(path.with_suffix(".md"), markdown(result))
    click.echo(markdown(result))


if __name__ == "__main__":
    main()
