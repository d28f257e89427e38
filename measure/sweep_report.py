"""A sweep as text, and as one HTML page: opens from disk, needs no network."""

from __future__ import annotations

from collections.abc import Sequence

from arinar.text import aligned

from .charts import COLORS, escaped, line_plot, page
from .evaluate import Estimate
from .sweep import Score, Sweep, describe

HEADER = ("guidance", "temperature", "steps", "FID", "behind the best", "KID x 1000", "precision", "recall", "IS", "agreement")
STYLE = """
th, td { text-align: right; padding: 4px 0 4px 20px; } td:first-child, th:first-child { padding-left: 0; }
figure svg { max-width: 620px; }
"""
NOTE = (
    "All settings begin with the same noise. FID with the interval that another set of as many images would lie in (95 %); "
    "behind the best: the difference and its own interval, which is narrower, as both sets were drawn alike."
)


def table(found: Sweep) -> str:
    rows = [HEADER, *(_cells(score) for score in found.scores)]
    filled = [place for place in range(len(HEADER)) if any(row[place] for row in rows[1:])]
    lines = aligned([[row[place] for place in filled] for row in rows])
    return "\n".join([*lines, f"best: {describe(found.best)}"])


def render(found: Sweep) -> str:
    """The page."""
    rows = [HEADER, *(_cells(score) for score in found.scores)]
    filled = [place for place in range(len(HEADER)) if any(row[place] for row in rows[1:])]
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{escaped(row[place])}</{tag}>" for place in filled) + "</tr>")
    first = found.scores[0].evaluation
    words = f"{first.images} images of each setting against {found.reference}, {first.features} features ({first.width})"
    parts = [f"<p>{escaped(words)}<br>{escaped(NOTE)}</p>", *_plots(found.scores), f"<table>{''.join(lines)}</table>"]
    return page(f"Sweep: best at {describe(found.best)}", parts, STYLE)


def _cells(score: Score) -> tuple[str, ...]:
    found, setting = score.evaluation, score.setting
    return (
        f"{setting.guidance_scale:g}",
        f"{setting.temperature:g}",
        str(setting.num_iter),
        _interval(found.fid),
        _deviation(score.behind),
        "" if found.kid is None else f"{found.kid.value * 1000:.3g}",
        "" if found.precision is None else f"{found.precision:.1%}",
        "" if found.recall is None else f"{found.recall:.1%}",
        "" if found.inception is None else f"{found.inception.value:.4g}",
        "" if found.agreement is None else f"{found.agreement:.1%}",
    )


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    ends = estimate.interval
    return f"{estimate.value:.4g}" + ("" if ends is None else f" [{max(ends[0], 0):.4g}, {ends[1]:.4g}]")


def _deviation(estimate: Estimate) -> str:
    ends = estimate.interval
    return f"{estimate.value:.3g}" + ("" if ends is None or estimate.value == 0 else f" [{ends[0]:.3g}, {ends[1]:.3g}]")


def _plots(scores: Sequence[Score]) -> list[str]:
    """FID over the axis with the most values; a figure for each value of the shortest one, a line for each of the third."""
    names = {"guidance_scale": "guidance", "temperature": "temperature", "num_iter": "steps"}
    values = {name: sorted({getattr(score.setting, name) for score in scores}) for name in names}
    across, lines, figures = sorted(names, key=lambda name: -len(values[name]))
    by_setting = {score.setting: score.evaluation for score in scores}
    plots = []
    for fixed in values[figures]:
        for start in range(0, len(values[lines]), len(COLORS)):
            series = {}
            for line in values[lines][start : start + len(COLORS)]:
                curve = []
                for value in values[across]:
                    setting = scores[0].setting._replace(**{across: value, lines: line, figures: fixed})
                    found = by_setting.get(setting)
                    curve.append(float("nan") if found is None or found.fid is None else found.fid.value)
                series[f"{names[lines]} {line:g}"] = curve
            title = f"FID, {names[figures]} {fixed:g}" if len(values[figures]) > 1 else "FID"
            ticks = [f"{value:g}" for value in values[across]]
            plots.append(line_plot(series, title, names[across], "FID", log=False, ticks=ticks))
    return plots
