"""The shape of every tensor of a graph, for inputs of given shapes; nothing is computed but sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

Array = npt.NDArray[np.generic]

#: Tensors of so many elements at most may be sizes, or what sizes are made of: their values are followed.
MOST_SIZES = 4096
#: Operators of ONNX Runtime's own, whose outputs have the shape of this input. Others: see `_own`.
LIKE_INPUT = {
    "BiasGelu": 0,
    "BiasSplitGelu": 0,
    "FastGelu": 0,
    "Gelu": 0,
    "GroupNorm": 0,
    "LayerNormalization": 0,
    "MultiHeadAttention": 0,
    "QuickGelu": 0,
    "SkipLayerNormalization": 0,
    "SkipSimplifiedLayerNormalization": 0,
}


@dataclass(frozen=True)
class Tensor:
    """Shape and type of a tensor in a graph."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def tensor_shapes(model: ModelProto, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """By name, initializers among them. Raises ValueError naming a node whose outputs do not follow from its inputs."""
    found = _Shapes(model)
    for value in model.graph.input:
        if value.name in inputs:
            kind = value.type.tensor_type.elem_type
            found.types[value.name] = helper.make_tensor_type_proto(kind, inputs[value.name])
    for node in model.graph.node:
        found.follow(node)
    return {name: _tensor(kind) for name, kind in found.types.items()}


class _Shapes:
    """What is known while the nodes are gone through in their order."""

    def __init__(self, model: ModelProto) -> None:
        self.opsets = {item.domain: item.version for item in model.opset_import}
        self.imports = list(model.opset_import)
        self.types: dict[str, TypeProto] = {}
        self.values: dict[str, TensorProto] = {}  # those that sizes may be made of
        for tensor in model.graph.initializer:
            self.types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
            small = math.prod(tensor.dims) <= MOST_SIZES
            if small and tensor.data_location != TensorProto.EXTERNAL:
                self.values[tensor.name] = tensor  # of any type: a Resize takes factors

    def follow(self, node: NodeProto) -> None:
        names = [name for name in node.input if name]
        missing = [name for name in names if name not in self.types]
        if missing:
            raise ValueError(f"the shape of {missing[0]!r}, an input of {node.name!r} ({node.op_type}), is not known")
        if node.domain not in ("", "ai.onnx"):
            made = _own(node, self.types)
        else:
            schema = defs.get_schema(node.op_type, self.opsets[""], "")
            given = {name: self.types[name] for name in names}
            values = {name: self.values[name] for name in names if name in self.values}
            try:
                made = shape_inference.infer_node_outputs(schema, node, given, values, opset_imports=self.imports)
            except shape_inference.InferenceError as error:
                raise ValueError(f"node {node.name!r} ({node.op_type}): {error}") from error
        self._evaluate(node, names, made)
        for name in filter(None, node.output):
            kind = self.types.get(name) or made.get(name)
            if kind is None or not _whole(kind):
                raise ValueError(f"the shape of {name!r}, made by {node.name!r} ({node.op_type}), does not follow")
            self.types[name] = kind

    def _evaluate(self, node: NodeProto, names: Iterable[str], made: Mapping[str, TypeProto]) -> None:
        """The node's value, where it is made of sizes alone."""
        if node.op_type == "Shape" and not node.domain:
            shape = _tensor(self.types[node.input[0]]).shape
            first, last = (next((a.i for a in node.attribute if a.name == key), None) for key in ("start", "end"))
            self._keep(node.output[0], np.array(shape[first:last], np.int64))
        elif node.op_type == "Constant" or all(name in self.values for name in names):
            if node.domain or not all(_may_be_size_type(made.get(name)) for name in node.output if name):
                return
            feeds = {name: numpy_helper.to_array(self.values[name]) for name in names}
            opset = {domain: version for domain, version in self.opsets.items() if not domain}
            results = ReferenceEvaluator(_alone(node, self.types, opset)).run(None, feeds)
            for name, value in zip(filter(None, node.output), results, strict=True):
                self._keep(name, np.asarray(value))

    def _keep(self, name: str, value: Array) -> None:
        tensor = numpy_helper.from_array(value, name)
        self.types[name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        if self._may_be_size(self.types[name]):
            self.values[name] = tensor

    @staticmethod
    def _may_be_size(kind: TypeProto) -> bool:
        return _may_be_size_type(kind) and _whole(kind) and _tensor(kind).size <= MOST_SIZES


def _may_be_size_type(kind: TypeProto | None) -> bool:
    return kind is not None and kind.tensor_type.elem_type in (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)


def _alone(node: NodeProto, types: Mapping[str, TypeProto], opset: Mapping[str, int]) -> ModelProto:
    """A model of one node."""
    inputs = [helper.make_value_info(name, types[name]) for name in dict.fromkeys(filter(None, node.input))]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    graph = helper.make_graph([node], "alone", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(d, v) for d, v in opset.items()])


def _own(node: NodeProto, types: Mapping[str, TypeProto]) -> dict[str, TypeProto]:
    """Outputs of an operator of ONNX Runtime's own."""
    if node.op_type == "FusedMatMul":
        plain = onnx.NodeProto(op_type="MatMul", input=node.input, output=node.output)
        given = {}
        for name, key in zip(node.input, ("transA", "transB"), strict=True):
            tensor, swap = _tensor(types[name]), any(a.name == key and a.i for a in node.attribute)
            shape = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2]) if swap else tensor.shape
            given[name] = helper.make_tensor_type_proto(types[name].tensor_type.elem_type, shape)
        return dict(shape_inference.infer_node_outputs(defs.get_schema("MatMul", 13, ""), plain, given))
    if node.op_type == "Attention":  # rows (B, S, inputs), weights of queries, keys and values beside one another
        rows, weights = (_tensor(types[name]).shape for name in node.input[:2])
        kind = helper.make_tensor_type_proto(types[node.input[0]].tensor_type.elem_type, (*rows[:-1], weights[1] // 3))
        return {node.output[0]: kind}
    if node.op_type not in LIKE_INPUT:
        raise ValueError(f"the operator {node.domain}::{node.op_type} ({node.name!r}) is not known here; add it to LIKE_INPUT")
    kind = types[node.input[LIKE_INPUT[node.op_type]]]
    return {name: kind for name in node.output if name}


def _whole(kind: TypeProto) -> bool:
    tensor = kind.tensor_type
    return tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim)


def _tensor(kind: TypeProto) -> Tensor:
    tensor = kind.tensor_type
    return Tensor(tuple(dim.dim_value for dim in tensor.shape.dim), np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
