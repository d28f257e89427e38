"""The public runtime: a bundle in, images out, no PyTorch."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from arinar.config import ArinarConfig
from arinar.schedule import CFG_SCHEDULES, steps

from .backends import open_backend
from .backends.base import Array, Backend
from .bundle import Bundle, Manifest
from .loop import Loop
from .noise import Noise

# Images of a micro-batch where the caller does not say: about this many tokens at a time.
DEFAULT_BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Progress:
    """Passed to a callback after each outer step. ``images_done`` of ``images`` are finished."""

    step: int
    num_iter: int
    images_done: int
    images: int


@dataclass(frozen=True)
class Generation:
    """What `Pipeline.generate` made.

    images : PIL images, RGB. tokens : (B, L, D) float32, raster order, as the model made them.
    latents : (B, channels, h, w) float32, what the VAE decoded. timings : seconds by phase (``outer``, ``inner``,
    ``vae``, ``total``; on a GPU, where they are not apart, ``device`` and ``total``) over the whole call.
    seed, labels : what was asked for.
    """

    images: list[Image.Image]
    tokens: npt.NDArray[np.float32]
    latents: npt.NDArray[np.float32]
    timings: dict[str, float]
    seed: int | None = None
    labels: list[int] = field(default_factory=list)


class Pipeline:
    """A loaded bundle, ready to generate. Made by :meth:`load`."""

    def __init__(self, bundle: Bundle, backend: Backend, precision: str, inner: str = "fused") -> None:
        self.bundle, self.backend, self.precision = bundle, backend, precision
        self.loop = Loop(backend, bundle.manifest.precision_graphs(precision), bundle.manifest.config, inner)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: str | None = None,
        precision: str | None = None,
        inner: str = "fused",
        verify: bool = True,
        **options: Any,
    ) -> Pipeline:
        """Open a bundle.

        Parameters
        ----------
        path : the bundle's folder.
        backend : "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", or None for the best available.
        precision : which of the bundle's variants; None means fp32, or the only one.
        inner : "fused" (one graph for all features of a token) or "stepwise" (a graph per feature, KV cache outside).
        verify : compare the size and SHA-256 of the files that will be read with the manifest.
        options : of the backend, e.g. ``threads`` and ``low_memory`` on the CPU, ``cuda_graphs`` on a GPU (see the backends'
            classes).

        Raises BundleError (a ValueError) where the bundle is damaged or cannot run here; the message tells the remedy.
        """
        bundle = Bundle.open(path)
        precision = precision or default_precision(bundle.manifest)
        graphs = bundle.manifest.precision_graphs(precision)
        if verify:
            bundle.verify(sorted({file for name, g in graphs.items() if name != "vae_encoder" for file in g.files}))
        return cls(bundle, open_backend(bundle, backend, precision, **options), precision, inner)

    @property
    def config(self) -> ArinarConfig:
        return self.bundle.manifest.config

    def generate(
        self,
        labels: Sequence[int] | npt.NDArray[np.integer[Any]],
        *,
        guidance_scale: float | None = None,
        cfg_schedule: str | None = None,
        temperature: float | None = None,
        num_iter: int | None = None,
        seed: int = 0,
        noise: Noise | None = None,
        batch_size: int | None = None,
        callback: Callable[[Progress], None] | None = None,
    ) -> Generation:
        """Generate one image per label.

        Image i is determined, up to floating-point rounding, by (seed, i) and the sampling arguments. With
        ``batch_size`` given it is determined to the last bit: short batches are padded to that size.

        Parameters
        ----------
        labels : class ids, each in 0..num_classes-1.
        guidance_scale : classifier-free guidance, at least 1; 1 runs no unconditional branch.
        cfg_schedule : "linear" or "constant".
        temperature : above 0, multiplies the component std.
        num_iter : outer steps, 1..L; a causal model takes L, one token a step.
        seed : 0..2**64-1. Ignored when ``noise`` is given.
        noise : every random number, for len(labels) images.
        batch_size : images generated at a time.
        callback : called after each outer step with a :class:`Progress`.

        Arguments left None take the bundle's defaults. Raises ValueError naming the argument, FloatingPointError
        naming the graph where a computation was not finite.
        """
        began = time.perf_counter()
        config, defaults = self.config, self.bundle.manifest.defaults
        ids = check_labels(labels, config)
        scale = check_number("guidance_scale", defaults.guidance_scale if guidance_scale is None else guidance_scale, 1.0)
        heat = check_number("temperature", defaults.temperature if temperature is None else temperature, 0.0, strict=True)
        schedule = defaults.cfg_schedule if cfg_schedule is None else cfg_schedule
        plan = steps(config.seq_len, check_num_iter(num_iter, defaults.num_iter, config), scale, schedule)
        if noise is None:
            noise = Noise.from_seed(seed, range(len(ids)), config)
        else:
            noise.check(len(ids), config)
        size = check_batch_size(batch_size, len(ids), config)

        guided = scale != 1.0
        self.loop.prepare(guided, size)
        self.loop.seconds.clear()
        images: list[Image.Image] = []
        tokens: list[Array] = []
        latents: list[Array] = []
        for first in range(0, len(ids), size):
            rows = slice(first, min(first + size, len(ids)))
            batch, batch_noise = ids[rows], noise[rows]
            if batch_size is not None:
                batch_noise = batch_noise.padded(size)
                batch = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch))])

            def on_step(step: int, done: int = first) -> None:
                if callback:
                    callback(Progress(step + 1, len(plan), done, len(ids)))

            made = self.loop.run(batch, batch_noise, plan, guided=guided, temperature=heat, on_step=on_step)
            count = rows.stop - rows.start
            tokens.append(made.tokens[:count])
            latents.append(made.latents[:count])
            images += [Image.fromarray(image) for image in made.images[:count]]
        timings = dict(self.loop.seconds)
        timings["total"] = time.perf_counter() - began
        return Generation(images, np.concatenate(tokens), np.concatenate(latents), timings, seed, [int(label) for label in ids])


def default_precision(manifest: Manifest) -> str:
    return "fp32" if "fp32" in manifest.graphs else next(iter(manifest.graphs))


def check_labels(labels: Any, config: ArinarConfig) -> npt.NDArray[np.int64]:
    """Class ids as (B,) int64. Raises ValueError for none, a wrong type, or one out of range."""
    ids = np.asarray(labels)
    if ids.size == 0:
        raise ValueError("labels is empty; give at least one class id")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"labels is {ids.dtype} with shape {ids.shape}; expected a list of integer class ids")
    if (bad := ids[(ids < 0) | (ids >= config.num_classes)]).size:
        raise ValueError(f"label {int(bad[0])} is out of range; this model has classes 0..{config.num_classes - 1}")
    return ids.astype(np.int64)


def check_number(name: str, value: Any, least: float, *, strict: bool = False) -> float:
    bound = f"above {least:g}" if strict else f"at least {least:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; expected a finite number {bound}")
    if value < least or (strict and value == least):
        raise ValueError(f"{name} is {value!r}; expected a number {bound}")
    return float(value)


def check_num_iter(value: Any, default: int, config: ArinarConfig) -> int:
    length = config.seq_len
    if config.outer == "causal":
        if value not in (None, length):
            raise ValueError(f"num_iter is {value!r}; a causal model generates one token a step: {length}, or None")
        return length
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= length:
        raise ValueError(f"num_iter is {value!r}; expected an integer from 1 to {length} (one token a step at most)")
    return int(value)


def check_batch_size(value: Any, count: int, config: ArinarConfig) -> int:
    if value is None:
        return min(count, max(1, DEFAULT_BATCH_TOKENS // config.seq_len))
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"batch_size is {value!r}; expected an integer of at least 1")
    return int(value)


__all__ = ["CFG_SCHEDULES", "Generation", "Pipeline", "Progress"]
