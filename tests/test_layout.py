"""Structure: who may import whom, and that the runtime needs nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import arinar

ROOT = Path(arinar.__file__).parent
# Installed, the rooms are inside the package; in a checkout they are its siblings.
ROOMS = {
    "arinar": ROOT,
    **{room: (ROOT / room if (ROOT / room).is_dir() else ROOT.parent / room) for room in ("export", "runtime", "calibration")},
}
# Plain modules (standard library and NumPy) that every room may import.
PLAIN = {"arinar", "arinar.config", "arinar.files", "arinar.schedule", "arinar.mixture_law"}
HEAVY = ("torch", "onnx", "onnxscript", "safetensors", "sklearn", "scipy", "polygraphy")


def modules(room: str) -> list[Path]:
    return sorted(ROOMS[room].glob("*.py"))


def imports(path: Path, room: str) -> set[str]:
    """Absolute names of everything a module imports, at any depth of its code."""
    package = "arinar" if room == "arinar" else f"arinar.{room}"
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            found.add(name)
            if node.module is None or name == "arinar":  # `from . import x`, `from arinar import x`
                found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


def room_of(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "arinar":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ("export", "runtime", "calibration") else "arinar"


@pytest.mark.parametrize("room", ["arinar", "runtime"])
def test_model_and_runtime_do_not_import_each_other(room: str) -> None:
    for path in modules(room):
        if path.name in ("cli.py", "__main__.py"):  # the front door knows every room, but only inside a subcommand
            continue
        for name in imports(path, room):
            other = room_of(name)
            if other is None or other == room:
                continue
            assert room == "runtime" and name in PLAIN, f"{path.name} of {room}/ imports {name}"


def test_runtime_uses_only_plain_modules_of_the_model_room() -> None:
    for path in modules("runtime"):
        for name in imports(path, "runtime"):
            assert name.split(".")[0] not in HEAVY, f"{path.name} imports {name}"


def test_calibration_neither_imports_export_nor_runtime_models() -> None:
    for path in modules("calibration"):
        for name in imports(path, "calibration"):
            assert room_of(name) not in ("export",), f"{path.name} imports {name}"


def test_nobody_imports_the_rooms_by_their_folder_names() -> None:
    for room in ROOMS:
        for path in modules(room):
            bare = {name.split(".")[0] for name in imports(path, room)} & {"export", "runtime", "calibration"}
            assert not bare, f"{path} imports {bare}: a second copy of every class"


def test_every_runtime_module_imports_without_torch_onnx_or_the_model() -> None:
    names = [f"arinar.runtime.{p.stem}" for p in modules("runtime") if p.stem != "__init__"] + ["arinar.runtime", "arinar.cli"]
    blocked = [*HEAVY, *(f"arinar.{p.stem}" for p in modules("arinar") if f"arinar.{p.stem}" not in PLAIN)]
    blocked = [name for name in blocked if name not in ("arinar.cli", "arinar.__init__", "arinar.__main__")]
    code = (
        "import sys, importlib\n"
        f"blocked = {blocked!r}\n"
        "for name in blocked: sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "heavy = [n for n in ('torch', 'onnx', 'onnxruntime') if sys.modules.get(n)]\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_loads_only_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import arinar\n"
        "new = {n.split('.')[0] for n in set(sys.modules) - before} - set(sys.stdlib_module_names) - {'arinar'}\n"
        "assert not new, new"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert result.returncode == 0, result.stderr
