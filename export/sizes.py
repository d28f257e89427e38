"""How large a graph's tensors are: the exporter writes their sizes into the file as expressions of the graph's axes."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from arinar.runtime.wire import every_field, fields

# Fields of onnx.proto: Model.graph; of Graph: output, value_info; of ValueInfo: name, type; Type.tensor_type;
# Tensor.shape; Shape.dim; of Dimension: dim_value, dim_param.
GRAPH, OUTPUT, VALUE_INFO, NAME, TYPE, TENSOR, SHAPE, DIM, VALUE, PARAM = 7, 12, 13, 1, 2, 1, 2, 1, 1, 2

Dims = tuple[int | str, ...]
OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def tensor_dims(path: Path) -> dict[str, Dims]:
    """Name -> sizes of every tensor whose shape an ONNX file tells; a string is an expression of the graph's axes.

    Raises ValueError for what is no ONNX file.
    """
    data = path.read_bytes()
    found: dict[str, Dims] = {}
    for _, *graph in _those(data, (0, len(data)), GRAPH):
        for _, *value in _those(data, (graph[0], graph[1]), OUTPUT, VALUE_INFO):
            name, dims = "", None
            for number, *part in fields(data, value[0], value[1]):
                if number == NAME:
                    name = data[part[0] : part[1]].decode()
                elif number == TYPE:
                    dims = _dims(data, (part[0], part[1]))
            if dims is not None:
                found[name] = dims
    return found


def _those(data: bytes, place: tuple[int, int], *wanted: int) -> Iterator[tuple[int, int, int]]:
    return (field for field in fields(data, *place) if field[0] in wanted)


def _dims(data: bytes, place: tuple[int, int]) -> Dims | None:
    """Sizes in a tensor's type; None where it has none."""
    for step in (TENSOR, SHAPE):
        inside = [(first, last) for _, first, last in _those(data, place, step)]
        if not inside:
            return None
        place = inside[0]
    dims: list[int | str] = []
    for _, first, last in _those(data, place, DIM):
        size: int | str = ""
        for number, value in every_field(data, first, last):
            if number == VALUE and isinstance(value, int):
                size = value
            elif number == PARAM and isinstance(value, tuple):
                size = data[value[0] : value[1]].decode()
        dims.append(size)
    return tuple(dims)


def evaluate(expression: int | str, sizes: Mapping[str, int]) -> int | None:
    """A size, given those of the axes, as "B*G*(V + 4)" of B, G and V. None where it cannot be told."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Name):
            return sizes[node.id]
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        raise ValueError

    if isinstance(expression, int):
        return expression
    try:
        return value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, KeyError):
        return None


def largest_tensor(path: Path, sizes: Mapping[str, int]) -> tuple[str, tuple[int, ...]]:
    """Name and shape of the tensor with the most elements that a graph makes, for given sizes of its axes."""
    best: tuple[str, tuple[int, ...]] = ("", (0,))
    for name, dims in tensor_dims(path).items():
        known = [evaluate(dim, sizes) for dim in dims]
        shape = tuple(size for size in known if size is not None)
        if len(shape) == len(known) and math.prod(shape) > math.prod(best[1]):
            best = name, shape
    return best


__all__ = ["evaluate", "largest_tensor", "tensor_dims"]
