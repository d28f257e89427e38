"""The shipped demo weights: where they are, how big, and whether their samples meet the bars."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from arinar.checkpoint import load_arinar, load_vae
from arinar.data import load_dataset, to_float
from arinar.demo import DEMO_MODELS, demo_checkpoint, demo_vae
from arinar.train import judge_samples, sample_images
from arinar.vae import posterior, to_uint8


def test_weights_are_there_and_small() -> None:
    files = {demo_checkpoint(name) for name in DEMO_MODELS} | {demo_vae(name) for name in DEMO_MODELS}
    assert len(files) == 4
    assert sum(path.stat().st_size for path in files) < 14e6


def test_unknown_names_are_refused_with_the_choices() -> None:
    for lookup in (demo_checkpoint, demo_vae):
        with pytest.raises(ValueError, match="no demo model 'cats'; choose one of digits, digits-causal"):
            lookup("cats")


def test_looking_up_weights_loads_nothing_heavy() -> None:
    code = (
        "import sys; from arinar.demo import demo_checkpoint; demo_checkpoint('digits');"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_config_fits_the_autoencoder(name: str) -> None:
    model, vae = load_arinar(demo_checkpoint(name)), load_vae(demo_vae(name))
    config = model.config
    assert config.outer == ("causal" if name == "digits-causal" else "masked")
    assert (config.vae_stride, config.vae_embed_dim) == (vae.config.stride, vae.config.embed_dim) == (8, 16)
    assert config.class_names == tuple("0123456789")
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 1.3e6


def test_autoencoder_reconstructs_digits_it_never_saw() -> None:
    images = load_dataset("digits").held_out.images[:100]
    vae = load_vae(demo_vae("digits"))
    with torch.no_grad():
        rebuilt = to_uint8(vae.decode(posterior(vae.encode(to_float(images)))[0]))
    error = (rebuilt.permute(0, 3, 1, 2).double() - images.double()).pow(2).mean()
    assert 10 * np.log10(255**2 / float(error)) > 27  # PSNR, dB


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_samples_meet_the_bars(name: str) -> None:
    # The bars are for 1,000 samples (0.97, 0.80, 0.70); 200 leave a little room for chance.
    found = judge_samples(load_arinar(demo_checkpoint(name)), load_vae(demo_vae(name)), count=200, seed=1)
    assert found.agreement >= 0.96
    assert found.diversity >= 0.78
    assert found.novelty >= 0.68


def test_same_seed_same_images() -> None:
    model, vae = load_arinar(demo_checkpoint("digits")), load_vae(demo_vae("digits"))
    labels = torch.tensor([3, 8])
    first, second, other = (sample_images(model, vae, labels, num_iter=4, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert first.shape == (2, 32, 32, 3) and first.dtype == torch.uint8
