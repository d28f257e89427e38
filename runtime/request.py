"""What is asked for: the one place where sampling arguments are checked and take their defaults, and the micro-batches
that the loop sees of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from arinar.class_names import UNCONDITIONAL
from arinar.config import ArinarConfig
from arinar.schedule import (
    ALWAYS,
    COSINE,
    Stages,
    Step,
    check_cfg_schedule,
    check_guidance_interval,
    checkerboard,
    guidance_at,
    stages_of,
    steps,
)
from arinar.text import shown
from arinar.values import is_whole, number

from .bundle import Defaults
from .known import Known
from .labels import Labels
from .noise import Noise, check_seed

# Images of a micro-batch where the caller does not say: about this many tokens at a time.
DEFAULT_BATCH_TOKENS = 1024
#: Images of a micro-batch at most: they are in memory at one time, short batches too, and many more gain nothing.
MOST_AT_A_TIME = 4096


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B images: all that the loop knows of a request.

    classes : what each is to be of. noise : of B images. guidance_scale, temperature : (B,) float64, image by image.
    cfg_schedule : how guidance grows over the steps. plan : the outer steps. sampling_steps : of a diffusion head, as
    `arinar.diffusion_schedule.respacings` reads it. known : tokens that are given, as many of every image; their positions
    are the end of the noise's order.

    All of it is guided or none: where no image has a guidance above 1, no unconditional row is computed; nor is one at a step
    that is not guided.
    """

    classes: Labels
    noise: Noise
    guidance_scale: npt.NDArray[np.float64]
    temperature: npt.NDArray[np.float64]
    cfg_schedule: str
    plan: list[Step]
    sampling_steps: str = ""
    known: Known | None = None

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """(B,): the class of each, or the first of several."""
        return self.classes.ids

    @property
    def guided(self) -> bool:
        return bool((self.guidance_scale != 1.0).any()) and any(step.guided for step in self.plan)

    @property
    def branches(self) -> int:
        return 2 if self.guided else 1

    def guidance_rows(self, length: int) -> npt.NDArray[np.float32]:
        """(L, B) in generation order: how strongly each token is guided."""
        rows = np.ones((length, len(self)), np.float32)
        for step in self.plan:
            if step.guided:
                rows[step.remaining : step.masked] = guidance_at(step, length, self.guidance_scale, self.cfg_schedule)
        return rows

    def temperature_rows(self, length: int) -> npt.NDArray[np.float32]:
        """(L, B) in generation order."""
        return np.broadcast_to(self.temperature.astype(np.float32), (length, len(self)))


@dataclass(frozen=True)
class Sampling:
    """A request for n images, checked, every default filled in. Made by :meth:`resolve`.

    config: the model's, with the request's sampling steps; classes: what each is to be of; guidance_scale, temperature (n,)
    float64; indices (n,): the images' places in the seed's sequence; noise: every random number, where the caller gave it;
    known: tokens that are given; batch_size: images of a micro-batch, size: the same where the caller did not say (short
    ones are then not filled up); schedule, guidance_interval, guidance_refresh: which tokens a step generates, which steps are
    guided, and how many of these share an unconditional branch.
    """

    config: ArinarConfig
    classes: Labels
    guidance_scale: npt.NDArray[np.float64]
    temperature: npt.NDArray[np.float64]
    cfg_schedule: str
    num_iter: int
    seed: int
    indices: list[int]
    noise: Noise | None
    batch_size: int | None
    size: int
    known: Known | None = None
    schedule: str = COSINE
    guidance_interval: tuple[float, float] = ALWAYS
    guidance_refresh: int = 1

    @classmethod
    def resolve(
        cls,
        config: ArinarConfig,
        defaults: Defaults,
        labels: Any,
        *,
        guidance_scale: Any = None,
        cfg_schedule: str | None = None,
        temperature: Any = None,
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
    ) -> Sampling:
        """Arguments as for `Pipeline.generate`. Raises ValueError naming the first that is wrong."""
        config = with_sampling_steps(config, sampling_steps)
        ids = Labels.of(labels, config)
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        heat = defaults.temperature if temperature is None else temperature
        if isinstance(indices, str) or not (indices is None or isinstance(indices, (Sequence, np.ndarray))):
            raise ValueError(f"indices is {shown(indices)}; expected a list of integers, one per label")
        if noise is not None and not isinstance(noise, Noise):
            raise ValueError(f"noise is {shown(noise)}; expected a Noise, e.g. of Noise.from_seed, of len(labels) images")
        places = list(range(len(ids))) if indices is None else list(indices)
        if len(places) != len(ids):
            raise ValueError(f"indices has {len(places)} values for {len(ids)} labels; give one per label")
        if noise is not None:
            if indices is not None:
                raise ValueError("indices and noise exclude each other: the noise of an image is all that its index decides")
            noise.check(len(ids), config)
        else:
            check_seed(seed, places)
        if known is not None:
            if not isinstance(known, Known):
                raise ValueError(f"known is {shown(known)}; expected a Known of len(labels) images")
            known.check(len(ids), config)
        scales = per_label("guidance_scale", scale, len(ids), 1.0)
        scales[ids.ids == UNCONDITIONAL] = 1.0  # both branches would be the same
        schedule = COSINE if schedule is None else schedule
        stages = check_schedule(schedule, num_iter, config, known)
        return cls(
            config=config,
            classes=ids,
            guidance_scale=scales,
            temperature=per_label("temperature", heat, len(ids), 0.0, strict=True),
            cfg_schedule=check_cfg_schedule(defaults.cfg_schedule if cfg_schedule is None else cfg_schedule),
            num_iter=sum(number for _, number in stages) or check_num_iter(num_iter, defaults.num_iter, config),
            seed=seed,
            indices=places,
            noise=noise,
            batch_size=batch_size,
            size=check_batch_size(batch_size, len(ids), config),
            known=known,
            schedule=schedule,
            guidance_interval=check_interval(ALWAYS if guidance_interval is None else guidance_interval, config),
            guidance_refresh=check_refresh(1 if guidance_refresh is None else guidance_refresh, config),
        )

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """(n,): the class of each, or the first of several."""
        return self.classes.ids

    @property
    def unknown(self) -> npt.NDArray[np.int64]:
        """(n,): how many tokens of each image are to be generated."""
        length = np.full(len(self), self.config.seq_len)
        return length if self.known is None else length - self.known.counts

    @property
    def sampling_steps(self) -> str | None:
        """Of a diffusion head."""
        return self.config.sampling_steps if self.config.head == "diffusion" else None

    def settings(self, row: int = 0) -> dict[str, Any]:
        """What determines image ``row``, its label, seed and index left out. JSON-ready."""
        own = {} if self.sampling_steps is None else {"sampling_steps": self.sampling_steps}
        return {
            "guidance_scale": float(self.guidance_scale[row]),
            "cfg_schedule": self.cfg_schedule,
            "temperature": float(self.temperature[row]),
            "num_iter": self.num_iter,
            **own,
            **({} if self.schedule == COSINE else {"schedule": self.schedule}),
            **({} if self.guidance_interval == ALWAYS else {"guidance_interval": list(self.guidance_interval)}),
            **({} if self.guidance_refresh == 1 else {"guidance_refresh": self.guidance_refresh}),
        }

    def batches(self) -> Iterator[Part]:
        """The micro-batches. Guided images share none with others, so that an image is computed alike whatever is beside
        it; nor do images of which different numbers of tokens are known: their plans differ. With a ``batch_size``, its
        place in a micro-batch is that of its index, for the same reason."""
        kinds = np.stack([self.config.seq_len - self.unknown, self.guidance_scale != 1.0], 1)
        groups = [np.flatnonzero((kinds == kind).all(1)) for kind in np.unique(kinds, axis=0)]
        if self.batch_size is None:
            for group in groups:
                for start in range(0, len(group), self.size):
                    yield self._part(group[start : start + self.size].tolist())
            return
        for start in range(0, len(self), self.size):
            for group in groups:
                if here := group[(start <= group) & (group < start + self.size)].tolist():
                    yield self._part(here, start)

    def _part(self, rows: list[int], start: int | None = None) -> Part:
        """Images ``rows`` as a micro-batch: one after another, or each in its place after ``start``."""
        if start is None:
            return Part(rows, list(range(len(rows))), self.batch(rows))
        places = [row - start for row in rows]
        filled = [rows[-1]] * self.size
        for place, row in zip(places, rows, strict=True):
            filled[place] = row
        return Part(rows, places, self.batch(filled))

    def batch(self, rows: Sequence[int] | None = None) -> Batch:
        """Images ``rows`` (all of them) as one micro-batch, its noise made now. As many tokens of each must be known."""
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows)
        if self.noise is not None:
            noise = self.noise[chosen]
        else:
            noise = Noise.from_seed(self.seed, [self.indices[row] for row in chosen], self.config)
        (unknown,) = set(self.unknown[chosen].tolist())
        known = None
        if self.known is not None and unknown < self.config.seq_len:
            known = self.known[chosen]
            noise = replace(noise, order=known.last(noise.order))
        stages = stages_of(self.schedule, self.config.grid_size)
        if stages:
            noise = replace(noise, order=staged(noise.order, self.config, len(stages)))
        scales = self.guidance_scale[chosen]
        return Batch(
            self.classes[chosen],
            noise,
            scales,
            self.temperature[chosen],
            self.cfg_schedule,
            steps(
                self.config.seq_len,
                self.num_iter,
                unknown,
                stages=stages,
                guidance_interval=self.guidance_interval,
                guidance_refresh=self.guidance_refresh if (scales != 1.0).any() else 1,
            ),
            self.config.sampling_steps,
            known,
        )


class Part(NamedTuple):
    """A micro-batch of a request: which images are in it, their places there, and the micro-batch; its other places are
    padding."""

    rows: list[int]
    places: list[int]
    batch: Batch


def with_sampling_steps(config: ArinarConfig, value: Any) -> ArinarConfig:
    """The config with so many sampling steps, of a diffusion head; None: as it is."""
    if value is None:
        return config
    if config.head != "diffusion":
        raise ValueError(f"sampling_steps is {shown(value)}; this model's head draws each feature at once: leave it out")
    return config.replace(sampling_steps=value)


def per_label(name: str, value: Any, count: int, least: float, *, strict: bool = False) -> npt.NDArray[np.float64]:
    """A number, or one for each label, as (count,) float64. Raises ValueError naming the one that is wrong."""
    if isinstance(value, np.ndarray) and value.ndim <= 1:
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return np.full(count, number(name, value, least, strict=strict))
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values for {count} labels; give one number, or one for each label")
    return np.array([number(f"{name}[{row}]", item, least, strict=strict) for row, item in enumerate(value)])


def check_schedule(value: Any, num_iter: Any, config: ArinarConfig, known: Known | None) -> Stages:
    """The stages of a schedule. Raises ValueError where it has no meaning."""
    stages = stages_of(value, config.grid_size)
    if stages and config.outer == "causal":
        raise ValueError(f"schedule is {shown(value)}; a causal model has one order, a token a step: leave it out")
    if stages and known is not None:
        raise ValueError(f"schedule is {shown(value)}; where tokens are known, those left have no such sets: leave it out")
    number = sum(count for _, count in stages)
    if stages and num_iter not in (None, number):
        raise ValueError(f"num_iter is {shown(num_iter)}, schedule {value} has {number} steps: leave num_iter out")
    return stages


def check_interval(value: Any, config: ArinarConfig) -> tuple[float, float]:
    interval = check_guidance_interval(value)
    if interval != ALWAYS:
        _check_branches("guidance_interval", value, config)
    return interval


def check_refresh(value: Any, config: ArinarConfig) -> int:
    if not is_whole(value) or not 1 <= value <= config.seq_len:
        raise ValueError(f"guidance_refresh is {shown(value)}; expected an integer from 1 (none is reused) to {config.seq_len}")
    if value != 1:
        _check_branches("guidance_refresh", value, config)
    return int(value)


def _check_branches(name: str, value: Any, config: ArinarConfig) -> None:
    """Raise ValueError where no step may do without the unconditional branch."""
    if config.outer == "causal":
        raise ValueError(
            f"{name} is {shown(value)}; a causal model's unconditional branch needs every token in its cache: leave it out"
        )


def staged(order: npt.NDArray[np.int64], config: ArinarConfig, sets: int) -> npt.NDArray[np.int64]:
    """Orders (B, L) with the first set's tokens at the end, where generation starts, each set in the order it had."""
    places = np.array(checkerboard(config.grid_size, sets))
    return np.take_along_axis(order, np.argsort(-places[order], axis=1, kind="stable"), 1)


def check_num_iter(value: Any, default: int, config: ArinarConfig) -> int:
    length = config.seq_len
    if config.outer == "causal":
        if value is not None and (not is_whole(value) or value != length):
            raise ValueError(f"num_iter is {shown(value)}; a causal model generates one token a step: {length}, or None")
        return length
    value = default if value is None else value
    if not is_whole(value) or not 1 <= value <= length:
        raise ValueError(f"num_iter is {shown(value)}; expected an integer from 1 to {length} (one token a step at most)")
    return int(value)


def check_batch_size(value: Any, count: int, config: ArinarConfig) -> int:
    if value is None:
        return min(count, max(1, DEFAULT_BATCH_TOKENS // config.seq_len))
    if not is_whole(value) or not 1 <= value <= MOST_AT_A_TIME:
        raise ValueError(
            f"batch_size is {shown(value)}; expected an integer from 1 to {MOST_AT_A_TIME} (images in memory at one time; more "
            f"labels than that are made in several batches)"
        )
    return int(value)
