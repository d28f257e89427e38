"""A model of how TensorRT fuses a graph, where no engine can be inspected: which nodes share a kernel.

The rule, node by node in the graph's order:

- Constants, sizes and views cost nothing, as in `arinar.measure.launches`.
- A product (MatMul, Gemm, Conv) begins a kernel. MatMul, Softmax and MatMul, with at most operations element by element
  between them (casts among them), are one kernel: fused attention.
- A sum over an axis (LayerNormalization, Softmax, ReduceSum, ...) begins a kernel.
- What TensorRT leaves to a library or to a kernel of its own (TopK, CumSum, Resize, ...) is one, and takes nothing in.
- Anything else works element by element or moves elements. It joins the last of the kernels that it reads from, unless it
  has more elements than that one goes through; else it begins a kernel.
- A kernel of such operations alone joins the only kernel that reads from it, unless that begins with a product.

It is optimistic where an engine declines a fusion and pessimistic where one merges sums over the same axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnx import ModelProto, NodeProto

from arinar.measure.launches import VIEWS, launching

from .shapes import Tensor

PRODUCTS = frozenset({"Conv", "ConvTranspose", "FusedMatMul", "Gemm", "MatMul"})
SUMS = frozenset(
    {
        "InstanceNormalization",
        "LayerNormalization",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceSum",
        "SkipLayerNormalization",
        "Softmax",
    }
)
ALONE = frozenset({"ArgMax", "Attention", "CumSum", "MultiHeadAttention", "NonZero", "Resize", "ScatterND", "TopK"})


@dataclass
class Group:
    """The nodes of a kernel. ``kind``: "product", "sum", "alone", or "" of element-wise operations only; ``elements``: how
    many it goes through; ``scores``: a product of attention whose softmax has joined it."""

    kind: str
    elements: int
    nodes: list[NodeProto] = field(default_factory=list)
    scores: bool = False


def fused(model: ModelProto, shapes: Mapping[str, Tensor]) -> list[list[NodeProto]]:
    """The groups of nodes that share a kernel each, in an order in which they can run."""
    fusion = _Fusion(shapes)
    active = {node_key(node) for node, _ in launching(model)}
    for node in model.graph.node:
        if node_key(node) in active:
            fusion.place(node)
        elif node.op_type in VIEWS and node.input[0] in fusion.makers:
            fusion.makers[node.output[0]] = fusion.makers[node.input[0]]
    fusion.join_single_readers()
    return [group.nodes for group in fusion.groups if group.nodes]


class _Fusion:
    def __init__(self, shapes: Mapping[str, Tensor]) -> None:
        self.shapes = shapes
        self.groups: list[Group] = []
        self.makers: dict[str, int] = {}  # tensor -> number of the group that makes it
        self.readers: dict[int, set[int]] = {}  # group -> those that read from it

    def place(self, node: NodeProto) -> None:
        sources = [self.makers[name] for name in node.input if name in self.makers]
        number = self._home(node, max(sources, default=None))
        if number is None:
            number = len(self.groups)
            self.groups.append(Group(_kind(node), self._elements(node)))
        self.groups[number].nodes.append(node)
        for source in sources:
            if source != number:
                self.readers.setdefault(source, set()).add(number)
        self.makers.update((name, number) for name in node.output if name)

    def _home(self, node: NodeProto, last: int | None) -> int | None:
        """The group that a node joins; None: a new one. Joining the last that it reads from never closes a circle."""
        if last is None:
            return None
        group, kind = self.groups[last], _kind(node)
        if node.op_type == "Softmax" and group.kind == "product" and not group.scores and _only(group, "MatMul"):
            group.scores = True
            return last
        if node.op_type == "MatMul" and group.scores and self.makers.get(node.input[0]) == last:
            group.scores, group.elements = False, self._results(node)
            return last
        if kind or group.kind == "alone" or self._results(node) > group.elements:
            return None
        return last

    def join_single_readers(self) -> None:
        for number in reversed(range(len(self.groups))):
            group, readers = self.groups[number], self.readers.get(number, set())
            if group.kind or len(readers) != 1:
                continue
            (reader,) = readers
            if self.groups[reader].kind in ("sum", "") and self.groups[reader].nodes:
                self.groups[reader].nodes[:0] = group.nodes
                group.nodes = []
                for others in self.readers.values():
                    if number in others:
                        others.remove(number)
                        others.add(reader)

    def _elements(self, node: NodeProto) -> int:
        """How many elements a kernel that begins with this node goes through."""
        results = self._results(node)
        return max(results, self.shapes[node.input[0]].size) if node.op_type in SUMS else results

    def _results(self, node: NodeProto) -> int:
        return sum(self.shapes[name].size for name in node.output if name)


def node_key(node: NodeProto) -> str:
    """What tells a node of a graph from all others: the first tensor that it makes. (Names may be missing.)"""
    return next(name for name in node.output if name)


def _kind(node: NodeProto) -> str:
    kinds = {"product": PRODUCTS, "sum": SUMS, "alone": ALONE}
    return next((kind for kind, operators in kinds.items() if node.op_type in operators), "")


def _only(group: Group, operator: str) -> bool:
    """Whether one node of a group is of this operator, and it is the only one that is not element-wise."""
    return [node.op_type for node in group.nodes if _kind(node)] == [operator]
