"""Our kernels in the GPU runtime, on the fake GPU: what they replace, that they are recorded, what happens without them."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_kernels import requires_compiler
from fake_driver import FakeDriver, FakeNvrtc, KernelLaunch
from fake_gpu import FakeCudaRuntime, fake_onnxruntime, fake_tensorrt, make_engines

from arinar.runtime import Bundle, Pipeline
from arinar.runtime.backends.cuda import Cuda, CudaError
from arinar.runtime.bundle import BundleError

LABELS = [3, 1, 4]
BACKENDS = ("tensorrt", "onnxruntime-cuda")
CALLS: list[dict[str, Any]] = [
    {"labels": LABELS, "seed": 1, "guidance_scale": 2.5, "num_iter": 3},
    {"labels": LABELS, "seed": 2, "guidance_scale": [1.5, 1.0, 4.0], "temperature": [0.8, 1.0, 1.2], "num_iter": 3},
    {"labels": LABELS, "seed": 3, "guidance_scale": 4.0, "num_iter": 3},
    {"labels": LABELS, "seed": 4, "guidance_scale": 1.0, "num_iter": 3},
]


@pytest.fixture
def runtime() -> FakeCudaRuntime:
    runtime = FakeCudaRuntime()
    runtime.driver_api = FakeDriver(runtime)
    return runtime


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> FakeNvrtc:
    fake = FakeNvrtc()
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", fake)
    return fake


@pytest.fixture
def digits(demo_bundle: Any, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(demo_bundle("digits"), tmp_path / "digits"))
    make_engines(Bundle.open(folder))
    return folder


def gpu(
    path: Path, runtime: FakeCudaRuntime, backend: str, monkeypatch: pytest.MonkeyPatch, *, rows: int = 0, **options: Any
) -> Pipeline:
    """``rows``: up to which whole tokens are the kernels'; none: only draws are."""
    for module, name in (("gpu", "CudaBackend"), ("tensorrt", "TensorRt")):
        monkeypatch.setattr(f"arinar.runtime.backends.{module}.{name}.native_rows", rows)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(runtime))
    monkeypatch.setitem(sys.modules, "onnxruntime", fake_onnxruntime(runtime))
    return Pipeline.load(path, backend=backend, cuda=Cuda(runtime=runtime), verify=False, cuda_graphs=True, **options)


@requires_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_are_those_that_the_graphs_draw(
    digits: Path, runtime: FakeCudaRuntime, nvrtc: FakeNvrtc, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm-up, capture, replay, plain: to what the graphs' float32 leaves; and no graph draws."""
    reference = Pipeline.load(digits, backend="onnxruntime-cpu", threads=1, verify=False, inner="stepwise")
    wanted = [reference.generate(**call) for call in CALLS]
    pipeline = gpu(digits, runtime, backend, monkeypatch)
    head: Any = pipeline.loop.head
    assert head.mode == "stepwise" and head.graphs(True) == head.graphs(False) == ["inner_condition", "inner_step"]
    errors = []
    for call, want in zip(CALLS, wanted, strict=True):
        have = pipeline.generate(**call)
        errors.append(float(np.abs(have.tokens - want.tokens).max()))
        assert all(np.abs(np.subtract(a, b, dtype=int)).max() <= 1 for a, b in zip(have.images, want.images, strict=True))
    print(f"{backend}: largest differences of tokens {errors}")
    assert max(errors) < 1e-3


@requires_compiler
@pytest.mark.parametrize("guided", [False, True])
def test_a_draw_is_one_launch(
    digits: Path, runtime: FakeCudaRuntime, nvrtc: FakeNvrtc, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its place in the token and, guided, in both branches: per feature nothing but the step, its cache, and the draw."""
    pipeline = gpu(digits, runtime, "onnxruntime-cuda", monkeypatch)
    pipeline.generate(LABELS, guidance_scale=2.0 if guided else 1.0, num_iter=2)
    config, launches = pipeline.config, runtime.driver_api.launches
    rows = sorted({launch.grid[0] for launch in launches})
    assert len(launches) == 2 * config.token_dim and sum(rows) == config.seq_len * len(LABELS)
    assert set(launches) == {KernelLaunch("mixture_draw", (row, 1, 1), (256, 1, 1), 0) for row in rows}
    names = runtime.names()
    _, second, third, *_ = (place for place, name in enumerate(names) if name == "cuLaunchKernel")
    between = Counter(names[second + 1 : third])
    # Keys and values into their cache; a position that is another slice of its table, to where it was bound.
    assert between == {"cudaMemcpy2DAsync": 2, "cudaMemcpyAsync": 1}


@requires_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_guidance_changed_is_reused_by_a_kernel(
    digits: Path, runtime: FakeCudaRuntime, nvrtc: FakeNvrtc, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm-up, capture, replay, after a plan of the same steps without it: as on the CPU."""
    call: dict[str, Any] = {"labels": LABELS, "guidance_scale": 2.5, "num_iter": 5, "guidance_refresh": 2}
    reference = Pipeline.load(digits, backend="onnxruntime-cpu", threads=1, verify=False, inner="stepwise")
    pipeline = gpu(digits, runtime, backend, monkeypatch)
    pipeline.generate(**(call | {"guidance_refresh": 1}))
    for seed in range(4):
        want, have = reference.generate(**call, seed=seed), pipeline.generate(**call, seed=seed)
        assert np.abs(have.tokens - want.tokens).max() < 1e-3
    assert pipeline.generate(**(call | {"guidance_refresh": 1})).tokens.shape == want.tokens.shape
    assert {launch.name for launch in runtime.driver_api.launches} == {"mixture_draw", "add"}


def test_without_the_kernel_a_reuse_is_refused(
    digits: Path, runtime: FakeCudaRuntime, nvrtc: FakeNvrtc, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.driver_api = None  # an older cuda-python
    pipeline = gpu(digits, runtime, "onnxruntime-cuda", monkeypatch)
    with pytest.raises(BundleError, match="guidance_refresh above 1 needs a kernel that cannot be had here: cuda-python"):
        pipeline.generate(LABELS[:1], num_iter=3, guidance_refresh=2)


FEATURE = ["qkv", "attend", "project", "expand", "contract", "draw"]


@requires_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_by_the_kernels_are_those_of_the_graphs(
    digits: Path, runtime: FakeCudaRuntime, nvrtc: FakeNvrtc, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm-up, capture, replay; steps of few rows by the kernels, of more by the graphs and the draw."""
    call: dict[str, Any] = {"labels": LABELS[:1], "num_iter": 4, "guidance_scale": 2.5}
    reference = Pipeline.load(digits, backend="onnxruntime-cpu", threads=1, verify=False, inner="stepwise")
    wanted = [reference.generate(**call, seed=seed) for seed in range(4)]
    pipeline = gpu(digits, runtime, backend, monkeypatch, rows=4)
    found = []
    for seed, want in enumerate(wanted):
        have = pipeline.generate(**call, seed=seed)
        found.append(len(runtime.driver_api.launches))
        assert np.abs(have.tokens - want.tokens).max() < 1e-3
        assert all(np.abs(np.subtract(a, b, dtype=int)).max() <= 1 for a, b in zip(have.images, want.images, strict=True))
    names = Counter(launch.name.removeprefix("inner_") for launch in runtime.driver_api.launches)
    few = names["qkv"]
    assert few and names["mixture_draw"] and names == {**dict.fromkeys(FEATURE, few), "mixture_draw": names["mixture_draw"]}
    each, most = found[0], 1 + pipeline.backend.warm_up_runs  # type: ignore[attr-defined]
    assert found == [each * min(run, most) for run in range(1, 5)]  # from then on nothing is issued but recordings


@pytest.mark.parametrize("guided", [False, True])
def test_a_feature_is_six_launches(
    digits: Path, runtime: FakeCudaRuntime, nvrtc: FakeNvrtc, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the conditioning and the next outer step nothing else is issued: no copy, no launch of a graph."""
    runtime.driver_api.compute = False  # there are no results then: what is issued does not depend on them
    pipeline = gpu(digits, runtime, "onnxruntime-cuda", monkeypatch, rows=64)
    pipeline.generate(LABELS[:1], guidance_scale=2.0 if guided else 1.0, num_iter=4)
    names = [launch.name.removeprefix("inner_") for launch in runtime.driver_api.launches]
    assert names == FEATURE * pipeline.config.token_dim * 4
    calls = runtime.names()
    first = calls.index("cuLaunchKernel")
    launches = len(FEATURE) * pipeline.config.token_dim
    assert calls[first : first + launches] == ["cuLaunchKernel"] * launches


def test_weights_that_cannot_be_read_leave_the_draw(
    digits: Path, runtime: FakeCudaRuntime, nvrtc: FakeNvrtc, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.driver_api.compute = False
    monkeypatch.setattr("arinar.runtime.kernels.weights.Graph.products", lambda graph: [])
    with pytest.warns(RuntimeWarning, match=r"features are computed by graphs, which is slower: inner_step.onnx has other"):
        pipeline = gpu(digits, runtime, "tensorrt", monkeypatch, rows=64)
    head: Any = pipeline.loop.head
    assert head.native is not None and head.token is None and head.mode == "stepwise"


def test_models_whose_shape_the_kernels_lack_have_the_draw(
    digits: Path, runtime: FakeCudaRuntime, nvrtc: FakeNvrtc, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.driver_api.compute = False
    monkeypatch.setattr("arinar.runtime.kernels.inner.MOST_FEATURES", 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head: Any = gpu(digits, runtime, "tensorrt", monkeypatch, rows=64).loop.head
    assert head.native is not None and head.token is None


@requires_compiler
def test_draws_are_recorded_with_the_step(
    digits: Path, runtime: FakeCudaRuntime, nvrtc: FakeNvrtc, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = gpu(digits, runtime, "tensorrt", monkeypatch)
    images = []
    for _ in range(4):
        start = len(runtime.log)
        images.append(pipeline.generate(LABELS, seed=7, num_iter=2).tokens)
    assert all(np.array_equal(images[0], other) for other in images[1:])
    names = [call[0] for call in runtime.log[start:]]
    assert "cuLaunchKernel" not in names and names.count("cudaGraphLaunch") == 3
    assert nvrtc.programs == 1 and len(runtime.driver_api.images) == 1


def test_fused_is_still_to_be_had(
    digits: Path, runtime: FakeCudaRuntime, nvrtc: FakeNvrtc, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = gpu(digits, runtime, "tensorrt", monkeypatch, inner="fused")
    pipeline.generate(LABELS, num_iter=1)
    assert pipeline.loop.head.mode == "fused" and not runtime.driver_api.launches and not nvrtc.programs


@pytest.mark.parametrize("trouble", ["no compiler", "an unknown GPU", "the driver refuses"])
@pytest.mark.parametrize("inner", [None, "stepwise"])
def test_without_the_kernel_the_graphs_draw_and_one_warning_says_so(
    digits: Path, runtime: FakeCudaRuntime, nvrtc: FakeNvrtc, trouble: str, inner: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = Pipeline.load(digits, backend="onnxruntime-cpu", threads=1, verify=False).generate(LABELS, seed=5, num_iter=2)
    if trouble == "no compiler":
        monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
        message = r"drawn by graphs, which is slower: .*NVRTC cannot be loaded.*pip install '\.\[gpu\]'"
    elif trouble == "an unknown GPU":
        nvrtc.architectures = [80]
        message = "NVRTC 13.5 compiles for sm_80, this GPU is sm_90"
    else:
        monkeypatch.setattr(runtime.driver_api, "cuModuleLoadData", lambda image: (209, None))
        message = "cuModuleLoadData failed: CUDA_ERROR_NO_BINARY_FOR_GPU"
    with pytest.warns(RuntimeWarning, match=message) as said:
        pipeline = gpu(digits, runtime, "tensorrt", monkeypatch, inner=inner)
    assert len(said) == 1 and pipeline.loop.head.mode == (inner or "fused")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        have = pipeline.generate(LABELS, seed=5, num_iter=2)
    assert np.abs(have.tokens - want.tokens).max() < 1e-3 and not runtime.driver_api.launches


@requires_compiler
def test_a_bundle_that_cannot_be_written_to(
    digits: Path, runtime: FakeCudaRuntime, nvrtc: FakeNvrtc, monkeypatch: pytest.MonkeyPatch
) -> None:
    (digits / "engines" / "kernels").touch()
    with pytest.warns(RuntimeWarning, match="the compiled kernels are not kept"):
        pipeline = gpu(digits, runtime, "tensorrt", monkeypatch)
    pipeline.generate(LABELS, num_iter=1)
    assert runtime.driver_api.launches


def test_mixtures_too_large_for_the_kernel(
    digits: Path, runtime: FakeCudaRuntime, nvrtc: FakeNvrtc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arinar.runtime.kernels.draw.MOST_GAUSSIANS", 1)
    with pytest.warns(RuntimeWarning, match=r"at most 1 Gaussians, this model's mixtures have \d+"):
        pipeline = gpu(digits, runtime, "tensorrt", monkeypatch)
    assert pipeline.loop.head.mode == "fused"


def test_a_launch_that_fails_is_an_error_that_names_it(
    digits: Path, runtime: FakeCudaRuntime, nvrtc: FakeNvrtc, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.driver_api.compute = False
    pipeline = gpu(digits, runtime, "tensorrt", monkeypatch)
    monkeypatch.setattr(runtime.driver_api, "cuLaunchKernel", lambda *args: (209,))
    with pytest.raises(CudaError, match="cuLaunchKernel failed: CUDA_ERROR_NO_BINARY_FOR_GPU"):
        pipeline.generate(LABELS, num_iter=1)


def test_the_real_bindings_take_our_arguments() -> None:
    """Without a driver every call fails; what it must not do is refuse its arguments (TypeError)."""
    real = pytest.importorskip("cuda.bindings.runtime")
    if real.cudaGetDeviceCount()[0] == real.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU: the calls would do something")
    cuda = Cuda.__new__(Cuda)
    cuda.runtime, cuda.stream = real, 7001
    monkey = FakeCudaRuntime()
    buffer = Cuda(runtime=monkey).empty((4,), "float32")
    for arguments in ([buffer, None, 3, 2.5], []):
        with pytest.raises(RuntimeError):
            cuda.launch_kernel(cuda.driver.CUfunction(0), (1, 1, 1), (32, 1, 1), arguments)
    with pytest.raises(RuntimeError):
        cuda.call_driver("cuModuleLoadData", b"code")
    with pytest.raises(RuntimeError):
        cuda.call_driver("cuModuleGetFunction", cuda.driver.CUmodule(0), b"name")
