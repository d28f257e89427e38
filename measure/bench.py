"""How fast a bundle is on this machine: time by phase, memory, cold start, and the share of what the machine can do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from arinar.reading import read_json
from arinar.runtime.machine import machine
from arinar.runtime.pipeline import Pipeline
from arinar.runtime.request import MOST_AT_A_TIME, with_sampling_steps
from arinar.schemes import SCHEMES
from arinar.values import entry, integer, items, mapping, number, text

from .cost import Cost, image_cost
from .peaks import copy_bandwidth, gemm_peak, onnxruntime_peak

#: What each phase is; they add up to the total.
PHASES = {
    "outer": "outer network",
    "inner": "inner network with sampling",
    "vae": "VAE decoder",
    "device": "all graphs, on the device",
    "python": "Python: loop, noise, PIL images, loading graphs",
}
COLD_PHASES = {"import_s": "import", "open_s": "open and verify", "sessions_s": "load the graphs"}


def bench(
    pipeline: Pipeline,
    *,
    batches: Sequence[int] = (1, 4),
    num_iters: Sequence[int] | None = None,
    sampling_steps: str | None = None,
    guidance_scale: float | None = None,
    repeats: int = 3,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time whole generations, after a warm-up, rounds of all settings interleaved.

    Returns JSON-ready numbers: per setting the seconds per image (median, fastest, slowest), the split of the median run
    by phase, and on a CPU two floors (operations at the measured GEMM peak, weight bytes at the measured memory
    bandwidth, both with the pipeline's threads); peak memory of this process; cold start of a fresh one.
    """
    say = progress or (lambda line: None)
    config, manifest = with_sampling_steps(pipeline.config, sampling_steps), pipeline.bundle.manifest
    chosen: dict[str, Any] = {"sampling_steps": sampling_steps}
    asked = [pipeline.resolve([0], guidance_scale=guidance_scale, num_iter=n, **chosen) for n in (num_iters or (None,))]
    scale, iters = float(asked[0].guidance_scale[0]), [sampling.num_iter for sampling in asked]
    for batch in batches:
        integer("batch", batch, 1, MOST_AT_A_TIME)
    settings = list(dict.fromkeys((batch, num_iter) for batch in batches for num_iter in iters))
    say("cold start in a fresh process")
    told = pipeline.backend.describe()
    low_memory, threads = bool(told.get("low_memory")), told.get("threads")  # a GPU's backend has neither
    options = {"low_memory": True} if low_memory else {}
    cold = cold_start(pipeline.bundle.folder, pipeline.precision, pipeline.backend.name, **options)
    runs: dict[tuple[int, int], list[dict[str, float]]] = {setting: [] for setting in settings}
    for repeat in range(-1, repeats):  # the first round warms up
        for batch, num_iter in settings:
            labels = [i % config.num_classes for i in range(batch)]
            how: dict[str, Any] = {"guidance_scale": scale, "num_iter": num_iter, "batch_size": batch, **chosen}
            made = pipeline.generate(labels, seed=max(repeat, 0), **how)
            if repeat >= 0:
                runs[batch, num_iter].append({name: seconds / batch for name, seconds in made.timings.items()})
            say(f"batch {batch}, {num_iter} steps: {made.timings['total'] / batch:.3g} s per image")
    memory = peak_memory()  # before the peaks are measured, which takes memory too
    scheme = manifest.scheme(pipeline.precision)
    peaks: dict[str, float] = {}
    if threads is not None and not SCHEMES[scheme].runs:  # on the CPU, in what ONNX Runtime computes in
        say("what the machine can do: matrix products, copying memory")
        peaks = machine_peaks(scheme, threads)
    results = []
    for (batch, num_iter), times in runs.items():
        cost = image_cost(config, num_iter, guided=scale != 1.0, vae=manifest.vae)
        result = {"batch": batch, "num_iter": num_iter} | spread(times) | floors(cost, batch, scheme, peaks)
        if peaks:
            result["share_of_gemm_peak"] = result["floor_s_per_image"] / result["s_per_image"]
        results.append(result)
    return {
        "bundle": pipeline.bundle.folder.name,
        "backend": pipeline.backend.name,
        "precision": pipeline.precision,
        "guidance_scale": scale,
        **({} if asked[0].sampling_steps is None else {"sampling_steps": asked[0].sampling_steps}),
        "threads": threads,
        "low_memory": low_memory,
        "repeats": repeats,
        "machine": machine(),
        **peaks,
        "cold_start": cold,
        "peak_memory_gb": memory,
        "results": results,
    }


def spread(times: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Seconds per image of several runs -> the median run's total and phases, which add up to it, and the extremes."""
    ordered = sorted(times, key=lambda run: run["total"])
    middle = ordered[len(ordered) // 2]
    phases = {name: seconds for name, seconds in middle.items() if name != "total"}
    phases["python"] = middle["total"] - sum(phases.values())
    return {
        "s_per_image": middle["total"],
        "fastest": ordered[0]["total"],
        "slowest": ordered[-1]["total"],
        "phases": phases,
    }


def machine_peaks(scheme: str, threads: int | None) -> dict[str, float]:
    """The measured limits of this machine that matter for a scheme."""
    peaks = {
        "gemm_peak_gflops": onnxruntime_peak("float32", threads) / 1e9,
        "copy_gb_per_s": copy_bandwidth(threads) / 1e9,
    }
    if SCHEMES[scheme].integers:
        peaks["int8_peak_gops"] = onnxruntime_peak("int8", threads) / 1e9
    return peaks


def floors(cost: Cost, batch: int, scheme: str, peaks: dict[str, float]) -> dict[str, float]:
    """What an image takes at least, in operations, in bytes and, where the machine's limits are known, in seconds."""
    # The VAE of an fp16 variant may be in either precision, that of the others is in float32.
    size = cost.weight_bytes(SCHEMES[scheme].weight_bytes, batch=batch, vae_bytes=2 if scheme == "fp16" else 4)
    found = {"tera_operations_per_image": cost.total / 1e12, "weight_gb_per_image": size / 1e9}
    if peaks:
        linear = peaks.get("int8_peak_gops", peaks["gemm_peak_gflops"])
        found["floor_s_per_image"] = cost.seconds(1e9 * peaks["gemm_peak_gflops"], 1e9 * linear)
        found["memory_floor_s_per_image"] = size / (1e9 * peaks["copy_gb_per_s"])
    return found


def peak_memory() -> float:
    """Largest resident size of this process so far, in GB (10^9 bytes)."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells of a process counts the one that started it, too
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size * 1024 / 1e9 if sys.platform != "darwin" else size / 1e9  # kibibytes on Linux, bytes on macOS


COLD_START = """
import json, sys, time
start = time.perf_counter()
from arinar.runtime import Pipeline
imported = time.perf_counter()
pipe = Pipeline.load(sys.argv[1], precision=sys.argv[2], backend=sys.argv[3], **json.loads(sys.argv[4]))
opened = time.perf_counter()
pipe.loop.prepare(True)
ready = time.perf_counter()
print(json.dumps({"import_s": imported - start, "open_s": opened - imported, "sessions_s": ready - opened}))
"""


def cold_start(bundle: Path, precision: str, backend: str, **options: Any) -> dict[str, float]:
    """Seconds to import the runtime, to open and verify the bundle, and to load its graphs, in a fresh process."""
    found = fresh_process(COLD_START, str(bundle), precision, backend, json.dumps(options))
    return {name: float(value) for name, value in found.items()}


def fresh_process(code: str, *arguments: str) -> dict[str, Any]:
    """Run code in a new interpreter that imports from where this one does -> the JSON object that it prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=fresh_environment(), check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"a fresh process could not load the bundle: {last}")
    return dict(json.loads(done.stdout))


def fresh_environment() -> dict[str, str]:
    """This environment, with which a new interpreter imports from where this one does."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


# --------------------------------------------------------------------------------------------------------- reports


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    where = report["machine"]
    lines = [f"{report['bundle']} ({report['precision']}) on {backend_text(report)}, {where['cpu']}, {where['cores']} cores"]
    if limits := limits_text(report):
        lines.append(limits)
    names = [name for name in PHASES if any(name in row["phases"] for row in report["results"])]
    head = "".join(f"{name:>9}" for name in names)
    lines += [
        f"{'':22}{' of which, s ':->{9 * len(names)}}{' at least, s ':->18}",
        f"batch   steps  s/image{head}  compute   memory  of peak",
    ]
    for row in report["results"]:
        phases = "".join(f"{row['phases'].get(name, float('nan')):9.3g}" for name in names)
        least = "".join(_cell(row.get(key), "9.3g") for key in ("floor_s_per_image", "memory_floor_s_per_image"))
        share = _cell(row.get("share_of_gemm_peak"), "9.0%")
        lines.append(f"{row['batch']:5}{row['num_iter']:8}{row['s_per_image']:9.3g}{phases}{least}{share}")
    cold = report["cold_start"]
    lines.append(
        f"cold start: import {cold['import_s']:.2f} s, open {cold['open_s']:.2f} s, graphs {cold['sessions_s']:.2f} s; "
        f"peak memory {report['peak_memory_gb']:.2f} GB"
    )
    if against := report.get("against"):
        lines.append(f"against {compared_with(against)}:")
        lines.append("batch   steps   before    after  times faster" if against["results"] else "no setting in common")
        lines += [
            f"{row['batch']:5}{row['num_iter']:8}{row['before']:9.3g}{row['after']:9.3g}{row['times_faster']:14.2f}"
            for row in against["results"]
        ]
    return "\n".join(lines)


def backend_text(report: dict[str, Any]) -> str:
    """A report's backend, and whether it had to save memory."""
    return str(report["backend"]) + (", low memory" if report.get("low_memory") else "")


def limits_text(report: dict[str, Any]) -> str:
    """The measured limits of the machine as a line; empty where none were measured (on a GPU)."""
    units = {
        "gemm_peak_gflops": "fp32 GEMM {:.0f} GFLOP/s",
        "int8_peak_gops": "int8 GEMM {:.0f} GOP/s",
        "copy_gb_per_s": "memory copy {:.1f} GB/s",
    }
    found = [text.format(report[key]) for key, text in units.items() if key in report]
    threads = f"{report['threads']} thread" + ("s" if report["threads"] != 1 else "")
    return f"measured limits of {threads}: {', '.join(found)}" if found else ""


def _cell(value: float | None, form: str) -> str:
    return f"{'-':>9}" if value is None else f"{value:{form}}"


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What ``before`` was, and for the settings that it shares with ``after`` both times and how many times faster that is."""
    old = {(row["batch"], row["num_iter"]): row["s_per_image"] for row in before["results"]}
    results = [
        {
            "batch": row["batch"],
            "num_iter": row["num_iter"],
            "before": known,
            "after": row["s_per_image"],
            "times_faster": known / row["s_per_image"],
        }
        for row in after["results"]
        if (known := old.get((row["batch"], row["num_iter"]))) is not None
    ]
    where = before.get("machine", {})
    return {
        **{name: before.get(name, "?") for name in ("bundle", "precision", "backend", "guidance_scale")},
        **{name: where.get(name, "?") for name in ("cpu", "cores", "date")},
        "results": results,
    }


def compared_with(against: dict[str, Any]) -> str:
    """A comparison's earlier run as text."""
    return (
        f"{against['bundle']} ({against['precision']}) on {against['backend']}, {against['cpu']}, {against['cores']} cores, "
        f"{against['date']}, guidance {against['guidance_scale']}"
    )


def read_report(path: Path) -> dict[str, Any]:
    """A report that `arinar bench -o` wrote. Raises ValueError where the file cannot be read, or is another kind."""
    remedy = "name a JSON file that `arinar bench -o FILE` wrote"
    try:
        report = read_json(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}; {remedy}") from error
    except ValueError as error:  # neither text nor JSON
        raise ValueError(f"{path} is not JSON ({error}); {remedy}") from error
    try:
        return _checked(report)
    except ValueError as error:
        raise ValueError(f"{path} is not a report of `arinar bench` ({error}): {remedy}") from error


def _checked(report: Any) -> dict[str, Any]:
    """A report with what `compare` takes of it. Raises ValueError naming the first entry that is missing or wrong."""
    report = mapping("it", report)
    rows = items("results", entry("it", report, "results"))
    for place, row in enumerate(rows):
        for name in ("batch", "num_iter"):
            integer(f"results[{place}].{name}", entry(f"results[{place}]", row, name), 1)
        number(f"results[{place}].s_per_image", entry(f"results[{place}]", row, "s_per_image"), 0, strict=True)
    if not rows:
        raise ValueError("results has no entries")
    where = mapping("machine", entry("it", report, "machine"))
    text("machine.cpu", entry("machine", where, "cpu"))
    for name in ("bundle", "precision", "backend"):
        text(name, report.get(name, "?"))
    text("machine.date", where.get("date", "?"))
    integer("machine.cores", where.get("cores", 1), 1)
    number("guidance_scale", report.get("guidance_scale", 1))
    return report


__all__ = [
    "backend_text",
    "bench",
    "cold_start",
    "compare",
    "compared_with",
    "fresh_environment",
    "fresh_process",
    "gemm_peak",
    "peak_memory",
    "read_report",
    "table",
]
