"""What `benchmarks.plans` measured, as a table and a plot: plans.md, plans.svg."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from arinar.files import write_text
from arinar.measure.charts import AXIS, COLORS, GREY, INK, RULE, label, line

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 480, 62, 20, 16, 44
EIGHT_BITS = "int8: "
#: Of the plot's texts, in pixels: a letter's width, a line's height.
LETTER, ROW = 6.3, 13


class Row(NamedTuple):
    """A plan: ratio of the exact plan's seconds to its own (None: not timed), and what its images scored (None: not made)."""

    name: str
    speed: float | None
    score: Mapping[str, Any] | None


def write(folder: Path, exact: str) -> list[Path]:
    """The files that were written."""
    quality, seconds = (_read(folder / name) for name in ("quality.json", "seconds.json"))
    rows = rows_of(quality, seconds, exact)
    paths = folder / "plans.md", folder / "plans.svg"
    write_text(paths[0], table(rows, quality, seconds, exact))
    if not (quality and seconds):
        return [paths[0]]
    write_text(paths[1], plot(rows, quality["floor"]["reader"]))
    return list(paths)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def rows_of(quality: Any, seconds: Any, exact: str) -> list[Row]:
    scores, times = (found["rows"] if found else {} for found in (quality, seconds))
    return [
        Row(name, speed(times, name, exact), scores.get(name)) for name in [*scores, *(n for n in times if n not in scores)]
    ]


def speed(times: Mapping[str, Sequence[Mapping[str, float]]], name: str, exact: str) -> float | None:
    """The median over rounds of how many times faster than the exact plan of the same round."""
    if name not in times:
        return None
    return median(one["total"] / other["total"] for one, other in zip(times[exact], times[name], strict=True))


def table(rows: Sequence[Row], quality: Any, seconds: Any, exact: str) -> str:
    lines = []
    if quality:
        floor = quality["floor"]
        lines += [
            f"{quality['images']:,} images of each plan. Two seeds of the exact plan are {floor['reader']:.3g} (reader) and "
            f"{floor['built-in']:.3g} (built-in features) apart: 1 in the columns of distances.",
            "",
        ]
    if seconds:
        usual = median(one["total"] for one in seconds["rows"][exact])
        lines += [
            f"The exact plan takes {usual:.1f} s an image ({seconds['rounds']} rounds, {seconds['threads']} threads).",
            "",
        ]
    lines += [
        "| plan | times as fast | letters read as asked | distance to exact, reader | built-in | further from real, reader |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *(_line(row, quality) for row in rows)]) + "\n"


def _line(row: Row, quality: Any) -> str:
    cells = [row.name, "" if row.speed is None else f"{row.speed:.2f}"]
    if row.score is None:
        return f"| {' | '.join([*cells, '', '', '', ''])} |"
    cells.append(f"{row.score['agreement']:.1%}")
    for space in ("reader", "built-in"):
        floor, found = quality["floor"][space], row.score[space]
        cells.append(f"{found['exact'] / floor:.2f} ± {found['exact_std'] / floor:.2f}")
    real = row.score["reader"]
    cells.append(f"{real['further_from_real']:+.3g} ± {real['further_from_real_std']:.2g}")
    return f"| {' | '.join(cells)} |"


# ----------------------------------------------------------------------------------------------------------- plot


def plot(rows: Sequence[Row], floor: float) -> str:
    """Speed across, distance to the exact images up, both logarithmic, as an SVG file of its own."""
    shown = [(row.name, row.speed, row.score["reader"]["exact"] / floor) for row in rows if row.speed and row.score]
    points = [(name, fast, far) for name, fast, far in shown if far > 0]
    x_end = 2.0 ** math.ceil(math.log2(max(fast for _, fast, _ in points)) + 0.2)
    low, high = min(far for *_, far in points) / 2, 2.5 * max(1.0, *(far for *_, far in points))

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log2(value / 0.9) / math.log2(x_end / 0.9)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - math.log10(value / low) / math.log10(high / low))

    body = _axes(x, y, x_end, low, high)
    best = frontier(points)
    texts = placed([(name, x(fast), y(far)) for name, fast, far in points])
    for name, fast, far in points:
        color = COLORS[1] if name.startswith(EIGHT_BITS) else COLORS[0]
        ring = f" stroke='{INK}' stroke-width='1.5'" if name in best else ""
        body.append(f"<circle cx='{x(fast):.1f}' cy='{y(far):.1f}' r='4.5' fill='{color}'{ring}/>")
        left, base = texts[name]
        if abs(base - y(far) - 4) > ROW / 2:
            body.append(line(x(fast), y(far), left - 2 if left > x(fast) else left + LETTER * len(name) + 2, base - 4, AXIS))
        body.append(label(left, base, name))
    canvas = f"viewBox='0 0 {WIDTH} {HEIGHT}' font-size='11' font-family='system-ui, sans-serif' fill='{INK}'"
    ground = f"<rect width='{WIDTH}' height='{HEIGHT}' fill='#fff'/>"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {canvas}>{ground}{''.join(body)}</svg>\n"


def placed(points: Sequence[tuple[str, float, float]]) -> dict[str, tuple[float, float]]:
    """Where each point's text begins (left, base line), none on another or on a point: as near as there is room."""
    taken = [(px - 6, py - 6, px + 6, py + 6) for _, px, py in points]
    found = {}
    for name, px, py in sorted(points, key=lambda point: point[1]):
        wide = LETTER * len(name)
        tries = [(side, sign * ROW * rows) for rows in range(20) for sign in (1, -1) for side in (px + 9, px - 9 - wide)]
        for left, down in tries:
            area = (left, py + down - ROW / 2, left + wide, py + down + ROW / 2)
            inside = area[0] > LEFT and area[2] < WIDTH and area[1] > TOP and area[3] < HEIGHT - BOTTOM
            if inside and not any(a < area[2] and area[0] < c and b < area[3] and area[1] < d for a, b, c, d in taken):
                break
        taken.append(area)
        found[name] = (left, py + down + 4)
    return found


def frontier(points: Sequence[tuple[str, float, float]]) -> set[str]:
    """Plans that no other beats in both speed and distance."""
    return {
        name for name, fast, far in points if not any(f >= fast and d <= far and (f, d) != (fast, far) for _, f, d in points)
    }


def _axes(x: Any, y: Any, x_end: float, low: float, high: float) -> list[str]:
    body = []
    tick = 1.0
    while tick <= x_end:
        body += [
            line(x(tick), TOP, x(tick), HEIGHT - BOTTOM, RULE),
            label(x(tick), HEIGHT - BOTTOM + 16, f"{tick:g}×", "middle"),
        ]
        tick *= 2
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for value in (factor * 10.0**power for power in powers for factor in (1, 2, 5)):
        if not low <= value <= high:
            continue
        body += [line(LEFT, y(value), WIDTH - RIGHT, y(value), RULE), label(LEFT - 6, y(value) + 4, f"{value:g}", "end")]
    if low < 1 < high:
        body.append(line(LEFT, y(1), WIDTH - RIGHT, y(1), GREY, dashes="6 4"))
        body.append(label(WIDTH - RIGHT - 4, y(1) - 5, "two seeds of the exact plan", "end", GREY))
    body.append(line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, AXIS))
    body.append(label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "times as fast as the exact plan, base, batch 1", "middle", GREY))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    body.append(
        f"<text transform='translate(14 {middle:.0f}) rotate(-90)' text-anchor='middle' fill='{GREY}'>Frechet distance to the "
        f"exact images, letters</text>"
    )
    return body
