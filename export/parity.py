"""Is the deployed model still the trained one? Levels of comparison, each with numbers and thresholds in sight.

1. *per graph*: same inputs, the step module in PyTorch against the graph on a backend;
2. *teacher-forced*: the reference's tokens are forced at every step, so that errors do not compound; z, mixture
   parameters and the divergence between the mixtures, step by step, with chained state (caches) on both sides;
3. *free-running*: both generate from the same noise; where they part, and how far the images are apart.

The reference is `arinar.sampler.sample` in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from arinar.model import Arinar, denormalize, unpatchify
from arinar.runtime.bundle import BundleError, GraphInfo
from arinar.runtime.cache import KVCache
from arinar.runtime.noise import Noise
from arinar.runtime.pipeline import Pipeline
from arinar.sampler import StepRecord, sample
from arinar.schedule import steps
from arinar.vae import AutoencoderKL, to_uint8

from .bundle import graph_specs
from .onnx import run_module

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Thresholds:
    """Largest values that pass. Absolute errors for outputs up to 1 in size, relative to the size above."""

    graph: float = 1e-4
    sampled_graph: float = 5e-3  # graphs that end in a draw: a small error may be steep in the tails
    z: float = 1e-4
    mixture: float = 1e-4
    kl: float = 1e-5
    # Share of the free-running images that must lie within one grey level everywhere.
    same_images: float = 0.99


#: By precision. fp32 is the blueprint's; the others are what was measured on the demo models, with room.
THRESHOLDS = {
    "fp32": Thresholds(),
    "fp16": Thresholds(graph=2e-2, sampled_graph=0.5, z=2e-2, mixture=5e-2, kl=1e-3, same_images=0.0),
    "int8": Thresholds(graph=0.2, sampled_graph=2.0, z=0.2, mixture=0.5, kl=2e-2, same_images=0.0),
}


@dataclass(frozen=True)
class Check:
    """One line of the table: ``value`` must be at most ``limit`` (at least, where ``at_least``)."""

    level: str
    name: str
    value: float
    limit: float | None
    at_least: bool = False
    note: str = ""

    @property
    def passed(self) -> bool:
        if self.limit is None:
            return True
        return bool(self.value >= self.limit) if self.at_least else bool(self.value <= self.limit)


@dataclass
class ParityReport:
    """Checks in the order they were made, and the curves behind them (step -> value)."""

    precision: str
    backend: str
    settings: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    images: dict[str, Array] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "backend": self.backend,
            "settings": self.settings,
            "passed": self.passed,
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
            "curves": self.curves,
        }

    def table(self) -> str:
        """The checks as aligned text, one line each, with a verdict."""
        rows = [("level", "check", "value", "limit", "")]
        for check in self.checks:
            limit = "" if check.limit is None else f"{'>=' if check.at_least else '<='} {check.limit:g}"
            verdict = "" if check.limit is None else ("ok" if check.passed else "FAIL")
            rows.append((check.level, check.name, f"{check.value:.3g}", limit, f"{verdict}  {check.note}".rstrip()))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join((*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4])).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        failed = sum(not check.passed for check in self.checks)
        lines.append(f"{failed} of {len(self.checks)} checks FAILED" if failed else f"all {len(self.checks)} checks passed")
        return "\n".join(lines)


def run_parity(
    pipeline: Pipeline,
    model: Arinar,
    vae: AutoencoderKL,
    *,
    labels: Sequence[int],
    guidance_scale: float | None = None,
    num_iter: int | None = None,
    temperature: float = 1.0,
    cfg_schedule: str = "linear",
    seed: int = 0,
    thresholds: Thresholds | None = None,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Compare a loaded bundle with the PyTorch model that it should be.

    Raises BundleError where checkpoint and bundle do not even have the same configuration.
    """
    config, say = model.config, progress or (lambda line: None)
    if pipeline.config != config:
        differing = [k for k, v in config.to_dict().items() if pipeline.config.to_dict()[k] != v]
        raise BundleError(f"the bundle and the checkpoint are different models: {', '.join(differing)} differ")
    thresholds = thresholds or THRESHOLDS.get(pipeline.precision, Thresholds())
    defaults = pipeline.bundle.manifest.defaults
    scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    if config.outer == "causal":
        num_iter = config.seq_len
    num_iter = num_iter or defaults.num_iter
    settings = {
        "labels": list(labels), "guidance_scale": scale, "num_iter": num_iter, "temperature": temperature,
        "cfg_schedule": cfg_schedule, "seed": seed,
    }  # fmt: skip
    report = ParityReport(pipeline.precision, pipeline.backend.name, settings)
    say("level 1: each graph alone")
    _per_graph(report, pipeline, model, vae, thresholds)
    noise = Noise.from_seed(seed, range(len(labels)), config)
    records: list[StepRecord] = []
    say(f"reference: PyTorch generates {len(labels)} images in {num_iter} steps")
    tokens = sample(
        model, torch.tensor(list(labels)), guidance_scale=scale, temperature=temperature, num_iter=num_iter,
        cfg_schedule=cfg_schedule, noise=noise, record=records.append,
    )  # fmt: skip
    say("level 2: the deployed graphs along the reference's trajectory")
    _teacher_forced(report, pipeline, labels, noise, tokens.numpy(), records, settings, thresholds)
    say("level 3: the deployed pipeline on its own, same noise")
    _free_running(report, pipeline, vae, noise, tokens, settings, thresholds)
    return report


def _per_graph(
    report: ParityReport, pipeline: Pipeline, model: Arinar, vae: AutoencoderKL, thresholds: Thresholds
) -> None:
    graphs = pipeline.bundle.manifest.precision_graphs(pipeline.precision)
    specs = graph_specs(model, vae, pipeline.bundle.manifest.num_candidates)
    for name, spec in specs.items():
        if name not in graphs:
            continue
        worst, sizes = 0.0, spec.sizes[-1]
        feed = spec.example(sizes)
        expected = run_module(spec, feed)
        got = launch(pipeline, graphs[name], feed, [value.shape for value in expected])
        for want, have in zip(expected, got, strict=True):
            if want.size:
                difference = np.abs(want.astype(np.float64) - have.astype(np.float64))
                worst = max(worst, float(difference.max()) / max(1.0, float(np.abs(want.astype(np.float64)).max())))
        limit = thresholds.sampled_graph if name.startswith("mixture_sample") else thresholds.graph
        if spec.outputs[0].dtype == "uint8":  # one grey level of 255
            limit = max(limit, 1.001 / 255)
        report.checks.append(Check("graph", name, worst, limit))


def launch(
    pipeline: Pipeline, graph: GraphInfo, feed: dict[str, Array], shapes: Sequence[tuple[int, ...]]
) -> list[Array]:
    """Run one graph of a pipeline's backend on host arrays, cast to what the graph takes."""
    backend = pipeline.backend
    inputs = {t.name: backend.upload(feed[t.name].astype(t.dtype)) for t in graph.inputs}
    outputs = {t.name: backend.empty(shape, t.dtype) for t, shape in zip(graph.outputs, shapes, strict=True)}
    backend.launch(graph.name, inputs, outputs)
    return [backend.download(buffer) for buffer in outputs.values()]


def _teacher_forced(
    report: ParityReport,
    pipeline: Pipeline,
    labels: Sequence[int],
    noise: Noise,
    tokens: Array,
    records: list[StepRecord],
    settings: dict[str, Any],
    thresholds: Thresholds,
) -> None:
    config, backend, loop = pipeline.config, pipeline.backend, pipeline.loop
    plan = [record.step for record in records]
    batch, guided = len(labels), settings["guidance_scale"] != 1.0
    state = loop.state(batch, 2 if guided else 1, plan)
    loop.fill(state, np.array(labels, np.int64), noise, plan, settings["temperature"])
    ordered = np.ascontiguousarray(np.take_along_axis(tokens, noise.order[:, :, None], 1).swapaxes(0, 1))  # (L, B, D)
    curves: dict[str, list[float]] = {name: [] for name in ("z", "weight", "mu", "logvar", "kl")}
    for step, record in zip(plan, records, strict=True):
        z = backend.download(loop.outer(state, step)).copy()
        # Reference rows go image by image, the deployed ones position by position.
        wanted = [record.z_cond] if record.z_uncond is None else [record.z_cond, record.z_uncond]
        want_z = np.concatenate([_by_position(value, batch) for value in wanted])
        curves["z"].append(_error(z, want_z))
        features = np.ascontiguousarray(ordered[step.remaining : step.masked]).reshape(step.count * batch, -1)
        got = forced_mixtures(pipeline, z, np.tile(features, (state.branches, 1)))
        mixtures = [record.cond] if record.uncond is None else [record.cond, record.uncond]
        want = [np.concatenate([_by_position(m[i], batch) for m in mixtures]) for i in range(3)]
        for name, have, value in zip(("weight", "mu", "logvar"), got, want, strict=True):
            curves[name].append(_error(have, value))
        curves["kl"].append(float(mixture_kl(tuple(want), tuple(got)).max()))
        backend.write(state.tokens[step.remaining : step.masked], ordered[step.remaining : step.masked])
    for name, curve in curves.items():
        limit = {"z": thresholds.z, "kl": thresholds.kl}.get(name, thresholds.mixture)
        worst = int(np.argmax(curve))
        over = next((i for i, value in enumerate(curve) if value > limit), None)
        note = f"worst at step {worst}, mean {np.mean(curve):.2g}"
        note += "" if over is None else f"; first beyond the limit at step {over}"
        report.checks.append(Check("teacher-forced", name, curve[worst], limit, note=note))
    report.curves |= curves


def _by_position(value: torch.Tensor, batch: int) -> Array:
    """(B * P, ...) image by image -> (P * B, ...) position by position."""
    return value.unflatten(0, (batch, -1)).transpose(0, 1).flatten(0, 1).numpy()


def _error(have: Array, want: Array) -> float:
    """Largest error, relative to the size of the values where that is above 1."""
    scale = max(1.0, float(np.abs(want).max()))
    return float(np.abs(have.astype(np.float64) - want).max()) / scale


def forced_mixtures(pipeline: Pipeline, z: Array, features: Array) -> tuple[Array, Array, Array]:
    """z (N, C), forced features (N, D) -> weight, mu, logvar (N, D, K), by the bundle's inner step and its KV cache."""
    config, backend = pipeline.config, pipeline.backend
    graphs = pipeline.bundle.manifest.precision_graphs(pipeline.precision)
    rows = len(z)
    info = {tensor.name: tensor for tensor in graphs["inner_step"].inputs}
    start = backend.empty((rows, config.inner_width), info["start"].dtype)
    modulation = backend.empty((rows, 6 * config.inner_depth + 2, config.inner_width), info["modulation"].dtype)
    backend.launch("inner_condition", {"z": backend.upload(z)}, {"start": start, "modulation": modulation})
    cache = KVCache(backend, graphs["inner_step"], rows, slots=config.token_dim)
    result = [np.empty((rows, config.token_dim, config.num_gaussians), np.float32) for _ in range(3)]
    out = {name: backend.empty((rows, config.num_gaussians), "float32") for name in ("weight", "mu", "logvar")}
    previous = np.zeros((rows, 1), np.float32)
    for position in range(config.token_dim):
        inputs = {
            "feature": backend.upload(previous),
            "position": backend.upload(np.array([position], np.int64)),
            "start": start,
            "modulation": modulation,
            **cache.past,
        }
        backend.launch("inner_step", inputs, {**out, **cache.present})
        cache.write(position)
        for target, buffer in zip(result, out.values(), strict=True):
            target[:, position] = backend.download(buffer)
        previous = np.ascontiguousarray(features[:, position : position + 1], np.float32)
    return result[0], result[1], result[2]


def mixture_kl(p: tuple[Array, ...], q: tuple[Array, ...], nodes: int = 32) -> Array:
    """KL(p || q) of 1-D Gaussian mixtures (weight, mu, logvar), each (..., K) -> (...), in nats, at least 0.

    By Gauss-Hermite quadrature over each component of p.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    p, q = _normalized(p), _normalized(q)
    weight, mu, logvar = p
    x = mu[..., None] + np.exp(0.5 * logvar)[..., None] * points                              # (..., K, nodes)
    ratio = _log_density(x, p) - _log_density(x, q)
    return np.maximum((weight[..., None] * weights * ratio).sum((-1, -2)), 0.0)


def _normalized(mixture: tuple[Array, ...]) -> tuple[Array, ...]:
    """In float64, the weights summing to 1: float32 ones miss it by more than the divergences of interest."""
    weight, mu, logvar = (np.asarray(value, np.float64) for value in mixture)
    return weight / weight.sum(-1, keepdims=True), mu, logvar


def _log_density(x: Array, mixture: tuple[Array, ...]) -> Array:
    """x (..., K, nodes) under mixtures (..., K) -> (..., K, nodes)."""
    weight, mu, logvar = (value[..., None, None, :] for value in mixture)
    terms = np.log(np.maximum(weight, 1e-300)) - 0.5 * ((x[..., None] - mu) ** 2 * np.exp(-logvar) + logvar)
    peak = terms.max(-1)
    return peak + np.log(np.exp(terms - peak[..., None]).sum(-1)) - 0.5 * np.log(2 * np.pi)


def _free_running(
    report: ParityReport,
    pipeline: Pipeline,
    vae: AutoencoderKL,
    noise: Noise,
    tokens: torch.Tensor,
    settings: dict[str, Any],
    thresholds: Thresholds,
) -> None:
    config = pipeline.config
    out = pipeline.generate(
        settings["labels"], guidance_scale=settings["guidance_scale"], temperature=settings["temperature"],
        num_iter=settings["num_iter"], cfg_schedule=settings["cfg_schedule"], noise=noise,
    )  # fmt: skip
    with torch.no_grad():
        want = to_uint8(vae.decode(denormalize(unpatchify(tokens, config.patch_size), config))).numpy()
    have = np.stack([np.asarray(image) for image in out.images])
    report.images = {"reference": want, "deployed": have}
    apart = np.abs(out.tokens - tokens.numpy()).max(-1) > 1e-3 * max(1.0, float(tokens.abs().max()))  # (B, L)
    plan = steps(config.seq_len, settings["num_iter"], 1.0)
    diverged = []
    for step in plan:
        positions = noise.order[:, step.remaining : step.masked]
        diverged.append(np.take_along_axis(apart, positions, 1).any(1))
    first = [next((s for s, now in enumerate(diverged) if now[i]), None) for i in range(len(want))]
    parted = [step for step in first if step is not None]
    same = np.abs(have.astype(int) - want.astype(int)).max((1, 2, 3)) <= 1
    mse = np.square(have.astype(np.float64) - want.astype(np.float64)).mean((1, 2, 3))
    psnr = 10 * np.log10(255.0**2 / np.maximum(mse, 1e-3))
    note = "none part" if not parted else f"{len(parted)} of {len(first)} images part, the first at step {min(parted)}"
    add = report.checks.append
    add(Check("free-running", "images within 1 grey level", float(same.mean()), thresholds.same_images, True, note))
    add(Check("free-running", "tokens that agree", float(1 - apart.mean()), None))
    add(Check("free-running", "median PSNR, dB", float(np.median(psnr)), None, note="capped at 78"))
    report.curves["diverged"] = np.cumsum(np.stack(diverged), 0).astype(bool).mean(1).tolist()


__all__ = ["THRESHOLDS", "Check", "ParityReport", "Thresholds", "mixture_kl", "run_parity"]
