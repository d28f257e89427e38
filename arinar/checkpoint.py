"""Checkpoints: save and load models and autoencoders, ours and the published ones, and say what a file holds.

How files are read without running code from them is in `checkpoint_files`; what published files leave unsaid, and how it
is settled, in `published`. This is where both meet: which weights, which config, and whether they fit each other.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import published, states, versions
from .checkpoint_files import (
    CheckpointError,
    Contents,
    bare_name,
    dense_weights,
    open_checkpoint,
    some,
    write_checkpoint,
)
from .config import ArinarConfig, VaeConfig
from .latent_stats import read_latent_stats
from .model import Arinar, CausalArinar
from .vae import AutoencoderKL

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "inspect_checkpoint",
    "load_arinar",
    "load_vae",
    "save_arinar",
    "save_vae",
]

# Blocks that may be missing before a model is built to tell which entries are: a damaged file lacks few.
_SPARE_BLOCKS = 64

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds and how its config was settled; for people and scripts (``to_dict``)."""

    path: str
    kind: str  # "arinar" or "vae"
    source: str  # which format the file is in, in words
    weights: str  # which of the file's weights: "model_ema", "model", "the only weights"
    config: ArinarConfig | VaeConfig
    config_source: str
    parameters: int  # buffers not counted
    dtypes: tuple[str, ...]  # as stored; loading gives float32
    inner_heads_source: str  # "" for a VAE
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # guesses, each with its remedy; loading issues them as UserWarning
    epoch: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    size: int = 0  # bytes
    sha256: str = ""  # of the file; inspect_checkpoint fills it in

    @property
    def inner_heads(self) -> int | None:
        """Of a Gaussian mixture head; None for anything else."""
        return self.config.inner_heads if isinstance(self.config, ArinarConfig) and self.config.head == "gmm" else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain.update(
            config=self.config.to_dict(),
            inner_heads=self.inner_heads,
            dtypes=list(self.dtypes),
            notes=list(self.notes),
            warnings=list(self.warnings),
            metadata=dict(self.metadata),
        )
        return plain


# ---------------------------------------------------------------------------------------------------- write


def save_arinar(path: PathLike, model: Arinar, *, metadata: dict[str, str] | None = None) -> None:
    """Write a model as safetensors with its config inside.

    Atomic (a temporary name in the same folder, then renamed); equal models give equal bytes. ``metadata``
    (str -> str) is stored beside the config and shown by :func:`inspect_checkpoint`.
    """
    write_checkpoint(Path(path), "arinar", model, model.config.to_dict(), metadata)


def save_vae(path: PathLike, vae: AutoencoderKL, *, metadata: dict[str, str] | None = None) -> None:
    """Write an autoencoder as :func:`save_arinar` writes a model."""
    write_checkpoint(Path(path), "vae", vae, vae.config.to_dict(), metadata)


# ----------------------------------------------------------------------------------------------------- load


def load_arinar(
    path: PathLike,
    *,
    ema: bool = True,
    inner_heads: int | None = None,
    outer_heads: int | None = None,
    latent_stats: PathLike | None = None,
    config: ArinarConfig | None = None,
) -> Arinar:
    """Load a model (our safetensors, a published training container, a bare state dict): eval mode, float32.

    Parameters
    ----------
    path : a file, or the name of a demo model (``digits``, ``digits-causal``, ``digits-mar``).
    ema : of a training container, take the averaged weights (``model_ema``), as published evaluation does.
        Files that hold one set of weights are not affected.
    inner_heads : heads of the inner attention. Decides, whatever the file says: 4 for the first public
        version, 16 for later ones; weights of both look the same.
    outer_heads : heads of encoder and decoder, likewise; needed for widths that were not published.
    latent_stats : a file with mean and std of the latents (``latents_stats.pt``, ``.npz``): they become the config's
        ``latent_shift`` and ``latent_scale``, whatever else says.
    config : decides everything that the file does not hold; needed where the weights' shapes do not show it.

    Raises ValueError (:class:`CheckpointError`) for anything that is not such a checkpoint or is damaged;
    warns (UserWarning) where the config had to be guessed.
    """
    given = _Given(config, inner_heads, outer_heads, latent_stats)
    state, info = _read_arinar(_resolve(path, vae=False), ema, given)
    for message in info.warnings:
        warnings.warn(message, UserWarning, stacklevel=2)
    assert isinstance(info.config, ArinarConfig)
    with torch.device("meta"):
        model = Arinar(info.config)
    model.load_state_dict(state, assign=True)
    if isinstance(model, CausalArinar):  # a constant of the config, not among the weights
        model.order = torch.tensor(info.config.generation_order)
    return model.eval()


def load_vae(path: PathLike, config: VaeConfig | None = None) -> AutoencoderKL:
    """Load an autoencoder: our safetensors or published weights (``kl16.ckpt``), bare or nested.

    ``path`` may be the name of a demo model, whose autoencoder it then gives. The result is in eval mode and
    float32. Raises as :func:`load_arinar` does.
    """
    state, info = _read_vae(_resolve(path, vae=True), config)
    assert isinstance(info.config, VaeConfig)
    with torch.device("meta"):
        vae = AutoencoderKL(info.config)
    vae.load_state_dict(state, assign=True)
    return vae.eval()


def inspect_checkpoint(
    path: PathLike,
    *,
    ema: bool | None = None,
    inner_heads: int | None = None,
    outer_heads: int | None = None,
    latent_stats: PathLike | None = None,
    config: ArinarConfig | VaeConfig | None = None,
) -> CheckpointInfo:
    """Read a model or an autoencoder completely, checks included, and tell what it is, without warning.

    ``ema=None`` takes the averaged weights where the file has them. Raises as :func:`load_arinar` does.
    """
    file = _resolve(path, vae=False)
    contents = open_checkpoint(file)
    if _looks_like_vae(contents):
        if isinstance(config, ArinarConfig):
            raise CheckpointError(f"{file} is an autoencoder: its config is a VaeConfig, not an ArinarConfig")
        info = _read_vae(file, config, contents)[1]
    else:
        if isinstance(config, VaeConfig):
            raise CheckpointError(f"{file} is a model: its config is an ArinarConfig, not a VaeConfig")
        info = _read_arinar(file, ema, _Given(config, inner_heads, outer_heads, latent_stats), contents)[1]
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return replace(info, sha256=digest.hexdigest())


def _resolve(path: PathLike, vae: bool) -> Path:
    """A path, or the shipped file that a demo model's name stands for (``./digits`` is always a path)."""
    if isinstance(path, str) and re.fullmatch(r"[\w-]+", path):
        from . import demo

        if path in demo.DEMO_MODELS:
            return Path(demo.demo_vae(path) if vae else demo.demo_checkpoint(path))
        if not Path(path).exists():
            raise CheckpointError(f"no file {path}, nor a demo model of that name (demo models: {', '.join(demo.DEMO_MODELS)})")
    return Path(path)


# --------------------------------------------------------------------------------- which weights, which config


@dataclass
class _Given:
    """What the caller of ``load_arinar`` decides, whatever the file says."""

    config: ArinarConfig | None
    inner_heads: int | None
    outer_heads: int | None
    latent_stats: PathLike | None


@dataclass
class _Settled:
    """The config that a file's weights get, and how it came about; fields as in CheckpointInfo."""

    config: Any
    source: str
    heads_source: str = ""
    warned: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _looks_like_vae(contents: Contents) -> bool:
    found = contents.states.values()
    if contents.kind is not None or any(states.has_landmark(state, states.MODEL_LANDMARK) for state in found):
        return contents.kind == "vae"
    names = {bare_name(name) for state in found for name in state}
    return "decoder.conv_in.weight" in names or any(states.has_landmark(state, states.VAE_LANDMARK) for state in found)


def _read_arinar(
    path: Path, ema: bool | None, given: _Given, contents: Contents | None = None
) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Weights and what is known of them; ``ema=None``: the averaged ones where there are any."""
    contents = contents or open_checkpoint(path)
    if _looks_like_vae(contents):
        raise CheckpointError(f"{path} is an autoencoder, not a model: load it with load_vae (--vae on the command line)")
    contents = states.unwrapped(path, contents, states.MODEL_LANDMARK)
    weights, state = _choose_weights(path, contents.states, "model_ema" in contents.states if ema is None else ema)
    state = dense_weights(path, state)
    published.refuse_other_heads(path, state, contents.args or {})

    settled = _settle_arinar(path, state, contents, given)
    if weights == "model_ema":
        settled.warned += states.warnings_of_average(path, contents.states)
    return _finish(path, Arinar, settled, weights, state, contents, contents.notes + settled.notes)


def _settle_arinar(path: Path, state: dict[str, Tensor], contents: Contents, given: _Given) -> _Settled:
    """The caller's config, or the stored one, or one inferred; single values of the caller's have the last word."""
    args = contents.args
    if given.config is not None:
        settled = _Settled(given.config, "given by the caller", "the config given by the caller")
        if given.inner_heads is None and given.config.head == "gmm":
            settled.warned += published.warnings_of_given_config(path, args, given.config)
    elif contents.config is not None:
        settled = _Settled(_parse(path, ArinarConfig, contents.config), "stored in the file", "stored in the file")
    else:
        source = f"inferred from the {'saved args and the ' if args else ''}weights' shapes"
        found = published.infer_arinar(path, state, args, given.inner_heads, given.outer_heads)
        settled = _Settled(found.config, source, found.heads_source, found.warned, found.notes)
        if args is not None and given.latent_stats is None:
            settled.warned += published.warnings_of_statistics(path, args, found.config)
    if args is not None and settled.config.head == "gmm":
        settled.notes += versions.notes_from_args(args)
    _overrule(settled, given)
    return settled


def _overrule(settled: _Settled, given: _Given) -> None:
    """Put the caller's head counts and latent statistics into a settled config."""
    changes: dict[str, Any] = {}
    if given.inner_heads is not None:
        if settled.config.head != "gmm":
            raise CheckpointError(
                f"inner_heads is {given.inner_heads}; a {settled.config.head} head has no attention: leave it out"
            )
        changes["inner_heads"] = given.inner_heads
        settled.heads_source = "given by the caller"
    if given.outer_heads is not None:
        changes["decoder_heads"] = given.outer_heads
        if settled.config.encoder_depth:  # a causal model's encoder is empty
            changes["encoder_heads"] = given.outer_heads
    try:
        settled.config = settled.config.replace(**changes)
    except (ValueError, ZeroDivisionError) as error:
        what = " and ".join(
            f"{name} is {value}"
            for name, value in (("inner_heads", given.inner_heads), ("outer_heads", given.outer_heads))
            if value is not None
        )
        raise CheckpointError(f"{what}: {error}") from None
    if given.latent_stats is not None:
        statistics = read_latent_stats(Path(given.latent_stats), settled.config.vae_embed_dim)
        settled.config = settled.config.replace(**statistics)
        settled.notes.append(f"latent_shift and latent_scale are those of {given.latent_stats}")


def _read_vae(
    path: Path, config: VaeConfig | None, contents: Contents | None = None
) -> tuple[dict[str, Tensor], CheckpointInfo]:
    contents = contents or open_checkpoint(path)
    if not _looks_like_vae(contents):
        names = {bare_name(name) for state in contents.states.values() for name in state}
        if contents.kind == "arinar" or any(
            name.startswith(("arhead.", "diffloss.", "class_emb.", "z_proj.")) for name in names
        ):
            raise CheckpointError(f"{path} is a model, not an autoencoder: load it with load_arinar")
        raise CheckpointError(f"{path} is not a KL autoencoder: it has no post_quant_conv.weight ({some(names)})")
    contents = states.unwrapped(path, contents, states.VAE_LANDMARK)
    weights = next(key for key in ("", "model", "state_dict", "model_ema") if key in contents.states)
    state, notes = contents.states[weights], list(contents.notes)
    kept, left = published.without_training_of_vae(state)
    notes += left
    kept = dense_weights(path, kept)
    if config is not None:
        settled = _Settled(config, "given by the caller")
    elif contents.config is not None:
        settled = _Settled(_parse(path, VaeConfig, contents.config), "stored in the file")
    else:
        settled = _Settled(published.infer_vae(path, kept), "inferred from the weights' shapes")
    return _finish(path, AutoencoderKL, settled, weights or "the only weights", kept, contents, notes)


def _finish(
    path: Path,
    module: type[Arinar] | type[AutoencoderKL],
    settled: _Settled,
    weights: str,
    state: dict[str, Tensor],
    contents: Contents,
    notes: list[str],
) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Check the weights against what the config calls for, convert them to float32, and sum up."""
    _check_depths(path, state, settled)
    with torch.device("meta"):
        empty = module(settled.config)
    expected = {name: tuple(value.shape) for name, value in empty.state_dict().items()}
    _check_shapes(path, state, expected, settled.source)
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    # Copies, in the model's order: what was read may be mapped from the file.
    converted = {name: state[name].detach().to(torch.float32, copy=True).contiguous() for name in expected}
    bad = [name for name, value in converted.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise CheckpointError(
            f"{path} has non-finite weights in {len(bad)} of {len(converted)} entries ({some(bad)}): "
            f"training diverged, or the file is damaged; use another checkpoint"
        )
    info = CheckpointInfo(
        path=str(path),
        kind="arinar" if module is Arinar else "vae",
        source=contents.source,
        weights=weights,
        config=settled.config,
        config_source=settled.source,
        parameters=sum(parameter.numel() for parameter in empty.parameters()),
        dtypes=tuple(dtypes),
        inner_heads_source=settled.heads_source,
        notes=tuple(notes),
        warnings=tuple(settled.warned),
        epoch=contents.epoch,
        metadata=contents.metadata,
        size=path.stat().st_size,
    )
    return converted, info


def _choose_weights(path: Path, there: dict[str, dict[str, Tensor]], ema: bool) -> tuple[str, dict[str, Tensor]]:
    if "" in there:
        return "the only weights", there[""]
    if list(there) == ["state_dict"]:  # a Lightning module's: there is nothing to choose
        return "state_dict", there["state_dict"]
    wanted = ("model_ema",) if ema else ("model", "state_dict")
    for key in wanted:
        if key in there:
            return key, there[key]
    held = ", ".join(there)
    raise CheckpointError(
        f"{path} has no {' or '.join(wanted)} weights (it has {held}): pass ema={not ema} "
        f"({'--no-ema' if ema else 'without --no-ema'} on the command line) to use {held}"
    )


def _check_shapes(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shaped = [
        f"{name} is {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    faults = [
        f"{len(found)} {what} ({some(found)})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shaped))
        if found
    ]
    if faults:
        raise CheckpointError(
            f"{path} does not fit the config {source}: {'; '.join(faults)}; of {len(expected)} expected "
            f"entries. Use the config it was trained with, or a checkpoint of this architecture"
        )


def _check_depths(path: Path, state: Mapping[str, Tensor], settled: _Settled) -> None:
    """Blocks as the config wants them, before any is built: what a file asks for, it must hold."""
    if not isinstance(settled.config, ArinarConfig):
        return
    inner = "arhead.blocks." if settled.config.head == "gmm" else "diffloss.net.res_blocks."
    for stack, prefix in (("encoder", "encoder_blocks."), ("decoder", "decoder_blocks."), ("inner", inner)):
        wanted = getattr(settled.config, f"{stack}_depth")
        found = len({name[len(prefix) :].split(".", 1)[0] for name in state if name.startswith(prefix)})
        if wanted > found + _SPARE_BLOCKS:
            raise CheckpointError(
                f"{path} does not fit the config {settled.source}: {stack}_depth is {wanted}, its weights have {found} blocks. "
                f"Use the config it was trained with, or a checkpoint of this architecture"
            )


def _parse(path: Path, kind: Any, data: dict[str, Any]) -> Any:
    try:
        return kind.from_dict(data)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: its stored config is not usable: {error}") from None
