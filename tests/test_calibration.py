"""Calibration: streaming statistics, recording and resuming, sensitivity and the search, bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

pytest.importorskip("onnxruntime")

from arinar.calibration import collect as recording_module
from arinar.calibration.collect import collect, collect_random
from arinar.calibration.precision import Cost, Evaluator, _activations, calibrate, layer_plan, search, to_json
from arinar.calibration.ranges import BINS, METHODS, TensorStatistics
from arinar.calibration.recording import CalibrationError, Recording
from arinar.cli import main
from arinar.config import ArinarConfig
from arinar.export.layers import LayerPlan
from arinar.files import hidden_name
from arinar.runtime.bundle import Bundle, BundleError

QUICK: dict[str, Any] = {"num_images": 4, "num_iter": 3, "batch_size": 2, "threads": 1}


@pytest.fixture(scope="module")
def bundle(digits_bundle: Path) -> Bundle:
    return Bundle.open(digits_bundle)


# ----------------------------------------------------------------------------------------------- statistics


def test_statistics_do_not_depend_on_how_values_arrive() -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((600, 8)) * np.linspace(0.01, 3, 8)).astype(np.float32)
    whole, parts = TensorStatistics(8, 2), TensorStatistics(8, 2)
    whole.update(values, 0)
    for chunk in np.array_split(values[np.argsort(np.abs(values).max(1))], 7):
        parts.update(chunk, 0)
    parts.update(values[:0], 1)
    assert np.array_equal(whole.histogram, parts.histogram) and whole.limit == parts.limit
    assert whole.ranges() == parts.ranges() and whole.count == parts.count == values.size
    np.testing.assert_array_equal(whole.channel_absmax, np.abs(values).max(0))
    assert whole.absmax == np.abs(values).max() and whole.low == values.min() and whole.high == values.max()
    assert parts.step_absmax.tolist() == [whole.absmax, 0]
    again = TensorStatistics.from_arrays(whole.arrays())
    assert again.ranges() == whole.ranges() and again.count == whole.count
    for name, found in whole.arrays().items():
        np.testing.assert_array_equal(found, again.arrays()[name])
    with pytest.raises(ValueError, match="histogram has shape"):
        TensorStatistics.from_arrays(whole.arrays() | {"histogram": np.zeros(3, np.int64)})


@pytest.mark.parametrize("scale", [1e-3, 0.1, 30.0])
def test_ranges_of_normal_values_of_any_size(scale: float) -> None:
    values = (np.random.default_rng(4).standard_normal((20_000, 1)) * scale).astype(np.float32)
    statistics = TensorStatistics(1, 1)
    for chunk in np.array_split(values, 5):
        statistics.update(chunk, 0)
    ranges = statistics.ranges()
    assert ranges["absmax"] == np.abs(values).max() and all(0 < ranges[name] <= ranges["absmax"] for name in METHODS)
    quantile = float(np.quantile(np.abs(values), 0.9999))
    assert abs(ranges["percentile"] - quantile) <= 2 * statistics.limit / BINS + 0.05 * quantile

    def error(clip: float) -> float:
        step = clip / 127
        return float(np.square(np.clip(np.round(values / step), -127, 127) * step - values).mean())

    assert error(ranges["mse"]) <= error(ranges["absmax"]) * 1.02


def test_ranges_of_a_tensor_with_outliers() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((20_000, 10)).astype(np.float32)
    values[0, 0] = 400
    statistics = TensorStatistics(10, 1)
    statistics.update(values, 0)
    ranges = statistics.ranges()
    assert set(ranges) == set(METHODS) and ranges["absmax"] == 400
    assert ranges["percentile"] == pytest.approx(np.quantile(np.abs(values), 0.9999), abs=0.3)
    assert 2 < ranges["entropy"] < 60  # a single outlier does not stretch the range

    def error(clip: float) -> float:
        step = clip / 127
        return float(np.square(np.clip(np.round(values / step), -127, 127) * step - values).mean())

    assert error(ranges["mse"]) <= error(ranges["absmax"]) * 1.02
    narrow = TensorStatistics(10, 1)
    narrow.update(values[1:], 0)
    assert 3 < narrow.ranges()["mse"] <= narrow.absmax


def test_ranges_of_nothing_and_of_zeros() -> None:
    empty, zeros = TensorStatistics(3, 1), TensorStatistics(3, 1)
    zeros.update(np.zeros((5, 3), np.float32), 0)
    assert set(empty.ranges().values()) == {0.0} and zeros.ranges()["absmax"] == 0


# ------------------------------------------------------------------------------------------------ recording


@pytest.fixture(scope="module")
def recorded(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recording, Path]:
    path = tmp_path_factory.mktemp("calibration") / "calib.npz"
    return collect(bundle, partial=path, **QUICK), path


def layer_names(config: ArinarConfig) -> set[str]:
    """The layers of a masked model."""
    names = {"outer_step/z_proj", "outer_step/decoder_embed"}
    for kind, depth in (("encoder", config.encoder_depth), ("decoder", config.decoder_depth)):
        blocks = [f"outer_step/{kind}_blocks.{index}" for index in range(depth)]
        names |= {f"{block}.{layer}" for block in blocks for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    # The last block computes queries where it is asked, keys and values everywhere: one weight, two products.
    names.add(f"outer_step/decoder_blocks.{config.decoder_depth - 1}.attn.qkv#2")
    names |= {"inner_condition/cond_proj", "inner_condition/modulation", "inner_step/input_proj", "inner_step/head"}
    blocks = [f"inner_step/blocks.{index}" for index in range(config.inner_depth)]
    return names | {f"{block}.{layer}" for block in blocks for layer in ("attn.qkv", "attn.proj", "ffn.fc1", "ffn.fc2")}


def test_recording_covers_every_layer_and_step(bundle: Bundle, recorded: tuple[Recording, Path]) -> None:
    recording, path = recorded
    assert recording.done == 4 and set(recording.layers) == layer_names(bundle.manifest.config)
    for name, statistics in recording.layers.items():
        seen = statistics.step_absmax > 0
        assert seen[1:].all() and (seen[0] or name == "outer_step/z_proj"), name  # no token is known at step 0
    assert len(recording.samples) == 6 and {s.step for s in recording.samples} == {0, 1, 2}
    for sample in recording.samples:
        assert sample.tokens.shape == (len(sample.rows), 16)
    largest = max(float(maxima.max()) for maxima in recording.maxima.values())
    assert 1 < largest < 1000  # the mask that attention adds is not an activation
    again = Recording.load(path)
    assert {n: s.ranges() for n, s in again.layers.items()} == {n: s.ranges() for n, s in recording.layers.items()}
    assert again.settings == recording.settings


def test_an_interrupted_run_resumes_and_ends_alike(bundle: Bundle, recorded: tuple[Recording, Path], tmp_path: Path) -> None:
    path = tmp_path / "calib.npz"
    said: list[str] = []

    def interrupt(line: str) -> None:
        if line.startswith("2 of 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(bundle, partial=path, progress=interrupt, **QUICK)
    resumed = collect(bundle, partial=path, progress=said.append, **QUICK)
    assert said[0] == "resuming after 2 of 4 images"
    whole = recorded[0]
    for name, statistics in whole.layers.items():
        for key, value in statistics.arrays().items():
            np.testing.assert_array_equal(value, resumed.layers[name].arrays()[key])
    for ours, theirs in zip(whole.samples, resumed.samples, strict=True):
        assert ours.step == theirs.step
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    with pytest.raises(CalibrationError, match=r"another calibration \(seed differ\); delete it"):
        collect(bundle, partial=path, seed=5, **QUICK)


def test_a_run_that_was_killed_goes_on_from_its_last_finished_images(
    bundle: Bundle, recorded: tuple[Recording, Path], tmp_path: Path
) -> None:
    path = tmp_path / "calib.npz"
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from arinar.calibration.collect import collect\n"
        "from arinar.runtime.bundle import Bundle\n"
        "def progress(line):\n"
        "    if line.startswith('2 of 4'): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"collect(Bundle.open({str(bundle.folder)!r}), partial=Path({str(path)!r}), progress=progress, **{QUICK!r})\n"
    )
    root = Path(recording_module.__file__).parent.parent
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    half = hidden_name(path, "partial")
    half.write_bytes(b"half of a file, as a kill while writing leaves it")
    said: list[str] = []
    resumed = collect(bundle, partial=path, progress=said.append, **QUICK)
    assert said[0] == "resuming after 2 of 4 images" and set(tmp_path.iterdir()) == {path, half}
    for name, statistics in recorded[0].layers.items():
        for key, value in statistics.arrays().items():
            np.testing.assert_array_equal(value, resumed.layers[name].arrays()[key])
    assert resumed.seen_steps == recorded[0].seen_steps
    for ours, theirs in zip(recorded[0].samples, resumed.samples, strict=True):
        assert (ours.graph, ours.step) == (theirs.graph, theirs.step)
        for name in ("labels", "rows", "tokens"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        for key, value in ours.feed.items():
            np.testing.assert_array_equal(value, theirs.feed[key])


def test_damaged_recordings_are_refused(recorded: tuple[Recording, Path], tmp_path: Path) -> None:
    content = recorded[1].read_bytes()
    flipped, directory = bytearray(content), bytearray(content)
    flipped[len(content) // 3] ^= 255
    directory[content.rindex(b"PK\x01\x02") + 16] ^= 255  # a checksum in the archive's directory
    path = tmp_path / "calib.npz"
    torn = [content[:length] for length in (0, 4, 1000, len(content) // 2, len(content) - 10)]
    for damaged in (b"not a zip file", *torn, bytes(flipped), bytes(directory)):
        path.write_bytes(damaged)
        with pytest.raises(CalibrationError, match=r"calib.npz is damaged.*delete it and calibrate again"):
            Recording.load(path)
    np.savez(path, head=np.array(json.dumps({"version": 99})))
    with pytest.raises(CalibrationError, match="version 99"):
        Recording.load(path)


def test_causal_models_record_their_prefix_too(causal_bundle: Path) -> None:
    recording = collect(Bundle.open(causal_bundle), num_images=4, batch_size=4, threads=1)
    assert any(name.startswith("outer_prefill/") for name in recording.layers)
    assert {sample.graph for sample in recording.samples} == {"outer_prefill", "outer_step"}
    evaluator = Evaluator(Bundle.open(causal_bundle), recording, 1)
    assert evaluator.cost({}).kl < 1e-9
    first = next(name for name, layer in evaluator.layers.items() if name.startswith("outer_prefill/") and layer.wide)
    assert evaluator.cost({first: LayerPlan("int8")}).z_error > 0


def test_kept_steps_of_causal_models_are_bounded_in_size(causal_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(causal_bundle)
    whole = collect(opened, num_images=4, batch_size=4, threads=1)
    step = next(sample for sample in whole.samples if sample.graph == "outer_step")
    caches = [value for name, value in step.feed.items() if name.startswith("past_key_values.")]
    monkeypatch.setattr(recording_module, "SAMPLE_BYTES", 3 * sum(value[0].nbytes for value in caches))
    recording = collect(opened, num_images=4, batch_size=4, threads=1)
    for sample in recording.samples:
        assert sample.tokens.shape == (len(sample.rows), 16)
        if sample.graph == "outer_step":
            assert len(sample.rows) == len(sample.labels) == len(sample.feed["rows"]) == 3
            assert all(len(value) == 3 for name, value in sample.feed.items() if name.startswith("past_key_values."))
    for name, statistics in whole.layers.items():  # ranges are taken over everything all the same
        assert statistics.ranges() == recording.layers[name].ranges()
    # What is kept is consistent: the graphs, run on it, give the very z that its tokens were drawn from.
    evaluator = Evaluator(opened, recording, 1)
    assert evaluator.cost({}).kl < 1e-9
    offset, by_step = 0, {sample.step: sample for sample in whole.samples if sample.graph == "outer_step"}
    for sample in recording.samples:
        z = evaluator._z[offset : offset + len(sample.rows)]
        offset += len(sample.rows)
        if sample.step in by_step and sample.graph == "outer_step":
            full = by_step[sample.step]
            (want,) = evaluator._sessions["outer_step"].run(["z"], full.feed)
            assert all(np.abs(want - row).max(1).min() < 1e-5 for row in z)


def test_bad_input(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="num_images is 2; ranges need at least 4"):
        collect(bundle, num_images=2)
    with pytest.raises(ValueError, match="label 10 is out of range; this model has classes 0..9"):
        collect(bundle, num_images=4, labels=[3, 10])
    with pytest.raises(ValueError, match="guidance_scale is 0.5"):
        collect(bundle, num_images=4, guidance_scale=0.5)
    with pytest.raises(ValueError, match="precision is 'int4'; choose from int8"):
        calibrate(bundle.folder, tmp_path / "x.json", precisions=["int4"])
    for budget in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"budget_kl is {budget}; expected a number of nats above 0"):
            calibrate(bundle.folder, tmp_path / "x.json", budget_kl=budget)
    with pytest.raises(ValueError, match="batch_size is 0"):
        calibrate(bundle.folder, tmp_path / "x.json", batch_size=0)
    with pytest.raises(ValueError, match="seed is -1"):
        calibrate(bundle.folder, tmp_path / "x.json", seed=-1)
    with pytest.raises(ValueError, match="give the JSON file another suffix"):
        calibrate(bundle.folder, tmp_path / "x.npz")
    with pytest.raises(ValueError, match="no does not exist; make it"):
        calibrate(bundle.folder, tmp_path / "no" / "x.json")
    result = CliRunner().invoke(main, ["calibrate", str(bundle.folder), "--labels", "12", "-o", str(tmp_path / "x.json")])
    assert result.exit_code == 2 and "label 12 is out of range" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_checks_its_arguments_before_it_exports_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "x.json"
    for words, message in (
        (["digits", "--num-images", "2"], "num_images is 2"),
        (["digits", "--labels", "3,12"], "label 12 is out of range"),
        (["digits", "--budget-kl", "0"], "budget_kl is 0.0"),
        (["digits", "--precision", "int4"], "precision is 'int4'"),
        (["digits-causal", "--num-iter", "3"], "num_iter is 3"),
        ([str(tmp_path / "none")], "there is no bundle or checkpoint"),
        ([str(tmp_path), "--vae", "digits"], "a bundle has its own"),
    ):
        result = CliRunner().invoke(main, ["calibrate", *words, "-o", str(out)])
        assert result.exit_code == 2 and message in result.stderr and "tracing" not in result.stderr, result.output
    assert not list(tmp_path.iterdir())


def test_a_damaged_bundle_is_not_calibrated(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    weights = folder / "graphs" / "fp32" / "weights.data"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 255
    weights.write_bytes(bytes(content))
    with pytest.raises(BundleError, match="weights.data"):
        calibrate(folder, tmp_path / "x.json", **QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_activations_that_are_not_finite_name_layer_and_step(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    file = folder / bundle.manifest.graphs["fp32"]["outer_step"].file
    model = onnx.load(file, load_external_data=False)
    norm = next(t for t in model.graph.initializer if t.name == "outer.encoder_blocks.1.norm2.weight")
    values = onnx.numpy_helper.to_array(norm).copy()
    values[3] = np.inf
    norm.CopyFrom(onnx.numpy_helper.from_array(values, norm.name))
    file.write_bytes(model.SerializeToString())
    with pytest.raises(FloatingPointError, match=r"layer 'outer_step/encoder_blocks.1.mlp.fc1' got values .* at step 0"):
        collect(Bundle.open(folder), **QUICK)


# ------------------------------------------------------------------------------------------------ precision


def test_random_inputs_give_ranges_for_every_layer(bundle: Bundle) -> None:
    recording = collect_random(bundle, launches=2)
    assert set(recording.layers) == layer_names(bundle.manifest.config)
    assert all(s.absmax > 0 for s in recording.layers.values())


def test_cost_grows_with_what_is_quantised(bundle: Bundle, recorded: tuple[Recording, Path]) -> None:
    evaluator = Evaluator(bundle, recorded[0], 1)
    assert evaluator.cost({}) == Cost(0.0, 0.0, 0.0)
    wide = [layer for layer in evaluator.layers.values() if layer.wide]
    inner = next(layer for layer in wide if layer.name.startswith("inner_step/"))
    plans = {layer.name: layer_plan(layer, recorded[0], "int8-static", "mse") for layer in wide}
    one, everything = evaluator.cost({inner.name: plans[inner.name]}), evaluator.cost(plans)
    assert 0 < one.kl < everything.kl < 0.05 and one.z_error == 0 < everything.z_error
    clipped = evaluator.cost({inner.name: LayerPlan("int8-static", (plans[inner.name].absmax or 0) / 20)})
    assert clipped.kl > 10 * one.kl
    assert layer_plan(inner, recorded[0], "int8-static", "smooth").smooth is not None


class Additive:
    """Costs of layers that simply add up."""

    def __init__(self, costs: dict[str, float]) -> None:
        self.costs = costs

    def cost(self, plans: dict[str, LayerPlan]) -> Cost:
        return Cost(sum(self.costs[name] for name in plans), 0.0, 0.0)


def test_search_keeps_within_the_budget_and_wastes_little() -> None:
    costs = {"a": 5.0, "b": 1.0, "c": 0.5, "d": 0.1, "e": 4.0}
    saved = {"a": 10, "b": 10, "c": 1, "d": 10, "e": 100}
    plans = {name: LayerPlan("int8") for name in costs}
    ranking = [{"layer": name, "kl": kl, "bytes_saved": saved[name]} for name, kl in costs.items()]
    evaluator: Any = Additive(costs)
    for budget in (0.0, 0.05, 0.2, 1.2, 4.2, 5.5, 100.0):
        chosen, cost = search(evaluator, plans, ranking, budget)
        assert cost.kl <= budget and list(chosen) == [name for name in plans if name in chosen]
        for name in set(plans) - set(chosen):  # nothing that was left out would still fit
            assert cost.kl + costs[name] > budget
    assert set(search(evaluator, plans, ranking, 5.2)[0]) == {"b", "d", "e"}


def test_calibrate_writes_a_file_that_export_reads(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from arinar.export.quantize import Calibration, quantize_bundle
    from arinar.runtime import Pipeline

    monkeypatch.setattr(recording_module, "STEP_SAMPLES", 3)
    folder, out = tmp_path / "bundle", tmp_path / "calib.json"
    shutil.copytree(bundle.folder, folder)
    result = calibrate(folder, out, precisions=("int8-static",), budget_kl=1e-3, **QUICK)
    found = result["maps"]["int8-static"]
    assert found["kl"] <= 1e-3 and found["bytes"] < 0.5 * found["bytes_fp32"]
    assert [row["kl"] for row in found["ranking"]] == sorted((row["kl"] for row in found["ranking"]), reverse=True)
    assert set(found["quantized"]) | set(found["fp32"]) == set(result["layers"]) and "inner_step/head" in found["fp32"]
    for entry in result["layers"].values():
        channels = entry["weight"][0]
        assert set(entry["ranges"]) == set(METHODS)
        assert len(entry["absmax_per_channel"]) == channels and len(entry["absmax_per_step"]) == 3
    assert result["activations"]["fp16_safe"] is True and result["activations"]["fp16_unsafe"] == []
    assert 0 < result["activations"]["largest"]["value"] < 1000
    text = out.read_text()
    assert json.loads(text) == json.loads(to_json(result)) and max(map(len, text.splitlines())) < 6000
    assert Calibration.read(out).maps.keys() == {"int8-static"}
    quantize_bundle(folder, "int8-static", out)
    images = Pipeline.load(folder, precision="int8-static", threads=1).generate([1, 2], num_iter=2).images
    assert len(images) == 2


def test_activations_too_large_for_fp16_are_named() -> None:
    maxima = np.array([[1.0, 2.0], [3.0, 20_000.0]])
    found = _activations(Recording({}, maxima={"outer_step": maxima}, tensors={"outer_step": ["a", "b"]}))
    assert not found["fp16_safe"]
    assert found["fp16_unsafe"] == [{"graph": "outer_step", "tensor": "b", "step": 1, "value": 20_000.0}]


def test_a_layer_that_sees_nothing_leaves_the_file_readable(bundle: Bundle, tmp_path: Path) -> None:
    # One step alone: no token is ever known, the token projection computes nothing.
    out = tmp_path / "calib.json"
    calibrate(bundle.folder, out, precisions=(), **(QUICK | {"num_iter": 1}))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    data = json.loads(out.read_text(), parse_constant=refuse)  # neither Infinity nor NaN
    assert data["layers"]["outer_step/z_proj"]["values"] == 0 and data["layers"]["outer_step/z_proj"]["min"] == 0


def test_budget_of_zero_quantises_nothing() -> None:
    evaluator: Any = SimpleNamespace(cost=lambda plans: Cost(float(len(plans)), 0.0, 0.0))
    plans = {"a": LayerPlan("int8"), "b": LayerPlan("int8")}
    ranking = [{"layer": "a", "kl": 1.0, "bytes_saved": 1}, {"layer": "b", "kl": 2.0, "bytes_saved": 1}]
    assert search(evaluator, plans, ranking, 0.0) == ({}, Cost(0.0, 0.0, 0.0))
