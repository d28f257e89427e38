"""The diffusion head: noise is taken out of a whole token step by step, S network evaluations one after another.

Letters as in `arinar.export.steps`; S sampling steps, U = S + 1 random numbers a feature.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from arinar.config import ArinarConfig
from arinar.diffusion_law import forced_states
from arinar.diffusion_schedule import respacings, step_table
from arinar.law import law_of
from arinar.schedule import Step

from .backends.base import Array, Backend, Rows
from .bundle import GraphInfo
from .request import Batch
from .state import State

PARTS = ("mean", "logvar")


@dataclass
class Chain:
    """The sampling steps of a respacing, on the device: timesteps (S,) int64, constants (S, 5)."""

    timesteps: Any
    constants: Any

    def __len__(self) -> int:
        return int(self.timesteps.shape[0])


@dataclass
class DiffusionBuffers:
    """draws (U, L, B, D); condition (G * count * B, W); x: two that take turns, and the parts of a step's law, (count * B, D)
    each; chains: one for each outer step, or one for all."""

    draws: Any
    condition: Any
    x: tuple[Any, Any]
    parts: dict[str, Any]
    chains: list[Chain]


class DiffusionHead:
    """``mode``: "stepwise" is the only one: a graph for each sampling step."""

    MODES = ("stepwise",)
    GRAPHS = ("head_condition", "head_step", "head_step_guided")

    def __init__(self, backend: Backend, graphs: Mapping[str, GraphInfo], config: ArinarConfig, mode: str | None) -> None:
        self.backend, self.infos, self.config, self.mode = backend, graphs, config, mode or self.MODES[0]
        self._chains: dict[str, Chain] = {}

    @staticmethod
    def unread(graph: str, inputs: Mapping[str, Array]) -> set[str]:
        return set()

    def graphs(self, guided: bool) -> list[str]:
        return ["head_condition", "head_step_guided" if guided else "head_step"]

    def prepare(self, guided: bool, batch: int) -> None:
        self.backend.prepare(*self.graphs(guided), rows=batch)

    def shape(self, batch: Batch) -> Hashable:
        """The respacing; of steps that differ, each one's."""
        steps = respacings(batch.sampling_steps, len(batch.plan))
        return steps[0] if len(set(steps)) == 1 else tuple(steps)

    def allocate(self, state: State, batch: Batch) -> DiffusionBuffers:
        config, empty = self.config, self.backend.empty
        size, steps = batch.noise.draws.shape[-1], respacings(batch.sampling_steps, len(batch.plan))
        tokens = state.count * state.batch
        return DiffusionBuffers(
            draws=empty((size, config.seq_len, state.batch, config.token_dim), "float32"),
            condition=self._condition_buffer(state.branches * tokens),
            x=(empty((tokens, config.token_dim), "float32"), empty((tokens, config.token_dim), "float32")),
            parts={part: empty((tokens, config.token_dim), "float32") for part in PARTS},
            chains=[self._chain(name) for name in (steps[:1] if len(set(steps)) == 1 else steps)],
        )

    def fill(self, state: State, batch: Batch) -> None:
        by_position = np.take_along_axis(batch.noise.draws, batch.noise.order[:, :, None, None], 1)  # (B, L, D, U)
        self.backend.write(state.head.draws, by_position.transpose(3, 1, 0, 2))

    def draw(self, state: State, step: Step, z: Any) -> None:
        own: DiffusionBuffers = state.head
        config, name = self.config, self.graphs(state.guided)[-1]
        now, shape = slice(step.remaining, step.masked), (step.count, state.batch)
        count = step.count * state.batch
        condition = own.condition[: state.branches * count]
        self._condition(z.reshape(-1, state.batch, config.z_width), condition.reshape(-1, state.batch, config.inner_width))
        given = {"condition": condition[:count].reshape(*shape, -1), "temperature": state.temperature[now]}
        if state.guided:
            given |= {"condition_uncond": condition[count:].reshape(*shape, -1), "guidance_scale": state.guidance[now]}

        def drawn(number: int) -> Any:
            return own.draws[number : number + 1].reshape(config.seq_len, state.batch, config.token_dim)[now]

        chain = own.chains[step.index if len(own.chains) > 1 else 0]  # one for all steps, of however long a plan
        x, parts = drawn(0), {part: value[:count].reshape(*shape, -1) for part, value in own.parts.items()}
        for number in range(len(chain)):
            last = number == len(chain) - 1
            target = state.tokens[now] if last else own.x[number % 2][:count].reshape(*shape, config.token_dim)
            self._step(name, chain, number, {"x": x, "noise": drawn(number + 1), **given}, {"next_x": target, **parts})
            x = target

    def law(self, z: Array, tokens: Array, images: int | None = None) -> tuple[Array, ...]:
        """mean, logvar, each (N, S, D): of the states that training makes of the tokens (`arinar.diffusion_law`)."""
        config, backend = self.config, self.backend
        rows = (len(z),) if images is None else (len(z) // images, images)
        respacing = respacings(config.sampling_steps, 1)[0]
        chain, states = self._chain(respacing), forced_states(tokens, respacing)
        condition = self._condition_buffer(*rows)
        self._condition(backend.upload(np.ascontiguousarray(z).reshape(*rows, -1)), condition)
        outputs = {name: backend.empty((*rows, config.token_dim), "float32") for name in ("next_x", *PARTS)}
        nothing, ones = backend.empty((*rows, config.token_dim), "float32"), backend.upload(np.ones(rows, np.float32))
        found = {part: np.empty(states.shape, np.float32) for part in law_of(config).parts}
        for number in range(len(chain)):
            x = backend.upload(np.ascontiguousarray(states[:, number]).reshape(*rows, -1))
            given = {"x": x, "noise": nothing, "condition": condition, "temperature": ones}
            self._step("head_step", chain, number, given, outputs)
            for part, values in found.items():
                values[:, number] = backend.download(outputs[part]).reshape(len(z), -1)
        return tuple(found.values())

    def _condition_buffer(self, *rows: int) -> Any:
        """(rows, W), of the dtype that the network computes in."""
        (condition,) = self.infos["head_condition"].outputs
        return self.backend.empty((*rows, self.config.inner_width), condition.dtype)

    def _condition(self, z: Any, condition: Any) -> None:
        """z (anything, B, C) -> condition (anything, B, W); without B, rows of one image."""
        rows = Rows({"z": 1, "condition": 1}) if len(z.shape) > 2 else None
        self.backend.launch("head_condition", {"z": z}, {"condition": condition}, rows)

    def _step(self, name: str, chain: Chain, number: int, given: Mapping[str, Any], made: Mapping[str, Any]) -> None:
        """One launch, on buffers (P, B, ...); without B, rows of one image."""
        rows = Rows(dict.fromkeys((*given, *made), 1)) if len(given["x"].shape) > 2 else None
        now = slice(number, number + 1)
        inputs = {**given, "timestep": chain.timesteps[now], "constants": chain.constants[now]}
        self.backend.launch(name, inputs, made, rows)

    def _chain(self, respacing: str) -> Chain:
        if respacing not in self._chains:
            self._chains[respacing] = Chain(*(self.backend.upload(values) for values in step_table(respacing)))
        return self._chains[respacing]
