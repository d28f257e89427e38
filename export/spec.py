"""What a graph to export is: its step module, its interface, the sizes that it is tested at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from arinar.runtime.bundle import GraphKind, TensorInfo

Array = npt.NDArray[np.generic]


class ExportError(RuntimeError):
    """A graph that could not be written, or that does not compute what its module computes."""


@dataclass(frozen=True)
class GraphSpec(GraphKind):
    """One graph to export: the module, and what is fed to it.

    ``inputs`` and ``outputs`` give names, dtypes and symbolic shapes, in the order of ``module.forward``; a string in
    a shape is a dynamic axis. Integer inputs are drawn from ``ranges[name]`` when the graph is tested.
    """

    name: str
    module: torch.nn.Module
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    ranges: Mapping[str, tuple[int, int]]
    sizes: tuple[Mapping[str, int], ...]  # axis sizes to validate at, batch 1 and awkward ones included
    # What it is: see `arinar.runtime.bundle.GraphInfo`.
    phase: str
    draws: str = "none"
    small: bool = False
    atol: float = 1e-4
    # Share of the values that must lie within atol: below 1 for chains of draws in low precision, where a rounding
    # error early on may rightly end in another feature.
    share: float = 1.0

    @property
    def axes(self) -> list[str]:
        found = dict.fromkeys(d for tensor in self.inputs for d in tensor.shape if isinstance(d, str))
        return list(found)

    def example(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
        """Random inputs for given axis sizes. Float inputs called ``uniforms`` lie in [0, 1), scalars above 1."""
        rng = np.random.default_rng(seed)
        feed: dict[str, Array] = {}
        for tensor in self.inputs:
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in tensor.shape)
            dtype = np.dtype(tensor.dtype)
            if dtype.kind in "iu":
                low, high = self.ranges[tensor.name]
                feed[tensor.name] = rng.integers(low, high, shape).astype(dtype)
            elif tensor.name == "uniforms":
                feed[tensor.name] = rng.random(shape).astype(dtype)
            elif tensor.name in ("guidance_scale", "temperature"):
                feed[tensor.name] = (1 + rng.random(shape)).astype(dtype)
            elif tensor.name.startswith("weight"):
                raw = rng.random(shape) + 0.05
                feed[tensor.name] = (raw / raw.sum(-1, keepdims=True)).astype(dtype)
            else:
                feed[tensor.name] = rng.standard_normal(shape).astype(dtype)
        return feed


def tensor(name: str, shape: tuple[int | str, ...], dtype: str = "float32") -> TensorInfo:
    return TensorInfo(name, dtype, shape)


def cache_tensors(
    kind: str, depth: int, rows: str, heads: int, slots: int | str, head_dim: int, dtype: str
) -> tuple[TensorInfo, ...]:
    """`past_key_values.N.key` or `present.N.key` and the values, per layer, each (rows, H, slots, head_dim)."""
    return tuple(
        tensor(f"{kind}.{layer}.{part}", (rows, heads, slots, head_dim), dtype)
        for layer in range(depth)
        for part in ("key", "value")
    )
