"""The files that hold checkpoints, taken apart without ever running code from them; and our own format, written.

Our format is safetensors with one metadata entry, ``arinar``: a JSON object of format version, kind
("arinar" or "vae"), config, the caller's metadata and a sha256 over all of it and every tensor. Files of torch.save
are read as data, by `torch_files`. What the entries mean is no matter here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import replacing
from .pickled import AttackError, Unknown, plain
from .reading import check_regular, parse_json
from .text import one_line
from .torch_files import TorchFileError, read_torch_stream, read_torch_zip, state_of

FORMAT_VERSION = 1
# One entry holds everything: safetensors writes several in random order; equal models give equal bytes.
METADATA_KEY = "arinar"

# Weights of a file may share storages, but not without end: their copies must have a size that the file answers for.
_MAX_SHARING = 2


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
        if stat.S_ISDIR(path.stat().st_mode):
            raise CheckpointError(f"{path} is a folder: give the checkpoint file inside it")
        check_regular(path)
        size = path.stat().st_size
        with open(path, "rb") as stream:
            start = stream.read(512)
    except FileNotFoundError:
        raise CheckpointError(f"no file {path}: give the path of a checkpoint, or a demo model's name") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except CheckpointError:
        raise
    except ValueError as error:  # a pipe, a device; a name that no file can have
        raise CheckpointError(str(error)) from None
    if not start:
        raise CheckpointError(f"{path} is empty: copy or download it again")
    # The format's own rule comes first: the length of its header can look like the beginning of a pickle.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return _open_safetensors(path)
    if start[:4] == b"PK\x03\x04":
        return _open_torch(path, zipped=True)
    if start[0] == 0x80 and len(start) > 1 and start[1] <= 5:
        return _open_torch(path, zipped=False)
    if start[8:9] == b"{":  # its header is longer than the file
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
    reason = one_line(error) or type(error).__name__
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
        header = parse_json(metadata[METADATA_KEY])
        version, kind, config = header["format_version"], header["kind"], dict(header["config"])
        saved, expected = dict(header["metadata"]), header["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        _damaged(path, f"its header: {error}")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}, this arinar reads {FORMAT_VERSION}: use a newer arinar")
    if contents_sha256(header, state) != expected:
        _damaged(path, "its sha256 does not match its contents")
    return Contents(f"arinar safetensors, version {version}", {"": state}, config, kind, metadata=saved)


def _open_torch(path: Path, zipped: bool) -> Contents:
    """A file of torch.save, read as data: tensors, plain values, and stand-ins for anything else."""
    try:
        data = read_torch_zip(path) if zipped else read_torch_stream(path)
    except AttackError as error:
        raise CheckpointError(_needs(path, error.name)) from None
    except TorchFileError as error:
        raise CheckpointError(f"{path} {error}") from None
    except Exception as error:  # damage surfaces in a dozen types: KeyError, EOFError, struct.error, BadZipFile, ...
        _damaged(path, error)
    contents = _take_apart(path, data)
    if not zipped:
        contents.notes.append("an old-style PyTorch file: it carries no checksum")
    return contents


def _needs(path: Path, name: str) -> str:
    return (
        f"{path} needs {name}, which would mean running code from the file, and is refused: save its state "
        f"dict alone (torch.save(model.state_dict(), ...)), or as safetensors"
    )


def _take_apart(path: Path, data: Any) -> Contents:
    if isinstance(data, Unknown):
        raise CheckpointError(_needs(path, data.name))
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path} holds a {type(data).__name__}; expected a state dict, or a training container")
    if any(isinstance(value, Tensor) for value in data.values()):
        return Contents("bare state dict", {"": dict(data)})
    states = {key: dict(data[key]) for key in ("model", "model_ema", "state_dict") if isinstance(data.get(key), Mapping)}
    if not states:
        held = ", ".join(str(key) for key in list(data)[:6]) or "nothing"
        raise CheckpointError(f"{path} holds no weights (its entries: {held}); expected model, model_ema or state_dict")
    saved, epoch = data.get("args"), data.get("epoch")
    args = state_of(saved)
    args = None if args is None else {str(name): plain(value) for name, value in args.items()}
    contents = Contents(f"training container ({', '.join(states)})", states, args=args)
    contents.epoch = epoch if isinstance(epoch, int) else None
    unmade = [f"{name} ({value.name})" for name, value in (args or {}).items() if isinstance(value, Unknown)]
    if unmade:
        contents.notes.append(f"its args hold what is not read, as nothing is run from a file: {some(unmade, 6)}")
    elif args is None and saved is not None:
        what = saved.name if isinstance(saved, Unknown) else f"a {type(saved).__name__}"
        contents.notes.append(f"its args are not read: they are {what}, expected argparse.Namespace or a dict")
    return contents


def bare_name(name: object) -> str:
    """A parameter's name without what DistributedDataParallel and torch.compile put before it."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", str(name))


def dense_weights(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names without wrappers' prefixes; every value a dense floating-point tensor."""
    clean: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Unknown):
            raise CheckpointError(
                f"{path}: entry {name} is {value.name}, which is not read; expected dense floating-point weights"
            )
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: entry {name} is a {type(value).__name__}, not a tensor; expected weights alone")
        if value.layout != torch.strided or not value.is_floating_point():
            raise CheckpointError(
                f"{path}: entry {name} is {value.layout} {value.dtype}; expected dense floating-point "
                f"weights (quantised checkpoints are not read)"
            )
        clean[bare_name(name)] = value
    needed, size = sum(value.nbytes for value in clean.values()), path.stat().st_size
    if needed > _MAX_SHARING * size:
        raise CheckpointError(
            f"{path}: its weights share storages: {needed:,} bytes out of a file of {size:,}; save each on its own"
        )
    return clean


def some(names: Sequence[str] | set[str], count: int = 3) -> str:
    """The first names, for a message."""
    shown = sorted(names)[:count] if isinstance(names, set) else list(names)[:count]
    return ", ".join(shown) + (", ..." if len(names) > count else "")
