"""Many images into a folder: in chunks, resumable, each file complete or absent."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from arinar.class_names import UNCONDITIONAL, Classes
from arinar.files import check_folder, sweep

from .images import read_metadata, read_png, save_all
from .pipeline import Label, Pipeline, Progress

#: Of a class's name in a file's.
MOST_LETTERS = 60


class Worklist:
    """Image i of ``labels`` becomes ``out/00000i-LABEL-NAME.png``; files made with the same settings are kept.

    Raises ValueError for bad sampling arguments, a folder that cannot be written to, or files in the way that other
    settings made (unless ``overwrite``).
    """

    def __init__(
        self,
        pipeline: Pipeline,
        labels: Sequence[Label],
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
        named = (file_words(label, pipeline.classes) for label in self.labels)
        self.paths = [self.out / f"{index:0{digits}d}-{words}.png" for index, words in enumerate(named)]
        self.metadata = pipeline.metadata(self.sampling)
        there, self.missing = _numbered(self.out), list[int]()
        self._replaced: list[Path] = []  # image i of other labels
        for index, path in enumerate(self.paths):
            found = there.get(_number(path), [])
            others = [other for other in found if other != path]
            if not others and path in found and read_metadata(path) == self.metadata[index]:
                continue
            if found and not overwrite:
                raise ValueError(
                    f"{found[0]} is there already and was made with other settings; choose another folder, or --overwrite"
                )
            self.missing.append(index)
            self._replaced += others

    def prepare(self) -> None:
        """Load what the first micro-batch runs, which else is a part of its time."""
        if self.missing:
            first = self.missing[: self.sampling.size]
            guided = bool((self.sampling.guidance_scale[first] != 1.0).any())
            self.pipeline.loop.prepare(guided, self.sampling.batch_size or len(first))

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
                    self._remove_replaced({_number(self.paths[index]) for index in done})

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
                guidance_refresh=sampling.guidance_refresh,
                callback=step,
            )
            for phase, seconds in made.timings.items():
                timings[phase] = timings.get(phase, 0.0) + seconds
        self.missing = []
        return timings

    def _remove_replaced(self, numbers: set[str]) -> None:
        """Image i of other labels has another name: it goes when its successor is there."""
        for path in [path for path in self._replaced if _number(path) in numbers]:
            path.unlink(missing_ok=True)
            self._replaced.remove(path)

    def images(self) -> list[Image.Image]:
        """All images of the list, read back from the folder."""
        side = self.pipeline.config.img_size
        return [read_png(path, (side, side)) for path in self.paths]


def _number(path: Path) -> str:
    """What the name of an image's file begins with."""
    return path.stem.partition("-")[0]


def _numbered(folder: Path) -> dict[str, list[Path]]:
    """Files of a folder that are images of a list, by their number."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("[0-9]*.png")):
        found.setdefault(_number(path), []).append(path)
    return found


def file_words(label: int | dict[int, float], classes: Classes) -> str:
    """A label as a part of a file's name: ``207-golden-retriever``, ``5``, ``3+8``."""
    if isinstance(label, dict):
        return "+".join(map(str, label))
    words = re.sub(r"[^0-9a-z]+", "-", classes.short(label).casefold())[:MOST_LETTERS].strip("-")
    return words if label == UNCONDITIONAL or words == str(label) else f"{label}-{words}".rstrip("-")


def _writable(folder: Path) -> None:
    """Make the folder; raise ValueError where files cannot be made in it."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder / "000000.png")
