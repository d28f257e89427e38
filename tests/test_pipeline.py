"""Generation through a bundle: seeds, batches, modes, arguments."""

from __future__ import annotations

import gc
import weakref
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from arinar.runtime import Bundle, Known, Noise, Pipeline, Progress
from arinar.runtime.backends import BACKENDS, BackendOptions, backend_options

KINDS = ("digits", "digits-causal")


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request: pytest.FixtureRequest, demo_bundle) -> Pipeline:  # type: ignore[no-untyped-def]
    return Pipeline.load(demo_bundle(request.param))


def pixels(generation) -> npt.NDArray[np.int64]:  # type: ignore[no-untyped-def]
    return np.stack([np.asarray(image) for image in generation.images]).astype(np.int64)


def test_shapes_and_timings(pipeline: Pipeline) -> None:
    config = pipeline.config
    out = pipeline.generate([3, 1, 4], seed=1)
    assert out.tokens.shape == (3, config.seq_len, config.token_dim) and out.tokens.dtype == np.float32
    assert out.latents.shape == (3, config.vae_embed_dim, 4, 4) and np.isfinite(out.latents).all()
    assert [image.size for image in out.images] == [(32, 32)] * 3 and out.images[0].mode == "RGB"
    assert set(out.timings) == {"outer", "inner", "vae", "total"} and out.timings["total"] > out.timings["outer"] > 0
    assert out.labels == [3, 1, 4] and out.seed == 1
    assert pixels(out).std() > 10  # not a grey square


def test_same_seed_same_images_for_batch_1_3_and_64(pipeline: Pipeline) -> None:
    labels = [i % 10 for i in range(130)]
    whole = pixels(pipeline.generate(labels, seed=3, batch_size=64))
    thirds = pixels(pipeline.generate(labels, seed=3, batch_size=3))
    worst = np.abs(whole - thirds).max((1, 2, 3))
    assert (worst <= 1).mean() >= 0.99
    singles = pixels(pipeline.generate(labels[:50], seed=3, batch_size=1))
    assert (np.abs(whole[:50] - singles).max((1, 2, 3)) <= 1).mean() >= 0.98


def test_fixed_micro_batch_is_identical_to_the_last_bit(pipeline: Pipeline) -> None:
    alone = pipeline.generate([7], seed=5, batch_size=8)
    together = pipeline.generate([7, 2, 2, 9, 0], seed=5, batch_size=8)
    assert np.array_equal(alone.tokens[0], together.tokens[0])
    assert np.array_equal(pixels(alone)[0], pixels(together)[0])


def test_stepwise_inner_loop_gives_the_same_images(pipeline: Pipeline) -> None:
    stepwise = Pipeline.load(pipeline.bundle.folder, inner="stepwise")
    for scale in (1.0, 2.5):
        fused = pipeline.generate(range(10), seed=2, guidance_scale=scale)  # type: ignore[arg-type]
        other = stepwise.generate(range(10), seed=2, guidance_scale=scale)  # type: ignore[arg-type]
        assert np.abs(pixels(fused) - pixels(other)).max() <= 1


def test_noise_can_be_passed_and_a_single_image_made_again(pipeline: Pipeline) -> None:
    whole = pipeline.generate([1, 2, 3, 4], seed=9)
    again = pipeline.generate([3], noise=Noise.from_seed(9, [2], pipeline.config))
    assert np.abs(pixels(whole)[2] - pixels(again)[0]).max() <= 1


def test_arguments_change_the_result(pipeline: Pipeline) -> None:
    base = pixels(pipeline.generate([5, 6], seed=0))
    assert (pixels(pipeline.generate([5, 6], seed=1)) != base).any()
    assert (pixels(pipeline.generate([5, 6], seed=0, temperature=0.7)) != base).any()
    assert (pixels(pipeline.generate([5, 6], seed=0, guidance_scale=2.0)) != base).any()
    assert (pixels(pipeline.generate([5, 6], seed=0, cfg_schedule="constant")) != base).any()


def test_without_guidance_no_unconditional_work(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    call = pipeline.backend._call  # type: ignore[attr-defined]

    def spy(loaded, graph, inputs, outputs):  # type: ignore[no-untyped-def]
        found = call(loaded, graph, inputs, outputs)
        if graph.name == "outer_step":
            rows.append(found[0].shape[0] // (1 if "token" in inputs else inputs["target_positions"].shape[0]))
        return found

    monkeypatch.setattr(pipeline.backend, "_call", spy)
    counts = []
    for scale in (1.0, 2.0):
        pipeline.generate([1, 2, 3], guidance_scale=scale, num_iter=16)
        counts.append(sum(rows))
        rows.clear()
    assert counts[1] == 2 * counts[0] > 0


@pytest.mark.parametrize("threads", [1, 2, 3, 6, 16])
def test_rows_apart_or_together_are_the_same_images(digits_bundle: Path, threads: int) -> None:
    """Whatever the number of threads makes of a micro-batch: one launch, or one for each image and branch."""
    want = pixels(Pipeline.load(digits_bundle, threads=1).generate([1, 2, 3], num_iter=5, seed=4))
    got = pixels(Pipeline.load(digits_bundle, threads=threads).generate([1, 2, 3], num_iter=5, seed=4))
    assert np.abs(got - want).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_low_memory_holds_one_phase_at_a_time(demo_bundle, kind: str) -> None:  # type: ignore[no-untyped-def]
    plain, saving = (Pipeline.load(demo_bundle(kind), threads=2, low_memory=low) for low in (False, True))
    held: list[set[str]] = []
    call = saving.backend._call  # type: ignore[attr-defined]

    def spy(*arguments):  # type: ignore[no-untyped-def]
        held.append({name for name, _ in saving.backend._loaded})  # type: ignore[attr-defined]
        return call(*arguments)

    saving.backend._call = spy  # type: ignore[attr-defined]
    for _ in range(2):
        want, got = (p.generate([1, 2, 3], batch_size=2, seed=4) for p in (plain, saving))
        assert np.array_equal(pixels(want), pixels(got)) and np.array_equal(want.tokens, got.tokens)
    making, decoding = {"outer_step", "outer_prefill", "inner_token_guided"}, {"tokens_to_latents", "vae_decoder"}
    assert all(names <= making or names <= decoding for names in held)
    phases = [names <= decoding for names in held]
    assert sum(a != b for a, b in pairwise(phases)) == 7  # four micro-batches, each made and decoded


def test_num_iter(digits_bundle: Path, causal_bundle: Path) -> None:
    masked, causal = Pipeline.load(digits_bundle), Pipeline.load(causal_bundle)
    made = {}
    for num_iter in (1, 5, 12, 16):
        seen: list[Progress] = []
        made[num_iter] = masked.generate([1], num_iter=num_iter, callback=seen.append).tokens
        assert [p.step for p in seen] == [*range(1, num_iter + 1)]
    for one, other in combinations(made.values(), 2):  # another plan, other tokens
        assert np.abs(one - other).max() > 0.1
    assert np.array_equal(masked.generate([1]).tokens, made[12])  # the model's own
    assert np.array_equal(causal.generate([1], num_iter=16).tokens, causal.generate([1]).tokens)
    for bad in (0, 17, -1, 2.0, True):
        with pytest.raises(ValueError, match="num_iter is .*expected an integer from 1 to 16"):
            masked.generate([1], num_iter=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a causal model generates one token a step: 16"):
        causal.generate([1], num_iter=8)


def test_progress(pipeline: Pipeline) -> None:
    seen: list[Progress] = []
    pipeline.generate([1, 2, 3], batch_size=2, callback=seen.append)
    total = seen[0].num_iter
    assert [p.step for p in seen] == [*range(1, total + 1)] * 2
    assert [p.images_done for p in seen] == [0] * total + [2] * total and seen[0].images == 3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels is empty"),
        ([10], "label 10 is out of range; this model has classes 0..9"),
        ([-2], "label -2 is out of range"),
        ([1.0], "labels is float64"),
        (["three"], r"labels\[0\] is 'three', no class of this model"),
        ([True], "labels is bool"),
        ([[1, 2]], r"with shape \(1, 2\)"),
        (3, r"with shape \(\)"),
    ],
)
def test_bad_labels(pipeline: Pipeline, labels: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.generate(labels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 0.9}, "guidance_scale is 0.9; expected a number at least 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; expected a finite number"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf; expected a finite number"),
        ({"guidance_scale": "4"}, "guidance_scale is '4'"),
        ({"temperature": 0}, "temperature is 0; expected a number above 0"),
        ({"temperature": -1.0}, "temperature is -1.0; expected a number above 0"),
        ({"cfg_schedule": "cosine"}, "cfg_schedule is 'cosine'; choose one of linear, constant"),
        ({"batch_size": 0}, "batch_size is 0; expected an integer from 1 to 4096"),
        ({"seed": -3}, "seed is -3; expected an integer from 0"),
    ],
)
def test_bad_arguments(pipeline: Pipeline, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.generate([1], **arguments)  # type: ignore[arg-type]


def test_non_finite_values_are_an_error_that_names_the_graph(digits_bundle: Path) -> None:
    pipeline = Pipeline.load(digits_bundle)
    launch = pipeline.backend.launch

    def broken(graph: str, inputs, outputs, rows=None) -> None:  # type: ignore[no-untyped-def]
        if graph == "inner_token_guided":
            inputs = {**inputs, "z": np.full_like(inputs["z"], np.inf)}
        launch(graph, inputs, outputs, rows)

    pipeline.backend.launch = broken  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="graph 'inner_token_guided' made non-finite values in its output 'tokens'"):
        pipeline.generate([1])


def test_tokens_to_latents_undoes_patchify_and_the_order() -> None:
    torch = pytest.importorskip("torch")
    from arinar.config import ArinarConfig
    from arinar.export.steps import TokensToLatents
    from arinar.model import denormalize, unpatchify

    config = ArinarConfig(
        img_size=32, vae_stride=4, patch_size=2, vae_embed_dim=4, latent_scale=(1.0, 2.0, 3.0, 4.0), latent_shift=0.5
    )
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((2, 16, 16)).astype(np.float32)
    order = np.stack([rng.permutation(16) for _ in range(2)])
    generated = np.take_along_axis(tokens, order[:, :, None], 1).swapaxes(0, 1)
    raster, latents = TokensToLatents(config)(torch.from_numpy(generated.copy()), torch.from_numpy(np.argsort(order, 1)))
    assert np.array_equal(raster.numpy(), tokens)
    want = denormalize(unpatchify(torch.from_numpy(tokens), 2), config)
    torch.testing.assert_close(latents, want)


def test_a_closed_pipeline_says_so_and_has_let_go(digits_bundle: Path) -> None:
    with Pipeline.load(digits_bundle, threads=2) as pipe:
        backend, stream = weakref.ref(pipe.backend), pipe.stream([1], num_iter=4)
        next(stream)
        assert repr(pipe) == f"Pipeline({str(digits_bundle)!r}, fp32, onnxruntime-cpu, threads=2, low_memory=False)"
    assert repr(pipe).endswith("closed)")
    for call in (
        lambda: next(stream),
        lambda: pipe.generate([1]),
        lambda: pipe.encode(Image.new("RGB", (32, 32))),
        lambda: pipe.backend.describe(),
    ):
        with pytest.raises(RuntimeError, match="this pipeline is closed; load the bundle again"):
            call()
    stream.close()
    pipe.close()
    gc.collect()
    assert backend() is None

    def close(progress: Progress) -> None:
        pipe.close()

    pipe = Pipeline.load(digits_bundle)
    with pytest.raises(RuntimeError, match="in the middle of a call"):
        pipe.generate([1], callback=close)
    assert pipe.generate([1], num_iter=2).images


def test_what_a_bundle_offers_here_and_how_things_show_themselves(digits_bundle: Path) -> None:
    bundle = Bundle.open(digits_bundle)
    assert bundle.precisions == ("fp32",) and "fp32" in repr(bundle) and bundle.size() == bundle.size("fp32") > 1e6
    assert "onnxruntime-cpu" in Pipeline.available(digits_bundle)["fp32"]
    with Pipeline.load(digits_bundle) as pipe:
        made = pipe.generate([1, 2], num_iter=2)
        known = Known(made.tokens, np.ones(made.tokens.shape[:2], bool))
        for thing in (bundle, bundle.manifest, made, known, Noise.from_seed(0, [0], pipe.config), pipe):
            assert len(repr(thing)) < 200 and "array" not in repr(thing), repr(thing)
        assert made.images[1].info["label"] == 2 and made.images[1].info["num_iter"] == 2
        given = pipe.generate([1], noise=Noise.from_seed(7, [0], pipe.config))
        assert given.seed is None and given.images[0].info["seed"] is None


def test_the_options_of_all_backends_are_declared() -> None:
    assert set(BackendOptions.__annotations__) == {option for name in BACKENDS for option in backend_options(name)}
