"""A benchmark's report as one HTML page: opens from disk, needs no network; charts are inline SVG."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .bench import COLD_PHASES, PHASES, backend_text, compared_with, limits_text

COLORS = {
    "outer": "#1f6feb",
    "inner": "#d9480f",
    "vae": "#2b8a3e",
    "device": "#1f6feb",
    "python": "#8c959f",
    "import_s": "#9c36b5",
    "open_s": "#a07000",
    "sessions_s": "#1f6feb",
}
INK, GREY = "#1c2128", "#57606a"
# Floors on the bars: the result's key, what it is called, the dashes of its line.
FLOORS = (
    ("floor_s_per_image", "at least, for the operations", ""),
    ("memory_floor_s_per_image", "at least, for reading the weights", "3 2"),
)
FLOOR_NOTE = (
    "At least: the operations at the measured peak of matrix products; the weights, read once per outer step of a batch, "
    "at the measured bandwidth of memory. Norms, activations and the draw from the mixtures are not counted. What fits the "
    "caches may be read faster."
)

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2128; background: #fff;
  margin: 0 auto; padding: 28px; max-width: 1000px; }
h1 { font-size: 24px; margin: 0 0 6px; } h2 { font-size: 18px; margin: 32px 0 4px; } p { margin: 4px 0 10px; color: #57606a; }
table { border-collapse: collapse; margin: 12px 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 0 5px 18px; border-bottom: 1px solid #e5e8eb; white-space: nowrap; }
th { font-weight: 600; color: #57606a; font-size: 13px; vertical-align: bottom; } th.group { text-align: center; }
td:first-child { padding-left: 0; } .wide { overflow-x: auto; }
figure { margin: 12px 0; overflow-x: auto; } figcaption { font-size: 13px; margin-bottom: 4px; }
figcaption span { margin-right: 16px; white-space: nowrap; } figcaption i { font-style: normal; }
svg { width: 100%; min-width: 700px; height: auto; display: block; }
figcaption svg { width: 8px; min-width: 8px; height: 16px; display: inline; vertical-align: -3px; }
"""


def render(report: dict[str, Any]) -> str:
    """What `arinar.measure.bench.bench` measured, with its ``against`` where there is one -> the page."""
    name = f"Speed: {report['bundle']}, {report['precision']} on {backend_text(report)}"
    where, memory = report["machine"], report["peak_memory_gb"]
    versions = ", ".join(f"{key} {value}" for key, value in where["versions"].items())
    limits, results = limits_text(report), report["results"]
    unit = Unit("s", 1.0) if max(row["s_per_image"] for row in results) >= 1 else Unit("ms", 1e3)
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{_text(name)}</title><style>{STYLE}</style>",
        f"<h1>{_text(name)}</h1>",
        f"<p>{_text(where['cpu'])}, {where['cores']} cores; {_text(versions)}; {_text(where['date'])}<br>"
        f"guidance {report['guidance_scale']:g}, median of {report['repeats']} rounds, peak memory {memory:.2f} GB"
        + (f"<br>{_text(limits)}" if limits else "")
        + "</p>",
        "<h2>Time per image</h2>",
        _times(results, unit),
        _table(results, unit),
        f"<p>{FLOOR_NOTE}</p>" if limits else "",
        "<h2>Cold start</h2><p>A fresh process, until it can generate.</p>",
        _cold_start(report["cold_start"]),
    ]
    if against := report.get("against"):
        parts.append(f"<h2>Times faster</h2><p>than {_text(compared_with(against))}</p>{_ratios(against['results'], unit)}")
    return "\n".join(parts) + "\n</html>\n"


def _times(results: Sequence[dict[str, Any]], unit: Unit) -> str:
    bars = [
        Bar(
            _setting(row),
            {name: unit.per_second * row["phases"][name] for name in PHASES if name in row["phases"]},
            f"{_number(unit.of(row['s_per_image']))} {unit.name}",
            {key: unit.per_second * row[key] for key, _, _ in FLOORS if key in row},
        )
        for row in results
    ]
    keys = [(COLORS[name], text) for name, text in PHASES.items() if any(name in row["phases"] for row in results)]
    return _figure("Time per image by phase", bars, keys, unit.name)


def _cold_start(cold: Mapping[str, float]) -> str:
    keys = [(COLORS[name], f"{text} {cold[name]:.2f} s") for name, text in COLD_PHASES.items()]
    segments = {name: cold[name] for name in COLD_PHASES}
    return _figure("Cold start", [Bar("cold start", segments, f"{sum(segments.values()):.2f} s")], keys, "s")


def _ratios(rows: Sequence[dict[str, Any]], unit: Unit) -> str:
    if not rows:
        return "<p>The two reports have no setting (batch, steps) in common.</p>"
    bars = []
    for row in rows:
        before, after = _number(unit.of(row["before"])), _number(unit.of(row["after"]))
        note = f"{row['times_faster']:.2f} x: {before} → {after} {unit.name}"
        bars.append(Bar(_setting(row), {"outer": row["times_faster"]}, note, {"as fast": 1.0}))
    return _figure("Times faster", bars, [], "x")


def _setting(row: Mapping[str, Any]) -> str:
    return f"batch {row['batch']}, {row['num_iter']} steps"


def _table(results: Sequence[dict[str, Any]], unit: Unit) -> str:
    names = [name for name in PHASES if any(name in row["phases"] for row in results)]
    head = (
        f"<tr><th rowspan='2'>batch</th><th rowspan='2'>steps</th><th rowspan='2'>{unit.name} per<br>image</th>"
        f"<th rowspan='2'>fastest,<br>slowest</th><th class='group' colspan='{len(names)}'>of which</th>"
        "<th class='group' colspan='2'>at least</th><th rowspan='2'>of the<br>GEMM peak</th>"
        "<th rowspan='2'>10<sup>9</sup> ope-<br>rations</th><th rowspan='2'>MB of<br>weights</th></tr>"
        f"<tr>{''.join(f'<th>{name}</th>' for name in names)}<th>compute</th><th>memory</th></tr>"
    )
    rows = []
    for row in results:
        fastest, slowest = _number(unit.of(row["fastest"])), _number(unit.of(row["slowest"]))
        cells = [str(row["batch"]), str(row["num_iter"]), f"<b>{_number(unit.of(row['s_per_image']))}</b>"]
        cells += [f"{fastest}, {slowest}", *(_number(unit.of(row["phases"].get(name))) for name in names)]
        cells += [_number(unit.of(row.get(key))) for key, _, _ in FLOORS]
        cells.append(f"{row['share_of_gemm_peak']:.0%}" if "share_of_gemm_peak" in row else "-")
        cells += [_number(1e3 * row["tera_operations_per_image"]), _number(1e3 * row["weight_gb_per_image"])]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<div class='wide'><table>{head}{''.join(rows)}</table></div>"


class Unit(NamedTuple):
    """What times are shown in."""

    name: str
    per_second: float

    def of(self, seconds: float | None) -> float | None:
        return None if seconds is None else self.per_second * seconds


def _number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{float(f'{value:.3g}'):.6g}"


def _text(value: object) -> str:
    return html.escape(str(value))


# --------------------------------------------------------------------------------------------------- bars

WIDTH, LEFT, RIGHT, TOP, ROW, BAR, AXIS = 940, 150, 190, 6, 34, 20, 26


class Bar(NamedTuple):
    """A bar: what stands left of it, its segments by name (of COLORS), what stands right of it, values to mark."""

    label: str
    segments: Mapping[str, float]
    note: str
    marks: Mapping[str, float] = {}


def _figure(title: str, bars: Sequence[Bar], keys: Sequence[tuple[str, str]], unit: str) -> str:
    """Horizontal bars of stacked segments on one linear axis, with a legend of (colour, text)."""
    most = max(max(sum(bar.segments.values()), *bar.marks.values(), 0.0) for bar in bars) or 1.0
    ticks = _ticks(most)
    top, bottom = max(most, ticks[-1]), TOP + ROW * len(bars)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / top

    body = []
    for tick in ticks:
        body.append(f"<line x1='{x(tick):.1f}' y1='{TOP}' x2='{x(tick):.1f}' y2='{bottom}' stroke='#e5e8eb'/>")
        body.append(f"<text x='{x(tick):.1f}' y='{bottom + 17}' text-anchor='middle' fill='{GREY}'>{tick:g} {unit}</text>")
    dashes = {key: dash for key, _, dash in FLOORS}
    for index, bar in enumerate(bars):
        y, start = TOP + ROW * index + (ROW - BAR) / 2, 0.0
        base = y + BAR / 2 + 4  # of the text
        body.append(f"<text x='{LEFT - 10}' y='{base}' text-anchor='end'>{_text(bar.label)}</text>")
        for name, value in bar.segments.items():
            body.append(
                f"<rect x='{x(start):.2f}' y='{y}' width='{x(value) - LEFT:.2f}' height='{BAR}' fill='{COLORS[name]}'>"
                f"<title>{_text(name)} {value:.3g} {unit}</title></rect>"
            )
            start += value
        for name, value in bar.marks.items():
            line = f"x1='{x(value):.1f}' y1='{y - 5}' x2='{x(value):.1f}' y2='{y + BAR + 5}'"
            body.append(
                f"<line {line} stroke='{INK}' stroke-width='2' stroke-dasharray='{dashes.get(name, '')}'>"
                f"<title>{_text(name)} {value:.3g} {unit}</title></line>"
            )
        end = x(max(start, *bar.marks.values(), 0.0))
        body.append(f"<text x='{end + 8:.1f}' y='{base}'>{_text(bar.note)}</text>")
    legend = " ".join(f"<span><i style='color:{color}'>&#9632;</i> {_text(text)}</span>" for color, text in keys)
    if marked := [(text, dash) for key, text, dash in FLOORS if any(key in bar.marks for bar in bars)]:
        line = f"<line x1='4' y1='1' x2='4' y2='15' stroke='{INK}' stroke-width='2' stroke-dasharray="
        marks = [f"<span><svg viewBox='0 0 8 16'>{line}'{dash}'/></svg> {_text(text)}</span>" for text, dash in marked]
        legend += f"<br>{' '.join(marks)}"
    return (
        f"<figure><figcaption>{legend}</figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {bottom + AXIS}' font-size='13' font-family='system-ui, sans-serif' fill='{INK}' "
        f"role='img' aria-label='{html.escape(title, quote=True)}'>{''.join(body)}</svg></figure>"
    )


def _ticks(most: float) -> list[float]:
    """0 and a few round values, the last at or above ``most``."""
    power = 10.0 ** (len(f"{most:.0f}") - 1) if most >= 1 else 1.0
    while power > most:
        power /= 10
    step = next(step for step in (0.2 * power, 0.5 * power, power, 2 * power) if 6 * step >= most)
    return [round(step * i, 12) for i in range(int(-(-most // step)) + 1)]


__all__ = ["render"]
