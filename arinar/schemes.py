"""How the graphs of a variant compute: the facts of each scheme, for whoever decides by them. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """title : in words. weight_bytes : of a transformer's weight (what an 8-bit variant leaves in float32 is not known here:
    the least possible). ranges : of the activations where they are quantised: "" (they are not), "dynamic" (one range per
    tensor, taken over a launch as it runs, so that only rows that are launched apart do not depend on one another) or
    "static" (calibrated, written into the graph). integers : products are of 8-bit integers. runs_on : backends that have
    kernels for it. faster_on : kinds of machine ("cpu", "gpu") that it is there for, being faster than 32 bits. runs :
    the variant whose graphs it takes and computes otherwise, where no bundle has graphs of its own."""

    title: str
    weight_bytes: int
    ranges: str = ""
    integers: bool = False
    runs_on: tuple[str, ...] = ("onnxruntime-cpu", "openvino", "onnxruntime-cuda", "tensorrt")
    faster_on: tuple[str, ...] = ()
    runs: str = ""


#: By name. A variant of a bundle is called as its scheme is, unless whoever made it chose another name.
SCHEMES: dict[str, Scheme] = {
    "fp32": Scheme("32-bit floats", 4),
    "fp16": Scheme("16-bit floats; norms, softmax, heads and draws in 32 bits", 2, faster_on=("gpu",)),
    "bf16": Scheme(
        "the fp32 graphs, their products in bfloat16 (for CPUs that have it)", 2, runs_on=("openvino",), runs="fp32"
    ),
    "int8": Scheme(
        "8-bit integers, activation ranges taken as the graph runs (for CPUs)",
        1,
        "dynamic",
        integers=True,
        runs_on=("onnxruntime-cpu",),
        faster_on=("cpu",),
    ),
    "int8-static": Scheme(
        "8-bit integers, explicit QuantizeLinear/DequantizeLinear with calibrated ranges",
        1,
        "static",
        integers=True,
        runs_on=("onnxruntime-cpu", "tensorrt"),
        faster_on=("gpu",),
    ),
    "fp8": Scheme(
        "E4M3 floats, explicit QuantizeLinear/DequantizeLinear with calibrated ranges",
        1,
        "static",
        runs_on=("tensorrt",),
        faster_on=("gpu",),
    ),
}
#: Traced from a model; made of a bundle's fp32 graphs.
TRACED = tuple(name for name, scheme in SCHEMES.items() if not scheme.ranges and not scheme.runs)
QUANTIZED = tuple(name for name, scheme in SCHEMES.items() if scheme.ranges)
