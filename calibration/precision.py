"""From a recording to a precision map: which layers bear few bits, at which ranges, and what that costs.

The cost of a map is the divergence KL(fp32 || quantised), in nats per feature, between the mixtures that features are
drawn from, over steps of real trajectories with the reference's features forced: what quantisation does to the law
that the model samples from, before a single number is drawn.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arinar.config import ArinarConfig
from arinar.export.layers import Graph, Layer, LayerPlan, layer_bytes, layer_graphs, smooth_scale, total_bytes
from arinar.files import check_writable, write_text
from arinar.law import Parts, law_of
from arinar.runtime.backends.cpu import Buffers, CpuBackend
from arinar.runtime.bundle import Bundle, Defaults, GraphInfo
from arinar.runtime.head import Head, head_class
from arinar.runtime.labels import unmixed
from arinar.schemes import QUANTIZED, SCHEMES

from .collect import FP16_MAX, check_arguments, collect, open_session
from .ranges import METHODS
from .recording import CalibrationError, Recording

Array = npt.NDArray[Any]

FORMAT_VERSION = 1
#: What the search may spend by default, in nats per feature.
DEFAULT_BUDGET_KL = 3e-4
SMOOTH_ALPHA = 0.5
# Layers whose ranges are chosen by trial, and the shares of the largest smoothed magnitude that are tried.
REFINED, SHARES = 8, (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
# An activation larger than this share of float16's range is called unsafe: other images reach further.
FP16_MARGIN = 0.25


@dataclass(frozen=True)
class Cost:
    """Of a precision map: divergence per draw (mean, and of the worst one in a hundred), largest error of z."""

    kl: float
    kl_worst: float
    z_error: float


class SessionBackend(CpuBackend):
    """Runs graphs in sessions that are given by name."""

    def __init__(self, bundle: Bundle, sessions: Mapping[str, Any]) -> None:
        super().__init__(bundle, "fp32", threads=1)
        self._sessions = sessions

    def _load(self, graph: GraphInfo, threads: int) -> Any:
        return self._sessions[graph.name]

    def _call(self, loaded: Any, graph: GraphInfo, inputs: Buffers, outputs: list[str]) -> list[Array]:
        return list(loaded.run(outputs, dict(inputs)))


class Evaluator:
    """Runs the recorded steps through quantised copies of the graphs and compares with fp32."""

    def __init__(self, bundle: Bundle, recording: Recording, threads: int | None = None) -> None:
        self.bundle, self.config, self.threads = bundle, bundle.manifest.config, threads
        self.infos = bundle.manifest.precision_graphs("fp32")
        self.graphs = {n: Graph.load(bundle.graph_path(self.infos[n])) for n in layer_graphs(self.infos)}
        self.layers: dict[str, Layer] = {}
        for graph in self.graphs.values():
            self.layers |= graph.layers
        self.samples = recording.samples
        if not self.samples:
            raise CalibrationError("the recording holds no steps; record more images")
        self.tokens = np.concatenate([sample.tokens for sample in self.samples])  # (N, D)
        self._sessions = {name: open_session(g.model, g.folder, threads) for name, g in self.graphs.items()}
        self._z = self._outer(self._sessions)
        self._law = self._draws(self._sessions, self._z)

    def cost(self, plans: Mapping[str, LayerPlan]) -> Cost:
        """What a precision map costs. Only the parts of the model that it touches run again."""
        touched = {name for name, graph in self.graphs.items() if any(layer in graph.layers for layer in plans)}
        sessions = dict(self._sessions)
        for name in touched:
            graph = self.graphs[name]
            chosen = {layer: plan for layer, plan in plans.items() if layer in graph.layers}
            sessions[name] = open_session(graph.quantized(chosen), graph.folder, self.threads)
        outer = any(self.infos[name].phase == "outer" for name in touched)
        z = self._outer(sessions) if outer else self._z
        kl = law_of(self.config).kl(self._law, self._draws(sessions, z))
        return Cost(float(kl.mean()), float(np.quantile(kl, 0.99)), float(np.abs(z - self._z).max()))

    def _draws(self, sessions: Mapping[str, Any], z: Array) -> Parts:
        """z (N, C) and the recorded tokens -> the law of every draw."""
        backend = SessionBackend(self.bundle, sessions)
        head: Head = head_class(self.config)(backend, self.infos, self.config, "stepwise")
        return head.law(z, self.tokens)

    def _outer(self, sessions: Mapping[str, Any]) -> Array:
        """z (N, C) of all samples, one after another."""
        found = []
        for sample in self.samples:
            feed = dict(sample.feed)
            if sample.graph == "outer_step" and "outer_prefill" in sessions:
                # The buffer's part of the cache comes from the other graph, which may be quantised too.
                prefill = sessions["outer_prefill"]
                names = [output.name for output in prefill.get_outputs()]
                known = {"labels": sample.labels, **unmixed(len(sample.labels))}
                given = {value.name: known[value.name] for value in prefill.get_inputs()}
                made = dict(zip(names, prefill.run(names, given), strict=True))
                for name in names:
                    if name.startswith("present."):
                        past = name.replace("present", "past_key_values", 1)
                        feed[past] = feed[past].copy()
                        feed[past][:, :, : made[name].shape[2]] = made[name]
            (z,) = sessions[sample.graph].run(["z"], feed)
            if sample.rows.max(initial=0) >= len(z):
                raise CalibrationError(f"a recorded sample has rows beyond the {len(z)} of its step; calibrate again")
            found.append(z[sample.rows])
        return np.concatenate(found)


def layer_plan(layer: Layer, recording: Recording, scheme: str, method: str) -> LayerPlan:
    """How to quantise a layer with the recorded ranges. ``method``: one of ``METHODS``, or "smooth"."""
    if SCHEMES[scheme].ranges == "dynamic":
        return LayerPlan(scheme)
    statistics = recording.layers[layer.name]
    if method == "smooth":
        smooth = smooth_scale(statistics.channel_absmax, layer.weight, SMOOTH_ALPHA)
        return LayerPlan(scheme, float((statistics.channel_absmax / smooth).max()), smooth)
    return LayerPlan(scheme, statistics.ranges()[method])


def methods_of(scheme: str) -> tuple[str, ...]:
    """Ways to choose ranges that make sense for a scheme. (A float format wastes nothing on a long tail.)"""
    known = SCHEMES[scheme]
    if known.ranges == "dynamic":
        return ("dynamic",)
    return (*METHODS, "smooth") if known.integers else ("absmax", "smooth")


def sensitivity(
    evaluator: Evaluator, plans: Mapping[str, LayerPlan], progress: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """Quantise one layer at a time; the costliest first, each with what it would save."""
    rows = []
    for number, (name, plan) in enumerate(plans.items(), 1):
        cost, layer = evaluator.cost({name: plan}), evaluator.layers[name]
        rows.append(
            {
                "layer": name,
                "kl": cost.kl,
                "kl_worst": cost.kl_worst,
                "z_error": cost.z_error,
                "bytes_saved": layer_bytes(layer, None) - layer_bytes(layer, plan.scheme),
            }
        )
        if progress:
            progress(f"[{number}/{len(plans)}] {name}: KL {cost.kl:.2e}")
    return sorted(rows, key=lambda row: -row["kl"])


def refine(
    evaluator: Evaluator,
    recording: Recording,
    plans: Mapping[str, LayerPlan],
    ranking: list[dict[str, Any]],
    scheme: str,
    progress: Callable[[str], None] | None = None,
) -> tuple[dict[str, LayerPlan], list[dict[str, Any]]]:
    """Choose the ranges of the costliest layers by what each costs alone, instead of by one rule for all.

    -> plans, and the ranking with the new costs. Only for schemes whose steps are even (a float format's are not).
    """
    chosen, rows = dict(plans), [dict(row) for row in ranking]
    for row in rows[:REFINED]:
        layer = evaluator.layers[row["layer"]]
        smooth = layer_plan(layer, recording, scheme, "smooth")
        candidates = [layer_plan(layer, recording, scheme, method) for method in METHODS]
        candidates += [replace(smooth, absmax=share * float(smooth.absmax or 0)) for share in SHARES]
        for plan in candidates:
            cost = evaluator.cost({layer.name: plan})
            if cost.kl < row["kl"]:
                chosen[layer.name] = plan
                row |= {"kl": cost.kl, "kl_worst": cost.kl_worst, "z_error": cost.z_error}
        if progress:
            progress(f"{layer.name}: KL {row['kl']:.2e} with ranges by trial")
    return chosen, sorted(rows, key=lambda row: -row["kl"])


def search(
    evaluator: Evaluator, plans: Mapping[str, LayerPlan], ranking: Sequence[Mapping[str, Any]], budget_kl: float
) -> tuple[dict[str, LayerPlan], Cost]:
    """The smallest map found whose cost is within the budget -> plans of the layers to quantise, their joint cost.

    Layers leave the map in order of KL per byte saved until the budget is met (bisection, as costs add up), then those
    that still fit, largest saving first, come back.
    """
    order = [row["layer"] for row in sorted(ranking, key=lambda row: -row["kl"] / max(row["bytes_saved"], 1))]

    def without(count: int) -> dict[str, LayerPlan]:
        left_out = set(order[:count])
        return {name: plan for name, plan in plans.items() if name not in left_out}

    cost = evaluator.cost(plans)
    if cost.kl <= budget_kl:
        return dict(plans), cost
    low, high = 0, len(order)  # `low` layers left out is too few, `high` is enough: nothing is quantised then
    while high - low > 1:
        middle = (low + high) // 2
        if evaluator.cost(without(middle)).kl <= budget_kl:
            high = middle
        else:
            low = middle
    chosen = without(high)
    saving = {row["layer"]: row["bytes_saved"] for row in ranking}
    for name in sorted(order[:high], key=lambda name: -saving[name]):
        tried = {key: plans[key] for key in plans if key in chosen or key == name}
        if evaluator.cost(tried).kl <= budget_kl:
            chosen = tried
    return chosen, evaluator.cost(chosen) if chosen else Cost(0.0, 0.0, 0.0)


def check(
    config: ArinarConfig,
    defaults: Defaults,
    out: str | os.PathLike[str],
    *,
    budget_kl: float = DEFAULT_BUDGET_KL,
    precisions: Sequence[str] = QUANTIZED,
    **recording_arguments: Any,
) -> None:
    """Raise for whatever :func:`calibrate` would not accept, before anything long begins."""
    for name in precisions:
        if name not in QUANTIZED:
            raise ValueError(f"precision is {name!r}; choose from {', '.join(QUANTIZED)}")
    if not 0 < budget_kl < math.inf:
        raise ValueError(f"budget_kl is {budget_kl}; expected a number of nats above 0, for example {DEFAULT_BUDGET_KL:g}")
    check_arguments(config, defaults, **recording_arguments)
    check_out(out)


def check_out(out: str | os.PathLike[str]) -> None:
    """Raise ValueError where :func:`calibrate` could not write its file, or the recorded inputs beside it."""
    out = Path(out)
    if out.suffix == ".npz":
        raise ValueError(f"out is {out}; recorded inputs go into a file of that name: give the JSON file another suffix")
    check_writable(out)
    check_writable(out.with_suffix(".npz"))


def calibrate(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    num_images: int = 64,
    budget_kl: float = DEFAULT_BUDGET_KL,
    precisions: Sequence[str] = QUANTIZED,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
    **recording_arguments: Any,
) -> dict[str, Any]:
    """Record, measure, search; write a calibration file that `arinar export` reads -> its content.

    Parameters
    ----------
    bundle : folder of a bundle with fp32 graphs.
    out : JSON file to write. Recorded inputs are kept beside it (``.npz``); an interrupted run leaves that file too
        and goes on from it.
    budget_kl : largest mean divergence per feature, in nats, of a precision map.
    precisions : which of `arinar.schemes.QUANTIZED` to rank layers and search a map for; () only records.
    recording_arguments : as for :func:`arinar.calibration.collect.check_arguments`.

    Raises CalibrationError, ValueError (BundleError for a damaged bundle), or FloatingPointError (which names layer and
    step).
    """
    say = progress or (lambda line: None)
    opened, out = Bundle.open(bundle), Path(out)
    manifest = opened.manifest
    check(
        manifest.config,
        manifest.defaults,
        out,
        budget_kl=budget_kl,
        precisions=precisions,
        num_images=num_images,
        **recording_arguments,
    )
    opened.verify(sorted({name for graph in manifest.precision_graphs("fp32").values() for name in graph.files}))
    kept = out.with_suffix(".npz")
    recording = collect(opened, num_images=num_images, partial=kept, threads=threads, progress=say, **recording_arguments)
    evaluator = Evaluator(opened, recording, threads)
    result: dict[str, Any] = {
        "kind": "arinar calibration",
        "format_version": FORMAT_VERSION,
        "settings": recording.settings,
        "recorded_inputs": kept.name,
        "activations": _activations(recording),
        "layers": {name: _layer_entry(layer, recording) for name, layer in evaluator.layers.items()},
        "maps": {},
    }
    for scheme in precisions:
        result["maps"][scheme] = _precision_map(evaluator, recording, scheme, budget_kl, say)
    write_text(out, to_json(result))
    return result


def _precision_map(
    evaluator: Evaluator, recording: Recording, scheme: str, budget_kl: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """The best way to choose ranges, the ranking of the layers, and the smallest map within the budget."""
    wide = [layer for layer in evaluator.layers.values() if layer.wide]
    by_method = {}
    for method in methods_of(scheme):
        everything = {layer.name: layer_plan(layer, recording, scheme, method) for layer in wide}
        by_method[method] = evaluator.cost(everything)
        say(f"{scheme}, all layers, ranges by {method}: KL {by_method[method].kl:.2e}")
    best = min(by_method, key=lambda name: by_method[name].kl)
    plans = {layer.name: layer_plan(layer, recording, scheme, best) for layer in wide}
    ranking = sensitivity(evaluator, plans, say)
    known = SCHEMES[scheme]
    refined = known.integers and known.ranges == "static"
    if refined:
        plans, ranking = refine(evaluator, recording, plans, ranking, scheme, say)
    chosen, cost = search(evaluator, plans, ranking, budget_kl)
    fp32 = [name for name in evaluator.layers if name not in chosen]
    say(f"{scheme}: {len(chosen)} of {len(evaluator.layers)} layers quantised, KL {cost.kl:.2e}")
    return {
        "method": best,
        "budget_kl": budget_kl,
        "kl": cost.kl,
        "kl_worst": cost.kl_worst,
        "z_error": cost.z_error,
        "kl_by_method_all_layers": {name: value.kl for name, value in by_method.items()},
        "refined": refined,
        "bytes": total_bytes(evaluator.layers.values(), chosen),
        "bytes_fp32": total_bytes(evaluator.layers.values(), {}),
        "quantized": {name: _plan_entry(plan) for name, plan in chosen.items()},
        "fp32": fp32,
        "ranking": ranking,
        # Whatever the budget: how each layer would be quantised.
        "all_layers": {name: _plan_entry(plan) for name, plan in plans.items()},
    }


def _plan_entry(plan: LayerPlan) -> dict[str, Any]:
    """``smooth_alpha`` stands for the channel scales: they follow from ``absmax_per_channel`` and the weight."""
    entry: dict[str, Any] = {} if plan.absmax is None else {"absmax": _round(plan.absmax)}
    return entry | ({} if plan.smooth is None else {"smooth_alpha": SMOOTH_ALPHA})


def _layer_entry(layer: Layer, recording: Recording) -> dict[str, Any]:
    statistics = recording.layers[layer.name]
    count = max(statistics.count, 1)
    mean = statistics.total / count
    return {
        "weight": list(layer.weight.shape),
        "values": statistics.count,
        "min": _round(statistics.low if statistics.count else 0),
        "max": _round(statistics.high if statistics.count else 0),
        "mean": _round(mean),
        "std": _round(float(np.sqrt(max(statistics.squares / count - mean**2, 0)))),
        "ranges": {name: _round(value) for name, value in statistics.ranges().items()},
        "absmax_per_step": [_round(v) for v in statistics.step_absmax],
        # What `arinar export` makes channel scales of.
        "absmax_per_channel": [_round(v) for v in statistics.channel_absmax],
    }


def _activations(recording: Recording) -> dict[str, Any]:
    """Largest magnitude of every float tensor, and what that says about float16."""
    found: dict[str, Any] = {"fp16_max": FP16_MAX, "fp16_limit": FP16_MARGIN * FP16_MAX, "graphs": {}}
    unsafe: list[dict[str, Any]] = []
    worst = (0.0, "", "", 0)
    for graph, maxima in recording.maxima.items():
        names = recording.tensors[graph]
        peaks = maxima.max(1)
        found["graphs"][graph] = {name: _round(peak) for name, peak in zip(names, peaks, strict=True)}
        unsafe += [
            {"graph": graph, "tensor": names[i], "step": int(maxima[i].argmax()), "value": _round(peaks[i])}
            for i in np.nonzero(peaks >= FP16_MARGIN * FP16_MAX)[0]
        ]
        index = int(peaks.argmax())
        if peaks[index] > worst[0]:
            worst = (float(peaks[index]), graph, names[index], int(maxima[index].argmax()))
    found["largest"] = {"value": _round(worst[0]), "graph": worst[1], "tensor": worst[2], "step": worst[3]}
    found["fp16_safe"], found["fp16_unsafe"] = not unsafe, unsafe
    return found


def _round(value: Any) -> float:
    """Four significant digits, upwards for ranges' sake: what was seen must stay inside."""
    number = float(value)
    rounded = float(f"{number:.4g}")
    if abs(rounded) < abs(number):
        rounded = float(f"{number * 1.0005:.4g}")
    return rounded


def to_json(result: Mapping[str, Any]) -> str:
    """Indented, but with lists of numbers on one line."""
    import re

    text = json.dumps(result, indent=1, allow_nan=False)
    return re.sub(r"\[[\s\d.eE+,-]*\]", lambda m: " ".join(m[0].split()), text) + "\n"
