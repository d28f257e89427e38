"""What the published codes' checkpoints mean: their arguments, the heads we do not have, and configs from shapes.

Published files carry no config: it is inferred from the saved training ``args`` and the tensors' shapes. What neither
shows (attention heads, the latent scale) follows the published code, and is said aloud where it is a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from . import published_diffusion as diffusion_head
from . import versions
from .checkpoint_files import CheckpointError, bare_name, some
from .config import ArinarConfig, VaeConfig
from .text import shown
from .versions import FIRST_VERSION_INNER_HEADS, LATER_INNER_HEADS, heads_from_args

# Attention heads of the published outer widths (base, large, huge): they leave no trace in the weights.
PUBLISHED_OUTER_HEADS = {768: 12, 1024: 16, 1280: 16}
# (outer width, depth) of large and huge in the first public version; and since 2025-03-10, in versions of either kind.
_FIRST_VERSION_SIZES = {(1024, 16), (1280, 20)}
_LATER_SIZES = {(1024, 18), (1280, 22)}

_ONLY_THESE = (
    "supported are the inner autoregressive Gaussian-mixture head (head_type ar_gmm, feature_group 1, no flow) and MAR's "
    "diffusion head (diff_loss)"
)
_HEAD_TYPES = {
    "ar_diff_loss": "inner autoregressive diffusion",
    "ar_rect_flow": "inner autoregressive rectified flow",
    "ar_byte": "inner autoregressive bytes",
    "rect_flow": "rectified flow",
    "gmm_wo_ar": "Gaussian mixture without inner autoregression",
    "gmm_cov_wo_ar": "full-covariance Gaussian mixture without inner autoregression",
}
_HEAD_KEYS = {
    "diffloss.flow_net.": "rectified-flow",
    "diffloss.": "per-token (not MAR's)",
    "gmm_head.": "non-autoregressive Gaussian-mixture",
    "arhead.net.": "inner diffusion or rectified-flow",
    "arhead.word_embed.": "inner bytes",
}


def refuse_other_heads(path: Path, state: Mapping[str, Tensor], args: Mapping[str, Any]) -> None:
    """Raise CheckpointError for what the published code can train and we cannot run."""
    backbone = args.get("model", "mar")
    if isinstance(backbone, str) and backbone.startswith("var"):
        raise CheckpointError(f"{path} has the backbone {_bare(backbone)}; only the masked MAR backbone is supported")
    diffusion = diffusion_head.has_diffusion_head(state)
    told, held = args.get("head_type"), "diff_loss" if diffusion else "ar_gmm"
    if told not in (None, "ar_gmm", "diff_loss"):
        name = _HEAD_TYPES.get(told, "unknown") if isinstance(told, str) else "unknown"
        raise CheckpointError(f"{path} has the head {_bare(told)} ({name}); {_ONLY_THESE}")
    if told not in (None, held):
        raise CheckpointError(
            f"{path}: its saved args say head_type {told}, its weights {'have' if diffusion else 'lack'} MAR's diffusion head "
            f"({diffusion_head.LANDMARK} with two rows for each feature); {_ONLY_THESE}"
        )
    if diffusion:
        return
    for prefix, name in _HEAD_KEYS.items():
        if any(key.startswith(prefix) for key in state):
            raise CheckpointError(f"{path} has a {name} head (entries {prefix}*); {_ONLY_THESE}")
    if args.get("use_nf") or any(key.startswith("arhead.nf.") for key in state):
        raise CheckpointError(f"{path} has a normalising flow before its mixture head (use_nf); {_ONLY_THESE}")
    if args.get("pos_emb_for_head") or any(key.startswith("arhead.head_nm.loc_emb.") for key in state):
        raise CheckpointError(
            f"{path} has position embeddings before its head's last layer (pos_emb_for_head), which are not supported; "
            f"{_ONLY_THESE}"
        )
    group = args.get("feature_group", 1)
    projection = state.get("arhead.input_proj.weight")
    if projection is not None and projection.ndim == 2:
        group = projection.shape[1]
    if group != 1:
        raise CheckpointError(
            f"{path} generates {shown(group)} features at a time (feature_group {shown(group)}); {_ONLY_THESE}"
        )


def guess_heads(outer: tuple[int, int], inner: tuple[int, int]) -> tuple[int | None, str]:
    """Inner heads from (width, depth) alone, with the reason; no number where nothing speaks for either."""
    if inner != (768, 1):
        return LATER_INNER_HEADS, (
            f"versions until 2025-03-19 have inner width 768 and depth 1, this has {inner[0]} and {inner[1]}; of those since, "
            f"all but the first have {LATER_INNER_HEADS}"
        )
    if outer in _FIRST_VERSION_SIZES:
        return FIRST_VERSION_INNER_HEADS, (
            f"it has {outer[1]} blocks a side at width {outer[0]}, as the first public version; later ones have them only "
            f"where enc_dec_depth asks"
        )
    if outer in _LATER_SIZES:
        return None, (
            f"versions with {outer[1]} blocks a side at width {outer[0]} and inner width 768 have {FIRST_VERSION_INNER_HEADS} "
            f"(2025-03-10 to 03-19) or {LATER_INNER_HEADS} (later)"
        )
    return FIRST_VERSION_INNER_HEADS, "the weights fit the published base checkpoint, which the first public version wrote"


def _bare(value: object) -> str:
    """A saved name without quotes."""
    return shown(value).strip("'\"")


@dataclass(frozen=True)
class _Shapes:
    """What the weights' shapes of a masked model say, before it is known whether they make a config."""

    length: int
    num_classes: int
    token_dim: int
    widths: dict[str, int]  # of "encoder" and "decoder"
    depths: dict[str, int]
    outer_rows: int  # of the first matrix of an outer block's MLP


class Inferred(NamedTuple):
    """A config, how its inner heads were settled ("" where it has none), warnings for what was guessed, and notes."""

    config: ArinarConfig
    heads_source: str
    warned: list[str]
    notes: list[str]


def infer_arinar(
    path: Path,
    state: Mapping[str, Tensor],
    args: Mapping[str, Any] | None,
    inner_heads: int | None,
    outer_heads: int | None = None,
) -> Inferred:
    """The config of published weights.

    ``inner_heads`` and ``outer_heads`` (of encoder and decoder) are the caller's, and decide. Raises CheckpointError
    where neither they, nor the args, nor the shapes do.
    """
    if "target_pos_embed_learned" in state:
        raise CheckpointError(
            f"{path} is a causal model without its config, and its shapes do not show the generation order: "
            f"pass config=ArinarConfig(outer='causal', ...), --config FILE on the command line"
        )
    saved = args or {}
    shapes = _read_shapes(path, state)
    outer = _outer_entries(path, state, saved, shapes, outer_heads)
    warned: list[str] = []
    if diffusion_head.has_diffusion_head(state):
        heads_source = ""
        head = diffusion_head.head_entries(path, state)
        defaults, notes = diffusion_head.defaults(args, shapes.widths["decoder"], shapes.length)
    else:
        head, heads_source, warned = _gmm_entries(path, state, args, shapes, inner_heads)
        defaults, notes = versions.defaults(saved, shapes.length, versions.divides_by_temperature(saved))
    try:
        config = ArinarConfig(**outer, **head)
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path}: its weights' shapes give no usable config ({error}): pass config=... (--config FILE on the command line)"
        ) from None
    _refuse_disagreement(path, saved, config)
    try:
        scale = versions.latent_scale(saved)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    config = config.replace(latent_scale=scale, **defaults)
    if config.head == "diffusion":
        notes = [*notes, *diffusion_head.notes(config)]
    return Inferred(config, heads_source, warned, notes)


def _gmm_entries(
    path: Path, state: Mapping[str, Tensor], args: Mapping[str, Any] | None, shapes: _Shapes, given: int | None
) -> tuple[dict[str, Any], str, list[str]]:
    """The config's entries of a Gaussian mixture head, how its inner heads were settled, and what was guessed."""
    width = _shape(path, state, "arhead.input_proj.weight", 2)[0]
    depth = _count(state, "arhead.blocks.")
    rows = _shape(path, state, "arhead.blocks.0.ffn.fc1.weight", 2)[0]
    outer = (shapes.widths["encoder"], shapes.depths["encoder"])
    (heads, reason), warned = _inner_heads(path, args, outer, (width, depth), given)
    entries = {
        "inner_width": width,
        "inner_depth": depth,
        "inner_heads": heads,
        "inner_mlp_ratio": rows / max(width, 1),
        "num_gaussians": _shape(path, state, "arhead.head.weight", 2)[0] // 3,
    }
    return entries, reason, warned


def _inner_heads(
    path: Path, args: Mapping[str, Any] | None, outer: tuple[int, int], inner: tuple[int, int], given: int | None
) -> tuple[tuple[int, str], list[str]]:
    """Inner heads with the reason, and the warning where they are a guess; outer and inner are (width, depth)."""
    if given is not None:
        return (given, "given by the caller"), []
    settled = heads_from_args(args)
    guessed = settled is None
    if settled is None:
        settled = guess_heads(outer, inner)
    heads, reason = settled
    if heads is None:
        raise CheckpointError(
            f"{path}: its number of inner heads cannot be told: {reason}, and head counts leave no trace in weights: pass "
            f"inner_heads={FIRST_VERSION_INNER_HEADS} or inner_heads={LATER_INNER_HEADS} (--inner-heads on the command "
            f"line); the wrong one spoils the images without any error"
        )
    return (heads, reason), [_warning_of_guess(path, heads, reason)] if guessed else []


def _shape(path: Path, state: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"{path} is not an ARINAR checkpoint: it has no {name} ({some(set(state))})")
    if state[name].ndim != axes:
        raise CheckpointError(f"{path}: {name} is {tuple(state[name].shape)}; expected {axes} axes")
    return tuple(state[name].shape)


def _read_shapes(path: Path, state: Mapping[str, Tensor]) -> _Shapes:
    _, length, decoder_width = _shape(path, state, "diffusion_pos_embed_learned", 3)
    num_classes, encoder_width = _shape(path, state, "class_emb.weight", 2)
    token_dim = _shape(path, state, "z_proj.weight", 2)[1]
    stacks = {"encoder": "encoder_blocks.", "decoder": "decoder_blocks."}
    return _Shapes(
        length,
        num_classes,
        token_dim,
        widths={"encoder": encoder_width, "decoder": decoder_width},
        depths={stack: _count(state, prefix) for stack, prefix in stacks.items()},
        outer_rows=_shape(path, state, "encoder_blocks.0.mlp.fc1.weight", 2)[0],
    )


def _outer_heads(path: Path, args: Mapping[str, Any], widths: Mapping[str, int], given: int | None) -> dict[str, int]:
    """Heads of encoder and decoder, as the caller, the args or the published widths settle them."""
    if given is not None:
        return {"encoder": given, "decoder": given}
    heads = {}
    for stack in ("encoder", "decoder"):
        known = args.get(f"{stack}_num_heads", PUBLISHED_OUTER_HEADS.get(widths[stack]))
        if not isinstance(known, int):
            published = ", ".join(str(key) for key in PUBLISHED_OUTER_HEADS)
            raise CheckpointError(
                f"{path} has {stack} width {widths[stack]}, whose number of attention heads the weights do not show "
                f"(known for the published widths {published}): pass "
                f"config=ArinarConfig(encoder_heads=..., decoder_heads=..., ...) or outer_heads=N (--config FILE or "
                f"--outer-heads N on the command line)"
            )
        heads[stack] = known
    return heads


def _warning_of_guess(path: Path, inner_heads: int, reason: str) -> str:
    return (
        f"{path}: inner_heads={inner_heads} is a guess: the file has no training args, head counts leave no "
        f"trace in weights, and {reason}. The wrong number spoils the images without any error: pass "
        f"inner_heads={FIRST_VERSION_INNER_HEADS} (first public version, March 2025) or "
        f"inner_heads={LATER_INNER_HEADS} (later versions), --inner-heads on the command line, to settle it"
    )


def _outer_entries(
    path: Path, state: Mapping[str, Tensor], saved: Mapping[str, Any], shapes: _Shapes, given: int | None
) -> dict[str, Any]:
    """The config's entries of the outer network and the images; ``given``: its heads, as the caller has them."""
    patch, stride = _integer(path, saved, "patch_size", 1), _integer(path, saved, "vae_stride", 16)
    heads = _outer_heads(path, saved, shapes.widths, given)
    entries: dict[str, Any] = {
        "img_size": math.isqrt(shapes.length) * stride * patch,
        "vae_stride": stride,
        "patch_size": patch,
        "vae_embed_dim": shapes.token_dim // patch**2,
        "num_classes": shapes.num_classes,
        "buffer_size": _shape(path, state, "encoder_pos_embed_learned", 3)[1] - shapes.length,
        "mlp_ratio": shapes.outer_rows / max(shapes.widths["encoder"], 1),
        "default_num_iter": min(64, shapes.length),
    }
    for stack in ("encoder", "decoder"):
        entries[f"{stack}_width"] = shapes.widths[stack]
        entries[f"{stack}_depth"] = shapes.depths[stack]
        entries[f"{stack}_heads"] = heads[stack]
    return entries


def _refuse_disagreement(path: Path, args: Mapping[str, Any], config: ArinarConfig) -> None:
    entries = {
        "img_size": config.img_size,
        "vae_embed_dim": config.vae_embed_dim,
        "class_num": config.num_classes,
        "buffer_size": config.buffer_size,
    }
    if config.head == "gmm":
        entries |= {
            "num_gaussians": config.num_gaussians,
            "inner_ar_width": config.inner_width,
            "inner_ar_depth": config.inner_depth,
        }
    elif "head_type" not in args:  # MAR's own; ARINAR's code has other names, and these with other meanings
        entries |= {"diffloss_w": config.inner_width, "diffloss_d": config.inner_depth}
    wrong = [
        f"{name} is {shown(args[name])} in args, {got} in the weights"
        for name, got in entries.items()
        if args.get(name, got) != got
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: saved args and weights disagree ({'; '.join(wrong)}): pass config=... (--config FILE on the "
            f"command line) to decide"
        )


def _integer(path: Path, args: Mapping[str, Any], name: str, default: int) -> int:
    value = args.get(name, default)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: {name} is {shown(value)} in its saved args; expected a positive integer")
    return value


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Blocks in a stack. Distinct numbers, not the highest + 1: a stray name must not ask for a million."""
    return len({name[len(prefix) :].split(".", 1)[0] for name in state if name.startswith(prefix)})


def warnings_of_given_config(path: Path, args: Mapping[str, Any] | None, config: ArinarConfig) -> list[str]:
    """Where the args settle other inner heads than the caller's config has."""
    by_args = heads_from_args(args)
    if by_args is None or by_args[0] in (None, config.inner_heads):
        return []
    return [
        f"{path}: the given config has inner_heads={config.inner_heads}, but {by_args[1]}. The weights fit "
        f"both and compute different things: pass inner_heads={by_args[0]} unless you know better "
        f"(inner_heads={config.inner_heads} confirms the config)"
    ]


def warnings_of_statistics(path: Path, args: Mapping[str, Any], config: ArinarConfig) -> list[str]:
    """Where the latents were normalised by a statistics file that the checkpoint does not hold."""
    if not versions.lacks_statistics(args):
        return []
    return [
        f"{path}: trained on latents normalised with their own statistics (latents_stats.pt), which "
        f"the checkpoint does not hold; latent_scale {config.latent_scale} and latent_shift "
        f"{config.latent_shift} are guesses: pass latent_stats=FILE (--latent-stats FILE on the command line), or pass "
        f"config=inspect_checkpoint(path).config.replace(latent_scale=1 / std, latent_shift=mean)"
    ]


def without_training_of_vae(state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """An autoencoder's entries without what was beside it in training only, and notes on what was left out."""
    parts = {
        ("loss", "model_ema."): "the training loss and its averages",
        # VA-VAE's training pulls the latents towards a foundation model's features; decoding needs neither.
        ("foundation_model.", "linear_proj.weight"): "the foundation model that aligned the latents (VA-VAE)",
    }
    kept, notes = dict(state), []
    for prefixes, what in parts.items():
        left = [name for name in kept if bare_name(name).startswith(prefixes)]
        for name in left:
            del kept[name]
        if left:
            notes.append(f"{len(left)} entries of {what} were left out")
    return kept, notes


def infer_vae(path: Path, state: Mapping[str, Tensor]) -> VaeConfig:
    """An autoencoder's config from its convolutions' shapes."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in state or state[name].ndim != 4:
            raise CheckpointError(f"{path} is not a complete KL autoencoder: it has no convolution {name}")
        return tuple(state[name].shape)

    channels, in_channels = shape("encoder.conv_in.weight")[:2]
    levels = _count(state, "encoder.down.")
    multipliers = tuple(shape(f"encoder.down.{level}.block.0.conv1.weight")[0] // channels for level in range(levels))

    def attention(half: str) -> tuple[int, ...]:
        return tuple(level for level in range(levels) if any(name.startswith(f"{half}.{level}.attn.") for name in state))

    try:
        return VaeConfig(
            embed_dim=shape("post_quant_conv.weight")[1],
            channels=channels,
            channel_multipliers=multipliers,
            num_res_blocks=_count(state, "encoder.down.0.block."),
            in_channels=in_channels,
            encoder_attention_levels=attention("encoder.down"),
            decoder_attention_levels=attention("decoder.up"),
            out_channels=shape("decoder.conv_out.weight")[0],
        )
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its shapes give no usable config ({error}): pass config=VaeConfig(norm_groups=..., ...)"
        ) from None
