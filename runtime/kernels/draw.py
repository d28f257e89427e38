"""Launching the draw from Gaussian mixtures, plain or guided: one kernel for what the graph does in 187."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arinar.mixture_law import NUM_UNIFORMS

from .compiler import KernelError, cubin
from .source import DRAW_THREADS, MOST_GAUSSIANS, draw_source


def draw_kernel(device: Any, num_gaussians: int, num_candidates: int, folder: Path) -> DrawKernel:
    """The kernel for a law, of code that is kept in a folder. ``device``: what launches, a `Cuda`.

    Raises KernelError where it cannot be had: no compiler, an unknown GPU, mixtures too large for it."""
    if num_gaussians > MOST_GAUSSIANS:
        raise KernelError(f"the kernel takes at most {MOST_GAUSSIANS} Gaussians, this model's mixtures have {num_gaussians}")
    code = cubin(draw_source(num_gaussians, num_candidates), device.info.compute_capability, folder)
    return DrawKernel(device, code)


class DrawKernel:
    """Draws a feature of every row. ``code``: the cubin of `draw_source`."""

    def __init__(self, device: Any, code: bytes) -> None:
        self._device = device
        self._function = device.load_module(code, ["mixture_draw"])["mixture_draw"]

    def __call__(
        self,
        mixture: Mapping[str, Any],
        uniforms: Any,
        guidance_scale: Any | None,
        temperature: Any,
        feature: Any,
        tokens: Any,
        position: int,
    ) -> None:
        """A draw of each of M rows, into ``feature`` and into ``tokens`` (M, D) at a position.

        mixture : weight, mu, logvar, each (N, K). N = 2 M with guidance, the conditional rows first; both halves of
        ``feature`` (N, 1) get the draw. uniforms (M, NUM_UNIFORMS), guidance_scale (M,) or None, temperature (M,); all float32.
        """
        *_, features = tokens.shape
        rows = tokens.size // features
        branches = 1 if guidance_scale is None else 2
        assert NUM_UNIFORMS == 1 and uniforms.size == rows and temperature.size == rows
        assert all(value.shape[0] == branches * rows for value in (*mixture.values(), feature)) and 0 <= position < features
        inputs = [mixture["weight"], mixture["mu"], mixture["logvar"], uniforms, guidance_scale, temperature]
        self._device.launch_kernel(
            self._function, (rows, 1, 1), (DRAW_THREADS, 1, 1), [*inputs, feature, tokens, features, position]
        )
