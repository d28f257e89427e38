"""Bundles: integrity, and every way of being damaged or foreign gets one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from arinar.runtime import Bundle, BundleError, Manifest, Pipeline


@pytest.fixture
def copy(digits_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits_bundle, tmp_path / "moved" / "bundle"))


def edit(bundle: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_moved_bundle_loads_and_its_manifest_survives_json(copy: Path) -> None:
    manifest = Bundle.open(copy).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
    Bundle.open(copy).verify()
    assert len(Pipeline.load(copy).generate([3]).images) == 1
    assert str(copy.parent) not in (copy / "manifest.json").read_text()


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist.*arinar export"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="holds no manifest.json"):
        Bundle.open(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="is not a folder"):
        Bundle.open(tmp_path / "file")


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "{}", '{"format_version": 1}', '{"format_version": 1, "config": 3}'])
def test_manifest_that_is_not_one(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest.json is (not a bundle's manifest|damaged).*export the model again"):
        Bundle.open(copy)


def test_manifest_that_is_binary(copy: Path) -> None:
    (copy / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match="is not text"):
        Bundle.open(copy)


def test_newer_format(copy: Path) -> None:
    edit(copy, lambda data: data.update(format_version=99))
    with pytest.raises(BundleError, match="format version 99; this version of arinar reads 1"):
        Pipeline.load(copy)


def test_damaged_file(copy: Path) -> None:
    path = copy / "graphs" / "fp32" / "weights.data"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"weights.data is damaged: its SHA-256"):
        Pipeline.load(copy)


def test_truncated_and_missing_file(copy: Path) -> None:
    path = copy / "graphs" / "fp32" / "outer_step.onnx"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BundleError, match=r"outer_step.onnx has \d+ bytes; the manifest says"):
        Pipeline.load(copy)
    path.unlink()
    with pytest.raises(BundleError, match=r"outer_step.onnx is missing"):
        Pipeline.load(copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "graphs/../../x", "C:\\x", ""])
def test_paths_that_leave_the_folder(copy: Path, name: str) -> None:
    edit(copy, lambda data: data["files"].update({name: {"size": 1, "sha256": "0"}}))
    with pytest.raises(BundleError, match="does not lie inside the bundle; do not trust it"):
        Bundle.open(copy)


def test_links_that_leave_the_folder(copy: Path, tmp_path: Path) -> None:
    path = copy / "graphs" / "fp32" / "outer_step.onnx"
    outside = tmp_path / "outside.onnx"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Pipeline.load(copy)


def test_graph_file_that_the_manifest_does_not_list(copy: Path) -> None:
    edit(copy, lambda data: data["files"].pop("graphs/fp32/outer_step.onnx"))
    with pytest.raises(BundleError, match="needs 'graphs/fp32/outer_step.onnx', which the manifest does not list"):
        Bundle.open(copy)


def test_unknown_precision_backend_and_inner_mode(copy: Path) -> None:
    with pytest.raises(BundleError, match="holds no 'int4' graphs; it has fp32.*: choose one of those"):
        Pipeline.load(copy, precision="int4")
    with pytest.raises(
        BundleError,
        match="backend is 'cuda9'; choose one of onnxruntime-cpu, onnxruntime-cuda, tensorrt, openvino, tensorrt-rtx",
    ):
        Pipeline.load(copy, backend="cuda9")
    with pytest.raises(ValueError, match="inner is 'both'; choose one of fused, stepwise"):
        Pipeline.load(copy, inner="both")
    for threads in (0, 10**6, 10**400, 1.5, "2", True):
        with pytest.raises(ValueError, match="threads is .*; expected an integer from 1 to"):
            Pipeline.load(copy, backend="onnxruntime-cpu", threads=threads)


def test_the_remedy_for_a_missing_precision_is_a_command_for_one_that_exists(digits_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(digits_bundle).manifest
    with pytest.raises(BundleError, match="`arinar export CHECKPOINT --precision fp8 -o BUNDLE` adds them"):
        manifest.precision_graphs("fp8")
    with pytest.raises(BundleError, match="no 'fp31' graphs") as caught:
        manifest.precision_graphs("fp31")
    assert "arinar export" not in str(caught.value)


def test_a_wish_for_a_device_is_not_dropped(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the backend is chosen unasked, preferences of others are left out; a device that is missing is an error."""
    from arinar.runtime.backends import cuda

    def none() -> None:
        raise cuda.NoGpuError("this machine has no GPU")

    monkeypatch.setattr(cuda, "load_runtime", none)
    for wish in ({"device": 0}, {"device": "cuda"}, {"cuda": object()}):
        with pytest.raises(BundleError, match="asks for a GPU, and none can be used here: this machine has no GPU. Leave"):
            Pipeline.load(copy, **wish)
    assert Pipeline.load(copy, cuda_graphs=False, device=None, threads=1).backend.name == "onnxruntime-cpu"
    with pytest.raises(BundleError, match="backend onnxruntime-cpu has no option 'device'"):
        Pipeline.load(copy, backend="onnxruntime-cpu", device=0)
    with pytest.raises(BundleError, match="backend onnxruntime-cpu has no option 'colour'"):
        Pipeline.load(copy, colour=1)


def test_a_graph_that_fails_while_it_runs_is_one_line(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Naming the graph; ONNX Runtime's own log stays silent."""
    pipeline = Pipeline.load(copy, backend="onnxruntime-cpu", threads=1)
    empty = {t.name: np.zeros([1 if isinstance(d, str) else d for d in t.shape], t.dtype)
             for t in pipeline.bundle.manifest.graphs["fp32"]["outer_step"].inputs}  # fmt: skip
    empty["visible_positions"] = empty["visible_positions"] + 10**6
    with pytest.raises(
        RuntimeError, match="graph 'outer_step' did not run in ONNX Runtime: .*; export the model again"
    ) as caught:
        pipeline.backend.launch("outer_step", empty, {"z": np.zeros(1, np.float32)})
    told = capfd.readouterr()
    assert "\n" not in str(caught.value) and not told.err and not told.out


def test_bundle_kinds_mixed_up(copy: Path, causal_bundle: Path) -> None:
    """A causal model's manifest over a masked model's graphs: refused by the graphs' interface, not by a crash."""
    other = json.loads((causal_bundle / "manifest.json").read_text())
    edit(copy, lambda data: data.update(config=other["config"]))
    with pytest.raises(BundleError, match="graph 'outer_step' does not fit a causal model"):
        Pipeline.load(copy)


def test_both_onnxruntime_packages(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from arinar.runtime import machine

    class Distribution:
        def locate_file(self, path: str) -> str:
            return "/site-packages"

    monkeypatch.setattr(machine.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(BundleError, match="both installed.*pip uninstall"):
        Pipeline.load(copy, backend="onnxruntime-cpu")
