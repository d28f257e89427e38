"""The fence: which room may import which, at every level of folders, and that what is torch-free stays so."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import arinar

ROOT = Path(arinar.__file__).parent
NAMES = ("runtime", "export", "calibration", "measure", "serve", "cli")
# Installed, the rooms are inside the package; in a checkout they are its siblings.
ROOMS = {
    "arinar": ROOT,
    **{room: (ROOT / room if (ROOT / room).is_dir() else ROOT.parent / room) for room in NAMES},
}
#: Modules of the model's room that need nothing but the standard library and NumPy: every room may import them.
PLAIN = {
    f"arinar.{name}"
    for name in (
        "class_names",
        "config",
        "demo",
        "diffusion_law",
        "diffusion_schedule",
        "files",
        "gmm_law",
        "law",
        "mixture_law",
        "reading",
        "rows",
        "schedule",
        "schemes",
        "text",
        "values",
    )
}
#: Modules that import neither torch nor the model, though their rooms do.
TORCH_FREE = {
    *(f"arinar.export.{name}" for name in ("layers", "onnx_edit")),
    *(
        f"arinar.measure.{name}"
        for name in (
            "bench",
            "bench_report",
            "charts",
            "checks",
            "cost",
            "distances",
            "evaluate",
            "evaluation_report",
            "features",
            "image_sets",
            "launches",
            "moments",
            "parity_report",
            "peaks",
            "plans",
            "sweep",
            "sweep_report",
        )
    ),
}
#: Room -> what it may import of the others: whole rooms, or single modules.
ALLOWED: dict[str, set[str]] = {
    "arinar": set(),
    "runtime": PLAIN,
    "export": {"arinar", "runtime"},
    "calibration": {"arinar", "runtime", *(name for name in TORCH_FREE if name.startswith("arinar.export."))},
    "measure": {"arinar", "runtime", "export", "calibration"},
    "serve": {"runtime"},
    "cli": {"arinar", "runtime", "export", "calibration", "measure", "serve"},
}
#: A torch-free module stays among these.
LIGHT_ROOMS = ("runtime", "serve", "cli")
HEAVY = ("torch", "onnx", "onnxscript", "safetensors", "sklearn", "scipy", "polygraphy")


def modules(room: str) -> list[Path]:
    inside = [ROOMS[other] for other in ROOMS if ROOMS[other] != ROOMS[room] and ROOMS[other].is_relative_to(ROOMS[room])]
    found = (path for path in ROOMS[room].rglob("*.py") if not any(path.is_relative_to(folder) for folder in inside))
    return sorted(path for path in found if path != ROOT / "__main__.py")  # it only calls the front door


def module_name(path: Path, room: str) -> str:
    parts = path.relative_to(ROOMS[room]).with_suffix("").parts
    base = ["arinar"] if room == "arinar" else ["arinar", room]
    return ".".join([*base, *(part for part in parts if part != "__init__")])


def imports(path: Path, room: str) -> set[str]:
    """Absolute names of every module that a module imports, at any depth of its code."""
    own = module_name(path, room).split(".")
    package = own if path.name == "__init__.py" else own[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            name = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" if is_module(f"{name}.{alias.name}") else name for alias in node.names}
    return found


def is_module(name: str) -> bool:
    """Whether an absolute name is a module of ours, or a room."""
    parts = name.split(".")
    if parts[0] != "arinar" or len(parts) < 2:
        return False
    room, rest = (parts[1], parts[2:]) if parts[1] in NAMES else ("arinar", parts[1:])
    place = ROOMS[room].joinpath(*rest)
    return place.is_dir() or place.with_suffix(".py").is_file()


def has_packages(path: Path) -> bool:
    """Whether the packages are installed that a module of serve/ imports: an extra brings them."""
    if path.parent != ROOMS["serve"]:
        return True
    return all(importlib.util.find_spec(name) for name in ("fastapi", *(["ray"] if path.stem == "ray" else [])))


def room_of(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "arinar":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in NAMES else "arinar"


def test_the_table_names_modules_that_exist() -> None:
    assert all(is_module(name) for name in PLAIN | TORCH_FREE)
    assert set(ALLOWED) == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_in_allowed_directions(room: str) -> None:
    assert modules(room)
    for path in modules(room):
        for name in imports(path, room):
            other = room_of(name)
            allowed = other in (None, room) or other in ALLOWED[room] or name in ALLOWED[room] | PLAIN | {"arinar"}
            assert allowed, f"{path} of {room}/ imports {name}"


def test_the_fence_sees_sub_folders_and_relative_imports() -> None:
    base = ROOMS["runtime"] / "backends" / "base.py"
    assert base in modules("runtime")
    registry = imports(ROOMS["runtime"] / "backends" / "__init__.py", "runtime")
    assert {"arinar.runtime.bundle", "arinar.runtime.backends.base"} <= registry


def test_no_backend_is_imported_by_what_stands_above_it() -> None:
    """The registry knows the backends by name only, and no backend knows the registry: no circle."""
    folder = ROOMS["runtime"] / "backends"
    for path in sorted(folder.glob("*.py")):
        for name in imports(path, "runtime"):
            assert name != "arinar.runtime.backends" or path.name == "__init__.py", f"{path} imports the registry"
    files = {f"arinar.runtime.backends.{path.stem}" for path in folder.glob("*.py")} - {"arinar.runtime.backends.__init__"}
    known = {name for path in modules("runtime") if path.parent != folder for name in imports(path, "runtime")} & files
    assert known <= {"arinar.runtime.backends.base"}, known


def test_torch_free_modules_import_nothing_heavy() -> None:
    for room in LIGHT_ROOMS:
        for path in modules(room):
            # The command imports the other rooms inside its subcommands, which say what to install.
            heavy = {name.split(".")[0] for name in imports(path, room)} & set(HEAVY)
            assert not heavy or room == "cli", f"{path} imports {heavy}"


def test_nobody_imports_the_rooms_by_their_folder_names() -> None:
    for room in ROOMS:
        for path in modules(room):
            bare = {name.split(".")[0] for name in imports(path, room)} & set(NAMES)
            assert not bare, f"{path} imports {bare}: a second copy of every class"


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert result.returncode == 0, result.stderr


def test_what_is_torch_free_imports_without_torch_or_the_model() -> None:
    light = [module_name(path, room) for room in LIGHT_ROOMS for path in modules(room) if has_packages(path)]
    model = {module_name(path, "arinar") for path in modules("arinar")} - PLAIN - {"arinar"}
    for names, packages in ((light, HEAVY), (sorted(TORCH_FREE), ("torch", "safetensors", "sklearn", "polygraphy"))):
        run(
            "import sys, importlib\n"
            f"for name in {[*packages, *sorted(model)]!r}: sys.modules[name] = None\n"
            f"for name in {names!r}: importlib.import_module(name)\n"
            "heavy = [n for n in ('torch', 'onnxruntime') if sys.modules.get(n)]\n"
            "assert not heavy, heavy\n"
        )


def test_importing_the_package_loads_only_the_standard_library() -> None:
    run(
        "import sys; before = set(sys.modules); import arinar\n"
        "new = {n.split('.')[0] for n in set(sys.modules) - before} - set(sys.stdlib_module_names) - {'arinar'}\n"
        "assert not new, new"
    )
