"""Subcommands that measure: is it right, is it fast?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from .common import (
    CHECKPOINT,
    RUNTIME,
    SAMPLING,
    Integers,
    Labels,
    inspected,
    load_models,
    open_pipeline,
    print_json,
    quiet,
    say,
    then,
    without_none,
)
from .group import FAILED, main


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
    "--control",
    is_flag=True,
    help="Also compare PyTorch in float32 with PyTorch in float64, beside levels 2 and 3. [default: only where one of their limits is exceeded]",
)
@click.option(
    "--edit", is_flag=True, help="At level 3 also an edit: half of PyTorch's tokens are given, both generate the rest."
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
    labels: list[int | str],
    distribution: int,
    features: str,
    fid_stats: Path | None,
    limits: tuple[str, ...],
    control: bool,
    edit: bool,
    report_file: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Is the deployed bundle still the trained model?

    Exits with 1 when a check fails. Four levels: each graph alone; along the PyTorch trajectory, step by step; both on their own from the same noise;
    and (--distribution) the law of many images, beside what two PyTorch runs differ. Where level 2 or 3 exceeds a limit,
    it is judged by how far PyTorch in float32 is from PyTorch in float64 on the same weights and noise.

    \b
    Example:  arinar parity bundle/ --checkpoint checkpoint-last.pth --vae kl16.ckpt --labels 207 --num-iter 16
              arinar parity digits-bundle/ --checkpoint digits --distribution 500 --report report.html
    """
    from arinar.files import check_writable
    from arinar.measure.checks import parse_thresholds
    from arinar.measure.parity import run_parity

    if report_file is not None:
        check_writable(report_file)
    for option, given in (("--fid-stats", fid_stats is not None), ("--features", features != "builtin")):
        if given and not distribution:
            raise click.UsageError(f"{option} is for comparing distributions: add --distribution N, the number of images")
    pipeline = open_pipeline(bundle, **RUNTIME.of(options))
    num_iter = options["num_iter"]
    if pipeline.config.outer == "causal" and num_iter not in (None, pipeline.config.seq_len):
        raise ValueError(f"num_iter is {num_iter}; a causal model generates one token a step: leave --num-iter out")
    thresholds = parse_thresholds(limits, pipeline.bundle.manifest.scheme(pipeline.precision))
    model, autoencoder = load_models(checkpoint, vae, **CHECKPOINT.of(options))
    report = run_parity(
        pipeline,
        model,
        autoencoder,
        labels=pipeline.resolve(labels).classes.shown(),
        thresholds=thresholds,
        distribution=distribution,
        features=features,
        fid_stats=fid_stats,
        reference=inspected(checkpoint, vae, **CHECKPOINT.of(options)),
        control=control,
        edit=edit,
        progress=quiet if as_json else say,
        **without_none(SAMPLING.of(options)),
    )
    if report_file is not None:
        from arinar.measure.parity_report import write_report

        write_report(report, report_file)
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(report.table())
        if report_file is not None:
            then(f"look at {report_file}")
        elif report.passed:
            then(f"arinar generate {bundle} --labels 0 -o out/   (--report FILE.html here: the same with curves)")
        else:
            then("docs/parity.md says what each row means, and when a failure is bad (--report FILE.html: with curves)")
    if not report.passed:
        sys.exit(FAILED)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--batch", "batches", default="1,4", show_default=True, type=Integers(), help="Batch sizes.")
@click.option("--num-iter", "num_iters", type=Integers(), help="Integers of outer steps. [default: the bundle's]")
@click.option("--sampling-steps", metavar="STEPS", help="Of a diffusion head, e.g. 25. [default: the bundle's]")
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
    sampling_steps: str | None,
    guidance_scale: float | None,
    repeats: int,
    out: Path | None,
    html_file: Path | None,
    against: Path | None,
    as_json: bool,
    **runtime: Any,
) -> None:
    """How fast is a bundle on this machine, and how fast could it be?

    Time by phase, memory, cold start, and the time that it takes at least.

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
    pipeline = open_pipeline(bundle, **runtime)
    report = benchmark.bench(
        pipeline,
        batches=batches,
        num_iters=num_iters,
        sampling_steps=sampling_steps,
        guidance_scale=guidance_scale,
        repeats=repeats,
        progress=quiet if as_json else say,
    )
    if earlier is not None:
        report["against"] = benchmark.compare(earlier, report)
    # Printed before it is written: a disk that is full by now does not cost the measurement.
    if as_json:
        print_json(report)
    else:
        click.echo(benchmark.table(report))
    if out is not None:
        write_text(out, json.dumps(report, indent=2, sort_keys=True) + "\n")
    if html_file is not None:
        from arinar.measure.bench_report import render

        write_text(html_file, render(report))
    if not as_json:
        then(
            f"arinar bench {bundle} --against {out}   (after a change)"
            if out
            else "-o FILE.json keeps it, --against FILE.json compares"
        )
