"""The outer step of both kinds of model: what it launches on which part of the state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from arinar.config import ArinarConfig
from arinar.schedule import Step

from .backends.base import Backend, Rows
from .bundle import BundleError, GraphInfo
from .cache import KVCache
from .first_step import MIXED, FirstStep
from .labels import MOST_CLASSES
from .request import Batch
from .state import State


class Outer(Protocol):
    """Made with (backend, graphs, config)."""

    def prepare(self, batch: int, branches: int) -> None:
        """Load the graphs."""

    def allocate(self, state: State) -> Any:
        """Buffers of this kind's own."""

    def fill(self, state: State, batch: Batch) -> None:
        """What has to be ready before the first step."""

    def step(self, state: State, step: Step) -> Any:
        """z (G, P, B, C) of the tokens that this step generates, conditional rows first."""


@dataclass
class Change:
    """What guidance changes in z, kept from step to step: (L, B, C) in generation order; and ``z`` (G * L * B, C) of launches
    that look ahead."""

    z: Any
    change: Any


class MaskedOuter:
    """Every step recomputes z from all visible tokens; with ``keep_first_step`` not the first, where none is known: what is
    kept of it (`first_step`) is uploaded with the rest of a micro-batch."""

    GRAPHS = ("outer_step",)
    INPUTS = ("visible_tokens", "visible_positions", "target_positions", "hidden_positions", "labels")
    # Axes of images, and of guidance branches.
    IMAGES: ClassVar = {**dict.fromkeys(INPUTS, 1), **dict.fromkeys(MIXED, 2), "z": 2}
    BRANCHES: ClassVar = {"labels": 0, **dict.fromkeys(MIXED, 1), "z": 0}

    def __init__(self, backend: Backend, graphs: Mapping[str, GraphInfo], config: ArinarConfig, keep_first_step: bool) -> None:
        self.backend, self.config = backend, config
        self.mixes = takes_mixed(graphs["outer_step"])
        self.first = FirstStep(backend, graphs, config, self.IMAGES, self.mixes)
        self.keep_first_step = keep_first_step and self.first.available

    def prepare(self, batch: int, branches: int) -> None:
        self.backend.prepare("outer_step", rows=batch * branches)
        if self.keep_first_step:
            self.first.prepare()

    def allocate(self, state: State) -> Any:
        return None

    def fill(self, state: State, batch: Batch) -> None:
        check_mixed(batch, self.mixes)
        if state.outer is None and any(step.reuses for step in batch.plan):
            length, images, width = self.config.seq_len, state.batch, self.config.z_width
            state.outer = Change(
                z=self.backend.empty((state.branches * length * images, width), "float32"),
                change=self.backend.empty((length, images, width), "float32"),
            )
        if self._kept(step := batch.plan[0]):
            used, targets = state.of(step), batch.noise.order.T[step.first :]
            self.backend.write(self._z(used, step), self.first.z(batch, used.branches, targets))

    def step(self, state: State, step: Step) -> Any:
        if step.reuses:
            return self._changed(state, step)
        z = self._z(state, step)
        if not self._kept(step):
            self._launch(state, step, z)
        return self._keep_change(state, step, z) if step.ahead else z

    def _launch(self, state: State, step: Step, z: Any) -> None:
        """z (G, P, B, C) of the tokens that are generated at this step, and before them those ``ahead``."""
        inputs = {
            "visible_tokens": state.tokens[step.masked :],
            "visible_positions": state.order[step.masked :],
            "target_positions": state.order[step.first : step.masked],
            "hidden_positions": state.order[: step.first],
            "labels": state.labels,
        }
        if self.mixes:
            inputs |= {"mixed_labels": state.mixed_labels, "mixed_weights": state.mixed_weights}
        self.backend.launch("outer_step", inputs, {"z": z}, Rows(self.IMAGES, self.BRANCHES))

    def _keep_change(self, state: State, step: Step, wide: Any) -> Any:
        """Of z (2, P, B, C) that looks ahead: the last rows of each branch are this step's; what guidance changes in the
        others is kept."""
        z = self._own(state, step)
        for source, target in zip(_branches(wide), _branches(z), strict=True):
            self.backend.copy(source[step.ahead :], target)
        cond, uncond = (branch[: step.ahead] for branch in _branches(wide))
        self.backend.add(uncond, cond, state.outer.change[step.first : step.remaining], -1.0)
        return z

    def _changed(self, state: State, step: Step) -> Any:
        """The conditional branch, and beside it the same with what guidance changed when both were computed last."""
        z = self._own(state, step)
        assert state.alone is not None
        self._launch(state.alone, step, z[:1])
        cond, uncond = _branches(z)
        self.backend.add(cond, state.outer.change[step.remaining : step.masked], uncond, 1.0)
        return z

    def _kept(self, step: Step) -> bool:
        return self.keep_first_step and step.masked == self.config.seq_len

    def _own(self, state: State, step: Step) -> Any:
        """Where the head reads z (G, P, B, C) of a step's tokens."""
        rows = state.branches * step.count * state.batch
        return state.z[:rows].reshape(state.branches, step.count, state.batch, self.config.z_width)

    def _z(self, state: State, step: Step) -> Any:
        """Where a launch writes it: (G, ahead + P, B, C)."""
        if not step.ahead:
            return self._own(state, step)
        count = step.ahead + step.count
        rows = state.branches * count * state.batch
        return state.outer.z[:rows].reshape(state.branches, count, state.batch, self.config.z_width)


@dataclass
class CausalBuffers:
    """Of a causal model: the image of each cache row, positions 0..L-1, the cache, the rows of the class buffer."""

    rows: Any
    positions: Any
    cache: KVCache
    prefix: dict[str, Any]


class CausalOuter:
    """One token a step, against a KV cache."""

    GRAPHS = ("outer_prefill", "outer_step")
    INPUTS = ("token", "rows", "position")

    def __init__(self, backend: Backend, graphs: Mapping[str, GraphInfo], config: ArinarConfig, keep_first_step: bool) -> None:
        self.backend, self.config, self.graph = backend, config, graphs["outer_step"]
        self.mixes = takes_mixed(graphs["outer_prefill"])

    def prepare(self, batch: int, branches: int) -> None:
        self.backend.prepare("outer_prefill", "outer_step")

    def allocate(self, state: State) -> CausalBuffers:
        backend, rows = self.backend, state.branches * state.batch
        cache = KVCache(backend, self.graph, rows)
        prefix = {}
        for tensor in self.graph.inputs:
            if tensor.name in cache.past:
                _, heads, _, head_dim = cache.past[tensor.name].shape
                prefix[tensor.name] = backend.empty((rows, heads, self.config.buffer_size, head_dim), tensor.dtype)
        return CausalBuffers(
            rows=backend.upload(np.tile(np.arange(state.batch, dtype=np.int64), state.branches)),
            positions=backend.upload(np.arange(self.config.seq_len, dtype=np.int64)),
            cache=cache,
            prefix=prefix,
        )

    def fill(self, state: State, batch: Batch) -> None:
        check_mixed(batch, self.mixes)

    def step(self, state: State, step: Step) -> Any:
        z = state.z[: state.branches * state.batch]
        known = self.config.seq_len - step.masked
        if step.index == 0:
            self._prefill(state, z)
        for position in range(known) if step.index == 0 else (known - 1,):  # first, all tokens that are given
            self._feed(state, position, z)
        return z.reshape(state.branches, 1, state.batch, self.config.z_width)

    def _prefill(self, state: State, z: Any) -> None:
        """The class buffer into the cache -> z of the first token."""
        own: CausalBuffers = state.outer
        present = {name.replace("past_key_values", "present", 1): value for name, value in own.prefix.items()}
        inputs = {"labels": state.labels.reshape(z.shape[0])}
        if self.mixes:
            shape = (MOST_CLASSES - 1, z.shape[0])
            inputs |= {name: getattr(state, name).reshape(*shape) for name in MIXED}
        self.backend.launch("outer_prefill", inputs, {"z": z, **present})
        own.cache.fill(own.prefix)

    def _feed(self, state: State, position: int, z: Any) -> None:
        """The token that ``position`` others came before into the cache -> z of the next."""
        own: CausalBuffers = state.outer
        place = self.config.seq_len - 1 - position  # generation runs from the end of the order to its start
        inputs = {
            "token": state.tokens[place : place + 1].reshape(state.batch, -1),
            "rows": own.rows,
            "position": own.positions[position : position + 1],
            **own.cache.past,
        }
        self.backend.launch("outer_step", inputs, {"z": z, **own.cache.present})
        own.cache.write(self.config.buffer_size + position)


#: By `config.outer`.
OUTERS: dict[str, type[MaskedOuter] | type[CausalOuter]] = {"masked": MaskedOuter, "causal": CausalOuter}


def _branches(z: Any) -> tuple[Any, Any]:
    """z (2, P, B, C) as (P, B, C) of each branch."""
    return z[:1].reshape(*z.shape[1:]), z[1:].reshape(*z.shape[1:])


def takes_mixed(graph: GraphInfo) -> bool:
    """Whether a graph takes several classes for an image; those of older versions do not."""
    return any(tensor.name == MIXED[0] for tensor in graph.inputs)


def check_mixed(batch: Batch, mixes: bool) -> None:
    """Raise BundleError where an image is to be of several classes, and the graphs take one."""
    if batch.classes.weights is not None and not mixes:
        raise BundleError(
            "this bundle's graphs take one class for each image (an older version of arinar wrote them); export the model "
            "again, or ask for images of one class"
        )


def check_interface(graph: GraphInfo, inputs: tuple[str, ...], config: ArinarConfig) -> None:
    """Raise BundleError where `outer_step` is not that of the model that the config describes."""
    names = [t.name for t in graph.inputs if not t.name.startswith("past_key_values.") and t.name not in MIXED]
    width = next((t.shape[-1] for t in graph.outputs if t.name == "z"), None)
    if names != list(inputs) or width != config.z_width:
        raise BundleError(
            f"graph 'outer_step' does not fit a {config.outer} model of width {config.z_width}: its inputs are "
            f"{', '.join(names)}, its z is {width} wide; export the model again"
        )
