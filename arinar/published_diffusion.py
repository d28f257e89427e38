"""What checkpoints with MAR's diffusion head mean: MAR's own, and those of ARINAR's code trained with ``head_type=diff_loss``.

Keys and shapes are the same in both, and show the network's width and depth. The number of sampling steps is in the saved
``args`` at best; MAR's published files are believed to have none (github.com/LTH14/mar).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import versions
from .checkpoint_files import CheckpointError
from .diffusion_schedule import respacings
from .text import shown

#: The network's last layer: 2 * D rows, the noise and the variance value.
LANDMARK = "diffloss.net.final_layer.linear.weight"
_BLOCKS = "diffloss.net.res_blocks."

# MAR's recommended guidance of its three sizes, by outer width (README of its repository; linear schedule).
_GUIDANCE = {768: 2.9, 1024: 3.0, 1280: 3.2}
_PUBLISHED_STEPS = "100"


def has_diffusion_head(state: Mapping[str, Tensor]) -> bool:
    """Whether the head is MAR's: it predicts noise and variance (a rectified flow has other names, and one output)."""
    last, tokens = state.get(LANDMARK), state.get("z_proj.weight")
    return last is not None and tokens is not None and last.ndim == tokens.ndim == 2 and len(last) == 2 * tokens.shape[1]


def head_entries(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config's entries that describe the head's network, from its shapes."""
    projection = state.get("diffloss.net.input_proj.weight")
    if projection is None or projection.ndim != 2:
        raise CheckpointError(f"{path} has an incomplete diffusion head: no matrix diffloss.net.input_proj.weight")
    blocks = {name[len(_BLOCKS) :].split(".", 1)[0] for name in state if name.startswith(_BLOCKS)}
    return {"head": "diffusion", "inner_width": len(projection), "inner_depth": len(blocks)}


def defaults(args: Mapping[str, Any] | None, width: int, seq_len: int) -> tuple[dict[str, Any], list[str]]:
    """Sampling settings as fields of ArinarConfig, and notes on where they come from; ``width`` is the outer network's."""
    saved = args or {}
    # This head's temperature multiplies the steps' noise, in both codes and all versions.
    found, notes = versions.defaults(saved, seq_len, divides=False)
    if "default_guidance_scale" not in found and width in _GUIDANCE:
        found["default_guidance_scale"] = _GUIDANCE[width]
        notes.append(
            f"guidance {_GUIDANCE[width]} is what MAR recommends for its model of this width; the weights do not show it"
        )
    steps, note = _sampling_steps(saved)
    return found | {"sampling_steps": steps}, [*notes, note]


def _sampling_steps(saved: Mapping[str, Any]) -> tuple[str, str]:
    """The number of sampling steps, and where it comes from."""
    if saved.get("diff_sampling_strategy") == "linear":  # of ARINAR's code: DiSA's annealing
        name = "diff_upper_steps and diff_lower_steps"
        value: Any = f"{saved.get('diff_upper_steps')}-{saved.get('diff_lower_steps')}"
    else:
        name, value = "num_sampling_steps", saved.get("num_sampling_steps")
    try:
        respacings(value, 1)
    except ValueError:
        why = f"its saved {name} is {shown(value)}" if value is not None else f"there is no saved {name}"
        return _PUBLISHED_STEPS, (
            f"sampling_steps is {_PUBLISHED_STEPS!r}, as MAR's evaluation has it: {why}, and the weights fit any number"
        )
    return value, f"sampling_steps {value!r} is its saved {name}"


def notes(config: Any) -> list[str]:
    """How the head's network was settled, and what the weights cannot tell."""
    return [
        f"diffusion head of width {config.inner_width} (rows of input_proj) and depth {config.inner_depth} (number of "
        f"res_blocks) behind {config.encoder_depth} + {config.decoder_depth} blocks, as the weights have it (MAR's sizes have "
        f"12, 16 and 20 a side, ARINAR's 14 and more)",
        "not known from the weights: attention heads of the outer network, patch_size, vae_stride, the latents' scale, and the "
        "sampling steps",
    ]
