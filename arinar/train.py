"""Training: the autoencoder, then the autoregressive model on its latents.

Every random number of a step follows from (seed, step) alone: which images, which augmented copy, posterior noise,
masks, dropped labels, dropout. A training that is stopped and resumed therefore does exactly what an
uninterrupted one does, bit for bit on the same machine with the same number of threads.

Letters: N images, B images per step, C latent channels, L tokens, D features per token.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from .checkpoint import load_arinar, load_vae, save_arinar, save_vae
from .config import PRESETS, VAE_PRESETS, ArinarConfig, VaeConfig
from .data import DIGITS, Augment, Dataset, load_dataset, to_float
from .demo import demo_vae
from .files import replacing
from .inner import Mixture, log_density
from .judge import Judgement, judge
from .model import (
    MASK_RATIO_MIN,
    MASK_RATIO_STD,
    Arinar,
    MaskedArinar,
    denormalize,
    initialize,
    normalize,
    patchify,
    unpatchify,
)
from .sampler import sample
from .vae import AutoencoderKL, posterior, to_uint8

SCHEDULES = ("cosine", "constant")
# Of the state files; a file of another version is refused rather than misread.
STATE_VERSION = 1
# Pixels, and images' latents, per forward pass where no gradient is needed: bounds the memory.
EVAL_PIXELS = 250 * 32 * 32
EVAL_BATCH = 250
# Passes over the held-out images per evaluation: a masked model's NLL depends on the masks drawn.
EVAL_REPEATS = 4

# Samples per call of the reference sampler when the demo models are judged: bounds the memory of 1000 proposals each.
JUDGE_BATCH = 100

OnEval = Callable[[int, float, float], None]

#: What :func:`train_demo` trains. Their recipes are the defaults of :func:`train_vae` and :func:`train_arinar`.
DEMO_NAMES = ("digits-vae", "digits", "digits-causal")

# Masks for images of few tokens: the published range would leave them without training for the last sampling steps.
# With the published number of tokens the model generalises to those; with 16 tokens, 0.7 means 4 known at most.
FEW_TOKENS = 64
FEW_TOKENS_RATIO_MIN = 0.05
FEW_TOKENS_RATIO_STD = 0.5


@dataclass(frozen=True)
class Optimization:
    """How weights are updated. AdamW; linear warm-up, then ``schedule`` ("cosine" to zero, or "constant").

    ``weight_decay`` applies to matrices and convolutions only. ``ema`` is the decay of the averaged weights, reached
    gradually. ``clip`` is the largest gradient norm.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    schedule: str = "cosine"
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    ema: float = 0.999

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps is {self.steps}, batch_size is {self.batch_size}; expected at least 1 of each")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected a number above 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; expected 0 <= ema < 1")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; choose one of {', '.join(SCHEDULES)}")

    def rate(self, step: int) -> float:
        """Learning rate of step 0..steps-1."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class TrainResult:
    """What a training came to.

    ``finished`` is False after an interruption: the same call resumes. ``held_out`` is the lowest held-out loss (NLL
    per token for a model, None without held-out images) and ``best_step`` the number of steps that gave it;
    ``history`` lists (steps, mean training loss since the last entry, held-out loss).
    """

    path: Path
    finished: bool
    step: int
    best_step: int
    held_out: float | None
    parameters: int
    history: list[tuple[int, float, float]] = field(repr=False)


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

    Raises ValueError for unsuitable arguments or data, and where the state file belongs to another training.
    """
    vae_config = _preset(config, VAE_PRESETS, VaeConfig, "VAE config")
    optimization = Optimization(steps, batch_size, learning_rate, warmup, schedule, weight_decay, clip=clip, ema=ema)
    dataset = _dataset(data, img_size, held_out, seed)
    target = _device(device)
    with _own_random_state():
        torch.manual_seed(_seed(seed, "weights"))
        vae = AutoencoderKL(vae_config).to(target)
        pixels = dataset.train.images

        def loss(step: int, generator: torch.Generator) -> Tensor:
            images = to_float(pixels[_batch(len(pixels), batch_size, step, seed)])
            if augment is not None:
                images = augment(images, generator)
            return vae_loss(vae, images.to(target), generator, kl_weight, edge_weight)

        def evaluate(averaged: nn.Module, generator: torch.Generator) -> float:
            assert isinstance(averaged, AutoencoderKL)
            total = 0.0
            for images in torch.split(dataset.held_out.images, _eval_images(img_size)):
                value = vae_loss(averaged, to_float(images).to(target), generator, kl_weight, edge_weight)
                total += float(value) * len(images)
            return total / len(dataset.held_out)

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
        fit = _Fit(vae, optimization, loss, evaluate if len(dataset.held_out) else None, seed, identity, target)
        finished = fit.run(_state_path(out), eval_every, save_every, progress, on_eval)
        if finished:
            chosen = fit.chosen()
            assert isinstance(chosen, AutoencoderKL)
            save_vae(out, chosen, metadata=_metadata(fit, dataset, seed, "held_out_loss"))
            _state_path(out).unlink(missing_ok=True)
    return fit.result(Path(out), finished)


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
    progress: bool = True,
    on_eval: OnEval | None = None,
) -> TrainResult:
    """Train a model of either kind and write the averaged weights with the lowest held-out NLL to ``out``.

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
    device : None means CUDA where there is one (bfloat16 where it has it), else the CPU.
    on_eval : called with (steps done, mean training loss, held-out NLL per token) at each evaluation.

    Raises ValueError for unsuitable arguments or data, and where the state file belongs to another training.
    """
    model_config = _preset(config, PRESETS, ArinarConfig, "config")
    few = model_config.seq_len < FEW_TOKENS
    if mask_ratio_min is None:
        mask_ratio_min = FEW_TOKENS_RATIO_MIN if few else MASK_RATIO_MIN
    if mask_ratio_std is None:
        mask_ratio_std = FEW_TOKENS_RATIO_STD if few else MASK_RATIO_STD
    ratios = {"mask_ratio_min": mask_ratio_min, "mask_ratio_std": mask_ratio_std}
    for name, share in (("dropout", dropout), ("label_drop", label_drop), ("mask_ratio_min", mask_ratio_min)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} is {share}; expected 0 <= {name} < 1")
    optimization = Optimization(steps, batch_size, learning_rate, warmup, schedule, weight_decay, clip=clip, ema=ema)
    dataset = _dataset(data, model_config.img_size, held_out, seed)
    target = _device(device)
    coder = _autoencoder(vae, model_config).to(target)
    with _own_random_state():
        moments = encode_copies(coder, dataset.train.images, augment, augmented_copies, seed)
        aside = encode_copies(coder, dataset.held_out.images, None, 0, seed)[0]
        shift, scale = latent_statistics(moments)
        model_config = model_config.replace(
            num_classes=len(dataset.class_names),
            class_names=dataset.class_names,
            latent_shift=shift,
            latent_scale=scale,
        )
        torch.manual_seed(_seed(seed, "weights"))
        model = initialize(Arinar(model_config, dropout), _seed(seed, "weights")).to(target)
        labels = dataset.train.labels

        def tokens_of(chosen: Tensor, generator: torch.Generator) -> Tensor:
            mean, std = posterior(chosen)
            latents = mean + std * torch.randn(mean.shape, generator=generator)
            return patchify(normalize(latents, model_config), model_config.patch_size).to(target)

        def loss(step: int, generator: torch.Generator) -> Tensor:
            rows = _batch(len(labels), batch_size, step, seed)
            copies = torch.randint(len(moments), (len(rows),), generator=generator)
            tokens = tokens_of(moments[copies, rows], generator)
            return training_loss(model, tokens, labels[rows].to(target), generator, label_drop=label_drop, **ratios)

        def evaluate(averaged: nn.Module, generator: torch.Generator) -> float:
            assert isinstance(averaged, Arinar)
            total = 0.0
            for _ in range(EVAL_REPEATS):
                for first in range(0, len(aside), EVAL_BATCH):
                    ids = dataset.held_out.labels[first : first + EVAL_BATCH]
                    tokens = tokens_of(aside[first : first + EVAL_BATCH], generator)
                    value = training_loss(averaged, tokens, ids.to(target), generator, label_drop=0.0, **ratios)
                    total += float(value) * len(ids)
            return total / (EVAL_REPEATS * len(aside))

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
        fit = _Fit(model, optimization, loss, evaluate if len(aside) else None, seed, identity, target)
        finished = fit.run(_state_path(out), eval_every, save_every, progress, on_eval)
        if finished:
            chosen = fit.chosen()
            assert isinstance(chosen, Arinar)
            save_arinar(out, chosen, metadata=_metadata(fit, dataset, seed, "held_out_nll"))
            _state_path(out).unlink(missing_ok=True)
    return fit.result(Path(out), finished)


def train_demo(name: str, out: str | Path, *, judged_samples: int = 1000, **changes: Any) -> TrainResult:
    """Train a demo model ("digits", "digits-causal") or its autoencoder ("digits-vae") as the shipped one was.

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
            metadata["held_out_nll"] = f"{result.held_out:.4f}"
        save_arinar(out, model, metadata=metadata)
    return result


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
            seed=_seed(seed, "samples", index),
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
    latents = denormalize(unpatchify(tokens, config.patch_size), config)
    return to_uint8(vae.decode(latents)).cpu()


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
    """NLL per token to be predicted, of normalised tokens (B, L, D) and labels (B,): a scalar.

    The same quantity as ``model(latents, labels)`` (without 0.5 log(2 pi) per feature), with the masks' share of
    unknown tokens to choose and no work for tokens that are known.
    """
    if label_drop > 0:
        drop = torch.rand(len(labels), generator=generator).to(labels.device) < label_drop
        labels = torch.where(drop, torch.full_like(labels, -1), labels)
    mask = draw_mask(model, len(tokens), generator, mask_ratio_min, mask_ratio_std).to(tokens)
    unknown = mask.flatten().bool()
    z = model.condition(tokens, mask, labels).flatten(0, 1)[unknown]  # (N, C)
    features = tokens.flatten(0, 1)[unknown].float()  # (N, D)
    # Under autocast the network may run in bfloat16; densities need single precision.
    mixture = Mixture(*(value.float() for value in model.mixture(z, features)))
    constant = 0.5 * math.log(2 * math.pi) * features.shape[-1]
    return -log_density(features, mixture).sum(-1).mean() - constant


def draw_mask(
    model: Arinar,
    batch: int,
    generator: torch.Generator,
    ratio_min: float = MASK_RATIO_MIN,
    ratio_std: float = MASK_RATIO_STD,
) -> Tensor:
    """Training mask (batch, L), 1 = to be predicted; one share of unknown tokens per batch, at least one token."""
    if not isinstance(model, MaskedArinar):
        return model.training_mask(batch, generator)
    length = model.config.seq_len
    while True:  # rejection from the one-sided normal
        ratio = 1.0 - abs(float(torch.randn((), generator=generator))) * ratio_std
        if ratio >= ratio_min:
            break
    count = max(1, math.ceil(length * ratio))
    return (torch.rand(batch, length, generator=generator).argsort(1) < count).float()


@torch.no_grad()
def encode_copies(vae: AutoencoderKL, images: Tensor, augment: Augment | None, copies: int, seed: int) -> Tensor:
    """uint8 images (N, 3, H, W) -> posterior moments (1 + copies, N, 2C, h, w) on the CPU; the first is unchanged.

    Without ``augment`` there is the first alone.
    """
    device = vae.post_quant_conv.weight.device
    found = []
    for index in range(1 + (copies if augment is not None else 0)):
        generator = torch.Generator().manual_seed(_seed(seed, "augment", index))
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


class _Fit:
    """One training: weights, their average, the optimizer, the best average so far. Knows nothing of the task."""

    def __init__(
        self,
        module: nn.Module,
        optimization: Optimization,
        loss: Callable[[int, torch.Generator], Tensor],
        evaluate: Callable[[nn.Module, torch.Generator], float] | None,
        seed: int,
        identity: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.module, self.optimization, self.loss, self.evaluate = module, optimization, loss, evaluate
        self.seed, self.identity, self.device = seed, identity, device
        self.averaged = copy.deepcopy(module).eval().requires_grad_(False)
        decayed = [p for p in module.parameters() if p.ndim > 1]
        others = [p for p in module.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": optimization.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=optimization.learning_rate,
            betas=optimization.betas,
        )
        self.step = 0
        self.best_step = 0
        self.best = math.inf
        self.best_weights: dict[str, Tensor] = {}
        self.history: list[tuple[int, float, float]] = []
        # Sum and number of training losses since the last evaluation.
        self.recent = [0.0, 0]

    def run(self, state: Path, eval_every: int, save_every: int, progress: bool, on_eval: OnEval | None) -> bool:
        """Train to the last step -> True, or until a signal asks to stop -> False, with the state saved."""
        if eval_every < 1 or save_every < 1:
            raise ValueError(f"eval_every is {eval_every}, save_every is {save_every}; expected at least 1 of each")
        state.parent.mkdir(parents=True, exist_ok=True)
        if state.exists():
            self.load(state)
        steps = self.optimization.steps
        bar = tqdm(total=steps, initial=self.step, disable=not progress, unit="step", mininterval=0.5)
        with bar, _stop_signal() as stopped:
            while self.step < steps:
                value = self.update()
                self.recent = [self.recent[0] + value, self.recent[1] + 1]
                bar.update()
                held_out = f"{self.history[-1][2]:.3f}" if self.history else "-"
                bar.set_postfix_str(f"loss {value:.3f}, held-out {held_out}", refresh=False)
                if self.step % eval_every == 0 or self.step == steps:
                    self.judge(on_eval)
                if stopped() and self.step < steps:
                    self.save(state)
                    return False
                if self.step % save_every == 0 and self.step < steps:
                    self.save(state)
        return True

    def update(self) -> float:
        """One optimizer step -> its loss."""
        generator = torch.Generator().manual_seed(_seed(self.seed, "step", self.step))
        torch.manual_seed(_seed(self.seed, "dropout", self.step))
        self.module.train()
        with _autocast(self.device):
            loss = self.loss(self.step, generator)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RuntimeError(f"the training loss is {value} at step {self.step}; try a smaller learning_rate")
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.module.parameters(), self.optimization.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimization.rate(self.step)
        self.optimizer.step()
        self.step += 1
        update_ema(self.averaged, self.module, ema_decay(self.optimization.ema, self.step))
        return value

    @torch.no_grad()
    def judge(self, on_eval: OnEval | None) -> None:
        """Evaluate the averaged weights, always on the same noise and masks, and keep the best."""
        mean = self.recent[0] / max(1, self.recent[1])
        self.recent = [0.0, 0]
        if self.evaluate is None:
            self.best_step, self.history = self.step, [*self.history, (self.step, mean, math.nan)]
            return
        with _autocast(self.device):
            value = self.evaluate(self.averaged, torch.Generator().manual_seed(_seed(self.seed, "evaluate")))
        if value < self.best:
            self.best, self.best_step = value, self.step
            self.best_weights = {k: v.detach().clone() for k, v in self.averaged.state_dict().items()}
        self.history.append((self.step, mean, value))
        if on_eval is not None:
            on_eval(self.step, mean, value)

    def chosen(self) -> nn.Module:
        """The averaged weights with the lowest held-out loss; the last ones without held-out images."""
        if self.best_weights:
            self.averaged.load_state_dict(self.best_weights)
        return self.averaged

    def result(self, path: Path, finished: bool) -> TrainResult:
        parameters = sum(p.numel() for p in self.module.parameters())
        held_out = self.best if math.isfinite(self.best) else None
        return TrainResult(path, finished, self.step, self.best_step, held_out, parameters, list(self.history))

    def save(self, path: Path) -> None:
        """Write the state under a temporary name, then rename: an interruption leaves the previous file whole."""
        state = {
            "version": STATE_VERSION,
            "identity": self.identity,
            "step": self.step,
            "module": self.module.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_step": self.best_step,
            "best_weights": self.best_weights,
            "history": self.history,
            "recent": self.recent,
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Continue from a state file, or raise ValueError where it is damaged or belongs to another training."""
        remedy = f"repeat the first call's arguments, or delete {path} to start again"
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            version, identity = state["version"], state["identity"]
        except Exception as error:  # torch.load raises half a dozen kinds
            raise ValueError(f"{path} is not a readable training state; delete it to start again: {error}") from error
        if version != STATE_VERSION:
            raise ValueError(f"{path} has state version {version}; expected {STATE_VERSION}; {remedy}")
        keys = self.identity.keys() | identity.keys()
        changed = sorted(key for key in keys if self.identity.get(key) != identity.get(key))
        if changed:
            raise ValueError(f"{path} belongs to a training with another {', '.join(changed)}; {remedy}")
        self.module.load_state_dict(state["module"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.best_step = state["step"], state["best"], state["best_step"]
        self.best_weights, self.recent = state["best_weights"], state["recent"]
        self.history = [tuple(entry) for entry in state["history"]]


def ema_decay(decay: float, step: int) -> float:
    """Decay after ``step`` updates: short memory at first, so that the initial weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(averaged: nn.Module, module: nn.Module, decay: float) -> None:
    """averaged = decay * averaged + (1 - decay) * module, for every parameter, in place; buffers are copied."""
    torch._foreach_lerp_(list(averaged.parameters()), list(module.parameters()), 1 - decay)
    for ours, theirs in zip(averaged.buffers(), module.buffers(), strict=True):
        ours.copy_(theirs)


def _seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose, unrelated to that of any other."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(_seed(seed, "epoch", epoch)))


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


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 on a CUDA device that computes in it; nothing elsewhere (CPUs mostly emulate it)."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _own_random_state() -> Iterator[None]:
    """Training seeds torch's global generator (dropout reads it); give the caller's state back afterwards."""
    with torch.random.fork_rng():
        yield


@contextlib.contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """While inside, the first Ctrl-C (or SIGTERM) is noted, so that a step can end; the second acts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # only the main thread may install handlers
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: object) -> None:
        asked.set()
        restore()

    for number in previous:
        signal.signal(number, note)
    try:
        yield asked.is_set
    finally:
        restore()


def _state_path(out: str | Path) -> Path:
    return Path(out).with_name(Path(out).name + ".state")


def _metadata(fit: _Fit, dataset: Dataset, seed: int, measure: str) -> dict[str, str]:
    entries = {"data": dataset.name, "seed": str(seed), "steps": str(fit.step), "best_step": str(fit.best_step)}
    if math.isfinite(fit.best):
        entries[measure] = f"{fit.best:.4f}"
    return entries
