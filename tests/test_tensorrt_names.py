"""What our code calls of TensorRT is there in a real library, and the tests' stand-ins offer nothing that it lacks.

The library is tensorrt_rtx: it imports without a driver, and its Python interface is that of TensorRT 10 and 11 but for
`OTHERS`. `USED` says which names are taken from which class; it cannot go stale, because every attribute that the code
asks for is either in it, or belongs to the module itself, or is defined by our code or Python's.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import io
import os
import re
import subprocess
import types
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
from test_engine import FAKE

import arinar.export.builder
import arinar.runtime
import arinar.runtime.backends.tensorrt

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
pytestmark = [pytest.mark.requires_rtx, pytest.mark.skipif(not HAS_RTX, reason="tensorrt_rtx is not installed")]

SOURCES = [Path(str(module.__file__)) for module in (arinar.export.builder, arinar.runtime.backends.tensorrt)]
#: Where these modules keep the library.
LIBRARY = ("trt", "self._trt", "library")

#: Class -> what our code asks its objects for.
USED = {
    "Builder": {"build_serialized_network", "create_builder_config", "create_network", "create_optimization_profile"},
    "IBuilderConfig": {
        "add_optimization_profile",
        "builder_optimization_level",
        "clear_flag",
        "create_timing_cache",
        "get_timing_cache",
        "num_compute_capabilities",
        "progress_monitor",
        "set_compute_capability",
        "set_flag",
        "set_memory_pool_limit",
        "set_timing_cache",
    },
    "ICudaEngine": {
        "create_execution_context",
        "create_runtime_config",
        "get_aliased_input_tensor",
        "get_tensor_dtype",
        "get_tensor_location",
        "get_tensor_mode",
        "get_tensor_name",
        "get_tensor_profile_shape",
        "get_tensor_shape",
        "num_io_tensors",
        "num_optimization_profiles",
    },
    "IExecutionContext": {
        "execute_async_v3",
        "get_tensor_shape",
        "infer_shapes",
        "is_stream_capturable",
        "set_device_memory",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
        "update_device_memory_size_for_shapes",
    },
    "ILogger": {"log"},
    "INetworkDefinition": {"get_input", "num_inputs"},
    "IOptimizationProfile": {"set_shape"},
    "IProgressMonitor": {"phase_finish", "phase_start", "step_complete"},
    "IRuntimeConfig": {"dynamic_shapes_kernel_specialization_strategy", "set_execution_context_allocation_strategy"},
    "ITensor": {"is_shape_tensor", "name"},
    "ITimingCache": {"serialize"},
    "OnnxParser": {"get_error", "num_errors", "parse_from_file"},
    "ParserError": {"desc"},
    "Runtime": {"deserialize_cuda_engine", "engine_host_code_allowed"},
}
#: Names that TensorRT 10 or 11 have and this library lacks. (None is used.)
OTHERS: set[str] = set()
#: Names that our code gives a meaning of its own, as well as the library.
ALSO_OURS = {"get_input", "get_tensor_shape", "log", "name", "phase_finish", "phase_start", "serialize", "step_complete"}


@pytest.fixture(scope="module")
def trt() -> Any:
    return importlib.import_module("tensorrt_rtx")


def trees() -> Iterator[ast.Module]:
    for path in SOURCES:
        yield ast.parse(path.read_text(encoding="utf-8"))


def asked_for(node: ast.AST) -> tuple[str, str] | None:
    """(of what, name) where the code takes an attribute, or asks with `hasattr` or `getattr` whether it is there."""
    if isinstance(node, ast.Attribute):
        return ast.unparse(node.value), node.attr
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
        name = node.args[1]
        assert isinstance(name, ast.Constant) and isinstance(name.value, str), f"{ast.unparse(node)}: which name?"
        return ast.unparse(node.args[0]), name.value
    return None


def module_names(tree: ast.Module) -> set[str]:
    """What the code asks the module itself for: "Runtime", "BuilderFlag.TF32", ..."""
    roots = dict.fromkeys(LIBRARY, "")
    for node in ast.walk(tree):  # x = trt.A.B
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        if match := re.fullmatch(r"(?:trt|self\._trt)\.([\w.]+)", ast.unparse(node.value)):
            roots[node.targets[0].id] = f"{match[1]}."
    found = set()
    for node in ast.walk(tree):
        for of, name in filter(None, [asked_for(node)]):
            for root, prefix in roots.items():
                if of == root:
                    found.add(f"{prefix}{name}")
                elif of.startswith(f"{root}.") and root in LIBRARY and re.fullmatch(r"[\w.]+", of):
                    found.add(f"{of.removeprefix(f'{root}.')}.{name}")
    return found


def test_what_is_asked_of_the_module(trt: Any) -> None:
    names = set().union(*map(module_names, trees()))
    # That the search finds what it is for, in each of the ways in which it is written.
    assert {"Runtime", "BuilderFlag.TF32", "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "TensorIOMode.OUTPUT"} <= names
    assert {"ILogger.__init__", "ILogger.Severity.ERROR", "MemoryPoolType.WORKSPACE", "IExecutionContext"} <= names
    missing = set()
    for name in names - OTHERS:
        value = trt
        for part in name.split("."):
            if not hasattr(value, part):
                missing.add(name)
                break
            value = getattr(value, part)
    # `library` is a word of our own as well, in export/builder.py: the tests' and the builder's description of one.
    assert missing <= {"module", "targets", "version"}


def test_what_is_asked_of_its_objects(trt: Any) -> None:
    for kind, names in USED.items():
        for name in names - OTHERS:
            assert hasattr(getattr(trt, kind), name), f"{kind}.{name}"


def own_names() -> set[str]:
    """Every name that our code or Python's own types give a meaning to."""
    names: set[str] = set()
    packages = (arinar, arinar.runtime, arinar.runtime.backends, arinar.export)
    for path in {path for package in packages for folder in package.__path__ for path in Path(folder).glob("*.py")}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in [part for item in targets for part in getattr(item, "elts", [item])]:
                    if isinstance(target, ast.Name):
                        names.add(target.id)
                    elif isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                        names.add(target.attr)
    for kind in (
        *vars(builtins).values(),
        Path,
        deque,
        re.Match,
        io.TextIOWrapper,
        os.stat_result,
        subprocess.Popen,
        np.ndarray,
    ):
        names.update(dir(kind))
    for module in (arinar.export.builder, arinar.runtime.backends.tensorrt):
        for value in vars(module).values():  # os, json, subprocess, ..., and the classes that come from them
            if isinstance(value, (types.ModuleType, type)):
                names.update(dir(value))
    return names


def test_the_table_is_whole() -> None:
    """No name is asked for that the table lacks, none is in it that nobody asks for."""
    known = {name for names in USED.values() for name in names}
    found: set[str] = set()
    of_module: set[str] = set()
    defined: set[str] = set()
    for tree in trees():
        of_module |= {part for name in module_names(tree) for part in name.split(".")}
        found |= {asked[1] for node in ast.walk(tree) if (asked := asked_for(node))}
        defined |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}  # what we override
    assert known - found - defined == set(), "nobody asks for these any more"
    unknown = {name for name in found - known - of_module - own_names() if not re.match("cu[A-Z]|nvml[A-Z]", name)}
    assert unknown == set(), "whose are these? If the library's, they belong in USED"
    # A name of both sorts is one that the line above cannot see, so it must be known to be so.
    assert known & own_names() <= ALSO_OURS | known & defined


def signatures(function: Any) -> list[tuple[list[str], int]]:
    """(parameters, how many of them must be given) of each overload, from pybind11's documentation."""
    found = []
    for line in (function.__doc__ or "").splitlines():
        if match := re.match(r"(?:\d+\. )?(\w+)\((self: .*)\) -> ", line):
            parts = re.split(r", (?=\w+: )", match[2])[1:]
            found.append(([part.split(":")[0] for part in parts], sum(" = " not in part for part in parts)))
    return found


def test_calls_have_arguments_that_the_library_takes(trt: Any) -> None:
    checked = set()
    kinds = {name: kind for kind, names in USED.items() for name in names}
    for tree in trees():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in kinds):
                continue
            name = node.func.attr
            possible = signatures(getattr(getattr(trt, kinds[name]), name))
            if not possible or (name in ALSO_OURS and name != "get_tensor_shape"):
                continue
            keywords = [str(keyword.arg) for keyword in node.keywords]
            assert any(
                least <= len(node.args) + len(keywords) <= len(parameters)
                and set(keywords) <= set(parameters[len(node.args) :])
                for parameters, least in possible
            ), f"{ast.unparse(node)}: the library takes {possible}"
            checked.add(name)
    assert len(checked) > 25, sorted(checked)


def offered(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_fakes_of_the_runtime_are_not_kinder(trt: Any) -> None:
    fake = fake_gpu.fake_tensorrt(fake_gpu.FakeCudaRuntime())
    assert {name for name in vars(fake) if not name.startswith("__")} - {"engines"} - set(dir(trt)) == set()
    pairs = {fake_gpu.FakeContext: trt.IExecutionContext, fake_gpu.FakeEngine: trt.ICudaEngine}
    for name in ("ILogger", "Runtime", "IExecutionContext"):
        pairs[getattr(fake, name)] = getattr(trt, name)
    for stand_in, real in pairs.items():
        assert offered(stand_in) - set(dir(real)) == set(), stand_in
    assert len(offered(fake_gpu.FakeContext)) >= 8 and len(offered(fake_gpu.FakeEngine)) >= 10
    for name, value in vars(fake).items():  # stand-ins of enumerations
        if isinstance(value, types.SimpleNamespace):
            assert set(vars(value)) <= set(getattr(trt, name).__members__), name
    assert set(vars(fake.ILogger.Severity)) <= set(trt.ILogger.Severity.__members__)
    config = fake_gpu.FakeEngine.create_runtime_config(None)  # type: ignore[arg-type]
    assert set(vars(config)) - {"strategy"} - set(dir(trt.IRuntimeConfig)) == set()


def test_fakes_of_the_builder_are_not_kinder(trt: Any) -> None:
    fake: dict[str, Any] = {}
    exec(FAKE, fake)
    aliases = {
        "Network": "INetworkDefinition",
        "Tensor": "ITensor",
        "Profile": "IOptimizationProfile",
        "TimingCache": "ITimingCache",
        "Problem": "ParserError",
    }
    own = {"Network": {"text"}}  # what becomes of the graph
    classes = {name: value for name, value in fake.items() if isinstance(value, type)}
    assert len(classes) >= 12
    for name, kind in classes.items():
        real = getattr(trt, aliases.get(name, name))
        # Which GPUs a library knows is its own affair.
        lacking = {n for n in offered(kind) - set(dir(real)) - own.get(name, set()) if not re.fullmatch(r"SM\d+", n)}
        assert lacking == set(), f"{name}: {lacking}"
