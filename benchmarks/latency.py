"""Runtime against the PyTorch reference, step by step in one process, interleaved.

    python -m benchmarks.latency BUNDLE --checkpoint CHECKPOINT --vae VAE --precision fp32 --precision int8 --batch 1 --batch 4
    python -m benchmarks.latency BUNDLE --base          # full size with random weights, if BUNDLE was made by --make-base
    python -m benchmarks.latency BUNDLE --make-base     # makes such a bundle (fp32 and int8; 3 GB of memory, minutes)

The reference is `arinar.sampler.sample`: the published algorithm in plain eager PyTorch as its authors run it (all positions
through every block, AdaLN recomputed for each feature, 1000 proposals per guided draw), threads set to the machine. After
each of its outer steps every runtime does the same step on the same tokens, so that whatever else the machine does slows
all alike. The ratio of the sums is what counts; the quartiles of the steps' ratios show the spread. Every run is one whole
batch of images that the runtime has not seen: nothing is kept from the image before it.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from arinar.checkpoint import load_arinar, load_vae
from arinar.files import check_writable, write_text
from arinar.measure.cost import image_cost
from arinar.measure.peaks import onnxruntime_peak
from arinar.model import Arinar, decode_images, random_models
from arinar.runtime import Pipeline
from arinar.runtime.loop import Loop
from arinar.runtime.machine import machine, usable_cores
from arinar.runtime.state import State
from arinar.sampler import StepRecord, sample
from arinar.vae import AutoencoderKL

DECODE_REPEATS = 3


def make_base(folder: Path) -> None:
    from arinar.export.bundle import export_bundle
    from arinar.export.quantize import quantize_bundle

    export_bundle(*random_models("base"), folder, progress=click.echo)
    quantize_bundle(folder, "int8", progress=click.echo)


def compare(
    pipelines: dict[str, Pipeline],
    model: Arinar,
    vae: AutoencoderKL,
    *,
    batch: int,
    num_iter: int,
    guidance_scale: float,
    seed: int = 0,
) -> dict[str, Any]:
    """One batch through the reference and every pipeline -> per pipeline seconds by phase, and the ratio to the reference.

    The answer has ``reference`` (seconds by phase) and, per pipeline, ``seconds`` by phase and the steps' ``ratios``.
    """
    config = model.config
    labels = np.arange(batch) % config.num_classes
    stack = contextlib.ExitStack()
    contenders: dict[str, tuple[Loop, State]] = {}
    first: dict[str, float] = {}
    for name, pipeline in pipelines.items():
        one = pipeline.resolve(labels, guidance_scale=guidance_scale, temperature=1.0, num_iter=num_iter, seed=seed).batch()
        # A loop of its own has kept no first step: every image is the first of its class.
        loop = Loop(pipeline.backend, pipeline.bundle.manifest.precision_graphs(pipeline.precision), config)
        loop.prepare(one.guided, batch)
        state, seconds = stack.enter_context(loop.state(one)), dict[str, float]()
        loop.fill(state, one, seconds)
        contenders[name], first[name] = (loop, state), seconds.get("outer", 0.0)
    reference: list[float] = []
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in pipelines}
    last = 0.0

    def follow(record: StepRecord) -> None:
        nonlocal last
        reference.append(time.perf_counter() - last)
        step = record.step
        drawn = record.features.reshape(batch, step.count, -1).transpose(0, 1).numpy()
        for name, pipeline in pipelines.items():
            loop, state = contenders[name]
            start = time.perf_counter()
            z = loop.outer.step(state, step)
            middle = time.perf_counter()
            loop.head.draw(state, step, z)
            taken[name].append((first.pop(name, 0.0) + middle - start, time.perf_counter() - middle))
            pipeline.backend.write(state.tokens[step.remaining : step.masked], drawn)
        last = time.perf_counter()

    last = time.perf_counter()
    tokens = sample(
        model,
        torch.from_numpy(labels),
        guidance_scale=guidance_scale,
        num_iter=num_iter,
        seed=seed,
        record=follow,
        order=torch.from_numpy(one.noise.order),
    )
    decode: dict[str, list[float]] = {name: [] for name in ("reference", *pipelines)}
    for _ in range(DECODE_REPEATS):
        start = time.perf_counter()
        decode_images(vae, tokens, config)
        decode["reference"].append(time.perf_counter() - start)
        for name in pipelines:
            start = time.perf_counter()
            contenders[name][0].decode(contenders[name][1])
            decode[name].append(time.perf_counter() - start)
    stack.close()
    found: dict[str, Any] = {"reference": {"steps": sum(reference), "vae": statistics.median(decode["reference"])}}
    for name, pairs in taken.items():
        outer, inner = (sum(values) for values in zip(*pairs, strict=True))
        found[name] = {
            "seconds": {"outer": outer, "inner": inner, "vae": statistics.median(decode[name])},
            "ratios": [r / sum(pair) for r, pair in zip(reference, pairs, strict=True)],
        }
    return found


def summary(
    runs: list[dict[str, Any]], name: str, *, batch: int, num_iter: int, operations: float, peak: float
) -> dict[str, Any]:
    """Of several runs of one setting: the median run by its ratio, and the spread."""

    def ratio(run: dict[str, Any]) -> float:
        return float(sum(run["reference"].values()) / sum(run[name]["seconds"].values()))

    run = sorted(runs, key=ratio)[len(runs) // 2]
    seconds = {phase: value / batch for phase, value in run[name]["seconds"].items()}
    return {
        "batch": batch,
        "num_iter": num_iter,
        "precision": name,
        "reference_s_per_image": sum(run["reference"].values()) / batch,
        "runtime_s_per_image": sum(seconds.values()),
        "ratio": ratio(run),
        "ratios_of_runs": [ratio(r) for r in runs],
        "step_ratio_quartiles": np.quantile(run[name]["ratios"], [0.25, 0.5, 0.75]).tolist(),
        "runtime_phases_s_per_image": seconds,
        "reference_phases_s_per_image": {phase: value / batch for phase, value in run["reference"].items()},
        "tera_operations_per_image": operations / 1e12,
        "floor_s_per_image": operations / peak,
        "share_of_gemm_peak": operations / peak / sum(seconds.values()),
        "largest_possible_ratio": sum(run["reference"].values()) / batch / (operations / peak),
    }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", help="The model that the bundle was exported from.")
@click.option("--vae", help="Its autoencoder.")
@click.option("--base", is_flag=True, help="The bundle is one of --make-base: no checkpoint is needed.")
@click.option("--make-base", "make", is_flag=True, help="Only make a full-size bundle with random weights.")
@click.option("--precision", "precisions", multiple=True, help="Variant of the bundle; may be repeated. [default: fp32]")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(min=1), default=(1,), show_default=True)
@click.option("--num-iter", type=int, default=64, show_default=True)
@click.option("--guidance-scale", type=float, default=4.5, show_default=True)
@click.option("--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="Whole runs; the median is reported.")
@click.option("--threads", type=click.IntRange(min=1), help="Of all sides. [default: all cores]")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    bundle: Path,
    checkpoint: str | None,
    vae: str | None,
    base: bool,
    make: bool,
    precisions: tuple[str, ...],
    batches: tuple[int, ...],
    num_iter: int,
    guidance_scale: float,
    repeat: int,
    threads: int | None,
    json_path: Path | None,
) -> None:
    """Compare the runtime with the PyTorch reference on this machine."""
    if make:
        make_base(bundle)
        return
    if not base and not (checkpoint and vae):
        raise click.UsageError("give --checkpoint and --vae, or --base for a bundle of --make-base")
    if json_path is not None:
        check_writable(json_path)
    threads = threads or usable_cores()
    torch.set_num_threads(threads)
    pipelines = {
        name: Pipeline.load(bundle, precision=name, backend="onnxruntime-cpu", threads=threads)
        for name in precisions or ("fp32",)
    }
    if base:
        model, autoencoder = random_models("base")
    else:
        assert checkpoint is not None and vae is not None
        model, autoencoder = load_arinar(checkpoint), load_vae(vae)
    peaks = {"float32": 0.0, "int8": 0.0}
    cost = image_cost(model.config, num_iter, guided=guidance_scale != 1.0, vae=autoencoder.config)
    results = []
    for batch in batches:
        settings: dict[str, Any] = {"batch": batch, "guidance_scale": guidance_scale}
        compare(pipelines, model, autoencoder, num_iter=2, **settings)  # warms up all sides
        runs = [compare(pipelines, model, autoencoder, num_iter=num_iter, seed=run, **settings) for run in range(repeat)]
        # Whatever else the machine did while a peak was measured only lowered it.
        peaks = {kind: max(known, onnxruntime_peak(kind, threads)) for kind, known in peaks.items()}
        for name in pipelines:
            row = summary(runs, name, batch=batch, num_iter=num_iter, operations=cost.total, peak=peaks["float32"])
            results.append(row)
            low, middle, high = row["step_ratio_quartiles"]
            phases = ", ".join(f"{phase} {value:.2f} s" for phase, value in row["runtime_phases_s_per_image"].items())
            click.echo(
                f"batch {batch}, {name}: reference {row['reference_s_per_image']:.2f} s per image, runtime "
                f"{row['runtime_s_per_image']:.2f} s, ratio {row['ratio']:.2f} (steps {low:.2f} {middle:.2f} {high:.2f}); "
                f"{phases}; {row['share_of_gemm_peak']:.0%} of the float32 peak, at which the ratio would be "
                f"{row['largest_possible_ratio']:.2f}"
            )
        report = {
            "machine": machine() | {"threads": threads},
            "peaks_gops": {k: v / 1e9 for k, v in peaks.items()},
            "guidance_scale": guidance_scale,
            "backend": "onnxruntime-cpu",
            "results": results,
        }
        if json_path is not None:
            write_text(json_path, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
