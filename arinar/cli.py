"""The `arinar` command. Each subcommand mirrors a function, and imports its room only when it runs."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__

if TYPE_CHECKING:
    from .checkpoint import CheckpointInfo
    from .model import Arinar
    from .vae import AutoencoderKL

# What to install when a package of a room is missing.
INSTALL_HINTS = {
    "torch": "export", "onnx": "export", "onnxscript": "export", "safetensors": "export",
    "sklearn": "demo", "onnxruntime": "cpu",
}  # fmt: skip

BAD_INPUT, FAILED = 2, 1


class ArinarGroup(click.Group):
    """Turns our errors into one line and an exit code: 2 for bad input, 1 for a failed check or computation."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
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


class Labels(click.ParamType):
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
    click.option("--guidance-scale", type=float, help="Classifier-free guidance, at least 1 (1 = none). [default: the bundle's]"),
    click.option("--cfg-schedule", type=click.Choice(["linear", "constant"]), help="How guidance grows over the steps. [default: linear]"),
    click.option("--temperature", type=float, help="Multiplies the std of the mixture components. [default: 1.0]"),
    click.option("--num-iter", type=int, help="Outer steps, 1 to the number of tokens. [default: the bundle's]"),
    click.option("--seed", type=int, default=0, show_default=True, help="Image i depends on (seed, i) alone."),
)  # fmt: skip
RUNTIME = _options(
    click.option("--backend", help="Execution backend, e.g. onnxruntime-cpu. [default: the best available]"),
    click.option("--precision", help="Variant of the bundle. [default: fp32, or the only one]"),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: all physical cores]"),
)
CHECKPOINT = _options(
    click.option("--no-ema", is_flag=True, help="Take the raw weights of a training checkpoint, not the averaged ones."),
    click.option("--inner-heads", type=int, help="Heads of the inner attention, where the checkpoint does not say (4 or 16)."),
)  # fmt: skip


def _load_models(checkpoint: str, vae: str | None, no_ema: bool, inner_heads: int | None) -> tuple[Arinar, AutoencoderKL]:
    from .checkpoint import load_arinar, load_vae
    from .demo import DEMO_MODELS

    if vae is None:
        if checkpoint not in DEMO_MODELS:
            raise click.UsageError("--vae is missing: name the file of the autoencoder (the published one is kl16.ckpt)")
        vae = checkpoint
    model = load_arinar(checkpoint, ema=not no_ema, inner_heads=inner_heads)
    return model, load_vae(vae)


def _provenance(checkpoint: str, vae: str | None, info: CheckpointInfo) -> dict[str, Any]:
    return {
        "checkpoint": Path(checkpoint).name, "checkpoint_sha256": info.sha256, "checkpoint_source": info.source,
        "weights": info.weights, "inner_heads": info.inner_heads, "inner_heads_source": info.inner_heads_source,
        "vae": Path(vae or checkpoint).name,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------- demo


@main.command()
@click.option("--model", type=click.Choice(["digits", "digits-causal"]), default="digits", show_default=True,
              help="Which of the shipped, really trained models.")  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("demo-output"), show_default=True,
              help="Folder for the bundle and the pictures.")  # fmt: skip
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
    from .checkpoint import inspect_checkpoint

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
    from arinar.export.parity import run_parity

    report = run_parity(pipeline, arinar, vae, labels=list(range(10)), seed=seed, progress=_indent)
    _say("\n" + report.table() + "\n")

    _say("5. an independent classifier, trained on the real digits, reads the images")
    import numpy as np

    from .judge import judge

    verdict = judge(np.stack([np.asarray(image) for image in made.images]), np.array(labels))
    _say(
        f"   it agrees with the label on {verdict.agreement:.1%}; diversity within a class {verdict.diversity:.2f} of "
        f"real digits'; distance to the nearest training image {verdict.novelty:.2f} of held-out digits'"
    )
    seconds = time.perf_counter() - began
    _say(f"done in {seconds:.0f} s. Look at {picture}; generate more with: arinar generate {bundle} --labels 0-9 -o out")
    if as_json:
        _json({
            "model": model, "picture": str(picture), "bundle": str(bundle), "seconds": seconds,
            "agreement": verdict.agreement, "diversity": verdict.diversity, "novelty": verdict.novelty,
            "parity": report.to_dict(),
        })  # fmt: skip
    if not report.passed:
        sys.exit(FAILED)


def _indent(line: str) -> None:
    _say(f"   {line}")


# ---------------------------------------------------------------------------------------------------- train


@main.command()
@click.argument("what", type=click.Choice(["model", "vae"]), default="model")
@click.option("--config", default="digits", show_default=True, help="Preset name, or a JSON file with a model (or VAE) config.")
@click.option("--data", default="digits", show_default=True, help="'digits', or a folder with one sub-folder of images per class.")
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
    from . import train as training
    from .config import ArinarConfig, VaeConfig

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
    from .config import PRESETS, VAE_PRESETS

    if list_presets:
        for name, config in PRESETS.items():
            click.echo(f"{name:14} {config.outer:7} {config.img_size}px, {config.seq_len} tokens, width {config.z_width}")
        return
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; choose one of {', '.join(PRESETS)}")
    if out is None and vae_out is None:
        raise click.UsageError("-o is missing: where should the checkpoint go?")
    import torch

    from .checkpoint import save_arinar, save_vae
    from .model import Arinar, initialize
    from .vae import AutoencoderKL

    note = {"weights": f"random, seed {seed}"}
    if out is not None:
        model = initialize(Arinar(PRESETS[preset]), seed)
        save_arinar(out, model, metadata=note)
        click.echo(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters")
    if vae_out is not None:
        torch.manual_seed(seed)
        vae = AutoencoderKL(VAE_PRESETS["digits" if preset.startswith("digits") else "kl16"])
        save_vae(vae_out, vae, metadata=note)
        click.echo(f"{vae_out}: {sum(p.numel() for p in vae.parameters()):,} parameters")


# --------------------------------------------------------------------------------------------------- export


@main.command()
@click.argument("checkpoint")
@click.option("--vae", help="Autoencoder's checkpoint (e.g. kl16.ckpt). [default: the demo model's own]")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Bundle folder to write, or to add a precision to.")
@click.option("--precision", default="fp32", show_default=True, help="Of the transformer graphs.")
@click.option("--opset", type=int, default=20, show_default=True, help="ONNX opset; 20 suits every TensorRT from 10.0 on.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
@CHECKPOINT
def export(
    checkpoint: str, vae: str | None, out: Path, precision: str, opset: int, overwrite: bool, as_json: bool,
    no_ema: bool, inner_heads: int | None,
) -> None:  # fmt: skip
    """Export a trained model and its VAE to a bundle of ONNX graphs, each proven against PyTorch.

    CHECKPOINT is a published training checkpoint, a safetensors file, or a demo model's name.

    \b
    Example:  arinar export checkpoint-last.pth --vae kl16.ckpt -o bundle/
              arinar export digits -o digits-bundle/
    """
    from arinar.export.bundle import export_bundle

    from .checkpoint import inspect_checkpoint

    model, autoencoder = _load_models(checkpoint, vae, no_ema, inner_heads)
    info = inspect_checkpoint(checkpoint, ema=None if not no_ema else False, inner_heads=inner_heads)
    manifest = export_bundle(
        model, autoencoder, out, precision=precision, opset=opset, overwrite=overwrite,
        provenance=_provenance(checkpoint, vae, info), progress=_say,
    )  # fmt: skip
    if as_json:
        click.echo(manifest.to_json(), nl=False)


# ------------------------------------------------------------------------------------------------- generate


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--labels", type=Labels(), required=True, help="Class ids and ranges: 207,360 or 0-9.")
@click.option("--per-label", type=click.IntRange(min=1), default=1, show_default=True, help="Images of each label.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the PNG files.")
@click.option("--grid", is_flag=True, help="Also write a contact sheet, grid.png.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Images at a time; fixing it makes results identical to the last bit.")
@click.option("--overwrite", is_flag=True, help="Replace images that were made with other settings.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made, as JSON.")
@SAMPLING
@RUNTIME
def generate(
    bundle: Path, labels: list[int], per_label: int, out: Path, grid: bool, batch_size: int | None, overwrite: bool,
    as_json: bool, backend: str | None, precision: str | None, threads: int | None, seed: int, **sampling: Any,
) -> None:  # fmt: skip
    """Generate images from a bundle: numbered PNG files that hold their label and seed as metadata.

    Files that are already there, made with the same settings, are kept: an interrupted run goes on where it stopped.

    \b
    Example:  arinar generate bundle/ --labels 207,360 -o out/
              arinar generate digits-bundle/ --labels 0-9 --per-label 10 --grid -o digits/ --seed 7
    """
    from tqdm import tqdm

    from arinar.runtime import Pipeline
    from arinar.runtime.images import contact_sheet, save_png
    from arinar.runtime.worklist import Worklist

    options = {} if threads is None else {"threads": threads}
    pipeline = Pipeline.load(bundle, backend=backend, precision=precision, **options)
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
        _json({
            "images": [str(path) for path in work.paths], "labels": wanted, "seed": seed, "made": made,
            "timings": timings, "backend": pipeline.backend.name, "precision": pipeline.precision,
        })  # fmt: skip
    else:
        pace = f", {timings['total'] / made:.3g} s each" if made else ""
        click.echo(f"{made} images in {out}{pace}" + (f"; contact sheet {out / 'grid.png'}" if grid else ""))


# --------------------------------------------------------------------------------------------------- parity


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", required=True, help="The trained model that the bundle should be (file or demo name).")
@click.option("--vae", help="Its autoencoder. [default: the demo model's own]")
@click.option("--labels", type=Labels(), default="0-7", show_default=True, help="Classes of the compared images.")
@click.option("--json", "as_json", is_flag=True, help="Print every number, as JSON.")
@SAMPLING
@RUNTIME
@CHECKPOINT
def parity(
    bundle: Path, checkpoint: str, vae: str | None, labels: list[int], as_json: bool, backend: str | None,
    precision: str | None, threads: int | None, no_ema: bool, inner_heads: int | None, cfg_schedule: str | None,
    guidance_scale: float | None, temperature: float | None, num_iter: int | None, seed: int,
) -> None:  # fmt: skip
    """Is the deployed bundle still the trained model? Exits with 1 when a check fails.

    Three levels: each graph alone; along the PyTorch trajectory, step by step; and both on their own from the same
    noise.

    \b
    Example:  arinar parity bundle/ --checkpoint checkpoint-last.pth --vae kl16.ckpt --labels 207 --num-iter 16
              arinar parity digits-bundle/ --checkpoint digits
    """
    from arinar.export.parity import run_parity
    from arinar.runtime import Pipeline

    options = {} if threads is None else {"threads": threads}
    pipeline = Pipeline.load(bundle, backend=backend, precision=precision, **options)
    model, autoencoder = _load_models(checkpoint, vae, no_ema, inner_heads)
    report = run_parity(
        pipeline, model, autoencoder, labels=labels, guidance_scale=guidance_scale, num_iter=num_iter,
        temperature=1.0 if temperature is None else temperature, cfg_schedule=cfg_schedule or "linear", seed=seed,
        progress=_quiet if as_json else _say,
    )  # fmt: skip
    if as_json:
        _json(report.to_dict())
    else:
        click.echo(report.table())
    if not report.passed:
        sys.exit(FAILED)


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
    from .checkpoint import inspect_checkpoint

    info = inspect_checkpoint(path, ema=False if no_ema else None, inner_heads=inner_heads)
    if as_json:
        _json(info.to_dict())
        return
    click.echo(f"{info.path}: {info.source}")
    rows = [
        ("kind", info.kind), ("weights", info.weights), ("parameters", f"{info.parameters:,}"),
        ("sha256", info.sha256), ("config", info.config_source), *info.config.to_dict().items(),
    ]  # fmt: skip
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
