"""Runs of many images: every byte decided by the run alone, whatever ends the process, and nothing of another run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from arinar.cli import main
from arinar.runtime import Bundle, Pipeline
from arinar.runtime import sampling as sampling_module
from arinar.runtime import shards as shards_module
from arinar.runtime.images import read_metadata
from arinar.runtime.run import Record, Run, differences, fingerprint, npz_path, shard_path
from arinar.runtime.sampling import one_process, sample

#: Small enough to be quick: 7 shards, the last one short.
SETTINGS: dict[str, Any] = {"batch_size": 4, "shard_size": 8, "num_iter": 2, "seed": 5}
COUNT = 50
WORDS = ("--batch-size", 4, "--shard-size", 8, "--num-iter", 2, "--seed", 5)


class Made(NamedTuple):
    folder: Path
    bundle: Bundle
    run: Run

    def images(self) -> Any:
        with np.load(npz_path(self.folder, self.run)) as found:
            return found["arr_0"]


@pytest.fixture(scope="module")
def made(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A whole run. Treat it as read-only."""
    bundle = Bundle.open(digits_bundle)
    run = Run.of(bundle, COUNT, **SETTINGS)
    folder = tmp_path_factory.mktemp("made") / "run"
    done = sample(bundle, folder, run, png=True)
    assert done.made == COUNT and done.record.complete
    return Made(folder, bundle, run)


def hashes(folder: Path) -> dict[str, str]:
    """Of all files but the record, and what a killed process left."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.json" and path.name[0] != "."]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def arinar(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def fails(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    (message,) = [line for line in result.stderr.splitlines() if "rror" in line]
    assert "Traceback" not in result.output
    for word in words:
        assert word in message, message


# What is made.


def test_the_images_are_those_of_one_call(made: Made) -> None:
    labels = [index * 10 // COUNT for index in range(COUNT)]
    pipeline = Pipeline.load(made.bundle.folder, threads=1)
    want = pipeline.generate(labels, seed=5, batch_size=4, num_iter=2)
    assert np.array_equal(made.images(), np.stack([np.asarray(image) for image in want.images]))
    with np.load(npz_path(made.folder, made.run)) as found:
        assert found["arr_1"].tolist() == labels and found["arr_0"].dtype == np.uint8
    assert npz_path(made.folder, made.run).name == "samples_50x32x32x3.npz"


def test_shards_and_pictures_are_the_same_images(made: Made) -> None:
    whole = made.images()
    shards = sorted((made.folder / "shards").iterdir())
    assert [path.name for path in shards] == [f"{number:06d}.npz" for number in range(7)]
    assert np.array_equal(np.concatenate([np.load(path)["arr_0"] for path in shards]), whole)
    pictures = sorted((made.folder / "images").iterdir())
    assert len(pictures) == COUNT
    for index in (0, 23, 49):
        with Image.open(pictures[index]) as picture:
            assert np.array_equal(np.asarray(picture), whole[index])
        metadata = read_metadata(pictures[index])
        assert metadata is not None and metadata["index"] == index and metadata["seed"] == 5 and metadata["num_iter"] == 2


def test_the_record_tells_what_decides_the_images(made: Made) -> None:
    record = Record.read(made.folder)
    assert record.complete and record.run == made.run and record.config == made.bundle.manifest.config
    assert list(record.shards) == [hashes(made.folder)[f"shards/{number:06d}.npz"] for number in range(7)]
    assert record.npz["sha256"] == hashes(made.folder)["samples_50x32x32x3.npz"]
    assert record.run.settings == {"guidance_scale": 4.0, "cfg_schedule": "linear", "temperature": 1.0, "num_iter": 2}
    assert {"arinar", "numpy", "onnxruntime"} <= set(record.versions) and len(record.made_on) == 1


def test_a_plan_of_the_users_is_sampled_and_recorded(digits_bundle: Path, tmp_path: Path) -> None:
    plan = {"schedule": "staged:4x3,4x2,8x2", "guidance_interval": (0.1, 1.0), "guidance_refresh": 2}
    words = ("--schedule", plan["schedule"], "--guidance-interval", "0.1:1", "--guidance-refresh", 2)
    for made in (10, 0):  # the same command again finds the run done
        done = arinar("sample", digits_bundle, "-n", 10, "-o", tmp_path / "run", "--batch-size", 4, *words, "--json")
        assert done.exit_code == 0 and json.loads(done.stdout)["made"] == made, done.output
    run = Record.read(tmp_path / "run").run
    assert run.settings.items() >= {**plan, "guidance_interval": [0.1, 1.0], "num_iter": 7}.items()
    want = Pipeline.load(digits_bundle, threads=1).generate(range(10), batch_size=4, **plan)
    with np.load(npz_path(tmp_path / "run", run)) as found:
        assert np.array_equal(found["arr_0"], np.stack([np.asarray(image) for image in want.images]))


@pytest.mark.parametrize(("count", "labels"), [(50, 10), (1000, 10), (17, 4), (4, 4), (50_000, 1000)])
def test_labels_have_equal_shares_in_order(digits_bundle: Path, count: int, labels: int) -> None:
    run = Run.of(Bundle.open(digits_bundle), count, labels=[index % 10 for index in range(labels)])
    run = Run.from_dict(run.__dict__ | {"labels": list(range(labels))})
    found = run.labels_of(range(count))
    assert (np.diff(found) >= 0).all()
    shares = np.bincount(found, minlength=labels)
    assert set(shares) == {count // labels, -(-count // labels)}
    assert np.array_equal(np.concatenate([run.labels_of(run.indices(number)) for number in range(run.shards)]), found)


def test_the_usual_size_of_shards_depends_on_the_run_alone(digits_bundle: Path) -> None:
    bundle = Bundle.open(digits_bundle)
    sizes = {count: Run.of(bundle, count, batch_size=4).shard_size for count in (50, 20_000, 50_000, 50_000_000)}
    assert sizes == {50: 4, 20_000: 4, 50_000: 12, 50_000_000: 256}
    for count in sizes:
        run = Run.of(bundle, count, batch_size=4)
        assert run.indices(run.shards - 1).stop == count and len(run.indices(0)) == min(run.shard_size, count)


def test_a_models_fingerprint_is_not_its_defaults(digits_bundle: Path, causal_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(digits_bundle)
    copy = shutil.copytree(digits_bundle, tmp_path / "copy")
    text = json.loads((copy / "manifest.json").read_text())
    text["defaults"]["guidance_scale"] = 2.0
    (copy / "manifest.json").write_text(json.dumps(text))
    assert fingerprint(Bundle.open(copy), "fp32") == fingerprint(bundle, "fp32")
    assert fingerprint(Bundle.open(causal_bundle), "fp32") != fingerprint(bundle, "fp32")
    file = next(name for name in text["files"] if name.endswith(".onnx"))
    text["files"][file]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(text))
    assert fingerprint(Bundle.open(copy), "fp32") != fingerprint(bundle, "fp32")


# What is there already.


class Stops:
    """Workers that end after some tasks, as Ctrl-C does."""

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks

    def __call__(self, make: Callable[[], Callable[[Any], Any]], tasks: Sequence[Any]) -> Iterator[Any]:
        for count, result in enumerate(one_process(make, tasks)):
            if count == self.tasks:
                raise KeyboardInterrupt
            yield result


def test_a_run_goes_on_where_it_stopped(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        sample(made.bundle, folder, made.run, workers=Stops(3), png=True)
    assert not Record.read(folder).complete
    done = sample(made.bundle, folder, made.run, png=True)
    assert done.made == COUNT - 32 and not done.damaged  # the fourth shard was there before its worker said so
    assert hashes(folder) == hashes(made.folder)


def test_a_whole_run_loads_no_model_and_changes_nothing(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(made.folder, tmp_path / "run")
    before = hashes(folder)
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    done = sample(made.bundle, folder, made.run, png=True)
    assert done.made == 0 and done.record == Record.read(made.folder) and hashes(folder) == before


def test_single_pictures_come_from_the_shards(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(made.folder, tmp_path / "run")
    shutil.rmtree(folder / "images")
    npz_path(folder, made.run).unlink()
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert sample(made.bundle, folder, made.run, png=True).made == 0
    (folder / "images" / "000007.png").write_bytes(b"cut off")
    sample(made.bundle, folder, made.run, png=True)
    assert hashes(folder) == hashes(made.folder)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: shutil.copyfile(path.with_name("000002.npz"), path),
        lambda path: np.savez(path, np.zeros((8, 16, 16, 3), np.uint8), np.zeros(8, np.int64)),
    ],
    ids=["a bit", "cut off", "empty", "other labels", "other images"],
)
def test_a_damaged_shard_is_made_again(made: Made, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    folder = shutil.copytree(made.folder, tmp_path / "run")
    damage(shard_path(folder, 4))
    said = []
    done = sample(made.bundle, folder, made.run, png=True, progress=said.append)
    assert done.damaged == [4] and done.made == 8
    assert "000004.npz is damaged" in str(next(shard.damage for shard in said if shard.number == 4))
    assert hashes(folder) == hashes(made.folder)


def test_a_damaged_npz_file_is_made_again(made: Made, tmp_path: Path) -> None:
    folder = shutil.copytree(made.folder, tmp_path / "run")
    _flip(npz_path(folder, made.run))
    assert sample(made.bundle, folder, made.run, png=True).made == 0
    assert hashes(folder) == hashes(made.folder)


def test_the_command_killed_and_begun_again_makes_the_same_set(made: Made, tmp_path: Path) -> None:
    """SIGKILL at several moments; each time another lot of shards is there."""
    folder = tmp_path / "run"
    words = ["sample", str(made.bundle.folder), "-n", str(COUNT), "-o", str(folder), *map(str, WORDS), "--png"]
    command = [sys.executable, "-m", "arinar", *words]
    kept = []
    for wanted in (1, 3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list((folder / "shards").glob("0*.npz"))) < wanted:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kept.append(len(list((folder / "shards").glob("0*.npz"))))
    assert kept == sorted(kept) and 1 <= kept[0] < 7
    result = arinar(*words, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["made"] == COUNT - 8 * kept[1]
    assert hashes(folder) == hashes(made.folder)


# What is refused.


def test_a_folder_of_another_run_is_refused_with_what_differs(made: Made, tmp_path: Path, causal_bundle: Path) -> None:
    words = ("sample", made.bundle.folder, "-n", COUNT, "-o", made.folder)
    before = hashes(made.folder)
    fails(arinar(*words, *WORDS, "--temperature", 0.9), "holds another run", "temperature was 1.0 and is 0.9")
    fails(arinar(*words, *WORDS[:-1], 6), "seed was 5 and is 6", "Choose another folder")
    fails(arinar(*words, "--labels", "3,5", *WORDS), "labels was (0, 1, 2")
    fails(arinar("sample", made.bundle.folder, "-n", 60, "-o", made.folder, *WORDS), "num_images was 50 and is 60")
    causal = ("sample", causal_bundle, "-n", COUNT, "-o", made.folder, "--batch-size", 4, "--shard-size", 8, "--seed", 5)
    fails(arinar(*causal), "it is of another model")
    assert hashes(made.folder) == before


def test_differences_are_in_words(made: Made) -> None:
    other = Run.of(made.bundle, COUNT, **{**SETTINGS, "guidance_scale": 2.0, "shard_size": 16})
    assert differences(made.run, made.run) == []
    assert differences(made.run, other) == ["guidance_scale was 4.0 and is 2.0", "shard_size was 8 and is 16"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format_version": 2}', '{"format_version": 1, "run": {}}'])
def test_a_damaged_record_is_refused(made: Made, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(made.folder, tmp_path / "run")
    (folder / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is no record of a run .*; restore it, or choose another folder"):
        sample(made.bundle, folder, made.run)
    (folder / "run.json").unlink()
    with pytest.raises(ValueError, match=r"has shards and no run\.json"):
        sample(made.bundle, folder, made.run)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--labels", "3,10"), ("10", "0..9")),
        (("-n", 5), ("num_images is 5, for 10 labels", "name the labels")),
        (("--shard-size", 6), ("shard_size is 6, with a batch_size of 4; expected a multiple",)),
        (("--guidance-scale", 0.5), ("guidance_scale is 0.5",)),
        (("--precision", "int8"), ("no 'int8' graphs",)),
        (("--backend", "abacus"), ("backend is 'abacus'; choose one of",)),
        (("--address", "auto"), ("--address is for workers: add --workers N",)),
    ],
)
def test_bad_arguments(digits_bundle: Path, tmp_path: Path, words: tuple[Any, ...], parts: tuple[str, ...]) -> None:
    fails(arinar("sample", digits_bundle, "-n", 20, "-o", tmp_path / "run", "--batch-size", 4, *words), *parts)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_too_small_is_told_first(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 9 * 10**8, 250_000))
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"has 0.00025 GB of room left, and 50 images need more \(shards .*npz file"):
        sample(made.bundle, tmp_path / "run", made.run)
    assert not (tmp_path / "run").exists()
    folder = shutil.copytree(made.folder, tmp_path / "there")
    assert sample(made.bundle, folder, made.run).made == 0  # it needs no more


def test_a_worker_that_sees_another_folder_or_bundle_says_so(made: Made, causal_bundle: Path, tmp_path: Path) -> None:
    work = shards_module.MakeShards(tmp_path, made.bundle.folder, made.run)
    with pytest.raises(ValueError, match=r"holds no run\.json.*all machines must see the folder, under the same path"):
        work()
    work = shards_module.MakeShards(made.folder, causal_bundle, made.run)
    with pytest.raises(ValueError, match="is another model than on the machine that began the run"):
        work()


def test_ray_that_is_missing_is_named(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = arinar("sample", made.bundle.folder, "-n", COUNT, "-o", tmp_path / "run", *WORDS, "--workers", 2)
    fails(result, "workers need the package ray", "'.[ray]'", "--workers 0 needs none")
    assert not (tmp_path / "run").exists()


def test_what_is_told(made: Made, tmp_path: Path) -> None:
    folder = shutil.copytree(made.folder, tmp_path / "run")
    _flip(shard_path(folder, 0))
    words = ("sample", made.bundle.folder, "-n", COUNT, "-o", folder, *WORDS)
    result = arinar(*words)
    assert result.exit_code == 0 and "000000.npz is damaged" in result.stderr and "made again" in result.stderr
    assert result.stdout == f"50 images in {folder} (42 were there already): samples_50x32x32x3.npz\n"
    report = json.loads(arinar(*words, "--json").stdout)
    assert report["made"] == 0 and report["shards"] == 7 and report["npz"].endswith("samples_50x32x32x3.npz")
