"""What subcommands share: option groups, kinds of arguments, opening what they name, printing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from arinar.checkpoint import CheckpointInfo
    from arinar.model import Arinar
    from arinar.runtime import Pipeline
    from arinar.vae import AutoencoderKL


def say(line: str) -> None:
    click.echo(line, err=True)


def quiet(line: str) -> None:
    pass


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, sort_keys=True, default=str))


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


class Labels(click.ParamType):  # type: ignore[type-arg]
    name = "labels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        return value if isinstance(value, list) else parse_labels(value)


class Options:
    """Options that several subcommands share: a decorator that knows the names of the arguments it adds."""

    def __init__(self, *decorators: Callable[[Any], Any]) -> None:
        self._decorators = decorators
        self.names = {param.name for param in click.command()(self(lambda: None)).params if param.expose_value}

    def __call__(self, function: Any) -> Any:
        for decorator in reversed(self._decorators):
            function = decorator(function)
        return function

    def of(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a subcommand's arguments that came by these options."""
        return {name: value for name, value in arguments.items() if name in self.names}


def without_none(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What was given: the rest is left to the defaults of the function that is called."""
    return {name: value for name, value in arguments.items() if value is not None}


SAMPLING = Options(
    click.option(
        "--guidance-scale", type=float, help="Classifier-free guidance, at least 1 (1 = none). [default: the bundle's]"
    ),
    click.option(
        "--cfg-schedule", type=click.Choice(["linear", "constant"]), help="How guidance grows over the steps. [default: linear]"
    ),
    click.option("--temperature", type=float, help="Multiplies the std of the mixture components. [default: 1.0]"),
    click.option("--num-iter", type=int, help="Outer steps, 1 to the number of tokens. [default: the bundle's]"),
    click.option("--seed", type=int, default=0, show_default=True, help="Image i depends on (seed, i) alone."),
)


RUNTIME = Options(
    click.option(
        "--backend",
        help="Execution backend, e.g. onnxruntime-cpu or tensorrt-rtx (a wrong name lists all). [default: the best]",
    ),
    click.option("--precision", help="Variant of the bundle. [default: fp32, or the only one]"),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: all physical cores]"),
    click.option(
        "--low-memory",
        is_flag=True,
        help="On the CPU, hold the transformers or the VAE in memory, not both; every batch loads them again.",
    ),
    click.option(
        "--no-cuda-graphs",
        is_flag=True,
        help="Launch every step anew on a GPU, instead of replaying a recording; slower, less memory.",
    ),
)
CHECKPOINT = Options(
    click.option("--no-ema", is_flag=True, help="Take the raw weights of a training checkpoint, not the averaged ones."),
    click.option("--inner-heads", type=int, help="Heads of the inner attention, where the checkpoint does not say (4 or 16)."),
)


def load_models(
    checkpoint: str, vae: str | None = None, no_ema: bool = False, inner_heads: int | None = None
) -> tuple[Arinar, AutoencoderKL]:
    """The model and its autoencoder; ``vae`` may be left out for a demo model. Options as CHECKPOINT gives them."""
    from arinar.checkpoint import load_arinar, load_vae
    from arinar.demo import DEMO_MODELS

    if vae is None:
        if checkpoint not in DEMO_MODELS:
            raise click.UsageError("--vae is missing: name the file of the autoencoder (the published one is kl16.ckpt)")
        vae = checkpoint
    model = load_arinar(checkpoint, ema=not no_ema, inner_heads=inner_heads)
    return model, load_vae(vae)


def inspected(checkpoint: str, vae: str | None, no_ema: bool, inner_heads: int | None) -> dict[str, Any]:
    """Provenance of a checkpoint, read for the purpose. Options as CHECKPOINT gives them."""
    from arinar.checkpoint import inspect_checkpoint

    info = inspect_checkpoint(checkpoint, ema=False if no_ema else None, inner_heads=inner_heads)
    return provenance(checkpoint, vae, info)


def open_pipeline(
    bundle: Path,
    backend: str | None,
    precision: str | None,
    threads: int | None,
    low_memory: bool,
    no_cuda_graphs: bool,
) -> Pipeline:
    """Load a bundle. Options as RUNTIME gives them."""
    from arinar.runtime import Pipeline

    # What is not asked for is the backend's own affair: it may not have the option.
    options = without_none({"threads": threads, "low_memory": low_memory or None})
    if no_cuda_graphs:
        options["cuda_graphs"] = False
    return Pipeline.load(bundle, backend=backend, precision=precision, **options)


def provenance(checkpoint: str, vae: str | None, info: CheckpointInfo) -> dict[str, Any]:
    """What a bundle and a report keep of the checkpoint that they came from."""
    return {
        "checkpoint": Path(checkpoint).name,
        "checkpoint_sha256": info.sha256,
        "checkpoint_source": info.source,
        "weights": info.weights,
        "inner_heads": info.inner_heads,
        "inner_heads_source": info.inner_heads_source,
        "vae": Path(vae or checkpoint).name,
    }
