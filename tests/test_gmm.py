"""Mixture sampling: the law against golden data and brute force, the graph against the NumPy reference."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from arinar import mixture_law
from arinar.runtime import gmm

Array = npt.NDArray[np.floating[Any]]
Float64 = npt.NDArray[np.float64]
Inputs = dict[str, Array]

PARTS = ("weight", "mu", "logvar")
INPUT_NAMES = (*PARTS, *(f"{part}_uncond" for part in PARTS), "uniforms", "guidance_scale", "temperature")
PLAIN_NAMES = (*PARTS, "uniforms", "temperature")
# Middles of equal parts of [0, 1): a law's quantiles at these are as good as many draws.
EVEN = (np.arange(2000) + 0.5) / 2000


def mixtures(rows: int, num_gaussians: int, seed: int, logvar: tuple[float, float] = (-4.0, 0.5)) -> Float64:
    """Random mixtures (3, rows, K)."""
    rng = np.random.default_rng(seed)
    weight = rng.dirichlet(np.ones(num_gaussians), rows)
    return np.stack([weight, rng.normal(size=weight.shape), rng.uniform(*logvar, weight.shape)])


def pair(rows: int, num_gaussians: int, seed: int) -> tuple[Float64, Float64]:
    """A conditional mixture and an unconditional one that resembles it, each (3, rows, K)."""
    cond, other = mixtures(rows, num_gaussians, seed), mixtures(rows, num_gaussians, seed + 1)
    uncond = np.stack([0.7 * cond[0] + 0.3 * other[0], cond[1] + 0.3 * other[1], cond[2] + 0.5])
    return cond, uncond


def guided_law(
    cond: Float64,
    uncond: Float64,
    guidance_scale: float,
    temperature: float = 1.0,
    num_candidates: int = 1000,
) -> gmm.Law:
    return gmm.guided_law(gmm.plain_law(cond, temperature), cond, uncond, guidance_scale, num_candidates)


def log_density(x: Float64, mixture: Float64) -> Float64:
    """x (any), mixture (3, K) -> log density, term by term."""
    terms = [
        math.log(weight) - 0.5 * math.log(2 * math.pi) - 0.5 * logvar - 0.5 * (x - mu) ** 2 / math.exp(logvar)
        for weight, mu, logvar in mixture.T
    ]
    return np.asarray(np.logaddexp.reduce(terms, axis=0), np.float64)


def mixture_cdf(x: Float64, mixture: Float64, temperature: float) -> Float64:
    """Exact distribution function at x (n,) of a tempered mixture (3, K)."""
    std = np.exp(0.5 * mixture[2]) * temperature
    scaled = (x[:, None] - mixture[1]) / (std * math.sqrt(2))
    return np.array([mixture[0] @ [0.5 * math.erfc(-z) for z in row] for row in scaled])


@pytest.fixture(scope="module")
def pairs(golden: Path) -> dict[str, Array]:
    with np.load(golden / "gmm_cfg" / "gmm_cfg.npz") as file:
        return dict(file)


def golden_pair(pairs: dict[str, Array]) -> tuple[Float64, Float64]:
    cond, uncond = (np.stack([pairs[f"{part}_{branch}"] for part in PARTS]) for branch in ("cond", "uncond"))
    return cond.astype(np.float64), uncond.astype(np.float64)


# -- the law


@pytest.mark.parametrize("cfg_index", range(4))
def test_law_is_that_of_the_published_scheme(pairs: dict[str, Array], cfg_index: int) -> None:
    """All golden pairs: |F(quantile) - level| <= 4 sqrt(0.25 / n + cdf_se^2), as of n = 1e5 draws."""
    cond, uncond = golden_pair(pairs)
    levels = pairs["levels"]
    for scale_index, scale in enumerate(pairs["std_scale"]):
        if pairs["cfg"][cfg_index] == 1:
            law = gmm.plain_law(cond, float(scale))
        else:
            law = guided_law(cond, uncond, float(pairs["cfg"][cfg_index]), float(scale))
        quantiles = pairs["quantiles"][:, scale_index, cfg_index]
        tolerance = 4 * np.sqrt(0.25 / 1e5 + pairs["cdf_se"][:, scale_index, cfg_index, None] ** 2)
        # F(quantile) >= level - tolerance says the same as quantile >= F^-1(level - tolerance).
        low = gmm.quantile(law, np.clip(levels - tolerance, 0, 1 - 1e-9))
        high = gmm.quantile(law, np.clip(levels + tolerance, 0, 1 - 1e-9))
        outside = ((quantiles < low) & (levels > tolerance)) | ((quantiles > high) & (levels < 1 - tolerance))
        assert not outside.any(), f"std scale {scale}: pairs {np.nonzero(outside.any(1))[0]}"


@pytest.mark.parametrize("index", [3, 60, 109, 124])
def test_draws_follow_the_golden_quantiles(pairs: dict[str, Array], index: int) -> None:
    """The public function, random uniforms, on ordinary pairs and on two where one proposal takes all."""
    count = 3000
    cond, uncond = (np.repeat(mixture[:, index : index + 1], count, 1) for mixture in golden_pair(pairs))
    uniforms = np.random.default_rng(index).random((count, gmm.NUM_UNIFORMS))
    draws = gmm.sample(tuple(cond), tuple(uncond), uniforms, guidance_scale=4.5, temperature=1.0)
    below = (draws[:, None] <= pairs["quantiles"][index, 2, 3]).mean(0)
    tolerance = 4 * math.sqrt(0.25 / count + float(pairs["cdf_se"][index, 2, 3]) ** 2)
    assert np.abs(below - pairs["levels"]).max() <= tolerance


@pytest.mark.parametrize(
    ("num_candidates", "num_gaussians", "temperature", "guidance_scale"),
    [
        (2, 2, 1.0, 4.0),
        (10, 1, 0.5, 3.0),
        (10, 4, 1.5, 4.5),
        (100, 8, 1.0, 6.0),
        (100, 2, 1.5, 1.5),
        (1000, 4, 0.8, 4.5),
    ],
)
def test_law_against_brute_force(num_candidates: int, num_gaussians: int, temperature: float, guidance_scale: float) -> None:
    """Distance between the law and simulated picks, for a related and an unrelated unconditional mixture."""
    count = 4000
    rng = np.random.default_rng(num_candidates + num_gaussians)
    cond, uncond = pair(2, num_gaussians, seed=5)
    uncond[:, 1] = mixtures(1, num_gaussians, seed=9, logvar=(-2.0, 1.0))[:, 0]
    law = guided_law(cond, uncond, guidance_scale, temperature, num_candidates)
    table = gmm.quantile(law, np.tile(EVEN, (2, 1)))
    for row in range(2):
        weight, mu, logvar = cond[:, row]
        component = rng.choice(num_gaussians, (count, num_candidates), p=weight)
        std = np.exp(0.5 * logvar[component]) * temperature
        proposals = mu[component] + std * rng.normal(size=component.shape)
        score = log_density(proposals, cond[:, row]) - log_density(proposals, uncond[:, row])
        # The largest of score + Gumbel noise is a draw in proportion to exp(score).
        pick = np.argmax(score * (guidance_scale - 1) + rng.gumbel(size=score.shape), 1)
        level = np.interp(np.sort(proposals[np.arange(count), pick]), table[row], EVEN)
        distance = np.abs(level - (np.arange(count) + 0.5) / count).max()
        # Its 0.1 % point under equal laws, and room for the quadrature.
        assert distance < 1.95 / math.sqrt(count) + 0.005


def test_law_against_a_finer_quadrature(pairs: dict[str, Array], monkeypatch: pytest.MonkeyPatch) -> None:
    """Distance from the same law with ten times the cells and five times the nodes."""
    cond, uncond = (mixture[:, ::2] for mixture in golden_pair(pairs))
    deployed = gmm.quantile(guided_law(cond, uncond, 4.5), np.tile(EVEN, (64, 1)))
    finer = {"CELLS_PER_GAUSSIAN": 640, "TABLE_NODES": 100, "NODES": 60, "BETA_TAIL": 1e-4}
    for name, value in finer.items():
        for module in (mixture_law, gmm):
            monkeypatch.setattr(module, name, value, raising=False)
    # Without the cache: its entries are of the deployed constants.
    monkeypatch.setattr(gmm, "node_plan", mixture_law.node_plan.__wrapped__)
    distances = []
    for row in range(64):
        one = slice(row, row + 1)
        fine = gmm.quantile(guided_law(cond[:, one], uncond[:, one], 4.5), EVEN[None])
        distances.append(np.abs(np.interp(deployed[row], fine[0], EVEN) - EVEN)[2:-2].max())
    assert np.mean(distances) < 0.003
    assert np.median(distances) < 0.001
    assert np.max(distances) < 0.06


@pytest.mark.parametrize("num_gaussians", [1, 2, 4, 8])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_plain_law_is_the_mixture(num_gaussians: int, temperature: float) -> None:
    mixture = mixtures(3, num_gaussians, seed=num_gaussians)
    levels = np.concatenate([[1e-5, 1e-4, 1e-3], EVEN[::20], [0.999, 0.9999, 0.99999]])
    draws = gmm.quantile(gmm.plain_law(mixture, temperature), np.tile(levels, (3, 1)))
    for row in range(3):
        error = np.abs(mixture_cdf(draws[row], mixture[:, row], temperature) - levels)
        assert error.max() < 2e-4
        assert error[[0, -1]].max() < 1e-6


def test_equal_mixtures_and_slight_guidance_approach_the_plain_draw() -> None:
    cond, uncond = pair(50, 4, seed=3)
    uniforms = np.random.default_rng(0).random((50, gmm.NUM_UNIFORMS))

    def draw(other: Float64 | None, guidance_scale: float, num_candidates: int = 1000) -> Array:
        second = None if other is None else tuple(other)
        return gmm.sample(
            tuple(cond),
            second,
            uniforms,
            guidance_scale=guidance_scale,
            temperature=0.9,
            num_candidates=num_candidates,
        )

    plain = draw(None, 4.5)
    np.testing.assert_array_equal(draw(uncond, 1.0), plain)
    np.testing.assert_array_equal(draw(uncond, 4.5, num_candidates=1), plain)
    np.testing.assert_allclose(draw(cond, 4.5), plain, atol=1e-6)
    np.testing.assert_allclose(draw(uncond, 1 + 1e-7), plain, atol=1e-5)
    # Not all draws: between two modes a little mass goes a long way.
    assert 1e-4 < np.median(np.abs(draw(uncond, 1.0137) - plain)) < 0.01


# -- a continuous function of its inputs


def test_draws_increase_with_the_uniform(pairs: dict[str, Array]) -> None:
    cond, uncond = golden_pair(pairs)
    draws = gmm.quantile(guided_law(cond, uncond, 4.5), np.tile(EVEN, (128, 1)))
    assert (np.diff(draws) >= 0).all()


def test_small_changes_of_the_inputs_move_draws_a_little() -> None:
    """Inputs off by 1e-6 must not replace a draw by another, as picking among proposals would."""
    cond, uncond = pair(400, 4, seed=11)
    rng = np.random.default_rng(0)
    uniforms = rng.random((400, gmm.NUM_UNIFORMS))

    def draw(change: float) -> Array:
        moved = [mixture + change * rng.normal(size=mixture.shape) for mixture in (cond, uncond)]
        for mixture in moved:
            mixture[0] = np.abs(mixture[0]) / np.abs(mixture[0]).sum(-1, keepdims=True)
        return gmm.sample(tuple(moved[0]), tuple(moved[1]), uniforms, guidance_scale=4.5, temperature=1.0)

    moved = np.abs(draw(1e-6) - draw(0.0))
    assert 0 < moved.max() < 1e-3
    assert np.median(moved) < 1e-5


def test_rows_do_not_depend_on_each_other() -> None:
    cond, uncond = pair(600, 3, seed=2)
    uniforms = np.random.default_rng(1).random((600, gmm.NUM_UNIFORMS))

    def draw(rows: slice) -> Array:
        return gmm.sample(tuple(cond[:, rows]), tuple(uncond[:, rows]), uniforms[rows], guidance_scale=3.0, temperature=1.0)

    together = draw(slice(None))
    alone = np.concatenate([draw(slice(row, row + 1)) for row in range(250, 600, 7)])
    np.testing.assert_allclose(alone, together[250::7], rtol=0, atol=1e-9)
    assert draw(slice(0, 0)).shape == (0,)


def extreme_inputs() -> Inputs:
    """Density ratios from e^-700 to e^+60000, a weight of zero, equal components, uniforms at both ends."""
    rows = 6
    ends = np.array([0.0, 2.0**-24, 0.5, 0.9, 1 - 2.0**-20, 1 - 2.0**-24])
    weight = np.tile([0.6, 0.399, 0.001, 0.0], (rows, 1))
    mu = np.tile([-1.0, 2.0, 2.0, 40.0], (rows, 1))
    logvar = [[0, 1, 1, 0], [-9, 1, 1, 0], [2, 2, 2, 2], [-9, -9, 2, -9], [0, 0, 0, 0], [1, -3, -3, 1]]
    logvar_uncond = [[-9] * 4, [3] * 4, [-9, 2, 2, 2], [2] * 4, [0] * 4, [-6] * 4]
    values = (weight, mu, logvar, weight[:, ::-1], mu + 0.1, logvar_uncond, ends[:, None], [4.5], [1.0])
    return {name: np.array(value, np.float32) for name, value in zip(INPUT_NAMES, values, strict=True)}


def reference(inputs: Inputs) -> Float64:
    """`gmm.sample` in float64, for named inputs of a graph -> (M, 1)."""
    wide = {name: value.astype(np.float64) for name, value in inputs.items()}
    guided = "guidance_scale" in wide
    cond = tuple(wide[part] for part in PARTS)
    uncond = tuple(wide[f"{part}_uncond"] for part in PARTS) if guided else None
    draws = gmm.sample(
        cond,
        uncond,
        wide["uniforms"],
        guidance_scale=float(wide["guidance_scale"][0]) if guided else 1.0,
        temperature=float(wide["temperature"][0]),
    )
    return np.asarray(draws, np.float64)[:, None]


def test_extreme_inputs_give_finite_draws_within_reach() -> None:
    inputs = extreme_inputs()
    draws = reference(inputs)[:, 0]
    assert np.isfinite(draws).all()
    std = np.exp(0.5 * inputs["logvar"].max(1))
    assert (np.abs(draws - inputs["mu"].mean(1)) < 40 + 6 * std).all()


# -- inputs and outputs


def test_dtype_follows_the_mixtures() -> None:
    cond, uncond = pair(2, 2, seed=0)
    uniforms = np.full((2, gmm.NUM_UNIFORMS), 0.3, np.float32)

    def draw(dtype: type[np.floating[Any]]) -> Array:
        inputs = [tuple(part.astype(dtype) for part in mixture) for mixture in (cond, uncond)]
        return gmm.sample(inputs[0], inputs[1], uniforms, guidance_scale=2.0, temperature=1.0)

    assert draw(np.float64).dtype == np.float64
    assert draw(np.float32).dtype == np.float32
    assert draw(np.float16).dtype == np.float32


def _set(index: int, value: float) -> Callable[[list[Array]], None]:
    def change(parts: list[Array]) -> None:
        parts[index][1, 0] = value

    return change


def _cut(index: int) -> Callable[[list[Array]], None]:
    def change(parts: list[Array]) -> None:
        parts[index] = parts[index][:, :-1]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(1, math.nan), r"cond mu has values that are not finite in 1 rows, the first is row 1"),
        (_set(2, math.inf), r"cond logvar has values that are not finite"),
        (_set(0, -0.5), r"cond weight of row 1 is \[-0.5 "),
        (_set(0, 7.0), r"cond weight of row 1 .* sum 7.*expected weights >= 0 that sum to 1"),
        (_cut(1), r"cond mu has shape \(3, 1\); expected \(N, K\), here \(3, 2\)"),
        (_set(4, math.nan), r"uncond mu has values that are not finite"),
        (_cut(3), r"uncond weight has shape \(3, 1\); expected \(N, K\), here \(3, 2\)"),
        (_set(6, 1.0), r"uniforms has values outside \[0, 1\)"),
        (_set(6, math.nan), r"uniforms has values outside \[0, 1\)"),
        (_cut(6), r"uniforms has shape \(3, 0\); expected \(N, NUM_UNIFORMS\) = \(3, 1\)"),
    ],
)
def test_bad_arrays_are_named(change: Callable[[list[Array]], None], message: str) -> None:
    cond, uncond = pair(3, 2, seed=0)
    parts: list[Array] = [*cond, *uncond, np.full((3, gmm.NUM_UNIFORMS), 0.5)]
    change(parts)
    with pytest.raises(ValueError, match=message):
        gmm.sample(tuple(parts[:3]), tuple(parts[3:6]), parts[6], guidance_scale=2.0, temperature=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 0.9}, r"guidance_scale is 0.9; expected a finite number, at least 1"),
        ({"guidance_scale": math.nan}, r"guidance_scale is nan"),
        ({"temperature": 0.0}, r"temperature is 0.0; expected a finite number above 0"),
        ({"num_candidates": 0}, r"num_candidates is 0; expected at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    cond, uncond = pair(3, 2, seed=0)
    uniforms = np.full((3, gmm.NUM_UNIFORMS), 0.5)
    arguments = {"guidance_scale": 2.0, "temperature": 1.0, **arguments}
    with pytest.raises(ValueError, match=message):
        gmm.sample(tuple(cond), tuple(uncond), uniforms, **arguments)


# -- the graph


def random_inputs(rows: int, guidance_scale: float, temperature: float, seed: int = 0) -> Inputs:
    cond, uncond = pair(rows, 4, seed)
    uniforms = np.random.default_rng(seed).random((rows, gmm.NUM_UNIFORMS))
    values = (*cond, *uncond, uniforms, [guidance_scale], [temperature])
    return {name: np.array(value, np.float32) for name, value in zip(INPUT_NAMES, values, strict=True)}


def graph(module: Any, inputs: Inputs, path: Path) -> Any:
    """The module's ONNX graph, batch dynamic, in an ONNX Runtime session."""
    torch = pytest.importorskip("torch")
    onnxruntime = pytest.importorskip("onnxruntime")
    batch = torch.export.Dim("M", min=1, max=8192)
    shapes = tuple({0: batch} if value.ndim == 2 else None for value in inputs.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            tuple(torch.from_numpy(value) for value in inputs.values()),
            path,
            dynamo=True,
            opset_version=20,
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
            input_names=list(inputs),
            output_names=["feature"],
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def guided_graph(tmp_path_factory: pytest.TempPathFactory) -> Any:
    mixture = pytest.importorskip("arinar.mixture")
    path = tmp_path_factory.mktemp("graphs") / "guided.onnx"
    return graph(mixture.MixtureSample(4, gmm.NUM_CANDIDATES), random_inputs(2, 3.0, 1.0), path)


@pytest.fixture(scope="module")
def plain_graph(tmp_path_factory: pytest.TempPathFactory) -> Any:
    mixture = pytest.importorskip("arinar.mixture")
    drawn = random_inputs(2, 1.0, 1.0)
    inputs = {name: drawn[name] for name in PLAIN_NAMES}
    path = tmp_path_factory.mktemp("graphs") / "plain.onnx"
    return graph(mixture.PlainMixtureSample(4, gmm.NUM_CANDIDATES), inputs, path)


def component_std(inputs: Inputs) -> Array:
    """Smallest component std of each row, (M, 1)."""
    return np.asarray(np.exp(0.5 * inputs["logvar"].min(1, keepdims=True)) * inputs["temperature"])


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize(("guidance_scale", "temperature"), [(1.0137, 1.0), (4.5, 0.9), (8.0, 1.5)])
def test_guided_graph_matches_the_reference(guided_graph: Any, rows: int, guidance_scale: float, temperature: float) -> None:
    inputs = random_inputs(rows, guidance_scale, temperature, seed=rows)
    (feature,) = guided_graph.run(None, inputs)
    assert feature.shape == (rows, 1)
    assert np.abs((feature - reference(inputs)) / component_std(inputs)).max() < 1e-3


@pytest.mark.parametrize("cfg", [1.5, 3.0, 4.5])
def test_guided_graph_matches_the_reference_on_golden_pairs(guided_graph: Any, pairs: dict[str, Array], cfg: float) -> None:
    cond, uncond = golden_pair(pairs)
    uniforms = np.random.default_rng(0).random((128, gmm.NUM_UNIFORMS))
    values = (*cond, *uncond, uniforms, [cfg], [1.0])
    inputs = {name: np.array(value, np.float32) for name, value in zip(INPUT_NAMES, values, strict=True)}
    (feature,) = guided_graph.run(None, inputs)
    error = np.abs((feature - reference(inputs)) / component_std(inputs))
    # The worst are pairs where one proposal in a thousand, far out in a tail, takes all the weight.
    assert error.max() < 1e-2
    assert np.median(error) < 1e-5


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_plain_graph_matches_the_reference(plain_graph: Any, rows: int) -> None:
    drawn = random_inputs(rows, 1.0, 1.2, seed=rows)
    inputs = {name: drawn[name] for name in PLAIN_NAMES}
    (feature,) = plain_graph.run(None, inputs)
    assert feature.shape == (rows, 1)
    assert np.abs((feature - reference(inputs)) / component_std(inputs)).max() < 1e-3


def test_graph_keeps_extreme_inputs_finite(guided_graph: Any) -> None:
    inputs = extreme_inputs()
    (feature,) = guided_graph.run(None, inputs)
    assert np.isfinite(feature).all()
    std = np.exp(0.5 * inputs["logvar"].max(1, keepdims=True))
    assert np.abs((feature - reference(inputs)) / std).max() < 0.05


def test_graphs_have_a_dynamic_batch(guided_graph: Any, plain_graph: Any) -> None:
    for session, names in ((guided_graph, INPUT_NAMES), (plain_graph, PLAIN_NAMES)):
        assert [value.name for value in session.get_inputs()] == list(names)
        expected = {"guidance_scale": [1], "temperature": [1], "uniforms": ["M", gmm.NUM_UNIFORMS]}
        for value in session.get_inputs():
            assert value.shape == expected.get(value.name, ["M", 4])
        (output,) = session.get_outputs()
        assert (output.name, output.shape, output.type) == ("feature", ["M", 1], "tensor(float)")


@pytest.mark.parametrize("num_gaussians", [1, 2, 8])
@pytest.mark.parametrize("num_candidates", [1, 2, 100, 1000])
def test_torch_draws_match_the_reference(num_gaussians: int, num_candidates: int) -> None:
    torch = pytest.importorskip("torch")
    mixture = pytest.importorskip("arinar.mixture")
    cond, uncond = pair(40, num_gaussians, seed=num_gaussians)
    uniforms = np.random.default_rng(4).random((40, gmm.NUM_UNIFORMS))
    arguments: dict[str, Any] = {"guidance_scale": 3.0, "temperature": 1.1, "num_candidates": num_candidates}
    wanted = gmm.sample(tuple(cond), tuple(uncond), uniforms, **arguments)
    rows = {n: torch.full((40,), v) if isinstance(v, float) else v for n, v in arguments.items()}
    for dtype, atol in ((torch.float64, 1e-5), (torch.float32, 1e-3)):
        tensors = [tuple(torch.from_numpy(part).to(dtype) for part in parts) for parts in (cond, uncond)]
        drawn = mixture.draw_mixture(*tensors, torch.from_numpy(uniforms), **rows)
        assert drawn.dtype == dtype
        np.testing.assert_allclose(drawn.numpy(), wanted, rtol=0, atol=atol)
    plain = mixture.draw_mixture(tensors[0], None, torch.from_numpy(uniforms), **rows)
    wanted = gmm.sample(tuple(cond), None, uniforms, **arguments)
    np.testing.assert_allclose(plain.numpy(), wanted, rtol=0, atol=1e-4)
