"""Very many images into a folder: in shards, by as many workers as there are, resumable after any end of any of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from arinar.files import check_folder, sweep
from arinar.rows import Rows, write_npz

from .bundle import Bundle, file_sha256
from .machine import machine
from .run import IMAGES, RECORD, SHARDS, Record, Run, image_path, is_run, npz_path, open_run, shard_path
from .shards import OVERHEAD, MakeShards, Shard, shard_parts

Task = TypeVar("Task")
Result = TypeVar("Result")

#: Files in one folder at most.
MOST_FILES = 1_000_000
#: Packages whose versions a record tells.
PACKAGES = ("arinar", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "ray")


class Workers(Protocol):
    """What does tasks: ``make()`` is called once by each worker, and what it gives once for each task. Results come in any
    order. (Ray's: `arinar.serve.pool.RayPool`.)"""

    def __call__(self, make: Callable[[], Callable[[Task], Result]], tasks: Sequence[Task]) -> Iterator[Result]: ...


def one_process(make: Callable[[], Callable[[Task], Result]], tasks: Iterable[Task]) -> Iterator[Result]:
    """Workers that are this process alone."""
    work = make()
    return (work(task) for task in tasks)


@dataclass(frozen=True)
class Sampled:
    """What `sample` leaves: the record, how many images were made now, the numbers of shards that were damaged."""

    record: Record
    made: int
    damaged: list[int]


def sample(
    bundle: Bundle,
    folder: Path,
    run: Run,
    *,
    workers: Workers = one_process,
    options: dict[str, Any] | None = None,
    npz: bool = True,
    png: bool = False,
    progress: Callable[[Shard], object] = lambda shard: None,
) -> Sampled:
    """Make the images of a run that are not there yet. ``options``: of `Pipeline.load`. ``progress`` is called as shards are
    done, those that were there already first of all.

    Raises ValueError for a folder of another run, too little room on the disk, and what a worker raises. Whatever ends it,
    the same call goes on where it stopped.
    """
    check_folder(folder)
    if png and run.num_images > MOST_FILES:
        raise ValueError(f"{run.num_images:,} images are more than {MOST_FILES:,} files in one folder; leave PNG files out")
    versions = machine(PACKAGES)["versions"]
    record = open_run(folder, Record(run, bundle.manifest.config, versions))
    check_room(folder, run, npz=npz, png=png)
    if not is_run(folder):
        folder.mkdir(parents=True, exist_ok=True)
        record.write(folder)
    for place in (folder, folder / SHARDS, folder / IMAGES):
        sweep(place / RECORD)
    make = MakeShards(folder.resolve(), bundle.folder.resolve(), run, options or {}, png)
    hashes, damaged, made = [""] * run.shards, list[int](), 0
    for shard in workers(make, range(run.shards)):
        hashes[shard.number] = shard.sha256
        made += shard.made
        if shard.made and shard.made_on not in record.made_on:
            record = replace(record, complete=False, made_on=(*record.made_on, shard.made_on))
            record.write(folder)
        if shard.damage:
            damaged.append(shard.number)
        progress(shard)
    file = record.npz if not made and not damaged else {}
    if npz:
        file = _whole(folder, run, file)
    record = replace(record, complete=True, shards=tuple(hashes), npz=file)
    record.write(folder)
    return Sampled(record, made, sorted(damaged))


def check_room(folder: Path, run: Run, *, npz: bool, png: bool) -> None:
    """Raise ValueError where the disk has too little room for what is still to be written. (Of a PNG file, as for pixels.)"""
    pixels = run.num_images * run.image_bytes
    there = sum(path.stat().st_size for path in (folder / SHARDS).glob("*.npz")) if (folder / SHARDS).is_dir() else 0
    needed = {"shards": max(0, pixels + run.shards * OVERHEAD - there)}
    if npz and not npz_path(folder, run).exists():
        needed["the .npz file"] = pixels
    if png and not image_path(folder, run.num_images - 1).exists():
        needed["PNG files"] = pixels
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(nearest).free
    if sum(needed.values()) > free:
        told = ", ".join(f"{name} {size / 1e9:,.3g} GB" for name, size in needed.items() if size)
        raise ValueError(
            f"{folder} has {free / 1e9:,.3g} GB of room left, and {run.num_images:,} images need more ({told}); make room, "
            f"choose another folder, or ask for fewer files"
        )


def _whole(folder: Path, run: Run, known: dict[str, Any]) -> dict[str, Any]:
    """The one file of all images, made of the shards where it is not there -> name, size, SHA-256."""
    path = npz_path(folder, run)
    if path.exists() and known.get("size") == path.stat().st_size and known.get("sha256") == file_sha256(path):
        return known
    labels = (run.labels_of(run.indices(number)) for number in range(run.shards))
    write_npz(
        path,
        {
            "arr_0": Rows(run.shape, "uint8", shard_parts(folder, run)),
            "arr_1": Rows((run.num_images,), "int64", labels),
        },
    )
    return {"name": path.name, "size": path.stat().st_size, "sha256": file_sha256(path)}


__all__ = ["Sampled", "Workers", "check_room", "one_process", "sample", "shard_path"]
