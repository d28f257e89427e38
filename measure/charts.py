"""Pages and charts of the reports: one HTML file that opens from disk and needs no network; charts are inline SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: Of lines and bars, in turn.
COLORS = ("#1f6feb", "#d9480f", "#2b8a3e", "#9c36b5", "#a07000")
INK, GREY, RULE, AXIS, BAD = "#1c2128", "#57606a", "#e5e8eb", "#8c959f", "#c01c28"
LIGHT, DARK = (238, 243, 250), (8, 48, 107)  # ends of the heat map's scale

STYLE = f"""
:root {{ color-scheme: light; }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; background: #fff;
  margin: 0 auto; padding: 28px; max-width: 1080px; }}
h1 {{ font-size: 24px; margin: 0 0 6px; }} h2 {{ font-size: 18px; margin: 32px 0 4px; }}
p {{ margin: 4px 0 10px; color: {GREY}; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ border-bottom: 1px solid {RULE}; }} th {{ font-weight: 600; color: {GREY}; font-size: 13px; }}
figcaption {{ font-size: 13px; }} figcaption i {{ font-style: normal; }}
figcaption span {{ display: inline-block; margin-right: 14px; }}
svg {{ width: 100%; height: auto; display: block; }}
"""


def page(title: str, parts: Sequence[str], style: str = "") -> str:
    """A whole HTML document of parts that are HTML already. ``style``: CSS after that of all pages."""
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escaped(title)}</title><style>{STYLE}{style}</style>"
    return "\n".join([head, f"<h1>{escaped(title)}</h1>", *parts]) + "\n</html>\n"


def escaped(value: object) -> str:
    """Text, as it may stand in HTML and SVG."""
    return html.escape(str(value))


def legend(keys: Sequence[tuple[str, str]]) -> str:
    """A square of each colour, with its text."""
    return " ".join(f"<span><i style='color:{color}'>&#9632;</i> {escaped(text)}</span>" for color, text in keys)


def figure(title: str, caption: str, body: Sequence[str], width: int, height: int, size: int = 12) -> str:
    """SVG elements on so large a canvas under a caption of HTML; ``size`` of their letters."""
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f"<svg viewBox='0 0 {width} {height}' font-size='{size}' font-family='system-ui, sans-serif' fill='{INK}' "
        f"role='img' aria-label='{escaped(title)}'>{''.join(body)}</svg></figure>"
    )


def round_ticks(most: float, whole: bool = False) -> list[float]:
    """0 and a few round values, the last at or above ``most`` (at least 0). ``whole``: of things that are counted."""
    most = max(most, 1.0) if whole or not most > 0 else most
    power = 10.0 ** math.floor(math.log10(most))
    step = next(step for step in (0.2 * power, 0.5 * power, power, 2 * power) if 6 * step >= most)
    step = max(step, 1.0) if whole else step
    return [float(f"{step * i:.12g}") for i in range(math.ceil(most / step - 1e-9) + 1)]


def line(x1: float, y1: float, x2: float, y2: float, stroke: str, width: int = 1, dashes: str = "", hint: str = "") -> str:
    ends = f"x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}'"
    drawn = f"<line {ends} stroke='{stroke}' stroke-width='{width}' stroke-dasharray='{dashes}'"
    return f"{drawn}><title>{escaped(hint)}</title></line>" if hint else f"{drawn}/>"


def box(x: float, y: float, width: float, height: float, fill: str, hint: str = "") -> str:
    """A filled rectangle; ``hint`` shows under the pointer."""
    sides = f"x='{x:.2f}' y='{y:.2f}' width='{width:.2f}' height='{height:.2f}' fill='{fill}'"
    return f"<rect {sides}><title>{escaped(hint)}</title></rect>" if hint else f"<rect {sides}/>"


def label(x: float, y: float, text: object, anchor: str = "start", fill: str = INK) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{fill}'>{escaped(text)}</text>"


# ------------------------------------------------------------------------------- charts over steps, features, bins

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 250, 64, 12, 10, 40
FLOOR, INNER_WIDTH, INNER_HEIGHT = HEIGHT - BOTTOM, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM


class Scale(NamedTuple):
    """A vertical axis: its ends (their logarithms, where ``log``), and (value, text) of its ticks."""

    low: float
    high: float
    log: bool
    ticks: list[tuple[float, str]]

    def y(self, value: float) -> float:
        """Where a value is; what is beyond an end sits on it."""
        shown = (math.log10(value) if value > 0 else self.low) if self.log else value
        return FLOOR - INNER_HEIGHT * (min(max(shown, self.low), self.high) - self.low) / (self.high - self.low)


def log_scale(values: Sequence[float]) -> Scale:
    """Reaches all of some values above 0, but no more than twelve powers of ten."""
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    first, last = (max(first, last - 12), last) if last > first else (first - 1, first + 1)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    powers = range(first, last + 1, max(1, (last - first) // 6))
    ticks = [(float(f"{f}e{power}"), f"{f}e{power}") for power in powers for f in factors if power < last or f == 1]
    return Scale(float(first), float(last), True, ticks)


def linear_scale(most: float, whole: bool = False) -> Scale:
    ticks = round_ticks(most, whole)
    return Scale(0.0, ticks[-1], False, [(tick, f"{tick:,.6g}") for tick in ticks])


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
    beside: Mapping[str, Sequence[float]] | None = None,
    ticks: Sequence[str] | None = None,
) -> str:
    """Curves over 0, 1, 2, ... as a figure; values of 0 and below sit on the axis' floor.

    ``top`` fixes the end of a linear axis. ``limits``: dashed lines, by name, which a logarithmic axis reaches to show.
    ``beside``: of some series, by name, a curve to compare with, dotted in its colour. ``ticks``: what the places are called.
    """
    beside = beside or {}
    values = [value for curve in (*series.values(), *beside.values()) for value in curve if math.isfinite(value)]
    positive = [value for value in values if value > 0]
    log = log and bool(positive)
    limits = {name: value for name, value in (limits or {}).items() if log and 0 < value < math.inf}
    scale = log_scale([*positive, *limits.values()]) if log else linear_scale(top or max([*values, 0.0]))
    count = max(len(curve) for curve in series.values())
    across = [LEFT + INNER_WIDTH * (i / (count - 1) if count > 1 else 0.5) for i in range(count)]
    body = [_axes(x_label, y_label, scale), *_x_ticks(across, ticks)]
    for name, value in limits.items():
        y = scale.y(value)
        body.append(line(LEFT, y, WIDTH - RIGHT, y, GREY, dashes="6 4"))
        body.append(label(WIDTH - RIGHT - 4, y + (13 if y < TOP + 12 else -4), f"{name}: {value:.3g}", "end", GREY))
    for color, (name, curve) in zip(colors, series.items(), strict=False):
        points = [(across[i], scale.y(value)) for i, value in enumerate(curve) if math.isfinite(value)]
        body.append(_path(points, color))
        other = [(x, scale.y(value)) for x, value in zip(across, beside.get(name, ()), strict=False) if math.isfinite(value)]
        body += [_path(other, color, "2 4")] if other else []
        if len(points) <= 40:
            body += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.6' fill='{color}'/>" for x, y in points]
        lost = [across[i] for i, value in enumerate(curve) if not math.isfinite(value)]
        body += [label(x, TOP + 9, "×", "middle", BAD) for x in lost]
    missing = not all(math.isfinite(value) for curve in series.values() for value in curve)
    return _plot(title, body, list(series) if len(series) > 1 else [], colors, "&#215; not finite" if missing else "")


def _path(points: Sequence[tuple[float, float]], color: str, dashes: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f" stroke-dasharray='{dashes}' stroke-linecap='round'" if dashes else ""
    return f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='2'{dashed}/>"


def bar_plot(series: Mapping[str, Sequence[int]], title: str, x_label: str, y_label: str) -> str:
    """Counts per bin, the series side by side."""
    count = max(len(bars) for bars in series.values())
    scale = linear_scale(max([1, *(value for bars in series.values() for value in bars)]), whole=True)
    span = INNER_WIDTH / max(count, 1)
    width = 0.76 * span / len(series)
    body = [_axes(x_label, y_label, scale), *_x_ticks([LEFT + (i + 0.5) * span for i in range(count)])]
    for number, (color, bars) in enumerate(zip(COLORS, series.values(), strict=False)):
        for index, value in enumerate(bars):
            x, y = LEFT + (index + 0.12) * span + number * width, scale.y(value)
            body.append(box(x, y, width, FLOOR - y, color))
    return _plot(title, body, list(series) if len(series) > 1 else [])


def heat_map(table: Array, title: str, x_label: str, y_label: str) -> str:
    """A table (rows, columns) as colours on a logarithmic scale, which is drawn beside it."""
    rows, columns = table.shape
    positive = table[np.isfinite(table) & (table > 0)]
    high = math.log10(positive.max()) if positive.size else 0.0
    low = max(math.log10(positive.min()), high - 6) if positive.size else -1.0
    right = WIDTH - RIGHT - 64
    wide, tall = (right - LEFT) / columns, INNER_HEIGHT / rows
    body = [_axes(x_label, y_label, None, right)]
    body += [label(LEFT - 6, TOP + (i + 0.5) * tall + 5, i, "end") for i in _chosen(rows)]
    body += _x_ticks([LEFT + (i + 0.5) * wide for i in range(columns)])
    for (row, column), found in np.ndenumerate(table):
        value = float(found)
        share = 0.0 if not value > 0 else (math.log10(value) - low) / max(high - low, 1e-9) if value < math.inf else 1.0
        color = _shade(share) if math.isfinite(value) else BAD
        body.append(box(LEFT + column * wide, TOP + row * tall, wide + 0.3, tall + 0.3, color, f"{value:.3g}"))
    bars = 24
    for index in range(bars):
        y = TOP + INNER_HEIGHT * (1 - (index + 1) / bars)
        body.append(box(right + 12, y, 12, INNER_HEIGHT / bars + 0.3, _shade(index / (bars - 1))))
    if positive.size:
        ends = ((TOP + 9, high), (TOP + INNER_HEIGHT / 2 + 4, (low + high) / 2), (FLOOR, low))
        body += [label(right + 28, y, f"{10**power:.1g}") for y, power in ends]
    else:
        body.append(label(right + 28, FLOOR, "0"))
    lost = f"<span style='color:{BAD}'>&#9632; not finite</span>" if not np.isfinite(table).all() else ""
    return _plot(title, body, [], extra=f"<span>logarithmic scale</span>{lost}")


def _shade(share: float) -> str:
    share = min(max(share, 0.0), 1.0)
    return f"rgb({', '.join(str(round(a + (b - a) * share)) for a, b in zip(LIGHT, DARK, strict=True))})"


def _chosen(count: int) -> list[int]:
    """About eight of 0..count-1, evenly spaced, the first included."""
    return list(range(0, count, max(1, math.ceil(count / 9))))


def _axes(x_label: str, y_label: str, scale: Scale | None, right: int = WIDTH - RIGHT) -> str:
    """The lower axis, what both axes are called, and ticks with lines across where there is a scale."""
    drawn = [
        line(LEFT, FLOOR, right, FLOOR, AXIS),
        label((LEFT + right) / 2, HEIGHT - 6, x_label, "middle", GREY),
        f"<text transform='translate(13 {(TOP + FLOOR) / 2}) rotate(-90)' text-anchor='middle' fill='{GREY}'>"
        f"{escaped(y_label)}</text>",
    ]
    for value, text in scale.ticks if scale else ():
        y = scale.y(value) if scale else 0.0
        drawn += [line(LEFT, y, right, y, RULE), label(LEFT - 6, y + 4, text, "end")]
    return "".join(drawn)


def _x_ticks(places: Sequence[float], names: Sequence[str] | None = None) -> list[str]:
    return [label(places[i], FLOOR + 16, i if names is None else names[i], "middle") for i in _chosen(len(places))]


def _plot(title: str, body: Sequence[str], names: Sequence[str], colors: Sequence[str] = COLORS, extra: str = "") -> str:
    caption = f"<b>{escaped(title)}</b><div>{legend(list(zip(colors, names, strict=False)))}{extra}</div>"
    return figure(title, caption, body, WIDTH, HEIGHT)


# ---------------------------------------------------------------------------------------------- bars of segments

BARS_WIDTH, BARS_LEFT, BARS_RIGHT, BARS_TOP, ROW, THICK, BELOW = 1000, 150, 190, 6, 34, 20, 26


class Bar(NamedTuple):
    """A horizontal bar: what stands left of it, its segments by name, what stands right of it, values to mark by name."""

    label: str
    segments: Mapping[str, float]
    note: str
    marks: Mapping[str, float] = {}


class Mark(NamedTuple):
    """How values of a name are marked across bars: the legend's text, the dashes of the line."""

    text: str
    dashes: str = ""


def segment_plot(
    bars: Sequence[Bar],
    title: str,
    unit: str,
    *,
    colors: Mapping[str, str],
    keys: Sequence[tuple[str, str]] = (),
    marks: Mapping[str, Mark] = {},
) -> str:
    """Horizontal bars of segments on one linear axis, with a legend.

    colors : of the segments, by name.
    keys : (colour, text) of the legend.
    marks : by name, how to draw and call what bars mark; a name that is not there is drawn plain, and not in the legend.
    """
    most = max(max(sum(bar.segments.values()), *bar.marks.values(), 0.0) for bar in bars)
    ticks, bottom = round_ticks(most), BARS_TOP + ROW * len(bars)

    def x(value: float) -> float:
        return BARS_LEFT + (BARS_WIDTH - BARS_LEFT - BARS_RIGHT) * value / ticks[-1]

    body = []
    for tick in ticks:
        body.append(line(x(tick), BARS_TOP, x(tick), bottom, RULE))
        body.append(label(x(tick), bottom + 17, f"{tick:g} {unit}", "middle", GREY))
    for index, bar in enumerate(bars):
        y, start = BARS_TOP + ROW * index + (ROW - THICK) / 2, 0.0
        body.append(label(BARS_LEFT - 10, y + THICK / 2 + 4, bar.label, "end"))
        for name, value in bar.segments.items():
            body.append(box(x(start), y, x(value) - BARS_LEFT, THICK, colors[name], f"{name} {value:.3g} {unit}"))
            start += value
        for name, value in bar.marks.items():
            dashes = marks[name].dashes if name in marks else ""
            hint = f"{name} {value:.3g} {unit}"
            body.append(line(x(value), y - 5, x(value), y + THICK + 5, INK, 2, dashes, hint))
        body.append(label(x(max(start, *bar.marks.values(), 0.0)) + 8, y + THICK / 2 + 4, bar.note))
    caption = legend(keys)
    if shown := [mark for name, mark in marks.items() if any(name in bar.marks for bar in bars)]:
        samples = [f"<svg viewBox='0 0 8 16'>{line(4, 1, 4, 15, INK, 2, mark.dashes)}</svg>" for mark in shown]
        caption += "<br>"
        caption += " ".join(f"<span>{sample} {escaped(mark.text)}</span>" for sample, mark in zip(samples, shown, strict=True))
    return figure(title, caption, body, BARS_WIDTH, bottom + BELOW, size=13)
