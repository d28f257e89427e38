"""The subcommand that tells what a file or folder is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arinar.class_names import Classes
from arinar.config import ArinarConfig
from arinar.demo import DEMO_MODELS
from arinar.text import aligned, printable

from .common import CHECKPOINT, checkpoint_info, print_json, then
from .group import main

if TYPE_CHECKING:
    from arinar.runtime import Bundle


@main.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print everything, as JSON.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check sizes and hashes of a bundle's files.")
@click.option("--graphs", is_flag=True, help="Of a bundle: also its graphs and their tensors.")
@CHECKPOINT
def inspect(path: str, as_json: bool, verify: bool, graphs: bool, **options: Any) -> None:
    """Tell what a bundle or a checkpoint is, and whether it is whole.

    \b
    Example:  arinar inspect bundle/
              arinar inspect bundle/ --graphs
              arinar inspect checkpoint-last.pth
              arinar inspect digits
    """
    if Path(path).is_dir():
        _inspect_bundle(Path(path), as_json, verify, graphs)
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
        *({"classes": _classes(Classes(info.config))} if isinstance(info.config, ArinarConfig) else {}).items(),
        *((name, value) for name, value in info.config.to_dict().items() if name != "class_names"),
    ]
    _rows([*rows, *info.metadata.items()])
    if info.inner_heads is not None:  # not among the rows, which are cut: the whole reason is wanted
        click.echo(f"inner heads: {info.inner_heads} ({info.inner_heads_source})")
    for note in info.notes:
        click.echo(printable(f"note: {note}"))
    for warning in info.warnings:
        click.echo(printable(f"WARNING: {warning}"))
    if info.kind == "arinar":
        coder = "" if path in DEMO_MODELS else " --vae kl16.ckpt"
        then(f"arinar export {path}{coder} -o bundle/")
    else:
        then(f"arinar export CHECKPOINT --vae {path} -o bundle/")


def _inspect_bundle(path: Path, as_json: bool, verify: bool, graphs: bool) -> None:
    from arinar.runtime import Bundle

    bundle = Bundle.open(path)
    if verify:
        bundle.verify()
    manifest = bundle.manifest
    if as_json:
        click.echo(manifest.to_json(), nl=False)
        return
    state = "all hashes match" if verify else "not verified"
    click.echo(f"{printable(path, 200)}: bundle of format {manifest.format_version}, {bundle.size() / 1e6:.1f} MB, {state}")
    _rows([("model", _model(manifest.config)), *_about(manifest)])
    _precisions(bundle)
    if graphs:
        _graphs(manifest)
    then(
        f"arinar generate {path} --labels {'207' if manifest.config.num_classes > 207 else '0'} -o out/",
        f"arinar inspect {path} --graphs   (the graphs and their tensors; --json: everything)",
    )


def _model(config: Any) -> str:
    head = {"gmm": "Gaussian mixture", "diffusion": "diffusion"}.get(config.head, config.head)
    tokens = f"{config.seq_len} tokens of {config.token_dim} features"
    return f"{config.outer} outer network, {head} head; {config.img_size} x {config.img_size} pixels, {tokens}"


def _about(manifest: Any) -> list[tuple[str, Any]]:
    """What a bundle makes where nothing else is said, and where it comes from."""
    config, defaults, came = manifest.config, manifest.defaults, manifest.provenance
    steps = config.seq_len if config.outer == "causal" else defaults.num_iter
    own = f", {config.sampling_steps} sampling steps" if config.head == "diffusion" else ""
    guidance = f"guidance {defaults.guidance_scale:g} ({defaults.cfg_schedule})"
    rows = [
        ("classes", _classes(Classes(config))),
        ("defaults", f"{steps} outer steps{own}, {guidance}, temperature {defaults.temperature:g}"),
        ("from", f"{came.get('checkpoint', 'a model in memory')}, VAE {came.get('vae', 'likewise')}"),
    ]
    for name in ("weights", "checkpoint_sha256", "checkpoint_source", "inner_heads_source"):
        if name in came:
            rows.append((name.replace("_", " "), came[name]))
    return rows


def _classes(classes: Classes) -> str:
    if not classes.names:
        return f"{classes.count:,}, without names"
    shown = [classes.short(label) for label in range(min(3, classes.count))]
    last = [f"... {classes.short(classes.count - 1)}"] if classes.count > 3 else []
    source = " (ImageNet's names: the model has none of its own)" if classes.guessed else ""
    return f"{classes.count:,}: {', '.join([*shown, *last])}{source}"


def _precisions(bundle: Bundle) -> None:
    """Each variant: its size, error, what runs it here, its engines."""
    from arinar.runtime import Pipeline
    from arinar.runtime.backends.engines import list_engines

    problems: list[str] = []
    engines = list_engines(bundle, problems)
    here = Pipeline.available(bundle.folder)
    rows = [("precision", "MB", "runs here on", "engines")]
    for name in here:
        built = sorted({engine.path.parent.name for engine in engines if engine.info.precision == name})
        size = f"{bundle.size(name) / 1e6:.1f}"
        rows.append((name, size, ", ".join(here[name]) or "nothing", ", ".join(built) or "none"))
    click.echo()
    for line in aligned([tuple(printable(cell, 90) for cell in row) for row in rows]):
        click.echo(f"  {line}")
    for problem in problems:
        click.echo(printable(f"WARNING: engine {problem}; `arinar build` makes it again", 300))


def _graphs(manifest: Any) -> None:
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
