"""Editing, shown on the demo model: the upper half of real digits stays, the lower half is generated anew as each class.

A judge that knows nothing of the model (`arinar.judge`) reads the results. How much the upper half leaves room for is told by
the same with real digits: the upper half of one on the lower half of another.

    python -m benchmarks.editing digits-bundle/ --picture docs/editing.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arinar.judge import classify, real_digits
from arinar.runtime import Pipeline
from arinar.runtime.images import contact_sheet, save_png

CLASSES = 10
#: Where real halves are read as the lower one's class at least so often, the upper half leaves room for it.
ROOM = 0.8


def lower_half(side: int) -> Any:
    """(side, side) bool."""
    return np.arange(side)[:, None].repeat(side, 1) >= side // 2


def held_out(label: int, count: int) -> Any:
    """Real digits that no model was trained on, (count, 32, 32, 3)."""
    real = real_digits()
    return real.held_out_images[real.held_out_labels == label][:count]


def read_as(images: Any, label: int) -> float:
    return float((classify(np.stack([np.asarray(image) for image in images])) == label).mean())


def real_shares(count: int) -> Any:
    """(10, 10): how often the upper half of real digits (rows) on the lower half of others (columns) is read as these."""
    shares = np.zeros((CLASSES, CLASSES))
    for upper in range(CLASSES):
        for lower in range(CLASSES):
            above, below = held_out(upper, count), held_out(lower, count)
            shares[upper, lower] = read_as(np.where(lower_half(32)[..., None], below, above), lower)
    return shares


def edited(pipeline: Pipeline, upper: int, lower: int, count: int, seed: int = 0) -> list[Image.Image]:
    """Real digits whose lower half is generated anew as another class."""
    return pipeline.edit(held_out(upper, count), lower_half(32), [lower] * count, seed=seed).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=20, help="digits of each class")
    parser.add_argument("--picture", type=Path, help="write a contact sheet here: a digit, then its lower half as 0 to 9")
    arguments = parser.parse_args()
    pipeline = Pipeline.load(arguments.bundle)
    shares, rows = np.zeros((CLASSES, CLASSES)), []
    for upper in range(CLASSES):
        rows.append(Image.fromarray(held_out(upper, 1)[0]))
        for lower in range(CLASSES):
            made = edited(pipeline, upper, lower, arguments.count)
            shares[upper, lower] = read_as(made, lower)
            rows.append(made[0])
    if arguments.picture:
        save_png(contact_sheet(rows, CLASSES + 1, scale=2), arguments.picture)
    real, other = real_shares(arguments.count), ~np.eye(CLASSES, dtype=bool)
    room = (real >= ROOM) & other
    result = {
        "digits of each class": arguments.count,
        "same class": {"edited": shares[~other].mean(), "real halves": real[~other].mean()},
        "another class": {"edited": shares[other].mean(), "real halves": real[other].mean()},
        "another class, room for it": {
            "pairs": int(room.sum()),
            "edited": shares[room].mean(),
            "real halves": real[room].mean(),
        },
        "edited, upper by lower": shares.round(2).tolist(),
        "real halves, upper by lower": real.round(2).tolist(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
