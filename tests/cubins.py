"""What a cubin says of its kernels: an ELF file whose `.nv.info` lists attributes of each (readelf shows the sections)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

#: Attributes, as cuobjdump names them: EIATTR_REGCOUNT, EIATTR_FRAME_SIZE.
REGISTERS, FRAME = 0x2F, 0x11
#: How an attribute is written: with a value of two bytes in its head, or with so many bytes behind it.
SIZED = 4


@dataclass
class Needs:
    """Of a kernel: registers and bytes of local memory a thread, bytes of static shared memory a block, bytes of code."""

    registers: int = 0
    local: int = 0
    shared: int = 0
    code: int = 0


def needs(cubin: bytes) -> dict[str, Needs]:
    """By kernel. Local memory is where registers are spilled to, and arrays that are indexed by a variable."""
    assert cubin[:4] == b"\x7fELF" and cubin[4] == 2, "no ELF file of 64 bits"
    sections = list(_sections(cubin))
    found = {name.removeprefix(".text."): Needs(code=size) for name, _, size in sections if name.startswith(".text.")}
    symbols = _symbols(cubin, sections)
    for name, offset, size in sections:
        if name.startswith(".nv.shared.") and name.removeprefix(".nv.shared.") in found:
            found[name.removeprefix(".nv.shared.")].shared = size
        if name == ".nv.info":
            for attribute, data in _attributes(cubin[offset : offset + size]):
                if attribute in (REGISTERS, FRAME):
                    symbol, value = struct.unpack("<II", data)
                    kernel = found.get(symbols[symbol])  # else a function of the compiler's own
                    if kernel is not None:
                        setattr(kernel, "registers" if attribute == REGISTERS else "local", value)
    return found


def _sections(cubin: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, offset, size."""
    start, size, count, names = struct.unpack_from("<Q", cubin, 40)[0], *struct.unpack_from("<HHH", cubin, 58)
    heads = [struct.unpack_from("<IIQQQQ", cubin, start + size * index) for index in range(count)]
    for name, _, _, _, offset, length in heads:
        yield _text(cubin, heads[names][4] + name), offset, length


def _symbols(cubin: bytes, sections: list[tuple[str, int, int]]) -> list[str]:
    at = {name: (offset, size) for name, offset, size in sections}
    (table, size), (names, _) = at[".symtab"], at[".strtab"]
    return [_text(cubin, names + struct.unpack_from("<I", cubin, place)[0]) for place in range(table, table + size, 24)]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place < len(data):
        kind, attribute, size = struct.unpack_from("<BBH", data, place)
        place += 4
        if kind == SIZED:
            yield attribute, data[place : place + size]
            place += size


def _text(data: bytes, place: int) -> str:
    return data[place : data.index(b"\0", place)].decode()
