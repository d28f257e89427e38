"""A benchmark's report as one HTML page: opens from disk, needs no network; charts are inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .bench import COLD_PHASES, PHASES, backend_text, compared_with, limits_text
from .charts import Bar, Mark, escaped, page, segment_plot

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
# Floors on the bars, by the result's key.
FLOORS = {
    "floor_s_per_image": Mark("at least, for the operations"),
    "memory_floor_s_per_image": Mark("at least, for reading the weights", dashes="3 2"),
}
FLOOR_NOTE = (
    "At least: the operations at the measured peak of matrix products; the weights, read once per outer step of a batch, "
    "at the measured bandwidth of memory. Norms, activations and the draw from the mixtures are not counted. What fits the "
    "caches may be read faster."
)

STYLE = """
table { margin: 12px 0; }
th, td { text-align: right; padding: 5px 0 5px 18px; white-space: nowrap; }
th { vertical-align: bottom; } th.group { text-align: center; } td:first-child { padding-left: 0; } .wide { overflow-x: auto; }
figure { margin: 12px 0; overflow-x: auto; } figcaption { margin-bottom: 4px; } figcaption span { white-space: nowrap; }
svg { min-width: 700px; }
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
        f"<p>{escaped(where['cpu'])}, {where['cores']} cores; {escaped(versions)}; {escaped(where['date'])}<br>"
        f"guidance {report['guidance_scale']:g}, median of {report['repeats']} rounds, peak memory {memory:.2f} GB"
        + (f"<br>{escaped(limits)}" if limits else "")
        + "</p>",
        "<h2>Time per image</h2>",
        _times(results, unit),
        _table(results, unit),
        f"<p>{FLOOR_NOTE}</p>" if limits else "",
        "<h2>Cold start</h2><p>A fresh process, until it can generate.</p>",
        _cold_start(report["cold_start"]),
    ]
    if against := report.get("against"):
        parts.append(f"<h2>Times faster</h2><p>than {escaped(compared_with(against))}</p>{_ratios(against['results'], unit)}")
    return page(name, parts, STYLE)


def _times(results: Sequence[dict[str, Any]], unit: Unit) -> str:
    bars = [
        Bar(
            _setting(row),
            {name: unit.per_second * row["phases"][name] for name in PHASES if name in row["phases"]},
            f"{_number(unit.of(row['s_per_image']))} {unit.name}",
            {key: unit.per_second * row[key] for key in FLOORS if key in row},
        )
        for row in results
    ]
    keys = [(COLORS[name], text) for name, text in PHASES.items() if any(name in row["phases"] for row in results)]
    return segment_plot(bars, "Time per image by phase", unit.name, colors=COLORS, keys=keys, marks=FLOORS)


def _cold_start(cold: Mapping[str, float]) -> str:
    keys = [(COLORS[name], f"{text} {cold[name]:.2f} s") for name, text in COLD_PHASES.items()]
    segments = {name: cold[name] for name in COLD_PHASES}
    bar = Bar("cold start", segments, f"{sum(segments.values()):.2f} s")
    return segment_plot([bar], "Cold start", "s", colors=COLORS, keys=keys)


def _ratios(rows: Sequence[dict[str, Any]], unit: Unit) -> str:
    if not rows:
        return "<p>The two reports have no setting (batch, steps) in common.</p>"
    bars = []
    for row in rows:
        before, after = _number(unit.of(row["before"])), _number(unit.of(row["after"]))
        note = f"{row['times_faster']:.2f} x: {before} → {after} {unit.name}"
        bars.append(Bar(_setting(row), {"outer": row["times_faster"]}, note, {"as fast": 1.0}))
    return segment_plot(bars, "Times faster", "x", colors=COLORS)


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
        cells += [_number(unit.of(row.get(key))) for key in FLOORS]
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


__all__ = ["render"]
