"""How good are very many images? FID, KID, precision and recall against a reference, the inception score, and how sure each is.

Numbers are those of torch-fidelity (the same definitions, subsets and shuffles, from the same network's features), but
for memory: see `moments`. Where torch-fidelity's own code is installed, tests compare with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arinar.runtime.bundle import file_sha256
from arinar.runtime.run import Run, differences
from arinar.runtime.sampling import one_process

from .distances import MAX_PSNR, frechet_distance, kernel_distance, precision_and_recall, psnr
from .image_sets import ImageSet, Statistics, open_images, open_reference
from .moments import KEPT, PARTS, ClassSums, Gathered, Moments, Source, gather

Array = npt.NDArray[Any]

#: Images of each set that KID's subsets have, and that precision and recall are taken of, at most.
KID_SIZE, NEIGHBOURS, MANIFOLD = 1000, 3, 10_000
SIGMAS = 1.96  # of an interval that holds the value 19 times out of 20


@dataclass(frozen=True)
class Estimate:
    """A number, and a standard deviation: of the FID, what another set of as many images would have it vary by."""

    value: float
    std: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.std is None else (self.value - SIGMAS * self.std, self.value + SIGMAS * self.std)


@dataclass(frozen=True)
class Reference:
    """What images are compared with: statistics, or a set of images, or both (FID is then of the statistics)."""

    name: str
    stats: Statistics | None
    images: ImageSet | None
    gathered: Gathered | None

    @property
    def moments(self) -> Statistics:
        if self.stats is not None:
            return self.stats
        assert self.gathered is not None
        return Statistics(self.gathered.moments.mean, self.gathered.moments.covariance)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured; None where there is nothing to measure it with.

    fid : squared Frechet distance to the reference, its std by bootstrap; ``replicates`` are the bootstrap's values: two
    evaluations of as many images have the same images drawn in each, so that their difference is paired.
    kid, inception : std over subsets, over parts. agreement : of the digits' independent classifier with the labels.
    floor : FID of the reference against a run with another seed: so far, two runs of one model are apart.
    psnr : dB, median over image pairs of one seed; same : the share of pairs with the same pixels.
    """

    samples: str
    images: int
    reference: str | None
    features: str
    width: int
    weights_sha256: str | None = None
    fid: Estimate | None = None
    kid: Estimate | None = None
    precision: float | None = None
    recall: float | None = None
    inception: Estimate | None = None
    agreement: float | None = None
    floor: float | None = None
    psnr: float | None = None
    same: float | None = None
    notes: tuple[str, ...] = ()
    replicates: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = asdict(self)
        if self.fid is not None:
            found["fid"]["interval"] = self.fid.interval
        return found

    @classmethod
    def from_dict(cls, data: Any) -> Evaluation:
        """Of what `to_dict` gave. Raises ValueError, TypeError or KeyError for anything else."""
        given = dict(data)
        for name in ("fid", "kid", "inception"):
            if given[name] is not None:
                given[name] = Estimate(given[name]["value"], given[name]["std"])
        return cls(**given | {"notes": tuple(given["notes"]), "replicates": tuple(given["replicates"])})


def evaluate(
    samples: str,
    reference: str | None = None,
    *,
    features: str | Callable[[Array], Any] = "builtin",
    weights: Path | None = None,
    floor: str | None = None,
    bootstrap: int = 100,
    workers: Any = one_process,
    progress: Callable[[int], object] = lambda count: None,
) -> Evaluation:
    """Judge a set of images. ``samples``, ``reference``, ``floor``: as `image_sets.open_images` and `open_reference` take them.

    features, weights : as `features.feature_extractor`. floor : a run of the reference's settings with another seed.
    bootstrap : how often sets are drawn anew from their own images for the FID's standard deviation; 0: not at all.
    workers : `one_process`, or Ray's. progress : is told how many images are done more.

    Raises ValueError for sets that cannot be read or compared, before the long work where that is possible.
    """
    made = open_images(samples)
    stats, images = (None, None) if reference is None else open_reference(reference)
    other = None if floor is None else open_images(floor)
    if other is not None:
        check_floor(images, other)
    source, goal = Source(features, _config(made, images), weights), None
    if reference is not None:
        width = width_of(source)
        check_count(made.name, made.count, width)
        goal = load_reference(reference, stats, images, source, width, workers, progress)
    return judge(made, goal, source, floor=other, bootstrap=bootstrap, workers=workers, progress=progress)


def load_reference(
    name: str,
    stats: Statistics | None,
    images: ImageSet | None,
    source: Source,
    width: int,
    workers: Any,
    progress: Callable[[int], object] = lambda count: None,
) -> Reference:
    """A reference with its features, gathered once. Raises ValueError where its statistics are not of ``width`` features, or
    its images are too few."""
    if stats is not None and len(stats.mean) != width:
        raise ValueError(
            f"{name} has statistics of {len(stats.mean)} features, and {source.name} gives {width}; make statistics and "
            f"compare with the same features (--features)"
        )
    if images is not None and stats is None:
        check_count(images.name, images.count, width)
    return Reference(name, stats, images, None if images is None else gather(images, source, workers, progress))


def judge(
    made: ImageSet,
    reference: Reference | None,
    source: Source,
    *,
    floor: ImageSet | None = None,
    bootstrap: int = 100,
    workers: Any = one_process,
    progress: Callable[[int], object] = lambda count: None,
) -> Evaluation:
    """`evaluate`, of what has been opened."""
    ours = gather(made, source, workers, progress)
    result = Evaluation(
        made.name,
        made.count,
        None if reference is None else reference.name,
        source.name,
        len(ours.moments.mean),
        None if source.weights is None else file_sha256(source.weights),
        inception=None if ours.classes is None else inception_score(ours.classes),
        agreement=None if ours.right is None else ours.right / made.count,
    )
    if reference is None:
        if ours.classes is None and ours.right is None:
            raise ValueError(f"without a reference there is nothing that {source.name} features tell; give --reference")
        return result
    result = compare(result, made, ours, reference, bootstrap)
    if floor is not None and reference.gathered is not None:
        other = gather(floor, source, workers, progress)
        result = replace(result, floor=distance(reference.gathered, Statistics(other.moments.mean, other.moments.covariance)))
    return result


def compare(result: Evaluation, made: ImageSet, ours: Gathered, reference: Reference, bootstrap: int) -> Evaluation:
    """The numbers that need a reference."""
    moments, theirs = reference.moments, reference.gathered
    paired = reference.images is not None and are_pairs(made, reference.images)
    notes = []
    replicates: list[float] = []
    if bootstrap:
        drawn = None if reference.stats is not None or theirs is None else theirs.features
        replicates = frechet_replicates(ours.features, moments, drawn, bootstrap, paired)
        if made.count > KEPT:
            notes.append(f"the FID's standard deviation is that of {KEPT:,} of the images, scaled")
    scale = min(1.0, KEPT / made.count) ** 0.5
    result = replace(
        result,
        fid=Estimate(distance(ours, moments), float(np.std(replicates, ddof=1)) * scale if bootstrap > 1 else None),
        replicates=tuple(replicates),
    )
    if theirs is not None and reference.images is not None:
        size = min(KID_SIZE, len(ours.features), len(theirs.features))
        if size < KID_SIZE:
            notes.append(f"KID is of subsets of {size} images, for want of {KID_SIZE:,}: not comparable with others'")
        some = [_spread(set_.features, MANIFOLD) for set_ in (ours, theirs)]
        enough = size > NEIGHBOURS
        precision, recall = precision_and_recall(*some, neighbours=NEIGHBOURS) if enough else (None, None)
        result = replace(
            result,
            kid=Estimate(*kernel_distance(ours.features, theirs.features, size=size)) if enough else None,
            precision=precision,
            recall=recall,
        )
        if (made.height, made.width) != (reference.images.height, reference.images.width):
            sizes = [f"{images.width} x {images.height}" for images in (made, reference.images)]
            notes.append(f"images of {sizes[0]} pixels are compared with images of {sizes[1]}")
        if paired:
            near, same = pair_numbers(made, reference.images)
            result = replace(result, psnr=near, same=same)
    return replace(result, notes=tuple(notes))


def distance(ours: Gathered, moments: Statistics) -> float:
    return frechet_distance(ours.moments.mean, ours.moments.covariance, moments.mean, moments.covariance)


def frechet_replicates(
    ours: Array, moments: Statistics, theirs: Array | None, count: int, paired: bool, seed: int = 0
) -> list[float]:
    """FIDs of sets drawn, with replacement, from our images (N, F) and, where the reference is images, from theirs (M, F).

    ``paired``: the same places are drawn of both. (A set drawn so has fewer different images: its FID is too large by
    something like the FID's own bias, which the spread of these values does not show. Hence a deviation, not percentiles.)
    """
    values = []
    for number in range(count):
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
        rows = rng.integers(0, len(ours), len(ours))
        other = moments
        if theirs is not None:
            other = _moments_of(theirs, rows if paired else rng.integers(0, len(theirs), len(theirs)))
        drawn = _moments_of(ours, rows)
        values.append(frechet_distance(other.mean, other.covariance, drawn.mean, drawn.covariance))
    return values


def _moments_of(features: Array, rows: Array, block: int = 8192) -> Statistics:
    """Of some rows, each as often as it is named."""
    parts = (Moments.of(features[rows[start : start + block]].astype(np.float64)) for start in range(0, len(rows), block))
    total = next(parts)
    for part in parts:
        total.merge(part)
    return Statistics(total.mean, total.covariance)


def inception_score(sums: ClassSums) -> Estimate:
    """exp(mean over images of KL(p(y|x) | p(y))), in PARTS parts (Salimans et al., arXiv 1606.03498)."""
    used = sums.counts > 0
    counts, mean = sums.counts[used], sums.probabilities[used] / sums.counts[used, None]
    logs = np.log(np.maximum(mean, np.finfo(np.float64).tiny))
    scores = np.exp(sums.negentropy[used] / counts - (mean * logs).sum(1))
    return Estimate(float(scores.mean()), float(scores.std()) if len(scores) == PARTS else None)


def pair_numbers(made: ImageSet, other: ImageSet) -> tuple[float, float]:
    """How near images of one seed and index are to each other: median PSNR in dB, share of pairs with the same pixels."""
    values = []
    for ours, theirs in zip(_parts(made), _parts(other), strict=True):
        values.append(np.where((ours == theirs).all((1, 2, 3)), np.inf, psnr(ours, theirs)))
    found = np.concatenate(values)
    return float(np.median(np.minimum(found, MAX_PSNR))), float(np.isinf(found).mean())


def _parts(images: ImageSet, size: int = 64) -> Any:
    """Images a few at a time, cut alike whatever the pieces are."""
    left = np.empty((0, images.height, images.width, 3), np.uint8)
    for piece in images.pieces:
        for part in piece.parts():
            left = np.concatenate([left, part])
            while len(left) >= size:
                yield left[:size]
                left = left[size:]
    if len(left):
        yield left


def are_pairs(one: ImageSet, other: ImageSet) -> bool:
    """Whether image i of one set was made with the noise of image i of the other."""
    if one.record is None or other.record is None:
        return False
    keys = []
    for record in (one.record, other.record):
        run, config = record.run, record.config
        keys.append(
            (run.seed, run.num_images, run.labels, run.img_size, config.head, config.outer, config.seq_len, config.token_dim)
        )
    return keys[0] == keys[1]


def check_floor(reference: ImageSet | None, floor: ImageSet) -> None:
    """Raise ValueError unless one set is the other with another seed."""
    runs: list[Run] = [images.record.run for images in (reference, floor) if images is not None and images.record is not None]
    if len(runs) != 2:
        raise ValueError("a noise floor is between two runs of `arinar sample`: the reference, and --floor")
    if runs[0].seed == runs[1].seed:
        raise ValueError(f"{floor.name} has the reference's seed, {runs[0].seed}; a noise floor is between two seeds")
    if other := differences(replace(runs[0], seed=runs[1].seed), runs[1]):
        raise ValueError(f"{floor.name} differs from the reference in more than its seed: {'; '.join(other)}")


def check_count(name: str, count: int, width: int) -> None:
    if count <= width:
        raise ValueError(
            f"{name} has {count} images; a covariance of {width} features needs {width + 1}, and better ten times as many: "
            f"give more images, or other --features"
        )


def width_of(source: Source) -> int:
    """How many features there are. Raises ValueError where the extractor fails on black images."""
    try:
        features, _ = source.open()(np.zeros((2, 32, 32, 3), np.uint8))
    except ValueError:
        raise
    except Exception as error:  # somebody else's code
        raise ValueError(
            f"the feature extractor {source.name} fails on black images: {type(error).__name__}: {error}"
        ) from error
    return features.shape[1]


def _config(*sets: ImageSet | None) -> Any:
    """Of the model, where one of the sets tells; and "digits" is of the digits."""
    from arinar.config import PRESETS

    for images in sets:
        if images is not None and images.record is not None:
            return images.record.config
    return PRESETS["digits"] if any(images is not None and images.name == "digits" for images in sets) else None


def _spread(features: Array, most: int) -> Array:
    """At most so many rows, evenly spread."""
    return features if len(features) <= most else features[np.arange(most) * len(features) // most]
