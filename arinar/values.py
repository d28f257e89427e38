"""Values that come from outside, a JSON file or a caller, checked at the door: what is trusted behind it is of the type, and
in the range, that it is declared with.

Every function raises ValueError: one line with the name of the value, what it is, and what was expected.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from .text import shown

#: Numbers in files count things that exist, or are sizes of such: larger ones are damage, or meant to exhaust memory.
MOST = 2**31 - 1
#: A file's size in bytes.
MOST_BYTES = 2**63 - 1
FLOAT32_MAX = float(np.finfo(np.float32).max)


def mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {shown(value)}; expected entries by name")
    return dict(value)


def entry(name: str, value: Any, key: str) -> Any:
    """``value[key]``, of a mapping that must have it."""
    found = mapping(name, value)
    if key not in found:
        raise ValueError(f"{name} has no entry {key!r}")
    return found[key]


def items(name: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is {shown(value)}; expected a list")
    return list(value)


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}; expected text")
    return value


def truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}; expected true or false")
    return value


def is_whole(value: Any) -> bool:
    """Whether it is an integer, Python's or NumPy's; truth values are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def integer(name: str, value: Any, least: int = 0, most: int = MOST) -> int:
    if not is_whole(value) or not least <= value <= most:
        raise ValueError(f"{name} is {shown(value)}; expected an integer from {least} to {most}")
    return int(value)


def number(name: str, value: Any, least: float = -FLOAT32_MAX, most: float = FLOAT32_MAX, *, strict: bool = False) -> float:
    """A number that float32 can hold, from ``least`` to ``most``; ``strict``: above ``least``, also rounded to float32."""
    real = not isinstance(value, bool) and isinstance(value, (int, float, np.integer, np.floating))
    bound = "" if least == -FLOAT32_MAX else f" above {least:g}" if strict else f" at least {least:g}"
    if most < FLOAT32_MAX:
        bound = f" from {least:g} to {most:g}"
    try:
        found = float(value) if real else math.nan
    except OverflowError:  # an integer of hundreds of digits
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{name} is {shown(value)}; expected a finite number{bound}")
    if not least <= found <= most or (strict and np.float32(found) <= least):
        held = " that float32 can hold" if most == FLOAT32_MAX else ""
        raise ValueError(f"{name} is {shown(value)}; expected a number{bound}{held}")
    return found


def array(name: str, value: Any, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    """Raise ValueError unless it is a NumPy array of this type and shape."""
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{name} is {shown(value)}; expected a NumPy array, {np.dtype(dtype)} {shape}")
    if value.shape != shape or value.dtype != dtype:
        raise ValueError(f"{name} is {value.dtype} {value.shape}; expected {np.dtype(dtype)} {shape}")


def conforming(cls: Any, name: str, value: Any) -> dict[str, Any]:
    """The entries of a dataclass that is to be made of a JSON object, each of its declared type; integers from 0 to MOST.

    Lists come back as tuples. What the class itself checks (which values go together) is left to it.
    """
    given, hints = mapping(name, value), get_type_hints(cls)
    known = {item.name: item for item in fields(cls)}
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{name} has unknown entries {', '.join(map(shown, unknown))}; it was written by a newer version?")
    for key, item in known.items():
        if key not in given and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{name} has no entry {key!r}")
    return {key: typed(f"{name}.{key}", item, hints[key]) for key, item in given.items()}


def typed(name: str, value: Any, hint: Any) -> Any:
    """A value of a type that a dataclass declares: a plain one, a tuple of such, or one of several."""
    if get_origin(hint) in (Union, types.UnionType):
        choices = get_args(hint)
        if value is None and type(None) in choices:
            return None
        several = isinstance(value, (list, tuple))
        fitting = [kind for kind in choices if kind is not type(None) and (get_origin(kind) is tuple) == several]
        return typed(name, value, (fitting or [kind for kind in choices if kind is not type(None)])[0])
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        found = items(name, value)
        if kinds[-1] is not ... and len(found) != len(kinds):
            raise ValueError(f"{name} has {len(found)} values; expected {len(kinds)}")
        return tuple(
            typed(f"{name}[{place}]", item, kinds[0] if kinds[-1] is ... else kinds[place]) for place, item in enumerate(found)
        )
    if get_origin(hint) is dict:
        kind = get_args(hint)[1]
        return {key: typed(f"{name}.{key}", item, kind) for key, item in mapping(name, value).items()}
    checks: dict[Any, Any] = {bool: truth, int: integer, float: number, str: text}
    return checks[hint](name, value) if hint in checks else value
