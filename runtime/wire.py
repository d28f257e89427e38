"""Protobuf's wire format, as far as ONNX files need it here: the runtime does without the onnx package.

Messages are fields by number; an integer is written as it is, text, bytes and messages are preceded by their length.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Where tensors hide in a model: message -> field number -> message in it. Numbers are those of onnx.proto, whose names
# stand beside them.
MESSAGES: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},  # graph, training_info, functions
    "Training": {1: "Graph", 2: "Graph"},  # initialization, algorithm
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},  # node, initializer, sparse_initializer
    "Function": {7: "Node", 11: "Attribute"},  # node, attribute_proto
    "Node": {5: "Attribute"},  # attribute
    # t, g, tensors, graphs, sparse_tensor, sparse_tensors
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},  # values, indices
    "Tensor": {13: "Entry"},  # external_data
    "Entry": {},
}
KEY = b"location"  # of the entry that names the file
# Graphs in graphs, at most: protobuf's own readers stop at 100 messages.
DEEPEST = 100

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def message(*fields: tuple[int, int | str | bytes]) -> bytes:
    """A protobuf message of these fields."""
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(varint(number << 3) + varint(value))
        else:
            data = value.encode() if isinstance(value, str) else value
            parts.append(varint(number << 3 | BYTES) + varint(len(data)) + data)
    return b"".join(parts)


def varint(value: int) -> bytes:
    """A number, seven bits a byte, the lowest first; the top bit says that more follow."""
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def external_locations(path: Path) -> set[str]:
    """Every file that an ONNX file says its tensors' values lie in: of its graphs, sub-graphs, functions, attributes.

    Also of tensors that say so and hold their values themselves: what a reader makes of a contradiction is its own affair.
    Raises ValueError for what is cut off, or no protobuf message; where no tensor can say so, nothing is parsed.
    """
    data = path.read_bytes()
    found: set[str] = set()
    if KEY in data:
        _collect(data, 0, len(data), "Model", found, DEEPEST)
    return found


def _collect(data: bytes, start: int, stop: int, kind: str, found: set[str], depth: int) -> None:
    if depth == 0:
        raise ValueError(f"its messages are more than {DEEPEST} deep")
    inside = MESSAGES[kind]
    for number, first, last in fields(data, start, stop):
        # What does not hold the key anywhere is passed over as a whole: most of a graph.
        if number not in inside or data.find(KEY, first, last) < 0:
            continue
        if inside[number] == "Entry":
            found |= _locations(data, first, last)
        else:
            _collect(data, first, last, inside[number], found, depth - 1)


def _locations(data: bytes, start: int, stop: int) -> set[str]:
    """Values of an entry (key, value); of one that has several of either, all: readers take the last."""
    pairs = list(fields(data, start, stop))
    if not any(number == 1 and data[first:last] == KEY for number, first, last in pairs):
        return set()
    values = [data[first:last] for number, first, last in pairs if number == 2]
    return {value.decode("utf-8") for value in values or [b""]}


def fields(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Fields of a message that lies at start..stop: number, and where the content lies of those that have a length.

    Raises ValueError where the message is cut off, or is none.
    """
    return ((number, value[0], value[1]) for number, value in every_field(data, start, stop) if isinstance(value, tuple))


def every_field(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """As `fields`, with those that are an integer: number, and the integer, or where the content lies."""
    place = start
    while place < stop:
        tag, place = _number(data, place, stop)
        number, kind = tag >> 3, tag & 7
        if kind == BYTES:
            size, place = _number(data, place, stop)
            if size > stop - place:
                raise ValueError("it is cut off")
            yield number, (place, place + size)
            place += size
        elif kind == VARINT:
            value, place = _number(data, place, stop)
            yield number, value
        elif kind in (FIXED32, FIXED64):
            place += 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"field {number} is of the unknown kind {kind}")
        if place > stop or number == 0:
            raise ValueError("it is cut off, or no ONNX file")


def integers(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """As `fields`: number and value of those that are integers."""
    return ((number, value) for number, value in every_field(data, start, stop) if isinstance(value, int))


def listed(data: bytes, start: int, stop: int) -> list[int]:
    """Integers that follow one another."""
    found = []
    while start < stop:
        value, start = _number(data, start, stop)
        found.append(value)
    return found


def _number(data: bytes, place: int, stop: int) -> tuple[int, int]:
    """The varint at a place, and the place behind it."""
    value = shift = 0
    while place < stop and shift < 64:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    raise ValueError("it is cut off, or no ONNX file")
