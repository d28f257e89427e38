"""The form of the outer step for ONNX Runtime's CUDA kernels: the same function, in a third of the launches."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

import onnx
from fake_gpu import FakeCudaRuntime, fake_onnxruntime
from tiny_bundles import TINY, TINY_CAUSAL, tiny_bundle, tiny_model

from arinar.config import PRESETS
from arinar.export.cuda import finish_cuda_form
from arinar.export.graphs import cuda_forms, graph_specs
from arinar.export.trace import WeightStore, exact_reference, export_graph, validate_graph
from arinar.measure.launches import MAKERS, launches
from arinar.runtime import Bundle, Pipeline
from arinar.runtime.backends.cuda import Cuda
from arinar.runtime.backends.onnxruntime_cuda import SHAPE_ARITHMETIC
from arinar.runtime.bundle import GraphInfo

#: Of a block, and of everything around the blocks.
PER_BLOCK, AROUND = 9, 42


@pytest.fixture(scope="module")
def bundle(shared_folder: Path, torch_onnx_export: object) -> Bundle:
    return Bundle.open(tiny_bundle(shared_folder, TINY))


def plain_and_form(bundle: Bundle) -> tuple[GraphInfo, Any, Any]:
    info = bundle.manifest.graphs["fp16"]["outer_step"]
    paths = bundle.graph_path(info), bundle.graph_path(info, "cuda")
    return info, *(onnx.load(path, load_external_data=False) for path in paths)


def test_a_block_is_nine_launches(bundle: Bundle) -> None:
    """At the published size 294 for 732; more would be a cost that nobody noticed."""
    _, plain, form = plain_and_form(bundle)
    blocks = TINY.encoder_depth + TINY.decoder_depth
    assert launches(form).total() <= AROUND + PER_BLOCK * blocks
    base = PRESETS["base"]
    assert AROUND + PER_BLOCK * (base.encoder_depth + base.decoder_depth) <= 300
    assert launches(plain).total() > 1.5 * launches(form).total()
    kinds = launches(form)
    assert kinds["Attention"] == 3 * (blocks - 1) and kinds["MultiHeadAttention"] == 4
    assert kinds["SkipLayerNormalization"] == 2 * blocks + 1 and kinds["BiasGelu"] == blocks
    assert "Split" not in kinds and "Softmax" not in kinds
    # What attention multiplies by is the plain form's weight as it is stored, turned when a session is made.
    turned = {node.output[0]: node.input[0] for node in form.graph.node if node.op_type == "Transpose"}
    weights = [turned[node.input[1]] for node in form.graph.node if node.op_type == "Attention"]
    stored = {tensor.name: tensor.SerializeToString() for tensor in plain.graph.initializer}
    assert len(weights) == blocks - 1
    assert all(t.SerializeToString() == stored[t.name] for t in form.graph.initializer if t.name in weights)


def test_the_form_is_of_fp16_masked_models_alone(bundle: Bundle) -> None:
    graphs = bundle.manifest.graphs
    assert {name for name, info in graphs["fp16"].items() if info.cuda_file} == {"outer_step"}
    assert not any(info.cuda_file for info in graphs["fp32"].values())
    assert cuda_forms(tiny_model(TINY_CAUSAL)[0]) == {}
    info = graphs["fp16"]["outer_step"]
    assert info.cuda_file in info.files and info.cuda_file in bundle.manifest.files
    assert GraphInfo.from_dict(info.to_dict()) == info
    old = {key: value for key, value in info.to_dict().items() if key != "cuda_file"}
    assert GraphInfo.from_dict(old).cuda_file is None  # a bundle of before
    assert bundle.graph_path(info, "cpu") == bundle.graph_path(info) != bundle.graph_path(info, "cuda")


def test_in_float32_it_is_the_module(tmp_path: Path, torch_onnx_export: object) -> None:
    """Every axis at several sizes, ONNX Runtime's own CPU kernels of the same operators."""
    model, vae = tiny_model(TINY)
    exact, form = graph_specs(model, vae)["outer_step"], cuda_forms(model)["outer_step"]
    store = WeightStore(tmp_path / "weights.data")
    path = export_graph(replace(form, name="outer_step.cuda"), tmp_path, store)
    store.close()
    finish_cuda_form(path)
    assert validate_graph(path, replace(form, atol=1e-5), exact_reference(form, exact)) < 1e-5
    read = {name for node in onnx.load(path).graph.node for name in node.input}
    made = [name for node in onnx.load(path).graph.node if node.domain for name in node.output if name]
    assert all(name in read for name in made)


def test_in_float16_it_is_as_near_as_the_plain_form(bundle: Bundle) -> None:
    import onnxruntime

    info, *_ = plain_and_form(bundle)
    exact = graph_specs(*tiny_model(TINY))["outer_step"]
    sessions = [
        onnxruntime.InferenceSession(str(bundle.graph_path(info, form)), providers=["CPUExecutionProvider"])
        for form in (None, "cuda")
    ]
    for number, sizes in enumerate(exact.sizes):
        feed = exact.example(sizes, seed=number)
        (want,) = exact_reference(exact, exact)(feed)
        plain, form = (np.abs(session.run(None, feed)[0] - want) for session in sessions)
        assert form.mean() < 2 * plain.mean() + 1e-4 and form.max() < 2e-2


def test_the_cuda_backend_runs_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeCudaRuntime()
    module = fake_onnxruntime(runtime)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    arguments: dict[str, Any] = {"guidance_scale": 2.0, "num_iter": 3, "seed": 1}
    pipeline = Pipeline.load(
        bundle.folder, backend="onnxruntime-cuda", precision="fp16", cuda=Cuda(runtime=runtime), verify=False
    )
    have = pipeline.generate([0, 2], **arguments)
    ran = [Path(session.path).name for session in module.sessions]
    assert "outer_step.cuda.onnx" in ran and "outer_step.onnx" not in ran
    assert all(session.settings["sdpa_kernel"] == "19" for session in module.sessions)
    monkeypatch.undo()
    want = Pipeline.load(bundle.folder, backend="onnxruntime-cpu", precision="fp16", verify=False).generate([0, 2], **arguments)
    assert np.isfinite(have.tokens).all() and np.median(np.abs(have.tokens - want.tokens)) < 1e-2


def test_what_makes_sizes_is_known_to_be_shape_arithmetic(bundle: Bundle, shared_folder: Path) -> None:
    """ONNX Runtime leaves it to the CPU; the backend must not warn of it."""
    for folder in (bundle, Bundle.open(tiny_bundle(shared_folder, TINY_CAUSAL))):
        for info in folder.manifest.graphs["fp16"].values():
            model = onnx.load(folder.graph_path(info, "cuda"), load_external_data=False)
            known = {tensor.name for tensor in model.graph.initializer} | {""}
            sizes: set[str] = set()
            for node in model.graph.node:
                if known.issuperset(node.input):
                    known.update(node.output)
                elif node.op_type == "Shape" or (node.op_type not in MAKERS and (known | sizes).issuperset(node.input)):
                    sizes.update(node.output)
                    assert node.op_type in SHAPE_ARITHMETIC, (info.name, node.name)
