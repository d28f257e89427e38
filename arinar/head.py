"""What a model needs of its head, which turns z into tokens: a loss, and the draw of a token.

A head is: condition once, then draws one after another until the token is whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """How M tokens are drawn.

    guidance_scale, temperature : (M,), at least 1 and above 0. draws : (M, D, U) random numbers, as
    `arinar.law.Law.make` makes them: then what is drawn is what the deployed graphs draw. None: the published code's
    draws, from ``generator``. law : what the draws' law depends on besides the config, as a bundle's manifest tells.
    sampling_steps : of a diffusion head, at this outer step (`arinar.diffusion_schedule.kept_timesteps`); None: the config's.
    recorded : whether the parts of the law are wanted.
    """

    guidance_scale: Tensor
    temperature: Tensor
    generator: torch.Generator
    draws: Tensor | None = None
    law: Mapping[str, int] = field(default_factory=dict)
    sampling_steps: str | None = None
    recorded: bool = True


class Drawn(NamedTuple):
    """M tokens (M, D), and the parts of the law that each of their S draws followed, each (M, S, ...): of the conditional
    branch, and of the unconditional one where there is guidance. (Empty where they were not wanted and cost something.)"""

    tokens: Tensor
    cond: tuple[Tensor, ...]
    uncond: tuple[Tensor, ...] | None


class Head(Protocol):
    """A module made with (config); rows are tokens. REPEATS: how often a training step takes the loss of each token."""

    REPEATS: int

    def initialize(self, generator: torch.Generator) -> None:
        """Random weights, in place, of what does not begin as every linear layer does; without gradient."""

    def loss(self, z: Tensor, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """z (N, C), tokens (N, D) -> training loss (N,); what is random in it comes from ``generator`` (on the CPU)."""

    def draw(self, z_cond: Tensor, z_uncond: Tensor | None, how: Draw, forced: Tensor | None = None) -> Drawn:
        """z (M, C) of the branches -> tokens; ``forced`` (M, D) takes the place of what would be drawn."""


def wide(value: Tensor) -> Tensor:
    """In float32 at least (under autocast, and in half precision, it comes in less). float64 stays: only there can a saving be
    told from a rounding error."""
    return value if value.dtype == torch.float64 else value.float()
