"""Very many images: images per second with and without Ray, memory, what evaluation takes, and a run whose parts are killed.

    python -m benchmarks.sample rates BUNDLE --images 2000 --workers 0,1,2
    python -m benchmarks.sample memory BUNDLE --images 10000
    python -m benchmarks.sample kills BUNDLE --images 500 --kills 20
    python -m benchmarks.sample head --tasks 20000
    python -m benchmarks.sample precision DIGITS-BUNDLE --images 2000

Every command prints JSON, and runs `arinar sample` and `arinar evaluate` in processes of their own. ``precision`` is for a
bundle with the variants fp32 and int8: what int8 costs in FID, beside what another seed does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import stdev
from typing import Any

import click

from arinar.runtime.machine import machine

WORKER = b"ray::_Worker"


def say(line: str) -> None:
    click.echo(line, err=True)


def finish(report: dict[str, Any]) -> None:
    click.echo(json.dumps({**report, "machine": machine(("numpy", "onnxruntime", "ray"))}, indent=2))


def arinar(*words: object) -> tuple[dict[str, Any], float, float]:
    """A command of its own -> what it printed, seconds, its peak resident memory in MB (without that of Ray's processes)."""
    command = [sys.executable, "-m", "arinar", *map(str, words), "--json"]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        if status:
            raise click.ClickException(f"failed: {' '.join(command)}")
        out.seek(0)
        return json.load(out), seconds, usage.ru_maxrss / 1024


def workers() -> list[int]:
    """Processes that Ray gave the name of our workers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(WORKER):
                found.append(int(folder.name))
    return found


@contextlib.contextmanager
def watched_workers() -> Iterator[dict[int, float]]:
    """While inside, the peak resident memory of every worker in MB, by process."""
    peaks: dict[int, float] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            for pid in workers():
                with contextlib.suppress(OSError, StopIteration):
                    lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
                    peaks[pid] = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()


def pace(folder: Path) -> float:
    """Images per second from the end of a run's first shard to that of its last one: without start and end."""
    times = sorted(path.stat().st_mtime_ns / 1e9 for path in (folder / "shards").glob("0*.npz"))
    size = json.loads((folder / "run.json").read_text())["run"]["shard_size"]
    return float((len(times) - 1) * size / (times[-1] - times[0]))


@click.group()
def main() -> None:
    """Measure `arinar sample` and `arinar evaluate`."""


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--images", type=int, default=2000, show_default=True)
@click.option("--workers", "counts", default="0,1,2", show_default=True)
@click.option("--batch-size", type=int, default=16, show_default=True)
def rates(bundle: Path, images: int, counts: str, batch_size: int) -> None:
    """Images per second: of the whole command, and between its first and its last shard (no start, no end)."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in map(int, counts.split(",")):
            folder = Path(scratch) / str(count)
            words = ("sample", bundle, "-n", images, "-o", folder, "--workers", count, "--batch-size", batch_size)
            with watched_workers() as peaks:
                _, seconds, memory = arinar(*words)
            rate = pace(folder)
            rows.append(
                {
                    "workers": count,
                    "seconds": seconds,
                    "images_per_s": images / seconds,
                    "images_per_s_while_making": rate,
                    "memory_mb": memory,
                    "worker_memory_mb": sorted(peaks.values()),
                }
            )
            say(json.dumps(rows[-1]))
    finish({"images": images, "batch_size": batch_size, "rows": rows})


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--images", type=int, default=10_000, show_default=True)
@click.option("--num-iter", type=int, default=2, show_default=True, help="Few: memory does not depend on it.")
def memory(bundle: Path, images: int, num_iter: int) -> None:
    """Peak memory of one process that makes many images, and of judging them; and how long that takes."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in (images // 10, images):
            folder = Path(scratch) / str(count)
            _, made, sampling = arinar("sample", bundle, "-n", count, "-o", folder, "--num-iter", num_iter)
            _, judged, evaluating = arinar("evaluate", folder, "--reference", folder)
            rows.append(
                {
                    "images": count,
                    "sample_seconds": made,
                    "sample_mb": sampling,
                    "evaluate_seconds": judged,
                    "evaluate_mb": evaluating,
                    "npz_mb": next(folder.glob("*.npz")).stat().st_size / 1e6,
                }
            )
            say(json.dumps(rows[-1]))
    finish({"num_iter": num_iter, "rows": rows})


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--images", type=int, default=500, show_default=True)
@click.option("--kills", type=int, default=20, show_default=True)
@click.option("--workers", "count", type=int, default=2, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def kills(bundle: Path, images: int, kills: int, count: int, seed: int) -> None:
    """A run whose workers, and now and then whose command, are killed at random; then the same run in one process.

    Exit code 1 where they differ in a byte."""
    rng, killed = random.Random(seed), {"worker": 0, "command": 0}
    with tempfile.TemporaryDirectory() as scratch:
        words = ("sample", bundle, "-n", images, "--batch-size", 4, "--shard-size", 4, "--num-iter", 4)
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        arinar(*words, "-o", whole)
        command = [sys.executable, "-m", "arinar", *map(str, (*words, "-o", broken, "--workers", count, "--json"))]
        ends: list[str] = []  # why the command ended before the run did
        while len(ends) <= 3 * kills:
            with tempfile.TemporaryFile("w+") as errors:
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
                _kill_parts(process, rng, killed, kills)
                if process.wait() == 0:
                    break
                errors.seek(0)
                last = errors.read().replace("\r", "\n").strip().splitlines()
                ends.append("killed" if process.returncode < 0 else last[-1] if last else "?")
        else:
            raise click.ClickException("the run does not come to an end")
        same = _hashes(whole) == _hashes(broken)
        finish({"images": images, "workers": count, "killed": killed, "ends": ends, "same_bytes": same})
    if not same:
        raise SystemExit(1)


def _kill_parts(process: subprocess.Popen[bytes], rng: random.Random, killed: dict[str, int], most: int) -> None:
    """Kill until the process has ended, or enough has been killed."""
    while process.poll() is None:
        time.sleep(rng.uniform(0.5, 4))
        there = workers()
        if sum(killed.values()) >= most or not there:
            continue
        kind = "command" if rng.random() < 0.2 else "worker"
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid if kind == "command" else rng.choice(there), signal.SIGKILL)
            killed[kind] += 1
            say(f"killed a {kind}: {killed}")


def _hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.json" and path.name[0] != "."]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def nothing() -> Any:
    """Makes a task that does nothing, and tells what a shard's maker would tell."""
    return lambda number: (number, "0" * 64)


@main.command()
@click.option("--tasks", type=int, default=20_000, show_default=True)
@click.option("--workers", "count", type=int, default=2, show_default=True)
def head(tasks: int, count: int) -> None:
    """What a task costs the command besides its work, in time and memory: empty tasks, as many as shards of a large run."""
    import resource

    from arinar.serve.pool import RayPool

    rows = []
    with RayPool(count) as pool:
        for number in (tasks // 10, tasks):
            began = time.perf_counter()
            results = list(pool(nothing, range(number)))
            seconds = time.perf_counter() - began
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            rows.append({"tasks": len(results), "seconds": seconds, "tasks_per_s": number / seconds, "peak_mb": peak})
            say(json.dumps(rows[-1]))
    finish({"workers": count, "rows": rows})


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--images", type=int, default=2000, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Keep the runs in this folder.")
@click.option("--workers", "count", type=int, default=0, show_default=True)
def precision(bundle: Path, images: int, out: Path | None, count: int) -> None:
    """What int8 costs: int8 against fp32 of the same seed, beside fp32 of another seed; and all of them against real digits."""
    with contextlib.ExitStack() as stack:
        scratch = out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs = {"fp32": ("fp32", 0), "int8": ("int8", 0), "fp32, another seed": ("fp32", 1)}
        seconds = {}
        for name, (variant, seed) in runs.items():
            place = scratch / f"{variant}-{seed}"
            words = ("sample", bundle, "-n", images, "-o", place, "--precision", variant, "--seed", seed, "--workers", count)
            _, seconds[name], _ = arinar(*words, "--batch-size", 16)
            say(f"{name}: {seconds[name]:.0f} s")
        first, int8, other = (scratch / f"{variant}-{seed}" for variant, seed in runs.values())
        found = {
            "int8 against fp32": arinar("evaluate", int8, "--reference", first, "--floor", other)[0],
            "fp32 against the digits": arinar("evaluate", first, "--reference", "digits")[0],
            "int8 against the digits": arinar("evaluate", int8, "--reference", "digits")[0],
            "fp32, another seed, against the digits": arinar("evaluate", other, "--reference", "digits")[0],
        }
        change = {name: found[f"{name} against the digits"]["replicates"] for name in ("int8", "fp32")}
        paired = stdev(mine - theirs for mine, theirs in zip(change["int8"], change["fp32"], strict=True))
        for evaluation in found.values():
            del evaluation["replicates"]
        finish({"images": images, "seconds": seconds, "std_of_the_difference_to_the_digits": paired, "evaluations": found})


if __name__ == "__main__":
    main()
