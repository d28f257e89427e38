"""A run: very many images of one bundle, seed and settings, in a folder. What decides every byte of them, and its record.

    FOLDER/run.json             the record: settings at the start, the shards' hashes at the end
    FOLDER/shards/000000.npz    images 0..n-1: arr_0 (n, H, W, 3) uint8, arr_1 (n,) int64, their labels
    FOLDER/samples_NxHxWx3.npz  all of them, the same two arrays (where asked for)
    FOLDER/images/000000.png    one by one (where asked for)

Image i depends on the run and i alone. A shard is a whole number of micro-batches, which are the same whoever makes it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arinar.config import ArinarConfig
from arinar.files import write_text
from arinar.reading import read_json
from arinar.text import shown
from arinar.values import conforming, entry, integer, items, mapping, text, truth

from .backends import ALIASES, backend_options
from .bundle import Bundle
from .pipeline import default_precision
from .request import DEFAULT_BATCH_TOKENS, MOST_AT_A_TIME, Sampling

RECORD, SHARDS, IMAGES = "run.json", "shards", "images"
FORMAT_VERSION = 1
#: Images of a run: their hashes fit into a record, their numbers into a file's name.
MOST_IMAGES = 1_000_000_000
#: Unless told otherwise a run has about this many shards, none of more than so many images (docs/scaling.md).
USUAL_SHARDS, MOST_USUAL = 4000, 256
MOST_OF_A_SHARD = 65_536


@dataclass(frozen=True)
class Run:
    """What decides the images of a run, to the last byte on machines of a kind.

    model : fingerprint of config, graphs and weights (:func:`fingerprint`). precision, backend, threads : as
    `Pipeline.load` has them; threads of each pipeline, because a float's last bit may depend on them. labels : in equal
    shares, in this order. batch_size : of a micro-batch. shard_size : images of a file. img_size : pixels of a side.
    settings : of `Pipeline.generate`, every default filled in.
    """

    model: str
    precision: str
    backend: str | None
    threads: int | None
    seed: int
    num_images: int
    labels: tuple[int, ...]
    batch_size: int
    shard_size: int
    img_size: int
    settings: dict[str, Any]

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        num_images: int,
        *,
        labels: Sequence[int] | None = None,
        seed: int = 0,
        precision: str | None = None,
        backend: str | None = None,
        threads: int | None = None,
        batch_size: int | None = None,
        shard_size: int | None = None,
        **sampling: Any,
    ) -> Run:
        """A run of ``num_images`` images. ``labels``: default all classes. ``threads``: default 1, where the backend has any.
        ``batch_size``, ``shard_size``: the default depends on the model and on the number of images alone. ``sampling``: as for
        `Pipeline.generate`; defaults are the bundle's.

        Raises ValueError naming the argument that is wrong, BundleError where the bundle has no such precision.
        """
        config, precision = bundle.manifest.config, precision or default_precision(bundle.manifest)
        model = fingerprint(bundle, precision)
        if threads is None and (backend is None or "threads" in backend_options(ALIASES.get(backend, (backend, {}))[0])):
            threads = 1
        integer("num_images", num_images, 1, MOST_IMAGES)
        wanted = range(config.num_classes) if labels is None else labels
        if len(wanted) > num_images:
            raise ValueError(
                f"num_images is {num_images}, for {len(wanted)} labels; expected at least one image of each: ask for more, or "
                f"name the labels"
            )
        size = 1 << max(0, (DEFAULT_BATCH_TOKENS // config.seq_len).bit_length() - 1) if batch_size is None else batch_size
        sampling = {name: value for name, value in sampling.items() if value is not None}
        asked = Sampling.resolve(config, bundle.manifest.defaults, list(wanted), seed=seed, batch_size=size, **sampling)
        return cls(
            model,
            precision,
            backend,
            threads,
            seed,
            num_images,
            tuple(asked.labels.tolist()),
            size,
            _usual_shard(num_images, size) if shard_size is None else check_shard_size(shard_size, size),
            config.img_size,
            asked.settings(),
        )

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.num_images // self.shard_size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of all images."""
        return (self.num_images, self.img_size, self.img_size, 3)

    @property
    def image_bytes(self) -> int:
        return 3 * self.img_size**2

    def indices(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def labels_of(self, indices: range) -> npt.NDArray[np.int64]:
        """(n,): equal shares in order; where the number of images is no multiple, shares differ by one."""
        places = np.arange(indices.start, indices.stop, dtype=np.int64) * len(self.labels) // self.num_images
        return np.array(self.labels, np.int64)[places]

    @classmethod
    def from_dict(cls, data: Any) -> Run:
        """Raises ValueError for an entry of the wrong type or range."""
        given = mapping("run", data)
        settings = mapping("run.settings", entry("run", given, "settings"))
        run = cls(**conforming(cls, "run", {**given, "settings": {}}) | {"settings": settings})
        integer("run.num_images", run.num_images, 1, MOST_IMAGES)
        integer("run.batch_size", run.batch_size, 1, MOST_AT_A_TIME)
        integer("run.shard_size", run.shard_size, 1, MOST_OF_A_SHARD)
        integer("run.img_size", run.img_size, 1, 1 << 15)
        if not run.labels:
            raise ValueError("run.labels is empty; expected class ids")
        return run


@dataclass(frozen=True)
class Record:
    """What a folder's ``run.json`` says: the run, the model's config, with which versions it was begun (by package).

    ``made_on``: kinds of machines that made its images. At the end also ``shards``, their SHA-256 in order, and ``npz``, the
    one file of all images: its name, size and SHA-256.
    """

    run: Run
    config: ArinarConfig
    versions: dict[str, str]
    complete: bool = False
    shards: tuple[str, ...] = ()
    made_on: tuple[str, ...] = ()
    npz: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        data = asdict(self) | {"config": self.config.to_dict(), "format_version": FORMAT_VERSION}
        write_text(folder / RECORD, json.dumps(data, indent=2, sort_keys=True) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Raises ValueError where the folder holds no run, or its record is damaged."""
        path = folder / RECORD
        try:
            data = read_json(path)
            if (version := entry("it", data, "format_version")) != FORMAT_VERSION:
                raise ValueError(f"it has format version {shown(version)}; this version of arinar reads {FORMAT_VERSION}")
            shards = items("shards", entry("it", data, "shards"))
            return cls(
                Run.from_dict(entry("it", data, "run")),
                ArinarConfig.from_dict(mapping("config", entry("it", data, "config"))),
                {name: text(f"versions.{name}", value) for name, value in _of(data, "versions").items()},
                truth("complete", entry("it", data, "complete")),
                tuple(text(f"shards[{place}]", digest) for place, digest in enumerate(shards)),
                tuple(text("made_on", kind) for kind in items("made_on", entry("it", data, "made_on"))),
                _of(data, "npz"),
            )
        except FileNotFoundError:
            raise ValueError(
                f"{folder} holds no {RECORD}: no run is in it; `arinar sample BUNDLE -o {folder}` makes one"
            ) from None
        except (OSError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise ValueError(f"{path} is no record of a run ({error}); restore it, or choose another folder") from error


def _of(data: Any, key: str) -> dict[str, Any]:
    return mapping(key, entry("it", data, key))


def shard_path(folder: Path, shard: int) -> Path:
    return folder / SHARDS / f"{shard:06d}.npz"


def image_path(folder: Path, index: int) -> Path:
    return folder / IMAGES / f"{index:06d}.png"


def npz_path(folder: Path, run: Run) -> Path:
    return folder / f"samples_{'x'.join(map(str, run.shape))}.npz"


def is_run(folder: str | os.PathLike[str]) -> bool:
    return (Path(folder) / RECORD).exists()


def open_run(folder: Path, record: Record) -> Record:
    """The record of a folder, or the one given where nothing is there yet. Writes nothing. Raises ValueError where the folder
    is another run's."""
    if not is_run(folder):
        if (folder / SHARDS).exists():
            raise ValueError(f"{folder} has shards and no {RECORD} that says of what; restore it, or choose another folder")
        return record
    found = Record.read(folder)
    if different := differences(found.run, record.run):
        raise ValueError(
            f"{folder} holds another run: {'; '.join(different)}. Choose another folder, or ask for the same to go on with it"
        )
    return found


def differences(there: Run, asked: Run) -> list[str]:
    """In words, how one run differs from the other."""
    one, other = (asdict(run) | run.settings for run in (there, asked))
    for settings in (one, other):
        del settings["settings"]
    words = [
        f"{name} was {shown(one.get(name))} and is {shown(other.get(name))}"
        for name in sorted(one | other)
        if name != "model" and one.get(name) != other.get(name)
    ]
    if there.model != asked.model:
        words.insert(0, f"it is of another model ({there.model[:12]}, this bundle's {asked.precision} is {asked.model[:12]})")
    return words


def fingerprint(bundle: Bundle, precision: str) -> str:
    """SHA-256 of what decides a model's images: config, law, scheme, the precision's graphs and the hashes of their files.

    Neither the bundle's defaults (a run has its own settings) nor its other precisions."""
    manifest = bundle.manifest
    graphs = manifest.precision_graphs(precision)
    files = sorted({file for graph in graphs.values() if graph.phase != "encode" for file in graph.files})
    config = manifest.config.to_dict()
    data = {
        "config": {name: value for name, value in config.items() if not name.startswith("default_")},
        "law": manifest.law,
        "scheme": manifest.scheme(precision),
        "graphs": {name: graph.to_dict() for name, graph in graphs.items()},
        "files": {name: manifest.files[name].sha256 for name in files},
    }
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def check_shard_size(value: Any, batch_size: int) -> int:
    """Raises ValueError for what is no whole number of micro-batches."""
    integer("shard_size", value, 1, MOST_OF_A_SHARD)
    if value % batch_size:
        raise ValueError(
            f"shard_size is {value}, with a batch_size of {batch_size}; expected a multiple: micro-batches end where shards do"
        )
    return int(value)


def _usual_shard(num_images: int, batch_size: int) -> int:
    """So many micro-batches that there are about USUAL_SHARDS shards."""
    wanted = min(num_images // USUAL_SHARDS, MOST_USUAL)
    return max(1, wanted // batch_size) * batch_size
