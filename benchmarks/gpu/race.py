"""Milliseconds per image of the GPU backends against the PyTorch reference on the same GPU: whole images (labels and noise
in, uint8 pixels out), guidance on, the contenders taking turns, medians; the VAE in the same precision on both sides."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from arinar.runtime import Pipeline
from arinar.text import aligned

from .device import Stopwatch
from .models import half_vae, models
from .session import Session

#: Rounds of the first size, and of those after it: the first is where small differences matter.
ROUNDS, FEWER = 5, 2


class Reference:
    """Eager PyTorch on the GPU (or CPU), its transformers in fp16 autocast there; its VAE too where ``half_vae``."""

    def __init__(self, name: str, *, half_vae: bool) -> None:
        import torch

        self.torch, self.half_vae = torch, half_vae
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model, vae = models(name)
        self.model, self.vae = model.to(self.device), vae.to(self.device)

    def autocast(self, half: bool = True) -> Any:
        on = half and self.device == "cuda"
        return self.torch.autocast("cuda", self.torch.float16) if on else contextlib.nullcontext()

    def __call__(self, labels: Sequence[int], guidance_scale: float, num_iter: int, seed: int) -> Any:
        """One batch: uint8 images (B, H, W, 3) in host memory."""
        from arinar.model import decode_images
        from arinar.sampler import sample

        torch, config = self.torch, self.model.config
        # Random numbers are drawn on the GPU, as the published code does.
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.no_grad():
            with self.autocast():
                tokens = sample(
                    self.model,
                    torch.tensor(list(labels)),
                    guidance_scale=guidance_scale,
                    num_iter=num_iter,
                    generator=generator,
                )
            with self.autocast(self.half_vae):
                return np.concatenate([decode_images(self.vae, part, config).numpy() for part in tokens.float().split(4)])

    def phases(self, batch: int, guidance_scale: float, clock: Callable[[], float]) -> dict[str, float]:
        """Milliseconds of an outer step with half of the tokens known, and of the draw of one token of each image."""
        from arinar.head import Draw

        torch, config = self.torch, self.model.config
        generator = torch.Generator(self.device).manual_seed(0)
        tokens = torch.zeros(2 * batch, config.seq_len, config.token_dim, device=self.device)
        mask = torch.zeros(2 * batch, config.seq_len, device=self.device)
        mask[:, ::2] = 1
        labels = torch.zeros(2 * batch, dtype=torch.int64, device=self.device)
        ones = torch.ones(batch, dtype=torch.float64, device=self.device)
        how = Draw(guidance_scale * ones, ones, generator, None, {}, None, False)
        found = {}
        with torch.no_grad(), self.autocast():
            z = self.model.condition(tokens, mask, labels)[:, 0]
            work: dict[str, Callable[[], Any]] = {
                "outer_ms": lambda: self.model.condition(tokens, mask, labels),
                "token_ms": lambda: self.model.head.draw(z[:batch], z[batch:], how, None),
            }
            for name, run in work.items():
                found[name] = round(1e3 * min(timed(run, clock) for _ in range(3)), 3)
        return found


def timed(function: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Seconds until the GPU is done."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = clock()
    function()
    wait()
    return clock() - start


def used_memory() -> int:
    """Bytes of the GPU's memory in use, by anybody; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def check(session: Session, name: str, sizes: Sequence[int], until: float) -> None:
    """All sizes of one model, in this order; one is skipped where the sizes before say that it will not fit."""
    report = session.report
    backends = session.possible(name)
    if not backends:
        return
    pipelines = {backend: session.open(name, backend) for backend in backends}
    reference = None
    with report.check(f"race: the reference of {name}", ""):
        reference = Reference(name, half_vae=half_vae(session.bundle(name), session.precision))
    race, before = Race(session, name, pipelines, reference), len(report.data.get("timings", []))
    for place, size in enumerate(sizes):
        need = race.estimate(size)
        if need > until - report.elapsed():
            report.skip(
                f"{name} batch {size}", f"it may take {need:.0f} s, {until - report.elapsed():.0f} s are left of its share"
            )
            continue
        with report.check(f"race: {name} batch {size}", ""):
            race.run(size, ROUNDS if place == 0 else FEWER, until)
    for backend, pipeline in pipelines.items():
        with report.check(f"race: phases of {name} on {backend}", ""):
            report.add("phases", {"model": name, "backend": backend} | vae_time(session, pipeline))
    for row in report.data.get("timings", [])[before:]:
        if row.get("ratio", 1.0) >= 1.0:
            continue
        told = f"batch {row['batch']}: {row['ms_per_image']:.1f} ms an image, {row['ratio']:.2f} x the reference"
        remedy = "launch-bound or not: see launching; then phases, and `benchmarks.launches` for what is launched"
        report.find("slow", f"race: {name} on {row['contender']}", told, remedy)


class Race:
    """``rounds``: seconds of a round of each size so far, all contenders; ``warm_up``: of the runs before it."""

    def __init__(self, session: Session, name: str, pipelines: dict[str, Pipeline], reference: Reference | None) -> None:
        self.session, self.name, self.pipelines, self.reference = session, name, pipelines, reference
        self.config = next(iter(pipelines.values())).config
        self.num_iter = session.steps(self.config)
        self.held: dict[str, int] = {}  # bytes of device memory of each contender so far
        self.rounds: list[tuple[int, float]] = []
        self.warm_up = 0.0

    def estimate(self, size: int) -> float:
        """Seconds that a size will take: a line through the last two sizes, as launches cost the same whatever the batch; of
        one size alone nothing is known but that a larger one takes as long at least."""
        if not self.rounds:
            return 0.0
        first, second = (self.rounds[-2:] * 2)[:2]
        slope = max(0.0, (second[1] - first[1]) / (second[0] - first[0])) if first[0] != second[0] else 0.0
        round_ = max(0.0, second[1] + slope * (size - second[0]))
        return self.warm_up + (FEWER + 1) * round_

    def run(self, size: int, rounds: int, until: float) -> None:
        session, report = self.session, self.session.report
        labels = [i % self.config.num_classes for i in range(size)]
        runs: dict[str, Callable[[int], Any]] = {}
        if self.reference is not None:
            runs["pytorch"] = functools.partial(self.reference, labels, session.guidance_scale, self.num_iter)
        for backend, pipeline in self.pipelines.items():
            runs[backend] = functools.partial(self._generate, pipeline, labels)
        rows = {contender: self._row(contender, size) for contender in runs}
        began = report.clock()
        for contender, run in list(runs.items()):
            if not self._warm_up(contender, run, rows[contender]):
                del runs[contender]
        self.warm_up = report.clock() - began
        times: dict[str, list[float]] = {contender: [] for contender in runs}
        for round_ in range(rounds):
            for contender, run in runs.items():
                times[contender].append(timed(functools.partial(run, round_ + 1), report.clock))
            seconds = sum(values[-1] for values in times.values())
            if report.elapsed() + seconds > until:
                break
        self.rounds.append((size, sum(statistics.median(values) for values in times.values())))
        self._tell(rows, times, size)

    def _generate(self, pipeline: Pipeline, labels: Sequence[int], seed: int) -> Any:
        scale, most = self.session.guidance_scale, self.session.most
        size = min(len(labels), most) if pipeline.backend.name == "tensorrt" else len(labels)
        return pipeline.generate(labels, guidance_scale=scale, num_iter=self.num_iter, seed=seed, batch_size=size)

    def _row(self, contender: str, size: int) -> dict[str, Any]:
        settings = {"num_iter": self.num_iter, "guidance_scale": self.session.guidance_scale}
        return {"model": self.name, "batch": size, "contender": contender, **settings}

    def _warm_up(self, contender: str, run: Callable[[int], Any], row: dict[str, Any]) -> bool:
        """Until kernels are loaded, memory is taken and CUDA graphs are captured; whether it runs at all."""
        import torch

        memory, report = used_memory(), self.session.report
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        pipeline = self.pipelines.get(contender)
        recorded = pipeline is not None and pipeline.backend.describe().get("cuda_graphs", False)
        times = 1 + (getattr(pipeline.backend, "warm_up_runs", 1) if recorded and pipeline else 0)
        done: list[float] = []
        with report.check(f"race: {contender} {self.name} batch {row['batch']} runs", "out of memory: a smaller batch"):
            done += [round(timed(functools.partial(run, 0), report.clock), 4) for _ in range(times)]
        row["warm_up_s"] = done
        self.held[contender] = self.held.get(contender, 0) + max(0, used_memory() - memory)
        row["memory_gib"] = round(self.held[contender] / 2**30, 2)
        if contender == "pytorch" and torch.cuda.is_available():
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return len(done) == times

    def _tell(self, rows: dict[str, dict[str, Any]], times: dict[str, list[float]], size: int) -> None:
        for contender, values in times.items():
            rows[contender] |= {
                "ms_per_image": round(1000 * statistics.median(values) / size, 3),
                "images_per_s": round(size / statistics.median(values), 2),
                "rounds": len(values),
                "fastest_ms": round(1000 * min(values) / size, 3),
                "slowest_ms": round(1000 * max(values) / size, 3),
            }
        base = rows.get("pytorch", {}).get("ms_per_image")
        for contender, row in rows.items():
            if base and "ms_per_image" in row:
                row["ratio"] = round(base / row["ms_per_image"], 2)
            self.session.report.add("timings", row)
            if "ms_per_image" in row:
                ratio = f", {row['ratio']:.2f} x the reference" if "ratio" in row else ""
                self.session.report.say(f"{self.name} batch {size}: {contender} {row['ms_per_image']:.1f} ms an image{ratio}")


def vae_time(session: Session, pipeline: Pipeline, images: int = 4) -> dict[str, Any]:
    """Milliseconds per image of the VAE alone, by events, and in which precision."""
    cuda = pipeline.backend.cuda  # type: ignore[attr-defined]
    sampling = pipeline.resolve([0] * images, guidance_scale=1.0)
    with pipeline.loop.state(sampling.batch()) as state:
        pipeline.loop._decode(state)
        watch = Stopwatch(cuda)
        watch.mark()
        pipeline.loop._decode(state)
        watch.mark()
        device = watch.milliseconds()[0]
    half = half_vae(pipeline.bundle, session.precision)
    return {"vae_ms_per_image": round(device / images, 3), "vae_precision": "fp16" if half else "fp32"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The timings as text."""
    lines = [("model", "batch", "contender", "ms per image", "fastest", "slowest", "ratio", "memory GiB", "rounds")]
    for row in rows:
        median = f"{row['ms_per_image']:.2f}" if "ms_per_image" in row else "-"
        rest = [row.get("fastest_ms"), row.get("slowest_ms"), row.get("ratio"), row.get("peak_gib", row.get("memory_gib"))]
        told = ["" if value is None else str(value) for value in (*rest, row.get("rounds"))]
        lines.append((row["model"], str(row["batch"]), row["contender"], median, *told))  # type: ignore[arg-type]
    return "\n".join(aligned(lines))
