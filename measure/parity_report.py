"""A parity report as one HTML file: opens from disk, needs no network; plots are inline SVG, images inline PNG."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from arinar.files import write_text

from .charts import COLORS, bar_plot, escaped, heat_map, line_plot, page
from .checks import CONTROL_FACTOR, KL_FACTOR, LEVELS, PARTED, Check, ParityReport, Thresholds
from .distances import MAX_PSNR, psnr

Array = npt.NDArray[Any]

# What each level is called, and what it does.
TITLES = {
    "graph": (
        "each graph alone",
        "The same random inputs go to the PyTorch module and to the deployed graph. Largest error of any output, relative "
        "to the output's largest value where that is above 1.",
    ),
    "teacher-forced": (
        "along PyTorch's trajectory",
        "PyTorch's tokens are forced at every outer step, so that errors do not add up; caches are each side's own.",
    ),
    "free-running": ("each on its own", "Both generate images from the same noise, each going on from its own tokens."),
    "distribution": (
        "many images",
        "Do the deployed images follow the same law? Their distance from a PyTorch run with another seed, beside the "
        "distance between two PyTorch runs with different seeds (the yardstick): a right model is at about 1.",
    ),
}
#: What a pass of each level shows, and what it does not.
SHOWS = {
    "graph": "A pass shows that every graph computes what its module does; not that they are put together rightly.",
    "teacher-forced": (
        "A pass shows that at every step of a real run z and the law of every draw are PyTorch's; not what becomes of errors "
        "that add up."
    ),
    "free-running": (
        "A pass shows that these labels and this seed give the same pictures; not other labels and seeds, nor whether the "
        "pictures are good."
    ),
    "distribution": (
        "A pass shows that the deployed images follow the same law as far as so many images and these features tell; not "
        "rare faults, nor what the features do not see."
    ),
}
# Names of checks in full; others are shown as they are.
CHECKS = {
    "kl": "KL divergence: worst draw",
    "mean kl": "KL divergence: mean of all draws",
    "absolute error": "largest absolute error",
    "MMD, p-value": "mean discrepancy (MMD): p-value",
    "the same, with equal noise": "the same, made from equal noise",
    "same component": "features that both ascribe to the same component",
    "same picks": "picks of the same component",
}
SHARES = {
    "same component",
    "same picks",
    "images within 1 grey level",
    "tokens that agree",
    "classifier agreement lost",
}
# What the control is called in legends.
CONTROL = "PyTorch, float32 against float64"
# Images per row block, and how much the difference is amplified.
SHOWN, AMPLIFY = 10, 8

STYLE = """
.verdict { border-radius: 8px; padding: 14px 18px; margin: 16px 0; font-size: 17px; }
.verdict ul { margin: 8px 0 0; padding-left: 20px; font-size: 15px; }
.pass { background: #e6f6ea; border: 1px solid #8fd3a1; } .fail { background: #fdeaea; border: 1px solid #e69a9a; }
table { width: 100%; }
table.checks { table-layout: fixed; } col.name { width: 31%; } col.number { width: 11%; } col.limit { width: 14%; }
col.verdict { width: 8%; }
th, td { text-align: left; padding: 5px 10px 5px 0; vertical-align: top; }
td.number { white-space: nowrap; } td.note { color: #57606a; font-size: 13px; } table.facts td:first-child { width: 27%; }
.ok { color: #1a7f37; font-weight: 600; } .bad { color: #c01c28; font-weight: 700; } tr.failed { background: #fdeaea; }
.plots { display: grid; margin: 18px 0; grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); gap: 20px 16px; }
figure { margin: 0; min-width: 0; } figcaption { min-height: 42px; } figcaption div { color: #57606a; }
table.images { width: auto; margin: 14px 0; }
.images td, .images th { border: 0; padding: 2px 6px 2px 0; font-size: 13px; vertical-align: middle; }
.images img { image-rendering: pixelated; display: block; }
.images th { white-space: nowrap; padding-right: 14px; } code { font-size: 12px; word-break: break-all; }
details { margin-top: 8px; } summary { cursor: pointer; color: #57606a; }
"""


def write_report(report: ParityReport, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Write the report's HTML file -> its path. Raises OSError where it cannot be written."""
    return write_text(path, render(report, title))


def render(report: ParityReport, title: str | None = None) -> str:
    name = title or f"Parity: {report.provenance.get('bundle', 'bundle')}, {report.precision} on {report.backend}"
    parts = [_verdict(report), _settings(report)]
    for number, level in enumerate(LEVELS, 1):
        heading, why = TITLES[level]
        checks = [check for check in report.checks if check.level == level]
        parts.append(f"<h2>Level {number}: {escaped(heading)}</h2>")
        if not checks:
            asked = level != "distribution" or any(note.startswith("level 4") for note in report.notes)
            parts.append(f"<p>Not run{'' if asked else ' (<code>arinar parity --distribution N</code> runs it)'}.</p>")
            continue
        parts.append(f"<p>{escaped(why)} {escaped(SHOWS[level])}</p>{_checks(checks, report)}")
        if level == "teacher-forced":
            parts.append(_teacher_forced_plots(report))
        if level == "free-running":
            parts.append(_images(report) + _free_running_plots(report))
    parts.append(_provenance(report))
    return page(name, parts, STYLE)


def _verdict(report: ParityReport) -> str:
    limits = f"the limits of {report.precision}{', as changed here' if report.changed_limits else ''}"
    first, notes = report.first_failure, report.remarks
    if first is None:
        state, lead = "pass", f"Passed: the deployed model is the trained one, within {limits}."
        text = f"All {report.limited} checks passed."
        if report.widened:
            text += f" Of {len(report.widened)} the limit was widened: float32 itself parts that far on these weights."
    else:
        state, lead = "fail", f"Failed: the deployed model is not the trained one within {limits}."
        text = f"{len(report.failed)} of {report.limited} checks failed."
        value = f" ({_number(first, first.value)}, {_limit(first)})" if math.isfinite(first.value) else ""
        notes.insert(0, f"first divergence: {report.first_divergence}{value}")
    for number, level in enumerate(LEVELS, 1):
        if all(check.level != level for check in report.checks) and not any(f"level {number}" in n for n in report.notes):
            notes.append(f"level {number} ({TITLES[level][0]}) was not run")
    items = "".join(f"<li>{escaped(note[:1].upper() + note[1:])}.</li>" for note in notes)
    return f"<div class='verdict {state}'><b>{escaped(lead)}</b> {text}{f'<ul>{items}</ul>' if items else ''}</div>"


def _settings(report: ParityReport) -> str:
    shown = "; ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in report.settings.items())
    return f"<p>{escaped(shown)}</p>"


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 60 else text[:57] + "..."


def _number(check: Check, value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    if check.quantity.startswith("finite"):
        return "yes" if value else "no"
    return f"{100 * value:.4g} %" if check.quantity in SHARES else f"{value:.3g}"


def _limit(check: Check) -> str:
    if check.quantity.startswith("finite"):
        return "required"
    return "" if check.limit is None else f"{'at least' if check.at_least else 'at most'} {_number(check, check.limit)}"


def _names(report: ParityReport) -> dict[str, str]:
    """What level 2 compares: z and the parts of the head's law, each by what it is."""
    return {"z": "condition vector z", **report.parts}


def _checks(checks: Sequence[Check], report: ParityReport) -> str:
    names = CHECKS | {name: f"{text}: largest error" for name, text in _names(report).items()}
    rows = []
    for check in checks:
        word = "<span class='ok'>ok</span>" if check.passed else "<span class='bad'>FAIL</span>"
        word = "" if check.limit is None else word
        row = "<tr>" if check.passed else "<tr class='failed'>"
        said = check.name.removesuffix(check.quantity) + names.get(check.quantity, check.quantity)
        rows.append(
            f"{row}<td>{escaped(said)}</td>"
            f"<td class='number'>{_number(check, check.value)}</td><td class='number'>{_limit(check)}</td>"
            f"<td>{word}</td><td class='note'>{escaped(check.note)}</td></tr>"
        )
    columns = "".join(f"<col class='{name}'>" for name in ("name", "number", "limit", "verdict", "note"))
    head = "<tr><th>check</th><th>value</th><th>limit</th><th>verdict</th><th>remarks</th></tr>"
    return f"<table class='checks'>{columns}{head}{''.join(rows)}</table>"


def _teacher_forced_plots(report: ParityReport) -> str:
    curves, tables, limits = report.curves, report.tables, report.thresholds
    plots, names, control = [], _names(report), report.control.get("curves", {})
    for kind, what in (("", "Largest"), (" mean", "Mean")):
        series = {name: curves[f"{name}{kind}"] for name in names if curves.get(f"{name}{kind}")}
        if series:
            title = f"{what} error at each outer step"
            beside = {name: curve for name in series if (curve := control.get(f"{name}{kind}"))}
            plots.append(_error_plot(names, series, title, "outer step", limits if not kind else None, beside))
    for kind, what in (("", "Largest"), (" mean", "Mean")):
        reduce = np.mean if kind else np.max
        by_feature = {name: reduce(tables[f"{name}{kind}"], 0).tolist() for name in report.parts if tables.get(f"{name}{kind}")}
        if by_feature:
            title = f"{what} error at each {report.draw} of a token (z has none)"
            shown = report.control.get("tables", {})
            beside = {name: reduce(shown[f"{name}{kind}"], 0).tolist() for name in by_feature if shown}
            plots.append(_error_plot(names, by_feature, title, report.draw, limits if not kind else None, beside))
    for name in report.parts:
        if tables.get(name):
            plots.append(heat_map(np.array(tables[name]), f"Largest relative error: {names[name]}", report.draw, "outer step"))
    if tables.get("kl"):
        plots.append(heat_map(np.array(tables["kl"]), "Mean KL divergence of the draws, nats", report.draw, "outer step"))
    if curves.get("kl"):
        series = {"worst draw": curves["kl"]} | ({"mean": curves["kl mean"]} if curves.get("kl mean") else {})
        shown = {} if limits is None else {"limit of the worst draw": limits.kl, "limit of the mean": limits.mean_kl}
        title = "KL divergence of the draws at each outer step"
        beside = {"worst draw": control["kl"], "mean": control["kl mean"]} if control else {}
        plots.append(line_plot(series, title, "outer step", f"nats per {report.draw}", limits=shown, beside=beside))
    picks = _picks(report, "", "Component that most probably drew each of PyTorch's features")
    if not any(curves.values()):
        return ""
    note = "Errors are relative to the largest value of a quantity where that is above 1. Dashed lines are limits."
    if report.control:
        note += (
            f" Dotted: PyTorch in float32 against PyTorch in float64 along the same tokens, which widens a limit to "
            f"{CONTROL_FACTOR:g} times its error ({KL_FACTOR:g} times its divergence) where that is above it."
        )
    return f"<p>{note}</p><div class='plots'>{''.join([*plots, picks])}</div>"


def _error_plot(
    names: Mapping[str, str],
    series: Mapping[str, Sequence[float]],
    title: str,
    x_label: str,
    limits: Thresholds | None,
    beside: Mapping[str, Sequence[float]] | None = None,
) -> str:
    shown = {}
    if limits is not None:
        shown = ({"limit of z": limits.z} if "z" in series else {}) | {"limit of the parameters": limits.mixture}
        if len(set(shown.values())) == 1:
            shown = {"limit": limits.mixture}
    named = {names[name]: values for name, values in series.items()}
    colors = [COLORS[list(names).index(name) % len(COLORS)] for name in series]
    dotted = {names[name]: values for name, values in (beside or {}).items()}
    return line_plot(named, title, x_label, "relative error", limits=shown, colors=colors, beside=dotted)


def _picks(report: ParityReport, prefix: str, title: str) -> str:
    sides = {"PyTorch": f"{prefix}reference", "deployed": f"{prefix}deployed"}
    counts = {name: report.histograms[key] for name, key in sides.items() if key in report.histograms}
    return (
        bar_plot(counts, title, "component", "features")
        if any(len(values) > 1 and any(values) for values in counts.values())
        else ""
    )


def _free_running_plots(report: ParityReport) -> str:
    if not report.images:
        return ""
    plots = []
    parted = report.histograms.get("divergence step", [])
    control = report.control.get("curves", {})
    if any(parted):
        title = "Outer step at which an image first parts from PyTorch's"
        bars = {"deployed": parted} if control else {"images": parted}
        bars |= {CONTROL: report.control["histograms"]["divergence step"]} if control else {}
        plots.append(bar_plot(bars, title, "outer step", "images"))
    if any(report.curves.get("diverged", [])):
        title = "Images that have parted so far"
        plots.append(_share_plot(report, "diverged", title, "% of the images"))
    plots.append(_picks(report, "own ", "Component that most probably drew each side's own features"))
    if report.curves.get("same picks") and min(report.curves["same picks"]) < 1:
        plots.append(_share_plot(report, "same picks", "Picks of the same component", "% of the features"))
    said = f"An image parts where a feature of a token differs by more than {PARTED:g} of the largest value of all tokens."
    said += "" if any(parted) else " None does, at any step."
    if report.thresholds is not None and not report.thresholds.same_images:
        said += " With fewer bits every token moves a little: what is limited is the law of each draw, and that of many images."
    return f"<p>{said}</p><div class='plots'>{''.join(plots)}</div>"


def _share_plot(report: ParityReport, name: str, title: str, y_label: str) -> str:
    """A curve of shares in percent, the control's beside it."""
    curves = {"deployed": report.curves[name]}
    if report.control:
        curves[CONTROL] = report.control["curves"][name]
    share = {side: [100 * value for value in curve] for side, curve in curves.items()}
    return line_plot(share, title, "outer step", y_label, log=False, top=100)


def _images(report: ParityReport) -> str:
    if not {"reference", "deployed"} <= report.images.keys():
        return ""
    total, shown = len(report.images["reference"]), SHOWN
    width = 84 if report.images["reference"].shape[1] <= 96 else 176
    if width == 176:  # large images: fewer to a line
        shown = 5
    reference, deployed = report.images["reference"][:shown], report.images["deployed"][:shown]
    difference = np.abs(reference.astype(int) - deployed.astype(int))
    amplified = np.clip(AMPLIFY * difference, 0, 255).astype(np.uint8)
    labels = [f"class {label}" for label in report.settings.get("labels", [])[: len(reference)]]
    lines = [f"<tr><th></th>{''.join(f'<td>{escaped(label)}</td>' for label in labels)}</tr>"]
    for name, images in (("PyTorch", reference), ("deployed", deployed), (f"difference x {AMPLIFY}", amplified)):
        cells = "".join(
            f"<td><img width='{width}' height='{width}' alt='{name}, image {i}' src='{_png(image)}'></td>"
            for i, image in enumerate(images)
        )
        lines.append(f"<tr><th>{name}</th>{cells}</tr>")
    ratios = psnr(deployed, reference)
    cells = "".join("<td>same</td>" if value >= MAX_PSNR else f"<td>{value:.1f}</td>" for value in ratios)
    lines.append(f"<tr><th>PSNR, dB</th>{cells}</tr>")
    note = f"<p>The first {len(reference)} of {total} images.</p>" if total > len(reference) else ""
    return f"<table class='images'>{''.join(lines)}</table>{note}"


def _png(image: Array) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _provenance(report: ParityReport) -> str:
    given = dict(report.provenance)
    hashes, origin = given.pop("sha256", {}), given.pop("origin", {})
    return (
        f"<h2>Provenance</h2>{_facts(given)}"
        f"<details><summary>How the bundle was exported</summary>{_facts(origin)}</details>"
        f"<details><summary>SHA-256 of the bundle's graphs and weights</summary>{_facts(hashes)}</details>"
    )


def _facts(facts: Mapping[str, Any]) -> str:
    rows = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping) and all(isinstance(item, str) and len(item) < 20 for item in value.values()):
            add(name, ", ".join(f"{key} {item}" for key, item in value.items()))
        elif isinstance(value, Mapping):
            for key, item in value.items():
                add(f"{name}: {key}", item)
        else:
            rows.append(f"<tr><td>{escaped(name)}</td><td><code>{escaped(value)}</code></td></tr>")

    for key, item in facts.items():
        add(key, item)
    return f"<table class='facts'>{''.join(rows)}</table>"


__all__ = ["render", "write_report"]
