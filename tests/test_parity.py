"""Parity: passes on the right model, names what is wrong with another, and its measures agree with closed forms."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

import torch

from arinar.checkpoint import load_arinar, load_vae
from arinar.cli import main
from arinar.divergence import frechet_between, frechet_distance, mixture_kl, mmd_test, responsible_component
from arinar.export import distribution
from arinar.export.parity import THRESHOLDS, ParityReport, parse_thresholds, run_parity
from arinar.model import Arinar
from arinar.runtime import Pipeline
from arinar.runtime.bundle import PRECISIONS, BundleError
from arinar.vae import AutoencoderKL

QUICK: dict[str, Any] = {"labels": [3, 7], "num_iter": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def model() -> Arinar:
    return load_arinar("digits")


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return load_vae("digits")


@pytest.fixture(scope="module")
def pipeline(digits_bundle: Path) -> Pipeline:
    return Pipeline.load(digits_bundle, threads=1)


def check(report: ParityReport, level: str, name: str) -> Any:
    return next(c for c in report.checks if (c.level, c.name) == (level, name))


def test_the_right_model_passes_every_level(pipeline: Pipeline, model: Arinar, vae: AutoencoderKL) -> None:
    report = run_parity(pipeline, model, vae, **QUICK)
    assert report.passed, report.table()
    assert {c.level for c in report.checks} == {"graph", "teacher-forced", "free-running"}
    assert len(report.curves["z"]) == 3 and np.array(report.tables["kl"]).shape == (3, 16)
    assert report.histograms["reference"] == report.histograms["deployed"]
    assert sum(report.histograms["reference"]) == 2 * 16 * 16
    assert report.images["reference"].shape == (2, 32, 32, 3)
    assert "all" in report.table() and report.to_dict()["passed"] is True
    assert set(report.provenance["sha256"]) <= set(pipeline.bundle.manifest.files)


def test_unguided_and_causal_models_pass_too(
    pipeline: Pipeline, model: Arinar, vae: AutoencoderKL, causal_bundle: Path
) -> None:
    assert run_parity(pipeline, model, vae, labels=[1], num_iter=2, guidance_scale=1.0).passed
    causal = Pipeline.load(causal_bundle, threads=1)
    report = run_parity(causal, load_arinar("digits-causal"), load_vae("digits-causal"), labels=[5])
    assert report.passed, report.table()


@pytest.mark.parametrize(("parameter", "step"), [("decoder_norm.weight", 0), ("z_proj.weight", 1)])
def test_another_model_fails_and_the_first_bad_step_is_named(
    pipeline: Pipeline, model: Arinar, vae: AutoencoderKL, parameter: str, step: int
) -> None:
    # The token projection sees nothing before step 1: at step 0 no token is known.
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(parameter).mul_(1.05)
    report = run_parity(pipeline, other, vae, **QUICK)
    found = check(report, "teacher-forced", "z")
    assert not report.passed and not found.passed
    assert f"first beyond the limit at step {step}" in found.note
    assert not check(report, "graph", "outer_step").passed and check(report, "graph", "inner_step").passed
    assert "FAIL" in report.table()


def test_an_inner_model_that_differs_shows_in_the_mixtures_only(
    pipeline: Pipeline, model: Arinar, vae: AutoencoderKL
) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.arhead.head.bias[0] += 0.5  # the first component's mean
    report = run_parity(pipeline, other, vae, **QUICK)
    assert check(report, "teacher-forced", "z").passed
    assert not check(report, "teacher-forced", "mu").passed and not check(report, "teacher-forced", "kl").passed
    assert check(report, "teacher-forced", "logvar").passed
    assert not check(report, "free-running", "images within 1 grey level").passed


def test_models_of_different_configuration_are_refused(pipeline: Pipeline, model: Arinar, vae: AutoencoderKL) -> None:
    other = Arinar(model.config.replace(inner_heads=2))
    with pytest.raises(BundleError, match="different models: inner_heads"):
        run_parity(pipeline, other, vae, **QUICK)


def test_thresholds_can_be_overridden() -> None:
    assert parse_thresholds(["z=0.5", "kl=1e-3"], "fp16").z == 0.5
    assert parse_thresholds([], "fp16") == THRESHOLDS["fp16"]
    with pytest.raises(ValueError, match="no threshold 'zz'; there are graph"):
        parse_thresholds(["zz=1"], "fp32")
    with pytest.raises(ValueError, match="'z=big' has no number"):
        parse_thresholds(["z=big"], "fp32")
    assert set(THRESHOLDS) == set(PRECISIONS)


def test_the_command_writes_a_report_and_exits_with_1_beyond_a_limit(digits_bundle: Path, tmp_path: Path) -> None:
    def run(*words: object) -> Any:
        quick = ["--checkpoint", "digits", "--labels", "3", "--num-iter", "2", "--threads", "1"]
        return CliRunner().invoke(main, ["parity", str(digits_bundle), *quick, *map(str, words)])

    result = run("--threshold", "z=0", "--report", tmp_path / "report.html")
    assert result.exit_code == 1 and "1 of" in result.stdout and "FAILED" in result.stdout
    assert "1 check failed; the first: z" in (tmp_path / "report.html").read_text()
    unknown = run("--threshold", "zeta=0")
    assert unknown.exit_code == 2 and "no threshold 'zeta'" in unknown.stderr
    np.savez(tmp_path / "stats.npz", mu=0)
    alone = run("--fid-stats", tmp_path / "stats.npz")
    assert alone.exit_code == 2 and "--distribution N" in alone.stderr


# ---------------------------------------------------------------------------------------------- closed forms


def gaussian(mu: Any, sigma: Any) -> tuple[Any, Any, Any]:
    mu, sigma = np.atleast_1d(mu)[:, None].astype(float), np.atleast_1d(sigma)[:, None].astype(float)
    return np.ones_like(mu), mu, 2 * np.log(sigma)


def test_kl_of_single_gaussians() -> None:
    m1, s1, m2, s2 = (np.array(v) for v in ([0.0, 1, -2], [1.0, 0.5, 2], [0.3, 1, 4], [1.0, 2, 1.5]))
    want = np.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5
    np.testing.assert_allclose(mixture_kl(gaussian(m1, s1), gaussian(m2, s2)), want, rtol=1e-9)


def test_kl_of_mixtures() -> None:
    rng = np.random.default_rng(0)
    p = (rng.dirichlet(np.ones(4), 20), rng.normal(size=(20, 4)), rng.normal(size=(20, 4)))
    assert np.allclose(mixture_kl(p, p), 0, atol=1e-12)
    order = rng.permutation(4)
    assert np.allclose(mixture_kl(p, tuple(v[:, order] for v in p)), 0, atol=1e-12)  # components have no order
    scaled = (p[0] * 3, p[1], p[2])  # nor do weights that do not sum to one matter
    assert np.allclose(mixture_kl(p, scaled), 0, atol=1e-12)
    # Components far apart and alike: what is left is the divergence of the weights.
    mu, logvar = np.array([[-50.0, 50.0]]), np.zeros((1, 2))
    got = mixture_kl((np.array([[0.3, 0.7]]), mu, logvar), (np.array([[0.6, 0.4]]), mu, logvar))
    np.testing.assert_allclose(got, 0.3 * np.log(0.5) + 0.7 * np.log(0.7 / 0.4), rtol=1e-9)


def test_kl_against_a_fine_grid() -> None:
    p = (np.array([0.2, 0.8]), np.array([-1.0, 1.0]), np.log([0.3, 0.6]))
    q = (np.array([0.4, 0.6]), np.array([-0.8, 1.2]), np.log([0.5, 0.4]))
    x = np.linspace(-9, 9, 200_001)

    def density(m: Any) -> Any:
        parts = zip(*m, strict=True)
        return sum(w * np.exp(-((x - mu) ** 2) / (2 * np.exp(v))) / np.sqrt(2 * np.pi * np.exp(v)) for w, mu, v in parts)

    want = (density(p) * np.log(density(p) / density(q))).sum() * (x[1] - x[0])
    assert abs(float(mixture_kl(p, q)) - want) < 1e-3 * want


def test_responsible_component() -> None:
    mixture = (np.array([0.5, 0.5]), np.array([-1.0, 1.0]), np.array([0.0, 0.0]))
    assert responsible_component(np.array([-2.0, 3.0]), mixture).tolist() == [0, 1]


def test_frechet_distance() -> None:
    eye = np.eye(3)
    assert frechet_distance(np.zeros(3), eye, np.zeros(3), eye) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(np.zeros(3), eye, np.full(3, 2.0), 4 * eye) == pytest.approx(12 + 3)
    rng = np.random.default_rng(1)
    a, b = (m @ m.T + 0.1 * eye for m in rng.normal(size=(2, 3, 3)))
    from scipy.linalg import sqrtm

    want = np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert frechet_distance(np.zeros(3), a, np.zeros(3), b) == pytest.approx(want, rel=1e-6)
    singular = np.diag([1.0, 0.0, 0.0])
    assert frechet_distance(np.zeros(3), singular, np.zeros(3), eye) == pytest.approx(2.0)
    samples = rng.normal(size=(500, 3))
    assert frechet_between(samples, samples) == pytest.approx(0, abs=1e-9)


def test_mean_discrepancy_tells_different_from_alike() -> None:
    rng = np.random.default_rng(2)
    a, b, shifted, wide = rng.normal(size=(3, 120, 4)).tolist() + [(2 * rng.normal(size=(120, 4))).tolist()]
    assert mmd_test(np.array(a), np.array(b), permutations=200)[1] > 0.05
    assert mmd_test(np.array(a), np.array(shifted) + 0.8, permutations=200)[1] < 0.01
    assert mmd_test(np.array(a), np.array(wide), permutations=200)[1] < 0.01
    distance, p = mmd_test(np.array(a), np.array(a), permutations=50)
    assert abs(distance) < 1e-12 and p == 1.0


# ---------------------------------------------------------------------------------------------- distribution

SETTINGS = {"guidance_scale": 2.0, "cfg_schedule": "linear", "temperature": 1.0, "num_iter": 2, "seed": 0}


@pytest.fixture(scope="module")
def references(model: Arinar, vae: AutoencoderKL) -> distribution.References:
    return distribution.make_references(model, vae, 80, SETTINGS)


def test_distribution_of_the_right_model(
    pipeline: Pipeline, references: distribution.References, tmp_path: Path
) -> None:
    images = references.first
    features = distribution.builtin_features(pipeline.config)(images)
    np.savez(tmp_path / "stats.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    found, deployed = distribution.compare(pipeline, references, stats=tmp_path / "stats.npz")
    assert deployed.shape == images.shape == (80, 32, 32, 3)
    assert found.frechet < 0.1 * found.yardstick and found.mmd_p > 0.5
    assert found.agreement is not None and found.drop is not None and abs(found.drop) < 0.02
    assert found.deployed_distance is not None and found.deployed_distance < 0.1 * found.yardstick


def test_distribution_of_wrong_labels(pipeline: Pipeline, references: distribution.References) -> None:
    wrong = distribution.References(
        references.first, references.second, [(label + 1) % 10 for label in references.labels], references.settings
    )
    found, _ = distribution.compare(pipeline, wrong)  # same classes in all, but not what was asked for image by image
    assert found.agreement is not None and found.agreement > 0.5
    assert found.reference_agreement is not None and found.reference_agreement < 0.2


def test_bad_statistics_features_and_counts(
    pipeline: Pipeline, model: Arinar, vae: AutoencoderKL, references: distribution.References, tmp_path: Path
) -> None:
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="features are 32 wide"):
        distribution.read_stats(tmp_path / "narrow.npz", 32)
    (tmp_path / "bad.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match="holds no statistics"):
        distribution.read_stats(tmp_path / "bad.npz", 32)
    with pytest.raises(ValueError, match="at least 64"):
        distribution.make_references(model, vae, 10, SETTINGS)
    with pytest.raises(ValueError, match="choose builtin, inception"):
        distribution.feature_extractor("vgg", model.config)
    with pytest.raises(ValueError, match="cannot be imported"):
        distribution.feature_extractor("nowhere:f", model.config)
    assert distribution.feature_extractor("arinar.judge:classifier_features", model.config)(references.first).shape == (80, 256)


def test_builtin_features_are_fixed_and_take_any_size() -> None:
    config = load_arinar("digits").config.replace(img_size=64, class_names=(), num_classes=10)
    rng = np.random.default_rng(0)
    for size in (16, 64, 100):
        images = rng.integers(0, 256, (3, size, size, 3), np.uint8)
        first, again = (distribution.builtin_features(config)(images) for _ in range(2))
        assert first.shape == (3, distribution.BUILTIN_WIDTH) and np.array_equal(first, again)
