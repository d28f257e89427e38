"""What a generation on a GPU launches, counted without one: from the graphs, the loop and the kernels.

    python -m benchmarks.launches BUNDLE --backend tensorrt --precision fp16 --batch 1,8,64 --gpu H100 --json counts.json

The loop and the backend run as they are, on a fake GPU that takes every call and computes nothing; a graph's kernels are
counted from its nodes, for the shapes that it was launched with. Per outer step and per image: launches by phase and by
graph, launches of CUDA graphs, calls and waits of the host, bytes, operations, and the time that they come to on a named GPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from arinar.runtime import Bundle, BundleError
from arinar.text import aligned

from .count import PHASES, RULES, GraphCounts, row
from .gpus import GPUS, Gpu, assumptions
from .record import record

#: What the kernels are counted by, said with the counts.
COUNTED_BY = {
    "onnxruntime-cuda": "kernels: each node by itself, as arinar.measure.launches counts them",
    "tensorrt": "kernels: by a model of TensorRT's fusions (benchmarks/launches/fusion.py), attention fused whatever its "
    "softmax's type",
}


def report(
    bundle: Bundle,
    backend: str,
    precision: str,
    batches: Sequence[int],
    gpus: Sequence[Gpu],
    *,
    num_iter: int | None = None,
    guidance_scale: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Counts of every batch size, JSON-ready. ``options``: of `record`. Raises ValueError, BundleError as that does."""
    scale = bundle.manifest.defaults.guidance_scale if guidance_scale is None else guidance_scale
    graphs = GraphCounts(bundle, precision, backend)
    rows = []
    for batch in batches:
        walk = record(bundle, backend, precision, batch, num_iter=num_iter, guidance_scale=scale, **options)
        rows.append(row(graphs, walk, batch, gpus))
    return {
        "bundle": bundle.folder.name,
        "backend": backend,
        "precision": precision,
        "guidance_scale": scale,
        "options": options,
        "assumptions": [COUNTED_BY[backend], *assumptions(gpus)],
        "results": rows,
    }


def table(data: dict[str, Any]) -> str:
    """The report as text."""
    rows = data["results"]
    head = ("", *(f"batch {item['batch']}" for item in rows))
    lines: list[tuple[str, ...]] = [head]

    def line(title: str, *path: str) -> None:
        values = []
        for item in rows:
            value: Any = item
            for key in path:
                value = value.get(key, 0) if isinstance(value, dict) else value
            values.append(
                f"{value:,.6g}" if not isinstance(value, dict) else ", ".join(f"{v:,.4g} {k}" for k, v in value.items())
            )
        if any(value != "0" for value in values):
            lines.append((title, *values))

    for share, title in (("per_step", "an outer step"), ("per_image", "an image")):
        line(f"{title}: launches", share, "launches")
        for phase in PHASES:
            line(f"  {phase}", share, "by_phase", phase)
        names = [name for item in rows for name in item[share]["by_name"]] if share == "per_step" else []
        for name in dict.fromkeys(names):
            line(f"  of {name}", share, "by_name", name)
        line("  in CUDA graphs", share, "captured")
        line("  launches of CUDA graphs", share, "graph_launches")
        line("  calls of the host", share, "host_calls")
        line("  waits of the host", share, "host_waits")
        line("  MB read", share, "read_mb")
        line("  MB written", share, "written_mb")
        line("  GFLOP of products", share, "gflop")
    for gpu, times in rows[0]["ms_per_image"].items():
        for name in times:
            line(f"ms per image on {gpu}: {name}", "ms_per_image", gpu, name)
    return "\n".join(aligned(lines))


def batch_sizes(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        sizes = [int(part) for part in value.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise click.BadParameter(f"{value!r}; expected sizes of at least 1 with commas between them, as 1,8,64")
    return sizes


@click.command()
@click.argument("path", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--backend", type=click.Choice(list(RULES)), default="onnxruntime-cuda", show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp16", show_default=True)
@click.option("--batch", "batches", default="1,8,64", show_default=True, callback=batch_sizes, help="Batch sizes.")
@click.option("--num-iter", type=int, help="Outer steps. [default: the bundle's]")
@click.option("--guidance", "guidance_scale", type=float, help="Guidance scale; 1 runs one branch. [default: the bundle's]")
@click.option("--inner", help="How the head makes a token, fused or stepwise. [default: as the runtime chooses]")
@click.option("--cuda-graphs/--no-cuda-graphs", default=None, help="Record launches. [default: as the backend does]")
@click.option("--gpu", "gpus", type=click.Choice(list(GPUS)), multiple=True, help="Whose time is told. [default: H100]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File to write the counts to.")
def main(
    path: Path,
    backend: str,
    precision: str,
    batches: list[int],
    num_iter: int | None,
    guidance_scale: float | None,
    inner: str | None,
    cuda_graphs: bool | None,
    gpus: tuple[str, ...],
    json_path: Path | None,
) -> None:
    """Count what generating with BUNDLE launches on a GPU; none is needed."""
    options = {key: value for key, value in {"inner": inner, "cuda_graphs": cuda_graphs}.items() if value is not None}
    try:
        bundle = Bundle.open(path)
        named = [GPUS[name] for name in gpus or ("H100",)]
        data = report(bundle, backend, precision, batches, named, num_iter=num_iter, guidance_scale=guidance_scale, **options)
    except (BundleError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{bundle.folder.name} {precision} on {backend}, guidance {data['guidance_scale']:g}")
    click.echo(table(data))
    for text in data["assumptions"]:
        click.echo(f"- {text}")


if __name__ == "__main__":
    main()
