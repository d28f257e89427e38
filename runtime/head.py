"""What the loop needs of a head, which turns z into tokens, and the choice of one by the model's config.

A head is: condition once, then draws one after another until the token is whole.
"""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Mapping
from typing import Any, Protocol

from arinar.config import ArinarConfig
from arinar.schedule import Step

from .backends.base import Array
from .request import Batch
from .state import State

#: Name in the config -> module of this package and class.
HEADS: dict[str, tuple[str, str]] = {
    "gmm": ("gmm_head", "GmmHead"),
    "diffusion": ("diffusion_head", "DiffusionHead"),
}


class Head(Protocol):
    """Made with (backend, graphs, config, mode); ``mode`` is one of the head's MODES, or None: the head chooses."""

    MODES: tuple[str, ...]
    mode: str

    @staticmethod
    def unread(graph: str, inputs: Mapping[str, Array]) -> set[str]:
        """Inputs that a launch is given but does not read: what is in them is left over from somewhere."""

    def graphs(self, guided: bool) -> list[str]:
        """Names of the graphs that drawing launches."""

    def prepare(self, guided: bool, batch: int) -> None:
        """Load them."""

    def shape(self, batch: Batch) -> Hashable:
        """What the head's buffers and launches depend on besides the numbers of images, branches and tokens a step."""

    def allocate(self, state: State, batch: Batch) -> Any:
        """Buffers of the head's own, for micro-batches of the state's numbers and this one's shape."""

    def fill(self, state: State, batch: Batch) -> None:
        """Upload what a micro-batch's draws need."""

    def draw(self, state: State, step: Step, z: Any) -> None:
        """z (G * P, B, C) of the tokens that a step generates, conditional rows first -> the tokens, into the state."""

    def law(self, z: Array, tokens: Array, images: int | None = None) -> tuple[Array, ...]:
        """What every draw is drawn from, with given tokens forced: z (N, C), tokens (N, D) -> the parts of the law, each
        (N, S, ...) for S draws a token. ``images``: rows are (anything, images), and computed as in `draw`."""


def head_class(config: ArinarConfig) -> Any:
    module, name = HEADS[config.head]
    return getattr(importlib.import_module(f".{module}", __package__), name)
