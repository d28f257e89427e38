"""ARINAR: the outer and the inner model together, the training loss, and what lies between tokens and images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .config import PRESETS, VAE_PRESETS, ArinarConfig
from .diffusion_head import DiffusionHead
from .gmm_head import GmmHead
from .head import Head
from .inner import Mixture
from .outer import CausalOuter, MaskedOuter
from .vae import AutoencoderKL, to_uint8

# MAR's training masks: the masked share is drawn from a normal of mean 1 and this std, truncated to [0.7, 1].
MASK_RATIO_STD = 0.25
MASK_RATIO_MIN = 0.7
#: Head, as the config names it -> the attribute that holds it, as in the published checkpoints, and its kind.
HEADS: dict[str, tuple[str, type[nn.Module]]] = {"gmm": ("arhead", GmmHead), "diffusion": ("diffloss", DiffusionHead)}


class Arinar(nn.Module):
    """An ARINAR model; ``Arinar(config)`` gives the kind that ``config.outer`` names.

    State-dict names and shapes are those of the published code for ``masked`` models.

    Parameters
    ----------
    config : ArinarConfig
    dropout : probability for the outer blocks while training; no effect in ``eval()``.
    """

    config: ArinarConfig
    fake_latent: nn.Parameter

    def __new__(cls, config: ArinarConfig | None = None, *args: Any, **kwargs: Any) -> Arinar:
        if cls is Arinar and config is not None:
            cls = MaskedArinar if config.outer == "masked" else CausalArinar
        return super().__new__(cls)

    def __init__(self, config: ArinarConfig, dropout: float = 0.0) -> None:
        super().__init__(config, dropout)  # the outer network's parameters, at top level as published
        attribute, kind = HEADS[config.head]
        setattr(self, attribute, kind(config))

    @property
    def head(self) -> Head:
        """What draws a token given z."""
        found: Head = getattr(self, HEADS[self.config.head][0])
        return found

    def condition(self, tokens: Tensor, mask: Tensor | None, labels: Tensor) -> Tensor:
        """tokens (B, L, D), mask (B, L) with 1 = unknown, labels (B,) with -1 = unconditional -> z (B, L, C)."""
        raise NotImplementedError  # by the kinds below

    def mixture(self, z: Tensor, features: Tensor) -> Mixture:
        """Teacher-forced mixture parameters of a Gaussian mixture head.

        z (N, C), features (N, D) -> weight, mu, logvar, each (N, D, K): those of feature j given features < j. Raises
        ValueError for another head.
        """
        if not isinstance(self.head, GmmHead):
            raise ValueError(
                f"a {self.config.head} head draws from no mixture: its training loss is model.head.loss(z, tokens)"
            )
        result: Mixture = self.head(z, features)
        return result

    def nll(self, z: Tensor, features: Tensor, row_mask: Tensor | None = None) -> Tensor:
        """Training loss of a Gaussian mixture head: negative log-likelihood per token, without the constant 0.5 log(2 pi)
        per feature. Raises ValueError for another head, whose likelihood is not known in closed form.

        z (N, C), features (N, D) -> (N,); with ``row_mask`` (N,) the mean over rows where it is 1, a scalar.
        """
        if not isinstance(self.head, GmmHead):
            raise ValueError(f"a {self.config.head} head has no NLL: its training loss is model.head.loss(z, tokens)")
        rows = self.head.loss(z, features)
        return rows if row_mask is None else masked_mean(rows, row_mask)

    def forward(
        self, latents: Tensor, labels: Tensor, *, label_drop: float = 0.1, generator: torch.Generator | None = None
    ) -> Tensor:
        """Training loss of VAE latents (B, channels, H, W) (as the VAE makes them) and labels (B,): a scalar.

        Each label is replaced by the unconditional one with probability ``label_drop``. A masked model is trained on
        the unknown tokens of one random mask ratio per batch, a causal one on all tokens in one pass; each token as often
        as its head's REPEATS says.
        """
        tokens = patchify(normalize(latents, self.config), self.config.patch_size)  # (B, L, D)
        labels = drop_labels(labels, label_drop, generator)
        mask = self.training_mask(len(tokens), generator).to(tokens)  # (B, L)
        z = self.condition(tokens, mask, labels)
        z, tokens = (value.flatten(0, 1).repeat(self.head.REPEATS, 1) for value in (z, tokens))
        return masked_mean(self.head.loss(z, tokens, generator), mask.flatten().repeat(self.head.REPEATS))

    def training_mask(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        ratio_min: float = MASK_RATIO_MIN,
        ratio_std: float = MASK_RATIO_STD,
    ) -> Tensor:
        """(batch, L), 1 = to be predicted: all tokens of a causal model.

        Of a masked one, a share per batch and at least one token; the share is drawn from a one-sided normal that falls
        from 1 with ``ratio_std``, truncated below ``ratio_min``.
        """
        raise NotImplementedError  # by the kinds below


class MaskedArinar(Arinar, MaskedOuter):
    condition = MaskedOuter.condition  # type: ignore[assignment]

    def training_mask(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        ratio_min: float = MASK_RATIO_MIN,
        ratio_std: float = MASK_RATIO_STD,
    ) -> Tensor:
        length = self.config.seq_len
        while True:  # rejection: accepted 3 times in 4 with the published ratios
            ratio = 1.0 - abs(float(torch.randn((), generator=generator))) * ratio_std
            if ratio >= ratio_min:
                break
        order = torch.rand(batch, length, generator=generator).argsort(1)
        return (order < max(1, math.ceil(length * ratio))).float()


class CausalArinar(Arinar, CausalOuter):
    condition = CausalOuter.condition

    def training_mask(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        ratio_min: float = MASK_RATIO_MIN,
        ratio_std: float = MASK_RATIO_STD,
    ) -> Tensor:
        return torch.ones(batch, self.config.seq_len)


def masked_mean(rows: Tensor, mask: Tensor) -> Tensor:
    """The mean of rows (N,) where mask (N,) is 1."""
    return (rows * mask).sum() / mask.sum()


def drop_labels(labels: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Labels (B,), each replaced by the unconditional -1 with probability ``share``; 0 draws nothing."""
    if share <= 0:
        return labels
    drop = torch.rand(len(labels), generator=generator).to(labels.device) < share
    return torch.where(drop, torch.full_like(labels, -1), labels)


def initialize(model: Arinar, seed: int = 0) -> Arinar:
    """Random weights as MAR initialises them: normal(0, 0.02) embeddings, Xavier-uniform linears, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith(("fake_latent", "mask_token", "_learned", "class_emb.weight")):
                parameter.normal_(0.0, 0.02, generator=generator)
        model.head.initialize(generator)
    return model


def random_model(preset: str, seed: int = 0) -> Arinar:
    """A preset's model with random weights, in eval mode."""
    return initialize(Arinar(PRESETS[preset]), seed).eval()


def random_vae(preset: str, seed: int = 0) -> AutoencoderKL:
    """The autoencoder that belongs to a model's preset, with random weights, in eval mode."""
    own = preset.partition("-")[0]  # digits-causal has the digits'
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return AutoencoderKL(VAE_PRESETS[own if own in VAE_PRESETS else "kl16"]).eval()


def random_models(preset: str, seed: int = 0) -> tuple[Arinar, AutoencoderKL]:
    """Both: what benchmarks and trials run where no trained weights are at hand."""
    return random_model(preset, seed), random_vae(preset, seed)


def normalize(latents: Tensor, config: ArinarConfig) -> Tensor:
    """VAE latents (B, channels, H, W) -> what the model works on: (latents - shift) * scale."""
    return (latents - _per_channel(config.latent_shift, latents)) * _per_channel(config.latent_scale, latents)


def denormalize(latents: Tensor, config: ArinarConfig) -> Tensor:
    """Inverse of :func:`normalize`."""
    return latents / _per_channel(config.latent_scale, latents) + _per_channel(config.latent_shift, latents)


def _per_channel(value: float | tuple[float, ...], like: Tensor) -> Tensor:
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return tensor[:, None, None] if tensor.ndim else tensor


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """(B, channels, H, W) -> tokens (B, L, D) in raster order, features ordered (channel, row, column)."""
    batch, channels, height, width = latents.shape
    p = patch_size
    x = latents.reshape(batch, channels, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // p) * (width // p), channels * p * p)


def unpatchify(tokens: Tensor, patch_size: int) -> Tensor:
    """Inverse of :func:`patchify` for square images."""
    batch, length, features = tokens.shape
    p, side = patch_size, math.isqrt(length)
    x = tokens.reshape(batch, side, side, features // (p * p), p, p)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // (p * p), side * p, side * p)


@torch.no_grad()
def decode_images(vae: AutoencoderKL, tokens: Tensor, config: ArinarConfig) -> Tensor:
    """Tokens (B, L, D) in raster order -> images (B, H, W, 3) uint8, on the CPU."""
    latents = denormalize(unpatchify(tokens, config.patch_size), config)
    # Under autocast the decoder may answer in half precision, which rounds grey levels.
    return to_uint8(vae.decode(latents).float()).cpu()
