"""z of a masked model's first step, where nothing is visible: it depends on the label and the position alone, and is computed
once per label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arinar.config import ArinarConfig

from .backends.base import Array, Backend, Rows
from .bundle import GraphInfo
from .labels import MOST_CLASSES
from .request import Batch

#: Inputs for further classes of an image.
MIXED = ("mixed_labels", "mixed_weights")
#: What an image is of: the class, further ones, their weights.
Key = tuple[int, tuple[int, ...], tuple[float, ...]]
# Labels of which it is kept: (L, C) float32 each, 0.8 MB at the published size. All of ImageNet's beside a GPU, where each
# would be a pass for one image alone.
KEPT_LABELS, KEPT_BESIDE_A_GPU = 32, 1024


class FirstStep:
    """Computed by the outer step itself on a CPU; by a graph of its own on a GPU, whose libraries see no tensors without
    elements then. (A bundle without that graph has every first step computed: ``available`` is False.)

    images : axes of images of the outer step. mixes : whether the graphs take several classes for an image.
    """

    GRAPH = "outer_first"

    def __init__(
        self, backend: Backend, graphs: Mapping[str, GraphInfo], config: ArinarConfig, images: Mapping[str, int], mixes: bool
    ) -> None:
        self.backend, self.config, self.images, self.mixes = backend, config, images, mixes
        self.has_graph = self.GRAPH in graphs and not backend.synchronous
        self.available = self.has_graph or backend.synchronous
        self.most = KEPT_BESIDE_A_GPU if self.has_graph else KEPT_LABELS
        self.kept: dict[Key, Array] = {}  # z (L, C), the most recently used last

    def prepare(self) -> None:
        if self.has_graph:
            self.backend.prepare(self.GRAPH)

    def z(self, batch: Batch, branches: int, targets: Array) -> Array:
        """(G, P, B, C) at positions ``targets`` (P, B) of the images of a micro-batch."""
        keys = keys_of(batch, branches)
        known = self.of(list(dict.fromkeys(key for row in keys for key in row)))
        return np.stack([np.stack([known[key][targets[:, image]] for image, key in enumerate(row)], 1) for row in keys])

    def of(self, keys: list[Key]) -> dict[Key, Array]:
        """z (L, C) by class, or classes; each is computed as if it were alone."""
        missing = [key for key in keys if key not in self.kept]
        known = {key: self.kept.pop(key) for key in keys if key not in missing}
        if missing:
            known |= self.by_graph(missing) if self.has_graph else self.by_step(missing)
        self.kept |= known  # at the end: most recently used
        for key in list(self.kept)[: max(0, len(self.kept) - self.most)]:
            del self.kept[key]
        return known

    def by_graph(self, keys: list[Key]) -> dict[Key, Array]:
        """One launch each, always of the same shape."""
        z, made = self.backend.empty((self.config.seq_len, self.config.z_width), "float32"), {}
        for key in keys:
            self.backend.launch(self.GRAPH, self._classes([key], ()), {"z": z})
            made[key] = self.backend.download(z).copy()
        return made

    def by_step(self, keys: list[Key]) -> dict[Key, Array]:
        """As rows of a step in which nothing is visible."""
        length, count, upload = self.config.seq_len, len(keys), self.backend.upload
        nothing = upload(np.empty((0, count), np.int64))
        z = self.backend.empty((1, length, count, self.config.z_width), "float32")
        inputs = {
            "visible_tokens": upload(np.empty((0, count, self.config.token_dim), np.float32)),
            "visible_positions": nothing,
            "target_positions": upload(np.repeat(np.arange(length)[:, None], count, 1)),
            "hidden_positions": nothing,
            **self._classes(keys, (1,)),
        }
        self.backend.launch("outer_step", inputs, {"z": z}, Rows(self.images, apart=True))
        made = self.backend.download(z)[0]
        return {key: np.ascontiguousarray(made[:, place]) for place, key in enumerate(keys)}

    def _classes(self, keys: list[Key], branches: tuple[int, ...]) -> dict[str, Any]:
        """Labels (..., keys), and further ones (places, ..., keys) where the graphs take them, with the given axes between."""
        shape, upload = (*branches, len(keys)), self.backend.upload
        inputs = {"labels": upload(np.array([key[0] for key in keys], np.int64).reshape(shape))}
        if self.mixes:
            places = MOST_CLASSES - 1, *shape
            inputs["mixed_labels"] = upload(np.array([key[1] for key in keys], np.int64).T.reshape(places))
            inputs["mixed_weights"] = upload(np.array([key[2] for key in keys], np.float32).T.reshape(places))
        return inputs


def keys_of(batch: Batch, branches: int) -> list[list[Key]]:
    """What the images of each branch are of, [branch][image]."""
    labels, others, weights = batch.classes.branches(branches)
    others = np.where(weights != 0, others, 0)  # what has no weight tells no classes apart
    pairs = np.moveaxis(others, 0, -1).tolist(), np.moveaxis(weights, 0, -1).tolist()
    return [
        [(label, tuple(several), tuple(shares)) for label, several, shares in zip(*rows, strict=True)]
        for rows in zip(labels.tolist(), *pairs, strict=True)
    ]
