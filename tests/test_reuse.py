"""The prototype of local steps: exact where nothing is old. And the benchmark that measures what reuse costs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("benchmarks.local_steps")

import torch

from arinar.checkpoint import load_arinar
from arinar.config import PRESETS
from arinar.measure.cost import image_cost
from arinar.runtime import Noise, gmm
from arinar.sampler import sample
from arinar.schedule import steps
from benchmarks import local_steps, reuse

LABELS = torch.tensor([3, 7])
LENGTH = 16  # the digits' tokens


@pytest.fixture(scope="module")
def digits() -> Any:
    return load_arinar("digits").double()


@pytest.fixture
def rows(digits: Any) -> Any:
    """Two images, of which one is unconditional; all of their tokens, of which those that are known are read."""
    noise = Noise.from_seed(0, range(2), digits.config)
    tokens = torch.randn(2, LENGTH, digits.config.token_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return local_steps.Rows(digits, tokens, torch.as_tensor(noise.order), torch.tensor([3, -1]))


def exact(rows: Any, masked: int) -> torch.Tensor:
    """z (N, masked, C) of the unknown positions, in generation order."""
    mask = torch.zeros(rows.tokens.shape[:2]).scatter(1, rows.order[:, :masked], 1.0)
    z = rows.outer.condition(rows.tokens, mask, rows.labels)
    return z[torch.arange(len(z))[:, None], rows.order[:, :masked]]


def largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("masked", [LENGTH, 9, 1])
def test_a_refresh_is_the_exact_model(rows: Any, masked: int) -> None:
    h, _ = rows.full(masked)
    assert largest(rows.z(h, 0) - exact(rows, masked)) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize(("masked", "first"), [(9, 4), (9, 0), (16, 5), (1, 0)])
def test_a_local_step_without_a_new_token_changes_nothing(rows: Any, masked: int, first: int, buffer: bool) -> None:
    h, past = rows.full(masked)
    kept = rows.keep(past, masked, first, buffer=buffer)
    assert kept.past.decoder[0][0].shape[2] == (LENGTH - masked) + first + (4 if buffer else 0)
    assert largest(rows.local(kept, masked) - h[:, first:]) < 1e-12


@torch.no_grad()
def test_a_local_step_that_computes_every_row_is_exact(rows: Any) -> None:
    _, past = rows.full(LENGTH)
    h = rows.local(rows.keep(past, LENGTH, 0), 9)
    assert largest(rows.z(h, 0) - exact(rows, 9)) < 1e-12


@torch.no_grad()
def test_what_is_old_makes_a_difference(rows: Any) -> None:
    _, past = rows.full(12)
    z = rows.z(rows.local(rows.keep(past, 12, 4), 6), 4)
    assert 1e-3 < largest(z - exact(rows, 6)[:, 4:]) < 10


@pytest.mark.parametrize(("local", "warm_up"), [(0, 0), (3, 16)])
def test_without_local_steps_the_tokens_are_the_samplers(digits: Any, local: int, warm_up: int) -> None:
    noise = Noise.from_seed(1, range(2), digits.config)
    plan = steps(LENGTH, 12)
    made = local_steps.generate(digits, LABELS, noise, plan, guidance_scale=4.0, local=local, warm_up=warm_up)
    assert largest(made - sample(digits, LABELS, guidance_scale=4.0, num_iter=12, noise=noise)) < 1e-9


def test_groups_of_steps() -> None:
    groups = [local_steps.group_of(index, 3, 2, 9) for index in range(9)]
    assert groups == [(0, 0), (1, 1), (2, 5), (2, 5), (2, 5), (2, 5), (6, 8), (6, 8), (6, 8)]


# ------------------------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize(("preset", "num_iter"), [("base", 64), ("letters", 24), ("digits", 16)])
def test_an_exact_plan_costs_what_the_cost_model_says(preset: str, num_iter: int) -> None:
    config = PRESETS[preset]
    made = local_steps.launches(config, plan := steps(config.seq_len, num_iter))
    embedded = sum((config.seq_len - step.masked) * config.token_dim * config.encoder_width for step in plan)
    counted = 2 * (sum(one.multiply_adds(config) for one in made) + embedded)
    assert counted == pytest.approx(image_cost(config, num_iter, guided=True).outer, rel=1e-12)


def test_rows_of_local_steps() -> None:
    config = PRESETS["digits"]  # a buffer of 4
    made = local_steps.launches(config, steps(LENGTH, 16), 1, 4)
    assert len(made) == 32  # of both branches
    assert [(one.encoder, one.decoder) for one in made[8:12]] == [(8, 20), (8, 20), (5, 6), (5, 6)]
    few = local_steps.launches(config, steps(LENGTH, 16), 1, 4, keep_buffer=True)
    assert [(one.encoder, one.decoder) for one in few[8:12]] == [(8, 20), (8, 20), (1, 2), (1, 2)]


# ------------------------------------------------------------------------------------------------------------- benchmark


def test_distances_between_laws() -> None:
    """Of two normal laws of the same width, ``apart`` standard deviations from each other, in closed form."""
    apart = np.array([0.0, 0.1, 1.0, 4.0])
    laws = [gmm.plain_law(np.stack([np.ones((4, 1)), mu[:, None], np.zeros((4, 1))]), 1.0) for mu in (0 * apart, apart)]
    levels = np.broadcast_to(reuse.LEVELS, (4, len(reuse.LEVELS)))
    found = reuse.distances(*(gmm.quantile(law, levels) for law in laws))
    assert found == pytest.approx([math.erf(value / math.sqrt(8)) for value in apart], abs=1e-3)


def test_the_benchmark_measures_and_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ["digits", "--images", "2", "--num-iter", "16", "--own-images", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["reuse", *few])
    reuse.main()
    found = json.loads((tmp_path / "reuse-digits.json").read_text())
    errors = {(row["what"], row["age"]): row["all"] for row in found["errors"]}
    # A difference can be so old from a step that far in: of 2 images, 16 features.
    assert [errors[reuse.AFTER, age]["laws"] for age in range(1, 8)] == [2 * 16 * (LENGTH - age) for age in range(1, 8)]
    assert errors[reuse.AFTER, 1]["z_c"] == 0 < errors[reuse.AFTER, 1]["z_u"] < errors[reuse.UNGUIDED, 0]["z_u"]
    shares = [row["share"] for row in found["cadences"] if row["every"] == 2]
    difference, local, buffer_kept, both, fewer = shares
    assert 0.7 < difference < 0.8 and 0.4 < fewer < buffer_kept < both < local < 1
    assert [row["num_iter"] for row in found["fewer_steps"]] == [12, 8, 6, 4]
    assert sorted(row["ks_mean"] for row in found["fewer_steps"]) == [row["ks_mean"] for row in found["fewer_steps"]]
    page = (tmp_path / "reuse-digits.md").read_text()
    assert "## 16 steps" in page and reuse.BEFORE in page and "staged:64x24,64x6,128x2" in page
