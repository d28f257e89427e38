"""Images of several classes: their embeddings are interpolated, and the ends are the classes themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import torch
from tiny_bundles import TINY, TINY_CAUSAL, tiny_model

from arinar.config import PRESETS
from arinar.export import graphs as graphs_module
from arinar.export.bundle import export_bundle
from arinar.export.steps import class_table, class_vectors
from arinar.measure.parity import run_parity
from arinar.runtime import BundleError, Noise, Pipeline
from arinar.runtime.images import read_metadata
from arinar.runtime.labels import MOST_CLASSES, Labels
from arinar.runtime.worklist import Worklist
from arinar.sampler import sample

DIGITS = PRESETS["digits"]


@pytest.fixture(scope="module", params=["digits", "digits-causal"])
def pipeline(request: pytest.FixtureRequest, demo_bundle: Callable[[str], Path]) -> Pipeline:
    return Pipeline.load(demo_bundle(request.param), threads=1)


# -------------------------------------------------------------------------------------------------------------- asking


def test_weights_are_divided_by_their_sum_and_zeros_dropped() -> None:
    found = Labels.of([{8: 3, 3: 1.0}, 7, {1: 0.0, 2: 0.25}, {4: 3e38, 5: 3e38}], DIGITS)
    assert found.ids.tolist() == [3, 7, 2, 4] and len(found) == 4
    assert found.shown() == [{3: 0.25, 8: 0.75}, 7, 2, {4: 0.5, 5: 0.5}]
    assert Labels.of([{3: 1, 8: 3}], DIGITS).shown() == Labels.of([{np.int64(8): np.float32(0.75), 3: 0.25}], DIGITS).shown()
    pure = Labels.of([{3: 2.0}, {7: 1, 9: 0}, {1: 1e-30, 8: 1}, {1: 1, 8: 1e-30}], DIGITS)
    assert pure.weights is None and pure.shown() == [3, 7, 8, 1]
    assert found[np.array([1, 2])].weights is None and found[np.array([1, 0])].weights is not None
    ids, others, weights = found.branches(2)
    assert ids.tolist() == [[3, 7, 2, 4], [-1] * 4] and weights[:, 1].max() == 0  # the unconditional branch is of no class
    assert others.shape == weights.shape == (MOST_CLASSES - 1, 2, 4) and weights[:, 0].sum(0).tolist() == [0.75, 0, 0, 0.5]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({}, r"labels\[1\] is {}; expected a class id, or weights by class id"),
        ({"three": 1}, r"labels\[1\] is 'three', no class of this model"),
        ({"3": 1, 3: 1}, r"labels\[1\] is {'3': 1, 3: 1}, in which a class has two names"),
        ({True: 1}, r"labels\[1\] is {True: 1}"),
        ({3.0: 1}, r"labels\[1\] is {3.0: 1}"),
        ("three", r"labels\[1\] is 'three', no class of this model"),
        (None, r"labels\[1\] is None"),
        (True, r"labels\[1\] is True"),
        ([3], r"labels\[1\] is \[3\]"),
        ({10: 1, 3: 1}, "label 10 is out of range; this model has classes 0..9"),
        ({-1: 1, 3: 1}, "label -1 is out of range"),
        (10, "label 10 is out of range"),
        ({3: -0.5, 4: 1}, r"labels\[1\]\[3\] is -0.5; expected a number at least 0"),
        ({3: float("nan")}, r"labels\[1\]\[3\] is nan; expected a finite number at least 0"),
        ({3: float("inf")}, r"labels\[1\]\[3\] is inf"),
        ({3: "1"}, r"labels\[1\]\[3\] is '1'"),
        ({3: None}, r"labels\[1\]\[3\] is None"),
        ({3: 0, 4: 0.0}, r"labels\[1\] has no weight above 0"),
        (dict.fromkeys(range(5), 1), r"labels\[1\] has 5 classes; expected at most 4"),
        ({10**30: 1}, "label .* is out of range|labels is"),
    ],
    ids=lambda part: part[:30] if isinstance(part, str) else "",
)
def test_bad_mixtures(label: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Labels.of([{3: 0.5, 8: 0.5}, label], DIGITS)


# --------------------------------------------------------------------------------------------------------- the graphs


def test_class_vectors_are_interpolated_and_exact_at_the_ends() -> None:
    model, _ = tiny_model(TINY.replace(num_classes=9))
    table = class_table(model)  # type: ignore[arg-type]
    labels = torch.tensor([[3, 1, 8, 5], [-1, -1, -1, -1]])
    others = torch.randint(0, 9, (MOST_CLASSES - 1, 2, 4), generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(others.shape)
    assert torch.equal(class_vectors(table, labels, others, nothing), class_vectors(table, labels))
    weights = nothing.clone()
    weights[:, 0, 1] = torch.tensor([0.5, 0.125, 0.25])
    found = class_vectors(table, labels, others, weights)
    assert torch.equal(found[0, [0, 2, 3]], table[[3, 8, 5]]) and torch.equal(found[1], table[[-1] * 4])
    want = 0.125 * table[1] + 0.5 * table[others[0, 0, 1]] + 0.125 * table[others[1, 0, 1]] + 0.25 * table[others[2, 0, 1]]
    torch.testing.assert_close(found[0, 1], want)
    shares = torch.zeros(1, 9, dtype=torch.float64)
    for label, weight in ((1, 0.125), *zip(others[:, 0, 1].tolist(), (0.5, 0.125, 0.25), strict=True)):
        shares[0, label] += weight
    torch.testing.assert_close(model.class_vectors(shares)[0], want)  # type: ignore[operator]
    assert torch.equal(model.class_vectors(torch.full_like(shares, -1)), model.fake_latent)  # type: ignore[operator]


# --------------------------------------------------------------------------------------------------------- generating


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_ends_are_the_classes_bit_for_bit(pipeline: Pipeline, scale: float) -> None:
    want = pipeline.generate([3, 8, 7], seed=1, guidance_scale=scale, batch_size=4)
    ends = pipeline.generate([{3: 1.0, 8: 0.0}, {3: 0, 8: 5}, 7], seed=1, guidance_scale=scale, batch_size=4)
    assert np.array_equal(ends.tokens, want.tokens) and ends.labels == [3, 8, 7]
    beside = pipeline.generate([3, 8, {7: 1, 1: 1}], seed=1, guidance_scale=scale, batch_size=4)  # pure ones beside a mixture
    assert np.array_equal(beside.tokens[:2], want.tokens[:2]) and beside.labels[2] == {1: 0.5, 7: 0.5}
    assert np.abs(beside.tokens[2] - want.tokens[2]).max() > 0.1
    again = pipeline.generate([3, 8, 7], seed=1, guidance_scale=scale, batch_size=4)  # nothing of the mixture is kept
    assert np.array_equal(again.tokens, want.tokens)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_it_is_what_the_reference_generates(pipeline: Pipeline, scale: float) -> None:
    from arinar.checkpoint import load_arinar

    name = "digits" if pipeline.config.outer == "masked" else "digits-causal"
    labels: list[Any] = [{3: 0.5, 8: 0.5}, 7, {1: 1, 2: 1, 4: 2}, {0: 0.1, 6: 0.2, 8: 0.3, 9: 0.4}]
    noise = Noise.from_seed(5, range(4), pipeline.config)
    got = pipeline.generate(labels, noise=noise, guidance_scale=scale)
    want = sample(load_arinar(name), labels, noise=noise, guidance_scale=scale).numpy()
    assert np.abs(got.tokens - want).max() < 2e-3
    pure = pipeline.generate([3, 7, 1, 0], noise=noise, guidance_scale=scale)
    apart = np.abs(got.tokens - pure.tokens).max((1, 2)) > 0.1
    assert apart.tolist() == [True, False, True, True]


def test_mixtures_of_the_same_classes_are_told_apart(pipeline: Pipeline) -> None:
    """Whatever is kept between calls is kept by classes and weights."""
    shares = [{3: 0.9, 8: 0.1}, {3: 0.1, 8: 0.9}, {3: 0.5, 8: 0.5}, {3: 0.5, 1: 0.5}, 3, 8]
    made = [pipeline.generate([share], seed=2).tokens for share in shares]
    fresh = Pipeline.load(pipeline.bundle.folder, threads=1)
    for tokens, share in zip(reversed(made), reversed(shares), strict=True):
        assert np.array_equal(fresh.generate([share], seed=2).tokens, tokens)
    assert len({tokens.tobytes() for tokens in made}) == len(shares)


def test_files_say_what_they_are_of_and_are_kept(pipeline: Pipeline, tmp_path: Path) -> None:
    labels: list[Any] = [{3: 1, 8: 2}, 7]
    Worklist(pipeline, labels, tmp_path).run()
    metadata = read_metadata(next(tmp_path.glob("000000-*.png")))
    assert metadata is not None and metadata["label"].keys() == {"3", "8"} and metadata["label"]["3"] == pytest.approx(1 / 3)
    assert Worklist(pipeline, labels, tmp_path).missing == []
    with pytest.raises(ValueError, match=r"000000-.*png is there already and was made with other settings"):
        Worklist(pipeline, [{3: 1, 8: 3}, 7], tmp_path)


def test_parity_of_mixtures(pipeline: Pipeline) -> None:
    from arinar.checkpoint import load_arinar, load_vae

    name = "digits" if pipeline.config.outer == "masked" else "digits-causal"
    model, vae, labels = load_arinar(name), load_vae(name), [{3: 0.5, 8: 0.5}, 7]
    report = run_parity(pipeline, model, vae, labels=labels)
    assert report.passed, report.table()
    with pytest.raises(ValueError, match="labels has images of several classes"):
        run_parity(pipeline, model, vae, labels=labels, distribution=100)


@pytest.mark.parametrize("config", [TINY, TINY_CAUSAL], ids=["masked", "causal"])
def test_older_bundles_run_and_refuse_mixtures(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs as earlier versions wrote them, without the inputs."""
    export_bundle(*tiny_model(config), tmp_path / "new", untrained=True)
    monkeypatch.setattr(graphs_module, "_mixed", lambda *axes: ())
    export_bundle(*tiny_model(config), tmp_path / "old", untrained=True)
    monkeypatch.undo()
    new, old = (Pipeline.load(tmp_path / name, threads=1) for name in ("new", "old"))
    names = {t.name for graph in old.bundle.manifest.graphs["fp32"].values() for t in graph.inputs}
    assert not names & {"mixed_labels", "mixed_weights"}
    for scale in (1.0, 3.0):
        one, two = (p.generate([0, 1, 2], seed=3, guidance_scale=scale).tokens for p in (new, old))
        assert np.array_equal(one, two)
    new.generate([{0: 1, 2: 1}, 1], seed=3)
    with pytest.raises(BundleError, match="take one class for each image .*; export the model again, or ask for images of one"):
        old.generate([{0: 1, 2: 1}, 1], seed=3)
    assert np.array_equal(old.generate([{0: 1}, {1: 1, 2: 0}, 2], seed=3, guidance_scale=3.0).tokens, two)
    report = run_parity(old, *tiny_model(config), labels=[0, 1])
    assert all(check.passed for check in report.checks if check.name in ("outer_step", "outer_prefill", "z")), report.table()
