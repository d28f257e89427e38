"""Where a graph's file says that its weights lie: read without the onnx package, and compared with the manifest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from arinar.runtime import Bundle, BundleError, Pipeline
from arinar.runtime.bundle import MANIFEST_NAME, file_info
from arinar.runtime.wire import external_locations, fields, message

WEIGHTS = "graphs/fp32/weights.data"
STEP = "graphs/fp32/outer_step.onnx"


def all_tensors(message_: object) -> list[TensorProto]:
    """Every tensor anywhere in a message, as the onnx package's own classes find them."""
    found = [message_] if isinstance(message_, TensorProto) else []
    for descriptor, value in message_.ListFields():  # type: ignore[attr-defined]
        if descriptor.message_type is not None:
            for item in value if not hasattr(value, "ListFields") else [value]:
                found += all_tensors(item)
    return found


def by_onnx(path: Path) -> set[str]:
    tensors = all_tensors(onnx.load(path, load_external_data=False))
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


@pytest.mark.parametrize("kind", ["digits", "digits-causal"])
def test_as_the_onnx_package_finds_them(demo_bundle: Callable[[str], Path], kind: str) -> None:
    bundle = Bundle.open(demo_bundle(kind))
    found = set()
    for graph in bundle.manifest.graphs["fp32"].values():
        for name in filter(None, (graph.file, graph.cpu_file)):
            want = by_onnx(bundle.folder / name)
            assert external_locations(bundle.folder / name) == want
            found |= want
        assert bundle.graph_path(graph) == bundle.folder / graph.file
    assert found == {"weights.data", "vae_decoder.data", "vae_encoder.data"}


def outside(location: str) -> TensorProto:
    tensor = numpy_helper.from_array(np.zeros(2, np.float32), location)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_tensors_hide_in_many_places(tmp_path: Path) -> None:
    sparse = helper.make_sparse_tensor(outside("sparse.values"), outside("sparse.indices"), [4])
    inner = helper.make_graph([helper.make_node("Constant", [], ["v"], value=outside("constant.of.subgraph"))], "inner", [], [])
    inner.initializer.append(outside("initializer.of.subgraph"))
    nodes = [
        helper.make_node("If", ["c"], ["d"], then_branch=inner),
        helper.make_node("Constant", [], ["e"], value=outside("attribute")),
        helper.make_node("Constant", [], ["e2"], sparse_value=sparse),
        helper.make_node("Any", [], ["f"], domain="x", many=[outside("one.of.many"), outside("other.of.many")]),
        helper.make_node("Any", [], ["g"], domain="x", graphs=[inner]),
    ]
    graph = helper.make_graph(nodes, "outer", [], [], [outside("initializer")])
    graph.sparse_initializer.append(helper.make_sparse_tensor(outside("s.values"), outside("s.indices"), [4]))
    body = [helper.make_node("Constant", [], ["h"], value=outside("function"))]
    function = helper.make_function("x", "F", [], ["h"], body, [helper.make_opsetid("", 20)])
    default = onnx.AttributeProto(name="a", type=onnx.AttributeProto.TENSOR, t=outside("default.of.function"))
    function.attribute_proto.append(default)
    model = helper.make_model(graph, functions=[function])
    training = model.training_info.add()
    training.initialization.initializer.append(outside("initialization"))
    training.algorithm.initializer.append(outside("algorithm"))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    want = by_onnx(path)
    assert len(want) == 14 and external_locations(path) == want


def test_contradictions_are_all_told(tmp_path: Path) -> None:
    """Of repeated entries readers take the last; one that says where, but not that it is external, may be believed."""
    entry = message((1, "offset"), (2, "harmless"), (1, "location"), (2, "last"))
    tensor = message((9, b"abcd"), (13, entry), (13, message((2, "first"), (1, "location"))), (13, message((1, "location"))))
    path = tmp_path / "m.onnx"
    path.write_bytes(message((7, message((5, tensor))), (7, message((5, message((13, message((1, "location"), (2, "two")))))))))
    assert external_locations(path) == {"harmless", "last", "first", "", "two"}


def test_what_is_cut_off_or_no_message_is_refused(digits_bundle: Path, tmp_path: Path) -> None:
    content = (digits_bundle / STEP).read_bytes()
    path = tmp_path / "m.onnx"
    for size in [*range(1, 200), *range(200, len(content), 997)]:
        path.write_bytes(content[:size])
        with_key = b"location" in content[:size]
        try:
            assert external_locations(path) <= {"weights.data"}
        except ValueError:
            assert with_key
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content[:4000])
        for place in random.integers(0, len(damaged), 5):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        try:
            external_locations(path)
        except ValueError as error:
            assert "\n" not in str(error)
    nested = b"location"
    for _ in range(500):  # If in If in ...
        nested = message((1, message((5, message((6, nested))))))
    path.write_bytes(message((7, nested)))
    with pytest.raises(ValueError, match="deep"):
        external_locations(path)
    for tag in (b"\x0b", b"\x0f", b"\x00\x01", b"\xff" * 11, b"\x0a\xff\xff\xff\xff\x7f"):
        with pytest.raises(ValueError):
            list(fields(tag, 0, len(tag)))


# ------------------------------------------------------------------------------------------------- against the manifest


@pytest.fixture
def copy(digits_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits_bundle, tmp_path / "bundle"))


def lead_to(bundle: Path, location: str, lists: str | None = None) -> None:
    """Every external tensor of the outer graph lies at ``location`` now; hashes fit; the manifest lists ``lists``."""
    data = json.loads((bundle / MANIFEST_NAME).read_text())
    entry = data["graphs"]["fp32"]["outer_step"]
    for name in filter(None, (entry["file"], entry["cpu_file"])):
        model = onnx.load(bundle / name, load_external_data=False)
        for tensor in all_tensors(model):
            for pair in tensor.external_data:
                if pair.key == "location":
                    pair.value = location
        (bundle / name).write_bytes(model.SerializeToString())
        data["files"][name] = vars(file_info(bundle / name))
    if lists is not None:
        entry["weights"] = [lists]
        data["files"].setdefault(lists, {"size": 1, "sha256": "0" * 64})
    (bundle / MANIFEST_NAME).write_text(json.dumps(data))


def refused(bundle: Path, match: str, **options: object) -> None:
    with pytest.raises(BundleError, match=match) as caught:
        Pipeline.load(bundle, backend="onnxruntime-cpu", threads=1, **options).generate([1])  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../fp16/weights.data",
        "../fp32/weights.data",
        "sub/../weights.data",
        "vae_decoder.data",  # in the bundle and hashed, but not this graph's
        "unlisted.data",
        "*/_ORT_MEM_ADDR_/*",
        "",
        ".",
        "C:\\weights.data",
        "file:weights.data",
        "weights.data\0",
    ],
)
def test_weights_elsewhere_are_refused(copy: Path, location: str) -> None:
    shutil.copyfile(copy / WEIGHTS, copy / "graphs/fp32/unlisted.data")
    lead_to(copy, location)
    refused(copy, "has weights in the file .*; the manifest lists graphs/fp32/weights.data .*do not trust the bundle")


def test_a_marker_is_refused_even_where_the_manifest_lists_it(copy: Path) -> None:
    lead_to(copy, "*/_ORT_MEM_ADDR_/*", lists="graphs/fp32/*/_ORT_MEM_ADDR_/*")
    refused(copy, "do not trust the bundle", verify=False)


def test_the_same_place_by_another_spelling_is_fine(copy: Path) -> None:
    lead_to(copy, "./weights.data")
    assert Pipeline.load(copy, threads=1).generate([1]).images


def test_links_are_refused(copy: Path, tmp_path: Path) -> None:
    weights, aside = copy / WEIGHTS, copy / "graphs/fp32/aside.data"
    weights.rename(aside)
    weights.symlink_to("aside.data")
    refused(copy, "weights.data is a link, or lies behind one; copy the bundle with its files in place of links")
    weights.unlink()
    shutil.move(aside, tmp_path / "outside.data")
    os.link(tmp_path / "outside.data", weights)
    refused(copy, r"weights.data has another name outside the bundle \(a hard link\); copy the bundle")
    remedied = shutil.copytree(copy, tmp_path / "remedied")
    assert Pipeline.load(remedied, threads=1).generate([1]).images
    weights.unlink()
    refused(copy, "weights.data is missing", verify=False)


def test_equal_files_of_one_bundle_may_be_hard_links(copy: Path) -> None:
    data = json.loads((copy / MANIFEST_NAME).read_text())
    os.link(copy / WEIGHTS, copy / "graphs/fp32/again.data")
    data["files"]["graphs/fp32/again.data"] = data["files"][WEIGHTS]
    (copy / MANIFEST_NAME).write_text(json.dumps(data))
    assert Pipeline.load(copy, threads=1).generate([1]).images


def test_other_formats_are_refused(copy: Path) -> None:
    data = json.loads((copy / MANIFEST_NAME).read_text())
    entry = data["graphs"]["fp32"]["outer_step"]
    (copy / STEP).rename(copy / "graphs/fp32/outer_step.ort")
    entry["file"], entry["cpu_file"] = "graphs/fp32/outer_step.ort", None
    data["files"][entry["file"]] = data["files"].pop(STEP)
    (copy / MANIFEST_NAME).write_text(json.dumps(data))
    refused(copy, r"is the file 'graphs/fp32/outer_step.ort'; expected \*.onnx")


def test_calibration_and_quantisation_look_too(copy: Path, tmp_path: Path) -> None:
    from arinar.calibration.precision import calibrate
    from arinar.export.quantize import quantize_bundle

    lead_to(copy, "unlisted.data")
    with pytest.raises(BundleError, match="do not trust the bundle"):
        quantize_bundle(copy, "int8", name="again")
    with pytest.raises(BundleError, match="do not trust the bundle"):
        calibrate(copy, tmp_path / "c.json", num_images=4, threads=1)
