"""What fewer bits cost: precision against size, error of z, divergence of the mixtures, classifier agreement, Frechet
distance. Writes ``benchmarks/results/precision-MODEL.json`` and ``.md``.

    python -m benchmarks.precision --model digits --samples 1000
    python -m benchmarks.precision --model base --samples 0 --num-iter 4 --images 1 --calibration-images 4 --no-search

The second is for random weights: errors only, and no search (which runs the model a few hundred times).

Rows that say "all layers" quantise every layer that is wide enough, so that they differ in their ranges alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from arinar.calibration.collect import collect_random
from arinar.calibration.precision import DEFAULT_BUDGET_KL, Evaluator, calibrate, layer_plan
from arinar.calibration.recording import Recording
from arinar.checkpoint import load_arinar, load_vae
from arinar.config import PRESETS
from arinar.demo import DEMO_MODELS
from arinar.export.bundle import export_bundle
from arinar.export.layers import LayerPlan
from arinar.export.quantize import Calibration, quantize_bundle, variant_bytes
from arinar.measure.checks import parse_thresholds as thresholds_of
from arinar.measure.distribution import References, compare, make_references
from arinar.measure.parity import add_distribution, run_parity
from arinar.measure.parity_report import write_report
from arinar.model import Arinar, random_models
from arinar.runtime import Pipeline
from arinar.runtime.bundle import Bundle
from arinar.schemes import QUANTIZED
from arinar.vae import AutoencoderKL

RESULTS = Path(__file__).parent / "results"
# Calibration and the sampled sets use seeds 0 and 1: errors are measured on other trajectories.
PARITY_SEED = 1000


def load(name: str) -> tuple[Arinar, AutoencoderKL, str]:
    if name in DEMO_MODELS:
        return load_arinar(name), load_vae(name), "the shipped weights"
    return *random_models(name), "random weights (seed 0)"


def measure(
    folder: Path,
    variant: str,
    model: Arinar,
    vae: AutoencoderKL,
    options: argparse.Namespace,
    references: References | None,
    report: Path | None,
) -> dict[str, Any]:
    """One row of the table."""
    pipeline = Pipeline.load(folder, precision=variant, threads=options.threads)
    labels = [i % model.config.num_classes for i in range(options.images)]
    began = time.perf_counter()
    found = run_parity(pipeline, model, vae, labels=labels, num_iter=options.num_iter, seed=PARITY_SEED)
    if references is not None:
        distribution, _ = compare(pipeline, references)
        add_distribution(found, distribution, thresholds_of([], variant))
    if report is not None:
        write_report(found, report)
    checks = {(check.level, check.name): check.value for check in found.checks}
    row: dict[str, Any] = {
        "variant": variant,
        "bytes": variant_bytes(pipeline.bundle, variant),
        "seconds": time.perf_counter() - began,
        "z_error": checks["teacher-forced", "z"],
        "kl_mean": checks["teacher-forced", "mean kl"],
        "kl_max": checks["teacher-forced", "kl"],
        "same_component": checks["teacher-forced", "same component"],
        "psnr": checks["free-running", "median PSNR, dB"],
    }
    return row | ({} if references is None else asdict(distribution))


def add_variants(
    folder: Path, model: Arinar, vae: AutoencoderKL, calibration: Path, recording: Recording, say: Callable[[str], None]
) -> dict[str, str]:
    """Make every variant of the table -> what each is, by its name."""
    made = {"fp32": "float32"}
    try:
        export_bundle(model, vae, folder, precision="fp16", progress=say)
        made["fp16"] = "float16 (weights, products, caches)"
    except Exception as error:
        say(f"no fp16: {error}")
    bundle = Bundle.open(folder)

    def add(name: str, what: str, scheme: str, plans: dict[str, LayerPlan] | None = None) -> None:
        quantize_bundle(folder, scheme, None if plans is not None else calibration, plans=plans, name=name, progress=say)
        made[name] = what

    searched = Calibration.read(calibration).maps
    for scheme in searched:
        add(scheme, "the calibrated map", scheme)
    if not searched:
        quantize_bundle(folder, "int8", progress=say)
        made["int8"] = "all layers, ranges taken as it runs"
    evaluator = Evaluator(bundle, recording, 1)
    wide = [layer for layer in evaluator.layers.values() if layer.wide]
    random, read = collect_random(bundle), Calibration.read(calibration)
    for scheme in ("int8-static", "fp8"):
        ranges = {
            "uncalibrated": ("largest magnitude over random inputs", random, "absmax"),
            "absmax": ("largest magnitude over trajectories", recording, "absmax"),
            "smooth": ("the same, channels evened out", recording, "smooth"),
        }
        for name, (what, source, method) in ranges.items():
            plans = {layer.name: layer_plan(layer, source, scheme, method) for layer in wide}
            add(f"{scheme}-{name}", f"all layers, {what}", scheme, plans)
    if not searched:
        return made
    entries = read.maps["int8-static"]["all_layers"]
    plans = {layer.name: read.plan(layer, "int8-static", entries[layer.name]) for layer in wide}
    add("int8-static-calibrated", "all layers, the costliest layers' ranges by trial", "int8-static", plans)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", help=f"one of {', '.join([*DEMO_MODELS, *PRESETS])}")
    parser.add_argument("--samples", type=int, default=1000, help="images of each set; 0: errors only")
    parser.add_argument("--images", type=int, default=10, help="images of the teacher-forced comparison")
    parser.add_argument("--num-iter", type=int)
    parser.add_argument("--calibration-images", type=int, default=64)
    parser.add_argument("--budget-kl", type=float, default=DEFAULT_BUDGET_KL)
    parser.add_argument("--no-search", action="store_true", help="ranges only: no ranking of layers, no maps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reports", type=Path, help="folder for an HTML report of each variant")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - began:6.0f} s] {line}", flush=True)

    model, vae, weights = load(options.model)
    with tempfile.TemporaryDirectory(prefix="arinar-precision-") as scratch:
        folder, calib = Path(scratch) / "bundle", Path(scratch) / "calib.json"
        export_bundle(model, vae, folder, progress=say)
        chosen = calibrate(
            folder,
            calib,
            num_images=options.calibration_images,
            budget_kl=options.budget_kl,
            threads=options.threads,
            num_iter=options.num_iter,
            batch_size=min(8, options.calibration_images),
            progress=say,
            precisions=() if options.no_search else QUANTIZED,
        )
        made = add_variants(folder, model, vae, calib, Recording.load(calib.with_suffix(".npz")), say)
        references = None
        if options.samples:
            defaults = Bundle.open(folder).manifest.defaults
            num_iter = options.num_iter or (model.config.seq_len if model.config.outer == "causal" else defaults.num_iter)
            settings = {
                "guidance_scale": defaults.guidance_scale,
                "cfg_schedule": defaults.cfg_schedule,
                "temperature": 1.0,
                "num_iter": num_iter,
                "seed": 0,
            }
            references = make_references(model, vae, options.samples, settings, say)
        rows = []
        for variant, what in made.items():
            report = None
            if options.reports is not None:
                options.reports.mkdir(parents=True, exist_ok=True)
                report = options.reports / f"{options.model}-{variant}.html"
            rows.append({"what": what} | measure(folder, variant, model, vae, options, references, report))
            say(f"{variant}: KL {rows[-1]['kl_mean']:.2e}, agreement {rows[-1].get('agreement')}")
        result = {
            "model": options.model,
            "weights": weights,
            "machine": f"{platform.machine()}, ONNX Runtime on the CPU",
            "options": {k: v for k, v in vars(options).items() if k not in ("out", "reports")},
            "rows": rows,
            "maps": {
                scheme: {key: found[key] for key in ("method", "budget_kl", "kl", "fp32", "bytes", "bytes_fp32", "ranking")}
                for scheme, found in chosen["maps"].items()
            },
            "largest_activation": chosen["activations"]["largest"],
        }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"precision-{options.model}"
    path.with_suffix(".json").write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


def markdown(result: dict[str, Any]) -> str:
    options = result["options"]
    sampled = "agreement" in result["rows"][0]
    lines = [
        f"# Precision: {result['model']}, {result['weights']}",
        "",
        f"{result['machine']}. Errors over {options['images']} trajectories with PyTorch's tokens forced; ranges from "
        f"{options['calibration_images']} calibration images; maps within KL {options['budget_kl']:g} per feature.",
        "",
    ]
    head = ["variant", "what", "weights, MB", "z error", "mixture KL, mean", "KL, largest", "same component"]
    if sampled:
        head += ["agreement, %", "Frechet distance", "/ yardstick", "MMD p"]
        first = result["rows"][0]
        lines += [
            f"{first['samples']} images of each variant; the classifier agrees with {first['reference_agreement']:.1%} of "
            f"PyTorch's; two PyTorch runs are {first['yardstick']:.3g} apart (the yardstick).",
            "",
        ]
    lines += [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in result["rows"]:
        cells = [
            row["variant"],
            row["what"],
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['z_error']:.2g}",
            f"{row['kl_mean']:.2g}",
            f"{row['kl_max']:.2g}",
            f"{row['same_component']:.4f}",
        ]
        if sampled:
            cells += [
                f"{100 * row['agreement']:.1f}",
                f"{row['frechet']:.3g}",
                f"{row['frechet'] / row['yardstick']:.2f}",
                f"{row['mmd_p']:.2f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    for scheme, found in result["maps"].items():
        lines += [
            "",
            f"## {scheme}: what the search chose",
            "",
            f"Ranges by {found['method']}; joint KL {found['kl']:.2g}; layers' weights {found['bytes'] / 1e6:.2f} MB "
            f"instead of {found['bytes_fp32'] / 1e6:.2f} MB; in float32: {', '.join(found['fp32'])}.",
            "",
            "| layer, alone in this precision | KL | z error |",
            "| --- | --- | --- |",
        ]
        lines += [f"| {row['layer']} | {row['kl']:.2g} | {row['z_error']:.2g} |" for row in found["ranking"][:12]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
