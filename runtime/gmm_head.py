"""The Gaussian mixture head: the features of a token one after another, each drawn from a mixture that depends on z and
on the features before it.

Letters as in `arinar.export.steps`, and N = G * P * B rows, conditional ones first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from arinar.config import ArinarConfig
from arinar.law import law_of
from arinar.schedule import Step

from .backends.base import Array, Backend, Draw, Rows
from .bundle import BundleError, GraphInfo
from .cache import KVCache
from .request import Batch
from .state import State


@dataclass
class ChainBuffers:
    """Of the features' chain, for a largest number of rows; fewer use the first of them."""

    start: Any
    modulation: Any
    mixture: dict[str, Any]
    feature: Any
    positions: Any
    caches: dict[int, KVCache] = field(default_factory=dict)  # by rows: a cache's layout depends on them


@dataclass
class GmmBuffers:
    """``uniforms``: fused (L, B, D, U), stepwise (D, L, B, U), so that what a launch reads is contiguous."""

    uniforms: Any
    chain: ChainBuffers | None


class GmmHead:
    """``mode``: "fused" runs one graph for all features of a token, "stepwise" one graph per feature with an explicit KV
    cache; both give the same tokens. None: stepwise where the backend draws without a graph, as a draw is then one launch
    where the graph's is 187; else fused, which leaves more to the library at a time."""

    MODES = ("fused", "stepwise")
    GRAPHS = (
        "inner_condition",
        "inner_step",
        "inner_token",
        "inner_token_guided",
        "mixture_sample",
        "mixture_sample_guided",
    )

    def __init__(self, backend: Backend, graphs: Mapping[str, GraphInfo], config: ArinarConfig, mode: str | None) -> None:
        self.backend, self.infos, self.config = backend, graphs, config
        self.native = None if mode == "fused" else backend.native_draw()
        self.token = backend.native_token() if self.native else None
        self.mode = mode or ("stepwise" if self.native else "fused")

    @staticmethod
    def unread(graph: str, inputs: Mapping[str, Array]) -> set[str]:
        # The first feature has none before it.
        return {"feature"} if graph == "inner_step" and inputs["position"][0] == 0 else set()

    def graphs(self, guided: bool) -> list[str]:
        suffix = "_guided" if guided else ""
        if self.mode == "fused":
            return [f"inner_token{suffix}"]
        return ["inner_condition", "inner_step", *([] if self.native else [f"mixture_sample{suffix}"])]

    def prepare(self, guided: bool, batch: int) -> None:
        self.backend.prepare(*self.graphs(guided), rows=batch if self.mode == "fused" else None)

    def shape(self, batch: Batch) -> Hashable:
        return None

    def allocate(self, state: State, batch: Batch) -> GmmBuffers:
        config, size = self.config, law_of(self.config).size(self.config)
        if self.mode == "fused":
            shape: tuple[int, ...] = (config.seq_len, state.batch, config.token_dim, size)
            return GmmBuffers(self.backend.empty(shape, "float32"), None)
        shape = (config.token_dim, config.seq_len, state.batch, size)
        rows = state.branches * state.count * state.batch
        return GmmBuffers(self.backend.empty(shape, "float32"), self._chain_buffers(rows))

    def fill(self, state: State, batch: Batch) -> None:
        for name, values in (("guidance_scale", batch.guidance_scale), ("temperature", batch.temperature)):
            if not self.native and len(set(values.tolist())) > 1 and not self._per_row(self.graphs(batch.guided)[-1], name):
                raise BundleError(
                    f"this bundle's graphs take one {name} for all images of a micro-batch (an older version of arinar "
                    f"wrote them); export the model again, or ask for images of one {name} at a time"
                )
        by_position = np.take_along_axis(batch.noise.draws, batch.noise.order[:, :, None, None], 1)  # (B, L, D, U)
        layout = (1, 0, 2, 3) if self.mode == "fused" else (2, 1, 0, 3)
        self.backend.write(state.head.uniforms, by_position.transpose(layout))

    def draw(self, state: State, step: Step, z: Any) -> None:
        z = z.reshape(state.branches * step.count, state.batch, self.config.z_width)
        if self.mode == "fused":
            self._draw_fused(state, step, z)
        else:
            self._draw_stepwise(state, step, z)

    def law(self, z: Array, tokens: Array, images: int | None = None) -> tuple[Array, ...]:
        """weight, mu, logvar, each (N, D, K)."""
        config, backend = self.config, self.backend
        buffers = self._chain_buffers(len(z))
        shape = (len(z), config.token_dim, config.num_gaussians)
        found = {name: np.empty(shape, np.float32) for name in buffers.mixture}
        features = np.ascontiguousarray(tokens.T, np.float32)[:, :, None]  # (D, N, 1)

        def force(position: int) -> None:
            for name, value in buffers.mixture.items():
                found[name][:, position] = backend.download(value)
            backend.write(buffers.feature, features[position])

        self._chain(buffers, backend.upload(np.ascontiguousarray(z)), force, images)
        return tuple(found.values())

    def _draw_fused(self, state: State, step: Step, z: Any) -> None:
        (name,) = self.graphs(state.guided)
        now = slice(step.remaining, step.masked)
        inputs = {"z": z, "uniforms": state.head.uniforms[now]} | self._settings(name, state, step)
        rows = {key: 1 for key, buffer in inputs.items() if len(buffer.shape) > 1}
        self.backend.launch(name, inputs, {"tokens": state.tokens[now]}, Rows({**rows, "tokens": 1}))

    def _draw_stepwise(self, state: State, step: Step, z: Any) -> None:
        config, own = self.config, state.head
        assert own.chain is not None
        count = step.count * state.batch
        rows, now = state.branches * count, slice(step.remaining, step.masked)
        feature = own.chain.feature[:rows]
        mixture = {key: value[:rows] for key, value in own.chain.mixture.items()}
        uniforms = [
            own.uniforms[position : position + 1].reshape(config.seq_len, state.batch, -1)[now]
            for position in range(config.token_dim)
        ]
        settings = state.guidance[now] if state.guided else None, state.temperature[now]
        z = z.reshape(rows, config.z_width)
        if self.token is not None and rows <= self.token.most_rows:
            start, modulation = own.chain.start[:rows], own.chain.modulation[:rows]
            self.backend.launch("inner_condition", {"z": z}, {"start": start, "modulation": modulation})
            self.token(start, modulation, uniforms, *settings, feature, state.tokens[now])
            return
        draw = self.native or self._graph_draw(state, step)

        def advance(position: int) -> None:
            draw(mixture, uniforms[position], *settings, feature, state.tokens[now], position)

        self._chain(own.chain, z, advance)

    def _graph_draw(self, state: State, step: Step) -> Draw:
        """A draw by the graph, and copies of what it gives."""
        backend, name = self.backend, self.graphs(state.guided)[-1]
        settings, count = self._settings(name, state, step), step.count * state.batch

        def draw(
            mixture: Mapping[str, Any],
            uniforms: Any,
            guidance_scale: Any | None,
            temperature: Any,
            feature: Any,
            tokens: Any,
            position: int,
        ) -> None:
            cond = {key: value[:count] for key, value in mixture.items()}
            uncond = {f"{key}_uncond": value[count:] for key, value in mixture.items()} if state.guided else {}
            backend.launch(name, {**cond, **uncond, "uniforms": uniforms, **settings}, {"feature": feature[:count]})
            if state.guided:
                backend.copy(feature[:count], feature[count:])
            slots = tokens.reshape(count, 1, self.config.token_dim, 1)
            backend.write_slots(feature[:count].reshape(count, 1, 1, 1), slots, position)

        return draw

    def _settings(self, name: str, state: State, step: Step) -> dict[str, Any]:
        """What a drawing graph takes besides mixtures and noise: guidance and temperature, (P, B) each."""
        given = {"guidance_scale": state.guidance, "temperature": state.temperature}
        wanted = {tensor.name for tensor in self.infos[name].inputs}
        now = slice(step.remaining, step.masked)
        return {
            key: value[now] if self._per_row(name, key) else value[now].reshape(step.count * state.batch)[:1]
            for key, value in given.items()
            if key in wanted
        }

    def _per_row(self, name: str, key: str) -> bool:
        """Whether a graph takes a value per row; those of version 0.1 took one for all."""
        return all(tensor.shape != (1,) for tensor in self.infos[name].inputs if tensor.name == key)

    def _chain_buffers(self, rows: int) -> ChainBuffers:
        config, backend = self.config, self.backend
        info = {tensor.name: tensor for tensor in self.infos["inner_step"].inputs}
        modulation = tuple(d for d in info["modulation"].shape if isinstance(d, int))
        return ChainBuffers(
            start=backend.empty((rows, config.inner_width), info["start"].dtype),
            modulation=backend.empty((rows, *modulation), info["modulation"].dtype),
            mixture={name: backend.empty((rows, config.num_gaussians), "float32") for name in law_of(config).parts},
            feature=backend.empty((rows, 1), "float32"),
            positions=backend.upload(np.arange(config.token_dim, dtype=np.int64)),
        )

    def _chain(self, buffers: ChainBuffers, z: Any, advance: Callable[[int], None], images: int | None = None) -> None:
        """Feature after feature of N rows: z (N, C) -> at every position the mixtures of the feature there; ``advance``
        reads them and leaves the feature for all rows. ``images``: rows are (anything, images), each image independent.
        """
        backend, count = self.backend, z.shape[0]

        def split(buffer: Any) -> Any:
            """(N, ...), by image where images are to be computed independently."""
            used = buffer[:count]
            return used if images is None else used.reshape(count // images, images, *used.shape[1:])

        start, modulation, feature = (split(b) for b in (buffers.start, buffers.modulation, buffers.feature))
        mixture = {name: split(value) for name, value in buffers.mixture.items()}
        rows = None if images is None else Rows({"z": 1, "start": 1, "modulation": 1})
        backend.launch("inner_condition", {"z": split(z)}, {"start": start, "modulation": modulation}, rows)
        if count not in buffers.caches:
            buffers.caches[count] = KVCache(backend, self.infos["inner_step"], count, slots=self.config.token_dim)
        cache = buffers.caches[count]
        past, present = ({name: split(value) for name, value in kind.items()} for kind in (cache.past, cache.present))
        given = {"feature": feature, "start": start, "modulation": modulation, **past}
        if images is not None:
            rows = Rows(dict.fromkeys((*given, *mixture, *present), 1))
        for position in range(self.config.token_dim):
            where = buffers.positions[position : position + 1]
            backend.launch("inner_step", {**given, "position": where}, {**mixture, **present}, rows)
            cache.write(position)
            advance(position)
