"""A thousand GPUs, simulated: how large shards should be, and what failures, slow machines and the end of a run cost.

    python -m benchmarks.fleet                      # tables for docs/scaling.md
    python -m benchmarks.fleet --workers 64 --images 50000 --seconds 1 --json

Every worker takes the next shard when it is done with one, as `arinar.serve.pool` does. Nothing here has been run on so many
machines: what is assumed is in `Fleet`, where each number is from is said there.
"""

from __future__ import annotations

import heapq
import json
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

import click
import numpy as np

from arinar.text import aligned

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Fleet:
    """workers : GPUs, ``per_machine`` of which fail together. images : of the run. seconds : that an image takes one GPU.

    hours_to_failure : mean, of a machine. Llama 3's training (arXiv 2407.21783, table 5) had 419 unexpected ends in 54 days on
        16,384 GPUs, 2,048 machines: one in 6,335 machine hours. Machines that may be taken away at any time: 24.
    repair : seconds until a machine, or another, is there again. start : seconds that a worker needs before its first image
        (process, bundle, engines).
    spread : of the workers' speeds (std of the logarithm). slow_share, slow_factor : some are slower by far.
    overhead : seconds that a shard costs besides its images: a task of Ray's, a file of a shared disk and its flush.
    """

    workers: int = 1000
    images: int = 50_000
    seconds: float = 1.0
    per_machine: int = 8
    hours_to_failure: float = 6335.0
    repair: float = 600.0
    start: float = 60.0
    spread: float = 0.05
    slow_share: float = 0.01
    slow_factor: float = 2.0
    overhead: float = 0.1


@dataclass(frozen=True)
class Outcome:
    """hours : of the run. efficiency : the time of as many workers without failures, starts or ends, over that. failures : of
    machines. lost : share of GPU time that went into shards that were lost. idle : share spent waiting for the last shards."""

    shard: int
    hours: float
    efficiency: float
    failures: int
    lost: float
    idle: float


class Failures:
    """When machines fail: at random, each at the same rate."""

    def __init__(self, rng: np.random.Generator, machines: int, mean_life: float) -> None:
        self.rng, self.mean_life = rng, mean_life
        self.times = [[float(rng.exponential(mean_life))] for _ in range(machines)]
        self.seen: set[tuple[int, float]] = set()

    def after(self, machine: int, now: float) -> float:
        """The first failure of a machine after a time."""
        times = self.times[machine]
        while times[-1] <= now:
            times.append(times[-1] + float(self.rng.exponential(self.mean_life)))
        return times[bisect_right(times, now)]


def simulate(fleet: Fleet, shard: int, seed: int = 0) -> Outcome:
    """One run, event by event."""
    rng = np.random.default_rng(seed)
    speed = np.exp(rng.normal(0, fleet.spread, fleet.workers))
    speed[rng.random(fleet.workers) < fleet.slow_share] /= fleet.slow_factor
    failures = Failures(rng, -(-fleet.workers // fleet.per_machine), fleet.hours_to_failure * 3600)
    shards = -(-fleet.images // shard)
    waiting = deque([shard] * (shards - 1) + [fleet.images - shard * (shards - 1)])
    # What happens when: a worker is free, having done so many images; or (-1) a shard of so many is to be made again.
    events = [(fleet.start * rng.uniform(0.5, 1.5), worker, 0) for worker in range(fleet.workers)]
    heapq.heapify(events)
    idle, done, lost, now = list[int](), 0, 0.0, 0.0
    last = [0.0] * fleet.workers
    while done < fleet.images:
        now, worker, size = heapq.heappop(events)
        if worker < 0:
            waiting.appendleft(size)
            if idle:
                heapq.heappush(events, (now, idle.pop(), 0))
            continue
        done, last[worker] = done + size, now
        if not waiting:
            idle.append(worker)
            continue
        size = waiting.popleft()
        finish = now + size * fleet.seconds / speed[worker] + fleet.overhead
        failed = failures.after(worker // fleet.per_machine, now)
        if failed < finish:
            lost += failed - now
            failures.seen.add((worker // fleet.per_machine, failed))
            heapq.heappush(events, (failed, -1, size))
            heapq.heappush(events, (failed + fleet.repair + fleet.start, worker, 0))
        else:
            heapq.heappush(events, (finish, worker, size))
    ideal, total = fleet.images * fleet.seconds / speed.sum(), now * fleet.workers
    waited = sum(now - time for time in last)
    return Outcome(shard, now / 3600, ideal / now, len(failures.seen), lost / total, waited / total)


def averaged(fleet: Fleet, shard: int, rounds: int) -> Outcome:
    """Of several seeds."""
    found = [asdict(simulate(fleet, shard, seed)) for seed in range(rounds)]
    values = {name: mean(outcome[name] for outcome in found) for name in found[0]}
    return Outcome(**values | {"shard": shard, "failures": round(values["failures"])})


def table(outcomes: Sequence[Outcome]) -> str:
    rows = [("shard", "hours", "efficiency", "failures", "lost", "waiting at the end")]
    for found in outcomes:
        shares = (f"{found.efficiency:.1%}", str(found.failures), f"{found.lost:.2%}", f"{found.idle:.1%}")
        rows.append((str(found.shard), f"{found.hours:.3f}", *shares))
    return "\n".join(aligned(rows))


@click.command()
@click.option("--workers", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--images", type=click.IntRange(1), default=50_000, show_default=True)
@click.option("--seconds", type=float, default=1.0, show_default=True, help="Of an image on one GPU.")
@click.option("--hours-to-failure", type=float, default=6335.0, show_default=True, help="Of a machine; 24: taken away at will.")
@click.option("--overhead", type=float, default=0.1, show_default=True, help="Seconds of a shard besides its images.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Seeds.")
@click.option("--json", "as_json", is_flag=True)
def main(
    workers: int, images: int, seconds: float, hours_to_failure: float, overhead: float, rounds: int, as_json: bool
) -> None:
    """Simulate a run on many GPUs, for every size of shards."""
    fleet = replace(
        Fleet(), workers=workers, images=images, seconds=seconds, hours_to_failure=hours_to_failure, overhead=overhead
    )
    sizes = [size for size in SIZES if images / size <= 4e6]
    outcomes = [averaged(fleet, size, rounds) for size in sizes]
    report: dict[str, Any] = {"fleet": asdict(fleet), "rounds": rounds, "outcomes": [asdict(found) for found in outcomes]}
    click.echo(json.dumps(report, indent=2) if as_json else table(outcomes))


if __name__ == "__main__":
    main()
