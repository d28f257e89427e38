"""What a plan costs in quality and gains in time: fewer steps, staged orders, guidance in an interval, its change reused.

    python -m benchmarks.plans quality LETTERS-BUNDLE LETTERS -o plans/    # LETTERS: folder of `benchmarks.letters`
    python -m benchmarks.plans seconds BASE-BUNDLE -o plans/               # `benchmarks.heads make` makes one
    python -m benchmarks.plans show plans/                                 # table and plot, from both

*Quality*: the same seed and labels through every plan, on a trained model of 64 tokens. Each set of images is compared with the
exact plan's in two feature spaces (those of an independent reader of letters, and the built-in ones), by the squared Frechet
distance, its deviation by bootstrap; the yardstick is how far the exact plan's images of another seed are. The same for real
letters of held-out fonts, where what matters is the difference to the exact plan's distance, whose bootstrap is paired.

*Seconds*: whole images at batch 1, all plans in turn, as ratios to the exact plan of the same round; medians. ``--reference``
has plain PyTorch (the published algorithm, eager) take its turn.

A plan has as many steps for both models: what a step adds to an image is then the same share of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from arinar.config import ArinarConfig
from arinar.files import check_folder, write_text
from arinar.measure.evaluate import distance, frechet_replicates
from arinar.measure.image_sets import ImageSet, Statistics, open_images
from arinar.measure.moments import Gathered, Source, gather
from arinar.runtime import Bundle, Pipeline
from arinar.runtime.images import contact_sheet
from arinar.runtime.machine import machine, usable_cores
from arinar.runtime.run import Run, fingerprint
from arinar.runtime.sampling import one_process, sample
from arinar.schedule import checkerboard

#: Images (N, H, W, 3) uint8 -> their features, what is read.
Reader = Callable[[Any], tuple[Any, Any]]
BOOTSTRAP = 100
#: Images of a micro-batch: two of each letter.
BATCH = 52
QUALITY, SECONDS, SHEET = "quality.json", "seconds.json", "sheet.png"
#: Images of each plan side by side on the contact sheet.
SHEET_IMAGES = 12
EXACT = "exact, 64 steps"


@dataclass(frozen=True)
class Plan:
    """``stages``: steps of each set of a staged order; ``options``: arguments of `Pipeline.generate`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    stages: tuple[int, ...] = ()
    precision: str = "fp32"

    def arguments(self, config: ArinarConfig) -> dict[str, Any]:
        if not self.stages:
            return {"num_iter": 64, **self.options}
        places = checkerboard(config.grid_size, len(self.stages))
        sets = [f"{places.count(number)}x{steps}" for number, steps in enumerate(self.stages)]
        return {"schedule": "staged:" + ",".join(sets), **self.options}

    @property
    def folder(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)


def _plans() -> list[Plan]:
    late = {"guidance_interval": (0.25, 1.0)}
    found = [
        Plan(EXACT),
        *(Plan(f"{steps} steps", {"num_iter": steps}) for steps in (48, 32, 24, 16)),
        Plan("staged 16+6+2", stages=(16, 6, 2)),
        Plan("staged 12+3+1", stages=(12, 3, 1)),
        Plan("staged 8+2+1", stages=(8, 2, 1)),
        Plan("guided from 25 %", late),
        *(Plan(f"refresh {every}", {"guidance_refresh": every}) for every in (2, 4)),
        Plan("32 steps, refresh 2", {"num_iter": 32, "guidance_refresh": 2}),
        Plan("24 steps, refresh 2", {"num_iter": 24, "guidance_refresh": 2}),
        Plan("24 steps, from 25 %, refresh 2", {"num_iter": 24, "guidance_refresh": 2, **late}),
        Plan("staged 16+6+2, refresh 2", {"guidance_refresh": 2}, (16, 6, 2)),
        Plan("staged 16+6+2, refresh 4", {"guidance_refresh": 4}, (16, 6, 2)),
    ]
    eight_bits = (EXACT, "32 steps", "24 steps", "24 steps, refresh 2", "staged 16+6+2", "staged 16+6+2, refresh 2")
    return found + [Plan(f"int8: {plan.name}", plan.options, plan.stages, "int8") for plan in found if plan.name in eight_bits]


PLANS = _plans()


@click.group(help=__doc__.partition("\n")[0] if __doc__ else None)
def main() -> None:
    pass


# -------------------------------------------------------------------------------------------------------- quality


@dataclass(frozen=True)
class Space:
    """A feature space: its source, what is compared in it, the distance of two seeds; ``exact_to_real``: the bootstrap's
    distances of the exact images to real ones."""

    source: Source
    exact: Gathered
    real: Gathered
    floor: float
    exact_to_real: list[float]


@main.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("letters", type=click.Path(exists=True, path_type=Path))
@click.option("-n", "--num-images", default=1040, show_default=True, help="Images of each plan.")
@click.option("--threads", type=int, default=usable_cores(), show_default="all")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True)
def quality(bundle: Path, letters: Path, num_images: int, threads: int, out: Path) -> None:
    """Images of every plan; those that are there already are not made again."""
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    opened, sets = Bundle.open(bundle), {}
    config = opened.manifest.config
    precisions = opened.precisions

    def made(plan: Plan, seed: int = 0) -> ImageSet:
        place = out / "runs" / f"{plan.folder}-{seed}"
        began = time.perf_counter()
        how = plan.arguments(config)
        how |= {"precision": plan.precision, "threads": threads, "batch_size": BATCH}
        run = Run.of(opened, num_images, seed=seed, **how)
        done = sample(opened, place, run, npz=False)
        click.echo(f"{plan.name}, seed {seed}: {done.made} images made in {time.perf_counter() - began:.0f} s", err=True)
        return open_images(str(place))

    for plan in PLANS:
        if plan.precision in precisions:
            sets[plan.name] = made(plan)
    read = _reader(letters)
    spaces = _spaces(sets[EXACT], made(PLANS[0], 1), letters, config, read)
    result = {
        "model": fingerprint(opened, PLANS[0].precision),
        "images": num_images,
        "floor": {name: space.floor for name, space in spaces.items()},
        "real": {name: distance(space.exact, _moments(space.real)) for name, space in spaces.items()},
        "rows": {name: _row(images, spaces, read) for name, images in sets.items()},
    }
    write_text(out / QUALITY, json.dumps(result, indent=1) + "\n")
    _sheet(sets).save(out / SHEET)
    click.echo(f"{out / QUALITY}, {out / SHEET}")


def _reader(letters: Path) -> Reader:
    """Images -> features of the reader of letters, what it reads."""
    from benchmarks import letters_judge

    reader = letters_judge.load(letters / "judge.pt")
    return lambda images: letters_judge.read(reader, images)


def _spaces(exact: ImageSet, other_seed: ImageSet, letters: Path, config: ArinarConfig, read: Reader) -> dict[str, Space]:
    def reader(images: Any) -> Any:
        return read(images)[0]

    real, found = open_images(str(letters / "val")), {}
    for name, source in {"reader": Source(reader, config), "built-in": Source("builtin", config)}.items():
        ours, theirs, other = (gather(images, source, one_process) for images in (exact, real, other_seed))
        far = frechet_replicates(ours.features, _moments(theirs), None, BOOTSTRAP, paired=False)
        found[name] = Space(source, ours, theirs, distance(other, _moments(ours)), far)
    return found


def _moments(gathered: Gathered) -> Statistics:
    return Statistics(gathered.moments.mean, gathered.moments.covariance)


def _pixels(images: ImageSet) -> Any:
    """(N, H, W, 3) uint8."""
    return np.concatenate([part for piece in images.pieces for part in piece.parts()])


def _row(images: ImageSet, spaces: dict[str, Space], read: Reader) -> dict[str, Any]:
    """Agreement; in each space the distance to the exact images and how much further from real ones, with deviations."""
    row: dict[str, Any] = {"agreement": float(np.mean(read(_pixels(images))[1] == images.labels))}
    for name, space in spaces.items():
        ours = gather(images, space.source, one_process)
        exact, real = _moments(space.exact), _moments(space.real)
        near = frechet_replicates(ours.features, exact, space.exact.features, BOOTSTRAP, paired=True)
        far = frechet_replicates(ours.features, real, None, BOOTSTRAP, paired=False)
        row[name] = {
            "exact": distance(ours, exact),
            "exact_std": float(np.std(near, ddof=1)),
            "further_from_real": distance(ours, real) - distance(space.exact, real),
            "further_from_real_std": float(np.std(np.subtract(np.array(far), np.array(space.exact_to_real)), ddof=1)),
        }
    return row


def _sheet(sets: dict[str, ImageSet]) -> Image.Image:
    """Images of classes spread over all, a row a plan."""
    shown: list[Image.Image] = []
    for images in sets.values():
        pixels = _pixels(images)
        chosen = np.linspace(0, len(pixels) - 1, SHEET_IMAGES).astype(int)
        shown += [Image.fromarray(pixels[index]) for index in chosen]
    return contact_sheet(shown, SHEET_IMAGES, rows=list(sets))


# -------------------------------------------------------------------------------------------------------- seconds


@main.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", type=int, default=usable_cores(), show_default="all")
@click.option("--reference", is_flag=True, help="Plain PyTorch too, on random weights of the preset `base`.")
@click.option("--only", multiple=True, help="Plans' names. [default: all]")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True)
def seconds(bundle: Path, rounds: int, threads: int, reference: bool, only: tuple[str, ...], out: Path) -> None:
    """Whole images at batch 1, plan after plan, so many rounds."""
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    precisions = Bundle.open(bundle).precisions
    pipelines = {
        name: Pipeline.load(bundle, precision=name, threads=threads) for name in precisions if name in ("fp32", "int8")
    }
    plans = [plan for plan in PLANS if plan.precision in pipelines and (not only or plan.name in (EXACT, *only))]
    for pipeline in pipelines.values():
        pipeline.generate([0], num_iter=2)
    contenders = {plan.name: _generate(pipelines[plan.precision], plan) for plan in plans}
    if reference:
        contenders["PyTorch, eager"] = _eager(threads)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, make in contenders.items():
            taken[name].append(make(number))
            click.echo(f"round {number + 1}/{rounds} {name}: {taken[name][-1]['total']:.2f} s", err=True)
        result = {
            "machine": machine(["numpy", "onnxruntime", "torch"]),
            "threads": threads,
            "rounds": number + 1,
            "rows": taken,
        }
        write_text(out / SECONDS, json.dumps(result, indent=1) + "\n")


def _generate(pipeline: Pipeline, plan: Plan) -> Callable[[int], dict[str, float]]:
    how = plan.arguments(pipeline.config)
    return lambda seed: dict(pipeline.generate([0], seed=seed, **how).timings)


def _eager(threads: int) -> Callable[[int], dict[str, float]]:
    import torch

    from arinar.model import decode_images, random_models
    from arinar.sampler import sample as reference_sample

    torch.set_num_threads(threads)
    model, vae = random_models("base")

    @torch.no_grad()
    def make(seed: int) -> dict[str, float]:
        began = time.perf_counter()
        scale = model.config.default_guidance_scale
        decode_images(vae, reference_sample(model, [0], guidance_scale=scale, num_iter=64, seed=seed), model.config)
        return {"total": time.perf_counter() - began}

    return make


# ----------------------------------------------------------------------------------------------------------- show


@main.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
def show(folder: Path) -> None:
    """A table (plans.md) and a plot (plans.svg) of what the folder has."""
    from benchmarks import plans_report

    for path in plans_report.write(folder, EXACT):
        click.echo(path)


if __name__ == "__main__":
    main()
