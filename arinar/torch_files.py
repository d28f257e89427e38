"""The two kinds of files that torch.save has written, zip archives and streams of pickles, read without PyTorch's reader.

Every place and length in a file is checked against the others before a tensor is made, and nothing from it is run.
Tensors lie in the mapped file: what is not used (an optimizer's state, twice the model's size) is never held in memory.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .pickled import MAX_BYTES, Name, Outside, Unknown, read_pickle

_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LOCAL_HEADER, _LOCAL_MAGIC = struct.Struct("<4s5H3I2H"), b"PK\x03\x04"
_METHODS = {8: "deflate", 12: "bzip2", 14: "lzma"}
_BLOCK = 1 << 24
# Bytes that every type of elements is aligned to.
_ALIGNED = 16

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# None: of bytes, the tensor says which type.
_STORAGES: dict[str, torch.dtype | None] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": None,
}


class TorchFileError(ValueError):
    """A file that is whole, or seems so, and is not read. The message goes on after the file's name, remedy included."""


@dataclass(frozen=True)
class _StorageId:
    """A storage as a pickle describes it: the name of its class, its key, its number of elements."""

    name: str
    key: str | int
    count: int

    @property
    def kind(self) -> str:
        return self.name.rsplit(".", 1)[-1] if self.name.startswith("torch.") else self.name

    @property
    def dtype(self) -> torch.dtype | None:
        return _STORAGES.get(self.kind)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * (1 if self.dtype is None else self.dtype.itemsize)


@dataclass(frozen=True)
class _Storage:
    """The bytes (N,) uint8 of a storage, and the type of its elements (None: the tensor says which)."""

    content: Tensor
    dtype: torch.dtype | None


def read_torch_zip(path: Path) -> Any:
    """What torch.save wrote as a zip archive: dicts, lists, plain values, tensors in the mapped file, and `Unknown`.

    Raises TorchFileError for archives that torch.save does not write, AttackError, and nearly anything for damage.
    """
    memory = _mapped(path)
    places = _stored_entries(path, memory)
    pickles = [name for name in places if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise TorchFileError("is a zip archive, but not a PyTorch checkpoint: expected one entry data.pkl")
    base = pickles[0].removesuffix("data.pkl")

    def content(name: str, most: int) -> bytes:
        start, size = places[base + name]
        if size > most:
            raise TorchFileError(
                f"has a {name} of {size:,} bytes, of which at most {most:,} are read: save its state dict alone"
            )
        return memory[start : start + size]

    if base + "byteorder" in places and content("byteorder", 16) != b"little":
        raise TorchFileError("was written on a big-endian machine, which is not read: save it again on another one")

    made: dict[_StorageId, _Storage | Unknown] = {}

    def storage(pid: Any) -> Any:
        storage_id = _storage_id(pid)
        if storage_id not in made:
            name = f"{base}data/{storage_id.key}"
            if name not in places:
                raise ValueError(f"it has no record {storage_id.key!r}")
            start, size = places[name]
            if size != storage_id.size:
                raise ValueError(f"its record {name!r} has {size:,} bytes where its tensors need {storage_id.size:,}")
            made[storage_id] = _storage(memory, start, storage_id)
        return made[storage_id]

    return read_pickle(io.BytesIO(content("data.pkl", MAX_BYTES)), _build, storage)


def read_torch_stream(path: Path) -> Any:
    """What torch.save wrote before it wrote zip archives (it still can): as :func:`read_torch_zip`."""
    memory = _mapped(path)
    stream = io.BytesIO(memory[:MAX_BYTES])
    if read_pickle(stream) != _LEGACY_MAGIC or read_pickle(stream) != _LEGACY_PROTOCOL:
        raise ValueError("it is a pickle, but not one of torch.save")
    if not dict(read_pickle(stream)).get("little_endian", True):
        raise TorchFileError("was written on a big-endian machine, which is not read: save it again on another one")
    begin = stream.tell()
    described: dict[Any, _StorageId] = {}

    def note(pid: Any) -> Any:
        storage_id = _storage_id(pid)
        if described.setdefault(storage_id.key, storage_id) != storage_id:
            raise ValueError(f"it describes its record {storage_id.key!r} in two ways")
        return Unknown("storage")

    # The pickle comes before the places of what it refers to, so it is read twice.
    read_pickle(stream, Unknown, _but_modules(note))
    storages = _streamed(memory, stream, described)
    stream.seek(begin)
    return read_pickle(stream, _build, _but_modules(lambda pid: storages[_storage_id(pid).key]))


def _streamed(memory: mmap.mmap, stream: io.BytesIO, described: Mapping[Any, _StorageId]) -> dict[Any, _Storage | Unknown]:
    """The storages behind a stream's pickles, each after its number of elements, in the order of a last pickle."""
    keys = read_pickle(stream)
    if not isinstance(keys, list) or not all(isinstance(key, (str, int)) for key in keys):
        raise ValueError("its list of records is none")
    place, storages = stream.tell(), {}
    for key in keys:
        storage_id = described[key]
        (count,) = struct.unpack("<q", memory[place : place + 8])
        if count != storage_id.count:
            raise ValueError(f"its record {key!r} has {count:,} elements where its tensors need {storage_id.count:,}")
        if place + 8 + storage_id.size > len(memory):
            raise ValueError(f"its record {key!r} ends behind the file")
        storages[key] = _storage(memory, place + 8, storage_id)
        place += 8 + storage_id.size
    return storages


def _but_modules(storage: Outside) -> Outside:
    """Streams refer to the source text of classes as well: nothing that is wanted."""
    return lambda pid: Unknown("a module") if isinstance(pid, tuple) and pid and pid[0] == "module" else storage(pid)


# --------------------------------------------------------------------------------------------------------- zip


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _stored_entries(path: Path, memory: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Name -> first byte and length of every entry. All are stored as they are, in places of their own, once, unharmed."""
    with zipfile.ZipFile(path) as archive:
        infos, end = sorted(archive.infolist(), key=lambda info: info.header_offset), archive.start_dir
    for info in infos:
        method = _METHODS.get(info.compress_type, f"method {info.compress_type}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            how = f"is compressed ({method})" if info.compress_type else "is encrypted, or gives two lengths"
            raise TorchFileError(
                f"has an entry that {how}: {info.filename!r}. torch.save stores its entries as they are: load the original "
                f"with PyTorch, and save it again"
            )
    places: dict[str, tuple[int, int]] = {}
    ends = [*(info.header_offset for info in infos[1:]), end]
    for info, behind in zip(infos, ends, strict=False):
        if info.filename in places:
            raise TorchFileError(f"has two entries named {info.filename!r}: torch.save writes each once; do not trust it")
        start = _start(info, memory)
        if start + info.file_size > behind:
            raise TorchFileError(f"has entries that overlap ({info.filename!r}): it is damaged, or do not trust it")
        places[info.filename] = start, info.file_size
    for info in infos:  # PyTorch's own reader skips the checksums: flipped bits would pass unnoticed
        _check_sum(info, memory, *places[info.filename])
    return places


def _start(info: zipfile.ZipInfo, memory: mmap.mmap) -> int:
    """Where an entry's content begins, as its own header says."""
    place = info.header_offset
    header = memory[place : place + _LOCAL_HEADER.size]
    if place < 0 or len(header) < _LOCAL_HEADER.size:
        raise ValueError(f"the header of {info.filename!r} is missing")
    magic, _, _, method, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    place += _LOCAL_HEADER.size
    name = memory[place : place + name_length].decode("utf-8" if info.flag_bits & 0x800 else "cp437")
    if magic != _LOCAL_MAGIC or method != zipfile.ZIP_STORED or name != info.orig_filename:
        raise ValueError(f"the header of {info.filename!r} says something else than the archive's directory")
    return int(place + name_length + extra_length)


def _check_sum(info: zipfile.ZipInfo, memory: mmap.mmap, start: int, size: int) -> None:
    found = 0
    with memoryview(memory) as view:
        for place in range(start, start + size, _BLOCK):
            found = zlib.crc32(view[place : min(place + _BLOCK, start + size)], found)
    if found != info.CRC:
        raise ValueError(f"checksum of {info.filename}")


# ---------------------------------------------------------------------------------------------------- storages


def _storage_id(pid: Any) -> _StorageId:
    """What a pickle says of a storage. Raises ValueError for a reference to anything else."""
    if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], Name)):
        raise ValueError("it refers to something that is no storage")
    _, name, key, _, count, *view = pid
    if not isinstance(key, (str, int)) or not _is_size(count) or any(item is not None for item in view):
        raise ValueError(f"its storage {str(key)[:60]!r} is described in a way that is not understood")
    return _StorageId(name.text, key, count)


def _storage(memory: mmap.mmap, start: int, storage_id: _StorageId) -> _Storage | Unknown:
    """A storage where it lies in the file. (Streams align nothing: what lies across is copied, once.)"""
    if storage_id.kind not in _STORAGES:
        return Unknown(storage_id.name)
    if not storage_id.size:
        return _Storage(torch.empty(0, dtype=torch.uint8), storage_id.dtype)
    content = torch.frombuffer(memory, dtype=torch.uint8, count=storage_id.size, offset=start)
    return _Storage(content.clone() if start % _ALIGNED else content, storage_id.dtype)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# ----------------------------------------------------------------------------------------------------- objects


def _build(name: str, args: tuple[Any, ...]) -> Any:
    """What is understood of what torch.save writes; the rest is left unmade."""
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return args[0]
    if name == "torch._tensor._rebuild_from_type_v2" and isinstance(args[0], Name) and isinstance(args[2], tuple):
        return _rebuilt(args[0].text, args[2])  # a tensor with attributes
    if name == "collections.OrderedDict":
        pairs = args[0] if args and isinstance(args[0], list) else []
        return {key: value for key, value in pairs if isinstance(key, str)}
    if name == "collections.defaultdict":
        return {}
    if name == "torch.Size" and args and isinstance(args[0], (list, tuple)):
        return tuple(args[0])
    if name in ("copyreg._reconstructor", "copy_reg._reconstructor") and isinstance(args[0], Name):
        return Unknown(args[0].text)
    return _rebuilt(name, args)


def _rebuilt(name: str, args: tuple[Any, ...]) -> Any:
    """A tensor in the way of the named function of torch._utils; an Unknown where that is not understood."""
    function = name.removeprefix("torch._utils.")
    if function in ("_rebuild_tensor", "_rebuild_tensor_v2") and len(args) >= 4:
        storage, dtype = args[0], args[0].dtype if isinstance(args[0], _Storage) else None
    elif function == "_rebuild_tensor_v3" and len(args) >= 7 and isinstance(args[6], Name):
        storage, dtype = args[0], _DTYPES.get(args[6].text.removeprefix("torch."))
    else:
        return Unknown(name, args)
    if not isinstance(storage, _Storage) or dtype is None:
        return Unknown(name, args)
    return _tensor(storage, dtype, *args[1:4])


def _tensor(storage: _Storage, dtype: torch.dtype, offset: Any, shape: Any, stride: Any) -> Tensor | Unknown:
    """A view of a storage. One that shows elements several times is not made: a copy of it could have any size."""
    if not (_is_size(offset) and _are_sizes(shape) and _are_sizes(stride) and len(shape) == len(stride)):
        raise ValueError("it has a tensor whose shape or strides are no sizes")
    if 0 in shape:
        return torch.empty(tuple(shape), dtype=dtype)
    held = storage.content.numel() // dtype.itemsize
    last = offset + sum((axis - 1) * step for axis, step in zip(shape, stride, strict=True))
    if last >= held:
        raise ValueError(f"it has a tensor {_text(shape)} that reaches behind its storage of {held:,} elements")
    if math.prod(shape) > held:
        return Unknown(f"a tensor {_text(shape)} over a storage of {held:,} elements")
    return storage.content[: held * dtype.itemsize].view(dtype).as_strided(tuple(shape), tuple(stride), offset)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, (tuple, list)) and len(values) <= 64 and all(_is_size(value) for value in values)


def _text(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"


def state_of(value: Any) -> Mapping[str, Any] | None:
    """The entries of a saved argparse.Namespace, or of a dict; None for anything else."""
    if isinstance(value, Unknown) and value.name == "argparse.Namespace":
        value = value.state
    return value if isinstance(value, Mapping) else None
