"""What images are compared by: features (N, F) of images (N, H, W, 3) uint8, statistics of a reference set, a classifier.

Features are pluggable: any callable images -> (N, F), or that and logits of classes (N, C). Built in is one that needs
no download; statistics (``mu``, ``sigma`` in an .npz, as torch-fidelity and pytorch-fid keep them) can be given, made with
the same features.
"""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arinar.config import PRESETS, ArinarConfig
from arinar.files import temporary_folder
from arinar.reading import check_regular, read_npz
from arinar.text import install_hint, one_line

Array = npt.NDArray[Any]
Features = Callable[[Array], Any]

#: Bytes of a file of statistics: of 8,192 features, in double precision.
MAX_STATS = 1 << 29
#: What torch-fidelity's InceptionV3 takes.
INCEPTION = "weights-inception-2015-12-05-6726825d.pth, of torch-fidelity's release v0.2.0"
BUILTIN_WIDTH, _SIDE, _CELLS, _ANGLES = 32, 32, 4, 8


@dataclass(frozen=True)
class Measure:
    """What images are compared by: an extractor that has been tried on an image, and ``mu``, ``sigma`` to compare with."""

    name: str
    extract: Features
    stats: tuple[Array, Array] | None = None


def open_measure(features: str | Features, stats: Path | None, config: ArinarConfig) -> Measure:
    """Find the extractor, try it on black images of the model's size, read the statistics -> what to compare by.

    Raises ValueError where anything is missing or does not fit: known before the first image is generated.
    """
    extract = feature_extractor(features, config)
    name = extractor_name(features)
    try:
        found, _ = features_and_logits(extract(np.zeros((2, config.img_size, config.img_size, 3), np.uint8)))
    except Exception as error:  # somebody else's code
        raise ValueError(f"the feature extractor {name} fails on black images: {type(error).__name__}: {error}") from error
    width = check_features(found, 2, name).shape[1]
    return Measure(
        name, lambda images: features_and_logits(extract(images))[0], None if stats is None else read_stats(stats, width)
    )


def extractor_name(features: str | Features) -> str:
    """What an extractor is called in reports and errors."""
    return features if isinstance(features, str) else getattr(features, "__name__", "custom")


def is_digits(config: ArinarConfig | None) -> bool:
    digits = PRESETS["digits"]
    return config is not None and (config.img_size, config.num_classes, config.class_names) == (
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


def features_and_logits(found: Any) -> tuple[Any, Any]:
    """What an extractor gave: features, or a pair of features and logits of classes -> both, or None for the second."""
    return (found[0], np.asarray(found[1])) if isinstance(found, tuple) and len(found) == 2 else (found, None)


def feature_extractor(features: str | Features, config: ArinarConfig | None, weights: Path | None = None) -> Features:
    """By name: "builtin", "inception" (torch-fidelity's InceptionV3, 2048 wide, where installed), or "module:function".

    config : of the model that made the images, None where that is not known: the digits have built-in features of their own.
    weights : of "inception", torch-fidelity's file; None: torch-fidelity fetches it.

    Raises ValueError for anything else, or where the package is missing.
    """
    if callable(features):
        return features
    if features == "builtin":
        return builtin_features(config)
    if features == "inception":
        return _inception(weights)
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


def builtin_features(config: ArinarConfig | None) -> Features:
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


def _inception(weights: Path | None) -> Features:
    try:
        import torch
        from torch_fidelity.utils import create_feature_extractor
    except Exception as error:  # a torchvision that does not fit to PyTorch raises what it likes
        raise ValueError(
            f"features inception needs torch-fidelity, with a torchvision that fits to PyTorch: {install_hint('evaluate')} "
            f"installs them ({error})"
        ) from error
    cuda = torch.cuda.is_available()
    layers, name = ["2048", "logits_unbiased"], "inception-v3-compat"
    if weights is None:
        network = create_feature_extractor(name, layers, cuda=cuda, verbose=False)
    else:
        with _plain_weights(weights) as file:
            try:
                network = create_feature_extractor(name, layers, cuda, feature_extractor_weights_path=str(file), verbose=False)
            except (RuntimeError, KeyError) as error:  # other names, other shapes
                raise ValueError(
                    f"{weights} does not fit to torch-fidelity's InceptionV3 ({one_line(error)[:200]}); expected {INCEPTION}"
                ) from None

    def extract(images: Array) -> tuple[Array, Array]:
        found = []
        for first in range(0, len(images), 32):
            batch = torch.from_numpy(images[first : first + 32]).permute(0, 3, 1, 2)
            with torch.no_grad():
                found.append([part.float().cpu().numpy() for part in network(batch.to("cuda" if cuda else "cpu"))])
        features, logits = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return features, logits

    return extract


@contextmanager
def _plain_weights(path: Path) -> Iterator[Path]:
    """The tensors of a file that torch.save wrote, in a file of our own: torch-fidelity would run what is pickled in it."""
    import torch

    from arinar.torch_files import read_torch_stream, read_torch_zip, state_of

    try:
        check_regular(path)
        state = state_of((read_torch_zip if zipfile.is_zipfile(path) else read_torch_stream)(path))
        if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError("it holds other things than weights by name")
    except Exception as error:  # of a damaged file, nearly anything
        raise ValueError(f"{path} cannot be read as weights ({one_line(error)[:200]}); expected {INCEPTION}") from error
    with temporary_folder("arinar-weights") as folder:
        torch.save({name: tensor.clone() for name, tensor in state.items()}, folder / "weights.pth")
        yield folder / "weights.pth"


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
        if not path.exists():
            raise ValueError("there is no such file")
        arrays = read_npz(path, MAX_STATS)
        mean, covariance = np.asarray(arrays["mu"], np.float64), np.asarray(arrays["sigma"], np.float64)
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
