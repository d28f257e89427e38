"""The GPU runtime on a fake GPU: what is launched, copied and bound, in which order, and that the images are the CPU's."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from fake_gpu import (
    FakeContext,
    FakeCudaRuntime,
    FakeEngine,
    cudaError_t,
    cudaMemcpyKind,
    fake_onnxruntime,
    fake_tensorrt,
    make_engines,
)

import arinar.runtime.backends as backends_module
import arinar.runtime.backends.gpu as cuda_backend
import arinar.runtime.machine as machine_module
from arinar.runtime import Bundle, BundleError, Known, Pipeline
from arinar.runtime.backends.cuda import Cuda, CudaError, GpuMemoryError, NoGpuError, device_info, load_runtime
from arinar.runtime.backends.engines import EngineError
from arinar.runtime.bundle import GraphInfo, TensorInfo
from arinar.runtime.loop import KEPT_STATES
from arinar.runtime.outer import MaskedOuter

KINDS = ("digits", "digits-causal")
LABELS = [3, 1, 4]


@pytest.fixture(scope="module")
def bundles(demo_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of the demo bundles, with engines."""
    made = {}
    for kind in KINDS:
        made[kind] = Path(shutil.copytree(demo_bundle(kind), tmp_path_factory.mktemp("gpu") / kind))
        make_engines(Bundle.open(made[kind]))
    return made


@pytest.fixture
def digits(bundles: dict[str, Path]) -> Path:
    return bundles["digits"]


@pytest.fixture
def runtime() -> FakeCudaRuntime:
    return FakeCudaRuntime()


@pytest.fixture
def trt(runtime: FakeCudaRuntime, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = fake_tensorrt(runtime)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


@pytest.fixture
def ort(runtime: FakeCudaRuntime, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = fake_onnxruntime(runtime)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    return module


def gpu(path: Path, runtime: FakeCudaRuntime, backend: str = "tensorrt", **options: Any) -> Pipeline:
    return Pipeline.load(path, backend=backend, cuda=Cuda(runtime=runtime), verify=False, **options)


def cpu(path: Path, **options: Any) -> Pipeline:
    """On the CPU what a GPU backend runs: the plain form of every graph, each step of a micro-batch in one launch, first
    steps by the graph for them."""
    pipeline = Pipeline.load(path, backend="onnxruntime-cpu", threads=1, verify=False, **options)
    backend: Any = pipeline.backend
    backend._graphs = {name: replace(info, cpu_file=None) for name, info in backend._graphs.items()}
    backend._parts = lambda info, rows: 1
    if isinstance(pipeline.loop.outer, MaskedOuter):
        pipeline.loop.outer.first.has_graph = True
    return pipeline


def assert_same(have: Any, want: Any) -> None:
    assert np.array_equal(have.tokens, want.tokens)
    assert np.array_equal(have.latents, want.latents)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(have.images, want.images, strict=True))


# ------------------------------------------------------------------------------------------------------ whole images


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime-cuda"])
@pytest.mark.parametrize("inner", ["fused", "stepwise"])
@pytest.mark.parametrize("kind", KINDS)
def test_images_are_the_cpus_bit_for_bit(
    bundles: dict[str, Path],
    runtime: FakeCudaRuntime,
    trt: Any,
    kind: str,
    inner: str,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 0: warm-up, 1: captured, 2: replayed, with other seeds, labels, guidance: those are data.
    calls: list[dict[str, Any]] = [
        {"labels": LABELS, "seed": 1, "guidance_scale": 2.5},
        {"labels": [7, 7, 0], "seed": 2, "guidance_scale": 1.5, "temperature": 0.8},
        {"labels": [9, 2, 5], "seed": 3, "guidance_scale": 4.0, "cfg_schedule": "constant"},
        {"labels": [5], "seed": 4, "guidance_scale": 1.0},
    ]
    reference = cpu(bundles[kind], inner=inner)
    wanted = [reference.generate(**call) for call in calls]
    if backend == "onnxruntime-cuda":
        monkeypatch.setitem(sys.modules, "onnxruntime", fake_onnxruntime(runtime))
    pipeline = gpu(bundles[kind], runtime, backend, inner=inner, cuda_graphs=True)
    for call, want in zip(calls, wanted, strict=True):
        assert_same(pipeline.generate(**call), want)
    assert len(runtime.graphs) >= 1 and not runtime.queue


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime-cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_edits_are_the_cpus_bit_for_bit(
    bundles: dict[str, Path], runtime: FakeCudaRuntime, trt: Any, kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded steps are shared by plans with and without known tokens, of buffers that are used again."""
    reference = cpu(bundles[kind])
    tokens = reference.generate(LABELS, seed=9).tokens
    calls: list[dict[str, Any]] = []
    for seed, count in enumerate((0, 4, 9, 4, 4, 0, 9, 9, 16, 16, 16, 15, 0)):
        rng = np.random.default_rng(seed)
        order = (np.arange(16) if kind == "digits-causal" else rng.permutation(16) for _ in LABELS)
        known = Known(tokens, np.stack([places < count for places in order]))
        calls.append({"seed": seed, "known": known, "guidance_scale": 2.0})
    wanted = [reference.generate(LABELS, **call) for call in calls]
    if backend == "onnxruntime-cuda":
        monkeypatch.setitem(sys.modules, "onnxruntime", fake_onnxruntime(runtime))
    pipeline = gpu(bundles[kind], runtime, backend, cuda_graphs=True)
    for call, want in zip(calls, wanted, strict=True):
        assert_same(pipeline.generate(LABELS, **call), want)
    assert len(runtime.graphs) >= 1 and not runtime.queue


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_several_classes_are_the_cpus_bit_for_bit(
    bundles: dict[str, Path], runtime: FakeCudaRuntime, trt: Any, kind: str
) -> None:
    reference, pipeline = cpu(bundles[kind]), gpu(bundles[kind], runtime)
    calls: list[list[Any]] = [[3, 1, 4], [{3: 1, 8: 1}, 1, 4], [3, {1: 1, 2: 2, 5: 1}, {4: 1, 0: 3}], [3, 1, 4]]
    for labels in calls:  # what is recorded once serves them all
        assert_same(pipeline.generate(labels, seed=1), reference.generate(labels, seed=1))


def test_pictures_are_encoded_where_an_engine_is(
    bundles: dict[str, Path], tmp_path: Path, runtime: FakeCudaRuntime, trt: Any
) -> None:
    folder = Path(shutil.copytree(bundles["digits"], tmp_path / "b"))
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    mask = np.arange(32)[:, None].repeat(32, 1) >= 16
    pipeline = gpu(folder, runtime)
    for seed in range(3):
        assert_same(pipeline.edit(pictures, mask, LABELS, seed=seed), cpu(folder).edit(pictures, mask, LABELS, seed=seed))
    for file in folder.glob("engines/*/vae_encoder.*"):  # which `arinar build` does not make unless it is told
        file.unlink()
    without = gpu(folder, runtime)
    without.generate(LABELS)
    with pytest.raises(EngineError, match=r"no fp32 engine of graph 'vae_encoder' .*--precision fp32 --graph vae_encoder`"):
        without.edit(pictures, mask, LABELS)


def test_without_cuda_graphs(digits: Path, runtime: FakeCudaRuntime, trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    want = cpu(digits).generate(LABELS, seed=1)
    pipeline = gpu(digits, runtime, cuda_graphs=False)
    for _ in range(3):
        assert_same(pipeline.generate(LABELS, seed=1), want)
    assert not any("Graph" in name or "Capture" in name for name in runtime.names())
    assert all(len(engine.contexts) == 1 for engine in trt.engines.values())
    assert pipeline.backend.describe() == {"cuda_graphs": False}
    assert gpu(digits, runtime).backend.describe() == {"cuda_graphs": True}


def test_the_switch_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches the backend as an argument; without it nothing is said, so that every backend keeps its own default."""
    from click.testing import CliRunner

    from arinar.cli import main

    given: list[dict[str, Any]] = []

    def load(path: Path, **options: Any) -> Pipeline:
        given.append(options)
        raise BundleError("no bundle there")

    monkeypatch.setattr(Pipeline, "load", load)
    arguments = ["generate", str(tmp_path), "--labels", "1", "-o", str(tmp_path / "out")]
    before = dict(os.environ)
    for words in ([], ["--no-cuda-graphs"]):
        assert CliRunner().invoke(main, [*arguments, *words]).exit_code == 2
    assert given == [{"backend": None, "precision": None}, {"backend": None, "precision": None, "cuda_graphs": False}]
    assert dict(os.environ) == before


def test_a_replayed_image_is_uploads_graphs_downloads(digits: Path, runtime: FakeCudaRuntime, trt: Any) -> None:
    pipeline = gpu(digits, runtime)
    for seed in range(3):
        start = len(runtime.log)
        pipeline.generate(LABELS, seed=seed)
    calls = runtime.log[start:]
    to_device, to_host = cudaMemcpyKind.cudaMemcpyHostToDevice, cudaMemcpyKind.cudaMemcpyDeviceToHost
    kinds = [call[4].name[10:] if call[0] == "cudaMemcpyAsync" else call[0] for call in calls]
    graphs = kinds.count("cudaGraphLaunch")
    assert graphs == len(runtime.graphs) >= 1
    # Order, ranks, labels, guidance, temperature; no tokens yet; uniforms, z of the first step. A graph for each step, one
    # for decoding. Then tokens, latents, images.
    want = [to_device.name[10:]] * 5 + ["cudaMemsetAsync"] + [to_device.name[10:]] * 2
    want += ["cudaGraphLaunch"] * (pipeline.bundle.manifest.defaults.num_iter + 1)
    want += [to_host.name[10:], "cudaStreamSynchronize"] * 3
    assert [kind for kind in kinds if kind != "cudaSetDevice"] == want
    assert kinds[0] == "cudaSetDevice"  # this may be the thread's first call


def test_a_watched_image_waits_for_one_step_behind(digits: Path, runtime: FakeCudaRuntime, trt: Any) -> None:
    """Progress that is told is true, and the device has the next step to do meanwhile; unwatched, nothing waits."""
    pipeline = gpu(digits, runtime)
    for _ in range(2):
        pipeline.generate(LABELS, num_iter=4)
    assert "cudaEventSynchronize" not in runtime.names()
    start = len(runtime.log)
    pipeline.generate(LABELS, num_iter=4, callback=lambda progress: None)
    names = [name for name in runtime.names()[start:] if "Event" in name or name == "cudaGraphLaunch"]
    record, wait = ["cudaEventCreateWithFlags", "cudaEventRecord"], ["cudaEventSynchronize", "cudaEventDestroy"]
    step = ["cudaGraphLaunch", *record]
    assert names == step + (step + wait) * 3 + wait + ["cudaGraphLaunch"]
    start = len(runtime.log)
    stream = pipeline.stream(LABELS, num_iter=4)
    for _ in range(3):
        next(stream)
    stream.close()  # its events go with it
    names = runtime.names()[start:]
    assert names.count("cudaEventRecord") == names.count("cudaEventDestroy") == 3


@pytest.mark.parametrize("inner", ["fused", "stepwise"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_copied_to_or_from_the_host_during_the_steps(
    bundles: dict[str, Path], runtime: FakeCudaRuntime, trt: Any, kind: str, inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = gpu(bundles[kind], runtime, inner=inner)
    execute, spans = pipeline.backend.execute, []

    def spy(owner: Any, key: Any, launches: Any) -> None:
        start = len(runtime.log)
        execute(owner, key, launches)
        spans.append(runtime.log[start:])

    monkeypatch.setattr(pipeline.backend, "execute", spy)
    for seed in range(3):
        pipeline.generate(LABELS, seed=seed)
    for calls in spans:
        for call in calls:
            if call[0] == "cudaMemcpyAsync":
                assert call[4] == cudaMemcpyKind.cudaMemcpyDeviceToDevice
    steps = len(spans) // 3  # of an image, decoding included
    for calls in spans[steps:]:  # the warm-up allocates and waits; from the capture on, nothing does
        assert not {"cudaMalloc", "cudaFree", "cudaStreamSynchronize", "cudaMemsetAsync"} & {call[0] for call in calls}
    names = [call[0] for call in spans[steps]]
    begin, end = names.index("cudaStreamBeginCapture"), len(names) - 1 - names[::-1].index("cudaStreamEndCapture")
    assert names.index("cudaGraphLaunch") > end > begin


def test_addresses_and_shapes_are_told_once(bundles: dict[str, Path], runtime: FakeCudaRuntime, trt: Any) -> None:
    """The capture tells the library nothing new: shapes, addresses and scratch memory were settled by the warm-up."""
    pipeline = gpu(bundles["digits-causal"], runtime)
    pipeline.generate(LABELS, seed=0)
    engine = trt.engines["outer_step"]
    told = {name: [c for c in e.calls if c[0] != "execute_async_v3"] for name, e in trt.engines.items()}
    contexts = {name: len(e.contexts) for name, e in trt.engines.items()}
    pipeline.generate(LABELS, seed=1)
    assert told == {name: [c for c in e.calls if c[0] != "execute_async_v3"] for name, e in trt.engines.items()}
    assert contexts == {name: len(e.contexts) for name, e in trt.engines.items()}
    # One shape in all steps: one context, and the caches and z are bound where the loop keeps them.
    (context,) = engine.contexts
    (state,) = pipeline.loop._idle
    own = state.outer
    for name, buffer in {**own.cache.past, **own.cache.present, "z": state.z, "rows": own.rows}.items():
        assert context.addresses[name] == buffer.pointer
    # The position is another slice of a table at every step: it has to be staged.
    assert context.addresses["position"] not in range(own.positions.pointer, own.positions.pointer + 8 * 16)


def test_every_shape_of_a_masked_model_has_its_context_and_they_share_scratch(
    digits: Path, runtime: FakeCudaRuntime, trt: Any
) -> None:
    pipeline = gpu(digits, runtime)
    plan = pipeline.generate(LABELS, num_iter=6) and 6
    engine = trt.engines["outer_step"]
    assert len(engine.contexts) == plan - 1  # the first step is kept per label
    assert len({tuple(sorted(context.shapes.items())) for context in engine.contexts}) == plan - 1
    scratch = {context.scratch for e in trt.engines.values() for context in e.contexts}
    sizes = [size for _, size in scratch]
    assert len(set(sizes)) == len(sizes) and sum(sizes) < 2 * max(sizes)  # one of each power of two at most
    # The last step leaves no token hidden: no element, yet an address.
    last = next(context for context in engine.contexts if context.shapes["hidden_positions"][0] == 0)
    assert last.addresses["hidden_positions"]


def test_forgotten_sequences_free_their_graphs_and_contexts(digits: Path, runtime: FakeCudaRuntime, trt: Any) -> None:
    pipeline = gpu(digits, runtime)
    for _ in range(2):
        pipeline.generate([1], num_iter=2)
    assert len(runtime.graphs) == 3  # two steps, decoding
    for batch in range(2, 2 + KEPT_STATES):  # pushes the first shape out
        pipeline.generate([1] * batch, num_iter=2)
    assert not runtime.graphs and "cudaGraphExecDestroy" in runtime.names()
    assert len(pipeline.backend._owned) == KEPT_STATES  # type: ignore[attr-defined]


def test_long_sequences_become_several_graphs(
    digits: Path, runtime: FakeCudaRuntime, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_backend, "LAUNCHES_PER_GRAPH", 3)
    want = cpu(digits, inner="stepwise").generate(LABELS, seed=5, num_iter=1)
    pipeline = gpu(digits, runtime, inner="stepwise")
    for _ in range(3):
        assert_same(pipeline.generate(LABELS, seed=5, num_iter=1), want)
    assert len(runtime.graphs) == 12 + 1  # conditioning, 16 x (step, draw) = 33 launches, and an end; decoding: 2


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_failed_capture_falls_back_with_one_warning(digits: Path, runtime: FakeCudaRuntime, trt: Any, call: str) -> None:
    want = cpu(digits).generate(LABELS, seed=5, num_iter=3)
    pipeline = gpu(digits, runtime)
    pipeline.generate(LABELS, seed=4, num_iter=3)
    runtime.fail[call] = cudaError_t.cudaErrorStreamCaptureInvalidated
    if call == "cudaStreamEndCapture":  # a failed end leaves the fake in capture mode, the real one does not
        end = runtime.cudaStreamEndCapture

        def failing(stream: int) -> Any:
            runtime.captured = None
            del runtime.__dict__["cudaStreamEndCapture"]
            runtime.fail.pop(call, None)
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None

        runtime.__dict__["cudaStreamEndCapture"] = failing
        assert end is not failing
    with pytest.warns(RuntimeWarning, match=r"could not be captured.*cudaErrorStreamCaptureInvalidated.*no-cuda-graphs"):
        assert_same(pipeline.generate(LABELS, seed=5, num_iter=3), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(pipeline.generate(LABELS, seed=5, num_iter=3), want)
    assert not runtime.graphs


def test_everything_is_freed_with_the_pipeline(digits: Path, runtime: FakeCudaRuntime, trt: Any) -> None:
    pipeline = gpu(digits, runtime)
    for _ in range(2):
        pipeline.generate(LABELS, num_iter=2)
    assert runtime.used > 0 and runtime.graphs
    del pipeline
    trt.engines.clear()
    gc.collect()
    assert not runtime.blocks and not runtime.graphs


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.fixture
def cuda(runtime: FakeCudaRuntime) -> Cuda:
    return Cuda(runtime=runtime)


def test_views_are_numpys(cuda: Cuda) -> None:
    array = np.arange(120, dtype=np.float32).reshape(5, 4, 6)
    buffer = cuda.empty(array.shape, array.dtype)
    cuda.upload(array, buffer)
    assert buffer.pointer % 256 == 0 and buffer.nbytes == array.nbytes
    for rows in (slice(0, 5), slice(2, 4), slice(3, None), slice(None, 1), slice(-2, None), slice(4, 2), slice(5, 9)):
        assert np.array_equal(cuda.download(buffer[rows]), array[rows])
        assert buffer[rows].pointer == buffer.pointer + rows.indices(5)[0] * 96
    for shape in ((12, 6), (72,), (4, -1), (-1,), (3, 2, -1, 6)):
        assert np.array_equal(cuda.download(buffer[1:4].reshape(*shape)), array[1:4].reshape(*shape))
    assert np.array_equal(cuda.download(buffer[1:][1:3].reshape(8, 6)), array[1:][1:3].reshape(8, 6))
    assert buffer[2:2].reshape(0, 24).shape == (0, 24)
    with pytest.raises(ValueError, match="step 2"):
        buffer[::2]
    for wrong in ((7, 7), (-1, 7), (-1, -1)):
        with pytest.raises(ValueError, match="cannot reshape"):
            buffer.reshape(*wrong)


def test_memory_lives_as_long_as_a_view(cuda: Cuda, runtime: FakeCudaRuntime) -> None:
    view = cuda.empty((4, 8), "int64")[1:2]
    gc.collect()
    assert len(runtime.blocks) == 1
    del view
    gc.collect()
    assert not runtime.blocks


def test_uploads_keep_their_source_until_the_stream_is_done(cuda: Cuda) -> None:
    buffer = cuda.empty((1000,), "float32")
    for value in range(3):
        cuda.upload(np.full(1000, value, np.float64), buffer)  # converted: nobody else holds the float32 copy
    gc.collect()
    assert np.array_equal(cuda.download(buffer), np.full(1000, 2, np.float32))
    assert not cuda._unfinished
    with pytest.raises(ValueError, match=r"shape \(3,\), the buffer \(1000,\)"):
        cuda.upload(np.zeros(3), buffer)


def test_nothing_is_freed_during_a_capture(cuda: Cuda, runtime: FakeCudaRuntime) -> None:
    buffer = cuda.empty((4,), "float32")
    cuda.begin_capture()
    del buffer
    gc.collect()
    assert len(runtime.blocks) == 1
    graph = cuda.end_capture()
    assert not runtime.blocks
    cuda.launch_graph(graph)
    cuda.destroy_graph(graph)
    cuda.abandon_capture()  # of none: nothing happens


def test_out_of_memory_names_the_remedy(digits: Path, trt: Any, runtime: FakeCudaRuntime) -> None:
    with pytest.raises(GpuMemoryError, match=r"2 MiB wanted, 1 of 1 MiB free.*--batch-size"):
        Cuda(runtime=FakeCudaRuntime(memory=2**20)).empty((2**21,), "uint8")
    pipeline = gpu(digits, runtime)
    runtime.total = runtime.used + 4096
    with pytest.raises(GpuMemoryError, match="--batch-size"):
        pipeline.generate(LABELS)
    runtime.total = 2**40
    trt.engines["outer_step"].refuse = "Requested amount of GPU memory could not be allocated: OutOfMemory"
    with pytest.raises(GpuMemoryError, match=r"graph 'outer_step' did not run.*OutOfMemory.*--batch-size"):
        pipeline.generate(LABELS)
    trt.engines["outer_step"].refuse = "Myelin error"
    with pytest.raises(CudaError, match="graph 'outer_step' did not run; tensorrt says: .*Myelin error"):
        pipeline.generate(LABELS)


@pytest.mark.parametrize("other", [{"driver": 0}, {"driver": 12040}, {"devices": 0}])
def test_machines_without_a_gpu_are_told_what_is_missing(other: dict[str, int]) -> None:
    runtime = FakeCudaRuntime(**other)
    message = "no NVIDIA driver"
    if other.get("driver"):
        runtime.fail["cudaGetDeviceCount"] = cudaError_t.cudaErrorInsufficientDriver
        message = "supports CUDA 12.4, the package cuda-bindings is made for 13.0: update the driver"
    elif "devices" in other:
        message = "CUDA_VISIBLE_DEVICES"
    with pytest.raises(NoGpuError, match=message):
        Cuda(runtime=runtime)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(NoGpuError, match="device is 3; this machine has GPUs 0..0"):
        Cuda(3, FakeCudaRuntime())


def test_missing_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(NoGpuError, match=r"cuda-bindings is not installed.*pip install cuda-bindings"):
        load_runtime()


def test_the_real_bindings_take_our_arguments() -> None:
    """Where there is no driver every call fails with an error code; what it must not do is refuse its arguments."""
    real = pytest.importorskip("cuda.bindings.runtime")
    if real.cudaGetDeviceCount()[0] == real.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU: the calls would do something")
    with pytest.raises(NoGpuError):
        device_info(real)
    cuda = Cuda.__new__(Cuda)
    cuda.runtime, cuda._stream, cuda.stream, cuda.capturing = real, real.cudaStream_t(0), 0, False
    cuda._unfinished, cuda._freed_in_capture = [], []
    graph = real.cudaGraphExec_t(0)
    for call in (
        lambda: cuda.malloc(300),
        lambda: cuda._copy(512, 1024, 8, "HostToDevice"),
        lambda: cuda.copy(512, 1024, 8),
        lambda: cuda.copy_rows(512, 1024, 8, 2, 16),
        lambda: cuda.call("cudaMemsetAsync", 512, 0, 8, cuda._stream),
        cuda.synchronize,
        cuda.begin_capture,
        cuda.end_capture,
        lambda: cuda.launch_graph(graph),
        lambda: cuda.call("cudaGraphExecDestroy", graph),
        lambda: cuda.call("cudaGraphInstantiate", real.cudaGraph_t(0), 0),
        lambda: cuda.call("cudaSetDevice", 0),
        lambda: cuda.call("cudaStreamCreateWithFlags", real.cudaStreamNonBlocking),
    ):
        with pytest.raises(CudaError, match="cudaErrorInsufficientDriver|cudaErrorNoDevice"):
            call()


def test_cache_rows_are_written_in_one_strided_copy(digits: Path, runtime: FakeCudaRuntime, trt: Any) -> None:
    backend: Any = gpu(digits, runtime).backend
    rng = np.random.default_rng(0)
    for dtype in ("float32", "float16"):
        cache, rows = rng.standard_normal((6, 2, 9, 4)).astype(dtype), rng.standard_normal((6, 2, 3, 4)).astype(dtype)
        target, source = backend.upload(cache), backend.upload(rows)
        for slot in (0, 4, 6):
            before = len(runtime.log)
            backend.write_slots(source, target, slot)
            assert [call[0] for call in runtime.log[before:]] == ["cudaSetDevice", "cudaMemcpy2DAsync"]
            cache[:, :, slot : slot + 3] = rows
            assert np.array_equal(backend.download(target), cache)
        with pytest.raises(ValueError, match="do not fit slot 7"):
            backend.write_slots(source, target, 7)
    zeros = backend.empty((3, 0, 2), "float32")
    backend.copy(zeros, zeros)
    assert backend.download(zeros).shape == (3, 0, 2)
    with pytest.raises(ValueError, match="copy of 0 bytes"):
        backend.copy(zeros, target)


# ---------------------------------------------------------------------------------------------------------- aliasing


@pytest.fixture
def updater(digits: Path, runtime: FakeCudaRuntime, trt: Any) -> Any:
    """A backend with one more graph, which adds to a cache: ``past`` (N, 4) + ``new`` (1, 4) -> ``present`` (N, 4)."""
    backend: Any = gpu(digits, runtime).backend
    inputs = (TensorInfo("past", "float32", ("N", 4)), TensorInfo("new", "float32", (1, 4)))
    info = GraphInfo("updater", "none", 20, inputs, (TensorInfo("present", "float32", ("N", 4)),), "outer")
    backend._graphs = {**backend._graphs, "updater": info}
    engine = FakeEngine(runtime, backend._log, info, lambda feeds, _: [feeds["past"] + feeds["new"]], 64)

    def load(alias: bool) -> Any:
        engine.aliases = {"present": "past"} if alias else {}
        backend._engines["updater"] = engine
        backend._check("updater", engine)
        return backend

    return load


@pytest.mark.parametrize("alias", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_caches_are_updated_in_place_where_the_engine_says_so(
    updater: Any, runtime: FakeCudaRuntime, alias: bool, same: bool
) -> None:
    """In place and out of place in the loop, on engines that do and that do not: always the same result."""
    backend = updater(alias)
    past = backend.upload(np.ones((3, 4), np.float32))
    present = past if same else backend.empty((3, 4), "float32")
    new = backend.upload(np.full((1, 4), 2, np.float32))
    before = len(runtime.log)
    backend.launch("updater", {"past": past, "new": new}, {"present": present})
    copies = sum(call[0] == "cudaMemcpyAsync" for call in runtime.log[before:])
    assert copies == (alias != same)  # only where loop and engine differ
    assert (backend.download(present) == 3).all()
    if not same:
        assert (backend.download(past) == 1).all()


@pytest.mark.parametrize("alias", [True, False])
def test_aliased_caches_in_a_captured_sequence(updater: Any, runtime: FakeCudaRuntime, alias: bool) -> None:
    backend = updater(alias)
    cache, new = backend.empty((3, 4), "float32"), backend.upload(np.ones((1, 4), np.float32))
    table = backend.upload(np.arange(5 * 4, dtype=np.float32).reshape(5, 4))

    def launches() -> None:
        for step in range(4):  # slices of a table: 16 bytes apart, so not aligned
            backend.launch("updater", {"past": cache, "new": table[step : step + 1]}, {"present": cache})
        backend.launch("updater", {"past": cache, "new": new}, {"present": cache})

    total = np.arange(16, dtype=np.float32).reshape(4, 4).sum(0) + 1
    for times in range(1, 4):
        backend.execute("owner", "key", launches)
        assert (backend.download(cache) == times * total).all()
    assert len(runtime.graphs) == 1
    backend.forget("owner")
    backend.forget("nobody")
    assert not runtime.graphs


# ----------------------------------------------------------------------------------------------------------- engines


def test_engines_that_do_not_fit_are_refused(bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeCudaRuntime()
    path = Path(shutil.copytree(bundles["digits"], tmp_path / "b"))
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(runtime, version="11.5.0"))
    with pytest.raises(EngineError, match=r"built with tensorrt 11.4.0, 11.5.0 is installed.*Run `arinar build"):
        gpu(path, runtime)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(runtime))
    shutil.rmtree(path / "engines")
    with pytest.raises(EngineError, match=r"no fp32 engines for tensorrt.*it has none.*arinar build"):
        gpu(path, runtime)
    folder = make_engines(Bundle.open(path), compute_capability=("8.9",))
    with pytest.raises(EngineError, match=r"built for compute capability 8.9, this GPU has 9.0.*arinar build"):
        gpu(path, runtime)
    shutil.rmtree(folder)
    folder = make_engines(Bundle.open(path))
    engine = folder / "outer_step.engine"
    text = engine.read_text()
    engine.write_text(text.replace("graph", "hparg"))
    with pytest.raises(EngineError, match="is damaged"):
        gpu(path, runtime)
    for name in ("tensorrt", "tensorrt_lean", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BundleError, match=r"no TensorRT library is installed; `pip install '.\[tensorrt\]'` in a checkout"):
        gpu(path, runtime)
    with pytest.raises(BundleError, match=r"tensorrt_lean cannot be imported.*pip install tensorrt_lean"):
        gpu(path, runtime, module="tensorrt_lean")
    with pytest.raises(BundleError, match="module is 'tensorflow'"):
        gpu(path, runtime, module="tensorflow")


def test_an_engine_that_cannot_be_loaded_tells_what_the_library_said(
    bundles: dict[str, Path], tmp_path: Path, runtime: FakeCudaRuntime, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arinar.runtime.backends.engines import Engine

    path = Path(shutil.copytree(bundles["digits"], tmp_path / "b"))
    monkeypatch.setattr(Engine, "verify", lambda self: None)
    (engine,) = path.glob("engines/*/outer_step.engine")
    engine.write_bytes(b"x" * engine.stat().st_size)
    with pytest.raises(CudaError, match=r"cannot load the engine.*magic tag failed.*Build it again: `arinar build"):
        gpu(path, runtime)


def test_version_compatible_engines_run_in_the_lean_library(
    bundles: dict[str, Path], tmp_path: Path, runtime: FakeCudaRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(bundles["digits"], tmp_path / "b"))
    lean = fake_tensorrt(runtime, "tensorrt_lean", "11.9.0")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_lean", lean)
    with pytest.raises(EngineError, match="runs only engines built with --version-compatible"):
        gpu(path, runtime)
    make_engines(Bundle.open(path), version_compatible=True)
    pipeline = gpu(path, runtime)
    assert pipeline.backend.module == "tensorrt_lean"  # type: ignore[attr-defined]
    assert pipeline.backend._runtime.engine_host_code_allowed  # type: ignore[attr-defined]
    assert_same(pipeline.generate(LABELS, num_iter=2), cpu(path).generate(LABELS, num_iter=2))


def test_sizes_outside_the_profiles(bundles: dict[str, Path], tmp_path: Path, runtime: FakeCudaRuntime, trt: Any) -> None:
    path = Path(shutil.copytree(bundles["digits"], tmp_path / "b"))
    shutil.rmtree(path / "engines")
    make_engines(Bundle.open(path), batch=(1, 1, 2))
    remedy = r"input '.*' has shape .*, the engine takes .*--batch-size.*arinar build.*--batch MIN:OPT:MAX"
    with pytest.raises(EngineError, match=remedy):
        gpu(path, runtime).generate(LABELS)


@pytest.mark.parametrize("capturable", [True, False])
def test_what_rtx_does_otherwise(
    digits: Path, runtime: FakeCudaRuntime, trt: Any, capturable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compiles kernels when a context is made, and tells whether a context can be captured."""
    trt.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    monkeypatch.setattr(FakeContext, "is_stream_capturable", lambda self, stream: capturable, raising=False)
    want = cpu(digits).generate(LABELS, num_iter=3)
    pipeline = gpu(digits, runtime)
    for _ in range(3):
        assert_same(pipeline.generate(LABELS, num_iter=3), want)
    assert bool(runtime.graphs) == capturable


def test_a_library_without_shared_scratch_memory(digits: Path, runtime: FakeCudaRuntime, trt: Any) -> None:
    del trt.ExecutionContextAllocationStrategy
    want = cpu(digits).generate(LABELS, num_iter=3)
    pipeline = gpu(digits, runtime)
    for _ in range(3):
        assert_same(pipeline.generate(LABELS, num_iter=3), want)
    assert runtime.graphs and all(context.scratch[0] == 0 for e in trt.engines.values() for context in e.contexts)


# ------------------------------------------------------------------------------------------- ONNX Runtime, the choice


def test_onnxruntime_is_bound_to_our_stream_and_memory(digits: Path, runtime: FakeCudaRuntime) -> None:
    want = cpu(digits).generate(LABELS, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        module = fake_onnxruntime(runtime)
        patch.setitem(sys.modules, "onnxruntime", module)
        pipeline = gpu(digits, runtime, "onnxruntime-cuda")
        for _ in range(3):
            assert_same(pipeline.generate(LABELS, seed=1), want)
        assert not runtime.graphs  # off unless asked for
        assert module.preloaded
        for session in module.sessions:
            assert session.settings["use_tf32"] == str(int("vae_decoder" in session.path)) and len(session.bindings) == 1
        module.sessions[0].fail = "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 12"
        with pytest.raises(GpuMemoryError, match="--batch-size"):
            pipeline.generate(LABELS)
        module.sessions[0].fail = "CUBLAS_STATUS_EXECUTION_FAILED"
        with pytest.raises(CudaError, match="did not run in ONNX Runtime: CUBLAS"):
            pipeline.generate(LABELS)


def test_a_silent_fallback_to_the_cpu_is_refused(digits: Path, runtime: FakeCudaRuntime, ort: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", fake_onnxruntime(runtime, ["CPUExecutionProvider"]))
        with pytest.raises(BundleError, match=r"would run graph 'outer_step' on CPUExecutionProvider, not on the GPU.*cuDNN"):
            gpu(digits, runtime, "onnxruntime-cuda").generate(LABELS)
    ort.get_available_providers = lambda: ["CPUExecutionProvider"]
    with pytest.raises(
        BundleError,
        match=r"has no CUDA provider \(only CPUExecutionProvider\).*'onnxruntime-gpu\[cuda,cudnn\]>=1.31' .*cuda-bindings",
    ):
        gpu(digits, runtime, "onnxruntime-cuda")


@pytest.fixture
def fake_machine(runtime: FakeCudaRuntime, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCudaRuntime]:
    monkeypatch.setattr("arinar.runtime.backends.cuda.load_runtime", lambda: runtime)
    yield runtime


def test_the_best_backend_is_chosen_and_nothing_missing_raises(
    digits: Path, fake_machine: FakeCudaRuntime, ort: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(digits)
    choose = backends_module.choose_backend
    for name in ("tensorrt", "tensorrt_lean", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    assert choose(bundle, "fp32") == "onnxruntime-cuda"
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(fake_machine))
    assert choose(bundle, "fp32") == "tensorrt"
    assert Pipeline.load(digits, verify=False, threads=2).backend.name == "tensorrt"  # threads: another backend's
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(fake_machine, version="10.9"))
    assert choose(bundle, "fp32") == "onnxruntime-cuda"
    ort.get_available_providers = lambda: ["CPUExecutionProvider"]
    assert choose(bundle, "fp32") == "onnxruntime-cpu"
    fake_machine.devices = 0
    assert choose(bundle, "fp32") == "onnxruntime-cpu"
    monkeypatch.setattr("arinar.runtime.backends.cuda.load_runtime", lambda: 1 / 0)
    assert choose(bundle, "fp32") == "onnxruntime-cpu"


def test_options_of_other_backends(digits: Path) -> None:
    with pytest.raises(BundleError, match="backend onnxruntime-cpu has no option 'cuda_graphs'; it has threads"):
        Pipeline.load(digits, backend="onnxruntime-cpu", cuda_graphs=False)
    with pytest.raises(BundleError, match="has no option 'treads'"):
        Pipeline.load(digits, treads=1)
    with pytest.raises(BundleError, match="backend is 'cuda'; choose one of onnxruntime-cpu, onnxruntime-cuda, tensorrt"):
        Pipeline.load(digits, backend="cuda")


def test_two_onnxruntime_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"onnxruntime": "/a", "onnxruntime-gpu": "/a"}

    class Distribution:
        def __init__(self, name: str) -> None:
            self.name = name

        def locate_file(self, path: str) -> str:
            return places[self.name]

    monkeypatch.setattr(machine_module.metadata, "distribution", Distribution)
    with pytest.raises(BundleError, match="both installed"):
        machine_module.onnxruntime_distribution()
    places["onnxruntime-gpu"] = "/b"
    monkeypatch.setattr(sys, "path", ["/b", "/a"])
    assert machine_module.onnxruntime_distribution() == "onnxruntime-gpu"
    monkeypatch.setattr(sys, "path", ["/a", "/b"])
    assert machine_module.onnxruntime_distribution() == "onnxruntime"
