"""Checkpoints: our own format, and readers for the published ones that never run pickled code.

Our format is safetensors with one metadata entry, ``arinar``: a JSON object of format version, kind
("arinar" or "vae"), config, the caller's metadata and a sha256 over all of it and every tensor. Published
files carry no config: it is inferred from the saved training ``args`` and the tensors' shapes. What neither
shows (attention heads, the latent scale) follows the published code, and is said aloud where it is a guess.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import ArinarConfig, VaeConfig
from .files import replacing
from .model import Arinar, CausalArinar
from .vae import AutoencoderKL

PathLike = str | os.PathLike[str]

FORMAT_VERSION = 1
# One entry holds everything: safetensors writes several in random order; equal models give equal bytes.
METADATA_KEY = "arinar"

#: Heads of the inner attention in the first public version of the published code, and in the later ones.
FIRST_VERSION_INNER_HEADS = 4
LATER_INNER_HEADS = 16
# Attention heads of the published outer widths (base, large, huge): they leave no trace in the weights.
PUBLISHED_OUTER_HEADS = {768: 12, 1024: 16, 1280: 16}
# (outer width, depth) that only one of the versions had.
_FIRST_VERSION_SIZES = {(1024, 16), (1280, 20)}
_LATER_SIZES = {(1024, 18), (1280, 22)}

# What published containers hold beside tensors. None of these runs anything when it is built.
_ALLOWED_GLOBALS = [argparse.Namespace]

_ONLY_GMM = "only the inner autoregressive Gaussian-mixture head is supported (head_type ar_gmm, feature_group 1, no flow)"
_HEAD_TYPES = {
    "ar_diff_loss": "inner autoregressive diffusion",
    "ar_rect_flow": "inner autoregressive rectified flow",
    "ar_byte": "inner autoregressive bytes",
    "rect_flow": "rectified flow",
    "diff_loss": "diffusion",
    "gmm_wo_ar": "Gaussian mixture without inner autoregression",
    "gmm_cov_wo_ar": "full-covariance Gaussian mixture without inner autoregression",
}
_HEAD_KEYS = {
    "diffloss.": "diffusion or rectified-flow",
    "gmm_head.": "non-autoregressive Gaussian-mixture",
    "arhead.net.": "inner diffusion or rectified-flow",
    "arhead.word_embed.": "inner bytes",
}


class CheckpointError(ValueError):
    """A file that cannot serve as the checkpoint asked for; the message names file, fault and remedy."""


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
        return self.config.inner_heads if isinstance(self.config, ArinarConfig) else None

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
    _save(Path(path), "arinar", model, model.config.to_dict(), metadata)


def save_vae(path: PathLike, vae: AutoencoderKL, *, metadata: dict[str, str] | None = None) -> None:
    """Write an autoencoder as :func:`save_arinar` writes a model."""
    _save(Path(path), "vae", vae, vae.config.to_dict(), metadata)


def _save(path: Path, kind: str, module: nn.Module, config: dict[str, Any], metadata: dict[str, str] | None) -> None:
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    header = {"format_version": FORMAT_VERSION, "kind": kind, "config": config, "metadata": metadata or {}}
    header["sha256"] = _digest(header, state)
    with replacing(path) as temporary:
        save_file(state, temporary, {METADATA_KEY: json.dumps(header, sort_keys=True)})
        temporary.chmod(0o644)  # safetensors makes it readable by its owner alone


def _digest(header: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """sha256 over the header (without its own ``sha256``) and every tensor: name, dtype, shape, bytes."""
    described = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(state):
        value = state[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------- load


def load_arinar(
    path: PathLike, *, ema: bool = True, inner_heads: int | None = None, config: ArinarConfig | None = None
) -> Arinar:
    """Load a model (our safetensors, a published training container, a bare state dict): eval mode, float32.

    Parameters
    ----------
    path : a file, or the name of a demo model (``digits``, ``digits-causal``).
    ema : of a training container, take the averaged weights (``model_ema``), as published evaluation does.
        Files that hold one set of weights are not affected.
    inner_heads : heads of the inner attention. Decides, whatever the file says: 4 for the first public
        version, 16 for later ones; weights of both look the same.
    config : decides everything that the file does not hold; needed where the weights' shapes do not show it.

    Raises ValueError (:class:`CheckpointError`) for anything that is not such a checkpoint or is damaged;
    warns (UserWarning) where the config had to be guessed.
    """
    state, info = _read_arinar(_resolve(path, vae=False), ema, inner_heads, config)
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
    config: ArinarConfig | VaeConfig | None = None,
) -> CheckpointInfo:
    """Read a model or an autoencoder completely, checks included, and tell what it is, without warning.

    ``ema=None`` takes the averaged weights where the file has them. Raises as :func:`load_arinar` does.
    """
    file = _resolve(path, vae=False)
    contents = _open(file)
    if _looks_like_vae(contents):
        if isinstance(config, ArinarConfig):
            raise CheckpointError(f"{file} is an autoencoder: its config is a VaeConfig, not an ArinarConfig")
        info = _read_vae(file, config, contents)[1]
    else:
        if isinstance(config, VaeConfig):
            raise CheckpointError(f"{file} is a model: its config is an ArinarConfig, not a VaeConfig")
        ema = "model_ema" in contents.states if ema is None else ema
        info = _read_arinar(file, ema, inner_heads, config, contents)[1]
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    plain = {name: getattr(info, name) for name in info.__dataclass_fields__}
    return CheckpointInfo(**{**plain, "sha256": digest.hexdigest()})


def _resolve(path: PathLike, vae: bool) -> Path:
    """A path, or the shipped file that a demo model's name stands for (``./digits`` is always a path)."""
    if isinstance(path, str) and re.fullmatch(r"[\w-]+", path):
        from . import demo

        if path in demo.DEMO_MODELS:
            return Path(demo.demo_vae(path) if vae else demo.demo_checkpoint(path))
        if not Path(path).exists():
            raise CheckpointError(f"no file {path}, nor a demo model of that name (demo models: {', '.join(demo.DEMO_MODELS)})")
    return Path(path)


# ------------------------------------------------------------------------------------------- open any format


@dataclass
class _Contents:
    """A file taken apart: ``states`` holds its state dicts by container key, "" for a bare one."""

    source: str
    states: dict[str, dict[str, Tensor]]
    config: dict[str, Any] | None = None
    kind: str | None = None  # None: the file does not say
    args: dict[str, Any] | None = None
    epoch: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _open(path: Path) -> _Contents:
    try:
        with open(path, "rb") as stream:
            start = stream.read(512)
    except FileNotFoundError:
        raise CheckpointError(f"no file {path}: give the path of a checkpoint, or a demo model's name") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder: give the checkpoint file inside it") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if not start:
        raise CheckpointError(f"{path} is empty: copy or download it again")
    if start[:4] == b"PK\x03\x04":
        return _open_pickle(path, zipped=True)
    if start[0] == 0x80 and len(start) > 1 and start[1] <= 5:
        return _open_pickle(path, zipped=False)
    if start[8:9] == b"{":
        return _open_safetensors(path)
    raise CheckpointError(
        f"{path} is not a checkpoint ({_foreign(start)}): expected safetensors or a PyTorch file (.pth, .pt, .ckpt)"
    )


def _foreign(start: bytes) -> str:
    """What a file with this beginning seems to be."""
    images = {b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image", b"GIF8": "a GIF image"}
    for magic, name in images.items():
        if start.startswith(magic):
            return name
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: fetch the file itself with `git lfs pull`"
    if re.match(rb"\s*<(!doctype|html)", start, re.IGNORECASE):
        return "a web page: the download failed"
    if all(byte >= 32 or byte in b"\t\n\r" for byte in start):
        return "a text file"
    return "unknown format, or damaged at its beginning"


def _damaged(path: Path, error: object) -> NoReturn:
    reason = " ".join(str(error).split()) or type(error).__name__
    raise CheckpointError(f"{path} is truncated or damaged ({reason[:200]}): copy or download it again") from None


def _open_safetensors(path: Path) -> _Contents:
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        _damaged(path, error)
    if METADATA_KEY not in metadata:
        return _Contents("safetensors without a config", {"": state}, metadata=metadata)
    try:
        header = json.loads(metadata[METADATA_KEY])
        version, kind, config = header["format_version"], header["kind"], dict(header["config"])
        saved, expected = dict(header["metadata"]), header["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        _damaged(path, f"its header: {error}")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}, this arinar reads {FORMAT_VERSION}: use a newer arinar")
    if _digest(header, state) != expected:
        _damaged(path, "its sha256 does not match its contents")
    return _Contents(f"arinar safetensors, version {version}", {"": state}, config, kind, metadata=saved)


def _open_pickle(path: Path, zipped: bool) -> _Contents:
    """A file of torch.save through the restricted unpickler: tensors, plain values, argparse.Namespace."""
    if zipped:
        # PyTorch's own reader skips the checksums, so flipped bits would pass unnoticed.
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                broken = archive.testzip()
        except Exception as error:  # damage surfaces in a dozen types, NotImplementedError and RuntimeError included
            _damaged(path, error)
        if broken is not None:
            _damaged(path, f"checksum of {broken}")
        if not any(name.endswith("data.pkl") for name in names):
            raise CheckpointError(f"{path} is a zip archive, but not a PyTorch checkpoint")
    try:
        with torch.serialization.safe_globals(list(_ALLOWED_GLOBALS)), warnings.catch_warnings():
            # Which pickle protocol a file was written with is no concern of the user's.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            # Mapped, so that the optimizer state (twice the model's size) is never read into memory.
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except Exception as error:  # damaged pickles raise nearly anything: KeyError, EOFError, struct.error, ...
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not found and not zipped:
            _damaged(path, error)
        # A zip's checksums were right, so it holds what its writer meant.
        what = f"needs {found.group(1)}" if found else "holds more than plain values and tensors"
        raise CheckpointError(
            f"{path} {what}, which would mean running code from the file, and is refused: save its state "
            f"dict alone (torch.save(model.state_dict(), ...)), or as safetensors"
        ) from None
    contents = _take_apart(path, data)
    if not zipped:
        contents.notes.append("an old-style PyTorch file: it carries no checksum")
    return contents


def _take_apart(path: Path, data: Any) -> _Contents:
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path} holds a {type(data).__name__}; expected a state dict, or a training container")
    if any(isinstance(value, Tensor) for value in data.values()):
        return _Contents("bare state dict", {"": dict(data)})
    states = {key: dict(data[key]) for key in ("model", "model_ema", "state_dict") if isinstance(data.get(key), Mapping)}
    if not states:
        held = ", ".join(str(key) for key in list(data)[:6]) or "nothing"
        raise CheckpointError(f"{path} holds no weights (its entries: {held}); expected model, model_ema or state_dict")
    args = data.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    epoch = data.get("epoch")
    return _Contents(
        f"training container ({', '.join(states)})",
        states,
        args=dict(args) if isinstance(args, Mapping) else None,
        epoch=epoch if isinstance(epoch, int) else None,
    )


def _looks_like_vae(contents: _Contents) -> bool:
    names = {_bare(name) for state in contents.states.values() for name in state}
    return contents.kind == "vae" or "post_quant_conv.weight" in names or "decoder.conv_in.weight" in names


def _bare(name: object) -> str:
    """A parameter's name without what DistributedDataParallel and torch.compile put before it."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", str(name))


# ------------------------------------------------------------------------------------------ models and VAEs


def _read_arinar(
    path: Path,
    ema: bool,
    inner_heads: int | None,
    config: ArinarConfig | None,
    contents: _Contents | None = None,
) -> tuple[dict[str, Tensor], CheckpointInfo]:
    contents = contents or _open(path)
    if _looks_like_vae(contents):
        raise CheckpointError(f"{path} is an autoencoder, not a model: load it with load_vae (--vae on the command line)")
    weights, state = _choose_weights(path, contents.states, ema)
    state = _strip(path, state)
    _refuse_other_heads(path, state, contents.args or {})

    notes, warned = list(contents.notes), []
    if config is not None:
        source, heads_source = "given by the caller", "the config given by the caller"
        by_args = _heads_from_args(contents.args)
        if inner_heads is None and by_args is not None and by_args[0] != config.inner_heads:
            warned.append(
                f"{path}: the given config has inner_heads={config.inner_heads}, but {by_args[1]}, which has "
                f"{by_args[0]}. The weights fit both and compute different things: pass "
                f"inner_heads={by_args[0]} unless you know better "
                f"(inner_heads={config.inner_heads} confirms the config)"
            )
    elif contents.config is not None:
        source, heads_source = "stored in the file", "stored in the file"
        config = _parse(path, ArinarConfig, contents.config)
    else:
        source = (
            "inferred from the saved args and the weights' shapes" if contents.args else "inferred from the weights' shapes"
        )
        config, heads_source, guesses = _infer_arinar(path, state, contents.args, inner_heads)
        warned += guesses
    if inner_heads is not None:
        heads_source = "given by the caller"
        try:
            config = config.replace(inner_heads=inner_heads)
        except (ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"inner_heads is {inner_heads}: {error}") from None
    if contents.args is not None:
        notes += _notes_from_args(contents.args)
        if source != "given by the caller" and _other_latent_statistics(contents.args):
            warned.append(
                f"{path}: trained on latents normalised with their own statistics (latents_stats.pt), which "
                f"the checkpoint does not hold; latent_scale {config.latent_scale} and latent_shift "
                f"{config.latent_shift} are guesses: pass "
                f"config=inspect_checkpoint(path).config.replace(latent_scale=1 / std, latent_shift=mean)"
            )
    return _finish(path, "arinar", Arinar, config, source, weights, state, contents, heads_source, notes, warned)


def _read_vae(
    path: Path, config: VaeConfig | None, contents: _Contents | None = None
) -> tuple[dict[str, Tensor], CheckpointInfo]:
    contents = contents or _open(path)
    if not _looks_like_vae(contents):
        names = {_bare(name) for state in contents.states.values() for name in state}
        if contents.kind == "arinar" or any(name.startswith(("arhead.", "class_emb.", "z_proj.")) for name in names):
            raise CheckpointError(f"{path} is a model, not an autoencoder: load it with load_arinar")
        raise CheckpointError(f"{path} is not a KL autoencoder: it has no post_quant_conv.weight ({_some(names)})")
    weights = next(key for key in ("", "model", "state_dict", "model_ema") if key in contents.states)
    state, notes = contents.states[weights], list(contents.notes)
    kept = {name: value for name, value in state.items() if not _bare(name).startswith(("loss", "model_ema."))}
    if len(kept) < len(state):
        notes.append(f"{len(state) - len(kept)} entries of the training loss and its averages were left out")
    kept = _strip(path, kept)
    if config is not None:
        source = "given by the caller"
    elif contents.config is not None:
        source, config = "stored in the file", _parse(path, VaeConfig, contents.config)
    else:
        source, config = "inferred from the weights' shapes", _infer_vae(path, kept)
    shown = weights or "the only weights"
    return _finish(path, "vae", AutoencoderKL, config, source, shown, kept, contents, "", notes, [])


def _finish(
    path: Path,
    kind: str,
    module: type[Arinar] | type[AutoencoderKL],
    config: Any,
    source: str,
    weights: str,
    state: dict[str, Tensor],
    contents: _Contents,
    heads_source: str,
    notes: list[str],
    warned: list[str],
) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Check the weights against what the config calls for, convert them to float32, and sum up."""
    with torch.device("meta"):
        empty = module(config)
    expected = {name: tuple(value.shape) for name, value in empty.state_dict().items()}
    _check_shapes(path, state, expected, source)
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    # Copies, in the model's order: what was read may be mapped from the file.
    converted = {name: state[name].detach().to(torch.float32, copy=True).contiguous() for name in expected}
    bad = [name for name, value in converted.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise CheckpointError(
            f"{path} has non-finite weights in {len(bad)} of {len(converted)} entries ({_some(bad)}): "
            f"training diverged, or the file is damaged; use another checkpoint"
        )
    info = CheckpointInfo(
        path=str(path),
        kind=kind,
        source=contents.source,
        weights=weights,
        config=config,
        config_source=source,
        parameters=sum(parameter.numel() for parameter in empty.parameters()),
        dtypes=tuple(dtypes),
        inner_heads_source=heads_source,
        notes=tuple(notes),
        warnings=tuple(warned),
        epoch=contents.epoch,
        metadata=contents.metadata,
        size=path.stat().st_size,
    )
    return converted, info


def _choose_weights(path: Path, states: dict[str, dict[str, Tensor]], ema: bool) -> tuple[str, dict[str, Tensor]]:
    if "" in states:
        return "the only weights", states[""]
    wanted = ("model_ema",) if ema else ("model", "state_dict")
    for key in wanted:
        if key in states:
            return key, states[key]
    there = ", ".join(states)
    raise CheckpointError(
        f"{path} has no {' or '.join(wanted)} weights (it has {there}): pass ema={not ema} "
        f"({'--no-ema' if ema else 'without --no-ema'} on the command line) to use {there}"
    )


def _strip(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names without wrappers' prefixes; every value a dense floating-point tensor."""
    clean: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: entry {name} is a {type(value).__name__}, not a tensor; expected weights alone")
        if value.layout != torch.strided or not value.is_floating_point():
            raise CheckpointError(
                f"{path}: entry {name} is {value.layout} {value.dtype}; expected dense floating-point "
                f"weights (quantised checkpoints are not read)"
            )
        clean[_bare(name)] = value
    return clean


def _check_shapes(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shaped = [
        f"{name} is {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    faults = [
        f"{len(found)} {what} ({_some(found)})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shaped))
        if found
    ]
    if faults:
        raise CheckpointError(
            f"{path} does not fit the config {source}: {'; '.join(faults)}; of {len(expected)} expected "
            f"entries. Use the config it was trained with, or a checkpoint of this architecture"
        )


def _some(names: Sequence[str] | set[str], count: int = 3) -> str:
    shown = sorted(names)[:count] if isinstance(names, set) else list(names)[:count]
    return ", ".join(shown) + (", ..." if len(names) > count else "")


def _parse(path: Path, kind: Any, data: dict[str, Any]) -> Any:
    try:
        return kind.from_dict(data)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: its stored config is not usable: {error}") from None


# ----------------------------------------------------------------------------- inference from shapes and args


def _refuse_other_heads(path: Path, state: Mapping[str, Tensor], args: Mapping[str, Any]) -> None:
    backbone = str(args.get("model", "mar"))
    if backbone.startswith("var"):
        raise CheckpointError(f"{path} has the backbone {backbone}; only the masked MAR backbone is supported")
    head_type = args.get("head_type", "ar_gmm")
    if head_type != "ar_gmm":
        name = _HEAD_TYPES.get(str(head_type), "unknown")
        raise CheckpointError(f"{path} has the head {head_type} ({name}); {_ONLY_GMM}")
    for prefix, name in _HEAD_KEYS.items():
        if any(key.startswith(prefix) for key in state):
            raise CheckpointError(f"{path} has a {name} head (entries {prefix}*); {_ONLY_GMM}")
    if args.get("use_nf") or any(key.startswith("arhead.nf.") for key in state):
        raise CheckpointError(f"{path} has a normalising flow before its mixture head (use_nf); {_ONLY_GMM}")
    group = args.get("feature_group", 1)
    projection = state.get("arhead.input_proj.weight")
    if projection is not None and projection.ndim == 2:
        group = projection.shape[1]
    if group != 1:
        raise CheckpointError(f"{path} generates {group} features at a time (feature_group {group}); {_ONLY_GMM}")


def _heads_from_args(args: Mapping[str, Any] | None) -> tuple[int, str] | None:
    """Inner heads as the saved args settle them, with the reason; None without args."""
    if args is None:
        return None
    if "inner_ar_width" in args:
        return LATER_INNER_HEADS, "its saved args have inner_ar_width, so a later public version wrote it"
    return (
        FIRST_VERSION_INNER_HEADS,
        "its saved args lack inner_ar_width, so the first public version wrote it",
    )


def _guess_heads(outer: tuple[int, int], inner: tuple[int, int]) -> tuple[int, str]:
    """Inner heads from (width, depth) alone, with the reason."""
    if outer in _FIRST_VERSION_SIZES:
        return (
            FIRST_VERSION_INNER_HEADS,
            f"only the first public version has an outer depth of {outer[1]} at width {outer[0]}",
        )
    if outer in _LATER_SIZES:
        return (
            LATER_INNER_HEADS,
            f"only later public versions have an outer depth of {outer[1]} at width {outer[0]}",
        )
    if inner != (768, 1):
        return LATER_INNER_HEADS, (
            f"the first public version has inner width 768 and depth 1, this has {inner[0]} and {inner[1]}"
        )
    return (
        FIRST_VERSION_INNER_HEADS,
        "the weights fit the published base checkpoint, which the first public version wrote",
    )


def _infer_arinar(
    path: Path, state: Mapping[str, Tensor], args: Mapping[str, Any] | None, inner_heads: int | None
) -> tuple[ArinarConfig, str, list[str]]:
    """Config, how the inner heads were settled, and warnings for what was guessed."""
    if "target_pos_embed_learned" in state:
        raise CheckpointError(
            f"{path} is a causal model without its config, and its shapes do not show the generation order: "
            f"pass config=ArinarConfig(outer='causal', ...)"
        )
    saved = args or {}

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in state:
            raise CheckpointError(f"{path} is not an ARINAR checkpoint: it has no {name} ({_some(set(state))})")
        if state[name].ndim != axes:
            raise CheckpointError(f"{path}: {name} is {tuple(state[name].shape)}; expected {axes} axes")
        return tuple(state[name].shape)

    _, length, decoder_width = shape("diffusion_pos_embed_learned", 3)
    num_classes, encoder_width = shape("class_emb.weight", 2)
    token_dim = shape("z_proj.weight", 2)[1]
    inner_width = shape("arhead.input_proj.weight", 2)[0]
    grid, patch = math.isqrt(length), _integer(path, saved, "patch_size", 1)
    depths = {room: _count(state, f"{room}_blocks.") for room in ("encoder", "decoder")}
    inner_depth = _count(state, "arhead.blocks.")
    outer_rows = shape("encoder_blocks.0.mlp.fc1.weight", 2)[0]
    inner_rows = shape("arhead.blocks.0.ffn.fc1.weight", 2)[0]
    heads = {}
    for room, width in (("encoder", encoder_width), ("decoder", decoder_width)):
        known = saved.get(f"{room}_num_heads", PUBLISHED_OUTER_HEADS.get(width))
        if not isinstance(known, int):
            widths = ", ".join(str(key) for key in PUBLISHED_OUTER_HEADS)
            raise CheckpointError(
                f"{path} has {room} width {width}, whose number of attention heads the weights do not show "
                f"(known for the published widths {widths}): pass "
                f"config=ArinarConfig(encoder_heads=..., decoder_heads=..., ...)"
            )
        heads[room] = known

    warned: list[str] = []
    settled = _heads_from_args(args)
    if inner_heads is not None:
        settled = inner_heads, "given by the caller"
    elif settled is None:
        settled = _guess_heads((encoder_width, depths["encoder"]), (inner_width, inner_depth))
        warned.append(
            f"{path}: inner_heads={settled[0]} is a guess: the file has no training args, head counts leave no "
            f"trace in weights, and {settled[1]}. The wrong number spoils the images without any error: pass "
            f"inner_heads={FIRST_VERSION_INNER_HEADS} (first public version, March 2025) or "
            f"inner_heads={LATER_INNER_HEADS} (later versions), --inner-heads on the command line, to settle it"
        )
    stride = _integer(path, saved, "vae_stride", 16)
    try:
        config = ArinarConfig(
            img_size=grid * stride * patch,
            vae_stride=stride,
            patch_size=patch,
            vae_embed_dim=token_dim // patch**2,
            num_classes=num_classes,
            buffer_size=shape("encoder_pos_embed_learned", 3)[1] - length,
            encoder_width=encoder_width,
            encoder_depth=depths["encoder"],
            encoder_heads=heads["encoder"],
            decoder_width=decoder_width,
            decoder_depth=depths["decoder"],
            decoder_heads=heads["decoder"],
            mlp_ratio=outer_rows / encoder_width,
            inner_width=inner_width,
            inner_depth=inner_depth,
            inner_heads=settled[0],
            inner_mlp_ratio=inner_rows / inner_width,
            num_gaussians=shape("arhead.head.weight", 2)[0] // 3,
            default_num_iter=min(64, length),
        )
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: its weights' shapes give no usable config ({error}): pass config=...") from None
    entries = {
        "img_size": config.img_size,
        "vae_embed_dim": config.vae_embed_dim,
        "class_num": num_classes,
        "buffer_size": config.buffer_size,
        "num_gaussians": config.num_gaussians,
        "inner_ar_width": inner_width,
        "inner_ar_depth": inner_depth,
    }
    wrong = [
        f"{name} is {saved[name]} in args, {got} in the weights" for name, got in entries.items() if saved.get(name, got) != got
    ]
    if wrong:
        raise CheckpointError(f"{path}: saved args and weights disagree ({'; '.join(wrong)}): pass config=... to decide")
    return config, settled[1], warned


def _integer(path: Path, args: Mapping[str, Any], name: str, default: int) -> int:
    value = args.get(name, default)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: {name} is {value!r} in its saved args; expected a positive integer")
    return value


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Blocks in a stack. Distinct numbers, not the highest + 1: a stray name must not ask for a million."""
    return len({name[len(prefix) :].split(".", 1)[0] for name in state if name.startswith(prefix)})


def _other_latent_statistics(args: Mapping[str, Any]) -> bool:
    """Later versions scale latents by 0.2325 only for a cache of that name, else by a file's mean and std."""
    return "inner_ar_width" in args and "cached_path" in args and "mar_cache" not in str(args["cached_path"])


def _notes_from_args(args: Mapping[str, Any]) -> list[str]:
    notes = []
    if "inner_ar_width" not in args:
        notes.append(
            "written by the first public version: its quoted temperatures divide the std, ours multiply "
            "(1.1 there is 1/1.1 here)"
        )
    schedule = args.get("bilevel_schedule", "constant")
    if schedule != "constant":
        notes.append(f"its args ask for bilevel_schedule {schedule} in sampling; only constant is implemented")
    return notes


def _infer_vae(path: Path, state: Mapping[str, Tensor]) -> VaeConfig:
    def shape(name: str) -> tuple[int, ...]:
        if name not in state or state[name].ndim != 4:
            raise CheckpointError(f"{path} is not a complete KL autoencoder: it has no convolution {name}")
        return tuple(state[name].shape)

    channels, in_channels = shape("encoder.conv_in.weight")[:2]
    levels = _count(state, "encoder.down.")
    multipliers = tuple(shape(f"encoder.down.{level}.block.0.conv1.weight")[0] // channels for level in range(levels))

    def attention(room: str) -> tuple[int, ...]:
        return tuple(level for level in range(levels) if any(name.startswith(f"{room}.{level}.attn.") for name in state))

    try:
        return VaeConfig(
            embed_dim=shape("post_quant_conv.weight")[1],
            channels=channels,
            channel_multipliers=multipliers,
            num_res_blocks=_count(state, "encoder.down.0.block."),
            in_channels=in_channels,
            encoder_attention_levels=attention("encoder.down"),
            decoder_attention_levels=attention("decoder.up"),
            out_channels=shape("decoder.conv_out.weight")[0],
        )
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its shapes give no usable config ({error}): pass config=VaeConfig(norm_groups=..., ...)"
        ) from None
