"""The inner autoregressive model: z -> the features of one token, each from a 1-D Gaussian mixture.

Letters: N rows (one row = one token of one image), D features, W inner width, K Gaussians, H heads.
Parameter names are those of the published code (`arhead.*`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ArinarConfig
from .outer import KVCache, Mlp


class Mixture(NamedTuple):
    """Gaussian mixture parameters, each (..., K): weights sum to 1, ``logvar`` is the log variance."""

    weight: Tensor
    mu: Tensor
    logvar: Tensor


class InnerAttention(nn.Module):
    """Self-attention with query and value biases and softmax scale 0.25 / sqrt(head_dim)."""

    def __init__(self, width: int, heads: int, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.zero_k_bias: Tensor
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, S, W) -> queries, keys, values, each (N, H, S, head_dim)."""
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # type: ignore[no-untyped-call]
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=self.scale)
        merged: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return merged


class InnerBlock(nn.Module):
    """AdaLN block: norms without affine, their scale, shift and the residual gates come from z."""

    def __init__(self, config: ArinarConfig) -> None:
        super().__init__()
        width = config.inner_width
        self.norm_eps = config.norm_eps
        self.attn = InnerAttention(width, config.inner_heads, config.inner_attention_scale)
        self.ffn = Mlp(width, int(width * config.inner_mlp_ratio), "tanh")
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.z_width, 6 * width))

    def modulation(self, z: Tensor) -> Tensor:
        """z (N, C) -> (N, 6, W): gamma1, gamma2, scale1, scale2, shift1, shift2."""
        out: Tensor = self.ada_lin(z).unflatten(-1, (6, -1))
        return out

    def step(self, x: Tensor, modulation: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (N, S, W), modulation (N, 6, W), cached keys and values -> output (N, S, W), grown cache.

        Without a cache the S positions attend causally; with one, S must be 1.
        """
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation[:, :, None].unbind(1)  # each (N, 1, W)
        q, k, v = self.attn.project(plain_norm(x, self.norm_eps) * (1 + scale1) + shift1)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        x = x + gamma1 * self.attn.attend(q, k, v, causal=past is None)
        x = x + gamma2 * self.ffn(plain_norm(x, self.norm_eps) * (1 + scale2) + shift2)
        return x, (k, v)


class HeadNorm(nn.Module):
    """AdaLN before the head: scale and shift from z."""

    def __init__(self, config: ArinarConfig) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.z_width, 2 * config.inner_width))

    def modulation(self, z: Tensor) -> Tensor:
        """z (N, C) -> (N, 2, W): scale, shift."""
        out: Tensor = self.ada_lin(z).unflatten(-1, (2, -1))
        return out

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation[:, :, None].unbind(1)
        return plain_norm(x, self.norm_eps) * (1 + scale) + shift


def plain_norm(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis, without affine."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


class InnerAR(nn.Module):
    """Inner transformer and mixture head, over full sequences and by KV-cached stepping."""

    def __init__(self, config: ArinarConfig) -> None:
        super().__init__()
        self.config = config
        width = config.inner_width
        self.start_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embedding = nn.Parameter(torch.zeros(1, config.token_dim, width))
        self.input_proj = nn.Linear(1, width)
        self.cond_proj = nn.Linear(config.z_width, width)
        self.blocks = nn.ModuleList(InnerBlock(config) for _ in range(config.inner_depth))
        self.head_nm = HeadNorm(config)
        self.head = nn.Linear(width, 3 * config.num_gaussians)

    def start(self, z: Tensor) -> Tensor:
        """z (N, C) -> the first position's input (N, 1, W), without its position embedding."""
        out: Tensor = self.cond_proj(z)[:, None] + self.start_token
        return out

    def mixture(self, x: Tensor) -> Mixture:
        """Normalised hidden states (N, S, W) -> mixtures, each (N, S, K)."""
        mu, logvar, logits = self.head(x).chunk(3, -1)
        return Mixture(logits.softmax(-1), mu, logvar)

    def forward(self, z: Tensor, features: Tensor) -> Mixture:
        """Teacher-forced: z (N, C), features (N, D) -> mixtures (N, D, K) of feature j given features < j."""
        x = torch.cat([self.start(z), self.input_proj(features[:, :-1, None])], 1) + self.pos_embedding
        for block in self.blocks:
            x, _ = block.step(x, block.modulation(z), None)  # type: ignore[operator]
        return self.mixture(self.head_nm(x, self.head_nm.modulation(z)))

    def step(self, z: Tensor, feature: Tensor | None, position: int, cache: KVCache | None) -> tuple[Mixture, KVCache]:
        """One feature, as the published sampler computes it (conditioning included, each time).

        z (N, C), the previous feature (N, 1) (None at position 0), cache of the positions before
        -> mixture (N, K) of the feature at ``position``, grown cache.
        """
        if not 0 <= position < self.config.token_dim:
            raise ValueError(f"KV cache overrun: feature {position} of {self.config.token_dim}")
        pasts: Sequence[tuple[Tensor, Tensor] | None]
        if position == 0:
            x, pasts = self.start(z), [None] * len(self.blocks)
        elif feature is None or cache is None:
            raise ValueError(f"feature {position} needs the one before it and the cache of 0..{position - 1}")
        else:
            x, pasts = self.input_proj(feature)[:, None], cache
        x = x + self.pos_embedding[:, position : position + 1]  # (N, 1, W)
        grown: KVCache = []
        for block, past in zip(self.blocks, pasts, strict=True):
            x, kv = block.step(x, block.modulation(z), past)  # type: ignore[operator]
            grown.append(kv)
        mixture = self.mixture(self.head_nm(x, self.head_nm.modulation(z)))
        return Mixture(*(value[:, 0] for value in mixture)), grown


def log_density(x: Tensor, mixture: Mixture) -> Tensor:
    """Log density of x (...) under a mixture (..., K), the 0.5 log(2 pi) included."""
    weight, mu, logvar = mixture
    log_normal = -0.5 * ((x[..., None] - mu) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi))
    return torch.logsumexp(torch.log(weight) + log_normal, -1)
