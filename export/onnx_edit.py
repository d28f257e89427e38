"""Edits of ONNX graphs that calibration and export share. NumPy and onnx."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper


def remove_unused(model: ModelProto) -> None:
    """Drop nodes whose results nobody reads, then initializers."""
    needed = {value.name for value in model.graph.output}
    kept: list[NodeProto] = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    kept.reverse()
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(initializers)


def blank_unread_outputs(model: ModelProto) -> None:
    """Take the names from outputs of a node that nobody reads, and with them the values: all but its first are optional."""
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    for node in model.graph.node:
        for place, name in enumerate(node.output):
            if place and name not in read:
                node.output[place] = ""
    made = {name for node in model.graph.node for name in node.output}
    for value in [value for value in model.graph.value_info if value.name not in made]:
        model.graph.value_info.remove(value)


def split_products(model: ModelProto) -> dict[str, list[str]]:
    """One product for each part of a product that is only made to be split: queries, keys and values of one layer.

    Gemm(x, w, b) - Reshape - Split into n equal parts of the columns becomes n times Gemm(x, rows of w, part of b) -
    Reshape, and nothing is copied afterwards. The parts of ``w`` (transB) stay where they are stored.

    Returns the name of each Gemm replaced -> names of those in its place, in the order of the parts.
    """
    graph = model.graph
    edit = _Split(model)
    replaced: dict[str, list[str]] = {}
    instead: dict[str, list[NodeProto]] = {}  # name of a node -> nodes in its place
    for node in graph.node:
        if (match := edit.match(node)) is None:
            continue
        products, shaped = edit.parts(match)
        instead |= {node.name: products, match.reshape.name: shaped, match.split.name: []}
        replaced[node.name] = [product.name for product in products]
    nodes = [new for node in graph.node for new in instead.get(node.name, [node])]
    del graph.node[:]
    graph.node.extend(nodes)
    remove_unused(model)
    return replaced


@dataclass(frozen=True)
class _Match:
    gemm: NodeProto
    reshape: NodeProto
    sizes: NodeProto  # the Concat of the numbers in the reshape's shape (one each), the number of columns last
    split: NodeProto


class _Split:
    def __init__(self, model: ModelProto) -> None:
        self.graph = model.graph
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in self.graph.output}

    def match(self, gemm: NodeProto) -> _Match | None:
        if gemm.op_type != "Gemm" or not all(name in self.constants for name in gemm.input[1:]):
            return None
        reshape = self.reader(gemm, "Reshape")
        split = self.reader(reshape, "Split") if reshape else None
        sizes = self.makers.get(reshape.input[1]) if reshape else None
        if not (reshape and split and sizes) or sizes.op_type != "Concat" or len(split.input) > 1:
            return None  # (a second input of Split would give parts of different sizes)
        attributes = {a.name: a.i for node in (gemm, split) for a in node.attribute}
        columns, last = self.constants.get(sizes.input[-1]), len(sizes.input) - 1
        if not attributes.get("transB") or attributes.get("axis", 0) not in (-1, last) or columns is None:
            return None
        whole = self.value(columns.name).tolist()
        if any(self.constants[name].dims[0] != whole[0] or whole[0] % len(split.output) for name in gemm.input[1:]):
            return None
        return _Match(gemm, reshape, sizes, split)

    def reader(self, node: NodeProto, op: str) -> NodeProto | None:
        """The only reader of a node's output, if it is of this kind."""
        name = node.output[0]
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and readers[0].op_type == op and name not in self.outputs else None

    def parts(self, match: _Match) -> tuple[list[NodeProto], list[NodeProto]]:
        """The products, and the nodes that give each its shape."""
        gemm, count = match.gemm, len(match.split.output)
        constants = [self.rows(self.constants[name], count) for name in gemm.input[1:]]
        columns = match.sizes.input[-1]
        self.add(numpy_helper.from_array(self.value(columns) // count, f"{columns}/{count}"))
        shape = f"{match.reshape.name}/shape"
        sizes = [*match.sizes.input[:-1], f"{columns}/{count}"]
        shaped = [helper.make_node("Concat", sizes, [shape], name=shape, axis=0)]
        products = []
        for index, output in enumerate(match.split.output):
            name = f"{gemm.name}/{index}"
            product = helper.make_node("Gemm", [gemm.input[0], *(rows[index] for rows in constants)], [name], name=name)
            product.attribute.extend(gemm.attribute)
            products.append(product)
            shaped.append(helper.make_node("Reshape", [name, shape], [output], name=output))
        return products, shaped

    def rows(self, tensor: TensorProto, count: int) -> list[str]:
        """Names of equal parts of an initializer along its first axis, in the same file where it is in one."""
        names = [f"{tensor.name}/{index}" for index in range(count)]
        if not tensor.external_data:
            for name, rows in zip(names, np.split(self.value(tensor.name), count), strict=True):
                self.add(numpy_helper.from_array(rows, name))
            return names
        place = {entry.key: entry.value for entry in tensor.external_data}
        length = int(place["length"]) // count
        for index, name in enumerate(names):
            part = TensorProto()
            part.CopyFrom(tensor)
            part.name, part.dims[0] = name, tensor.dims[0] // count
            del part.external_data[:]
            offset = int(place.get("offset", 0)) + index * length
            for key, entry in (place | {"offset": str(offset), "length": str(length)}).items():
                part.external_data.add(key=key, value=entry)
            self.add(part)
        return names

    def value(self, name: str) -> npt.NDArray[Any]:
        return np.asarray(numpy_helper.to_array(self.constants[name]))

    def add(self, tensor: TensorProto) -> None:
        if tensor.name not in self.constants:
            self.constants[tensor.name] = tensor
            self.graph.initializer.append(tensor)
