"""Subcommands for very many images: make them, judge them, find the best settings."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import PLAN, SAMPLING, Integers, Labels, Numbers, Options, print_json, quiet, say, then
from .group import main

if TYPE_CHECKING:
    from arinar.runtime.run import Run
    from arinar.runtime.sampling import Sampled
    from arinar.runtime.shards import Shard

MODEL = Options(
    click.option("--backend", help="Execution backend, the same on all workers. [default: the best]"),
    click.option(
        "--precision", help="Variant of the bundle; bf16: its fp32 graphs on OpenVINO. [default: fp32, or the only one]"
    ),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each worker. [default: 1]"),
    click.option("--batch-size", type=click.IntRange(min=1), help="Images of a micro-batch. [default: by the model]"),
    click.option(
        "--shard-size",
        type=click.IntRange(min=1),
        help="Images of a shard, what is lost at most of a worker that is killed. [default: by the number of images]",
    ),
)
WORKERS = Options(
    click.option(
        "--workers",
        type=click.IntRange(0, 100_000),
        default=0,
        show_default=True,
        help="Processes on Ray, each with a pipeline; 0: this process alone, without Ray.",
    ),
    click.option("--address", metavar="RAY", help="Address of a Ray cluster (host:port, auto). [default: this machine]"),
    click.option("--gpus", type=click.FloatRange(min=0), help="GPUs of each worker. [default: 1, where the cluster has any]"),
)


@contextlib.contextmanager
def open_workers(workers: int, address: str | None, gpus: float | None, threads: int | None) -> Any:
    """What shares tasks out. Options as WORKERS gives them."""
    from arinar.runtime.sampling import one_process

    if not workers:
        if address is not None:
            raise click.UsageError("--address is for workers: add --workers N")
        yield one_process
        return
    from arinar.serve.pool import RayPool

    def lost(reason: str) -> None:
        say(f"a worker is replaced: {reason}")

    with RayPool(workers, address, cpus=threads or 1, gpus=gpus, on_loss=lost) as pool:
        yield pool


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-n", "--num-images", type=click.IntRange(min=1), required=True, help="How many images.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--labels", type=Labels(), help="Classes, by id, range or name, in equal shares in this order. [default: all]")
@click.option("--npz/--no-npz", default=True, show_default=True, help="Write samples_NxHxWx3.npz (arr_0, uint8, NHWC).")
@click.option("--png", is_flag=True, help="Write images/000000.png and so on.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made, as JSON.")
@WORKERS
@MODEL
@SAMPLING
@PLAN
def sample(
    bundle: Path,
    num_images: int,
    out: Path,
    labels: list[int] | None,
    npz: bool,
    png: bool,
    as_json: bool,
    workers: int,
    address: str | None,
    gpus: float | None,
    **options: Any,
) -> None:
    """Make very many images: for an FID, say. Image i depends on the seed and i alone, whatever makes it.

    The folder holds shards, a record (run.json) with their hashes, and one .npz file as evaluators read it. Whatever ends the
    command, a worker or a machine: the same command again goes on where it stopped. With --workers it runs on Ray, on this
    machine or, with --address, on all of a cluster, which must see bundle and folder under the same paths.

    \b
    Example:  arinar sample bundle/ --num-images 50000 -o run/ --workers 8
              arinar sample digits-bundle/ --num-images 100 -o digits/ --labels 3,5 --png --no-npz
    """
    from arinar.runtime.bundle import Bundle
    from arinar.runtime.run import Run
    from arinar.runtime.sampling import sample as make_all

    opened = Bundle.open(bundle)
    run = Run.of(opened, num_images, labels=labels, **options)
    with open_workers(workers, address, gpus, run.threads) as pool, _bar(run) as progress:
        done = make_all(opened, out, run, workers=pool, npz=npz, png=png, progress=progress)
    _tell_sampled(done, out, as_json)


@contextlib.contextmanager
def _bar(run: Run) -> Any:
    """A bar with images per second and the time left -> what is called for each shard."""
    from tqdm import tqdm

    with tqdm(total=run.num_images, unit=" images", smoothing=0.05) as bar:

        def step(shard: Shard) -> None:
            if shard.damage:
                bar.write(f"{shard.damage}: made again", file=sys.stderr)
            if not shard.made:
                bar.initial += shard.images  # what was there is no part of the pace
            bar.update(shard.images)

        yield step


def _tell_sampled(done: Sampled, out: Path, as_json: bool) -> None:
    run, record = done.record.run, done.record
    if len(record.made_on) > 1:
        say(f"WARNING: made on different machines ({'; '.join(record.made_on)}): the images' last bits may be each one's own")
    if as_json:
        print_json(
            {
                "folder": str(out),
                "images": run.num_images,
                "made": done.made,
                "damaged": done.damaged,
                "npz": str(out / record.npz["name"]) if record.npz else None,
                "sha256": record.npz.get("sha256"),
                "shards": run.shards,
                "made_on": record.made_on,
            }
        )
        return
    there = run.num_images - done.made
    kept = f" ({there} were there already)" if there else ""
    click.echo(f"{run.num_images} images in {out}{kept}" + (f": {record.npz['name']}" if record.npz else ""))
    then(f"arinar evaluate {out} --reference STATS_OR_SAMPLES")


FEATURES = Options(
    click.option(
        "--features",
        default="builtin",
        show_default=True,
        help="builtin (32 fixed features of shape and colour), inception (needs torch-fidelity), or your own module:function, images (N, H, W, 3) uint8 -> (N, F), or that and logits (N, C).",
    ),
    click.option(
        "--weights",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Of inception: torch-fidelity's weights-inception-2015-12-05-6726825d.pth.",
    ),
)


def check_features_options(features: str, weights: Path | None) -> None:
    """Inception comes with a file of weights, nothing else does."""
    if features == "inception" and weights is None:
        from arinar.measure.features import INCEPTION

        raise ValueError(f"--features inception needs --weights FILE: {INCEPTION}")
    if features != "inception" and weights is not None:
        raise click.UsageError("--weights is for --features inception")


@main.command()
@click.argument("samples")
@click.option("--reference", metavar="STATS_OR_SAMPLES", help="What to compare with: as SAMPLES, or an .npz with mu and sigma.")
@click.option(
    "--floor", metavar="SAMPLES", help="A run as the reference, with another seed: how far apart two runs of one model are."
)
@click.option(
    "--bootstrap", type=click.IntRange(0, 10_000), default=100, show_default=True, help="Draws for the FID's interval; 0: none."
)
@click.option("--json", "as_json", is_flag=True, help="Print every number, as JSON.")
@FEATURES
@WORKERS
def evaluate(
    samples: str,
    reference: str | None,
    floor: str | None,
    bootstrap: int,
    as_json: bool,
    features: str,
    weights: Path | None,
    workers: int,
    address: str | None,
    gpus: float | None,
) -> None:
    """How good are very many images? FID, KID, precision, recall and more.

    Against a reference; and the inception score. SAMPLES is a run of `arinar sample`, a folder of pictures, an .npz file
    with arr_0, or "digits", the real ones. Images are compared as the uint8 pixels that they are.

    \b
    Example:  arinar evaluate run/ --reference adm_in256_stats.npz --features inception --weights weights-inception-2015-12-05-6726825d.pth
              arinar evaluate int8-run/ --reference fp32-run/ --floor fp32-run-seed-1/
              arinar evaluate samples_50000x256x256x3.npz --reference photos/
    """
    from tqdm import tqdm

    from arinar.measure.evaluate import evaluate as judge_all
    from arinar.measure.evaluation_report import table

    check_features_options(features, weights)
    with open_workers(workers, address, gpus, 1) as pool, tqdm(unit=" images") as bar:
        found = judge_all(
            samples,
            reference,
            features=features,
            weights=weights,
            floor=floor,
            bootstrap=bootstrap,
            workers=pool,
            progress=bar.update,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        click.echo(table(found))
        then("arinar sweep BUNDLE --reference STATS_OR_SAMPLES -o sweep/   (which settings are best)")


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--reference", required=True, metavar="STATS_OR_SAMPLES", help="What to compare with, as for `arinar evaluate`.")
@click.option("-n", "--num-images", type=click.IntRange(min=2), default=5000, show_default=True, help="Images of each setting.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the sweep.")
@click.option("--guidance", type=Numbers(), help="Guidance scales, e.g. 3:5:.25. [default: the bundle's]")
@click.option("--temperature", type=Numbers(), help="Temperatures, e.g. .9,1,1.1. [default: the bundle's]")
@click.option("--num-iter", type=Integers(), help="Numbers of outer steps, e.g. 32,64. [default: the bundle's]")
@click.option("--labels", type=Labels(), help="Classes, by id, range or name, in equal shares. [default: all]")
@click.option("--seed", type=int, default=0, show_default=True, help="The same for every setting.")
@click.option(
    "--bootstrap", type=click.IntRange(0, 10_000), default=100, show_default=True, help="Draws for the intervals; 0: none."
)
@click.option("--keep-images", is_flag=True, help="Keep the images of every setting, not its score alone.")
@click.option("--write-defaults", is_flag=True, help="Make the best setting the bundle's defaults.")
@click.option("--json", "as_json", is_flag=True, help="Print every number, as JSON.")
@FEATURES
@WORKERS
@MODEL
def sweep(
    bundle: Path,
    reference: str,
    num_images: int,
    out: Path,
    guidance: list[float] | None,
    temperature: list[float] | None,
    num_iter: list[int] | None,
    bootstrap: int,
    keep_images: bool,
    write_defaults: bool,
    as_json: bool,
    features: str,
    weights: Path | None,
    workers: int,
    address: str | None,
    gpus: float | None,
    **options: Any,
) -> None:
    """Which guidance, temperature and number of steps are best?

    Every combination, from the same noise, by its FID. What has been scored is kept: the same command goes on where it stopped, and one with more values makes those.

    \b
    Example:  arinar sweep bundle/ --guidance 3:5:.25 --temperature .9,1,1.1 --num-iter 32,64 -n 5000 --reference adm_in256_stats.npz --features inception --weights weights-inception-2015-12-05-6726825d.pth -o sweep/
              arinar sweep digits-bundle/ --guidance 1:4 -n 500 --reference digits -o sweep/ --write-defaults
    """
    from arinar.files import write_text
    from arinar.measure import sweep as sweeping
    from arinar.measure.sweep_report import render, table
    from arinar.runtime.bundle import Bundle

    check_features_options(features, weights)
    opened = Bundle.open(bundle)
    settings = sweeping.grid(opened, guidance, temperature, num_iter)
    with open_workers(workers, address, gpus, options["threads"]) as pool:
        found = sweeping.sweep(
            opened,
            out,
            settings,
            num_images,
            reference,
            features=features,
            weights=weights,
            bootstrap=bootstrap,
            keep_images=keep_images,
            workers=pool,
            progress=quiet if as_json else say,
            **options,
        )
    write_text(out / sweeping.PAGE, render(found))
    if as_json:
        print_json(found.to_dict())
    else:
        click.echo(f"{table(found)}\n{out / sweeping.PAGE} has the plots")
    if write_defaults:
        from arinar.export.folder import write_defaults as write

        write(bundle, sweeping.with_best(opened.manifest.defaults, found.best), say)
        say(f"{bundle} now has these defaults")
    elif not as_json:
        then(f"look at {out / sweeping.PAGE}; --write-defaults gives the bundle the best settings")
