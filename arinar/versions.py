"""What the saved training ``args`` tell of the version of the published code that wrote them, and what follows from it.

The code changed what it computes without changing the weights' names or shapes, and wrote no version number; but each
version saved all its arguments, so the names there date it:

======================  ==========================================================================================
entry                   in versions
``head_width``          2025-03-19 on; the first of that day has 4 inner heads, the others 16
``head_type``           2025-03-21 on, all with 16 inner heads (``enc_dec_depth``: 03-24 on)
``inner_ar_width``      2025-03-29 on
``model_type``          2025-03-19 to 04-05: they still divide the std by the temperature, later ones multiply
``bilevel_schedule``    2025-04-14 on; true or false until 04-30, then a name
``norm_scale``          2025-04-18 to 04-30: the factor of the latents; 0.2325 before
``huggingface_dir``     2025-04-23 on; without ``norm_scale`` beside it: 04-30 on, latents by a statistics file
======================  ==========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .schedule import CFG_SCHEDULES
from .text import shown

#: Heads of the inner attention in the first public versions of the published code, and in the later ones.
FIRST_VERSION_INNER_HEADS = 4
LATER_INNER_HEADS = 16

# Entries that came after norm_scale: where that is missing beside them, it had already gone (2025-04-30).
_AFTER_NORM_SCALE = ("latent_stats_file", "huggingface_dir", "head_batch_mul", "diff_sampling_strategy", "use_nf")
# Entries that came after the temperature began to multiply (2025-04-05).
_AFTER_DIVIDING = ("bilevel_schedule", "feature_group", "norm_scale", *_AFTER_NORM_SCALE)

Args = Mapping[str, Any]


def heads_from_args(args: Args | None) -> tuple[int | None, str] | None:
    """Inner heads as the saved args settle them, with the reason; no number where they fit both; None without args."""
    if args is None:
        return None
    later = next((name for name in ("inner_ar_width", "head_type", "enc_dec_depth") if name in args), None)
    if later is not None:
        reason = f"its saved args have {later}, so a version of 2025-03-21 or later wrote it, and all those have 16"
        return LATER_INNER_HEADS, reason
    if "head_width" in args:
        return None, (
            "its saved args have head_width but none of head_type, enc_dec_depth, inner_ar_width, as those of 2025-03-19 do: "
            "the first version of that day has 4, the others 16"
        )
    return FIRST_VERSION_INNER_HEADS, (
        "its saved args lack inner_ar_width, head_type, enc_dec_depth and head_width, so one of the first public versions "
        "(until 2025-03-19) wrote it, and all those have 4"
    )


def divides_by_temperature(args: Args) -> bool:
    """Whether the version divides the std by the temperature; the later ones multiply, as we do."""
    # For three minutes of 2025-04-05 a version without model_type still divided: not worth a question.
    return "inner_ar_width" not in args or "model_type" in args


def uses_statistics(args: Args) -> bool:
    """Whether the version (2025-04-30 on) normalises latents by a file of their mean and std, rather than by one factor."""
    if "norm_scale" in args:
        return False
    return isinstance(args.get("bilevel_schedule"), str) or any(name in args for name in _AFTER_NORM_SCALE)


def lacks_statistics(args: Args) -> bool:
    """Whether the model was trained on latents normalised by a statistics file, which the checkpoint does not hold.

    The first versions that use the file always do; those whose ``bilevel_schedule`` is a name use 0.2325 where the
    cache's path has ``mar_cache`` in it. In versions before, the path says nothing.
    """
    by_path = not isinstance(args.get("bilevel_schedule"), bool) and "latent_stats_file" not in args
    return uses_statistics(args) and not (by_path and "mar_cache" in _text(args, "cached_path"))


def latent_scale(args: Args) -> float:
    """The factor of the latents: the saved ``norm_scale``, or 0.2325. Raises ValueError where that is no positive number."""
    value = args.get("norm_scale", 0.2325)
    if not _is_number(value) or not value > 0:
        raise ValueError(f"norm_scale is {shown(value)} in its saved args; expected a number above 0")
    return float(value)


def defaults(args: Args, seq_len: int, divides: bool) -> tuple[dict[str, Any], list[str]]:
    """Sampling settings saved in ``args`` as fields of ArinarConfig, and notes on those that cannot be taken.

    ``num_iter`` is cut to ``seq_len``; ``cfg`` 0 means none there, 1 here; a temperature by which the code ``divides``
    becomes one that multiplies.
    """
    found: dict[str, Any] = {}
    notes = []
    for name, field, wanted in (
        ("num_iter", "default_num_iter", "a whole number from 1 on"),
        ("cfg", "default_guidance_scale", "a number from 1 on, or 0 for none"),
        ("cfg_schedule", "default_cfg_schedule", " or ".join(CFG_SCHEDULES)),
        ("temperature", "default_temperature", "a number above 0"),
    ):
        if name not in args:
            continue
        value = _default(name, args[name], seq_len, divides)
        if value is None:
            notes.append(f"its saved {name} is {shown(args[name])}, not {wanted}: it does not become the default")
        else:
            found[field] = value
    if found:
        listed = ", ".join(f"{name.removeprefix('default_')} {value}" for name, value in found.items())
        notes.insert(0, f"defaults of sampling are those of its saved args: {listed}")
    return found, notes


def _default(name: str, value: Any, seq_len: int, divides: bool) -> Any:
    """One saved setting in our terms; None where it is of no use."""
    if name == "cfg_schedule":
        return value if isinstance(value, str) and value in CFG_SCHEDULES else None
    if not _is_number(value):
        return None
    if name == "num_iter":
        return min(value, seq_len) if isinstance(value, int) and value >= 1 else None
    if name == "cfg":
        return 1.0 if value == 0 else float(value) if value >= 1 else None
    temperature = 1 / value if divides and value > 0 else value
    return float(temperature) if 0 < temperature < math.inf else None


def notes_from_args(args: Args) -> list[str]:
    """What a user who knows the published code should hear about this file."""
    notes = []
    if divides_by_temperature(args):
        when = "a version of 2025-03-29 to 04-05, which has inner_ar_width but still" if "inner_ar_width" in args else None
        notes.append(
            f"written by {when or 'a version before 2025-04-05, which'} divides the std by the temperature; ours "
            f"multiplies (1.1 there is 1/1.1 here)"
        )
    elif not any(name in args for name in _AFTER_DIVIDING):
        notes.append(
            "its temperature is taken to multiply the std, as ours does: versions with inner_ar_width that still divide by it "
            "exist (2025-03-29 to 04-05), but save model_type, which this file lacks"
        )
    schedule = args.get("bilevel_schedule", "constant")
    if schedule is not False and schedule != "constant":  # a bool until 2025-04-30: false is constant
        name = shown(schedule).strip("'")
        notes.append(f"its args ask for bilevel_schedule {name} in sampling; only constant is implemented")
    if uses_statistics(args) and not lacks_statistics(args):
        notes.append(
            f"its cached_path is {shown(args.get('cached_path'))}: its version scales the latents of a cache of that name by "
            f"0.2325, of any other by their statistics (latents_stats.pt; --latent-stats on the command line)"
        )
    return notes


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -1e6 < value < 1e6  # every sensible setting; false for NaN


def _text(args: Args, name: str) -> str:
    value = args.get(name)
    return value if isinstance(value, str) else ""
