"""Parity: passes on the right model, names what is wrong with another, and its measures agree with closed forms."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

import torch
from tiny_bundles import TINY, tiny_model

from arinar.checkpoint import load_arinar, load_vae
from arinar.cli import main
from arinar.export.bundle import export_bundle
from arinar.gmm_law import LAW, mixture_kl, responsible_component
from arinar.measure import distribution, features
from arinar.measure import parity as parity_module
from arinar.measure.checks import CONTROL_FACTOR, ORIGINS, THRESHOLDS, Check, ParityReport, parse_thresholds
from arinar.measure.distances import MAX_PSNR, frechet_between, frechet_distance, mmd_test, psnr
from arinar.measure.parity import add_distribution, run_parity
from arinar.measure.parity_report import render
from arinar.model import Arinar
from arinar.runtime import Noise, Pipeline
from arinar.runtime.backends.engines import EngineError
from arinar.runtime.bundle import BundleError
from arinar.sampler import sample
from arinar.schemes import SCHEMES
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
    for name in ("z", *LAW.parts, "kl"):
        largest, mean = (np.array(report.curves[f"{name}{kind}"]) for kind in ("", " mean"))
        assert largest.shape == mean.shape == (3,) and (mean > 0).all() and (mean < largest).all()
    for name in LAW.parts:  # the same numbers, by feature as well
        largest, mean = (np.array(report.tables[f"{name}{kind}"]) for kind in ("", " mean"))
        assert largest.shape == mean.shape == (3, 16)
        np.testing.assert_allclose(largest.max(1), report.curves[name])
        np.testing.assert_allclose(mean.mean(1), report.curves[f"{name} mean"])
    assert np.array(report.tables["kl"]).shape == (3, 16)
    for prefix in ("", "own "):
        assert report.histograms[f"{prefix}reference"] == report.histograms[f"{prefix}deployed"]
        assert sum(report.histograms[f"{prefix}reference"]) == 2 * 16 * 16
    assert check(report, "free-running", "same picks").value == 1 and report.curves["same picks"] == [1, 1, 1]
    compared = {c.name for c in report.checks if c.level == "graph"}
    assert compared == set(pipeline.bundle.manifest.graphs["fp32"])  # what generation runs, and all the rest
    assert report.first_divergence is None and report.provenance["exported from these weights"] == "yes"
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


@pytest.mark.parametrize("kind", ["digits", "digits-causal"])
def test_an_edit_is_compared_as_well(demo_bundle: Any, kind: str) -> None:
    pipeline, model, vae = Pipeline.load(demo_bundle(kind), threads=1), load_arinar(kind), load_vae(kind)
    few: dict[str, Any] = {"labels": [3, 7], "num_iter": 3 if kind == "digits" else None, "guidance_scale": 2.0}
    plain, edited = (run_parity(pipeline, model, vae, edit=edit, **few) for edit in (False, True))
    assert edited.passed, edited.table()
    added = [c for c in edited.checks if c not in plain.checks]
    free = [c.name for c in plain.checks if c.level == "free-running"]
    assert [c.name for c in added] == [f"edit: {name}" for name in free] and {c.level for c in added} == {"free-running"}
    assert check(edited, "free-running", "edit: same picks").note == "each side's own draws, 256 features"  # of half the tokens
    assert edited.images.keys() == plain.images.keys() and edited.curves.keys() == plain.curves.keys()
    for name in ("reference", "deployed"):
        assert np.array_equal(edited.images[name], plain.images[name])  # the free run's, not the edit's
    page = render(edited)
    assert "edit: picks of the same component" in page and page.count("100 %") > render(plain).count("100 %")
    with_control = run_parity(pipeline, model, vae, edit=True, control=True, **few)
    assert with_control.passed and all(c.control is not None for c in with_control.checks if c.name.startswith("edit: "))


def test_an_edit_that_differs_fails_by_its_own_name(
    pipeline: Pipeline, model: Arinar, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deployed side is made to read its known tokens wrongly: levels 1 and 2 cannot see that."""
    fill = pipeline.loop.fill

    def wrong(state: Any, batch: Any, seconds: Any) -> None:
        fill(state, batch, seconds)
        if batch.known is not None:
            state.tokens[-1] += 0.5

    monkeypatch.setattr(pipeline.loop, "fill", wrong)
    report = run_parity(pipeline, model, vae, edit=True, **QUICK)
    assert report.failed and all(c.name.startswith("edit: ") for c in report.failed), report.table()


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
    assert check(report, "graph", "outer_first").passed == (step > 0)
    first_graph = "outer_step" if step else "outer_first"
    assert report.first_divergence == f"level 1, graph: {first_graph}, output z"
    assert report.first_divergence in report.table() and "exported from other weights" in report.table()
    # With the graphs' limit out of the way, what the trajectory shows is named, by its outer step.
    loose = parse_thresholds(["graph=1", "token=1"], "fp32")
    report = run_parity(pipeline, other, vae, thresholds=loose, **QUICK)
    first = report.first_failure
    assert first is not None and first.level == "teacher-forced" and first.step == step
    assert report.first_divergence is not None and f"outer step {step}" in report.first_divergence


def test_an_inner_model_that_differs_shows_in_the_mixtures_only(pipeline: Pipeline, model: Arinar, vae: AutoencoderKL) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.arhead.head.bias[0] += 0.5  # the first component's mean
    report = run_parity(pipeline, other, vae, **QUICK)
    assert check(report, "teacher-forced", "z").passed
    assert not check(report, "teacher-forced", "mu").passed and not check(report, "teacher-forced", "kl").passed
    assert check(report, "teacher-forced", "logvar").passed
    assert "feature" in check(report, "teacher-forced", "mu").where
    for name in ("inner_step", "inner_token", "inner_token_guided"):
        assert not check(report, "graph", name).passed, name
    assert not check(report, "free-running", "images within 1 grey level").passed
    assert check(report, "free-running", "same picks").value < 1
    assert not check(report, "free-running", "median PSNR, dB").passed


def test_values_that_are_not_finite_never_pass(
    pipeline: Pipeline, model: Arinar, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(pipeline: Any, graph: Any, feed: Any, shapes: Any) -> Any:
        return [np.full(shape, np.nan, np.float32) for shape in shapes]

    with monkeypatch.context() as patch:  # a backend that does not notice
        patch.setattr(parity_module, "launch", nothing)
        report = run_parity(pipeline, model, vae, **QUICK)
    failed = {c.name for c in report.failed}
    assert {"outer_step", "inner_token_guided", "vae_decoder"} <= failed and "z" not in failed
    json.loads(json.dumps(report.to_dict(), allow_nan=False))

    def refuse(graph: str, *arguments: Any) -> None:
        raise FloatingPointError(f"graph {graph!r} made non-finite values in its output 'z'")

    with monkeypatch.context() as patch:  # and one that does
        patch.setattr(pipeline.backend, "launch", refuse)
        report = run_parity(pipeline, model, vae, distribution=64, **QUICK)
    assert {c.name for c in report.failed} >= {"outer_step", "finite values", "finite images"}
    assert report.distribution is None and "level 4 was not run" in report.notes[0]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("decoder_norm.weight")[0] = np.inf
    with pytest.raises(FloatingPointError, match="the checkpoint itself gives values that are not finite .* at outer step 0"):
        run_parity(pipeline, other, vae, **QUICK)


@pytest.mark.parametrize(("levels", "passed"), [(1, True), (2, False)])
def test_one_grey_level_may_differ_in_dark_images_too(
    pipeline: Pipeline, model: Arinar, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, levels: int, passed: bool
) -> None:
    run_module, launch = parity_module.run_module, parity_module.launch

    def dark(spec: Any, feed: Any) -> Any:
        made = run_module(spec, feed)
        return [np.full_like(made[0], 100)] if spec.name == "vae_decoder" else made

    def brighter(pipeline: Pipeline, graph: Any, feed: Any, shapes: Any) -> Any:
        made = launch(pipeline, graph, feed, shapes)
        return [np.full_like(made[0], 100 + levels)] if graph.name == "vae_decoder" else made

    monkeypatch.setattr(parity_module, "run_module", dark)
    monkeypatch.setattr(parity_module, "launch", brighter)
    report = run_parity(pipeline, model, vae, **QUICK)
    assert check(report, "graph", "vae_decoder").passed is passed


def test_a_graph_without_engine_is_left_out_only_where_generation_can_do_without(
    pipeline: Pipeline, model: Arinar, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = parity_module.launch
    missing = "vae_encoder"

    def no_engine(pipeline: Any, graph: Any, *arguments: Any) -> Any:
        if graph.name == missing:
            raise EngineError(f"no engine of graph {graph.name!r}")
        return launch(pipeline, graph, *arguments)

    monkeypatch.setattr(parity_module, "launch", no_engine)
    report = run_parity(pipeline, model, vae, **QUICK)
    assert report.passed and report.notes == [
        "graph vae_encoder was not compared, generation does not need it: no engine of graph 'vae_encoder'"
    ]
    missing = "inner_step"
    with pytest.raises(EngineError, match="inner_step"):
        run_parity(pipeline, model, vae, **QUICK)


def test_the_law_that_a_bundle_was_exported_with_is_the_references_too(tmp_path: Path) -> None:
    """N of the guided draw is a parameter of the export: recorded in the manifest, and what parity compares with."""
    tiny, autoencoder = tiny_model(TINY)
    manifest = export_bundle(tiny, autoencoder, tmp_path / "bundle", law={"num_candidates": 3}, untrained=True)
    assert manifest.law == {"num_candidates": 3}
    pipeline = Pipeline.load(tmp_path / "bundle", threads=1)
    settings: dict[str, Any] = {"guidance_scale": 4.0, "num_iter": 4}
    report = run_parity(pipeline, tiny, autoencoder, labels=[0, 1, 2], **settings)
    assert report.passed, report.table()
    have = pipeline.generate([0, 1, 2], seed=0, **settings).tokens
    noise = Noise.from_seed(0, range(3), TINY)
    for law, same in (({"num_candidates": 3}, True), (None, False)):
        want = sample(tiny, torch.tensor([0, 1, 2]), noise=noise, law=law, **settings).numpy()
        assert bool(np.abs(have - want).max() < 1e-3) is same
    with pytest.raises(BundleError, match="another model"):
        export_bundle(tiny, autoencoder, tmp_path / "bundle", precision="fp16")


@pytest.fixture(scope="module")
def harsh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Arinar, AutoencoderKL]:
    """A random model of large weights: its mixtures are so narrow that float32's rounding sends draws elsewhere."""
    model, autoencoder = tiny_model(TINY)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim >= 2:
                value.mul_(3)
    folder = tmp_path_factory.mktemp("harsh") / "bundle"
    export_bundle(model, autoencoder, folder, untrained=True)
    return Pipeline.load(folder, threads=1), model, autoencoder


HARSH: dict[str, Any] = {"labels": [0, 1, 2] * 4, "num_iter": 4, "guidance_scale": 2.0}


def test_harsh_weights_pass_as_far_as_float32_can_tell(harsh: tuple[Pipeline, Arinar, AutoencoderKL]) -> None:
    report = run_parity(*harsh, **HARSH)
    assert report.passed, report.table()
    widened = {(c.level, c.name) for c in report.widened}
    assert widened >= {("teacher-forced", "kl"), ("teacher-forced", "mean kl"), ("free-running", "images within 1 grey level")}
    for name, limit in (("kl", THRESHOLDS["fp32"].kl), ("mean kl", THRESHOLDS["fp32"].mean_kl)):
        found = check(report, "teacher-forced", name)  # beyond the limit, as float32 is
        assert found.value > limit and found.control > limit and f"limit widened from {limit:g}" in found.note
    assert not check(report, "teacher-forced", "z").widened and not any(c.widened for c in report.checks if c.level == "graph")
    assert "by limits that the control widened" in report.table()
    assert "float32 itself parts that far on these weights" in report.table()
    kept = json.loads(json.dumps(report.to_dict(), allow_nan=False))["control"]
    assert len(kept["curves"]["kl"]) == len(kept["curves"]["same picks"]) == 4 and kept["factor"] == CONTROL_FACTOR


@pytest.mark.parametrize("parameter", ["decoder_norm.weight", "z_proj.weight", "arhead.head.bias"])
def test_one_wrong_weight_fails_on_harsh_weights_too(harsh: tuple[Pipeline, Arinar, AutoencoderKL], parameter: str) -> None:
    pipeline, model, autoencoder = harsh
    other = copy.deepcopy(model)
    with torch.no_grad():
        value = other.get_parameter(parameter).view(-1)
        value[0] += 0.1 if parameter.endswith("bias") else 0.05 * value[0]
    report = run_parity(pipeline, other, autoencoder, **HARSH)
    failed = {(c.level, c.name) for c in report.failed}
    assert failed >= {("teacher-forced", "mu"), ("teacher-forced", "kl"), ("teacher-forced", "mean kl")}, report.table()
    assert "what failed lies beyond that" in report.table()


def test_the_control_is_computed_where_it_is_needed_or_asked_for(pipeline: Pipeline, model: Arinar, vae: AutoencoderKL) -> None:
    plain = run_parity(pipeline, model, vae, **QUICK)
    assert not plain.control and plain.to_dict()["control"] is None and all(c.control is None for c in plain.checks)
    asked = run_parity(pipeline, model, vae, control=True, **QUICK)
    assert asked.passed and not asked.widened and "no limit was widened" in asked.table()
    for name in ("z", *LAW.parts):
        found = check(asked, "teacher-forced", name)
        assert 0 < found.control < 1e-5 and "float32 against float64" in found.note
    failing = run_parity(pipeline, model, vae, thresholds=parse_thresholds(["psnr=100"], "fp32"), **QUICK)
    assert failing.control and "float32's rounding does not explain what failed" in failing.table()


def test_where_limits_come_from_is_said() -> None:
    assert set(ORIGINS) == set(THRESHOLDS)
    report = ParityReport("small", "x", {}, scheme="int8", thresholds=THRESHOLDS["int8"])
    assert "limits of small: measured on the demo models" in report.table() and "demo" in report.to_dict()["limits"]


def test_random_inputs_lie_within_what_engines_are_built_for(pipeline: Pipeline, model: Arinar, vae: AutoencoderKL) -> None:
    specs = parity_module.graph_specs(model, vae)
    sizes = {name: parity_module._sizes(spec, pipeline, 2, 4) for name, spec in specs.items()}
    assert sizes["outer_step"]["B"] == 2 and sizes["inner_step"] == {"N": 4, "S": 16}
    assert sizes["mixture_sample"]["M"] == 4 and sizes["vae_decoder"]["B"] <= 2


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
    for wrong in ("z=-1", "z=nan"):
        with pytest.raises(ValueError, match="expected a number of at least 0"):
            parse_thresholds([wrong], "fp32")
    assert set(THRESHOLDS) == set(SCHEMES)


def test_overridden_limits_are_said_and_hold_for_shared_graphs(pipeline: Pipeline, model: Arinar, vae: AutoencoderKL) -> None:
    report = run_parity(pipeline, model, vae, thresholds=parse_thresholds(["z=0", "psnr=0"], "fp32"), **QUICK)
    assert report.changed_limits == {"z": (1e-4, 0.0), "psnr": (45.0, 0.0)}
    assert "the limit z was set to 0; fp32's is 0.0001" in report.table()
    assert report.limited == len(report.checks) - 2  # of PSNR there is none any more, of agreeing tokens there never is
    assert f"1 of {report.limited} checks FAILED" in report.table()
    assert report.first_divergence == "level 2, teacher-forced: z, outer step 0"


def test_bad_arguments_are_known_before_anything_is_generated(
    pipeline: Pipeline, model: Arinar, vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity_module, "sample", lambda *args, **kwargs: pytest.fail("it began"))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    for arguments, message in (
        ({"labels": [10]}, "label 10 is out of range"),
        ({"num_iter": 0}, "num_iter is 0"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"distribution": 10}, "at least 64 samples"),
        ({"distribution": 64, "features": "nowhere:f"}, "cannot be imported"),
        ({"distribution": 64, "fid_stats": tmp_path / "narrow.npz"}, "features are 32 wide"),
        ({"distribution": 64, "fid_stats": tmp_path / "none.npz"}, "there is no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            run_parity(pipeline, model, vae, **(QUICK | arguments))


def test_the_command_writes_a_report_and_exits_with_1_beyond_a_limit(digits_bundle: Path, tmp_path: Path) -> None:
    def run(*words: object) -> Any:
        quick = ["--checkpoint", "digits", "--labels", "3", "--num-iter", "2", "--threads", "1"]
        return CliRunner().invoke(main, ["parity", str(digits_bundle), *quick, *map(str, words)])

    result = run("--threshold", "z=0", "--report", tmp_path / "report.html")
    assert result.exit_code == 1 and "1 of" in result.stdout and "FAILED" in result.stdout
    assert "First divergence: level 2, teacher-forced: z, outer step 0" in (tmp_path / "report.html").read_text()
    unknown = run("--threshold", "zeta=0")
    assert unknown.exit_code == 2 and "no threshold 'zeta'" in unknown.stderr
    np.savez(tmp_path / "stats.npz", mu=0)
    alone = run("--fid-stats", tmp_path / "stats.npz")
    assert alone.exit_code == 2 and "--distribution N" in alone.stderr
    assert run("--features", "mine:f").exit_code == 2
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "none" / "report.html", tmp_path / "file" / "report.html"):
        unwritable = run("--report", place)
        assert unwritable.exit_code == 2 and "cannot write" in unwritable.stderr and "level 1" not in unwritable.stderr


def test_the_command_refuses_steps_that_a_causal_model_does_not_have(causal_bundle: Path) -> None:
    result = CliRunner().invoke(main, ["parity", str(causal_bundle), "--checkpoint", "digits-causal", "--num-iter", "4"])
    assert result.exit_code == 2 and "num_iter is 4; a causal model generates one token a step" in result.stderr
    mixed = CliRunner().invoke(main, ["parity", str(causal_bundle), "--checkpoint", "digits"])
    assert mixed.exit_code == 2 and "are different models: outer" in mixed.stderr


def test_the_first_failure_is_by_level_then_by_step() -> None:
    report = ParityReport(
        "fp32",
        "x",
        {},
        [
            Check("teacher-forced", "z", 1.0, 0.5, step=3),
            Check("teacher-forced", "mu", 1.0, 0.5, step=1, where="feature 4"),
            Check("free-running", "same picks", 0.0, 0.9, True, step=0),
        ],
    )
    assert report.first_divergence == "level 2, teacher-forced: mu, outer step 1, feature 4"
    report.checks.append(Check("graph", "inner_step", float("nan"), 1e-4, where="output mu"))
    assert report.first_divergence == "level 1, graph: inner_step, output mu"


def test_psnr() -> None:
    images = np.full((2, 4, 4, 3), 100, np.uint8)
    other = images.copy()
    other[1] += 10
    np.testing.assert_allclose(psnr(other, images), [MAX_PSNR, 10 * np.log10(255**2 / 100)])


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
    single = rng.normal(size=(50, 1))
    assert frechet_between(single, single + 2) == pytest.approx(4)
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


def test_groups_make_the_discrepancy_test_sharp() -> None:
    """Where both sets hold so many of each group, differences within groups do not drown in those between them."""
    rng = np.random.default_rng(3)
    groups = np.arange(120) % 6

    def draw(shift: float = 0.0) -> Any:
        return 8 * groups[:, None] + rng.normal(size=(120, 2)) + shift

    first, alike, shifted = draw(), draw(), draw(1.0)
    strata = (groups, groups)
    assert mmd_test(first, shifted, permutations=400)[1] > 0.5  # blind
    assert mmd_test(first, shifted, permutations=400, strata=strata)[1] < 0.01
    ps = [mmd_test(draw(), draw(), permutations=200, strata=strata)[1] for _ in range(40)]
    assert 0.3 < np.mean(ps) < 0.7 and min(ps) > 0.001  # an honest p-value is spread over 0 to 1
    assert mmd_test(first, alike, permutations=400, strata=strata)[1] > 0.01


# ---------------------------------------------------------------------------------------------- distribution

SETTINGS = {"guidance_scale": 2.0, "cfg_schedule": "linear", "temperature": 1.0, "num_iter": 2, "seed": 0}


@pytest.fixture(scope="module")
def references(model: Arinar, vae: AutoencoderKL) -> distribution.References:
    return distribution.make_references(model, vae, 80, SETTINGS)


def test_distribution_of_the_right_model(pipeline: Pipeline, references: distribution.References, tmp_path: Path) -> None:
    images = references.first
    values = features.builtin_features(pipeline.config)(images)
    np.savez(tmp_path / "stats.npz", mu=values.mean(0), sigma=np.cov(values, rowvar=False))
    found, deployed = distribution.compare(pipeline, references, stats=tmp_path / "stats.npz")
    assert deployed.shape == images.shape == (80, 32, 32, 3)
    assert found.frechet < 0.1 * found.yardstick and found.mmd_p > 0.01
    assert found.independent == pytest.approx(found.yardstick, rel=0.05)  # it is the first run once more
    assert found.agreement is not None and found.drop is not None and abs(found.drop) < 0.02
    assert found.deployed_distance is not None and found.deployed_distance < 0.1 * found.yardstick


def test_sampling_without_guidance_is_another_law(pipeline: Pipeline, references: distribution.References) -> None:
    other = replace(references, settings=SETTINGS | {"guidance_scale": 1.0, "temperature": 0.6})
    found, _ = distribution.compare(pipeline, other)
    report = ParityReport("int8", "x", {})
    add_distribution(report, found, THRESHOLDS["int8"])
    assert {c.name for c in report.failed} >= {"MMD, p-value"}, report.table()
    assert found.independent > 1.2 * found.yardstick


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
        features.read_stats(tmp_path / "narrow.npz", 32)
    (tmp_path / "bad.npz").write_bytes(b"no")
    np.savez_compressed(tmp_path / "whole.npz", mu=np.arange(32.0), sigma=np.eye(32))
    whole = (tmp_path / "whole.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[60] ^= 255
    for content in (b"no", b"", whole[:50], whole[:-30], bytes(flipped)):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.npz holds no statistics .* expected an .npz"):
            features.read_stats(tmp_path / "bad.npz", 32)
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    with pytest.raises(ValueError, match="not finite"):
        features.read_stats(tmp_path / "nan.npz", 3)
    with pytest.raises(ValueError, match="at least 64"):
        distribution.make_references(model, vae, 10, SETTINGS)
    with pytest.raises(ValueError, match="choose builtin, inception"):
        features.feature_extractor("vgg", model.config)
    with pytest.raises(ValueError, match="cannot be imported"):
        features.feature_extractor("nowhere:f", model.config)
    with pytest.raises(ValueError, match="is str; expected a function"):
        features.feature_extractor("json:__name__", model.config)
    with pytest.raises(ValueError, match="json:dumps fails on black images: TypeError"):
        features.open_measure("json:dumps", None, model.config)
    with pytest.raises(ValueError, match=r"gave \(1, 4\) for 2 images; expected finite values \(2, F\)"):
        features.open_measure(lambda images: np.zeros((1, 4)), None, model.config)
    assert features.feature_extractor("arinar.judge:classifier_features", model.config)(references.first).shape == (80, 256)


def test_builtin_features_are_fixed_and_take_any_size() -> None:
    config = load_arinar("digits").config.replace(img_size=64, class_names=(), num_classes=10)
    rng = np.random.default_rng(0)
    for size in (16, 64, 100):
        images = rng.integers(0, 256, (3, size, size, 3), np.uint8)
        first, again = (features.builtin_features(config)(images) for _ in range(2))
        assert first.shape == (3, features.BUILTIN_WIDTH) and np.array_equal(first, again)
