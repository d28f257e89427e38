"""Which tokens each outer step generates, and how strongly it is guided. Plain Python, shared by all rooms.

Sources: MAR's cosine mask schedule and linear guidance schedule, as ARINAR's published sampler uses them. Staged orders:
GtR (arXiv 2510.17171), a coarse checkerboard first and slowly, what lies between it last and quickly. Guidance in an interval:
arXiv 2404.07724.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from .text import shown

CFG_SCHEDULES = ("linear", "constant")
#: The published schedule: a random order, the cosine's counts.
COSINE = "cosine"
#: Guided at every step.
ALWAYS = (0.0, 1.0)
#: Tokens and steps of each set of a staged order, first set first; none: the order is not staged.
Stages = tuple[tuple[int, int], ...]

# A number, or an array of them.
Scale = TypeVar("Scale")


@dataclass(frozen=True)
class Step:
    """One outer step: of ``masked`` unknown positions, all but ``remaining`` become known.

    With ``order`` (L,) of an image, the positions generated are ``order[remaining:masked]`` and those already
    known are ``order[masked:]``. ``guided``: whether it is, in an image that has guidance.

    Where what guidance changes in z is kept for some steps: ``ahead``: positions below ``remaining``, of the steps that follow,
    at which it is computed too; ``reuses``: whether this step takes what was kept, and computes no unconditional branch.
    """

    index: int
    masked: int
    remaining: int
    guided: bool = True
    ahead: int = 0
    reuses: bool = False

    @property
    def count(self) -> int:
        """Positions that this step generates, per image."""
        return self.masked - self.remaining

    @property
    def first(self) -> int:
        """Of the positions at which z is computed, ``order[first:masked]``, the first."""
        return self.remaining - self.ahead


def mask_counts(seq_len: int, num_iter: int) -> list[int]:
    """Unknown positions at the start of each step: ``num_iter`` integers, falling from ``seq_len``."""
    counts = [seq_len]
    for step in range(num_iter - 1):
        cosine = math.floor(seq_len * math.cos(math.pi / 2.0 * (step + 1) / num_iter))
        counts.append(max(1, min(counts[-1] - 1, cosine)))
    return counts


def steps(
    seq_len: int,
    num_iter: int,
    unknown: int | None = None,
    *,
    stages: Stages = (),
    guidance_interval: tuple[float, float] = ALWAYS,
    guidance_refresh: int = 1,
) -> list[Step]:
    """The outer steps of one image. Raises ValueError for a ``num_iter`` outside 1..seq_len.

    ``unknown``: how many tokens are to be generated, where others are given; default all. The schedule is then that of so
    many tokens, in ``num_iter`` steps or, where they are fewer, one step for each; none take no step.
    ``stages``: of a staged order, whose steps are as many as the stages say.
    ``guidance_interval``: a step is guided where the share of tokens known before it is at least the first, below the second.
    ``guidance_refresh``: of so many guided steps the first computes both branches, the others reuse their difference.
    """
    if not 1 <= num_iter <= seq_len:
        raise ValueError(f"num_iter is {num_iter}; expected 1..{seq_len} (one token a step at most)")
    unknown = seq_len if unknown is None else unknown
    if not unknown:
        return []
    counts = _staged_counts(stages) if stages else [*mask_counts(unknown, min(num_iter, unknown)), 0]
    low, high = guidance_interval
    pairs = itertools.pairwise(counts)
    plan = [
        Step(index, masked, remaining, low <= (seq_len - masked) / seq_len < high)
        for index, (masked, remaining) in enumerate(pairs)
    ]
    return plan if guidance_refresh == 1 else _refreshed(plan, guidance_refresh)


def _refreshed(plan: list[Step], refresh: int) -> list[Step]:
    found = list(plan)
    guided = [step.index for step in plan if step.guided]  # one stretch of the plan
    for first in guided[::refresh]:
        group = [index for index in guided if first <= index < first + refresh]
        found[first] = replace(plan[first], ahead=plan[first].remaining - plan[group[-1]].remaining)
        for index in group[1:]:
            found[index] = replace(plan[index], reuses=True)
    return found


def _staged_counts(stages: Stages) -> list[int]:
    """Unknown positions before each step and after the last: a set's tokens are divided evenly among its steps."""
    left = sum(tokens for tokens, _ in stages)
    counts = [left]
    for tokens, number in stages:
        counts += [left - tokens * (step + 1) // number for step in range(number)]
        left -= tokens
    return counts


def stages_of(schedule: str, side: int) -> Stages:
    """``cosine``: (); ``staged:64x24,64x6,128x2``: tokens x steps of each set of :func:`checkerboard`, first set first.

    Raises ValueError for another text, for sets of other sizes than a grid of ``side`` x ``side`` has, and for more steps
    than a set has tokens.
    """
    if schedule == COSINE:
        return ()
    kind, _, listed = schedule.partition(":") if isinstance(schedule, str) else ("", "", "")
    found = [re.fullmatch(r"(\d{1,6})x(\d{1,6})", item.strip()) for item in listed.split(",")]
    if kind != "staged" or not all(found) or 2 ** (len(found) - 1) > side:
        raise ValueError(
            f"schedule is {shown(schedule)}; choose {COSINE}, or staged:TOKENSxSTEPS,... with a set of tokens after another, "
            f"e.g. {_example(side)}"
        )
    stages = tuple((int(match[1]), int(match[2])) for match in found if match)
    sizes = _sizes(side, len(stages))
    if [tokens for tokens, _ in stages] != sizes or not all(1 <= number <= tokens for tokens, number in stages):
        wanted = ", ".join(map(str, sizes))
        raise ValueError(
            f"schedule is {shown(schedule)}; {len(stages)} sets of {side * side} tokens have {wanted} of them, each "
            f"in 1 step at least and in one a token at most, e.g. {_example(side)}"
        )
    return stages


def checkerboard(side: int, sets: int) -> list[int]:
    """Of each grid position (side * side, raster order), the set that it is in, 0 first: the last set are the black fields
    of a chessboard, half of the tokens; the set before it every second diagonal of the white ones; and so on."""
    found = []
    for row in range(side):
        for column in range(side):
            diagonal = row + column
            halvings = next((n for n in range(sets - 1) if diagonal >> n & 1), sets - 1)
            found.append(sets - 1 - halvings)
    return found


def _sizes(side: int, sets: int) -> list[int]:
    places = checkerboard(side, sets)
    return [places.count(number) for number in range(sets)]


def _example(side: int) -> str:
    sizes = _sizes(side, 3 if side >= 4 else 1)
    numbers = [max(1, size * share // 64) for size, share in zip(sizes, (24, 6, 1), strict=False)]
    return "staged:" + ",".join(f"{size}x{number}" for size, number in zip(sizes, numbers, strict=True))


def check_guidance_interval(value: Any) -> tuple[float, float]:
    """Two shares of known tokens, 0 <= low < high <= 1. Raises ValueError for anything else."""
    pair = tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(pair) != 2 or not all(isinstance(share, (int, float)) and not isinstance(share, bool) for share in pair):
        raise ValueError(f"guidance_interval is {shown(value)}; expected two shares of known tokens, e.g. (0.2, 1.0)")
    low, high = float(pair[0]), float(pair[1])
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"guidance_interval is {shown(value)}; expected 0 <= low < high <= 1 (for no guidance at all, guidance_scale 1)"
        )
    return low, high


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
