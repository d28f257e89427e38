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

from .parity import Check, ParityReport

Array = npt.NDArray[Any]

LEVELS = {
    "graph": ("Each graph alone", "The same inputs to the PyTorch module and to the deployed graph."),
    "teacher-forced": ("Along PyTorch's trajectory", "PyTorch's tokens are forced at every step: errors do not add up."),
    "free-running": ("Each on its own", "Both generate from the same noise, every draw their own."),
    "distribution": ("Many images", "The law of the images: deployed against PyTorch, beside PyTorch against PyTorch."),
}
NAMES = {"z": "z", "weight": "component weight", "mu": "mean", "logvar": "log variance", "kl": "KL divergence"}
COLORS = ("#1f6feb", "#d9480f", "#2b8a3e", "#9c36b5", "#a07000")
LIGHT, DARK = (238, 243, 250), (8, 48, 107)  # ends of the heat map's scale
# Images per row block, and how much the difference is amplified.
SHOWN, AMPLIFY = 10, 8

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2128; background: #fff;
  margin: 0 auto; padding: 28px; max-width: 1080px; }
h1 { font-size: 24px; margin: 0 0 6px; } h2 { font-size: 18px; margin: 32px 0 4px; } p { margin: 4px 0 10px; color: #57606a; }
.verdict { border-radius: 8px; padding: 14px 18px; margin: 16px 0; font-size: 17px; }
.pass { background: #e6f6ea; border: 1px solid #8fd3a1; } .fail { background: #fdeaea; border: 1px solid #e69a9a; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
table.checks { table-layout: fixed; } col.name { width: 27%; } col.number { width: 11%; } col.limit { width: 16%; }
col.verdict { width: 7%; }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid #e5e8eb; vertical-align: top; }
th { font-weight: 600; color: #57606a; font-size: 13px; }
td.number { white-space: nowrap; } td.note { color: #57606a; font-size: 13px; }
.ok { color: #1a7f37; font-weight: 600; } .bad { color: #c01c28; font-weight: 700; }
.plots { display: grid; margin: 18px 0; grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); gap: 16px; }
figure { margin: 0; } figcaption { font-size: 13px; color: #57606a; margin-bottom: 2px; } svg { width: 100%; height: auto; }
.images td { border: 0; padding: 2px 4px 2px 0; } .images img { image-rendering: pixelated; display: block; }
.images th { white-space: nowrap; padding-right: 12px; border: 0; } code { font-size: 12px; word-break: break-all; }
details { margin-top: 8px; }
"""


def write_report(report: ParityReport, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Write the report's HTML file -> its path. Raises OSError where it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(render(report, title), encoding="utf-8")
    os.replace(temporary, path)
    return path


def render(report: ParityReport, title: str | None = None) -> str:
    name = title or f"Parity: {report.provenance.get('bundle', 'bundle')}, {report.precision} on {report.backend}"
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{_text(name)}</title><style>{STYLE}</style>",
        f"<h1>{_text(name)}</h1>", _verdict(report), _settings(report),
    ]  # fmt: skip
    for level, (heading, why) in LEVELS.items():
        checks = [check for check in report.checks if check.level == level]
        if not checks:
            continue
        parts.append(f"<h2>{_text(heading)}</h2><p>{_text(why)}</p>{_checks(checks)}")
        if level == "teacher-forced":
            parts.append(_teacher_forced_plots(report))
        if level == "free-running":
            parts.append(_free_running_plots(report) + _images(report))
    parts.append(_provenance(report))
    return "\n".join(parts) + "\n</html>\n"


def _verdict(report: ParityReport) -> str:
    failed = [check for check in report.checks if not check.passed]
    if not failed:
        count = sum(check.limit is not None for check in report.checks)
        within = "" if report.precision == "fp32" else f", within the limits of {_text(report.precision)}"
        return f"<div class='verdict pass'><b>It is the same model{within}.</b> All {count} checks passed.</div>"
    first, number = failed[0], f"{len(failed)} check" + ("s" if len(failed) > 1 else "")
    return (
        f"<div class='verdict fail'><b>It is not the same model, by these limits.</b> {number} failed; the first: "
        f"{_text(first.name)} ({_text(first.level)}) is {first.value:.3g}, {_limit(first)}. {_text(first.note)}</div>"
    )


def _settings(report: ParityReport) -> str:
    shown = ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in report.settings.items())
    return f"<p>{_text(shown)}</p>"


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 60 else text[:57] + "..."


def _limit(check: Check) -> str:
    if check.limit is None:
        return ""
    return f"{'at least' if check.at_least else 'at most'} {check.limit:.3g}"


def _checks(checks: Sequence[Check]) -> str:
    rows = []
    for check in checks:
        word = "<span class='ok'>ok</span>" if check.passed else "<span class='bad'>FAIL</span>"
        word = "" if check.limit is None else word
        rows.append(
            f"<tr><td>{_text(check.name)}</td><td class='number'>{check.value:.3g}</td><td class='number'>{_limit(check)}</td>"
            f"<td>{word}</td><td class='note'>{_text(check.note)}</td></tr>"
        )
    columns = "".join(f"<col class='{name}'>" for name in ("name", "number", "limit", "verdict", "note"))
    head = "<tr><th>check</th><th>value</th><th>limit</th><th></th><th></th></tr>"
    return f"<table class='checks'>{columns}{head}{''.join(rows)}</table>"


def _teacher_forced_plots(report: ParityReport) -> str:
    curves, tables = report.curves, report.tables
    plots = []
    by_step = {NAMES[name]: curves[name] for name in ("z", "weight", "mu", "logvar") if name in curves}
    if by_step:
        plots.append(line_plot(by_step, "Largest error at each outer step", "outer step", "error"))
    if "kl" in curves:
        mean = [float(np.mean(row)) for row in tables.get("kl", [])]
        series = {"largest": curves["kl"]} | ({"mean": mean} if mean else {})
        plots.append(line_plot(series, "KL divergence of the mixtures at each outer step", "outer step", "nats"))
    by_feature = {NAMES[name]: np.max(tables[name], 0).tolist() for name in ("weight", "mu", "logvar") if tables.get(name)}
    if by_feature:
        plots.append(line_plot(by_feature, "Largest error at each feature of a token", "feature", "error"))
    if tables.get("kl"):
        plots.append(heat_map(np.array(tables["kl"]), "Mean KL divergence, nats", "feature", "outer step"))
    counts = {name: report.histograms[name] for name in ("reference", "deployed") if name in report.histograms}
    if counts:
        shown = {"PyTorch" if name == "reference" else name: values for name, values in counts.items()}
        plots.append(bar_plot(shown, "Component most responsible for each drawn feature", "component", "features"))
    return f"<div class='plots'>{''.join(plots)}</div>"


def _free_running_plots(report: ParityReport) -> str:
    plots = []
    if "divergence step" in report.histograms:
        parted = {"images": report.histograms["divergence step"]}
        plots.append(bar_plot(parted, "Outer step at which an image first parts from PyTorch's", "outer step", "images"))
    if "diverged" in report.curves:
        share = {"parted": [100 * value for value in report.curves["diverged"]]}
        plots.append(line_plot(share, "Images that have parted so far", "outer step", "%", log=False, top=100))
    return f"<div class='plots'>{''.join(plots)}</div>"


def _images(report: ParityReport) -> str:
    if not {"reference", "deployed"} <= report.images.keys():
        return ""
    reference, deployed = report.images["reference"][:SHOWN], report.images["deployed"][:SHOWN]
    difference = np.abs(reference.astype(int) - deployed.astype(int))
    amplified = np.clip(AMPLIFY * difference, 0, 255).astype(np.uint8)
    labels = report.settings.get("labels", [])
    width = 96 if reference.shape[1] <= 96 else 192
    if width == 192:  # large images: fewer to a line
        reference, deployed, amplified = reference[:5], deployed[:5], amplified[:5]
    rows = [("label", [str(label) for label in labels[: len(reference)]])]
    head = "".join(f"<td>{_text(cell)}</td>" for cell in rows[0][1])
    lines = [f"<tr><th>label</th>{head}</tr>"]
    for name, images in (("PyTorch", reference), ("deployed", deployed), (f"difference x{AMPLIFY}", amplified)):
        cells = "".join(f"<td><img width='{width}' height='{width}' alt='' src='{_png(image)}'></td>" for image in images)
        lines.append(f"<tr><th>{name}</th>{cells}</tr>")
    return f"<table class='images'>{''.join(lines)}</table>"


def _png(image: Array) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _provenance(report: ParityReport) -> str:
    rows = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                add(f"{name} {key}".strip(), item)
        else:
            rows.append(f"<tr><td>{_text(name)}</td><td><code>{_text(str(value))}</code></td></tr>")

    add("", {key: value for key, value in report.provenance.items() if key != "sha256"})
    hashes = report.provenance.get("sha256", {})
    files = [f"<tr><td>{_text(k)}</td><td><code>{_text(v)}</code></td></tr>" for k, v in hashes.items()]
    return (
        f"<h2>Provenance</h2><table>{''.join(rows)}</table>"
        f"<details><summary>SHA-256 of the graphs and weights</summary><table>{''.join(files)}</table></details>"
    )


def _text(value: str) -> str:
    return html.escape(value)


# --------------------------------------------------------------------------------------------------- plots

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 250, 58, 12, 10, 40


def line_plot(
    series: Mapping[str, Sequence[float]], title: str, x_label: str, y_label: str, *, log: bool = True,
    top: float | None = None,
) -> str:  # fmt: skip
    """Curves over 0, 1, 2, ... as a figure; on a logarithmic axis values of 0 (and below) sit on its floor.

    ``top`` fixes the end of a linear axis.
    """
    values = [value for curve in series.values() for value in curve if math.isfinite(value)]
    positive = [value for value in values if value > 0]
    log = log and bool(positive)
    if log:
        first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        first, last = (max(first, last - 12), last) if last > first else (first - 1, first + 1)
        ticks = [(float(power), f"1e{power}") for power in range(first, last + 1, max(1, (last - first) // 6))]
        low, high = float(first), float(last)
    else:
        low, high = min([0.0, *values]), top or max([*values, 1e-12])
        ticks = [(tick, f"{tick:.3g}") for tick in np.linspace(low, high, 5).tolist()]
    count = max(len(curve) for curve in series.values())

    def place(index: int, value: float) -> tuple[float, float]:
        shown = (math.log10(value) if value > 0 else low) if log else value
        shown = min(max(shown, low), high)
        x = LEFT + (WIDTH - LEFT - RIGHT) * (index / max(count - 1, 1) if count > 1 else 0.5)
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (shown - low) / (high - low)

    body = [_axes(x_label, y_label, [(place(0, 10**t if log else t)[1], text) for t, text in ticks])]
    body += _x_ticks([(place(i, 1)[0], str(i)) for i in _chosen(count)])
    for color, curve in zip(COLORS, series.values(), strict=False):
        points = [place(i, value) for i, value in enumerate(curve) if math.isfinite(value)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        body.append(f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='2'/>")
        if len(points) <= 40:
            body += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.6' fill='{color}'/>" for x, y in points]
    return _figure(title, body, list(series) if len(series) > 1 else [])


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
    """A table (rows, columns) as colours on a logarithmic scale, dark is large; its ends are written below."""
    rows, columns = table.shape
    positive = table[table > 0]
    high = math.log10(positive.max()) if positive.size else 0.0
    low = max(math.log10(positive.min()), high - 6) if positive.size else -1.0
    wide, tall = (WIDTH - LEFT - RIGHT) / columns, (HEIGHT - TOP - BOTTOM) / rows
    body = [_axes(x_label, y_label, [(TOP + (i + 0.5) * tall + 1, str(i)) for i in _chosen(rows)], grid=False)]
    body += _x_ticks([(LEFT + (i + 0.5) * wide, str(i)) for i in _chosen(columns)])
    for row in range(rows):
        for column in range(columns):
            value = float(table[row, column])
            share = 0.0 if value <= 0 else min(max((math.log10(value) - low) / max(high - low, 1e-9), 0.0), 1.0)
            color = ", ".join(str(round(a + (b - a) * share)) for a, b in zip(LIGHT, DARK, strict=True))
            body.append(
                f"<rect x='{LEFT + column * wide:.1f}' y='{TOP + row * tall:.1f}' width='{wide + 0.3:.1f}' "
                f"height='{tall + 0.3:.1f}' fill='rgb({color})'><title>{value:.3g}</title></rect>"
            )
    return _figure(f"{title} (light {10**low:.1g}, dark {10**high:.1g})", body, [])


def _chosen(count: int) -> list[int]:
    """About eight of 0..count-1, evenly spaced, the first included."""
    return list(range(0, count, max(1, math.ceil(count / 9))))


def _axes(x_label: str, y_label: str, ticks: Sequence[tuple[float, str]], grid: bool = True) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
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


def _figure(title: str, body: Sequence[str], names: Sequence[str]) -> str:
    legend = "".join(
        f" <span style='color:{color}; white-space:nowrap'>&#9632; {_text(name)}</span>"
        for color, name in zip(COLORS, names, strict=False)
    )
    return (
        f"<figure><figcaption><b>{_text(title)}</b>{legend}</figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' font-size='12' font-family='system-ui, sans-serif' fill='#1c2128' "
        f"role='img' aria-label='{html.escape(title, quote=True)}'>{''.join(body)}</svg></figure>"
    )


__all__ = ["bar_plot", "heat_map", "line_plot", "render", "write_report"]
