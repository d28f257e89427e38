"""Launching the inner model: all features of a token in 5 launches a block and one, each.

Letters as in `arinar.runtime.gmm_head`: N rows, conditional ones first, M of them drawn, D features, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arinar.config import ArinarConfig

from .compiler import cubin
from .source import COLUMNS, DRAW_THREADS, LANES, MOST_GAUSSIANS, ROWS, SPLITS, block_columns, inner_source
from .weights import InnerWeights, Linear, read_inner_weights

#: Features whose keys a warp's lanes hold, two each. Widths of which 8 rows fit a block's static shared memory.
MOST_FEATURES, MOST_WIDTH = LANES // 2, 1472
#: A block's products, by the kernel that makes each.
PRODUCTS = tuple(SPLITS)


def fits(config: ArinarConfig) -> bool:
    """Whether the kernels are made for a model's shape."""
    hidden = int(config.inner_width * config.inner_mlp_ratio)
    return (
        config.inner_width % COLUMNS == 0
        and hidden % COLUMNS == 0
        and config.inner_width <= MOST_WIDTH
        and config.inner_head_dim % 8 == 0
        and config.token_dim <= MOST_FEATURES
        and config.num_gaussians <= MOST_GAUSSIANS
        and config.inner_depth >= 1
    )


def token_kernels(
    device: Any, graph: Path, config: ArinarConfig, num_candidates: int, most_rows: int, folder: Path
) -> TokenKernels:
    """With the weights that lie in a graph `inner_step`, of code that is kept in a folder. ``device``: a `Cuda`.

    Raises KernelError where they cannot be had."""
    weights = read_inner_weights(graph, config)
    code = cubin(inner_source(config, num_candidates, weights.dtype), device.info.compute_capability, folder)
    return TokenKernels(device, code, weights, config, most_rows)


class TokenKernels:
    """Makes tokens of at most ``most_rows`` rows at a time. ``code``: the cubin of `inner_source`."""

    def __init__(self, device: Any, code: bytes, weights: InnerWeights, config: ArinarConfig, most_rows: int) -> None:
        self._device, self._config, self.most_rows = device, config, most_rows
        self._kernels = device.load_module(code, [f"inner_{name}" for name in (*PRODUCTS, "attend", "draw")])
        width, dtype = config.inner_width, weights.dtype
        self._entry, self._places = self._linear(weights.entry, dtype), self._upload(weights.places, dtype)
        self._blocks = [{name: self._linear(getattr(block, name), dtype) for name in PRODUCTS} for block in weights.blocks]
        self._head = self._linear(weights.head, "float32")
        device.synchronize()
        # What passes from kernel to kernel. Keys and values of all blocks: (depth, N, D, 2, W).
        self._stream, self._query = (device.empty((most_rows, width), "float32") for _ in range(2))
        self._attended = device.empty((most_rows, width), dtype)
        self._hidden = device.empty((most_rows, int(width * config.inner_mlp_ratio)), dtype)
        self._cache = device.empty((config.inner_depth, most_rows, config.token_dim, 2, width), dtype)

    def __call__(
        self,
        start: Any,
        modulation: Any,
        uniforms: Sequence[Any],
        guidance_scale: Any | None,
        temperature: Any,
        feature: Any,
        tokens: Any,
    ) -> None:
        """start (N, W), modulation (N, 6 depth + 2, W) as the conditioning gives them, uniforms: (M, 1) for each feature,
        guidance_scale (M,) or None, temperature (M,) -> tokens (M, D); feature (N, 1) is overwritten."""
        rows = start.shape[0]
        drawn = tokens.size // self._config.token_dim
        assert start.dtype == modulation.dtype == self._cache.dtype
        assert rows <= self.most_rows and rows == drawn * (1 if guidance_scale is None else 2)
        for position in range(self._config.token_dim):
            for index in range(self._config.inner_depth):
                self._block(index, position, rows, start, feature, modulation)
            given = [self._stream, modulation, *self._head, uniforms[position], guidance_scale, temperature]
            self._launch("draw", (drawn, 1, 1), *given, feature, tokens, position)

    def _block(self, index: int, position: int, rows: int, start: Any, feature: Any, modulation: Any) -> None:
        weights, cache = self._blocks[index], self._cache[index : index + 1]
        stream = self._stream
        embedding = [start, feature, *self._entry, self._places, modulation]
        self._product("qkv", rows, *embedding, *weights["qkv"], stream, self._query, cache, rows, index, position)
        self._launch("attend", (rows, 1, 1), self._query, cache, self._attended, position)
        self._product("project", rows, self._attended, *weights["project"], modulation, stream, rows, index)
        self._product("expand", rows, stream, modulation, *weights["expand"], self._hidden, rows, index)
        self._product("contract", rows, self._hidden, *weights["contract"], modulation, stream, rows, index)

    def _product(self, name: str, rows: int, *arguments: Any) -> None:
        columns = self._blocks[0][name][0].shape[0]
        self._launch(name, (-(-columns // block_columns(name)), -(-rows // ROWS), 1), *arguments)

    def _launch(self, name: str, grid: tuple[int, int, int], *arguments: Any) -> None:
        self._device.launch_kernel(self._kernels[f"inner_{name}"], grid, (DRAW_THREADS, 1, 1), arguments)

    def _linear(self, linear: Linear, dtype: str) -> tuple[Any, Any]:
        return self._upload(linear.weight, dtype), self._upload(linear.bias, dtype)

    def _upload(self, values: Any, dtype: str) -> Any:
        buffer = self._device.empty(values.shape, dtype)
        self._device.upload(np.ascontiguousarray(values), buffer)
        return buffer
