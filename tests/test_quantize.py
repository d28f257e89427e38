"""Quantised variants: what the nodes say, what they cost, what a bundle with them does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from arinar.calibration.collect import open_session
from arinar.checkpoint import load_arinar
from arinar.cli import main
from arinar.export.folder import merge
from arinar.export.layers import FP8_MAX, Graph, LayerPlan, layer_graphs, quantize_weight, smooth_scale
from arinar.export.quantize import Calibration, default_plans, example_feed, quantize_bundle, variant_bytes
from arinar.export.spec import ExportError
from arinar.runtime import Pipeline
from arinar.runtime.backends import products
from arinar.runtime.bundle import Bundle, BundleError
from arinar.schemes import QUANTIZED, SCHEMES

# Wide enough for every layer of the demo model.
RANGE = 12.0


@pytest.fixture(scope="module")
def bundle(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with an int8 and an int8-static variant."""
    folder = tmp_path_factory.mktemp("quantize") / "bundle"
    shutil.copytree(digits_bundle, folder)
    quantize_bundle(folder, "int8")
    opened = Bundle.open(folder)
    layers = {name: layer for graph in graphs_of(opened).values() for name, layer in graph.layers.items()}
    quantize_bundle(folder, "int8-static", plans=default_plans("int8-static", layers, dict.fromkeys(layers, RANGE)))
    return folder


def graphs_of(bundle: Bundle) -> dict[str, Graph]:
    infos = bundle.manifest.graphs["fp32"]
    return {name: Graph.load(bundle.path(infos[name].file)) for name in layer_graphs(infos)}


@pytest.fixture(scope="module")
def graphs(bundle: Path) -> dict[str, Graph]:
    return graphs_of(Bundle.open(bundle))


def pixels(pipeline: Pipeline, labels: list[int], **arguments: Any) -> Any:
    return np.stack([np.asarray(image) for image in pipeline.generate(labels, **arguments).images]).astype(int)


def test_precisions_have_one_list_of_names() -> None:
    assert set(QUANTIZED) < set(SCHEMES)


def test_layers_are_those_of_the_model(graphs: dict[str, Graph]) -> None:
    state = load_arinar("digits").state_dict()
    outer, inner = graphs["outer_step"].layers, graphs["inner_step"].layers
    rooms = ("encoder_blocks", "decoder_blocks", "decoder_embed")
    for name, weight in state.items():
        if name.endswith(".weight") and weight.ndim == 2 and name.startswith(rooms):
            label = f"outer_step/{name.removesuffix('.weight')}"
            found = [outer[key].weight for key in (label, f"{label}#2") if key in outer]
            # The last block computes queries apart from keys and values.
            np.testing.assert_array_equal(np.concatenate(found, 1), weight.numpy().T)
    np.testing.assert_array_equal(inner["inner_step/head"].weight, state["arhead.head.weight"].numpy().T)
    qkv = inner["inner_step/blocks.0.attn.qkv"].weight
    np.testing.assert_array_equal(qkv, state["arhead.blocks.0.attn.mat_qkv.weight"].numpy().T)
    narrow = [name for graph in graphs.values() for name, layer in graph.layers.items() if not layer.wide]
    assert narrow == ["outer_step/z_proj", "inner_step/input_proj", "inner_step/head"]


def test_weights_round_to_the_nearest_step_of_their_channel() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((64, 5)) * [1, 100, 1e-3, 0, 1]).astype(np.float32)
    values, scale = quantize_weight(weight, "int8")
    assert values.dtype == np.int8 and scale.shape == (5,) and (scale > 0).all()
    assert (np.abs(values * scale - weight) <= scale / 2 * 1.0001).all()
    assert (np.abs(values).max(0)[[0, 1, 2, 4]] == 127).all() and not values[:, 3].any()
    eight, scale = quantize_weight(weight, "fp8")
    real = eight.astype(np.float32) * scale
    assert np.isfinite(real).all() and np.abs(eight.astype(np.float32)).max() == FP8_MAX
    large = np.abs(weight) > scale * 2  # normal numbers: 3 bits of mantissa
    assert (np.abs(real - weight)[large] <= np.abs(weight)[large] / 16 * 1.0001).all()


def test_smoothing_evens_out_channels() -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((32, 8)).astype(np.float32)
    channels = np.ones(32)
    channels[5] = 100
    smooth = smooth_scale(channels, weight)
    assert smooth.argmax() == 5 and (channels / smooth).max() < 20
    assert np.isfinite(smooth_scale(np.zeros(32), np.zeros((32, 4), np.float32))).all()


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("smooth", [False, True])
def test_one_layer_at_a_time_is_nearly_the_same(bundle: Path, graphs: dict[str, Graph], scheme: str, smooth: bool) -> None:
    opened, graph = Bundle.open(bundle), graphs["inner_step"]
    feed = example_feed(opened, opened.manifest.graphs["fp32"]["inner_step"])
    want = open_session(graph.model, graph.folder, 1).run(None, feed)
    for name, layer in graph.layers.items():
        factor = np.linspace(0.5, 2, len(layer.weight)).astype(np.float32) if smooth else None
        model = graph.quantized({name: LayerPlan(scheme, 2 * RANGE, factor)})
        onnx.checker.check_model(model) if not any(t.data_location for t in model.graph.initializer) else None
        got = open_session(model, graph.folder, 1).run(None, feed)
        error = max(float(np.abs(a - b).max()) for a, b in zip(want, got, strict=True))
        assert 0 < error < 0.6, (name, error)


def test_8_bit_products_are_exact_on_every_processor() -> None:
    import onnxruntime

    rng = np.random.default_rng(0)
    shape = 64, 64
    cases = [(np.full(shape, 255), np.full(shape, weight)) for weight in (127, -127)]
    cases.append((rng.integers(0, 256, shape), rng.integers(-127, 128, shape)))
    for a, weight in cases:
        for exact in (True, False):  # the exact kernels, and what is chosen here
            options = onnxruntime.SessionOptions()
            options.add_session_config_entry(products.EXACT_PRODUCTS, "1") if exact else products.keep_products_exact(options)
            got = products.run_product(a.astype(np.uint8), weight.astype(np.int8), options)
            assert np.array_equal(got, a @ weight)


def test_exact_kernels_where_the_usual_ones_saturate(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens(precision: str, exact: bool) -> Any:
        monkeypatch.setattr(products, "products_are_exact", lambda: exact)
        pipeline = Pipeline.load(bundle, precision=precision, threads=1)
        made = pipeline.generate([3], num_iter=2, seed=0)
        for session in pipeline.backend._loaded.values():  # type: ignore[attr-defined]
            options = session.get_session_options()
            if exact or precision == "fp32":
                with pytest.raises(RuntimeError):  # it has no such entry
                    options.get_session_config_entry(products.EXACT_PRODUCTS)
            else:
                assert options.get_session_config_entry(products.EXACT_PRODUCTS) == "1"
        return made.tokens

    exact_here = products.products_are_exact()
    tokens("fp32", False)
    for precision in (name for name, scheme in SCHEMES.items() if scheme.integers):
        slow = tokens(precision, False)
        if exact_here:
            assert np.array_equal(tokens(precision, True), slow)


def test_a_variant_of_any_name_runs_as_its_scheme_does(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    quantize_bundle(folder, "int8", name="eight")
    manifest = Bundle.open(folder).manifest
    assert [manifest.scheme(precision) for precision in ("fp32", "int8", "eight")] == ["fp32", "int8", "int8"]
    monkeypatch.setattr(products, "products_are_exact", lambda: False)
    known, named = (Pipeline.load(folder, precision=precision, threads=1) for precision in ("int8", "eight"))
    batch: dict[str, Any] = {"num_iter": 2, "seed": 0, "batch_size": 2}
    assert np.array_equal(known.generate([3, 5], **batch).tokens, named.generate([3, 5], **batch).tokens)
    for session in named.backend._loaded.values():  # type: ignore[attr-defined]
        assert session.get_session_options().get_session_config_entry(products.EXACT_PRODUCTS) == "1"


def test_names_of_variants(bundle: Path, tmp_path: Path) -> None:
    before = Bundle.open(bundle).manifest
    for name in ("fp32", "int8-static", "../x", "a/b", "", ".x"):
        with pytest.raises(ValueError, match="name is .*; expected letters, digits"):
            quantize_bundle(bundle, "int8", name=name or " ", overwrite=True)
    assert Bundle.open(bundle).manifest == before


def test_a_variant_that_is_replaced_leaves_no_scheme_behind(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    variant = {"odd": dict(manifest.graphs["fp32"])}
    quantised = replace(manifest, graphs=variant, schemes={"odd": "int8"}, provenance={"quantization": {"odd": {"layers": 1}}})
    with_odd = merge(manifest, quantised)
    assert with_odd.scheme("odd") == "int8" and "odd" in with_odd.provenance["quantization"]
    again = merge(with_odd, replace(manifest, graphs=variant, schemes={}, provenance={}))
    assert "odd" not in again.schemes and set(again.provenance["quantization"]) == {"int8", "int8-static"}


def test_static_nodes_are_what_tensorrt_reads(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    info = opened.manifest.graphs["int8-static"]["outer_step"]
    model = onnx.load(opened.path(info.file))
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == 26 and kinds.count("DequantizeLinear") == 52
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = tensors[node.input[1]], tensors[node.input[2]]
            assert zero.dtype == np.int8 and not zero.any() and zero.shape == scale.shape and (scale > 0).all()
            if node.input[0] in tensors:  # a weight: one scale per output channel
                weight = tensors[node.input[0]]
                assert weight.dtype == np.int8 and scale.shape == weight.shape[1:] and node.attribute[0].i == 1
    wide = [name for name, value in tensors.items() if value.ndim == 2 and value.shape[0] > 96]
    assert all(tensors[name].dtype == np.int8 for name in wide)  # the float32 originals are gone


def test_dynamic_variant_is_small_and_close(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    opened.verify()
    graphs = opened.manifest.graphs
    assert variant_bytes(opened, "int8") < 0.35 * variant_bytes(opened, "fp32")
    assert graphs["int8"]["vae_decoder"] == graphs["fp32"]["vae_decoder"]  # what has no layers is shared
    exact, quick = (Pipeline.load(bundle, precision=name, threads=1) for name in ("fp32", "int8"))
    labels = list(range(10))
    want, got = pixels(exact, labels, num_iter=4), pixels(quick, labels, num_iter=4)
    assert np.abs(want - got).mean() < 8
    assert opened.manifest.provenance["quantization"]["int8"] == {"layers": 32} and opened.manifest.scheme("int8") == "int8"


def test_a_layer_that_is_split_becomes_products_that_share_one_rounding(graphs: dict[str, Graph]) -> None:
    graph = graphs["outer_step"]
    layer = graph.layers["outer_step/encoder_blocks.0.attn.qkv"]
    smooth = np.linspace(0.5, 2, len(layer.weight)).astype(np.float32)
    for factor in (None, smooth):
        model = graph.quantized({layer.name: LayerPlan("int8", None, factor)})
        kinds = [node.op_type for node in model.graph.node]
        assert kinds.count("DynamicQuantizeLinear") == 1 and kinds.count("MatMulInteger") == 3
        tensors = {t.name: t for t in model.graph.initializer}
        products = [node.input[1] for node in model.graph.node if node.op_type == "MatMulInteger"]
        values, scale = quantize_weight(layer.weight if factor is None else layer.weight * smooth[:, None], "int8")
        for stored, whole in ((products, values), ([f"{name}.scale" for name in products], scale)):
            parts = [onnx.numpy_helper.to_array(tensors[name]) for name in stored]
            np.testing.assert_array_equal(np.concatenate(parts, -1), whole)


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
def test_fused_and_stepwise_inner_loops_agree(bundle: Path, precision: str) -> None:
    fused, stepwise = (Pipeline.load(bundle, precision=precision, inner=inner, threads=1) for inner in ("fused", "stepwise"))
    # One image: stepwise, int8 takes its ranges over the batch.
    ours, theirs = (p.generate([3], num_iter=2, seed=1).tokens for p in (fused, stepwise))
    close = np.isclose(ours, theirs, atol=1e-3)
    assert close.mean() > 0.97  # the same integers; float sums in another order may round one the other way


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
def test_images_do_not_depend_on_their_batch(bundle: Path, precision: str) -> None:
    pipeline = Pipeline.load(bundle, precision=precision, threads=1)
    alone = pixels(pipeline, [7], batch_size=4, num_iter=3)
    together = pixels(pipeline, [7, 2, 0, 9], batch_size=4, num_iter=3)
    assert np.array_equal(alone[0], together[0])


def test_bad_arguments_change_nothing(bundle: Path, tmp_path: Path) -> None:
    before = sorted((p.name, p.stat().st_mtime_ns) for p in bundle.rglob("*"))
    with pytest.raises(ValueError, match="quantised precisions are int8, int8-static, fp8"):
        quantize_bundle(bundle, "int4")
    with pytest.raises(BundleError, match="already holds int8 graphs; pass --overwrite"):
        quantize_bundle(bundle, "int8")
    with pytest.raises(ExportError, match="fp8 needs ranges: `arinar calibrate"):
        quantize_bundle(bundle, "fp8")
    with pytest.raises(BundleError, match="is not a bundle"):
        quantize_bundle(tmp_path, "int8")
    with pytest.raises(ValueError, match="absmax is None; fp8 needs a calibrated"):
        LayerPlan("fp8")
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in bundle.rglob("*"))


def test_unknown_layer(graphs: dict[str, Graph]) -> None:
    with pytest.raises(ValueError, match="no layer 'inner_step/nope'; it has inner_step/input_proj"):
        graphs["inner_step"].quantized({"inner_step/nope": LayerPlan("int8")})


def test_calibration_files_that_do_not_fit(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "calib.json"
    file.write_text("{}")
    with pytest.raises(ExportError, match="is not a calibration file"):
        quantize_bundle(bundle, "fp8", file)
    hashes = {name: info.sha256 for name, info in Bundle.open(bundle).manifest.files.items() if "fp32" in name}
    data: dict[str, Any] = {
        "kind": "arinar calibration",
        "format_version": 1,
        "settings": {"model": hashes},
        "layers": {},
        "maps": {"fp8": {"quantized": {"inner_step/gone": {"absmax": 1.0}}}},
    }
    file.write_text(json.dumps(data))
    Calibration.read(file).check(Bundle.open(bundle))
    with pytest.raises(ExportError, match="names layers that the bundle does not have: inner_step/gone"):
        quantize_bundle(bundle, "fp8", file)
    with pytest.raises(ExportError, match=r"has no map for int8-static; it has fp8. `arinar calibrate"):
        quantize_bundle(bundle, "int8-static", file, overwrite=True)
    data["settings"]["model"] = dict.fromkeys(hashes, "0" * 64)
    file.write_text(json.dumps(data))
    with pytest.raises(ExportError, match="was calibrated on another model.*Calibrate this bundle"):
        quantize_bundle(bundle, "fp8", file)
    file.write_text(json.dumps(data | {"format_version": 9}))
    with pytest.raises(ExportError, match="format version 9"):
        quantize_bundle(bundle, "fp8", file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, r"cannot be read \(No such file"),
        ({"settings": {"model": {}}}, "is not a calibration file"),
        ({"maps": {"fp8": {}}}, r"the map for fp8 is damaged \(it has no entry 'quantized'\); calibrate again"),
        ({"maps": {"fp8": {"quantized": 3}}}, "the map for fp8 is damaged"),
        ({"maps": {"fp8": {"quantized": {"LAYER": {"absmax": "wide"}}}}}, "the entry of layer LAYER is damaged"),
        ({"maps": {"fp8": {"quantized": {"LAYER": [1]}}}}, "the entry of layer LAYER is damaged"),
        ({"maps": {"fp8": {"quantized": {"LAYER": {"absmax": 1.0, "smooth_alpha": 0.5}}}}}, "the entry of layer LAYER"),
        (
            {
                "maps": {"fp8": {"quantized": {"LAYER": {"absmax": 1.0, "smooth_alpha": 0.5}}}},
                "layers": {"LAYER": {"absmax_per_channel": [1.0]}},
            },
            r"the entry of layer LAYER is damaged.*has shape \(1,\); expected",
        ),
    ],
)
def test_damaged_calibration_files(bundle: Path, tmp_path: Path, change: dict[str, Any] | None, said: str) -> None:
    opened = Bundle.open(bundle)
    info = opened.manifest.graphs["fp32"]["inner_step"]
    layer = next(name for name, layer in Graph.load(opened.path(info.file)).layers.items() if layer.wide)
    file = tmp_path / "calib.json"
    if change is not None:
        data = {
            "kind": "arinar calibration",
            "format_version": 1,
            "layers": {},
            "maps": {},
            "settings": {"model": {info.file: opened.manifest.files[info.file].sha256}},
        } | change
        file.write_text(json.dumps(data).replace("LAYER", layer))
    with pytest.raises(ExportError, match=said.replace("LAYER", layer)):
        quantize_bundle(bundle, "fp8", file, name="other")


def test_the_command_adds_a_precision_to_a_bundle(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)

    def run(*words: object) -> Any:
        return CliRunner().invoke(main, ["export", str(folder), *map(str, words)])

    assert run("-o", folder, "--precision", "int8").exit_code == 2  # it is there already
    assert run("-o", folder, "--precision", "int8", "--overwrite").exit_code == 0
    elsewhere = run("-o", tmp_path / "other", "--precision", "int8")
    assert elsewhere.exit_code == 2 and "added to the bundle itself" in elsewhere.stderr
    missing = run("-o", folder, "--precision", "fp8")
    assert missing.exit_code in (1, 2) and "arinar calibrate" in missing.stderr
    unused = CliRunner().invoke(main, ["export", "digits", "-o", str(folder), "--calibration", str(tmp_path / "c.json")])
    assert unused.exit_code == 2 and "fp32 has no use for it" in unused.stderr
    other = CliRunner().invoke(main, ["export", "digits-causal", "-o", str(folder), "--precision", "int8", "--overwrite"])
    assert other.exit_code == 2 and "bundle of another model" in other.stderr


@pytest.mark.requires_rtx
@pytest.mark.parametrize("precision", ["int8-static", "fp8"])
def test_tensorrt_builds_the_graphs(bundle: Path, graphs: dict[str, Graph], precision: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from arinar.export.engine import build_engines

    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    if precision == "fp8":
        layers = {name: layer for graph in graphs.values() for name, layer in graph.layers.items()}
        quantize_bundle(folder, "fp8", plans=default_plans("fp8", layers, dict.fromkeys(layers, RANGE)))
    outcomes = build_engines(
        folder,
        module="tensorrt_rtx",
        precision=precision,
        batch=(1, 2, 4),
        optimization_level=0,
        timeout=300,
        graphs=["outer_step", "inner_condition", "inner_step"],
    )
    assert {o.graph: o.error for o in outcomes if o.state == "failed"} == {} and len(outcomes) == 3
