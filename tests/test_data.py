"""The built-in digits, folders of images, splits and augmentation."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arinar.data import Augment, Dataset, digit_images, load_dataset, load_folder, split_indices, to_float


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


def _folder(root: Path, counts: dict[str, int], size: tuple[int, int] = (40, 24)) -> Path:
    """Images of one colour per class, in assorted formats and modes."""
    for index, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            colour = (40 * index + 20, 10 * i, 200)
            ending = (".png", ".jpg", ".bmp")[i % 3]
            image = Image.new("RGB", size, colour)
            (image.convert("L") if i % 4 == 3 else image).save(root / name / f"{i:03d}{ending}")
    return root


def test_digits_shapes_and_split(digits: Dataset) -> None:
    assert digits.train.images.shape == (1500, 3, 32, 32) and digits.train.images.dtype == torch.uint8
    assert digits.held_out.images.shape == (297, 3, 32, 32) and digits.held_out.labels.dtype == torch.int64
    assert digits.class_names == tuple("0123456789")
    # Stratified: each class gives its share to within one image.
    every = torch.cat([digits.train.labels, digits.held_out.labels]).bincount()
    share = every * 297 / 1797
    assert ((digits.held_out.labels.bincount() - share).abs() < 1).all()


def test_digits_fill_the_range_and_leave_a_border(digits: Dataset) -> None:
    images = digits.train.images
    assert images.amin() == 0 and images.amax() == 255
    border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]], -1)
    assert border.max() < 16, "strokes must not touch the edge"
    assert (images[:, 0] == images[:, 2]).all(), "grey"


def test_digits_are_the_same_every_time(digits: Dataset) -> None:
    again = load_dataset("digits", seed=5)
    assert again.fingerprint() == digits.fingerprint(), "the seed does not touch the digits' split"
    assert load_dataset("digits", held_out=0.2).fingerprint() != digits.fingerprint()


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        digit_images()


def test_digits_exist_at_one_size_only() -> None:
    with pytest.raises(ValueError, match="img_size is 64"):
        load_dataset("digits", img_size=64)


@pytest.mark.parametrize("held_out", [-0.1, 1.0, float("nan")])
def test_held_out_share_is_checked(held_out: float) -> None:
    with pytest.raises(ValueError, match="held_out is"):
        load_dataset("digits", held_out=held_out)


@pytest.mark.parametrize(("counts", "held_out"), [((10, 20, 30), 6), ((1, 1, 50), 5), ((3,), 1), ((5, 5), 0)])
def test_split_is_stratified(counts: tuple[int, ...], held_out: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    train, aside = split_indices(labels, held_out, seed=3)
    assert len(aside) == held_out
    assert sorted([*train, *aside]) == list(range(len(labels)))
    assert set(labels[train]) == set(range(len(counts))), "every class stays in training"


def test_split_of_single_images_leaves_them_in_training() -> None:
    train, aside = split_indices(np.arange(4), 2, seed=0)
    assert len(train) == 4 and len(aside) == 0


def test_folder_classes_crop_and_resize(tmp_path: Path) -> None:
    data = load_folder(_folder(tmp_path, {"dog": 6, "cat": 4}), img_size=16, held_out=0.2, seed=1)
    assert data.class_names == ("cat", "dog") and data.name == "folder"
    assert data.train.images.shape == (8, 3, 16, 16) and len(data.held_out) == 2
    assert data.train.labels.bincount().tolist() == [3, 5]


def test_folder_crop_is_centred(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    Image.fromarray(pixels).save(tmp_path / "one" / "a.png")
    data = load_folder(tmp_path, img_size=8, held_out=0)
    assert (data.train.images == 255).all()


def test_folder_split_follows_the_seed(tmp_path: Path) -> None:
    root = _folder(tmp_path, {"a": 12, "b": 12})
    prints = {seed: load_dataset(root, img_size=8, held_out=0.25, seed=seed).fingerprint() for seed in (0, 1)}
    assert prints[0] != prints[1]
    assert prints[0] == load_dataset(root, img_size=8, held_out=0.25, seed=0).fingerprint()


def test_a_folder_of_train_and_val_is_split_already(tmp_path: Path) -> None:
    for part, counts in (("train", {"dog": 6, "cat": 4}), ("val", {"cat": 1, "dog": 2})):
        (tmp_path / part).mkdir()
        _folder(tmp_path / part, counts)
    data = load_dataset(tmp_path, img_size=8, held_out=0.5, seed=3)
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [0] * 4 + [1] * 6 and data.held_out.labels.tolist() == [0, 1, 1]
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "cow")
    with pytest.raises(ValueError, match=r"train and val have different classes \(cat, cow\)"):
        load_dataset(tmp_path, img_size=8)


def test_two_classes_may_be_called_train_and_val(tmp_path: Path) -> None:
    assert load_dataset(_folder(tmp_path, {"train": 3, "val": 3}), img_size=8).class_names == ("train", "val")


def test_one_class_is_fine(tmp_path: Path) -> None:
    assert load_dataset(_folder(tmp_path, {"only": 3}), img_size=8).class_names == ("only",)


def test_folder_errors_name_the_culprit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing is not a folder"):
        load_dataset(tmp_path / "missing", img_size=8)
    with pytest.raises(ValueError, match="no sub-folder"):
        load_dataset(tmp_path, img_size=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image"):
        load_dataset(tmp_path, img_size=8)
    (tmp_path / "empty" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        load_dataset(tmp_path, img_size=8)


def test_truncated_image_is_named(tmp_path: Path) -> None:
    path = _folder(tmp_path, {"a": 1}) / "a" / "000.png"
    noisy = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noisy).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"000\.png cannot be read"):
        load_dataset(tmp_path, img_size=8)


def test_augmentation_is_small_seeded_and_in_range(digits: Dataset) -> None:
    images = to_float(digits.train.images[:20])
    changed = Augment()(images, torch.Generator().manual_seed(1))
    assert torch.equal(changed, Augment()(images, torch.Generator().manual_seed(1)))
    assert changed.shape == images.shape and changed.abs().max() <= 1
    assert not torch.equal(changed, images)
    assert (changed - images).abs().mean() < 0.25


def test_augmentation_of_nothing_changes_nothing(digits: Dataset) -> None:
    images = to_float(digits.train.images[:4])
    still = Augment(rotation=0, shear=0, scale=0, shift=0)
    torch.testing.assert_close(still(images, torch.Generator()), images, atol=1e-4, rtol=0)


def test_flip_mirrors_whole_images(digits: Dataset) -> None:
    images = to_float(digits.train.images[:16])
    flip = Augment(rotation=0, shear=0, scale=0, shift=0, flip=True)
    changed = flip(images, torch.Generator().manual_seed(0))
    same = (changed - images).abs().amax((1, 2, 3)) < 1e-3
    mirrored = (changed - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-3
    assert (same | mirrored).all() and mirrored.any() and same.any()
