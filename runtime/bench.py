"""How fast a bundle is on this machine: time by phase, memory, cold start, and the share of what the machine can do."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arinar.config import VaeConfig

from .cost import image_cost
from .pipeline import Pipeline, check_num_iter


def machine() -> dict[str, Any]:
    """What a result depends on: processor, cores this process may use, versions, the date."""
    model, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for name in ("onnxruntime", "tensorrt", "torch"):
        if name in sys.modules:
            versions[name] = str(getattr(sys.modules[name], "__version__", "?"))
    return {"cpu": model, "cores": cores, "versions": versions, "date": time.strftime("%Y-%m-%d")}


def gemm_peak(size: int = 2048, repeats: int = 5) -> float:
    """Float32 operations per second of NumPy's matrix product on this machine, the best of a few."""
    a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return float(2 * size**3 / best)


def bench(
    pipeline: Pipeline,
    *,
    batches: Sequence[int] = (1, 4),
    num_iters: Sequence[int] | None = None,
    guidance_scale: float | None = None,
    repeats: int = 3,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time whole generations, after a warm-up, rounds of all settings interleaved.

    Returns JSON-ready numbers: per setting the median and spread of seconds per image, the split by phase, and the
    achieved share of the measured GEMM peak; peak memory of this process; cold start of a fresh one.
    """
    say = progress or (lambda line: None)
    config, defaults = pipeline.config, pipeline.bundle.manifest.defaults
    scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    iters = [check_num_iter(n, defaults.num_iter, config) for n in (num_iters or (None,))]
    vae = pipeline.bundle.manifest.provenance.get("vae_config")
    say("cold start in a fresh process")
    cold = cold_start(pipeline.bundle.folder, pipeline.precision, pipeline.backend.name)
    peak = gemm_peak()
    settings = [(batch, num_iter) for batch in batches for num_iter in iters]
    times: dict[tuple[int, int], list[dict[str, float]]] = {setting: [] for setting in settings}
    for repeat in range(-1, repeats):  # the first round warms up
        for batch, num_iter in settings:
            labels = [i % config.num_classes for i in range(batch)]
            made = pipeline.generate(labels, guidance_scale=scale, num_iter=num_iter, seed=max(repeat, 0), batch_size=batch)
            if repeat >= 0:
                times[batch, num_iter].append(made.timings)
            say(f"batch {batch}, {num_iter} steps: {made.timings['total'] / batch:.3g} s per image")
    results = []
    for (batch, num_iter), runs in times.items():
        totals = sorted(run["total"] / batch for run in runs)
        cost = image_cost(
            config, num_iter, guided=scale != 1.0, vae=VaeConfig.from_dict(vae) if vae else None
        )
        seconds = statistics.median(totals)
        results.append({
            "batch": batch, "num_iter": num_iter, "s_per_image": seconds, "fastest": totals[0], "slowest": totals[-1],
            "phases": {
                name: statistics.median(run[name] / batch for run in runs) for name in runs[0] if name != "total"
            },
            "tera_operations_per_image": cost.total / 1e12,
            "floor_s_per_image": cost.total / peak,
            "share_of_gemm_peak": cost.total / peak / seconds,
        })  # fmt: skip
    return {
        "bundle": pipeline.bundle.folder.name, "backend": pipeline.backend.name, "precision": pipeline.precision,
        "guidance_scale": scale, "machine": machine(), "gemm_peak_gflops": peak / 1e9, "cold_start": cold,
        "peak_memory_gb": peak_memory(), "results": results,
    }  # fmt: skip


def peak_memory() -> float:
    """Largest resident size of this process so far, in GB (10^9 bytes)."""
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 1e6 if sys.platform != "darwin" else size / 1e9  # kilobytes on Linux, bytes on macOS


COLD_START = """
import json, sys, time
start = time.perf_counter()
from arinar.runtime import Pipeline
imported = time.perf_counter()
pipe = Pipeline.load(sys.argv[1], precision=sys.argv[2], backend=sys.argv[3])
opened = time.perf_counter()
pipe.loop.prepare(True)
ready = time.perf_counter()
print(json.dumps({"import_s": imported - start, "open_s": opened - imported, "sessions_s": ready - opened}))
"""


def cold_start(bundle: Path, precision: str, backend: str) -> dict[str, float]:
    """Seconds to import the runtime, to open and verify the bundle, and to load its graphs, in a fresh process."""
    command = [sys.executable, "-c", COLD_START, str(bundle), precision, backend]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"a fresh process could not load the bundle: {done.stderr.strip().splitlines()[-1]}")
    return {name: float(value) for name, value in json.loads(done.stdout).items()}


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    where = report["machine"]
    lines = [
        f"{report['bundle']} ({report['precision']}) on {report['backend']}, {where['cpu']}, {where['cores']} cores, "
        f"GEMM peak {report['gemm_peak_gflops']:.0f} GFLOP/s",
        "batch  steps  s/image   outer   inner     vae  floor s  of peak",
    ]
    for row in report["results"]:
        phases = row["phases"]
        lines.append(
            f"{row['batch']:5}  {row['num_iter']:5}  {row['s_per_image']:7.3g} "
            + " ".join(f"{phases.get(name, float('nan')):7.3g}" for name in ("outer", "inner", "vae"))
            + f"  {row['floor_s_per_image']:7.3g}  {row['share_of_gemm_peak']:6.0%}"
        )
    cold = report["cold_start"]
    lines.append(
        f"cold start: import {cold['import_s']:.2f} s, open {cold['open_s']:.2f} s, graphs {cold['sessions_s']:.2f} s; "
        f"peak memory {report['peak_memory_gb']:.2f} GB"
    )
    return "\n".join(lines)


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Two reports, setting by setting: how many times faster ``after`` is."""
    old = {(row["batch"], row["num_iter"]): row for row in before["results"]}
    lines = ["batch  steps   before    after  times faster"]
    for row in after["results"]:
        known = old.get((row["batch"], row["num_iter"]))
        if known:
            lines.append(
                f"{row['batch']:5}  {row['num_iter']:5}  {known['s_per_image']:7.3g}  {row['s_per_image']:7.3g}  "
                f"{known['s_per_image'] / row['s_per_image']:.2f}"
            )
    return "\n".join(lines)


__all__ = ["bench", "cold_start", "compare", "gemm_peak", "machine", "peak_memory", "table"]
