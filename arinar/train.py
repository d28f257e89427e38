"""Training: the autoencoder, then the autoregressive model on its latents.

Every random number of a step follows from (seed, step) alone: which images, which augmented copy, posterior noise,
masks, dropped labels, dropout. A training that is stopped and resumed therefore does exactly what an
uninterrupted one does, bit for bit on the same machine with the same number of threads.

Letters: N images, B images per step, C latent channels, L tokens, D features per token.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import load_arinar, load_vae, save_arinar, save_vae
from .config import PRESETS, VAE_PRESETS, ArinarConfig, VaeConfig
from .data import DIGITS, Augment, Dataset, load_dataset, to_float
from .demo import demo_vae
from .files import check_writable
from .fit import Fit, OnEval, Optimization, TrainResult, Watch, own_random_state, seed_for
from .judge import Judgement, judge
from .model import (
    MASK_RATIO_MIN,
    MASK_RATIO_STD,
    Arinar,
    decode_images,
    drop_labels,
    initialize,
    normalize,
    patchify,
)
from .sampler import sample
from .vae import AutoencoderKL, posterior

# Pixels, and images' latents, per forward pass where no gradient is needed: bounds the memory.
EVAL_PIXELS = 250 * 32 * 32
EVAL_BATCH = 250
# Passes over the held-out images per evaluation: a masked model's NLL depends on the masks drawn.
EVAL_REPEATS = 4

# Images that the autoencoder is tried on before a model is trained on its latents, and the least median PSNR: the
# published KL-16 has 24.08 dB on ImageNet (table of autoencoders in the code of arXiv 2112.10752), the digits' own 36 dB
# on digits and 8 on anything else.
PSNR_IMAGES = 64
LEAST_PSNR = 20.0

# Samples per call of the reference sampler when the demo models are judged: bounds the memory of 1000 proposals each.
JUDGE_BATCH = 100

#: What :func:`train_demo` trains. Their recipes are the defaults of :func:`train_vae` and :func:`train_arinar`.
DEMO_NAMES = ("digits-vae", "digits", "digits-causal", "digits-mar")

# Masks for images of few tokens: the published range would leave them without training for the last sampling steps.
# With the published number of tokens the model generalises to those; with 16 tokens, 0.7 means 4 known at most.
FEW_TOKENS = 64
FEW_TOKENS_RATIO_MIN = 0.05
FEW_TOKENS_RATIO_STD = 0.5


def train_vae(
    out: str | Path,
    *,
    config: str | VaeConfig = "digits",
    data: str | Path | Dataset = DIGITS,
    img_size: int = 32,
    steps: int = 2500,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    warmup: int = 100,
    schedule: str = "cosine",
    weight_decay: float = 0.01,
    clip: float = 1.0,
    ema: float = 0.999,
    kl_weight: float = 0.08,
    edge_weight: float = 0.5,
    augment: Augment | None = Augment(),  # noqa: B008 - frozen
    held_out: float | None = None,
    seed: int = 0,
    eval_every: int = 250,
    save_every: int = 500,
    device: str | torch.device | None = None,
    progress: bool = True,
    on_eval: OnEval | None = None,
    overwrite: bool = False,
) -> TrainResult:
    """Train an autoencoder and write the averaged weights with the lowest held-out loss to ``out`` (safetensors).

    Beside ``out`` lies ``<out>.state`` while training: Ctrl-C saves it and returns, the same call goes on from it.
    The loss is the mean absolute error of pixels in [-1, 1], plus ``edge_weight`` times that of the differences
    between neighbouring pixels (it keeps strokes crisp), plus ``kl_weight`` times the KL divergence per image value.

    Parameters
    ----------
    config : a name in VAE_PRESETS, or a VaeConfig.
    data : "digits", a folder with one sub-folder per class, or a Dataset.
    augment : random changes of the training images; None for none.
    device : None means CUDA where there is one, else the CPU.
    on_eval : called with (steps done, mean training loss, held-out loss) at each evaluation.
    overwrite : train anew where ``out`` is there already.

    Raises ValueError for unsuitable arguments or data, where ``out`` cannot be written or is there already, and where the
    state file belongs to another training; OSError where the disk is full.
    """
    vae_config = _preset(config, VAE_PRESETS, VaeConfig, "VAE config")
    target = _device(device)
    optimization = Optimization(steps, batch_size, learning_rate, warmup, schedule, weight_decay, clip=clip, ema=ema)
    watch = Watch(eval_every, save_every, progress, on_eval)
    _check_out(Path(out), overwrite)
    dataset = _dataset(data, img_size, held_out, seed)
    with own_random_state():
        torch.manual_seed(seed_for(seed, "weights"))
        vae = AutoencoderKL(vae_config).to(target)
        task = _VaeTask(vae, dataset, batch_size, seed, augment, kl_weight, edge_weight)
        identity = {
            "kind": "vae",
            "config": vae_config.to_dict(),
            "optimization": asdict(optimization),
            "kl_weight": kl_weight,
            "edge_weight": edge_weight,
            "augment": augment and asdict(augment),
            "seed": seed,
            "eval_every": eval_every,
            "data": dataset.fingerprint(),
        }
        fit = Fit(vae, optimization, task.loss, task.evaluate if len(dataset.held_out) else None, seed, identity, target)
        return _carry_out(fit, watch, Path(out), save_vae, "held_out_loss", dataset)


@dataclass
class _VaeTask:
    """What each step of an autoencoder's training computes."""

    vae: AutoencoderKL
    dataset: Dataset
    batch_size: int
    seed: int
    augment: Augment | None
    kl_weight: float
    edge_weight: float

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        pixels = self.dataset.train.images
        images = to_float(pixels[_batch(len(pixels), self.batch_size, step, self.seed)])
        if self.augment is not None:
            images = self.augment(images, generator)
        return self._loss(self.vae, images, generator)

    def evaluate(self, averaged: nn.Module, generator: torch.Generator) -> float:
        assert isinstance(averaged, AutoencoderKL)
        held_out = self.dataset.held_out.images
        total = 0.0
        for images in torch.split(held_out, _eval_images(held_out.shape[-1])):
            total += float(self._loss(averaged, to_float(images), generator)) * len(images)
        return total / len(held_out)

    def _loss(self, vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
        return vae_loss(vae, images.to(_device_of(vae)), generator, self.kl_weight, self.edge_weight)


def vae_loss(vae: AutoencoderKL, images: Tensor, generator: torch.Generator, kl_weight: float, edge_weight: float) -> Tensor:
    """Loss of float images (B, 3, H, W) in [-1, 1], reconstructed from one draw of the posterior: a scalar."""
    mean, std = posterior(vae.encode(images))
    mean, std = mean.float(), std.float()
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    error = vae.decode(mean + std * noise).float() - images
    # The difference of edges is the edge of the difference.
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum() / images.numel()
    return error.abs().mean() + edge_weight * edges + kl_weight * kl


def train_arinar(
    out: str | Path,
    *,
    config: str | ArinarConfig = "digits",
    data: str | Path | Dataset = DIGITS,
    vae: str | Path | AutoencoderKL | None = None,
    steps: int = 3600,
    batch_size: int = 64,
    learning_rate: float = 1.5e-3,
    warmup: int = 100,
    schedule: str = "cosine",
    weight_decay: float = 0.05,
    clip: float = 1.0,
    ema: float = 0.999,
    dropout: float = 0.1,
    label_drop: float = 0.1,
    mask_ratio_min: float | None = None,
    mask_ratio_std: float | None = None,
    augment: Augment | None = Augment(),  # noqa: B008 - frozen
    augmented_copies: int = 24,
    held_out: float | None = None,
    seed: int = 0,
    eval_every: int = 200,
    save_every: int = 400,
    device: str | torch.device | None = None,
    accept_reconstruction: bool = False,
    progress: bool = True,
    on_eval: OnEval | None = None,
    overwrite: bool = False,
) -> TrainResult:
    """Train a model of any kind and write the averaged weights with the lowest held-out loss to ``out``. (Of a Gaussian
    mixture head the loss is the NLL per token; of a diffusion head it is that of `DiffusionHead.loss_at`.)

    The images are encoded once, in ``augmented_copies`` randomly changed copies beside the original; each step draws
    latents from the posterior of a random copy. ``latent_shift`` and ``latent_scale`` are set per channel so that the
    model sees zero mean and unit variance; ``num_classes`` and ``class_names`` follow the data. Interruption and
    resuming: as in :func:`train_vae`.

    Parameters
    ----------
    config : a name in PRESETS, or an ArinarConfig.
    data : "digits", a folder with one sub-folder per class, or a Dataset.
    vae : autoencoder, or its file; None means the built-in one of the digits.
    dropout : in the outer blocks.
    label_drop : share of labels replaced by "unconditional", which is what guidance needs.
    mask_ratio_min, mask_ratio_std : for a masked model, the share of unknown tokens in training: a one-sided normal
        that falls from 1 with this std, truncated below. None means the published 0.7 and 0.25, or 0.05 and 0.5 for
        images of fewer than 64 tokens.
    accept_reconstruction : train also where the autoencoder reconstructs the images badly, below LEAST_PSNR.
    device : None means CUDA where there is one (bfloat16 where it has it), else the CPU.
    on_eval : called with (steps done, mean training loss, held-out loss) at each evaluation.
    overwrite : train anew where ``out`` is there already.

    Raises ValueError for unsuitable arguments or data, where ``out`` cannot be written or is there already, and where the
    state file belongs to another training; OSError where the disk is full.
    """
    model_config = _preset(config, PRESETS, ArinarConfig, "config")
    target = _device(device)
    ratios = _mask_ratios(model_config, mask_ratio_min, mask_ratio_std)
    _check_shares(dropout=dropout, label_drop=label_drop, mask_ratio_min=ratios["mask_ratio_min"])
    optimization = Optimization(steps, batch_size, learning_rate, warmup, schedule, weight_decay, clip=clip, ema=ema)
    watch = Watch(eval_every, save_every, progress, on_eval)
    _check_out(Path(out), overwrite)
    dataset = _dataset(data, model_config.img_size, held_out, seed)
    coder = _autoencoder(vae, model_config).to(target)
    psnr = reconstruction_psnr(coder, dataset.train.images)
    _check_reconstruction(psnr, accept_reconstruction, progress)
    with own_random_state():
        moments = encode_copies(coder, dataset.train.images, augment, augmented_copies, seed, progress)
        aside = encode_copies(coder, dataset.held_out.images, None, 0, seed)[0]
        model_config = _fitted_to_data(model_config, dataset, moments)
        torch.manual_seed(seed_for(seed, "weights"))
        model = initialize(Arinar(model_config, dropout), seed_for(seed, "weights")).to(target)
        task = _ArinarTask(model, dataset, moments, aside, batch_size, seed, label_drop, ratios)
        identity = {
            "kind": "arinar",
            "config": model_config.to_dict(),
            "optimization": asdict(optimization),
            "dropout": dropout,
            "label_drop": label_drop,
            "ratios": ratios,
            "augment": augment and asdict(augment),
            "augmented_copies": augmented_copies,
            "seed": seed,
            "eval_every": eval_every,
            "data": dataset.fingerprint(),
        }
        fit = Fit(model, optimization, task.loss, task.evaluate if len(aside) else None, seed, identity, target)
        return _carry_out(fit, watch, Path(out), save_arinar, held_out_name(model_config), dataset)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """uint8 images (N, 3, H, W) -> how well they survive the autoencoder: the median of PSNRs, in dB, of a sample of them."""
    sample_ = images[:: max(1, len(images) // PSNR_IMAGES)][:PSNR_IMAGES]
    found = []
    for part in torch.split(sample_, max(1, min(PSNR_IMAGES, _eval_images(images.shape[-1])))):
        pixels = to_float(part).to(_device_of(vae))
        decoded = vae.decode(posterior(vae.encode(pixels))[0]).float().clamp(-1, 1)
        error = ((decoded - pixels) / 2).square().mean((1, 2, 3))  # of pixels in [0, 1]
        found.append(-10 * error.clamp(min=1e-10).log10().cpu())
    return float(torch.cat(found).median())


def _check_reconstruction(psnr: float, accept: bool, progress: bool) -> None:
    if progress:
        print(f"the autoencoder reconstructs these images with a PSNR of {psnr:.1f} dB", file=sys.stderr)
    if not accept and not psnr >= LEAST_PSNR:  # NaN too
        raise ValueError(
            f"the autoencoder reconstructs these images with a PSNR of {psnr:.1f} dB; expected at least {LEAST_PSNR:g} dB: a "
            f"model cannot draw what its autoencoder cannot. Train one on them first, or longer (`arinar train vae --data "
            f"FOLDER -o my-vae.safetensors --steps N`, then --vae my-vae.safetensors), or accept it with "
            "--accept-reconstruction"
        )


def _mask_ratios(config: ArinarConfig, ratio_min: float | None, ratio_std: float | None) -> dict[str, float]:
    few = config.seq_len < FEW_TOKENS
    if ratio_min is None:
        ratio_min = FEW_TOKENS_RATIO_MIN if few else MASK_RATIO_MIN
    if ratio_std is None:
        ratio_std = FEW_TOKENS_RATIO_STD if few else MASK_RATIO_STD
    return {"mask_ratio_min": ratio_min, "mask_ratio_std": ratio_std}


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name} is {share}; expected 0 <= {name} < 1")


def _fitted_to_data(config: ArinarConfig, dataset: Dataset, moments: Tensor) -> ArinarConfig:
    shift, scale = latent_statistics(moments)
    return config.replace(
        num_classes=len(dataset.class_names),
        class_names=dataset.class_names,
        latent_shift=shift,
        latent_scale=scale,
    )


@dataclass
class _ArinarTask:
    """What each step of a model's training computes, on latents drawn from the images' posteriors."""

    model: Arinar
    dataset: Dataset
    moments: Tensor  # (copies, N, 2C, h, w) of the training images
    aside: Tensor  # (N, 2C, h, w) of the held-out images
    batch_size: int
    seed: int
    label_drop: float
    ratios: dict[str, float]

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        labels = self.dataset.train.labels
        rows = _batch(len(labels), self.batch_size, step, self.seed)
        copies = torch.randint(len(self.moments), (len(rows),), generator=generator)
        return self._loss(self.model, self.moments[copies, rows], labels[rows], generator, self.label_drop)

    def evaluate(self, averaged: nn.Module, generator: torch.Generator) -> float:
        assert isinstance(averaged, Arinar)
        total = 0.0
        for _ in range(EVAL_REPEATS):
            for first in range(0, len(self.aside), EVAL_BATCH):
                labels = self.dataset.held_out.labels[first : first + EVAL_BATCH]
                value = self._loss(averaged, self.aside[first : first + EVAL_BATCH], labels, generator, 0.0)
                total += float(value) * len(labels)
        return total / (EVAL_REPEATS * len(self.aside))

    def _loss(self, model: Arinar, moments: Tensor, labels: Tensor, generator: torch.Generator, label_drop: float) -> Tensor:
        mean, std = posterior(moments)
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        device = model.fake_latent.device
        tokens = patchify(normalize(latents, model.config), model.config.patch_size).to(device)
        return training_loss(model, tokens, labels.to(device), generator, label_drop=label_drop, **self.ratios)


def _state_path(out: Path) -> Path:
    """The file that holds a training's state until it is finished."""
    return out.with_name(out.name + ".state")


def _check_out(out: Path, overwrite: bool) -> None:
    """Raise ValueError where a training's result could not be written, or would replace another's."""
    state = _state_path(out)
    if out.is_file() and not state.exists() and not overwrite:
        raise ValueError(
            f"{out} is there already, and no unfinished training of it ({state.name}) to go on with; "
            f"pass --overwrite to train anew in its place, or name another file with -o"
        )
    check_writable(out, make_folder=True)
    check_writable(state)


def _carry_out(fit: Fit, watch: Watch, out: Path, save: Callable[..., None], measure: str, dataset: Dataset) -> TrainResult:
    """Train, and write what came of it to ``out``; the state lies beside it until then."""
    state = _state_path(out)
    finished = fit.run(state, watch)
    if finished:
        metadata = {"data": dataset.name, "seed": str(fit.seed), "steps": str(fit.step), "best_step": str(fit.best_step)}
        if math.isfinite(fit.best):
            metadata[measure] = f"{fit.best:.4f}"
        save(out, fit.chosen(), metadata=metadata)
        state.unlink(missing_ok=True)
    return fit.result(out, finished)


def train_demo(name: str, out: str | Path, *, judged_samples: int = 1000, **changes: Any) -> TrainResult:
    """Train a demo model ("digits", "digits-causal", "digits-mar") or its autoencoder ("digits-vae") as the shipped one was.

    ``changes`` are keyword arguments of :func:`train_vae` or :func:`train_arinar` that differ from the defaults. A
    finished model is judged on ``judged_samples`` samples at its default settings (0: not at all), and the result
    stored in the file's metadata.
    """
    if name not in DEMO_NAMES:
        raise ValueError(f"no demo model {name!r}; choose one of {', '.join(DEMO_NAMES)}")
    if name.endswith("-vae"):
        return train_vae(out, config=name.removesuffix("-vae"), **changes)
    result = train_arinar(out, config=name, **changes)
    if result.finished and judged_samples:
        model = load_arinar(out)
        vae = _autoencoder(changes.get("vae"), model.config)
        found = judge_samples(model, vae, count=judged_samples)
        metadata = {
            "data": DIGITS,
            "command": f"arinar train model --config {name}",
            "seed": str(changes.get("seed", 0)),
            "steps": str(result.step),
            "best_step": str(result.best_step),
            "agreement": f"{found.agreement:.4f}",
            "diversity": f"{found.diversity:.4f}",
            "novelty": f"{found.novelty:.4f}",
            "judged_samples": str(found.images),
        }
        if result.held_out is not None:
            metadata[held_out_name(model.config)] = f"{result.held_out:.4f}"
        save_arinar(out, model, metadata=metadata)
    return result


def held_out_name(config: ArinarConfig) -> str:
    """What the held-out loss of a model is called in its file's metadata."""
    return "held_out_nll" if config.head == "gmm" else "held_out_loss"


def judge_samples(
    model: Arinar,
    vae: AutoencoderKL,
    *,
    count: int = 1000,
    guidance_scale: float | None = None,
    temperature: float = 1.0,
    num_iter: int | None = None,
    seed: int = 0,
) -> Judgement:
    """Draw ``count`` digits, as many of each class, by the reference sampler and judge them.

    ``guidance_scale`` and ``num_iter`` None mean the config's defaults. Needs scikit-learn.
    """
    labels = torch.arange(count) % 10
    images = [
        sample_images(
            model,
            vae,
            part,
            guidance_scale=guidance_scale,
            temperature=temperature,
            num_iter=num_iter,
            seed=seed_for(seed, "samples", index),
        )
        for index, part in enumerate(torch.split(labels, JUDGE_BATCH))
    ]
    return judge(torch.cat(images).numpy(), labels.numpy())


@torch.no_grad()
def sample_images(
    model: Arinar,
    vae: AutoencoderKL,
    labels: Tensor,
    *,
    guidance_scale: float | None = None,
    temperature: float = 1.0,
    num_iter: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Labels (B,) -> images (B, H, W, 3) uint8 on the CPU, by the reference sampler and the autoencoder."""
    config = model.config
    scale = config.default_guidance_scale if guidance_scale is None else guidance_scale
    tokens = sample(model, labels, guidance_scale=scale, temperature=temperature, num_iter=num_iter, seed=seed)
    return decode_images(vae, tokens, config)


def training_loss(
    model: Arinar,
    tokens: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    *,
    label_drop: float = 0.1,
    mask_ratio_min: float = MASK_RATIO_MIN,
    mask_ratio_std: float = MASK_RATIO_STD,
) -> Tensor:
    """The head's loss per token to be predicted, of normalised tokens (B, L, D) and labels (B,): a scalar.

    The same quantity as ``model(latents, labels)``, with the masks' share of unknown tokens to choose and no work for
    tokens that are known.
    """
    labels = drop_labels(labels, label_drop, generator)
    mask = model.training_mask(len(tokens), generator, mask_ratio_min, mask_ratio_std).to(tokens)
    unknown = mask.flatten().bool()
    z = model.condition(tokens, mask, labels).flatten(0, 1)[unknown]  # (N, C)
    features = tokens.flatten(0, 1)[unknown].float()  # (N, D)
    z, features = (value.repeat(model.head.REPEATS, 1) for value in (z, features))
    return model.head.loss(z, features, generator).mean()


@torch.no_grad()
def encode_copies(
    vae: AutoencoderKL, images: Tensor, augment: Augment | None, copies: int, seed: int, progress: bool = False
) -> Tensor:
    """uint8 images (N, 3, H, W) -> posterior moments (1 + copies, N, 2C, h, w) on the CPU; the first is unchanged.

    Without ``augment`` there is the first alone.
    """
    device = _device_of(vae)
    found = []
    rounds = range(1 + (copies if augment is not None else 0))
    for index in tqdm(rounds, desc="encoding", unit="copy", disable=not progress):
        generator = torch.Generator().manual_seed(seed_for(seed, "augment", index))
        parts = []
        for part in torch.split(images, _eval_images(images.shape[-1])):
            pixels = to_float(part)
            if index and augment is not None:
                pixels = augment(pixels, generator)
            parts.append(vae.encode(pixels.to(device)).float().cpu())
        found.append(torch.cat(parts) if parts else torch.zeros(0, 2 * vae.config.embed_dim, 1, 1))
    return torch.stack(found)


def _eval_images(img_size: int) -> int:
    return max(1, EVAL_PIXELS // img_size**2)


def latent_statistics(moments: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Posterior moments (copies, N, 2C, h, w) -> shift and scale, C values each.

    (latents - shift) * scale has zero mean and unit variance per channel, the posterior's own variance included.
    """
    mean, std = posterior(moments.flatten(0, 1))
    mean, variance = mean.double(), std.double() ** 2
    centre = mean.mean((0, 2, 3))
    total = ((mean - centre[:, None, None]) ** 2 + variance).mean((0, 2, 3)).clamp(min=1e-12)
    # Six digits are plenty, and keep the config readable.
    return (
        tuple(float(f"{value:.6g}") for value in centre),
        tuple(float(f"{value:.6g}") for value in total.rsqrt()),
    )


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_for(seed, "epoch", epoch)))


def _batch(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Indices (batch_size,) of a step's images: its stretch of one shuffled pass over all images after another."""
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // count, (last - 1) // count + 1)
    passes = torch.cat([_permutation(count, seed, epoch) for epoch in epochs])
    offset = first - epochs[0] * count
    return passes[offset : offset + batch_size]


def _preset(config: Any, presets: dict[str, Any], kind: type, what: str) -> Any:
    if isinstance(config, kind):
        return config
    if config not in presets:
        raise ValueError(f"{what} is {config!r}; choose one of {', '.join(presets)}")
    return presets[config]


def _dataset(data: str | Path | Dataset, img_size: int, held_out: float | None, seed: int) -> Dataset:
    if not isinstance(data, Dataset):
        return load_dataset(data, img_size=img_size, held_out=held_out, seed=seed)
    if data.train.images.shape[-1] != img_size:
        width = data.train.images.shape[-1]
        raise ValueError(f"the images are {width} pixels wide; the config's img_size is {img_size}")
    return data


def _autoencoder(vae: str | Path | AutoencoderKL | None, config: ArinarConfig) -> AutoencoderKL:
    """The autoencoder to encode with, frozen, checked against the model's config."""
    if not isinstance(vae, AutoencoderKL):
        vae = load_vae(demo_vae(DIGITS) if vae is None else vae)
    if (vae.config.stride, vae.config.embed_dim) != (config.vae_stride, config.vae_embed_dim):
        raise ValueError(
            f"the autoencoder has stride {vae.config.stride} and {vae.config.embed_dim} channels; the config expects "
            f"{config.vae_stride} and {config.vae_embed_dim}: choose the autoencoder with `vae`"
        )
    return copy.deepcopy(vae).float().eval().requires_grad_(False)


def _device_of(vae: AutoencoderKL) -> torch.device:
    return vae.post_quant_conv.weight.device


def _device(device: str | torch.device | None) -> torch.device:
    """The device to train on. Raises ValueError for one that is unknown, or cannot be used here."""
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=target).item()
    except Exception as error:  # PyTorch raises AssertionError, RuntimeError, NotImplementedError and more
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"device is {str(device)!r}, which PyTorch cannot use here ({reason}); choose cpu") from error
    return target
