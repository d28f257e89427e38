"""Runtime against the PyTorch reference, step by step in one process, interleaved.

    python -m benchmarks.latency BUNDLE --checkpoint CHECKPOINT --vae VAE --batch 1 --num-iter 64 --json out.json

The reference is `arinar.sampler.sample`: the published algorithm in plain eager PyTorch as its authors run it (all positions
through every block, AdaLN recomputed for each feature, 1000 proposals per guided draw), threads set to the machine. After
each of its outer steps the runtime does the same step on the same tokens, so that whatever else the machine does slows both
alike. The ratio of the sums is what counts; the medians of the steps' ratios show the spread.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from arinar.checkpoint import load_arinar, load_vae
from arinar.config import VaeConfig
from arinar.model import denormalize, unpatchify
from arinar.runtime import Noise, Pipeline
from arinar.runtime.bench import gemm_peak, machine, peak_memory
from arinar.runtime.cost import image_cost
from arinar.sampler import StepRecord, sample
from arinar.schedule import steps
from arinar.vae import to_uint8


def compare(
    pipeline: Pipeline, model: Any, vae: Any, *, batch: int, num_iter: int, guidance_scale: float, seed: int = 0
) -> dict[str, Any]:
    """One batch through both -> seconds by phase and the ratio reference / runtime."""
    config, loop, backend = pipeline.config, pipeline.loop, pipeline.backend
    guided = guidance_scale != 1.0
    loop.prepare(guided)
    labels = np.arange(batch) % config.num_classes
    reference: list[float] = []
    outer: list[float] = []
    inner: list[float] = []
    last = 0.0

    def follow(record: StepRecord) -> None:
        nonlocal last
        reference.append(time.perf_counter() - last)
        step = record.step
        start = time.perf_counter()
        z = loop.outer(state, step)
        middle = time.perf_counter()
        loop.draw(state, step, z)
        inner.append(time.perf_counter() - middle)
        outer.append(middle - start)
        rows = record.features.reshape(batch, step.count, -1).transpose(0, 1).numpy()
        backend.write(state.tokens[step.remaining : step.masked], rows)
        last = time.perf_counter()

    noise = Noise.from_seed(seed, range(batch), config)
    plan = steps(config.seq_len, num_iter, guidance_scale)
    state = loop.state(batch, 2 if guided else 1, plan)
    loop.fill(state, labels, noise, plan, 1.0)
    last = time.perf_counter()
    tokens = sample(
        model, torch.from_numpy(labels), guidance_scale=guidance_scale, num_iter=num_iter, seed=seed, record=follow,
        order=torch.from_numpy(noise.order),
    )  # fmt: skip
    decode_reference, decode_runtime = [], []
    for _ in range(3):
        start = time.perf_counter()
        with torch.no_grad():
            to_uint8(vae.decode(denormalize(unpatchify(tokens, config.patch_size), config)))
        middle = time.perf_counter()
        loop.decode(state)
        decode_reference.append(middle - start)
        decode_runtime.append(time.perf_counter() - middle)
    ours = [a + b for a, b in zip(outer, inner, strict=True)]
    vae_reference, vae_ours = statistics.median(decode_reference), statistics.median(decode_runtime)
    total_reference, total = sum(reference) + vae_reference, sum(ours) + vae_ours
    ratios = sorted(r / o for r, o in zip(reference, ours, strict=True))
    return {
        "batch": batch,
        "num_iter": num_iter,
        "guidance_scale": guidance_scale,
        "reference_s_per_image": total_reference / batch,
        "runtime_s_per_image": total / batch,
        "ratio": total_reference / total,
        "step_ratio_quartiles": [ratios[len(ratios) // 4], statistics.median(ratios), ratios[3 * len(ratios) // 4]],
        "runtime_phases_s": {"outer": sum(outer), "inner": sum(inner), "vae": vae_ours},
        "reference_phases_s": {"steps": sum(reference), "vae": vae_reference},
    }


@click.command()
@click.argument("bundle")
@click.option("--checkpoint", required=True)
@click.option("--vae", required=True)
@click.option("--precision", default=None)
@click.option("--batch", multiple=True, type=int, default=(1,), show_default=True)
@click.option("--num-iter", type=int, default=64, show_default=True)
@click.option("--guidance-scale", type=float, default=4.5, show_default=True)
@click.option("--repeat", type=int, default=1, show_default=True, help="Whole runs; the median is reported.")
@click.option("--threads", type=int, help="Of both sides. [default: all cores]")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    bundle: str, checkpoint: str, vae: str, precision: str | None, batch: tuple[int, ...], num_iter: int,
    guidance_scale: float, repeat: int, threads: int | None, json_path: Path | None,
) -> None:  # fmt: skip
    """Compare the runtime with the PyTorch reference on this machine."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    options = {} if threads is None else {"threads": threads}
    pipeline = Pipeline.load(bundle, precision=precision, **options)  # type: ignore[arg-type]
    model, autoencoder = load_arinar(checkpoint), load_vae(vae)
    peak = gemm_peak()
    vae_config: VaeConfig = autoencoder.config
    results = []
    for size in batch:
        # Warm-up of both: a few steps, then the measured runs.
        compare(pipeline, model, autoencoder, batch=size, num_iter=2, guidance_scale=guidance_scale)
        runs = [
            compare(pipeline, model, autoencoder, batch=size, num_iter=num_iter, guidance_scale=guidance_scale, seed=run)
            for run in range(repeat)
        ]
        result = sorted(runs, key=lambda r: r["ratio"])[len(runs) // 2]
        cost = image_cost(pipeline.config, num_iter, guided=guidance_scale != 1.0, vae=vae_config)
        result |= {
            "ratios_of_runs": [run["ratio"] for run in runs],
            "tera_operations_per_image": cost.total / 1e12,
            "share_of_gemm_peak": cost.total / result["runtime_s_per_image"] / peak,
        }
        results.append(result)
        low, middle, high = result["step_ratio_quartiles"]
        click.echo(
            f"batch {size}: reference {result['reference_s_per_image']:.2f} s/image, runtime "
            f"{result['runtime_s_per_image']:.2f} s/image ({pipeline.precision}), ratio {result['ratio']:.2f} "
            f"(steps {low:.2f} {middle:.2f} {high:.2f}); phases "
            + ", ".join(f"{name} {value:.2f} s" for name, value in result["runtime_phases_s"].items())
            + f"; {result['share_of_gemm_peak']:.0%} of the measured GEMM peak"
        )
    report = {
        "machine": machine() | {"torch_threads": torch.get_num_threads()},
        "gemm_peak_gflops": peak / 1e9, "precision": pipeline.precision,
        "backend": pipeline.backend.name, "results": results,
        "peak_memory_gb": peak_memory(),
    }  # fmt: skip
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
