"""What subcommands share: option groups, kinds of arguments, opening what they name, printing."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arinar.text import printable

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


def then(*commands: str) -> None:
    """What a command ends with: what to do next, a line each."""
    for place, command in enumerate(commands):
        as_called = f"{program()} {command.removeprefix('arinar ')}" if command.startswith("arinar ") else command
        say(f"{'next:' if place == 0 else '     '} {as_called}")


def program() -> str:
    """This command as it was called: an environment that is not activated has it on no path."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py" and called.parent.name == "arinar":
        return f"{sys.executable} -m arinar"
    if called.name != "arinar":  # called from Python
        return "arinar"
    found = shutil.which("arinar")
    return "arinar" if found is not None and os.path.samefile(found, called) else str(called)


def parse_integers(text: str) -> list[int]:
    """`3`, `1,5,7`, `0-9`, and mixtures of them."""
    return [number for part in text.split(",") for number in _range(part)]


def parse_labels(text: str) -> list[int | str]:
    """As `parse_integers`; what is no number is a class's name, `-1` an image of no class."""
    labels: list[int | str] = []
    for part in text.split(","):
        name = part.strip()
        if name == "-1" or (name and not re.fullmatch(r"[\d\s-]+", name)):
            labels.append(-1 if name == "-1" else name)
        else:
            labels.extend(_range(part))
    return labels


def _range(part: str) -> range:
    match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part)
    if match is None:
        raise click.BadParameter(f"{part!r} is not a number or a range; write for example 207,360 or 0-9")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first or last - first > 1_000_000:
        raise click.BadParameter(f"the range {part.strip()!r} runs backwards or is too long")
    return range(first, last + 1)


class Integers(click.ParamType):  # type: ignore[type-arg]
    name = "integers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        return value if isinstance(value, list) else parse_integers(value)


class Labels(click.ParamType):  # type: ignore[type-arg]
    """Class ids, and names, which only a model can tell: `Pipeline.resolve` finds them."""

    name = "labels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int | str]:
        return value if isinstance(value, list) else parse_labels(value)


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """`.9,1,1.1`, `3:5:.25` (first to last in steps; `3:5` in steps of 1), and mixtures of them -> numbers."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        return value if isinstance(value, list) else parse_numbers(value)


def parse_numbers(text: str) -> list[float]:
    numbers: list[float] = []
    for part in text.split(","):
        words = part.split(":") if ":" in part else [part, part]
        try:  # (in decimal, where 3.1 + 0.1 is 3.2)
            first, last, step = (Decimal(word.strip()) for word in (words if len(words) > 2 else [*words, "1"]))
            whole = first.is_finite() and last.is_finite() and step > 0 and first <= last < first + 1000 * step
        except (ValueError, ArithmeticError):
            whole = False
        if not whole:
            raise click.BadParameter(f"{part!r} is no number and no range; write for example .9,1,1.1 or 3:5:.25")
        while first <= last:
            numbers.append(float(first))
            first += step
    return numbers


class Interval(click.ParamType):  # type: ignore[type-arg]
    name = "interval"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"([\d.]+):([\d.]+)", value)
        try:
            return float(found[1]), float(found[2])  # type: ignore[index]
        except (TypeError, ValueError):
            self.fail(f"{value!r} is no interval; expected LOW:HIGH, two shares of known tokens, e.g. 0.2:1", param, ctx)


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
        "--cfg-schedule",
        type=click.Choice(["linear", "constant"]),
        help="How guidance grows over the steps. [default: the bundle's]",
    ),
    click.option("--temperature", type=float, help="Multiplies the std of the draws. [default: the bundle's]"),
    click.option("--num-iter", type=int, help="Outer steps, 1 to the number of tokens. [default: the bundle's]"),
    click.option(
        "--sampling-steps",
        metavar="STEPS",
        help="Of a diffusion head: 100, ddim25, or 25-5 for fewer in later outer steps. [default: the bundle's]",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Image i depends on (seed, i) alone."),
)
#: What makes other images, of another law, in less time.
PLAN = Options(
    click.option(
        "--schedule",
        metavar="SCHEDULE",
        help="Which tokens a step generates: cosine, or staged:64x24,64x6,128x2, tokens x steps of a coarse checkerboard, "
        "then of what lies between (docs/faster.md). [default: cosine]",
    ),
    click.option(
        "--guidance-interval",
        type=Interval(),
        metavar="LOW:HIGH",
        help="Shares of known tokens between which steps are guided; others cost half. [default: 0:1]",
    ),
    click.option(
        "--guidance-refresh",
        type=int,
        metavar="STEPS",
        help="Of so many guided steps, the first computes the unconditional branch; the others reuse what guidance changed "
        "there, and cost half. [default: 1]",
    ),
)


RUNTIME = Options(
    click.option(
        "--backend",
        help="Execution backend, e.g. onnxruntime-cpu or tensorrt-rtx (a wrong name lists all). [default: the best]",
    ),
    click.option(
        "--precision", help="Variant of the bundle; bf16: its fp32 graphs on OpenVINO. [default: fp32, or the only one]"
    ),
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
    click.option("--outer-heads", type=int, help="Heads of encoder and decoder, where their width is not a published one."),
    click.option(
        "--latent-stats",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        help="Mean and std of the latents that the model was trained on (latents_stats.pt, .npz).",
    ),
    click.option(
        "--config", help="JSON file with the model's config, or a preset's name. [default: what the checkpoint says or shows]"
    ),
)


def _as_arguments(
    no_ema: bool = False,
    inner_heads: int | None = None,
    outer_heads: int | None = None,
    latent_stats: str | None = None,
    config: str | None = None,
) -> dict[str, Any]:
    """The options of CHECKPOINT as arguments of load_arinar and inspect_checkpoint, but ``ema``."""
    given = {"inner_heads": inner_heads, "outer_heads": outer_heads, "latent_stats": latent_stats}
    if config is not None:
        from arinar.config import PRESETS, ArinarConfig

        given["config"] = read_config(config, ArinarConfig, PRESETS)
    return without_none(given) | ({"ema": False} if no_ema else {})


def read_config(text: str, kind: Any, presets: Mapping[str, Any]) -> Any:
    """The config that ``text`` names: a preset, or a JSON file with the entries of ``kind`` that differ from its defaults.

    Raises ValueError naming the file, and the presets where there is no such file.
    """
    from arinar.reading import read_json

    if text in presets:
        return presets[text]
    try:
        data = read_json(text)
        if not isinstance(data, dict):
            raise ValueError(f"it holds a {type(data).__name__}, expected an object")
        return kind.from_dict(data)
    except FileNotFoundError:
        raise ValueError(f"config is {text!r}, no file; nor a preset: choose one of {', '.join(presets)}") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        wanted = "write one with `arinar init --print-config PRESET`"
        raise ValueError(f"{text} is not a config file: {error} ({wanted})") from None


def load_models(checkpoint: str, vae: str | None = None, **options: Any) -> tuple[Arinar, AutoencoderKL]:
    """The model and its autoencoder; ``vae`` may be left out for a demo model. ``options``: CHECKPOINT's."""
    say(f"starting PyTorch, reading {printable(checkpoint, 200)}")
    import warnings

    from arinar.checkpoint import load_arinar, load_vae
    from arinar.demo import DEMO_MODELS

    if vae is None:
        if checkpoint not in DEMO_MODELS:
            raise click.UsageError("--vae is missing: name the file of the autoencoder (the published one is kl16.ckpt)")
        vae = checkpoint
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_arinar(checkpoint, **_as_arguments(**options))
    for warning in caught:
        say(f"WARNING: {warning.message}")
    return model, load_vae(vae)


def checkpoint_info(checkpoint: str, **options: Any) -> CheckpointInfo:
    """What a checkpoint is. ``options``: CHECKPOINT's."""
    from arinar.checkpoint import inspect_checkpoint

    return inspect_checkpoint(checkpoint, **_as_arguments(**options))


def inspected(checkpoint: str, vae: str | None, **options: Any) -> dict[str, Any]:
    """Provenance of a checkpoint, read for the purpose. ``options``: CHECKPOINT's."""
    return provenance(checkpoint, vae, checkpoint_info(checkpoint, **options))


def open_pipeline(
    bundle: Path,
    backend: str | None,
    precision: str | None,
    threads: int | None,
    low_memory: bool,
    no_cuda_graphs: bool,
    tell: Callable[[str], None] = say,
) -> Pipeline:
    """Load a bundle, and tell what runs where. Options as RUNTIME gives them."""
    tell(f"opening {printable(bundle, 200)}")
    from arinar.runtime import Pipeline
    from arinar.runtime.backends import backend_options

    # What is not asked for is the backend's own affair: it may not have the option.
    options: Any = without_none({"threads": threads, "low_memory": low_memory or None})
    if no_cuda_graphs and (backend is None or "cuda_graphs" in backend_options(backend)):  # else there are none anyway
        options["cuda_graphs"] = False
    pipeline = Pipeline.load(bundle, backend=backend, precision=precision, **options)
    tell(running(pipeline))
    return pipeline


def running(pipeline: Pipeline) -> str:
    """Which precision runs on what, and which of the bundle's others are faster there."""
    from arinar.schemes import SCHEMES

    manifest, name = pipeline.bundle.manifest, pipeline.backend.name
    kind = "cpu" if pipeline.backend.synchronous else "gpu"

    def faster(precision: str) -> bool:
        scheme = SCHEMES[manifest.scheme(precision)]
        return kind in scheme.faster_on and name in scheme.runs_on

    others = [precision for precision in manifest.graphs if faster(precision) and precision != pipeline.precision]
    hint = f"; faster here: {', '.join(f'--precision {other}' for other in others)}" if others else ""
    return f"precision {pipeline.precision} on {name}{'' if faster(pipeline.precision) else hint}"


def provenance(checkpoint: str, vae: str | None, info: CheckpointInfo) -> dict[str, Any]:
    """What a bundle and a report keep of the checkpoint that they came from."""
    return {
        "checkpoint": Path(checkpoint).name,
        "checkpoint_sha256": info.sha256,
        "checkpoint_source": info.source,
        "weights": info.weights,
        **(
            {} if info.inner_heads is None else {"inner_heads": info.inner_heads, "inner_heads_source": info.inner_heads_source}
        ),
        "vae": Path(vae or checkpoint).name,
    }
