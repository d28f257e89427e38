"""The wheel, built from a clean copy and installed into an empty environment without PyTorch, outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arinar.cli import main

pytestmark = pytest.mark.wheel

ROOT = Path(__file__).parent.parent
#: Import name -> folder.
ROOMS = {
    "arinar": "arinar",
    "arinar.calibration": "calibration",
    "arinar.cli": "cli",
    "arinar.export": "export",
    "arinar.measure": "measure",
    "arinar.runtime": "runtime",
    "arinar.runtime.backends": "runtime/backends",
    "arinar.runtime.kernels": "runtime/kernels",
    "arinar.serve": "serve",
}
#: Of the base requirements and the extra `cpu`, compiled: what a server needs on its disk.
MOST_MEGABYTES = 220


def run(*words: object, cwd: Path, **environment: str) -> str:
    # PYTHONPATH of the test run would lead back to the checkout.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | environment
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=clean, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source") / "checkout"
    source.mkdir()
    for folder in sorted({folder.split("/")[0] for folder in ROOMS.values()}):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copyfile(file, source / file.name)
    out = tmp_path_factory.mktemp("dist")
    # In an environment of its own, as the release is: what builds it is what pyproject.toml says.
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out, source, cwd=out)
    (file,) = out.glob("arinar-*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel -> its folder."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    pip = (folder / "bin" / "python", "-m", "pip", "install", "-q")
    run(*pip, "-c", ROOT / "constraints.txt", f"{wheel}[cpu]", cwd=folder.parent)
    return folder


def test_the_wheel_holds_the_rooms_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    have = {name for name in names if name.endswith(".py")}
    want = set()
    for package, folder in ROOMS.items():
        want |= {f"{package.replace('.', '/')}/{file.name}" for file in (ROOT / folder).glob("*.py")}
    assert have == want
    weights = {f"arinar/weights/{file.name}" for file in (ROOT / "arinar" / "weights").glob("*.safetensors")}
    assert len(weights) == 4
    kernels = {f"arinar/runtime/kernels/{file.name}" for file in (ROOT / "runtime" / "kernels").glob("*.cu*")}
    assert len(kernels) >= 2
    assert set(names) - have == weights | kernels | {"arinar/imagenet_classes.txt", "arinar/py.typed", "arinar/serve/page.html"}


def test_every_folder_with_modules_is_a_room() -> None:
    """A new one must be packaged, and named here."""
    hidden = ("build", "dist", "tests", "benchmarks", "shared")
    tops = [folder for folder in ROOT.iterdir() if folder.is_dir() and folder.name not in hidden and folder.name[0] != "."]
    folders = {file.parent.relative_to(ROOT).as_posix() for top in tops for file in top.rglob("__init__.py")}
    assert folders == set(ROOMS.values())


def test_the_runtime_imports_without_torch(environment: Path, tmp_path: Path) -> None:
    code = """
import importlib, importlib.util, pkgutil, sys
for absent in ("torch", "onnx", "onnxscript", "sklearn", "scipy", "safetensors", "pytest"):
    assert importlib.util.find_spec(absent) is None, absent
import arinar.runtime
found = ["arinar.runtime"]
for info in pkgutil.walk_packages(arinar.runtime.__path__, "arinar.runtime."):
    importlib.import_module(info.name)
    found.append(info.name)
assert all(sys.modules[name].__file__.startswith(sys.prefix) for name in found)
print(len(found))
"""
    modules = [file for folder in ("runtime", "runtime/backends", "runtime/kernels") for file in (ROOT / folder).glob("*.py")]
    assert int(run(environment / "bin" / "python", "-c", code, cwd=tmp_path)) == len(modules)


def test_the_command_works_and_makes_the_same_image(environment: Path, digits_bundle: Path, tmp_path: Path) -> None:
    arinar = environment / "bin" / "arinar"
    assert "generate" in run(arinar, "--help", cwd=tmp_path)
    bundle = shutil.copytree(digits_bundle, tmp_path / "bundle")
    assert "outer_step" in run(arinar, "inspect", "bundle", "--graphs", cwd=tmp_path)
    run(arinar, "generate", "bundle", "--labels", 3, "-o", "out", cwd=tmp_path)
    from click.testing import CliRunner

    here = CliRunner().invoke(main, ["generate", str(bundle), "--labels", "3", "-o", str(tmp_path / "here")])
    assert here.exit_code == 0, here.output
    images = []
    for folder in ("out", "here"):
        with Image.open(next((tmp_path / folder).glob("000000-*.png"))) as image:
            images.append(np.asarray(image))
    assert images[0].shape == (32, 32, 3) and np.array_equal(*images)


def test_it_needs_little_room(environment: Path) -> None:
    (packages,) = environment.glob("lib/python*/site-packages")
    sizes: dict[str, int] = {}
    for file in packages.rglob("*"):
        if file.is_file():
            name = file.relative_to(packages).parts[0]
            sizes[name] = sizes.get(name, 0) + file.stat().st_size
    ours = {name: size for name, size in sizes.items() if not name.startswith(("pip", "setuptools", "_distutils", "distutils"))}
    largest = sorted(((size, name) for name, size in ours.items()), reverse=True)[:6]
    assert sum(ours.values()) <= MOST_MEGABYTES * 1e6, largest
    print(f"{sum(ours.values()) / 1e6:.0f} MB: {largest}")
