"""What an ARINAR model is made of: one frozen dataclass, JSON both ways, and the named presets.

Plain Python: both the PyTorch side and the torch-free runtime read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

from .diffusion_schedule import respacings
from .reading import parse_json
from .schedule import check_cfg_schedule
from .text import shown
from .values import integer, number

#: Tokens of an image: attention takes memory by their square. Blocks of a stack. Longest text of a class name.
MAX_TOKENS, MAX_DEPTH, MAX_CLASS_NAME = 1 << 16, 1024, 1000
_MAX_WIDTH, _MAX_HEADS, _MAX_SIDE, _MAX_CLASSES = 1 << 16, 1024, 1 << 15, 1 << 24

OUTER_KINDS = ("masked", "causal")
HEAD_KINDS = ("gmm", "diffusion")


@dataclass(frozen=True)
class VaeConfig:
    """Shape of a KL autoencoder (the latent-diffusion family's layout and key names).

    The published KL-16 is the default: stride 16, 16 latent channels, 66,456,019 parameters.
    """

    embed_dim: int = 16
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    # Levels (0 = full resolution) that carry attention. The published encoder has it at the lowest
    # resolution only, the published decoder nowhere outside its middle block.
    encoder_attention_levels: tuple[int, ...] = (4,)
    decoder_attention_levels: tuple[int, ...] = ()
    in_channels: int = 3
    out_channels: int = 3
    norm_groups: int = 32
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Types and ranges, then what fits what. Raises ValueError naming the entry."""
        _settle_numbers(self, _VAE_INTEGERS, _VAE_NUMBERS)
        multipliers = _integers("channel_multipliers", self.channel_multipliers, 1, 64, most=8)
        if not multipliers:
            raise ValueError("channel_multipliers is empty; expected one for each level of the autoencoder")
        object.__setattr__(self, "channel_multipliers", multipliers)
        for name in ("encoder_attention_levels", "decoder_attention_levels"):
            levels = _integers(name, getattr(self, name), 0, len(multipliers) - 1, most=len(multipliers))
            object.__setattr__(self, name, levels)
        for multiplier in self.channel_multipliers:
            if self.channels * multiplier % self.norm_groups:
                raise ValueError(
                    f"VAE channels {self.channels} x multiplier {multiplier} is not divisible by norm_groups {self.norm_groups}"
                )

    @property
    def stride(self) -> int:
        """Pixels per latent position, along one side."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VaeConfig:
        return cls(**_known(cls, data, "VAE config"))


@dataclass(frozen=True)
class ArinarConfig:
    """Everything that decides an ARINAR model's weights' shapes and its arithmetic.

    Defaults are ARINAR-B as published (arXiv 2503.02883): 212,949,516 parameters.

    Fields that leave no trace in the weights' shapes, and so must be stored beside them:
    ``encoder_heads``, ``decoder_heads``, ``inner_heads``, ``latent_scale``, ``latent_shift``, ``order``.
    """

    outer: str = "masked"
    img_size: int = 256
    vae_stride: int = 16
    patch_size: int = 1
    vae_embed_dim: int = 16
    num_classes: int = 1000
    buffer_size: int = 64

    # Outer transformer. `causal` models have a single stack: the decoder fields; encoder_depth is 0.
    encoder_width: int = 768
    encoder_depth: int = 14
    encoder_heads: int = 12
    decoder_width: int = 768
    decoder_depth: int = 14
    decoder_heads: int = 12
    mlp_ratio: float = 4.0

    # What draws a token given z. `gmm`: an autoregressive model over its features, each from a Gaussian mixture
    # (ARINAR). `diffusion`: an MLP that takes the noise out of the whole token step by step (MAR).
    head: str = "gmm"
    inner_width: int = 768
    inner_depth: int = 1
    # `gmm` only.
    inner_heads: int = 16
    inner_mlp_ratio: float = 4.0
    num_gaussians: int = 4
    # `diffusion` only: the sampling steps of a token, as `arinar.diffusion_schedule.respacings` reads them.
    sampling_steps: str = "100"

    norm_eps: float = 1e-6
    # `causal` only: the generation order as grid positions; () means raster order.
    order: tuple[int, ...] = ()
    # The model works on (VAE latent - latent_shift) * latent_scale; a scalar, or one value per channel.
    latent_scale: float | tuple[float, ...] = 0.2325
    latent_shift: float | tuple[float, ...] = 0.0
    # What `generate` uses when the caller does not say; carried into the bundle.
    default_num_iter: int = 64
    default_guidance_scale: float = 4.5
    default_cfg_schedule: str = "linear"
    default_temperature: float = 1.0
    class_names: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        """Types and ranges, then what fits what. Raises ValueError naming the entry."""
        for name, kinds in (("outer", OUTER_KINDS), ("head", HEAD_KINDS)):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} is {shown(getattr(self, name))}; choose one of {', '.join(kinds)}")
        _settle_numbers(self, _INTEGERS, _NUMBERS)
        self._settle_lists()
        check_cfg_schedule(self.default_cfg_schedule, "default_cfg_schedule")
        if self.img_size % (self.vae_stride * self.patch_size):
            raise ValueError(
                f"img_size {self.img_size} is not a multiple of vae_stride x patch_size ({self.vae_stride} x {self.patch_size})"
            )
        if self.seq_len > MAX_TOKENS:
            raise ValueError(
                f"img_size {self.img_size} makes {self.seq_len:,} tokens of an image; expected at most {MAX_TOKENS:,}: "
                f"a larger vae_stride or patch_size makes fewer"
            )
        respacings(self.sampling_steps, 1)
        for room in ("encoder", "decoder", *(["inner"] if self.head == "gmm" else [])):
            width, heads = getattr(self, f"{room}_width"), getattr(self, f"{room}_heads")
            if width % heads:
                raise ValueError(f"{room}_width {width} is not divisible by {room}_heads {heads}")
        if self.outer == "causal":
            if self.encoder_depth:
                raise ValueError(f"a causal model has one stack: encoder_depth is {self.encoder_depth}, expected 0")
            if self.buffer_size < 1:
                raise ValueError(f"buffer_size is {self.buffer_size}; a causal model needs at least 1 prefix position")
        if self.order:
            if self.outer != "causal":
                raise ValueError("order is a causal model's; a masked model draws a new order for every image")
            check_order(self.order, self.seq_len)
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class_names for {self.num_classes} classes")

    def _settle_lists(self) -> None:
        """Entries of several values as tuples: ``order``, ``class_names``, a latent channel's own scale and shift."""
        object.__setattr__(self, "order", _integers("order", self.order, 0, MAX_TOKENS - 1, most=MAX_TOKENS))
        names = _listed("class_names", self.class_names, _MAX_CLASSES)
        for name in names:
            if not isinstance(name, str) or len(name) > MAX_CLASS_NAME:
                raise ValueError(f"class_names holds {shown(name)}; expected texts of at most {MAX_CLASS_NAME} characters")
        object.__setattr__(self, "class_names", names)
        for name in ("latent_scale", "latent_shift"):
            value = getattr(self, name)
            if isinstance(value, (int, float)):
                object.__setattr__(self, name, number(name, value, -1e6, 1e6))
                continue
            values = tuple(number(name, v, -1e6, 1e6) for v in _listed(name, value, 1 << 16))
            if len(values) != self.vae_embed_dim:
                raise ValueError(
                    f"{name} has {len(values)} values; expected one number or {self.vae_embed_dim} (one per latent channel)"
                )
            object.__setattr__(self, name, values)

    @property
    def grid_size(self) -> int:
        """Tokens along one side of the image."""
        return self.img_size // (self.vae_stride * self.patch_size)

    @property
    def seq_len(self) -> int:
        """Tokens per image, L."""
        return self.grid_size**2

    @property
    def token_dim(self) -> int:
        """Features per token, D."""
        return self.vae_embed_dim * self.patch_size**2

    @property
    def z_width(self) -> int:
        """Width of the outer model's condition vector z, C."""
        return self.decoder_width

    @property
    def inner_head_dim(self) -> int:
        return self.inner_width // self.inner_heads

    @property
    def inner_attention_scale(self) -> float:
        """Softmax scale of the inner attention, 0.25 / sqrt(head_dim) as in the published code."""
        return float(0.25 / self.inner_head_dim**0.5)

    @property
    def generation_order(self) -> tuple[int, ...]:
        """A causal model's order of grid positions (raster unless configured)."""
        return self.order or tuple(range(self.seq_len))

    def replace(self, **changes: Any) -> ArinarConfig:
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ArinarConfig:
        return cls(**_known(cls, data, "model config"))

    @classmethod
    def from_json(cls, text: str) -> ArinarConfig:
        return cls.from_dict(parse_json(text))


# Entry -> least and largest value.
_INTEGERS: dict[str, tuple[int, int]] = {
    "img_size": (1, _MAX_SIDE),
    "vae_stride": (1, 1 << 10),
    "patch_size": (1, 1 << 6),
    "vae_embed_dim": (1, 1 << 12),
    "num_classes": (1, _MAX_CLASSES),
    "buffer_size": (0, MAX_TOKENS),
    "encoder_width": (1, _MAX_WIDTH),
    "encoder_depth": (0, MAX_DEPTH),
    "encoder_heads": (1, _MAX_HEADS),
    "decoder_width": (1, _MAX_WIDTH),
    "decoder_depth": (0, MAX_DEPTH),
    "decoder_heads": (1, _MAX_HEADS),
    "inner_width": (1, _MAX_WIDTH),
    "inner_depth": (0, MAX_DEPTH),
    "inner_heads": (1, _MAX_HEADS),
    "num_gaussians": (1, 1 << 12),
    "default_num_iter": (1, MAX_TOKENS),
}
_NUMBERS: dict[str, tuple[float, float]] = {
    "mlp_ratio": (1e-3, 64),
    "inner_mlp_ratio": (1e-3, 64),
    "norm_eps": (0, 1),
    "default_guidance_scale": (1, 1e6),
    "default_temperature": (1e-6, 1e6),
}
_VAE_INTEGERS: dict[str, tuple[int, int]] = {
    "embed_dim": (1, 1 << 12),
    "channels": (1, 1 << 12),
    "num_res_blocks": (1, 64),
    "in_channels": (1, 1 << 10),
    "out_channels": (1, 1 << 10),
    "norm_groups": (1, 1 << 12),
}
_VAE_NUMBERS: dict[str, tuple[float, float]] = {"norm_eps": (0, 1)}


def _settle_numbers(config: Any, integers: dict[str, tuple[int, int]], numbers: dict[str, tuple[float, float]]) -> None:
    for name, limits in integers.items():
        object.__setattr__(config, name, integer(name, getattr(config, name), *limits))
    for name, bounds in numbers.items():
        number(name, getattr(config, name), *bounds)


def _listed(name: str, value: Any, most: int) -> tuple[Any, ...]:
    """A list's values. Raises ValueError for text, for what is no list, and for more than ``most`` values."""
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} is {shown(value)}; expected a list")
    values = tuple(value)
    if len(values) > most:
        raise ValueError(f"{name} has {len(values):,} values; expected at most {most:,}")
    return values


def _integers(name: str, value: Any, low: int, high: int, most: int) -> tuple[int, ...]:
    return tuple(integer(name, v, low, high) for v in _listed(name, value, most))


def check_order(order: tuple[int, ...], seq_len: int) -> None:
    """Raise ValueError unless ``order`` is a permutation of 0..seq_len-1."""
    if len(order) != seq_len:
        raise ValueError(f"order has {len(order)} positions; expected {seq_len}, one per token")
    if sorted(order) != list(range(seq_len)):
        raise ValueError(f"order is not a permutation of 0..{seq_len - 1}: every position must occur exactly once")


def _known(cls: type, data: dict[str, Any], what: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{what} is {shown(data)}; expected an object of named entries")
    names = {f.name for f in fields(cls)}
    unknown = sorted(shown(name).strip("'") for name in set(data) - names)
    if unknown:
        near = {name: get_close_matches(str(name), names, n=1) for name in unknown[:6]}
        listed = ", ".join(f"{name} (nearest: {found[0]})" if found else str(name) for name, found in near.items())
        more = f" and {len(unknown) - len(near)} more" if len(unknown) > len(near) else ""
        raise ValueError(f"{what} has unknown entries {listed}{more}; mistyped, or written by a newer version?")
    return dict(data)


def _published(width: int, depth: int, heads: int, **changes: Any) -> ArinarConfig:
    return ArinarConfig(
        encoder_width=width,
        encoder_depth=depth,
        encoder_heads=heads,
        decoder_width=width,
        decoder_depth=depth,
        decoder_heads=heads,
        **changes,
    )


def _mar(width: int, depth: int) -> dict[str, Any]:
    return {"head": "diffusion", "inner_width": width, "inner_depth": depth}


_DIGITS_NAMES = tuple(str(digit) for digit in range(10))
_DIGITS = ArinarConfig(
    img_size=32,
    vae_stride=8,
    num_classes=10,
    buffer_size=4,
    encoder_width=96,
    encoder_depth=3,
    encoder_heads=4,
    decoder_width=96,
    decoder_depth=3,
    decoder_heads=4,
    inner_width=64,
    inner_depth=1,
    inner_heads=4,
    default_num_iter=12,
    default_guidance_scale=4.0,
    class_names=_DIGITS_NAMES,
)

# 8 x 8 tokens of capitals in many tones: many enough for their order, and for what is reused between steps, to show.
_LETTERS = _DIGITS.replace(
    img_size=64,
    num_classes=26,
    buffer_size=8,
    encoder_width=160,
    encoder_depth=4,
    encoder_heads=5,
    decoder_width=160,
    decoder_depth=4,
    decoder_heads=5,
    inner_width=96,
    default_num_iter=64,
    class_names=tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
)

#: Named configurations. `base`, `large`, `huge` have the sizes of the published code (its later version; the
#: first version's large and huge are shallower: `large-v1`, `huge-v1`, and its `base-v1` has 4 inner heads).
PRESETS: dict[str, ArinarConfig] = {
    "base": _published(768, 14, 12),
    "large": _published(1024, 18, 16, inner_width=1024),
    "huge": _published(1280, 22, 16, inner_width=1024),
    "base-v1": _published(768, 14, 12, inner_heads=4),
    "large-v1": _published(1024, 16, 16, inner_heads=4),
    "huge-v1": _published(1280, 20, 16, inner_heads=4),
    # MAR's (github.com/LTH14/mar), with its recommended settings but for 64 outer steps instead of 256.
    "mar_base": _published(768, 12, 12, default_guidance_scale=2.9, **_mar(1024, 6)),
    "mar_large": _published(1024, 16, 16, default_guidance_scale=3.0, **_mar(1280, 8)),
    "mar_huge": _published(1280, 20, 16, default_guidance_scale=3.2, **_mar(1536, 12)),
    # One stack of the same number of blocks as base's two.
    "base-causal": ArinarConfig(outer="causal", encoder_depth=0, decoder_depth=28),
    "digits": _DIGITS,
    "letters": _LETTERS,
    "digits-causal": _DIGITS.replace(outer="causal", encoder_depth=0, decoder_depth=6, default_num_iter=16),
    "digits-mar": _DIGITS.replace(**_mar(128, 3), sampling_steps="ddim25", default_guidance_scale=3.0),
}

#: Autoencoders that belong to the presets: `kl16` is the published one.
VAE_PRESETS: dict[str, VaeConfig] = {
    "kl16": VaeConfig(),
    "digits": VaeConfig(
        channels=8, channel_multipliers=(1, 2, 4, 8), num_res_blocks=1, encoder_attention_levels=(), norm_groups=4
    ),
    "letters": VaeConfig(
        channels=16, channel_multipliers=(1, 2, 4, 4), num_res_blocks=1, encoder_attention_levels=(), norm_groups=4
    ),
}
