"""Graphs made of other graphs: all features of a token, with sampling, as one graph.

`inner_token` is not traced (sixteen unrolled copies would take the exporter minutes) but composed from the very graphs
`inner_condition`, `inner_step` and `mixture_sample` that stand beside it in the bundle, their weights shared. It
therefore cannot drift from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from arinar.config import ArinarConfig
from arinar.runtime.bundle import TensorInfo

from .trace import ExportError


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


def inner_token_info(config: ArinarConfig, guided: bool, num_uniforms: int) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Inputs and outputs of `inner_token` (or of its guided form)."""
    features = config.token_dim
    inputs = [
        TensorInfo("z", "float32", ("N" if guided else "M", config.z_width)),
        TensorInfo("uniforms", "float32", ("M", features, num_uniforms)),
    ]
    if guided:
        inputs.append(TensorInfo("guidance_scale", "float32", (1,)))
    inputs.append(TensorInfo("temperature", "float32", (1,)))
    return inputs, [TensorInfo("tokens", "float32", ("M", features))]


def compose_inner_token(
    condition: ModelProto, step: ModelProto, mixture: ModelProto, config: ArinarConfig, *, guided: bool, num_uniforms: int
) -> ModelProto:
    """All features of M tokens.

    z (M, C), or (2M, C) conditional rows first when guided, uniforms (M, D, U), guidance_scale (1,) when guided,
    temperature (1,) -> tokens (M, D). Guided: both branches see the features sampled from the guided draw.
    """
    features = config.token_dim
    heads, head_dim = config.inner_heads, config.inner_head_dim
    cache_names = [f"{i}.{kind}" for i in range(config.inner_depth) for kind in ("key", "value")]
    cache_dtype = next(
        value.type.tensor_type.elem_type for value in step.graph.input if value.name.startswith("past_key_values.")
    )
    build = GraphComposer()
    given = build.inline(condition, "condition/", {"z": "z"})

    # Position 0 has no past: one empty slot, which the step's own mask hides.
    rows = "cache/rows"
    build.node("Shape", ["z"], [rows], start=0, end=1)
    tail = build.constant(np.array([heads, 1, head_dim], np.int64), "cache/tail")
    build.node("Concat", [rows, tail], ["cache/shape"], axis=0)
    zero = numpy_helper.from_array(np.zeros(1, helper.tensor_dtype_to_np_dtype(cache_dtype)))
    build.node("ConstantOfShape", ["cache/shape"], ["cache/empty"], value=zero)
    # The feature before the first is not read, but the graph wants one.
    build.node("Shape", ["z"], ["feature/rows"], start=0, end=1)
    build.node("Concat", ["feature/rows", build.constant(np.array([1], np.int64), "one")], ["feature/shape"], axis=0)
    build.node("ConstantOfShape", ["feature/shape"], ["feature/none"], value=numpy_helper.from_array(np.zeros(1, np.float32)))

    past: dict[str, list[str]] = {name: [] for name in cache_names}
    previous, drawn = "feature/none", []
    for position in range(features):
        prefix = f"feature.{position}/"
        index = build.constant(np.array([position], np.int64), f"position.{position}")
        inputs = {"feature": previous, "position": index, **given}
        for name, rows_so_far in past.items():
            if not rows_so_far:
                inputs[f"past_key_values.{name}"] = "cache/empty"
            elif len(rows_so_far) == 1:
                inputs[f"past_key_values.{name}"] = rows_so_far[0]
            else:
                joined = f"{prefix}past.{name}"
                build.node("Concat", rows_so_far, [joined], axis=2)
                inputs[f"past_key_values.{name}"] = joined
        out = build.inline(step, prefix, inputs)
        for name in cache_names:
            past[name].append(out[f"present.{name}"])

        draw = {"temperature": "temperature", "uniforms": f"{prefix}uniforms"}
        scalar = build.constant(np.array(position, np.int64), f"position.{position}.scalar")
        build.node("Gather", ["uniforms", scalar], [draw["uniforms"]], axis=1)
        for name in ("weight", "mu", "logvar"):
            if guided:
                halves = [f"{prefix}{name}.cond", f"{prefix}{name}.uncond"]
                build.node("Split", [out[name]], halves, axis=0, num_outputs=2)
                draw[name], draw[f"{name}_uncond"] = halves
            else:
                draw[name] = out[name]
        if guided:
            draw["guidance_scale"] = "guidance_scale"
        feature = build.inline(mixture, f"{prefix}draw/", draw)["feature"]
        drawn.append(feature)
        previous = feature
        if guided and position < features - 1:
            previous = f"{prefix}both"
            build.node("Concat", [feature, feature], [previous], axis=0)
    build.node("Concat", drawn, ["tokens"], axis=1)

    inputs_info, outputs_info = inner_token_info(config, guided, num_uniforms)
    name = "inner_token_guided" if guided else "inner_token"
    opset = next(item.version for item in step.opset_import if item.domain == "")
    return build.model(name, inputs_info, outputs_info, opset, step.ir_version)
