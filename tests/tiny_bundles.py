"""Bundles of tiny random models, in both precisions, exported once per test run."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from once import once

from arinar.config import ArinarConfig, VaeConfig
from arinar.export.bundle import export_bundle
from arinar.model import Arinar, initialize
from arinar.runtime import Bundle
from arinar.vae import AutoencoderKL

TINY = ArinarConfig(
    img_size=16,
    vae_stride=4,
    vae_embed_dim=4,
    num_classes=3,
    buffer_size=2,
    encoder_width=16,
    encoder_depth=1,
    encoder_heads=2,
    decoder_width=16,
    decoder_depth=2,
    decoder_heads=2,
    inner_width=16,
    inner_depth=1,
    inner_heads=2,
    num_gaussians=2,
    default_num_iter=4,
)
TINY_CAUSAL = TINY.replace(outer="causal", encoder_depth=0)
# (A chain that begins at timestep 750: at 999 random weights would be multiplied by thousands.)
TINY_MAR = TINY.replace(head="diffusion", inner_depth=2, sampling_steps="ddim4")
TINY_VAE = VaeConfig(
    embed_dim=4, channels=4, channel_multipliers=(1, 1, 2), num_res_blocks=1, encoder_attention_levels=(), norm_groups=2
)


def tiny_model(config: ArinarConfig, seed: int = 0) -> tuple[Arinar, AutoencoderKL]:
    model = initialize(Arinar(config), seed).eval()
    if config.head == "diffusion":  # what begins at zero would hide what is wired to it
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.head.parameters():  # type: ignore[attr-defined]
                if not parameter.any():
                    parameter.normal_(0.0, 0.1, generator=generator)
    torch.manual_seed(seed)  # the same VAE for every model
    return model, AutoencoderKL(TINY_VAE).eval()


def tiny_bundle(folder: Path, config: ArinarConfig) -> Path:
    """The bundle with fp32 and fp16 graphs, made where it is not there yet. Treat it as read-only but for engines."""
    out = folder / f"tiny-{config.outer}-{config.head}"
    done = out.with_suffix(".done")

    def make() -> None:
        for precision in ("fp32", "fp16"):
            export_bundle(*tiny_model(config), out, precision=precision, overwrite=True)
        done.touch()

    once(done, make)
    return out


def tiny_with_engines(folder: Path, copy: Path) -> Path:
    """A copy of the masked one, with the fake GPU's engines beside its graphs."""
    from fake_gpu import make_engines  # which needs ONNX Runtime

    made = Path(shutil.copytree(tiny_bundle(folder, TINY), copy))
    make_engines(Bundle.open(made))
    return made
