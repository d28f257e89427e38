"""How many tokens each outer step generates, and how strongly it is guided. Plain Python, shared by all rooms.

Source: MAR's cosine mask schedule and linear guidance schedule, as ARINAR's published sampler uses them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

from .text import shown

CFG_SCHEDULES = ("linear", "constant")


# A number, or an array of them.
Scale = TypeVar("Scale")


@dataclass(frozen=True)
class Step:
    """One outer step: of ``masked`` unknown positions, all but ``remaining`` become known.

    With ``order`` (L,) of an image, the positions generated are ``order[remaining:masked]`` and those already
    known are ``order[masked:]``.
    """

    index: int
    masked: int
    remaining: int

    @property
    def count(self) -> int:
        """Positions that this step generates, per image."""
        return self.masked - self.remaining


def mask_counts(seq_len: int, num_iter: int) -> list[int]:
    """Unknown positions at the start of each step: ``num_iter`` integers, falling from ``seq_len``."""
    counts = [seq_len]
    for step in range(num_iter - 1):
        cosine = math.floor(seq_len * math.cos(math.pi / 2.0 * (step + 1) / num_iter))
        counts.append(max(1, min(counts[-1] - 1, cosine)))
    return counts


def steps(seq_len: int, num_iter: int, unknown: int | None = None) -> list[Step]:
    """The outer steps of one image. Raises ValueError for a ``num_iter`` outside 1..seq_len.

    ``unknown``: how many tokens are to be generated, where others are given; default all. The schedule is then that of so
    many tokens, in ``num_iter`` steps or, where they are fewer, one step for each; none take no step.
    """
    if not 1 <= num_iter <= seq_len:
        raise ValueError(f"num_iter is {num_iter}; expected 1..{seq_len} (one token a step at most)")
    unknown = seq_len if unknown is None else unknown
    if not unknown:
        return []
    num_iter = min(num_iter, unknown)
    counts = [*mask_counts(unknown, num_iter), 0]
    return [Step(index, counts[index], counts[index + 1]) for index in range(num_iter)]


def guidance_at(step: Step, seq_len: int, guidance_scale: Scale, cfg_schedule: str) -> Scale:
    """How strongly a step is guided, for one ``guidance_scale`` or an array of them.

    The linear schedule guides by ``1 + (guidance_scale - 1) * (L - next) / L`` with ``next`` the unknown count after
    the step, never below 1, at the last step too (so the full scale is never quite reached).
    """
    if cfg_schedule == "constant":
        return guidance_scale
    scale: Any = guidance_scale
    guided: Scale = 1.0 + (scale - 1.0) * (seq_len - max(1, step.remaining)) / seq_len
    return guided


def check_cfg_schedule(cfg_schedule: str, name: str = "cfg_schedule") -> str:
    """Raise ValueError for an unknown schedule; ``name`` is what the value is called."""
    if not isinstance(cfg_schedule, str) or cfg_schedule not in CFG_SCHEDULES:
        raise ValueError(f"{name} is {shown(cfg_schedule)}; choose one of {', '.join(CFG_SCHEDULES)}")
    return cfg_schedule
