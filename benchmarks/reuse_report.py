"""The page of `benchmarks.reuse`, and what reuse is called on it."""

from __future__ import annotations

import itertools
from typing import Any

from arinar.config import PRESETS, ArinarConfig
from benchmarks.local_steps import SHARES, multiply_adds

#: Errors are told of all steps, and of those from here on: before, few tokens are known and much changes.
WARM_UP = 16
AGES = range(1, 8)
AFTER, BEFORE = "difference kept, after the norm", "difference kept, before the norm"
UNCOND, BOTH, UNGUIDED = "z_u kept", "z_c and z_u kept", "unguided"
LOCAL, LOCAL_AFTER = "local, {} after a refresh", "local, {} after a refresh, difference kept"
LOCAL_KEPT = "local, {} after a refresh, class buffer kept"
COLUMNS = {"ks_mean": "KS, mean", "share": "multiply-adds", "share_base": "ARINAR-B's"}
WHAT = """Cells are `z_c / z_u / KS / 99 %`: the relative root mean square error of z in each branch; the distance between the
laws of each feature drawn, exact and with reuse, its mean and 99th percentile."""


def cadences(config: ArinarConfig, errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every 2 or 4 steps one whole, the others by reuse: the mean distance over all steps, where the whole ones' is 0, and
    the shares of the exact plan's multiply-adds. With both z kept such steps are one: so many fewer steps."""
    distances = {(row["num_iter"], row["what"], row["age"]): row["all"]["ks_mean"] for row in errors}
    found = []
    for num_iter, every in itertools.product(dict.fromkeys(row["num_iter"] for row in errors), (2, 4)):
        after = every - 1
        ways: dict[str, dict[str, Any]] = {
            AFTER: {"refresh": every},
            LOCAL.format(after): {"local": after},
            LOCAL_KEPT.format(after): {"local": after, "keep_buffer": True},
            LOCAL_AFTER.format(after): {"local": after, "refresh": every},
            BOTH: {"num_iter": num_iter // every},
        }
        for what, how in ways.items():
            mean = sum(distances.get((num_iter, what, age), 0.0) for age in range(1, every)) / every
            row = {"num_iter": num_iter, "every": every, "what": what, "ks_mean": mean}
            found.append(row | shares(config, num_iter, **how))
    return found


def shares(config: ArinarConfig, whole: int, **how: Any) -> dict[str, float]:
    """Multiply-adds by those of ``whole`` exact steps: of this model, and of ARINAR-B."""
    found = {}
    for name, one in (("share", config), ("share_base", PRESETS["base"])):
        found[name] = multiply_adds(one, **({"num_iter": whole} | how)) / multiply_adds(one, whole)
    return found


def markdown(result: dict[str, Any]) -> str:
    images = f"{result['images']} images, guidance {result['guidance_scale']:g}, exact tokens forced, float64."
    parts = [f"# Reuse between outer steps: {result['model']}", images, WHAT]
    for number in dict.fromkeys(row["num_iter"] for row in result["errors"]):
        rows = [row for row in result["errors"] if row["num_iter"] == number]
        parts += [f"## {number} steps", by_age(rows, "all")]
        parts += [f"From step {WARM_UP} on:", by_age(rows, "late")] if number > WARM_UP else []
    parts += ["## Of every 2 or 4 steps one whole", "Distances of whole steps are 0. Multiply-adds: the exact plan = 1."]
    cells = [
        [row["num_iter"], row["every"], row["what"], *(f"{row[key]:.2g}" for key in COLUMNS)] for row in result["cadences"]
    ]
    parts.append(_table(["steps", "one whole of", "the others", *COLUMNS.values()], cells))
    if few := result["fewer_steps"]:
        parts.append("Fewer steps from the first on, in the cosine's counts:")
        cells = [[row["num_iter"], *(f"{row[key]:.2g}" for key in COLUMNS)] for row in few]
        parts.append(_table(["steps", *COLUMNS.values()], cells))
    if own := result["own"]:
        parts += [f"## Images of their own: {own['images']}, {own['num_iter']} steps, the same noise"]
        parts += ["Distance: mean difference of tokens, where between exact images of other noise it is 1."]
        cells = [[row["what"], f"{row['distance']:.3f}", f"{row['differ']:.1%}"] for row in own["rows"]]
        parts.append(_table(["", "distance", "tokens that differ"], cells))
    parts += ["## Arithmetic of the outer network, the exact plan = 1"]
    parts += ["`a / b / c`: guidance refreshed every step, every 2nd, every 4th. Batch 1: least time on two cores, in float32."]
    names = ["rows", "multiply-adds", "the same, class buffer kept", "passes over the weights", "batch 1, class buffer kept"]
    for part in result["arithmetic"]:
        groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for row in part["rows"]:
            groups.setdefault((row["local"], row["warm_up"]), []).append(row)
        cells = [[*key, *(" / ".join(f"{row[name]:.2f}" for row in rows) for name in SHARES)] for key, rows in groups.items()]
        parts += [
            f"{part['model']}, {part['schedule']}:",
            _table(["local steps after a refresh", "exact at first", *names], cells),
        ]
    return "\n\n".join(parts) + "\n"


def by_age(rows: list[dict[str, Any]], which: str) -> str:
    found: dict[str, dict[int, str]] = {}
    for row in rows:
        if row[which]:
            cell = " / ".join(f"{row[which][key]:.2g}" for key in ("z_c", "z_u", "ks_mean", "ks_99"))
            found.setdefault(row["what"], {})[row["age"] or 1] = cell
    cells = [[what, *(ages.get(age, "") for age in AGES)] for what, ages in found.items()]
    return _table(["reused", *(f"{age} step{'s' * (age > 1)} old" for age in AGES)], cells)


def _table(head: list[str], cells: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
