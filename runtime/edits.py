"""One picture, several edits of it, each a file: complete or absent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .editing import Mask, Pixels, as_pixels, token_mask
from .images import save_all
from .pipeline import Pipeline, Progress
from .worklist import metadata_of


def about_edit(pixels: Pixels, anew: Mask, grow: int, paste: bool) -> dict[str, Any]:
    """What a result's file says of the picture, the mask and how they were taken. JSON-ready."""
    return {
        "image_sha256": hashlib.sha256(pixels.tobytes()).hexdigest()[:16],
        "mask_sha256": hashlib.sha256(np.packbits(anew).tobytes()).hexdigest()[:16],
        "grow": grow,
        "paste": paste,
    }


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
        labels: list[int],
        paths: Sequence[Path],
        *,
        grow: int = 0,
        paste: bool = True,
        **sampling: Any,
    ) -> None:
        self.pipeline, self.labels, self.paths, self.anew = pipeline, labels, list(paths), anew
        self.sampling = pipeline.resolve(labels, **sampling)
        self.arguments = sampling | {"grow": grow, "paste": paste}
        self.pixels = as_pixels(picture, pipeline.config.img_size, resize=True)
        self.unknown = int(token_mask(anew[None], pipeline.config, grow).sum())
        self.steps = min(self.sampling.num_iter, self.unknown)
        edited = about_edit(self.pixels, anew, grow, paste)
        self.metadata = [made | {"edit": edited} for made in metadata_of(pipeline, self.sampling)]

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
            save_all((image, self.paths[row], self.metadata[row]) for row, image in zip(rows, made.images, strict=True))
            for phase, seconds in made.timings.items():
                timings[phase] = timings.get(phase, 0.0) + seconds
        return timings
