"""The form of a graph that ONNX Runtime's CPU kernels run fastest: attention as one operator (ONNX opset 23), its
queries, keys and values as products of their own.

The plain form, of opset 20, is what TensorRT builds; both compute the same, from the same weights. Attention without a
mask in float32 is the very pattern that TensorRT refuses as one operator, hence two forms of one graph.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from arinar.export.onnx_edit import remove_unused, split_products

from .trace import write_model

#: The first opset with the Attention operator.
ATTENTION_OPSET = 23
# (N, S, H, d) <-> (N, H, S, d), and the transposed keys.
SWAP_HEADS, KEYS = [0, 2, 1, 3], [0, 2, 3, 1]


class AttentionFusion:
    """Finds softmax(q k^T * scale) v between Reshape nodes, as `arinar.export.steps` writes it, and replaces it."""

    def __init__(self, model: ModelProto) -> None:
        self.graph = model.graph
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.outputs = {value.name for value in self.graph.output}

    def run(self) -> int:
        """Replace every match -> their number."""
        fused = 0
        for node in list(self.graph.node):
            if node.op_type == "Softmax" and (found := self.match(node)) is not None:
                attention, after = found
                after.input[0] = attention.output[0]
                self.graph.node.insert(list(self.graph.node).index(after), attention)
                fused += 1
        return fused

    def match(self, softmax: NodeProto) -> tuple[NodeProto, NodeProto] | None:
        """The Attention node for this softmax, and the Reshape that reads it."""
        scores = self.maker(softmax.input[0], "MatMul")
        product = self.reader(softmax.output[0], "MatMul")
        scaled = self.maker(scores.input[0], "Mul") if scores else None
        swapped = self.reader(product.output[0], "Transpose") if product else None
        after = self.reader(swapped.output[0], "Reshape") if swapped else None
        if not (scores and product and scaled and swapped and after) or permutation(swapped) != SWAP_HEADS:
            return None
        if product.input[0] != softmax.output[0] or (scale := self.scalar(scaled.input[1])) is None:
            return None
        split = [
            self.split(scaled.input[0], SWAP_HEADS),
            self.split(scores.input[1], KEYS),
            self.split(product.input[1], SWAP_HEADS),
        ]
        if None in split:
            return None
        names, heads = zip(*(part for part in split if part is not None), strict=True)
        if len(set(heads)) != 1:
            return None
        node = helper.make_node(
            "Attention",
            names,
            [f"{product.output[0]}/attention"],
            name=f"{product.output[0]}/attention",
            q_num_heads=heads[0],
            kv_num_heads=heads[0],
            scale=scale,
        )
        return node, after

    def split(self, name: str, order: list[int]) -> tuple[str, int] | None:
        """A tensor with its heads split -> the (N, S, C) tensor it was made of, and the number of heads."""
        transpose = self.maker(name, "Transpose")
        reshape = self.maker(transpose.input[0], "Reshape") if transpose else None
        shape = self.maker(reshape.input[1], "Concat") if reshape else None
        if not (transpose and reshape and shape) or permutation(transpose) != order or len(shape.input) != 4:
            return None
        heads = self.scalar(shape.input[2])
        return None if heads is None else (reshape.input[0], int(heads))

    def maker(self, name: str, op: str) -> NodeProto | None:
        node = self.makers.get(name)
        return node if node is not None and node.op_type == op else None

    def reader(self, name: str, op: str) -> NodeProto | None:
        """The only reader of a tensor, if it is of this kind."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and readers[0].op_type == op and name not in self.outputs else None

    def scalar(self, name: str) -> float | None:
        tensor = self.constants.get(name)
        if tensor is None or int(np.prod(tensor.dims)) != 1:
            return None
        return float(numpy_helper.to_array(tensor).reshape(()))


def permutation(node: NodeProto) -> list[int]:
    return next(list(a.ints) for a in node.attribute if a.name == "perm")


def cpu_form(model: ModelProto) -> ModelProto | None:
    """A copy of a graph with its attention fused, or None where there is nothing to fuse."""
    copy = ModelProto()
    copy.CopyFrom(model)
    if not AttentionFusion(copy).run():
        return None
    split_products(copy)
    for item in copy.opset_import:
        if item.domain == "":
            item.version = max(item.version, ATTENTION_OPSET)
    del copy.graph.value_info[:]
    remove_unused(copy)
    return copy


def cpu_path(path: Path) -> Path:
    """Where the CPU form of a graph's file lies."""
    return path.with_name(f"{path.stem}.cpu.onnx")


def write_cpu_form(path: Path) -> Path | None:
    """Write the CPU form of a graph beside it -> its path, or None where the graph has no other form."""
    form = cpu_form(onnx.load(path, load_external_data=False))
    if form is None:
        return None
    write_model(form, cpu_path(path))
    return cpu_path(path)


__all__ = ["cpu_form", "cpu_path", "write_cpu_form"]
