"""Which graphs a model has: those of its outer network, of its head, of its autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType

from arinar.config import ArinarConfig
from arinar.model import Arinar, CausalArinar
from arinar.outer import MaskedOuter
from arinar.runtime.bundle import TensorInfo
from arinar.runtime.labels import MOST_CLASSES
from arinar.vae import AutoencoderKL

from . import diffusion_head, gmm_head
from .cuda import MaskedStepCuda
from .spec import GraphSpec, cache_tensors, tensor
from .steps import (
    CausalPrefill,
    CausalStep,
    CausalStepInPlace,
    MaskedFirst,
    MaskedStep,
    TokensToLatents,
    VaeDecoder,
    VaeEncoder,
    cache_slots,
)
from .trace import DEFAULT_OPSET

# From here on ONNX has an operator that writes a row into a cache (TensorScatter).
IN_PLACE_OPSET = 24

#: Head, as the config names it -> the module with its graphs. Each has LAW, COMPOSED, float32_islands and specs, as `gmm_head`
#: documents them, and, where it composes graphs, composed_spec, in_float16, reference and compose.
HEADS: dict[str, ModuleType] = {"gmm": gmm_head, "diffusion": diffusion_head}


def graph_specs(
    model: Arinar, vae: AutoencoderKL, law: Mapping[str, int] | None = None, opset: int = DEFAULT_OPSET
) -> dict[str, GraphSpec]:
    """The graphs that are traced for a model, by name, in the order of the data. ``law``: what the head's draws depend on
    besides the config; default the published."""
    config, head = model.config, HEADS[model.config.head]
    if isinstance(model, CausalArinar):
        dtype = str(model.fake_latent.dtype).removeprefix("torch.")
        outer = _causal_outer(model, dtype, opset >= IN_PLACE_OPSET)
    else:
        assert isinstance(model, MaskedOuter)
        outer = _masked_outer(model)
    found = [*outer, *head.specs(model.head, law or head.LAW), *_autoencoder(config, vae)]
    return {spec.name: spec for spec in found}


def cuda_forms(model: Arinar) -> dict[str, GraphSpec]:
    """The graphs that are traced once more, in the form for ONNX Runtime's CUDA kernels."""
    if not isinstance(model, MaskedOuter):
        return {}
    return {"outer_step": replace(_masked_outer(model)[-1], module=MaskedStepCuda(model))}


def _masked_outer(outer: MaskedOuter) -> list[GraphSpec]:
    config = outer.config
    length = config.seq_len
    middle = length // 2
    positions = ("visible_positions", "target_positions", "hidden_positions")
    return [
        GraphSpec(
            "outer_first",
            MaskedFirst(outer),
            (tensor("labels", (1,), "int64"), *_mixed(1)),
            (tensor("z", (length, config.z_width)),),
            _classes(config),
            ({}, {}, {}),
            phase="first",
        ),
        GraphSpec(
            "outer_step",
            MaskedStep(outer),
            (
                tensor("visible_tokens", ("V", "B", config.token_dim)),
                *(tensor(name, (axis, "B"), "int64") for name, axis in zip(positions, "VPU", strict=True)),
                tensor("labels", ("G", "B"), "int64"),
                *_mixed("G", "B"),
            ),
            (tensor("z", ("G*P*B", config.z_width)),),
            dict.fromkeys(positions, (0, length)) | _classes(config),
            # The first step (nothing visible), the last (nothing hidden), one in the middle.
            (
                {"V": 0, "B": 1, "P": 1, "U": length - 1, "G": 1},
                {"V": length - 2, "B": 1, "P": 2, "U": 0, "G": 2},
                {"V": middle, "B": 3, "P": 1, "U": length - middle - 1, "G": 2},
            ),
            phase="outer",
        ),
    ]


def _mixed(*axes: int | str) -> tuple[TensorInfo, ...]:
    """Further classes of an image, and their weights."""
    shape: tuple[int | str, ...] = (MOST_CLASSES - 1, *axes)
    return tensor("mixed_labels", shape, "int64"), tensor("mixed_weights", shape)


def _classes(config: ArinarConfig) -> dict[str, tuple[int, int]]:
    return {"labels": (-1, config.num_classes), "mixed_labels": (0, config.num_classes)}


def _causal_outer(outer: CausalArinar, dtype: str, in_place: bool) -> list[GraphSpec]:
    config = outer.config
    depth, heads = config.decoder_depth, config.decoder_heads
    head_dim, slots = config.decoder_width // heads, cache_slots(config)
    z = tensor("z", ("N", config.z_width))

    def caches(kind: str, length: int) -> tuple[TensorInfo, ...]:
        return cache_tensors(kind, depth, "N", heads, length, head_dim, dtype)

    return [
        GraphSpec(
            "outer_prefill",
            CausalPrefill(outer),
            (tensor("labels", ("N",), "int64"), *_mixed("N")),
            (z, *caches("present", config.buffer_size)),
            _classes(config),
            ({"N": 1}, {"N": 2}, {"N": 6}),
            phase="outer",
        ),
        GraphSpec(
            "outer_step",
            CausalStepInPlace(outer) if in_place else CausalStep(outer),
            (
                tensor("token", ("B", config.token_dim)),
                tensor("rows", ("N",), "int64"),
                tensor("position", (1,), "int64"),
                *caches("past_key_values", slots),
            ),
            (z, *caches("present", slots if in_place else 1)),
            {"rows": (0, 1), "position": (0, config.seq_len - 1)},
            ({"N": 1, "B": 1}, {"N": 2, "B": 1}, {"N": 6, "B": 3}),
            phase="outer",
        ),
    ]


def _autoencoder(config: ArinarConfig, vae: AutoencoderKL) -> list[GraphSpec]:
    side, length, features = config.grid_size * config.patch_size, config.seq_len, config.token_dim
    latents = tensor("latents", ("B", config.vae_embed_dim, side, side))
    images = tensor("images", ("B", config.img_size, config.img_size, 3), "uint8")
    batches: tuple[dict[str, int], ...] = ({"B": 1}, {"B": 3}) if config.img_size < 128 else ({"B": 1},)
    return [
        GraphSpec(
            "tokens_to_latents",
            TokensToLatents(config),
            (tensor("tokens", (length, "B", features)), tensor("ranks", ("B", length), "int64")),
            (tensor("raster", ("B", length, features)), latents),
            {"ranks": (0, length)},
            batches,
            phase="decode",
            small=True,
        ),
        GraphSpec("vae_decoder", VaeDecoder(vae), (latents,), (images,), {}, batches, phase="decode"),
        GraphSpec("vae_encoder", VaeEncoder(vae), (images,), (latents,), {"images": (0, 256)}, batches, phase="encode"),
    ]
