"""The benchmarks' arithmetic, pages and refusals; never their speed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

import arinar.measure.peaks as peaks_module
from arinar.cli import main
from arinar.config import PRESETS, VAE_PRESETS
from arinar.measure.bench import bench, compare, floors, fresh_process, peak_memory, read_report, spread, table
from arinar.measure.bench_report import render
from arinar.measure.cost import image_cost
from arinar.measure.peaks import copy_bandwidth, gemm_peak, onnxruntime_peak
from arinar.runtime import Bundle, Pipeline
from arinar.runtime.backends.products import product_model, run_product
from arinar.runtime.machine import machine
from arinar.schedule import steps

# ------------------------------------------------------------------------------------------------ what an image costs


def test_costs_of_the_published_size() -> None:
    masked = image_cost(PRESETS["base"], 64, guided=True, vae=VAE_PRESETS["kl16"])
    causal = image_cost(PRESETS["base-causal"], 64, guided=True)
    assert 12.0e12 < masked.outer < 12.8e12  # 12.8 with every position in the last block
    assert 0.25e12 < causal.outer < 0.28e12 and masked.outer / causal.outer > 45
    assert masked.outer_weights == 28 * 12 * 768**2 + 768 * (768 + 16)
    # Tokens are embedded once for both branches.
    assert image_cost(PRESETS["base"], 64, guided=False).outer == pytest.approx(masked.outer / 2, rel=1e-4)
    assert masked.total == masked.outer + masked.inner + masked.vae and masked.attention < 0.1 * masked.total


def test_weight_bytes_by_hand() -> None:
    cost = image_cost(PRESETS["digits"], 5, guided=True, vae=VAE_PRESETS["digits"])
    assert cost.passes == 5
    weights = 5 * (cost.outer_weights + cost.inner_weights)
    assert cost.weight_bytes(4) == 4 * weights + 4 * cost.vae_weights
    assert cost.weight_bytes(1, batch=4) == weights / 4 + 4 * cost.vae_weights
    assert cost.weight_bytes(2, vae_bytes=2) == 2 * weights + 2 * cost.vae_weights
    # A causal model passes over its weights once a token, whatever number of steps is asked for.
    assert image_cost(PRESETS["digits-causal"], 5, guided=True).passes == 16


def test_floors_of_each_precision() -> None:
    cost = image_cost(PRESETS["digits"], 4, guided=True, vae=VAE_PRESETS["digits"])
    peaks = {"gemm_peak_gflops": 100.0, "copy_gb_per_s": 10.0}
    full = floors(cost, 1, "fp32", peaks)
    assert full["floor_s_per_image"] == pytest.approx(cost.total / 100e9)
    assert full["memory_floor_s_per_image"] == pytest.approx(cost.weight_bytes(4) / 10e9)
    small = floors(cost, 2, "int8", peaks | {"int8_peak_gops": 400.0})
    plain = cost.attention + cost.vae  # stay in float32
    assert small["floor_s_per_image"] == pytest.approx(plain / 100e9 + (cost.total - plain) / 400e9)
    assert small["memory_floor_s_per_image"] == pytest.approx(cost.weight_bytes(1, batch=2) / 10e9)
    assert "floor_s_per_image" not in floors(cost, 1, "fp16", {})  # a GPU's limits are not measured


class Counted(NamedTuple):
    """Products in a graph: operations with a weight and without, the number of weights."""

    linear: int
    attention: int
    weights: int


def counted(bundle: Bundle, name: str, **dims: int) -> Counted:
    """Count from the exported graph, with the shapes that ONNX Runtime computes when its dynamic axes have this size."""
    onnx = pytest.importorskip("onnx")
    import onnxruntime

    info = bundle.manifest.graphs["fp32"][name]
    model = onnx.load(bundle.path(info.file))
    feed = {
        tensor.name: np.zeros([dims[d] if isinstance(d, str) else d for d in tensor.shape], tensor.dtype)
        for tensor in info.inputs
    }
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    shapes |= {key: value.shape for key, value in feed.items()}
    nodes = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    wanted = {name for node in nodes for name in (*node.input[:2], node.output[0])}
    wanted -= {value.name for value in model.graph.output} | set(shapes)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    shapes |= {name: value.shape for name, value in zip(names, session.run(names, feed), strict=True)}
    linear = attention = 0
    weights = {}
    for node in nodes:
        a, b, c = (shapes[name] for name in (*node.input[:2], node.output[0]))
        operations = 2 * math.prod(c) * (math.prod(b[1:]) if node.op_type == "Conv" else a[-1])
        if node.op_type == "Conv" or len(b) == 2:  # a weight is a matrix; what attention multiplies has a batch
            linear += operations
            weights[node.input[1]] = math.prod(b)
        else:
            attention += operations
    return Counted(linear, attention, sum(weights.values()))


@pytest.mark.parametrize("guided", [True, False])
def test_counted_operations_are_those_of_the_masked_graphs(digits_bundle: Path, guided: bool) -> None:
    bundle, branches = Bundle.open(digits_bundle), 2 if guided else 1
    config = bundle.manifest.config
    plan = steps(config.seq_len, 3)
    outer = [
        counted(bundle, "outer_step", V=config.seq_len - step.masked, P=step.count, U=step.remaining, B=1, G=branches)
        for step in plan
    ]
    graph = "inner_token_guided" if guided else "inner_token"
    inner = [counted(bundle, graph, N=branches * step.count, M=step.count) for step in plan]
    cost = image_cost(config, 3, guided=guided)
    assert cost.outer == sum(part.linear + part.attention for part in outer)
    assert cost.inner == sum(part.linear + part.attention for part in inner)
    assert cost.attention == sum(part.attention for part in outer + inner)
    assert cost.outer_weights == outer[0].weights and cost.inner_weights == inner[0].weights


def test_counted_operations_are_those_of_the_causal_graphs(causal_bundle: Path) -> None:
    bundle = Bundle.open(causal_bundle)
    config = bundle.manifest.config
    prefill, step = counted(bundle, "outer_prefill", N=2), counted(bundle, "outer_step", N=2, B=1)
    token = counted(bundle, "inner_token_guided", N=2, M=1)
    cost = image_cost(config, 16, guided=True)
    assert cost.outer == prefill.linear + prefill.attention + (config.seq_len - 1) * (step.linear + step.attention)
    assert cost.inner == config.seq_len * (token.linear + token.attention)
    assert cost.attention == prefill.attention + (config.seq_len - 1) * step.attention + config.seq_len * token.attention
    assert cost.outer_weights == step.weights and cost.inner_weights == token.weights


def test_counted_operations_are_those_of_the_vae_decoder(digits_bundle: Path) -> None:
    found = counted(Bundle.open(digits_bundle), "vae_decoder", B=1)
    cost = image_cost(PRESETS["digits"], 4, guided=True, vae=VAE_PRESETS["digits"])
    assert cost.vae == found.linear + found.attention and cost.vae_weights == found.weights


# -------------------------------------------------------------------------------------------- what a machine can do


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_probing_model_multiplies(dtype: str) -> None:
    rng = np.random.default_rng(0)
    weight: Any = rng.integers(-127, 128, (5, 5)).astype(dtype)
    a: Any = rng.integers(0, 256, (5, 5)).astype("uint8" if dtype == "int8" else dtype)
    assert np.array_equal(run_product(a, weight), a.astype("int32") @ weight.astype("int32"))
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load_from_string(product_model(weight)), full_check=True)


def test_peaks_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of work that is really done: operations, or bytes read and written, by the seconds of the fastest run."""
    rates = [gemm_peak(64, 1), onnxruntime_peak("float32", 1, size=64, repeats=1), copy_bandwidth(2, size=1 << 20, repeats=1)]
    assert all(math.isfinite(rate) and rate > 0 for rate in [*rates, onnxruntime_peak("int8", 1, size=64, repeats=1)])
    ticks = iter([0.0, 3.0, 10.0, 10.5, 20.0, 22.0])  # runs of 3, 0.5 and 2 seconds
    monkeypatch.setattr(peaks_module.time, "perf_counter", lambda: next(ticks))
    done: list[int] = []
    assert peaks_module._fastest(lambda: done.append(1), 3) == 0.5 and len(done) == 3
    monkeypatch.undo()
    repeats: list[int] = []

    def half_a_second(work: Callable[[], object], count: int) -> float:
        work()
        repeats.append(count)
        return 0.5

    monkeypatch.setattr(peaks_module, "_fastest", half_a_second)
    assert gemm_peak(64, 7) == 2 * (2 * 64**3)
    assert onnxruntime_peak("float32", 1, size=32, repeats=8) == onnxruntime_peak("int8", 1, size=32, repeats=9) == 4 * 32**3
    assert copy_bandwidth(2, size=1 << 20, repeats=10) == 2 * (2 * (1 << 20))
    assert repeats == [7, 8, 9, 10]


def test_peak_memory_is_that_of_the_process_alone() -> None:
    held = np.ones(300_000_000, np.uint8)
    code = "import json; from arinar.measure.bench import peak_memory; print(json.dumps({'gb': peak_memory()}))"
    assert 0.01 < fresh_process(code)["gb"] < 0.3 < peak_memory() and held[-1] == 1


# ------------------------------------------------------------------------------------------------------------ bench


@pytest.fixture(scope="module")
def report(digits_bundle: Path) -> dict[str, Any]:
    """Treat it as read-only."""
    return bench(Pipeline.load(digits_bundle), batches=(1, 3, 1), num_iters=(2, 4), repeats=1)


def test_bench_reports_every_setting(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report
    assert [(row["batch"], row["num_iter"]) for row in report["results"]] == [(1, 2), (1, 4), (3, 2), (3, 4)]
    for row in report["results"]:
        assert set(row["phases"]) == {"outer", "inner", "vae", "python"} and min(row["phases"].values()) > 0
        assert sum(row["phases"].values()) == pytest.approx(row["s_per_image"])
        assert row["fastest"] <= row["s_per_image"] <= row["slowest"]
        assert row["floor_s_per_image"] > 0 and row["memory_floor_s_per_image"] > 0 and row["tera_operations_per_image"] > 0
        assert row["share_of_gemm_peak"] == pytest.approx(row["floor_s_per_image"] / row["s_per_image"])
    assert report["results"][0]["weight_gb_per_image"] > report["results"][2]["weight_gb_per_image"]
    assert report["cold_start"]["import_s"] > 0 and report["peak_memory_gb"] > 0
    assert "at least" in table(report) and "memory copy" in table(report)


def test_the_split_is_that_of_the_median_run() -> None:
    runs = [{"outer": 1.0, "total": total} for total in (3.0, 2.0, 9.0)]
    assert spread(runs) == {"s_per_image": 3.0, "fastest": 2.0, "slowest": 9.0, "phases": {"outer": 1.0, "python": 2.0}}


def test_a_report_is_compared_with_an_earlier_one(report: dict[str, Any]) -> None:
    slower = copy.deepcopy(report)
    for row in slower["results"][1:]:
        row["s_per_image"] *= 2
    del slower["results"][0]
    found = compare(slower, report)
    assert [row["times_faster"] for row in found["results"]] == pytest.approx([2.0, 2.0, 2.0])
    assert table(report | {"against": found}).count("2.00") == 3
    nothing = compare(report | {"results": []}, report)
    assert "no setting in common" in table(report | {"against": nothing})


def on_a_gpu(report: dict[str, Any]) -> dict[str, Any]:
    """The report as a GPU backend makes it: no phases, no limits."""
    gpu = {key: value for key, value in copy.deepcopy(report).items() if key not in ("gemm_peak_gflops", "copy_gb_per_s")}
    gpu["threads"] = None
    for row in gpu["results"]:
        row["phases"] = {"device": 0.9 * row["s_per_image"], "python": 0.1 * row["s_per_image"]}
        for key in ("floor_s_per_image", "memory_floor_s_per_image", "share_of_gemm_peak"):
            del row[key]
    return gpu


@pytest.mark.parametrize("change", [lambda report: report, on_a_gpu], ids=["cpu", "gpu"])
def test_the_page_is_whole_and_needs_no_network(
    report: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    changed = change(report) | {"bundle": "<a & b>"}
    page = render(changed | {"against": compare(report, report)})
    assert "http" not in page and "<a & b>" not in page and "&lt;a &amp; b&gt;" in page
    charts = [ElementTree.fromstring(part.split("</figcaption>")[1]) for part in page.split("</figure>")[:-1]]
    assert len(charts) == 3  # times, cold start, ratios
    settings = len(report["results"])
    bars = charts[0].findall("rect")
    phases = len(changed["results"][0]["phases"])
    assert len(bars) == settings * phases
    # The bars of one setting adjoin, and are as long as its time: the same scale for all.
    lengths = [sum(float(bar.get("width", 0)) for bar in bars[i : i + phases]) for i in range(0, len(bars), phases)]
    scale = lengths[0] / report["results"][0]["s_per_image"]
    for length, row in zip(lengths, report["results"], strict=True):
        assert length == pytest.approx(scale * row["s_per_image"], abs=0.1)
    for chart in charts:  # nothing is drawn outside
        _, _, width, height = map(float, chart.get("viewBox", "").split())
        assert all(0 <= float(bar.get("x", -1)) <= width - float(bar.get("width", 0)) for bar in chart.findall("rect"))
        assert all(0 <= float(text.get("y", -1)) <= height for text in chart.findall("text"))
    assert table(changed)


def test_bench_command_writes_what_it_prints(report: dict[str, Any], digits_bundle: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    options = [str(digits_bundle), "--batch", "1", "--num-iter", "2", "--repeats", "1"]
    done = CliRunner().invoke(main, ["bench", *options, "-o", str(out), "--html", str(page)])
    assert done.exit_code == 0, done.output
    assert read_report(out)["results"][0]["num_iter"] == 2 and page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.json"]  # no temporary files
    done = CliRunner().invoke(main, ["bench", *options, "--against", str(out), "--json"])
    found = json.loads(done.stdout)["against"]
    assert done.exit_code == 0 and len(found["results"]) == 1 and found["bundle"] == digits_bundle.name
    done = CliRunner().invoke(main, ["bench", *options, "--low-memory", "-o", str(out)])
    saving = read_report(out)
    assert done.exit_code == 0 and "onnxruntime-cpu, low memory" in done.stdout and "cpu, low memory" in render(saving)
    assert saving["low_memory"] and not report["low_memory"]


BAD = {
    "no file": (None, "cannot read"),
    "no JSON": ("once upon a time", "is not JSON"),
    "no text": (b"\xff\xfe\x00\x01", "is not JSON"),
    "another kind": ('{"results": [{"batch": 1}]}', "is not a report"),
    "nothing in it": ('{"machine": {"cpu": "x"}, "results": []}', "is not a report"),
    "a list": ("[1, 2]", "is not a report"),
    "no number": ('{"results": [{"batch": 1, "num_iter": 4, "s_per_image": "fast"}]}', "is not a report"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_earlier_report_is_refused_before_measuring(case: str, tmp_path: Path) -> None:
    content, words = BAD[case]
    path = tmp_path / "earlier.json"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    # The bundle does not exist: the file is looked at first.
    done = CliRunner().invoke(main, ["bench", str(tmp_path / "bundle"), "--against", str(path)])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
    assert words in done.stderr and str(path) in done.stderr and "`arinar bench -o FILE`" in done.stderr


@pytest.mark.parametrize("option", ["-o", "--html"])
def test_an_unwritable_output_is_refused_before_measuring(option: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "missing" / "out", "make it"),
        (tmp_path / "file" / "out", "make it"),
        (Path("/proc/out"), "choose another file"),
    ):
        done = CliRunner().invoke(main, ["bench", str(tmp_path / "bundle"), option, str(path)])
        assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
        assert f"cannot write {path}" in done.stderr and words in done.stderr
    both = ["-o", str(tmp_path / "a"), "--html", str(tmp_path / "a")]
    assert "same file" in CliRunner().invoke(main, ["bench", str(tmp_path / "bundle"), *both]).stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"batches": [0]}, "batch"), ({"guidance_scale": 0.5}, "guidance_scale"), ({"num_iters": [99]}, "num_iter")],
)
def test_bad_arguments_are_refused_before_measuring(
    digits_bundle: Path, arguments: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arinar.measure.bench.cold_start", lambda *args: pytest.fail("measured first"))
    with pytest.raises(ValueError, match=words):
        bench(Pipeline.load(digits_bundle), **arguments)


# ---------------------------------------------------------------------------------------------- benchmarks.scaling


def test_scaling_measures_what_is_asked_for(digits_bundle: Path, tmp_path: Path) -> None:
    scaling = pytest.importorskip("benchmarks.scaling")
    out = tmp_path / "results" / "scaling.json"
    few = ["--num-iter", "2", "--repeats", "1", "--batch", "1", "--batch", "2", "--images", "1", "--calls", "4"]
    done = CliRunner().invoke(scaling.main, [str(digits_bundle), *few, "--json", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["machine"]["date"] and found["precision"] == "fp32" and found["num_iter"] == 2
    # 16 tokens: as many steps, and a quarter of them.
    assert found["iterations"]["num_iter"] == [4, 16]
    few_steps, many_steps = found["iterations"]["s_per_image"]
    assert found["iterations"]["ratio"] == pytest.approx(many_steps / few_steps)
    assert found["batch"]["batch"] == [1, 2] and found["batch"]["times_faster"][0] == 1
    side = found["concurrency"]
    assert side["images"] == 2 and side["workers"] * side["threads_of_each"] <= max(2, side["cores"])
    assert side["throughput_ratio"]["threads"] == pytest.approx(side["seconds"]["one"] / side["seconds"]["threads"])
    memory = found["memory"]
    assert memory["calls"] == 4 and max(memory["first_mb"], memory["last_mb"]) <= memory["max_mb"]
    assert found["start"]["one_image_peak_mb"] > 10 and found["start"]["import_s"] > 0


def test_scaling_takes_one_measure_alone(digits_bundle: Path) -> None:
    scaling = pytest.importorskip("benchmarks.scaling")
    few = ["--num-iter", "2", "--calls", "2", "--measure", "memory"]
    done = CliRunner().invoke(scaling.main, [str(digits_bundle), *few])
    assert done.exit_code == 0 and "kB per call" in done.stdout and len(done.stdout.splitlines()) == 2


def test_scaling_slope_is_per_call() -> None:
    scaling = pytest.importorskip("benchmarks.scaling")
    assert scaling.slope([1.0, 3.0, 5.0]) == pytest.approx(2.0) and scaling.slope([7.0]) == 0.0


def test_scaling_says_that_a_causal_model_has_no_choice_of_steps(causal_bundle: Path) -> None:
    scaling = pytest.importorskip("benchmarks.scaling")
    done = CliRunner().invoke(scaling.main, [str(causal_bundle), "--measure", "iterations"])
    assert done.exit_code == 0 and "always takes 16 steps" in done.stderr


def test_what_machine_this_is() -> None:
    here = machine()
    assert here["cpu"] and 1 <= here["cores"] <= here["cpus"] and {"python", "numpy"} <= here["versions"].keys()
    assert set(machine(("numpy", "no-such-package"))["versions"]) == {"python", "numpy"}
    assert json.loads(json.dumps(here)) == here


# ------------------------------------------------------------------------------------------ benchmarks.cpu_engines


def test_cpu_engines_compares_what_the_bundle_and_the_machine_have(digits_bundle: Path, tmp_path: Path) -> None:
    engines = pytest.importorskip("benchmarks.cpu_engines")
    few = ["--model", "digits", "--bundle", str(digits_bundle), "--num-iter", "2", "--rounds", "1", "--threads", "1"]
    done = CliRunner().invoke(engines.main, [*few, "--out", str(tmp_path / "results")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "results" / "cpu-engines-digits.json").read_text())
    rows = {row["engine"]: row for row in found["engines"]}
    assert found["left_out"].pop("ONNX Runtime, int8") == "the bundle has no int8 graphs"
    assert rows.keys() | found["left_out"].keys() == set(engines.ENGINES) - {"ONNX Runtime, int8"}
    exact = rows[engines.EXACT]
    assert exact["outer_ratio"] == exact["vae_ratio"] == 1 and exact["z_error"] == exact["grey_largest"] == 0
    assert all(row["outer_s"] > 0 and row["vae_s"] > 0 and row["peak_gb"] > 0.01 for row in rows.values())
    if "OpenVINO, bf16" in rows:
        assert 0 < rows["OpenVINO, fp32"]["z_error"] < 1e-5 < rows["OpenVINO, bf16"]["z_error"] < 0.02
    table = (tmp_path / "results" / "cpu-engines-digits.md").read_text()
    assert table in done.output and "Left out, ONNX Runtime, int8: the bundle has no int8 graphs." in table


def test_cpu_engines_ratios_are_of_the_same_round() -> None:
    engines = pytest.importorskip("benchmarks.cpu_engines")
    exact = [{"outer": 4.0, "vae": 2.0}, {"outer": 40.0, "vae": 20.0}, {"outer": 4.0, "vae": 3.0}]
    ours = [{"outer": 2.0, "vae": 2.0}, {"outer": 10.0, "vae": 5.0}, {"outer": 1.0, "vae": 1.0}]
    z, grey = np.array([3.0, 4.0], np.float32), np.array([10, 200], np.uint8)
    row = engines.as_row("OpenVINO, bf16", ours, exact, ([z[:1], z[1:] + 5], grey + np.uint8(3)), ([z[:1], z[1:]], grey))
    assert row["outer_ratio"] == 4 and row["vae_ratio"] == 3 and row["outer_s"] == row["vae_s"] == 2
    assert row["z_error"] == pytest.approx(1) and row["grey_mean"] == row["grey_largest"] == 3
    assert (row["backend"], row["precision"]) == ("openvino", "bf16")
