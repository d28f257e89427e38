"""Launching the sum of two buffers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .compiler import cubin
from .source import ADD_THREADS, add_source


class AddKernel:
    """Of code that is kept in a folder. ``device``: what launches, a `Cuda`. Raises KernelError where it cannot be had."""

    def __init__(self, device: Any, folder: Path) -> None:
        self._device = device
        code = cubin(add_source(), device.info.compute_capability, folder)
        self._function = device.load_module(code, ["add"])["add"]

    def __call__(self, left: Any, right: Any, target: Any, factor: float) -> None:
        """left + factor * right into ``target``: float32, all of one size."""
        assert left.size == right.size == target.size
        blocks = -(-target.size // ADD_THREADS)
        self._device.launch_kernel(
            self._function, (blocks, 1, 1), (ADD_THREADS, 1, 1), [left, right, target, target.size, float(factor)]
        )
