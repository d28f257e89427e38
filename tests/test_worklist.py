"""Many images into a folder: what is there already is read quickly, and what is damaged is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from arinar.runtime import Pipeline
from arinar.runtime import worklist as worklist_module
from arinar.runtime.images import METADATA_KEY, read_metadata, save_png
from arinar.runtime.worklist import Worklist


@pytest.fixture(scope="module")
def pipeline(digits_bundle: Path) -> Pipeline:
    return Pipeline.load(digits_bundle, threads=1)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))


def test_metadata_is_what_the_library_reads(picture: Image.Image, tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"label": 3, "name": "Käse, 犬", "scale": 1.5, "none": None}
    save_png(picture, tmp_path / "a.png", wanted)
    assert read_metadata(tmp_path / "a.png") == wanted
    with Image.open(tmp_path / "a.png") as image:
        assert json.loads(image.info[METADATA_KEY]) == wanted


def test_a_file_that_is_cut_off_or_damaged_has_no_metadata(picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_png(picture, path, {"label": 3})
    whole = path.read_bytes()
    for length in (*range(0, 60), *range(60, len(whole), 97), *range(len(whole) - 14, len(whole))):
        path.write_bytes(whole[:length])
        assert read_metadata(path) is None, length
    for place in (0, 18, whole.index(b"IDAT") + 40, len(whole) - 6):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read_metadata(path) is None, place
    assert read_metadata(tmp_path / "none.png") is None and read_metadata(tmp_path) is None


def test_pictures_that_are_not_ours_have_no_metadata(picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "plain.png")
    picture.save(tmp_path / "jpeg.png", format="JPEG")
    for name, text in (("list", "[1]"), ("words", "not json"), ("number", "3")):
        info = PngImagePlugin.PngInfo()
        info.add_text(METADATA_KEY, text)
        picture.save(tmp_path / f"{name}.png", pnginfo=info)
    for path in tmp_path.iterdir():
        assert read_metadata(path) is None, path.name


@pytest.mark.parametrize("overwrite", [False, True])
def test_existing_files_are_read_once_and_not_decoded(
    pipeline: Pipeline, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    labels = [i % 10 for i in range(500)]
    planned = Worklist(pipeline, labels, tmp_path, seed=3)
    for path, metadata in zip(planned.paths, planned.metadata, strict=True):
        save_png(picture, path, metadata)
    read: list[Path] = []

    def counted(path: Path) -> dict[str, Any] | None:
        read.append(path)
        return read_metadata(path)

    monkeypatch.setattr(worklist_module, "read_metadata", counted)
    for kind in (Image.Image, ImageFile.ImageFile):
        monkeypatch.setattr(kind, "load", lambda self: pytest.fail("a picture was decoded"))
    assert Worklist(pipeline, labels, tmp_path, seed=3, overwrite=overwrite).missing == []
    assert read == planned.paths


def test_a_file_that_is_cut_off_is_made_again_or_refused(pipeline: Pipeline, picture: Image.Image, tmp_path: Path) -> None:
    planned = Worklist(pipeline, [1, 2, 3], tmp_path)
    for path, metadata in zip(planned.paths, planned.metadata, strict=True):
        save_png(picture, path, metadata)
    planned.paths[1].write_bytes(planned.paths[1].read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"000001-2.png is there already and was made with other settings"):
        Worklist(pipeline, [1, 2, 3], tmp_path)
    assert Worklist(pipeline, [1, 2, 3], tmp_path, overwrite=True).missing == [1]


def test_other_labels_do_not_mix_with_what_is_there(pipeline: Pipeline, picture: Image.Image, tmp_path: Path) -> None:
    for path, metadata in zip((planned := Worklist(pipeline, [1, 2], tmp_path)).paths, planned.metadata, strict=True):
        save_png(picture, path, metadata)
    with pytest.raises(ValueError, match=r"000001-2.png is there already and was made with other settings"):
        Worklist(pipeline, [1, 3], tmp_path)
    other = Worklist(pipeline, [1, 3], tmp_path, overwrite=True)
    other.prepare()
    other.run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000-1.png", "000001-3.png"]
