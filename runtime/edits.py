"""One picture, several edits of it, each a file: complete or absent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .editing import Mask, as_pixels, token_mask
from .images import about, save_all
from .pipeline import Label, Pipeline, Progress


class Edits:
    """Edit i of a picture becomes ``paths[i]``, of class ``labels[i]``, image i of the seed's sequence.

    picture : a PIL image, cut and resized to the model's size where it has another. anew : (H, W) bool, what is generated
    anew. The rest as for `Pipeline.edit`. Raises ValueError for bad arguments.

    ``unknown``: how many tokens are generated anew. ``steps``: the outer steps that each result takes.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        picture: Image.Image,
        anew: Mask,
        labels: Sequence[Label],
        paths: Sequence[Path],
        *,
        grow: int = 0,
        paste: bool = True,
        **sampling: Any,
    ) -> None:
        self.pipeline, self.labels, self.paths, self.anew = pipeline, list(labels), list(paths), anew
        self.sampling = pipeline.resolve(labels, **sampling)
        self.arguments = sampling | {"grow": grow, "paste": paste}
        self.pixels = as_pixels(picture, pipeline.config.img_size, resize=True)
        self.unknown = int(token_mask(anew[None], pipeline.config, grow).sum())
        self.steps = min(self.sampling.num_iter, self.unknown)

    def run(self, on_step: Callable[[Progress], object] | None = None) -> dict[str, float]:
        """Make them -> seconds by phase. Ctrl-C leaves the files there whose images were finished.

        ``on_step`` is called after every outer step."""
        timings: dict[str, float] = {}

        def step(progress: Progress) -> None:  # what it returns stops nothing
            if on_step:
                on_step(progress)

        for first in range(0, len(self.paths), self.sampling.size):
            rows = range(len(self.paths))[first : first + self.sampling.size]
            labels = self.labels[rows.start : rows.stop]
            made = self.pipeline.edit(self.pixels, self.anew, labels, indices=list(rows), callback=step, **self.arguments)
            save_all((image, self.paths[row], about(image)) for row, image in zip(rows, made.images, strict=True))
            for phase, seconds in made.timings.items():
                timings[phase] = timings.get(phase, 0.0) + seconds
        return timings
