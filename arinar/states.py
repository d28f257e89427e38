"""The state dicts of a file: peeled of what wrapped the model when it was saved, and averaged weights looked at."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .checkpoint_files import CheckpointError, Contents, bare_name, some

#: An entry that every model has, and one that every autoencoder has: what stands before its name is a wrapper's.
MODEL_LANDMARK = "z_proj.weight"
VAE_LANDMARK = "post_quant_conv.weight"

# Averaged weights that have moved less than this part of the raw ones' way are taken for hardly averaged at all.
_LEAST_WAY = 0.25
# Averaged weights this much larger or smaller than the raw ones do not belong to them.
_MOST_SCALE = 2.0
# Values of a tensor that are looked at: the files are mapped, so the raw weights are not read as a whole.
_SAMPLE = 1 << 14


def has_landmark(state: Mapping[str, Any], landmark: str) -> bool:
    return any(name == landmark or str(name).endswith("." + landmark) for name in state)


def unwrapped(path: Path, contents: Contents, landmark: str) -> Contents:
    """The contents with every state dict peeled of its wrappers' prefixes (``model.``, ``net.``, ``ema.``, ...).

    A state dict that holds a model twice, under an average's name and another, gives ``model_ema`` and ``model``.
    Entries beside the wrapped model (a Lightning module's loss, say) are left out, and a note says so. Raises
    CheckpointError, naming the prefixes, where it cannot be told which model is meant.
    """
    states: dict[str, dict[str, Tensor]] = {}
    notes = list(contents.notes)
    for key, state in contents.states.items():
        found = {str(name)[: -len(landmark)] for name in state if str(name) == landmark or str(name).endswith("." + landmark)}
        if found <= {""}:
            states[key] = state
            continue
        parts = _parts(path, key, found)
        for target, prefix in parts.items():
            others = [other for other in found if other.startswith(prefix) and other != prefix]
            states[target] = {
                str(name)[len(prefix) :]: value
                for name, value in state.items()
                if str(name).startswith(prefix) and not str(name).startswith(tuple(others))
            }
        notes += _notes(state, found)
    return replace(contents, states=states, notes=notes)


def _parts(path: Path, key: str, prefixes: set[str]) -> dict[str, str]:
    """Which prefix gives which state dict of the result."""
    if len(prefixes) == 1:
        return {key: next(iter(prefixes))}
    averaged = sorted(prefix for prefix in prefixes if "ema" in re.split(r"[._]", prefix))
    raw = sorted(prefixes - set(averaged))
    if len(averaged) != 1 or len(raw) != 1:
        listed = ", ".join(f"{prefix}*" for prefix in sorted(prefixes))
        raise CheckpointError(
            f"{path} holds several models ({listed}), and not one of them alone is named an average (ema): save the "
            f"state dict of the one that is meant by itself"
        )
    return {"model_ema": averaged[0], "model": raw[0]}


def _notes(state: Mapping[str, Any], prefixes: set[str]) -> list[str]:
    notes = []
    peeled = sorted(prefix for prefix in prefixes if bare_name(prefix + "x") != "x")
    if peeled:
        notes.append(f"wrapped names: {', '.join(peeled)} was taken off")
    left = [] if "" in prefixes else [str(name) for name in state if not str(name).startswith(tuple(prefixes))]
    if left:
        notes.append(f"{len(left)} entries beside the wrapped model were left out ({some(left)})")
    return notes


# ------------------------------------------------------------------------------------------ are averages any good?


def warnings_of_average(path: Path, states: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What speaks against a container's averaged weights, by comparing the spread of each tensor with the raw one's.

    Spread is the standard deviation of a tensor's values: it is 0 where all are equal, as biases and norms' scales are
    before training. So the vectors (one axis) show how far a model has moved from its initial values: averaged ones
    that have moved less than a quarter of the raw ones' way (the median over the vectors) are mostly initial noise. The
    matrices start with a spread, which training changes little: averaged ones whose spread is not between half of and
    twice the raw ones' are no average of them. Healthy averages have both near 1.
    """
    averaged, raw = states.get("model_ema"), states.get("model")
    if averaged is None or raw is None:
        return []
    vectors, matrices = _spread_ratios(averaged, raw)
    fault = ""
    if matrices and not 1 / _MOST_SCALE <= median(matrices) <= _MOST_SCALE:
        fault = f"are {median(matrices):.2g} times as large as its raw ones (model), of which they should be an average"
    elif vectors and median(vectors) < _LEAST_WAY:
        fault = (
            f"are nearly at their initial values: biases and scales have moved {median(vectors):.1%} of the way of the raw "
            f"ones (model), as after a training too short for its ema_rate"
        )
    if not fault:
        return []
    return [
        f"{path}: its averaged weights (model_ema) {fault}; they will generate noise: pass ema=False (--no-ema on the "
        f"command line) to take the raw ones"
    ]


def _spread_ratios(averaged: Mapping[str, Any], raw: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Spread of each averaged tensor over that of its raw one: of vectors, and of those with more axes."""
    plain = {bare_name(name): value for name, value in raw.items()}
    vectors: list[float] = []
    matrices: list[float] = []
    for name, value in averaged.items():
        other = plain.get(bare_name(name))
        if not isinstance(value, Tensor) or not isinstance(other, Tensor) or value.shape != other.shape:
            continue
        spread, raw_spread = _spread(value), _spread(other)
        if spread is not None and raw_spread:
            (vectors if value.ndim == 1 else matrices).append(spread / raw_spread)
    return vectors, matrices


def _spread(value: Tensor) -> float | None:
    """Standard deviation of a tensor's first values; None where there is none to take."""
    if not value.is_floating_point() or value.layout != torch.strided or value.numel() < 2:
        return None
    spread = float(value.detach().flatten()[:_SAMPLE].double().std())
    return spread if spread < float("inf") else None
