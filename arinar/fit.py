"""The loop that trains: weights, their average, stopping and resuming. It knows nothing of what is trained.

Every random number of a step follows from (seed, step) alone, by :func:`seed_for`. A training that is stopped and resumed
therefore does exactly what an uninterrupted one does, bit for bit on the same machine with the same number of threads.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .files import replacing

SCHEDULES = ("cosine", "constant")
# Of the state files; a file of another version is refused rather than misread.
STATE_VERSION = 1

OnEval = Callable[[int, float, float], None]


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
class Watch:
    """When a training is looked at: evaluated and saved every so many steps, with a bar of its progress or without.

    ``on_eval`` is called with (steps done, mean training loss, held-out loss) at each evaluation.
    """

    eval_every: int
    save_every: int
    progress: bool = True
    on_eval: OnEval | None = None

    def __post_init__(self) -> None:
        if self.eval_every < 1 or self.save_every < 1:
            raise ValueError(f"eval_every is {self.eval_every}, save_every is {self.save_every}; expected at least 1 of each")


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


class Fit:
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

    def run(self, state: Path, watch: Watch) -> bool:
        """Train to the last step -> True, or until a signal asks to stop -> False, with the state saved."""
        state.parent.mkdir(parents=True, exist_ok=True)
        if state.exists():
            self.load(state)
        steps = self.optimization.steps
        bar = tqdm(total=steps, initial=self.step, disable=not watch.progress, unit="step", mininterval=0.5)
        with bar, _stop_signal() as stopped:
            while self.step < steps:
                value = self.update()
                self.recent = [self.recent[0] + value, self.recent[1] + 1]
                bar.update()
                held_out = f"{self.history[-1][2]:.3f}" if self.history else "-"
                bar.set_postfix_str(f"loss {value:.3f}, held-out {held_out}", refresh=False)
                if self.step % watch.eval_every == 0 or self.step == steps:
                    self.judge(watch.on_eval)
                if stopped() and self.step < steps:
                    self.save(state)
                    return False
                if self.step % watch.save_every == 0 and self.step < steps:
                    self.save(state)
        return True

    def update(self) -> float:
        """One optimizer step -> its loss."""
        generator = torch.Generator().manual_seed(seed_for(self.seed, "step", self.step))
        torch.manual_seed(seed_for(self.seed, "dropout", self.step))
        self.module.train()
        with autocast(self.device):
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
        with autocast(self.device):
            value = self.evaluate(self.averaged, torch.Generator().manual_seed(seed_for(self.seed, "evaluate")))
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
        with replacing(path) as temporary, temporary.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # PyTorch's own words for what befell the file
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise

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


def seed_for(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose, unrelated to that of any other."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 on a CUDA device that computes in it; nothing elsewhere (CPUs mostly emulate it)."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
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
