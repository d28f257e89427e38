"""Whether a picture's last bits depend on its place in a micro-batch, or on what is beside it: tried, not assumed.

A CPU's kernels may compute the last rows of a launch by other instructions than the rest (seen: 3, 5, 6 and 7 rows of a guided
draw; 1, 2, 4, 8 and 16 never), and where ranges are taken as a graph runs, the rows of a launch share them. The scheduler puts
rows wherever there is room, so it needs a size at which neither matters. Where smaller micro-batches make the same bits too,
few rows need not be filled up to many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from arinar.runtime import Pipeline
from arinar.runtime.request import Batch, Sampling

#: Outer steps that a trial takes, spread over the plan: the first, the last and some between have all kinds of shapes.
TRIED_STEPS = 5
#: Features that a trial compares at least, in micro-batches of different pictures: the difference shows in few of them.
TRIED_FEATURES = 8_000


def sizes_alike(pipeline: Pipeline, most: int) -> list[int]:
    """The largest power of two up to ``most`` at which places do not matter, and the smaller ones at which pictures are the
    same to the last bit: in ascending order."""
    powers = [1 << power for power in range(most.bit_length())]
    largest = next(size for size in reversed(powers) if not places_matter(pipeline, size))
    return [*(size for size in powers if size < largest and _alike(pipeline, size, largest)), largest]


def places_matter(pipeline: Pipeline, size: int) -> bool:
    """Make pictures of all kinds in micro-batches of ``size``: whether some picture's bits depend on where it was made.

    Each is made in every place of a micro-batch, then in one with others beside it.
    """
    return size > 1 and any(_differ(pipeline, pictures) for pictures in _lots(pipeline, size))


def _differ(pipeline: Pipeline, pictures: Sampling) -> bool:
    rows = list(range(len(pictures)))
    mixed, alike = (_made(pipeline, pictures.batch(some)) for some in (rows, [rows[0]] * len(rows)))
    return any(
        not np.array_equal(mixed[kind][0], alike[kind][0])
        or any(not np.array_equal(picture, alike[kind][0]) for picture in alike[kind][1:])
        for kind in range(len(mixed))
    )


def _alike(pipeline: Pipeline, size: int, largest: int) -> bool:
    """Whether pictures of micro-batches of ``size`` are those of ``largest``, at which places do not matter."""
    for pictures in _lots(pipeline, size):
        rows = list(range(size))
        ours, theirs = (_made(pipeline, pictures.batch(some)) for some in (rows, rows + [0] * (largest - size)))
        if any(not np.array_equal(mine, other[:size]) for mine, other in zip(ours, theirs, strict=True)):
            return False
    return True


def _lots(pipeline: Pipeline, size: int) -> Iterator[Sampling]:
    """Lots of so many pictures, guided and not: different labels, noise, temperatures and guidance scales."""
    config = pipeline.config
    count = -(-TRIED_FEATURES // (config.seq_len * config.token_dim * size))
    return (_pictures(pipeline, size, lot, scale) for scale in (3.5, 1.0) for lot in range(count))


def _pictures(pipeline: Pipeline, size: int, seed: int, scale: float) -> Sampling:
    return pipeline.resolve(
        [(seed + place) % pipeline.config.num_classes for place in range(size)],
        seed=seed,
        guidance_scale=[scale + 0.5 * place * (scale > 1) for place in range(size)],
        temperature=[1.0 - 0.1 * place / size for place in range(size)],
    )


def _made(pipeline: Pipeline, batch: Batch) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Tokens (B, L, D) and images after some steps of the plan, the other tokens unknown."""
    chosen = sorted({round(place) for place in np.linspace(0, len(batch.plan) - 1, TRIED_STEPS)})
    loop = pipeline.loop
    loop.prepare(batch.guided, len(batch))
    with closing(loop.walk(replace(batch, plan=[batch.plan[step] for step in chosen]))) as walk:
        while True:
            try:
                next(walk)
            except StopIteration as end:
                return end.value.tokens, end.value.images
