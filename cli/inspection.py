"""The subcommand that tells what a file or folder is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from arinar.text import aligned, printable

from .common import CHECKPOINT, checkpoint_info, print_json
from .group import main


@main.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print everything, as JSON.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check sizes and hashes of a bundle's files.")
@CHECKPOINT
def inspect(path: str, as_json: bool, verify: bool, **options: Any) -> None:
    """Tell what a bundle or a checkpoint is: configuration, where it came from, whether it is whole.

    \b
    Example:  arinar inspect bundle/
              arinar inspect checkpoint-last.pth
              arinar inspect digits
    """
    if Path(path).is_dir():
        _inspect_bundle(Path(path), as_json, verify)
        return
    info = checkpoint_info(path, **options)
    if as_json:
        print_json(info.to_dict())
        return
    click.echo(printable(f"{info.path}: {info.source}"))
    rows = [
        ("kind", info.kind),
        ("weights", info.weights),
        ("parameters", f"{info.parameters:,}"),
        ("sha256", info.sha256),
        ("config", info.config_source),
        *info.config.to_dict().items(),
    ]
    _rows([*rows, *info.metadata.items()])
    if info.inner_heads is not None:  # not among the rows, which are cut: the whole reason is wanted
        click.echo(f"inner heads: {info.inner_heads} ({info.inner_heads_source})")
    for note in info.notes:
        click.echo(printable(f"note: {note}"))
    for warning in info.warnings:
        click.echo(printable(f"WARNING: {warning}"))


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
        click.echo(printable(f"{precision}:"))
        for graph in graphs.values():
            click.echo(f"  {printable(graph.name, 90)}  (opset {graph.opset}, {_error(graph)})")
            for arrow, tensors in (("<-", graph.inputs), ("->", graph.outputs)):
                for tensor in _without_caches(tensors):
                    click.echo(f"    {arrow} {printable(tensor, 200)}")


def _error(graph: Any) -> str:
    if graph.max_abs_err is None:
        return "not compared with PyTorch"
    return f"largest error against PyTorch {graph.max_abs_err:.2g}"


def _without_caches(tensors: Any) -> list[str]:
    """Tensor descriptions, the many cache tensors as one line."""
    lines = [f"{t.name} {t.dtype} ({', '.join(map(str, t.shape))})" for t in tensors]
    caches = [t for t in tensors if re.match(r"(past_key_values|present)\.", t.name)]
    if len(caches) > 2:
        first = next(i for i, t in enumerate(tensors) if t in caches)
        lines[first : first + len(caches)] = [f"{lines[first]} ... {len(caches)} cache tensors"]
    return lines


def _rows(rows: list[tuple[str, Any]]) -> None:
    for line in aligned([(printable(name, 40), printable(value, 90)) for name, value in rows]):
        click.echo(f"  {line}")
