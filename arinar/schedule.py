"""How many tokens each outer step generates, and how strongly it is guided. Plain Python, shared by all rooms.

Source: MAR's cosine mask schedule and linear guidance schedule, as ARINAR's published sampler uses them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CFG_SCHEDULES = ("linear", "constant")


@dataclass(frozen=True)
class Step:
    """One outer step: of ``masked`` unknown positions, all but ``remaining`` become known.

    With ``order`` (L,) of an image, the positions generated are ``order[remaining:masked]`` and those already
    known are ``order[masked:]``.
    """

    index: int
    masked: int
    remaining: int
    guidance_scale: float

    @property
    def count(self) -> int:
        """Positions that this step generates, per image."""
        return self.masked - self.remaining


def mask_counts(seq_len: int, num_iter: int) -> list[int]:
    """Unknown positions at the start of each step: ``num_iter`` integers, falling from ``seq_len``."""
    counts = [seq_len]
    for step in range(num_iter - 1):
        counts.append(_next_count(counts[-1], step, seq_len, num_iter))
    return counts


def _next_count(masked: int, step: int, seq_len: int, num_iter: int) -> int:
    cosine = math.floor(seq_len * math.cos(math.pi / 2.0 * (step + 1) / num_iter))
    return max(1, min(masked - 1, cosine))


def steps(seq_len: int, num_iter: int, guidance_scale: float, cfg_schedule: str = "linear") -> list[Step]:
    """The outer steps of one image.

    The linear schedule guides step s by ``1 + (guidance_scale - 1) * (L - next) / L`` with ``next`` the unknown
    count after the step, never below 1, at the last step too (so the full scale is never quite reached).

    Raises ValueError for a ``num_iter`` outside 1..seq_len, or an unknown schedule.
    """
    if not 1 <= num_iter <= seq_len:
        raise ValueError(f"num_iter is {num_iter}; expected 1..{seq_len} (one token a step at most)")
    if cfg_schedule not in CFG_SCHEDULES:
        raise ValueError(f"cfg_schedule is {cfg_schedule!r}; choose one of {', '.join(CFG_SCHEDULES)}")
    counts = mask_counts(seq_len, num_iter)
    plan = []
    for index, masked in enumerate(counts):
        clamped = _next_count(masked, index, seq_len, num_iter)
        scale = guidance_scale
        if cfg_schedule == "linear":
            scale = 1.0 + (guidance_scale - 1.0) * (seq_len - clamped) / seq_len
        plan.append(Step(index, masked, 0 if index == num_iter - 1 else clamped, scale))
    return plan
