"""OpenVINO: what it computes, in which precision, and what it says where it cannot. Skipped where it is not installed, but for
what is said then."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from arinar.config import PRESETS
from arinar.runtime import BundleError, Noise, Pipeline
from arinar.runtime.backends import openvino as backend

MISSING = importlib.util.find_spec("openvino") is None and not os.environ.get("ARINAR_OPENVINO")
needed = pytest.mark.skipif(MISSING, reason="OpenVINO is not installed")
NOISE = Noise.from_seed(1, range(3), PRESETS["digits"])


def bfloat16() -> bool:
    try:
        backend.check_bfloat16()
    except BundleError:
        return False
    return True


@pytest.fixture(scope="module")
def exact(digits_bundle: Path) -> Any:
    return Pipeline.load(digits_bundle, backend="onnxruntime-cpu", threads=1).generate([1, 2, 3], noise=NOISE)


@needed
@pytest.mark.parametrize("threads", [1, 2])
def test_float32_is_float32(digits_bundle: Path, exact: Any, threads: int) -> None:
    pipeline = Pipeline.load(digits_bundle, backend="openvino", threads=threads)
    made = pipeline.generate([1, 2, 3], noise=NOISE)
    assert np.abs(made.tokens - exact.tokens).max() < 1e-4
    again = pipeline.generate([1, 2, 3], noise=NOISE)
    assert np.array_equal(again.tokens, made.tokens)


@needed
def test_bfloat16_is_near_and_not_the_same(digits_bundle: Path, exact: Any) -> None:
    if not bfloat16():
        pytest.skip("this processor has no bfloat16 products")
    pipeline = Pipeline.load(digits_bundle, precision="bf16", threads=1)  # which decides the backend
    assert pipeline.backend.name == "openvino" and pipeline.precision == "bf16"
    made = pipeline.generate([1, 2, 3], noise=NOISE)
    assert 1e-5 < np.abs(made.latents - exact.latents).max() < 0.5
    difference = [
        np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).mean()
        for ours, theirs in zip(made.images, exact.images, strict=True)
    ]
    assert max(difference) < 4


@needed
def test_the_head_stays_with_onnx_runtime(digits_bundle: Path) -> None:
    pipeline = Pipeline.load(digits_bundle, backend="openvino", threads=1)
    pipeline.generate([1], num_iter=2)
    engine: Any = pipeline.backend
    compiled = {name for (name, _), loaded in engine._loaded.items() if isinstance(loaded, backend.Compiled)}
    assert compiled == {"outer_step", "vae_decoder"}
    others = {type(loaded).__module__.split(".")[0] for (name, _), loaded in engine._loaded.items() if name not in compiled}
    assert others == {"onnxruntime"} and ("inner_token_guided", 1) in engine._loaded


@needed
def test_the_folder_stays_as_it_is(digits_bundle: Path) -> None:
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in digits_bundle.rglob("*")}

    before = files()
    Pipeline.load(digits_bundle, backend="openvino", threads=1).generate([1], num_iter=2)
    assert files() == before


@needed
def test_parity_holds_each_graph_to_what_it_is_computed_in(digits_bundle: Path) -> None:
    if not bfloat16():
        pytest.skip("this processor has no bfloat16 products")
    torch = pytest.importorskip("torch")
    from arinar.checkpoint import load_arinar, load_vae
    from arinar.measure.checks import THRESHOLDS
    from arinar.measure.parity import run_parity
    from arinar.measure.parity_report import render

    model, vae = load_arinar("digits"), load_vae("digits")
    pipeline = Pipeline.load(digits_bundle, precision="bf16", threads=1)
    report = run_parity(pipeline, model, vae, labels=[3], num_iter=2)
    assert report.passed, report.table()
    limits = {check.name: check.limit for check in report.checks if check.level == "graph"}
    assert limits["outer_step"] == limits["vae_decoder"] == limits["vae_encoder"] == THRESHOLDS["bf16"].graph
    assert limits["inner_step"] == limits["inner_condition"] == THRESHOLDS["fp32"].graph
    assert limits["inner_token_guided"] == THRESHOLDS["fp32"].token
    assert report.backend == "openvino" and "bf16 on openvino" in render(report)
    with torch.no_grad():  # another model
        model.decoder_norm.weight *= 1.05
    assert not run_parity(pipeline, model, vae, labels=[3], num_iter=2).passed


@needed
def test_eight_bits_are_refused_with_the_remedy(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from arinar.runtime import Bundle
    from arinar.runtime.bundle import Manifest

    monkeypatch.setattr(Manifest, "scheme", lambda self, precision: "int8")
    with pytest.raises(BundleError, match="8-bit: take backend onnxruntime-cpu"):
        backend.OpenVino(Bundle.open(digits_bundle), "fp32", threads=1)


@needed
@pytest.mark.parametrize("fault", ["none", "wrong"])
def test_products_are_tried_first(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    openvino = backend.load_openvino()
    real = openvino.Core

    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32"] if fault == "none" else ["FP32", "BF16"]

        def compile_model(self, model: Any, device: str, settings: Any) -> Any:
            compiled = real().compile_model(model, device, {})
            return lambda given: {0: 0.7 * compiled(given)[0]}

    monkeypatch.setattr(openvino, "Core", Core)
    backend.check_bfloat16.cache_clear()
    try:
        with pytest.raises(BundleError, match="has no bfloat16" if fault == "none" else "30% off on this processor"):
            backend.check_bfloat16()
        # What is listed is what the processor says that it has; whether that is right is tried when it is loaded.
        available = Pipeline.available(digits_bundle)
        assert "openvino" in available["fp32"] and available.get("bf16") == (None if fault == "none" else ["openvino"])
    finally:
        backend.check_bfloat16.cache_clear()


@needed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_failure_names_what_else_runs_the_graph(digits_bundle: Path, precision: str) -> None:
    if precision == "bf16" and not bfloat16():
        pytest.skip("this processor has no bfloat16 products")
    engine: Any = Pipeline.load(digits_bundle, backend="openvino", precision=precision, threads=1).backend
    remedy = {"fp32": "take backend onnxruntime-cpu", "bf16": "take precision fp32, or int8"}[precision]
    with pytest.raises(RuntimeError, match=f"graph 'vae_decoder' did not run in OpenVINO: .*; {remedy}"):
        engine.launch("vae_decoder", {"latents": np.zeros((1, 3), np.float32)}, {})
    engine._core = None
    with pytest.raises(BundleError, match=f"OpenVINO cannot load graph 'outer_step' .*; {remedy}"):
        engine.prepare("outer_step")


def test_where_it_is_missing_the_extra_is_named(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for choice in ({"backend": "openvino"}, {"precision": "bf16"}):
        with pytest.raises(BundleError, match=r"OpenVINO is not installed; .*openvino"):
            Pipeline.load(digits_bundle, threads=1, **choice)
    available = Pipeline.available(digits_bundle)
    assert "openvino" not in available["fp32"] and "bf16" not in available


def test_bf16_is_of_one_backend(digits_bundle: Path) -> None:
    with pytest.raises(BundleError, match="precision bf16 is of backend openvino, not of 'onnxruntime-cpu'"):
        Pipeline.load(digits_bundle, backend="onnxruntime-cpu", precision="bf16")
