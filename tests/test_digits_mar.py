"""The trained diffusion model `digits-mar` from checkpoint to images: parity, 8 bits, calibration, reports, cost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from arinar.calibration.collect import CalibrationError, RecordingBackend, collect, collect_random
from arinar.calibration.precision import Evaluator
from arinar.calibration.recording import Recording
from arinar.checkpoint import load_arinar, load_vae
from arinar.config import PRESETS
from arinar.export.layers import Graph, LayerPlan, layer_graphs
from arinar.export.quantize import quantize_bundle
from arinar.measure.cost import diffusion_parameters, image_cost
from arinar.measure.parity import run_parity
from arinar.measure.parity_report import render
from arinar.runtime import Bundle, Pipeline


@pytest.fixture(scope="module")
def bundle(demo_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an int8 variant beside fp32."""
    made = Path(shutil.copytree(demo_bundle("digits-mar"), tmp_path_factory.mktemp("mar") / "digits-mar"))
    quantize_bundle(made, "int8")
    return made


@pytest.fixture(scope="module")
def recording(bundle: Path) -> Recording:
    return collect(Bundle.open(bundle), num_images=16, num_iter=3, batch_size=16)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_parity(bundle: Path, precision: str) -> None:
    report = run_parity(
        Pipeline.load(bundle, precision=precision),
        load_arinar("digits-mar"),
        load_vae("digits-mar"),
        labels=[3, 8],
        num_iter=4,
        sampling_steps="ddim10",
    )
    assert report.passed, report.table()
    names = {check.name for check in report.checks}
    assert {"mean", "logvar", "kl", "mean kl", "median PSNR, dB"} <= names
    assert not {"same component", "same picks"} & names  # a Gaussian has nothing to pick
    page = render(report)
    assert "nats per sampling step" in page and "mean of a sampling step" in page
    assert "mixture" not in page and "component" not in page


def test_a_law_that_is_off_is_found(bundle: Path) -> None:
    """Constants of a schedule that is not the model's: the images look alike, the law does not."""
    pipeline = Pipeline.load(bundle)
    head: Any = pipeline.loop.head
    chain = head._chain("ddim25")
    changed = np.array(chain.constants)
    changed[:, 1] *= 1.01
    head._chains["ddim25"] = replace(chain, constants=changed)
    report = run_parity(pipeline, load_arinar("digits-mar"), load_vae("digits-mar"), labels=[3], num_iter=2)
    assert {"mean", "kl"} <= {check.name for check in report.failed}
    where = next(check.where for check in report.failed if check.name == "mean")
    assert where.startswith("sampling step ")


def test_guided_and_plain_steps_share_their_layers(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    infos = opened.manifest.precision_graphs("fp32")
    assert layer_graphs(infos) == ["outer_step", "head_condition", "head_step", "head_step_guided"]
    plain, guided = (Graph.load(opened.graph_path(infos[name])) for name in ("head_step", "head_step_guided"))
    assert set(plain.layers) == set(guided.layers)
    assert {"head_step/modulation", "head_step/res_blocks.2.mlp.2", "head_step/final_layer.linear"} <= set(plain.layers)
    # What the first sampling step multiplies by hundreds stays in float32.
    assert {name for name, layer in plain.layers.items() if not layer.wide} == {
        "head_step/input_proj",
        "head_step/final_layer.linear",
    }


def test_calibration_sees_the_head_and_weighs_its_layers(bundle: Path, recording: Recording) -> None:
    assert all(statistics.count > 0 for statistics in recording.layers.values())
    evaluator = Evaluator(Bundle.open(bundle), recording)
    layer = evaluator.layers["head_step/modulation"]
    absmax = float(recording.layers[layer.name].channel_absmax.max())
    fine = evaluator.cost({layer.name: LayerPlan("int8-static", absmax=absmax)})
    coarse = evaluator.cost({layer.name: LayerPlan("int8-static", absmax=absmax / 8)})
    assert 0 < fine.kl < 1e-3 < 10 * fine.kl < coarse.kl


def test_a_recording_without_a_layer_is_refused(bundle: Path, recording: Recording) -> None:
    less = Recording(recording.settings)
    less.done, less.layers = recording.done, dict(recording.layers)
    del less.layers["head_step/modulation"]
    with pytest.raises(CalibrationError, match="layer head_step/modulation are not this model's"):
        RecordingBackend(Bundle.open(bundle), less, 3, 0, 1)


def test_random_inputs_reach_every_layer(bundle: Path) -> None:
    found = collect_random(Bundle.open(bundle), launches=2, rows=2)
    assert all(statistics.count > 0 for statistics in found.layers.values())


def test_cost_of_the_published_sizes() -> None:
    """Multiply-adds of a row, and of an image as published: 100 steps, both branches."""
    config = PRESETS["mar_base"]
    step = diffusion_parameters(config) - config.z_width * config.inner_width
    assert step == (5 * 6 + 2) * 1024**2 + 3 * 16 * 1024
    cost = image_cost(config, 64, guided=True)
    assert cost.inner == pytest.approx(3.44e12, rel=0.01)
    assert 10e12 < cost.outer < 11.0e12  # the published code computes all positions in the last block too
    assert image_cost(config.replace(sampling_steps="25"), 64, guided=True).inner == pytest.approx(cost.inner / 4, rel=0.01)
    gmm = image_cost(PRESETS["base"], 64, guided=True)
    assert 25 < cost.inner / gmm.inner < 35
