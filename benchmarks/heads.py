"""Two heads on one machine: ARINAR's mixture against MAR's diffusion, in time and, on trained models, in quality.

    python -m benchmarks.heads make FOLDER         # full-size bundles with random weights, fp32 and int8 (minutes, 3 GB)
    python -m benchmarks.heads time FOLDER         # seconds, operations, launches
    python -m benchmarks.heads quality             # `digits` against `digits-mar`

*Time*: `base` and `mar_base` at their published guidance, through this runtime and through the plain PyTorch reference
(`arinar.sampler`: the published algorithm, eager), all in one process, outer step by outer step in turn: whatever else the
machine does slows all alike. Outer steps that lie between the measured ones (``--every``) are taken to cost what those
beside them do, in proportion to their tokens. Outer network and head are timed apart; the VAE is the same for both.

*Quality*: 1,000 images of each by the deployed fp32 bundle, read by the digits' classifier, and their Frechet distance to the
real digits in the built-in features. The distance between two seeds of one model tells what differences mean.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch

from arinar.checkpoint import inspect_checkpoint, load_arinar, load_vae
from arinar.diffusion_schedule import most_steps
from arinar.export.bundle import export_bundle
from arinar.export.quantize import quantize_bundle
from arinar.files import check_writable, write_text
from arinar.head import Draw
from arinar.judge import judge, real_digits
from arinar.measure.cost import image_cost
from arinar.measure.distances import frechet_between
from arinar.measure.features import builtin_features
from arinar.model import Arinar, random_models
from arinar.runtime import Pipeline
from arinar.runtime.loop import Loop
from arinar.runtime.machine import machine, usable_cores
from arinar.runtime.request import with_sampling_steps
from arinar.schedule import Step
from arinar.schedule import steps as steps_of
from arinar.text import aligned
from arinar.vae import AutoencoderKL

#: Presets, and the guidance that was published for each.
MODELS = {"base": 4.5, "mar_base": 2.9}
PRECISIONS = ("fp32", "int8")
QUALITY_STEPS = ("10", "25", "50", "100", "ddim10", "ddim25", "ddim50", "ddim100")
QUALITY_BATCH = 50


def make(folder: Path) -> None:
    for preset in MODELS:
        export_bundle(*random_models(preset), folder / preset, untrained=True, progress=click.echo)
        quantize_bundle(folder / preset, "int8", progress=click.echo)


# ----------------------------------------------------------------------------------------------------------- time


@dataclass
class Contender:
    """One way to make an image: ``step`` takes an outer step and gives seconds of the outer network and of the head."""

    model: str
    how: str
    sampling_steps: str | None
    step: Callable[[Step], tuple[float, float]]
    launches: dict[str, int] = field(default_factory=dict)  # of graphs and of their operators, for an image
    seconds: dict[int, tuple[float, float]] = field(default_factory=dict)  # by outer step


def runtime_contender(
    stack: contextlib.ExitStack, pipeline: Pipeline, preset: str, batch: int, num_iter: int, sampling_steps: str | None
) -> Contender:
    labels = np.arange(batch) % pipeline.config.num_classes
    how: dict[str, Any] = {"guidance_scale": MODELS[preset], "num_iter": num_iter, "sampling_steps": sampling_steps}
    one = pipeline.resolve(labels, **how).batch()
    graphs = pipeline.bundle.manifest.precision_graphs(pipeline.precision)
    # A loop of its own that keeps no first step: every image is the first of its class.
    loop = Loop(pipeline.backend, graphs, pipeline.config, keep_first_step=False)
    loop.prepare(one.guided, batch)
    state = stack.enter_context(loop.state(one))
    loop.fill(state, one, {})
    tokens = np.random.default_rng(0).standard_normal(state.tokens.shape).astype(np.float32)

    def step(step: Step) -> tuple[float, float]:
        pipeline.backend.write(state.tokens, tokens)
        start = time.perf_counter()
        z = loop.outer.step(state, step)
        middle = time.perf_counter()
        loop.head.draw(state, step, z)
        return middle - start, time.perf_counter() - middle

    return Contender(
        preset, f"runtime {pipeline.precision}", sampling_steps, step, launched(pipeline, num_iter, sampling_steps)
    )


def launched(pipeline: Pipeline, num_iter: int, sampling_steps: str | None) -> dict[str, int]:
    """Graphs that a guided micro-batch launches, and the operators in them, decoding apart."""
    head = pipeline.loop.head.graphs(guided=True)
    times = {"outer_step": num_iter} | dict.fromkeys(head, num_iter)
    if sampling_steps is not None:
        times[head[-1]] = num_iter * most_steps(sampling_steps)
    graphs = pipeline.bundle.manifest.precision_graphs(pipeline.precision)
    folder = pipeline.bundle.folder
    sizes = {name: len(onnx.load(folder / graphs[name].file, load_external_data=False).graph.node) for name in times}
    return {"graphs": sum(times.values()), "operators": sum(count * sizes[name] for name, count in times.items())}


def reference_contender(model: Arinar, preset: str, batch: int, sampling_steps: str | None) -> Contender:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.arange(batch) % config.num_classes, torch.full((batch,), -1)])
    tokens = torch.randn(2 * batch, config.seq_len, config.token_dim, generator=generator)
    order = torch.rand(batch, config.seq_len, generator=generator).argsort(1).repeat(2, 1)

    @torch.no_grad()
    def step(step: Step) -> tuple[float, float]:
        start = time.perf_counter()
        mask = torch.zeros(2 * batch, config.seq_len).scatter_(1, order[:, : step.masked], 1.0)
        z = model.condition(tokens, mask, labels)
        cond, uncond = z[torch.arange(2 * batch)[:, None], order[:, step.remaining : step.masked]].flatten(0, 1).chunk(2)
        middle = time.perf_counter()
        rows = torch.ones(len(cond), dtype=torch.float64)
        how = Draw(rows * MODELS[preset], rows, generator, sampling_steps=sampling_steps, recorded=False)
        model.head.draw(cond, uncond, how)
        return middle - start, time.perf_counter() - middle

    return Contender(preset, "PyTorch", sampling_steps, step)


def measure(contenders: list[Contender], plan: list[Step], every: int) -> None:
    """Every ``every``-th outer step of the plan, and the last, by all contenders in turn."""
    for contender in contenders:  # warm up
        contender.step(plan[0])
    for index in sorted({*range(0, len(plan), every), len(plan) - 1}):
        for contender in contenders:
            contender.seconds[index] = contender.step(plan[index])
        click.echo(f"outer step {index + 1} of {len(plan)}")


def whole(contender: Contender, plan: list[Step]) -> tuple[float, float]:
    """Seconds of all outer steps, outer network and head: what was not measured by interpolation, the head by token."""
    measured = sorted(contender.seconds)
    outer, head = (np.array([contender.seconds[index][part] for index in measured]) for part in (0, 1))
    counts = np.array([step.count for step in plan])
    per_token = head / counts[measured]
    every = np.arange(len(plan))
    return float(np.interp(every, measured, outer).sum()), float((np.interp(every, measured, per_token) * counts).sum())


def timed(folder: Path, batches: tuple[int, ...], num_iter: int, every: int, threads: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    models = {preset: random_models(preset) for preset in MODELS}
    pipelines = {
        (preset, precision): Pipeline.load(folder / preset, precision=precision, backend="onnxruntime-cpu", threads=threads)
        for preset in MODELS
        for precision in PRECISIONS
    }
    rows: list[dict[str, Any]] = []
    for batch in batches:
        with contextlib.ExitStack() as stack:
            contenders = []
            for preset, (model, _) in models.items():
                for steps in (None,) if model.config.head == "gmm" else ("100", "25"):
                    for precision in PRECISIONS:
                        contenders.append(
                            runtime_contender(stack, pipelines[preset, precision], preset, batch, num_iter, steps)
                        )
                    contenders.append(reference_contender(model, preset, batch, steps))
            plan = steps_of(models["base"][0].config.seq_len, num_iter)
            measure(contenders, plan, every)
        rows += [as_row(contender, models[contender.model], plan, batch) for contender in contenders]
        click.echo("\n".join(time_table(rows)))
    return rows


def as_row(contender: Contender, made: tuple[Arinar, AutoencoderKL], plan: list[Step], batch: int) -> dict[str, Any]:
    """Of one image."""
    model, vae = made
    config = with_sampling_steps(model.config, contender.sampling_steps)
    cost = image_cost(config, len(plan), guided=True, vae=vae.config)
    outer, head = (seconds / batch for seconds in whole(contender, plan))
    return {
        "model": contender.model,
        "how": contender.how,
        "sampling_steps": contender.sampling_steps,
        "batch": batch,
        "outer_s": outer,
        "head_s": head,
        "outer_tera_operations": cost.outer / 1e12,
        "head_tera_operations": cost.inner / 1e12,
        **{f"launched_{name}": count for name, count in contender.launches.items()},
    }


def time_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [["model", "steps", "how", "batch", "outer s", "head s", "sum s", "TOP outer", "TOP head", "launches", "operators"]]
    for row in rows:
        seconds = (row["outer_s"], row["head_s"], row["outer_s"] + row["head_s"])
        operations = (row["outer_tera_operations"], row["head_tera_operations"])
        counts = [f"{row[name]:,}" if name in row else "" for name in ("launched_graphs", "launched_operators")]
        numbers = [f"{value:.3g}" for value in (*seconds, *operations)]
        lines.append([row["model"], row["sampling_steps"] or "", row["how"], str(row["batch"]), *numbers, *counts])
    return aligned(lines)


# -------------------------------------------------------------------------------------------------------- quality


def quality(samples: int, seed: int, threads: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        pipelines = {name: demo_pipeline(name, Path(scratch) / name, threads) for name in ("digits", "digits-mar")}
        extract = builtin_features(pipelines["digits"].config)
        real = extract(real_digits().train_images)
        rows = []
        for name, steps in (("digits", None), *(("digits-mar", steps) for steps in QUALITY_STEPS)):
            sets = []
            seconds = []
            for chosen in (seed, seed + 1):
                images, taken = draw(pipelines[name], samples, steps, chosen)
                sets.append(images)
                seconds.append(taken / samples)
            labels = np.arange(samples) % 10
            judged = [judge(images, labels) for images in sets]
            features = [extract(images) for images in sets]
            row = {
                "model": name,
                "sampling_steps": steps,
                "s_per_image": min(seconds),
                "agreement": float(np.mean([found.agreement for found in judged])),
                "diversity": float(np.mean([found.diversity for found in judged])),
                "novelty": float(np.mean([found.novelty for found in judged])),
                "frechet": float(np.mean([frechet_between(found, real) for found in features])),
                "frechet_of_seeds": frechet_between(*features),
                "held_out": held_out(name),
            }
            rows.append(row)
            click.echo("\n".join(quality_table(rows)))
    return rows


def demo_pipeline(name: str, folder: Path, threads: int) -> Pipeline:
    export_bundle(load_arinar(name), load_vae(name), folder)
    return Pipeline.load(folder, backend="onnxruntime-cpu", threads=threads)


def draw(pipeline: Pipeline, samples: int, steps: str | None, seed: int) -> tuple[np.ndarray, float]:
    """``samples`` images, all classes in turn, and the seconds that they took."""
    labels = [index % 10 for index in range(samples)]
    made = pipeline.generate(labels, sampling_steps=steps, seed=seed, batch_size=QUALITY_BATCH)
    return np.stack([np.asarray(image) for image in made.images]), made.timings["total"]


def held_out(name: str) -> str:
    """The held-out loss of a demo model, and which it is: an NLL exists of the mixture head alone."""
    metadata = inspect_checkpoint(name).metadata
    key = next((key for key in metadata if key.startswith("held_out")), None)
    return "" if key is None else f"{key.removeprefix('held_out_').upper()} {metadata[key]}"


def quality_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [["model", "steps", "ms an image", "agreement", "diversity", "novelty", "Frechet", "two seeds", "held out"]]
    for row in rows:
        numbers = (f"{1e3 * row['s_per_image']:.3g}", f"{row['agreement']:.1%}", f"{row['diversity']:.2f}")
        more = (f"{row['novelty']:.2f}", f"{row['frechet']:.4f}", f"{row['frechet_of_seeds']:.4f}", row["held_out"])
        lines.append([row["model"], row["sampling_steps"] or "", *numbers, *more])
    return aligned(lines)


# -------------------------------------------------------------------------------------------------------- command


@click.group()
def main() -> None:
    """Compare ARINAR's head with MAR's."""


@main.command("make")
@click.argument("folder", type=click.Path(path_type=Path))
def make_command(folder: Path) -> None:
    """Full-size bundles of both with random weights, fp32 and int8."""
    make(folder)


@main.command("time")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--batch", "batches", multiple=True, type=click.IntRange(min=1), default=(1, 4), show_default=True)
@click.option("--num-iter", type=int, default=64, show_default=True)
@click.option("--every", type=click.IntRange(min=1), default=8, show_default=True, help="Measure every so many-th outer step.")
@click.option("--threads", type=click.IntRange(min=1), help="Of all sides. [default: all cores]")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def time_command(
    folder: Path, batches: tuple[int, ...], num_iter: int, every: int, threads: int | None, json_path: Path | None
) -> None:
    """Seconds, operations and launches of both, at the published sizes."""
    if json_path is not None:
        check_writable(json_path)
    threads = threads or usable_cores()
    rows = timed(folder, batches, num_iter, every, threads)
    settings = {"num_iter": num_iter, "every": every, "guidance_scale": MODELS, "threads": threads}
    _write(json_path, rows, settings)


@main.command("quality")
@click.option("--samples", type=click.IntRange(min=100), default=1000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="[default: all cores]")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def quality_command(samples: int, seed: int, threads: int | None, json_path: Path | None) -> None:
    """Both demo models' images, judged."""
    if json_path is not None:
        check_writable(json_path)
    threads = threads or usable_cores()
    rows = quality(samples, seed, threads)
    _write(json_path, rows, {"samples": samples, "seed": seed, "threads": threads})


def _write(path: Path | None, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    if path is not None:
        write_text(path, json.dumps({"machine": machine(), **settings, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
