"""Parity's fourth level: do many deployed images follow the law of many PyTorch images?

Three sets of samples: PyTorch with seed A, PyTorch with seed B, the deployed pipeline with seed A. How far the second
is from the first is the yardstick: that much, two correct runs differ. The deployed set must not be much further from the
second, with which it shares no noise. From the first, with which it shares all of it, it must be far less away where
rounding changes little; that says nothing by itself where images part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from arinar.model import Arinar, decode_images
from arinar.runtime.noise import Noise
from arinar.runtime.pipeline import Pipeline
from arinar.runtime.request import with_sampling_steps
from arinar.sampler import sample
from arinar.vae import AutoencoderKL

from .distances import frechet_between, frechet_distance, mean_and_covariance, mmd_test
from .features import Features, Measure, check_features, open_measure, right_answers

Array = npt.NDArray[Any]

#: Fewer samples than this do not determine a covariance worth comparing.
MIN_SAMPLES = 64
PERMUTATIONS = 2000
# Images that PyTorch generates at a time.
REFERENCE_BATCH = 64


@dataclass(frozen=True)
class Distribution:
    """What level 4 measured. Frechet distances: ``yardstick`` PyTorch against PyTorch, ``independent`` deployed against
    PyTorch with another seed, ``frechet`` with the same noise. ``mmd``, ``mmd_p`` with another seed as well.

    ``agreement`` of a classifier with the labels, ``drop`` how much less than PyTorch's, ``drop_error`` the standard
    error of that (paired, as both see the same noise); None where there is no classifier. ``reference_distance`` and
    ``deployed_distance``: to given statistics.
    """

    samples: int
    features: str
    frechet: float
    yardstick: float
    independent: float
    mmd: float
    mmd_p: float
    agreement: float | None = None
    reference_agreement: float | None = None
    drop: float | None = None
    drop_error: float | None = None
    reference_distance: float | None = None
    deployed_distance: float | None = None


@dataclass(frozen=True)
class References:
    """Both PyTorch sets, (N, H, W, 3) uint8, and the settings that made them. Reusable for many bundles."""

    first: Array
    second: Array
    labels: list[int]
    settings: dict[str, Any]


def check_samples(count: int) -> None:
    if count < MIN_SAMPLES:
        raise ValueError(f"--distribution is {count}; comparing distributions needs at least {MIN_SAMPLES} samples")


def make_references(
    model: Arinar, vae: AutoencoderKL, count: int, settings: dict[str, Any], progress: Callable[[str], None] | None = None
) -> References:
    """PyTorch's two sets of ``count`` images, all classes in turn. ``settings``: the sampling arguments and ``seed``.
    Raises ValueError for too few."""
    check_samples(count)
    config = model.config
    how = {name: value for name, value in settings.items() if name not in ("labels", "seed")}
    chosen = with_sampling_steps(config, how.get("sampling_steps"))
    labels = [i % config.num_classes for i in range(count)]
    sets = []
    for seed in (settings["seed"], settings["seed"] + 1):
        images = []
        for first in range(0, count, REFERENCE_BATCH):
            rows = range(first, min(first + REFERENCE_BATCH, count))
            tokens = sample(
                model,
                torch.tensor(labels[first : rows.stop]),
                **how,
                noise=Noise.from_seed(seed, rows, chosen),
            )
            images.append(decode_images(vae, tokens, config).numpy())
            if progress:
                progress(f"PyTorch, seed {seed}: {rows.stop} of {count} images")
        sets.append(np.concatenate(images))
    return References(sets[0], sets[1], labels, dict(settings))


def compare(
    pipeline: Pipeline,
    references: References,
    *,
    features: str | Features = "builtin",
    stats: Path | None = None,
    measure: Measure | None = None,
) -> tuple[Distribution, Array]:
    """Generate the deployed set and measure -> result, deployed images (N, H, W, 3) uint8.

    ``measure``, from `arinar.measure.features.open_measure`, takes the place of ``features`` and ``stats``.
    """
    settings, config = references.settings, pipeline.config
    measure = measure or open_measure(features, stats, config)
    made = pipeline.generate(references.labels, **{name: value for name, value in settings.items() if name != "labels"})
    deployed = np.stack([np.asarray(image) for image in made.images])
    first, second, ours = (
        check_features(measure.extract(images), len(images), measure.name)
        for images in (references.first, references.second, deployed)
    )
    groups = np.array(references.labels)
    mmd, p = mmd_test(second, ours, permutations=PERMUTATIONS, strata=(groups, groups))
    found: dict[str, Any] = {}
    right = [right_answers(images, references.labels, config) for images in (references.first, deployed)]
    if right[0] is not None and right[1] is not None:
        change = right[0].astype(float) - right[1]
        found = {
            "agreement": float(right[1].mean()),
            "reference_agreement": float(right[0].mean()),
            "drop": float(change.mean()),
            "drop_error": float(change.std() / len(change) ** 0.5),
        }
    if measure.stats is not None:
        for name, values in (("reference_distance", first), ("deployed_distance", ours)):
            found[name] = frechet_distance(*mean_and_covariance(values), *measure.stats)
    result = Distribution(
        len(ours),
        measure.name,
        frechet_between(first, ours),
        frechet_between(first, second),
        frechet_between(second, ours),
        mmd,
        p,
        **found,
    )
    return result, deployed
