"""Are generated digits digits, varied, and new? An independent judge: NumPy and scikit-learn, no torch.

The classifier knows nothing of the autoencoder or the model: it is a support vector machine trained on the real
digits' training split. All images are (N, 32, 32, 3) uint8; labels are (N,) integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .data import DIGITS_HELD_OUT, DIGITS_SIZE, DIGITS_SPLIT_SEED, digit_images, import_sklearn, split_indices

# The classifier sees 16x16 grey values: the scans had 8x8, more would only be noise to it.
_SIDE = 16
_SVC = {"C": 10.0, "gamma": 0.1}
# The training digits are repeated, moved by one pixel each way, so that position does not decide.
_MOVES = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))
# Rows per block of a distance table, to bound memory.
_BLOCK = 256


@dataclass(frozen=True)
class Judgement:
    """What :func:`judge` measures.

    ``agreement`` : share of images that the classifier gives the requested label.
    ``diversity`` : mean pairwise distance within a class, relative to real digits; 1 is as varied as reality.
    ``novelty`` : median distance to the nearest training image, relative to held-out real digits; near 0 is a copy.
    """

    agreement: float
    diversity: float
    novelty: float
    images: int


@dataclass(frozen=True)
class RealDigits:
    """The real digits as (N, 32, 32, 3) uint8 images and (N,) labels, in the split that training uses."""

    train_images: Any
    train_labels: Any
    held_out_images: Any
    held_out_labels: Any


@lru_cache(maxsize=1)
def real_digits() -> RealDigits:
    """All real digits, split as for training. Raises ImportError where scikit-learn is missing."""
    images, labels = digit_images()
    train, aside = split_indices(labels, DIGITS_HELD_OUT, DIGITS_SPLIT_SEED)
    return RealDigits(images[train], labels[train], images[aside], labels[aside])


@lru_cache(maxsize=1)
def classifier() -> Any:
    """Support vector machine (a fitted scikit-learn SVC) that reads :func:`classifier_features`."""
    real = real_digits()
    machine = import_sklearn("svm").SVC(**_SVC)
    moved = np.concatenate([np.roll(real.train_images, move, (1, 2)) for move in _MOVES])
    return machine.fit(classifier_features(moved), np.tile(real.train_labels, len(_MOVES)))


def classifier_features(images: Any) -> Any:
    """Images -> (N, 256) grey values 0..1, averaged over 2x2 pixels."""
    grey = _check(images).mean(-1, dtype=np.float64) / 255
    step = DIGITS_SIZE // _SIDE
    return grey.reshape(len(grey), _SIDE, step, _SIDE, step).mean((2, 4)).reshape(len(grey), -1)


def classify(images: Any) -> Any:
    """Images -> (N,) labels 0..9."""
    return classifier().predict(classifier_features(images))


def agreement(images: Any, labels: Any) -> float:
    """Share of images that the classifier gives their label, 0..1."""
    images, labels = _check(images), _check_labels(images, labels)
    return float((classify(images) == labels).mean())


def classifier_accuracy() -> float:
    """Share of held-out real digits that the classifier gives their label."""
    real = real_digits()
    return agreement(real.held_out_images, real.held_out_labels)


def diversity_ratio(images: Any, labels: Any) -> float:
    """Mean pairwise distance within a class, averaged over the classes present, relative to all real digits."""
    images, labels = _check(images), _check_labels(images, labels)
    real = real_digits()
    pixels = _flat(np.concatenate([real.train_images, real.held_out_images]))
    ids = np.concatenate([real.train_labels, real.held_out_labels])
    found, expected = [], []
    for label in np.unique(labels):
        found.append(_mean_pairwise(_flat(images[labels == label])))
        expected.append(_mean_pairwise(pixels[ids == label]))
    return float(np.mean(found) / np.mean(expected))


def nearest_ratio(images: Any) -> float:
    """Median distance to the nearest training image, relative to that of the held-out real digits."""
    real = real_digits()
    train = _flat(real.train_images)
    return float(np.median(_nearest(_flat(_check(images)), train)) / np.median(_nearest(_flat(real.held_out_images), train)))


def judge(images: Any, labels: Any) -> Judgement:
    """All three measures of images (N, 32, 32, 3) uint8 made for labels (N,).

    Raises ValueError for another shape, type or label, ImportError where scikit-learn is missing.
    """
    return Judgement(agreement(images, labels), diversity_ratio(images, labels), nearest_ratio(images), len(_check(images)))


def _check(images: Any) -> Any:
    images = np.asarray(images)
    expected = (DIGITS_SIZE, DIGITS_SIZE, 3)
    if images.ndim != 4 or images.shape[1:] != expected or images.dtype != np.uint8 or not len(images):
        raise ValueError(
            f"images have shape {images.shape} and type {images.dtype}; expected (N, 32, 32, 3) uint8, at least one"
        )
    return images


def _check_labels(images: Any, labels: Any) -> Any:
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels have shape {labels.shape} and type {labels.dtype}; expected one integer per image, ({len(images)},)"
        )
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}; digits run from 0 to 9")
    return labels


def _flat(images: Any) -> Any:
    """(N, 32, 32, 3) uint8 -> (N, 3072) float64 in 0..1."""
    return images.reshape(len(images), -1).astype(np.float64) / 255


def _distances(ours: Any, theirs: Any) -> Any:
    """Euclidean distances of (N, P) and (M, P) -> (N, M)."""
    square = (ours**2).sum(1)[:, None] + (theirs**2).sum(1) - 2 * ours @ theirs.T
    return np.sqrt(np.maximum(square, 0))


def _mean_pairwise(pixels: Any) -> float:
    """Mean distance between different rows of (N, P); 0 for a single row."""
    count = len(pixels)
    if count < 2:
        return 0.0
    table = _distances(pixels, pixels)
    np.fill_diagonal(table, 0)
    return float(table.sum() / (count * (count - 1)))


def _nearest(ours: Any, theirs: Any) -> Any:
    """Distance of each row of (N, P) to the nearest row of (M, P) -> (N,)."""
    blocks = [_distances(ours[i : i + _BLOCK], theirs).min(1) for i in range(0, len(ours), _BLOCK)]
    return np.concatenate(blocks)
