"""What an image costs at least: operations and weight bytes, from the configuration alone.

Counts are of the computation as the graphs do it (exact visible lengths, last decoder block at the predicted positions
only). One multiply-add is two operations; norms, activations and the mixture draw are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from arinar.config import ArinarConfig, VaeConfig
from arinar.schedule import Step, steps


@dataclass(frozen=True)
class Cost:
    """Operations of one image by phase, and bytes of weights that each phase reads per launch (float32)."""

    outer: float
    inner: float
    vae: float
    outer_weights: float
    inner_weights: float
    launches: int

    @property
    def total(self) -> float:
        return self.outer + self.inner + self.vae


def image_cost(config: ArinarConfig, num_iter: int, *, guided: bool, vae: VaeConfig | None = None) -> Cost:
    """Cost of one image generated alone. Causal models ignore ``num_iter``."""
    branches = 2 if guided else 1
    causal = config.outer == "causal"
    plan = steps(config.seq_len, config.seq_len if causal else num_iter, 1.0)
    outer = sum(_causal_step(config, step) if causal else _masked_step(config, step) for step in plan)
    if causal:
        outer += _blocks(config.decoder_width, config.mlp_ratio, config.decoder_depth, config.buffer_size)
    return Cost(
        outer=branches * outer,
        inner=branches * config.seq_len * _inner_token(config),
        vae=decoder_operations(vae, config.grid_size * config.patch_size) if vae else 0.0,
        outer_weights=4 * outer_parameters(config),
        inner_weights=4 * inner_parameters(config),
        launches=2 * len(plan) + 2,
    )


def _block_parameters(width: int, mlp_ratio: float) -> float:
    return (4 + 2 * mlp_ratio) * width**2


def _blocks(width: int, mlp_ratio: float, depth: int, length: int) -> float:
    """Operations of full transformer blocks over ``length`` positions."""
    return depth * (2 * length * _block_parameters(width, mlp_ratio) + 4 * length**2 * width)


def _masked_step(config: ArinarConfig, step: Step) -> float:
    visible = config.buffer_size + config.seq_len - step.masked
    total = config.buffer_size + config.seq_len
    width, ratio, predicted = config.decoder_width, config.mlp_ratio, step.count
    last = 4 * total * width**2 + 2 * predicted * (2 + 2 * ratio) * width**2 + 4 * predicted * total * width
    return (
        _blocks(config.encoder_width, ratio, config.encoder_depth, visible)
        + 2 * visible * config.encoder_width * width
        + _blocks(width, ratio, config.decoder_depth - 1, total)
        + last
    )


def _causal_step(config: ArinarConfig, step: Step) -> float:
    if step.index == 0:
        return 0.0
    width = config.decoder_width
    slots = config.buffer_size + config.seq_len - 1  # the whole cache is read, whatever is filled
    return config.decoder_depth * (2 * _block_parameters(width, config.mlp_ratio) + 4 * slots * width)


def _inner_token(config: ArinarConfig) -> float:
    """Operations of all features of one token, one branch."""
    width, depth, features = config.inner_width, config.inner_depth, config.token_dim
    conditioning = 2 * config.z_width * width * (6 * depth + 3)
    feature = depth * (2 * _block_parameters(width, config.inner_mlp_ratio) + 2 * features * width)
    return conditioning + features * feature


def outer_parameters(config: ArinarConfig) -> float:
    """Weights of the outer blocks (biases, norms and embeddings not counted)."""
    encoder = config.encoder_depth * _block_parameters(config.encoder_width, config.mlp_ratio)
    return encoder + config.decoder_depth * _block_parameters(config.decoder_width, config.mlp_ratio)


def inner_parameters(config: ArinarConfig) -> float:
    depth, width = config.inner_depth, config.inner_width
    return depth * _block_parameters(width, config.inner_mlp_ratio) + config.z_width * width * (6 * depth + 3)


def decoder_operations(vae: VaeConfig, side: int) -> float:
    """Convolutions and the middle attention of the VAE decoder, for a latent of ``side`` x ``side``."""
    widths = [vae.channels * m for m in vae.channel_multipliers]

    def conv(inputs: int, outputs: int, pixels: int, kernel: int = 3) -> float:
        return 2.0 * kernel**2 * inputs * outputs * pixels

    pixels, inputs = side**2, widths[-1]
    total = conv(vae.embed_dim, vae.embed_dim, pixels, 1) + conv(vae.embed_dim, inputs, pixels)
    total += 4 * conv(inputs, inputs, pixels) + 4 * conv(inputs, inputs, pixels, 1) + 4.0 * pixels**2 * inputs
    for level in reversed(range(len(widths))):
        for _ in range(vae.num_res_blocks + 1):
            total += conv(inputs, widths[level], pixels) + conv(widths[level], widths[level], pixels)
            if inputs != widths[level]:
                total += conv(inputs, widths[level], pixels, 1)
            inputs = widths[level]
        if level > 0:
            pixels *= 4
            total += conv(inputs, inputs, pixels)
    return total + conv(inputs, vae.out_channels, pixels)
