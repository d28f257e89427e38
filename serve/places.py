"""Whether a picture's last bits depend on its place in a micro-batch, or on what is beside it: tried, not assumed.

A CPU's kernels may compute the last rows of a launch by other instructions than the rest (seen: 3, 5, 6 and 7 rows of a guided
draw; 1, 2, 4, 8 and 16 never), and where ranges are taken as a graph runs, the rows of a launch share them. The scheduler puts
rows wherever there is room, so it needs a size at which neither matters.
"""

from __future__ import annotations

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


def size_without_places(pipeline: Pipeline, most: int) -> int:
    """The largest power of two up to ``most`` at which places do not matter; 1 where none is."""
    sizes = (1 << power for power in range(most.bit_length() - 1, -1, -1))
    return next(size for size in sizes if not places_matter(pipeline, size))


def places_matter(pipeline: Pipeline, size: int) -> bool:
    """Make pictures of all kinds in micro-batches of ``size``: whether some picture's bits depend on where it was made.

    Each is made in every place of a micro-batch, then in one with others beside it.
    """
    config = pipeline.config
    lots = -(-TRIED_FEATURES // (config.seq_len * config.token_dim * size))
    return size > 1 and any(
        _differ(pipeline, _pictures(pipeline, size, lot, scale)) for scale in (3.5, 1.0) for lot in range(lots)
    )


def _pictures(pipeline: Pipeline, size: int, seed: int, scale: float) -> Sampling:
    """Different labels, noise, temperatures and, above 1, guidance scales."""
    return pipeline.resolve(
        [(seed + place) % pipeline.config.num_classes for place in range(size)],
        seed=seed,
        guidance_scale=[scale + 0.5 * place * (scale > 1) for place in range(size)],
        temperature=[1.0 - 0.1 * place / size for place in range(size)],
    )


def _differ(pipeline: Pipeline, pictures: Sampling) -> bool:
    rows = list(range(len(pictures)))
    mixed, alike = (_made(pipeline, pictures.batch(some)) for some in (rows, [rows[0]] * len(rows)))
    return any(
        not np.array_equal(mixed[kind][0], alike[kind][0])
        or any(not np.array_equal(picture, alike[kind][0]) for picture in alike[kind][1:])
        for kind in range(len(mixed))
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
