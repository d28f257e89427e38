"""Is a causal model's time per token flat, and what does it save? Both kinds, interleaved, in one process.

    python -m benchmarks.causal CAUSAL_BUNDLE --masked MASKED_BUNDLE --batch 1 --json out.json

Flat means: the median time of the last quarter of positions over that of the first, with whole generations repeated and each
position's median taken first. A cache that is copied or grown would show as a slope. The masked bundle should have the same
width and the same number of blocks.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from pathlib import Path
from typing import Any

import click
import numpy as np

from arinar.measure.bench import gemm_peak, peak_memory
from arinar.runtime import Pipeline
from arinar.runtime.machine import machine


def token_times(pipeline: Pipeline, batch: int, num_iter: int, guidance_scale: float, seed: int) -> list[dict[str, float]]:
    """Seconds of the outer and the inner phase of every outer step of one generation."""
    labels = np.arange(batch) % pipeline.config.num_classes
    asked = pipeline.resolve(
        labels, guidance_scale=guidance_scale, temperature=1.0, num_iter=num_iter, seed=seed, cfg_schedule="linear"
    )
    one = asked.batch()
    pipeline.loop.prepare(one.guided)
    seconds: dict[str, float] = {}
    times: list[dict[str, float]] = []
    with contextlib.closing(pipeline.loop.walk(one, seconds)) as walk:
        for _ in one.plan:
            before = dict(seconds)
            next(walk)
            times.append({phase: seconds[phase] - before.get(phase, 0.0) for phase in ("outer", "inner")})
    return times


def flatness(outer: list[float]) -> float:
    """Median of the last quarter over median of the first; the first step (the class buffer) is left out."""
    quarter = len(outer[1:]) // 4
    return statistics.median(outer[-quarter:]) / statistics.median(outer[1 : 1 + quarter])


@click.command()
@click.argument("causal")
@click.option("--masked", help="Bundle of a masked model of equal width and depth, to compare with.")
@click.option("--batch", type=int, default=1, show_default=True)
@click.option("--num-iter", type=int, default=64, show_default=True, help="Outer steps of the masked model.")
@click.option("--guidance-scale", type=float, default=4.5, show_default=True)
@click.option("--repeat", type=int, default=3, show_default=True)
@click.option("--precision")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    causal: str,
    masked: str | None,
    batch: int,
    num_iter: int,
    guidance_scale: float,
    repeat: int,
    precision: str | None,
    json_path: Path | None,
) -> None:
    """Time per token of a causal bundle, and against a masked one."""
    one = Pipeline.load(causal, precision=precision)
    two = Pipeline.load(masked, precision=precision) if masked else None
    length = one.config.seq_len
    token_times(one, batch, length, guidance_scale, 0)
    if two is not None:
        token_times(two, batch, 2, guidance_scale, 0)
    runs: list[list[dict[str, float]]] = []
    other: list[float] = []
    for seed in range(repeat):
        runs.append(token_times(one, batch, length, guidance_scale, seed))
        if two is not None:
            times = token_times(two, batch, min(num_iter, two.config.seq_len), guidance_scale, seed)
            other.append(sum(sum(step.values()) for step in times))
    outer = [statistics.median(run[i]["outer"] for run in runs) for i in range(length)]
    inner = [statistics.median(run[i]["inner"] for run in runs) for i in range(length)]
    total = statistics.median(sum(sum(step.values()) for step in run) for run in runs)
    report: dict[str, Any] = {
        "machine": machine(),
        "gemm_peak_gflops": gemm_peak() / 1e9,
        "batch": batch,
        "guidance_scale": guidance_scale,
        "precision": one.precision,
        "causal_s_per_image": total / batch,
        "outer_ms_per_token": [1e3 * t for t in outer],
        "inner_ms_per_token": [1e3 * t for t in inner],
        "flatness_last_over_first_quarter": flatness(outer),
        "peak_memory_gb": peak_memory(),
    }
    click.echo(
        f"causal: {total / batch:.3g} s per image without VAE; outer {1e3 * statistics.median(outer):.3g} ms, inner "
        f"{1e3 * statistics.median(inner):.3g} ms per token; last quarter / first quarter {flatness(outer):.3f}"
    )
    if other:
        masked_total = statistics.median(other)
        report |= {"masked_s_per_image": masked_total / batch, "masked_over_causal": masked_total / total}
        click.echo(
            f"masked: {masked_total / batch:.3g} s per image without VAE in {num_iter} steps; {masked_total / total:.1f} x"
        )
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
