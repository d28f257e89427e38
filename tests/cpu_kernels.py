"""The kernels' sources, run by the CPU: compiled as C++ with the macros of `on_cpu.hpp`, called as CUDA would call them."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arinar.runtime.kernels.source import Source

HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
#: Orders in which a block's threads run between two barriers: forwards, backwards, and two drawn ones.
SCHEDULES = (0, 1, 2, 3)
# Arithmetic as written, with nothing contracted; modules in one process share nothing (unique symbols would be).
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-fno-gnu-unique", "-U_FORTIFY_SOURCE")
# What reads beyond an array of known size ends the process.
CHECKS = ("-fsanitize=bounds,integer-divide-by-zero,shift", "-fsanitize-undefined-trap-on-error")

requires_compiler = pytest.mark.skipif(
    COMPILER is None and os.environ.get("ARINAR_KERNELS") != "1",
    reason="no C++ compiler (g++, or what CXX names): kernels are run by the CPU only where there is one",
)


class CpuKernels:
    """A module of kernels for the CPU: its text, and the headers that it includes."""

    def __init__(self, text: str, headers: Mapping[str, str]) -> None:
        assert COMPILER is not None, "no C++ compiler; install g++"
        with tempfile.TemporaryDirectory(prefix="arinar-kernels-") as name:
            folder = Path(name)
            for header, content in headers.items():
                (folder / header).write_text(content, encoding="utf-8")
            names = re.findall(r'extern "C" __global__ void (?:__launch_bounds__\(\w+\)\s+)?(\w+)\(', text)
            assert names
            registered = "".join(f"KERNEL({name});\n" for name in names)
            (folder / "module.cpp").write_text(f'#include "{HERE / "on_cpu.hpp"}"\n{text}\n{registered}', encoding="utf-8")
            command = [COMPILER, *FLAGS, *CHECKS, f"-I{folder}", "-o", "module.so", "module.cpp"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            self._library = ctypes.CDLL(str(folder / "module.so"))
        self.names = names

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        values: Sequence[Any],
        types: Sequence[Any],
        *,
        schedule: int = 0,
        together: bool = False,
    ) -> None:
        """Run a kernel to its end. Raises RuntimeError where its threads wait for one another for ever."""
        sizes = (ctypes.c_size_t * 64)()
        count = self._library.on_cpu_arguments(name.encode(), sizes)
        assert count == len(values), f"{name} takes {count} arguments, {len(values)} were given"
        kept = [kind(value) for kind, value in zip(types, values, strict=True)]
        assert [ctypes.sizeof(value) for value in kept] == list(sizes[:count]), f"{name}: an argument has another size"
        pointers = (ctypes.c_void_p * count)(*(ctypes.addressof(value) for value in kept))
        error = ctypes.create_string_buffer(1000)
        shape = [(ctypes.c_uint * 3)(*size) for size in (grid, block)]
        failed = self._library.on_cpu_launch(
            name.encode(), *shape, pointers, ctypes.c_uint64(schedule), int(together), error, ctypes.c_size_t(len(error))
        )
        if failed:
            raise RuntimeError(error.value.decode())

    def run(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        *,
        schedule: int = 0,
        together: bool = False,
    ) -> None:
        """On NumPy arrays (changed in place), None for a null pointer, integers and floats."""
        values, types = zip(*map(_argument, arguments), strict=True)
        self.launch(name, grid, block, values, types, schedule=schedule, together=together)


def _argument(value: Any) -> tuple[Any, Any]:
    if value is None:
        return None, ctypes.c_void_p
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return value.ctypes.data, ctypes.c_void_p
    return value, ctypes.c_float if isinstance(value, float) else ctypes.c_int


def on_cpu(source: Source) -> CpuKernels:
    return compiled(source.text, tuple(source.headers.items()))


@functools.cache
def compiled(text: str, headers: tuple[tuple[str, str], ...]) -> CpuKernels:
    """Once in a process."""
    return CpuKernels(text, dict(headers))
