"""Is the deployed model still the trained one? Levels of comparison, each with numbers and thresholds in sight.

1. *per graph*: same inputs, the step module in PyTorch against the graph on a backend;
2. *teacher-forced*: the reference's tokens are forced at every step, so that errors do not compound; z, mixture
   parameters and the divergence between the mixtures, step by step, with chained state (caches) on both sides;
3. *free-running*: both generate from the same noise; where they part, and how far the images are apart;
4. *distribution* (`arinar.export.distribution`): many images of each.

The reference is `arinar.sampler.sample` in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from arinar.divergence import mixture_kl, responsible_component
from arinar.model import Arinar, denormalize, unpatchify
from arinar.runtime.bundle import BundleError, GraphInfo
from arinar.runtime.cache import KVCache
from arinar.runtime.noise import Noise
from arinar.runtime.pipeline import Pipeline
from arinar.sampler import StepRecord, sample
from arinar.schedule import steps
from arinar.vae import AutoencoderKL, to_uint8

from .bundle import graph_specs
from .distribution import Distribution, Features, compare, make_references
from .onnx import run_module

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Thresholds:
    """Largest values that pass. Absolute errors for outputs up to 1 in size, relative to the size above."""

    graph: float = 1e-4
    sampled_graph: float = 5e-3  # graphs that end in a draw: a small error may be steep in the tails
    z: float = 1e-4
    mixture: float = 1e-4
    kl: float = 1e-5  # of the worst mixture
    mean_kl: float = 1e-7
    # Share of drawn features that both sides' mixtures ascribe to the same component.
    same_component: float = 0.999
    # Share of the free-running images that must lie within one grey level everywhere.
    same_images: float = 0.99
    # Distribution: how much less often the classifier may agree (beyond two standard errors), Frechet distance
    # relative to that of two PyTorch runs, p-value of the discrepancy, distance to given statistics against PyTorch's.
    agreement_drop: float = 0.01
    frechet_ratio: float = 1.5
    mmd_p: float = 0.01
    stats_ratio: float = 1.1


# 8 bits. Largest errors depend on how far the tails were looked at; what counts is in the mixtures' mean divergence
# (`arinar calibrate` keeps it within a budget) and in level 4.
QUANTIZED = Thresholds(
    graph=0.5, sampled_graph=2.0, z=0.1, mixture=0.5, kl=0.5, mean_kl=2e-3, same_component=0.97, same_images=0.0
)

#: By precision. fp32 is the blueprint's; the others are what was measured on the demo models, with room.
THRESHOLDS = {
    "fp32": Thresholds(),
    # Measured in ONNX Runtime on the CPU: graph 7e-4, z 5.3e-4, mixture 1.8e-3, kl 8.8e-5 (draws stay in float32). The
    # room is for GPUs, which accumulate and fuse in another order, and for deeper models.
    "fp16": Thresholds(
        graph=1e-2, sampled_graph=5e-3, z=1e-2, mixture=2e-2, kl=1e-3, mean_kl=1e-4, same_component=0.99, same_images=0.0
    ),
    "int8": QUANTIZED,
    "int8-static": QUANTIZED,
    "fp8": replace(QUANTIZED, graph=0.8, z=0.5, mixture=0.8, kl=1.0, mean_kl=1e-2, same_component=0.95),
}


def parse_thresholds(given: Sequence[str], precision: str) -> Thresholds:
    """The limits of a precision with some overridden: ["z=1e-3", ...]. Raises ValueError for an unknown name."""
    base = THRESHOLDS.get(precision, Thresholds())
    changes: dict[str, float] = {}
    for item in given:
        name, _, value = item.partition("=")
        if name not in asdict(base):
            raise ValueError(f"no threshold {name!r}; there are {', '.join(asdict(base))}")
        try:
            changes[name] = float(value)
        except ValueError:
            raise ValueError(f"threshold {item!r} has no number; write for example {name}=1e-3") from None
    return replace(base, **changes)


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
    # (step, feature) tables: largest error of each mixture parameter, mean divergence.
    tables: dict[str, list[list[float]]] = field(default_factory=dict)
    # Name -> counts per bin.
    histograms: dict[str, list[int]] = field(default_factory=dict)
    distribution: Distribution | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

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
            "tables": self.tables,
            "histograms": self.histograms,
            "distribution": None if self.distribution is None else asdict(self.distribution),
            "provenance": self.provenance,
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
    distribution: int = 0,
    features: str | Features = "builtin",
    fid_stats: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Compare a loaded bundle with the PyTorch model that it should be.

    ``distribution`` > 0 adds the fourth level with so many samples of each; ``features`` and ``fid_stats`` as for
    `arinar.export.distribution.compare`. ``thresholds``: default those of ``THRESHOLDS`` for the bundle's precision.
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
    if distribution:
        say(f"level 4: {distribution} images of each, by distribution")
        references = make_references(model, vae, distribution, settings, say)
        found, _ = compare(pipeline, references, features=features, stats=fid_stats)
        add_distribution(report, found, thresholds)
    report.provenance = provenance(pipeline)
    return report


def add_distribution(report: ParityReport, found: Distribution, thresholds: Thresholds) -> None:
    """Turn what level 4 measured into checks."""
    add, note = report.checks.append, f"{found.samples} samples of each"
    report.distribution = found
    if found.drop is not None and found.drop_error is not None:
        add(Check(
            "distribution", "classifier agreement lost", found.drop, thresholds.agreement_drop + 2 * found.drop_error,
            note=f"{found.agreement:.1%} deployed, {found.reference_agreement:.1%} PyTorch, +-{found.drop_error:.1%}",
        ))  # fmt: skip
    ratio = found.frechet / max(found.yardstick, 1e-12)
    add(Check(
        "distribution", "Frechet distance / yardstick", ratio, thresholds.frechet_ratio,
        note=f"{found.frechet:.3g} to PyTorch, {found.yardstick:.3g} between two PyTorch runs; {note}",
    ))  # fmt: skip
    add(Check("distribution", "MMD, p-value", found.mmd_p, thresholds.mmd_p, True, f"squared MMD {found.mmd:.2g}"))
    if found.deployed_distance is not None and found.reference_distance is not None:
        add(Check(
            "distribution", "Frechet distance to the statistics / PyTorch's",
            found.deployed_distance / max(found.reference_distance, 1e-12), thresholds.stats_ratio,
            note=f"{found.deployed_distance:.4g} deployed, {found.reference_distance:.4g} PyTorch",
        ))  # fmt: skip


def provenance(pipeline: Pipeline) -> dict[str, Any]:
    """What was compared, with what, where."""
    import os
    import platform
    from importlib import metadata

    versions = {}
    for name in ("arinar", "torch", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    manifest = pipeline.bundle.manifest
    graphs = manifest.precision_graphs(pipeline.precision)
    origin = dict(manifest.provenance)
    quantization = origin.pop("quantization", {}).get(pipeline.precision)
    if quantization is not None:
        origin["quantization"] = quantization
    files = sorted({name for graph in graphs.values() for name in (graph.file, *graph.weights)})
    return {
        "bundle": pipeline.bundle.folder.name, "precision": pipeline.precision, "backend": pipeline.backend.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}",
        "python": platform.python_version(), "versions": versions, "origin": origin,
        "sha256": {name: manifest.files[name].sha256 for name in files},
    }  # fmt: skip


def _per_graph(
    report: ParityReport, pipeline: Pipeline, model: Arinar, vae: AutoencoderKL, thresholds: Thresholds
) -> None:
    graphs = pipeline.bundle.manifest.precision_graphs(pipeline.precision)
    shared = {} if pipeline.precision == "fp32" else pipeline.bundle.manifest.graphs.get("fp32", {})
    specs = graph_specs(model, vae, pipeline.bundle.manifest.num_candidates, graphs["outer_step"].opset)
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
        # Graphs that a variant shares with fp32 have its limits.
        limits = THRESHOLDS["fp32"] if graphs[name] == shared.get(name) else thresholds
        limit = limits.sampled_graph if name.startswith("mixture_sample") else limits.graph
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
    tables: dict[str, list[list[float]]] = {name: [] for name in ("weight", "mu", "logvar", "kl")}
    picks = np.zeros((2, config.num_gaussians), np.int64)
    same = drawn = 0
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
            tables[name].append([_error(have[:, j], value[:, j]) for j in range(config.token_dim)])
        kl = mixture_kl(tuple(want), tuple(got))                                              # (rows, D)
        curves["kl"].append(float(kl.max()))
        tables["kl"].append(kl.mean(0).tolist())
        first = slice(step.count * batch)  # the conditional rows, which features are drawn from
        ours, theirs = (
            responsible_component(features, tuple(value[first] for value in side)) for side in (want, got)
        )
        picks += np.stack([np.bincount(side.ravel(), minlength=picks.shape[1]) for side in (ours, theirs)])
        same, drawn = same + int((ours == theirs).sum()), drawn + ours.size
        backend.write(state.tokens[step.remaining : step.masked], ordered[step.remaining : step.masked])
    for name, curve in curves.items():
        limit = {"z": thresholds.z, "kl": thresholds.kl}.get(name, thresholds.mixture)
        worst = int(np.argmax(curve))
        over = next((i for i, value in enumerate(curve) if value > limit), None)
        note = f"worst at step {worst}, mean {np.mean(curve):.2g}"
        note += "" if over is None else f"; first beyond the limit at step {over}"
        report.checks.append(Check("teacher-forced", name, curve[worst], limit, note=note))
    share = same / max(drawn, 1)
    note = f"of {drawn} drawn features"
    report.checks.append(Check("teacher-forced", "same component", share, thresholds.same_component, True, note))
    mean_kl = float(np.mean(tables["kl"]))
    report.checks.append(Check("teacher-forced", "mean kl", mean_kl, thresholds.mean_kl, note="nats per feature"))
    report.curves |= curves
    report.tables |= tables
    report.histograms |= {"reference": picks[0].tolist(), "deployed": picks[1].tolist()}


def _by_position(value: torch.Tensor, batch: int) -> Array:
    """(B * P, ...) image by image -> (P * B, ...) position by position."""
    rows = value.reshape(batch, -1, *value.shape[1:])
    return np.asarray(rows.transpose(0, 1).flatten(0, 1).numpy())


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
    diverged: list[Array] = []
    for step in plan:
        positions = noise.order[:, step.remaining : step.masked]
        diverged.append(np.asarray(np.take_along_axis(apart, positions, 1).any(1)))
    first = [next((s for s, now in enumerate(diverged) if now[i]), None) for i in range(len(want))]
    parted = [step for step in first if step is not None]
    same: Array = np.abs(have.astype(int) - want.astype(int)).max((1, 2, 3)) <= 1
    mse = np.square(have.astype(np.float64) - want.astype(np.float64)).mean((1, 2, 3))
    psnr = 10 * np.log10(255.0**2 / np.maximum(mse, 1e-3))
    note = "none part" if not parted else f"{len(parted)} of {len(first)} images part, the first at step {min(parted)}"
    add = report.checks.append
    add(Check("free-running", "images within 1 grey level", float(same.mean()), thresholds.same_images or None, True, note))
    add(Check("free-running", "tokens that agree", float(1 - apart.mean()), None))
    add(Check("free-running", "median PSNR, dB", float(np.median(psnr)), None, note="capped at 78"))
    report.histograms["divergence step"] = [sum(step == index for step in parted) for index in range(len(plan))]
    report.curves["diverged"] = np.cumsum(np.stack(diverged), 0).astype(bool).mean(1).tolist()


__all__ = [
    "THRESHOLDS", "Check", "ParityReport", "Thresholds", "add_distribution", "forced_mixtures", "mixture_kl",
    "parse_thresholds", "run_parity",
]  # fmt: skip
