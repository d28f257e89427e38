"""Tokens that are given: the plan around them, that they stay as they are, and that the reference does the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import torch

from arinar.config import PRESETS
from arinar.runtime import GenerationCancelled, Known, Noise, Pipeline, Progress
from arinar.runtime.bundle import Defaults
from arinar.runtime.request import Sampling
from arinar.schedule import steps

DIGITS, CAUSAL = PRESETS["digits"], PRESETS["digits-causal"]
LENGTH, FEATURES = DIGITS.seq_len, DIGITS.token_dim
LABELS = [4, 5, 6]


@pytest.fixture(scope="module", params=["digits", "digits-causal", "digits-mar"])
def pipeline(request: pytest.FixtureRequest, demo_bundle: Callable[[str], Path]) -> Pipeline:
    return Pipeline.load(demo_bundle(request.param), threads=1)


@pytest.fixture(scope="module")
def digits(digits_bundle: Path) -> Pipeline:
    return Pipeline.load(digits_bundle, threads=1)


@pytest.fixture(scope="module")
def given(digits: Pipeline) -> npt.NDArray[np.float32]:
    """Tokens of three digits."""
    return digits.generate([1, 2, 3], seed=3).tokens


def mask_of(counts: list[int], causal: bool = False, seed: int = 0) -> npt.NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    return np.stack([(np.arange(LENGTH) if causal else rng.permutation(LENGTH)) < count for count in counts])


def resolve(labels: list[int], config: Any = DIGITS, **arguments: Any) -> Sampling:
    return Sampling.resolve(config, Defaults(12, 4.0), labels, **arguments)


# --------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("num_iter", [1, 3, 12, 16])
@pytest.mark.parametrize("unknown", range(LENGTH + 1))
def test_the_plan_is_the_cosine_schedule_of_what_is_unknown(num_iter: int, unknown: int) -> None:
    plan = steps(LENGTH, num_iter, unknown)
    count = min(num_iter, unknown)
    left, want = unknown, []
    for step in range(count):  # the schedule's formula
        after = (
            0 if step == count - 1 else max(1, min(left - 1, math.floor(unknown * math.cos(math.pi / 2 * (step + 1) / count))))
        )
        want.append((step, left, after))
        left = after
    assert [(step.index, step.masked, step.remaining) for step in plan] == want
    assert left == 0
    assert steps(LENGTH, num_iter, LENGTH) == steps(LENGTH, num_iter)


def test_known_positions_are_the_end_of_the_order_and_the_others_keep_theirs(given: npt.NDArray[np.float32]) -> None:
    mask = mask_of([5, 5, 5])
    sampling = resolve(LABELS, seed=8, known=Known(given, mask))
    batch, noise = sampling.batch(), Noise.from_seed(8, [0, 1, 2], DIGITS)
    for row in range(3):
        seeded = noise.order[row].tolist()
        assert batch.noise.order[row].tolist() == [p for p in seeded if not mask[row, p]] + [p for p in seeded if mask[row, p]]
    assert np.array_equal(batch.noise.draws, noise.draws)  # by position: not moved
    assert batch.plan[0].masked == 11 and len(batch.plan) == 11


def test_guidance_follows_the_share_of_all_tokens(given: npt.NDArray[np.float32]) -> None:
    batch = resolve(LABELS, guidance_scale=3.0, num_iter=4, known=Known(given, mask_of([8, 8, 8]))).batch()
    rows = batch.guidance_rows(LENGTH)
    for step in batch.plan:
        want = 1 + 2 * (LENGTH - max(1, step.remaining)) / LENGTH
        assert np.allclose(rows[step.remaining : step.masked], want)
    assert rows[batch.plan[0].remaining, 0] > 2  # half of the tokens are known: it does not begin at 1


def test_different_numbers_of_known_tokens_share_no_micro_batch() -> None:
    mask = mask_of([3, 16, 0, 3, 0, 16])
    tokens = np.zeros((6, LENGTH, FEATURES), np.float32)
    scales = [2.0, 1.0, 2.0, 1.0, 2.0, 2.0]
    sampling = resolve([0, 1, 2, 3, 4, 5], guidance_scale=scales, known=Known(tokens, mask))
    parts = [(part.rows, len(part.batch.plan), part.batch.guided) for part in sampling.batches()]
    assert parts == [([2, 4], 12, True), ([3], 12, False), ([0], 12, True), ([1], 0, False), ([5], 0, False)]
    fixed = resolve([0, 1, 2, 3, 4, 5], guidance_scale=scales, known=Known(tokens, mask), batch_size=4)
    assert [(part.rows, part.places, len(part.batch)) for part in fixed.batches()] == [
        ([2], [2], 4), ([3], [3], 4), ([0], [0], 4), ([1], [1], 4), ([4], [0], 4), ([5], [1], 4)
    ]  # fmt: skip
    for part in fixed.batches():
        known = part.batch.known
        assert (known is None) == (part.rows[0] in (2, 4))
        assert known is None or len(set(known.counts.tolist())) == 1


# --------------------------------------------------------------------------------------------------------- generating


def test_nothing_known_is_the_plain_call_bit_for_bit(pipeline: Pipeline) -> None:
    for scale in (1.0, 3.0):
        want = pipeline.generate(LABELS, seed=2, guidance_scale=scale)
        junk = np.full((3, LENGTH, FEATURES), np.nan, np.float32)  # what is not known is not read
        got = pipeline.generate(LABELS, seed=2, guidance_scale=scale, known=Known(junk, mask_of([0, 0, 0])))
        assert np.array_equal(got.tokens, want.tokens)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(got.images, want.images, strict=True))


def test_all_known_is_only_decoded(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pipeline.generate(LABELS, seed=2)
    launched: list[str] = []
    launch = pipeline.backend.launch

    def spy(graph: str, *arguments: Any) -> None:
        launched.append(graph)
        launch(graph, *arguments)

    monkeypatch.setattr(pipeline.backend, "launch", spy)
    seen: list[Progress] = []
    got = pipeline.generate(LABELS, seed=7, known=Known(made.tokens, mask_of([16] * 3)), callback=seen.append)
    assert set(launched) == {"tokens_to_latents", "vae_decoder"}
    assert np.array_equal(got.tokens, made.tokens) and np.array_equal(got.latents, made.latents)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got.images, made.images, strict=True))
    assert [(p.step, p.num_iter, p.images, p.rows) for p in seen] == [(0, 0, 3, (0, 1, 2))] and seen[0].result is got
    assert [image.tobytes() for image in seen[0].preview()] == [image.tobytes() for image in made.images]
    (last,) = pipeline.stream(LABELS, known=Known(made.tokens, mask_of([16] * 3)))
    assert last.result is not None and np.array_equal(last.result.tokens, made.tokens)
    with pytest.raises(GenerationCancelled, match="step 0 of 0"):
        pipeline.generate(LABELS, known=Known(made.tokens, mask_of([16] * 3)), callback=lambda p: True)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("count", [1, 8, 15])
def test_it_is_what_the_reference_generates(
    pipeline: Pipeline, given: npt.NDArray[np.float32], count: int, scale: float
) -> None:
    from arinar.checkpoint import load_arinar
    from arinar.sampler import StepRecord, sample

    causal = pipeline.config.outer == "causal"
    known = Known(given, mask_of([count] * 3, causal))
    noise = Noise.from_seed(9, [0, 1, 2], pipeline.config)
    steps_seen: list[Progress] = []
    got = pipeline.generate(LABELS, guidance_scale=scale, noise=noise, known=known, callback=steps_seen.append)
    records: list[StepRecord] = []
    model = load_arinar("digits-causal" if causal else "digits-mar" if pipeline.config.head == "diffusion" else "digits")
    want = sample(
        model, torch.tensor(LABELS), guidance_scale=scale, noise=noise, known=known, record=records.append
    ).numpy()  # fmt: skip
    assert np.array_equal(got.tokens[known.mask], given[known.mask])  # bit for bit, on both sides
    assert np.array_equal(want[known.mask], given[known.mask])
    assert len(steps_seen) == len(records) == min(pipeline.config.seq_len if causal else 12, 16 - count)
    assert np.abs(got.tokens - want).max() < 2e-3 and np.abs(want - given).max() > 1


def test_what_is_not_known_has_no_influence(pipeline: Pipeline, given: npt.NDArray[np.float32]) -> None:
    mask = mask_of([6] * 3, pipeline.config.outer == "causal")
    other = np.where(mask[:, :, None], given, np.float32(np.nan))
    one, two = (pipeline.generate(LABELS, seed=1, known=Known(tokens, mask)) for tokens in (given, other))
    assert np.array_equal(one.tokens, two.tokens)
    changed = np.where(mask[:, :, None], given + 1, given).astype(np.float32)  # what is known has
    three = pipeline.generate(LABELS, seed=1, known=Known(changed, mask))
    assert np.abs(three.tokens - one.tokens)[~mask].max() > 0.1


def test_a_kept_state_carries_nothing_over(pipeline: Pipeline, given: npt.NDArray[np.float32]) -> None:
    """Micro-batches of one shape share buffers and caches, whatever was known before."""
    causal = pipeline.config.outer == "causal"
    runs: list[dict[str, Any]] = [
        {"known": Known(given, mask_of([count] * 3, causal, seed=count))} for count in (0, 4, 9, 12, 16)
    ]
    runs += [{}, {"num_iter": 16}]
    alone = [Pipeline.load(pipeline.bundle.folder, threads=1).generate(LABELS, seed=5, **run).tokens for run in runs]
    for run, want in [*zip(runs, alone, strict=True), *reversed(list(zip(runs, alone, strict=True)))]:
        assert np.array_equal(pipeline.generate(LABELS, seed=5, **run).tokens, want)


def test_different_numbers_come_back_in_the_order_of_the_labels(pipeline: Pipeline, given: npt.NDArray[np.float32]) -> None:
    mask = mask_of([4, 16, 9], pipeline.config.outer == "causal")
    whole = pipeline.generate(LABELS, seed=6, batch_size=4, known=Known(given, mask))
    assert np.array_equal(whole.tokens[mask], given[mask])
    for row in range(3):
        one = Known(given[row : row + 1], mask[row : row + 1])
        alone = pipeline.generate([LABELS[row]], seed=6, indices=[row], batch_size=4, known=one)
        assert np.abs(alone.tokens[0] - whole.tokens[row]).max() < 1e-3


def test_previews_show_what_is_known_from_the_first_step_on(digits: Pipeline, given: npt.NDArray[np.float32]) -> None:
    upper = np.tile(np.arange(LENGTH) < 8, (3, 1))
    whole = digits.generate(LABELS, known=Known(given, mask_of([16] * 3))).images
    for progress in digits.stream(LABELS, known=Known(given, upper)):
        for shown, want in zip(progress.preview(), whole, strict=True):
            assert np.abs(np.asarray(shown, int)[:8] - np.asarray(want, int)[:8]).mean() < 20
        break


def test_stepwise_gives_the_same(pipeline: Pipeline, given: npt.NDArray[np.float32]) -> None:
    known = Known(given, mask_of([7] * 3, pipeline.config.outer == "causal"))
    stepwise = Pipeline.load(pipeline.bundle.folder, inner="stepwise", threads=1)
    one, two = (p.generate(LABELS, seed=2, known=known).tokens for p in (pipeline, stepwise))
    assert np.abs(one - two).max() < 1e-3


# ---------------------------------------------------------------------------------------------------------- bad input

GOOD = np.zeros((2, LENGTH, FEATURES), np.float32), np.zeros((2, LENGTH), np.bool_)


def with_value(place: tuple[int, ...], value: float) -> npt.NDArray[np.float32]:
    tokens = GOOD[0].copy()
    tokens[place] = value
    return tokens


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (GOOD[0][:1], GOOD[1], r"known.tokens is float32 \(1, 16, 16\); expected float32 \(2, 16, 16\)"),
        (GOOD[0][:, :, :3], GOOD[1], r"known.tokens is float32 \(2, 16, 3\)"),
        (GOOD[0].astype(np.float64), GOOD[1], r"known.tokens is float64 \(2, 16, 16\); expected float32"),
        (GOOD[0].tolist(), GOOD[1], "known.tokens is .*; expected a NumPy array"),
        (None, GOOD[1], "known.tokens is None"),
        (GOOD[0], GOOD[1][:, 1:], r"known.mask is bool \(2, 15\); expected bool \(2, 16\)"),
        (GOOD[0], GOOD[1].astype(np.int64), r"known.mask is int64 \(2, 16\); expected bool"),
        (GOOD[0], GOOD[1][0], r"known.mask is bool \(16,\)"),
        (GOOD[0], [True], r"known.mask is \[True\]; expected a NumPy array"),
        (with_value((1, 3, 0), np.nan), ~GOOD[1], "known.tokens of image 1 has values that are not finite, at position 3"),
        (with_value((0, 5, 9), np.inf), ~GOOD[1], "known.tokens of image 0 has values that are not finite, at position 5"),
    ],
)
def test_bad_known_tokens(tokens: Any, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve([1, 2], known=Known(tokens, mask))


@pytest.mark.parametrize("known", [3, "x", np.zeros(4), (GOOD[0], GOOD[1]), {"tokens": GOOD[0]}])
def test_what_is_no_known(known: Any) -> None:
    with pytest.raises(ValueError, match="known is .*; expected a Known"):
        resolve([1, 2], known=known)


def test_a_causal_model_goes_on_from_the_first_of_its_order() -> None:
    mask = GOOD[1].copy()
    mask[0, :4] = mask[1, [0, 1, 3]] = True
    with pytest.raises(
        ValueError, match="known.mask of image 1: position 3 is known, 2 before it in the generation order is not"
    ):
        resolve([1, 2], CAUSAL, known=Known(GOOD[0], mask))
    resolve([1, 2], known=Known(GOOD[0], mask))  # a masked model takes any
    order = tuple(np.random.default_rng(0).permutation(LENGTH).tolist())
    mask = np.zeros((1, LENGTH), np.bool_)
    mask[0, list(order[:5])] = True
    resolve([1], CAUSAL.replace(order=order), known=Known(GOOD[0][:1], mask))
    with pytest.raises(ValueError, match="must be the first of its order"):
        resolve([1], CAUSAL, known=Known(GOOD[0][:1], mask))


def test_the_reference_refuses_what_it_cannot_do() -> None:
    from arinar.checkpoint import load_arinar
    from arinar.sampler import sample

    def run(name: str, mask: Any) -> None:
        sample(load_arinar(name), torch.tensor([1, 2]), guidance_scale=1.0, seed=0, known=Known(GOOD[0], mask))

    uneven, late = mask_of([3, 4]), mask_of([3, 3], seed=1)
    with pytest.raises(ValueError, match=r"known.mask has \[3, 4\] tokens known; expected as many of every image"):
        run("digits", uneven)
    with pytest.raises(ValueError, match="not a beginning of the causal model's generation order"):
        run("digits-causal", late)
    with pytest.raises(ValueError, match=r"known.mask is torch.bool \(2, 15\)"):
        run("digits", late[:, 1:])
