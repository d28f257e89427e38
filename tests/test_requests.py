"""What can be asked for: arguments per label, indices, streams, cancelling, several threads."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from arinar.config import PRESETS
from arinar.runtime import GenerationCancelled, Noise, Pipeline
from arinar.runtime.bundle import Defaults
from arinar.runtime.request import Sampling
from arinar.schedule import guidance_at, steps

DIGITS = PRESETS["digits"]
DEFAULTS = Defaults(12, 4.0)


def resolve(labels: Any, **arguments: Any) -> Sampling:
    return Sampling.resolve(DIGITS, DEFAULTS, labels, **arguments)


@pytest.fixture(scope="module", params=["digits", "digits-causal"])
def pipeline(request: pytest.FixtureRequest, demo_bundle: Any) -> Pipeline:
    return Pipeline.load(demo_bundle(request.param), threads=2)


# ---------------------------------------------------------------------------------------------------------- resolving


def test_defaults_are_the_bundles() -> None:
    sampling = resolve([3, 1])
    assert sampling.settings() == {"guidance_scale": 4.0, "cfg_schedule": "linear", "temperature": 1.0, "num_iter": 12}
    assert (
        sampling.indices == [0, 1] and sampling.size == 2 and sampling.batch_size is None and len(sampling.batch().plan) == 12
    )


def test_values_per_label() -> None:
    sampling = resolve([3, 1], guidance_scale=[2, 3.5], temperature=np.array([0.9, 1.1]))
    assert sampling.guidance_scale.tolist() == [2.0, 3.5] and sampling.temperature.tolist() == [0.9, 1.1]
    assert sampling.settings(1)["guidance_scale"] == 3.5
    batch = sampling.batch()
    rows = batch.guidance_rows(16)
    for step in steps(16, 12):
        for place in range(step.remaining, step.masked):
            want = guidance_at(step, 16, np.array([2.0, 3.5]), "linear").astype(np.float32)
            assert np.array_equal(rows[place], want)
    assert np.array_equal(batch.temperature_rows(16)[7], np.array([0.9, 1.1], np.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": [2.0]}, "guidance_scale has 1 values for 2 labels; give one number, or one for each label"),
        ({"guidance_scale": [2.0, 0.5]}, r"guidance_scale\[1\] is 0.5; expected a number at least 1"),
        ({"temperature": [1.0, float("nan")]}, r"temperature\[1\] is nan; expected a finite number"),
        ({"temperature": (1.0, "hot")}, r"temperature\[1\] is 'hot'"),
        ({"guidance_scale": np.ones((2, 2))}, "guidance_scale is array"),
        ({"indices": [1]}, "indices has 1 values for 2 labels"),
        ({"indices": 5}, "indices is 5; expected a list of integers, one per label"),
        ({"noise": 3}, "noise is 3; expected a Noise"),
        ({"indices": [1, -2]}, "image index is -2; expected an integer from 0"),
        ({"indices": [1, 2.5]}, "image index is 2.5"),
        ({"indices": [0, 1], "noise": Noise.from_seed(0, [0, 1], DIGITS)}, "indices and noise exclude each other"),
        ({"noise": Noise.from_seed(0, [0], DIGITS)}, r"noise.order is int64 \(1, 16\); expected int64 \(2, 16\)"),
        ({"cfg_schedule": "cosine"}, "cfg_schedule is 'cosine'; choose one of linear, constant"),
        ({"cfg_schedule": ["linear"]}, "cfg_schedule is"),
        ({"guidance_scale": 10**400}, "guidance_scale is an integer of 1329 bits; expected a finite number at least 1"),
        ({"guidance_scale": 2 + 1j}, "guidance_scale is .*; expected a finite number"),
        ({"guidance_scale": 1e39}, "guidance_scale is 1e.39; expected a number at least 1 that float32 can hold"),
        ({"guidance_scale": "4"}, "guidance_scale is '4'; expected a finite number"),
        ({"temperature": [np.complex128(1), 1]}, r"temperature\[0\] is"),
        ({"temperature": 1e-60}, "temperature is 1e-60; expected a number above 0 that float32 can hold"),
        ({"num_iter": 10**400}, "num_iter is an integer of 1329 bits"),
        ({"num_iter": "12"}, "num_iter is '12'; expected an integer from 1 to 16"),
        ({"seed": 10**5000}, "seed is an integer of 16610 bits; expected an integer from 0"),
        ({"seed": 1.0}, "seed is 1.0; expected an integer"),
        ({"indices": 5}, "indices is 5; expected a list of integers"),
        ({"indices": "01"}, "indices is '01'; expected a list of integers"),
        ({"noise": 3}, "noise is 3; expected a Noise"),
        ({"batch_size": 10**400}, "batch_size is an integer of 1329 bits; expected an integer from 1 to 4096"),
        ({"batch_size": 10**6}, "batch_size is 1000000; expected an integer from 1 to 4096 .*several batches"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
    ],
    ids=lambda part: part[:30] if isinstance(part, str) else "",  # some values cannot be written out
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve([3, 1], **arguments)


@pytest.mark.parametrize("labels", [[[1], [2, 3]], "3", 3, 10**400, [10**400], [3.0], [True], None, [1 + 1j], {1: 2}])
def test_bad_labels(labels: Any) -> None:
    with pytest.raises(ValueError, match="labels is"):
        resolve(labels)


def test_micro_batches_hold_guided_images_or_others() -> None:
    scales = [1.0, 3.0, 1.0, 2.0, 5.0, 1.0]
    sampling = resolve([0, 1, 2, 3, 4, 5], guidance_scale=scales, batch_size=2)
    found = [(part.rows, part.places, part.batch.guided, part.batch.labels.tolist()) for part in sampling.batches()]
    assert found == [  # each in its place, the others filled up
        ([0], [0], False, [0, 0]),
        ([1], [1], True, [1, 1]),
        ([2], [0], False, [2, 2]),
        ([3], [1], True, [3, 3]),
        ([5], [1], False, [5, 5]),
        ([4], [0], True, [4, 4]),
    ]
    free = resolve([0, 1, 2, 3, 4, 5], guidance_scale=scales)  # one after another
    assert [(part.rows, part.places) for part in free.batches()] == [([0, 2, 5], [0, 1, 2]), ([1, 3, 4], [0, 1, 2])]


def test_noise_is_made_for_each_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[int]] = []
    from_seed = Noise.from_seed.__func__  # type: ignore[attr-defined]

    def spy(cls: Any, seed: int, indices: Any, config: Any) -> Noise:
        made.append(list(indices))
        noise: Noise = from_seed(cls, seed, indices, config)
        return noise

    monkeypatch.setattr(Noise, "from_seed", classmethod(spy))
    batches = resolve([1] * 5, indices=[9, 8, 7, 6, 5], batch_size=2).batches()
    assert made == []
    next(batches)
    assert made == [[9, 8]]
    assert [len(part.batch) for part in batches] == [2, 2] and made == [[9, 8], [7, 6], [5, 5]]


# ---------------------------------------------------------------------------------------------------------- generating


def test_an_image_of_a_sequence_made_alone(pipeline: Pipeline) -> None:
    whole = pipeline.generate([1, 2, 5], seed=9, batch_size=4)
    again = pipeline.generate([5], seed=9, indices=[2], batch_size=4)
    assert np.array_equal(whole.tokens[2], again.tokens[0])
    elsewhere = pipeline.generate([5], seed=9, batch_size=4)
    assert not np.array_equal(whole.tokens[2], elsewhere.tokens[0])


def test_mixed_guidance_comes_back_in_the_order_of_the_labels(pipeline: Pipeline) -> None:
    labels, scales = [1, 2, 3, 4], [1.0, 4.0, 1.0, 2.0]
    mixed = pipeline.generate(labels, seed=2, guidance_scale=scales)
    for row, scale in enumerate(scales):
        single = pipeline.generate([labels[row]], seed=2, guidance_scale=scale, indices=[row])
        assert np.abs(mixed.tokens[row] - single.tokens[0]).max() < 1e-3
    assert mixed.labels == labels


def test_a_callback_that_returns_true_stops(pipeline: Pipeline) -> None:
    want = pipeline.generate([4, 4], seed=1)
    seen = []

    def stop(progress: Any) -> bool:
        seen.append(progress.step)
        return progress.step == 3

    with pytest.raises(GenerationCancelled, match="cancelled at step 3 of"):
        pipeline.generate([4, 4], seed=1, callback=stop)
    assert seen == [1, 2, 3]
    with pytest.raises(GenerationCancelled, match="cancelled at step 1 of"):
        pipeline.generate([4, 4], seed=1, callback=lambda progress: np.True_)
    assert np.array_equal(pipeline.generate([4, 4], seed=1).tokens, want.tokens)
    # What else a callback returns means nothing.
    assert np.array_equal(pipeline.generate([4, 4], seed=1, callback=lambda p: p.step).tokens, want.tokens)


def test_a_stream_refuses_bad_arguments_at_once_and_returns_the_generation(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="label 77 is out of range"):
        pipeline.stream([77])
    with pytest.raises(ValueError, match="stream takes no callback"):
        pipeline.stream([3], callback=print)
    stream = pipeline.stream([3], seed=1)
    while True:
        try:
            item = next(stream)
        except StopIteration as end:
            returned = end.value
            break
    assert returned is item.result and returned.seed == 1 and returned.labels == [3]
    assert set(returned.timings) == {"outer", "inner", "vae", "total"}
    first, *_ = pipeline.stream([3], seed=1)
    with pytest.raises(RuntimeError, match="preview\\(\\) is for while they are being made"):
        first.preview()  # its buffers are free for others


def test_previews_grow_into_the_image(pipeline: Pipeline) -> None:
    *early, last = (np.asarray(item.preview()[0], int) for item in pipeline.stream([0], seed=4))
    far = [np.abs(image - last).mean() for image in early]
    assert far[0] > 2 * far[-1] and far[0] > 10


def test_several_threads_take_turns(pipeline: Pipeline) -> None:
    arguments = [([i % 10, (i * 3) % 10], {"seed": i, "guidance_scale": 1.0 + i % 3}) for i in range(12)]
    want = [pipeline.generate(labels, **rest).tokens for labels, rest in arguments]  # type: ignore[arg-type]

    def streamed(labels: list[int], rest: dict[str, Any]) -> Any:
        *_, last = pipeline.stream(labels, **rest)
        assert last.result is not None
        return last.result.tokens

    with ThreadPoolExecutor(6) as pool:
        plain = [pool.submit(pipeline.generate, labels, **rest) for labels, rest in arguments]  # type: ignore[arg-type]
        streams = [pool.submit(streamed, labels, rest) for labels, rest in arguments]
        for future, other, tokens in zip(plain, streams, want, strict=True):
            assert np.array_equal(future.result().tokens, tokens) and np.array_equal(other.result(), tokens)


def test_a_call_from_a_callback_is_an_error(pipeline: Pipeline) -> None:
    with pytest.raises(RuntimeError, match="in the middle of a call of this thread"):
        pipeline.generate([1], callback=lambda progress: pipeline.generate([2]))
    assert len(pipeline.generate([1]).images) == 1
    shown: list[Any] = []
    pipeline.generate([1], callback=lambda progress: shown.append(progress.preview()))  # which runs the VAE, may be had
    assert all(len(images) == 1 for images in shown)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_is_told_to_load_again(digits_bundle: Path) -> None:
    pipeline = Pipeline.load(digits_bundle, threads=2)
    pipeline.generate([1], num_iter=2)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            pipeline.generate([1], num_iter=2)
            said = "it generated"
        except RuntimeError as error:
            said = str(error)
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    waiting = threading.Timer(60, lambda: os.kill(child, 9))
    waiting.start()
    with os.fdopen(reader) as answer:
        assert "load it again in this one" in answer.read()
    os.waitpid(child, 0)
    waiting.cancel()


def test_old_graphs_take_one_guidance_for_all(digits_bundle: Path, tmp_path: Path) -> None:
    """A bundle of version 0.1 generates as ever; what it cannot do is said, with the remedy."""
    onnx = pytest.importorskip("onnx")
    import json
    import shutil

    from arinar.runtime import BundleError
    from arinar.runtime.bundle import MANIFEST_NAME, file_info

    folder = Path(shutil.copytree(digits_bundle, tmp_path / "old"))
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    for name, graph in manifest["graphs"]["fp32"].items():
        if graph["draws"] == "none":
            continue
        file = folder / graph["file"]
        model = onnx.load(file, load_external_data=False)
        for values, key in ((model.graph.input, "inputs"),):
            for value, entry in zip(values, graph[key], strict=True):
                if value.name in ("guidance_scale", "temperature"):
                    dim = value.type.tensor_type.shape.dim[0]
                    dim.ClearField("dim_param")
                    dim.dim_value = 1
                    entry["shape"] = [1]
        file.write_bytes(model.SerializeToString())
        info = file_info(file)
        manifest["files"][graph["file"]] = {"size": info.size, "sha256": info.sha256}
        assert name
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    old, new = Pipeline.load(folder, threads=1), Pipeline.load(digits_bundle, threads=1)
    for inner in ("fused", "stepwise"):
        old, new = (Pipeline.load(path, threads=1, inner=inner) for path in (folder, digits_bundle))
        for scale in (1.0, 3.0):
            ours, theirs = (p.generate([1, 2], seed=0, guidance_scale=scale, temperature=0.9).tokens for p in (old, new))
            assert np.array_equal(ours, theirs)
        with pytest.raises(BundleError, match="take one guidance_scale for all images .* export the model again"):
            old.generate([1, 2], guidance_scale=[2.0, 3.0])
        mixed = old.generate([1, 2], seed=0, guidance_scale=[1.0, 3.0], temperature=0.9).tokens  # two micro-batches
        assert np.abs(mixed[1] - theirs[1]).max() < 1e-4
