"""Is the deployed model still the trained one? Levels of comparison, each with numbers and thresholds in sight.

1. *per graph*: same inputs, the step module in PyTorch against the graph on a backend;
2. *teacher-forced*: the reference's tokens are forced at every step, so that errors do not compound; z, the parameters
   of every draw's law and the divergence between the laws, step by step, with chained state (caches) on both sides;
3. *free-running*: both generate from the same noise; where they part, how often they pick the same component, and how
   far the images are apart; the same of an edit, half of whose tokens are given, where that is asked for;
4. *distribution* (`arinar.measure.distribution`): many images of each.

The reference is `arinar.sampler.sample` in float32. Where levels 2 and 3 exceed a limit, they get a control: the same
sampler in float64, along the same tokens and from the same noise. How far float32 is from that is nobody's fault.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from arinar.config import ArinarConfig
from arinar.export.bundle import check_match, weights_sha256
from arinar.export.graphs import HEADS, graph_specs
from arinar.export.spec import GraphSpec
from arinar.export.trace import run_module
from arinar.head import Draw
from arinar.law import Law, Parts, law_of
from arinar.model import Arinar, decode_images
from arinar.runtime.backends.engines import EngineError
from arinar.runtime.bundle import PHASES, BundleError, GraphInfo
from arinar.runtime.known import Known
from arinar.runtime.machine import machine
from arinar.runtime.pipeline import Pipeline
from arinar.runtime.request import Batch, Sampling
from arinar.sampler import StepRecord, sample
from arinar.schemes import SCHEMES
from arinar.vae import AutoencoderKL

from .checks import CONTROL_FACTOR, EDIT, KL_FACTOR, LEVELS, PARTED, THRESHOLDS, Check, ParityReport, Thresholds, least, most
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
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "torch-fidelity",
)


def run_parity(
    pipeline: Pipeline,
    model: Arinar,
    vae: AutoencoderKL,
    *,
    labels: Sequence[int | Mapping[int, float]],
    thresholds: Thresholds | None = None,
    distribution: int = 0,
    features: str | Features = "builtin",
    fid_stats: Path | None = None,
    reference: Mapping[str, Any] | None = None,
    control: bool = False,
    edit: bool = False,
    progress: Callable[[str], None] | None = None,
    **arguments: Any,
) -> ParityReport:
    """Compare a loaded bundle with the PyTorch model that it should be.

    ``arguments``: of sampling, as for `Pipeline.generate` (of a causal model, ``num_iter`` means nothing). ``distribution``
    > 0 adds the fourth level with so many samples of each; ``features`` and ``fid_stats`` as for
    `arinar.measure.distribution.compare`. ``thresholds``: default those of ``THRESHOLDS`` for the bundle's precision.
    ``reference``: what the report is to say about the checkpoint (its file, hash, ...).
    ``control``: compute the control even where levels 2 and 3 keep their limits; it takes several times as long as the
    reference. ``edit``: at level 3 also keep half of the reference's tokens, and let both generate the rest anew.

    Raises BundleError where checkpoint and bundle do not even have the same configuration, ValueError for a bad
    argument (before anything long begins), FloatingPointError where the checkpoint itself computes what is not finite.
    """
    say = progress or (lambda line: None)
    check_same(pipeline, model, vae)
    scheme = pipeline.bundle.manifest.scheme(pipeline.precision)
    thresholds = thresholds or THRESHOLDS[scheme]
    if model.config.outer == "causal":  # one token a step
        arguments.pop("num_iter", None)
    sampling = pipeline.resolve(list(labels), **arguments)
    settings = {"labels": sampling.classes.shown(), **sampling.settings(), "seed": sampling.seed}
    measure = None
    if distribution:
        if sampling.classes.weights is not None:
            raise ValueError("labels has images of several classes; distributions are compared of images of one class each")
        check_samples(distribution)
        measure = open_measure(features, fid_stats, model.config)
    report = ParityReport(pipeline.precision, pipeline.backend.name, settings, scheme=scheme, thresholds=thresholds)
    report.parts, report.draw = law_of(model.config).titles, law_of(model.config).draw
    report.provenance = provenance(pipeline, model, vae, reference)
    if report.provenance["exported from these weights"] == "no":
        report.notes.append("the bundle was exported from other weights than those it is compared with here")
    finite = _by_sample(report, pipeline, model, vae, sampling, thresholds, control, edit, say)
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


class Run(NamedTuple):
    """What the reference generated: tokens (B, L, D), and the steps on the way."""

    tokens: torch.Tensor
    records: list[StepRecord]


def _by_sample(
    report: ParityReport,
    pipeline: Pipeline,
    model: Arinar,
    vae: AutoencoderKL,
    sampling: Sampling,
    thresholds: Thresholds,
    control: bool,
    edit: bool,
    say: Callable[[str], None],
) -> bool:
    """Levels 1 to 3 -> whether the deployed pipeline made images at all."""
    batch = sampling.batch()
    say("level 1: each graph alone")
    _per_graph(report, pipeline, model, vae, thresholds, len(batch), len(batch) * max(step.count for step in batch.plan))

    def generate(model: Arinar, forced: torch.Tensor | None = None, known: Known | None = None) -> Run:
        records = list[StepRecord]()
        labels, law = sampling.classes.shown(), pipeline.bundle.manifest.law
        how: dict[str, Any] = {"noise": batch.noise, "record": records.append, "law": law, "forced": forced, "known": known}
        return Run(sample(model, labels, **sampling.settings(), **how), records)

    say(f"reference: PyTorch generates {len(batch)} images in {len(batch.plan)} steps")
    run = generate(model)
    _check_reference(run.records)
    say("level 2: the deployed graphs along the reference's trajectory")
    forced = _teacher_forced(report, pipeline, batch, run)
    say("level 3: the deployed pipeline on its own, same noise")
    trials = {"": (batch, run)}
    if edit:
        half = replace(sampling, known=half_known(run.tokens.numpy(), pipeline.config)).batch()
        trials[EDIT] = half, generate(model, known=half.known)
    free = {name: _free_running(report, pipeline, vae, *trial, name) for name, trial in trials.items()}

    held = tuple(report.changed_limits)

    def judged(beside: Curves | None = None, alone: Mapping[str, Parting] | None = None) -> list[Check]:
        found = forced.checks(thresholds, beside, held)
        for name, parting in free.items():
            checks = [] if parting is None else parting.checks(thresholds, (alone or {}).get(name), held)
            found += [replace(check, name=name + check.name) for check in checks]
        return found

    found = judged()
    if control or not all(check.passed for check in found):
        say("control: PyTorch in float64, along the same tokens and on its own")
        wide = copy.deepcopy(model).double()
        own = {name: generate(wide, known=made.known) for name, (made, _) in trials.items()}
        alone = {name: _control_parting(vae, *trials[name], own[name], pipeline.config) for name in trials}
        found = judged(_control(report, batch, run, generate(wide, run.tokens.double()), alone[""], pipeline.config), alone)
    # What was not finite was found on the way.
    report.checks = sorted(report.checks + found, key=lambda check: LEVELS.index(check.level))
    return free[""] is not None


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
        computed_otherwise = SCHEMES[report.scheme].runs and graph.bears_bfloat16
        if graph == shared.get(spec.name) and not computed_otherwise:  # it has fp32's limits, unless told otherwise
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
        limit = max(limit, 1.001 / 255)
        note = f"grey levels may differ by {int(min(1.0, limit) * 255)} of 255"
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

    @property
    def agreed(self) -> float:
        """Share of the drawn features that both sides ascribe to the same component."""
        return self.same / self.drawn

    @property
    def mean_kl(self) -> float:
        return float(np.mean(self.tables["kl"]))

    def checks(self, thresholds: Thresholds, control: Curves | None = None, held: Sequence[str] = ()) -> list[Check]:
        """``control``: the same of float32 against float64. ``held``: limits that were set by hand, which it never widens."""
        if not self.drawn:
            return []
        found = [self._check(name, thresholds, control, held) for name in (*self.names, "kl")]
        absolute = None if thresholds.absolute == math.inf else thresholds.absolute
        note = f"largest of {', '.join(self.names[:-1])} and {self.names[-1]}"
        overall = Check("teacher-forced", "absolute error", float(np.max(self.absolute)), absolute, note=note)
        note, limit = f"of {self.drawn} drawn features", thresholds.same_component
        same = Check("teacher-forced", "same component", self.agreed, limit, True, note)
        mean_kl = Check("teacher-forced", "mean kl", self.mean_kl, thresholds.mean_kl, note=f"nats per {self.law.draw}")
        if control is not None:
            largest = float(np.max(control.absolute))
            overall = overall.beside(largest, most(thresholds.absolute, largest), "absolute" in held)
            same = same.beside(control.agreed, least(control.agreed), "same_component" in held)
            allowed = most(thresholds.mean_kl, control.mean_kl, KL_FACTOR)
            mean_kl = mean_kl.beside(control.mean_kl, allowed, "mean_kl" in held)
        return [*found, overall, *([same] if self.picks.shape[1] > 1 else []), mean_kl]

    def _check(self, name: str, thresholds: Thresholds, control: Curves | None, held: Sequence[str]) -> Check:
        """Of a curve: every step has its own limit, and the worst of them is told."""
        curve, kind = self.curves[name], name if name in ("z", "kl") else "mixture"
        limit: float = getattr(thresholds, kind)
        limits = [limit] * len(curve)
        if control is not None and kind not in held:
            factor = KL_FACTOR if name == "kl" else CONTROL_FACTOR
            limits = [most(limit, control.curves[name][step], factor) for step in range(len(curve))]
        beyond = [value / max(allowed, 1e-30) for value, allowed in zip(curve, limits, strict=True)]  # a limit may be 0
        own = np.array(curve) <= limit
        worst = int(np.argmax(curve if own.all() else np.where(own, -1.0, beyond)))
        over = next((i for i, value in enumerate(curve) if not value <= limits[i]), None)
        unit = f" nats per {self.law.draw}" if name == "kl" else ""
        note = f"worst at step {worst}, mean {np.mean(self.curves[f'{name} mean']):.2g}{unit}"
        note += "" if over is None else f"; first beyond the limit at step {over}"
        where = ""
        if over is not None and name in self.law.parts:
            where = f"{self.law.draw} {int(np.argmax(self.tables[name][over]))}"
        check = Check("teacher-forced", name, curve[worst], limit, note=note, step=over, where=where)
        return check if control is None else check.beside(control.curves[name][worst], limits[worst])


def _teacher_forced(report: ParityReport, pipeline: Pipeline, batch: Batch, run: Run) -> Curves:
    """The deployed graphs against the reference along its tokens."""
    law = law_of(pipeline.config)
    found = Curves(law, law.picks(pipeline.config))
    walk = _walk(pipeline, batch, run.tokens.numpy())
    for record in run.records:
        try:
            z, features, have = next(walk)
        except FloatingPointError as error:
            step = record.step.index
            report.checks.append(Check("teacher-forced", "finite values", 0.0, 1.0, True, str(error), step=step))
            break
        found.add(z, have, *_recorded(record, len(batch)), features)
    report.curves |= found.curves
    report.tables |= found.tables
    report.histograms |= {"reference": found.picks[0].tolist(), "deployed": found.picks[1].tolist()}
    return found


def _recorded(record: StepRecord, batch: int) -> tuple[Array, Parts]:
    """z and the parts of the law as `_walk` has them: position by position (the reference's rows go image by image),
    conditional ones first."""
    wanted = [record.z_cond] if record.z_uncond is None else [record.z_cond, record.z_uncond]
    laws = [record.cond] if record.uncond is None else [record.cond, record.uncond]
    z = np.concatenate([_by_position(value, batch) for value in wanted])
    return z, tuple(np.concatenate([_by_position(part, batch) for part in both]) for both in zip(*laws, strict=True))


def _counts(ours: Array, theirs: Array, components: int) -> Array:
    """(2, K): how often each component was picked."""
    return np.stack([np.bincount(side.ravel(), minlength=components) for side in (ours, theirs)])


def _by_position(value: torch.Tensor, batch: int) -> Array:
    """(B * P, ...) image by image -> (P * B, ...) position by position."""
    rows = value.reshape(batch, -1, *value.shape[1:])
    return np.asarray(rows.transpose(0, 1).flatten(0, 1).numpy())


class Side(NamedTuple):
    """A generation on its own: tokens (B, L, D), images (B, H, W, 3) uint8, and by outer step the component that most
    probably drew each feature, under this side's own law (P * B, D)."""

    tokens: Array
    images: Array
    picks: list[Array]


class Parting:
    """Where two generations from the same noise part: what level 3 gathers."""

    def __init__(self, batch: Batch, want: Side, have: Side, components: int) -> None:
        self.apart = np.abs(have.tokens - want.tokens).max(-1) > PARTED * _scale(want.tokens)  # (B, L)
        anew = batch.noise.order[:, : batch.plan[0].masked]
        self.agree = float(1 - np.take_along_axis(self.apart, anew, 1).mean())  # of the tokens that were generated
        positions = (batch.noise.order[:, step.remaining : step.masked] for step in batch.plan)
        diverged = np.stack([np.take_along_axis(self.apart, now, 1).any(1) for now in positions])  # (S, B)
        self.diverged: list[float] = np.logical_or.accumulate(diverged, 0).mean(1).tolist()
        first = np.where(diverged.any(0), diverged.argmax(0), -1)
        self.first: list[int] = first[first >= 0].tolist()  # of the images that part
        self.first_counts = [self.first.count(index) for index in range(len(batch.plan))]
        grey = np.abs(have.images.astype(int) - want.images.astype(int)).max((1, 2, 3))
        self.same_images = float((grey <= 1).mean())
        self.psnr = psnr(have.images, want.images)
        pairs = list(zip(want.picks, have.picks, strict=True))
        self.picks: Array = sum((_counts(*pair, components) for pair in pairs), np.zeros((2, components), np.int64))
        self.by_step = [float((ours == theirs).mean()) for ours, theirs in pairs]
        self.same_picks = float(np.average(self.by_step, weights=[ours.size for ours, _ in pairs]))

    def checks(self, thresholds: Thresholds, control: Parting | None = None, held: Sequence[str] = ()) -> list[Check]:
        """As `Curves.checks`."""
        began, images = min(self.first, default=None), len(self.psnr)
        note = "no image parts" if began is None else f"{len(self.first)} of {images} images part, the first at step {began}"
        median = float(np.median(self.psnr))
        over = next((i for i, value in enumerate(self.by_step) if value < thresholds.same_picks), None)
        named = (
            ("images within 1 grey level", self.same_images, thresholds.same_images, note),
            ("tokens that agree", self.agree, 0.0, f"to {PARTED:g} of the largest value"),
            (
                "same picks",
                self.same_picks,
                thresholds.same_picks,
                f"each side's own draws, {int(self.picks[0].sum())} features",
            ),
            (
                "median PSNR, dB",
                median,
                thresholds.psnr,
                f"lowest {self.psnr.min():.3g}; the same image counts as {MAX_PSNR:g}",
            ),
        )
        found = [Check("free-running", name, value, limit or None, True, note) for name, value, limit, note in named]
        if control is not None:
            found = control.beside(found, held)
        steps = {"images within 1 grey level": began, "same picks": over}
        if self.picks.shape[1] == 1:  # there is nothing to pick
            found = [check for check in found if check.name != "same picks"]
        return [check if check.passed else replace(check, step=steps.get(check.name)) for check in found]

    def beside(self, found: Sequence[Check], held: Sequence[str]) -> list[Check]:
        """Another's checks beside this, the control."""
        shares = (self.same_images, self.agree, self.same_picks)
        ratio = float(np.median(self.psnr))
        allowed = [*map(least, shares), ratio - 20 * math.log10(CONTROL_FACTOR)]
        # Images may part as often as that; one that has parted goes its own way, and its picks and PSNR with it.
        together = least(1 - self.diverged[-1])
        allowed[2] = min(allowed[2], together)
        allowed[3] = allowed[3] if together > 0.5 else 0.0
        fixed = (field in held for field in ("same_images", "", "same_picks", "psnr"))
        given = zip(found, (*shares, ratio), allowed, fixed, strict=True)
        return [check.beside(value, limit, keep) for check, value, limit, keep in given]


def half_known(tokens: Array, config: ArinarConfig) -> Known:
    """Tokens (B, L, D) of which the first half of the generation order is known (in raster order the upper half)."""
    mask = np.zeros(tokens.shape[:2], np.bool_)
    mask[:, list(config.generation_order[: config.seq_len // 2])] = True
    return Known(np.ascontiguousarray(tokens, np.float32), mask)


def _free_running(
    report: ParityReport, pipeline: Pipeline, vae: AutoencoderKL, batch: Batch, run: Run, name: str
) -> Parting | None:
    """The deployed pipeline on its own against the reference; None where it made no images. Pictures and curves of the
    trial without a name go into the report."""
    law = law_of(pipeline.config)
    want = _side(law, vae, batch, run, pipeline.config)
    try:
        settings = {key: value for key, value in report.settings.items() if key != "seed"}
        out = pipeline.generate(**settings, noise=batch.noise, known=batch.known)
        walk = _walk(pipeline, batch, out.tokens)
        picks = [law.pick(features, tuple(part[: len(features)] for part in have)) for _, features, have in walk]
    except FloatingPointError as error:
        report.checks.append(Check("free-running", f"{name}finite images", 0.0, 1.0, True, str(error)))
        return None
    have = Side(out.tokens, np.stack([np.asarray(image) for image in out.images]), picks)
    found = Parting(batch, want, have, law.picks(pipeline.config))
    if not name:
        report.images = {"reference": want.images, "deployed": have.images}
        report.histograms["divergence step"] = found.first_counts
        report.histograms |= {"own reference": found.picks[0].tolist(), "own deployed": found.picks[1].tolist()}
        report.curves |= {"diverged": found.diverged, "same picks": found.by_step}
    return found


def _side(law: Law, vae: AutoencoderKL, batch: Batch, run: Run, config: ArinarConfig) -> Side:
    """What the reference generated."""
    picks = [
        law.pick(_by_position(record.features, len(batch)), tuple(_by_position(part, len(batch)) for part in record.cond))
        for record in run.records
    ]
    return Side(run.tokens.numpy(), decode_images(vae, run.tokens, config).numpy(), picks)


def _control(report: ParityReport, batch: Batch, run: Run, forced: Run, parting: Parting, config: ArinarConfig) -> Curves:
    """The reference in float32 (``run``) against itself in float64 along the same tokens (``forced``); ``parting``: on its
    own. Both go into the report."""
    law, size = law_of(config), len(batch)
    curves = Curves(law, law.picks(config))
    for record, wide in zip(run.records, forced.records, strict=True):
        curves.add(*_recorded(record, size), *_recorded(wide, size), _by_position(record.features, size))
    report.control = {
        "curves": curves.curves | {"diverged": parting.diverged, "same picks": parting.by_step},
        "tables": curves.tables,
        "histograms": {"divergence step": parting.first_counts},
    }
    return curves


def _control_parting(vae: AutoencoderKL, batch: Batch, run: Run, wide: Run, config: ArinarConfig) -> Parting:
    """The reference in float32 (``run``) against itself in float64 (``wide``), each on its own."""
    law = law_of(config)
    sides = _side(law, copy.deepcopy(vae).double(), batch, wide, config), _side(law, vae, batch, run, config)
    return Parting(batch, *sides, law.picks(config))


__all__ = ["add_distribution", "provenance", "run_parity"]
