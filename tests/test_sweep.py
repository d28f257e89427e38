"""Sweeps: the grid, one score each, what is made again and what is not, the best one, and the bundle's defaults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from arinar.cli import main
from arinar.cli.common import parse_numbers
from arinar.measure import sweep as sweep_module
from arinar.measure.evaluate import Estimate, Evaluation, evaluate
from arinar.measure.sweep import Setting, grid, ranked, sweep
from arinar.runtime import Bundle, Pipeline
from arinar.runtime.run import Run
from arinar.runtime.sampling import one_process, sample

COUNT = 40
#: Few features, so that few images will do.
FEATURES = "test_sweep:means"
ARGUMENTS: dict[str, Any] = {"features": FEATURES, "batch_size": 8, "bootstrap": 20}


def means(images: Any) -> Any:
    """Brightness of the quarters."""
    x = images.astype(np.float64).mean(-1) / 255
    half = x.shape[1] // 2
    return np.stack(
        [
            x[:, rows, columns].mean((1, 2))
            for rows in (slice(half), slice(half, None))
            for columns in (slice(half), slice(half, None))
        ],
        1,
    )


def test_numbers() -> None:
    assert parse_numbers(".9,1,1.1") == [0.9, 1.0, 1.1]
    assert parse_numbers("3:5:.25") == [3.0, 3.25, 3.5, 3.75, 4.0, 4.25, 4.5, 4.75, 5.0]
    assert parse_numbers("1:4") == [1.0, 2.0, 3.0, 4.0]
    assert parse_numbers("0.1:0.5:0.1, 7") == [0.1, 0.2, 0.3, 0.4, 0.5, 7.0]


@pytest.mark.parametrize("text", ["", "a", "1:", "1:2:0", "2:1:.5", "1:2:-1", "nan", "1:inf:1", "1:2:3:4", "0:1:.0001"])
def test_what_is_no_number(text: str) -> None:
    import click

    with pytest.raises(click.BadParameter, match="is no number and no range"):
        parse_numbers(text)


def test_the_grid_is_every_combination(digits_bundle: Path, causal_bundle: Path) -> None:
    bundle = Bundle.open(digits_bundle)
    found = grid(bundle, [3, 4.5], [0.9, 1], [2, 4])
    assert len(set(found)) == 8 and Setting(4.5, 0.9, 2) in found and len({setting.name for setting in found}) == 8
    assert grid(bundle) == [Setting(4.0, 1.0, 12)]
    assert grid(Bundle.open(causal_bundle))[0].num_iter == 16
    with pytest.raises(ValueError, match=r"guidance is \[3, 3.0\]; expected every value once"):
        grid(bundle, [3, 3.0])


def scored(fid: float, replicates: Sequence[float]) -> Evaluation:
    return Evaluation("x", 10, "r", "f", 4, fid=Estimate(fid, 0.1), replicates=tuple(replicates))


def test_differences_are_paired() -> None:
    a, b, c = Setting(1, 1, 2), Setting(2, 1, 2), Setting(3, 1, 2)
    shared = np.random.default_rng(0).normal(0, 1, 50)
    found = ranked([(a, scored(3, shared + 3)), (b, scored(2, shared + 2)), (c, scored(5, ()))])
    assert [score.setting for score in found] == [b, a, c]
    assert found[0].behind.value == 0 and found[1].behind.value == 1
    assert found[1].behind.std == pytest.approx(0, abs=1e-9) and found[2].behind.std is None  # of either alone: 1


@pytest.fixture(scope="module")
def reference(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What guidance 2.5 makes with another seed: the best setting must be that one."""
    bundle, folder = Bundle.open(digits_bundle), tmp_path_factory.mktemp("reference") / "run"
    run = Run.of(bundle, 200, seed=9, batch_size=8, guidance_scale=2.5, num_iter=2, temperature=1.0)
    sample(bundle, folder, run, npz=False)
    return str(folder)


class Counts:
    """Workers that tell how many tasks of making images there were."""

    def __init__(self, stop: int | None = None) -> None:
        self.made, self.stop = 0, stop

    def __call__(self, make: Callable[[], Callable[[Any], Any]], tasks: Sequence[Any]) -> Iterator[Any]:
        for result in one_process(make, tasks):
            if hasattr(result, "made"):
                self.made += result.made
                if self.stop is not None and self.made >= self.stop:
                    raise KeyboardInterrupt
            yield result


def test_a_sweep_finds_the_setting_that_made_the_reference_and_goes_on(
    digits_bundle: Path, reference: str, tmp_path: Path
) -> None:
    bundle, folder = Bundle.open(digits_bundle), tmp_path / "sweep"
    settings = grid(bundle, [1, 2.5], [1.0, 0.4], [2])
    first = Counts(stop=COUNT + 16)
    with pytest.raises(KeyboardInterrupt):
        sweep(bundle, folder, settings, COUNT, reference, workers=first, **ARGUMENTS)
    second, lines = Counts(), list[str]()
    found = sweep(bundle, folder, settings, COUNT, reference, workers=second, progress=lines.append, **ARGUMENTS)
    assert first.made + second.made == 4 * COUNT  # (what the interrupted setting had was kept)
    assert found.best.temperature == 1.0
    assert [("there already" in line) for line in lines[1:]] == [True, False, False, False]
    assert not list((folder / "runs").iterdir())
    # One value of an axis more: it alone is made. The scores are those of `evaluate`.
    third = Counts()
    more = sweep(
        bundle, folder, grid(bundle, [1, 2.5, 4], [1.0], [2]), COUNT, reference, workers=third, keep_images=True, **ARGUMENTS
    )
    assert third.made == COUNT and len(more.scores) == 3
    made = folder / "runs" / "guidance-4-temperature-1-steps-2"
    alone = evaluate(str(made), reference, features=FEATURES, bootstrap=20)
    (score,) = [score for score in more.scores if score.setting.guidance_scale == 4]
    assert score.evaluation.fid == alone.fid and score.evaluation.replicates == alone.replicates


def test_settings_share_their_noise(digits_bundle: Path, reference: str, tmp_path: Path) -> None:
    """Image i of a setting is `generate`'s with the sweep's seed."""
    bundle = Bundle.open(digits_bundle)
    settings = grid(bundle, [1, 1.5], None, [2])
    sweep(bundle, tmp_path / "sweep", settings, COUNT, reference, keep_images=True, seed=3, **ARGUMENTS)
    pipeline = Pipeline.load(digits_bundle, threads=1)
    for setting in settings:
        want = pipeline.generate([0] * 4 + [1] * 4, seed=3, batch_size=8, **setting._asdict()).images
        found = np.load(tmp_path / "sweep" / "runs" / setting.name / "shards" / "000000.npz")["arr_0"]
        assert np.array_equal(found, np.stack([np.asarray(image) for image in want]))


def arinar(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_command_writes_a_page_and_the_best_defaults(digits_bundle: Path, reference: str, tmp_path: Path) -> None:
    bundle = shutil.copytree(digits_bundle, tmp_path / "bundle")
    words = ("--guidance", "1,2.5", "--temperature", "1,.4", "--num-iter", "2", "-n", COUNT, "--batch-size", 8)
    command = ("sweep", bundle, *words, "--reference", reference, "--features", FEATURES, "-o", tmp_path / "sweep")
    result = arinar(*command, "--write-defaults")
    assert result.exit_code == 0, result.output
    assert (
        "best: guidance" in result.stdout and "behind the best" in result.stdout and "now has these defaults" in result.stderr
    )
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert page.count("<svg") >= 1 and page.count("<tr>") == 5 and "http" not in page.replace("http://www.w3.org", "")
    found = json.loads(arinar(*command, "--json").stdout)
    best, defaults = found["best"], Bundle.open(bundle).manifest.defaults
    assert (
        {name: getattr(defaults, name) for name in best} == best == {"guidance_scale": 2.5, "temperature": 1.0, "num_iter": 2}
    )
    old = Bundle.open(digits_bundle).manifest
    assert Bundle.open(bundle).manifest.files == old.files and Bundle.open(bundle).manifest.graphs == old.graphs
    assert Pipeline.load(bundle, threads=1).generate([3], batch_size=1).images


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "holds another sweep: seed was 0 and is 1; choose another folder"),
        ({"reference": "digits"}, "holds another sweep: reference was"),
        ({"num_images": 48}, "holds another sweep: num_images was 40 and is 48"),
        ({"num_images": 4, "labels": [1]}, "a setting has 4 images; a covariance of 4 features needs 5"),
        ({"settings": [Setting(0.5, 1, 2)]}, "guidance_scale is 0.5"),
        ({"settings": [Setting(2, 1, 99)]}, "num_iter is 99"),
    ],
)
def test_what_is_refused_before_an_image_is_made(
    digits_bundle: Path, reference: str, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    bundle = Bundle.open(digits_bundle)
    first: dict[str, Any] = {
        "settings": grid(bundle, [2.0], [1.0], [2]),
        "num_images": COUNT,
        "reference": reference,
        **ARGUMENTS,
    }
    sweep(bundle, tmp_path / "sweep", **first)
    made = Counts()
    with pytest.raises(ValueError, match=words):
        sweep(bundle, tmp_path / "sweep", **{**first, **changes}, workers=made)
    assert made.made == 0


def test_a_damaged_score_is_made_again_and_a_damaged_record_refused(
    digits_bundle: Path, reference: str, tmp_path: Path
) -> None:
    bundle, folder = Bundle.open(digits_bundle), tmp_path / "sweep"
    settings = grid(bundle, [2.0], [1.0], [2])
    first = sweep(bundle, folder, settings, COUNT, reference, **ARGUMENTS)
    (score,) = (folder / "scores").iterdir()
    score.write_text(score.read_text()[:200])
    made = Counts()
    again = sweep(bundle, folder, settings, COUNT, reference, workers=made, **ARGUMENTS)
    assert made.made == COUNT and again.scores == first.scores
    (folder / sweep_module.SHARED).write_text("[1]")
    with pytest.raises(ValueError, match="is no record of a sweep"):
        sweep(bundle, folder, settings, COUNT, reference, **ARGUMENTS)
