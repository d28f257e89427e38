"""The benchmark's arithmetic; never its speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arinar.config import PRESETS, VAE_PRESETS
from arinar.runtime import Pipeline
from arinar.runtime.bench import bench, compare, table
from arinar.runtime.cost import image_cost


def test_costs_of_the_published_size() -> None:
    masked = image_cost(PRESETS["base"], 64, guided=True, vae=VAE_PRESETS["kl16"])
    causal = image_cost(PRESETS["base-causal"], 64, guided=True)
    assert 12.0e12 < masked.outer < 12.8e12  # 12.8 with every position in the last block
    assert 0.25e12 < causal.outer < 0.28e12 and masked.outer / causal.outer > 45
    assert masked.outer_weights == 4 * 28 * 12 * 768**2
    assert image_cost(PRESETS["base"], 64, guided=False).outer == pytest.approx(masked.outer / 2)


def test_counted_operations_are_those_of_the_vae_decoder() -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from arinar.runtime.cost import decoder_operations
    from arinar.vae import AutoencoderKL

    config = VAE_PRESETS["digits"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        AutoencoderKL(config).decode(torch.zeros(1, 16, 4, 4))
    assert decoder_operations(config, 4) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_bench_reports_every_setting(digits_bundle: Path) -> None:
    report = bench(Pipeline.load(digits_bundle), batches=(1, 3), num_iters=(2, 4), repeats=1)
    assert json.loads(json.dumps(report)) == report
    assert [(row["batch"], row["num_iter"]) for row in report["results"]] == [(1, 2), (1, 4), (3, 2), (3, 4)]
    for row in report["results"]:
        assert row["s_per_image"] > 0 and set(row["phases"]) == {"outer", "inner", "vae"}
        assert row["floor_s_per_image"] > 0 and row["tera_operations_per_image"] > 0
    assert report["cold_start"]["import_s"] > 0 and report["peak_memory_gb"] > 0
    assert "floor" in table(report)
    faster = json.loads(json.dumps(report))
    for row in faster["results"]:
        row["s_per_image"] /= 2
    assert compare(report, faster).count("2.00") == 4
