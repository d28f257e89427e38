"""The first step on a GPU: by class, computed once, by a graph that has no tensors without elements."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from fake_gpu import FakeCudaRuntime, fake_onnxruntime, fake_tensorrt
from tiny_bundles import TINY, tiny_with_engines

import arinar.runtime.first_step as first_step
from arinar.export.folder import write_manifest
from arinar.runtime import Bundle, Pipeline
from arinar.runtime.backends.cuda import Cuda
from arinar.runtime.outer import MaskedOuter

KEYS: list[Any] = [(0, (0, 0, 0), (0.0, 0.0, 0.0)), (-1, (0, 0, 0), (0.0, 0.0, 0.0)), (2, (1, 0, 0), (0.25, 0.5, 0.0))]
BACKENDS = ["onnxruntime-cuda", "tensorrt"]


@pytest.fixture(scope="module")
def folder(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory, torch_onnx_export: object) -> Path:
    return tiny_with_engines(shared_folder, tmp_path_factory.mktemp("first") / "tiny")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeCudaRuntime:
    runtime = FakeCudaRuntime()
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(runtime))
    return runtime


def gpu(path: Path, runtime: FakeCudaRuntime, backend: str, **options: Any) -> Pipeline:
    with pytest.MonkeyPatch.context() as patch:
        if backend == "onnxruntime-cuda":
            patch.setitem(sys.modules, "onnxruntime", fake_onnxruntime(runtime))
        return Pipeline.load(path, backend=backend, precision="fp32", cuda=Cuda(runtime=runtime), verify=False, **options)


def launches_of(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    seen: list[tuple[str, dict[str, Any]]] = []
    launch = pipeline.backend.launch

    def spy(graph: str, inputs: Any, outputs: Any, rows: Any = None) -> None:
        seen.append((graph, {name: buffer.shape for name, buffer in inputs.items()}))
        launch(graph, inputs, outputs, rows)

    monkeypatch.setattr(pipeline.backend, "launch", spy)
    return seen


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_is_the_step_in_which_nothing_is_visible(folder: Path, precision: str) -> None:
    outer = Pipeline.load(folder, precision=precision, backend="onnxruntime-cpu", verify=False).loop.outer
    assert isinstance(outer, MaskedOuter) and not outer.first.has_graph  # on a CPU the step itself computes it
    by_step, by_graph = outer.first.by_step(KEYS), outer.first.by_graph(KEYS)
    for key in KEYS:
        assert by_graph[key].shape == (TINY.seq_len, TINY.z_width)
        assert np.abs(by_step[key] - by_graph[key]).max() < (1e-5 if precision == "fp32" else 2e-2)
    assert np.abs(by_graph[KEYS[0]] - by_graph[KEYS[1]]).max() > 1e-2  # classes differ


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gpu_sees_no_step_without_visible_tokens(
    folder: Path, runtime: FakeCudaRuntime, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = gpu(folder, runtime, backend, cuda_graphs=False)
    seen = launches_of(pipeline, monkeypatch)
    calls = [[0, 1], [2, 1], [1, {0: 1, 2: 1}], [0, 0]]
    for seed, labels in enumerate(calls):
        pipeline.generate(labels, seed=seed, num_iter=4, guidance_scale=2.0)
    steps = [shapes for graph, shapes in seen if graph == "outer_step"]
    assert len(steps) == 3 * len(calls) and all(shapes["visible_tokens"][0] > 0 for shapes in steps)
    firsts = [shapes for graph, shapes in seen if graph == "outer_first"]
    # Three classes, the unconditional vector, one mixture: each once.
    assert len(firsts) == 5 and all(0 not in shape for shapes in firsts for shape in shapes.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_recordings_serve_other_labels(folder: Path, runtime: FakeCudaRuntime, backend: str) -> None:
    """z of the first step is data, as labels are: what is recorded once gives every call its own."""
    pipeline, reference = gpu(folder, runtime, backend, cuda_graphs=True), gpu(folder, runtime, backend, cuda_graphs=False)
    for seed, labels in enumerate([[0, 1], [2, 2], [1, 0], [2, 0], [0, 1]]):
        arguments: dict[str, Any] = {"seed": seed, "num_iter": 3, "guidance_scale": 1.0 + seed}
        if seed == 0:
            arguments["guidance_scale"] = 2.0
        have, want = (p.generate(labels, **arguments) for p in (pipeline, reference))
        assert np.array_equal(have.tokens, want.tokens)
    assert runtime.graphs
    known = gpu(folder, runtime, backend, cuda_graphs=True)
    assert np.array_equal(
        known.generate([1, 2], seed=9, num_iter=3).tokens, pipeline.generate([1, 2], seed=9, num_iter=3).tokens
    )


def test_as_many_classes_are_kept_as_there_is_room_for(
    folder: Path, runtime: FakeCudaRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_step, "KEPT_BESIDE_A_GPU", 2)
    pipeline = gpu(folder, runtime, "tensorrt")
    seen = launches_of(pipeline, monkeypatch)
    for label in (0, 1, 0, 1, 2, 0):
        pipeline.generate([label], num_iter=2, guidance_scale=1.0)
    assert Counter(graph for graph, _ in seen)["outer_first"] == 4
    outer = pipeline.loop.outer
    assert isinstance(outer, MaskedOuter) and len(outer.first.kept) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bundle_without_that_graph_runs_as_ever(
    folder: Path, tmp_path: Path, runtime: FakeCudaRuntime, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Path(shutil.copytree(folder, tmp_path / "old"))
    manifest = Bundle.open(old).manifest
    graphs = {
        precision: {name: info for name, info in infos.items() if info.phase != "first"}
        for precision, infos in manifest.graphs.items()
    }
    write_manifest(old, replace(manifest, graphs=graphs))
    pipeline = gpu(old, runtime, backend)
    seen = launches_of(pipeline, monkeypatch)
    have = pipeline.generate([1, 2], seed=3, num_iter=3).tokens
    assert next(shapes["visible_tokens"][0] for graph, shapes in seen if graph == "outer_step") == 0
    assert np.abs(have - gpu(folder, runtime, backend).generate([1, 2], seed=3, num_iter=3).tokens).max() < 1e-3
