"""The launch-counting rule, on graphs small enough to count by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper

from arinar.measure.launches import launches, launching


def graph(nodes: list[Any], **constants: Any) -> Any:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, initializer=held))


def node(op: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(" "), [output], **attributes)


def test_views_sizes_and_constants_launch_nothing() -> None:
    model = graph(
        [
            node("Transpose", "w", "wt"),  # folded
            node("Shape", "x", "s"),
            node("Gather", "s zero", "b"),  # sizes, and what is computed from them
            node("Mul", "b two", "b2"),
            node("Concat", "b2 two", "shape", axis=0),
            node("Reshape", "x shape", "r"),
            node("MatMul", "r wt", "m"),
            node("Expand", "m shape2", "e"),
            node("ConstantOfShape", "shape", "c"),  # a tensor of that size: written by a kernel
            node("Expand", "w shape", "f"),
            node("Max", "e c f", "y"),
        ],
        w=np.ones((2, 2), np.float32),
        zero=np.zeros(1, np.int64),
        two=np.full(1, 2, np.int64),
        shape2=np.ones(2, np.int64),
    )
    assert launches(model) == {"MatMul": 1, "Expand": 2, "ConstantOfShape": 1, "Max": 2}


def test_nodes_of_several_kernels() -> None:
    def count(op: str, inputs: str, domain: str = "") -> int:
        return launches(graph([node(op, inputs, "y", domain=domain)])).total()

    assert count("Gemm", "x x") == 1 and count("Gemm", "x x x") == 2
    assert count("Conv", "x x") == 1 and count("Conv", "x x x") == 2
    assert count("Attention", "x x x", "com.microsoft") == 3 and count("Attention", "x x x") == 1
    # Three inputs that are split already; with a bias; packed, which have to be split.
    assert [count("MultiHeadAttention", given, "com.microsoft") for given in ("x x x", "x x x x", "x", "x   x")] == [1, 4, 2, 2]
    assert count("SkipLayerNormalization", "x x x x x", "com.microsoft") == 1


def test_which_nodes_launch_and_what_cannot_be_counted() -> None:
    model = graph([node("Shape", "x", "s"), node("Gemm", "x x x", "h"), node("Relu", "h", "y")])
    assert [(n.op_type, count) for n, count in launching(model)] == [("Gemm", 2), ("Relu", 1)]
    branch = helper.make_graph([node("Relu", "x", "z")], "branch", [], [])
    with pytest.raises(ValueError, match=r"\(If\) has a sub-graph"):
        launches(graph([node("If", "x", "y", then_branch=branch, else_branch=branch)]))
