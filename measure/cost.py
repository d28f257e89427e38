"""What an image costs at least: operations and weight bytes, from the configuration alone.

Counts are of the computation as the graphs do it (exact visible lengths; what tables hold is not computed; last decoder
block at the predicted positions only). One multiply-add is two operations. Only products of matrices and convolutions
count: norms, activations, gathers and draws do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from arinar.config import ArinarConfig, VaeConfig
from arinar.diffusion_schedule import most_steps
from arinar.runtime.kernels.source import ROWS, block_columns
from arinar.schedule import Step, steps


@dataclass(frozen=True)
class Cost:
    """One image: operations by phase, and how many weights it reads.

    outer, inner, vae : operations of the phase.
    attention : those operations of ``outer`` and ``inner`` in which no weight takes part (queries by keys, scores by
        values); they stay in float32 where weights are quantised.
    outer_weights, inner_weights, vae_weights : weights in the phase's products, a number, not bytes.
    passes : outer steps; each reads the weights of the outer model and of the inner one, once at least.
    """

    outer: float
    inner: float
    vae: float
    attention: float
    outer_weights: int
    inner_weights: int
    vae_weights: int
    passes: int

    @property
    def total(self) -> float:
        return self.outer + self.inner + self.vae

    def weight_bytes(self, bytes_per_weight: float, *, batch: int = 1, vae_bytes: float = 4) -> float:
        """Bytes of weights read for one image when ``batch`` are generated at a time (the VAE decodes them singly).

        The least possible: every pass reads each weight once, although the draws of a token pass over the head's
        weights one after the other, and rows that a backend launches apart over all. A causal model's cache is not counted.
        """
        transformers = self.passes * (self.outer_weights + self.inner_weights) * bytes_per_weight
        return transformers / batch + self.vae_weights * vae_bytes

    def seconds(self, peak: float, linear_peak: float | None = None) -> float:
        """Least time of the operations, at ``peak`` float32 operations per second; what has weights, the VAE apart, at
        ``linear_peak`` where that is another (8-bit integers)."""
        linear = self.outer + self.inner - self.attention
        return linear / (linear_peak or peak) + (self.attention + self.vae) / peak


def image_cost(config: ArinarConfig, num_iter: int, *, guided: bool, vae: VaeConfig | None = None) -> Cost:
    """Cost of one image. Causal models ignore ``num_iter``; without ``vae`` its cost is 0."""
    branches = 2 if guided else 1
    causal = config.outer == "causal"
    plan = steps(config.seq_len, config.seq_len if causal else num_iter)
    linear, attention = _causal(config, branches) if causal else _masked(config, plan, branches)
    inner_linear, inner_attention = (branches * config.seq_len * part for part in HEADS[config.head].token(config))
    side = config.grid_size * config.patch_size
    return Cost(
        outer=linear + attention,
        inner=inner_linear + inner_attention,
        vae=decoder_operations(vae, side) if vae else 0.0,
        attention=attention + inner_attention,
        outer_weights=outer_parameters(config),
        inner_weights=HEADS[config.head].parameters(config),
        vae_weights=decoder_parameters(vae) if vae else 0,
        passes=len(plan),
    )


def _block_parameters(width: int, mlp_ratio: float) -> int:
    return round((4 + 2 * mlp_ratio) * width**2)


def _masked(config: ArinarConfig, plan: Sequence[Step], branches: int) -> tuple[float, float]:
    """Operations of all outer steps of one image: with weights, and of attention."""
    width, ratio, depth = config.decoder_width, config.mlp_ratio, config.decoder_depth
    block = _block_parameters(width, ratio)
    encoder = config.encoder_depth * _block_parameters(config.encoder_width, ratio)
    total = config.buffer_size + config.seq_len
    linear = attention = shared = 0.0
    for step in plan:
        known = total - step.masked  # visible tokens and the class buffer
        shared += 2 * (config.seq_len - step.masked) * config.token_dim * config.encoder_width
        linear += 2 * known * (encoder + config.encoder_width * width)
        linear += 2 * total * (depth - 1) * block
        if depth > 1:  # a table holds the first block's queries, keys and values of the hidden positions
            linear -= 2 * step.masked * 3 * width**2
        linear += 2 * total * 2 * width**2 + 2 * step.count * (block - 2 * width**2)  # the last block
        attention += 4 * known**2 * config.encoder_width * config.encoder_depth
        attention += 4 * total**2 * width * (depth - 1) + 4 * step.count * total * width
    return branches * linear + shared, branches * attention  # tokens are embedded once for both branches


def _causal(config: ArinarConfig, branches: int) -> tuple[float, float]:
    """As `_masked`: the class buffer, then a token a step, each against the whole cache, whatever of it is filled."""
    width, buffer, steps_after = config.decoder_width, config.buffer_size, config.seq_len - 1
    blocks = config.decoder_depth * _block_parameters(width, config.mlp_ratio)
    linear = 2 * buffer * blocks + 2 * steps_after * (blocks + config.token_dim * width)
    attention = 4 * width * config.decoder_depth * (buffer**2 + steps_after * (buffer + config.seq_len - 1))
    return float(branches * linear), float(branches * attention)


def _gmm_token(config: ArinarConfig) -> tuple[float, float]:
    """Operations of all features of one token, one branch: with weights, and of attention.

    A feature attends to those before it through the cache; the first one's cache holds one empty slot.
    """
    width, depth, features = config.inner_width, config.inner_depth, config.token_dim
    conditioning = _conditioning_parameters(config)
    linear = 2 * conditioning + 2 * features * (gmm_parameters(config) - conditioning)
    return float(linear), float(depth * 4 * width * (features * (features - 1) / 2 + 1))


def _conditioning_parameters(config: ArinarConfig) -> int:
    """Start of the sequence, six modulations a block, two of the head: products of z, once per token."""
    return config.z_width * config.inner_width * (6 * config.inner_depth + 3)


def outer_parameters(config: ArinarConfig) -> int:
    """Weights of the outer model's products (biases, norms, embeddings and tables not counted)."""
    width, ratio = config.decoder_width, config.mlp_ratio
    decoder = config.decoder_depth * _block_parameters(width, ratio)
    if config.outer == "causal":
        return decoder + config.token_dim * width
    encoder = config.encoder_depth * _block_parameters(config.encoder_width, ratio)
    return encoder + decoder + config.encoder_width * (config.token_dim + width)


def gmm_parameters(config: ArinarConfig) -> int:
    """As `outer_parameters`, of the Gaussian mixture head."""
    width = config.inner_width
    blocks = config.inner_depth * _block_parameters(width, config.inner_mlp_ratio)
    return _conditioning_parameters(config) + blocks + width * (1 + 3 * config.num_gaussians)


def _diffusion_token(config: ArinarConfig) -> tuple[float, float]:
    """As `_gmm_token`, of a diffusion head: the conditioning once, the rest at each sampling step; it has no attention. Of
    steps that grow fewer over the outer ones, the largest number counts."""
    conditioning = config.z_width * config.inner_width
    step = diffusion_parameters(config) - conditioning
    return float(2 * conditioning + 2 * most_steps(config.sampling_steps) * step), 0.0


def diffusion_parameters(config: ArinarConfig) -> int:
    """As `outer_parameters`, of the diffusion head: a block's two matrices and three modulations, the last layer's two and
    its outputs; timesteps are a table."""
    width, features = config.inner_width, config.token_dim
    blocks = (5 * config.inner_depth + 2) * width**2
    return config.z_width * width + features * width + blocks + 2 * features * width


class HeadCost(NamedTuple):
    """Of a head: operations of one token in one branch, with weights and of attention; weights of its products."""

    token: Callable[[ArinarConfig], tuple[float, float]]
    parameters: Callable[[ArinarConfig], int]


class FeatureCost(NamedTuple):
    """One feature of N rows by the kernels of `arinar.runtime.kernels`: launches; bytes of weights and of rows that a GPU's
    multiprocessors read, each block counted; multiply-adds, those of rows that fill no tile included."""

    launches: int
    weight_bytes: int
    row_bytes: int
    multiply_adds: int


def kernel_feature(config: ArinarConfig, rows: int, bytes_per_number: int = 2) -> FeatureCost:
    """Every 8 rows read the weights once, and every block the rows that its columns need (head and draw are left out)."""
    tiles, width, hidden = -(-rows // ROWS), config.inner_width, int(config.inner_width * config.inner_mlp_ratio)
    normed = width * (4 + 2 * bytes_per_number)  # the residual stream, scale, shift
    products = {
        "qkv": (3 * width, width, normed),
        "project": (width, width, width * bytes_per_number),
        "expand": (hidden, width, normed),
        "contract": (width, hidden, hidden * bytes_per_number),
    }
    weights = config.inner_depth * sum(columns * inputs for columns, inputs, _ in products.values())
    read = sum(-(-columns // block_columns(name)) * size for name, (columns, _, size) in products.items())
    cached = config.token_dim * width * bytes_per_number  # keys and values of half the positions, on average
    return FeatureCost(
        launches=5 * config.inner_depth + 1,
        weight_bytes=tiles * weights * bytes_per_number,
        row_bytes=rows * config.inner_depth * (read + cached),
        multiply_adds=tiles * ROWS * weights,
    )


#: By `config.head`.
HEADS = {"gmm": HeadCost(_gmm_token, gmm_parameters), "diffusion": HeadCost(_diffusion_token, diffusion_parameters)}


def decoder_operations(vae: VaeConfig, side: int) -> float:
    """Convolutions and the middle attention of the VAE decoder, for a latent of ``side`` x ``side``."""
    width = vae.channels * vae.channel_multipliers[-1]
    return 4.0 * side**4 * width + sum(2.0 * weights * pixels for weights, pixels in _decoder_convolutions(vae, side))


def decoder_parameters(vae: VaeConfig) -> int:
    """Weights of the VAE decoder's convolutions."""
    return sum(weights for weights, _ in _decoder_convolutions(vae, 1))


def _decoder_convolutions(vae: VaeConfig, side: int) -> list[tuple[int, int]]:
    """Weights and output pixels of each convolution, the four 1 x 1 of the middle attention among them."""
    widths = [vae.channels * m for m in vae.channel_multipliers]
    pixels, inputs = side**2, widths[-1]
    found = [(vae.embed_dim**2, pixels), (9 * vae.embed_dim * inputs, pixels)]
    found += 4 * [(9 * inputs**2, pixels)] + 4 * [(inputs**2, pixels)]
    for level in reversed(range(len(widths))):
        for _ in range(vae.num_res_blocks + 1):
            found += [(9 * inputs * widths[level], pixels), (9 * widths[level] ** 2, pixels)]
            if inputs != widths[level]:
                found.append((inputs * widths[level], pixels))
            inputs = widths[level]
        if level > 0:
            pixels *= 4
            found.append((9 * inputs**2, pixels))
    return [*found, (9 * inputs * vae.out_channels, pixels)]
