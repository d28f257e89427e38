"""Whether a picture's last bits depend on its place in a micro-batch, or on what is beside it: tried, not assumed.

A CPU's kernels may compute the last rows of a launch by other instructions than the rest (seen: 3, 5, 6 and 7 rows of a guided
draw; 1, 2, 4, 8 and 16 never), and where ranges are taken as a graph runs, the rows of a launch share them. The scheduler puts
rows wherever there is room, so it needs a size at which neither matters. Where smaller micro-batches make the same bits too,
few rows need not be filled up to many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


class Trial:
    """Pictures made for comparison with a pipeline that nobody else uses. ``each_step`` is called before every outer step; what
    it raises ends the trial."""

    def __init__(self, pipeline: Pipeline, each_step: Callable[[], object] = lambda: None) -> None:
        self.pipeline, self.each_step = pipeline, each_step

    def sizes(self, most: int) -> list[int]:
        """The largest power of two up to ``most`` at which places do not matter, and the smaller ones at which pictures are the
        same to the last bit: in ascending order."""
        powers = [1 << power for power in range(most.bit_length())]
        largest = next(size for size in reversed(powers) if not self.places_matter(size))
        smaller = [size for size in powers if size < largest]
        for pictures in self._lots(largest):
            made = self._made(pictures.batch())
            smaller = [size for size in smaller if self._same(pictures, size, made)]
        return [*smaller, largest]

    def places_matter(self, size: int) -> bool:
        """Whether some picture's bits depend on where in a micro-batch of ``size`` it was made, or on the others there."""
        return size > 1 and any(self._differ(pictures) for pictures in self._lots(size))

    def _differ(self, pictures: Sampling) -> bool:
        """The first picture in every place of a micro-batch, then with the others beside it."""
        rows = list(range(len(pictures)))
        mixed, alike = (self._made(pictures.batch(some)) for some in (rows, [rows[0]] * len(rows)))
        return any(
            not np.array_equal(ours[0], theirs[0]) or any(not np.array_equal(picture, theirs[0]) for picture in theirs[1:])
            for ours, theirs in zip(mixed, alike, strict=True)
        )

    def _same(self, pictures: Sampling, size: int, made: tuple[npt.NDArray[Any], npt.NDArray[Any]]) -> bool:
        """Whether micro-batches of ``size`` make the same of these pictures as one of all of them."""
        for start in range(0, len(pictures), size):
            some = slice(start, start + size)
            ours = self._made(pictures.batch(range(len(pictures))[some]))
            if any(not np.array_equal(mine, theirs[some]) for mine, theirs in zip(ours, made, strict=True)):
                return False
        return True

    def _lots(self, size: int) -> Iterator[Sampling]:
        """Lots of so many pictures, guided and not: different labels, noise, temperatures and guidance scales."""
        config = self.pipeline.config
        count = -(-TRIED_FEATURES // (config.seq_len * config.token_dim * size))
        for scale in (3.5, 1.0):
            for lot in range(count):
                yield self.pipeline.resolve(
                    [(lot + place) % config.num_classes for place in range(size)],
                    seed=lot,
                    guidance_scale=[scale + 0.5 * place * (scale > 1) for place in range(size)],
                    temperature=[1.0 - 0.1 * place / size for place in range(size)],
                )

    def _made(self, batch: Batch) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Tokens (B, L, D) and images after some steps of the plan, the other tokens unknown."""
        chosen = sorted({round(place) for place in np.linspace(0, len(batch.plan) - 1, TRIED_STEPS)})
        loop = self.pipeline.loop
        loop.prepare(batch.guided, len(batch))
        with closing(loop.walk(replace(batch, plan=[batch.plan[step] for step in chosen]))) as walk:
            while True:
                self.each_step()
                try:
                    next(walk)
                except StopIteration as end:
                    return end.value.tokens, end.value.images
