"""Engine building: plans, child processes, sidecars and their rules; and that the real library builds every graph."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_bundles import TINY, TINY_CAUSAL, TINY_MAR, tiny_bundle, tiny_model

import arinar
from arinar.cli import main
from arinar.config import PRESETS
from arinar.export import engine as engine_module
from arinar.export.engine import Gpu, axis_ranges, build_engines, profiles
from arinar.runtime.backends.engines import (
    EngineError,
    EngineInfo,
    engine_key,
    find_engines,
    graph_hash,
    list_engines,
    mismatch,
)
from arinar.runtime.bundle import (
    KINDS_OF_VERSION_1,
    MANIFEST_NAME,
    Bundle,
    BundleError,
    Defaults,
    GraphInfo,
    Manifest,
    TensorInfo,
    file_info,
)
from arinar.schedule import steps

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
without_rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt_rtx is not installed")
GRAPHS = ("first", "second", "third")

# A library with the interface that the builder uses. What becomes of a graph is what its file says.
FAKE = """
import enum, os, signal, sys, time
__version__ = "9.8.7"

class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2
class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1
class BuilderFlag(enum.IntEnum):
    TF32 = 0
    VERSION_COMPATIBLE = 1
class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0
class ComputeCapability(enum.IntEnum):
    CURRENT = 1
    SM80 = 80
    SM120 = 120
class Tensor:
    def __init__(self, name, shape): self.name, self.is_shape_tensor = name, shape
class Network:
    text = ""
    num_inputs = 1
    def get_input(self, index): return Tensor("x", self.text == "shape tensor")
class IBuilderConfig:
    num_compute_capabilities = 0
    def __init__(self): self.log = []
    def set_compute_capability(self, value, index): self.log.append(value.name); return True
    def set_flag(self, flag): self.log.append(flag.name)
    def clear_flag(self, flag): self.log.append("not " + flag.name)
    def set_memory_pool_limit(self, pool, size): self.log.append(f"workspace {size}")
    def add_optimization_profile(self, profile): self.log.append(str(profile.shapes)); return 0
    def create_timing_cache(self, data): return TimingCache(data)
    def set_timing_cache(self, cache, ignore_mismatch): return cache.data in (b"", b"timings")
    def get_timing_cache(self): return TimingCache(b"timings")
class TimingCache:
    def __init__(self, data): self.data = data
    def serialize(self): return self.data
class Profile:
    def __init__(self): self.shapes = {}
    def set_shape(self, name, low, usual, high): self.shapes[name] = (low, usual, high)
class Builder:
    def __init__(self, log): self.log = log
    def create_network(self, flags):
        assert flags == 2
        return Network()
    def create_builder_config(self): return IBuilderConfig()
    def create_optimization_profile(self): return Profile()
    def build_serialized_network(self, network, config):
        print("the library talks", flush=True)
        if network.text == "crash":
            print("about to fall", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if network.text == "hang":
            time.sleep(60)
        if network.text == "refuse":
            self.log.log(ILogger.ERROR, "no kernel for this")
            return None
        if network.text == "exit":
            sys.exit(3)
        config.progress_monitor.phase_start("tactics", None, 2)
        config.progress_monitor.step_complete("tactics", 0)
        config.progress_monitor.phase_finish("tactics")
        return (network.text + "|" + "|".join(config.log)).encode()
class IProgressMonitor:
    pass
class Problem:
    def desc(self): return "no such operator"
class OnnxParser:
    num_errors = 1
    def __init__(self, network, log): self.network = network
    def get_error(self, index): return Problem()
    def parse_from_file(self, path):
        self.network.text = open(path).read()
        return self.network.text != "unparsable"
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "fake_trt.py").write_text(FAKE)
    monkeypatch.syspath_prepend(folder)
    return "fake_trt"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of other systems")
def test_sigterm_in_the_middle_of_a_build_leaves_no_litter(tmp_path: Path) -> None:
    """What was built before stays, the child is gone, and nothing half-written lies about."""
    (tmp_path / "library").mkdir()
    hang = 'open(os.environ["CHILD"], "w").write(str(os.getpid()))'
    talk = """print('\\narinar-build: {"progress": "half way"}', flush=True)"""
    fake = FAKE.replace("            time.sleep(60)", f"            {hang}; {talk}; time.sleep(600)")
    (tmp_path / "library" / "tensorrt.py").write_text(fake)
    bundle = make_bundle(tmp_path / "bundle", {"first": "quick", "second": "hang"})
    root = Path(arinar.__file__).parent.parent
    places = os.pathsep.join([str(tmp_path / "library"), str(root)])
    words = ["build", str(bundle.folder), "--precision", "fp16", "--compute-capability", "8.0"]
    command = subprocess.Popen(
        [sys.executable, "-m", "arinar", *words],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": places, "CHILD": str(tmp_path / "child")},
    )
    assert command.stderr is not None
    said = ""
    for line in command.stderr:
        said += line
        if "half way" in line:
            assert any(path.name.startswith(".") for path in bundle.folder.rglob("*"))  # being written
            command.terminate()
            break
    said += command.communicate(timeout=60)[1]
    assert command.returncode == 143 and said.splitlines()[-1] == "arinar: error: terminated", said
    assert [engine.info.graph for engine in list_engines(bundle)] == ["first"]
    assert sorted(path.name for path in (bundle.folder / "engines").rglob("*.*")) == sorted(
        [list_engines(bundle)[0].path.parent.name, "first.engine", "first.json"]
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)


def make_bundle(folder: Path, texts: dict[str, str]) -> Bundle:
    """A bundle whose graphs are these texts."""
    graphs, files = {}, {}
    for name, text in texts.items():
        file = f"graphs/fp16/{name}.onnx"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
        info = TensorInfo("x", "float32", ("B", 3))
        graphs[name] = GraphInfo(name, file, 20, (info,), (info,), *KINDS_OF_VERSION_1.get(name, ("head", "none", False)))
        files[file] = file_info(folder / file)
    manifest = Manifest(TINY, {"fp16": graphs}, files, Defaults(4, 2.0), {"num_candidates": 1000})
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return Bundle.open(folder)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", dict.fromkeys(GRAPHS, "fine"))


def states(outcomes: list[Any]) -> dict[str, str]:
    return {outcome.graph: outcome.state for outcome in outcomes}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


# ------------------------------------------------------------------------------------------- with the fake


def test_builds_into_the_bundle_with_sidecars(bundle: Bundle, fake: str) -> None:
    said: list[str] = []
    before = (bundle.folder / MANIFEST_NAME).read_bytes()
    outcomes = build_engines(
        bundle,
        module=fake,
        batch=(1, 2, 4),
        workspace=1 << 20,
        version_compatible=True,
        progress=said.append,
        compute_capability=["12.0", "8.0"],
    )
    assert states(outcomes) == dict.fromkeys(GRAPHS, "built")
    folder = bundle.folder / "engines" / "fake_trt-9.8.7-sm80+sm120-fp16-vc"
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{g}.{s}" for g in GRAPHS for s in ("engine", "json"))
    text = (folder / "first.engine").read_text()
    assert "not TF32" in text and "VERSION_COMPATIBLE" in text and "workspace 1048576" in text and "SM80|SM120" in text
    assert "'x': ((1, 3), (2, 3), (4, 3))" in text
    assert text.count("'x'") == 1  # one profile, where all would be the same
    found = {engine.info.graph: engine for engine in list_engines(bundle)}
    assert set(found) == set(GRAPHS)
    assert found["first"].info == outcomes[0].info
    assert found["first"].info.onnx_sha256 == graph_hash(bundle, "fp16", "first")
    found["first"].verify()
    assert leftovers(bundle.folder) == []
    assert (bundle.folder / MANIFEST_NAME).read_bytes() == before
    assert any("first: building" in line for line in said)


def test_products_of_the_decoder_alone_are_tf32(tmp_path: Path, fake: str) -> None:
    bundle = make_bundle(tmp_path / "bundle", dict.fromkeys(("outer_step", "vae_decoder", "vae_encoder"), "fine"))
    names = list(bundle.manifest.graphs["fp16"])
    made = build_engines(bundle, module=fake, graphs=names)
    assert {o.graph: "not TF32" in o.path.read_text() for o in made} == {
        "outer_step": True,
        "vae_decoder": False,
        "vae_encoder": True,
    }
    without = build_engines(bundle, module=fake, graphs=names, tf32=False)
    assert states(without) == {"outer_step": "reused", "vae_decoder": "built", "vae_encoder": "reused"}
    assert all("not TF32" in o.path.read_text() for o in without)


def test_what_has_not_changed_is_kept(bundle: Bundle, fake: str) -> None:
    first = build_engines(bundle, module=fake)
    assert states(build_engines(bundle, module=fake)) == dict.fromkeys(GRAPHS, "reused")
    assert states(build_engines(bundle, module=fake, rebuild=True, graphs=["first"])) == {"first": "built"}
    assert set(states(build_engines(bundle, module=fake, batch=(1, 8, 65))).values()) == {"built"}
    assert set(states(build_engines(bundle, module=fake, optimization_level=2)).values()) == {"built"}
    build_engines(bundle, module=fake)
    # A damaged engine, a lost sidecar, another export: those alone are built again.
    first[0].path.write_bytes(b"x" * first[0].path.stat().st_size)
    first[1].path.with_suffix(".json").unlink()
    assert states(build_engines(bundle, module=fake)) == {"first": "built", "second": "built", "third": "reused"}
    changed = make_bundle(bundle.folder, {"first": "fine", "second": "fine", "third": "fine too"})
    assert states(build_engines(changed, module=fake)) == {"first": "reused", "second": "reused", "third": "built"}


def test_dry_run_writes_nothing(bundle: Bundle, fake: str) -> None:
    outcomes = build_engines(bundle, module=fake, dry_run=True)
    assert states(outcomes) == dict.fromkeys(GRAPHS, "planned")
    assert not (bundle.folder / "engines").exists()
    assert outcomes[0].info.profiles == ({"x": ((1, 3), (8, 3), (64, 3))},)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crash", "the builder of fake_trt crashed with SIGSEGV.*about to fall"),
        ("refuse", "the builder refused the graph: no kernel for this"),
        ("unparsable", "the parser refused the graph: no such operator"),
        ("shape tensor", "input 'x' became a shape tensor"),
        ("exit", "ended with exit code 3 and no result"),
    ],
)
def test_one_failure_is_named_and_the_others_are_built(tmp_path: Path, fake: str, text: str, message: str) -> None:
    bundle = make_bundle(tmp_path / "bundle", {"first": "fine", "second": text, "third": "fine"})
    outcomes = build_engines(bundle, module=fake)
    assert states(outcomes) == {"first": "built", "second": "failed", "third": "built"}
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(outcomes[1].error)
    assert leftovers(bundle.folder) == []
    assert {engine.info.graph for engine in list_engines(bundle)} == {"first", "third"}


def test_a_hanging_build_is_ended(tmp_path: Path, fake: str) -> None:
    bundle = make_bundle(tmp_path / "bundle", {"first": "hang"})
    (outcome,) = build_engines(bundle, module=fake, timeout=3)
    assert outcome.state == "failed" and "did not finish within 3 s" in outcome.error
    assert not (bundle.folder / "engines").exists()


def test_a_failed_rebuild_keeps_the_old_engine(bundle: Bundle, fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (old,) = build_engines(bundle, module=fake, graphs=["first"])
    content = old.path.read_bytes()
    for failure in (EngineError("no"), KeyboardInterrupt()):

        def broken(*args: Any, failure: BaseException = failure, **kwargs: Any) -> Any:
            if args[0]["what"] == "probe":
                return {"version": "9.8.7", "targets": ["8.0"]}
            Path(args[0]["out"]).write_bytes(b"half")
            raise failure

        monkeypatch.setattr(engine_module, "run_child", broken)
        if isinstance(failure, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                build_engines(bundle, module=fake, graphs=["first"], rebuild=True)
        else:
            assert states(build_engines(bundle, module=fake, graphs=["first"], rebuild=True)) == {"first": "failed"}
        assert old.path.read_bytes() == content
        assert [engine.path for engine in list_engines(bundle)] == [old.path]
        assert leftovers(bundle.folder) == []


def test_timing_cache_is_kept_per_library_and_gpu(bundle: Bundle, fake: str, tmp_path: Path) -> None:
    folder = tmp_path / "timings"
    build_engines(bundle, module=fake, graphs=["first"], timing_cache=folder)
    (file,) = folder.iterdir()
    assert file.name == "fake_trt-9.8.7-portable.timing" and file.read_bytes() == b"timings"
    file.write_bytes(b"of another GPU")
    said: list[str] = []
    build_engines(bundle, module=fake, graphs=["second"], timing_cache=folder, progress=said.append)
    assert any("does not fit this library and GPU" in line for line in said)
    assert file.read_bytes() == b"timings"


def test_bad_arguments(bundle: Bundle, fake: str) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"graphs": ["fourth"]}, "no graph 'fourth'; it has first, second, third"),
        ({"batch": (0, 1, 2)}, "least <= usual <= largest"),
        ({"batch": (4, 2, 8)}, "least <= usual <= largest"),
        ({"min_num_iter": 17}, r"min_num_iter is 17; expected 1..16"),
        ({"optimization_level": 6}, r"expected 0..5"),
        ({"precision": "int8"}, "holds no 'int8' graphs"),
        ({"compute_capability": ["9.0"]}, "cannot build for compute capability '9.0'; it knows 8.0, 12.0"),
    ]
    for arguments, message in cases:
        with pytest.raises(BundleError, match=message):
            build_engines(bundle, module=fake, **arguments)
    path = bundle.path("graphs/fp16/first.onnx")
    path.write_text("evil")
    with pytest.raises(BundleError, match=r"first.onnx is damaged"):
        build_engines(bundle, module=fake)


def test_missing_and_broken_libraries(bundle: Bundle, tmp_path: Path, fake: str) -> None:
    with pytest.raises(BundleError, match="no_such_library is not installed"):
        build_engines(bundle, module="no_such_library")
    (tmp_path / "library" / "broken_trt.py").write_text("raise OSError('libnvinfer.so.11: cannot open')")
    with pytest.raises(BundleError, match=r"broken_trt is installed but does not load \(OSError: libnvinfer"):
        build_engines(bundle, module="broken_trt")
    if importlib.util.find_spec("tensorrt") is None:
        with pytest.raises(BundleError, match=r"tensorrt is not installed: `pip install tensorrt --extra-index-url"):
            build_engines(bundle, module="tensorrt")


def test_a_library_that_builds_for_its_own_gpu(
    bundle: Bundle, tmp_path: Path, fake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = FAKE.replace("class ComputeCapability", "class Other").replace("def set_compute_capability", "def other")
    (tmp_path / "library" / "plain_trt.py").write_text(plain)
    monkeypatch.setattr(engine_module, "describe_gpu", lambda: None)
    with pytest.raises(BundleError, match="builds engines on the GPU that is to run them, and no NVIDIA GPU is visible"):
        build_engines(bundle, module="plain_trt")
    monkeypatch.setattr(engine_module, "describe_gpu", lambda: Gpu("H200", "9.0", "580.1"))
    with pytest.raises(BundleError, match=r"builds for the GPU of this machine \(H200, compute capability 9.0\)"):
        build_engines(bundle, module="plain_trt", compute_capability=["8.9"])
    (outcome,) = build_engines(bundle, module="plain_trt", compute_capability=["current"], graphs=["first"])
    assert outcome.path.parent.name == "plain_trt-9.8.7-sm90-fp16"
    assert (outcome.info.gpu, outcome.info.driver, outcome.info.compute_capability) == ("H200", "580.1", ("9.0",))


def test_command_line(bundle: Bundle, fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from arinar.runtime.backends import engines

    monkeypatch.setitem(engines.MODULES, "tensorrt-rtx", fake)
    run = CliRunner().invoke
    arguments = ["build", str(bundle.folder), "--backend", "tensorrt-rtx"]
    plan = run(main, [*arguments, "--dry-run", "--batch", "1:2:3"])
    assert plan.exit_code == 0 and "x: (1, 3) .. (2, 3) .. (3, 3)" in plan.output
    built = run(main, [*arguments, "--json"])
    assert built.exit_code == 0
    assert {item["state"] for item in json.loads(built.stdout)} == {"built"}
    make_bundle(bundle.folder, {"first": "fine", "second": "crash", "third": "fine"})
    failed = run(main, arguments)
    assert failed.exit_code == 1 and "FAILED second" in failed.output and "2 reused, 1 failed" in failed.output
    for bad in ("8", "0:1:2", "2:1:3", "a:b:c"):
        result = run(main, [*arguments, "--batch", bad])
        assert result.exit_code == 2 and "MIN:OPT:MAX" in result.output


# ----------------------------------------------------------------------------------------------- the rules


def sidecar(**changes: Any) -> EngineInfo:
    values: dict[str, Any] = {
        "graph": "first",
        "precision": "fp16",
        "module": "tensorrt",
        "version": "11.4.0.106",
        "compute_capability": ("9.0",),
        "onnx_sha256": "a" * 64,
        "opset": 20,
        "batch": (1, 8, 64),
        "profiles": ({"x": ((1, 3), (8, 3), (64, 3))},),
        "flags": {},
        "size": 3,
        "sha256": "b" * 64,
    }
    return EngineInfo(**values | changes)


def test_sidecar_round_trip_and_damage() -> None:
    info = sidecar(flags={"workspace": None, "version_compatible": True}, gpu="H200", driver="580", seconds=1.5)
    assert EngineInfo.from_json(info.to_json()) == info
    for text in ("", "[]", "{}", "3", info.to_json().replace('"batch"', '"bunch"')):
        with pytest.raises(ValueError):
            EngineInfo.from_json(text)
    with pytest.raises(ValueError, match="version 3; this version of arinar reads 2: build it again"):
        EngineInfo.from_json(info.to_json().replace('"sidecar_version": 2', '"sidecar_version": 3'))


@pytest.mark.parametrize(
    ("info", "machine", "reason"),
    [
        ({}, {}, None),
        ({}, {"version": "11.5.0.1"}, "built with tensorrt 11.4.0.106, 11.5.0.1 is installed"),
        ({}, {"module": "tensorrt_rtx"}, "built with tensorrt, this is tensorrt_rtx"),
        ({}, {"compute_capability": "8.9"}, "built for compute capability 9.0, this GPU has 8.9"),
        ({}, {"onnx_sha256": "c" * 64}, "another export"),
        ({}, {"module": "tensorrt_lean"}, "runs only engines built with --version-compatible"),
        ({"flags": {"version_compatible": True}}, {"module": "tensorrt_lean"}, None),
        ({"flags": {"version_compatible": True}}, {"version": "11.10.0.1"}, None),
        ({"flags": {"version_compatible": True}}, {"version": "11.3.9.9"}, "newer than the 11.3.9.9 that is installed"),
        ({"compute_capability": ()}, {"compute_capability": "12.0"}, None),
        ({"compute_capability": ()}, {"compute_capability": "7.5"}, "portable engines run from compute capability 8.0 on"),
    ],
)
def test_which_engines_run_where(info: dict[str, Any], machine: dict[str, str], reason: str | None) -> None:
    here = {"module": "tensorrt", "version": "11.4.0.106", "compute_capability": "9.0", "onnx_sha256": "a" * 64} | machine
    found = mismatch(sidecar(**info), **here)
    assert found == reason if reason is None else reason in str(found)


def put(bundle: Bundle, info: EngineInfo, content: bytes = b"abc") -> Path:
    key = engine_key(info.module, info.version, info.compute_capability, info.precision, info.version_compatible)
    path = bundle.folder / "engines" / key / f"{info.graph}.engine"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.with_suffix(".json").write_text(info.to_json())
    return path


def test_finding_engines(bundle: Bundle) -> None:
    machine = {"module": "tensorrt", "version": "11.4.0.106", "compute_capability": "9.0", "precision": "fp16"}
    right = {"onnx_sha256": graph_hash(bundle, "fp16", "first")}
    command = "Run `arinar build .*bundle --backend tensorrt --precision fp16`"
    with pytest.raises(EngineError, match=f"graph 'first'.*none has been built.*{command}"):
        find_engines(bundle, ["first"], **machine)
    put(bundle, sidecar(**right, version="10.9.0"))
    put(bundle, sidecar(**right, compute_capability=("8.9",)))
    with pytest.raises(EngineError, match=r"built with tensorrt 10.9.0, 11.4.0.106 is installed.*8.9, this GPU has 9.0"):
        find_engines(bundle, ["first"], **machine)
    put(bundle, sidecar(**right, flags={"version_compatible": True}))
    assert find_engines(bundle, ["first"], **machine)["first"].info.version_compatible
    best = put(bundle, sidecar(**right))
    assert find_engines(bundle, ["first"], **machine)["first"].path == best  # several GPUs and versions side by side
    lean = find_engines(bundle, ["first"], **machine | {"module": "tensorrt_lean"})["first"]
    assert lean.info.version_compatible
    with pytest.raises(EngineError, match="no fp16 engine of graph 'second'"):
        find_engines(bundle, ["first", "second"], **machine)


def test_sidecars_that_are_links_out_of_the_bundle_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    path = put(bundle, sidecar(onnx_sha256=graph_hash(bundle, "fp16", "first")))
    assert len(list_engines(bundle)) == 1
    told = path.with_suffix(".json")
    told.rename(tmp_path / "outside.json")
    told.symlink_to(tmp_path / "outside.json")
    problems: list[str] = []
    assert not list_engines(bundle, problems)
    assert len(problems) == 1 and "first.json' leads out of the bundle" in problems[0]
    told.unlink()
    told.symlink_to("first.json")  # to itself
    assert not list_engines(bundle)


def test_damaged_engines_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    machine = {"module": "tensorrt", "version": "11.4.0.106", "compute_capability": "9.0", "precision": "fp16"}
    path = put(bundle, sidecar(onnx_sha256=graph_hash(bundle, "fp16", "first")), b"truncated")
    with pytest.raises(EngineError, match="the engine has 9 bytes, its sidecar says 3"):
        find_engines(bundle, ["first"], **machine)
    path.write_bytes(b"abc")
    with pytest.raises(EngineError, match="is damaged: its SHA-256 is not the sidecar's"):
        find_engines(bundle, ["first"], **machine)["first"].verify()
    path.rename(tmp_path / "outside.engine")
    path.symlink_to(tmp_path / "outside.engine")
    with pytest.raises(EngineError, match="leads out of the bundle"):
        find_engines(bundle, ["first"], **machine)
    path.unlink()
    path.with_suffix(".json").write_text("{")
    with pytest.raises(EngineError, match="no fp16 engine of graph 'first'"):
        find_engines(bundle, ["first"], **machine)


# -------------------------------------------------------------------------------------------------- profiles


@pytest.mark.parametrize("name", ["base", "digits", "base-causal", "digits-causal"])
def test_profiles_admit_every_step_of_every_schedule(name: str) -> None:
    from arinar.runtime.outer import CausalOuter

    config, least = PRESETS[name], 4
    batch = (2, 8, 16)
    bands = axis_ranges(config, batch, least, config.default_num_iter)
    for axes in bands:
        for low, usual, high in axes.values():
            assert low <= usual <= high
    length = config.seq_len
    counts = [length] if config.outer == "causal" else range(least, length + 1)
    for num_iter in counts:
        for step in steps(length, num_iter):
            seen = {"V": length - step.masked, "P": step.count, "U": step.remaining}
            for images in batch:
                for branches in (1, 2):
                    sizes = seen | {"B": images, "G": branches, "M": step.count * images}
                    seen_by = [axis for axis in sizes if config.outer == "masked" or axis in "BGM"]
                    fits = [all(axes[axis][0] <= sizes[axis] <= axes[axis][2] for axis in seen_by) for axes in bands]
                    assert any(fits), (num_iter, step)
    outer = GraphInfo(
        "outer_step", "f", 20, tuple(TensorInfo(n, "int64", ("N",)) for n in CausalOuter.INPUTS[1:2]), (), "outer"
    )
    assert profiles(outer, bands) == ({"rows": ((2,), (16,), (32,))},)


def test_visible_and_hidden_tokens_have_opposite_ranges() -> None:
    """No profile admits all tokens visible and hidden at once: that would make the largest tensors of what never occurs."""
    config = PRESETS["base"]
    bands = axis_ranges(config, (1, 8, 64), 16, 64, least_visible=1)
    assert [axes["V"] for axes in bands] == [(1, 32, 63), (64, 95, 127), (128, 159, 191), (192, 223, 255)]
    assert [axes["U"][1] for axes in bands] == sorted((axes["U"][1] for axes in bands), reverse=True)
    most = max(axes["V"][2] + axes["P"][2] + axes["U"][2] for axes in bands)
    assert most < config.seq_len + 64 + 25
    assert axis_ranges(config, (1, 8, 64), 16, 64)[0]["V"][0] == 0  # without a graph for first steps
    # The head draws what a first step predicts, all tokens of a single step included, and has one profile.
    head = GraphInfo("inner_condition", "f", 20, (TensorInfo("z", "float32", ("N", 4)),), (), "head")
    (profile,) = profiles(head, axis_ranges(config, (1, 8, 64), 1, 64, least_visible=1))
    assert profile["z"][2] == (2 * config.seq_len * 64, 4)


def test_tensors_too_large_for_the_library_are_refused_when_a_build_is_planned(
    shared_folder: Path, fake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle(shared_folder, TINY))
    monkeypatch.setattr(engine_module, "MOST_ELEMENTS", 100_000)
    arguments: dict[str, Any] = {"module": fake, "precision": "fp32", "graphs": ["outer_step"], "dry_run": True}
    with pytest.raises(
        BundleError, match=r"graph 'outer_step' makes of 64 images a tensor .* elements.*--batch 1:8:(\d+)"
    ) as told:
        build_engines(bundle, batch=(1, 8, 64), **arguments)
    fits = int(str(told.value).rpartition(":")[2])
    (outcome,) = build_engines(bundle, batch=(1, 1, fits), **arguments)
    assert len(outcome.info.profiles) == 4
    with pytest.raises(BundleError, match="--batch"):
        build_engines(bundle, batch=(1, 1, fits + 1), **arguments)


def test_sizes_are_those_that_the_exporter_wrote(shared_folder: Path) -> None:
    """Against shapes that ONNX Runtime makes, of every tensor of a graph."""
    onnx = pytest.importorskip("onnx")
    import onnxruntime

    from arinar.export.sizes import evaluate, largest_tensor, tensor_dims

    bundle = Bundle.open(tiny_bundle(shared_folder, TINY))
    path = bundle.graph_path(bundle.manifest.graphs["fp32"]["outer_step"])
    dims = tensor_dims(path)
    model = onnx.load(path)
    made = {name for node in model.graph.node for name in node.output}
    values = [value for value in model.graph.value_info if value.name in made]
    model.graph.output.extend(values)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    from arinar.export.graphs import graph_specs

    spec = graph_specs(*tiny_model(TINY))["outer_step"]
    sizes = spec.sizes[-1]
    names = [output.name for output in session.get_outputs()]
    shapes = {name: array.shape for name, array in zip(names, session.run(names, spec.example(sizes)), strict=True)}
    assert len(shapes) > 100
    for name, shape in shapes.items():
        if name in dims and name != "z":
            assert tuple(evaluate(dim, sizes) for dim in dims[name]) == shape, name
    name, shape = largest_tensor(path, sizes)
    assert np.prod(shape) == max(np.prod(shape) for shape in shapes.values())
    assert evaluate("__import__('os')", {}) is evaluate("B +", {"B": 1}) is evaluate("C", {}) is None


# ------------------------------------------------------------------------------------------- the real library


@pytest.fixture(scope="module")
def logger() -> Iterator[Any]:
    trt = importlib.import_module("tensorrt_rtx")
    yield trt.Logger(trt.Logger.ERROR)


@pytest.mark.requires_rtx
@without_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("config", [TINY, TINY_CAUSAL, TINY_MAR], ids=["masked", "causal", "diffusion"])
def test_every_graph_builds(config: Any, precision: str, shared_folder: Path) -> None:
    bundle = Bundle.open(tiny_bundle(shared_folder, config))
    names = list(bundle.manifest.precision_graphs(precision))
    outcomes = build_engines(
        bundle, module="tensorrt_rtx", precision=precision, graphs=names, batch=(1, 2, 4), optimization_level=0
    )
    assert {o.graph: o.error for o in outcomes if o.state == "failed"} == {}
    assert all(outcome.info.size > 1000 for outcome in outcomes)
    again = build_engines(
        bundle, module="tensorrt_rtx", precision=precision, graphs=names, batch=(1, 2, 4), optimization_level=0
    )
    assert set(states(again).values()) == {"reused"}
    machine = {"module": "tensorrt_rtx", "version": outcomes[0].info.version, "compute_capability": "12.0"}
    assert set(find_engines(bundle, names, precision=precision, **machine)) == set(names)


@pytest.mark.requires_rtx
@without_rtx
@pytest.mark.parametrize("config", [TINY, TINY_CAUSAL, TINY_MAR], ids=["masked", "causal", "diffusion"])
def test_no_input_is_a_shape_tensor(config: Any, shared_folder: Path, logger: Any) -> None:
    """A shape tensor is read by the host: its value could not change between replays of a recorded CUDA graph."""
    trt = importlib.import_module("tensorrt_rtx")
    bundle = Bundle.open(tiny_bundle(shared_folder, config))
    for precision, graphs in bundle.manifest.graphs.items():
        for name, graph in graphs.items():
            network = trt.Builder(logger).create_network(0)
            parser = trt.OnnxParser(network, logger)
            assert parser.parse_from_file(str(bundle.path(graph.file)))
            inputs = [network.get_input(index) for index in range(network.num_inputs)]
            assert [tensor.name for tensor in inputs] == [tensor.name for tensor in graph.inputs]
            assert [tensor.name for tensor in inputs if tensor.is_shape_tensor] == [], (precision, name)
            kinds = {tensor.name: np.dtype(trt.nptype(tensor.dtype)).name for tensor in inputs}
            assert kinds == {tensor.name: tensor.dtype for tensor in graph.inputs}


@pytest.fixture(scope="module")
def in_place(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny causal bundle with the step of opset 24, which gives back the whole cache."""
    from arinar.export.folder import write_manifest
    from arinar.export.graphs import graph_specs
    from arinar.export.trace import WeightStore, export_graph, validate_graph

    folder = tmp_path_factory.mktemp("in-place") / "bundle"
    engines = shutil.ignore_patterns("engines")  # another test may be building them
    manifest = Bundle.open(Path(shutil.copytree(tiny_bundle(shared_folder, TINY_CAUSAL), folder, ignore=engines))).manifest
    target = folder / "graphs" / "fp32" / "step24"
    target.mkdir()
    store = WeightStore(target / "weights.data")
    spec = graph_specs(*tiny_model(TINY_CAUSAL), opset=24)["outer_step"]
    path = export_graph(spec, target, store, opset=24)
    store.close()
    assert validate_graph(path, spec) < 1e-5
    names = [f"graphs/fp32/step24/{file.name}" for file in (path, store.path)]
    info = GraphInfo("outer_step", names[0], 24, spec.inputs, spec.outputs, "outer", weights=(names[1],))
    graphs = {"fp32": manifest.graphs["fp32"] | {"outer_step": info}}
    files = manifest.files | {name: file_info(folder / name) for name in names}
    write_manifest(folder, replace(manifest, graphs=graphs, files=files))
    return Bundle.open(folder)


def test_a_cache_updated_in_place_gives_the_same_tokens(in_place: Bundle, shared_folder: Path) -> None:
    from arinar.runtime import Pipeline

    pipeline = Pipeline.load(in_place.folder)
    have = pipeline.generate([0, 1, 2], guidance_scale=2.0)
    want = Pipeline.load(tiny_bundle(shared_folder, TINY_CAUSAL), precision="fp32").generate([0, 1, 2], guidance_scale=2.0)
    assert np.abs(have.tokens - want.tokens).max() < 1e-3
    (state,) = pipeline.loop._idle
    assert state.outer.cache.in_place
    for name, buffer in state.outer.cache.present.items():
        assert buffer is state.outer.cache.past[name.replace("present", "past_key_values")]  # a backend may alias them


@pytest.mark.requires_rtx
@without_rtx
def test_the_cache_is_updated_in_place_by_the_library(in_place: Bundle, logger: Any) -> None:
    trt = importlib.import_module("tensorrt_rtx")
    graph = in_place.manifest.graphs["fp32"]["outer_step"]
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(in_place.path(graph.file)))
    kinds = [network.get_layer(index).type.name for index in range(network.num_layers)]
    assert kinds.count("KV_CACHE_UPDATE") == 2 * TINY_CAUSAL.decoder_depth
    assert not any(network.get_input(index).is_shape_tensor for index in range(network.num_inputs))
    (outcome,) = build_engines(in_place, module="tensorrt_rtx", graphs=["outer_step"], batch=(1, 2, 4))
    assert outcome.state == "built", outcome.error


@pytest.mark.slow
@pytest.mark.requires_rtx
@without_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_graph_of_the_published_size_builds(precision: str, tmp_path: Path) -> None:
    from arinar.export.bundle import export_bundle
    from arinar.model import Arinar, initialize
    from arinar.vae import AutoencoderKL

    model = initialize(Arinar(PRESETS["base"])).eval()
    manifest = export_bundle(model, AutoencoderKL().eval(), tmp_path / "base", precision=precision)
    outcomes = build_engines(tmp_path / "base", module="tensorrt_rtx", graphs=list(manifest.graphs[precision]))
    assert {o.graph: o.error for o in outcomes if o.state == "failed"} == {}


# ---------------------------------------------------------------------------------- graph parity, independently


@pytest.mark.parametrize("config", [TINY, TINY_CAUSAL, TINY_MAR], ids=["masked", "causal", "diffusion"])
def test_onnxruntime_agrees_with_the_step_modules_by_polygraphy(config: Any, shared_folder: Path) -> None:
    pytest.importorskip("polygraphy")
    from polygraphy.backend.base import BaseRunner
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.common import TensorMetadata
    from polygraphy.comparator import Comparator, CompareFunc

    from arinar.export.graphs import graph_specs
    from arinar.export.spec import GraphSpec
    from arinar.export.trace import run_module

    class StepModuleRunner(BaseRunner):  # type: ignore[misc]
        def __init__(self, spec: GraphSpec) -> None:
            super().__init__(name="step module")
            self.spec = spec

        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for tensor in self.spec.inputs:
                metadata.add(tensor.name, np.dtype(tensor.dtype), [-1 if isinstance(d, str) else d for d in tensor.shape])
            return metadata

        def infer_impl(self, feed_dict: Any) -> Any:
            self.inference_time = 0.0  # the comparator adds it up
            names = [tensor.name for tensor in self.spec.outputs]
            return dict(zip(names, map(np.ascontiguousarray, run_module(self.spec, feed_dict)), strict=True))

    bundle = Bundle.open(tiny_bundle(shared_folder, config))
    graphs = bundle.manifest.graphs["fp32"]
    for name, spec in graph_specs(*tiny_model(config)).items():
        runners = [StepModuleRunner(spec), OnnxrtRunner(SessionFromOnnx(str(bundle.path(graphs[name].file))))]
        feeds = [spec.example(sizes, seed=7) for sizes in spec.sizes if 0 not in sizes.values()]
        results = Comparator.run(runners, data_loader=feeds)
        atol = 1.0 if spec.outputs[0].dtype == "uint8" else spec.atol
        compare = CompareFunc.simple(atol=atol, rtol=spec.atol, check_error_stat="max")
        assert bool(Comparator.compare_accuracy(results, compare_func=compare)), name
