"""Every random number of a generation, as arrays: made from a seed, or passed by the caller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arinar.config import ArinarConfig
from arinar.mixture_law import NUM_UNIFORMS

MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Noise:
    """The randomness of B images.

    order : (B, L) int64, a permutation of the grid positions per image. Generation runs from its end to its start:
        with m positions unknown and n after the step, the step generates ``order[n:m]``. For a causal model every row
        is the model's generation order reversed.
    uniforms : (B, L, D, NUM_UNIFORMS) float32 in [0, 1), by position in the grid and feature.
    """

    order: npt.NDArray[np.int64]
    uniforms: npt.NDArray[np.float32]

    @classmethod
    def from_seed(cls, seed: int, indices: Sequence[int], config: ArinarConfig) -> Noise:
        """The noise of images ``indices`` of the generation with this seed.

        Counter-based (Philox), keyed by (seed, image index): an image's noise does not depend on the others'.
        ``seed`` and the indices lie in 0..2**64-1.
        """
        for name, value in (("seed", seed), *(("image index", index) for index in indices)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value <= MAX_SEED:
                raise ValueError(f"{name} is {value!r}; expected an integer from 0 to 2**64 - 1")
        orders, uniforms = [], []
        for index in indices:
            generator = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
            # The permutation is drawn for causal models too, so that both kinds draw alike.
            orders.append(generator.permutation(config.seq_len))
            uniforms.append(generator.random((config.seq_len, config.token_dim, NUM_UNIFORMS), dtype=np.float32))
        shape = (len(indices), config.seq_len)
        order = np.array(orders, np.int64).reshape(shape)
        if config.outer == "causal":
            order = np.broadcast_to(np.array(config.generation_order[::-1], np.int64), shape).copy()
        return cls(order, np.array(uniforms, np.float32).reshape(*shape, config.token_dim, NUM_UNIFORMS))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, rows: slice) -> Noise:
        return Noise(self.order[rows], self.uniforms[rows])

    def padded(self, size: int) -> Noise:
        """The last image's noise repeated until there are ``size`` images."""
        missing = size - len(self)
        if missing <= 0:
            return self
        return Noise(
            np.concatenate([self.order, np.repeat(self.order[-1:], missing, 0)]),
            np.concatenate([self.uniforms, np.repeat(self.uniforms[-1:], missing, 0)]),
        )

    def check(self, batch: int, config: ArinarConfig) -> None:
        """Raise ValueError unless this is noise for ``batch`` images of a model."""
        order, uniforms = np.asarray(self.order), np.asarray(self.uniforms)
        shape = (batch, config.seq_len)
        if order.shape != shape or order.dtype.kind not in "iu":
            raise ValueError(f"noise.order is {order.dtype} {order.shape}; expected int64 {shape}")
        if not (np.sort(order, 1) == np.arange(config.seq_len)).all():
            bad = int(np.nonzero((np.sort(order, 1) != np.arange(config.seq_len)).any(1))[0][0])
            raise ValueError(f"noise.order of image {bad} is not a permutation of 0..{config.seq_len - 1}")
        if config.outer == "causal" and not (order == np.array(config.generation_order[::-1])).all():
            raise ValueError(
                "noise.order differs from the causal model's generation order (reversed); "
                "a causal model has one fixed order: use Noise.from_seed, or its order"
            )
        want = (*shape, config.token_dim, NUM_UNIFORMS)
        if uniforms.shape != want or uniforms.dtype != np.float32:
            raise ValueError(f"noise.uniforms is {uniforms.dtype} {uniforms.shape}; expected float32 {want}")
        if not ((uniforms >= 0) & (uniforms < 1)).all():
            raise ValueError("noise.uniforms has values outside [0, 1)")
