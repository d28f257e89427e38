"""The draw kernel, run by the CPU from its CUDA source, against the law's reference in float64."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cpu_kernels import SCHEDULES, CpuKernels, on_cpu, requires_compiler

from arinar.runtime import Pipeline, gmm
from arinar.runtime.kernels.source import DRAW_THREADS, FOLDER, MOST_GAUSSIANS, Source, draw_source

pytestmark = requires_compiler

Array = npt.NDArray[Any]
PARTS = ("weight", "mu", "logvar")
FEATURES, POSITION = 5, 3


def draw(
    cond: Array,
    uncond: Array | None,
    uniforms: Array,
    guidance_scale: Any = 1.0,
    temperature: Any = 1.0,
    *,
    num_candidates: int = 1000,
    schedule: int = 0,
    kernels: CpuKernels | None = None,
) -> Array:
    """Mixtures (3, N, K), uniforms (N,) -> draws (N,), what else the kernel writes being checked."""
    rows, num_gaussians = cond.shape[1:]
    kernels = kernels or on_cpu(draw_source(num_gaussians, num_candidates))
    parts = cond if uncond is None else np.concatenate([cond, uncond], 1)
    mixture = [np.ascontiguousarray(part, np.float32) for part in parts]
    scale = None if uncond is None else np.full(rows, guidance_scale, np.float32)
    feature = np.full((parts.shape[1] + 1, 1), 77, np.float32)
    tokens = np.full((rows + 1, FEATURES), 77, np.float32)
    given = [*mixture, uniforms.astype(np.float32), scale, np.full(rows, temperature, np.float32)]
    arguments = [*given, feature, tokens, FEATURES, POSITION]
    kernels.run("mixture_draw", (rows, 1, 1), (DRAW_THREADS, 1, 1), arguments, schedule=schedule)
    halves = feature[:-1, 0].reshape(-1, rows)
    assert (halves == halves[0]).all() or np.isnan(halves).any()
    assert np.array_equal(tokens[:-1, POSITION], halves[0], equal_nan=True)
    untouched = np.delete(tokens, POSITION, 1)
    assert (untouched == 77).all() and (tokens[-1] == 77).all() and feature[-1] == 77
    return halves[0].copy()


def reference(
    cond: Array, uncond: Array | None, uniforms: Array, guidance_scale: Any, temperature: Any, num_candidates: int = 1000
) -> Array:
    """In float64, from the very numbers that the kernel gets."""
    exact = [np.asarray(value, np.float32).astype(np.float64) for value in (uniforms, guidance_scale, temperature)]
    mixtures = [None if m is None else tuple(m.astype(np.float32).astype(np.float64)) for m in (cond, uncond)]
    return gmm.sample(
        mixtures[0],
        mixtures[1],
        exact[0][:, None],
        guidance_scale=exact[1],
        temperature=exact[2],
        num_candidates=num_candidates,
    )


def mixtures(rows: int, num_gaussians: int, seed: int) -> tuple[Array, Array]:
    """Random conditional mixtures and unconditional ones that resemble them, each (3, rows, K)."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(2):
        weight = rng.dirichlet(np.ones(num_gaussians), rows)
        found.append(np.stack([weight, rng.normal(size=weight.shape), rng.uniform(-4, 0.5, weight.shape)]))
    cond, other = found
    return cond, np.stack([0.7 * cond[0] + 0.3 * other[0], cond[1] + 0.3 * other[1], cond[2] + 0.5])


@pytest.fixture(scope="module")
def pairs(golden: Path) -> dict[str, Array]:
    with np.load(golden / "gmm_cfg" / "gmm_cfg.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def golden_mixtures(pairs: dict[str, Array]) -> tuple[Array, Array]:
    cond, uncond = (np.stack([pairs[f"{part}_{branch}"] for part in PARTS]) for branch in ("cond", "uncond"))
    return cond, uncond


# -- the law


def test_draws_are_the_references_on_all_golden_pairs(pairs: dict[str, Array], golden_mixtures: tuple[Array, Array]) -> None:
    """128 pairs of mixtures, every scale and guidance."""
    cond, uncond = golden_mixtures
    uniforms = np.random.default_rng(0).random(cond.shape[1])
    errors = {}
    for scale in pairs["std_scale"]:
        for cfg in pairs["cfg"]:
            error = np.abs(draw(cond, uncond, uniforms, cfg, scale) - reference(cond, uncond, uniforms, cfg, scale))
            errors[f"pair {error.argmax()}, scale {scale}, guidance {cfg}"] = float(error.max())
    worst = max(errors, key=lambda case: errors[case])
    print(f"worst error {errors[worst]:.2e}: {worst}")
    assert errors[worst] < 5e-5, worst


def test_draws_far_out(golden_mixtures: tuple[Array, Array]) -> None:
    """At the ends of [0, 1), as far as float32 goes."""
    cond, uncond = golden_mixtures
    uniforms = np.random.default_rng(0).choice([0.0, 2.0**-24, 1e-6, 1 - 1e-6, 1 - 2.0**-24], cond.shape[1])
    for scale, cfg in ((1.1, 3.0), (0.9, 1.0)):
        error = np.abs(draw(cond, uncond, uniforms, cfg, scale) - reference(cond, uncond, uniforms, cfg, scale))
        assert error.max() < 5e-5


def test_the_law_of_the_draws_is_the_published_schemes(pairs: dict[str, Array], golden_mixtures: tuple[Array, Array]) -> None:
    """All golden pairs, scales and guidances, by the tolerance that belongs to them, as of n = 1e5 draws: |F(quantile) - level|
    <= 4 sqrt(0.25 / n + cdf_se^2). Draws at levels on either side of it enclose the quantile; the level is another for each
    pair."""
    cond, uncond = golden_mixtures
    rows = np.arange(cond.shape[1])
    for scale_index, scale in enumerate(pairs["std_scale"]):
        for cfg_index, cfg in enumerate(pairs["cfg"]):
            which = (rows * 37 + scale_index * 5 + cfg_index) % len(pairs["levels"])
            level, quantile = pairs["levels"][which], pairs["quantiles"][rows, scale_index, cfg_index, which]
            tolerance = 4 * np.sqrt(0.25 / 1e5 + pairs["cdf_se"][:, scale_index, cfg_index] ** 2)
            low, high = (
                draw(cond, uncond, np.clip(level + shift, 0, 1 - 2.0**-24), cfg, scale) for shift in (-tolerance, tolerance)
            )
            outside = ((quantile < low) & (level > tolerance)) | ((quantile > high) & (level < 1 - tolerance))
            assert not outside.any(), f"std scale {scale}, guidance {cfg}: pairs {np.nonzero(outside)[0]}"


def test_draws_along_real_trajectories(demo_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mixture that guided digits are drawn from, features forced to be the graph's."""
    pipeline = Pipeline.load(demo_bundle("digits"), backend="onnxruntime-cpu", threads=1, inner="stepwise", verify=False)
    drawn: list[dict[str, Array]] = []
    launch = pipeline.backend.launch

    def spy(graph: str, inputs: Any, outputs: Any, rows: Any = None) -> None:
        launch(graph, inputs, outputs, rows)
        if graph == "mixture_sample_guided":
            count = inputs["mu"].shape[0]
            drawn.append({name: value.reshape(count, -1).copy() for name, value in inputs.items()})

    monkeypatch.setattr(pipeline.backend, "launch", spy)
    pipeline.generate([0, 1, 7], seed=3, num_iter=4, guidance_scale=3.0)
    assert len(drawn) == 4 * pipeline.config.token_dim
    stacked = {name: np.concatenate([inputs[name] for inputs in drawn]) for name in drawn[0]}
    cond, uncond = (np.stack([stacked[f"{part}{suffix}"] for part in PARTS]) for suffix in ("", "_uncond"))
    rest = [stacked[name][:, 0] for name in ("uniforms", "guidance_scale", "temperature")]
    error = np.abs(draw(cond, uncond, *rest) - reference(cond, uncond, *rest))
    print(f"{len(error)} draws, worst error {error.max():.2e}: draw {error.argmax()}")
    assert error.max() < 5e-5


@pytest.mark.parametrize("num_gaussians", [1, 2, 3, 8, MOST_GAUSSIANS])
@pytest.mark.parametrize("num_candidates", [1, 2, 100])
def test_other_numbers_of_gaussians_and_candidates(num_gaussians: int, num_candidates: int) -> None:
    """A block's threads have several cells each, or none; of one candidate a guided draw is a plain one."""
    cond, uncond = mixtures(6, num_gaussians, seed=num_gaussians)
    uniforms = np.random.default_rng(1).random(6)
    for pair in (uncond, None):
        guidance = 1.0 if pair is None else 3.0
        have = draw(cond, pair, uniforms, guidance, 0.9, num_candidates=num_candidates)
        assert np.abs(have - reference(cond, pair, uniforms, guidance, 0.9, num_candidates)).max() < 1e-4


def test_guidance_and_temperature_are_each_rows_own() -> None:
    cond, uncond = mixtures(7, 4, seed=3)
    uniforms = np.random.default_rng(2).random(7)
    guidance, temperature = np.array([1, 4, 1, 1.5, 9, 2, 30.0]), np.array([1, 0.5, 2, 1, 0.8, 3, 1.0])
    have = draw(cond, uncond, uniforms, guidance, temperature)
    assert np.abs(have - reference(cond, uncond, uniforms, guidance, temperature)).max() < 1e-4
    plain = draw(cond, None, uniforms, 1.0, temperature)
    assert np.array_equal(have[guidance == 1], plain[guidance == 1])


def test_a_rows_bits_do_not_depend_on_the_others() -> None:
    cond, uncond = mixtures(9, 4, seed=4)
    uniforms, guidance = np.random.default_rng(3).random(9), np.linspace(1, 6, 9)
    together = draw(cond, uncond, uniforms, guidance)
    for row in range(9):
        one = slice(row, row + 1)
        assert np.array_equal(draw(cond[:, one], uncond[:, one], uniforms[one], guidance[one]), together[one])
    order = np.random.default_rng(4).permutation(9)
    assert np.array_equal(draw(cond[:, order], uncond[:, order], uniforms[order], guidance[order]), together[order])


def test_draws_increase_with_the_uniform() -> None:
    cond, uncond = (np.repeat(part[:, :1], 64, 1) for part in mixtures(1, 4, seed=5))
    draws = draw(cond, uncond, np.linspace(0, 1 - 2.0**-24, 64), 4.0)
    assert (np.diff(draws) >= 0).all() and draws[0] < draws[-1]


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("branch", ["cond", "uncond"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_drawn_from_as_nan(part: int, branch: str, value: float) -> None:
    """So that the loop says so; and no other row notices."""
    cond, uncond = mixtures(3, 4, seed=6)
    uniforms = np.array([0.2, 0.5, 0.9])
    want = draw(cond, uncond, uniforms, 3.0)
    (cond if branch == "cond" else uncond)[part, 1, 2] = value
    have = draw(cond, uncond, uniforms, 3.0)
    assert np.isnan(have[1]) and np.array_equal(have[[0, 2]], want[[0, 2]])


# -- its threads


def test_the_order_of_threads_makes_no_difference() -> None:
    """Between two barriers no thread reads what another writes: whichever runs first, the bits are the same."""
    for num_gaussians in (1, 4, 6):
        cond, uncond = mixtures(4, num_gaussians, seed=7)
        uniforms = np.random.default_rng(5).random(4)
        for pair in (uncond, None):
            draws = [draw(cond, pair, uniforms, 3.0, schedule=schedule) for schedule in SCHEDULES]
            assert all(np.array_equal(draws[0], other) for other in draws[1:])


DRAWING = (FOLDER / "draw.cuh").read_text()
BARRIERS = [match.start() for match in re.finditer(r"__syncthreads\(\);", DRAWING)]


def edited(source: Source, place: int, barrier: str) -> CpuKernels:
    """With something else in place of a barrier."""
    text = DRAWING[:place] + DRAWING[place:].replace("__syncthreads()", barrier, 1)
    return CpuKernels(source.text, source.headers | {"draw.cuh": text})


@pytest.mark.parametrize("index", range(len(BARRIERS)))
def test_a_barrier_that_is_left_out_is_noticed(index: int) -> None:
    """Each of them is needed, and the orders of threads show it."""
    broken = edited(draw_source(4, 1000), BARRIERS[index], "")
    cond, uncond = mixtures(3, 4, seed=8)
    uniforms = np.array([0.1, 0.6, 0.97])

    def noticed(other: Array | None) -> bool:
        right = draw(cond, other, uniforms, 3.0)
        draws = (draw(cond, other, uniforms, 3.0, schedule=schedule, kernels=broken) for schedule in SCHEDULES)
        return not all(np.array_equal(right, wrong) for wrong in draws)

    assert noticed(uncond) or noticed(None)


def test_a_barrier_that_some_threads_do_not_reach_is_an_error() -> None:
    broken = edited(draw_source(2, 1000), BARRIERS[0], "if (threadIdx.x != 70) __syncthreads()")
    cond, uncond = mixtures(1, 2, seed=9)
    with pytest.raises(RuntimeError, match=r"mixture_draw: threads wait for one another: .*255 at the block's barrier in line"):
        draw(cond, uncond, np.array([0.5]), 3.0, kernels=broken)
