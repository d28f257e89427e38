"""ONNX Runtime's products of 8-bit integers: are they exact on this processor, and how do they become so?

The products of uint8 activations by int8 weights are summed in 32 bits, exactly, by processors that have an instruction for
it (x86 with VNNI). ONNX Runtime's kernels for x86 processors without it add two products in 16 bits first, which saturate:
255 * 127 + 255 * 127 becomes 32767. With weights that use their 8 bits, as here, the error of z grows from 2 % to 38 %.
A session option takes slower kernels instead, which are exact everywhere.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..wire import message

EXACT_PRODUCTS = "session.x64quantprecision"


@cache
def products_are_exact() -> bool:
    """Whether ONNX Runtime's usual kernels give exact sums on this processor: tried, on the largest values."""
    size = 64
    a, weight = np.full((size, size), 255, np.uint8), np.full((size, size), 127, np.int8)
    return bool((run_product(a, weight) == 255 * 127 * size).all())


def keep_products_exact(options: Any) -> None:
    """Set these session options so that products are exact; where they are anyway, nothing changes."""
    if not products_are_exact():
        options.add_session_config_entry(EXACT_PRODUCTS, "1")


def run_product(a: npt.NDArray[Any], weight: npt.NDArray[Any], options: Any = None) -> npt.NDArray[Any]:
    """a @ weight (N, N) by ONNX Runtime, of the types that `product_model` takes."""
    return np.asarray(product_session(weight, options).run(None, {"a": a})[0])


def product_session(weight: npt.NDArray[Any], options: Any = None) -> Any:
    """An ONNX Runtime session of `product_model`."""
    import onnxruntime

    return onnxruntime.InferenceSession(product_model(weight), options, providers=["CPUExecutionProvider"])


# ---------------------------------------------------------------------------------------------- a model of one node

# Element types of ONNX.
FLOAT, UINT8, INT8, INT32 = 1, 2, 3, 6


def product_model(weight: npt.NDArray[Any]) -> bytes:
    """An ONNX model a (N, N) -> c (N, N) = a @ weight, for weight (N, N) float32, or int8 (a is uint8 then, c int32).

    Messages and field numbers are those of onnx.proto, whose names stand beside them.
    """
    op, (of_a, of_b, of_c) = ("MatMulInteger", (UINT8, INT8, INT32)) if weight.dtype == np.int8 else ("MatMul", 3 * (FLOAT,))
    rows, columns = weight.shape

    def tensor(name: str, element: int) -> bytes:
        shape = message((1, message((1, rows))), (1, message((1, columns))))  # dim { dim_value }
        return message((1, name), (2, message((1, message((1, element), (2, shape))))))  # name, type { tensor_type }

    node = message((1, "a"), (1, "b"), (2, "c"), (4, op))  # input, output, op_type
    b = message((1, rows), (1, columns), (2, of_b), (8, "b"), (9, weight.tobytes()))  # dims, data_type, name, raw_data
    graph = message((1, node), (2, "product"), (5, b), (11, tensor("a", of_a)), (12, tensor("c", of_c)))
    return message((1, 8), (7, graph), (8, message((2, 17))))  # ir_version, graph, opset_import
