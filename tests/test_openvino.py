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
    kinds = {name: type(loaded).__module__.split(".")[0] for (name, _), loaded in engine._loaded.items()}
    assert kinds["outer_step"] == kinds["vae_decoder"] == "openvino"
    assert kinds["inner_token_guided"] == kinds["tokens_to_latents"] == "onnxruntime"


@needed
def test_eight_bits_are_refused_with_the_remedy(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from arinar.runtime import Bundle
    from arinar.runtime.bundle import Manifest

    monkeypatch.setattr(Manifest, "scheme", lambda self, precision: "int8")
    with pytest.raises(BundleError, match="8-bit: take backend onnxruntime-cpu"):
        backend.OpenVino(Bundle.open(digits_bundle), "fp32", threads=1)


@needed
@pytest.mark.parametrize("fault", ["none", "wrong"])
def test_products_are_tried_first(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
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
    finally:
        backend.check_bfloat16.cache_clear()


def test_where_it_is_missing_the_extra_is_named(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for choice in ({"backend": "openvino"}, {"precision": "bf16"}):
        with pytest.raises(BundleError, match=r"OpenVINO is not installed; .*openvino"):
            Pipeline.load(digits_bundle, threads=1, **choice)


def test_bf16_is_of_one_backend(digits_bundle: Path) -> None:
    with pytest.raises(BundleError, match="precision bf16 is of backend openvino, not of 'onnxruntime-cpu'"):
        Pipeline.load(digits_bundle, backend="onnxruntime-cpu", precision="bf16")
