"""Subcommands that make checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from arinar.text import printable

from .common import read_config, say, then, without_none
from .group import main


@main.command()
@click.argument("what", type=click.Choice(["model", "vae"]), default="model")
@click.option("--config", default="digits", show_default=True, help="Preset name, or a JSON file with a model (or VAE) config.")
@click.option(
    "--data", default="digits", show_default=True, help="'digits', or a folder with one sub-folder of images per class."
)
@click.option("--vae", help="Autoencoder's checkpoint, for training a model. [default: the shipped one of the digits]")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Checkpoint to write (.safetensors).")
@click.option(
    "--img-size",
    type=click.IntRange(min=8),
    help="Side in pixels to train an autoencoder at. [default: 32; a model: its config's]",
)
@click.option("--steps", type=click.IntRange(min=1), help="Updates. [default: what the shipped weights took]")
@click.option("--batch-size", type=click.IntRange(min=1))
@click.option("--learning-rate", type=float)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--accept-reconstruction", is_flag=True, help="Train a model even where the autoencoder reconstructs the images badly."
)
@click.option("--device", help="torch device, e.g. cuda. [default: cuda where there is one]")
@click.option("--overwrite", is_flag=True, help="Train anew where the checkpoint is there already.")
def train(
    what: str,
    config: str,
    data: str,
    vae: str | None,
    out: Path,
    img_size: int | None,
    seed: int,
    accept_reconstruction: bool,
    device: str | None,
    overwrite: bool,
    **given: Any,
) -> None:
    """Train a model, or with VAE as the first argument an autoencoder.

    Ctrl-C saves the training's state beside the checkpoint; the same command goes on from there, and ends with the
    same weights as if it had not been interrupted.

    \b
    Example:  arinar train vae --config digits -o my-vae.safetensors
              arinar train model --config digits --vae my-vae.safetensors -o my-digits.safetensors
              arinar train model --config my-config.json --data photos/ --vae kl16.ckpt -o mine.safetensors
    """
    from arinar.files import check_writable

    check_writable(out, make_folder=True)
    say(f"starting PyTorch, reading {printable(data, 200)}")
    from arinar import train as training
    from arinar.config import PRESETS, VAE_PRESETS, ArinarConfig, VaeConfig

    kind: Any = VaeConfig if what == "vae" else ArinarConfig
    presets: Any = VAE_PRESETS if what == "vae" else PRESETS
    # A preset goes on by its name, which the trained checkpoint keeps.
    chosen = config if config in presets else read_config(config, kind, presets)
    arguments = without_none(given) | {
        "config": chosen,
        "data": data,
        "seed": seed,
        "device": device,
        "overwrite": overwrite,
    }
    if what == "model":
        if img_size is not None:
            raise click.UsageError("--img-size is for training an autoencoder; a model's is in its --config")
        arguments |= {"vae": vae, "accept_reconstruction": accept_reconstruction}
    elif vae is not None or accept_reconstruction:
        raise click.UsageError("--vae and --accept-reconstruction are for training a model")
    elif img_size is not None:
        arguments["img_size"] = img_size
    result = (training.train_vae if what == "vae" else training.train_arinar)(out, **arguments)
    if not result.finished:
        say(f"interrupted after {result.step} steps; the same command resumes")
        sys.exit(130)
    held_out = "" if result.held_out is None else f", held-out loss {result.held_out:.4f} at step {result.best_step}"
    click.echo(f"{out}: {result.parameters:,} parameters{held_out}")
    if what == "vae":
        then(f"arinar train model --config {config} --data {data} --vae {out} -o model.safetensors")
    else:
        coder = vae or "digits"
        then(
            f"arinar export {out} --vae {coder} -o bundle/",
            "arinar generate bundle/ --labels 0 -o out/   (docs/train.md: what to do where the pictures are bad)",
        )


@main.command()
@click.option("--preset", help="Name of a preset (see `arinar init --list`).")
@click.option("--list", "list_presets", is_flag=True, help="Show the presets.")
@click.option("--print-config", metavar="PRESET", help="Print a preset's config as JSON, to edit and give to --config.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Checkpoint to write (.safetensors).")
@click.option("--vae-out", type=click.Path(path_type=Path), help="Also write an autoencoder of the preset's kind here.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
def init(
    preset: str | None,
    list_presets: bool,
    print_config: str | None,
    out: Path | None,
    vae_out: Path | None,
    seed: int,
    overwrite: bool,
) -> None:
    """Write a checkpoint with random weights, to measure speed and memory with.

    \b
    Example:  arinar init --preset base -o base.safetensors --vae-out kl16.safetensors
              arinar init --print-config base > my-config.json
    """
    from arinar.config import PRESETS

    if list_presets:
        for name, config in PRESETS.items():
            click.echo(f"{name:14} {config.outer:7} {config.img_size}px, {config.seq_len} tokens, width {config.z_width}")
        return
    chosen = preset if print_config is None else print_config
    if chosen is None:
        raise click.UsageError(f"--preset is missing: which model? Choose one of {', '.join(PRESETS)}")
    if chosen not in PRESETS:
        raise ValueError(f"preset is {chosen!r}; choose one of {', '.join(PRESETS)}")
    if print_config is not None:
        click.echo(PRESETS[chosen].to_json())
        return
    if out is None and vae_out is None:
        raise click.UsageError("-o is missing: where should the checkpoint go?")
    _write_random(chosen, out, vae_out, seed, overwrite)


def _write_random(preset: str, out: Path | None, vae_out: Path | None, seed: int, overwrite: bool) -> None:
    from arinar.files import check_writable

    paths = [path for path in (out, vae_out) if path is not None]
    if len({path.absolute() for path in paths}) < len(paths):
        raise click.UsageError("-o and --vae-out name the same file")
    for path in paths:
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists already: choose another name, or replace it with --overwrite")
        check_writable(path)
    from arinar.checkpoint import save_arinar, save_vae
    from arinar.model import random_model, random_vae

    note = {"weights": f"random, seed {seed}"}
    if out is not None:
        model = random_model(preset, seed)
        save_arinar(out, model, metadata=note)
        click.echo(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters")
    if vae_out is not None:
        vae = random_vae(preset, seed)
        save_vae(vae_out, vae, metadata=note)
        click.echo(f"{vae_out}: {sum(p.numel() for p in vae.parameters()):,} parameters")
    then(f"arinar export {out or 'CHECKPOINT'} --vae {vae_out or 'VAE'} -o bundle/, then arinar bench bundle/")
