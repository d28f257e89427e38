"""What an image is to be of: a class, or several classes with weights, whose embeddings are then interpolated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from arinar.class_names import UNCONDITIONAL, Classes
from arinar.config import ArinarConfig
from arinar.text import shown
from arinar.values import is_whole, number

#: Classes of one image at most: what the graphs have places for.
MOST_CLASSES = 4
# A class of a smaller share is left out: beside the others, float32 cannot tell it from none.
FEWEST = 2.0**-24


@dataclass(frozen=True)
class Labels:
    """Of n images.

    ids : (n,) int64, the class, or the first of several; -1 of an unconditional image. others, weights :
    (n, MOST_CLASSES - 1), further classes and their weights, 0 where there are no more; the first one's weight is what is
    left of 1. None: no image has several.
    """

    ids: npt.NDArray[np.int64]
    others: npt.NDArray[np.int64] | None = None
    weights: npt.NDArray[np.float32] | None = None

    @classmethod
    def of(cls, labels: Any, config: ArinarConfig) -> Labels:
        """Of a list of class ids (-1: of no class), names, and mappings, class id or name -> weight. Weights are divided by
        their sum.

        Raises ValueError for none, a wrong type, a class that the model does not have, weights that are none.
        """
        labels = by_id(labels, config)
        if not (isinstance(labels, (list, tuple)) and any(isinstance(label, Mapping) for label in labels)):
            return cls(check_ids(labels, config))
        shares = [_shares(f"labels[{place}]", label, config) for place, label in enumerate(labels)]
        ids = np.array([next(iter(share)) for share in shares], np.int64)
        if all(len(share) == 1 for share in shares):
            return cls(ids)
        shape = (len(ids), MOST_CLASSES - 1)
        others, weights = np.repeat(ids[:, None], shape[1], 1), np.zeros(shape, np.float32)
        for row, share in enumerate(shares):
            _, *rest = share.items()
            for place, (label, weight) in enumerate(rest):
                others[row, place], weights[row, place] = label, weight
        return cls(ids, others, weights)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: npt.NDArray[np.integer]) -> Labels:
        """Images ``rows``; where none of them has several classes, there are no weights."""
        if self.others is None or self.weights is None or not self.weights[rows].any():
            return Labels(self.ids[rows])
        return Labels(self.ids[rows], self.others[rows], self.weights[rows])

    def shown(self) -> list[int | dict[int, float]]:
        """What was asked for, image by image: a class id, or weights that sum to 1."""
        found: list[int | dict[int, float]] = [int(label) for label in self.ids]
        if self.others is None or self.weights is None:
            return found
        for row in np.flatnonzero(self.weights.any(1)):
            rest = {int(label): float(w) for label, w in zip(self.others[row], self.weights[row], strict=True) if w}
            found[row] = {int(self.ids[row]): 1 - sum(rest.values()), **rest}
        return found

    def branches(self, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """What ``count`` guidance branches are of: ids (G, B), -1 in the unconditional one; others and weights
        (MOST_CLASSES - 1, G, B), weights 0 there."""
        ids = np.stack([self.ids, np.full_like(self.ids, -1)])[:count]
        shape = (MOST_CLASSES - 1, *ids.shape)
        others, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        if self.others is not None and self.weights is not None:
            others[:, 0], weights[:, 0] = self.others.T, self.weights.T
        return ids, others, weights


def unmixed(*axes: int) -> dict[str, npt.NDArray[Any]]:
    """Inputs of an outer graph for rows (...) of one class each."""
    shape = (MOST_CLASSES - 1, *axes)
    return {"mixed_labels": np.zeros(shape, np.int64), "mixed_weights": np.zeros(shape, np.float32)}


def about_label(label: int | dict[int, float], classes: Classes) -> dict[str, Any]:
    """What an image tells of the label that it was made of, as JSON reads it back."""
    if isinstance(label, dict):
        return {"label": {str(key): weight for key, weight in label.items()}}
    named = label == UNCONDITIONAL or classes.short(label) != str(label)
    return {"label": label} | ({"class_name": classes.short(label)} if named else {})


def by_id(labels: Any, config: ArinarConfig) -> Any:
    """Labels with ids in place of names. Raises ValueError for a name that is no class's, or several classes'."""
    if not isinstance(labels, (list, tuple)) or not any(isinstance(label, (str, Mapping)) for label in labels):
        return labels
    classes = Classes(config)

    def found(label: Any, what: str) -> Any:
        if isinstance(label, str):
            return classes.label(label, what)
        if not isinstance(label, Mapping):
            return label
        pairs = [(classes.label(key, what) if isinstance(key, str) else key, weight) for key, weight in label.items()]
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError(f"{what} is {shown(label)}, in which a class has two names; give it one weight")
        return dict(pairs)

    return [found(label, f"labels[{place}]") for place, label in enumerate(labels)]


def check_ids(labels: Any, config: ArinarConfig, least: int = UNCONDITIONAL) -> npt.NDArray[np.int64]:
    """Class ids as (B,) int64, -1 of an unconditional image. Raises ValueError for none, a wrong type, or one out of range."""
    try:
        ids = np.asarray(labels)
    except (ValueError, OverflowError) as error:  # lists of lists of different lengths
        raise ValueError(f"labels is {shown(labels)}; expected a list of integer class ids") from error
    if ids.size == 0:
        raise ValueError("labels is empty; give at least one class id")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"labels is {ids.dtype} with shape {ids.shape}; expected a list of integer class ids")
    if (bad := ids[(ids < least) | (ids >= config.num_classes)]).size:
        raise ValueError(
            f"label {int(bad[0])} is out of range; this model has classes 0..{config.num_classes - 1}"
            + (", and -1 for an image of no class" if least < 0 else "")
        )
    return ids.astype(np.int64)


def _shares(name: str, label: Any, config: ArinarConfig) -> dict[int, float]:
    """The classes of an image that have a weight, in the order of their ids, and their shares of the sum."""
    if is_whole(label):
        return {int(check_ids([label], config)[0]): 1.0}
    if not isinstance(label, Mapping) or not label or not all(is_whole(key) for key in label):
        raise ValueError(f"{name} is {shown(label)}; expected a class id, or weights by class id: {{3: 0.5, 8: 0.5}}")
    for key in label:
        check_ids([key], config, 0)
    weights = {int(key): number(f"{name}[{key}]", label[key], 0) for key in sorted(label)}
    total = sum(weights.values())
    if not total:
        raise ValueError(f"{name} has no weight above 0; expected at least one class with one")
    shares = {key: weight / total for key, weight in weights.items() if weight / total > FEWEST}
    if len(shares) > MOST_CLASSES:
        raise ValueError(f"{name} has {len(shares)} classes; expected at most {MOST_CLASSES}: the graphs take no more")
    return shares
