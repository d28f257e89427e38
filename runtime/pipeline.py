"""The public runtime: a bundle in, images out, no PyTorch."""

from __future__ import annotations

import inspect
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias, Unpack, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from arinar.class_names import Classes
from arinar.config import ArinarConfig
from arinar.schemes import SCHEMES
from arinar.values import array

from .backends import BACKENDS, BackendOptions, obstacle, open_backend
from .backends.base import Backend
from .bundle import MANIFEST_NAME, Bundle, BundleError, Manifest, file_sha256
from .editing import about_edit, as_mask, as_pixels, hide, paste_back, per_image, to_tokens, token_mask
from .known import Known
from .labels import about_label
from .loop import Loop, Made
from .noise import Noise
from .request import Sampling
from .state import State

#: One label per image: a class's id or name, or weights by these.
Label: TypeAlias = int | str | Mapping[Any, float]
Wanted: TypeAlias = Sequence[Label] | npt.NDArray[np.integer[Any]]
CLOSED = "this pipeline is closed; load the bundle again"


class GenerationCancelled(Exception):
    """A callback of `Pipeline.generate` asked for the end. The pipeline can go on generating."""


@dataclass(frozen=True)
class Generation:
    """What `Pipeline.generate` made.

    images : PIL images, RGB. tokens : (B, L, D) float32, raster order, as the model made them.
    latents : (B, channels, h, w) float32, what the VAE decoded. timings : seconds by phase (``outer``, ``inner``,
    ``vae``, ``total``; on a GPU, where they are not apart, ``device`` and ``total``) over the whole call.
    seed, labels : what was asked for (seed None: the noise was given).

    ``images[i].info`` is a dict that tells how image i was made: label, class_name, seed, index, the sampling arguments,
    precision and bundle; what `arinar generate` writes into its files.
    """

    images: list[Image.Image]
    tokens: npt.NDArray[np.float32]
    latents: npt.NDArray[np.float32]
    timings: dict[str, float]
    seed: int | None = None
    labels: list[int | dict[int, float]] = field(default_factory=list)

    def __repr__(self) -> str:
        width, height = self.images[0].size if self.images else (0, 0)
        seconds = self.timings.get("total", 0.0)
        return f"Generation({len(self.images)} images of {width} x {height}, seed {self.seed}, {seconds:.3g} s)"


@dataclass(frozen=True)
class Progress:
    """An outer step that has been taken: ``step`` of ``num_iter``, on a micro-batch of images ``rows`` of the call.

    ``images_done`` of ``images`` were finished before. ``result``: with the last step of a call, what was made.
    """

    step: int
    num_iter: int
    images_done: int
    images: int
    rows: tuple[int, ...] = ()
    result: Generation | None = None
    _preview: Callable[[], list[Image.Image]] = field(default=list, repr=False, compare=False)

    def preview(self) -> list[Image.Image]:
        """The images ``rows`` as far as they are known by now, unknown tokens neutral (zero). Costs a run of the VAE.

        Raises RuntimeError once later steps have finished the images, or the call was cancelled."""
        return self._preview()


class Pipeline:
    """A loaded bundle, ready to generate. Made by :meth:`load`; a context manager, which closes it.

    May be used from several threads: calls take turns. It belongs to the process that loaded it.
    """

    def __init__(self, bundle: Bundle, backend: Backend, precision: str, inner: str | None = None) -> None:
        self.bundle, self.backend, self.precision = bundle, backend, precision
        self.loop = Loop(backend, bundle.manifest.precision_graphs(precision), bundle.manifest.config, inner)
        self._lock, self._busy, self._process = threading.RLock(), 0, os.getpid()
        self._unverified: list[str] = []  # files that only encoding reads, until it does
        self._closed = False
        #: What files of its images say of the pipeline: its precision, and the hash of the bundle's manifest.
        self.made_by = {"precision": precision, "bundle": file_sha256(bundle.path(MANIFEST_NAME))[:16]}
        self.classes = Classes(self.config)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: str | None = None,
        precision: str | None = None,
        inner: str | None = None,
        verify: bool = True,
        **options: Unpack[BackendOptions],
    ) -> Pipeline:
        """Open a bundle.

        Parameters
        ----------
        path : the bundle's folder.
        backend : "onnxruntime-cpu", "openvino", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx", or None for the best available.
        precision : which of the bundle's variants; None means fp32, or the only one. "bf16": the fp32 graphs with products in
            bfloat16, which backend openvino computes on CPUs that have it.
        inner : of a Gaussian mixture head, "fused" (one graph for all features of a token) or "stepwise" (a graph per
            feature, KV cache outside; on a GPU, draws by a kernel of ours); None: fused on a CPU, and on a GPU where the
            kernel cannot be had. A diffusion head is always "stepwise".
        verify : compare the size and SHA-256 of the files that will be read with the manifest.
        options : of the backend, e.g. ``threads`` and ``low_memory`` on the CPU, ``cuda_graphs`` on a GPU
            (`arinar.runtime.backends.BackendOptions`).

        Raises BundleError (a ValueError) where the bundle is damaged or cannot run here; the message tells the remedy.
        """
        bundle = Bundle.open(path)
        precision = precision or default_precision(bundle.manifest)
        graphs = bundle.manifest.precision_graphs(precision).values()
        usual = {file for graph in graphs if graph.phase != "encode" for file in graph.files}
        if verify:
            bundle.verify(sorted(usual))
        pipeline = cls(bundle, open_backend(bundle, backend, precision, **options), precision, inner)
        pipeline._unverified = sorted({file for graph in graphs for file in graph.files} - usual) if verify else []
        return pipeline

    @staticmethod
    def available(path: str | os.PathLike[str]) -> dict[str, list[str]]:
        """What of a bundle can run on this machine: precision -> the backends for it, by name; also precisions that a
        backend here computes from another's graphs ("bf16").

        Packages, devices and engines are looked for; nothing is loaded. Raises BundleError where there is no bundle.
        """
        bundle = Bundle.open(path)
        computed = [name for name, scheme in SCHEMES.items() if scheme.runs in bundle.precisions]
        found = {
            precision: [name for name in BACKENDS if obstacle(bundle, precision, name) is None]
            for precision in dict.fromkeys([*bundle.precisions, *computed])
        }
        return {precision: names for precision, names in found.items() if names or precision in bundle.precisions}

    def close(self) -> None:
        """Let go of the graphs, threads and buffers. Calls after that raise RuntimeError; closing again does nothing.

        Waits for a call of another thread; a stream that is under way ends when it is next asked.
        """
        if self._closed:
            return
        with self._turn():
            self._closed = True
            self.loop = self.backend = cast(Any, _Closed())

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._closed:
            return f"Pipeline({str(self.bundle.folder)!r}, closed)"
        options = "".join(f", {name}={value}" for name, value in self.backend.describe().items())
        return f"Pipeline({str(self.bundle.folder)!r}, {self.precision}, {self.backend.name}{options})"

    @property
    def config(self) -> ArinarConfig:
        return self.bundle.manifest.config

    def generate(
        self,
        labels: Wanted,
        *,
        guidance_scale: float | Sequence[float] | None = None,
        cfg_schedule: str | None = None,
        temperature: float | Sequence[float] | None = None,
        num_iter: int | None = None,
        sampling_steps: str | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        noise: Noise | None = None,
        batch_size: int | None = None,
        known: Known | None = None,
        schedule: str | None = None,
        guidance_interval: Sequence[float] | None = None,
        guidance_refresh: int | None = None,
        callback: Callable[[Progress], object] | None = None,
    ) -> Generation:
        """Generate one image per label.

        Image i is determined, up to floating-point rounding, by (seed, i) and the sampling arguments. With
        ``batch_size`` given it is determined to the last bit, whatever is generated beside it: short batches are padded
        to that size. (On a CPU a float's last bit may also depend on an image's place in the micro-batch: which row of a
        product it is; at powers of two none was seen to. A causal int8 model's rows share their ranges: an image depends
        slightly on the others.)

        Parameters
        ----------
        labels : class ids, each in 0..num_classes-1, or classes' names; -1 is an image of no class, made without guidance;
            or, for an image of several classes, weights by class id or name, at most four: ``[{3: 0.5, 8: 0.5}, 7]``.
            Weights are divided by their sum; the classes' embeddings are interpolated.
        guidance_scale : classifier-free guidance, at least 1; 1 runs no unconditional branch. One for all, or one per
            label.
        cfg_schedule : "linear" or "constant".
        temperature : above 0, multiplies the component std (of a diffusion head: the steps' noise). One for all, or one per
            label.
        num_iter : outer steps, 1..L; a causal model takes L, one token a step.
        sampling_steps : of a diffusion head: "100", "ddim25", or "25-5" for fewer in later outer steps
            (`arinar.diffusion_schedule.kept_timesteps`, `respacings`).
        seed : 0..2**64-1. Ignored when ``noise`` is given.
        indices : the images' indices in the seed's sequence; default 0, 1, ... `generate([5], seed=0, indices=[7])` is image
            7 of a run with seed 0.
        noise : every random number, for len(labels) images.
        batch_size : images generated at a time.
        known : tokens that are given, for len(labels) images: they come back as they are, bit for bit, and the others are
            generated around them, by the schedule of so many tokens (``num_iter`` steps, or one for each where they are
            fewer). Where all are known there is no step: one Progress tells of none.
        schedule : None or "cosine", the published one, or "staged:64x24,64x6,128x2" (`arinar.schedule.stages_of`): tokens x
            steps of sets of a checkerboard, the coarse first. Other images, of another law: what it costs is for the
            model's owner to see.
        guidance_interval : two shares of known tokens: steps outside are not guided, and cost half. Of another law, too.
            None: (0, 1), all are.
        guidance_refresh : of so many guided steps the first computes the unconditional branch; the others take what guidance
            changed there, and cost half. An approximation. None: 1, all compute it.
        callback : called after each outer step with a :class:`Progress`; returns True to stop. It has the pipeline to
            itself: another thread's ``preview()`` or call waits until this one is over.

        Arguments left None take the bundle's defaults. Raises ValueError naming the argument, FloatingPointError
        naming the graph where a computation was not finite, GenerationCancelled where the callback said so, RuntimeError
        for a call from within a callback or in a forked process.
        """
        began = time.perf_counter()
        sampling = self.resolve(
            labels,
            guidance_scale=guidance_scale,
            cfg_schedule=cfg_schedule,
            temperature=temperature,
            num_iter=num_iter,
            sampling_steps=sampling_steps,
            seed=seed,
            indices=indices,
            noise=noise,
            batch_size=batch_size,
            known=known,
            schedule=schedule,
            guidance_interval=guidance_interval,
            guidance_refresh=guidance_refresh,
        )
        with self._turn(), closing(self._walk(sampling, began, watched=callback is not None)) as walk:
            for progress in walk:
                if callback is not None and _is_true(callback(progress)):
                    raise GenerationCancelled(f"cancelled at step {progress.step} of {progress.num_iter}")
        assert progress.result is not None
        return progress.result

    def stream(self, labels: Wanted, **arguments: Any) -> Generator[Progress, None, Generation]:
        """Generate as :meth:`generate` does, step by step: yields a :class:`Progress` after every outer step, whose
        ``preview()`` shows the images as far as they are known; the last one's ``result`` is the :class:`Generation`, which
        the iterator also returns.

        Closing the iterator, in the thread that iterates, cancels within one step. Other calls may take their turns between
        two steps. Arguments and
        errors as for :meth:`generate`, without ``callback``; bad arguments are refused at once.
        """
        began = time.perf_counter()
        if "callback" in arguments:
            raise ValueError("stream takes no callback: what it would do goes into the loop over the stream")
        return self._stream(self.resolve(labels, **arguments), began)

    def encode(self, images: Any, *, resize: bool = False) -> npt.NDArray[np.float32]:
        """Pictures -> their tokens (B, L, D) float32, raster order: of the VAE's posterior the mean, normalised.

        images : PIL images (or one), or uint8 (B, H, W, 3), RGB, of the model's size. ``resize``: others are cut to a square
        about their centre and resized.

        Raises ValueError naming the picture that is none, of another size or transparent; BundleError where the bundle
        has no encoder, or the backend none built; RuntimeError as `generate`.
        """
        pixels = as_pixels(images, self.config.img_size, resize=resize)
        with self._turn():
            if "vae_encoder" not in self.bundle.manifest.precision_graphs(self.precision):
                raise BundleError("the bundle has no graph vae_encoder, which reads pictures in; export the model again")
            self.bundle.verify(self._unverified)
            self._unverified = []
            latents = self.loop.encode(pixels)
        if not np.isfinite(latents).all():
            raise FloatingPointError("graph 'vae_encoder' made values that are not finite")
        return to_tokens(latents, self.config)

    def decode(self, tokens: npt.NDArray[np.float32]) -> list[Image.Image]:
        """Tokens (B, L, D) float32, raster order -> the pictures that they are. Raises ValueError for anything else."""
        count = len(tokens) if isinstance(tokens, np.ndarray) and tokens.ndim else 0
        array("tokens", tokens, np.float32, (max(1, count), self.config.seq_len, self.config.token_dim))
        known = Known(tokens, np.ones(tokens.shape[:2], np.bool_))  # all of them: nothing is generated
        return self.generate([0] * count, guidance_scale=1.0, known=known).images

    def edit(self, images: Any, mask: Any, labels: Any, *, grow: int = 0, paste: bool = True, **sampling: Any) -> Generation:
        """Generate a part of pictures anew.

        images : as for :meth:`encode`, one per label, or one for all. They must have the model's size.
        mask : what is to be generated anew: bool (H, W), or (B, H, W), True; a black and white PIL image, white. A token
            (a square of pixels) is generated anew where any of its pixels is.
        labels : class ids, what the new part is to be of.
        grow : so many tokens more around those, in all eight directions.
        paste : what is not generated anew comes back as the pixels that were given, else as the VAE makes them.
        sampling : as for :meth:`generate`.

        The model sees nothing of what is generated anew: it is grey before it is encoded. Of a causal model it must be the
        end of its generation order (in raster order the lower rows). Raises as `generate` and `encode`, before anything is
        computed where an argument is wrong.
        """
        if "known" in sampling:
            raise ValueError("known has no place here: the mask says what is; generate(..., known=) takes tokens")
        side, settings = self.config.img_size, {key: value for key, value in sampling.items() if key != "callback"}
        count = len(self.resolve(labels, **settings))
        pixels, masks = per_image("images", as_pixels(images, side), count), per_image("mask", as_mask(mask, side), count)
        anew = token_mask(masks, self.config, grow)
        unknown = np.broadcast_to(anew, (count, self.config.seq_len))
        blank = np.zeros((*unknown.shape, self.config.token_dim), np.float32)
        self.resolve(labels, known=Known(blank, ~unknown), **settings)
        tokens = np.broadcast_to(self.encode(hide(pixels, anew, self.config)), blank.shape)
        made = self.generate(labels, known=Known(tokens, ~unknown), **sampling)
        pictures = paste_back(made.images, pixels, anew, self.config) if paste else made.images
        for row, (picture, before) in enumerate(zip(pictures, made.images, strict=True)):
            given = about_edit(pixels[row % len(pixels)], masks[row % len(masks)], grow, paste)
            picture.info = before.info | {"edit": given}
        return replace(made, images=pictures)

    def resolve(self, labels: Any, **arguments: Any) -> Sampling:
        """The arguments of :meth:`generate`, checked, with the bundle's defaults. Raises ValueError."""
        return Sampling.resolve(self.config, self.bundle.manifest.defaults, labels, **arguments)

    def metadata(self, sampling: Sampling) -> list[dict[str, Any]]:
        """How each image of a request is made, JSON-ready: what its file says, and its ``info``."""
        return [
            sampling.settings(row) | self.made_by | {"seed": _seed(sampling), "index": index} | about_label(label, self.classes)
            for row, (index, label) in enumerate(zip(sampling.indices, sampling.classes.shown(), strict=True))
        ]

    def _stream(self, sampling: Sampling, began: float) -> Generator[Progress, None, Generation]:
        walk = self._walk(sampling, began, watched=True)
        try:
            while True:
                with self._turn():
                    progress = next(walk)
                yield progress
                if progress.result is not None:
                    return progress.result
        finally:
            with self._turn(nested=True):
                walk.close()

    def _walk(self, sampling: Sampling, began: float, *, watched: bool) -> Generator[Progress, None, None]:
        """Every step of every micro-batch; the last with the result."""
        count, done, seconds = len(sampling), 0, dict[str, float]()
        tokens: list[Any] = [None] * count
        latents: list[Any] = [None] * count
        images: list[Any] = [None] * count
        about = self.metadata(sampling)
        for part in sampling.batches():
            rows, batch = part.rows, part.batch
            if batch.plan:
                for guided in {batch.guided and step.guided for step in batch.plan}:
                    self.loop.prepare(guided, len(batch))
            place = (len(batch.plan), done, count, tuple(rows))
            with closing(self.loop.walk(batch, seconds, watched=watched)) as walk:
                for step in batch.plan[:-1]:
                    show = partial(self._show, walk, next(walk).state, part.places)
                    yield Progress(step.index + 1, *place, _preview=show)
                if batch.plan:
                    next(walk)
                made = _result(walk)
            done += len(rows)
            for slot, row in zip(part.places, rows, strict=True):
                tokens[row], latents[row] = made.tokens[slot], made.latents[slot]
                images[row] = Image.fromarray(made.images[slot])
                images[row].info |= about[row]
            result = None
            if done == count:
                seconds["total"] = time.perf_counter() - began
                asked = sampling.classes.shown()
                result = Generation(images, np.stack(tokens), np.stack(latents), seconds, _seed(sampling), asked)
            finished = [images[row] for row in rows]
            yield Progress(len(batch.plan), *place, result=result, _preview=partial(_copies, finished))

    def _show(self, walk: Generator[Any, None, Made], state: State, places: list[int]) -> list[Image.Image]:
        with self._turn(nested=True):
            if inspect.getgeneratorstate(walk) == inspect.GEN_CLOSED:  # the buffers are somebody else's by now
                raise RuntimeError("these images are finished, or were cancelled; preview() is for while they are being made")
            self.loop.decode(state)
            images = self.backend.download(state.images)
            return [Image.fromarray(images[place].copy()) for place in places]

    @contextmanager
    def _turn(self, *, nested: bool = False) -> Iterator[None]:
        """One thread at a time. ``nested``: also from within a call of the same thread."""
        if self._closed and not nested:
            raise RuntimeError(CLOSED)
        if os.getpid() != self._process:
            raise RuntimeError(
                "this pipeline was loaded in another process, whose threads a fork does not copy: load it again in this one"
            )
        if self._busy == threading.get_ident():
            if not nested:
                raise RuntimeError(
                    "this pipeline is in the middle of a call of this thread (a callback?); generate after it, or load a "
                    "second pipeline"
                )
            yield
            return
        with self._lock:
            self._busy = threading.get_ident()
            try:
                yield
            finally:
                self._busy = 0


class _Closed:
    """In place of what a closed pipeline had."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(CLOSED)


def _is_true(value: object) -> bool:
    """True itself, NumPy's too; whatever else a callback returns means nothing."""
    return isinstance(value, (bool, np.bool_)) and bool(value)


def _seed(sampling: Sampling) -> int | None:
    """What decided the noise, where it was not given."""
    return sampling.seed if sampling.noise is None else None


def _copies(images: list[Image.Image]) -> list[Image.Image]:
    return [image.copy() for image in images]


def _result(walk: Generator[Any, None, Made]) -> Made:
    """What a walk returns, all of whose steps have been taken."""
    try:
        next(walk)
    except StopIteration as end:
        made: Made = end.value
        return made
    raise AssertionError("a walk of more steps than its plan has")


def default_precision(manifest: Manifest) -> str:
    return "fp32" if "fp32" in manifest.graphs else next(iter(manifest.graphs))


__all__ = ["Generation", "GenerationCancelled", "Pipeline", "Progress"]
