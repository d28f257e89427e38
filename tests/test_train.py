"""Training on tiny problems: exact resume, averaged weights, losses that fall, state files that are refused."""

from __future__ import annotations

import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from arinar import train
from arinar.checkpoint import inspect_checkpoint, load_arinar, load_vae
from arinar.config import VAE_PRESETS, ArinarConfig, VaeConfig
from arinar.data import Augment, Dataset, ImageSet
from arinar.fit import Optimization, TrainResult, ema_decay, update_ema
from arinar.model import Arinar, initialize, normalize, patchify
from arinar.train import train_arinar, train_vae
from arinar.vae import AutoencoderKL, posterior

VAE = VaeConfig(
    embed_dim=4, channels=4, channel_multipliers=(1, 2), num_res_blocks=1, encoder_attention_levels=(), norm_groups=2
)
MASKED = ArinarConfig(
    img_size=8,
    vae_stride=2,
    vae_embed_dim=4,
    num_classes=2,
    buffer_size=2,
    encoder_width=16,
    encoder_depth=1,
    encoder_heads=2,
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=2,
    inner_width=16,
    inner_heads=2,
    num_gaussians=2,
)
CAUSAL = MASKED.replace(outer="causal", encoder_depth=0)
KINDS = pytest.mark.parametrize("config", [MASKED, CAUSAL], ids=["masked", "causal"])


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Two classes that differ by which half is bright."""
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> ImageSet:
        labels = torch.arange(count) % 2
        pixels = torch.randint(0, 60, (count, 3, 8, 8), generator=generator)
        pixels[labels == 0, :, :4] += 150
        pixels[labels == 1, :, 4:] += 150
        return ImageSet(pixels.to(torch.uint8), labels)

    return Dataset(images(22), images(6), ("top", "bottom"), "tiny")


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """Untrained, but sure of itself: latents that tell something about the image."""
    torch.manual_seed(1)
    coder = AutoencoderKL(VAE).eval()
    with torch.no_grad():
        assert coder.quant_conv.bias is not None
        coder.quant_conv.bias[VAE.embed_dim :] -= 6
    return coder


def _arinar(out: Path, data: Dataset, vae: AutoencoderKL, **changes: Any) -> TrainResult:
    settings: dict[str, Any] = {
        "config": MASKED,
        "data": data,
        "vae": vae,
        "steps": 7,
        "batch_size": 5,
        "learning_rate": 3e-3,
        "warmup": 2,
        "ema": 0.9,
        "augmented_copies": 2,
        "eval_every": 3,
        "save_every": 2,
        "device": "cpu",
        "progress": False,
        "accept_reconstruction": True,  # the autoencoder is untrained
    }
    return train_arinar(out, **(settings | changes))


def _vae(out: Path, data: Dataset, **changes: Any) -> TrainResult:
    settings: dict[str, Any] = {
        "config": VAE,
        "data": data,
        "img_size": 8,
        "steps": 7,
        "batch_size": 5,
        "warmup": 2,
        "ema": 0.9,
        "eval_every": 3,
        "save_every": 2,
        "device": "cpu",
        "progress": False,
    }
    return train_vae(out, **(settings | changes))


def _interrupt_at(step: int) -> Any:
    """An `on_eval` that presses Ctrl-C at an evaluation."""

    def press(done: int, loss: float, held_out: float) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return press


@KINDS
def test_resume_is_exact(config: ArinarConfig, data: Dataset, vae: AutoencoderKL, tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole.safetensors", tmp_path / "pieces.safetensors"
    reference = _arinar(whole, data, vae, config=config)
    assert reference.finished and reference.step == 7

    stopped = _arinar(pieces, data, vae, config=config, on_eval=_interrupt_at(3))
    assert not stopped.finished and stopped.step == 3
    assert not pieces.exists() and (tmp_path / "pieces.safetensors.state").exists()
    torch.manual_seed(99)  # whatever else happened in between
    resumed = _arinar(pieces, data, vae, config=config)
    assert resumed.finished and resumed.history == reference.history
    assert pieces.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pieces.safetensors", "whole.safetensors"]


def test_vae_resume_is_exact(data: Dataset, tmp_path: Path) -> None:
    reference = _vae(tmp_path / "whole", data)
    assert not _vae(tmp_path / "pieces", data, on_eval=_interrupt_at(3)).finished
    assert _vae(tmp_path / "pieces", data).history == reference.history
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


def test_resume_after_a_crash_uses_the_last_save(data: Dataset, vae: AutoencoderKL, tmp_path: Path) -> None:
    _arinar(tmp_path / "whole", data, vae)

    def crash(done: int, loss: float, held_out: float) -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        _arinar(tmp_path / "pieces", data, vae, on_eval=crash)  # at step 3, saved at step 2
    _arinar(tmp_path / "pieces", data, vae)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


def test_signal_handlers_and_random_state_are_given_back(data: Dataset, vae: AutoencoderKL, tmp_path: Path) -> None:
    handler, state = signal.getsignal(signal.SIGINT), torch.get_rng_state()
    _arinar(tmp_path / "a", data, vae, on_eval=_interrupt_at(3))
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.equal(torch.get_rng_state(), state)


def test_training_works_outside_the_main_thread(data: Dataset, vae: AutoencoderKL, tmp_path: Path) -> None:
    results: list[TrainResult] = []
    thread = threading.Thread(target=lambda: results.append(_arinar(tmp_path / "a", data, vae, steps=2)))
    thread.start()
    thread.join()
    assert results[0].finished


def test_seed_decides(data: Dataset, vae: AutoencoderKL, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _arinar(tmp_path / name, data, vae, seed=seed, steps=3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_state_of_another_training_is_refused(data: Dataset, vae: AutoencoderKL, tmp_path: Path) -> None:
    _arinar(tmp_path / "a", data, vae, on_eval=_interrupt_at(3))
    with pytest.raises(ValueError, match="another optimization"):
        _arinar(tmp_path / "a", data, vae, steps=8)
    with pytest.raises(ValueError, match="another dropout, label_drop"):
        _arinar(tmp_path / "a", data, vae, dropout=0.3, label_drop=0.3)
    other = Dataset(data.held_out, data.train, data.class_names, "other")
    with pytest.raises(ValueError, match="another config, data"):
        _arinar(tmp_path / "a", other, vae)


def test_damaged_state_is_refused(data: Dataset, vae: AutoencoderKL, tmp_path: Path) -> None:
    _arinar(tmp_path / "a", data, vae, on_eval=_interrupt_at(3))
    state = tmp_path / "a.state"
    state.write_bytes(state.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"a\.state is not a readable training state"):
        _arinar(tmp_path / "a", data, vae)


@KINDS
def test_loss_falls_and_the_best_average_is_kept(
    config: ArinarConfig, data: Dataset, vae: AutoencoderKL, tmp_path: Path
) -> None:
    result = _arinar(
        tmp_path / "a",
        data,
        vae,
        config=config,
        steps=80,
        batch_size=22,
        dropout=0.0,
        eval_every=10,
        learning_rate=1e-2,
        schedule="constant",
        augment=None,
    )
    held_out = [entry[2] for entry in result.history]
    assert result.held_out == min(held_out) < held_out[0] - 0.5
    assert result.best_step == result.history[held_out.index(min(held_out))][0]
    model = load_arinar(tmp_path / "a")
    assert model.config.class_names == ("top", "bottom") and not model.training
    assert sum(p.numel() for p in model.parameters()) == result.parameters


def test_vae_loss_falls(data: Dataset, tmp_path: Path) -> None:
    result = _vae(tmp_path / "a", data, steps=60, batch_size=16, eval_every=10)
    assert result.history[-1][1] < 0.8 * result.history[0][1]
    assert result.history[-1][2] < 0.8 * result.history[0][2]


def test_latents_are_normalised(data: Dataset, vae: AutoencoderKL, tmp_path: Path) -> None:
    moments = train.encode_copies(vae, data.train.images, Augment(), 3, seed=0)
    assert moments.shape == (4, 22, 8, 4, 4)
    shift, scale = train.latent_statistics(moments)
    generator = torch.Generator().manual_seed(0)
    mean, std = posterior(moments.flatten(0, 1))
    latents = torch.cat([mean + std * torch.randn(mean.shape, generator=generator) for _ in range(50)])
    config = MASKED.replace(latent_shift=shift, latent_scale=scale)
    seen = normalize(latents, config)
    assert seen.mean((0, 2, 3)).abs().max() < 0.02
    torch.testing.assert_close(seen.std((0, 2, 3)), torch.ones(4), atol=0.02, rtol=0)


@KINDS
def test_training_loss_is_the_models_own(config: ArinarConfig) -> None:
    model = initialize(Arinar(config)).eval()
    latents = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(6) % 2
    model.config = config.replace(latent_scale=1.0)
    tokens = patchify(latents, 1)
    for label_drop in (0.0, 0.5):
        ours = train.training_loss(model, tokens, labels, torch.Generator().manual_seed(3), label_drop=label_drop)
        theirs = model(latents, labels, label_drop=label_drop, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(ours, theirs)


def test_label_drop_hides_labels() -> None:
    model = initialize(Arinar(MASKED)).eval()
    seen: list[torch.Tensor] = []
    condition = model.condition
    model.condition = lambda t, m, labels: (seen.append(labels), condition(t, m, labels))[1]  # type: ignore
    tokens, labels = torch.zeros(4000, 16, 4), torch.ones(4000, dtype=torch.int64)
    train.training_loss(model, tokens, labels, torch.Generator().manual_seed(0), label_drop=0.1)
    assert set(seen[0].tolist()) == {-1, 1}
    assert (seen[0] == -1).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_masks_hide_the_same_number_everywhere() -> None:
    model = Arinar(MASKED)
    generator = torch.Generator().manual_seed(0)
    published = [model.training_mask(3, generator).sum(1) for _ in range(200)]
    wide = [model.training_mask(3, generator, 0.0, 1.0).sum(1) for _ in range(200)]
    assert all((counts == counts[0]).all() and counts[0] >= 1 for counts in published + wide)
    assert min(int(counts[0]) for counts in published) == 12  # ceil(0.7 * 16)
    assert {int(counts[0]) for counts in wide} == set(range(1, 17))
    assert Arinar(CAUSAL).training_mask(3, generator).eq(1).all()


def test_ema_is_a_geometric_mean_of_the_past() -> None:
    averaged, module = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.fill_(1.0)
        for parameter in module.parameters():
            parameter.fill_(3.0)
    for _ in range(5):
        update_ema(averaged, module, 0.8)
    torch.testing.assert_close(averaged.weight, torch.full((2, 2), 3.0 - 2.0 * 0.8**5))
    assert ema_decay(0.999, 0) == 0.1 and ema_decay(0.999, 10**6) == 0.999


def test_learning_rate_schedule() -> None:
    cosine = Optimization(steps=100, batch_size=1, learning_rate=1.0, warmup=10)
    assert cosine.rate(0) == pytest.approx(0.1) and cosine.rate(9) == cosine.rate(10) == 1.0
    assert cosine.rate(55) == pytest.approx(0.5) and 0 < cosine.rate(99) < 1e-2
    constant = Optimization(steps=100, batch_size=1, learning_rate=1.0, warmup=10, schedule="constant")
    assert constant.rate(99) == 1.0


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 25])
def test_every_image_is_seen_once_per_pass(batch_size: int) -> None:
    seen = torch.cat([train._batch(10, batch_size, step, seed=4) for step in range(20)])
    assert all(len(train._batch(10, batch_size, step, seed=4)) == batch_size for step in range(20))
    for start in range(0, len(seen) - 9, 10):
        assert sorted(seen[start : start + 10].tolist()) == list(range(10))
    if len(seen) >= 20:
        assert seen[:10].tolist() != seen[10:20].tolist()


def test_training_without_held_out_images(data: Dataset, vae: AutoencoderKL, tmp_path: Path) -> None:
    empty = ImageSet(data.held_out.images[:0], data.held_out.labels[:0])
    result = _arinar(tmp_path / "a", Dataset(data.train, empty, data.class_names, "tiny"), vae)
    assert result.finished and result.held_out is None and result.best_step == 7
    assert math.isnan(result.history[-1][2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": "colossal"}, "config is 'colossal'; choose one of base"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"schedule": "linear"}, "choose one of cosine, constant"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"label_drop": 1.0}, "label_drop is 1.0"),
        ({"eval_every": 0}, "eval_every is 0"),
        ({"config": MASKED.replace(vae_stride=4)}, "autoencoder has stride 2"),
        ({"config": MASKED.replace(img_size=16)}, "8 pixels wide"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str, data: Dataset, vae: AutoencoderKL, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _arinar(tmp_path / "a", data, vae, **changes)


def test_demo_recipes_start_from_their_names(tmp_path: Path, vae: AutoencoderKL) -> None:
    with pytest.raises(ValueError, match="no demo model 'cats'; choose one of digits-vae, digits, digits-causal"):
        train.train_demo("cats", tmp_path / "a")
    torch.manual_seed(0)
    coder = AutoencoderKL(VAE_PRESETS["digits"])
    result = train.train_demo(
        "digits",
        tmp_path / "a",
        vae=coder,
        steps=1,
        batch_size=2,
        augmented_copies=0,
        judged_samples=10,
        eval_every=5,
        accept_reconstruction=True,
        progress=False,
        device="cpu",
    )
    assert result.finished
    metadata = inspect_checkpoint(tmp_path / "a").metadata
    assert metadata["command"] == "arinar train model --config digits"
    assert metadata["judged_samples"] == "10" and 0 <= float(metadata["agreement"]) <= 1


def test_diverging_loss_is_reported(data: Dataset, vae: AutoencoderKL, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="training loss is"):
        _arinar(tmp_path / "a", data, vae, steps=200, learning_rate=1e6, warmup=1, clip=1e9, schedule="constant")


def test_a_finished_training_is_not_replaced_without_a_word(data: Dataset, vae: AutoencoderKL, tmp_path: Path) -> None:
    _arinar(tmp_path / "a", data, vae, steps=3)
    before = (tmp_path / "a").read_bytes()
    for again in (lambda: _arinar(tmp_path / "a", data, vae, steps=1), lambda: _vae(tmp_path / "a", data, steps=1)):
        with pytest.raises(ValueError, match=r"a is there already, .*; pass --overwrite .*, or name another file with -o"):
            again()
    assert (tmp_path / "a").read_bytes() == before
    stopped = _arinar(tmp_path / "a", data, vae, overwrite=True, on_eval=_interrupt_at(3))
    assert not stopped.finished and (tmp_path / "a").read_bytes() == before
    assert _arinar(tmp_path / "a", data, vae, overwrite=True).finished
    assert (tmp_path / "a").read_bytes() != before and not (tmp_path / "a.state").exists()


def test_a_disk_that_is_full_keeps_the_last_good_state(data: Dataset, vae: AutoencoderKL, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: every writer fails as it would there, in its own words."""
    resource = pytest.importorskip("resource")
    _arinar(tmp_path / "a", data, vae, on_eval=_interrupt_at(3))
    state = (tmp_path / "a.state").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        for arguments, name in (({"on_eval": _interrupt_at(6)}, r"a\.state"), ({"save_every": 100}, "a")):
            with pytest.raises(OSError, match=rf"cannot write .*{name}: File too large; .* choose another file") as caught:
                _arinar(tmp_path / "a", data, vae, **arguments)
            assert "\n" not in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.state").read_bytes() == state and [p.name for p in tmp_path.iterdir()] == ["a.state"]
    assert _arinar(tmp_path / "a", data, vae).finished


def test_a_training_checks_first_that_it_can_write(data: Dataset, vae: AutoencoderKL, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def never(*args: object) -> None:
        raise AssertionError("it trained first")

    with pytest.raises(ValueError, match=r"cannot write .*file/a"):
        _arinar(tmp_path / "file" / "a", data, vae, on_eval=never)
    assert _arinar(tmp_path / "new" / "folder" / "a", data, vae, steps=1).finished


def test_pictures_that_the_autoencoder_does_not_know_are_refused_before_training(tmp_path: Path) -> None:
    """The digits' autoencoder on pictures of another kind: the PSNR is said, and what to do; on digits it is good."""
    from arinar.data import load_dataset
    from arinar.demo import demo_vae

    generator = torch.Generator().manual_seed(0)
    colours = nn.functional.interpolate(torch.rand(40, 3, 4, 4, generator=generator), size=(32, 32), mode="bilinear")
    images = ImageSet((colours * 255).to(torch.uint8), torch.arange(40) % 2)
    other = Dataset(images, ImageSet(images.images[:0], images.labels[:0]), ("a", "b"), "colours")
    with pytest.raises(
        ValueError, match=r"PSNR of \d+\.\d dB; expected at least 20 dB.*`arinar train vae.*--accept-reconstruction"
    ):
        train_arinar(tmp_path / "a", data=other, steps=1, device="cpu", progress=False)
    assert not list(tmp_path.iterdir())
    coder = load_vae(demo_vae("digits"))
    digits = load_dataset("digits", img_size=32)
    assert train.reconstruction_psnr(coder, digits.train.images) > 30
    assert train.reconstruction_psnr(coder, images.images) < 12


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta", 10**9])
@pytest.mark.parametrize("what", [train_vae, train_arinar])
def test_a_device_that_is_not_there_is_told_first(device: Any, what: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device is .*, which PyTorch cannot use here .*; choose cpu") as caught:
        what(tmp_path / "a", data=tmp_path / "no data", device=device)
    assert "\n" not in str(caught.value)
