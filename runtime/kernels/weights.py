"""The inner model's weights, out of the graph that computes a feature (`inner_step`), without the onnx package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from arinar.config import ArinarConfig

from ..wire import fields, integers, listed
from .compiler import KernelError

Array = npt.NDArray[Any]
#: Numbers of onnx.proto's TensorProto.DataType.
DTYPES = {1: "float32", 10: "float16"}


@dataclass(frozen=True)
class Linear:
    """weight (outputs, inputs), bias (outputs,)."""

    weight: Array
    bias: Array


@dataclass(frozen=True)
class BlockWeights:
    qkv: Linear
    project: Linear
    expand: Linear
    contract: Linear


@dataclass(frozen=True)
class InnerWeights:
    """entry: of a feature (W, 1); places (D, W), the position embedding; head (3K, W) float32."""

    entry: Linear
    places: Array
    blocks: tuple[BlockWeights, ...]
    head: Linear

    @property
    def dtype(self) -> str:
        return str(self.places.dtype)


def read_inner_weights(path: Path, config: ArinarConfig) -> InnerWeights:
    """Raises KernelError where the graph is not what the exporter makes of the config; OSError, ValueError: a broken file."""
    graph = Graph(path)
    width, hidden = config.inner_width, int(config.inner_width * config.inner_mlp_ratio)
    products, ends = graph.products(), graph.linears()
    sizes = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)] * config.inner_depth
    if [product.weight.shape[::-1] for product in products] != sizes or [end.weight.shape for end in ends] != [
        (width, 1),
        (3 * config.num_gaussians, width),
    ]:
        raise KernelError(f"{path.name} has other products than a model of this config; export the model again")
    blocks = [BlockWeights(*products[first : first + 4]) for first in range(0, len(products), 4)]
    return InnerWeights(ends[0], graph.table((config.token_dim, width)), tuple(blocks), ends[1])


class Node(NamedTuple):
    kind: str
    inputs: list[str]
    outputs: list[str]


class Graph:
    """Nodes, and constants by name, of an ONNX file, as far as weights are to be found in it."""

    def __init__(self, path: Path) -> None:
        self.path, self._data = path, path.read_bytes()
        self.nodes: list[Node] = []
        self._tensors: dict[str, tuple[int, int]] = {}
        for first, last in self._inside(0, len(self._data), 7):
            self.nodes += [self._node(*place) for place in self._inside(first, last, 1)]
            self._tensors |= {self._text(*place, 8): place for place in self._inside(first, last, 5)}

    def tensor(self, name: str) -> Array:
        """A constant's values. Raises KernelError where it is no floating-point tensor."""
        first, last = self._tensors[name]
        numbers = list(integers(self._data, first, last))
        shape = [value for number, value in numbers if number == 1]
        for place in self._inside(first, last, 1):
            shape += listed(self._data, *place)
        dtype = DTYPES.get(next((value for number, value in numbers if number == 2), 0))
        if dtype is None:
            raise KernelError(f"constant {name!r} of {self.path.name} is of no floating-point type that the kernels take")
        raw = self._external(first, last) or b"".join(self._data[a:b] for a, b in self._inside(first, last, 9))
        return np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).reshape(shape)

    def products(self) -> list[Linear]:
        """Products with a constant matrix (inputs, outputs) and what is added to them, in the order of the graph."""
        found = []
        for node in self.nodes:
            if node.kind == "MatMul" and node.inputs[1] in self._tensors:
                adding = (name for other in self._reading(node.outputs[0], "Add") for name in other.inputs)
                found.append(self._linear(self.tensor(node.inputs[1]).T, [name for name in adding if name in self._tensors]))
        return found

    def linears(self) -> list[Linear]:
        """Products that are one node with their bias: constant matrices (outputs, inputs)."""
        gemms = [node for node in self.nodes if node.kind == "Gemm" and self._tensors.keys() >= set(node.inputs[1:])]
        return [self._linear(self.tensor(node.inputs[1]), node.inputs[2:]) for node in gemms]

    def _linear(self, weight: Array, bias: list[str]) -> Linear:
        """A bias of zeros is not in the graph."""
        given = self.tensor(bias[0]) if bias else np.zeros(len(weight), weight.dtype)
        return Linear(np.ascontiguousarray(weight), given)

    def _reading(self, name: str, kind: str) -> list[Node]:
        return [node for node in self.nodes if node.kind == kind and name in node.inputs]

    def table(self, shape: tuple[int, int]) -> Array:
        """The first constant of a shape that rows are gathered from; of a large model it is the first of a batch of one."""
        for node in self.nodes:
            if node.kind == "Gather" and node.inputs[0] in self._tensors:
                values = self.tensor(node.inputs[0])
                if values.shape in (shape, (1, *shape)):
                    return values.reshape(shape)
        raise KernelError(f"{self.path.name} has no table of shape {shape}; export the model again")

    def _node(self, first: int, last: int) -> Node:
        inputs, outputs = ([self._data[a:b].decode() for a, b in self._inside(first, last, number)] for number in (1, 2))
        return Node(self._text(first, last, 4), inputs, outputs)

    def _external(self, first: int, last: int) -> bytes | None:
        """Values that lie in another file (which one is checked where a bundle's graphs are opened)."""
        entries = {self._text(*place, 1): self._text(*place, 2) for place in self._inside(first, last, 13)}
        if "location" not in entries:
            return None
        with (self.path.parent / entries["location"]).open("rb") as file:
            file.seek(int(entries.get("offset", 0)))
            return file.read(int(entries.get("length", -1)))

    def _inside(self, first: int, last: int, wanted: int) -> Iterator[tuple[int, int]]:
        return ((a, b) for number, a, b in fields(self._data, first, last) if number == wanted)

    def _text(self, first: int, last: int, number: int) -> str:
        return "".join(self._data[a:b].decode() for a, b in self._inside(first, last, number))
