"""What must not fail a first run on an unknown GPU machine for reasons of our own, and what is said where it fails."""

from __future__ import annotations

import gc
import re
import sys
import threading
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from fake_gpu import FakeContext, FakeCudaRuntime, FakeEngine, fake_onnxruntime, fake_tensorrt
from tiny_bundles import TINY, tiny_with_engines

import arinar.runtime.backends as backends_module
from arinar.export.engine import axis_ranges
from arinar.runtime import Bundle, BundleError, Pipeline
from arinar.runtime.backends import onnxruntime_cuda
from arinar.runtime.backends.cuda import Cuda, CudaError, NoGpuError, device_info

LABELS = [0, 2]


@pytest.fixture
def runtime() -> FakeCudaRuntime:
    return FakeCudaRuntime()


@pytest.fixture
def ort(runtime: FakeCudaRuntime, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = fake_onnxruntime(runtime)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    return module


@pytest.fixture(scope="module")
def folder(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory, torch_onnx_export: object) -> Path:
    """A tiny bundle, with engines beside it."""
    return tiny_with_engines(shared_folder, tmp_path_factory.mktemp("first") / "tiny")


@pytest.fixture
def trt(runtime: FakeCudaRuntime, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = fake_tensorrt(runtime)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def gpu(path: Path, runtime: FakeCudaRuntime, backend: str, **options: Any) -> Pipeline:
    return Pipeline.load(path, backend=backend, precision="fp32", cuda=Cuda(runtime=runtime), verify=False, **options)


# ---------------------------------------------------------------------------------------------------------- capture


@pytest.mark.parametrize(("backend", "warm_up"), [("onnxruntime-cuda", 2), ("tensorrt", 1)])
def test_a_library_runs_as_often_as_it_needs_before_a_capture(
    folder: Path, runtime: FakeCudaRuntime, ort: Any, trt: Any, backend: str, warm_up: int
) -> None:
    """ONNX Runtime allocates in its second run of a shape (the fake refuses a capture of it), and less without its plan."""
    pipeline = gpu(folder, runtime, backend, cuda_graphs=True)
    captures = []
    for seed in range(4):
        before = runtime.names().count("cudaStreamBeginCapture")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipeline.generate(LABELS, seed=seed, num_iter=2)
        captures.append(runtime.names().count("cudaStreamBeginCapture") - before)
    assert [count > 0 for count in captures] == [run == warm_up for run in range(4)]
    assert all(session.options.enable_mem_pattern is False for session in ort.sessions)
    if backend == "onnxruntime-cuda":
        gpu(folder, runtime, backend).generate(LABELS, num_iter=2)
        assert ort.sessions[-1].options.enable_mem_pattern  # where nothing is captured it may plan


def test_no_garbage_is_collected_during_a_capture(runtime: FakeCudaRuntime) -> None:
    """It might free a buffer of another device object, which the capturing thread must not (the fake refuses it)."""
    ours, other = Cuda(runtime=runtime), Cuda(runtime=runtime)
    cycle: dict[str, Any] = {"buffer": other.empty((4,), "float32")}
    cycle["itself"] = cycle
    before = gc.get_threshold()
    try:
        gc.set_threshold(1)
        ours.begin_capture()
        del cycle
        kept = [[number] for number in range(1000)]
        assert "cudaFree" not in runtime.names() and kept
        other_thread = Cuda(runtime=FakeCudaRuntime())
        other_thread.begin_capture()
        ours.end_capture()
        assert not gc.isenabled()  # one capture is left
        other_thread.abandon_capture()
    finally:
        gc.set_threshold(*before)
    assert gc.isenabled()
    gc.collect()
    assert "cudaFree" in runtime.names()


def test_pinned_memory_of_runs_without_a_wait_is_released(
    folder: Path, runtime: FakeCudaRuntime, ort: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_cuda, "RELEASE_EVERY", 4)
    pipeline = gpu(folder, runtime, "onnxruntime-cuda")
    for seed in range(2):
        pipeline.generate(LABELS, seed=seed, num_iter=4)
    runs = pipeline.backend._runs  # type: ignore[attr-defined]
    assert ort.waits == sum(count // 4 for count in runs.values()) > 0


# -------------------------------------------------------------------------------------------------- addresses, memory


def test_empty_tensors_have_addresses_of_their_own(folder: Path, runtime: FakeCudaRuntime, trt: Any) -> None:
    """At the first step of a single one nothing is visible and nothing stays hidden: three tensors without elements."""
    pipeline = gpu(folder, runtime, "tensorrt")
    pipeline.loop.outer.keep_first_step = False  # type: ignore[union-attr]
    pipeline.generate(LABELS, num_iter=1)  # the fake refuses one address for two tensors
    (context,) = trt.engines["outer_step"].contexts
    empty = [name for name, shape in context.shapes.items() if 0 in shape]
    assert len(empty) == 3 and len({context.addresses[name] for name in empty}) == 3


def test_an_unknown_size_of_scratch_memory_is_a_failure(
    folder: Path, runtime: FakeCudaRuntime, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(context: FakeContext) -> int:
        context.engine.logger.log("error", "shapes are not set")
        return 0

    monkeypatch.setattr(FakeContext, "update_device_memory_size_for_shapes", refuse)
    with pytest.raises(CudaError, match=r"no size of scratch memory for the shapes .*tensorrt says: shapes are not set"):
        gpu(folder, runtime, "tensorrt").generate(LABELS)


def test_each_step_runs_in_a_profile_that_admits_it(
    folder: Path, runtime: FakeCudaRuntime, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines of masked models have several, by bands of visible tokens."""
    bands = [axes["V"] for axes in axis_ranges(TINY, (1, 2, 4), 4, 4, least_visible=1)]
    assert len(bands) == 4

    def shapes(engine: FakeEngine, name: str, profile: int) -> list[tuple[int, ...]]:
        axes = engine._tensor(name).shape
        low, _, high = bands[profile]
        least = tuple(size if isinstance(size, int) else low if size == "V" else 0 for size in axes)
        most = tuple(size if isinstance(size, int) else high if size == "V" else 2**20 for size in axes)
        return [least, least, most]

    want = gpu(folder, runtime, "tensorrt").generate(LABELS, num_iter=8).tokens
    monkeypatch.setattr(FakeEngine, "num_optimization_profiles", 4)
    monkeypatch.setattr(FakeEngine, "get_tensor_profile_shape", shapes)
    pipeline = gpu(folder, runtime, "tensorrt")
    for _ in range(3):
        assert np.array_equal(pipeline.generate(LABELS, num_iter=8).tokens, want)
    assert {context.profile for context in trt.engines["outer_step"].contexts} == {0, 1, 2, 3}

    def refuse(context: FakeContext, index: int, stream: int) -> bool:
        raise RuntimeError("profile index out of range")

    monkeypatch.setattr(FakeContext, "set_optimization_profile_async", refuse)
    with pytest.raises(CudaError, match=r"graph 'outer_step': profile \d was refused \(profile index out of range\)"):
        gpu(folder, runtime, "tensorrt").generate(LABELS, num_iter=8)


# --------------------------------------------------------------------------------------------------- which device


@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "tensorrt"])
def test_whatever_a_thread_calls_first_makes_the_device_its_own(
    folder: Path, runtime: FakeCudaRuntime, ort: Any, trt: Any, backend: str
) -> None:
    runtime.devices = 2
    opened = Pipeline.load(folder, backend=backend, precision="fp32", cuda=Cuda(1, runtime), verify=False).backend
    buffer, other = opened.empty((2, 4, 3, 2), "float32"), opened.empty((2, 4, 3, 2), "float32")
    rows = opened.empty((2, 4, 1, 2), "float32")
    first: list[Callable[[], Any]] = [
        lambda: opened.prepare("inner_token_guided"),
        lambda: opened.write_slots(rows, buffer, 0),
        lambda: opened.copy(buffer, other),
        lambda: opened.mark(),
        lambda: opened.clear(buffer),
    ]
    for call in first:
        start = len(runtime.log)
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        assert runtime.log[start:][0] == ("cudaSetDevice", 1)


def test_the_backend_is_chosen_for_the_device_that_is_asked_for(
    folder: Path, runtime: FakeCudaRuntime, ort: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.devices = 2
    asked: list[int] = []
    properties = runtime.cudaGetDeviceProperties
    monkeypatch.setattr(runtime, "cudaGetDeviceProperties", lambda device: asked.append(device) or properties(device))
    monkeypatch.setattr("arinar.runtime.backends.cuda.load_runtime", lambda: runtime)
    assert backends_module.choose_backend(Bundle.open(folder), "fp32", device=1) != "onnxruntime-cpu"
    assert set(asked) == {1}
    with pytest.raises(BundleError, match=r"device=2 asks for a GPU, and none .*device is 2; this machine has GPUs 0\.\.1"):
        Pipeline.load(folder, device=2, verify=False)


# --------------------------------------------------------------------------------------------------- what is said


def test_nodes_on_the_cpu_are_counted_and_named(folder: Path, runtime: FakeCudaRuntime, ort: Any) -> None:
    ort.on_the_cpu = ["Pad", "ReduceMax", "Pad"]
    pipeline = gpu(folder, runtime, "onnxruntime-cuda", cuda_graphs=True)
    with pytest.warns(RuntimeWarning) as told:
        for seed in range(4):
            pipeline.generate(LABELS, seed=seed, num_iter=2)
    wanted = r"3 nodes of graph 'outer_step' run on the CPU, .*: 2 Pad, 1 ReduceMax\. `pip"
    assert sum(bool(re.search(wanted, str(warning.message))) for warning in told) == 1
    assert not runtime.graphs  # the CPU's part would not be in a recording
    described = pipeline.backend.describe()
    assert described["cpu_nodes"]["outer_step"] == {"Pad": 2, "ReduceMax": 1}
    ort.on_the_cpu = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean = gpu(folder, runtime, "onnxruntime-cuda")
        clean.generate(LABELS, num_iter=2)
    assert "cpu_nodes" not in clean.backend.describe()


def test_the_real_library_tells_which_nodes_are_where(folder: Path) -> None:
    """By the names that the backend relies on."""
    import onnxruntime

    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip("this ONNX Runtime has no record of it")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    bundle = Bundle.open(folder)
    path = bundle.graph_path(bundle.manifest.precision_graphs("fp32")["outer_step"])
    backend = onnxruntime_cuda.OnnxRuntimeCuda.__new__(onnxruntime_cuda.OnnxRuntimeCuda)
    backend.cpu_nodes = {}
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)
    with pytest.warns(RuntimeWarning, match="run on the CPU"):
        backend._look_for_cpu_nodes("outer_step", session)
    assert {"MatMul", "Softmax", "LayerNormalization"} <= set(backend.cpu_nodes["outer_step"])


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("CUDA failure 2: out of memory", r"out of memory.*--batch-size"),
        (
            "CUDA failure 35: CUDA driver version is insufficient",
            r"driver version is insufficient; the driver supports CUDA 13.0",
        ),
        (
            "CUDA failure 209: no kernel image is available for execution on the device",
            r"has no code for this GPU \(Fake H200, compute capability 9.0; 1.31 has it for 7.5, .*\): use backend tensorrt",
        ),
        ("Unknown provider option: has_user_compute_stream", r"Unknown provider option.*see whether driver .*onnxruntime-gpu"),
        ("Protobuf parsing failed", r"Protobuf parsing failed; export the model again"),
    ],
)
def test_a_session_that_fails_on_the_gpu_tells_why(
    folder: Path, runtime: FakeCudaRuntime, ort: Any, reason: str, message: str
) -> None:
    """Not that a library is missing: with its fallback on, ONNX Runtime would print the reason and use the CPU."""
    ort.refuses = reason
    with pytest.raises(CudaError, match=message):
        gpu(folder, runtime, "onnxruntime-cuda").generate(LABELS)


def test_what_it_prints_is_told_where_a_library_is_missing(
    folder: Path, runtime: FakeCudaRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fake_onnxruntime(runtime, ["CPUExecutionProvider"])
    made = module.InferenceSession

    class Talking(made):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            print("libcublasLt.so.13: cannot open shared object file")
            super().__init__(*args, **options)

    module.InferenceSession = Talking
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    with pytest.raises(BundleError, match=r"not on the GPU.*It printed: libcublasLt.so.13: cannot open.*nvidia-cublas"):
        gpu(folder, runtime, "onnxruntime-cuda").generate(LABELS)


def test_cuda_bindings_that_raise_without_a_driver() -> None:
    """Those before 12.9 do, in place of an error code."""
    runtime = FakeCudaRuntime()

    def missing() -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    runtime.__dict__["cudaDriverGetVersion"] = missing
    with pytest.raises(NoGpuError, match=r"no NVIDIA driver was found .*Failed to dlopen libcuda.so.1"):
        device_info(runtime)


def test_error_codes_that_the_bindings_do_not_know(runtime: FakeCudaRuntime) -> None:
    cuda = Cuda(runtime=runtime)

    def newer(*args: Any) -> Any:
        raise ValueError("99999 is not a valid cudaError_t")

    runtime.__dict__["cudaMemGetInfo"] = newer
    with pytest.raises(CudaError, match=r"cudaMemGetInfo failed .*cuda-bindings does not know: 99999"):
        cuda.call("cudaMemGetInfo")


def test_the_extras_ask_for_versions_that_work() -> None:
    """Reasons are beside them in setup.py; of the wheel's own metadata nothing but names would be left."""
    setup = Path(__file__).resolve().parent.parent / "setup.py"
    if not setup.is_file():
        pytest.skip("no checkout")
    given: dict[str, Any] = {}
    fake = types.ModuleType("setuptools")
    fake.setup = lambda **arguments: given.update(arguments)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", fake)
        exec(compile(setup.read_text(), str(setup), "exec"), {"__file__": str(setup), "__name__": "setup"})
    extras = given["extras_require"]

    def floor(extra: str, package: str) -> tuple[int, ...]:
        (found,) = [item for item in extras[extra] if re.match(rf"{package}(\[|>|=|$)", item)]
        return tuple(map(int, found.partition(">=")[2].split(",")[0].split(".")))

    assert floor("gpu", "onnxruntime-gpu") >= (1, 31)
    assert floor("gpu", "nvidia-cublas") >= (13,)
    assert floor("tensorrt", "tensorrt") >= (10, 1)
    assert all(floor(extra, "cuda-bindings") >= (12, 9) for extra in ("gpu", "tensorrt", "tensorrt-rtx"))
