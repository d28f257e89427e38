"""Subcommands that make bundles and add to them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

from .common import CHECKPOINT, SAMPLING, Labels, inspected, load_models, print_json, quiet, say, then, without_none
from .group import FAILED, main


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
    **options: Any,
) -> None:
    """Write a trained model as a bundle of ONNX graphs, each proven.

    CHECKPOINT is a published training checkpoint, a safetensors file, or a demo model's name. The 8-bit precisions are
    made from the bundle's fp32 graphs (exported first where they are missing); for them CHECKPOINT may be a bundle too.

    \b
    Example:  arinar export checkpoint-last.pth --vae kl16.ckpt -o bundle/
              arinar export digits -o digits-bundle/
    """
    from arinar.files import check_folder
    from arinar.schemes import QUANTIZED

    check_folder(out)
    if precision in QUANTIZED:
        manifest = _export_quantized(checkpoint, vae, out, precision, calibration, opset, overwrite, options)
        _tell_exported(manifest, checkpoint, vae, out, precision, as_json)
        return
    if calibration is not None:
        raise click.UsageError(f"--calibration is for {', '.join(QUANTIZED)}; {precision} has no use for it")
    model, autoencoder = load_models(checkpoint, vae, **options)
    from arinar.export.bundle import export_bundle

    manifest = export_bundle(
        model,
        autoencoder,
        out,
        precision=precision,
        vae_precision=vae_precision,
        opset=opset,
        overwrite=overwrite,
        provenance=inspected(checkpoint, vae, **options),
        progress=say,
    )
    _tell_exported(manifest, checkpoint, vae, out, precision, as_json)


def _tell_exported(manifest: Any, checkpoint: str, vae: str | None, out: Path, precision: str, as_json: bool) -> None:
    if as_json:
        click.echo(manifest.to_json(), nl=False)
        return
    variant = "" if precision == "fp32" else f" --precision {precision}"
    models = "" if Path(checkpoint).is_dir() else f" --checkpoint {checkpoint}{f' --vae {vae}' if vae else ''}"
    then(
        f"arinar parity {out}{variant}{models or ' --checkpoint CHECKPOINT --vae VAE'}   (is it still the same model?)",
        f"arinar generate {out}{variant} --labels {'0' if manifest.config.num_classes < 1000 else '207'} -o out/",
    )


def _export_quantized(
    checkpoint: str,
    vae: str | None,
    out: Path,
    precision: str,
    calibration: Path | None,
    opset: int,
    overwrite: bool,
    options: dict[str, Any],
) -> Any:
    """Add an 8-bit precision to the bundle; where it has no fp32 graphs yet, export those first. ``options``: CHECKPOINT's."""
    from arinar.export.bundle import export_bundle
    from arinar.export.quantize import check_weights, quantize_bundle
    from arinar.runtime import Bundle, BundleError

    if Path(checkpoint).is_dir():
        if not out.exists() or not out.samefile(checkpoint):
            raise click.UsageError(f"a precision is added to the bundle itself: -o {checkpoint}")
    else:
        model, autoencoder = load_models(checkpoint, vae, **options)
        if (out / "manifest.json").is_file() and "fp32" in Bundle.open(out).manifest.graphs:
            check_weights(Bundle.open(out), model, autoencoder)
        else:
            provenance = inspected(checkpoint, vae, **options)
            try:
                export_bundle(model, autoencoder, out, opset=opset, provenance=provenance, progress=say)
            except BundleError:
                # Another command may have put the same graphs there meanwhile: just as well.
                if not (out / "manifest.json").is_file() or "fp32" not in Bundle.open(out).manifest.graphs:
                    raise
                check_weights(Bundle.open(out), model, autoencoder)
    return quantize_bundle(out, precision, calibration, overwrite=overwrite, progress=say)


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
    labels: list[int | str] | None,
    out: Path,
    precisions: tuple[str, ...],
    budget_kl: float,
    batch_size: int,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find out which layers bear 8 bits, by what they see while the model generates.

    MODEL is a bundle with fp32 graphs, or a checkpoint, which is exported for the occasion. Ctrl-C leaves what was
    recorded; the same command goes on from there.

    \b
    Example:  arinar calibrate bundle/ --num-images 256 --out calib.json
              arinar export bundle/ -o bundle/ --precision int8-static --calibration calib.json
    """
    import contextlib

    from arinar.calibration.precision import calibrate as run
    from arinar.calibration.precision import check, check_out
    from arinar.demo import DEMO_MODELS
    from arinar.schemes import QUANTIZED

    arguments = without_none(SAMPLING.of(options)) | {
        "num_images": num_images,
        "labels": labels,
        "batch_size": batch_size,
        "budget_kl": budget_kl,
    }
    arguments["precisions"] = precisions or QUANTIZED
    check_out(out)
    with contextlib.ExitStack() as stack:
        bundle = Path(model)
        if bundle.is_dir() and vae is not None:
            raise click.UsageError("--vae belongs to a checkpoint; a bundle has its own")
        if not bundle.exists() and model not in DEMO_MODELS:
            raise ValueError(f"there is no bundle or checkpoint {model}; a demo model is {' or '.join(DEMO_MODELS)}")
        if not bundle.is_dir():
            from arinar.export.bundle import export_bundle
            from arinar.files import temporary_folder
            from arinar.runtime.bundle import Defaults

            trained, autoencoder = load_models(model, vae, **CHECKPOINT.of(options))
            config = trained.config
            check(config, Defaults.of(config), out, **arguments)
            bundle = stack.enter_context(temporary_folder("arinar-calibrate")) / "bundle"
            export_bundle(trained, autoencoder, bundle, progress=say)
        result = run(bundle, out, threads=threads, progress=say, **arguments)
    if as_json:
        print_json(result["maps"])
    else:
        _print_calibration(result)
        click.echo(f"{out} written")
        target = model if Path(model).is_dir() else "bundle/"
        then(f"arinar export {target} -o {target} --precision {arguments['precisions'][0]} --calibration {out}")


def _print_calibration(result: dict[str, Any]) -> None:
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
@click.option("--tf32/--no-tf32", default=True, show_default=True, help="Of the VAE's decoder, where it is float32.")
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
    tf32: bool,
    compute_capability: str | None,
    timeout: float,
    rebuild: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build TensorRT engines from a bundle's graphs.

    Exits with 1 when one could not be built. What has not changed since the last build is kept. Engines for several GPUs, versions and precisions lie side by
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
        tf32=tf32,
        compute_capability=[item.strip() for item in (compute_capability or "").split(",") if item.strip()],
        timeout=timeout,
        rebuild=rebuild,
        dry_run=dry_run,
        progress=quiet if as_json else say,
    )
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if as_json:
        print_json([outcome.to_dict() for outcome in outcomes])
    elif dry_run:
        for outcome in outcomes:
            click.echo(f"{outcome.graph}: {outcome.state}, {outcome.path}")
            for name, (low, usual, high) in (item for profile in outcome.info.profiles for item in profile.items()):
                click.echo(f"  {name}: {low} .. {usual} .. {high}")
    else:
        size = sum(outcome.info.size for outcome in outcomes if outcome.state != "failed")
        states = ", ".join(f"{sum(o.state == s for o in outcomes)} {s}" for s in ("built", "reused", "failed"))
        click.echo(f"{outcomes[0].path.parent if outcomes else bundle}: {states}, {size / 1e6:.1f} MB")
        for outcome in failed:
            click.echo(f"FAILED {outcome.graph}: {outcome.error}", err=True)
        if outcomes and not failed:
            then(f"arinar generate {bundle} --backend {backend} --precision {outcomes[0].info.precision} --labels 0 -o out/")
    if failed:
        sys.exit(FAILED)
