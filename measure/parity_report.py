"""A parity report as one HTML file: opens from disk, needs no network; plots are inline SVG, images inline PNG."""

from __future__ import annotations

import base64
import html
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

from .parity import LEVELS, MAX_PSNR, PARAMETERS, PARTED, Check, ParityReport, Thresholds, psnr

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
NAMES = {
    "z": "condition vector z",
    "weight": "component weight",
    "mu": "component mean (mu)",
    "logvar": "component log variance",
}
# Names of checks in full; others are shown as they are.
CHECKS = {
    **{name: f"{text}: largest error" for name, text in NAMES.items()},
    "kl": "KL divergence: worst mixture",
    "mean kl": "KL divergence: mean of all mixtures",
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
COLORS = ("#1f6feb", "#d9480f", "#2b8a3e", "#9c36b5", "#a07000")
COLOR_OF = dict(zip(("z", *PARAMETERS), COLORS, strict=False))
LIGHT, DARK, BAD = (238, 243, 250), (8, 48, 107), "#c01c28"  # ends of the heat map's scale; what is not a number
# Images per row block, and how much the difference is amplified.
SHOWN, AMPLIFY = 10, 8

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2128; background: #fff;
  margin: 0 auto; padding: 28px; max-width: 1080px; }
h1 { font-size: 24px; margin: 0 0 6px; } h2 { font-size: 18px; margin: 32px 0 4px; } p { margin: 4px 0 10px; color: #57606a; }
.verdict { border-radius: 8px; padding: 14px 18px; margin: 16px 0; font-size: 17px; }
.verdict ul { margin: 8px 0 0; padding-left: 20px; font-size: 15px; }
.pass { background: #e6f6ea; border: 1px solid #8fd3a1; } .fail { background: #fdeaea; border: 1px solid #e69a9a; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
table.checks { table-layout: fixed; } col.name { width: 31%; } col.number { width: 11%; } col.limit { width: 14%; }
col.verdict { width: 8%; }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid #e5e8eb; vertical-align: top; }
th { font-weight: 600; color: #57606a; font-size: 13px; }
td.number { white-space: nowrap; } td.note { color: #57606a; font-size: 13px; } table.facts td:first-child { width: 27%; }
.ok { color: #1a7f37; font-weight: 600; } .bad { color: #c01c28; font-weight: 700; } tr.failed { background: #fdeaea; }
.plots { display: grid; margin: 18px 0; grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); gap: 20px 16px; }
figure { margin: 0; min-width: 0; } figcaption { font-size: 13px; min-height: 42px; } figcaption div { color: #57606a; }
figcaption span { display: inline-block; margin-right: 10px; } figcaption i { font-style: normal; }
svg { width: 100%; height: auto; }
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
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{_text(name)}</title><style>{STYLE}</style>",
        f"<h1>{_text(name)}</h1>",
        _verdict(report),
        _settings(report),
    ]
    for number, level in enumerate(LEVELS, 1):
        heading, why = TITLES[level]
        checks = [check for check in report.checks if check.level == level]
        parts.append(f"<h2>Level {number}: {_text(heading)}</h2>")
        if not checks:
            asked = level != "distribution" or any(note.startswith("level 4") for note in report.notes)
            parts.append(f"<p>Not run{'' if asked else ' (<code>arinar parity --distribution N</code> runs it)'}.</p>")
            continue
        parts.append(f"<p>{_text(why)}</p>{_checks(checks)}")
        if level == "teacher-forced":
            parts.append(_teacher_forced_plots(report))
        if level == "free-running":
            parts.append(_images(report) + _free_running_plots(report))
    parts.append(_provenance(report))
    return "\n".join(parts) + "\n</html>\n"


def _verdict(report: ParityReport) -> str:
    limits = f"the limits of {report.precision}{', as changed here' if report.changed_limits else ''}"
    first, notes = report.first_failure, list(report.notes)
    if first is None:
        state, lead = "pass", f"Passed: the deployed model is the trained one, within {limits}."
        text = f"All {report.limited} checks passed."
    else:
        state, lead = "fail", f"Failed: the deployed model is not the trained one within {limits}."
        text = f"{len(report.failed)} of {report.limited} checks failed."
        value = f" ({_number(first, first.value)}, {_limit(first)})" if math.isfinite(first.value) else ""
        notes.insert(0, f"first divergence: {report.first_divergence}{value}")
    for number, level in enumerate(LEVELS, 1):
        if all(check.level != level for check in report.checks) and not any(f"level {number}" in note for note in notes):
            notes.append(f"level {number} ({TITLES[level][0]}) was not run")
    for name, (usual, now) in report.changed_limits.items():
        notes.append(f"the limit {name} was set to {now:g}; that of {report.precision} is {usual:g}")
    items = "".join(f"<li>{_text(note[:1].upper() + note[1:])}.</li>" for note in notes)
    return f"<div class='verdict {state}'><b>{_text(lead)}</b> {text}{f'<ul>{items}</ul>' if items else ''}</div>"


def _settings(report: ParityReport) -> str:
    shown = "; ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in report.settings.items())
    return f"<p>{_text(shown)}</p>"


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 60 else text[:57] + "..."


def _number(check: Check, value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    if check.name.startswith("finite"):
        return "yes" if value else "no"
    return f"{100 * value:.4g} %" if check.name in SHARES else f"{value:.3g}"


def _limit(check: Check) -> str:
    if check.name.startswith("finite"):
        return "required"
    return "" if check.limit is None else f"{'at least' if check.at_least else 'at most'} {_number(check, check.limit)}"


def _checks(checks: Sequence[Check]) -> str:
    rows = []
    for check in checks:
        word = "<span class='ok'>ok</span>" if check.passed else "<span class='bad'>FAIL</span>"
        word = "" if check.limit is None else word
        row = "<tr>" if check.passed else "<tr class='failed'>"
        rows.append(
            f"{row}<td>{_text(CHECKS.get(check.name, check.name))}</td>"
            f"<td class='number'>{_number(check, check.value)}</td><td class='number'>{_limit(check)}</td>"
            f"<td>{word}</td><td class='note'>{_text(check.note)}</td></tr>"
        )
    columns = "".join(f"<col class='{name}'>" for name in ("name", "number", "limit", "verdict", "note"))
    head = "<tr><th>check</th><th>value</th><th>limit</th><th>verdict</th><th>remarks</th></tr>"
    return f"<table class='checks'>{columns}{head}{''.join(rows)}</table>"


def _teacher_forced_plots(report: ParityReport) -> str:
    curves, tables, limits = report.curves, report.tables, report.thresholds
    plots = []
    for kind, what in (("", "Largest"), (" mean", "Mean")):
        series = {name: curves[f"{name}{kind}"] for name in NAMES if curves.get(f"{name}{kind}")}
        if series:
            title = f"{what} error at each outer step"
            plots.append(_error_plot(series, title, "outer step", limits if not kind else None))
    for kind, what in (("", "Largest"), (" mean", "Mean")):
        reduce = np.mean if kind else np.max
        by_feature = {name: reduce(tables[f"{name}{kind}"], 0).tolist() for name in PARAMETERS if tables.get(f"{name}{kind}")}
        if by_feature:
            title = f"{what} error at each feature of a token (z has none)"
            plots.append(_error_plot(by_feature, title, "feature", limits if not kind else None))
    for name in PARAMETERS:
        if tables.get(name):
            plots.append(heat_map(np.array(tables[name]), f"Largest relative error: {NAMES[name]}", "feature", "outer step"))
    if tables.get("kl"):
        plots.append(heat_map(np.array(tables["kl"]), "Mean KL divergence of the mixtures, nats", "feature", "outer step"))
    if curves.get("kl"):
        series = {"worst mixture": curves["kl"]} | ({"mean": curves["kl mean"]} if curves.get("kl mean") else {})
        shown = {} if limits is None else {"limit of the worst mixture": limits.kl, "limit of the mean": limits.mean_kl}
        title = "KL divergence of the mixtures at each outer step"
        plots.append(line_plot(series, title, "outer step", "nats per feature", limits=shown))
    picks = _picks(report, "", "Component that most probably drew each of PyTorch's features")
    if not any(curves.values()):
        return ""
    note = "<p>Errors are relative to the largest value of a quantity where that is above 1. Dashed lines are limits.</p>"
    return f"{note}<div class='plots'>{''.join([*plots, picks])}</div>"


def _error_plot(series: Mapping[str, Sequence[float]], title: str, x_label: str, limits: Thresholds | None) -> str:
    shown = {}
    if limits is not None:
        shown = ({"limit of z": limits.z} if "z" in series else {}) | {"limit of the parameters": limits.mixture}
        if len(set(shown.values())) == 1:
            shown = {"limit": limits.mixture}
    named = {NAMES[name]: values for name, values in series.items()}
    colors = [COLOR_OF[name] for name in series]
    return line_plot(named, title, x_label, "relative error", limits=shown, colors=colors)


def _picks(report: ParityReport, prefix: str, title: str) -> str:
    sides = {"PyTorch": f"{prefix}reference", "deployed": f"{prefix}deployed"}
    counts = {name: report.histograms[key] for name, key in sides.items() if key in report.histograms}
    return bar_plot(counts, title, "component", "features") if any(map(any, counts.values())) else ""


def _free_running_plots(report: ParityReport) -> str:
    if not report.images:
        return ""
    plots = []
    parted = report.histograms.get("divergence step", [])
    if any(parted):
        title = "Outer step at which an image first parts from PyTorch's"
        plots.append(bar_plot({"images": parted}, title, "outer step", "images"))
    if any(report.curves.get("diverged", [])):
        share = {"parted": [100 * value for value in report.curves["diverged"]]}
        plots.append(line_plot(share, "Images that have parted so far", "outer step", "% of the images", log=False, top=100))
    plots.append(_picks(report, "own ", "Component that most probably drew each side's own features"))
    if report.curves.get("same picks") and min(report.curves["same picks"]) < 1:
        share = {"same": [100 * value for value in report.curves["same picks"]]}
        plots.append(line_plot(share, "Picks of the same component", "outer step", "% of the features", log=False, top=100))
    said = f"An image parts where a feature of a token differs by more than {PARTED:g} of the largest value of all tokens."
    said += "" if any(parted) else " None does, at any step."
    if report.thresholds is not None and not report.thresholds.same_images:
        said += " With fewer bits every token moves a little: what is limited are the picks, and the law of many images."
    return f"<p>{said}</p><div class='plots'>{''.join(plots)}</div>"


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
    lines = [f"<tr><th></th>{''.join(f'<td>{_text(label)}</td>' for label in labels)}</tr>"]
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
            rows.append(f"<tr><td>{_text(name)}</td><td><code>{_text(str(value))}</code></td></tr>")

    for key, item in facts.items():
        add(key, item)
    return f"<table class='facts'>{''.join(rows)}</table>"


def _text(value: str) -> str:
    return html.escape(value)


# --------------------------------------------------------------------------------------------------- plots

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 250, 58, 12, 10, 40


def line_plot(
    series: Mapping[str, Sequence[float]],
    title: str,
    x_label: str,
    y_label: str,
    *,
    log: bool = True,
    top: float | None = None,
    limits: Mapping[str, float] | None = None,
    colors: Sequence[str] = COLORS,
) -> str:
    """Curves over 0, 1, 2, ... as a figure; on a logarithmic axis values of 0 (and below) sit on its floor.

    ``top`` fixes the end of a linear axis. ``limits``: dashed lines, by name, which a logarithmic axis reaches to show.
    """
    values = [value for curve in series.values() for value in curve if math.isfinite(value)]
    positive = [value for value in values if value > 0]
    log = log and bool(positive)
    limits = {name: value for name, value in (limits or {}).items() if log and 0 < value < math.inf}
    if log:
        reach = [*positive, *limits.values()]
        first, last = math.floor(math.log10(min(reach))), math.ceil(math.log10(max(reach)))
        first, last = (max(first, last - 12), last) if last > first else (first - 1, first + 1)
        factors = (1, 2, 5) if last - first <= 2 else (1,)
        powers = range(first, last + 1, max(1, (last - first) // 6))
        ticks = [(float(f"{f}e{power}"), f"{f}e{power}") for power in powers for f in factors if power < last or f == 1]
        low, high = float(first), float(last)
    else:
        low, high = min([0.0, *values]), top or max([*values, 1e-12])
        ticks = [(tick, f"{tick:.3g}") for tick in np.linspace(low, high, 5).tolist()]
    count = max(len(curve) for curve in series.values())

    def height(value: float) -> float:
        shown = (math.log10(value) if value > 0 else low) if log else value
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (min(max(shown, low), high) - low) / (high - low)

    def across(index: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (index / (count - 1) if count > 1 else 0.5)

    body = [_axes(x_label, y_label, [(height(tick), text) for tick, text in ticks])]
    body += _x_ticks([(across(i), str(i)) for i in _chosen(count)])
    for name, value in limits.items():
        y = height(value)
        body.append(
            f"<line x1='{LEFT}' y1='{y:.1f}' x2='{WIDTH - RIGHT}' y2='{y:.1f}' stroke='#57606a' stroke-dasharray='6 4'/>"
            f"<text x='{WIDTH - RIGHT - 4}' y='{y + (13 if y < TOP + 12 else -4):.1f}' text-anchor='end' "
            f"fill='#57606a'>{_text(name)}: {value:.3g}</text>"
        )
    for color, curve in zip(colors, series.values(), strict=False):
        points = [(across(i), height(value)) for i, value in enumerate(curve) if math.isfinite(value)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        body.append(f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='2'/>")
        if len(points) <= 40:
            body += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.6' fill='{color}'/>" for x, y in points]
        lost = [across(i) for i, value in enumerate(curve) if not math.isfinite(value)]
        body += [f"<text x='{x:.1f}' y='{TOP + 9}' text-anchor='middle' fill='{BAD}'>&#215;</text>" for x in lost]
    missing = any(not math.isfinite(value) for curve in series.values() for value in curve)
    return _figure(title, body, list(series) if len(series) > 1 else [], colors, "&#215; not finite" if missing else "")


def bar_plot(series: Mapping[str, Sequence[int]], title: str, x_label: str, y_label: str) -> str:
    """Counts per bin, the series side by side."""
    count = max(len(bars) for bars in series.values())
    most = max([1, *(value for bars in series.values() for value in bars)])
    unit = max(1, int(float(f"{most / 4:.1g}")))
    top = -(-most // unit) * unit
    span = (WIDTH - LEFT - RIGHT) / max(count, 1)
    width = 0.76 * span / len(series)

    def height(value: float) -> float:
        return (HEIGHT - TOP - BOTTOM) * value / top

    ticks = range(0, top + 1, unit)
    body = [_axes(x_label, y_label, [(HEIGHT - BOTTOM - height(tick), f"{tick:,}") for tick in ticks])]
    body += _x_ticks([(LEFT + (i + 0.5) * span, str(i)) for i in _chosen(count)])
    for number, (color, bars) in enumerate(zip(COLORS, series.values(), strict=False)):
        for index, value in enumerate(bars):
            x = LEFT + (index + 0.12) * span + number * width
            tall = height(value)
            body.append(
                f"<rect x='{x:.1f}' y='{HEIGHT - BOTTOM - tall:.1f}' width='{width:.1f}' height='{tall:.1f}' fill='{color}'/>"
            )
    return _figure(title, body, list(series) if len(series) > 1 else [])


def heat_map(table: Array, title: str, x_label: str, y_label: str) -> str:
    """A table (rows, columns) as colours on a logarithmic scale, which is drawn beside it."""
    rows, columns = table.shape
    positive = table[np.isfinite(table) & (table > 0)]
    high = math.log10(positive.max()) if positive.size else 0.0
    low = max(math.log10(positive.min()), high - 6) if positive.size else -1.0
    right = WIDTH - RIGHT - 64
    wide, tall = (right - LEFT) / columns, (HEIGHT - TOP - BOTTOM) / rows
    body = [_axes(x_label, y_label, [(TOP + (i + 0.5) * tall + 1, str(i)) for i in _chosen(rows)], grid=False, right=right)]
    body += _x_ticks([(LEFT + (i + 0.5) * wide, str(i)) for i in _chosen(columns)])
    for row in range(rows):
        for column in range(columns):
            value = float(table[row, column])
            share = 0.0 if not value > 0 else (math.log10(value) - low) / max(high - low, 1e-9) if value < math.inf else 1.0
            color = _shade(share) if math.isfinite(value) else BAD
            body.append(
                f"<rect x='{LEFT + column * wide:.1f}' y='{TOP + row * tall:.1f}' width='{wide + 0.3:.1f}' "
                f"height='{tall + 0.3:.1f}' fill='{color}'><title>{value:.3g}</title></rect>"
            )
    bars, length = 24, HEIGHT - TOP - BOTTOM
    for index in range(bars):
        y = TOP + length * (1 - (index + 1) / bars)
        color = _shade(index / (bars - 1))
        body.append(f"<rect x='{right + 12}' y='{y:.1f}' width='12' height='{length / bars + 0.3:.1f}' fill='{color}'/>")
    if positive.size:
        ends = ((TOP + 9, high), (TOP + length / 2 + 4, (low + high) / 2), (HEIGHT - BOTTOM, low))
        body += [f"<text x='{right + 28}' y='{y:.1f}'>{10**power:.1g}</text>" for y, power in ends]
    else:
        body.append(f"<text x='{right + 28}' y='{HEIGHT - BOTTOM}'>0</text>")
    lost = f"<span style='color:{BAD}'>&#9632; not finite</span>" if not np.isfinite(table).all() else ""
    return _figure(title, body, [], extra=f"<span>logarithmic scale</span>{lost}")


def _shade(share: float) -> str:
    share = min(max(share, 0.0), 1.0)
    return f"rgb({', '.join(str(round(a + (b - a) * share)) for a, b in zip(LIGHT, DARK, strict=True))})"


def _chosen(count: int) -> list[int]:
    """About eight of 0..count-1, evenly spaced, the first included."""
    return list(range(0, count, max(1, math.ceil(count / 9))))


def _axes(x_label: str, y_label: str, ticks: Sequence[tuple[float, str]], grid: bool = True, right: int = WIDTH - RIGHT) -> str:
    bottom = HEIGHT - BOTTOM
    lines = [
        f"<line x1='{LEFT}' y1='{bottom}' x2='{right}' y2='{bottom}' stroke='#8c959f'/>",
        f"<text x='{(LEFT + right) / 2}' y='{HEIGHT - 6}' text-anchor='middle' fill='#57606a'>{_text(x_label)}</text>",
        f"<text transform='translate(13 {(TOP + bottom) / 2}) rotate(-90)' text-anchor='middle' fill='#57606a'>"
        f"{_text(y_label)}</text>",
    ]
    for y, text in ticks:
        if grid:
            lines.append(f"<line x1='{LEFT}' y1='{y:.1f}' x2='{right}' y2='{y:.1f}' stroke='#e5e8eb'/>")
        lines.append(f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{_text(text)}</text>")
    return "".join(lines)


def _x_ticks(ticks: Sequence[tuple[float, str]]) -> list[str]:
    y = HEIGHT - BOTTOM + 16
    return [f"<text x='{x:.1f}' y='{y}' text-anchor='middle'>{_text(text)}</text>" for x, text in ticks]


def _figure(title: str, body: Sequence[str], names: Sequence[str], colors: Sequence[str] = COLORS, extra: str = "") -> str:
    legend = "".join(
        f"<span><i style='color:{color}'>&#9632;</i> {_text(name)}</span>" for color, name in zip(colors, names, strict=False)
    )
    return (
        f"<figure><figcaption><b>{_text(title)}</b><div>{legend}{extra}</div></figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' font-size='12' font-family='system-ui, sans-serif' fill='#1c2128' "
        f"role='img' aria-label='{html.escape(title, quote=True)}'>{''.join(body)}</svg></figure>"
    )


__all__ = ["bar_plot", "heat_map", "line_plot", "render", "write_report"]
