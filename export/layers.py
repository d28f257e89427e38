"""What quantising a layer means: its ranges, its rounding, and the ONNX nodes that say it. NumPy and onnx.

Calibration (which measures what it would cost) and export (which writes the graphs) build the same nodes from here.

A layer is a matrix product of activations with a constant weight. Everything else (norms, softmax, attention's own
products, residuals, the draw from the mixture) stays in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from arinar.runtime.bundle import PHASES, GraphInfo
from arinar.schemes import QUANTIZED, SCHEMES

from .onnx_edit import remove_unused, split_products

Array = npt.NDArray[Any]

INT8_MAX, FP8_MAX = 127.0, 448.0
# A layer narrower than this on either side stays in float32: nothing to gain, and the projections of tokens and features,
# the mixture head (12 outputs) and the last layer of a diffusion head (32, whose errors the first sampling step multiplies
# by hundreds) are where rounding hurts most.
MIN_WIDTH = 33
TINY = 1e-12  # keeps scales of all-zero channels positive


@dataclass(frozen=True)
class Layer:
    """One quantisable product: ``name`` is ``graph/label`` (of graphs that share the layer, the plain one), ``node`` the node
    in the graph, ``weight`` (K, N)."""

    name: str
    node: str
    input: str
    output: str
    weight: Array
    bias: str | None = None  # of a Gemm, whose sum is part of the node

    @property
    def wide(self) -> bool:
        return bool(min(self.weight.shape) >= MIN_WIDTH)


@dataclass(frozen=True)
class LayerPlan:
    """How to quantise one layer.

    scheme : one of `arinar.schemes.QUANTIZED`.
    absmax : activations are clipped to -absmax..absmax (static schemes); with ``smooth``, after the division.
    smooth : (K,) or None; channel k of the input is divided by smooth[k] and the weight's row k multiplied by it, which
        changes nothing but where rounding falls (SmoothQuant, arXiv 2211.10438).
    """

    scheme: str
    absmax: float | None = None
    smooth: Array | None = None

    def __post_init__(self) -> None:
        if self.scheme not in QUANTIZED:
            raise ValueError(f"scheme is {self.scheme!r}; choose one of {', '.join(QUANTIZED)}")
        if not self.dynamic and not (self.absmax is not None and np.isfinite(self.absmax) and self.absmax >= 0):
            raise ValueError(f"absmax is {self.absmax!r}; {self.scheme} needs a calibrated, finite range")

    @property
    def dynamic(self) -> bool:
        """Whether activation ranges are taken as the graph runs."""
        return SCHEMES[self.scheme].ranges == "dynamic"


def smooth_scale(channel_absmax: Array, weight: Array, alpha: float = 0.5) -> Array:
    """SmoothQuant's per-channel divisor: max|x_k|^alpha / max|w_k|^(1-alpha), channel maxima (K,), weight (K, N)."""
    x = np.maximum(np.asarray(channel_absmax, np.float64), 1e-5)
    w = np.maximum(np.abs(weight).max(1).astype(np.float64), 1e-5)
    return np.asarray(np.clip(x**alpha / w ** (1 - alpha), 1e-4, 1e4), np.float32)


def quantize_weight(weight: Array, scheme: str) -> tuple[Array, Array]:
    """weight (K, N) -> values (K, N), int8 or E4M3, and scales (N,): one per output channel, zero point 0."""
    peak = np.maximum(np.abs(weight).max(0), TINY).astype(np.float32)
    if scheme == "fp8":
        import ml_dtypes

        scale = (peak / np.float32(FP8_MAX)).astype(np.float32)
        return (weight / scale).astype(ml_dtypes.float8_e4m3fn), scale
    scale = (peak / np.float32(INT8_MAX)).astype(np.float32)
    return np.clip(np.round(weight / scale), -INT8_MAX, INT8_MAX).astype(np.int8), scale


def layer_bytes(layer: Layer, scheme: str | None) -> int:
    """Size of a layer's weight: quantised, or (None) in float32."""
    rows, columns = layer.weight.shape
    return int(rows * columns * (4 if scheme is None else 1) + (0 if scheme is None else 4 * columns))


def layer_graphs(graphs: Mapping[str, GraphInfo]) -> list[str]:
    """Of a variant's graphs, those that hold layers, in the order of the data."""
    found = [(PHASES.index(info.phase), name) for name, info in graphs.items() if info.layered]
    return [name for _, name in sorted(found)]


class Graph:
    """An ONNX model, its initializers' values read on demand, its layers, and copies with some of them quantised."""

    def __init__(self, model: ModelProto, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.name = model.graph.name
        # A step with guidance and one without have the same layers: they have one name, one range, one plan.
        self.owner = self.name.removesuffix("_guided")
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._producers = {output: node for node in model.graph.node for output in node.output}
        self.layers = self._find_layers()

    @classmethod
    def load(cls, path: Path) -> Graph:
        return cls(onnx.load(path, load_external_data=False), path.parent)

    def _find_layers(self) -> dict[str, Layer]:
        found: list[tuple[str | None, NodeProto, Array, str | None]] = []
        for node in self.model.graph.node:
            if node.op_type not in ("MatMul", "Gemm"):
                continue
            weight = self.constant(node.input[1])
            if weight is None or weight.ndim != 2 or weight.dtype != np.float32:
                continue
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
                continue
            if attributes.get("transB", 0):
                weight = np.ascontiguousarray(weight.T)
            bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
            found.append((self._label(node), node, weight, bias))
        layers: dict[str, Layer] = {}
        for index, (label, node, weight, bias) in enumerate(found):
            following = next((other for other, *_ in found[index + 1 : index + 2]), None)
            if label is None and following and following.endswith(".attn.proj"):
                label = following.removesuffix("proj") + "qkv"  # its bias is put together in the graph
            label = base = label or node.name
            number = 1
            while f"{self.owner}/{label}" in layers:
                number += 1
                label = f"{base}#{number}"
            name = f"{self.owner}/{label}"
            layers[name] = Layer(name, node.name, node.input[0], node.output[0], weight, bias)
        return layers

    def _label(self, node: NodeProto) -> str | None:
        """The name that the layer has in the model, from its weight's or bias's initializer."""
        names: list[str] = [*self._roots(node.input[1]), *node.input[2:]]
        for other in self.model.graph.node:
            if other.op_type == "Add" and node.output[0] in other.input:
                names += [name for name in other.input if name in self._initializers]
        for name in names:
            for suffix in (".weight", ".bias"):
                if name.endswith(suffix):
                    return name.removesuffix(suffix).removeprefix("outer.").removeprefix("inner.").removeprefix("net.")
        # Step modules join the modulations of all blocks into one layer, a buffer called "weight".
        return "modulation" if "weight" in names else None

    def _roots(self, name: str) -> list[str]:
        if name in self._initializers:
            return [name]
        node = self._producers.get(name)
        return [] if node is None else [root for item in node.input for root in self._roots(item)]

    def constant(self, name: str) -> Array | None:
        """Value of a tensor that is an initializer, or computed from initializers alone; else None."""
        if name in self._initializers:
            return np.asarray(numpy_helper.to_array(self._initializers[name], base_dir=str(self.folder)))
        nodes = self._constant_nodes(name)
        if not nodes:
            return None
        needed = {item for node in nodes for item in node.input} & self._initializers.keys()
        tensors = [numpy_helper.from_array(self.constant(item), item) for item in sorted(needed)]
        graph = helper.make_graph(nodes, "constant", [], [helper.make_empty_tensor_value_info(name)], tensors)
        model = helper.make_model(graph, opset_imports=self.model.opset_import)
        return np.asarray(onnx.reference.ReferenceEvaluator(model).run(None, {})[0])

    def _constant_nodes(self, name: str) -> list[NodeProto]:
        """The nodes that compute ``name`` from initializers, in order; empty where anything else is involved."""
        node = self._producers.get(name)
        if node is None:
            return []
        nodes: list[NodeProto] = []
        for item in node.input:
            if item and item not in self._initializers:
                inner = self._constant_nodes(item)
                if not inner:
                    return []
                nodes += [other for other in inner if other not in nodes]
        return [*nodes, node]

    def quantized(self, plans: Mapping[str, LayerPlan]) -> ModelProto:
        """A copy of the model in which the layers named in ``plans`` are quantised.

        New weights are inside the model, the others still refer to the files they came from. Where ranges are taken as
        the graph runs, a layer that is split afterwards becomes a product for each part. Raises ValueError for a layer
        that the graph does not have.
        """
        for name in plans:
            if name not in self.layers:
                raise ValueError(f"graph {self.name!r} has no layer {name!r}; it has {', '.join(self.layers)}")
        by_node = {self.layers[name].node: (self.layers[name], plan) for name, plan in plans.items()}
        model = ModelProto()
        model.CopyFrom(self.model)
        if any(plan.dynamic for plan in plans.values()):
            for name, products in split_products(model).items():
                if name in by_node:
                    layer, plan = by_node.pop(name)
                    by_node |= {part.node: (part, plan) for part in _layer_parts(layer, products)}
        build = _Rewriter()
        for node in model.graph.node:
            if node.name in by_node:
                build.layer(*by_node[node.name])
            else:
                build.nodes.append(node)
        del model.graph.node[:]
        model.graph.node.extend(build.nodes)
        model.graph.initializer.extend(build.initializers.values())
        del model.graph.value_info[:]
        remove_unused(model)
        return model


def _layer_parts(layer: Layer, products: Sequence[str]) -> list[Layer]:
    """A layer as `split_products` divides it."""
    columns = np.split(layer.weight, len(products), 1)
    biases = [None if layer.bias is None else f"{layer.bias}/{index}" for index in range(len(products))]
    return [
        replace(layer, node=name, output=name, weight=weight, bias=bias)
        for name, weight, bias in zip(products, columns, biases, strict=True)
    ]


class _Rewriter:
    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._rounded: dict[str, tuple[str, str, str]] = {}  # input -> its integers, step and zero point
        self._smoothed: dict[tuple[str, bytes], str] = {}  # input and divisors -> quotient

    def constant(self, value: Array, name: str) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def layer(self, layer: Layer, plan: LayerPlan) -> None:
        prefix = f"{layer.node}/"
        x, weight = layer.input, layer.weight
        if plan.smooth is not None:
            smooth = np.asarray(plan.smooth, np.float32)
            x = self._divided(prefix, x, smooth)
            weight = weight * smooth[:, None]
        values, scale = quantize_weight(weight, plan.scheme)
        kept = self.constant(values, f"{prefix}weight")
        scales = self.constant(scale, f"{prefix}weight.scale")
        target = layer.output if layer.bias is None else f"{prefix}product"
        if plan.dynamic:
            self._dynamic(prefix, x, kept, scales, target)
        else:
            self._static(prefix, x, kept, scales, values.dtype, plan, target)
        if layer.bias is not None:
            self.node("Add", [target, layer.bias], layer.output)

    def _divided(self, prefix: str, x: str, smooth: Array) -> str:
        key = x, smooth.tobytes()
        if key not in self._smoothed:
            constant = self.constant(1 / smooth, f"{prefix}smooth")
            self._smoothed[key] = self.node("Mul", [x, constant], f"{prefix}smoothed")
        return self._smoothed[key]

    def _dynamic(self, prefix: str, x: str, weight: str, scales: str, output: str) -> None:
        """The pattern that ONNX Runtime fuses into one kernel. Layers that read the same input share its rounding."""
        if x not in self._rounded:
            self._rounded[x] = (f"{prefix}values", f"{prefix}step", f"{prefix}zero")
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], self._rounded[x], name=f"{prefix}values"))
        values, step, zero = self._rounded[x]
        product = self.node("MatMulInteger", [values, weight, zero], f"{prefix}integer")
        real = self.node("Cast", [product], f"{prefix}float", to=TensorProto.FLOAT)
        self.node("Mul", [real, self.node("Mul", [step, scales], f"{prefix}scales")], output)

    def _static(
        self, prefix: str, x: str, weight: str, scales: str, dtype: npt.DTypeLike, plan: LayerPlan, output: str
    ) -> None:
        absmax = plan.absmax
        assert absmax is not None
        top = FP8_MAX if plan.scheme == "fp8" else INT8_MAX
        step = self.constant(np.array(max(absmax, TINY) / top, np.float32), f"{prefix}input.scale")
        zero = self.constant(np.zeros((), dtype), f"quantization/{plan.scheme}.zero")
        values = self.node("QuantizeLinear", [x, step, zero], f"{prefix}quantized")
        real = self.node("DequantizeLinear", [values, step, zero], f"{prefix}dequantized")
        columns = self.initializers[scales].dims[0]
        zeros = self.constant(np.zeros(columns, dtype), f"{prefix}zeros")
        matrix = self.node("DequantizeLinear", [weight, scales, zeros], f"{prefix}matrix", axis=1)
        self.node("MatMul", [real, matrix], output)


def total_bytes(layers: Iterable[Layer], plans: Mapping[str, LayerPlan]) -> int:
    """Size of all layers' weights under a precision map."""
    return sum(layer_bytes(layer, plans[layer.name].scheme if layer.name in plans else None) for layer in layers)
