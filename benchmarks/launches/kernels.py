"""Kernels of one launch of a graph: how many, the bytes that they read and write, the operations of their products.

Bytes: every kernel reads what it takes from outside itself and writes what others take from it, each tensor once; a kernel
that picks (Gather, Slice, ...) reads no more than it writes. Views move nothing. One multiply-add is two operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnx import ModelProto, NodeProto

from arinar.measure.launches import VIEWS, launching

from .fusion import fused, node_key
from .shapes import Tensor

#: Operators that read a part of their first input.
PICKING = frozenset({"Gather", "GatherElements", "GatherND", "Slice", "Split"})
#: Part of the names of the nodes that draw, in a graph that computes whole tokens (`arinar.export.gmm_head.compose`).
DRAWING = "/draw/"


@dataclass(frozen=True)
class Kernel:
    """``launches`` of what a group of nodes makes; ``flops`` of its products by the type of their factors."""

    name: str
    launches: int
    reads: int
    writes: int
    flops: Mapping[str, float]
    draws: bool


def onnxruntime_kernels(model: ModelProto, shapes: Mapping[str, Tensor]) -> list[Kernel]:
    """Of ONNX Runtime's CUDA provider: each node by itself (`arinar.measure.launches`). A node of several launches reads and
    writes its results once more in each."""
    flow = Flow(model, shapes)
    return [flow.kernel([node], count) for node, count in launching(model)]


def tensorrt_kernels(model: ModelProto, shapes: Mapping[str, Tensor]) -> list[Kernel]:
    """Of TensorRT, by the model of `fusion.fused`: a launch for each group."""
    flow = Flow(model, shapes)
    return [flow.kernel(group, 1) for group in fused(model, shapes)]


class Flow:
    """Which tensors cross the edge of a group of nodes, views looked through."""

    def __init__(self, model: ModelProto, shapes: Mapping[str, Tensor]) -> None:
        self.shapes, self.whole = shapes, whole_tensors(model)
        self.outputs = {self.whole.get(value.name, value.name) for value in model.graph.output}
        self.readers: dict[str, set[str]] = {}  # of a tensor, the nodes that read it
        for node in model.graph.node:
            if node.op_type not in VIEWS:
                for name in node.input:
                    self.readers.setdefault(self.whole.get(name, name), set()).add(node_key(node))

    def kernel(self, group: Sequence[NodeProto], launches: int) -> Kernel:
        made = {name for node in group for name in node.output if name}
        reads: dict[str, int] = {}
        for node in group:
            for name, nbytes in self._reads(node):
                if name not in made:
                    reads[name] = max(reads.get(name, 0), nbytes)
        own = {node_key(node) for node in group}
        writes = sum(self.shapes[name].nbytes for name in made if name in self.outputs or self.readers.get(name, set()) - own)
        again = (launches - 1) * writes
        flops: dict[str, float] = {}
        for node in group:
            if count := operations(node, self.shapes):
                kind = self.shapes[node.input[0]].dtype.name
                flops[kind] = flops.get(kind, 0.0) + count
        name = "+".join(dict.fromkeys(node.op_type for node in group))
        return Kernel(name, launches, sum(reads.values()) + again, writes + again, flops, any(map(draws, group)))

    def _reads(self, node: NodeProto) -> Iterator[tuple[str, int]]:
        """Tensors that a node reads, as they lie in memory, and how many bytes of each."""
        written = sum(self.shapes[name].nbytes for name in node.output if name)
        for place, name in enumerate(node.input):
            if name:
                nbytes = self.shapes[name].nbytes
                picked = place == 0 and node.op_type in PICKING
                yield self.whole.get(name, name), min(nbytes, written) if picked else nbytes


def draws(node: NodeProto) -> bool:
    """Whether a node is part of a draw, in a graph that computes whole tokens."""
    return DRAWING in node.name


def whole_tensors(model: ModelProto) -> dict[str, str]:
    """Results of views -> the tensor that lies in memory."""
    found: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in VIEWS:
            found[node.output[0]] = found.get(node.input[0], node.input[0])
    return found


def operations(node: NodeProto, shapes: Mapping[str, Tensor]) -> float:
    """Operations of a product of matrices, a convolution or attention; 0 of anything else."""
    shape = {place: shapes[name].shape for place, name in enumerate(node.input) if name}
    result = shapes[node.output[0]] if node.output and node.output[0] else None
    if result is None:
        return 0.0
    if node.op_type in ("MatMul", "Gemm", "FusedMatMul"):
        swapped = any(a.name == "transA" and a.i for a in node.attribute)
        return 2.0 * result.size * shape[0][-2 if swapped else -1]
    if node.op_type == "Conv":
        return 2.0 * result.size * math.prod(shape[1][1:])
    if node.op_type == "MultiHeadAttention":  # queries (B, S, W), or all three packed (B, S, heads, 3, W / heads)
        batch, queries = result.shape[:2]
        return 4.0 * batch * queries * (shape[1][1] if 1 in shape else queries) * result.shape[2]
    if node.op_type == "Attention" and not node.domain:  # (B, heads, S, d)
        return 4.0 * result.size * shape[1][-2]
    if node.op_type == "Attention":  # with the product that makes queries, keys and values: rows (B, S, W) by (W, 3 W)
        return 6.0 * result.size * shape[0][2] + 4.0 * result.size * result.shape[1]
    return 0.0
