"""The files that hold checkpoints, taken apart without ever running code from them; and our own format, written.

Our format is safetensors with one metadata entry, ``arinar``: a JSON object of format version, kind
("arinar" or "vae"), config, the caller's metadata and a sha256 over all of it and every tensor. Files of torch.save
go through the restricted unpickler. What the entries mean is no matter here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
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

from .files import replacing

FORMAT_VERSION = 1
# One entry holds everything: safetensors writes several in random order; equal models give equal bytes.
METADATA_KEY = "arinar"

# What published containers hold beside tensors. None of these runs anything when it is built.
_ALLOWED_GLOBALS = [argparse.Namespace]


class CheckpointError(ValueError):
    """A file that cannot serve as the checkpoint asked for; the message names file, fault and remedy."""


# ----------------------------------------------------------------------------------------------------- write


def write_checkpoint(path: Path, kind: str, module: nn.Module, config: dict[str, Any], metadata: dict[str, str] | None) -> None:
    """Write a module as our safetensors, whole or not at all; equal modules give equal bytes."""
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    header = {"format_version": FORMAT_VERSION, "kind": kind, "config": config, "metadata": metadata or {}}
    header["sha256"] = contents_sha256(header, state)
    with replacing(path) as temporary:
        try:
            save_file(state, temporary, {METADATA_KEY: json.dumps(header, sort_keys=True)})
        except SafetensorError as error:  # a full disk, a refusal: the state dict itself is sound
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error)) from error
        temporary.chmod(0o644)  # safetensors makes it readable by its owner alone


def contents_sha256(header: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """sha256 over the header (without its own ``sha256``) and every tensor: name, dtype, shape, bytes."""
    described = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(state):
        value = state[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ read


@dataclass
class Contents:
    """A file taken apart: ``states`` holds its state dicts by container key, "" for a bare one."""

    source: str
    states: dict[str, dict[str, Tensor]]
    config: dict[str, Any] | None = None
    kind: str | None = None  # None: the file does not say
    args: dict[str, Any] | None = None
    epoch: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_checkpoint(path: Path) -> Contents:
    """Take a file apart by what its first bytes say it is. Raises CheckpointError for what it is not, and for damage."""
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


def _open_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        _damaged(path, error)
    if METADATA_KEY not in metadata:
        return Contents("safetensors without a config", {"": state}, metadata=metadata)
    try:
        header = json.loads(metadata[METADATA_KEY])
        version, kind, config = header["format_version"], header["kind"], dict(header["config"])
        saved, expected = dict(header["metadata"]), header["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        _damaged(path, f"its header: {error}")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}, this arinar reads {FORMAT_VERSION}: use a newer arinar")
    if contents_sha256(header, state) != expected:
        _damaged(path, "its sha256 does not match its contents")
    return Contents(f"arinar safetensors, version {version}", {"": state}, config, kind, metadata=saved)


def _open_pickle(path: Path, zipped: bool) -> Contents:
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


def _take_apart(path: Path, data: Any) -> Contents:
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path} holds a {type(data).__name__}; expected a state dict, or a training container")
    if any(isinstance(value, Tensor) for value in data.values()):
        return Contents("bare state dict", {"": dict(data)})
    states = {key: dict(data[key]) for key in ("model", "model_ema", "state_dict") if isinstance(data.get(key), Mapping)}
    if not states:
        held = ", ".join(str(key) for key in list(data)[:6]) or "nothing"
        raise CheckpointError(f"{path} holds no weights (its entries: {held}); expected model, model_ema or state_dict")
    args = data.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    epoch = data.get("epoch")
    return Contents(
        f"training container ({', '.join(states)})",
        states,
        args=dict(args) if isinstance(args, Mapping) else None,
        epoch=epoch if isinstance(epoch, int) else None,
    )


def bare_name(name: object) -> str:
    """A parameter's name without what DistributedDataParallel and torch.compile put before it."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", str(name))


def dense_weights(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
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
        clean[bare_name(name)] = value
    return clean


def some(names: Sequence[str] | set[str], count: int = 3) -> str:
    """The first names, for a message."""
    shown = sorted(names)[:count] if isinstance(names, set) else list(names)[:count]
    return ", ".join(shown) + (", ..." if len(names) > count else "")
