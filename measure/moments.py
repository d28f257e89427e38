"""Features of a set of images, gathered piece by piece: moments of all of them, the features of some, class probabilities.

Memory does not grow with the number of images: moments and scores are sums that are merged, and of at most ``KEPT`` images,
evenly spread, the features themselves are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from arinar.config import ArinarConfig

from .features import Features, check_features, extractor_name, feature_extractor, features_and_logits, right_answers
from .image_sets import ImageSet, Piece

Array = npt.NDArray[Any]
Result = TypeVar("Result")

#: Images whose features are kept: of Inception, 0.4 GB.
KEPT = 50_000
#: The inception score is a mean over so many parts of the set, shuffled with this seed: torch-fidelity's numbers.
PARTS, SHUFFLE_SEED = 10, 2020


@dataclass
class Moments:
    """Of n features (n, F): their number, mean (F,), and sum of outer products about the mean (F, F)."""

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, features: Array) -> Moments:
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Take in another set's (Chan, Golub and LeVeque, 1979: exact, whatever the order)."""
        total, gap = self.count + other.count, other.mean - self.mean
        self.scatter = self.scatter + other.scatter + np.outer(gap, gap) * (self.count * other.count / total)
        self.mean = self.mean + gap * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Array:
        """(F, F), unbiased."""
        return self.scatter / (self.count - 1)


@dataclass
class ClassSums:
    """For the inception score, of each part of the set: images, sums of their class probabilities (PARTS, C), and of the
    probabilities times their logarithms (PARTS,)."""

    counts: Array
    probabilities: Array
    negentropy: Array

    @classmethod
    def of(cls, logits: Array, part: Array) -> ClassSums:
        """logits (n, C); part (n,): which part each image is in."""
        shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
        log = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        member = (part[None] == np.arange(PARTS)[:, None]).astype(np.float64)  # (PARTS, n)
        return cls(member.sum(1), member @ np.exp(log), member @ (np.exp(log) * log).sum(1))

    def merge(self, other: ClassSums) -> None:
        self.counts = self.counts + other.counts
        self.probabilities = self.probabilities + other.probabilities
        self.negentropy = self.negentropy + other.negentropy


@dataclass
class Gathered:
    """What is known of a set, or of a piece of it. ``right``: images whose label an independent classifier reads, None where
    there is none."""

    moments: Moments
    kept: list[Array] = field(default_factory=list)
    classes: ClassSums | None = None
    right: int | None = None

    def merge(self, other: Gathered) -> None:
        self.moments.merge(other.moments)
        self.kept += other.kept
        if self.classes is not None and other.classes is not None:
            self.classes.merge(other.classes)
        if self.right is not None and other.right is not None:
            self.right += other.right

    @property
    def features(self) -> Array:
        """(at most KEPT, F) float32, in the images' order."""
        if len(self.kept) > 1:
            self.kept = [np.concatenate(self.kept)]
        return self.kept[0]


@dataclass(frozen=True)
class Source:
    """Where features come from, ready to be sent to a worker: as `feature_extractor` has them."""

    features: str | Features
    config: ArinarConfig | None = None
    weights: Path | None = None

    @property
    def name(self) -> str:
        return extractor_name(self.features)

    def open(self) -> Callable[[Array], tuple[Array, Array | None]]:
        """A function of images (n, H, W, 3) uint8 -> features (n, F) float64, logits (n, C) or None."""
        extract = feature_extractor(self.features, self.config, self.weights)

        def call(images: Array) -> tuple[Array, Array | None]:
            features, logits = features_and_logits(extract(images))
            return check_features(features, len(images), self.name), logits

        return call


@dataclass(frozen=True)
class GatherPieces:
    """What a worker needs to gather pieces of a set of ``count`` images. ``labels``, ``config``: of a set whose images an
    independent classifier can read."""

    source: Source
    count: int
    labels: Array | None = None
    config: ArinarConfig | None = None

    def __call__(self) -> Callable[[tuple[int, Piece]], tuple[int, Gathered]]:
        extract = self.source.open()
        shuffled = np.random.RandomState(SHUFFLE_SEED).permutation(self.count)  # torch-fidelity's
        part = np.empty(self.count, np.int8)
        part[shuffled] = (np.searchsorted([s * self.count // PARTS for s in range(PARTS)], np.arange(self.count), "right")) - 1

        def gather(task: tuple[int, Piece]) -> tuple[int, Gathered]:
            number, piece = task
            found, first = None, piece.first
            for images in piece.parts():
                some = self._gather(extract, images, np.arange(first, first + len(images)), part)
                first += len(images)
                if found is None:
                    found = some
                else:
                    found.merge(some)
            assert found is not None and first == piece.last
            return number, found

        return gather

    def _gather(
        self, extract: Callable[[Array], tuple[Array, Array | None]], images: Array, indices: Array, part: Array
    ) -> Gathered:
        features, logits = extract(images)
        kept = features[is_kept(indices, self.count)].astype(np.float32)
        right = None
        if self.labels is not None and self.config is not None:
            answers = right_answers(images, self.labels[indices].tolist(), self.config)
            right = None if answers is None else int(answers.sum())
        classes = None if logits is None else ClassSums.of(logits, part[indices])
        return Gathered(Moments.of(features), [kept], classes, right)


def is_kept(indices: Array, count: int) -> Array:
    """Of ``count`` images, KEPT evenly spread ones; all where there are fewer."""
    if count <= KEPT:
        return np.ones(len(indices), bool)
    return np.asarray(indices * KEPT // count != (indices - 1) * KEPT // count)


def gather(images: ImageSet, source: Source, workers: Any, progress: Callable[[int], object] = lambda count: None) -> Gathered:
    """Everything of a set. ``workers``: `arinar.runtime.sampling.one_process`, or Ray's. ``progress`` is told how many images
    are done more. Pieces are merged in their order: the result does not depend on the workers."""
    config = None if images.record is None else images.record.config
    work = GatherPieces(source, images.count, images.labels, config)
    total: Gathered | None = None
    for found in in_order(workers(work, list(enumerate(images.pieces)))):
        progress(found.moments.count)
        if total is None:
            total = found
        else:
            total.merge(found)
    assert total is not None
    return total


def in_order(numbered: Iterator[tuple[int, Result]]) -> Iterator[Result]:
    """Results by their numbers 0, 1, ...; those that come too early wait."""
    early: dict[int, Result] = {}
    following = 0
    for number, result in numbered:
        early[number] = result
        while following in early:
            yield early.pop(following)
            following += 1
