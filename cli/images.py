"""Subcommands that make images."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arinar.demo import DEMO_MODELS

from .common import PLAN, RUNTIME, SAMPLING, Labels, load_models, open_pipeline, print_json, provenance, say, then
from .group import FAILED, main

if TYPE_CHECKING:
    from PIL.Image import Image

    from arinar.class_names import Classes
    from arinar.judge import Judgement
    from arinar.runtime import Generation, Progress
    from arinar.runtime.worklist import Worklist


#: Files of one run, all in one folder, each with its settings in memory.
MOST_IMAGES = 1_000_000
#: Images of the demo, all generated at one time, and shown in one picture.
MOST_DEMO_IMAGES = 100


@main.command()
@click.option(
    "--model",
    type=click.Choice(list(DEMO_MODELS)),
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
@click.option("--per-class", type=click.IntRange(1, MOST_DEMO_IMAGES), default=10, show_default=True, help="Images per digit.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def demo(model: str, out: Path, per_class: int, seed: int, as_json: bool) -> None:
    """The whole journey with a small model that ships with the package.

    \b
    Example:  arinar demo
              arinar demo --model digits-causal -o causal-output
              arinar demo --model digits-mar -o mar-output
    """
    from arinar.files import check_folder

    check_folder(out)
    began = time.perf_counter()
    say(f"1. the shipped checkpoint of {model!r}: a real model, trained on scikit-learn's handwritten digits")
    from arinar.checkpoint import inspect_checkpoint

    arinar, vae = load_models(model)
    info = inspect_checkpoint(model)
    say(f"   {info.parameters:,} parameters, {arinar.config.outer} outer network")

    say("2. PyTorch modules -> ONNX graphs, each checked against PyTorch (the slow part)")
    from arinar.export.bundle import export_bundle

    bundle = out / f"{model}-bundle"
    export_bundle(arinar, vae, bundle, overwrite=True, provenance=provenance(model, None, info), progress=_indent)

    say(f"3. ONNX Runtime generates {10 * per_class} images, without PyTorch")
    from arinar.runtime import Pipeline
    from arinar.runtime.images import contact_sheet, save_png

    pipeline = Pipeline.load(bundle)
    labels = [digit for digit in range(10) for _ in range(per_class)]
    made = pipeline.generate(labels, seed=seed)
    picture = out / f"{model}.png"
    sheet = contact_sheet(made.images, per_class, scale=2, rows=[str(digit) for digit in range(10)], title=_title(made))
    save_png(sheet, picture, {"model": model, "seed": seed})
    say(f"   {len(labels)} images in {made.timings['total']:.1f} s -> {picture} (one row per digit)")

    say("4. are they what PyTorch would have made? Same noise through both")
    from arinar.measure.parity import run_parity

    report = run_parity(pipeline, arinar, vae, labels=list(range(10)), seed=seed, progress=_indent)
    say("\n" + report.table() + "\n")

    say("5. an independent classifier, trained on the real digits, reads the images")
    verdict = _judged(made.images, labels)
    seconds = time.perf_counter() - began
    say(f"done in {seconds:.0f} s: look at {picture}")
    then(
        f"arinar generate {bundle} --labels 0-9 --grid -o out/   (more of them)",
        f"arinar inspect {bundle}   (what is in a bundle)",
        f"arinar export {bundle} -o {bundle} --precision int8   (fewer bits, less time)",
        "arinar train --help   (a model of your own)",
    )
    if as_json:
        print_json(
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


def _title(made: Generation) -> str:
    """How the images of a sheet were made, as far as they were made alike."""
    about = made.images[0].info
    steps = f", {about['sampling_steps']} sampling steps" if "sampling_steps" in about else ""
    return f"seed {about['seed']}, {about['precision']}, guidance {about['guidance_scale']:g}, {about['num_iter']} steps{steps}"


def _indent(line: str) -> None:
    say(f"   {line}")


def _judged(images: list[Image], labels: list[int]) -> Judgement:
    import numpy as np

    from arinar.judge import judge

    verdict = judge(np.stack([np.asarray(image) for image in images]), np.array(labels))
    say(
        f"   it agrees with the label on {verdict.agreement:.1%}; diversity within a class {verdict.diversity:.2f} of "
        f"real digits'; distance to the nearest training image {verdict.novelty:.2f} of held-out digits'"
    )
    return verdict


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--labels",
    type=Labels(),
    required=True,
    help='Class ids, ranges and names: 207,360, 0-9, "golden retriever"; -1 is no class.',
)
@click.option("--per-label", type=click.IntRange(min=1), default=1, show_default=True, help="Images of each label.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the PNG files.")
@click.option("--grid", is_flag=True, help="Also write a contact sheet, grid.png.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Images at a time; fixing it makes results identical to the last bit."
)
@click.option("--overwrite", is_flag=True, help="Replace images that were made with other settings.")
@click.option(
    "--preview",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Show how the images grow: .png is replaced after every step; .webp, .apng and .gif are animations, written at the end. For images that are made at one time (--batch-size).",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was made, as JSON.")
@SAMPLING
@PLAN
@RUNTIME
def generate(
    bundle: Path,
    labels: list[int | str],
    per_label: int,
    out: Path,
    grid: bool,
    batch_size: int | None,
    overwrite: bool,
    preview: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate images: PNG files that hold their label, seed and settings.

    Files that are already there, made with the same settings, are kept: an interrupted run goes on where it stopped.
    Ctrl-C leaves the images that were finished, and exits with 130.

    \b
    Example:  arinar generate bundle/ --labels 207,360 -o out/
              arinar generate bundle/ --labels "golden retriever",otter -o out/
              arinar generate digits-bundle/ --labels 0-9 --per-label 10 --grid -o digits/ --seed 7
              arinar generate bundle/ --labels 207 -o out/ --preview growing.webp
    """
    from tqdm import tqdm

    from arinar.files import check_folder

    if len(labels) * per_label > MOST_IMAGES:
        raise ValueError(
            f"{len(labels)} labels with {per_label} images each (--per-label) are more than {MOST_IMAGES:,} files in one "
            f"folder; make them in several runs, with --seed and -o of their own"
        )
    from arinar.runtime.growing import GrowingPicture
    from arinar.runtime.images import save_png
    from arinar.runtime.worklist import Worklist

    check_folder(out)
    growing = None if preview is None else GrowingPicture(preview)
    pipeline = open_pipeline(bundle, **RUNTIME.of(options))
    wanted, seed = [label for label in labels for _ in range(per_label)], options["seed"]
    work = Worklist(
        pipeline, wanted, out, batch_size=batch_size, overwrite=overwrite, **SAMPLING.of(options), **PLAN.of(options)
    )
    kept = len(wanted) - len(work.missing)
    if growing is not None:
        growing.check(len(work.missing), work.sampling.size)
    if kept:
        say(f"{kept} of {len(wanted)} images are already in {out}" + ("" if work.missing or not preview else ": no preview"))
    if work.missing:
        say("loading the graphs")
        work.prepare()
    with tqdm(total=len(work.missing) * work.sampling.num_iter, unit="step", disable=not work.missing) as bar:

        def step(progress: Progress) -> None:
            bar.update(len(progress.rows))
            if growing is not None:
                growing.add(progress.preview())

        timings = work.run(step)
    if growing is not None:
        growing.close()
    if grid:
        save_png(_grid(work, per_label), out / "grid.png", {"seed": seed})
    made = len(wanted) - kept
    if as_json:
        print_json(
            {
                "images": [str(path) for path in work.paths],
                "labels": work.labels,
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
        again = "another --seed makes others" if grid else "--grid adds a contact sheet, another --seed makes others"
        then(f"look at {work.paths[0]} ({again})")


def _grid(work: Worklist, per_label: int) -> Image:
    """A row for each label where it has several images, else a caption for each."""
    from arinar.runtime.images import contact_sheet

    captions = [_caption(label, work.pipeline.classes) for label in work.labels]
    if per_label > 1:
        return contact_sheet(work.images(), per_label, rows=captions[::per_label])
    return contact_sheet(work.images(), captions=captions)


def _caption(label: int | dict[int, float], classes: Classes) -> str:
    if isinstance(label, dict):
        return " + ".join(f"{share:.0%} {classes.short(key)}" for key, share in label.items())
    return classes.caption(label)
