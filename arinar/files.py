"""Files in and out: what is read is a file of bounded size, JSON of bounded depth, arrays of bounded shape; results are
written whole or not at all, and what cannot be written is known before the work, not after."""

from __future__ import annotations

import json
import math
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Bytes of a JSON file, and how deep it may nest. (A manifest has 7 levels.)
MAX_JSON, MAX_JSON_DEPTH = 256 << 20, 64
# Deflate makes nothing smaller by more than this: a larger promise is a lie about what will come out.
_MAX_DEFLATION = 1032


def check_regular(path: Path) -> None:
    """Raise ValueError for what is there and is no ordinary file: a pipe or a device may never end, or never begin."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder"}
        raise ValueError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'no ordinary file')}; expected a file: copy it into one")


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file says. Raises OSError where it cannot be read, ValueError for what is no JSON, or beyond bounds."""
    path = Path(path)
    check_regular(path)
    size = path.stat().st_size
    if size > MAX_JSON:
        raise ValueError(f"{path} has {size:,} bytes; expected JSON of at most {MAX_JSON:,}")
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """What a JSON text says. Raises ValueError for what is no JSON, or nested deeper than MAX_JSON_DEPTH."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep") from None
    level = [data]
    for _ in range(MAX_JSON_DEPTH):
        held = (value.values() if isinstance(value, dict) else value for value in level if isinstance(value, (dict, list)))
        level = [item for values in held for item in values]
    if level:
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")
    return data


def read_npz(path: Path, most: int) -> dict[str, Any]:
    """The arrays of an .npz file, at most ``most`` bytes together: their headers are believed only where all fits.

    Raises OSError where it cannot be read, ValueError for other files, and what NumPy, zipfile and zlib raise for damage.
    """
    import numpy as np

    check_regular(path)
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no .npz file")
    arrays: dict[str, Any] = {}
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        total = sum(info.file_size for info in infos)
        if total > most:
            raise ValueError(f"its arrays have {total:,} bytes; expected at most {most:,}")
        for info in infos:
            name = info.filename.removesuffix(".npy")
            if name in arrays or name == info.filename:
                raise ValueError(f"it has an entry {info.filename!r}; expected arrays, each of them once")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"its array {name!r} is compressed in a way that np.savez never uses")
            if info.file_size > _MAX_DEFLATION * info.compress_size:
                raise ValueError(f"its array {name!r} cannot have {info.file_size:,} bytes")
            with archive.open(info) as file:
                shape, dtype = _npy_header(np, file)
                held = info.file_size - file.tell()
                if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
                    raise ValueError(f"its array {name!r} says {shape} {dtype}, for {held:,} bytes")
            with archive.open(info) as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


def _npy_header(np: Any, file: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype that an .npy stream begins with."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an array has the format version {version}; expected 1.0 or 2.0")
    shape, _, dtype = read(file)
    return shape, dtype


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise ValueError, naming the reason and the remedy, where a file cannot be written."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: the folder {path.parent} does not exist; make it, or choose another file")
    probe = _temporary(path)
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}; choose another file") from error


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a file in one step, under a temporary name first -> its path. Raises OSError where it cannot be written."""
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside a file, to write to. That becomes the file at the end; an exception removes it."""
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
