"""Arrays in .npz files, row by row: written and read without ever holding a whole one in memory.

What is written is what np.savez writes (a zip archive of .npy files, stored as they are) and np.load reads.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .files import replacing
from .reading import MAX_DEFLATION, check_regular, npy_header

Array = npt.NDArray[Any]

# A member's bytes begin after this header, its name and its extra field.
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


class Rows(NamedTuple):
    """An array to be written: its shape and type, and its rows in parts (n, ...) that follow each other."""

    shape: tuple[int, ...]
    dtype: Any
    parts: Iterable[Array]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(math.prod(self.shape) * np.dtype(self.dtype).itemsize)


def write_npz(path: Path, arrays: Mapping[str, Rows]) -> None:
    """Write an .npz file in one step. The same arrays make the same bytes.

    Raises ValueError where parts are not the rows that were announced, OSError where it cannot be written.
    """
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, rows in arrays.items():
            dtype = np.dtype(rows.dtype)
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": rows.shape}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                written = 0
                for part in rows.parts:
                    if part.dtype != dtype or part.shape[1:] != rows.shape[1:]:
                        raise ValueError(f"{name} gets rows {part.dtype} {part.shape[1:]}; expected {dtype} {rows.shape[1:]}")
                    file.write(np.ascontiguousarray(part).data.cast("B") if part.size else b"")
                    written += len(part)
                if written != rows.shape[0]:
                    raise ValueError(f"{name} got {written} rows; expected {rows.shape[0]}")


@dataclass(frozen=True)
class Stored:
    """An array of an .npz file: where it is. ``start``: its first byte in the file, None where it is compressed."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: Any
    start: int | None

    def parts(self, first: int, last: int, size: int) -> Iterator[Array]:
        """Rows first..last-1, at most ``size`` at a time. Of a compressed array what comes before is read too, and left out.

        Raises ValueError where the file is damaged.
        """
        if self.start is None:
            yield from self._unpacked(first, last, size)
            return
        whole = np.memmap(self.path, self.dtype, "r", self.start, self.shape)
        for begin in range(first, last, size):
            yield np.array(whole[begin : min(begin + size, last)])

    def _unpacked(self, first: int, last: int, size: int) -> Iterator[Array]:
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.name}.npy") as file:
                npy_header(file)
                file.seek(first * row, 1)
                for begin in range(first, last, size):
                    count = min(size, last - begin)
                    data = file.read(count * row)
                    yield np.frombuffer(bytearray(data), self.dtype).reshape(count, *self.shape[1:])
        except Exception as error:  # what zipfile and zlib raise for damage has no common type
            raise ValueError(f"{self.path} is damaged ({error}); copy it again") from error


def stored_arrays(path: Path) -> dict[str, Stored]:
    """The arrays of an .npz file, found but not read. Raises ValueError for what is none, OSError where it cannot be read."""
    check_regular(path)
    found: dict[str, Stored] = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            for info in archive.infolist():
                with archive.open(info) as file:
                    shape, fortran, dtype = npy_header(file)
                    header = file.tell()
                name = info.filename.removesuffix(".npy")
                lies = math.prod(shape) * dtype.itemsize != info.file_size - header
                if lies or min(shape, default=0) < 0 or dtype.hasobject or info.file_size > MAX_DEFLATION * info.compress_size:
                    raise ValueError(f"its array {name!r} says {shape} {dtype}, for {info.file_size:,} bytes")
                if fortran and len(shape) > 1:
                    raise ValueError(f"its array {name!r} is in Fortran order; save it in C order")
                start = _start(raw, info) + header if info.compress_type == zipfile.ZIP_STORED else None
                found[name] = Stored(path, name, shape, dtype, start)
    except OSError:
        raise
    except Exception as error:  # as above
        raise ValueError(f"{path} is no whole .npz file ({error}); copy it again, or save it with np.savez") from error
    return found


def _start(raw: Any, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin. Raises ValueError where they do not lie in the file."""
    raw.seek(info.header_offset)
    *_, name, extra = _LOCAL_HEADER.unpack(raw.read(_LOCAL_HEADER.size))
    start = int(info.header_offset + _LOCAL_HEADER.size + name + extra)
    if start + info.file_size > raw.seek(0, 2):
        raise ValueError(f"its entry {info.filename!r} goes beyond its end")
    return start
