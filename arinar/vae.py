"""The KL autoencoder between images and latents (latent-diffusion family; parameter names as published)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VaeConfig


class Norm(nn.GroupNorm):
    def __init__(self, channels: int, config: VaeConfig) -> None:
        super().__init__(config.norm_groups, channels, eps=config.norm_eps)


class ResnetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, config: VaeConfig) -> None:
        super().__init__()
        self.norm1 = Norm(inputs, config)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = Norm(outputs, config)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Single-head attention over all positions, 1x1 convolutions for its projections."""

    def __init__(self, channels: int, config: VaeConfig) -> None:
        super().__init__()
        self.norm = Norm(channels, config)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # (B, H*W, C)
        scores = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, -1)
        return x + self.proj_out((scores @ v).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Middle(nn.Module):
    def __init__(self, channels: int, config: VaeConfig) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, config)
        self.attn_1 = AttentionBlock(channels, config)
        self.block_2 = ResnetBlock(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Level(nn.Module):
    """Residual blocks (and attention, where configured) of one resolution."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool, config: VaeConfig) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(inputs if i == 0 else outputs, outputs, config) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outputs, config) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        inputs = config.channels
        for level, outputs in enumerate(widths):
            attention = level in config.encoder_attention_levels
            stage = Level(inputs, outputs, config.num_res_blocks, attention, config)
            if level < len(widths) - 1:
                stage.downsample = Downsample(outputs)
            self.down.append(stage)
            inputs = outputs
        self.mid = Middle(inputs, config)
        self.norm_out = Norm(inputs, config)
        self.conv_out = nn.Conv2d(inputs, 2 * config.embed_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down:
            x = stage(x)
            if hasattr(stage, "downsample"):
                x = stage.downsample(x)  # type: ignore[operator]
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class Decoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.embed_dim, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config)
        stages: list[Level] = []
        inputs = widths[-1]
        for level in reversed(range(len(widths))):
            attention = level in config.decoder_attention_levels
            stage = Level(inputs, widths[level], config.num_res_blocks + 1, attention, config)
            if level > 0:
                stage.upsample = Upsample(widths[level])
            stages.insert(0, stage)
            inputs = widths[level]
        self.up = nn.ModuleList(stages)  # index = level, as published; run from the last to the first
        self.norm_out = Norm(inputs, config)
        self.conv_out = nn.Conv2d(inputs, config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(range(len(self.up))):
            x = self.up[level](x)
            if level > 0:
                x = self.up[level].upsample(x)  # type: ignore[operator]
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class AutoencoderKL(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] <-> latents (B, embed_dim, H / stride, W / stride). Fully convolutional."""

    def __init__(self, config: VaeConfig | None = None) -> None:
        super().__init__()
        self.config = config or VaeConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quant_conv = nn.Conv2d(2 * self.config.embed_dim, 2 * self.config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(self.config.embed_dim, self.config.embed_dim, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Image (B, 3, H, W) -> moments (B, 2 * embed_dim, h, w): mean, then log variance."""
        out: Tensor = self.quant_conv(self.encoder(x))
        return out

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, embed_dim, h, w) -> image (B, 3, H, W), nominally in [-1, 1], not clipped."""
        out: Tensor = self.decoder(self.post_quant_conv(latents))
        return out


def posterior(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Moments (B, 2 * embed_dim, h, w) -> mean and std of the latent; log variance clipped to [-30, 20]."""
    mean, logvar = moments.chunk(2, 1)
    return mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))


def to_uint8(image: Tensor) -> Tensor:
    """Image (B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 RGB: (x + 1) / 2 * 255, clipped, rounded half to even."""
    return ((image + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
