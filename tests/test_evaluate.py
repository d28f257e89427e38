"""How good many images are: every number against an independent computation, every kind of set, and what cannot be compared."""

from __future__ import annotations

import json
import shutil
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.special
import torch
from click.testing import CliRunner, Result
from PIL import Image

from arinar.cli import main
from arinar.measure import distances, image_sets
from arinar.measure import evaluate as evaluate_module
from arinar.measure import moments as moments_module
from arinar.measure.distances import frechet_distance, kernel_distance, precision_and_recall
from arinar.measure.evaluate import Evaluation, evaluate, frechet_replicates, inception_score
from arinar.measure.image_sets import Statistics, open_images, open_reference
from arinar.measure.moments import ClassSums, Moments, is_kept
from arinar.runtime import Bundle
from arinar.runtime.run import Run
from arinar.runtime.sampling import sample

WIDTH, CLASSES = 12, 7
torch.manual_seed(0)
_NETWORK = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3, stride=2),
    torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(2),
    torch.nn.Flatten(),
    torch.nn.Linear(32, WIDTH),
).eval()
_CLASSIFIER = torch.nn.Linear(WIDTH, CLASSES).eval()


def network(images: Any) -> Any:
    """A small network, as somebody's own: features and logits."""
    with torch.no_grad():
        features = _NETWORK(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        return features.numpy(), 20 * _CLASSIFIER(features).numpy()


def pictures(count: int, seed: int, brightness: int = 200) -> Any:
    """(count, 16, 16, 3) uint8: noise of few frequencies."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, brightness, (count, 4, 4, 3), np.uint8)
    return coarse.repeat(4, 1).repeat(4, 2)


def save(path: Path, images: Any, **arrays: Any) -> str:
    np.savez(path, images, **arrays)
    return str(path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    return save(folder / "a.npz", pictures(300, 0)), save(folder / "b.npz", pictures(250, 1, 160))


def by_scipy(a: Any, b: Any) -> float:
    """The Frechet distance as it is published, with a matrix square root."""
    (mean_a, mean_b), (cov_a, cov_b) = (x.mean(0) for x in (a, b)), (np.cov(x, rowvar=False) for x in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real))


# Numbers.


def test_fid_is_scipys(sets: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (network(np.load(path)["arr_0"])[0].astype(np.float64) for path in sets)
    for piece in (2048, 50, 7):
        monkeypatch.setattr(image_sets, "PIECE", piece)
        found = evaluate(*sets, features=network, bootstrap=0)
        assert found.fid is not None and found.fid.value == pytest.approx(by_scipy(a, b), rel=1e-6)
        assert found.width == WIDTH and found.images == 300 and found.fid.std is None


def test_moments_merge_to_those_of_all() -> None:
    x = np.random.default_rng(0).normal(3, 2, (101, 5)) ** 3
    for cuts in ([50], [1, 2, 3, 100], [99]):
        parts = [Moments.of(part) for part in np.split(x, cuts)]
        total = parts[0]
        for part in parts[1:]:
            total.merge(part)
        assert total.count == 101
        np.testing.assert_allclose(total.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(total.covariance, np.cov(x, rowvar=False), rtol=1e-10)


def test_the_inception_score_is_the_published_formula(sets: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = network(np.load(sets[0])["arr_0"])[1].astype(np.float64)
    shuffled = scipy.special.softmax(logits, 1)[np.random.RandomState(2020).permutation(300)]
    scores = []
    for part in np.split(shuffled, 10):
        scores.append(np.exp(np.mean([scipy.special.rel_entr(p, part.mean(0)).sum() for p in part])))
    monkeypatch.setattr(image_sets, "PIECE", 37)
    found = evaluate(sets[0], features=network)
    assert found.inception is not None and found.fid is None
    assert found.inception.value == pytest.approx(np.mean(scores), rel=1e-6)
    assert found.inception.std == pytest.approx(np.std(scores), rel=1e-5)


def test_kid_is_the_unbiased_estimate() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (40, 6)), rng.normal(0.3, 1, (30, 6))
    mean, std = kernel_distance(a, b, subsets=20, size=15)
    draws, values = np.random.RandomState(2020), []
    for _ in range(20):
        x, y = a[draws.choice(40, 15, replace=False)], b[draws.choice(30, 15, replace=False)]
        kernel = [[(float(p @ q) / 6 + 1) ** 3 for q in (*x, *y)] for p in (*x, *y)]
        pairs = [(i, j) for i in range(15) for j in range(15) if i != j]
        value = np.mean([kernel[i][j] for i, j in pairs]) + np.mean([kernel[15 + i][15 + j] for i, j in pairs])
        values.append(value - 2 * np.mean([kernel[i][15 + j] for i in range(15) for j in range(15)]))
    assert mean == pytest.approx(np.mean(values), rel=1e-9) and std == pytest.approx(np.std(values), rel=1e-9)


def test_precision_and_recall_are_by_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    made, real = rng.normal(0, 0.7, (1100, 5)), rng.normal(0.2, 1, (90, 5))
    monkeypatch.setattr(distances, "TABLE", 5000)  # many tables, the last one short
    inside = []
    for points, centres in ((made, real), (real, made)):
        reach = np.sort(scipy.spatial.distance.cdist(centres, centres), 1)[:, 3]
        inside.append((scipy.spatial.distance.cdist(points, centres) <= reach).any(1).mean())
    assert precision_and_recall(made, real) == pytest.approx(inside, abs=1e-12)
    assert 0.3 < inside[0] < 1 and 0.3 < inside[1] < 1


def test_numbers_are_torch_fidelitys(sets: tuple[str, str]) -> None:
    fidelity = pytest.importorskip(
        "torch_fidelity", reason="compares with torch-fidelity where it is installed", exc_type=Exception
    )
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    (a, logits), (b, _) = (network(np.load(path)["arr_0"]) for path in sets)
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    statistics = [fid_features_to_statistics(values.double()) for values in (x, y)]
    found = evaluate(*sets, features=network, bootstrap=0)
    assert found.fid and found.kid and found.inception and fidelity
    fid = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert found.fid.value == pytest.approx(fid, rel=1e-5)
    kid = kid_features_to_metric(x.double(), y.double(), kid_subset_size=250, kid_subsets=100, verbose=False)
    assert found.kid.value == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-5)
    assert found.kid.std == pytest.approx(kid["kernel_inception_distance_std"], rel=1e-4)
    score = isc_features_to_metric(torch.from_numpy(logits))
    assert found.inception.value == pytest.approx(score["inception_score_mean"], rel=1e-6)
    assert found.inception.std == pytest.approx(score["inception_score_std"], rel=1e-5)
    shares = prc_features_to_metric(x.double(), y.double(), save_cpu_ram=True, verbose=False)
    assert (found.precision, found.recall) == pytest.approx((shares["precision"], shares["recall"]), abs=1e-6)


def test_the_bootstraps_deviation_is_that_of_other_sets() -> None:
    """Sets of one law against a fixed reference: the spread of their distances, and what one set's bootstrap says of it."""
    rng, fixed = np.random.default_rng(0), Statistics(np.zeros(4), np.eye(4))
    law = np.diag([1.0, 1.3, 0.8, 1.0])
    sets_ = [rng.multivariate_normal(np.full(4, 0.3), law, 400) for _ in range(150)]
    values = [frechet_distance(x.mean(0), np.cov(x, rowvar=False), *fixed) for x in sets_]
    told = np.mean([np.std(frechet_replicates(x, fixed, None, 60, False), ddof=1) for x in sets_[:10]])
    assert told == pytest.approx(np.std(values), rel=0.25)


def test_replicates_of_two_sets_are_paired() -> None:
    rng, fixed = np.random.default_rng(0), Statistics(np.zeros(4), np.eye(4))
    x = rng.normal(0.2, 1, (500, 4))
    near = x + rng.normal(0, 0.01, x.shape)
    one, other = (np.array(frechet_replicates(values, fixed, None, 50, False)) for values in (x, near))
    assert np.std(one - other) < 0.1 * np.std(one)


# Sets.


@pytest.fixture(scope="module")
def runs(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of 40 images: "0" and "1" of two seeds, "warm" of seed 0 and another temperature."""
    bundle, folder = Bundle.open(digits_bundle), tmp_path_factory.mktemp("runs")
    for name, settings in (("0", {"seed": 0}), ("1", {"seed": 1}), ("warm", {"seed": 0, "temperature": 1.01})):
        sample(bundle, folder / name, Run.of(bundle, 40, batch_size=8, num_iter=2, **settings), png=name == "0")  # type: ignore[arg-type]
    return {name: folder / name for name in ("0", "1", "warm")}


def numbers(found: Evaluation) -> Any:
    """To the rounding of sums in another order."""
    assert found.fid and found.kid
    return pytest.approx([found.images, found.fid.value, found.kid.value, found.precision, found.recall], rel=1e-6)


def test_runs_pictures_and_arrays_give_the_same_numbers(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["0"]
    whole = np.load(run / "samples_40x32x32x3.npz")["arr_0"]
    np.savez_compressed(tmp_path / "packed.npz", whole)
    named = [str(run), str(run / "images"), str(run / "samples_40x32x32x3.npz"), str(tmp_path / "packed.npz")]
    found = [evaluate(name, str(runs["1"]), features=network, bootstrap=0) for name in named]
    for other in found[1:]:
        assert other.fid and other.kid and other.fid.value > 0
        assert [other.images, other.fid.value, other.kid.value, other.precision, other.recall] == numbers(found[0])


def test_a_runs_shards_may_be_gone_where_its_file_is_there(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs["0"], tmp_path / "run")
    shutil.rmtree(folder / "shards")
    left, whole = (evaluate(str(path), str(runs["1"]), features=network, bootstrap=0) for path in (folder, runs["0"]))
    assert left.fid and whole.fid and left.fid.value == pytest.approx(whole.fid.value, rel=1e-6)
    assert left.agreement == whole.agreement is not None


def test_statistics_and_adms_reference_file(sets: tuple[str, str], tmp_path: Path) -> None:
    images = np.load(sets[1])["arr_0"]
    features = network(images)[0].astype(np.float64)
    stats = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    want = evaluate(*sets, features=network, bootstrap=0)
    np.savez(tmp_path / "stats.npz", **stats)
    alone = evaluate(sets[0], str(tmp_path / "stats.npz"), features=network, bootstrap=2)
    assert alone.fid and want.fid and alone.fid.value == pytest.approx(want.fid.value, rel=1e-9)
    assert alone.kid is None and alone.precision is None
    # ADM's: statistics of everything, images of some, for precision and recall.
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    path = save(tmp_path / "adm.npz", images[:100], **stats, **spatial)
    both = evaluate(sets[0], path, features=network, bootstrap=0)
    fewer = evaluate(sets[0], save(tmp_path / "some.npz", images[:100]), features=network, bootstrap=0)
    assert both.fid == want.fid or both.fid.value == pytest.approx(want.fid.value, rel=1e-9)  # type: ignore[union-attr]
    assert (both.precision, both.recall, both.kid) == (fewer.precision, fewer.recall, fewer.kid)


def test_statistics_with_hardly_any_images_give_the_fid_alone(sets: tuple[str, str], tmp_path: Path) -> None:
    path = save(tmp_path / "adm.npz", pictures(3, 0), mu=np.zeros(WIDTH), sigma=np.eye(WIDTH))
    found = evaluate(sets[0], path, features=network, bootstrap=0)
    assert found.fid is not None and (found.kid, found.precision, found.recall) == (None, None, None)


def test_pairs_and_the_noise_floor(runs: dict[str, Path]) -> None:
    found = evaluate(str(runs["warm"]), str(runs["0"]), floor=str(runs["1"]), bootstrap=3)
    assert found.psnr is not None and found.psnr > 25 and found.same is not None and found.same < 1
    assert found.fid and found.floor and found.fid.value < found.floor  # the same noise: nearer than another seed
    other = evaluate(str(runs["1"]), str(runs["0"]), bootstrap=0)
    assert other.fid and found.floor == pytest.approx(other.fid.value, rel=1e-9) and other.psnr is None  # no pairs
    same = evaluate(str(runs["0"]), str(runs["0"]), bootstrap=0)
    assert same.psnr == 78.0 and same.same == 1.0 and same.agreement is not None


def test_real_digits_are_a_reference(runs: dict[str, Path]) -> None:
    found = evaluate(str(runs["0"]), "digits", bootstrap=0)
    assert found.fid and found.fid.value > 0 and found.reference == "digits"


def test_few_features_are_kept_of_many_images(sets: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    want = evaluate(*sets, features=network, bootstrap=0)
    monkeypatch.setattr(moments_module, "KEPT", 64)
    monkeypatch.setattr(evaluate_module, "KEPT", 64)
    images = open_images(sets[0])
    gathered = moments_module.gather(images, moments_module.Source(network), evaluate_module.one_process)
    assert gathered.features.shape == (64, WIDTH) and gathered.features.dtype == np.float32
    found = evaluate(*sets, features=network, bootstrap=4)
    assert found.fid and want.fid and found.fid.value == want.fid.value  # moments are of all
    assert any("64 of the images, scaled" in note for note in found.notes)
    for count in (64, 65, 300, 6400):
        assert sum(is_kept(np.arange(count), count)) == 64


def test_class_sums_do_not_depend_on_the_order_of_pieces() -> None:
    logits, part = np.random.default_rng(0).normal(0, 3, (200, 5)), np.arange(200) % 10
    whole = inception_score(ClassSums.of(logits, part))
    first, last = (ClassSums.of(logits[some], part[some]) for some in (slice(0, 37), slice(37, 200)))
    last.merge(first)
    found = inception_score(last)
    assert found.value == pytest.approx(whole.value, rel=1e-12) and found.std == pytest.approx(whole.std, rel=1e-9)


# What cannot be compared.


def _cases(folder: Path) -> dict[str, tuple[tuple[str, ...], str]]:
    good = save(folder / "good.npz", pictures(100, 0))
    np.savez(folder / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(folder / "odd.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(folder / "nan.npz", mu=np.full(WIDTH, np.nan), sigma=np.eye(WIDTH))
    np.savez(folder / "other.npz", x=np.zeros(3))
    np.savez(folder / "floats.npz", np.zeros((4, 8, 8, 3)))
    (folder / "damaged.npz").write_bytes(Path(good).read_bytes()[:-50])
    (folder / "empty").mkdir()
    (folder / "mixed").mkdir()
    for name, side in (("a", 8), ("b", 9)):
        Image.new("RGB", (side, side)).save(folder / "mixed" / f"{name}.png")
    few = save(folder / "few.npz", pictures(WIDTH, 0))
    return {
        "missing": (("nowhere",), "nowhere does not exist; expected a run's folder"),
        "stats as samples": ((str(folder / "wide.npz"),), "wide.npz has mu, sigma; expected arr_0"),
        "other width": ((good, str(folder / "wide.npz")), f"has statistics of 2048 features, and network gives {WIDTH}"),
        "odd": ((good, str(folder / "odd.npz")), r"mu \(3,\) and sigma \(4, 4\); expected floats"),
        "nan": ((good, str(folder / "nan.npz")), "not finite"),
        "nothing": ((good, str(folder / "other.npz")), "other.npz has x; expected mu and sigma, or arr_0"),
        "floats": ((str(folder / "floats.npz"),), r"arr_0 of float64 \(4, 8, 8, 3\); expected images, uint8"),
        "damaged": ((str(folder / "damaged.npz"),), "damaged.npz is no whole .npz file"),
        "empty": ((str(folder / "empty"),), "holds no pictures"),
        "mixed": ((str(folder / "mixed"), good), "few|has 2 images"),
        "few": ((few, good), f"few.npz has {WIDTH} images; a covariance of {WIDTH} features needs {WIDTH + 1}"),
        "few of the reference": ((good, few), f"few.npz has {WIDTH} images; a covariance"),
    }


CASES = (
    "missing",
    "stats as samples",
    "other width",
    "odd",
    "nan",
    "nothing",
    "floats",
    "damaged",
    "empty",
    "mixed",
    "few",
    "few of the reference",
)


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_read_or_compared(tmp_path: Path, case: str) -> None:
    cases = _cases(tmp_path)
    assert set(cases) == set(CASES)
    arguments, words = cases[case]
    with pytest.raises(ValueError, match=words):
        evaluate(*arguments, features=network)


def test_pictures_of_two_sizes_are_named(tmp_path: Path) -> None:
    for number in range(20):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:02d}.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "20.png")
    with pytest.raises(ValueError, match=r"20\.png has 9 x 8 pixels, others 8 x 8"):
        evaluate(str(tmp_path), features=network)


def test_runs_that_are_no_floor(runs: dict[str, Path], sets: tuple[str, str]) -> None:
    for floor, words in (
        (str(runs["0"]), "has the reference's seed, 0; a noise floor is between two seeds"),
        (sets[0], "a noise floor is between two runs"),
        (str(runs["warm"]), "has the reference's seed"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(str(runs["1"]), str(runs["0"]), floor=floor)
    with pytest.raises(ValueError, match="differs from the reference in more than its seed: temperature was 1.01 and is 1.0"):
        evaluate(str(runs["0"]), str(runs["warm"]), floor=str(runs["1"]))


def test_a_run_that_is_not_finished_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs["0"], tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"complete": False}))
    with pytest.raises(ValueError, match="has not come to its end; the same `arinar sample` again goes on with it"):
        open_images(str(folder))
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "shards" / "000001.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"000001\.npz is damaged"):
        evaluate(str(folder), str(runs["1"]), features=network)


def test_a_set_of_another_size_is_compared_and_said(sets: tuple[str, str], tmp_path: Path) -> None:
    small = save(tmp_path / "small.npz", pictures(100, 3)[:, ::2, ::2])
    found = evaluate(small, sets[0], features=network, bootstrap=0)
    assert "images of 8 x 8 pixels are compared with images of 16 x 16" in found.notes


def test_reference_may_be_both(sets: tuple[str, str]) -> None:
    stats, images = open_reference(sets[1])
    assert stats is None and images is not None and images.count == 250


# The command.


def arinar(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_command_prints_a_table_or_json(sets: tuple[str, str]) -> None:
    words = ("evaluate", sets[0], "--reference", sets[1], "--features", "test_evaluate:network", "--bootstrap", 3)
    result = arinar(*words)
    assert result.exit_code == 0, result.output
    for word in ("300 images of", "FID", "KID x 1000", "precision", "recall", "inception score"):
        assert word in result.stdout
    found = json.loads(arinar(*words, "--json").stdout)
    assert found["fid"]["interval"][0] < found["fid"]["value"] < found["fid"]["interval"][1]
    assert found["images"] == 300 and len(found["replicates"]) == 3


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--features", "inception"), ("needs --weights FILE", "weights-inception-2015-12-05-6726825d.pth")),
        (("--weights", __file__), ("--weights is for --features inception",)),
        (("--features", "vgg"), ("choose builtin, inception, or your own",)),
        (("--address", "auto"), ("--address is for workers",)),
        ((), ("without a reference there is nothing that builtin features tell; give --reference",)),
    ],
)
def test_bad_arguments(sets: tuple[str, str], words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    result = arinar("evaluate", sets[0], *words)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert all(part in result.stderr for part in parts), result.stderr


def test_inception_without_its_package_says_what_to_install(
    sets: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch_fidelity", "torch_fidelity.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "w.pth").touch()
    result = arinar("evaluate", sets[0], "--features", "inception", "--weights", tmp_path / "w.pth")
    assert (
        result.exit_code == 2
        and "features inception needs torch-fidelity" in result.stderr
        and "'.[evaluate]'" in result.stderr
    )


def test_inception_reads_a_file_of_weights_without_running_it(sets: tuple[str, str], tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity", reason="needs torch-fidelity", exc_type=Exception)
    from unittest import mock

    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    place = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    with mock.patch(place, lambda *_, **__: {}), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    weights = tmp_path / "inception.pth"
    torch.save(theirs.state_dict(), weights)
    from arinar.measure.features import feature_extractor

    images = np.load(sets[0])["arr_0"][:4]
    features, logits = feature_extractor("inception", None, weights)(images)
    want = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert np.array_equal(features, want[0].numpy()) and np.array_equal(logits, want[1].numpy())
    few = arinar("evaluate", sets[0], "--features", "inception", "--weights", weights, "--reference", sets[1])
    assert few.exit_code == 2 and "a covariance of 2048 features needs 2049" in few.stderr
    for content, words in ((b"words", "cannot be read as weights"), (None, "does not fit to torch-fidelity's InceptionV3")):
        if content is None:
            torch.save({"a": torch.zeros(1)}, weights)
        else:
            weights.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            feature_extractor("inception", None, weights)
    torch.save({"a": Path("x")}, weights)  # what torch.load would make
    with pytest.raises(ValueError, match="cannot be read as weights"):
        feature_extractor("inception", None, weights)


def test_precision_and_recall_hold_a_table_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "TABLE", 100_000)
    points = np.random.default_rng(0).normal(0, 1, (3000, 4))  # all distances: 72 MB
    tracemalloc.start()
    precision_and_recall(points, points[::2])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6
