"""Trace a step module into an ONNX graph, put its weights into a shared file, and prove the graph against the module."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto

from .onnx_edit import remove_unused
from .spec import Array, ExportError, GraphSpec

#: Opsets that the graphs can be exported for. 20 is what every TensorRT 10 and later reads.
OPSETS = (20, 21, 22, 23, 24)
DEFAULT_OPSET = 20

# Initializers smaller than this stay inside the .onnx file: shape constants must (the checker and ONNX Runtime read
# them without external data), and graphs that have nothing else then need no other file.
EXTERNAL_THRESHOLD = 4096
# Offsets of large tensors are page aligned, so that a runtime can map them.
PAGE, SMALL_ALIGNMENT = 4096, 64
PRODUCER = "arinar"


class WeightStore:
    """One file that holds the large initializers of all graphs of a precision, each distinct tensor once.

    Tensors of different types never share bytes, equal as those may be (1,536 zeros of float16, 768 of float32):
    TensorRT's parser refuses weights that begin at one address and differ in number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb")
        self._known: dict[tuple[int, bytes], tuple[int, int]] = {}

    def add(self, data: bytes | memoryview, data_type: int) -> tuple[int, int]:
        """Write ``data`` of an ONNX data type unless it is there already -> (offset, length)."""
        digest = data_type, hashlib.sha256(data).digest()
        if digest not in self._known:
            alignment = PAGE if len(data) >= 16 * PAGE else SMALL_ALIGNMENT
            offset = -(-self._file.tell() // alignment) * alignment
            self._file.write(b"\0" * (offset - self._file.tell()))
            self._file.write(data)
            self._known[digest] = (offset, len(data))
        return self._known[digest]

    def close(self) -> None:
        self._file.close()


def export_graph(spec: GraphSpec, folder: Path, store: WeightStore, opset: int = DEFAULT_OPSET) -> Path:
    """Trace ``spec.module`` and write ``folder/<name>.onnx``, large weights into ``store`` -> path of the graph.

    Raises ExportError when tracing fails or an axis that must be dynamic came out fixed.
    """
    sizes = {axis: 3 + index for index, axis in enumerate(spec.axes)}  # distinct, and not 0 or 1, which specialise
    feed = spec.example(sizes)
    dims = {axis: torch.export.Dim(axis, min=1, max=1 << 20) for axis in spec.axes}
    fixed: list[dict[int, torch.export.Dim]] = [
        {i: dims[d] for i, d in enumerate(tensor.shape) if isinstance(d, str)} for tensor in spec.inputs
    ]
    variadic = sum(t.name.startswith("past_key_values.") for t in spec.inputs)
    named, rest = fixed[: len(fixed) - variadic], fixed[len(fixed) - variadic :]
    shapes = (*named, tuple(rest)) if rest else tuple(named)
    args = tuple(torch.from_numpy(feed[tensor.name]) for tensor in spec.inputs)
    path = folder / f"{spec.name}.onnx"
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{spec.name}-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecation chatter
        raw = Path(scratch) / "raw.onnx"
        try:
            program = torch.onnx.export(
                spec.module,
                args,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                verbose=False,
                input_names=[t.name for t in spec.inputs],
                output_names=[t.name for t in spec.outputs],
            )
            assert program is not None
            program.save(raw, external_data=True)
        except Exception as error:
            raise ExportError(f"graph {spec.name!r} could not be traced: {error}") from error
        del program
        model = onnx.load(raw, load_external_data=False)
        strip(model)
        fix_shapes(model)
        model.graph.name = spec.name
        check_interface(model, spec)
        pool_weights(model, Path(scratch), store)
        write_model(model, path)
    return path


def strip(model: onnx.ModelProto) -> None:
    """Remove what would differ from machine to machine: source paths, stack traces, the exporter's version."""
    model.producer_name, model.producer_version, model.doc_string = PRODUCER, "", ""
    del model.metadata_props[:]
    graph = model.graph
    graph.doc_string = ""
    for item in [graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        if hasattr(item, "metadata_props"):
            del item.metadata_props[:]
        if hasattr(item, "doc_string"):
            item.doc_string = ""


def fix_shapes(model: onnx.ModelProto) -> int:
    """Reshape back to the shape of another tensor that is known but for its first axis (as a traced group norm does):
    a constant shape instead of one measured as the graph runs -> how many were replaced.

    A runtime that knows the sizes beforehand computes what follows in place.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.input, *graph.value_info)}
    known = {tensor.name for tensor in graph.initializer}
    replaced = 0
    for node in graph.node:
        measured = makers.get(node.input[1]) if node.op_type == "Reshape" else None
        if measured is None or measured.op_type != "Shape" or any(a.name == "end" or a.i for a in measured.attribute):
            continue
        wanted, given = shapes.get(measured.input[0]), shapes.get(node.input[0])
        if not wanted or not given or not wanted[0].dim_param or wanted[0].dim_param != given[0].dim_param:
            continue
        sizes = [0, *(dim.dim_value for dim in wanted[1:])]  # 0: the size that comes in
        if 0 in sizes[1:]:
            continue
        name = "shape_" + "_".join(map(str, sizes))
        if name not in known:
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(sizes, np.int64), name))
            known.add(name)
        node.input[1] = name
        del node.attribute[:]  # allowzero
        replaced += 1
    if replaced:
        remove_unused(model)
    return replaced


def check_interface(model: onnx.ModelProto, spec: GraphSpec) -> None:
    """Names, and dynamic axes still dynamic; then give the axes the names that the manifest uses."""
    for what, values, expected in (
        ("input", model.graph.input, spec.inputs),
        ("output", model.graph.output, spec.outputs),
    ):
        names = [value.name for value in values]
        if names != [tensor.name for tensor in expected]:
            raise ExportError(f"graph {spec.name!r}: {what}s are {names}; expected {[t.name for t in expected]}")
        for value, tensor in zip(values, expected, strict=True):
            dims = value.type.tensor_type.shape.dim
            if len(dims) != len(tensor.shape):
                raise ExportError(f"graph {spec.name!r}: {what} {tensor.name!r} has {len(dims)} axes; expected {tensor.shape}")
            for index, (dim, want) in enumerate(zip(dims, tensor.shape, strict=True)):
                if isinstance(want, str) and dim.HasField("dim_value"):
                    raise ExportError(
                        f"graph {spec.name!r}: axis {index} ({want}) of {what} {tensor.name!r} came out fixed at "
                        f"{dim.dim_value}; it must stay dynamic"
                    )
                if isinstance(want, str):
                    dim.dim_param = want
                elif dim.HasField("dim_value") and dim.dim_value != want:
                    raise ExportError(
                        f"graph {spec.name!r}: axis {index} of {what} {tensor.name!r} is {dim.dim_value}; expected {want}"
                    )
                else:
                    dim.dim_value = want


def pool_weights(model: onnx.ModelProto, source: Path, store: WeightStore) -> None:
    """Move large initializers into ``store``; ``source`` is the folder of the model's present external data."""
    for tensor in model.graph.initializer:
        data = tensor_bytes(tensor, source)
        for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(field)
        del tensor.external_data[:]
        if len(data) < EXTERNAL_THRESHOLD:
            tensor.data_location = TensorProto.DEFAULT
            tensor.raw_data = bytes(data)
            continue
        offset, length = store.add(data, tensor.data_type)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", store.path.name), ("offset", offset), ("length", length)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)


def tensor_bytes(tensor: TensorProto, folder: Path) -> bytes:
    """Raw little-endian content of an initializer, wherever it is kept."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return bytes(tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes())
    entries = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / entries["location"]).open("rb") as file:
        file.seek(int(entries.get("offset", 0)))
        return bytes(file.read(int(entries["length"]) if "length" in entries else -1))


def write_model(model: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString(deterministic=True))


def validate_graph(
    path: Path, spec: GraphSpec, reference: Callable[[dict[str, Array]], Sequence[Array]] | None = None
) -> float:
    """Run the graph in ONNX Runtime against its module at every ``spec.sizes`` -> largest absolute error.

    ``reference`` takes the module's place. Where ``spec.share`` is below 1, the largest error of that share.
    Raises ExportError naming the graph, output and error where they differ by more than ``spec.atol`` relative to
    the output's scale (at least 1), where a shape differs, or where the ONNX checker objects.
    """
    import onnxruntime as ort

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker has several exception types of its own
        raise ExportError(f"graph {spec.name!r} does not pass the ONNX checker: {error}") from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for number, sizes in enumerate(spec.sizes):
        feed = spec.example(sizes, seed=number)
        expected = (reference or (lambda f: run_module(spec, f)))(feed)
        got = session.run(None, feed)
        for tensor, want, have in zip(spec.outputs, expected, got, strict=True):
            if want.shape != have.shape or want.dtype != have.dtype:
                raise ExportError(
                    f"graph {spec.name!r}, output {tensor.name!r} at {dict(sizes)}: {have.dtype} {have.shape} from "
                    f"ONNX Runtime, {want.dtype} {want.shape} from PyTorch"
                )
            if want.size == 0:
                continue
            scale = max(1.0, float(np.abs(want.astype(np.float64)).max()))
            errors = np.abs(have.astype(np.float64) - want.astype(np.float64))
            largest = float(errors.max() if spec.share == 1 else np.quantile(errors, spec.share))
            limit = max(1.0, 255 * spec.atol) if want.dtype == np.uint8 else spec.atol * scale
            if not largest <= limit:  # catches NaN too
                raise ExportError(
                    f"graph {spec.name!r}, output {tensor.name!r} at {dict(sizes)}: ONNX Runtime differs from PyTorch "
                    f"by {largest:.3g}; at most {limit:.3g} is allowed"
                )
            worst = max(worst, largest)
    return worst


def exact_reference(spec: GraphSpec, exact: GraphSpec) -> Callable[[dict[str, Array]], Sequence[Array]]:
    """What the float32 module of the same graph makes of a low-precision graph's inputs, in its outputs' dtypes."""

    def run(feed: dict[str, Array]) -> list[Array]:
        wide = {tensor.name: feed[tensor.name].astype(tensor.dtype) for tensor in exact.inputs}
        return [out.astype(tensor.dtype) for tensor, out in zip(spec.outputs, run_module(exact, wide), strict=True)]

    return run


def run_module(spec: GraphSpec, feed: Mapping[str, Array]) -> list[Array]:
    with torch.no_grad():
        out = spec.module(*(torch.from_numpy(feed[tensor.name]) for tensor in spec.inputs if tensor.name in feed))
    values = out if isinstance(out, tuple) else (out,)
    return [value.numpy() for value in values]
