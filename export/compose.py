"""Graphs made of other graphs, with shared initializers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from arinar.runtime.bundle import TensorInfo

from .spec import ExportError


class GraphComposer:
    """Collects inlined copies of graphs; initializers of a part are added once, however often it is inlined.

    But 8-bit weights once for each copy, all of them the same bytes of a file: where a processor's products are not exact
    (`arinar.runtime.backends.products`), ONNX Runtime replaces the weights of each node, and fails where nodes share them.
    """

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._constants = 0

    def constant(self, value: np.ndarray[tuple[int, ...], np.dtype[np.generic]], name: str) -> str:
        """An initializer -> its name. Same name and value twice is one initializer."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(value, name)
        return name

    def node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: object) -> None:
        self.nodes.append(helper.make_node(op, list(inputs), list(outputs), name=outputs[0], **attributes))

    def inline(self, part: ModelProto, prefix: str, inputs: Mapping[str, str]) -> dict[str, str]:
        """Append a copy of ``part`` with its inputs connected -> the copy's output names, by the part's own."""
        graph: GraphProto = part.graph
        if any(attribute.g.node for node in graph.node for attribute in node.attribute):
            raise ExportError(f"graph {graph.name!r} has sub-graphs and cannot be composed")
        missing = [value.name for value in graph.input if value.name not in inputs]
        if missing:
            raise ExportError(f"graph {graph.name!r} is composed without its inputs {missing}")
        names = dict(inputs) | {"": ""}
        for tensor in graph.initializer:
            name = f"{prefix if tensor.data_type == TensorProto.INT8 else ''}{graph.name}.{tensor.name}"
            names[tensor.name] = name
            if name not in self.initializers:
                copy = TensorProto()
                copy.CopyFrom(tensor)
                copy.name = name
                self.initializers[name] = copy
        for node in graph.node:
            copied = NodeProto()
            copied.CopyFrom(node)
            del copied.input[:], copied.output[:]
            copied.name = prefix + node.name
            copied.input.extend(names[name] for name in node.input)
            for name in node.output:
                names[name] = prefix + name if name else ""
            copied.output.extend(names[name] for name in node.output)
            self.nodes.append(copied)
        return {value.name: names[value.name] for value in graph.output}

    def model(
        self, name: str, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], opset: int, ir_version: int
    ) -> ModelProto:
        graph = helper.make_graph(
            self.nodes,
            name,
            [value_info(t) for t in inputs],
            [value_info(t) for t in outputs],
            initializer=list(self.initializers.values()),
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version, producer_name="arinar"
        )


def value_info(tensor: TensorInfo) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, dtype, list(tensor.shape))
