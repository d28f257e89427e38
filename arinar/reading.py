"""Reading files from elsewhere: ordinary files of bounded size, JSON of bounded depth, arrays of bounded shape."""

from __future__ import annotations

import json
import math
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

#: Bytes of a JSON file, and how deep it may nest. (A manifest has 7 levels.)
MAX_JSON, MAX_JSON_DEPTH = 256 << 20, 64
# Deflate makes nothing smaller by more than this: a larger promise is a lie about what will come out.
MAX_DEFLATION = 1032


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
            if info.file_size > MAX_DEFLATION * info.compress_size:
                raise ValueError(f"its array {name!r} cannot have {info.file_size:,} bytes")
            with archive.open(info) as file:
                shape, _, dtype = npy_header(file)
                held = info.file_size - file.tell()
                if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
                    raise ValueError(f"its array {name!r} says {shape} {dtype}, for {held:,} bytes")
            with archive.open(info) as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


def npy_header(file: Any) -> tuple[tuple[int, ...], bool, Any]:
    """What an .npy stream begins with: shape, whether it is in Fortran order, dtype."""
    import numpy as np

    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an array has the format version {version}; expected 1.0 or 2.0")
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype
