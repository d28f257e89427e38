"""The law of a head's draws: all that noise, parity, reports and calibration know of a head. NumPy only."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import ArinarConfig

Array = npt.NDArray[Any]
#: The parameters of a law's draws by part, each (..., S, ...) for S draws a token.
Parts = tuple[Array, ...]


@dataclass(frozen=True)
class Law:
    """What one draw of a token's S draws follows, and the random numbers that it takes.

    draw : what is drawn at one time, in a word; for people.
    parts : names of the parameters, in the order in which they are passed; titles : what each is, for people.
    kl : KL(p || q) of parts p and q, per draw: (...) in nats, at least 0.
    pick : draws (...), parts -> the alternative (0 to ``picks(config)`` - 1) that each most probably took; picks: how many
        a draw has (1: there is nothing to pick).
    noise : name of the random numbers; size: how many a feature takes; make: (generator, shape) -> float32 of that shape,
        its last axis ``size``; check: raises ValueError for numbers out of range.
    """

    draw: str
    parts: tuple[str, ...]
    titles: dict[str, str]
    kl: Callable[[Parts, Parts], Array]
    pick: Callable[[Array, Parts], Array]
    picks: Callable[[ArinarConfig], int]
    noise: str
    size: Callable[[ArinarConfig], int]
    make: Callable[[np.random.Generator, tuple[int, ...]], npt.NDArray[np.float32]]
    check: Callable[[Array], None]


#: Head, as the config names it -> module of this package that holds its `LAW`.
LAWS = {"gmm": "gmm_law", "diffusion": "diffusion_law"}


def law_of(config: ArinarConfig) -> Law:
    law: Law = importlib.import_module(f".{LAWS[config.head]}", __package__).LAW
    return law
