"""Half precision: what is float16 and what is not, how far it is from float32, and what it leaves alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from tiny_bundles import TINY, TINY_CAUSAL, tiny_bundle, tiny_model

from arinar.calibration.activations import measure_activations
from arinar.config import ArinarConfig
from arinar.export.bundle import export_bundle, weights_sha256
from arinar.export.folder import merge
from arinar.export.gmm_head import float32_islands
from arinar.export.graphs import graph_specs
from arinar.export.steps import half_precision, half_precision_vae
from arinar.export.trace import WeightStore, exact_reference, run_module
from arinar.measure.checks import THRESHOLDS
from arinar.measure.parity import run_parity
from arinar.runtime import Bundle, BundleError, Pipeline

both = pytest.mark.parametrize("config", [TINY, TINY_CAUSAL], ids=["masked", "causal"])


@both
def test_the_copy_is_half_but_for_its_float32_islands(config: ArinarConfig) -> None:
    model, _ = tiny_model(config)
    before = weights_sha256(model)
    half = half_precision(model, float32_islands)
    assert weights_sha256(model) == before
    assert all(p.dtype == torch.float32 for p in model.parameters())
    for name, value in half.state_dict().items():
        island = "norm" in name or name.endswith(("z_proj_ln.weight", "z_proj_ln.bias")) or name.startswith("arhead.head.")
        assert value.dtype == (torch.float32 if island else torch.float16), name
        if island:
            torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=0)


def test_weights_beyond_float16_are_refused() -> None:
    model, _ = tiny_model(TINY)
    with torch.no_grad():
        model.arhead.cond_proj.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"'arhead.cond_proj.weight' holds values beyond float16"):
        half_precision(model, float32_islands)


@both
def test_what_the_graphs_exchange(config: ArinarConfig, shared_folder: Path) -> None:
    """Tokens, z, mixture parameters and noise in float32; caches and what goes from condition to step in float16."""
    graphs = Bundle.open(tiny_bundle(shared_folder, config)).manifest.graphs["fp16"]
    half = ("past_key_values.", "present.", "start", "modulation")
    for graph in graphs.values():
        for tensor in (*graph.inputs, *graph.outputs):
            if np.dtype(tensor.dtype).kind == "f":
                assert tensor.dtype == ("float16" if tensor.name.startswith(half) else "float32"), (graph.name, tensor)


@both
def test_products_run_in_half_and_islands_in_single(config: ArinarConfig, shared_folder: Path) -> None:
    folder = tiny_bundle(shared_folder, config) / "graphs" / "fp16"
    for name in ("outer_step", "inner_step"):
        model = onnx.shape_inference.infer_shapes(onnx.load(folder / f"{name}.onnx"))
        known = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.value_info, *model.graph.output]}
        known |= {t.name: t.data_type for t in model.graph.initializer}
        kinds: dict[str, set[int]] = {}
        for node in model.graph.node:
            kinds.setdefault(node.op_type, set()).add(known[node.output[0]])
        assert TensorProto.FLOAT16 in kinds["MatMul"] | kinds.get("Gemm", set())
        assert kinds["Softmax"] == {TensorProto.FLOAT}
        assert kinds["LayerNormalization"] == {TensorProto.FLOAT}


@both
def test_half_graphs_are_within_the_thresholds(config: ArinarConfig, shared_folder: Path) -> None:
    model, vae = tiny_model(config)
    pipeline = Pipeline.load(tiny_bundle(shared_folder, config), precision="fp16")
    report = run_parity(pipeline, model, vae, labels=[0, 1, 2], guidance_scale=2.0)
    assert report.passed, report.table()
    # Not by being float32 after all: float16 keeps 11 bits.
    worst = {check.name: check.value for check in report.checks if check.level == "teacher-forced"}
    assert 1e-5 < worst["z"] <= THRESHOLDS["fp16"].z
    assert Pipeline.load(tiny_bundle(shared_folder, config)).precision == "fp32"  # side by side


@both
def test_both_inner_modes_run_in_half(config: ArinarConfig, shared_folder: Path) -> None:
    bundle = tiny_bundle(shared_folder, config)
    exact = Pipeline.load(bundle, precision="fp32").generate([0, 1, 2], guidance_scale=2.0)
    for inner in ("fused", "stepwise"):
        out = Pipeline.load(bundle, precision="fp16", inner=inner).generate([0, 1, 2], guidance_scale=2.0)
        assert np.median(np.abs(out.tokens - exact.tokens)) < 1e-2


@both
def test_the_vae_stays_float32_and_is_stored_once(config: ArinarConfig, shared_folder: Path) -> None:
    bundle = Bundle.open(tiny_bundle(shared_folder, config))
    graphs = bundle.manifest.graphs
    for name in ("vae_decoder", "vae_encoder"):
        assert graphs["fp16"][name] == graphs["fp32"][name]
        assert graphs["fp16"][name].file.startswith("graphs/fp32/")
    assert not (bundle.folder / "graphs" / "fp16" / "vae_decoder.onnx").exists()
    bundle.verify()


def test_half_alone_with_its_vae_in_half(shared_folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    export_bundle(*tiny_model(TINY_CAUSAL), alone, precision="fp16", vae_precision="fp16")
    graphs = Bundle.open(alone).manifest.graphs
    assert list(graphs) == ["fp16"] and graphs["fp16"]["vae_decoder"].file == "graphs/fp16/vae_decoder.onnx"
    assert len(Pipeline.load(alone).generate([0]).images) == 1
    half, whole = (folder / "graphs" for folder in (alone, tiny_bundle(shared_folder, TINY_CAUSAL)))
    assert (half / "fp16/weights.data").stat().st_size < (whole / "fp32/weights.data").stat().st_size * 0.7


def test_another_vae_is_another_bundle(shared_folder: Path) -> None:
    model, _ = tiny_model(TINY)
    other = tiny_model(TINY, seed=1)[1]
    with pytest.raises(BundleError, match="is a bundle of another model"):
        export_bundle(model, other, tiny_bundle(shared_folder, TINY), precision="fp16")


def test_replacing_a_graph_that_others_share(shared_folder: Path) -> None:
    old = Bundle.open(tiny_bundle(shared_folder, TINY)).manifest
    again = {name: replace(info, opset=21) for name, info in old.graphs["fp32"].items()}
    new = replace(old, graphs={"fp32": again}, files={n: f for n, f in old.files.items() if "/fp32/" in n})
    merged = merge(old, new)
    assert merged.graphs["fp16"]["vae_decoder"].opset == 21 and merged.graphs["fp16"]["outer_step"].opset == 20
    assert old.graphs["fp16"]["vae_decoder"].opset == 20
    assert merged.files == old.files


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vae_precision is 'int8'; choose one of fp32, fp16"):
        export_bundle(*tiny_model(TINY), tmp_path / "b", precision="fp16", vae_precision="int8")
    with pytest.raises(ValueError, match="vae_precision fp16 belongs to an fp16 variant"):
        export_bundle(*tiny_model(TINY), tmp_path / "b", vae_precision="fp16")
    assert not (tmp_path / "b").exists()


def test_a_half_vae_is_close_and_leaves_the_original_alone() -> None:
    model, vae = tiny_model(TINY)
    before = weights_sha256(vae)
    half = graph_specs(model, half_precision_vae(vae))
    exact = graph_specs(model, vae)
    assert weights_sha256(vae) == before
    spec = half["vae_decoder"]
    feed = spec.example({"B": 2})
    (want,) = exact_reference(spec, exact["vae_decoder"])(feed)
    (have,) = run_module(spec, feed)
    assert np.abs(want.astype(int) - have.astype(int)).max() <= 2


@both
def test_activations_are_watched_at_every_step(config: ArinarConfig, shared_folder: Path) -> None:
    bundle = Bundle.open(tiny_bundle(shared_folder, config))
    report = measure_activations(bundle, [0, 1, 2], precision="fp16")
    rows = bundle.manifest.defaults.num_iter if config.outer == "masked" else config.seq_len - 1
    assert report.peaks["outer_step"].launches == rows
    for name in ("outer_step", "inner_condition", "inner_step", "vae_decoder"):
        peak = report.peaks[name]
        assert 0 < peak.value < (1000 if name == "vae_decoder" else 100) and peak.beyond == 0, (name, peak)
        assert peak.headroom == pytest.approx(65504 / peak.value)
    assert "float16 room" in report.table()
    # The float32 graphs show what the islands are for: the scores' mask lies near the edge of float16.
    assert measure_activations(bundle, [0], precision="fp32").peaks["inner_step"].value > 2e4


@pytest.mark.parametrize("name", ["digits", "digits-causal"])
def test_trained_models_overflow_nowhere(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from arinar.checkpoint import load_arinar, load_vae

    fixture = {"digits": "digits_bundle", "digits-causal": "causal_bundle"}[name]
    bundle = Path(shutil.copytree(request.getfixturevalue(fixture), tmp_path / "bundle"))
    export_bundle(load_arinar(name), load_vae(name), bundle, precision="fp16")
    report = measure_activations(Bundle.open(bundle), [i % 10 for i in range(20)], precision="fp16")
    for graph, peak in report.peaks.items():
        if not graph.startswith("mixture_sample"):  # float32 by design
            assert peak.beyond == 0 and peak.headroom > 50, report.table()


def test_equal_bytes_of_different_types_are_stored_twice(tmp_path: Path) -> None:
    """A parser that tells weights by their address would see one tensor of two sizes."""
    store = WeightStore(tmp_path / "weights.data")
    zeros = bytes(3072)
    places = [store.add(zeros, kind) for kind in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.FLOAT)]
    store.close()
    assert places[0] == places[2] != places[1]
