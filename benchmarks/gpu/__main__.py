"""What a GPU machine can run, whether it is right there, and how fast: the riskiest questions first, whatever fails.

    python -m benchmarks.gpu --json results.json                                  # on a GPU machine, from a checkout's root
    python -m benchmarks.gpu --bundle digits=digits/ --bundle base=base/ --json results.json
    python -m benchmarks.gpu --only kernels --json kernels.json

The checks, in their order:

machine    versions, driver, memory, clocks.
cuda       memory, strided copies, capture and replay, events, another thread: each by itself.
kernels    our own kernels beside `arinar.runtime.gmm`, their bits, their time.
graphs     every graph of the small model beside the CPU; the outer step first where nothing is visible, or nothing hidden.
launching  of base at batch 1, 8, 64: what the host takes to enqueue each phase, what the device takes to run it.
race       images against the PyTorch reference on the same GPU, batch 1, 64, 8.
capture    ONNX Runtime's launches in CUDA graphs, in a process of its own.
parity     the parity protocol, base at 3 steps.
causal     the causal model: parity, and its time.
large      base at batch 256.
memory     200 images of the small model: memory stays level.

Whatever fails becomes a finding (how bad, which check, what it saw, what to do) with its traceback, and the next check goes
on. What does not fit the budget is skipped, and named. The file is written after every check. Models that are not given are
exported in child processes meanwhile.

Exit codes: 0 nothing to mend; 1 findings; 2 a wrong option; 3 no GPU that can be used (said in one line).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click

from arinar.runtime.backends.cuda import NoGpuError

from . import capture, device, fidelity, graphs, kernels, launching, race
from .models import Exports
from .report import Report
from .session import Session

NO_GPU = 3
#: Least seconds that a check is begun with.
LEAST = 10.0
#: Checks of the small model.
OF_THE_DEMO = ("graphs", "memory")
CHECKS = ("machine", "cuda", "kernels", "graphs", "launching", "race", "capture", "parity", "causal", "large", "memory")


def plan(session: Session) -> dict[str, Callable[[], None]]:
    """The checks by name, in their order."""
    report, full = session.report, session.full
    usual = [size for size in session.sizes if size <= session.most]
    large = [size for size in session.sizes if size > session.most]

    def until(seconds: float) -> float:
        """The end of a share of this many seconds, of what is left."""
        return report.elapsed() + min(seconds, max(LEAST, report.left() - LEAST))

    def captures() -> None:
        for name in (full,) if session.no_demo else (session.demo, full):
            capture.check(session, name, min(90.0, max(LEAST, report.left())))

    def causal() -> None:
        session.close(full)
        fidelity.parity(session, session.causal, num_iter=session.num_iter, images=1)
        race.check(session, session.causal, usual[:1], until(60.0))

    return {
        "cuda": partial(device.check_cuda, report),
        "kernels": partial(kernels.check, session),
        "graphs": partial(graphs.check, session),
        "launching": partial(launching.check, session),
        "race": lambda: race.check(session, full, usual, until(150.0)),
        "capture": captures,
        "parity": partial(fidelity.parity, session, full, num_iter=3, images=1),
        "causal": causal,
        "large": lambda: race.check(session, full, large, until(120.0)),
        "memory": partial(fidelity.memory, session),
    }


def run(session: Session, only: Sequence[str]) -> None:
    """The checks that are wanted, as long as the budget lasts."""
    report = session.report
    for name, check in plan(session).items():
        if (only and name not in only) or (session.no_demo and name in OF_THE_DEMO):
            continue
        if report.left() < LEAST:
            report.skip(name, "the budget is used up")
            continue
        with report.check(name):
            check()
    report.data["clocks_after"] = device.clocks()
    report.save()


def summary(report: Report) -> None:
    """On the terminal: the race, what to mend, what was skipped."""
    if rows := report.data.get("timings"):
        click.echo(race.table(rows))
    for finding in report.data["findings"]:
        click.echo(f"{finding['severity']}: {finding['check']}: {finding['evidence'].splitlines()[0][:300]}")
        if finding["remedy"]:
            click.echo(f"    {finding['remedy']}")
    for item in report.data["skipped"]:
        click.echo(f"skipped: {item['what']}: {item['why']}")


def given_bundles(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    found = {}
    for value in values:
        name, mark, path = value.partition("=")
        if not mark or not (Path(path) / "manifest.json").is_file():
            raise click.BadParameter(f"{value!r}; expected NAME=FOLDER, the folder that of a bundle")
        found[name] = Path(path).resolve()
    return found


@click.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File to write the results to.")
@click.option("--budget", type=float, default=540.0, show_default=True, help="Seconds; what does not fit is skipped.")
@click.option("--only", multiple=True, type=click.Choice(CHECKS[1:]), help="Only this check (several times for several).")
@click.option("--no-demo", is_flag=True, help="Without the checks of the small model.")
@click.option("--smoke", is_flag=True, help="Tiny models in place of full-size ones: does the script work?")
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp16", show_default=True)
@click.option("--batch", "sizes", multiple=True, type=click.IntRange(1), help="Batch sizes. [default: 1, 64, 8, 256]")
@click.option("--num-iter", type=click.IntRange(1), default=64, show_default=True)
@click.option("--guidance-scale", type=float, default=4.5, show_default=True)
@click.option(
    "--bundle", "given", multiple=True, callback=given_bundles, help="NAME=FOLDER: a bundle, so that NAME is not exported."
)
def main(
    json_path: Path | None,
    budget: float,
    only: tuple[str, ...],
    no_demo: bool,
    smoke: bool,
    precision: str,
    sizes: tuple[int, ...],
    num_iter: int,
    guidance_scale: float,
    given: dict[str, Path],
) -> None:
    """Check and time the runtime on this machine's GPU."""
    report = Report(json_path, budget)
    report.data["settings"] = {"precision": precision, "num_iter": num_iter, "guidance_scale": guidance_scale, "smoke": smoke}
    try:
        device.describe(report)
    except NoGpuError as error:
        report.find("broken", "machine", str(error), "run it on a machine with an NVIDIA GPU, its driver and cuda-bindings")
        report.save()
        sys.exit(NO_GPU)
    full, causal = ("tiny", "tiny-causal") if smoke else ("base", "base-causal")
    with tempfile.TemporaryDirectory(prefix="arinar-gpu-") as folder:
        exports = Exports(report, Path(folder), given)
        session = Session(
            report,
            exports,
            precision,
            demo="digits",
            full=full,
            causal=causal,
            sizes=sizes or ((1, 4) if smoke else (1, 64, 8, 256)),
            num_iter=min(num_iter, 4) if smoke else num_iter,
            guidance_scale=guidance_scale,
            no_demo=no_demo,
        )
        try:
            for name in exports_of(session, only):
                exports.start(name, precision)
            run(session, only)
        finally:
            exports.stop()
    summary(report)
    sys.exit(1 if report.data["findings"] else 0)


def exports_of(session: Session, only: Sequence[str]) -> list[str]:
    """The models that the checks need first; the causal one is exported when its check comes."""
    demo, full = {"graphs", "memory", "capture"}, {"launching", "race", "capture", "parity", "large"}
    wanted = set(only or CHECKS)
    names = [session.demo] if wanted & demo and not session.no_demo else []
    return names + ([session.full] if wanted & full else [])


if __name__ == "__main__":
    main()
