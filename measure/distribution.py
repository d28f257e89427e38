"""Parity's fourth level: do many deployed images follow the law of many PyTorch images?

Three sets of samples: PyTorch with seed A, PyTorch with seed B, the deployed pipeline with seed A. How far the second
is from the first is the yardstick: that much, two correct runs differ. The deployed set must not be much further from the
second, with which it shares no noise. From the first, with which it shares all of it, it must be far less away where
rounding changes little; that says nothing by itself where images part.

Features are pluggable: any callable images (N, H, W, 3) uint8 -> (N, F). Built in is one that needs no download;
statistics of a reference set (``mu``, ``sigma`` in an .npz, as torch-fidelity and pytorch-fid keep them) can be given,
made with the same features.
"""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from arinar.config import PRESETS, ArinarConfig
from arinar.model import Arinar, decode_images
from arinar.runtime.noise import Noise
from arinar.runtime.pipeline import Pipeline
from arinar.sampler import sample
from arinar.vae import AutoencoderKL

from .distances import frechet_between, frechet_distance, mean_and_covariance, mmd_test

Array = npt.NDArray[Any]
Features = Callable[[Array], Array]

#: Fewer samples than this do not determine a covariance worth comparing.
MIN_SAMPLES = 64
PERMUTATIONS = 2000
# Images that PyTorch generates at a time.
REFERENCE_BATCH = 64
BUILTIN_WIDTH, _SIDE, _CELLS, _ANGLES = 32, 32, 4, 8


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
class Measure:
    """What images are compared by: an extractor that has been tried on an image, and ``mu``, ``sigma`` to compare with."""

    name: str
    extract: Features
    stats: tuple[Array, Array] | None = None


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
    """PyTorch's two sets of ``count`` images, all classes in turn. ``settings``: guidance_scale, cfg_schedule,
    temperature, num_iter, seed. Raises ValueError for too few."""
    check_samples(count)
    config = model.config
    labels = [i % config.num_classes for i in range(count)]
    sets = []
    for seed in (settings["seed"], settings["seed"] + 1):
        images = []
        for first in range(0, count, REFERENCE_BATCH):
            rows = range(first, min(first + REFERENCE_BATCH, count))
            tokens = sample(
                model,
                torch.tensor(labels[first : rows.stop]),
                guidance_scale=settings["guidance_scale"],
                cfg_schedule=settings["cfg_schedule"],
                temperature=settings["temperature"],
                num_iter=settings["num_iter"],
                noise=Noise.from_seed(seed, rows, config),
            )
            images.append(decode_images(vae, tokens, config).numpy())
            if progress:
                progress(f"PyTorch, seed {seed}: {rows.stop} of {count} images")
        sets.append(np.concatenate(images))
    return References(sets[0], sets[1], labels, dict(settings))


def open_measure(features: str | Features, stats: Path | None, config: ArinarConfig) -> Measure:
    """Find the extractor, try it on black images of the model's size, read the statistics -> what to compare by.

    Raises ValueError where anything is missing or does not fit: known before the first image is generated.
    """
    extract = feature_extractor(features, config)
    name = features if isinstance(features, str) else getattr(features, "__name__", "custom")
    try:
        found = extract(np.zeros((2, config.img_size, config.img_size, 3), np.uint8))
    except Exception as error:  # somebody else's code
        raise ValueError(f"the feature extractor {name} fails on black images: {type(error).__name__}: {error}") from error
    width = check_features(found, 2, name).shape[1]
    return Measure(name, extract, None if stats is None else read_stats(stats, width))


def compare(
    pipeline: Pipeline,
    references: References,
    *,
    features: str | Features = "builtin",
    stats: Path | None = None,
    measure: Measure | None = None,
) -> tuple[Distribution, Array]:
    """Generate the deployed set and measure -> result, deployed images (N, H, W, 3) uint8.

    ``measure``, from :func:`open_measure`, takes the place of ``features`` and ``stats``.
    """
    settings, config = references.settings, pipeline.config
    measure = measure or open_measure(features, stats, config)
    made = pipeline.generate(
        references.labels,
        guidance_scale=settings["guidance_scale"],
        cfg_schedule=settings["cfg_schedule"],
        temperature=settings["temperature"],
        num_iter=settings["num_iter"],
        seed=settings["seed"],
    )
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


def is_digits(config: ArinarConfig) -> bool:
    digits = PRESETS["digits"]
    return (config.img_size, config.num_classes, config.class_names) == (
        digits.img_size,
        digits.num_classes,
        digits.class_names,
    )


def right_answers(images: Array, labels: Sequence[int], config: ArinarConfig) -> Array | None:
    """(N,) bool: does the independent classifier read the label? None for models that have no classifier."""
    if not is_digits(config):
        return None
    from arinar.judge import classify

    return np.asarray(classify(images) == np.asarray(labels))


def feature_extractor(features: str | Features, config: ArinarConfig) -> Features:
    """By name: "builtin", "inception" (torch-fidelity's InceptionV3, 2048 wide, where installed), or "module:function".

    Raises ValueError for anything else, or where the package is missing.
    """
    if callable(features):
        return features
    if features == "builtin":
        return builtin_features(config)
    if features == "inception":
        return _inception()
    module, _, name = features.partition(":")
    if not module or not name:
        raise ValueError(f"features is {features!r}; choose builtin, inception, or your own as module:function")
    try:
        found: Features = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever somebody else's module raises as it is imported
        raise ValueError(
            f"features {features!r} cannot be imported: {error}; expected module:function, the module on PYTHONPATH"
        ) from error
    if not callable(found):
        raise ValueError(f"features {features!r} is {type(found).__name__}; expected a function of images (N, H, W, 3) uint8")
    return found


def builtin_features(config: ArinarConfig) -> Features:
    """A fixed, documented extractor, ``BUILTIN_WIDTH`` features wide.

    Grey values averaged to 8x8 (64), colour to 4x4 (48), gradient magnitude by signed direction (8 sectors) in 4x4 cells
    (128), projected: for the digits onto the first principal components of the real digits' features, otherwise by a
    random orthonormal matrix of fixed seed.
    """
    if is_digits(config):
        from arinar.judge import real_digits

        raw = _raw_features(real_digits().train_images)
        projection = np.linalg.svd(raw - raw.mean(0), full_matrices=False)[2][:BUILTIN_WIDTH].T
    else:
        width = 64 + 48 + _CELLS**2 * _ANGLES
        generator = np.random.Generator(np.random.Philox(key=np.array([0, 0], np.uint64)))
        projection = np.linalg.qr(generator.standard_normal((width, BUILTIN_WIDTH)))[0]

    def extract(images: Array) -> Array:
        return np.asarray(_raw_features(images) @ projection)

    return extract


def _raw_features(images: Array) -> Array:
    """(N, H, W, 3) uint8 -> (N, 240) float64."""
    x = _averaged(images.astype(np.float64) / 255, _SIDE)  # (N, 32, 32, 3)
    grey = x.mean(-1)
    down, right = np.gradient(grey, axis=(1, 2))
    size, sector = np.hypot(down, right), (np.arctan2(down, right) / (2 * np.pi) * _ANGLES).round().astype(int) % _ANGLES
    by_sector = size[..., None] * (sector[..., None] == np.arange(_ANGLES))  # (N, 32, 32, 8)
    parts = (_averaged(grey[..., None], 8), _averaged(x, 4), 4 * _averaged(by_sector, _CELLS))
    return np.concatenate([part.reshape(len(x), -1) for part in parts], 1)


def _averaged(x: Array, side: int) -> Array:
    """(N, S, S, c) -> (N, side, side, c): means over blocks (S a multiple of side, or the nearest pixels below it)."""
    if x.shape[1] < side:
        rows = np.arange(side) * x.shape[1] // side
        return x[:, rows][:, :, rows]
    block = x.shape[1] // side
    x = x[:, : block * side, : block * side]
    return np.asarray(x.reshape(len(x), side, block, side, block, -1).mean((2, 4)))


def _inception() -> Features:
    try:
        from torch_fidelity.utils import create_feature_extractor  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError("features inception needs the package torch-fidelity: pip install torch-fidelity") from error
    network = create_feature_extractor("inception-v3-compat", ["2048"], cuda=torch.cuda.is_available(), verbose=False)

    def extract(images: Array) -> Array:
        found = []
        for first in range(0, len(images), 32):
            batch = torch.from_numpy(images[first : first + 32]).permute(0, 3, 1, 2)
            with torch.no_grad():
                found.append(network(batch.to(next(network.parameters()).device))[0].float().cpu().numpy())
        return np.concatenate(found)

    return extract


def check_features(values: Any, count: int, name: str) -> Array:
    found: Array = np.asarray(values, np.float64)
    if found.ndim != 2 or len(found) != count or not found.shape[1] or not np.isfinite(found).all():
        what = "" if np.isfinite(found).all() else ", not all of it finite"
        raise ValueError(
            f"the feature extractor {name} gave {found.shape}{what} for {count} images; expected finite values ({count}, F)"
        )
    return found


def read_stats(path: Path, width: int) -> tuple[Array, Array]:
    """``mu`` (F,) and ``sigma`` (F, F) of an .npz file. Raises ValueError where they do not fit the features."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a file of that kind" if path.exists() else "there is no such file")
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = np.asarray(file["mu"], np.float64), np.asarray(file["sigma"], np.float64)
    except Exception as error:  # what NumPy, zipfile and zlib raise for damaged files has no common type
        raise ValueError(f"{path} holds no statistics ({error}); expected an .npz with mu (F,) and sigma (F, F)") from error
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise ValueError(
            f"{path} has mu {mean.shape} and sigma {covariance.shape}; the features are {width} wide: make statistics "
            f"and compare with the same features (--features)"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path} has a mu or sigma that is not finite; make the statistics again, from more images")
    return mean, covariance
