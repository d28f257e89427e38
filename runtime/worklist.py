"""Many images into a folder: in chunks, resumable, each file complete or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from arinar.files import check_folder, sweep

from .bundle import MANIFEST_NAME, file_sha256
from .images import read_metadata, read_png, save_all
from .pipeline import Pipeline, Progress
from .request import Sampling


class Worklist:
    """Image i of ``labels`` becomes ``out/00000i.png``; files made with the same settings are kept.

    Raises ValueError for bad sampling arguments, a folder that cannot be written to, or files in the way that other
    settings made (unless ``overwrite``).
    """

    def __init__(
        self,
        pipeline: Pipeline,
        labels: list[int],
        out: str | os.PathLike[str],
        *,
        seed: int = 0,
        batch_size: int | None = None,
        overwrite: bool = False,
        **sampling: Any,
    ) -> None:
        for name in ("indices", "noise"):
            if name in sampling:
                raise ValueError(f"{name} has no place here: image i of a list is image i of its seed's sequence")
        self.pipeline = pipeline
        self.sampling = pipeline.resolve(labels, seed=seed, batch_size=batch_size, **sampling)
        self.labels = self.sampling.classes.shown()
        self.out = Path(out)
        _writable(self.out)
        digits = max(6, len(str(len(labels) - 1)))
        self.paths = [self.out / f"{index:0{digits}d}.png" for index in range(len(labels))]
        self.metadata = metadata_of(pipeline, self.sampling)
        self.missing: list[int] = []
        for index, path in enumerate(self.paths):
            if not path.exists():
                self.missing.append(index)
            elif read_metadata(path) == self.metadata[index]:
                continue
            elif overwrite:
                self.missing.append(index)
            else:
                raise ValueError(
                    f"{path} is there already and was made with other settings; choose another folder, or --overwrite"
                )

    def run(self, on_step: Callable[[Progress], object] | None = None) -> dict[str, float]:
        """Generate what is missing -> seconds by phase. Ctrl-C leaves all files there whose images were finished.

        ``on_step`` is called after every outer step."""
        sampling, timings = self.sampling, {"total": 0.0}
        for first in range(0, len(self.missing), sampling.size):
            indices = self.missing[first : first + sampling.size]

            def step(progress: Progress, indices: list[int] = indices) -> None:
                if on_step:
                    on_step(progress)
                if progress.step == progress.num_iter:  # these are finished
                    done = [indices[row] for row in progress.rows]
                    given = ([part[index] for index in done] for part in (self.paths, self.metadata))
                    save_all(zip(progress.preview(), *given, strict=True))

            made = self.pipeline.generate(
                [self.labels[index] for index in indices],
                guidance_scale=sampling.guidance_scale[indices].tolist(),
                temperature=sampling.temperature[indices].tolist(),
                cfg_schedule=sampling.cfg_schedule,
                num_iter=sampling.num_iter,
                sampling_steps=sampling.sampling_steps,
                seed=sampling.seed,
                indices=indices,
                batch_size=sampling.batch_size,
                schedule=sampling.schedule,
                guidance_interval=sampling.guidance_interval,
                callback=step,
            )
            for phase, seconds in made.timings.items():
                timings[phase] = timings.get(phase, 0.0) + seconds
        self.missing = []
        return timings

    def images(self) -> list[Image.Image]:
        """All images of the list, read back from the folder."""
        side = self.pipeline.config.img_size
        return [read_png(path, (side, side)) for path in self.paths]


def metadata_of(pipeline: Pipeline, sampling: Sampling) -> list[dict[str, Any]]:
    """What the files of a request's images say of how they were made."""
    manifest = file_sha256(pipeline.bundle.path(MANIFEST_NAME))
    made_by = {"seed": sampling.seed, "precision": pipeline.precision, "bundle": manifest[:16]}
    labels = [  # as JSON reads them back
        {str(key): weight for key, weight in label.items()} if isinstance(label, dict) else label
        for label in sampling.classes.shown()
    ]
    return [
        sampling.settings(row) | made_by | {"index": index, "label": labels[row]} for row, index in enumerate(sampling.indices)
    ]


def _writable(folder: Path) -> None:
    """Make the folder; raise ValueError where files cannot be made in it."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder / "000000.png")
