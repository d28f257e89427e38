"""Shards of a run: made where they are missing or damaged, kept where they are whole. What a worker does."""

from __future__ import annotations

import platform
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from arinar.reading import read_npz
from arinar.rows import Rows, write_npz

from .bundle import Bundle, file_sha256
from .images import read_metadata, save_all
from .machine import processor_name
from .pipeline import Pipeline
from .run import Record, Run, fingerprint, image_path, shard_path

Array = npt.NDArray[Any]

#: Bytes of a shard's file besides its pixels and labels: headers.
OVERHEAD = 4096


class Shard(NamedTuple):
    """A shard that is there: its number, the file's SHA-256, how many images it has, how many of them were made now, what
    was wrong with the file that was there (None: nothing), and what made them."""

    number: int
    sha256: str
    images: int
    made: int
    damage: str | None
    made_on: str


@dataclass(frozen=True)
class MakeShards:
    """What a worker needs, ready to be sent to it: called there, it gives the function that makes one shard after another.

    folder, bundle : absolute paths, the same on every machine. options : of `Pipeline.load`. png : files of single images
    too.
    """

    folder: Path
    bundle: Path
    run: Run
    options: dict[str, Any] = field(default_factory=dict)
    png: bool = False

    def __call__(self) -> Callable[[int], Shard]:
        """Raises ValueError where this machine does not see the folder or the bundle, or sees others."""
        place = f"on {socket.gethostname()}"
        try:
            there = Record.read(self.folder).run
        except ValueError as error:
            raise ValueError(f"{error} ({place}: all machines must see the folder, under the same path)") from None
        if there != self.run:
            raise ValueError(f"{self.folder} {place} is another run's; all machines must see the same folder")
        if fingerprint(Bundle.open(self.bundle), self.run.precision) != self.run.model:
            raise ValueError(f"{self.bundle} {place} is another model than on the machine that began the run")
        return ShardMaker(self).ensure


class ShardMaker:
    """Makes shards with a pipeline that is loaded when the first one is missing."""

    def __init__(self, work: MakeShards) -> None:
        self.work, self.run = work, work.run

    @cached_property
    def pipeline(self) -> Pipeline:
        run = self.run
        options = self.work.options if run.threads is None else {"threads": run.threads, **self.work.options}
        return Pipeline.load(self.work.bundle, backend=run.backend, precision=run.precision, **options)

    def ensure(self, number: int) -> Shard:
        """Shard ``number`` is in its place, whole, and so are its images' files where they are asked for."""
        path, indices = shard_path(self.work.folder, number), self.run.indices(number)
        damage, made_on = None, ""
        try:
            images: Array | None = read_shard(path, self.run, number)
        except FileNotFoundError:
            images = None
        except ValueError as error:
            images, damage = None, str(error)
        made = 0
        if images is None:
            images, made, made_on = self._made(indices), len(indices), self._made_on()
        if self.work.png:
            self._save_images(images, indices)
        if made:  # last: a shard that is there says that all of it is
            path.parent.mkdir(exist_ok=True)
            labels = self.run.labels_of(indices)
            write_npz(path, {"arr_0": as_rows(images), "arr_1": as_rows(labels)})
        return Shard(number, file_sha256(path), len(indices), made, damage, made_on)

    def _made(self, indices: range) -> Array:
        made = self.pipeline.generate(
            self.run.labels_of(indices),
            seed=self.run.seed,
            indices=indices,
            batch_size=self.run.batch_size,
            **self.run.settings,
        )
        return np.stack([np.asarray(image) for image in made.images])

    def _made_on(self) -> str:
        """The backend, and on a CPU which one: the last bits may be a processor's own."""
        backend = self.pipeline.backend
        return f"{backend.name}, {processor_name() if backend.synchronous else platform.machine()}"

    def _save_images(self, images: Array, indices: range) -> None:
        """Files of single images, those that are missing or damaged."""
        image_path(self.work.folder, 0).parent.mkdir(exist_ok=True)
        common = {**self.run.settings, "seed": self.run.seed, "precision": self.run.precision, "model": self.run.model[:16]}
        missing = []
        for index, label, pixels in zip(indices, self.run.labels_of(indices), images, strict=True):
            path, metadata = image_path(self.work.folder, index), {**common, "index": index, "label": int(label)}
            if not path.exists() or read_metadata(path) != metadata:
                missing.append((Image.fromarray(pixels), path, metadata))
        save_all(missing)


def as_rows(array: Array) -> Rows:
    return Rows(array.shape, array.dtype, [array])


def read_shard(path: Path, run: Run, number: int) -> Array:
    """The images (n, H, W, 3) of a shard's file, its checksums compared. Raises FileNotFoundError, ValueError for damage."""
    indices = run.indices(number)
    shape = (len(indices), *run.shape[1:])
    try:
        arrays = read_npz(path, len(indices) * (run.image_bytes + 8) + OVERHEAD)
        images, labels = arrays["arr_0"], arrays["arr_1"]
        if images.shape != shape or images.dtype != np.uint8:
            raise ValueError(f"it has {images.dtype} {images.shape}, expected uint8 {shape}")
        if not np.array_equal(labels, run.labels_of(indices)):
            raise ValueError("its labels are not this run's")
    except FileNotFoundError:
        raise
    except Exception as error:  # what NumPy, zipfile and zlib raise for damaged files has no common type
        raise ValueError(f"{path} is damaged ({error})") from error
    return np.asarray(images)


def shard_parts(folder: Path, run: Run) -> Iterator[Array]:
    """All images of a run, shard by shard."""
    return (read_shard(shard_path(folder, number), run, number) for number in range(run.shards))
