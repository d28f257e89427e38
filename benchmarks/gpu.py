"""What a GPU machine can run, whether it is right there, and how fast: one run, one table, one JSON file.

    python -m benchmarks.gpu --json results.json          # on a GPU machine, from the root of a checkout
    python -m benchmarks.gpu --smoke --json smoke.json    # anywhere: tiny models on whatever there is

1. Which backends are possible here, and why the others are not.
2. Parity (`arinar parity`, levels 1 to 3) of the demo models and of full-size `base` with random weights.
3. Milliseconds per image of every GPU backend against the PyTorch reference on the same GPU: masked and causal, several
   batch sizes, guidance on, whole images (labels and noise in, uint8 pixels out), interleaved, medians.

The reference is `arinar.sampler.sample` with fp16 autocast, its 1000 proposals per feature drawn on the GPU, then the VAE.
Whatever fails is written down with its traceback, and the rest goes on; what does not fit into the time budget is
skipped, and named. Models are exported in child processes, all at a time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from arinar.runtime.machine import machine as this_machine
from arinar.text import aligned

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("onnxruntime-cpu", "onnxruntime-cuda", "tensorrt")
PACKAGES = (
    "arinar",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-lean",
    "tensorrt-rtx",
    "cuda-bindings",
    "numpy",
)
ROUNDS = 5


class Report:
    """Results as they come in, written to the file after each, so that a run that dies leaves what it had."""

    def __init__(self, path: Path | None, budget: float) -> None:
        self.path, self.budget, self.began = path, budget, time.monotonic()
        self.data: dict[str, Any] = {"budget_s": budget, "failures": [], "skipped": []}

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def say(self, line: str) -> None:
        click.echo(f"[{time.monotonic() - self.began:6.1f} s] {line}")
        sys.stdout.flush()

    def save(self) -> None:
        self.data["seconds"] = round(time.monotonic() - self.began, 1)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.data, indent=1, default=str) + "\n", encoding="utf-8")

    def skip(self, what: str, why: str) -> None:
        self.data["skipped"].append({"what": what, "why": why})
        self.say(f"skipped {what}: {why}")

    @contextlib.contextmanager
    def section(self, what: str) -> Iterator[None]:
        """A failure in here is written down, and ends here."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            last = str(error).strip().splitlines() or [""]
            self.say(f"FAILED {what}: {type(error).__name__}: {last[0][:300]}")
            self.data["failures"].append({"what": what, "error": repr(error), "traceback": traceback.format_exc()})
        finally:
            self.save()


# ------------------------------------------------------------------------------------------------ models and bundles


def models(name: str) -> tuple[Any, Any]:
    """A model and its VAE by name: demo models with their weights, presets and tiny ones with random weights."""
    import torch

    from arinar.checkpoint import load_arinar, load_vae
    from arinar.config import ArinarConfig, VaeConfig
    from arinar.model import Arinar, initialize, random_models
    from arinar.vae import AutoencoderKL

    if name.startswith("digits"):
        return load_arinar(name), load_vae(name)
    torch.manual_seed(0)  # on a GPU, the reference draws from its generator
    if not name.startswith("tiny"):
        return random_models(name)
    causal = name == "tiny-causal"
    config = ArinarConfig(
        outer="causal" if causal else "masked",
        img_size=32,
        vae_stride=8,
        vae_embed_dim=4,
        num_classes=10,
        buffer_size=3,
        encoder_width=32,
        encoder_depth=0 if causal else 1,
        encoder_heads=2,
        decoder_width=32,
        decoder_depth=1,
        decoder_heads=2,
        inner_width=32,
        inner_heads=2,
        num_gaussians=2,
        default_num_iter=4,
    )
    vae = AutoencoderKL(VaeConfig(4, 8, (1, 1, 1, 1), 1, encoder_attention_levels=(), norm_groups=4))
    return initialize(Arinar(config)).eval(), vae.eval()


def export(name: str, precision: str, out: Path) -> None:
    """In a child process: write a bundle."""
    from arinar.export.bundle import export_bundle

    def say(line: str) -> None:
        print(line, flush=True)

    export_bundle(*models(name), out, precision=precision, untrained=not name.startswith("digits"), progress=say)


class Exports:
    """Child processes that export, and their bundles."""

    def __init__(self, report: Report, folder: Path, given: dict[str, Path]) -> None:
        self.report, self.folder, self.given = report, folder, given
        self.running: dict[tuple[str, str], tuple[subprocess.Popen[bytes], Path, float]] = {}

    def start(self, name: str, precision: str) -> None:
        if name in self.given:
            return
        log = self.folder / f"{name}-{precision}.log"
        command = [sys.executable, "-m", "benchmarks.gpu", "--export", name, precision, str(self.out(name, precision))]
        threads = str(max(1, (os.cpu_count() or 1) // 4))  # several run at a time
        environment = {"OMP_NUM_THREADS": threads} | os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        self.running[name, precision] = process, log, time.monotonic()

    def out(self, name: str, precision: str) -> Path:
        return self.given.get(name, self.folder / f"{name}-{precision}")

    def bundle(self, name: str, precision: str) -> Path:
        """Wait for a bundle. Raises RuntimeError where its export failed, TimeoutError where it takes too long."""
        if (name, precision) in self.running:
            process, log, _ = self.running[name, precision]
            try:
                code = process.wait(max(1.0, self.report.left() - 20))
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"the export of {name} {precision} did not finish within the budget") from None
            text = log.read_text(errors="replace")
            if code:
                raise RuntimeError(f"the export of {name} {precision} ended with code {code}: {text[-3000:]}")
            notes = [line for line in text.splitlines() if line.startswith("NOTE")]
            self.report.data.setdefault("exports", {})[f"{name} {precision}"] = {"notes": notes}
        return self.out(name, precision)

    def stop(self) -> None:
        for process, _, _ in self.running.values():
            if process.poll() is None:
                process.terminate()


# ---------------------------------------------------------------------------------------------------- this machine


def machine() -> dict[str, Any]:
    found = this_machine(PACKAGES)
    found["python"] = found["versions"].pop("python")
    try:
        from arinar.runtime.backends.cuda import device_info, load_runtime

        info = device_info(load_runtime())
        found["gpu"] = {
            "name": info.name,
            "compute_capability": info.compute_capability,
            "memory_gib": round(info.memory / 2**30, 1),
            "cuda_of_driver": info.driver,
        }
    except Exception as error:
        found["gpu"], found["no_gpu"] = None, str(error)
    with contextlib.suppress(Exception):
        import torch  # before ONNX Runtime: it loads the CUDA libraries that both use

        found["torch_cuda"] = torch.version.cuda if torch.cuda.is_available() else None
    with contextlib.suppress(Exception):
        ort = importlib.import_module("onnxruntime")
        found["onnxruntime"] = {"version": ort.__version__, "providers": ort.get_available_providers()}
    return found


def used_memory() -> int:
    """Bytes of the GPU's memory in use, by anybody; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def build_engines(report: Report, bundle: Path, precision: str, batch: int, timeout: float) -> None:
    """Engines for this GPU, where a TensorRT library is installed."""
    from arinar.runtime.backends.tensorrt import installed

    name = next((name for name in ("tensorrt", "tensorrt_rtx") if installed(name)), None)
    if name is None or report.data["machine"]["gpu"] is None:
        return
    command = [
        sys.executable,
        "-m",
        "arinar",
        "build",
        str(bundle),
        "--backend",
        name.replace("_", "-"),
        "--precision",
        precision,
        "--batch",
        f"1:8:{batch}",
    ]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    seconds = round(time.monotonic() - started, 1)
    report.data.setdefault("engines", []).append(
        {
            "bundle": bundle.name,
            "library": name,
            "code": done.returncode,
            "seconds": seconds,
            "output": (done.stdout + done.stderr)[-4000:],
        }
    )


def open_pipeline(bundle: Path, backend: str, precision: str) -> Any:
    from arinar.runtime import Pipeline

    return Pipeline.load(bundle, backend=backend, precision=precision, verify=False)


def possible(report: Report, bundle: Path, precision: str) -> list[str]:
    """Backends that open this bundle."""
    names = []
    for backend in BACKENDS:
        try:
            pipeline = open_pipeline(bundle, backend, precision)
            pipeline.loop.prepare(guided=True)
            names.append(backend)
            verdict = "possible"
        except Exception as error:
            verdict = f"{type(error).__name__}: {error}"
            if not isinstance(error, ValueError):  # not one of the reasons that the runtime knows
                verdict += "\n" + traceback.format_exc()
        report.data.setdefault("backends", {})[f"{backend} {bundle.name}"] = verdict
        report.say(f"{backend} on {bundle.name}: {verdict.splitlines()[0][:200]}")
    return names


# -------------------------------------------------------------------------------------------------------- parity


def parity(report: Report, name: str, bundle: Path, precision: str, backend: str, num_iter: int, images: int) -> None:
    from arinar.measure.parity import run_parity

    pipeline = open_pipeline(bundle, backend, precision)
    model, vae = models(name)
    labels = [i % model.config.num_classes for i in range(images)]
    started = time.monotonic()
    result = run_parity(pipeline, model, vae, labels=labels, num_iter=num_iter)
    data = {k: v for k, v in result.to_dict().items() if k in ("precision", "backend", "settings", "passed", "checks")}
    data |= {"model": name, "seconds": round(time.monotonic() - started, 1)}
    report.data.setdefault("parity", []).append(data)
    report.say(f"parity of {name} {precision} on {backend}: {'passed' if result.passed else 'FAILED'}")
    if not result.passed:
        click.echo(result.table())


def experiment(bundle: Path, precision: str) -> dict[str, Any]:
    """In a child process: what ONNX Runtime says about nodes on the CPU, and whether its runs can be captured."""
    from arinar.runtime import Pipeline

    result: dict[str, Any] = {}
    with tempfile.TemporaryFile() as file:
        keep = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            pipeline = Pipeline.load(
                bundle, backend="onnxruntime-cuda", precision=precision, verify=False, log_severity=2, cuda_graphs=False
            )
            for guided in (True, False):
                pipeline.loop.prepare(guided)
        finally:
            os.dup2(keep, 2)
        file.seek(0)
        result["warnings"] = file.read().decode(errors="replace").splitlines()[-60:]
    want = [pipeline.generate([1, 0], seed=seed).tokens for seed in range(4)]
    result["repeatable"] = bool(np.array_equal(want[0], pipeline.generate([1, 0], seed=0).tokens))
    waiting = Pipeline.load(bundle, backend="onnxruntime-cuda", precision=precision, verify=False, wait=True, cuda_graphs=False)
    result["same_when_waiting"] = bool(np.array_equal(want[0], waiting.generate([1, 0], seed=0).tokens))
    print(json.dumps(result), flush=True)  # kept where the capture kills the process
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        captured = Pipeline.load(bundle, backend="onnxruntime-cuda", precision=precision, verify=False, cuda_graphs=True)
        have = [captured.generate([1, 0], seed=seed).tokens for seed in range(4)]
    result["captured"] = {
        "largest_error": [float(np.abs(a - b).max()) for a, b in zip(have, want, strict=True)],
        "warnings": [str(item.message) for item in caught],
    }
    return result


# -------------------------------------------------------------------------------------------------------- timing


class Reference:
    """Eager PyTorch on the GPU (or CPU), fp16 autocast there."""

    def __init__(self, name: str) -> None:
        import torch

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model, vae = models(name)
        self.model, self.vae = model.to(self.device), vae.to(self.device)

    def __call__(self, labels: Sequence[int], guidance_scale: float, num_iter: int, seed: int) -> Any:
        """One batch: uint8 images (B, H, W, 3) in host memory."""
        from arinar.model import decode_images
        from arinar.sampler import sample

        torch, config = self.torch, self.model.config
        autocast = torch.autocast("cuda", torch.float16) if self.device == "cuda" else contextlib.nullcontext()
        # Random numbers are drawn on the GPU, as the published code does.
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.no_grad(), autocast:
            tokens = sample(
                self.model,
                torch.tensor(list(labels)),
                guidance_scale=guidance_scale,
                num_iter=num_iter,
                generator=generator,
            )
            return np.concatenate([decode_images(self.vae, part, config).numpy() for part in tokens.float().split(4)])


def timed(function: Callable[[], Any]) -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(
    report: Report,
    name: str,
    pipelines: dict[str, Any],
    reference: Reference | None,
    batch: int,
    num_iter: int,
    scale: float,
    until: float,
    held: dict[str, int],
) -> None:
    """Median seconds of one batch size, the contenders taking turns. ``held``: bytes of device memory of each so far."""
    import torch

    classes = next(iter(pipelines.values())).config.num_classes
    labels = [i % classes for i in range(batch)]

    def generate(pipeline: Any, seed: int) -> Any:
        return pipeline.generate(labels, guidance_scale=scale, num_iter=num_iter, seed=seed, batch_size=batch)

    runs: dict[str, Callable[[int], Any]] = {}
    if reference is not None:
        runs["pytorch"] = functools.partial(reference, labels, scale, num_iter)
    for backend, pipeline in pipelines.items():
        runs[backend] = functools.partial(generate, pipeline)
    rows: dict[str, dict[str, Any]] = {}
    for contender, run in list(runs.items()):
        memory = used_memory()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        row = rows[contender] = {"model": name, "batch": batch, "contender": contender, "num_iter": num_iter}
        row["guidance_scale"] = scale
        try:
            # Warm-up: kernels are loaded and memory is taken; CUDA graphs are captured in the second run.
            pipeline = pipelines.get(contender)
            graphs = pipeline is not None and pipeline.backend.describe().get("cuda_graphs", False)
            row["warm_up_s"] = [round(timed(functools.partial(run, 0)), 4) for _ in range(2 if graphs else 1)]
            held[contender] = held.get(contender, 0) + max(0, used_memory() - memory)
            row["memory_gib"] = round(held[contender] / 2**30, 2)
            if contender == "pytorch" and torch.cuda.is_available():
                row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        except Exception as error:
            row["error"] = repr(error)
            report.data["failures"].append(
                {"what": f"{contender} {name} batch {batch}", "error": repr(error), "traceback": traceback.format_exc()}
            )
            report.say(f"FAILED {contender} {name} batch {batch}: {str(error)[:200]}")
            del runs[contender]
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()
    times: dict[str, list[float]] = {contender: [] for contender in runs}
    for round_ in range(ROUNDS):
        for contender, run in list(runs.items()):
            try:
                times[contender].append(timed(functools.partial(run, round_ + 1)))
            except Exception as error:
                rows[contender]["error"] = repr(error)
                del runs[contender]
        round_s = sum(values[-1] for values in times.values() if values)
        if time.monotonic() - report.began + round_s > until:
            break
    for contender, values in times.items():
        if values:
            rows[contender] |= {
                "ms_per_image": round(1000 * statistics.median(values) / batch, 3),
                "rounds": len(values),
                "fastest_ms": round(1000 * min(values) / batch, 3),
                "slowest_ms": round(1000 * max(values) / batch, 3),
            }
    base = rows.get("pytorch", {}).get("ms_per_image")
    for row in rows.values():
        if base and "ms_per_image" in row:
            row["ratio"] = round(base / row["ms_per_image"], 2)
        report.data.setdefault("timings", []).append(row)
        if "ms_per_image" in row:
            report.say(
                f"{name} batch {batch}: {row['contender']} {row['ms_per_image']:.1f} ms per image"
                + (f", {row['ratio']:.2f} x the reference" if "ratio" in row else "")
            )


def time_model(
    report: Report,
    name: str,
    bundle: Path,
    precision: str,
    backends: Sequence[str],
    batches: Sequence[int],
    num_iter: int,
    scale: float,
    until: float,
) -> None:
    """All batch sizes of one model, small ones first; a size is skipped where the last one says that it will not fit."""
    pipelines: dict[str, Any] = {}
    for backend in backends:
        with report.section(f"opening {name} on {backend}"):
            pipelines[backend] = open_pipeline(bundle, backend, precision)
    if not pipelines:
        return
    reference = None
    with report.section(f"the reference of {name}"):
        reference = Reference(name)
    config = next(iter(pipelines.values())).config
    num_iter = config.seq_len if config.outer == "causal" else min(num_iter, config.seq_len)
    last = (0, 0.0)
    held: dict[str, int] = {}
    for batch in batches:
        now = time.monotonic() - report.began
        # No batch takes longer per image than a smaller one; a warm-up, a capture and a round at least.
        if last[0] and now + 3 * last[1] * batch / last[0] > until + 60:
            report.skip(f"{name} batch {batch}", f"{until - now:.0f} s left of its share of the budget")
            continue
        if now > until:
            report.skip(f"{name} batch {batch}", "its share of the budget is used up")
            continue
        before = len(report.data.get("timings", []))
        with report.section(f"timing {name} batch {batch}"):
            race(report, name, pipelines, reference, batch, num_iter, scale, until, held)
        rows = report.data.get("timings", [])[before:]
        last = (batch, sum(row.get("ms_per_image", 0.0) for row in rows) * batch / 1000)


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = ("model", "batch", "contender", "ms per image", "fastest", "slowest", "ratio", "memory GiB", "rounds")
    lines = [head]
    for row in rows:
        lines.append(
            (
                row["model"],
                str(row["batch"]),
                row["contender"],
                f"{row['ms_per_image']:.2f}" if "ms_per_image" in row else row.get("error", "-")[:40],
                str(row.get("fastest_ms", "")),
                str(row.get("slowest_ms", "")),
                str(row.get("ratio", "")),
                str(row.get("peak_gib", row.get("memory_gib", ""))),
                str(row.get("rounds", "")),
            )
        )
    return "\n".join(aligned(lines))


# ---------------------------------------------------------------------------------------------------------- main


@click.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File to write the results to.")
@click.option("--budget", type=float, default=440.0, show_default=True, help="Seconds; what does not fit is skipped.")
@click.option("--smoke", is_flag=True, help="Tiny models, few steps: does the script work?")
@click.option("--precision", default="fp16", show_default=True, help="Of the timed graphs.")
@click.option("--batch", "batches", multiple=True, type=int, help="Batch sizes. [default: 1, 8, 64, 256]")
@click.option("--num-iter", type=int, default=64, show_default=True)
@click.option("--guidance-scale", type=float, default=4.5, show_default=True)
@click.option("--bundle", "given", multiple=True, help="NAME=PATH: a bundle that exists, instead of exporting NAME.")
@click.option("--cpu", "time_cpu", is_flag=True, help="Time the CPU backend as well, also where there is a GPU.")
@click.option("--export", "export_args", nargs=3, hidden=True, help="Of a child process: NAME PRECISION FOLDER.")
@click.option("--experiment", "experiment_args", nargs=2, hidden=True, help="Of a child process: BUNDLE PRECISION.")
def main(
    json_path: Path | None,
    budget: float,
    smoke: bool,
    precision: str,
    batches: tuple[int, ...],
    num_iter: int,
    guidance_scale: float,
    given: tuple[str, ...],
    time_cpu: bool,
    export_args: tuple[str, str, str] | None,
    experiment_args: tuple[str, str] | None,
) -> None:
    """Check and time the runtime on this machine's GPU."""
    if export_args:
        export(export_args[0], export_args[1], Path(export_args[2]))
        return
    if experiment_args:
        click.echo(json.dumps(experiment(Path(experiment_args[0]), experiment_args[1])))
        return
    report = Report(json_path, budget)
    report.data["settings"] = {"smoke": smoke, "precision": precision, "num_iter": num_iter, "guidance_scale": guidance_scale}
    with report.section("machine"):
        report.data["machine"] = machine()
        click.echo(json.dumps(report.data["machine"], indent=1, default=str))
    gpu = report.data.get("machine", {}).get("gpu") is not None
    demo = ("tiny",) if smoke else ("digits", "digits-causal")
    full = ("tiny", "tiny-causal") if smoke else ("base", "base-causal")
    sizes = batches or ((1, 2) if smoke else (1, 8, 64, 256))
    if smoke:
        num_iter, precision = min(num_iter, 3), "fp32"
    paths = {name: Path(path) for name, _, path in (item.partition("=") for item in given)}
    with tempfile.TemporaryDirectory(prefix="arinar-gpu-") as folder:
        exports = Exports(report, Path(folder), paths)
        try:
            wanted = {(name, p) for name in demo for p in ({"fp32"} if smoke else {"fp32", "fp16"})}
            wanted |= {(name, precision) for name in full}
            for name, kind in sorted(wanted):
                exports.start(name, kind)
            run(report, exports, demo, full, precision, sizes, num_iter, guidance_scale, gpu, time_cpu or not gpu, smoke)
        finally:
            exports.stop()
    rows = report.data.get("timings", [])
    if rows:
        where = json.dumps(report.data["machine"].get("gpu"))
        click.echo(f"\n{where} {precision}, {num_iter} steps, guidance {guidance_scale}")
        click.echo(table(rows))
    for item in report.data["failures"]:
        click.echo(f"failed: {item['what']}: {item['error'][:300]}")
    for item in report.data["skipped"]:
        click.echo(f"skipped: {item['what']}: {item['why']}")
    report.save()


def run(
    report: Report,
    exports: Exports,
    demo: Sequence[str],
    full: Sequence[str],
    precision: str,
    sizes: Sequence[int],
    num_iter: int,
    scale: float,
    gpu: bool,
    time_cpu: bool,
    smoke: bool,
) -> None:
    opened: dict[tuple[str, str], list[str]] = {}
    for name in demo:
        for kind in ("fp32",) if smoke else ("fp32", "fp16"):
            with report.section(f"{name} {kind}"):
                bundle = exports.bundle(name, kind)
                with report.section(f"engines of {name} {kind}"):
                    build_engines(report, bundle, kind, 64, max(30.0, report.left() / 4))
                opened[name, kind] = possible(report, bundle, kind)
                for backend in opened[name, kind]:
                    if backend == "onnxruntime-cpu" and gpu and not smoke:
                        continue  # the tests do that one
                    with report.section(f"parity of {name} {kind} on {backend}"):
                        parity(report, name, bundle, kind, backend, 3 if smoke else 8, 2 if smoke else 20)
    if any("onnxruntime-cuda" in names for names in opened.values()):
        with report.section("ONNX Runtime: nodes on the CPU, capture"):
            name, kind = next(key for key, names in opened.items() if "onnxruntime-cuda" in names)
            command = [sys.executable, "-m", "benchmarks.gpu", "--experiment", str(exports.out(name, kind)), kind]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            report.data["onnxruntime_experiment"] = {
                "code": done.returncode,
                "result": json.loads(lines[-1]) if lines else None,
                "stderr": done.stderr[-2000:],
            }
    for name in full:  # before anything is timed: exports keep the processor busy
        with report.section(f"export of {name}"):
            exports.bundle(name, precision)
    for index, name in enumerate(full):
        with report.section(name):
            bundle = exports.bundle(name, precision)
            share = report.left() / (len(full) - index)
            until = time.monotonic() - report.began + share - 10
            with report.section(f"engines of {name}"):
                build_engines(report, bundle, precision, max(sizes), max(30.0, share / 2))
            backends = possible(report, bundle, precision)
            contenders = [b for b in backends if b != "onnxruntime-cpu" or time_cpu]
            # First what nothing else can show; parity runs its reference on the CPU and waits.
            time_model(report, name, bundle, precision, contenders, sizes, num_iter, scale, until - min(60.0, share / 4))
            for backend in contenders:
                left = until - (time.monotonic() - report.began)
                if left < (5 if smoke else 30):
                    report.skip(f"parity of {name} on {backend}", f"{left:.0f} s left of its share of the budget")
                    continue
                with report.section(f"parity of {name} on {backend}"):
                    parity(report, name, bundle, precision, backend, 3 if smoke else 8, 1)


if __name__ == "__main__":
    main()
