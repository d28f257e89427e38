"""The benchmark of plans: what it asks for is what models take, and what it tells is what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("onnxruntime")

from arinar.config import PRESETS
from arinar.runtime.bundle import Defaults
from arinar.runtime.request import Sampling
from benchmarks import plans_report
from benchmarks.plans import EXACT, PLANS


@pytest.mark.parametrize("preset", ["letters", "base"])
def test_every_plan_is_one_for_both_models(preset: str) -> None:
    config, found = PRESETS[preset], {}
    for plan in PLANS:
        asked = Sampling.resolve(
            config,
            Defaults(guidance_scale=4.0, cfg_schedule="linear", temperature=1.0, num_iter=64),
            [0],
            **plan.arguments(config),
        )
        found[plan.name] = asked.batch().plan
    assert len(found) == len(PLANS) and len({plan.folder for plan in PLANS}) == len(PLANS)
    assert len(found[EXACT]) == 64 and all(step.guided and not step.reuses for step in found[EXACT])
    assert len(found["staged 16+6+2"]) == 24 and len(found["24 steps"]) == 24
    assert all(steps != found[EXACT] for name, steps in found.items() if EXACT not in name)


QUALITY: dict[str, Any] = {
    "images": 52,
    "floor": {"reader": 2.0, "built-in": 0.1},
    "rows": {
        name: {
            "agreement": 0.9,
            "reader": {"exact": far, "exact_std": 0.1, "further_from_real": 0.5, "further_from_real_std": 0.25},
            "built-in": {"exact": far / 20, "exact_std": 0.01, "further_from_real": 0.0, "further_from_real_std": 0.1},
        }
        for name, far in (("exact", 0.0), ("fast", 1.0), ("slower and worse", 4.0), ("int8: exact", 0.02))
    },
}
SECONDS: dict[str, Any] = {
    "rounds": 3,
    "threads": 2,
    "rows": {
        "exact": [{"total": 8.0}, {"total": 16.0}, {"total": 8.0}],
        "fast": [{"total": 2.0}, {"total": 4.0}, {"total": 8.0}],
        "slower and worse": [{"total": 4.0}, {"total": 8.0}, {"total": 4.0}],
        "int8: exact": [{"total": 4.0}, {"total": 4.0}, {"total": 4.0}],
        "PyTorch, eager": [{"total": 16.0}] * 3,
    },
}


def test_the_table_has_ratios_of_rounds_and_of_the_noise_floor(tmp_path: Path) -> None:
    (tmp_path / "quality.json").write_text(json.dumps(QUALITY))
    assert [path.name for path in plans_report.write(tmp_path, "exact")] == ["plans.md"]  # nothing to plot yet
    (tmp_path / "seconds.json").write_text(json.dumps(SECONDS))
    table, plot = plans_report.write(tmp_path, "exact")
    lines = table.read_text().splitlines()
    (fast,) = [line for line in lines if line.startswith("| fast ")]
    assert fast == "| fast | 4.00 | 90.0% | 0.50 ± 0.05 | 0.50 ± 0.10 | +0.5 ± 0.25 |"
    assert "| PyTorch, eager | 0.50 |  |  |  |  |" in lines
    drawn = ElementTree.parse(plot).getroot()
    texts = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    assert {"fast", "slower and worse", "int8: exact", "two seeds of the exact plan"} <= set(texts)
    assert "exact" not in texts  # its distance is none: it has no place on a logarithmic axis


def test_the_frontier_is_what_nothing_beats_in_both() -> None:
    points = [("a", 1.0, 0.1), ("b", 2.0, 0.2), ("c", 2.0, 0.3), ("d", 1.5, 0.25), ("e", 4.0, 9.0)]
    assert plans_report.frontier(points) == {"a", "b", "e"}
