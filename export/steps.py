"""Step modules: one thin `nn.Module` per ONNX graph, around the trained model's own sub-modules.

The loop keeps its state in generation order, position first: tokens (L, B, D), order (L, B), uniforms (L, B, D, U).
What a step reads or writes is then a contiguous slice of it, so no backend ever gathers, scatters or copies state
between steps. Hence the (V, B, ...) layouts here, turned to batch first inside the graph.

Letters: B images, G guidance branches (1, or 2: conditional then unconditional), L tokens, V visible, P to predict
now, U still hidden (V + P + U = L), D features, C outer width, W inner width, K Gaussians, H heads, N rows. Those of
the heads are in files of their own (`arinar.export.gmm_head`, `arinar.export.diffusion_head`).

Half precision is written here, not left to a converter: weights and GEMMs run in the module's dtype, while norms,
softmax, the mixture head and everything after it stay in float32. The casts around norms and softmax cost TensorRT nothing: it
fuses them with what stands beside them, and attention into one kernel, whose first product then sums in float32 (without
them in float16; read in engines of TensorRT-RTX, docs/gpu.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arinar.config import ArinarConfig
from arinar.head import wide
from arinar.model import Arinar, unpatchify
from arinar.outer import Attention, Block, CausalOuter, MaskedOuter
from arinar.vae import AutoencoderKL, posterior

__all__ = [
    "CausalPrefill",
    "CausalStep",
    "CausalStepInPlace",
    "MaskedFirst",
    "MaskedStep",
    "TokensToLatents",
    "VaeDecoder",
    "VaeEncoder",
    "half_precision",
    "half_precision_vae",
]

# Added to the scores of cache slots that hold nothing yet. Finite, so that a fully masked row stays finite, and
# within the range of float16 although scores are kept in float32.
MASKED_SCORE = -3.0e4


ArinarT = TypeVar("ArinarT", bound=Arinar)


def half_precision(model: ArinarT, float32_islands: Callable[[Any], Sequence[nn.Module]]) -> ArinarT:
    """A float16 copy of a transformer; what its float32 islands hold (norms, those of the head) keeps its float32 values.

    Raises ValueError naming a weight that float16 cannot hold.
    """
    half = copy.deepcopy(model).half()
    islands = set(float32_islands(half.head))
    exact = dict(model.named_modules())
    for name, module in half.named_modules():
        if isinstance(module, nn.LayerNorm) or module in islands:
            module.float().load_state_dict(exact[name].state_dict())
    for name, tensor in half.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"weight {name!r} holds values beyond float16 (65504); export this model as fp32")
    return half


class Float32Norm(nn.Module):
    """A group norm computed in float32, back in the input's dtype."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.float()).to(x.dtype)
        return out


def half_precision_vae(vae: AutoencoderKL) -> AutoencoderKL:
    """A float16 copy of an autoencoder with float32 norms. Its activations are the largest of all: see whether they
    leave room (`arinar.calibration.activations`) before using it."""
    half = copy.deepcopy(vae).half()
    norms = [(p, name, m) for p in half.modules() for name, m in p.named_children() if isinstance(m, nn.GroupNorm)]
    for parent, name, norm in norms:
        setattr(parent, name, Float32Norm(norm))
    return half


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm with float32 statistics, back in the input's dtype."""
    weight, bias = wide(norm.weight), wide(norm.bias)
    return F.layer_norm(wide(x), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Full attention: q (N, H, S, d), k and v (N, H, T, d) -> (N, H, S, d); softmax in float32."""
    scores = (q * scale) @ k.transpose(2, 3)
    return torch.softmax(wide(scores), -1).to(v.dtype) @ v


def attend_cached(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """One new position against a cache of fixed length, without appending to it (which would copy it).

    q, k, v (N, H, 1, d) of the new position; past_k, past_v (N, H, S, d); bias (S,) 0 for slots that are filled and
    MASKED_SCORE for the others -> (N, H, 1, d).
    """
    q = q * scale
    past_scores = wide(q @ past_k.transpose(2, 3)) + bias  # (N, H, 1, S)
    new_score = wide(q * k).sum(-1, keepdim=True)  # (N, H, 1, 1)
    weights = torch.softmax(torch.cat([past_scores, new_score], -1), -1).to(v.dtype)
    return weights[..., :-1] @ past_v + weights[..., -1:] * v


def filled_bias(slots: int, first: int, count: int) -> Tensor:
    """(count, slots) table: row i admits the first ``first + i`` slots. Gathered by position, never computed from it
    (a mask compared inside the graph crashes TensorRT's builder next to a cache)."""
    row, slot = torch.arange(count)[:, None] + first, torch.arange(slots)[None]
    return torch.where(slot < row, 0.0, MASKED_SCORE)


def class_table(outer: MaskedOuter | CausalOuter) -> Tensor:
    """(num_classes + 1, C): class embeddings, then the unconditional vector."""
    return torch.cat([outer.class_emb.weight, outer.fake_latent]).detach()


def class_rows(labels: Tensor, num_classes: int) -> Tensor:
    """Labels with -1 = unconditional -> rows of the class table."""
    return torch.where(labels < 0, num_classes, labels)


def class_vectors(table: Tensor, labels: Tensor, others: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Rows of a class table (num_classes + 1, C), interpolated: labels (...) with -1 = unconditional, further classes and
    their weights (M, ...) -> (..., C). With weights of 0 exactly the labels' rows, and without weights."""
    rows = F.embedding(class_rows(labels, table.shape[0] - 1), table)
    if others is None or weights is None:
        return rows
    first = wide(rows)
    return (first + ((wide(F.embedding(others, table)) - first) * weights[..., None]).sum(0)).to(table.dtype)


def split_heads(attn: Attention, qkv: Tensor) -> Sequence[Tensor]:
    """(N, S, j * C) -> j tensors (N, H, S, d)."""
    parts = qkv.shape[-1] // attn.proj.in_features
    return [part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in qkv.chunk(parts, -1)]


def merge_heads(attn: Attention, x: Tensor) -> Tensor:
    """(N, H, S, d) -> (N, S, C), through the output projection."""
    out: Tensor = attn.proj(x.transpose(1, 2).flatten(2))
    return out


def feed_forward(block: Block, x: Tensor) -> Tensor:
    out: Tensor = x + block.mlp(layer_norm(x, block.norm2))
    return out


def head_scale(attn: Attention) -> float:
    return float((attn.proj.in_features // attn.heads) ** -0.5)


class MaskedNetwork(nn.Module):
    """What the steps of a masked model share: tables by position, encoder, decoder.

    Exact savings over the full network: hidden positions enter the decoder as rows of one constant table, and so do
    their queries, keys and values in its first block; positions come in any order (attention does not care), so nothing
    is scattered; the last decoder block computes queries, projection and MLP for the predicted positions alone. Linear
    layers see matrices (N * S, C), whose bias is part of the product.
    """

    class_table: Tensor
    encoder_pos_buffer: Tensor
    encoder_pos: Tensor
    decoder_pos_buffer: Tensor
    decoder_pos: Tensor
    unknown_table: Tensor
    unknown_qkv: Tensor
    target_pos: Tensor

    def __init__(self, outer: MaskedOuter) -> None:
        super().__init__()
        self.outer, config = outer, outer.config
        self.buffer = config.buffer_size
        encoder_pos, decoder_pos = outer.encoder_pos_embed_learned[0], outer.decoder_pos_embed_learned[0]
        self.register_buffer("class_table", class_table(outer))
        self.register_buffer("encoder_pos_buffer", encoder_pos[: self.buffer].detach().clone())
        self.register_buffer("encoder_pos", encoder_pos[self.buffer :].detach().clone())
        self.register_buffer("decoder_pos_buffer", decoder_pos[: self.buffer].detach().clone())
        self.register_buffer("decoder_pos", decoder_pos[self.buffer :].detach().clone())
        unknown = wide(outer.mask_token[0]) + wide(decoder_pos[self.buffer :])
        self.register_buffer("unknown_table", unknown.to(decoder_pos.dtype).detach())
        self.register_buffer("target_pos", outer.diffusion_pos_embed_learned[0].detach().clone())
        if len(outer.decoder_blocks) > 1:  # else the first block is the last, whose queries are those of the targets
            first = outer.decoder_blocks[0]
            assert isinstance(first, Block)
            weight, bias = wide(first.attn.qkv.weight), wide(first.attn.qkv.bias)
            table = F.linear(layer_norm(unknown, first.norm1), weight, bias)  # (L, 3C)
            self.register_buffer("unknown_qkv", table.to(decoder_pos.dtype).detach())

    def prefix(self, classes: Tensor) -> Tensor:
        """Class vectors (N, C) -> what comes before the tokens (N, buffer, C)."""
        return layer_norm(classes[:, None] + self.encoder_pos_buffer, self.outer.z_proj_ln)

    def encode(self, x: Tensor) -> Tensor:
        """(N, buffer + V, C) -> the same, as the decoder takes it."""
        for block in self.outer.encoder_blocks:
            x = self.block(block, x)
        return rows_linear(layer_norm(x, self.outer.encoder_norm), self.outer.decoder_embed)

    def decode(self, rows_of: Callable[[Tensor], Tensor], known: Tensor, predicted: int) -> Tensor:
        """known (N, buffer + V, C); ``rows_of``: a table by position -> its rows of hidden positions (N, P + U, ...), those to
        predict first -> (N, P, C)."""
        blocks = self.outer.decoder_blocks
        x = torch.cat([rows_of(self.unknown_table), known], 1)  # (N, S, C)
        for index, block in enumerate(blocks[:-1]):
            assert isinstance(block, Block)
            qkv = None
            if index == 0:
                rest = rows_linear(layer_norm(known, block.norm1), block.attn.qkv)
                qkv = torch.cat([rows_of(self.unknown_qkv), rest], 1)  # (N, S, 3C)
            x = self.block(block, x, qkv)
        return layer_norm(self.last_block(blocks[-1], x, predicted), self.outer.decoder_norm)

    def block(self, block: nn.Module, x: Tensor, qkv: Tensor | None = None) -> Tensor:
        """(N, S, C) -> (N, S, C); ``qkv`` (N, S, 3C) where it is known already."""
        assert isinstance(block, Block)
        if qkv is None:
            qkv = rows_linear(layer_norm(x, block.norm1), block.attn.qkv)
        q, k, v = split_heads(block.attn, qkv)
        return self.finish(block, x, attend(q, k, v, head_scale(block.attn)))

    def last_block(self, block: nn.Module, x: Tensor, predicted: int) -> Tensor:
        """(GB, S, C) -> (GB, P, C): keys and values of every position, the rest for the first P."""
        assert isinstance(block, Block)
        attn, width = block.attn, x.shape[-1]
        normed = layer_norm(x, block.norm1)
        weight, bias = attn.qkv.weight, attn.qkv.bias
        (q,) = split_heads(attn, F.linear(normed[:, :predicted], weight[:width], bias[:width]))
        k, v = split_heads(attn, F.linear(normed, weight[width:], bias[width:]))
        return self.finish(block, x[:, :predicted], attend(q, k, v, head_scale(attn)))

    def finish(self, block: Block, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: x (N, S, C), attended (N, H, S, d) -> (N, S, C)."""
        x = x + rows_linear(attended.transpose(1, 2).flatten(2), block.attn.proj)
        hidden = F.gelu(rows_linear(layer_norm(x, block.norm2), block.mlp.fc1))
        return x + rows_linear(hidden, block.mlp.fc2)


class MaskedStep(MaskedNetwork):
    """Outer step of a masked model: z at the positions to predict, and at those only. Visible tokens are embedded once for
    both branches."""

    def forward(
        self,
        visible_tokens: Tensor,
        visible_positions: Tensor,
        target_positions: Tensor,
        hidden_positions: Tensor,
        labels: Tensor,
        mixed_labels: Tensor | None = None,
        mixed_weights: Tensor | None = None,
    ) -> Tensor:
        """visible_tokens (V, B, D), the positions (V|P|U, B) int64, labels (G, B) int64 with -1 = unconditional, further
        classes of an image and their weights (M, G, B) -> z (G * P * B, C) float32, conditional rows first."""
        outer, buffer = self.outer, self.buffer
        branches, batch = labels.shape
        predicted = target_positions.shape[0]

        x = outer.z_proj(visible_tokens.to(self.encoder_pos.dtype)) + F.embedding(visible_positions, self.encoder_pos)
        x = self.per_branch(layer_norm(x, outer.z_proj_ln), branches, batch)  # (GB, V, C)
        prefix = self.prefix(class_vectors(self.class_table, labels, mixed_labels, mixed_weights).flatten(0, 1))
        x = self.encode(torch.cat([prefix, x], 1))  # (GB, buffer + V, C)

        unknown = torch.cat([target_positions, hidden_positions])  # (P + U, B)
        visible_pos = self.per_branch(F.embedding(visible_positions, self.decoder_pos), branches, batch)
        known = torch.cat([x[:, :buffer] + self.decoder_pos_buffer, x[:, buffer:] + visible_pos], 1)

        def rows_of(table: Tensor) -> Tensor:
            return self.per_branch(F.embedding(unknown, table), branches, batch)

        z = self.decode(rows_of, known, predicted)  # (GB, P, C)
        z = z.unflatten(0, (branches, batch)).transpose(1, 2)  # (G, P, B, C)
        out: Tensor = wide((z + F.embedding(target_positions, self.target_pos)).flatten(0, 2))
        return out

    def per_branch(self, x: Tensor, branches: int, batch: int) -> Tensor:
        """(S, B, C) -> (G * B, S, C)."""
        return x.transpose(0, 1)[None].expand(branches, -1, -1, -1).flatten(0, 1)


class MaskedFirst(MaskedNetwork):
    """First outer step of a masked model, in which nothing is visible: z of all positions, by class alone.

    A graph of its own, as GPUs' libraries had better see no tensors without elements.
    """

    def forward(self, labels: Tensor, mixed_labels: Tensor | None = None, mixed_weights: Tensor | None = None) -> Tensor:
        """labels (1,) int64 with -1 = unconditional, further classes and their weights (M, 1) -> z (L, C) float32."""
        prefix = self.prefix(class_vectors(self.class_table, labels, mixed_labels, mixed_weights))
        known = self.encode(prefix) + self.decoder_pos_buffer
        z = self.decode(lambda table: table[None], known, len(self.target_pos))
        out: Tensor = wide(z[0] + self.target_pos)
        return out


def rows_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """A linear layer on (N, S, C) as one matrix (N * S, C): exported as a Gemm, whose bias costs nothing."""
    return linear(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class CausalPrefill(nn.Module):
    """Class buffer of a causal model: z of the first token, and the cache rows of the buffer."""

    class_table: Tensor
    prefix_pos: Tensor
    target_pos: Tensor
    causal_bias: Tensor

    def __init__(self, outer: CausalOuter) -> None:
        super().__init__()
        self.outer = outer
        self.register_buffer("class_table", class_table(outer))
        prefix = outer.encoder_pos_embed_learned[0, : outer.config.buffer_size].detach().clone()
        first = int(outer.order[0])
        prefix[-1] += outer.target_pos_embed_learned[0, first].detach()
        self.register_buffer("prefix_pos", prefix)
        self.register_buffer("target_pos", outer.diffusion_pos_embed_learned[0, first].detach().clone())
        size = outer.config.buffer_size
        future = torch.arange(size)[None] > torch.arange(size)[:, None]
        self.register_buffer("causal_bias", torch.where(future, MASKED_SCORE, 0.0))

    def forward(
        self, labels: Tensor, mixed_labels: Tensor | None = None, mixed_weights: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """labels (N,) int64, further classes and their weights (M, N) -> z (N, C) float32, then per layer keys and values
        (N, H, buffer, d)."""
        outer = self.outer
        x = class_vectors(self.class_table, labels, mixed_labels, mixed_weights)[:, None] + self.prefix_pos
        x = layer_norm(x, outer.z_proj_ln)  # (N, buffer, C)
        rows: list[Tensor] = []
        for block in outer.decoder_blocks:
            assert isinstance(block, Block)
            q, k, v = split_heads(block.attn, block.attn.qkv(layer_norm(x, block.norm1)))
            scores = wide((q * head_scale(block.attn)) @ k.transpose(2, 3)) + self.causal_bias
            x = x + merge_heads(block.attn, torch.softmax(scores, -1).to(v.dtype) @ v)
            x = feed_forward(block, x)
            rows += [k, v]
        z = layer_norm(x[:, -1], outer.decoder_norm) + self.target_pos
        return (wide(z), *rows)


class CausalStep(nn.Module):
    """Outer step of a causal model: one token in, z of the next out, new cache rows out.

    The cache has a fixed length and is only read: the caller writes the new rows at slot ``buffer + position``
    (so no step copies the cache, on any backend). The position is data, never a shape.
    """

    step_pos: Tensor
    target_pos: Tensor
    filled: Tensor

    def __init__(self, outer: CausalOuter) -> None:
        super().__init__()
        self.outer, config = outer, outer.config
        order, buffer = outer.order, config.buffer_size
        known, target = order[:-1], order[1:]
        embed = outer.encoder_pos_embed_learned[0, buffer + known] + outer.target_pos_embed_learned[0, target]
        self.register_buffer("step_pos", embed.detach())  # (L - 1, C)
        self.register_buffer("target_pos", outer.diffusion_pos_embed_learned[0, target].detach())
        self.register_buffer("filled", filled_bias(cache_slots(config), buffer, config.seq_len - 1))

    def forward(self, token: Tensor, rows: Tensor, position: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """token (B, D), rows (N,) int64: the image that each cache row belongs to, position (1,) int64: how many
        tokens came before this one, past keys and values per layer (N, H, S, d)
        -> z (N, C) float32, then per layer the new key and value rows (N, H, 1, d)."""
        outer = self.outer
        x = outer.z_proj(F.embedding(rows, token).to(self.step_pos.dtype)) + F.embedding(position, self.step_pos)
        x = layer_norm(x, outer.z_proj_ln)[:, None]  # (N, 1, C)
        bias = F.embedding(position, self.filled)[0]  # (S,)
        new: list[Tensor] = []
        for index, block in enumerate(outer.decoder_blocks):
            assert isinstance(block, Block)
            q, k, v = split_heads(block.attn, block.attn.qkv(layer_norm(x, block.norm1)))
            past_k, past_v = past[2 * index], past[2 * index + 1]
            x = x + merge_heads(block.attn, attend_cached(q, k, v, past_k, past_v, bias, head_scale(block.attn)))
            x = feed_forward(block, x)
            new += [k, v]
        z = layer_norm(x[:, 0], outer.decoder_norm) + F.embedding(position, self.target_pos)
        return (wide(z), *new)


class CausalStepInPlace(CausalStep):
    """As `CausalStep`, but the whole cache goes in and comes out with the new rows in it (ONNX's TensorScatter).

    A library that aliases the two (TensorRT) writes the rows where they belong, and nobody copies anything; others
    copy the cache once a step. The rows are in place before they are attended to, so the mask admits one slot more.
    """

    def __init__(self, outer: CausalOuter) -> None:
        super().__init__(outer)
        config = outer.config
        self.buffer = config.buffer_size
        self.register_buffer("filled", filled_bias(cache_slots(config), config.buffer_size + 1, config.seq_len - 1))

    def forward(self, token: Tensor, rows: Tensor, position: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """As `CausalStep.forward` -> z (N, C) float32, then per layer keys and values (N, H, S, d), updated."""
        outer = self.outer
        x = outer.z_proj(F.embedding(rows, token).to(self.step_pos.dtype)) + F.embedding(position, self.step_pos)
        x = layer_norm(x, outer.z_proj_ln)[:, None]  # (N, 1, C)
        bias = F.embedding(position, self.filled)[0]  # (S,)
        slots = (position + self.buffer).expand(rows.shape[0])  # (N,)
        present: list[Tensor] = []
        for index, block in enumerate(outer.decoder_blocks):
            assert isinstance(block, Block)
            q, k, v = split_heads(block.attn, block.attn.qkv(layer_norm(x, block.norm1)))
            k, v = scatter_rows(past[2 * index], k, slots), scatter_rows(past[2 * index + 1], v, slots)
            scores = wide((q * head_scale(block.attn)) @ k.transpose(2, 3)) + bias  # (N, H, 1, S)
            x = x + merge_heads(block.attn, torch.softmax(scores, -1).to(v.dtype) @ v)
            x = feed_forward(block, x)
            present += [k, v]
        z = layer_norm(x[:, 0], outer.decoder_norm) + F.embedding(position, self.target_pos)
        return (wide(z), *present)


def scatter_rows(cache: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """cache (N, H, S, d) with rows (N, H, 1, d) written at slots (N,), the same for all rows."""
    if torch.compiler.is_exporting():
        out: Tensor = torch.onnx.ops.symbolic(
            "TensorScatter", (cache, rows, slots), {"axis": 2}, dtype=cache.dtype, shape=cache.shape, version=24
        )
        return out
    return cache.index_copy(2, slots[:1], rows)


def cache_slots(config: ArinarConfig) -> int:
    """Length of a causal model's cache: the buffer and every token but the last, which is never fed back."""
    return config.buffer_size + config.seq_len - 1


class TokensToLatents(nn.Module):
    """Finished tokens in generation order -> raster order, and de-normalised latents for the VAE."""

    scale: Tensor
    shift: Tensor

    def __init__(self, config: ArinarConfig) -> None:
        super().__init__()
        self.config = config
        for name, value in (("scale", config.latent_scale), ("shift", config.latent_shift)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1))

    def forward(self, tokens: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (L, B, D) in generation order, ranks (B, L) int64: where in that order each grid position stands
        -> tokens (B, L, D) in raster order, latents (B, channels, h, w)."""
        features = tokens.shape[-1]
        raster = tokens.transpose(0, 1).gather(1, ranks[:, :, None].expand(-1, -1, features))
        return raster, unpatchify(raster, self.config.patch_size) / self.scale + self.shift


class VaeDecoder(nn.Module):
    """De-normalised latents -> finished images."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """latents (B, channels, h, w) float32 -> images (B, H, W, 3) uint8 RGB, rounded half to even."""
        image = self.vae.decode(latents.to(self.vae.post_quant_conv.weight.dtype)).float()
        return ((image + 1) / 2 * 255).clamp(0, 255).round().permute(0, 2, 3, 1).to(torch.uint8)


class VaeEncoder(nn.Module):
    """Images -> mean latents, de-normalised (what the decoder takes)."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> Tensor:
        """images (B, H, W, 3) uint8 RGB -> latents (B, channels, h, w) float32, the posterior mean."""
        x = images.float().permute(0, 3, 1, 2) / 127.5 - 1  # TensorRT transposes floats, not bytes
        mean, _ = posterior(self.vae.encode(x.to(self.vae.quant_conv.weight.dtype)))
        return mean.float()
