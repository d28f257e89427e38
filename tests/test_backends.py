"""What every backend must do, asked of each in the registry: on the CPU really, of the GPU backends on the fake GPU."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from fake_gpu import FakeCudaRuntime, fake_onnxruntime, fake_tensorrt, make_engines

from arinar.runtime import Bundle, BundleError, Pipeline
from arinar.runtime.backends import ALIASES, BACKENDS, backend_class, backend_options, open_backend
from arinar.runtime.backends.base import Rows
from arinar.runtime.backends.cuda import Cuda
from arinar.runtime.backends.engines import MODULES
from arinar.runtime.loop import KEPT_STATES

Load = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def bundle(demo_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, with engines."""
    made = Path(shutil.copytree(demo_bundle("digits"), tmp_path_factory.mktemp("backends") / "digits"))
    make_engines(Bundle.open(made))
    return made


def load_cpu(monkeypatch: pytest.MonkeyPatch) -> Load:
    return lambda bundle, **options: Pipeline.load(bundle, backend="onnxruntime-cpu", threads=2, verify=False, **options)


def load_openvino(monkeypatch: pytest.MonkeyPatch) -> Load:
    if not os.environ.get("ARINAR_OPENVINO"):
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
    return lambda bundle, **options: Pipeline.load(bundle, backend="openvino", threads=2, verify=False, **options)


def load_gpu(name: str) -> Callable[[pytest.MonkeyPatch], Load]:
    def prepare(monkeypatch: pytest.MonkeyPatch) -> Load:
        runtime = FakeCudaRuntime()
        library, fake = {
            "onnxruntime-cuda": ("onnxruntime", fake_onnxruntime),
            "tensorrt": ("tensorrt", fake_tensorrt),
        }[name]
        monkeypatch.setitem(sys.modules, library, fake(runtime))
        return lambda bundle, **options: Pipeline.load(
            bundle, backend=name, cuda=Cuda(runtime=runtime), cuda_graphs=True, verify=False, **options
        )

    return prepare


#: How each backend is opened in tests.
LOADERS: dict[str, Callable[[pytest.MonkeyPatch], Load]] = {
    "onnxruntime-cpu": load_cpu,
    "onnxruntime-cuda": load_gpu("onnxruntime-cuda"),
    "tensorrt": load_gpu("tensorrt"),
    "openvino": load_openvino,
}


@pytest.fixture(params=list(BACKENDS))
def load(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Load:
    return LOADERS[request.param](monkeypatch)


@pytest.fixture
def pipeline(load: Load, bundle: Path) -> Pipeline:
    return load(bundle)


def pixels(images: Any) -> Any:
    return np.stack([np.asarray(image) for image in images])


def test_every_backend_is_tested() -> None:
    assert set(LOADERS) == set(BACKENDS)
    for name in BACKENDS:
        assert backend_class(name).name == name and backend_options(name)


def test_memory(pipeline: Pipeline) -> None:
    backend = pipeline.backend
    array = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    buffer = backend.empty(array.shape, "float32")
    assert buffer.shape == (4, 3, 2) and not backend.download(buffer).any()
    backend.write(buffer, array)
    assert np.array_equal(backend.download(buffer), array)
    assert np.array_equal(backend.download(buffer[1:3]), array[1:3])
    assert np.array_equal(backend.download(buffer[1:3].reshape(6, 2)), array[1:3].reshape(6, 2))
    other = backend.upload(array.astype(np.float32) + 1)
    backend.copy(other[:2], buffer[2:])
    assert np.array_equal(backend.download(buffer), np.concatenate([array[:2], array[:2] + 1]))
    backend.clear(buffer[1:2])
    assert not backend.download(buffer)[1].any() and backend.download(buffer)[3].all()
    for dtype in ("int64", "uint8", "float16"):
        value = np.arange(6).reshape(2, 3).astype(dtype)
        assert np.array_equal(backend.download(backend.upload(value)), value)
    assert backend.empty((3, 0, 2), "float32").shape == (3, 0, 2)


def test_rows_of_a_cache(pipeline: Pipeline) -> None:
    backend = pipeline.backend
    cache = backend.empty((2, 3, 5, 4), "float32")
    rows = np.random.default_rng(0).standard_normal((2, 3, 2, 4)).astype(np.float32)
    backend.write_slots(backend.upload(rows), cache, 2)
    want = np.zeros((2, 3, 5, 4), np.float32)
    want[:, :, 2:4] = rows
    assert np.array_equal(backend.download(cache), want)


def mixture(rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(rows)
    weight = rng.random((rows, 4)).astype(np.float32) + 0.1
    return {
        "weight": weight / weight.sum(1, keepdims=True),
        "mu": rng.standard_normal((rows, 4)).astype(np.float32),
        "logvar": rng.standard_normal((rows, 4)).astype(np.float32),
        "uniforms": rng.random((rows, 1)).astype(np.float32),
        "temperature": 1 + rng.random(rows).astype(np.float32),
    }


def test_launches_merge_row_axes_and_may_divide_rows(pipeline: Pipeline) -> None:
    backend, positions, images = pipeline.backend, 3, 4
    given = {name: backend.upload(value) for name, value in mixture(positions * images).items()}
    whole = backend.empty((positions * images, 1), "float32")
    backend.launch("mixture_sample", given, {"feature": whole})
    want = backend.download(whole).copy()
    assert np.isfinite(want).all() and want.std() > 0.1
    split = {name: value.reshape(positions, images, *value.shape[1:]) for name, value in given.items()}
    for rows in (None, Rows(dict.fromkeys((*split, "feature"), 1)), Rows(dict.fromkeys((*split, "feature"), 1), apart=True)):
        out = backend.empty((positions, images, 1), "float32")
        backend.launch("mixture_sample", split, {"feature": out}, rows)
        np.testing.assert_allclose(backend.download(out).reshape(want.shape), want, rtol=0, atol=1e-5)
    with pytest.raises(BundleError, match="the bundle has no graph 'outer'; it has"):
        backend.launch("outer", {}, {})


def test_sequences_are_carried_out_every_time(pipeline: Pipeline) -> None:
    """Recorded or not: the buffers' content counts, not that of the first time."""
    backend = pipeline.backend
    given = {name: backend.upload(value) for name, value in mixture(5).items()}
    out = backend.empty((5, 1), "float32")
    found = []
    for owner in ("one", "other"):
        for value in (0.1, 0.5, 0.9, 0.5):
            backend.write(given["uniforms"], np.full((5, 1), value, np.float32))
            backend.execute(owner, "draw", lambda: backend.launch("mixture_sample", given, {"feature": out}))
            backend.wait(backend.mark())
            found.append(backend.download(out).copy())
        backend.forget(owner)
        backend.forget("nobody")
    low, middle, high, again = found[:4]
    assert (low < middle).all() and (middle < high).all() and np.array_equal(middle, again)
    assert all(np.array_equal(first, second) for first, second in zip(found[:4], found[4:], strict=True))


def test_what_it_tells_of_itself_is_json(pipeline: Pipeline) -> None:
    told = pipeline.backend.describe()
    assert told and json.loads(json.dumps(told)) == told


@pytest.mark.parametrize("size", [3, 5, 6])
def test_images_do_not_depend_on_their_batch_mates_guidance(load: Load, bundle: Path, size: int) -> None:
    """At any fixed micro-batch: every image keeps its place, whatever is beside it."""
    pipeline = load(bundle)
    arguments: dict[str, Any] = {"seed": 2, "num_iter": 3, "batch_size": size}
    want = pipeline.generate([4] * size, guidance_scale=3.0, **arguments)
    mixed = pipeline.generate([4] * size, guidance_scale=[1.0, *[3.0] * (size - 2), 2.0], **arguments)
    assert np.array_equal(mixed.tokens[1:-1], want.tokens[1:-1])


def test_images_do_not_depend_on_their_batch_mates(load: Load, bundle: Path) -> None:
    """At a fixed micro-batch, to the last bit: other labels, other guidance and temperature, or none beside it."""
    pipeline = load(bundle)
    alone = [
        pipeline.generate([3], seed=5, guidance_scale=scale, temperature=heat, num_iter=4, batch_size=4, indices=[index])
        for index, scale, heat in ((0, 2.0, 1.0), (1, 1.0, 0.8), (2, 5.5, 1.2), (3, 1.0, 1.0))
    ]
    mixed = pipeline.generate(
        [3] * 4, seed=5, guidance_scale=[2.0, 1.0, 5.5, 1.0], temperature=[1.0, 0.8, 1.2, 1.0], num_iter=4, batch_size=4
    )
    for row, single in enumerate(alone):
        assert np.array_equal(mixed.tokens[row], single.tokens[0]), row
        assert np.array_equal(pixels(mixed.images)[row], pixels(single.images)[0])


def test_a_stream_is_the_same(load: Load, bundle: Path) -> None:
    pipeline = load(bundle)
    arguments: dict[str, Any] = {"seed": 3, "num_iter": 5, "batch_size": 2}
    want = pipeline.generate([1, 7, 4], **arguments)
    shape = pixels(want.images).shape[1:]
    seen = []
    previews: list[Any] = []
    for item in (stream := pipeline.stream([1, 7, 4], **arguments)):
        seen.append((item.step, item.num_iter, item.images_done, item.images, item.rows))
        previews.append(pixels(item.preview()))
        assert previews[-1].shape == (len(item.rows), *shape)
    assert seen == [(s, 5, d, 3, r) for d, r in ((0, (0, 1)), (2, (2,))) for s in range(1, 6)]
    assert item.result is not None and np.array_equal(item.result.tokens, want.tokens)
    assert np.array_equal(previews[4], pixels(want.images)[:2]) and np.array_equal(previews[9], pixels(want.images)[2:])
    assert stream.gi_frame is None


def test_unknown_tokens_are_neutral_not_the_previous_images(load: Load, bundle: Path) -> None:
    pipeline = load(bundle)
    for seed in range(3):
        batch = pipeline.resolve([seed, 7], seed=seed, num_iter=5).batch()
        pipeline.loop.prepare(batch.guided, 2)
        for step, state in pipeline.loop.walk(batch):
            tokens = pipeline.backend.download(state.tokens)
            assert not tokens[: step.remaining].any() and tokens[step.remaining :].all()


def test_closing_a_stream_leaves_the_pipeline_usable(load: Load, bundle: Path) -> None:
    pipeline = load(bundle)
    want = pipeline.generate([2, 9], seed=1, num_iter=6)
    for taken in (1, 3, 6):
        stream = pipeline.stream([5, 5], seed=8, num_iter=6)
        for _ in range(taken):
            next(stream)
        # Another call takes its turn between two steps, on buffers of its own.
        assert np.array_equal(pipeline.generate([2, 9], seed=1, num_iter=6).tokens, want.tokens)
        stream.close()
        assert np.array_equal(pipeline.generate([2, 9], seed=1, num_iter=6).tokens, want.tokens)
    streams = [pipeline.stream([5], seed=1, num_iter=6) for _ in range(7)]
    held = [next(stream) for stream in streams]
    for stream in streams:
        stream.close()
    with pytest.raises(RuntimeError, match="finished, or were cancelled"):
        held[3].preview()
    pipeline.generate([2, 9], seed=1, num_iter=6)
    assert len(pipeline.loop._idle) <= KEPT_STATES  # what was held is free, and not kept without end


def test_the_name_of_the_builder_is_a_backend_too(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`arinar build --backend tensorrt-rtx` makes engines that `backend="tensorrt-rtx"` runs: TensorRt, with that library."""
    asked: list[dict[str, Any]] = []

    class Spy:
        def __init__(self, bundle: Bundle, precision: str, *, module: str | None = None, cuda: Any = None) -> None:
            asked.append({"module": module, "cuda": cuda})

    monkeypatch.setattr("arinar.runtime.backends.tensorrt.TensorRt", Spy)
    open_backend(Bundle.open(bundle), "tensorrt-rtx", "fp32", cuda=1)
    open_backend(Bundle.open(bundle), "tensorrt", "fp32")
    assert asked == [{"module": "tensorrt_rtx", "cuda": 1}, {"module": None, "cuda": None}]
    assert set(MODULES) <= {*BACKENDS, *ALIASES}
    with pytest.raises(BundleError, match="has no option 'threads'; it has module"):
        open_backend(Bundle.open(bundle), "tensorrt-rtx", "fp32", threads=2)
