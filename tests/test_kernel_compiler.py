"""Compiling and keeping the kernels: what is kept is used again, what is not right made anew, what is missing said."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from cubins import Needs, needs
from fake_driver import FakeNvrtc

from arinar.config import ArinarConfig
from arinar.runtime.kernels import compiler
from arinar.runtime.kernels.compiler import KernelError, cubin
from arinar.runtime.kernels.source import FOLDER, MOST_GAUSSIANS, Source, add_source, draw_source, inner_source

SOURCE = draw_source(4, 1000)


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> FakeNvrtc:
    fake = FakeNvrtc()
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", fake)
    return fake


def test_what_is_compiled_is_kept(nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    code = cubin(SOURCE, "9.0", tmp_path / "engines" / "kernels")
    assert cubin(SOURCE, "9.0", tmp_path / "engines" / "kernels") == code and nvrtc.programs == 1
    (path,) = (tmp_path / "engines" / "kernels").iterdir()
    assert path.name == f"draw-sm_90-{SOURCE.sha256[:16]}-nvrtc13.5.cubin"


def test_another_source_gpu_or_compiler_is_compiled_anew(nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    for source, capability, release in (
        (SOURCE, "9.0", (13, 5)),
        (draw_source(4, 999), "9.0", (13, 5)),
        (draw_source(5, 1000), "9.0", (13, 5)),
        (SOURCE, "8.0", (13, 5)),
        (SOURCE, "9.0", (14, 0)),
    ):
        before, nvrtc.release = nvrtc.programs, release
        cubin(source, capability, tmp_path)
        assert nvrtc.programs == before + 1
    assert len(list(tmp_path.iterdir())) == 5


def test_a_header_is_part_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = SOURCE.sha256
    for file in FOLDER.iterdir():
        if file.suffix in (".cu", ".cuh"):
            (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.setattr("arinar.runtime.kernels.source.FOLDER", tmp_path)
    assert SOURCE.sha256 == before
    with (tmp_path / "device.cuh").open("a") as header:
        header.write("// changed\n")
    assert SOURCE.sha256 != before


@pytest.mark.parametrize("damage", ["another source", "cut off", "changed", "no JSON", "empty", "a folder"])
def test_a_damaged_or_wrong_file_is_replaced(nvrtc: FakeNvrtc, tmp_path: Path, damage: str) -> None:
    code = cubin(SOURCE, "9.0", tmp_path)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    if damage == "another source":
        cubin(draw_source(3, 7), "9.0", tmp_path)
        (other,) = set(tmp_path.iterdir()) - {path}
        path.write_bytes(other.read_bytes())
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
        with pytest.warns(RuntimeWarning, match="are not kept"):
            assert cubin(SOURCE, "9.0", tmp_path) == code
        return
    else:
        bad = {"cut off": data[:-3], "changed": data[:-3] + b"xyz", "no JSON": b"{" * 1000 + b"\n" + code, "empty": b""}
        path.write_bytes(bad[damage])
    before = nvrtc.programs
    assert cubin(SOURCE, "9.0", tmp_path) == code and nvrtc.programs == before + 1
    assert path.read_bytes() == data


def test_a_folder_that_cannot_be_written_is_a_warning(nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.warns(RuntimeWarning, match="are not kept, and compiled at every start: .*file"):
        assert cubin(SOURCE, "9.0", blocked / "kernels")


def test_without_a_compiler_a_kept_one_will_do(nvrtc: FakeNvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = cubin(SOURCE, "9.0", tmp_path)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    assert cubin(SOURCE, "9.0", tmp_path) == code
    for source, capability in ((draw_source(4, 7), "9.0"), (SOURCE, "8.0")):
        with pytest.raises(KernelError, match=r"NVRTC cannot be loaded.*pip install '\.\[gpu\]'.*nvidia-cuda-nvrtc"):
            cubin(source, capability, tmp_path)


def test_a_library_that_cannot_be_loaded(nvrtc: FakeNvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise RuntimeError("Failed to dlopen libnvrtc.so.13")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    with pytest.raises(KernelError, match="cannot be loaded .Failed to dlopen libnvrtc.so.13.; .*nvidia-cuda-nvrtc"):
        cubin(SOURCE, "9.0", tmp_path)


def test_an_unknown_gpu(nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"NVRTC 13.5 compiles for sm_80, sm_90, this GPU is sm_142; .*--upgrade"):
        cubin(SOURCE, "14.2", tmp_path)


def test_a_source_that_does_not_compile_says_why(nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    nvrtc.log = b"draw.cu(12): error: identifier is undefined"
    with pytest.raises(KernelError, match=r"draw.cu does not compile for sm_90: draw.cu\(12\): error: identifier"):
        cubin(SOURCE, "9.0", tmp_path)
    assert not list(tmp_path.iterdir())


# -- the real compiler, which needs neither GPU nor driver

requires_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None and os.environ.get("ARINAR_NVRTC") != "1",
    reason="needs cuda-bindings and nvidia-cuda-nvrtc",
)
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
#: Of the published model's mixtures: half the registers and a tenth of the static shared memory that a block may have.
MOST = Needs(registers=64, local=0, shared=6 * 1024, code=64 * 1024)

MOST_INNER = {
    "inner_qkv": Needs(registers=144, shared=27 * 1024),
    "inner_attend": Needs(registers=72, shared=2 * 1024),
    "inner_project": Needs(registers=144, shared=2 * 1024),
    "inner_expand": Needs(registers=144, shared=27 * 1024),
    "inner_contract": Needs(registers=192, shared=2 * 1024),
    "inner_draw": Needs(registers=72, shared=12 * 1024),
}


@requires_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_draw_compiles_and_needs_little(architecture: str, tmp_path: Path) -> None:
    found = needs(cubin(SOURCE, architecture, tmp_path))["mixture_draw"]
    print(architecture, found)
    assert found.registers and found.shared and found.code
    assert found.local == MOST.local  # nothing is spilled
    assert found.registers <= MOST.registers and found.shared <= MOST.shared and found.code <= MOST.code


@requires_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_inner_model_compiles_and_spills_nothing(architecture: str, tmp_path: Path) -> None:
    """The published shape, in float16; two blocks of each kernel, or nearly so, fit a multiprocessor."""
    for name, found in needs(cubin(inner_source(ArinarConfig(), 1000, "float16"), architecture, tmp_path)).items():
        print(architecture, name, found)
        assert found.registers <= MOST_INNER[name].registers and found.shared <= MOST_INNER[name].shared
        assert found.local == 0 and found.code <= 64 * 1024


@requires_nvrtc
def test_the_inner_model_compiles_in_float32(tmp_path: Path) -> None:
    found = needs(cubin(inner_source(ArinarConfig(), 1000, "float32"), "9.0", tmp_path))
    assert set(found) == set(MOST_INNER) and all(kernel.local == 0 and kernel.registers <= 192 for kernel in found.values())


@requires_nvrtc
def test_the_sum_compiles(tmp_path: Path) -> None:
    (found,) = needs(cubin(add_source(), "9.0", tmp_path)).items()
    assert found[0] == "add" and found[1].local == found[1].shared == 0


@requires_nvrtc
@pytest.mark.parametrize("num_gaussians", [1, MOST_GAUSSIANS])
def test_small_and_large_mixtures_fit_a_block(num_gaussians: int, tmp_path: Path) -> None:
    for architecture in ("7.5", "10.0"):
        found = needs(cubin(draw_source(num_gaussians, 1000), architecture, tmp_path))["mixture_draw"]
        assert found.registers <= 255 and found.local == 0 and found.shared <= 48 * 1024


@requires_nvrtc
def test_the_compilers_errors_are_told(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"draw.cu does not compile for sm_90: .*NODE_TARGETS"):
        cubin(Source("draw.cu", SOURCE.constants.replace("NODE_TARGETS", "OTHER")), "9.0", tmp_path)
    with pytest.raises(KernelError, match="this GPU is sm_10"):
        compiler.compiled(SOURCE, "sm_10", compiler.load_nvrtc())
