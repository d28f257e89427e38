"""The generation loop: which graph runs on which part of the state, step after step.

State is kept in generation order, position first, so that everything a step reads or writes is a contiguous slice:
``tokens`` (L, B, D), ``order`` (L, B), ``uniforms`` (L, B, D, U). Letters as in `arinar.export.steps`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from arinar.config import ArinarConfig
from arinar.mixture_law import NUM_UNIFORMS
from arinar.schedule import Step

from .backends.base import Array, Backend
from .bundle import BundleError, GraphInfo
from .cache import KVCache
from .noise import Noise

INNER_MODES = ("fused", "stepwise")
# Shapes of micro-batches whose buffers (and recorded launches) are kept.
KEPT_STATES = 4
# Labels whose z of the first step is kept: (L, C) float32 each, 0.8 MB at the published size.
KEPT_LABELS = 32
# Pixels that the VAE decodes at a time; its activations are the largest tensors of all (at 256 x 256, a third of a
# gigabyte each image). A GPU is faster on some at a time, a CPU is not.
DECODE_PIXELS = 4 * 256 * 256


class Made(NamedTuple):
    """A micro-batch: tokens (B, L, D) in raster order, latents (B, channels, h, w), images (B, H, W, 3) uint8."""

    tokens: Array
    latents: Array
    images: Array


@dataclass
class State:
    """Buffers of micro-batches of one shape (B images, G branches), made once and used for every such micro-batch.

    Their addresses never change, so a backend may record the launches on them and replay them.
    """

    branches: int
    batch: int
    num_iter: int
    # What goes up per micro-batch.
    order: Any  # (L, B) int64
    ranks: Any  # (B, L) int64, where in the order each grid position stands
    uniforms: Any  # (L, B, D, U), in generation order; stepwise (D, L, B, U)
    labels: Any  # (G, B) int64
    scales: Any  # (num_iter,)
    temperature: Any  # (1,)
    # What is computed.
    tokens: Any  # (L, B, D), in generation order
    z: Any  # (largest G * P * B, C)
    raster: Any  # (B, L, D) tokens, raster order
    latents: Any  # (B, channels, h, w)
    images: Any  # (B, H, W, 3) uint8
    # Of a causal model only: the image of each cache row, 0..L-1, the cache, the rows of the class buffer.
    rows: Any = None
    positions: Any = None
    cache: KVCache | None = None
    prefix: dict[str, Any] = field(default_factory=dict)
    inner: InnerState | None = None

    @property
    def guided(self) -> bool:
        return self.branches == 2

    def scale(self, step: Step) -> Any:
        """This step's guidance scale, (1,)."""
        return self.scales[step.index : step.index + 1]


@dataclass
class InnerState:
    """Buffers of the stepwise inner loop, for the largest number of rows; smaller steps use their first rows."""

    start: Any
    modulation: Any
    mixture: dict[str, Any]
    feature: Any
    positions: Any
    caches: dict[int, KVCache] = field(default_factory=dict)  # by rows: a cache's layout depends on them


#: Inputs of `outer_step` by kind, its cache left out.
OUTER_INPUTS = {
    "masked": ["visible_tokens", "visible_positions", "target_positions", "hidden_positions", "labels"],
    "causal": ["token", "rows", "position"],
}


def check_graphs(graphs: dict[str, GraphInfo], config: ArinarConfig) -> None:
    """Raise BundleError where the graphs are not those of the model that the config describes."""
    needed = ["outer_step", "inner_condition", "inner_step", "inner_token", "inner_token_guided", "vae_decoder"]
    needed += ["mixture_sample", "mixture_sample_guided", "tokens_to_latents"]
    needed += ["outer_prefill"] if config.outer == "causal" else []
    outer = graphs.get("outer_step")
    if outer is not None:
        names = [t.name for t in outer.inputs if not t.name.startswith("past_key_values.")]
        width = next((t.shape[-1] for t in outer.outputs if t.name == "z"), None)
        if names != OUTER_INPUTS[config.outer] or width != config.z_width:
            raise BundleError(
                f"graph 'outer_step' does not fit a {config.outer} model of width {config.z_width}: its inputs are "
                f"{', '.join(names)}, its z is {width} wide; export the model again"
            )
    missing = [name for name in needed if name not in graphs]
    if missing:
        raise BundleError(f"the bundle has no graph {', '.join(missing)}; export the model again")


class Loop:
    """Generates the tokens of micro-batches with one bundle on one backend.

    ``inner`` says how a token's features are generated: "fused" runs one graph per outer step, "stepwise" one graph
    per feature with an explicit KV cache; both give the same tokens.
    """

    def __init__(self, backend: Backend, graphs: dict[str, GraphInfo], config: ArinarConfig, inner: str = "fused") -> None:
        if inner not in INNER_MODES:
            raise ValueError(f"inner is {inner!r}; choose one of {', '.join(INNER_MODES)}")
        check_graphs(graphs, config)
        self.backend, self.graphs, self.config, self.inner = backend, graphs, config, inner
        self.seconds: dict[str, float] = {}
        self._states: dict[tuple[int, int, int], State] = {}
        # Whether z of a first step, where no token is visible, is computed once per label. (On a GPU it would be a
        # gather more in a recorded sequence that costs a sixty-fourth less.)
        self.keep_first_step = backend.synchronous and config.outer == "masked"
        self._first_z: dict[int, Array] = {}

    def prepare(self, guided: bool, batch: int = 1) -> None:
        """Load the graphs that a generation of micro-batches of this size needs."""
        suffix = "_guided" if guided else ""
        if self.config.outer == "causal":
            self.backend.prepare("outer_prefill", "outer_step")
        else:
            self.backend.prepare("outer_step", rows=batch * (2 if guided else 1))
        self.backend.prepare("tokens_to_latents", "vae_decoder")
        if self.inner == "fused":
            self.backend.prepare(f"inner_token{suffix}", rows=batch)
        else:
            self.backend.prepare("inner_condition", "inner_step", f"mixture_sample{suffix}")

    def run(
        self,
        labels: Array,
        noise: Noise,
        plan: list[Step],
        *,
        guided: bool,
        temperature: float,
        on_step: Callable[[int], None] | None = None,
    ) -> Made:
        """labels (B,) int64 and their noise -> tokens, latents and images of one micro-batch.

        Without guidance no unconditional row is computed. Raises FloatingPointError naming the graph whose output was
        not finite.
        """
        state = self.state(len(labels), 2 if guided else 1, plan)
        self.fill(state, labels, noise, plan, temperature)

        def steps() -> None:
            for step in plan:
                with self.timed("outer"):
                    z = self.outer(state, step)
                with self.timed("inner"):
                    self.draw(state, step, z)
                if on_step and self.backend.synchronous:
                    on_step(step.index)
            with self.timed("vae"):
                self.decode(state)

        start = time.perf_counter()
        self.backend.execute((self.inner, state.batch, state.branches, state.num_iter), steps)
        made = Made(*(self.backend.download(buffer).copy() for buffer in (state.raster, state.latents, state.images)))
        if not self.backend.synchronous:
            self._add_time("device", start)
        for name, value in (("inner_token", made.tokens), ("vae_decoder", made.latents)):
            if not np.isfinite(value).all():
                raise FloatingPointError(f"graph {name!r} or one before it made values that are not finite")
        if on_step and not self.backend.synchronous:
            on_step(plan[-1].index)
        return made

    def state(self, batch: int, branches: int, plan: list[Step]) -> State:
        """The buffers for micro-batches of this shape; the most recently used are kept."""
        key = (batch, branches, len(plan))
        if key in self._states:
            self._states[key] = self._states.pop(key)  # to the end: most recently used
            return self._states[key]
        while len(self._states) >= KEPT_STATES:
            oldest = next(iter(self._states))
            self.backend.forget((self.inner, *oldest))
            del self._states[oldest]
        self._states[key] = self._allocate(batch, branches, plan)
        return self._states[key]

    def _allocate(self, batch: int, branches: int, plan: list[Step]) -> State:
        backend, config = self.backend, self.config
        length, features, side = config.seq_len, config.token_dim, config.grid_size * config.patch_size
        rows = max(step.count for step in plan) * branches * batch
        uniforms = (length, batch, features) if self.inner == "fused" else (features, length, batch)
        state = State(
            branches=branches,
            batch=batch,
            num_iter=len(plan),
            order=backend.empty((length, batch), "int64"),
            ranks=backend.empty((batch, length), "int64"),
            uniforms=backend.empty((*uniforms, NUM_UNIFORMS), "float32"),
            labels=backend.empty((branches, batch), "int64"),
            scales=backend.empty((len(plan),), "float32"),
            temperature=backend.empty((1,), "float32"),
            tokens=backend.empty((length, batch, features), "float32"),
            z=backend.empty((rows, config.z_width), "float32"),
            raster=backend.empty((batch, length, features), "float32"),
            latents=backend.empty((batch, config.vae_embed_dim, side, side), "float32"),
            images=backend.empty((batch, config.img_size, config.img_size, 3), "uint8"),
        )
        if config.outer == "causal":
            step = self.graphs["outer_step"]
            state.rows = backend.upload(np.tile(np.arange(batch, dtype=np.int64), branches))
            state.positions = backend.upload(np.arange(length, dtype=np.int64))
            state.cache = KVCache(backend, step, branches * batch)
            for tensor in step.inputs:
                if tensor.name in state.cache.past:
                    _, heads, _, head_dim = state.cache.past[tensor.name].shape
                    shape = (branches * batch, heads, config.buffer_size, head_dim)
                    state.prefix[tensor.name] = backend.empty(shape, tensor.dtype)
        if self.inner == "stepwise":
            info = {tensor.name: tensor for tensor in self.graphs["inner_step"].inputs}
            modulation = tuple(d for d in info["modulation"].shape if isinstance(d, int))
            mixture = (rows, config.num_gaussians)
            state.inner = InnerState(
                start=backend.empty((rows, config.inner_width), info["start"].dtype),
                modulation=backend.empty((rows, *modulation), info["modulation"].dtype),
                mixture={name: backend.empty(mixture, "float32") for name in ("weight", "mu", "logvar")},
                feature=backend.empty((rows, 1), "float32"),
                positions=backend.upload(np.arange(features, dtype=np.int64)),
            )
        return state

    def fill(self, state: State, labels: Array, noise: Noise, plan: list[Step], temperature: float) -> None:
        """Upload what a micro-batch needs; nothing more goes up until it is finished."""
        write = self.backend.write
        both = np.stack([labels, np.full_like(labels, -1)])[: state.branches]
        by_position = np.take_along_axis(noise.uniforms, noise.order[:, :, None, None], 1)  # (B, L, D, U)
        # Stepwise, one feature of a step's tokens must be contiguous; fused, all features of a token.
        layout = (1, 0, 2, 3) if self.inner == "fused" else (2, 1, 0, 3)
        write(state.order, noise.order.T)
        write(state.ranks, np.argsort(noise.order, 1))
        write(state.uniforms, by_position.transpose(layout))
        write(state.labels, both)
        write(state.scales, np.array([step.guidance_scale for step in plan], np.float32))
        write(state.temperature, np.array([temperature], np.float32))

    def outer(self, state: State, step: Step) -> Any:
        """z (G * P * B, C) of the tokens that this step generates, conditional rows first."""
        z = state.z[: state.branches * step.count * state.batch]
        if self.config.outer == "causal":
            self._causal_step(state, step, z)
        else:
            self._masked_step(state, step, z)
        return z

    def draw(self, state: State, step: Step, z: Any) -> None:
        """Generate this step's tokens from z, into the state."""
        if self.inner == "fused":
            self._inner_fused(state, step, z)
        else:
            self._inner_stepwise(state, step, z)

    def decode(self, state: State) -> None:
        """Tokens in generation order -> tokens in raster order, latents, images: a bounded number at a time."""
        self.backend.launch(
            "tokens_to_latents",
            {"tokens": state.tokens, "ranks": state.ranks},
            {"raster": state.raster, "latents": state.latents},
        )
        chunk = 1 if self.backend.synchronous else max(1, DECODE_PIXELS // self.config.img_size**2)
        for first in range(0, state.batch, chunk):
            rows = slice(first, min(first + chunk, state.batch))
            self.backend.launch("vae_decoder", {"latents": state.latents[rows]}, {"images": state.images[rows]})

    def _first_step(self, state: State, step: Step, z: Any) -> None:
        """No token is visible yet: z depends on the label and the position alone, and is kept for the next image."""
        length, labels = self.config.seq_len, list(dict.fromkeys(state.labels.flatten().tolist()))
        missing = [label for label in labels if label not in self._first_z]
        nothing = np.empty((0, 1), np.int64)
        made = {label: np.empty((length, z.shape[-1]), np.float32) for label in missing}
        inputs = {
            "visible_tokens": np.empty((0, 1, self.config.token_dim), np.float32),
            "visible_positions": nothing,
            "target_positions": np.arange(length)[:, None],
            "hidden_positions": nothing,
        }
        self.backend.launch_all(
            "outer_step", [(inputs | {"labels": np.array([[label]])}, {"z": made[label]}) for label in missing]
        )
        known = {label: made[label] if label in made else self._first_z.pop(label) for label in labels}
        rows, targets = z.reshape(state.branches, step.count, state.batch, -1), state.order[step.remaining :]
        for branch in range(state.branches):
            for image in range(state.batch):
                rows[branch, :, image] = known[int(state.labels[branch, image])][targets[:, image]]
        self._first_z |= known  # at the end: most recently used
        for label in list(self._first_z)[: max(0, len(self._first_z) - KEPT_LABELS)]:
            del self._first_z[label]

    def forget_first_step(self) -> None:
        """Drop what is kept of first steps (for measuring an image that is the first of its class)."""
        self._first_z.clear()

    def _masked_step(self, state: State, step: Step, z: Any) -> None:
        if self.keep_first_step and step.masked == self.config.seq_len:
            self._first_step(state, step, z)
            return
        branches, batch = state.branches, state.batch
        inputs = {
            "visible_tokens": state.tokens[step.masked :],
            "visible_positions": state.order[step.masked :],
            "target_positions": state.order[step.remaining : step.masked],
            "hidden_positions": state.order[: step.remaining],
        }
        parts = self.backend.parts("outer_step", branches * batch)
        if parts == 1:
            self.backend.launch("outer_step", inputs | {"labels": state.labels}, {"z": z})
            return
        rows = z.reshape(branches, step.count, batch, -1)
        jobs: list[tuple[dict[str, Any], dict[str, Any]]] = []
        targets: list[Any] = []
        for images in divided(batch, -(-parts // branches)):
            made = {name: value[:, images] for name, value in inputs.items()}
            for branch in range(branches):
                labels = state.labels[branch : branch + 1, images]
                jobs.append((made | {"labels": labels}, {"z": np.empty((step.count * labels.size, z.shape[-1]), np.float32)}))
                targets.append(rows[branch, :, images])
        self.backend.launch_all("outer_step", jobs)
        for target, (_, made) in zip(targets, jobs, strict=True):
            target[...] = made["z"].reshape(target.shape)

    def _causal_step(self, state: State, step: Step, z: Any) -> None:
        buffer, cache = self.config.buffer_size, state.cache
        assert cache is not None
        if step.index == 0:
            present = {name.replace("past_key_values", "present", 1): rows for name, rows in state.prefix.items()}
            labels = state.labels.reshape(z.shape[0])
            self.backend.launch("outer_prefill", {"labels": labels}, {"z": z, **present})
            cache.fill(state.prefix)
            return
        position = step.index - 1
        self.backend.launch(
            "outer_step",
            {
                "token": state.tokens[step.masked : step.masked + 1].reshape(state.batch, -1),
                "rows": state.rows,
                "position": state.positions[position : position + 1],
                **cache.past,
            },
            {"z": z, **cache.present},
        )
        cache.write(buffer + position)

    def _inner_fused(self, state: State, step: Step, z: Any) -> None:
        graph = "inner_token_guided" if state.guided else "inner_token"
        scalars = {"temperature": state.temperature}
        if state.guided:
            scalars["guidance_scale"] = state.scale(step)
        uniforms = state.uniforms[step.remaining : step.masked]  # (P, B, D, U)
        target = state.tokens[step.remaining : step.masked]  # (P, B, D)
        parts, features = self.backend.parts(graph, state.batch), self.config.token_dim
        if parts == 1:
            count = step.count * state.batch
            inputs = {"z": z, "uniforms": uniforms.reshape(count, features, -1), **scalars}
            self.backend.launch(graph, inputs, {"tokens": target.reshape(count, features)})
            return
        rows = z.reshape(state.branches, step.count, state.batch, -1)
        jobs = []
        for images in divided(state.batch, parts):
            made = np.empty((step.count * (images.stop - images.start), features), np.float32)
            jobs.append(
                (
                    {
                        "z": rows[:, :, images].reshape(-1, z.shape[-1]),
                        "uniforms": uniforms[:, images].reshape(len(made), features, -1),
                        **scalars,
                    },
                    {"tokens": made},
                )
            )
        self.backend.launch_all(graph, jobs)
        target[...] = np.concatenate([made["tokens"].reshape(step.count, -1, features) for _, made in jobs], 1)

    def _inner_stepwise(self, state: State, step: Step, z: Any) -> None:
        backend, config, inner = self.backend, self.config, state.inner
        assert inner is not None
        rows, count, features = z.shape[0], step.count * state.batch, config.token_dim
        start, modulation, feature = inner.start[:rows], inner.modulation[:rows], inner.feature[:rows]
        mixture = {name: value[:rows] for name, value in inner.mixture.items()}
        backend.launch("inner_condition", {"z": z}, {"start": start, "modulation": modulation})
        if rows not in inner.caches:
            inner.caches[rows] = KVCache(backend, self.graphs["inner_step"], rows, slots=features)
        cache, positions = inner.caches[rows], inner.positions
        tokens = state.tokens[step.remaining : step.masked].reshape(count, 1, features, 1)
        for position in range(features):
            backend.launch(
                "inner_step",
                {
                    "feature": feature,
                    "position": positions[position : position + 1],
                    "start": start,
                    "modulation": modulation,
                    **cache.past,
                },
                {**mixture, **cache.present},
            )
            cache.write(position)
            uniforms = state.uniforms[position : position + 1].reshape(config.seq_len, state.batch, -1)
            draw = {name: value[:count] for name, value in mixture.items()}
            draw["uniforms"] = uniforms[step.remaining : step.masked].reshape(count, -1)
            draw["temperature"] = state.temperature
            if state.guided:
                draw |= {f"{name}_uncond": value[count:] for name, value in mixture.items()}
                draw["guidance_scale"] = state.scale(step)
            name = "mixture_sample_guided" if state.guided else "mixture_sample"
            backend.launch(name, draw, {"feature": feature[:count]})
            if state.guided:
                backend.copy(feature[:count], feature[count:])
            backend.write_slots(feature[:count].reshape(count, 1, 1, 1), tokens, position)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the time of a phase; where launches only enqueue, it would be that of the enqueueing: left out."""
        start = time.perf_counter()
        yield
        if self.backend.synchronous:
            self._add_time(phase, start)

    def _add_time(self, phase: str, start: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def divided(count: int, parts: int) -> list[slice]:
    """Nearly equal ranges of ``count`` things, at most ``parts`` of them."""
    parts = min(count, parts)
    return [slice(part * count // parts, (part + 1) * count // parts) for part in range(parts)]
