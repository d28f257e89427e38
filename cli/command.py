"""The `arinar` command. Each subcommand mirrors a function, and imports its room only when it runs."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arinar import __version__

if TYPE_CHECKING:
    from arinar.checkpoint import CheckpointInfo
    from arinar.model import Arinar
    from arinar.runtime import Pipeline
    from arinar.vae import AutoencoderKL

# What to install when a package of a room is missing.
INSTALL_HINTS = {
    "torch": "export",
    "onnx": "export",
    "onnxscript": "export",
    "safetensors": "export",
    "sklearn": "demo",
    "onnxruntime": "cpu",
}

BAD_INPUT, FAILED = 2, 1


class ArinarGroup(click.Group):
    """Turns our errors into one line and an exit code: 2 for bad input, 1 for a failed check or computation."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):  # click's own way out (--help, Ctrl-C at a prompt); RuntimeErrors
            raise
        except ModuleNotFoundError as error:
            extra = INSTALL_HINTS.get((error.name or "").split(".")[0])
            if extra is None:
                raise
            _fail(f"this command needs the package {error.name!r}: pip install 'arinar[{extra}]'", BAD_INPUT)
        except (ValueError, OSError, ImportError) as error:
            _fail(str(error), BAD_INPUT)
        except (RuntimeError, ArithmeticError) as error:
            _fail(str(error), FAILED)
        except KeyboardInterrupt:
            _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    click.echo(f"arinar: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _quiet(line: str) -> None:
    pass


def _json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, sort_keys=True, default=str))


@click.group(cls=ArinarGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="arinar")
def main() -> None:
    """Put ARINAR models into production: train, export, generate, and prove that it is still the same model.

    \b
    See it work:     arinar demo
    Deploy a model:  arinar export checkpoint-last.pth --vae kl16.ckpt -o bundle/
                     arinar parity bundle/ --checkpoint checkpoint-last.pth --vae kl16.ckpt
                     arinar generate bundle/ --labels 207,360 -o out/
    """


def parse_labels(text: str) -> list[int]:
    """`3`, `1,5,7`, `0-9`, and mixtures of them -> class ids."""
    labels: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise click.BadParameter(f"{part!r} is not a class id or a range; write for example 207,360 or 0-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first > 1_000_000:
            raise click.BadParameter(f"the range {part.strip()!r} runs backwards or is too long")
        labels.extend(range(first, last + 1))
    return labels


class Labels(click.ParamType):  # type: ignore[type-arg]
    name = "labels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        return value if isinstance(value, list) else parse_labels(value)


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


SAMPLING = _options(
    click.option(
        "--guidance-scale", type=float, help="Classifier-free guidance, at least 1 (1 = none). [default: the bundle's]"
    ),
    click.option(
        "--cfg-schedule", type=click.Choice(["linear", "constant"]), help="How guidance grows over the steps. [default: linear]"
    ),
    click.option("--temperature", type=float, help="Multiplies the std of the mixture components. [default: 1.0]"),
    click.option("--num-iter", type=int, help="Outer steps, 1 to the number of tokens. [default: the bundle's]"),
    click.option("--seed", type=int, default=0, show_default=True, help="Image i depends on (seed, i) alone."),
)


def _no_cuda_graphs(ctx: click.Context, param: click.Parameter, off: bool) -> None:
    if off:
        os.environ["ARINAR_CUDA_GRAPHS"] = "0"  # what the GPU backends read where the caller does not say


RUNTIME = _options(
    click.option(
        "--backend", help="Execution backend: onnxruntime-cpu, onnxruntime-cuda, tensorrt. [default: the best available]"
    ),
    click.option("--precision", help="Variant of the bundle. [default: fp32, or the only one]"),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: all physical cores]"),
    click.option(
        "--low-memory",
        is_flag=True,
        help="On the CPU, hold the transformers or the VAE in memory, not both; every batch loads them again.",
    ),
    click.option(
        "--no-cuda-graphs",
        is_flag=True,
        expose_value=False,
        callback=_no_cuda_graphs,
        help="Launch every step anew on a GPU, instead of replaying a recording; slower, less memory.",
    ),
)
CHECKPOINT = _options(
    click.option("--no-ema", is_flag=True, help="Take the raw weights of a training checkpoint, not the averaged ones."),
    click.option("--inner-heads", type=int, help="Heads of the inner attention, where the checkpoint does not say (4 or 16)."),
)


def _load_models(checkpoint: str, vae: str | None, no_ema: bool, inner_heads: int | None) -> tuple[Arinar, AutoencoderKL]:
    from arinar.checkpoint import load_arinar, load_vae
    from arinar.demo import DEMO_MODELS

    if vae is None:
        if checkpoint not in DEMO_MODELS:
            raise click.UsageError("--vae is missing: name the file of the autoencoder (the published one is kl16.ckpt)")
        vae = checkpoint
    model = load_arinar(checkpoint, ema=not no_ema, inner_heads=inner_heads)
    return model, load_vae(vae)


def _inspected(checkpoint: str, vae: str | None, no_ema: bool, inner_heads: int | None) -> dict[str, Any]:
    """Provenance of a checkpoint, read for the purpose."""
    from arinar.checkpoint import inspect_checkpoint

    info = inspect_checkpoint(checkpoint, ema=False if no_ema else None, inner_heads=inner_heads)
    return _provenance(checkpoint, vae, info)


def _open_pipeline(bundle: Path, backend: str | None, precision: str | None, threads: int | None, low_memory: bool) -> Pipeline:
    """Load a bundle with the options that RUNTIME gives."""
    from arinar.runtime import Pipeline

    options: dict[str, Any] = {} if threads is None else {"threads": threads}
    if low_memory:
        options["low_memory"] = True
    return Pipeline.load(bundle, backend=backend, precision=precision, **options)


def _provenance(checkpoint: str, vae: str | None, info: CheckpointInfo) -> dict[str, Any]:
    return {
        "checkpoint": Path(checkpoint).name,
        "checkpoint_sha256": info.sha256,
        "checkpoint_source": info.source,
        "weights": info.weights,
        "inner_heads": info.inner_heads,
        "inner_heads_source": info.inner_heads_source,
        "vae": Path(vae or checkpoint).name,
    }


# ----------------------------------------------------------------------------------------------------- demo


@main.command()
@click.option(
    "--model",
    type=click.Choice(["digits", "digits-causal"]),
    default="digits",
    show_default=True,
    help="Which of the shipped, really trained models.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Folder for the bundle and the pictures.",
)
@click.option("--per-class", type=click.IntRange(min=1), default=10, show_default=True, help="Images per digit.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def demo(model: str, out: Path, per_class: int, seed: int, as_json: bool) -> None:
    """The whole journey on a model that ships with the package: checkpoint, ONNX, images, proof.

    \b
    Example:  arinar demo
              arinar demo --model digits-causal -o causal-output
    """
    began = time.perf_counter()
    _say(f"1. the shipped checkpoint of {model!r}: a real model, trained on scikit-learn's handwritten digits")
    from arinar.checkpoint import inspect_checkpoint

    arinar, vae = _load_models(model, None, False, None)
    info = inspect_checkpoint(model)
    _say(f"   {info.parameters:,} parameters, {arinar.config.outer} outer network")

    _say("2. PyTorch modules -> ONNX graphs, each checked against PyTorch (the slow part)")
    from arinar.export.bundle import export_bundle

    bundle = out / f"{model}-bundle"
    export_bundle(arinar, vae, bundle, overwrite=True, provenance=_provenance(model, None, info), progress=_indent)

    _say(f"3. ONNX Runtime generates {10 * per_class} images, without PyTorch")
    from arinar.runtime import Pipeline
    from arinar.runtime.images import contact_sheet, save_png

    pipeline = Pipeline.load(bundle)
    labels = [digit for digit in range(10) for _ in range(per_class)]
    made = pipeline.generate(labels, seed=seed)
    picture = out / f"{model}.png"
    save_png(contact_sheet(made.images, columns=per_class, scale=2), picture, {"model": model, "seed": seed})
    _say(f"   {len(labels)} images in {made.timings['total']:.1f} s -> {picture} (one row per digit)")

    _say("4. are they what PyTorch would have made? Same noise through both")
    from arinar.measure.parity import run_parity

    report = run_parity(pipeline, arinar, vae, labels=list(range(10)), seed=seed, progress=_indent)
    _say("\n" + report.table() + "\n")

    _say("5. an independent classifier, trained on the real digits, reads the images")
    import numpy as np

    from arinar.judge import judge

    verdict = judge(np.stack([np.asarray(image) for image in made.images]), np.array(labels))
    _say(
        f"   it agrees with the label on {verdict.agreement:.1%}; diversity within a class {verdict.diversity:.2f} of "
        f"real digits'; distance to the nearest training image {verdict.novelty:.2f} of held-out digits'"
    )
    seconds = time.perf_counter() - began
    _say(f"done in {seconds:.0f} s. Look at {picture}; generate more with: arinar generate {bundle} --labels 0-9 -o out")
    if as_json:
        _json(
            {
                "model": model,
                "picture": str(picture),
                "bundle": str(bundle),
                "seconds": seconds,
                "agreement": verdict.agreement,
                "diversity": verdict.diversity,
                "novelty": verdict.novelty,
                "parity": report.to_dict(),
            }
        )
    if not report.passed:
        sys.exit(FAILED)


def _indent(line: str) -> None:
    _say(f"   {line}")


# ---------------------------------------------------------------------------------------------------- train


@main.command()
@click.argument("what", type=click.Choice(["model", "vae"]), default="model")
@click.option("--config", default="digits", show_default=True, help="Preset name, or a JSON file with a model (or VAE) config.")
@click.option(
    "--data", default="digits", show_default=True, help="'digits', or a folder with one sub-folder of images per class."
)
@click.option("--vae", help="Autoencoder's checkpoint, for training a model. [default: the shipped one of the digits]")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Checkpoint to write (.safetensors).")
@click.option("--steps", type=click.IntRange(min=1), help="Updates. [default: what the shipped weights took]")
@click.option("--batch-size", type=click.IntRange(min=1))
@click.option("--learning-rate", type=float)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", help="torch device, e.g. cuda. [default: cuda where there is one]")
def train(what: str, config: str, data: str, vae: str | None, out: Path, seed: int, device: str | None, **given: Any) -> None:
    """Train a model (or with VAE as the first argument, its autoencoder), starting or resuming.

    Ctrl-C saves the training's state beside the checkpoint; the same command goes on from there, and ends with the
    same weights as if it had not been interrupted.

    \b
    Example:  arinar train vae --config digits -o my-vae.safetensors
              arinar train model --config digits --vae my-vae.safetensors -o my-digits.safetensors
              arinar train model --config my-config.json --data photos/ --vae kl16.ckpt -o mine.safetensors
    """
    from arinar import train as training
    from arinar.config import ArinarConfig, VaeConfig

    chosen: Any = config
    if config.endswith(".json"):
        kind: Any = VaeConfig if what == "vae" else ArinarConfig
        try:
            chosen = kind.from_dict(json.loads(Path(config).read_text(encoding="utf-8")))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{config} is not a {what} config: {error}") from error
    arguments: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    arguments |= {"config": chosen, "data": data, "seed": seed, "device": device}
    if what == "model":
        arguments["vae"] = vae
    elif vae is not None:
        raise click.UsageError("--vae is for training a model")
    result = (training.train_vae if what == "vae" else training.train_arinar)(out, **arguments)
    if not result.finished:
        _say(f"interrupted after {result.step} steps; the same command resumes")
        sys.exit(130)
    held_out = "" if result.held_out is None else f", held-out loss {result.held_out:.4f} at step {result.best_step}"
    click.echo(f"{out}: {result.parameters:,} parameters{held_out}")


# ----------------------------------------------------------------------------------------------------- init


@main.command()
@click.option("--preset", required=True, help="Name of a preset (see `arinar init --list`).", default="")
@click.option("--list", "list_presets", is_flag=True, help="Show the presets.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Checkpoint to write (.safetensors).")
@click.option("--vae-out", type=click.Path(path_type=Path), help="Also write an autoencoder of the preset's kind here.")
@click.option("--seed", type=int, default=0, show_default=True)
def init(preset: str, list_presets: bool, out: Path | None, vae_out: Path | None, seed: int) -> None:
    """Write a checkpoint with random weights: for measuring speed and memory, not for pictures.

    \b
    Example:  arinar init --preset base -o base.safetensors --vae-out kl16.safetensors
    """
    from arinar.config import PRESETS

    if list_presets:
        for name, config in PRESETS.items():
            click.echo(f"{name:14} {config.outer:7} {config.img_size}px, {config.seq_len} tokens, width {config.z_width}")
        return
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; choose one of {', '.join(PRESETS)}")
    if out is None and vae_out is None:
        raise click.UsageError("-o is missing: where should the checkpoint go?")
    from arinar.checkpoint import save_arinar, save_vae
    from arinar.model import random_model, random_vae

    note = {"weights": f"random, seed {seed}"}
    if out is not None:
        model = random_model(preset, seed)
        save_arinar(out, model, metadata=note)
        click.echo(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters")
    if vae_out is not None:
        vae = random_vae(preset, seed)
        save_vae(vae_out, vae, metadata=note)
        click.echo(f"{vae_out}: {sum(p.numel() for p in vae.parameters()):,} parameters")


# --------------------------------------------------------------------------------------------------- export


@main.command()
@click.argument("checkpoint")
@click.option("--vae", help="Autoencoder's checkpoint (e.g. kl16.ckpt). [default: the demo model's own]")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Bundle folder to write, or to add a precision to."
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="Of the transformer graphs: fp32, fp16, int8 (for CPUs), int8-static or fp8 (for TensorRT).",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, dir_okay=False),
    help="What `arinar calibrate` wrote; int8-static and fp8 need it.",
)
@click.option(
    "--vae-precision",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    show_default=True,
    help="Of the VAE graphs of an fp16 variant.",
)
@click.option("--opset", type=int, default=20, show_default=True, help="ONNX opset; 20 suits every TensorRT from 10.0 on.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
@CHECKPOINT
def export(
    checkpoint: str,
    vae: str | None,
    out: Path,
    precision: str,
    calibration: Path | None,
    vae_precision: str,
    opset: int,
    overwrite: bool,
    as_json: bool,
    no_ema: bool,
    inner_heads: int | None,
) -> None:
    """Export a trained model and its VAE to a bundle of ONNX graphs, each proven against PyTorch.

    CHECKPOINT is a published training checkpoint, a safetensors file, or a demo model's name. The 8-bit precisions are
    made from the bundle's fp32 graphs (exported first where they are missing); for them CHECKPOINT may be a bundle too.

    \b
    Example:  arinar export checkpoint-last.pth --vae kl16.ckpt -o bundle/
              arinar export digits -o digits-bundle/
    """
    from arinar.export.layers import SCHEMES

    if precision in SCHEMES:
        manifest = _export_quantized(checkpoint, vae, out, precision, calibration, opset, overwrite, no_ema, inner_heads)
        if as_json:
            click.echo(manifest.to_json(), nl=False)
        return
    if calibration is not None:
        raise click.UsageError(f"--calibration is for {', '.join(SCHEMES)}; {precision} has no use for it")
    from arinar.export.bundle import export_bundle

    model, autoencoder = _load_models(checkpoint, vae, no_ema, inner_heads)
    manifest = export_bundle(
        model,
        autoencoder,
        out,
        precision=precision,
        vae_precision=vae_precision,
        opset=opset,
        overwrite=overwrite,
        provenance=_inspected(checkpoint, vae, no_ema, inner_heads),
        progress=_say,
    )
    if as_json:
        click.echo(manifest.to_json(), nl=False)


def _export_quantized(
    checkpoint: str,
    vae: str | None,
    out: Path,
    precision: str,
    calibration: Path | None,
    opset: int,
    overwrite: bool,
    no_ema: bool,
    inner_heads: int | None,
) -> Any:
    from arinar.export.bundle import export_bundle
    from arinar.export.quantize import check_weights, quantize_bundle
    from arinar.runtime import Bundle

    if Path(checkpoint).is_dir():
        if not out.exists() or not out.samefile(checkpoint):
            raise click.UsageError(f"a precision is added to the bundle itself: -o {checkpoint}")
    else:
        model, autoencoder = _load_models(checkpoint, vae, no_ema, inner_heads)
        if (out / "manifest.json").is_file() and "fp32" in Bundle.open(out).manifest.graphs:
            check_weights(Bundle.open(out), model, autoencoder)
        else:
            provenance = _inspected(checkpoint, vae, no_ema, inner_heads)
            export_bundle(model, autoencoder, out, opset=opset, provenance=provenance, progress=_say)
    return quantize_bundle(out, precision, calibration, overwrite=overwrite, progress=_say)


# ------------------------------------------------------------------------------------------------ calibrate


@main.command()
@click.argument("model")
@click.option("--vae", help="Autoencoder's checkpoint, where MODEL is one. [default: the demo model's own]")
@click.option("--num-images", type=int, default=64, show_default=True, help="Trajectories to record.")
@click.option("--labels", type=Labels(), help="Classes of those images, in turn. [default: all]")
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path),
    required=True,
    help="JSON file to write; recorded inputs go into an .npz beside it.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    help="Search a map for this 8-bit precision only; may be repeated. [default: all]",
)
@click.option(
    "--budget-kl",
    type=float,
    default=3e-4,
    show_default=True,
    help="Mean divergence per feature that a precision map may cost, in nats.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Images at a time; bounds the memory."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: all physical cores]")
@click.option("--json", "as_json", is_flag=True, help="Print what was chosen, as JSON.")
@SAMPLING
@CHECKPOINT
def calibrate(
    model: str,
    vae: str | None,
    num_images: int,
    labels: list[int] | None,
    out: Path,
    precisions: tuple[str, ...],
    budget_kl: float,
    batch_size: int,
    threads: int | None,
    as_json: bool,
    no_ema: bool,
    inner_heads: int | None,
    **sampling: Any,
) -> None:
    """Measure what the layers see while the model generates, and find out which of them bear 8 bits.

    MODEL is a bundle with fp32 graphs, or a checkpoint, which is exported for the occasion. Ctrl-C leaves what was
    recorded; the same command goes on from there.

    \b
    Example:  arinar calibrate bundle/ --num-images 256 --out calib.json
              arinar export bundle/ -o bundle/ --precision int8-static --calibration calib.json
    """
    import contextlib
    import tempfile

    from arinar.calibration.precision import calibrate as run
    from arinar.calibration.precision import check
    from arinar.demo import DEMO_MODELS
    from arinar.export.layers import SCHEMES

    arguments: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    arguments |= {"num_images": num_images, "labels": labels, "batch_size": batch_size, "budget_kl": budget_kl}
    arguments["precisions"] = precisions or tuple(SCHEMES)
    with contextlib.ExitStack() as stack:
        bundle = Path(model)
        if bundle.is_dir() and vae is not None:
            raise click.UsageError("--vae belongs to a checkpoint; a bundle has its own")
        if not bundle.exists() and model not in DEMO_MODELS:
            raise ValueError(f"there is no bundle or checkpoint {model}; a demo model is {' or '.join(DEMO_MODELS)}")
        if not bundle.is_dir():
            from arinar.export.bundle import export_bundle
            from arinar.runtime.bundle import Defaults

            trained, autoencoder = _load_models(model, vae, no_ema, inner_heads)
            config = trained.config
            check(config, Defaults(config.default_num_iter, config.default_guidance_scale), out, **arguments)
            bundle = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="arinar-"))) / "bundle"
            export_bundle(trained, autoencoder, bundle, progress=_say)
        result = run(bundle, out, threads=threads, progress=_say, **arguments)
    if as_json:
        _json(result["maps"])
        return
    largest = result["activations"]["largest"]
    safe = "room enough for fp16" if result["activations"]["fp16_safe"] else "TOO LARGE for fp16"
    click.echo(
        f"largest activation: {largest['value']:g} ({largest['tensor']} of {largest['graph']}, step {largest['step']}): {safe}"
    )
    for precision, found in result["maps"].items():
        click.echo(
            f"{precision}: {len(found['quantized'])} layers quantised, ranges by {found['method']}; KL {found['kl']:.2e}, "
            f"weights {found['bytes'] / 1e6:.1f} MB instead of {found['bytes_fp32'] / 1e6:.1f} MB; in fp32: {', '.join(found['fp32'])}"
        )
    click.echo(f"{out} written")


# ------------------------------------------------------------------------------------------------- generate


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--labels", type=Labels(), required=True, help="Class ids and ranges: 207,360 or 0-9.")
@click.option("--per-label", type=click.IntRange(min=1), default=1, show_default=True, help="Images of each label.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the PNG files.")
@click.option("--grid", is_flag=True, help="Also write a contact sheet, grid.png.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Images at a time; fixing it makes results identical to the last bit."
)
@click.option("--overwrite", is_flag=True, help="Replace images that were made with other settings.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made, as JSON.")
@SAMPLING
@RUNTIME
def generate(
    bundle: Path,
    labels: list[int],
    per_label: int,
    out: Path,
    grid: bool,
    batch_size: int | None,
    overwrite: bool,
    as_json: bool,
    backend: str | None,
    precision: str | None,
    threads: int | None,
    low_memory: bool,
    seed: int,
    **sampling: Any,
) -> None:
    """Generate images from a bundle: numbered PNG files that hold their label and seed as metadata.

    Files that are already there, made with the same settings, are kept: an interrupted run goes on where it stopped.

    \b
    Example:  arinar generate bundle/ --labels 207,360 -o out/
              arinar generate digits-bundle/ --labels 0-9 --per-label 10 --grid -o digits/ --seed 7
    """
    from tqdm import tqdm

    from arinar.runtime.images import contact_sheet, save_png
    from arinar.runtime.worklist import Worklist

    pipeline = _open_pipeline(bundle, backend, precision, threads, low_memory)
    wanted = [label for label in labels for _ in range(per_label)]
    work = Worklist(pipeline, wanted, out, seed=seed, batch_size=batch_size, overwrite=overwrite, **sampling)
    kept = len(wanted) - len(work.missing)
    if kept:
        _say(f"{kept} of {len(wanted)} images are already in {out}")
    with tqdm(total=len(work.missing) * work.num_iter, unit="step", disable=not work.missing) as bar:
        timings = work.run(lambda steps: bar.update(steps) and None)
    if grid:
        columns = per_label if per_label > 1 else None
        save_png(contact_sheet(work.images(), columns), out / "grid.png", {"seed": seed})
    made = len(wanted) - kept
    if as_json:
        _json(
            {
                "images": [str(path) for path in work.paths],
                "labels": wanted,
                "seed": seed,
                "made": made,
                "timings": timings,
                "backend": pipeline.backend.name,
                "precision": pipeline.precision,
            }
        )
    else:
        pace = f", {timings['total'] / made:.3g} s each" if made else ""
        click.echo(f"{made} images in {out}{pace}" + (f"; contact sheet {out / 'grid.png'}" if grid else ""))


# --------------------------------------------------------------------------------------------------- parity


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", required=True, help="The trained model that the bundle should be (file or demo name).")
@click.option("--vae", help="Its autoencoder. [default: the demo model's own]")
@click.option("--labels", type=Labels(), default="0-7", show_default=True, help="Classes of the compared images.")
@click.option(
    "--distribution",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Also compare the distributions of N images of each.",
)
@click.option(
    "--features",
    default="builtin",
    show_default=True,
    help="What distributions are compared by: builtin (32 fixed features of shape and colour), inception (needs torch-fidelity), or your own module:function, images (N, H, W, 3) uint8 -> (N, F).",
)
@click.option(
    "--fid-stats",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Statistics of a reference set (.npz with mu and sigma), made with the same features.",
)
@click.option(
    "--threshold", "limits", multiple=True, metavar="NAME=VALUE", help="Override a limit, e.g. z=1e-3; may be repeated."
)
@click.option(
    "--report", "report_file", type=click.Path(path_type=Path, dir_okay=False), help="Write a self-contained HTML report here."
)
@click.option("--json", "as_json", is_flag=True, help="Print every number, as JSON.")
@SAMPLING
@RUNTIME
@CHECKPOINT
def parity(
    bundle: Path,
    checkpoint: str,
    vae: str | None,
    labels: list[int],
    distribution: int,
    features: str,
    fid_stats: Path | None,
    limits: tuple[str, ...],
    report_file: Path | None,
    as_json: bool,
    backend: str | None,
    precision: str | None,
    threads: int | None,
    low_memory: bool,
    no_ema: bool,
    inner_heads: int | None,
    cfg_schedule: str | None,
    guidance_scale: float | None,
    temperature: float | None,
    num_iter: int | None,
    seed: int,
) -> None:
    """Is the deployed bundle still the trained model? Exits with 1 when a check fails.

    Four levels: each graph alone; along the PyTorch trajectory, step by step; both on their own from the same noise;
    and (--distribution) the law of many images, beside what two PyTorch runs differ.

    \b
    Example:  arinar parity bundle/ --checkpoint checkpoint-last.pth --vae kl16.ckpt --labels 207 --num-iter 16
              arinar parity digits-bundle/ --checkpoint digits --distribution 500 --report report.html
    """
    from arinar.files import check_writable
    from arinar.measure.parity import parse_thresholds, run_parity

    if report_file is not None:
        check_writable(report_file)
    for option, given in (("--fid-stats", fid_stats is not None), ("--features", features != "builtin")):
        if given and not distribution:
            raise click.UsageError(f"{option} is for comparing distributions: add --distribution N, the number of images")
    pipeline = _open_pipeline(bundle, backend, precision, threads, low_memory)
    if pipeline.config.outer == "causal" and num_iter not in (None, pipeline.config.seq_len):
        raise ValueError(f"num_iter is {num_iter}; a causal model generates one token a step: leave --num-iter out")
    thresholds = parse_thresholds(limits, pipeline.precision)
    model, autoencoder = _load_models(checkpoint, vae, no_ema, inner_heads)
    report = run_parity(
        pipeline,
        model,
        autoencoder,
        labels=labels,
        guidance_scale=guidance_scale,
        num_iter=num_iter,
        temperature=1.0 if temperature is None else temperature,
        cfg_schedule=cfg_schedule or "linear",
        seed=seed,
        thresholds=thresholds,
        distribution=distribution,
        features=features,
        fid_stats=fid_stats,
        reference=_inspected(checkpoint, vae, no_ema, inner_heads),
        progress=_quiet if as_json else _say,
    )
    if report_file is not None:
        from arinar.measure.parity_report import write_report

        write_report(report, report_file)
    if as_json:
        _json(report.to_dict())
    else:
        click.echo(report.table())
    if not report.passed:
        sys.exit(FAILED)


# ---------------------------------------------------------------------------------------------------- build


class Batch(click.ParamType):  # type: ignore[type-arg]
    name = "MIN:OPT:MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+):(\d+):(\d+)", value)
        if match is None or not 1 <= int(match[1]) <= int(match[2]) <= int(match[3]):
            self.fail(f"{value!r} is not MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX; write for example 1:8:64", param, ctx)
        return int(match[1]), int(match[2]), int(match[3])


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    default="tensorrt",
    show_default=True,
    help="Library that builds, and later runs, the engines.",
)
@click.option("--precision", help="Variant of the bundle. [default: fp16, or the only one]")
@click.option(
    "--batch",
    type=Batch(),
    default=(1, 8, 64),
    show_default="1:8:64",
    help="Least, usual and largest number of images at a time.",
)
@click.option(
    "--min-num-iter",
    type=click.IntRange(min=1),
    help="Fewest outer steps to serve. [default: a quarter of the bundle's default]",
)
@click.option(
    "--graph", "graphs", multiple=True, help="Build only this graph; may be repeated. [default: all that generation runs]"
)
@click.option(
    "--workspace", type=click.IntRange(min=1), help="Most scratch memory of an engine, in MiB. [default: what the device has]"
)
@click.option(
    "--opt-level", type=click.IntRange(0, 5), help="Effort of the builder: 0 builds fast, 5 runs fast. [default: the library's]"
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder that keeps the builder's measurements: later builds are faster and choose alike.",
)
@click.option(
    "--version-compatible", is_flag=True, help="Engines that later versions of the library run too; larger and slower."
)
@click.option(
    "--compute-capability",
    help="GPUs to build for, e.g. 8.9,12.0 (tensorrt-rtx). [default: this GPU; tensorrt-rtx: all from 8.0 on]",
)
@click.option("--timeout", type=click.FloatRange(min=1), default=3600.0, show_default=True, help="Seconds for one graph.")
@click.option("--rebuild", is_flag=True, help="Build also what has not changed.")
@click.option("--dry-run", is_flag=True, help="Only show what would be built.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan or the result, as JSON.")
def build(
    bundle: Path,
    backend: str,
    precision: str | None,
    batch: tuple[int, int, int],
    min_num_iter: int | None,
    graphs: tuple[str, ...],
    workspace: int | None,
    opt_level: int | None,
    timing_cache: Path | None,
    version_compatible: bool,
    compute_capability: str | None,
    timeout: float,
    rebuild: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build TensorRT engines from a bundle's graphs, into the bundle. Exits with 1 when one could not be built.

    What has not changed since the last build is kept. Engines for several GPUs, versions and precisions lie side by
    side; the runtime takes those that fit. Each graph is built in a process of its own.

    \b
    Example:  arinar build bundle/ --batch 1:8:64
              arinar build digits-bundle/ --backend tensorrt-rtx --precision fp32 --dry-run
    """
    from arinar.export.engine import build_engines
    from arinar.runtime.backends.engines import MODULES

    outcomes = build_engines(
        bundle,
        module=MODULES[backend],
        precision=precision,
        graphs=graphs or None,
        batch=batch,
        min_num_iter=min_num_iter,
        workspace=None if workspace is None else workspace << 20,
        optimization_level=opt_level,
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        compute_capability=[item.strip() for item in (compute_capability or "").split(",") if item.strip()],
        timeout=timeout,
        rebuild=rebuild,
        dry_run=dry_run,
        progress=_quiet if as_json else _say,
    )
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if as_json:
        _json([outcome.to_dict() for outcome in outcomes])
    elif dry_run:
        for outcome in outcomes:
            click.echo(f"{outcome.graph}: {outcome.state}, {outcome.path}")
            for name, (low, usual, high) in outcome.info.profiles.items():
                click.echo(f"  {name}: {low} .. {usual} .. {high}")
    else:
        size = sum(outcome.info.size for outcome in outcomes if outcome.state != "failed")
        states = ", ".join(f"{sum(o.state == s for o in outcomes)} {s}" for s in ("built", "reused", "failed"))
        click.echo(f"{outcomes[0].path.parent if outcomes else bundle}: {states}, {size / 1e6:.1f} MB")
        for outcome in failed:
            click.echo(f"FAILED {outcome.graph}: {outcome.error}", err=True)
    if failed:
        sys.exit(FAILED)


# ---------------------------------------------------------------------------------------------------- bench


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--batch", "batches", default="1,4", show_default=True, type=Labels(), help="Batch sizes.")
@click.option("--num-iter", "num_iters", type=Labels(), help="Numbers of outer steps. [default: the bundle's]")
@click.option("--guidance-scale", type=float, help="[default: the bundle's]")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds; medians are reported.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Also write the numbers to this JSON file.")
@click.option("--html", "html_file", type=click.Path(path_type=Path), help="Also write them as one HTML page, with charts.")
@click.option("--against", type=click.Path(path_type=Path), help="JSON file of an earlier run to compare with.")
@click.option("--json", "as_json", is_flag=True, help="Print every number, as JSON.")
@RUNTIME
def bench(
    bundle: Path,
    batches: list[int],
    num_iters: list[int] | None,
    guidance_scale: float | None,
    repeats: int,
    out: Path | None,
    html_file: Path | None,
    against: Path | None,
    as_json: bool,
    backend: str | None,
    precision: str | None,
    threads: int | None,
    low_memory: bool,
) -> None:
    """How fast is a bundle on this machine? Time by phase, memory, cold start, and the time it takes at least.

    \b
    Example:  arinar bench bundle/ --batch 1,4 --num-iter 64 -o today.json --html today.html
              arinar bench bundle/ --batch 1,4 --num-iter 64 --against yesterday.json
    """
    from arinar.files import check_writable, write_text
    from arinar.measure import bench as benchmark

    if out is not None and out == html_file:
        raise click.UsageError("-o and --html name the same file")
    earlier = None if against is None else benchmark.read_report(against)
    for path in (out, html_file):
        if path is not None:
            check_writable(path)
    pipeline = _open_pipeline(bundle, backend, precision, threads, low_memory)
    report = benchmark.bench(
        pipeline,
        batches=batches,
        num_iters=num_iters,
        guidance_scale=guidance_scale,
        repeats=repeats,
        progress=_quiet if as_json else _say,
    )
    if earlier is not None:
        report["against"] = benchmark.compare(earlier, report)
    # Printed before it is written: a disk that is full by now does not cost the measurement.
    if as_json:
        _json(report)
    else:
        click.echo(benchmark.table(report))
    if out is not None:
        write_text(out, json.dumps(report, indent=2, sort_keys=True) + "\n")
    if html_file is not None:
        from arinar.measure.bench_report import render

        write_text(html_file, render(report))


# -------------------------------------------------------------------------------------------------- inspect


@main.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print everything, as JSON.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check sizes and hashes of a bundle's files.")
@CHECKPOINT
def inspect(path: str, as_json: bool, verify: bool, no_ema: bool, inner_heads: int | None) -> None:
    """Tell what a bundle or a checkpoint is: configuration, where it came from, whether it is whole.

    \b
    Example:  arinar inspect bundle/
              arinar inspect checkpoint-last.pth
              arinar inspect digits
    """
    if Path(path).is_dir():
        _inspect_bundle(Path(path), as_json, verify)
        return
    from arinar.checkpoint import inspect_checkpoint

    info = inspect_checkpoint(path, ema=False if no_ema else None, inner_heads=inner_heads)
    if as_json:
        _json(info.to_dict())
        return
    click.echo(f"{info.path}: {info.source}")
    rows = [
        ("kind", info.kind),
        ("weights", info.weights),
        ("parameters", f"{info.parameters:,}"),
        ("sha256", info.sha256),
        ("config", info.config_source),
        *info.config.to_dict().items(),
    ]
    if info.inner_heads is not None:
        rows.append(("inner heads", f"{info.inner_heads} ({info.inner_heads_source})"))
    _rows([*rows, *info.metadata.items()])
    for note in info.notes:
        click.echo(f"note: {note}")
    for warning in info.warnings:
        click.echo(f"WARNING: {warning}")


def _inspect_bundle(path: Path, as_json: bool, verify: bool) -> None:
    from arinar.runtime import Bundle

    bundle = Bundle.open(path)
    if verify:
        bundle.verify()
    manifest = bundle.manifest
    if as_json:
        click.echo(manifest.to_json(), nl=False)
        return
    size = sum(info.size for info in manifest.files.values())
    state = "all hashes match" if verify else "not verified"
    click.echo(f"{path}: bundle of format {manifest.format_version}, {size / 1e6:.1f} MB, {state}")
    _rows([*manifest.config.to_dict().items(), *manifest.provenance.items()])
    for precision, graphs in manifest.graphs.items():
        click.echo(f"{precision}:")
        for graph in graphs.values():
            click.echo(f"  {graph.name}  (opset {graph.opset}, largest error against PyTorch {graph.max_abs_err:.2g})")
            for arrow, tensors in (("<-", graph.inputs), ("->", graph.outputs)):
                for tensor in _without_caches(tensors):
                    click.echo(f"    {arrow} {tensor}")


def _without_caches(tensors: Any) -> list[str]:
    """Tensor descriptions, the many cache tensors as one line."""
    lines = [f"{t.name} {t.dtype} ({', '.join(map(str, t.shape))})" for t in tensors]
    caches = [t for t in tensors if re.match(r"(past_key_values|present)\.", t.name)]
    if len(caches) > 2:
        first = next(i for i, t in enumerate(tensors) if t in caches)
        lines[first : first + len(caches)] = [f"{lines[first]} ... {len(caches)} cache tensors"]
    return lines


def _rows(rows: list[tuple[str, Any]]) -> None:
    width = max(len(str(name)) for name, _ in rows)
    for name, value in rows:
        text = str(value)
        click.echo(f"  {name:{width}}  {text if len(text) <= 90 else text[:87] + '...'}")


if __name__ == "__main__":
    main()
