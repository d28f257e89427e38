"""How time and memory grow: with outer steps, with the batch, with pipelines side by side, over many calls.

    python -m benchmarks.scaling BUNDLE --precision int8 --json out.json
    python -m benchmarks.scaling BUNDLE --measure memory --measure start

On the CPU. What is compared is interleaved, so that whatever else the machine does slows both alike; medians are reported.

iterations   time of 256 outer steps over that of 64, batch 1 (the model's tokens and a quarter of them, where it has fewer).
batch        time per image at batch 1, 4, 16.
concurrency  K pipelines in threads of one process, and K processes, each with cores / K threads, against one pipeline with
             all cores doing the same work: one image at a time. Above 1: side by side is faster.
memory       resident size over many calls in this process, after a warm-up: does it stay?
start        fresh processes: to import the runtime, to open the bundle, and the peak memory of one image.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from arinar.files import check_writable, write_text
from arinar.measure.bench import fresh_environment, fresh_process
from arinar.runtime import Pipeline
from arinar.runtime.machine import machine, usable_cores

BACKEND = "onnxruntime-cpu"
STATM = Path("/proc/self/statm")


def say(line: str) -> None:
    click.echo(line, err=True)


class Setup:
    """The bundle and how images are made of it, the same for every measure."""

    def __init__(self, bundle: Path, precision: str | None, num_iter: int | None, guidance_scale: float | None) -> None:
        self.pipeline = Pipeline.load(bundle, backend=BACKEND, precision=precision)
        self.bundle, self.precision = bundle, self.pipeline.precision
        defaults = self.pipeline.bundle.manifest.defaults
        self.num_iter = self.pipeline.resolve([0], num_iter=num_iter).num_iter
        self.guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale

    def open(self, threads: int) -> Pipeline:
        """One more pipeline on the bundle; its hashes have been verified."""
        return Pipeline.load(self.bundle, backend=BACKEND, precision=self.precision, threads=threads, verify=False)

    def seconds(self, batch: int, num_iter: int, seed: int = 0) -> float:
        """Time of one micro-batch."""
        start = time.perf_counter()
        self.make(self.pipeline, batch, num_iter, seed)
        return time.perf_counter() - start

    def make(self, pipeline: Pipeline, batch: int, num_iter: int, seed: int) -> None:
        labels = [i % pipeline.config.num_classes for i in range(batch)]
        pipeline.generate(labels, guidance_scale=self.guidance_scale, num_iter=num_iter, seed=seed, batch_size=batch)


def interleaved(works: dict[str, Callable[[int], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each, all in turn, after a round of warm-up. Each is called with the number of its round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(-1, repeats):
        for name, work in works.items():
            seconds = work(max(round_, 0))
            say(f"  {name}: {seconds:.3g} s{' (warm-up)' if round_ < 0 else ''}")
            if round_ >= 0:
                times[name].append(seconds)
    return {name: statistics.median(runs) for name, runs in times.items()}


# -------------------------------------------------------------------------------------------------- the measures


def iterations(setup: Setup, repeats: int) -> dict[str, Any]:
    """Seconds per image with many outer steps and with few, at batch 1."""
    length = setup.pipeline.config.seq_len
    if setup.pipeline.config.outer == "causal":
        say(f"  a causal model always takes {length} steps: nothing to compare")
        return {"num_iter": [length], "s_per_image": [], "ratio": None}
    many = min(256, length)
    few = max(1, min(64, many // 4))
    say(f"  {few} and {many} steps")
    found = interleaved({f"{n} steps": partial(setup.seconds, 1, n) for n in (few, many)}, repeats)
    seconds = list(found.values())
    return {"num_iter": [few, many], "s_per_image": seconds, "ratio": seconds[1] / seconds[0]}


def batches(setup: Setup, repeats: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Seconds per image at each batch size."""
    found = interleaved({f"batch {n}": partial(setup.seconds, n, setup.num_iter) for n in sizes}, repeats)
    seconds = [total / size for total, size in zip(found.values(), sizes, strict=True)]
    return {"batch": list(sizes), "s_per_image": seconds, "times_faster": [seconds[0] / s for s in seconds]}


def concurrency(setup: Setup, repeats: int, workers: int, images: int) -> dict[str, Any]:
    """Seconds for workers * images single images: one pipeline on all cores, pipelines in threads, in processes."""
    cores = usable_cores()
    threads = max(1, cores // workers)
    alone = setup.open(cores)
    side_by_side = [setup.open(threads) for _ in range(workers)]

    def several(pipeline: Pipeline, count: int, seed: int) -> None:
        for i in range(count):
            setup.make(pipeline, 1, setup.num_iter, seed + i)

    def one_pipeline(seed: int) -> float:
        start = time.perf_counter()
        several(alone, workers * images, seed)
        return time.perf_counter() - start

    with ThreadPoolExecutor(workers) as pool, worker_processes(setup, workers, threads, images) as processes:

        def in_threads(seed: int) -> float:
            start = time.perf_counter()
            list(pool.map(lambda pipeline: several(pipeline, images, seed), side_by_side))
            return time.perf_counter() - start

        def in_processes(seed: int) -> float:
            start = time.perf_counter()
            for process in processes:
                tell(process, str(seed))
            for process in processes:
                hear(process)
            return time.perf_counter() - start

        found = interleaved(
            {"one pipeline": one_pipeline, f"{workers} in threads": in_threads, f"{workers} processes": in_processes}, repeats
        )
    one, threaded, forked = found.values()
    return {
        "workers": workers,
        "threads_of_each": threads,
        "cores": cores,
        "images": workers * images,
        "seconds": {"one": one, "threads": threaded, "processes": forked},
        "throughput_ratio": {"threads": one / threaded, "processes": one / forked},
    }


# A pipeline in a process of its own: told a seed, it makes its images and answers.
WORKER = """
import json, sys
from pathlib import Path
from benchmarks.scaling import Setup
bundle, precision, num_iter, scale, threads, images = sys.argv[1:]
setup = Setup(Path(bundle), precision, int(num_iter), float(scale))
pipeline = setup.open(int(threads))
print("ready", flush=True)
for line in sys.stdin:
    for i in range(int(images)):
        setup.make(pipeline, 1, setup.num_iter, int(line) + i)
    print("done", flush=True)
"""


@contextmanager
def worker_processes(setup: Setup, count: int, threads: int, images: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that have loaded the bundle and wait to be told."""
    arguments = [setup.bundle, setup.precision, setup.num_iter, setup.guidance_scale, threads, images]
    command = [sys.executable, "-c", WORKER, *map(str, arguments)]
    processes: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=fresh_environment(),
                )
            )
        for process in processes:
            hear(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> None:
    """Wait for a worker's answer."""
    assert process.stdout is not None
    if not process.stdout.readline():
        raise RuntimeError("a worker process ended early; what it said stands above")


def memory(setup: Setup, calls: int, warm_up: int = 5) -> dict[str, Any]:
    """Resident size in MB (10^6 bytes) after each of many calls, batch 1.

    Allocators grow in single steps; a leak shows as a slope that the last half has too.
    """
    resident = []
    for call in range(-warm_up, calls):
        setup.seconds(1, setup.num_iter, seed=max(call, 0))
        if call >= 0:
            resident.append(resident_bytes() / 1e6)
        if call % 50 == 0:
            say(f"  call {call}: {resident[-1]:.1f} MB")
    return {
        "calls": calls,
        "first_mb": resident[0],
        "last_mb": resident[-1],
        "max_mb": max(resident),
        "slope_kb_per_call": 1e3 * slope(resident),
        "slope_of_last_half": 1e3 * slope(resident[calls // 2 :]),
        "resident_mb": [round(size, 2) for size in resident[:: max(1, calls // 20)]],
    }


def slope(values: Sequence[float]) -> float:
    """Change per value, by least squares."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0]) if len(values) > 1 else 0.0


def resident_bytes(pid: int | None = None) -> int:
    """Memory of a process, by default this one, that lies in RAM."""
    statm = STATM if pid is None else Path(f"/proc/{pid}/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


FRESH = """
import json, sys, time
start = time.perf_counter()
import arinar.runtime
imported = time.perf_counter()
bundle, precision, backend, num_iter, scale = sys.argv[1:]
pipe = arinar.runtime.Pipeline.load(bundle, precision=precision, backend=backend)
opened = time.perf_counter()
found = {"import_s": imported - start, "open_s": opened - imported}
if int(num_iter):
    from arinar.measure.bench import peak_memory
    pipe.generate([0], num_iter=int(num_iter), guidance_scale=float(scale), batch_size=1)
    found |= {"first_image_s": time.perf_counter() - opened, "peak_mb": 1e3 * peak_memory()}
print(json.dumps(found))
"""


def start(setup: Setup, repeats: int = 5) -> dict[str, Any]:
    """Medians over fresh processes: import and opening (hashes verified); one of them also makes an image."""
    arguments = [str(setup.bundle), setup.precision, BACKEND]
    runs = [fresh_process(FRESH, *arguments, "0", "1") for _ in range(repeats)]
    image = fresh_process(FRESH, *arguments, str(setup.num_iter), str(setup.guidance_scale))
    medians = {name: statistics.median(run[name] for run in runs) for name in ("import_s", "open_s")}
    return medians | {"first_image_s": image["first_image_s"], "one_image_peak_mb": image["peak_mb"]}


# ----------------------------------------------------------------------------------------------------- the command

MEASURES = ("memory", "start", "iterations", "batch", "concurrency")  # memory first, while nothing else has taken any


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"{report['bundle']} ({report['precision']}), guidance {report['guidance_scale']:g}, {report['num_iter']} steps; "
        f"{report['machine']['cpu']}, {report['machine']['cores']} cores"
    ]
    if (found := report.get("iterations")) and found["ratio"] is not None:
        (few, many), (short, long) = found["num_iter"], found["s_per_image"]
        lines.append(f"iterations   {few} steps {short:.3g} s, {many} steps {long:.3g} s: {found['ratio']:.2f} x")
    if found := report.get("batch"):
        lines += [
            f"batch {size:6} {seconds:.3g} s per image, {faster:.2f} x"
            for size, seconds, faster in zip(found["batch"], found["s_per_image"], found["times_faster"], strict=True)
        ]
    if found := report.get("concurrency"):
        for name, ratio in found["throughput_ratio"].items():
            lines.append(
                f"{name:12} {found['workers']} pipelines, threads of each: {found['threads_of_each']}; {ratio:.2f} x the "
                f"throughput of one with {found['cores']}"
            )
    if found := report.get("memory"):
        lines.append(
            f"memory       {found['calls']} calls: first {found['first_mb']:.1f} MB, last {found['last_mb']:.1f} MB, "
            f"most {found['max_mb']:.1f} MB, "
            f"{found['slope_kb_per_call']:+.2f} kB per call ({found['slope_of_last_half']:+.2f} in the last half)"
        )
    if found := report.get("start"):
        lines.append(
            f"start        import {found['import_s']:.3f} s, open {found['open_s']:.3f} s, then the first image "
            f"{found['first_image_s']:.3g} s; peak {found['one_image_peak_mb']:.0f} MB"
        )
    return "\n".join(lines)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--precision", help="Variant of the bundle. [default: fp32, or the only one]")
@click.option("--measure", "measures", multiple=True, type=click.Choice(MEASURES), help="May be repeated. [default: all]")
@click.option("--num-iter", type=int, help="Outer steps, where they are not what is measured. [default: the bundle's]")
@click.option("--guidance-scale", type=click.FloatRange(min=1), help="[default: the bundle's]")
@click.option("--batch", "sizes", multiple=True, type=click.IntRange(min=1), default=(1, 4, 16), show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds; medians are reported.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Pipelines side by side, K.")
@click.option("--images", type=click.IntRange(min=1), default=2, show_default=True, help="Images of each of them, in a round.")
@click.option("--calls", type=click.IntRange(min=1), default=200, show_default=True, help="Calls over which memory is watched.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    bundle: Path,
    precision: str | None,
    measures: tuple[str, ...],
    num_iter: int | None,
    guidance_scale: float | None,
    sizes: tuple[int, ...],
    repeats: int,
    workers: int,
    images: int,
    calls: int,
    json_path: Path | None,
) -> None:
    """How a bundle's time and memory grow on this machine's CPU."""
    measures = measures or MEASURES
    if "memory" in measures and not STATM.exists():
        raise click.UsageError(f"memory is read from {STATM}, which this system lacks; choose others with --measure")
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(json_path)
    setup = Setup(bundle, precision, num_iter, guidance_scale)
    works: dict[str, Callable[[], dict[str, Any]]] = {
        "memory": lambda: memory(setup, calls),
        "start": lambda: start(setup),
        "iterations": lambda: iterations(setup, repeats),
        "batch": lambda: batches(setup, repeats, sizes),
        "concurrency": lambda: concurrency(setup, repeats, workers, images),
    }
    report: dict[str, Any] = {
        "machine": machine(),
        "bundle": setup.pipeline.bundle.folder.name,
        "backend": BACKEND,
        "precision": setup.precision,
        "guidance_scale": setup.guidance_scale,
        "num_iter": setup.num_iter,
        "repeats": repeats,
    }
    for name in MEASURES:
        if name in measures:
            say(name)
            report[name] = works[name]()
            if json_path is not None:  # after each: a run that dies leaves what it had
                write_text(json_path, json.dumps(report, indent=2) + "\n")
    click.echo(table(report))


if __name__ == "__main__":
    main()
