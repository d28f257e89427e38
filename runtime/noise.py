"""Every random number of a generation, as arrays: made from a seed, or passed by the caller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arinar.config import ArinarConfig
from arinar.law import law_of
from arinar.text import shown
from arinar.values import is_whole

MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Noise:
    """The randomness of B images.

    order : (B, L) int64, a permutation of the grid positions per image. Generation runs from its end to its start:
        with m positions unknown and n after the step, the step generates ``order[n:m]``. For a causal model every row
        is the model's generation order reversed.
    draws : (B, L, D, U) float32, by position in the grid and feature: what the model's head draws with. Of a Gaussian
        mixture head U = `arinar.mixture_law.NUM_UNIFORMS` uniforms in [0, 1).
    """

    order: npt.NDArray[np.int64]
    draws: npt.NDArray[np.float32]

    @property
    def uniforms(self) -> npt.NDArray[np.float32]:
        """The draws, by the name that fits a Gaussian mixture head."""
        return self.draws

    @classmethod
    def from_seed(cls, seed: int, indices: Sequence[int], config: ArinarConfig) -> Noise:
        """The noise of images ``indices`` of the generation with this seed.

        Counter-based (Philox), keyed by (seed, image index): an image's noise does not depend on the others'.
        ``seed`` and the indices lie in 0..2**64-1.
        """
        check_seed(seed, indices)
        law = law_of(config)
        shape = (len(indices), config.seq_len)
        order = np.empty(shape, np.int64)
        draws = np.empty((*shape, config.token_dim, law.size(config)), np.float32)
        for row, index in enumerate(indices):
            generator = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
            # The permutation is drawn for causal models too, so that both kinds draw alike.
            order[row] = generator.permutation(config.seq_len)
            draws[row] = law.make(generator, draws.shape[1:])
        if config.outer == "causal":
            order[:] = np.array(config.generation_order[::-1], np.int64)
        return cls(order, draws)

    @classmethod
    def joined(cls, parts: Sequence[Noise]) -> Noise:
        """The noise of several lots of images as that of all of them."""
        return cls(np.concatenate([part.order for part in parts]), np.concatenate([part.draws for part in parts]))

    def __len__(self) -> int:
        return len(self.order)

    def __repr__(self) -> str:
        return f"Noise(of {len(self)} images, draws {self.draws.shape})"

    def __getitem__(self, rows: slice | npt.NDArray[np.integer]) -> Noise:
        return Noise(self.order[rows], self.draws[rows])

    def check(self, batch: int, config: ArinarConfig) -> None:
        """Raise ValueError unless this is noise for ``batch`` images of a model."""
        order, draws = np.asarray(self.order), np.asarray(self.draws)
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
        law = law_of(config)
        want = (*shape, config.token_dim, law.size(config))
        if draws.shape != want or draws.dtype != np.float32:
            raise ValueError(f"noise.{law.noise} is {draws.dtype} {draws.shape}; expected float32 {want}")
        law.check(draws)


def check_seed(seed: int, indices: Sequence[int] = ()) -> None:
    """Raise ValueError for a seed, or an image index, that is no integer from 0 to 2**64 - 1."""
    for name, value in (("seed", seed), *(("image index", index) for index in indices)):
        if not is_whole(value) or not 0 <= value <= MAX_SEED:
            raise ValueError(f"{name} is {shown(value)}; expected an integer from 0 to 2**64 - 1")
