"""The generation loop: outer step and head in turn, micro-batch by micro-batch; what each launches is theirs to say
(`outer`, `head`)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from arinar.config import ArinarConfig
from arinar.schedule import Step
from arinar.text import shown

from .backends.base import Array, Backend
from .bundle import BundleError, GraphInfo
from .head import Head, head_class
from .outer import OUTERS, Outer, check_interface
from .request import Batch
from .state import State, allocate, without_guidance

# What turns tokens into images.
DECODING = ("tokens_to_latents", "vae_decoder")
# Micro-batches' buffers (and recorded launches) that are kept, of different shapes or used at the same time.
KEPT_STATES = 4
# Pixels that the VAE decodes at a time; its activations are the largest tensors of all (at 256 x 256, a third of a
# gigabyte each image). A GPU is faster on some at a time, a CPU is not.
DECODE_PIXELS = 4 * 256 * 256

Seconds = dict[str, float]


class Made(NamedTuple):
    """A micro-batch: tokens (B, L, D) in raster order, latents (B, channels, h, w), images (B, H, W, 3) uint8."""

    tokens: Array
    latents: Array
    images: Array


class Walked(NamedTuple):
    """An outer step that has been taken (on a GPU: enqueued), and the buffers that it was taken on."""

    step: Step
    state: State


class Loop:
    """Generates micro-batches with one bundle on one backend.

    inner : how the head generates a token, one of its MODES; None: what suits the backend.
    keep_first_step : whether z of a first step, where no token is visible, is computed once per label. False where every
        launch is to be seen.
    """

    def __init__(
        self,
        backend: Backend,
        graphs: Mapping[str, GraphInfo],
        config: ArinarConfig,
        inner: str | None = None,
        *,
        keep_first_step: bool = True,
    ) -> None:
        check_graphs(graphs, config)
        head = head_class(config)
        if inner is not None and inner not in head.MODES:
            raise ValueError(f"inner is {shown(inner)}; choose one of {', '.join(head.MODES)}")
        self.backend, self.config = backend, config
        self.outer: Outer = OUTERS[config.outer](backend, graphs, config, keep_first_step)
        self.head: Head = head(backend, graphs, config, inner)
        self._idle: list[State] = []  # the most recently used last
        self._owners = itertools.count()

    def prepare(self, guided: bool, batch: int = 1) -> None:
        """Load the graphs that a generation of micro-batches of this size needs."""
        self.outer.prepare(batch, 2 if guided else 1)
        self.backend.prepare(*DECODING)
        self.head.prepare(guided, batch)

    def walk(self, batch: Batch, seconds: Seconds | None = None, *, watched: bool = False) -> Generator[Walked, None, Made]:
        """One micro-batch, step by step; returns what was made. It can be closed between two steps. Where all tokens are
        known there is none: the first `next` ends it.

        seconds : gets the time by phase. watched : a step is yielded when the device is at most one step behind (else
        it may only be enqueued).

        Raises FloatingPointError naming the graph whose output was not finite.
        """
        seconds = {} if seconds is None else seconds
        with self.state(batch) as state:
            began = time.perf_counter()
            self.fill(state, batch, seconds)
            with self._pace(watched) as pace:
                for step in batch.plan:
                    self._step(state, step, seconds)
                    pace()
                    yield Walked(step, state)
            self.decode(state, seconds)
            buffers = (state.raster, state.latents, state.images)
            made = Made(*(self.backend.download(buffer).copy() for buffer in buffers))
            if not self.backend.synchronous:
                _add(seconds, "device", began)
        drawn = self.head.graphs(batch.guided)[-1]
        for name, value in ((drawn, made.tokens), (DECODING[-1], made.latents)):
            if not np.isfinite(value).all():
                raise FloatingPointError(f"graph {name!r} or one before it made values that are not finite")
        return made

    def forced(self, batch: Batch, tokens: Array) -> Iterator[tuple[Step, Array]]:
        """The outer steps along given tokens (B, L, D), raster order, instead of drawn ones -> z (G * P, B, C) of each."""
        ordered = np.take_along_axis(tokens, batch.noise.order[:, :, None], 1).swapaxes(0, 1)  # (L, B, D)
        with self.state(batch) as state:
            self.fill(state, batch, {})
            for step in batch.plan:
                z = self.backend.download(self.outer.step(state.of(step), step)).copy()
                yield step, z.reshape(-1, state.batch, self.config.z_width)
                now = slice(step.remaining, step.masked)
                self.backend.write(state.tokens[now], np.ascontiguousarray(ordered[now]))

    def decode(self, state: State, seconds: Seconds | None = None) -> None:
        """Tokens in generation order, as far as they are known -> tokens in raster order, latents, images."""
        with self._timed({} if seconds is None else seconds, "vae"):
            self.backend.execute(state.owner, "decode", lambda: self._decode(state))

    def _decode(self, state: State) -> None:
        """A bounded number of images at a time."""
        self.backend.launch(
            "tokens_to_latents",
            {"tokens": state.tokens, "ranks": state.ranks},
            {"raster": state.raster, "latents": state.latents},
        )
        chunk = self._chunk
        for first in range(0, state.batch, chunk):
            rows = slice(first, min(first + chunk, state.batch))
            self.backend.launch("vae_decoder", {"latents": state.latents[rows]}, {"images": state.images[rows]})

    def encode(self, images: Array) -> Array:
        """images (B, H, W, 3) uint8 -> latents (B, channels, h, w) as the VAE makes them, a bounded number at a time."""
        backend, config, chunk = self.backend, self.config, self._chunk
        side, parts = config.grid_size * config.patch_size, []
        for first in range(0, len(images), chunk):
            some = images[first : first + chunk]
            latents = backend.empty((len(some), config.vae_embed_dim, side, side), "float32")
            backend.launch("vae_encoder", {"images": backend.upload(some)}, {"latents": latents})
            parts.append(backend.download(latents).copy())
        return np.concatenate(parts)

    @property
    def _chunk(self) -> int:
        """Images that the VAE takes at a time."""
        return 1 if self.backend.synchronous else max(1, DECODE_PIXELS // self.config.img_size**2)

    def fill(self, state: State, batch: Batch, seconds: Seconds) -> None:
        """Upload what a micro-batch needs; nothing more goes up until it is finished."""
        write, length = self.backend.write, self.config.seq_len
        write(state.order, batch.noise.order.T)
        write(state.ranks, np.argsort(batch.noise.order, 1))
        labels, others, weights = batch.classes.branches(state.branches)
        write(state.labels, labels)
        mixed = batch.classes.weights is not None
        if mixed or state.mixed:  # else the weights are zeros, and stay so
            write(state.mixed_labels, others)
            write(state.mixed_weights, weights)
        state.mixed = mixed
        write(state.guidance, batch.guidance_rows(length))
        write(state.temperature, batch.temperature_rows(length))
        self.backend.clear(state.tokens)  # not the previous micro-batch's
        if batch.known is not None:
            places = batch.noise.order[:, length - int(batch.known.counts[0]) :]
            given = np.take_along_axis(batch.known.tokens, places[:, :, None], 1).swapaxes(0, 1)  # (known, B, D)
            write(state.tokens[length - len(given) :], np.ascontiguousarray(given))
        if not batch.plan:
            return
        self.head.fill(state, batch)
        if state.guided and any(step.reuses or not step.guided for step in batch.plan):
            self._fill_alone(state, others, weights, mixed)
        with self._timed(seconds, "outer"):
            self.outer.fill(state, batch)

    def _fill_alone(self, state: State, others: Array, weights: Array, mixed: bool) -> None:
        """The same for launches without an unconditional branch."""
        if state.alone is None:
            state.alone = without_guidance(self.backend, state)
        if mixed or state.alone.mixed:
            self.backend.write(state.alone.mixed_labels, np.ascontiguousarray(others[:, :1]))
            self.backend.write(state.alone.mixed_weights, np.ascontiguousarray(weights[:, :1]))
        state.alone.mixed = mixed

    def _step(self, state: State, step: Step, seconds: Seconds) -> None:
        used = state.of(step)

        def launches() -> None:
            with self._timed(seconds, "outer"):
                z = self.outer.step(used, step)
            with self._timed(seconds, "inner"):
                self.head.draw(used, step, z)

        # Where the head draws otherwise from step to step, plans with and without known tokens may have one at another place.
        index = step.index if isinstance(state.drawing, tuple) else min(step.index, 1)
        self.backend.execute(state.owner, (replace(step, index=index), used.branches), launches)

    @contextmanager
    def state(self, batch: Batch) -> Iterator[State]:
        """Buffers that nobody else uses meanwhile: kept ones of this shape, or new ones."""
        # Rounded up, so that plans of about as many steps share them.
        most = max((step.count for step in batch.plan), default=0)
        count = min(self.config.seq_len, 1 << (most - 1).bit_length()) if most else 0
        shape = (len(batch), batch.branches, count, self.head.shape(batch) if count else None)
        state = next((s for s in reversed(self._idle) if (s.batch, s.branches, s.count, s.drawing) == shape), None)
        if state is not None:
            self._idle.remove(state)
        while len(self._idle) >= KEPT_STATES:
            self.backend.forget(self._idle.pop(0).owner)
        if state is None:
            state = allocate(self.backend, self.config, next(self._owners), *shape)
            if count:
                state.outer, state.head = self.outer.allocate(state), self.head.allocate(state, batch)
        try:
            yield state
        finally:
            self._idle.append(state)

    @contextmanager
    def _pace(self, watched: bool) -> Iterator[Callable[[], None]]:
        """What to call after every step, so that the device is at most one step behind; without ``watched``, nothing."""
        marks: list[Any] = []

        def step() -> None:
            if watched:
                marks.append(self.backend.mark())
            while len(marks) > 1:
                self.backend.wait(marks.pop(0))

        try:
            yield step
        finally:
            while marks:
                self.backend.wait(marks.pop())

    @contextmanager
    def _timed(self, seconds: Seconds, phase: str) -> Iterator[None]:
        """Count the time of a phase; where launches only enqueue, it would be that of the enqueueing: left out."""
        start = time.perf_counter()
        yield
        if self.backend.synchronous:
            _add(seconds, phase, start)


def _add(seconds: Seconds, phase: str, start: float) -> None:
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def check_graphs(graphs: Mapping[str, GraphInfo], config: ArinarConfig) -> None:
    """Raise BundleError where the graphs are not those of the model that the config describes."""
    outer = OUTERS[config.outer]
    if "outer_step" in graphs:
        check_interface(graphs["outer_step"], outer.INPUTS, config)
    missing = [name for name in (*outer.GRAPHS, *head_class(config).GRAPHS, *DECODING) if name not in graphs]
    if missing:
        raise BundleError(f"the bundle has no graph {', '.join(missing)}; export the model again")
