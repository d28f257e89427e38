"""Plans that a user may choose: staged orders, guidance in an interval, its change reused. What they generate when, that the
reference does the same, that an image depends on nothing beside it, and that the default has not changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import torch
from click.testing import CliRunner

from arinar.checkpoint import load_arinar
from arinar.cli import main
from arinar.config import PRESETS
from arinar.runtime import Known, Noise, Pipeline
from arinar.runtime.bundle import Defaults
from arinar.runtime.request import Sampling
from arinar.sampler import sample
from arinar.schedule import checkerboard, stages_of, steps

DIGITS, CAUSAL, LETTERS, BASE = (PRESETS[name] for name in ("digits", "digits-causal", "letters", "base"))
STAGED = "staged:4x3,4x2,8x2"  # of the digits' 16 tokens
LABELS = [4, 5, 6]


@pytest.fixture(scope="module", params=["digits", "digits-mar"])
def pipeline(request: pytest.FixtureRequest, demo_bundle: Callable[[str], Path]) -> Pipeline:
    return Pipeline.load(demo_bundle(request.param), threads=1)


def resolve(labels: list[int], config: Any = DIGITS, **arguments: Any) -> Sampling:
    return Sampling.resolve(config, Defaults(12, 4.0), labels, **arguments)


# ------------------------------------------------------------------------------------------------------------- the sets


def test_the_sets_of_the_published_grid() -> None:
    places = np.array(checkerboard(16, 3)).reshape(16, 16)
    row, column = np.indices((16, 16))
    assert (places[(row + column) % 2 == 1] == 2).all()
    assert (places[(row + column) % 4 == 2] == 1).all()
    assert (places[(row + column) % 4 == 0] == 0).all()
    assert [int((places == number).sum()) for number in range(3)] == [64, 64, 128]


@pytest.mark.parametrize(("side", "sets"), [(4, 1), (4, 3), (8, 2), (8, 4), (16, 5)])
def test_every_token_is_in_one_set_and_no_set_is_empty(side: int, sets: int) -> None:
    assert sorted(set(checkerboard(side, sets))) == list(range(sets))


@pytest.mark.parametrize(
    ("schedule", "config"), [("staged:64x24,64x6,128x2", BASE), ("staged:16x7,16x3,32x1", LETTERS), (STAGED, DIGITS)]
)
def test_a_staged_plan_covers_each_token_once_set_after_set(schedule: str, config: Any) -> None:
    sampling = resolve([0, 1], config, schedule=schedule)
    batch, stages = sampling.batch(), stages_of(schedule, config.grid_size)
    assert sampling.num_iter == len(batch.plan) == sum(number for _, number in stages)
    assert batch.plan[0].masked == config.seq_len and batch.plan[-1].remaining == 0
    assert all(step.count >= 1 for step in batch.plan)
    assert all(before.remaining == step.masked for before, step in zip(batch.plan, batch.plan[1:], strict=False))
    places = np.array(checkerboard(config.grid_size, len(stages)))
    drawn = [places[batch.noise.order[:, step.remaining : step.masked]] for step in batch.plan]
    wanted = [number for number, (_, count) in enumerate(stages) for _ in range(count)]
    assert [set(part.ravel().tolist()) for part in drawn] == [{number} for number in wanted]
    counts = [step.count for step in batch.plan]
    for number in range(len(stages)):
        some = [count for count, which in zip(counts, wanted, strict=True) if which == number]
        assert max(some) - min(some) <= 1


def test_within_a_set_the_order_is_that_of_the_seed() -> None:
    order = Noise.from_seed(3, [0], LETTERS).order[0]
    staged = resolve([0], LETTERS, seed=3, schedule="staged:16x7,16x3,32x1").batch().noise.order[0]
    places = np.array(checkerboard(8, 3))
    for number in range(3):
        assert (order[places[order] == number] == staged[places[staged] == number]).all()
    again = resolve(
        [0], LETTERS, schedule="staged:16x7,16x3,32x1", noise=Noise(staged[None], Noise.from_seed(3, [0], LETTERS).draws)
    )
    assert (again.batch().noise.order[0] == staged).all()


def test_one_set_is_a_random_order_with_even_counts() -> None:
    batch = resolve([0], schedule="staged:16x4").batch()
    assert [step.count for step in batch.plan] == [4, 4, 4, 4]
    assert (batch.noise.order == Noise.from_seed(0, [0], DIGITS).order).all()


WRONG = ["", "cosin", "staged", "staged:", "staged:4x3,4x2", "staged:4x5,4x2,8x2", "staged:4x0,4x2,8x2", "staged:8x3,4x2,4x2"]


@pytest.mark.parametrize("schedule", [*WRONG, "staged:1x1,1x1,2x1,4x1,8x1", "staged:4*3", "\x1b[31m", 7, None, ["staged"]])
def test_a_schedule_that_is_none_is_refused_with_one_that_is(schedule: Any) -> None:
    with pytest.raises(ValueError, match=r"schedule is .*staged:4x1,4x1,8x1") as caught:
        stages_of(schedule, 4)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    stages_of(str(caught.value).rsplit(" ", 1)[1], 4)  # the example is right


def test_where_a_schedule_or_an_interval_has_no_meaning_it_is_refused() -> None:
    known = Known(np.zeros((1, 16, 16), np.float32), np.arange(16)[None] < 3)
    with pytest.raises(ValueError, match="a causal model has one order"):
        resolve([0], CAUSAL, schedule=STAGED)
    with pytest.raises(ValueError, match="where tokens are known"):
        resolve([0], known=known, schedule=STAGED)
    with pytest.raises(ValueError, match="num_iter is 12, schedule .* has 7 steps"):
        resolve([0], num_iter=12, schedule=STAGED)
    with pytest.raises(ValueError, match="needs every token in its cache"):
        resolve([0], CAUSAL, guidance_interval=(0.5, 1))
    with pytest.raises(ValueError, match="guidance_refresh is 2; a causal model"):
        resolve([0], CAUSAL, guidance_refresh=2)
    assert len(resolve([0], known=known, guidance_interval=(0.5, 1)).batch().plan) == 12


@pytest.mark.parametrize(
    "interval", [(0.5, 0.5), (0.6, 0.4), (-0.1, 1), (0, 1.1), (float("nan"), 1), (0.1,), "0:1", 0.5, (True, 1)]
)
def test_an_interval_that_is_none_is_refused(interval: Any) -> None:
    with pytest.raises(ValueError, match="guidance_interval is "):
        resolve([0], guidance_interval=interval)


# -------------------------------------------------------------------------------------------------------------- images


def test_the_default_is_the_published_schedule() -> None:
    plan = resolve([0]).batch().plan
    assert plan == steps(16, 12) and all(step.guided for step in plan)
    assert resolve([0], schedule="cosine", guidance_interval=(0, 1)).settings() == resolve([0]).settings()


CHOICES = [
    {"schedule": STAGED},
    {"guidance_interval": (0.3, 1.0)},
    {"guidance_interval": (0.0, 0.5)},
    {"schedule": STAGED, "guidance_interval": (0.25, 0.8), "guidance_scale": [3.0, 1.5, 2.0]},
    {"guidance_interval": (0.999, 1.0)},
    {"guidance_refresh": 2},
    {"guidance_refresh": 16, "guidance_scale": [3.0, 1.5, 2.0]},
    {"guidance_refresh": 3, "schedule": STAGED, "guidance_interval": (0.2, 0.9)},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_reference_makes_the_same(pipeline: Pipeline, choice: dict[str, Any]) -> None:
    noise = Noise.from_seed(5, range(3), pipeline.config)
    made = pipeline.generate(LABELS, noise=noise, **choice)
    model = load_arinar("digits-mar" if pipeline.config.head == "diffusion" else "digits")
    wanted = sample(model, LABELS, **({"guidance_scale": model.config.default_guidance_scale} | choice), noise=noise)
    assert np.abs(made.tokens - wanted.numpy()).max() < 5e-3
    plain = pipeline.generate(LABELS, noise=noise)
    assert np.abs(made.tokens - plain.tokens).max() > 0.1


@pytest.mark.parametrize("inner", ["fused", "stepwise"])
def test_an_image_depends_on_nothing_beside_it(digits_bundle: Path, inner: str) -> None:
    pipeline = Pipeline.load(digits_bundle, threads=1, inner=inner)
    how = CHOICES[3] | {"batch_size": 4, "guidance_refresh": 2}
    together = pipeline.generate(LABELS, seed=2, **how).tokens
    pipeline.generate([{1: 0.5, 7: 0.5}, 3, 3], seed=9, **how)  # buffers are used again
    for row, scale in enumerate(how["guidance_scale"]):
        alone = pipeline.generate([LABELS[row]], seed=2, indices=[row], **(how | {"guidance_scale": scale})).tokens[0]
        assert np.array_equal(alone, together[row])


@pytest.mark.parametrize("choice", [{"guidance_interval": (0.4, 1.0)}, {"guidance_refresh": 3}], ids=str)
def test_images_of_several_classes_are_so_at_launches_of_one_branch_too(digits_bundle: Path, choice: dict[str, Any]) -> None:
    pipeline, noise = Pipeline.load(digits_bundle, threads=1), Noise.from_seed(1, range(2), DIGITS)
    labels = [{3: 0.6, 8: 0.4}, 2]
    made = pipeline.generate(labels, noise=noise, **choice).tokens
    wanted = sample(load_arinar("digits"), labels, guidance_scale=4.0, noise=noise, **choice)
    assert np.abs(made - wanted.numpy()).max() < 5e-3


def record_launches(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every launch from now on: its graph, and of an outer step its branches and positions."""
    launched: list[tuple[str, int, int]] = []
    real = pipeline.backend.launch

    def launch(graph: str, inputs: Any, outputs: Any, rows: Any = None) -> None:
        launched.append((graph, *outputs["z"].shape[:2]) if graph == "outer_step" else (graph, 0, 0))
        real(graph, inputs, outputs, rows)

    monkeypatch.setattr(pipeline.backend, "launch", launch)
    return launched


def test_steps_outside_the_interval_launch_one_branch(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.load(digits_bundle, threads=1)
    launched = record_launches(pipeline, monkeypatch)
    sampling = pipeline.resolve([0], guidance_interval=(0.3, 0.8))
    pipeline.generate([0], guidance_interval=(0.3, 0.8))
    plan = sampling.batch().plan
    guided = [step.guided for step in plan]
    assert [0.3 <= 1 - step.masked / 16 < 0.8 for step in plan] == guided and 0 < sum(guided) < len(plan) - 1
    steps_taken = [branches for graph, branches, _ in launched if graph == "outer_step"]
    assert steps_taken[-len(plan) + 1 :] == [1 + g for g in guided[1:]]
    drawn = [graph for graph, *_ in launched if graph.startswith("inner_token")]
    assert drawn == ["inner_token_guided" if g else "inner_token" for g in guided]


def test_steps_that_reuse_a_change_launch_one_branch_and_draw_guided(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.load(digits_bundle, threads=1)
    launched = record_launches(pipeline, monkeypatch)
    made = pipeline.generate([0], guidance_refresh=3)
    plan = pipeline.resolve([0], guidance_refresh=3).batch().plan
    steps_taken = [(branches, positions) for graph, branches, positions in launched if graph == "outer_step"]
    wanted = [(1 if step.reuses else 2, step.masked - step.first) for step in plan[1:]]  # the first one's z is kept
    assert steps_taken[-len(wanted) :] == wanted and [pair[0] for pair in wanted] == [1, 1, 2] * 3 + [1, 1]
    assert {graph for graph, *_ in launched if graph.startswith("inner_token")} == {"inner_token_guided"}
    assert made.images[0].info["guidance_refresh"] == 3


@pytest.mark.parametrize(("label", "scale"), [(3, 1.0), (-1, 4.0)])
def test_an_image_without_guidance_has_nothing_to_reuse(digits_bundle: Path, label: int, scale: float) -> None:
    pipeline = Pipeline.load(digits_bundle, threads=1)
    plain, reused = (pipeline.generate([label], guidance_scale=scale, guidance_refresh=m).tokens for m in (1, 3))
    assert np.array_equal(plain, reused)
    beside = pipeline.generate([label, 5], guidance_scale=[scale, 4.0], guidance_refresh=3, batch_size=2).tokens
    alone = pipeline.generate([label], guidance_scale=scale, batch_size=2).tokens
    assert np.array_equal(beside[0], alone[0])


def test_known_tokens_stay_where_a_change_is_reused(digits_bundle: Path) -> None:
    pipeline = Pipeline.load(digits_bundle, threads=1)
    tokens, mask = np.random.default_rng(0).standard_normal((1, 16, 16)).astype(np.float32), np.zeros((1, 16), bool)
    mask[0, [1, 5, 9]] = True
    known, noise = Known(tokens, mask), Noise.from_seed(3, [0], DIGITS)
    made = pipeline.generate([4], noise=noise, known=known, guidance_refresh=4).tokens
    wanted = sample(load_arinar("digits"), [4], guidance_scale=4.0, noise=noise, known=known, guidance_refresh=4)
    assert np.array_equal(made[mask], tokens[mask]) and np.abs(made - wanted.numpy()).max() < 5e-3


@pytest.mark.parametrize("refresh", [0, -1, 17, 1.5, "2", True, None])
def test_a_refresh_that_is_none_is_refused(refresh: Any) -> None:
    if refresh is None:
        assert resolve([0], guidance_refresh=None).guidance_refresh == 1
        return
    with pytest.raises(ValueError, match="guidance_refresh is .* expected an integer from 1 .* to 16"):
        resolve([0], guidance_refresh=refresh)


def test_of_so_many_guided_steps_the_first_computes_both_branches_for_all() -> None:
    plan = steps(16, 12, guidance_interval=(0.1, 0.9), guidance_refresh=3)
    assert [(step.masked, step.remaining, step.guided) for step in plan] == [
        (step.masked, step.remaining, step.guided) for step in steps(16, 12, guidance_interval=(0.1, 0.9))
    ]
    guided = [step for step in plan if step.guided]
    assert [step.reuses for step in guided] == [place % 3 != 0 for place in range(len(guided))]
    for place, step in enumerate(guided):
        last = guided[min(place + 2, len(guided) - 1)]
        assert step.ahead == (0 if step.reuses else step.remaining - last.remaining)
    assert not any(step.ahead or step.reuses for step in plan if not step.guided)
    assert steps(16, 12, guidance_refresh=1) == steps(16, 12)


def test_the_reference_adds_what_guidance_changed_at_the_step_before() -> None:
    model, noise = load_arinar("digits"), Noise.from_seed(4, [0], DIGITS)
    records: list[Any] = []
    sample(model, [3], guidance_scale=4.0, noise=noise, guidance_refresh=2, record=records.append)
    nothing, unknown = torch.zeros(1, 16, 16), torch.ones(1, 16)
    cond, uncond = (model.condition(nothing, unknown, torch.tensor([label])) for label in (3, -1))
    change = (uncond - cond)[0, records[1].positions[0]]
    torch.testing.assert_close(records[1].z_uncond - records[1].z_cond, change)
    assert (records[2].z_uncond - records[2].z_cond).shape == (records[2].step.count, model.config.z_width)


def test_the_command_takes_both_and_files_say_so(digits_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    command = ["generate", str(digits_bundle), "--labels", "3", "-o", str(tmp_path), "--threads", "1"]
    wrong = CliRunner().invoke(main, [*command, "--guidance-interval", "half"])
    assert wrong.exit_code == 2 and "LOW:HIGH" in wrong.output
    done = CliRunner().invoke(main, [*command, "--schedule", STAGED, "--guidance-interval", "0.2:1", "--guidance-refresh", "2"])
    assert done.exit_code == 0, done.output
    said = Image.open(tmp_path / "000000-3.png").info["arinar"]
    assert (
        STAGED in said
        and '"guidance_interval": [0.2, 1.0]' in said
        and '"num_iter": 7, ' in said
        and '"guidance_refresh": 2' in said
    )
