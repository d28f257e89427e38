"""Tokens that are given and stay as they are: what editing keeps of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arinar.config import ArinarConfig
from arinar.values import array


@dataclass(frozen=True)
class Known:
    """What is given of B images; the rest is generated.

    tokens : (B, L, D) float32, raster order. Tokens that are not known are not read.
    mask : (B, L) bool, True = known. Any number of tokens may be known, none and all as well. Of a causal model, which
        goes on from what it has, they must be the first of its generation order.

    Source: MAR's authors' recipe for inpainting: known tokens stay, the order of generation starts after them.
    """

    tokens: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]

    @classmethod
    def joined(cls, parts: Sequence[Known]) -> Known:
        """What is given of several lots of images as that of all of them."""
        return cls(np.concatenate([part.tokens for part in parts]), np.concatenate([part.mask for part in parts]))

    def __repr__(self) -> str:
        return f"Known({int(self.mask.sum())} tokens of {len(self)} images)"

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows: slice | npt.NDArray[np.integer]) -> Known:
        return Known(self.tokens[rows], self.mask[rows])

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """(B,): how many tokens of each image are known."""
        return np.asarray(self.mask.sum(1), np.int64)

    def last(self, order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """An order (B, L), as `Noise` has it, with the known positions moved to its end, where generation starts from;
        both kinds keep the order that they have among themselves."""
        return np.take_along_axis(order, np.argsort(np.take_along_axis(self.mask, order, 1), axis=1, kind="stable"), 1)

    def check(self, batch: int, config: ArinarConfig) -> None:
        """Raise ValueError unless these are tokens of ``batch`` images of a model."""
        shape = (batch, config.seq_len)
        array("known.tokens", self.tokens, np.float32, (*shape, config.token_dim))
        array("known.mask", self.mask, np.bool_, shape)
        finite = np.isfinite(self.tokens).all(-1) | ~self.mask
        if not finite.all():
            image, position = np.argwhere(~finite)[0]
            raise ValueError(f"known.tokens of image {image} has values that are not finite, at position {position}")
        if config.outer == "causal":
            self._check_prefix(np.array(config.generation_order))

    def _check_prefix(self, order: npt.NDArray[np.int64]) -> None:
        known = self.mask[:, order]  # (B, L), as generated
        late = ~known[:, :-1] & known[:, 1:]
        if late.any():
            image, place = np.argwhere(late)[0]
            raise ValueError(
                f"known.mask of image {image}: position {order[place + 1]} is known, {order[place]} before it in the "
                f"generation order is not. A causal model goes on from the tokens that it is given: they must be the first "
                f"of its order (in raster order the upper rows); a masked model takes any"
            )
