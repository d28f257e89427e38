"""`benchmarks.gpu` on the fake GPU, from end to end, and without one; by a clock of the tests' own."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("benchmarks.gpu")

from click.testing import CliRunner
from cpu_kernels import requires_compiler
from fake_driver import FakeDriver, FakeNvrtc
from fake_gpu import FakeCudaRuntime, fake_onnxruntime, fake_tensorrt, make_engines

from arinar.runtime import Bundle
from arinar.runtime.kernels import compiler
from benchmarks.gpu import capture, graphs, race
from benchmarks.gpu import kernels as kernel_checks
from benchmarks.gpu.__main__ import NO_GPU, main, run, summary
from benchmarks.gpu.launching import kernels_of
from benchmarks.gpu.models import Exports
from benchmarks.gpu.report import Report
from benchmarks.gpu.session import Session


def ticking(step: float = 0.001) -> Callable[[], float]:
    """A clock on which every look takes as long."""
    ticks = itertools.count()
    return lambda: step * next(ticks)


@pytest.fixture(scope="module")
def bundles(demo_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of the demo bundles, with engines."""
    made = {}
    for kind in ("digits", "digits-causal"):
        made[kind] = Path(shutil.copytree(demo_bundle(kind), tmp_path_factory.mktemp("gpu") / kind))
        make_engines(Bundle.open(made[kind]))
    return made


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCudaRuntime]:
    """The machine's GPU."""
    runtime = FakeCudaRuntime()
    for module in ("arinar.runtime.backends.cuda", "benchmarks.gpu.device"):
        monkeypatch.setattr(f"{module}.load_runtime", lambda: runtime)
    monkeypatch.setattr(Session, "build", lambda self, name: None)  # engines are there
    monkeypatch.setattr("benchmarks.gpu.fidelity.IMAGES", 80)
    yield runtime


@pytest.fixture
def with_kernels(runtime: FakeCudaRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels are really computed, by the CPU."""
    runtime.driver_api = FakeDriver(runtime)
    monkeypatch.setattr(compiler, "load_nvrtc", FakeNvrtc)
    monkeypatch.setattr(kernel_checks, "ROWS", 5)
    monkeypatch.setattr(kernel_checks, "LAUNCHES", 2)


def session(bundles: dict[str, Path], folder: Path, **settings: Any) -> Session:
    report = Report(folder / "out" / "gpu.json", 10000.0, ticking())
    report.data["machine"] = {}
    exports = Exports(report, folder, bundles)
    given: dict[str, Any] = {
        "demo": "digits",
        "full": "digits",
        "causal": "digits-causal",
        "sizes": (1, 2),
        "most": 1,
        "num_iter": 2,
    }
    return Session(report, exports, "fp32", guidance_scale=2.0, **given | settings)


def library(name: str, runtime: FakeCudaRuntime, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The only GPU library that is installed."""
    module = fake_tensorrt(runtime) if name == "tensorrt" else fake_onnxruntime(runtime)
    for other in ("tensorrt", "tensorrt_lean", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, other, None)
    monkeypatch.setitem(sys.modules, "tensorrt" if name == "tensorrt" else "onnxruntime", module)
    return module


def test_all_checks_on_tensorrt(
    bundles: dict[str, Path], runtime: FakeCudaRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but our kernels, which this fake has not."""
    library("tensorrt", runtime, monkeypatch)
    made = session(bundles, tmp_path)
    run(made, ())
    data = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert {finding["check"] for finding in data["findings"]} == {"kernels: compile and load the draw"}
    checks = [item["check"] for item in data["checks"]]
    order = ["cuda", "kernels", "graphs", "launching", "race", "capture", "parity", "causal", "large", "memory"]
    assert [name for name in checks if name in order] == order
    # The riskiest first: what is at the edges of the outer step comes before every other graph.
    of_graphs = [name for name in checks if name.startswith("graphs: ") and name.endswith("tensorrt")]
    assert [name.split(" on ")[0].removeprefix("graphs: ") for name in of_graphs[:3]] == [
        "outer_step with 0 visible tokens",
        "outer_step with 1 visible tokens",
        "outer_step with no hidden tokens",
    ]
    names = {row["graph"].split(" with ")[0] for row in data["graphs"]}
    assert {"outer_step", "inner_condition", "inner_step", "inner_token_guided", "vae_decoder", "tokens_to_latents"} <= names
    assert all(row["error"] <= row["limit"] for row in data["graphs"])
    told = {(row["contender"], row["model"], row["batch"]) for row in data["timings"]}
    sizes = [("digits", 1), ("digits-causal", 1), ("digits", 2)]
    assert told == {(contender, *size) for contender in ("pytorch", "tensorrt") for size in sizes}
    assert {row["phase"] for row in data["launching"] if row["backend"] == "tensorrt"} == {"outer", "head", "decode"}
    assert all(row["passed"] for row in data["parity"]) and len(data["parity"]) == 2
    assert {item["what"] for item in data["skipped"]} == {"capture of digits", "tokens by our kernels on tensorrt"}
    assert {row["vae_precision"] for row in data["phases"]} == {"fp32"}
    summary(made.report)


@requires_compiler
def test_the_kernels(
    bundles: dict[str, Path], runtime: FakeCudaRuntime, with_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = session(bundles, tmp_path)
    run(made, ("kernels",))
    assert not made.report.data["findings"]
    assert [(row["guided"], row["worst_error"] < 5e-5) for row in made.report.data["kernels"]] == [(True, True), (False, True)]
    monkeypatch.setattr(kernel_checks.Draws, "reference", lambda self, guided: np.full(5, 100.0))
    run(made, ("kernels",))
    (plain, guided) = made.report.data["findings"]
    assert "at most 0.0001 was expected" in plain["evidence"] and guided["severity"] == "broken"


@requires_compiler
def test_tokens_by_the_kernels(
    bundles: dict[str, Path], runtime: FakeCudaRuntime, with_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library("tensorrt", runtime, monkeypatch)
    made = session(bundles, tmp_path)
    launched, pipeline = graphs.record(made, "fused"), made.open("digits", "tensorrt")
    graphs.tokens(made, pipeline, launched)
    (row,) = made.report.data["graphs"]
    assert row["error"] <= row["limit"]
    launched["inner_token_guided"].outputs["tokens"][0] += 1
    with pytest.raises(AssertionError, match="tokens are off by"):
        graphs.tokens(made, pipeline, launched)
    pipeline.loop.head.token = None  # type: ignore[attr-defined]
    graphs.tokens(made, pipeline, launched)
    assert made.report.data["skipped"]


def test_on_onnxruntime_and_after_failures(
    bundles: dict[str, Path], runtime: FakeCudaRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kernels, a library that fails in one graph, a check that ends: each is a finding, and the rest goes on."""
    made = session(bundles, tmp_path, sizes=(1,))
    on_the_cpu = graphs.record(made, "stepwise")  # before a fake stands for the library that does it
    monkeypatch.setattr(graphs, "record", lambda session, mode: dict(on_the_cpu))
    ort = library("onnxruntime", runtime, monkeypatch)
    assert made.possible("digits") == ["onnxruntime-cuda"]
    made.open("digits", "onnxruntime-cuda").loop.prepare(guided=True)
    broken = next(item for item in ort.sessions if Path(item.path).stem == "outer_step")
    broken.fail = "CUBLAS failure 13"

    def ends(*arguments: Any) -> None:
        raise SystemExit("the library ended the process")

    monkeypatch.setattr(capture, "check", ends)
    run(made, ("cuda", "graphs", "capture", "kernels"))
    findings = made.report.data["findings"]
    told = {finding["check"]: finding for finding in findings}
    assert "CUBLAS failure 13" in told["graphs: outer_step with 0 visible tokens on onnxruntime-cuda"]["detail"]
    assert "ended the process" in told["capture"]["evidence"]
    assert any(check.startswith("kernels: compile") for check in told)
    assert not any(finding["check"].startswith("cuda: ") for finding in findings)
    assert any(row["graph"] == "vae_decoder" for row in made.report.data["graphs"])
    assert all(finding["severity"] == "broken" and finding["remedy"] for finding in findings)


def test_the_capture_experiment(bundles: dict[str, Path], runtime: FakeCudaRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    library("onnxruntime", runtime, monkeypatch)
    result = capture.experiment(bundles["digits"], "fp32")
    assert result["repeatable"] and result["same_when_waiting"]
    assert result["captured"] == {"largest_error": [0.0] * len(capture.SEEDS), "warnings": []}


def test_what_an_experiment_says(bundles: dict[str, Path], tmp_path: Path) -> None:
    made = session(bundles, tmp_path)
    good = {"repeatable": True, "same_when_waiting": True, "captured": {"largest_error": [0.0], "warnings": []}}
    capture.judge(made, "digits", good)
    assert not made.report.data["findings"]
    bad = {"repeatable": False, "same_when_waiting": False, "captured": {"largest_error": [0.5], "warnings": ["no capture"]}}
    capture.judge(made, "digits", bad)
    assert [finding["severity"] for finding in made.report.data["findings"]] == ["wrong", "wrong", "slow", "wrong"]
    made.report.save()  # the worst first
    assert made.report.data["findings"][-1]["evidence"] == "no capture"


def test_sizes_are_estimated_from_the_last_two(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Of launch-bound rounds a larger size takes no longer; of those that grow, as they grow."""
    made = race.Race.__new__(race.Race)
    made.rounds, made.warm_up = [], 5.0
    assert made.estimate(64) == 0  # nothing is known: it is tried
    made.rounds = [(1, 2.0)]
    assert made.estimate(64) == pytest.approx(5 + 3 * 2.0)
    made.rounds = [(1, 2.0), (64, 2.3)]
    assert made.estimate(256) == pytest.approx(5 + 3 * (2.3 + 192 * 0.3 / 63))
    assert made.estimate(8) == pytest.approx(5 + 3 * (2.3 - 56 * 0.3 / 63))


def test_the_names_of_launches() -> None:
    def outer(visible: int, hidden: int) -> list[str]:
        return graphs.names("outer_step", {"visible_tokens": [0] * visible, "hidden_positions": [0] * hidden})

    assert outer(0, 3) == ["outer_step with 0 visible tokens"] and outer(5, 3) == ["outer_step"]
    assert outer(5, 0) == ["outer_step with no hidden tokens"] and len(outer(1, 0)) == 2
    assert graphs.names("vae_decoder", {"latents": []}) == ["vae_decoder"]


def test_kernels_of_a_profile() -> None:
    node = {"cat": "Node", "name": "a_kernel_time", "args": {"provider": "CUDAExecutionProvider", "op_name": "MatMul"}}
    copy = {"cat": "Node", "name": "m_kernel_time", "args": {"provider": "CPUExecutionProvider", "op_name": "MemcpyFromHost"}}
    events = [{"cat": "Session", "name": "model_run"}, node, node, copy, {"cat": "Kernel", "name": "gemm"}]
    nodes = {"CUDAExecutionProvider": 2, "CPUExecutionProvider": 1}
    assert kernels_of(events) == {"runs": 1, "gpu_kernels": 1, "nodes": nodes, "copies": 1}


# ----------------------------------------------------------------------------------------------------------- the command


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path, runtime: FakeCudaRuntime) -> None:
    runtime.devices = 0
    out = tmp_path / "new" / "gpu.json"
    done = CliRunner().invoke(main, ["--json", str(out)])
    assert done.exit_code == NO_GPU == 3
    (line,) = done.output.strip().splitlines()
    assert "no NVIDIA GPU that this process may use" in line
    (finding,) = json.loads(out.read_text())["findings"]
    assert finding["severity"] == "broken" and finding["check"] == "machine"


def test_the_command_on_a_gpu(
    bundles: dict[str, Path], runtime: FakeCudaRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library("tensorrt", runtime, monkeypatch)
    out = tmp_path / "gpu.json"
    chosen = ["--only", "cuda", "--only", "graphs", "--bundle", f"digits={bundles['digits']}", "--precision", "fp32"]
    done = CliRunner().invoke(main, [*chosen, "--json", str(out)])
    data = json.loads(out.read_text())
    assert done.exit_code == 0, (done.output, data["findings"])
    assert data["machine"]["gpu"]["name"] == "Fake H200" and data["graphs"]
    assert not {"race", "kernels"} & {item["check"] for item in data["checks"]}
    done = CliRunner().invoke(main, [*chosen[:4], "--no-demo", "--json", str(out)])
    assert done.exit_code == 0 and "graphs" not in json.loads(out.read_text())
    for arguments, message in (
        (["--bundle", "digits"], "expected NAME=FOLDER"),
        (["--bundle", f"digits={tmp_path}"], "expected NAME=FOLDER"),
        (["--only", "everything"], "'everything' is not one of"),
        (["--batch", "0"], "0 is not in the range"),
    ):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 2 and message in done.output


def test_a_budget_that_is_used_up(bundles: dict[str, Path], runtime: FakeCudaRuntime, tmp_path: Path) -> None:
    made = session(bundles, tmp_path)
    made.report.budget = 5.0
    run(made, ())
    skipped = [item["what"] for item in made.report.data["skipped"]]
    assert skipped[0] == "cuda" and "memory" in skipped and not made.report.data["findings"]
