"""The buffers of a micro-batch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

from arinar.config import ArinarConfig
from arinar.schedule import Step

from .backends.base import Backend
from .labels import MOST_CLASSES


@dataclass(eq=False)
class State:
    """Buffers of micro-batches of one shape, made once and used for every such micro-batch, in generation order, position
    first: everything that a step reads or writes is then a contiguous slice.

    Their addresses never change, so a backend may record the launches on them (under ``owner``) and replay them.
    Letters as in `arinar.export.steps`: B images, G branches, L tokens, D features, C outer width; ``count``: most
    positions of a step; 0 where nothing is generated, only decoded (then without the buffers of outer and head);
    ``drawing``: what the head's buffers and launches depend on besides (`Head.shape`).
    """

    owner: int
    batch: int
    branches: int
    count: int
    drawing: Hashable
    # What goes up per micro-batch.
    order: Any  # (L, B) int64
    ranks: Any  # (B, L) int64, where in the order each grid position stands
    labels: Any  # (G, B) int64
    mixed_labels: Any  # (MOST_CLASSES - 1, G, B) int64, further classes
    mixed_weights: Any  # the same shape, their weights
    guidance: Any  # (L, B), of the step at which the token is drawn
    temperature: Any  # (L, B)
    # What is computed.
    tokens: Any  # (L, B, D), in generation order; those that are not known yet are zero
    z: Any  # (G * count * B, C)
    raster: Any  # (B, L, D) tokens, raster order
    latents: Any  # (B, channels, h, w)
    images: Any  # (B, H, W, 3) uint8
    # Whether an image of the micro-batch is of several classes.
    mixed: bool = False
    # Of the outer model's kind, and of the head's.
    outer: Any = None
    head: Any = None
    # The same buffers for launches without an unconditional branch, in a plan that has both kinds.
    alone: State | None = None

    @property
    def guided(self) -> bool:
        return self.branches == 2

    def of(self, step: Step) -> State:
        """What a step is taken on."""
        return self.alone if self.guided and not step.guided and self.alone is not None else self


def allocate(
    backend: Backend, config: ArinarConfig, owner: int, batch: int, branches: int, count: int, drawing: Hashable
) -> State:
    """Buffers of every model; outer and head add their own."""
    length, features, side = config.seq_len, config.token_dim, config.grid_size * config.patch_size
    return State(
        owner=owner,
        batch=batch,
        branches=branches,
        count=count,
        drawing=drawing,
        order=backend.empty((length, batch), "int64"),
        ranks=backend.empty((batch, length), "int64"),
        labels=backend.empty((branches, batch), "int64"),
        mixed_labels=backend.empty((MOST_CLASSES - 1, branches, batch), "int64"),
        mixed_weights=backend.empty((MOST_CLASSES - 1, branches, batch), "float32"),
        guidance=backend.empty((length, batch), "float32"),
        temperature=backend.empty((length, batch), "float32"),
        tokens=backend.empty((length, batch, features), "float32"),
        z=backend.empty((branches * max(1, count) * batch, config.z_width), "float32"),
        raster=backend.empty((batch, length, features), "float32"),
        latents=backend.empty((batch, config.vae_embed_dim, side, side), "float32"),
        images=backend.empty((batch, config.img_size, config.img_size, 3), "uint8"),
    )


def without_guidance(backend: Backend, state: State) -> State:
    """A state of the conditional branch alone, on the same buffers; what has branches on an inner axis gets its own."""
    shape = (MOST_CLASSES - 1, 1, state.batch)
    return replace(
        state,
        branches=1,
        labels=state.labels[:1],
        mixed_labels=backend.empty(shape, "int64"),
        mixed_weights=backend.empty(shape, "float32"),
    )
