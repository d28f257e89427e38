"""Training data as plain tensors: the built-in digits, or a folder of images with one sub-folder per class.

Images are uint8 RGB. Only the functions that return tensors import torch: the judge reads the digits without it.
Letters: N images, H height, W width.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Generator, Tensor

#: Name of the built-in data set, accepted wherever a folder of images is.
DIGITS = "digits"
DIGITS_SIZE = 32
#: Digits set aside for choosing weights; 1,500 are left for training.
DIGITS_HELD_OUT = 297
DIGITS_SPLIT_SEED = 0

#: Names of a folder's parts where it is split already: for training, and held out.
SPLIT = ("train", "val")

#: What is read of a folder. No other decoder starts: some formats are programs (PostScript), run by another one.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

# An empty border of one source pixel: the scanned digits touch the edges of their 8x8 frames.
_DIGITS_BORDER = 1
# Enlargement blurs; a logistic curve around mid-grey gives the strokes their edge back.
_DIGITS_CONTRAST = 8.0
_DIGITS_THRESHOLD = 0.45


@dataclass(frozen=True)
class ImageSet:
    """``images`` (N, 3, H, W) uint8 RGB and ``labels`` (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """Training and held-out images. ``name`` says where they came from, without a machine's folders."""

    train: ImageSet
    held_out: ImageSet
    class_names: tuple[str, ...]
    name: str

    def fingerprint(self) -> str:
        """Digest of all pixels and labels: tells whether a resumed training still sees the same data."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(part.images.numpy().tobytes())
            digest.update(part.labels.numpy().tobytes())
        return digest.hexdigest()[:16]


def load_dataset(
    data: str | Path = DIGITS, *, img_size: int = DIGITS_SIZE, held_out: float | None = None, seed: int = 0
) -> Dataset:
    """The built-in digits (``data="digits"``), or a folder of images.

    Parameters
    ----------
    data : "digits", or a folder with one sub-folder per class.
    img_size : side in pixels; the digits exist at 32 only.
    held_out : share set aside for choosing weights, 0 <= held_out < 1. None means 297 of the 1,797 digits, or a
        tenth of a folder.
    seed : decides which images of a folder are set aside. The digits' split is fixed, so that the judge of
        generated digits can rely on it; a ``held_out`` share can still be given.

    Raises ValueError for an unsuitable folder, share or size, ImportError where scikit-learn is missing.
    """
    if held_out is not None and not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}; expected a share in 0 <= held_out < 1")
    if str(data) == DIGITS:
        if img_size != DIGITS_SIZE:
            raise ValueError(f"img_size is {img_size}; the built-in digits are {DIGITS_SIZE} pixels wide")
        images, labels = digit_images()
        count = DIGITS_HELD_OUT if held_out is None else round(held_out * len(labels))
        return _dataset(images, labels, tuple("0123456789"), DIGITS, count, DIGITS_SPLIT_SEED)
    return load_folder(data, img_size=img_size, held_out=0.1 if held_out is None else held_out, seed=seed)


def load_folder(folder: str | Path, *, img_size: int, held_out: float = 0.1, seed: int = 0) -> Dataset:
    """Images of a folder with one sub-folder per class; sorted sub-folder names are class ids 0, 1, ...

    A folder of just ``train`` and ``val``, with the same classes in each, is split already: ``val`` is held out, and
    ``held_out`` and ``seed`` decide nothing. Every file with an ending of FORMATS is read, centre-cropped to a square and
    resized to ``img_size``.

    Raises ValueError naming the folder or file that cannot be used.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; expected {DIGITS!r} or a folder with one sub-folder per class")
    parts = _sub_folders(root)
    if [part.name for part in parts] == list(SPLIT) and all(_sub_folders(part) for part in parts):
        (images, labels, names), (aside, aside_labels, aside_names) = (_read_classes(part, img_size) for part in parts)
        if names != aside_names:
            odd = ", ".join(sorted(set(names) ^ set(aside_names)))
            raise ValueError(f"{root}: train and val have different classes ({odd}); expected the same sub-folders in both")
        train, held = _image_set(images, labels), _image_set(aside, aside_labels)
        return Dataset(train, held, names, "folder")
    images, labels, names = _read_classes(root, img_size)
    return _dataset(images, labels, names, "folder", round(held_out * len(labels)), seed)


def _sub_folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read_classes(root: Path, img_size: int) -> tuple[Any, Any, tuple[str, ...]]:
    """Images (N, H, W, 3) uint8, labels (N,) int64, class names."""
    classes = _sub_folders(root)
    if not classes:
        raise ValueError(f"{root} has no sub-folder; expected one sub-folder of images per class")
    images, labels = [], []
    for label, entry in enumerate(classes):
        paths = list(_image_files(entry))
        if not paths:
            raise ValueError(f"{entry} holds no image; remove the sub-folder or add images to it")
        images += [_read_image(path, img_size) for path in paths]
        labels += [label] * len(paths)
    return np.stack(images), np.array(labels, dtype=np.int64), tuple(entry.name for entry in classes)


def _image_files(folder: Path) -> Iterator[Path]:
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix.lower() in endings:
            yield path


def _read_image(path: Path, img_size: int) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(
            f"{path} has too many pixels for an image; expected at most {Image.MAX_IMAGE_PIXELS:,}: scale it down, or remove it"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} cannot be read as an image: expected one of {', '.join(FORMATS)}") from None
    except Exception as error:  # what Pillow raises for damaged files has no common type
        raise ValueError(f"{path} cannot be read as an image: {error or type(error).__name__}") from error
    square = ImageOps.fit(upright, (img_size, img_size), Image.Resampling.BICUBIC, centering=(0.5, 0.5))
    return np.asarray(square, dtype=np.uint8)


def digit_images() -> tuple[Any, Any]:
    """scikit-learn's 1,797 scanned digits, enlarged -> images (N, 32, 32, 3) uint8, labels (N,) int64.

    White strokes on black. Needs scikit-learn, not torch.
    """
    datasets = import_sklearn("datasets")
    bunch = datasets.load_digits()
    images = np.stack([_enlarge(scan) for scan in bunch.images])
    return images, np.asarray(bunch.target, dtype=np.int64)


def _enlarge(scan: Any) -> Any:
    """One scan (8, 8) with values 0..16 -> (32, 32, 3) uint8."""
    padded = np.pad(np.asarray(scan, dtype=np.float32) / 16, _DIGITS_BORDER)
    image = Image.fromarray(padded).resize((DIGITS_SIZE, DIGITS_SIZE), Image.Resampling.BICUBIC)
    ink = 1 / (1 + np.exp(-_DIGITS_CONTRAST * (np.asarray(image, dtype=np.float64) - _DIGITS_THRESHOLD)))
    lowest, highest = (1 / (1 + np.exp(-_DIGITS_CONTRAST * (v - _DIGITS_THRESHOLD))) for v in (0.0, 1.0))
    grey = np.clip((ink - lowest) / (highest - lowest), 0, 1)
    return np.repeat(np.rint(grey * 255).astype(np.uint8)[..., None], 3, axis=-1)


def import_sklearn(module: str) -> Any:
    """``sklearn.<module>``, or an ImportError that says how to get it."""
    import importlib

    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError(
            "the built-in digits need scikit-learn, which is not installed; install it with: pip install scikit-learn"
        ) from error


def split_indices(labels: Any, held_out: int, seed: int) -> tuple[Any, Any]:
    """Stratified split of labels (N,) -> sorted indices of the training and of ``held_out`` held-out images.

    Each class gives its share, to the nearest image; no class gives its last image.
    """
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * held_out / len(labels)
    shares = np.minimum(np.floor(exact).astype(int), counts - 1)
    # Largest remainders first, as long as images are asked for and a class has one to spare.
    while shares.sum() < held_out and (shares < counts - 1).any():
        shares[np.argmax(np.where(shares < counts - 1, exact - shares, -np.inf))] += 1
    chosen = [rng.permutation(np.flatnonzero(labels == value))[:share] for value, share in zip(classes, shares, strict=True)]
    aside = np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), aside), aside


def _dataset(images: Any, labels: Any, names: tuple[str, ...], name: str, held_out: int, seed: int) -> Dataset:
    train, aside = split_indices(labels, held_out, seed)
    return Dataset(_image_set(images[train], labels[train]), _image_set(images[aside], labels[aside]), names, name)


def _image_set(images: Any, labels: Any) -> ImageSet:
    import torch

    return ImageSet(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))


def to_float(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 in [-1, 1], what the autoencoder reads."""
    return images.float() / 127.5 - 1


@dataclass(frozen=True)
class Augment:
    """Random small changes of an image that keep what it shows.

    ``rotation`` and ``shear`` in degrees, ``scale`` as a share, ``shift`` in pixels: each drawn evenly from
    -value to +value. ``flip`` mirrors every second image (not for digits). What moves in from outside repeats
    the border.
    """

    rotation: float = 6.0
    shear: float = 6.0
    scale: float = 0.06
    shift: float = 1.0
    flip: bool = False

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Float images (N, 3, H, W) in [-1, 1] -> changed images, the same shape and range."""
        import torch
        import torch.nn.functional as F

        count, _, height, width = images.shape
        draws = torch.rand(7, count, generator=generator).to(images.device) * 2 - 1
        angle, shear = torch.deg2rad(draws[0] * self.rotation), torch.tan(torch.deg2rad(draws[1] * self.shear))
        stretch_x, stretch_y = 1 + draws[2] * self.scale, 1 + draws[3] * self.scale
        mirror = torch.where(draws[6] < 0, -1.0, 1.0) if self.flip else torch.ones_like(angle)
        cos, sin = torch.cos(angle), torch.sin(angle)
        shift_x, shift_y = draws[4] * self.shift * 2 / width, draws[5] * self.shift * 2 / height
        affine = torch.stack(
            [
                torch.stack([mirror * cos * stretch_x, (shear * cos - sin) * stretch_y, shift_x], -1),
                torch.stack([mirror * sin * stretch_x, (shear * sin + cos) * stretch_y, shift_y], -1),
            ],
            1,
        )  # (N, 2, 3)
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
        return moved.clamp(-1, 1)
