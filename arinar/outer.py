"""The outer transformer: what is known of the image -> one condition vector z per token to generate.

Two kinds share their blocks. ``MaskedOuter`` is the published bidirectional network (built on MAR, whose
parameter names it keeps); ``CausalOuter`` is the autoregressive formulation, with a KV cache.
Letters: B batch, L tokens, D features per token, C width, H heads, S positions including the class buffer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ArinarConfig

KVCache = list[tuple[Tensor, Tensor]]  # per layer (keys, values), each (B, H, S, head_dim)


class Attention(nn.Module):
    """Multi-head self-attention with the usual 1/sqrt(head_dim) scale and a fused QKV projection."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, C) -> queries, keys, values, each (B, H, S, head_dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def merge(self, x: Tensor) -> Tensor:
        """(B, H, S, head_dim) -> (B, S, C), through the output projection."""
        out: Tensor = self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout))

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        return self.attend(*self.project(x), causal=causal)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, approximate: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate=approximate)
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return out


class Block(nn.Module):
    """Pre-norm ViT block, exact GELU."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_eps: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), "none", dropout)

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        x = x + self.attn(self.norm1(x), causal=causal)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def step(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """New positions x (B, S_new, C) after the cached ones -> output, grown cache.

        Without a cache the new positions attend causally among themselves; with one, S_new must be 1.
        """
        q, k, v = self.attn.project(self.norm1(x))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        x = x + self.attn.attend(q, k, v, causal=past is None)
        x = x + self.mlp(self.norm2(x))
        return x, (k, v)


def _stack(depth: int, width: int, heads: int, config: ArinarConfig, dropout: float) -> nn.ModuleList:
    return nn.ModuleList(Block(width, heads, config.mlp_ratio, config.norm_eps, dropout) for _ in range(depth))


class _Outer(nn.Module):
    """What both kinds have: class embedding, unconditional vector, token projection."""

    config: ArinarConfig
    fake_latent: nn.Parameter
    class_emb: nn.Embedding

    def class_vectors(self, labels: Tensor) -> Tensor:
        """(B,) int64, -1 = unconditional, or (B, num_classes) weights of classes, -1 = unconditional -> (B, C)."""
        if labels.is_floating_point():
            mixed = labels.to(self.class_emb.weight) @ self.class_emb.weight
            return torch.where(labels[:, :1] < 0, self.fake_latent.to(mixed.dtype), mixed)
        known: Tensor = self.class_emb(labels.clamp(min=0))
        return torch.where(labels[:, None] < 0, self.fake_latent.to(known.dtype), known)


class MaskedOuter(_Outer):
    """The published bidirectional outer network: encoder over the visible tokens, decoder over all."""

    def __init__(self, config: ArinarConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        enc, dec, total = config.encoder_width, config.decoder_width, config.buffer_size + config.seq_len
        self.fake_latent = nn.Parameter(torch.zeros(1, enc))
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, total, enc))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dec))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, total, dec))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, config.seq_len, dec))
        self.class_emb = nn.Embedding(config.num_classes, enc)
        self.z_proj = nn.Linear(config.token_dim, enc)
        self.z_proj_ln = nn.LayerNorm(enc, eps=config.norm_eps)
        self.encoder_blocks = _stack(config.encoder_depth, enc, config.encoder_heads, config, dropout)
        self.encoder_norm = nn.LayerNorm(enc, eps=config.norm_eps)
        self.decoder_embed = nn.Linear(enc, dec)
        self.decoder_blocks = _stack(config.decoder_depth, dec, config.decoder_heads, config, dropout)
        self.decoder_norm = nn.LayerNorm(dec, eps=config.norm_eps)

    def encode(self, tokens: Tensor, visible: Tensor, labels: Tensor) -> Tensor:
        """tokens (B, L, D), visible positions (B, V), labels (B,) -> (B, buffer + V, C), buffer first."""
        buffer = self.config.buffer_size
        x = self.z_proj(tokens)  # (B, L, C)
        x = torch.cat([self.class_vectors(labels)[:, None].expand(-1, buffer, -1), x], 1)  # (B, S, C)
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned)
        x = torch.cat([x[:, :buffer], _take(x[:, buffer:], visible)], 1)  # (B, buffer + V, C)
        for block in self.encoder_blocks:
            x = block(x)
        out: Tensor = self.encoder_norm(x)
        return out

    def decode(self, encoded: Tensor, visible: Tensor) -> Tensor:
        """(B, buffer + V, C), visible (B, V) -> z (B, L, C) for every position."""
        buffer, length = self.config.buffer_size, self.config.seq_len
        x = self.decoder_embed(encoded)
        grid = self.mask_token.to(x.dtype).expand(x.shape[0], length, -1)
        grid = grid.scatter(1, visible[..., None].expand(-1, -1, x.shape[-1]), x[:, buffer:])
        x = torch.cat([x[:, :buffer], grid], 1) + self.decoder_pos_embed_learned  # (B, S, C)
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_norm(x)
        out: Tensor = x[:, buffer:] + self.diffusion_pos_embed_learned
        return out

    def condition(self, tokens: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Condition vectors for every position.

        Parameters
        ----------
        tokens : (B, L, D), raster order; values at masked positions have no influence.
        mask : (B, L), 1 = unknown; the number of unknown positions must be the same in each row.
        labels : (B,) int64 class ids, -1 = unconditional.

        Returns
        -------
        z : (B, L, C)
        """
        visible = visible_positions(mask)
        return self.decode(self.encode(tokens, visible, labels), visible)


def visible_positions(mask: Tensor) -> Tensor:
    """Mask (B, L), 1 = unknown -> positions of the known tokens in raster order, (B, V) int64."""
    known = mask.eq(0).sum(1)
    if mask.shape[0] and bool((known != known[0]).any()):
        raise ValueError(
            f"mask leaves {known.tolist()} tokens visible per image; expected the same number in every image of a "
            f"batch (all images of a batch follow one schedule)"
        )
    count = int(known[0]) if mask.shape[0] else 0
    return torch.argsort(mask.ne(0).to(torch.uint8), dim=1, stable=True)[:, :count]


def _take(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of x (B, L, C) at positions (B, V) -> (B, V, C)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


class CausalOuter(_Outer):
    """Autoregressive outer network (the formulation of the paper, section 3): previous tokens -> z of the next.

    The sequence is the class buffer, then the tokens in generation order. Each position is told which position it
    is to predict: the last buffer position predicts ``order[0]``, the token at ``order[i]`` predicts ``order[i+1]``.
    """

    def __init__(self, config: ArinarConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        width = config.decoder_width
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, config.buffer_size + config.seq_len, width))
        self.target_pos_embed_learned = nn.Parameter(torch.zeros(1, config.seq_len, width))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, config.seq_len, width))
        self.class_emb = nn.Embedding(config.num_classes, width)
        self.z_proj = nn.Linear(config.token_dim, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=config.norm_eps)
        self.decoder_blocks = _stack(config.decoder_depth, width, config.decoder_heads, config, dropout)
        self.decoder_norm = nn.LayerNorm(width, eps=config.norm_eps)
        # A constant of the config, not a weight: kept out of checkpoints.
        self.register_buffer("order", torch.tensor(config.generation_order), persistent=False)
        self.order: Tensor

    def embed_prefix(self, labels: Tensor) -> Tensor:
        """labels (B,) -> embedded class buffer (B, buffer, C)."""
        buffer = self.config.buffer_size
        x = self.class_vectors(labels)[:, None] + self.encoder_pos_embed_learned[:, :buffer]
        first = self.target_pos_embed_learned[:, self.order[:1]]
        x = torch.cat([x[:, :-1], x[:, -1:] + first], 1)
        out: Tensor = self.z_proj_ln(x)
        return out

    def embed_tokens(self, tokens: Tensor, known: Tensor, target: Tensor) -> Tensor:
        """tokens (B, S, D), their positions (S,), the positions to predict (S,) -> (B, S, C)."""
        x = self.z_proj(tokens) + self.encoder_pos_embed_learned[:, self.config.buffer_size + known]
        out: Tensor = self.z_proj_ln(x + self.target_pos_embed_learned[:, target])
        return out

    def condition(self, tokens: Tensor, mask: Tensor | None, labels: Tensor) -> Tensor:
        """Condition vectors for every position, all in one pass; ``mask`` is ignored.

        tokens (B, L, D) in raster order, labels (B,) -> z (B, L, C): z at ``order[i]`` depends on the tokens at
        ``order[:i]`` alone.
        """
        order = self.order
        x = torch.cat(
            [self.embed_prefix(labels), self.embed_tokens(tokens[:, order[:-1]], order[:-1], order[1:])], 1
        )  # (B, buffer + L - 1, C)
        for block in self.decoder_blocks:
            x = block(x, causal=True)
        z: Tensor = self.decoder_norm(x[:, self.config.buffer_size - 1 :])  # (B, L, C), as generated
        z = z + self.diffusion_pos_embed_learned[:, order]
        return z[:, torch.argsort(order)]

    def prefill(self, labels: Tensor) -> tuple[Tensor, KVCache]:
        """labels (B,) -> z (B, 1, C) of the first token, cache of the class buffer."""
        x = self.embed_prefix(labels)
        cache: KVCache = []
        for block in self.decoder_blocks:
            x, grown = block.step(x, None)  # type: ignore[operator]
            cache.append(grown)
        z = self.decoder_norm(x[:, -1:]) + self.diffusion_pos_embed_learned[:, self.order[:1]]
        return z, cache

    def step(self, token: Tensor, index: int, cache: KVCache) -> tuple[Tensor, KVCache]:
        """The token (B, 1, D) at ``order[index]`` -> z (B, 1, C) of the one at ``order[index + 1]``, grown cache."""
        if not 0 <= index < self.config.seq_len - 1:
            raise ValueError(
                f"KV cache overrun: step {index} of a model of {self.config.seq_len} tokens; the last token is never "
                f"fed back, so steps run from 0 to {self.config.seq_len - 2}"
            )
        x = self.embed_tokens(token, self.order[index : index + 1], self.order[index + 1 : index + 2])
        grown: KVCache = []
        for block, past in zip(self.decoder_blocks, cache, strict=True):
            x, kv = block.step(x, past)  # type: ignore[operator]
            grown.append(kv)
        z = self.decoder_norm(x) + self.diffusion_pos_embed_learned[:, self.order[index + 1 : index + 2]]
        return z, grown
