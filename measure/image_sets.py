"""Sets of images to be judged: runs of `arinar sample`, folders of pictures, .npz files. Found first, read piece by piece.

Images are judged as the uint8 RGB pixels that their files hold, N x H x W x 3: nothing is rounded, resized or cropped here.
(Pixels of [-1, 1] become uint8 by round((x + 1) / 2 * 255) in this package's VAE graphs, as in MAR and ARINAR; DiT's
trunc(127.5 x + 128) is the same, trunc((x + 1) / 2 * 255) is half a grey level darker.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from arinar.rows import Stored, stored_arrays
from arinar.runtime.images import read_picture
from arinar.runtime.run import Record, Run, is_run, npz_path, shard_path
from arinar.runtime.shards import read_shard

Array = npt.NDArray[Any]

#: Name of scikit-learn's digits, as it is of the demo model.
DIGITS = "digits"
#: Images of a piece, one worker's task, about; and pixels that are in memory at a time.
PIECE, PIXELS = 2048, 1 << 22
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Piece:
    """Images first..last-1 of a set: rows of a run's shards, of an array in a file, files, or an array in memory."""

    source: Run | Stored | tuple[Path, ...] | Array
    folder: Path
    first: int
    last: int

    def parts(self) -> Iterator[Array]:
        """(n, H, W, 3) uint8, a few at a time. Raises ValueError where a file is damaged, or of another size."""
        source = self.source
        if isinstance(source, Run):
            for shard in range(self.first // source.shard_size, -(-self.last // source.shard_size)):
                yield from _few(read_shard(shard_path(self.folder, shard), source, shard))
        elif isinstance(source, Stored):
            yield from source.parts(self.first, self.last, _at_a_time(source.shape[1:3]))
        elif isinstance(source, np.ndarray):
            yield from _few(source[self.first : self.last])
        else:
            first = _pixels(source[0])
            for begin in range(0, len(source), size := _at_a_time(first.shape[:2])):
                yield np.stack([_pixels(path, first.shape) for path in source[begin : begin + size]])


@dataclass(frozen=True)
class ImageSet:
    """``count`` images of ``height`` x ``width``, in pieces. ``record``: of a run. ``labels`` (N,): where they are known."""

    name: str
    count: int
    height: int
    width: int
    pieces: tuple[Piece, ...]
    record: Record | None = None
    labels: Array | None = None


class Statistics(NamedTuple):
    """A mean (F,) and a covariance (F, F) of features, as a file has them."""

    mean: Array
    covariance: Array


def open_images(name: str) -> ImageSet:
    """A run's folder, a folder of pictures (of one size, with those of its sub-folders), an .npz with arr_0, or "digits".

    Raises ValueError for anything else.
    """
    path = Path(name)
    if name == DIGITS and not path.exists():
        return _real_digits()
    if not path.exists():
        raise ValueError(f"{name} does not exist; expected a run's folder, a folder of pictures, an .npz file, or {DIGITS}")
    if not path.is_dir():
        return _of_npz(path)
    return _of_run(path) if is_run(path) else _of_files(path)


def open_reference(name: str) -> tuple[Statistics | None, ImageSet | None]:
    """As `open_images`; also a file of statistics (mu and sigma), or both in one, as ADM's reference files are.

    (Their mu_s and sigma_s are of spatial features, which torch-fidelity's network does not give: they are not used.)
    """
    path = Path(name)
    if path.is_dir() or not path.exists():
        return None, open_images(name)
    arrays = stored_arrays(path)
    stats = _statistics(path, arrays) if "mu" in arrays and "sigma" in arrays else None
    if stats is None and "arr_0" not in arrays:
        raise ValueError(f"{path} has {', '.join(arrays) or 'no array'}; expected mu and sigma, or arr_0, the images")
    return stats, _of_npz(path) if "arr_0" in arrays else None


def _of_run(folder: Path) -> ImageSet:
    record = Record.read(folder)
    run = record.run
    if not record.complete:
        raise ValueError(f"{folder} is a run that has not come to its end; the same `arinar sample` again goes on with it")
    labels = run.labels_of(range(run.num_images))
    if not shard_path(folder, 0).exists() and npz_path(folder, run).exists():
        return replace(_of_npz(npz_path(folder, run)), name=str(folder), record=record, labels=labels)
    step = max(1, PIECE // run.shard_size) * run.shard_size
    pieces = [
        Piece(run, folder.resolve(), first, min(first + step, run.num_images)) for first in range(0, run.num_images, step)
    ]
    return ImageSet(str(folder), run.num_images, run.img_size, run.img_size, tuple(pieces), record, labels)


def _of_npz(path: Path) -> ImageSet:
    arrays = stored_arrays(path)
    if "arr_0" not in arrays:
        raise ValueError(f"{path} has {', '.join(arrays) or 'no array'}; expected arr_0, uint8 (N, H, W, 3)")
    images = arrays["arr_0"]
    if len(images.shape) != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or 0 in images.shape:
        raise ValueError(f"{path} has an arr_0 of {images.dtype} {images.shape}; expected images, uint8 (N, H, W, 3)")
    count, height, width = images.shape[:3]
    # (What is compressed is read in one go.)
    ends = [0, count] if images.start is None else [*range(0, count, PIECE), count]
    pieces = tuple(Piece(images, path.parent, *ends) for ends in pairwise(ends))
    return ImageSet(str(path), count, height, width, pieces)


def _of_files(folder: Path) -> ImageSet:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not paths:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}), and no run; name another folder")
    height, width = _pixels(paths[0]).shape[:2]
    pieces = []
    for first in range(0, len(paths), PIECE):
        some = tuple(path.resolve() for path in paths[first : first + PIECE])
        pieces.append(Piece(some, folder, first, first + len(some)))
    return ImageSet(str(folder), len(paths), height, width, tuple(pieces))


def _real_digits() -> ImageSet:
    from arinar.data import digit_images

    images, labels = digit_images()
    count, height, width = images.shape[:3]
    return ImageSet(DIGITS, count, height, width, (Piece(images, Path(), 0, count),), None, labels)


def _statistics(path: Path, arrays: dict[str, Stored]) -> Statistics:
    mean, covariance = arrays["mu"], arrays["sigma"]
    if len(mean.shape) != 1 or covariance.shape != mean.shape * 2 or {mean.dtype.kind, covariance.dtype.kind} != {"f"}:
        raise ValueError(f"{path} has mu {mean.shape} and sigma {covariance.shape}; expected floats (F,) and (F, F)")
    width = mean.shape[0]
    found = [np.concatenate(list(array.parts(0, width, max(1, width)))).astype(np.float64) for array in (mean, covariance)]
    if not all(np.isfinite(array).all() for array in found):
        raise ValueError(f"{path} has a mu or sigma that is not finite; make the statistics again, from more images")
    return Statistics(*found)


def _at_a_time(sides: Sequence[int]) -> int:
    return max(1, min(256, PIXELS // max(1, math.prod(sides))))


def _few(images: Array) -> Iterator[Array]:
    size = _at_a_time(images.shape[1:3])
    return (images[begin : begin + size] for begin in range(0, len(images), size))


def _pixels(path: Path, shape: tuple[int, ...] | None = None) -> Array:
    pixels = np.asarray(read_picture(path).convert("RGB"))
    if shape is not None and pixels.shape != shape:
        raise ValueError(
            f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels, others {shape[1]} x {shape[0]}; expected one size"
        )
    return pixels
