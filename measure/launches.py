"""How many kernels a graph launches in ONNX Runtime's CUDA provider: counted from its nodes, nothing is run.

The rule, in the order in which it is asked:

- What depends on constants alone is computed when a session is made: no launch.
- What depends on constants and sizes alone is shape arithmetic, done by the CPU: no launch.
- A view (Reshape, Squeeze, ...) changes a shape and no memory: no launch.
- A node of KERNELS launches as many as its kernel's source has: a Gemm with a bias writes the bias first, and so on.
- Min, Max and the like launch one kernel for every input after the first.
- Any other node launches one.

What the provider adds by itself, copies of nodes that it leaves to the CPU, is not counted: a session that has such says so
(`arinar.runtime.backends.onnxruntime_cuda`). Sources: onnxruntime/core/providers/cuda and onnxruntime/contrib_ops/cuda.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from onnx import ModelProto, NodeProto

VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
#: Nodes whose result is a size, whatever their input holds.
SIZES = frozenset({"Shape", "Size"})
#: Nodes that make a tensor of a given size: one launch, though their inputs are sizes.
MAKERS = frozenset({"ConstantOfShape", "Expand", "EyeLike", "Range", "Tile"})
#: Nodes of any number of inputs, taken two by two.
PAIRWISE = frozenset({"Max", "Mean", "Min", "Sum"})


def _given(node: NodeProto, place: int) -> bool:
    """Whether a node has its optional input of this number."""
    return len(node.input) > place and bool(node.input[place])


def _attention(node: NodeProto) -> int:
    """Fused attention; before it one that takes packed queries, keys and values apart, or the bias of each of the three."""
    return 1 + 3 * _given(node, 3) if _given(node, 1) else 2


#: Nodes that launch other than one kernel.
KERNELS: dict[str, Callable[[NodeProto], int]] = {
    "Gemm": lambda node: 1 + _given(node, 2),  # the bias is written to the result, the product added to it
    "Conv": lambda node: 1 + _given(node, 2),  # the bias is added afterwards
    "InstanceNormalization": lambda node: 2,  # statistics, then what they are applied to
    "Resize": lambda node: 2,  # where each row and column comes from, then the pixels
    "ScatterElements": lambda node: 2,  # a copy of the data, then the updates
    "ScatterND": lambda node: 2,
    "TensorScatter": lambda node: 2,
    # Of com.microsoft: product, bias with the split into heads, fused attention; without the product where it is given. (Up
    # to 256 keys, or where there are rows enough for all processors, no second kernel joins parts of the attention.)
    "com.microsoft::Attention": lambda node: 3,
    "com.microsoft::MultiHeadAttention": _attention,
}


def launching(model: ModelProto) -> Iterator[tuple[NodeProto, int]]:
    """The nodes that launch kernels, and how many each, in the order of the graph.

    Raises ValueError for a graph with sub-graphs, whose launches depend on data.
    """
    folded = {tensor.name for tensor in model.graph.initializer} | {""}
    sizes: set[str] = set()
    for node in model.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ValueError(f"node {node.name!r} ({node.op_type}) has a sub-graph: its launches cannot be counted")
        if node.op_type == "Constant" or folded.issuperset(node.input):
            folded.update(node.output)
        elif node.op_type in SIZES or (node.op_type not in MAKERS and (folded | sizes).issuperset(node.input)):
            sizes.update(node.output)
        elif node.op_type not in VIEWS:
            yield node, kernels(node)


def kernels(node: NodeProto) -> int:
    """How many kernels a node launches that is neither folded nor a view."""
    if node.op_type in PAIRWISE:
        return max(1, len(node.input) - 1)
    domain = f"{node.domain}::" if node.domain not in ("", "ai.onnx") else ""
    rule = KERNELS.get(domain + node.op_type)
    return rule(node) if rule else 1


def launches(model: ModelProto) -> Counter[str]:
    """Kernel launches by operator; their sum is ``.total()``. Raises ValueError as `launching` does."""
    found: Counter[str] = Counter()
    for node, count in launching(model):
        found[node.op_type] += count
    return found


__all__ = ["kernels", "launches", "launching"]
