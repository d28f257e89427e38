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
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from arinar.export.bundle import check_match, weights_sha256
from arinar.export.graphs import HEADS, graph_specs
from arinar.export.spec import GraphSpec
from arinar.export.trace import run_module
from arinar.head import Draw
from arinar.law import Law, Parts, law_of
from arinar.model import Arinar, decode_images
from arinar.runtime.backends.engines import EngineError
from arinar.runtime.bundle import PHASES, BundleError, GraphInfo
from arinar.runtime.machine import machine
from arinar.runtime.pipeline import Pipeline
from arinar.runtime.request import Batch, Sampling
from arinar.sampler import StepRecord, sample
from arinar.vae import AutoencoderKL

from .checks import PARTED, THRESHOLDS, Check, ParityReport, Thresholds
from .distances import MAX_PSNR, psnr
from .distribution import Distribution, check_samples, compare, make_references
from .features import Features, open_measure

Array = npt.NDArray[Any]
Mixture = tuple[Array, Array, Array]

# Of a token that one graph draws, the features that must keep their limit: a draw that a rounding error sends
# elsewhere rightly changes the features after it.
TOKEN_SHARE = 0.75
# Packages that the outcome may depend on.
PACKAGES = (
    "arinar",
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "torch-fidelity",
)


def run_parity(
    pipeline: Pipeline,
    model: Arinar,
    vae: AutoencoderKL,
    *,
    labels: Sequence[int],
    guidance_scale: float | None = None,
    num_iter: int | None = None,
    temperature: float | None = None,
    cfg_schedule: str | None = None,
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
    say = progress or (lambda line: None)
    check_same(pipeline, model, vae)
    scheme = pipeline.bundle.manifest.scheme(pipeline.precision)
    thresholds = thresholds or THRESHOLDS[scheme]
    sampling = pipeline.resolve(
        list(labels),
        guidance_scale=guidance_scale,
        num_iter=None if model.config.outer == "causal" else num_iter,
        temperature=temperature,
        cfg_schedule=cfg_schedule,
        seed=seed,
    )
    settings = {"labels": sampling.labels.tolist(), **sampling.settings(), "seed": seed}
    measure = None
    if distribution:
        check_samples(distribution)
        measure = open_measure(features, fid_stats, model.config)
    titles, precision = law_of(model.config).titles, pipeline.precision
    report = ParityReport(precision, pipeline.backend.name, settings, scheme=scheme, parts=titles, thresholds=thresholds)
    report.provenance = provenance(pipeline, model, vae, reference)
    if report.provenance["exported from these weights"] == "no":
        report.notes.append("the bundle was exported from other weights than those it is compared with here")
    finite = _by_sample(report, pipeline, model, vae, sampling, thresholds, say)
    if measure is not None and finite:
        say(f"level 4: {distribution} images of each, by distribution")
        references = make_references(model, vae, distribution, settings, say)
        found, _ = compare(pipeline, references, measure=measure)
        add_distribution(report, found, thresholds)
    elif measure is not None:
        report.notes.append("level 4 was not run: the deployed pipeline's images are not finite")
    return report


def check_same(pipeline: Pipeline, model: Arinar, vae: AutoencoderKL) -> None:
    """Raise BundleError where a bundle is of another configuration, ValueError where the autoencoder does not fit."""
    ours, theirs = pipeline.config.to_dict(), model.config.to_dict()
    if differing := [key for key, value in theirs.items() if ours[key] != value]:
        raise BundleError(
            f"the bundle {pipeline.bundle.folder} and the checkpoint are different models: {', '.join(differing)} differ; "
            f"compare with the checkpoint that the bundle was exported from"
        )
    check_match(model.config, vae)


def _by_sample(
    report: ParityReport,
    pipeline: Pipeline,
    model: Arinar,
    vae: AutoencoderKL,
    sampling: Sampling,
    thresholds: Thresholds,
    say: Callable[[str], None],
) -> bool:
    """Levels 1 to 3 -> whether the deployed pipeline made images at all."""
    batch, records = sampling.batch(), list[StepRecord]()
    say("level 1: each graph alone")
    _per_graph(report, pipeline, model, vae, thresholds, len(batch), len(batch) * max(step.count for step in batch.plan))
    say(f"reference: PyTorch generates {len(batch)} images in {len(batch.plan)} steps")
    tokens = sample(
        model,
        torch.from_numpy(sampling.labels),
        **sampling.settings(),
        noise=batch.noise,
        record=records.append,
        law=pipeline.bundle.manifest.law,
    )
    _check_reference(records)
    say("level 2: the deployed graphs along the reference's trajectory")
    _teacher_forced(report, pipeline, batch, tokens.numpy(), records, thresholds)
    say("level 3: the deployed pipeline on its own, same noise")
    return _free_running(report, pipeline, vae, batch, tokens, records, thresholds)


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
    where = machine(PACKAGES)
    python = where["versions"].pop("python")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
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
        "machine": f"{where['cpu']}, {where['architecture']}, {where['cpus']} CPUs{gpu}, {where['system']}",
        "python": python,
        "versions": where["versions"],
        "origin": origin,
        "sha256": {name: manifest.files[name].sha256 for name in files},
    }


def _per_graph(
    report: ParityReport, pipeline: Pipeline, model: Arinar, vae: AutoencoderKL, thresholds: Thresholds, batch: int, rows: int
) -> None:
    """``batch`` images, ``rows`` drawn tokens at most: no more than the levels that follow, so that engines fit."""
    manifest = pipeline.bundle.manifest
    graphs = manifest.precision_graphs(pipeline.precision)
    shared = {} if report.scheme == "fp32" else manifest.graphs.get("fp32", {})
    head = HEADS[model.config.head]
    specs = graph_specs(model, vae, manifest.law, graphs["outer_step"].opset)
    specs |= {name: head.composed_spec(name, model.config) for name in head.COMPOSED}
    for spec in sorted(specs.values(), key=lambda spec: PHASES.index(spec.phase)):
        if (graph := graphs.get(spec.name)) is None:
            continue
        feed = spec.example(_sizes(spec, pipeline, batch, rows))
        # Graphs of version 0.1 take one guidance scale and temperature for all rows.
        feed = {t.name: feed[t.name][:1] if t.shape == (1,) else feed[t.name] for t in graph.inputs}
        expected = [_drawn_tokens(model, feed, manifest.law)] if spec.draws == "chain" else run_module(spec, feed)
        limits = thresholds
        if graph == shared.get(spec.name):  # what a variant shares with fp32 has its limits, unless told otherwise
            limits = replace(THRESHOLDS["fp32"], **{key: now for key, (_, now) in report.changed_limits.items()})
        if (check := _graph_check(report, pipeline, graph, feed, expected, limits)) is not None:
            report.checks.append(check)


def _graph_check(
    report: ParityReport,
    pipeline: Pipeline,
    graph: GraphInfo,
    feed: Mapping[str, Array],
    expected: Sequence[Array],
    limits: Thresholds,
) -> Check | None:
    """What the graph gives, against what it should; None where it cannot run and generation does not need it."""
    limit, note = {"none": limits.graph, "one": limits.sampled_graph, "chain": limits.token}[graph.draws], ""
    if expected[0].dtype == np.uint8:
        limit, note = max(limit, 1.001 / 255), "1 grey level of 255 may differ"
    elif graph.draws == "chain":
        note = f"of the best {TOKEN_SHARE:.0%} of the drawn features"
    try:
        got = launch(pipeline, graph, feed, [value.shape for value in expected])
    except EngineError as error:
        if graph.phase != "encode":
            raise
        report.notes.append(f"graph {graph.name} was not compared, generation does not need it: {error}")
        return None
    except FloatingPointError as error:
        return Check("graph", graph.name, math.nan, limit, note=str(error), where="values that are not finite")
    errors = []
    for want, have in zip(expected, got, strict=True):
        with np.errstate(invalid="ignore"):  # infinite values end as NaN, which no limit lets pass
            difference = np.abs(want.astype(np.float64) - have.astype(np.float64)) / _scale(want)
        largest = np.quantile(difference, TOKEN_SHARE) if graph.draws == "chain" else difference.max(initial=0.0)
        errors.append((float(largest), float(difference.mean()) if want.size else 0.0))
    worst = int(np.argmax([largest for largest, _ in errors]))  # the first that is not a number, if any
    output = f"output {graph.outputs[worst].name}"
    parts = [note, f"mean {errors[worst][1]:.2g}", f"largest in {output}" if len(errors) > 1 else ""]
    return Check("graph", graph.name, errors[worst][0], limit, note=", ".join(filter(None, parts)), where=output)


def _scale(want: Array) -> float:
    """What errors are relative to: the largest value, at least 1; of grey levels, the largest that there is."""
    if want.dtype == np.uint8:
        return 255.0
    return max(1.0, float(np.abs(want.astype(np.float64)).max())) if want.size else 1.0


def _sizes(spec: GraphSpec, pipeline: Pipeline, batch: int, rows: int) -> dict[str, int]:
    """Axis sizes that lie within what engines for ``batch`` images are built for."""
    sizes = dict(spec.sizes[-1])
    if "B" in sizes:
        sizes["B"] = min(batch, sizes["B"]) if spec.convolutional else batch
    if "M" in sizes:
        sizes["M"] = min(rows, 64)
    if "N" in sizes:
        sizes["N"] = 2 * sizes.get("M", batch)
    if "S" in sizes:
        sizes["S"] = pipeline.config.token_dim
    return sizes


@torch.no_grad()
def _drawn_tokens(model: Arinar, feed: Mapping[str, Array], law: Mapping[str, int]) -> Array:
    """What the reference draws from the inputs of a composed graph."""
    given = {name: torch.from_numpy(value) for name, value in feed.items()}
    draws = given[law_of(model.config).noise]
    guided = "guidance_scale" in given
    cond, uncond = given["z"].chunk(2) if guided else (given["z"], None)
    one = torch.ones(1)
    settings = (given.get(name, one).double().expand(len(draws)) for name in ("guidance_scale", "temperature"))
    scale, temperature = settings
    drawn = model.head.draw(cond, uncond, Draw(scale, temperature, torch.Generator(), draws, law))
    return np.asarray(drawn.tokens.numpy())


def launch(pipeline: Pipeline, graph: GraphInfo, feed: Mapping[str, Array], shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Run one graph of a pipeline's backend on host arrays, cast to what the graph takes."""
    backend = pipeline.backend
    inputs = {t.name: backend.upload(feed[t.name].astype(t.dtype)) for t in graph.inputs}
    outputs = {t.name: backend.empty(shape, t.dtype) for t, shape in zip(graph.outputs, shapes, strict=True)}
    backend.launch(graph.name, inputs, outputs)
    return [backend.download(buffer) for buffer in outputs.values()]


def _walk(pipeline: Pipeline, batch: Batch, tokens: Array) -> Iterator[tuple[Array, Array, Parts]]:
    """The deployed graphs with given tokens (B, L, D) forced -> by outer step: z (G * P * B, C), features (P * B, D), the
    parts of the law (G * P * B, S, ...). Rows go position by position, conditional ones first."""
    loop, size = pipeline.loop, len(batch)
    ordered = np.take_along_axis(tokens, batch.noise.order[:, :, None], 1).swapaxes(0, 1)  # (L, B, D)
    for step, made in loop.forced(batch, tokens):
        z = made.reshape(-1, made.shape[-1])
        features = ordered[step.remaining : step.masked].reshape(step.count * size, -1)
        yield z, features, loop.head.law(z, np.tile(features, (batch.branches, 1)), images=size)


class Curves:
    """Errors of z and of the law's parts along a trajectory, step by step: what level 2 gathers."""

    def __init__(self, law: Law, picks: int) -> None:
        self.law, self.names = law, ("z", *law.parts)
        kinds = ("", " mean")
        self.curves: dict[str, list[float]] = {f"{name}{kind}": [] for name in (*self.names, "kl") for kind in kinds}
        self.tables: dict[str, list[list[float]]] = {f"{name}{kind}": [] for name in law.parts for kind in kinds}
        self.tables["kl"] = []
        self.picks = np.zeros((2, picks), np.int64)
        self.absolute: list[float] = []
        self.same = self.drawn = 0

    def add(self, have_z: Array, have: Parts, want_z: Array, want: Parts, features: Array) -> None:
        """A step's z (rows, C) and law, both branches; ``features`` (rows of one branch, D)."""
        for name, ours, theirs in zip(self.names, (have_z, *have), (want_z, *want), strict=True):
            difference = np.abs(ours.astype(np.float64) - theirs)
            self.absolute.append(float(difference.max()))
            difference /= _scale(theirs)
            self.curves[name].append(float(difference.max()))
            self.curves[f"{name} mean"].append(float(difference.mean()))
            if name in self.tables:
                self.tables[name].append(difference.max((0, 2)).tolist())
                self.tables[f"{name} mean"].append(difference.mean((0, 2)).tolist())
        kl = self.law.kl(want, have)  # (rows, S)
        self.curves["kl"].append(float(kl.max()))
        self.curves["kl mean"].append(float(kl.mean()))
        self.tables["kl"].append(kl.mean(0).tolist())
        first = slice(len(features))  # the conditional rows, which features are drawn from
        ours, theirs = (self.law.pick(features, tuple(value[first] for value in side)) for side in (want, have))
        self.picks += _counts(ours, theirs, self.picks.shape[1])
        self.same, self.drawn = self.same + int((ours == theirs).sum()), self.drawn + ours.size

    def checks(self, thresholds: Thresholds) -> list[Check]:
        found = []
        for name in (*self.names, "kl"):
            curve, limit = self.curves[name], {"z": thresholds.z, "kl": thresholds.kl}.get(name, thresholds.mixture)
            worst = int(np.argmax(curve))
            over = next((i for i, value in enumerate(curve) if not value <= limit), None)
            unit = " nats per feature" if name == "kl" else ""
            note = f"worst at step {worst}, mean {np.mean(self.curves[f'{name} mean']):.2g}{unit}"
            note += "" if over is None else f"; first beyond the limit at step {over}"
            where = ""
            if over is not None and name in self.law.parts:
                where = f"feature {int(np.argmax(self.tables[name][over]))}"
            found.append(Check("teacher-forced", name, curve[worst], limit, note=note, step=over, where=where))
        absolute = None if thresholds.absolute == math.inf else thresholds.absolute
        note = f"largest of {', '.join(self.names[:-1])} and {self.names[-1]}"
        found.append(Check("teacher-forced", "absolute error", float(np.max(self.absolute)), absolute, note=note))
        note, same = f"of {self.drawn} drawn features", self.same / self.drawn
        found.append(Check("teacher-forced", "same component", same, thresholds.same_component, True, note))
        mean_kl = float(np.mean(self.tables["kl"]))
        found.append(Check("teacher-forced", "mean kl", mean_kl, thresholds.mean_kl, note="nats per feature"))
        return found


def _teacher_forced(
    report: ParityReport,
    pipeline: Pipeline,
    batch: Batch,
    tokens: Array,
    records: Sequence[StepRecord],
    thresholds: Thresholds,
) -> None:
    law = law_of(pipeline.config)
    found = Curves(law, law.picks(pipeline.config))
    walk = _walk(pipeline, batch, tokens)
    for record in records:
        try:
            z, features, have = next(walk)
        except FloatingPointError as error:
            step = record.step.index
            report.checks.append(Check("teacher-forced", "finite values", 0.0, 1.0, True, str(error), step=step))
            break
        # Reference rows go image by image, the deployed ones position by position.
        wanted = [record.z_cond] if record.z_uncond is None else [record.z_cond, record.z_uncond]
        want_z = np.concatenate([_by_position(value, len(batch)) for value in wanted])
        laws = [record.cond] if record.uncond is None else [record.cond, record.uncond]
        want = tuple(np.concatenate([_by_position(part, len(batch)) for part in both]) for both in zip(*laws, strict=True))
        found.add(z, have, want_z, want, features)
    report.curves |= found.curves
    report.tables |= found.tables
    report.histograms |= {"reference": found.picks[0].tolist(), "deployed": found.picks[1].tolist()}
    if found.drawn:
        report.checks += found.checks(thresholds)


def _counts(ours: Array, theirs: Array, components: int) -> Array:
    """(2, K): how often each component was picked."""
    return np.stack([np.bincount(side.ravel(), minlength=components) for side in (ours, theirs)])


def _by_position(value: torch.Tensor, batch: int) -> Array:
    """(B * P, ...) image by image -> (P * B, ...) position by position."""
    rows = value.reshape(batch, -1, *value.shape[1:])
    return np.asarray(rows.transpose(0, 1).flatten(0, 1).numpy())


def _free_running(
    report: ParityReport,
    pipeline: Pipeline,
    vae: AutoencoderKL,
    batch: Batch,
    tokens: torch.Tensor,
    records: Sequence[StepRecord],
    thresholds: Thresholds,
) -> bool:
    """-> whether the deployed pipeline made images at all."""
    config, add, noise = pipeline.config, report.checks.append, batch.noise
    try:
        settings = {key: value for key, value in report.settings.items() if key != "seed"}
        out = pipeline.generate(**settings, noise=noise)
        share, by_step, picks = _own_picks(pipeline, batch, out.tokens, records)
    except FloatingPointError as error:
        add(Check("free-running", "finite images", 0.0, 1.0, True, str(error)))
        return False
    want = decode_images(vae, tokens, config).numpy()
    have = np.stack([np.asarray(image) for image in out.images])
    report.images = {"reference": want, "deployed": have}
    apart = np.abs(out.tokens - tokens.numpy()).max(-1) > PARTED * max(1.0, float(tokens.abs().max()))  # (B, L)
    diverged: list[Array] = []
    for step in batch.plan:
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
    report.histograms["divergence step"] = [sum(step == index for step in parted) for index in range(len(batch.plan))]
    report.histograms |= {"own reference": picks[0].tolist(), "own deployed": picks[1].tolist()}
    report.curves["diverged"] = np.cumsum(np.stack(diverged), 0).astype(bool).mean(1).tolist()
    report.curves["same picks"] = by_step
    return True


def _own_picks(
    pipeline: Pipeline, batch: Batch, tokens: Array, records: Sequence[StepRecord]
) -> tuple[float, list[float], Array]:
    """Which component most probably drew each feature, each side's own features under its own law -> share that is the
    same, by outer step as well, and how often each component was picked, (2, K)."""
    law = law_of(pipeline.config)
    components = law.picks(pipeline.config)
    picks, shares, sizes = np.zeros((2, components), np.int64), [], []
    for record, (_, features, have) in zip(records, _walk(pipeline, batch, tokens), strict=True):
        theirs = law.pick(features, tuple(value[: len(features)] for value in have))
        want = tuple(_by_position(value, len(batch)) for value in record.cond)
        ours = law.pick(_by_position(record.features, len(batch)), want)
        picks += _counts(ours, theirs, components)
        shares.append(float((ours == theirs).mean()))
        sizes.append(ours.size)
    return float(np.average(shares, weights=sizes)), shares, picks


__all__ = ["add_distribution", "provenance", "run_parity"]
