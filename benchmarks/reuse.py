"""What reuse between outer steps does to what is drawn: guidance's change of z kept for some steps, and local steps between
refreshing ones (`benchmarks.local_steps`).

    python -m benchmarks.reuse letters.safetensors --out benchmarks/results     # minutes on one core

Along trajectories of the exact model (its tokens forced, float64), by the age of what is reused in steps: the relative root
mean square error of z in each guidance branch, and the Kolmogorov-Smirnov distance between the guided laws of each feature
drawn, exact and with reuse. Then what images made with reuse have in common with exact ones of the same noise, and the
arithmetic. Writes ``reuse-MODEL.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arinar.checkpoint import load_arinar
from arinar.config import PRESETS, ArinarConfig
from arinar.files import write_text
from arinar.measure.checks import PARTED
from arinar.model import Arinar
from arinar.runtime import Noise, gmm
from arinar.sampler import sample
from arinar.schedule import Step, guidance_at, steps
from benchmarks.local_steps import Kept, Past, Rows, arithmetic, generate, group_of
from benchmarks.reuse_report import (
    AFTER,
    AGES,
    BEFORE,
    BOTH,
    LOCAL,
    LOCAL_AFTER,
    LOCAL_KEPT,
    UNCOND,
    UNGUIDED,
    WARM_UP,
    cadences,
    markdown,
    shares,
)

RESULTS = Path(__file__).parent / "results"
LOCALS = (1, 3, 7)
LEVELS = np.linspace(0, 1, 1001)[:-1] + 5e-4
Array = npt.NDArray[np.float64]


# ---------------------------------------------------------------------------------------------------- forced trajectories


@dataclass(eq=False)
class Found:
    """Of one kind of reuse at one age: per step its index, squared errors of z_c and z_u and the squares of the exact ones, and
    the distances of its laws."""

    steps: list[int] = field(default_factory=list)
    squares: list[list[float]] = field(default_factory=list)
    distances: list[Array] = field(default_factory=list)

    def row(self, first: int = 0) -> dict[str, float]:
        """From step ``first`` on."""
        chosen = [place for place, step in enumerate(self.steps) if step >= first]
        if not chosen:
            return {}
        cond, uncond, all_cond, all_uncond = np.sum([self.squares[place] for place in chosen], 0)
        distances = np.concatenate([self.distances[place] for place in chosen])
        return {
            "z_c": float(np.sqrt(cond / all_cond)),
            "z_u": float(np.sqrt(uncond / all_uncond)),
            "ks_mean": float(distances.mean()),
            "ks_99": float(np.quantile(distances, 0.99)),
            "laws": len(distances),
        }


class Candidate(NamedTuple):
    """z (B, P, C) of a step's tokens as reuse makes it; without z_u the draw is not guided."""

    what: str
    age: int
    z_c: Tensor
    z_u: Tensor | None


class Laws:
    """Guided laws of the features of N tokens (N, D), those before each given, as their quantiles at LEVELS (N * D, levels)."""

    def __init__(self, model: Arinar, features: Tensor, guidance_scale: float) -> None:
        self.model, self.features, self.scale = model, features, guidance_scale

    def mixture(self, z: Tensor) -> Array:
        """z (B, P, C) -> (3, N * D, K)."""
        parts = self.model.mixture(z.flatten(0, 1), self.features)
        return np.stack([part.flatten(0, 1).numpy() for part in parts])

    def quantiles(self, cond: Array, uncond: Array | None) -> Array:
        law = gmm.plain_law(cond, 1.0)
        law = law if uncond is None else gmm.guided_law(law, cond, uncond, self.scale)
        return gmm.quantile(law, np.broadcast_to(LEVELS, (cond.shape[1], len(LEVELS))))


def distances(one: Array, other: Array) -> Array:
    """Kolmogorov-Smirnov distances between laws given as quantiles at LEVELS (N, levels) -> (N,), to some 1e-4."""
    return np.array([np.abs(np.interp(b, a, LEVELS) - LEVELS).max() for a, b in zip(one, other, strict=True)])


class Forced:
    """A walk along tokens (B, L, D) of exact images, in float64, and at each step what reuse would have made of z."""

    def __init__(self, model: Arinar, tokens: Tensor, order: Tensor, labels: Tensor, plan: list[Step], scale: float) -> None:
        self.model, self.tokens, self.order, self.plan, self.scale = model, tokens, order, plan, scale
        branches = torch.cat([labels, torch.full_like(labels, -1)])
        self.rows = Rows(model, tokens.repeat(2, 1, 1), order.repeat(2, 1), branches)  # type: ignore[arg-type]
        self.past: deque[Tensor] = deque(maxlen=max(AGES))  # h of the steps before, the last first
        self.kept: dict[int, list[Kept]] = {}  # by the number of local steps: the class buffer computed anew, or kept too
        self.found: dict[tuple[str, int], Found] = {}

    @torch.no_grad()
    def run(self) -> dict[tuple[str, int], Found]:
        for step in self.plan:
            h, past = self.rows.full(step.masked)
            z_c, z_u = self.z(h, step)
            positions = self.order[:, step.remaining : step.masked]
            features = self.tokens[torch.arange(len(positions))[:, None], positions].flatten(0, 1)
            laws = Laws(self.model, features, guidance_at(step, self.order.shape[1], self.scale, "linear"))
            cond = laws.mixture(z_c)
            exact = laws.quantiles(cond, laws.mixture(z_u))
            for what, age, our_c, our_u in (*self.guidance(h, z_c, step), *self.local(past, step)):
                mixture_c = cond if our_c is z_c else laws.mixture(our_c)
                ours = laws.quantiles(mixture_c, None if our_u is None else laws.mixture(our_u))
                wrong = our_c - z_c, (our_c if our_u is None else our_u) - z_u
                entry = self.found.setdefault((what, age), Found())
                entry.steps.append(step.index)
                entry.squares.append([float(value.square().sum()) for value in (*wrong, z_c, z_u)])
                entry.distances.append(distances(exact, ours))
            self.past.appendleft(h)
        return self.found

    def z(self, h: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """h of all unknown positions -> z (B, P, C) of the step's, in both branches."""
        cond, uncond = self.rows.z(h[:, step.remaining : step.masked], step.remaining).chunk(2)
        return cond, uncond

    def guidance(self, h: Tensor, z_c: Tensor, step: Step) -> Iterator[Candidate]:
        """Of both branches, and without the unconditional one."""
        yield Candidate(UNGUIDED, 0, z_c, None)
        for age, before in zip(AGES, self.past, strict=False):
            old_c, old_u = self.z(before, step)
            yield Candidate(AFTER, age, z_c, z_c + old_u - old_c)
            (now, _), (cond, uncond) = h.chunk(2), before[:, : step.masked].chunk(2)
            yield Candidate(BEFORE, age, z_c, self.z(torch.cat([now, now + uncond - cond]), step)[1])
            yield Candidate(UNCOND, age, z_c, old_u)
            yield Candidate(BOTH, age, old_c, old_u)

    def local(self, past: Past, step: Step) -> Iterator[Candidate]:
        """Of local steps, alone and with the difference of their refresh."""
        for number in LOCALS:
            refresh, last = group_of(step.index, number, 0, len(self.plan))
            if refresh == step.index:
                first = self.plan[last].remaining
                self.kept[number] = [self.rows.keep(past, step.masked, first, buffer=buffer) for buffer in (False, True)]
                continue
            age = step.index - refresh
            anew, with_buffer = (self.rows.local(kept, step.masked)[:, -step.count :] for kept in self.kept[number])
            z_c, z_u = self.rows.z(anew, step.remaining).chunk(2)
            old_c, old_u = self.z(self.past[age - 1], step)
            yield Candidate(LOCAL.format(number), age, z_c, z_u)
            yield Candidate(LOCAL_KEPT.format(number), age, *self.rows.z(with_buffer, step.remaining).chunk(2))
            yield Candidate(LOCAL_AFTER.format(number), age, z_c, z_c + old_u - old_c)


def forced(model: Arinar, images: int, num_iter: int, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Errors by kind of reuse and age, along exact trajectories of ``images`` images in ``num_iter`` steps; and, where these
    are one token each, those of fewer steps."""
    config = model.config
    labels, noise = torch.arange(images) % config.num_classes, Noise.from_seed(seed, range(images), config)
    scale = config.default_guidance_scale
    tokens = sample(model, labels, guidance_scale=scale, num_iter=num_iter, noise=noise).double()
    plan = steps(config.seq_len, num_iter)
    walk = Forced(copy.deepcopy(model).double(), tokens, torch.as_tensor(noise.order), labels, plan, scale)
    found = walk.run()
    rows = [
        {"num_iter": num_iter, "what": what, "age": age, "all": entry.row(), "late": entry.row(WARM_UP)}
        for (what, age), entry in found.items()
    ]
    return rows, fewer_steps(config, found) if num_iter == config.seq_len else []


def fewer_steps(config: ArinarConfig, found: dict[tuple[str, int], Found]) -> list[dict[str, Any]]:
    """The mean distance, over all tokens, of plans of fewer steps: where a step generates several tokens, all but its first are
    drawn by z as old as they come after it. ``found``: along a plan of one token a step."""
    means = {
        (age, step): float(found[BOTH, age].distances[step - age].mean()) for age in AGES for step in range(age, config.seq_len)
    }
    rows = []
    for number in (config.seq_len * eighths // 8 for eighths in (6, 4, 3, 2)):
        plan = steps(config.seq_len, number)
        if max(step.count for step in plan) <= max(AGES) + 1:
            late = [means[age, config.seq_len - step.masked + age] for step in plan for age in range(1, step.count)]
            row = {"num_iter": number, "ks_mean": sum(late) / config.seq_len}
            rows.append(row | shares(config, config.seq_len, num_iter=number))
    return rows


# ---------------------------------------------------------------------------------------------------- images of their own


def free_running(model: Arinar, images: int, num_iter: int, seed: int = 1) -> dict[str, Any]:
    """How far tokens made with reuse are from the exact ones of the same noise (in float32), where the distance between
    exact images of the same classes and other noise is 1; and how many tokens differ at all."""
    config = model.config
    labels = torch.arange(images) % config.num_classes
    noise, other = (Noise.from_seed(seed, range(first, first + images), config) for first in (0, images))
    scale, plan = config.default_guidance_scale, steps(config.seq_len, num_iter)

    def exact(noise: Noise = noise, number: int = num_iter, **how: Any) -> Tensor:
        return sample(model, labels, guidance_scale=scale, num_iter=number, noise=noise, **how)

    want = exact()
    apart = float((exact(other) - want).abs().mean())
    made = {f"guidance_refresh {refresh}": exact(guidance_refresh=refresh) for refresh in (2, 4)}
    for local, warm_up in ((1, 0), (3, 0), (3, WARM_UP)):
        found = generate(model, labels, noise, plan, guidance_scale=scale, local=local, warm_up=warm_up)
        made[f"{local} local after a refresh, the first {warm_up} steps exact"] = found
    made |= {f"{num_iter // part} steps": exact(number=num_iter // part) for part in (2, 4)}
    rows = [
        {
            "what": what,
            "distance": float((tokens - want).abs().mean()) / apart,
            "differ": float(((tokens - want).abs().amax(-1) > PARTED * want.abs().max()).double().mean()),
        }
        for what, tokens in made.items()
    ]
    return {"images": images, "num_iter": num_iter, "tokens_apart": apart, "rows": rows}


# ---------------------------------------------------------------------------------------------------------------- report


def measure(options: argparse.Namespace) -> dict[str, Any]:
    model = load_arinar(options.model)
    config, began = model.config, time.perf_counter()
    errors: list[dict[str, Any]] = []
    fewer: list[dict[str, Any]] = []
    if config.outer != "masked" or config.head != "gmm":
        raise SystemExit(f"{options.model} is a {config.outer} model with a {config.head} head; expected masked, gmm")
    for number in sorted({min(number, config.seq_len) for number in options.num_iter}, reverse=True):
        rows, few = forced(model, options.images, number)
        errors, fewer = errors + rows, fewer + few
        print(f"[{time.perf_counter() - began:5.0f} s] forced, {number} steps")
    own = free_running(model, options.own_images, config.default_num_iter) if options.own_images else None
    print(f"[{time.perf_counter() - began:5.0f} s] images of their own")
    base, asked = PRESETS["base"], [("this model", config, "cosine", config.default_num_iter)]
    asked += [("ARINAR-B", base, "cosine", 64), ("ARINAR-B", base, "staged:64x24,64x6,128x2", 64)]
    return {
        "model": Path(options.model).stem,
        "images": options.images,
        "guidance_scale": config.default_guidance_scale,
        "errors": errors,
        "cadences": cadences(config, errors),
        "fewer_steps": fewer,
        "own": own,
        "arithmetic": [{"model": name, "schedule": how, "rows": arithmetic(it, how, n)} for name, it, how, n in asked],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint, or the name of a demo model: masked, with a Gaussian mixture head")
    parser.add_argument("--images", type=int, default=16, help="of the forced trajectories")
    parser.add_argument("--num-iter", type=int, nargs="+", default=[64, 24])
    parser.add_argument("--own-images", type=int, default=26, help="made with reuse; 0: none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"reuse-{result['model']}"
    write_text(path.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    write_text(path.with_suffix(".md"), markdown(result))
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
