"""Is the deployed model still the trained one? Levels of comparison, each with numbers and thresholds in sight.

1. *per graph*: same inputs, the step module in PyTorch against the graph on a backend;
2. *teacher-forced*: the reference's tokens are forced at every step, so that errors do not compound; z, mixture
   parameters and the divergence between the mixtures, step by step, with chained state (caches) on both sides;
3. *free-running*: both generate from the same noise; where they part, how often they pick the same component, and how
   far the images are apart;
4. *distribution* (`arinar.measure.distribution`): many images of each.

The reference is `arinar.sampler.sample` in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from arinar.export.bundle import check_match, graph_specs, weights_sha256
from arinar.export.engine import NOT_FOR_GENERATION
from arinar.export.trace import GraphSpec, run_module
from arinar.gmm_law import mixture_kl, responsible_component
from arinar.mixture_law import NUM_UNIFORMS
from arinar.model import Arinar, decode_images
from arinar.runtime.backends.engines import EngineError
from arinar.runtime.bundle import BundleError, GraphInfo
from arinar.runtime.cache import KVCache
from arinar.runtime.machine import processor_name
from arinar.runtime.noise import Noise
from arinar.runtime.pipeline import Pipeline, check_labels, check_num_iter, check_number
from arinar.sampler import StepRecord, _sample_rows, sample
from arinar.schedule import Step, steps
from arinar.vae import AutoencoderKL

from .distribution import Distribution, Features, check_samples, compare, make_references, open_measure

Array = npt.NDArray[Any]
Mixture = tuple[Array, Array, Array]

#: The levels, in the order in which they are run.
LEVELS = ("graph", "teacher-forced", "free-running", "distribution")
PARAMETERS = ("weight", "mu", "logvar")
# A feature of a token parts where it differs by more than this share of the largest value of all tokens (at least 1).
PARTED = 1e-3
# Of a token that one graph draws, the features that must keep their limit: a draw that a rounding error sends
# elsewhere rightly changes the features after it.
TOKEN_SHARE = 0.75
# Images that are the same count as this many dB.
MAX_PSNR = 78.0


@dataclass(frozen=True)
class Thresholds:
    """Limits. Errors, ``absolute`` apart, are relative to the largest value of an output where that is above 1.

    No limit at all: infinity, or 0 where a value must be at least its limit.
    """

    graph: float = 1e-4
    sampled_graph: float = 5e-3  # graphs that end in a draw: a small error may be steep in the tails
    token: float = 2e-4  # graphs that draw a whole token, one feature from another: for three in four features
    z: float = 1e-4
    mixture: float = 1e-4
    absolute: float = 1e-4  # of z and the mixtures' parameters
    kl: float = 1e-5  # of the worst mixture
    mean_kl: float = 1e-7
    # Share of drawn features that both sides' mixtures ascribe to the same component: of the same tokens (level 2), and
    # each side of its own (level 3).
    same_component: float = 0.999
    same_picks: float = 0.999
    # Share of the free-running images that must lie within one grey level everywhere; median PSNR in dB.
    same_images: float = 0.99
    psnr: float = 45.0
    # Distribution: how much less often the classifier may agree (beyond two standard errors), Frechet distance
    # relative to that of two PyTorch runs (to other noise; to the same noise), p-value of the discrepancy, distance to
    # given statistics against PyTorch's.
    agreement_drop: float = 0.01
    frechet_ratio: float = 1.5
    paired_ratio: float = 0.1
    mmd_p: float = 0.005
    stats_ratio: float = 1.1


# 8 bits. Largest errors depend on how far the tails were looked at; what counts is in the mixtures' mean divergence
# (`arinar calibrate` keeps it within a budget) and in level 4.
QUANTIZED = Thresholds(
    graph=0.5,
    sampled_graph=2.0,
    token=0.5,
    z=0.1,
    mixture=0.5,
    absolute=math.inf,
    kl=0.5,
    mean_kl=2e-3,
    same_component=0.97,
    same_picks=0.8,
    same_images=0.0,
    psnr=0.0,
    paired_ratio=math.inf,
)

#: By precision. fp32 is the blueprint's; the others are what was measured on the demo models, with room.
THRESHOLDS = {
    "fp32": Thresholds(),
    # Measured in ONNX Runtime on the CPU: graph 7e-4, z 5.3e-4, mixture 1.8e-3, kl 8.8e-5 (draws stay in float32). The
    # room is for GPUs, which accumulate and fuse in another order, and for deeper models.
    "fp16": Thresholds(
        graph=1e-2,
        sampled_graph=5e-3,
        token=0.1,
        z=1e-2,
        mixture=2e-2,
        absolute=math.inf,
        kl=1e-3,
        mean_kl=1e-4,
        same_component=0.99,
        same_picks=0.9,
        same_images=0.0,
        psnr=25.0,
        paired_ratio=math.inf,
    ),
    "int8": QUANTIZED,
    "int8-static": QUANTIZED,
    "fp8": replace(
        QUANTIZED, graph=0.8, token=0.8, z=0.5, mixture=0.8, kl=1.0, mean_kl=1e-2, same_component=0.95, same_picks=0.7
    ),
}


def default_thresholds(precision: str) -> Thresholds:
    """Those of ``THRESHOLDS``; fp32's where the name is not one of them (a variant of one's own)."""
    return THRESHOLDS.get(precision, Thresholds())


def parse_thresholds(given: Sequence[str], precision: str) -> Thresholds:
    """The limits of a precision with some overridden: ["z=1e-3", ...]. Raises ValueError for an unknown name, or what
    is not a number of at least 0."""
    base = default_thresholds(precision)
    changes: dict[str, float] = {}
    for item in given:
        name, _, value = item.partition("=")
        if name not in asdict(base):
            raise ValueError(f"no threshold {name!r}; there are {', '.join(asdict(base))}")
        try:
            changes[name] = float(value)
        except ValueError:
            raise ValueError(f"threshold {item!r} has no number; write for example {name}=1e-3") from None
        if not changes[name] >= 0:
            raise ValueError(f"threshold {item!r} is not a limit; expected a number of at least 0, for example {name}=1e-3")
    return replace(base, **changes)


@dataclass(frozen=True)
class Check:
    """One line of the table: ``value`` must be at most ``limit`` (at least, where ``at_least``).

    ``step``: the first outer step beyond the limit. ``where``: more exactly, what is.
    """

    level: str
    name: str
    value: float
    limit: float | None
    at_least: bool = False
    note: str = ""
    step: int | None = None
    where: str = ""

    @property
    def passed(self) -> bool:
        if self.limit is None:
            return True
        return bool(self.value >= self.limit) if self.at_least else bool(self.value <= self.limit)


@dataclass
class ParityReport:
    """Checks in the order they were made, and the curves behind them (outer step -> value)."""

    precision: str
    backend: str
    settings: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    # "z", "weight", "mu", "logvar", "kl": largest; "z mean", ...: mean.
    curves: dict[str, list[float]] = field(default_factory=dict)
    images: dict[str, Array] = field(default_factory=dict)
    # (step, feature) tables: largest and mean error of each mixture parameter ("mu", "mu mean"), mean divergence ("kl").
    tables: dict[str, list[list[float]]] = field(default_factory=dict)
    # Name -> counts per bin.
    histograms: dict[str, list[int]] = field(default_factory=dict)
    distribution: Distribution | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    thresholds: Thresholds | None = None
    # What a reader should know besides the checks.
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def limited(self) -> int:
        """How many of the checks can fail."""
        return sum(check.limit is not None for check in self.checks)

    @property
    def changed_limits(self) -> dict[str, tuple[float, float]]:
        """Limits that are not the precision's own: name -> default, what it was set to."""
        if self.thresholds is None:
            return {}
        usual, now = asdict(default_thresholds(self.precision)), asdict(self.thresholds)
        return {name: (usual[name], value) for name, value in now.items() if value != usual[name]}

    @property
    def first_failure(self) -> Check | None:
        """What failed first: by level, then by outer step, then in the order of the data's way through the model."""

        def order(check: Check) -> tuple[int, float]:
            level = LEVELS.index(check.level) if check.level in LEVELS else len(LEVELS)
            return level, math.inf if check.step is None else check.step

        return min(self.failed, key=order, default=None)

    @property
    def first_divergence(self) -> str | None:
        """In words: level, graph or quantity, outer step."""
        check = self.first_failure
        if check is None:
            return None
        number = f"level {LEVELS.index(check.level) + 1}, " if check.level in LEVELS else ""
        at = "" if check.step is None else f", outer step {check.step}"
        return f"{number}{check.level}: {check.name}{at}{f', {check.where}' if check.where else ''}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: a number that is not finite is None."""
        found = {
            "precision": self.precision,
            "backend": self.backend,
            "settings": self.settings,
            "passed": self.passed,
            "first_divergence": self.first_divergence,
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
            "changed_limits": self.changed_limits,
            "notes": self.notes,
            "curves": self.curves,
            "tables": self.tables,
            "histograms": self.histograms,
            "distribution": None if self.distribution is None else asdict(self.distribution),
            "provenance": self.provenance,
        }
        return {key: _finite(value) for key, value in found.items()}

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
        lines += [f"note: {note}" for note in self.notes]
        for name, (usual, now) in self.changed_limits.items():
            lines.append(f"note: the limit {name} was set to {now:g}; {self.precision}'s is {usual:g}")
        if self.passed:
            lines.append(f"all {self.limited} checks passed")
        else:
            lines.append(f"first divergence: {self.first_divergence}")
            lines.append(f"{len(self.failed)} of {self.limited} checks FAILED")
        return "\n".join(lines)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    reference: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Compare a loaded bundle with the PyTorch model that it should be.

    ``num_iter``: of masked models. ``distribution`` > 0 adds the fourth level with so many samples of each; ``features``
    and ``fid_stats`` as for `arinar.measure.distribution.compare`. ``thresholds``: default those of ``THRESHOLDS`` for
    the bundle's precision. ``reference``: what the report is to say about the checkpoint (its file, hash, ...).

    Raises BundleError where checkpoint and bundle do not even have the same configuration, ValueError for a bad
    argument (before anything long begins), FloatingPointError where the checkpoint itself computes what is not finite.
    """
    config, say = model.config, progress or (lambda line: None)
    if pipeline.config != config:
        differing = [k for k, v in config.to_dict().items() if pipeline.config.to_dict()[k] != v]
        raise BundleError(
            f"the bundle {pipeline.bundle.folder} and the checkpoint are different models: {', '.join(differing)} differ; "
            f"compare with the checkpoint that the bundle was exported from"
        )
    check_match(config, vae)
    thresholds = thresholds or default_thresholds(pipeline.precision)
    defaults = pipeline.bundle.manifest.defaults
    guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    settings: dict[str, Any] = {
        "labels": [int(label) for label in check_labels(list(labels), config)],
        "guidance_scale": check_number("guidance_scale", guidance_scale, 1.0),
        "num_iter": check_num_iter(None if config.outer == "causal" else num_iter, defaults.num_iter, config),
        "temperature": check_number("temperature", temperature, 0.0, strict=True),
        "cfg_schedule": cfg_schedule,
        "seed": seed,
    }
    plan = steps(config.seq_len, settings["num_iter"], settings["guidance_scale"], cfg_schedule)
    noise = Noise.from_seed(seed, range(len(labels)), config)
    measure = None
    if distribution:
        check_samples(distribution)
        measure = open_measure(features, fid_stats, config)
    report = ParityReport(pipeline.precision, pipeline.backend.name, settings, thresholds=thresholds)
    report.provenance = provenance(pipeline, model, vae, reference)
    if report.provenance["exported from these weights"] == "no":
        report.notes.append("the bundle was exported from other weights than those it is compared with here")
    say("level 1: each graph alone")
    _per_graph(report, pipeline, model, vae, thresholds, len(labels), len(labels) * max(step.count for step in plan))
    records: list[StepRecord] = []
    say(f"reference: PyTorch generates {len(labels)} images in {len(plan)} steps")
    tokens = sample(
        model,
        torch.tensor(settings["labels"]),
        guidance_scale=settings["guidance_scale"],
        temperature=settings["temperature"],
        num_iter=len(plan),
        cfg_schedule=cfg_schedule,
        noise=noise,
        record=records.append,
    )
    _check_reference(records)
    say("level 2: the deployed graphs along the reference's trajectory")
    _teacher_forced(report, pipeline, noise, tokens.numpy(), records, thresholds)
    say("level 3: the deployed pipeline on its own, same noise")
    finite = _free_running(report, pipeline, vae, noise, tokens, records, thresholds)
    if measure is not None and finite:
        say(f"level 4: {distribution} images of each, by distribution")
        references = make_references(model, vae, distribution, settings, say)
        found, _ = compare(pipeline, references, measure=measure)
        add_distribution(report, found, thresholds)
    elif measure is not None:
        report.notes.append("level 4 was not run: the deployed pipeline's images are not finite")
    return report


def _check_reference(records: Sequence[StepRecord]) -> None:
    for record in records:
        values = (record.z_cond, record.z_uncond, *record.cond, *(record.uncond or ()), record.features)
        if not all(bool(torch.isfinite(value).all()) for value in values if value is not None):
            raise FloatingPointError(
                f"the checkpoint itself gives values that are not finite in PyTorch, at outer step {record.step.index}; "
                f"there is nothing to compare with: check its weights"
            )


def add_distribution(report: ParityReport, found: Distribution, thresholds: Thresholds) -> None:
    """Turn what level 4 measured into checks."""
    add, note = report.checks.append, f"{found.samples} samples of each, features {found.features}"
    report.distribution = found
    if found.drop is not None and found.drop_error is not None:
        sides = f"{found.agreement:.1%} deployed, {found.reference_agreement:.1%} PyTorch"
        limit = thresholds.agreement_drop + 2 * found.drop_error
        remark = f"{sides}, standard error {found.drop_error:.1%}"
        add(Check("distribution", "classifier agreement lost", found.drop, limit, note=remark))
    yardstick = max(found.yardstick, 1e-12)
    add(
        Check(
            "distribution",
            "Frechet distance / yardstick",
            found.independent / yardstick,
            thresholds.frechet_ratio,
            note=f"{found.independent:.3g} to PyTorch's second run, {found.yardstick:.3g} between PyTorch's two; {note}",
        )
    )
    add(
        Check(
            "distribution",
            "the same, with equal noise",
            found.frechet / yardstick,
            None if thresholds.paired_ratio == math.inf else thresholds.paired_ratio,
            note=f"{found.frechet:.3g} to PyTorch's first run",
        )
    )
    remark = f"to PyTorch's second run; squared MMD {found.mmd:.2g}"
    add(Check("distribution", "MMD, p-value", found.mmd_p, thresholds.mmd_p, True, remark))
    if found.deployed_distance is not None and found.reference_distance is not None:
        add(
            Check(
                "distribution",
                "Frechet distance to the statistics / PyTorch's",
                found.deployed_distance / max(found.reference_distance, 1e-12),
                thresholds.stats_ratio,
                note=f"{found.deployed_distance:.4g} deployed, {found.reference_distance:.4g} PyTorch",
            )
        )


def provenance(
    pipeline: Pipeline, model: Arinar, vae: AutoencoderKL, reference: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What was compared, with what, when and where."""
    import platform
    from datetime import UTC, datetime
    from importlib import metadata

    versions = {}
    for name in (
        "arinar",
        "torch",
        "numpy",
        "onnx",
        "onnxruntime",
        "onnxruntime-gpu",
        "tensorrt",
        "tensorrt-rtx",
        "torch-fidelity",
    ):
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
    files = sorted({name for graph in graphs.values() for name in graph.files})
    hashes = {"weights_sha256": weights_sha256(model), "vae_weights_sha256": weights_sha256(vae)}
    known = [origin[name] == value for name, value in hashes.items() if name in origin]
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "bundle": pipeline.bundle.folder.resolve().name,
        "precision": pipeline.precision,
        "backend": pipeline.backend.name,
        "compared with": dict(reference or {}) | hashes,
        "exported from these weights": ("yes" if all(known) else "no") if known else "unknown",
        "machine": f"{_processor()}, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
        "origin": origin,
        "sha256": {name: manifest.files[name].sha256 for name in files},
    }


def _processor() -> str:
    """Name of the processor, how many, and of the GPU where there is one."""
    import os
    import platform

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor_name()}, {platform.machine()}, {os.cpu_count()} CPUs{gpu}"


def _per_graph(
    report: ParityReport, pipeline: Pipeline, model: Arinar, vae: AutoencoderKL, thresholds: Thresholds, batch: int, rows: int
) -> None:
    """``batch`` images, ``rows`` drawn tokens at most: no more than the levels that follow, so that engines fit."""
    manifest = pipeline.bundle.manifest
    graphs = manifest.precision_graphs(pipeline.precision)
    shared = {} if pipeline.precision == "fp32" else manifest.graphs.get("fp32", {})
    specs = graph_specs(model, vae, manifest.num_candidates, graphs["outer_step"].opset)
    # inner_token draws a token as one graph; what it must give is the reference sampler's to say.
    names = [*(name for name in specs if name not in VAE_SIDE), "inner_token", "inner_token_guided", *VAE_SIDE]
    for name in names:
        if name not in graphs:
            continue
        if name in specs:
            spec = specs[name]
            feed = spec.example(_sizes(spec, pipeline, batch, rows))
            expected = run_module(spec, feed)
        else:
            feed = _token_feed(graphs[name], pipeline, rows)
            expected = [_drawn_tokens(model, feed)]
        limits = thresholds
        if graphs[name] == shared.get(name):  # what a variant shares with fp32 has its limits, unless told otherwise
            limits = replace(THRESHOLDS["fp32"], **{key: now for key, (_, now) in report.changed_limits.items()})
        kind = "token" if name.startswith("inner_token") else "sampled_graph" if name.startswith("mixture_sample") else "graph"
        limit, note = getattr(limits, kind), ""
        if expected[0].dtype == np.uint8:
            limit, note = max(limit, 1.001 / 255), "1 grey level of 255 may differ"
        elif kind == "token":
            note = f"of the best {TOKEN_SHARE:.0%} of the drawn features"
        try:
            got = launch(pipeline, graphs[name], feed, [value.shape for value in expected])
        except EngineError as error:
            if name not in NOT_FOR_GENERATION:
                raise
            report.notes.append(f"graph {name} was not compared, generation does not need it: {error}")
            continue
        except FloatingPointError as error:
            report.checks.append(Check("graph", name, math.nan, limit, note=str(error), where="values that are not finite"))
            continue
        errors = []
        for want, have in zip(expected, got, strict=True):
            with np.errstate(invalid="ignore"):  # infinite values end as NaN, which no limit lets pass
                difference = np.abs(want.astype(np.float64) - have.astype(np.float64)) / _scale(want)
            largest = np.quantile(difference, TOKEN_SHARE) if kind == "token" else difference.max(initial=0.0)
            errors.append((float(largest), float(difference.mean()) if want.size else 0.0))
        worst = int(np.argmax([largest for largest, _ in errors]))  # the first that is not a number, if any
        output = f"output {graphs[name].outputs[worst].name}"
        parts = [note, f"mean {errors[worst][1]:.2g}", f"largest in {output}" if len(errors) > 1 else ""]
        report.checks.append(Check("graph", name, errors[worst][0], limit, note=", ".join(filter(None, parts)), where=output))


# In the order of the data's way, these come after the tokens.
VAE_SIDE = ("tokens_to_latents", "vae_decoder", "vae_encoder")


def _scale(want: Array) -> float:
    """What errors are relative to: the largest value, at least 1; of grey levels, the largest that there is."""
    if want.dtype == np.uint8:
        return 255.0
    return max(1.0, float(np.abs(want.astype(np.float64)).max())) if want.size else 1.0


def _sizes(spec: GraphSpec, pipeline: Pipeline, batch: int, rows: int) -> dict[str, int]:
    """Axis sizes that lie within what engines for ``batch`` images are built for."""
    sizes = dict(spec.sizes[-1])
    if "B" in sizes:
        sizes["B"] = min(batch, sizes["B"]) if spec.name.startswith("vae") else batch
    if "N" in sizes:
        sizes["N"] = 2 * batch
    if "S" in sizes:
        sizes["S"] = pipeline.config.token_dim
    if "M" in sizes:
        sizes["M"] = min(rows, sizes["M"])
    return sizes


def _token_feed(graph: GraphInfo, pipeline: Pipeline, rows: int) -> dict[str, Array]:
    """Random inputs of inner_token: z (M, C), with guidance (2M, C), uniforms (M, D, U), scalars above 1."""
    rng, config = np.random.default_rng(0), pipeline.config
    rows = min(rows, 64)
    branches = 2 if graph.name.endswith("guided") else 1
    feed: dict[str, Array] = {
        "z": rng.standard_normal((branches * rows, config.z_width)),
        "uniforms": rng.random((rows, config.token_dim, NUM_UNIFORMS)),
        "guidance_scale": 1 + rng.random(1),
        "temperature": 1 + rng.random(1),
    }
    return {tensor.name: feed[tensor.name].astype(np.float32) for tensor in graph.inputs}


@torch.no_grad()
def _drawn_tokens(model: Arinar, feed: Mapping[str, Array]) -> Array:
    given = {name: torch.from_numpy(value) for name, value in feed.items()}
    guided = "guidance_scale" in given
    cond, uncond = given["z"].chunk(2) if guided else (given["z"], None)
    scale = float(given["guidance_scale"]) if guided else 1.0
    features, _, _ = _sample_rows(
        model, cond, uncond, scale, float(given["temperature"]), torch.Generator(), given["uniforms"], None
    )
    return np.asarray(features.numpy())


def launch(pipeline: Pipeline, graph: GraphInfo, feed: Mapping[str, Array], shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Run one graph of a pipeline's backend on host arrays, cast to what the graph takes."""
    backend = pipeline.backend
    inputs = {t.name: backend.upload(feed[t.name].astype(t.dtype)) for t in graph.inputs}
    outputs = {t.name: backend.empty(shape, t.dtype) for t, shape in zip(graph.outputs, shapes, strict=True)}
    backend.launch(graph.name, inputs, outputs)
    return [backend.download(buffer) for buffer in outputs.values()]


def _walk(
    pipeline: Pipeline, noise: Noise, tokens: Array, plan: Sequence[Step], settings: Mapping[str, Any]
) -> Iterator[tuple[Array, Array, Mixture]]:
    """The deployed graphs with given tokens (B, L, D) forced -> by outer step: z (G * P * B, C), features (P * B, D),
    mixtures (G * P * B, D, K) each. Rows go position by position, conditional ones first."""
    backend, loop = pipeline.backend, pipeline.loop
    batch, branches = len(tokens), 2 if settings["guidance_scale"] != 1.0 else 1
    state = loop.state(batch, branches, list(plan))
    loop.fill(state, np.array(settings["labels"], np.int64), noise, list(plan), settings["temperature"])
    ordered = np.ascontiguousarray(np.take_along_axis(tokens, noise.order[:, :, None], 1).swapaxes(0, 1))  # (L, B, D)
    for step in plan:
        z = backend.download(loop.outer(state, step)).copy()
        now = np.ascontiguousarray(ordered[step.remaining : step.masked])  # (P, B, D)
        features = now.reshape(step.count * batch, -1)
        both = np.tile(features, (branches, 1))
        # Images are divided into launches as the pipeline does it: ranges that are taken as a graph runs depend on it.
        parts = np.array_split(np.arange(len(z)).reshape(-1, batch), backend.parts("inner_token", batch), 1)
        found = [forced_mixtures(pipeline, z[rows.ravel()], both[rows.ravel()]) for rows in parts]
        place = np.argsort(np.concatenate([rows.ravel() for rows in parts]))
        weight, mu, logvar = (np.concatenate(value)[place] for value in zip(*found, strict=True))
        yield z, features, (weight, mu, logvar)
        backend.write(state.tokens[step.remaining : step.masked], now)


def _teacher_forced(
    report: ParityReport,
    pipeline: Pipeline,
    noise: Noise,
    tokens: Array,
    records: Sequence[StepRecord],
    thresholds: Thresholds,
) -> None:
    config, batch, add = pipeline.config, len(tokens), report.checks.append
    curves: dict[str, list[float]] = {f"{name}{kind}": [] for name in ("z", *PARAMETERS, "kl") for kind in ("", " mean")}
    tables: dict[str, list[list[float]]] = {f"{name}{kind}": [] for name in PARAMETERS for kind in ("", " mean")}
    tables["kl"] = []
    picks = np.zeros((2, config.num_gaussians), np.int64)
    absolute: list[float] = []
    same = drawn = 0
    walk = _walk(pipeline, noise, tokens, [record.step for record in records], report.settings)
    for record in records:
        try:
            z, features, got = next(walk)
        except FloatingPointError as error:
            add(
                Check(
                    "teacher-forced",
                    "finite values",
                    0.0,
                    1.0,
                    True,
                    str(error),
                    step=record.step.index,
                )
            )
            break
        # Reference rows go image by image, the deployed ones position by position.
        wanted = [record.z_cond] if record.z_uncond is None else [record.z_cond, record.z_uncond]
        want_z = np.concatenate([_by_position(value, batch) for value in wanted])
        mixtures = [record.cond] if record.uncond is None else [record.cond, record.uncond]
        want = [np.concatenate([_by_position(m[i], batch) for m in mixtures]) for i in range(3)]
        for name, have, value in zip(("z", *PARAMETERS), (z, *got), (want_z, *want), strict=True):
            difference = np.abs(have.astype(np.float64) - value)
            absolute.append(float(difference.max()))
            difference /= _scale(value)
            curves[name].append(float(difference.max()))
            curves[f"{name} mean"].append(float(difference.mean()))
            if name in tables:
                tables[name].append(difference.max((0, 2)).tolist())
                tables[f"{name} mean"].append(difference.mean((0, 2)).tolist())
        kl = mixture_kl(tuple(want), got)  # (rows, D)
        curves["kl"].append(float(kl.max()))
        curves["kl mean"].append(float(kl.mean()))
        tables["kl"].append(kl.mean(0).tolist())
        first = slice(len(features))  # the conditional rows, which features are drawn from
        ours, theirs = (responsible_component(features, tuple(value[first] for value in side)) for side in (want, got))
        picks += _counts(ours, theirs, config.num_gaussians)
        same, drawn = same + int((ours == theirs).sum()), drawn + ours.size
    report.curves |= curves
    report.tables |= tables
    report.histograms |= {"reference": picks[0].tolist(), "deployed": picks[1].tolist()}
    if not drawn:
        return
    for name in ("z", *PARAMETERS, "kl"):
        curve, limit = curves[name], {"z": thresholds.z, "kl": thresholds.kl}.get(name, thresholds.mixture)
        worst = int(np.argmax(curve))
        over = next((i for i, value in enumerate(curve) if not value <= limit), None)
        unit = " nats per feature" if name == "kl" else ""
        note = f"worst at step {worst}, mean {np.mean(curves[f'{name} mean']):.2g}{unit}"
        note += "" if over is None else f"; first beyond the limit at step {over}"
        where = "" if over is None or name not in PARAMETERS else f"feature {int(np.argmax(tables[name][over]))}"
        add(Check("teacher-forced", name, curve[worst], limit, note=note, step=over, where=where))
    add(
        Check(
            "teacher-forced",
            "absolute error",
            float(np.max(absolute)),
            None if thresholds.absolute == math.inf else thresholds.absolute,
            note="largest of z, weight, mu and logvar",
        )
    )
    note = f"of {drawn} drawn features"
    add(Check("teacher-forced", "same component", same / drawn, thresholds.same_component, True, note))
    mean_kl = float(np.mean(tables["kl"]))
    add(Check("teacher-forced", "mean kl", mean_kl, thresholds.mean_kl, note="nats per feature"))


def _counts(ours: Array, theirs: Array, components: int) -> Array:
    """(2, K): how often each component was picked."""
    return np.stack([np.bincount(side.ravel(), minlength=components) for side in (ours, theirs)])


def _by_position(value: torch.Tensor, batch: int) -> Array:
    """(B * P, ...) image by image -> (P * B, ...) position by position."""
    rows = value.reshape(batch, -1, *value.shape[1:])
    return np.asarray(rows.transpose(0, 1).flatten(0, 1).numpy())


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
    records: Sequence[StepRecord],
    thresholds: Thresholds,
) -> bool:
    """-> whether the deployed pipeline made images at all."""
    config, settings, add = pipeline.config, report.settings, report.checks.append
    plan = [record.step for record in records]
    try:
        out = pipeline.generate(
            settings["labels"],
            guidance_scale=settings["guidance_scale"],
            temperature=settings["temperature"],
            num_iter=settings["num_iter"],
            cfg_schedule=settings["cfg_schedule"],
            noise=noise,
        )
        share, by_step, picks = _own_picks(pipeline, noise, out.tokens, records, settings)
    except FloatingPointError as error:
        add(Check("free-running", "finite images", 0.0, 1.0, True, str(error)))
        return False
    want = decode_images(vae, tokens, config).numpy()
    have = np.stack([np.asarray(image) for image in out.images])
    report.images = {"reference": want, "deployed": have}
    apart = np.abs(out.tokens - tokens.numpy()).max(-1) > PARTED * max(1.0, float(tokens.abs().max()))  # (B, L)
    diverged: list[Array] = []
    for step in plan:
        positions = noise.order[:, step.remaining : step.masked]
        diverged.append(np.asarray(np.take_along_axis(apart, positions, 1).any(1)))
    first = [next((s for s, now in enumerate(diverged) if now[i]), None) for i in range(len(want))]
    parted = [step for step in first if step is not None]
    same: Array = np.abs(have.astype(int) - want.astype(int)).max((1, 2, 3)) <= 1
    ratios = psnr(have, want)
    began = min(parted, default=None)
    note = "no image parts" if began is None else f"{len(parted)} of {len(first)} images part, the first at step {began}"
    grey = Check("free-running", "images within 1 grey level", float(same.mean()), thresholds.same_images or None, True, note)
    add(grey if grey.passed else replace(grey, step=began))
    add(Check("free-running", "tokens that agree", float(1 - apart.mean()), None, note=f"to {PARTED:g} of the largest value"))
    over = next((i for i, value in enumerate(by_step) if value < thresholds.same_picks), None)
    note = f"each side's own draws, {int(picks[0].sum())} features"
    same_picks = Check("free-running", "same picks", share, thresholds.same_picks or None, True, note)
    add(same_picks if same_picks.passed else replace(same_picks, step=over))
    note = f"lowest {ratios.min():.3g}; the same image counts as {MAX_PSNR:g}"
    add(Check("free-running", "median PSNR, dB", float(np.median(ratios)), thresholds.psnr or None, True, note))
    report.histograms["divergence step"] = [sum(step == index for step in parted) for index in range(len(plan))]
    report.histograms |= {"own reference": picks[0].tolist(), "own deployed": picks[1].tolist()}
    report.curves["diverged"] = np.cumsum(np.stack(diverged), 0).astype(bool).mean(1).tolist()
    report.curves["same picks"] = by_step
    return True


def _own_picks(
    pipeline: Pipeline, noise: Noise, tokens: Array, records: Sequence[StepRecord], settings: Mapping[str, Any]
) -> tuple[float, list[float], Array]:
    """Which component most probably drew each feature, each side's own features under its own mixtures -> share that
    is the same, by outer step as well, and how often each component was picked, (2, K)."""
    batch, components = len(tokens), pipeline.config.num_gaussians
    picks, shares, sizes = np.zeros((2, components), np.int64), [], []
    walk = _walk(pipeline, noise, tokens, [record.step for record in records], settings)
    for record, (_, features, mixtures) in zip(records, walk, strict=True):
        theirs = responsible_component(features, tuple(value[: len(features)] for value in mixtures))
        want = tuple(_by_position(value, batch) for value in record.cond)
        ours = responsible_component(_by_position(record.features, batch), want)
        picks += _counts(ours, theirs, components)
        shares.append(float((ours == theirs).mean()))
        sizes.append(ours.size)
    return float(np.average(shares, weights=sizes)), shares, picks


def psnr(have: Array, want: Array) -> Array:
    """Peak signal-to-noise ratio (N,) in dB of images (N, H, W, 3) uint8, at most ``MAX_PSNR``."""
    mse = np.square(have.astype(np.float64) - want.astype(np.float64)).mean((1, 2, 3))
    return np.asarray(np.minimum(10 * np.log10(255.0**2 / np.maximum(mse, 1e-9)), MAX_PSNR))


__all__ = [
    "LEVELS",
    "THRESHOLDS",
    "Check",
    "ParityReport",
    "Thresholds",
    "add_distribution",
    "default_thresholds",
    "forced_mixtures",
    "mixture_kl",
    "parse_thresholds",
    "run_parity",
]
