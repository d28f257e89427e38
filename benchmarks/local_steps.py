"""Refreshing and local steps of a masked outer network, as a prototype in PyTorch: to measure what they would change.

A refreshing step computes everything, and keeps keys and values of every block. The local steps after it compute few rows
only: the class buffer, the tokens drawn since, and the positions that are generated until the next refresh ("soon"). These
attend to what was kept of all others, which is as old as the refresh. (The structure is ReCAP's, arXiv 2505.19089.)

Rows are in generation order, [class buffer | known | hidden | soon]: what is kept is one range. Letters: N rows of a batch
(images, in each guidance branch), L tokens, D features, C width.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arinar.config import PRESETS, ArinarConfig
from arinar.head import Draw
from arinar.measure.cost import outer_parameters
from arinar.outer import KVCache, MaskedOuter
from arinar.sampler import NoiseLike
from arinar.schedule import Step, guidance_at, stages_of, steps

RESULTS = Path(__file__).parent / "results"


class Past(NamedTuple):
    """Keys and values of rows that are not computed anew, by block of the encoder and of the decoder."""

    encoder: KVCache
    decoder: KVCache

    def rows(self, encoder: slice, decoder: slice) -> Past:
        """Some of them."""
        parts = (self.encoder, encoder), (self.decoder, decoder)
        return Past(*([(k[:, :, rows], v[:, :, rows]) for k, v in cache] for cache, rows in parts))


@dataclass(frozen=True)
class Kept:
    """What a refresh leaves: keys and values of the known tokens ``order[masked:]`` and, in the decoder, of the hidden ones
    ``order[:first]``; with ``buffer`` those of the class buffer too, which local steps then leave alone."""

    past: Past
    masked: int
    first: int
    buffer: bool = False


def group_of(index: int, local: int, warm_up: int, count: int) -> tuple[int, int]:
    """The refresh that step ``index`` of ``count`` belongs to, and the last step before the next one. The first ``warm_up``
    steps are all refreshes; after them come ``local`` local steps after each."""
    if index < warm_up:
        return index, index
    first = index - (index - warm_up) % (local + 1)
    return first, min(first + local, count - 1)


class Rows:
    """A batch in generation order: tokens (N, L, D) in raster order, of which known ones alone are read; order (N, L);
    labels (N,), -1 = unconditional."""

    def __init__(self, outer: MaskedOuter, tokens: Tensor, order: Tensor, labels: Tensor) -> None:
        self.outer, self.tokens, self.order, self.labels = outer, tokens, order, labels

    def full(self, masked: int) -> tuple[Tensor, Past]:
        """Everything, with ``order[masked:]`` known -> h (N, masked, C) of ``order[:masked]``, keys and values of all rows
        [class buffer | known | ``order[:masked]``]. h is the decoder's output before its norm."""
        nothing = [self._none(self.outer.encoder_blocks), self._none(self.outer.decoder_blocks)]
        return self._run(self.order[:, masked:], self.order[:, :masked], Past(*nothing), buffer=True)

    def keep(self, past: Past, masked: int, first: int, *, buffer: bool = False) -> Kept:
        """Of all rows at a refresh those that its local steps need, where ``order[first:masked]`` are soon."""
        known = self.outer.config.buffer_size + self.order.shape[1] - masked
        start = 0 if buffer else self.outer.config.buffer_size
        return Kept(past.rows(slice(start, known), slice(start, known + first)), masked, first, buffer)

    def local(self, kept: Kept, masked: int) -> Tensor:
        """``order[masked:]`` known, those of them since the refresh from the tokens -> h (N, masked - first, C) of
        ``order[first:masked]``."""
        new, pending = self.order[:, masked : kept.masked], self.order[:, kept.first : masked]
        return self._run(new, pending, kept.past, buffer=not kept.buffer)[0]

    def z(self, h: Tensor, first: int) -> Tensor:
        """h (N, P, C) of ``order[first : first + P]`` -> z (N, P, C)."""
        places = self.order[:, first : first + h.shape[1]]
        out: Tensor = self.outer.decoder_norm(h) + self.outer.diffusion_pos_embed_learned[0, places]
        return out

    def _run(self, known: Tensor, unknown: Tensor, past: Past, *, buffer: bool) -> tuple[Tensor, Past]:
        """Rows of the class buffer (or not), of known and of unknown positions (N, S) -> h of the unknown ones."""
        outer, size = self.outer, self.outer.config.buffer_size
        each = torch.arange(len(known))[:, None]
        heads = torch.arange(size if buffer else 0).expand(len(known), -1)
        places = torch.cat([heads, size + known], 1)
        classes = outer.class_vectors(self.labels)[:, None].expand(-1, heads.shape[1], -1)
        x = torch.cat([classes, outer.z_proj(self.tokens[each, known])], 1)
        x = outer.z_proj_ln(x + outer.encoder_pos_embed_learned[0, places])
        x, encoder = _through(outer.encoder_blocks, x, past.encoder)
        masks = outer.mask_token.expand(len(known), unknown.shape[1], -1)
        x = torch.cat([outer.decoder_embed(outer.encoder_norm(x)), masks], 1)
        x = x + outer.decoder_pos_embed_learned[0, torch.cat([places, size + unknown], 1)]
        x, decoder = _through(outer.decoder_blocks, x, past.decoder)
        return x[:, places.shape[1] :], Past(encoder, decoder)

    def _none(self, blocks: Any) -> KVCache:
        heads, width = blocks[0].attn.heads, blocks[0].attn.proj.in_features
        empty = self.tokens.new_empty(len(self.tokens), heads, 0, width // heads)
        return [(empty, empty)] * len(blocks)


def _through(blocks: Any, x: Tensor, past: KVCache) -> tuple[Tensor, KVCache]:
    """All blocks; rows attend to each other and to the past, in both directions."""
    grown: KVCache = []
    for block, before in zip(blocks, past, strict=True):
        x, both = block.step(x, before)
        grown.append(both)
    return x, grown


@torch.no_grad()
def generate(
    model: Any, labels: Tensor, noise: NoiseLike, plan: Sequence[Step], *, guidance_scale: float, local: int, warm_up: int = 0
) -> Tensor:
    """Tokens (B, L, D) as `arinar.sampler.sample` makes them with the same noise (linear guidance, temperature 1), with
    ``local`` local steps after each refresh."""
    batch, length = len(labels), model.config.seq_len
    like = model.fake_latent
    order, draws = torch.as_tensor(noise.order), torch.as_tensor(noise.draws)
    tokens = like.new_zeros(batch, length, model.config.token_dim)
    each, kept, heat = torch.arange(batch)[:, None], None, torch.ones(batch, dtype=torch.float64)
    for step in plan:
        both = Rows(model, tokens.repeat(2, 1, 1), order.repeat(2, 1), torch.cat([labels, torch.full_like(labels, -1)]))
        refresh, last = group_of(step.index, local, warm_up, len(plan))
        if refresh == step.index:
            h, past = both.full(step.masked)
            kept = both.keep(past, step.masked, plan[last].remaining)
        else:
            assert kept is not None
            h = both.local(kept, step.masked)
        cond, uncond = (part.flatten(0, 1) for part in both.z(h[:, -step.count :], step.remaining).chunk(2))
        positions = order[:, step.remaining : step.masked]
        scale = guidance_at(step, length, heat * guidance_scale, "linear").repeat_interleave(step.count)
        given = draws[each, positions].flatten(0, 1)
        how = Draw(scale, heat.repeat_interleave(step.count), torch.Generator(), given, recorded=False)
        tokens[each, positions] = model.head.draw(cond, uncond, how).tokens.reshape(*positions.shape, -1)
    return tokens


# ------------------------------------------------------------------------------------------------------------ arithmetic


@dataclass(frozen=True)
class Launch:
    """Of one image in one guidance branch: rows that encoder and decoder compute, rows that the encoder's attend to, computed
    rows that are hidden tokens (their first queries, keys and values are a table), rows at which z is wanted."""

    encoder: int
    decoder: int
    seen: int
    hidden: int
    wanted: int

    def multiply_adds(self, config: ArinarConfig) -> float:
        """As `arinar.measure.cost` counts them, but for the embedding of the tokens."""
        width, depth, total = config.decoder_width, config.decoder_depth, config.buffer_size + config.seq_len
        share = 4 + 2 * config.mlp_ratio  # of a block's weights in width ** 2
        linear = self.encoder * (config.encoder_depth * share * config.encoder_width**2 + config.encoder_width * width)
        linear += self.decoder * ((depth - 1) * share + 2) * width**2 - self.hidden * 3 * width**2
        linear += self.wanted * (share - 2) * width**2
        attention = 2 * self.encoder * self.seen * config.encoder_width * config.encoder_depth
        attention += 2 * total * width * (self.decoder * (depth - 1) + self.wanted)
        return float(linear + attention)


def launches(
    config: ArinarConfig, plan: Sequence[Step], local: int = 0, warm_up: int = 0, *, keep_buffer: bool = False
) -> list[Launch]:
    """Every launch of an image: one a step, and one more where both guidance branches are computed."""
    found = []
    for step in plan:
        index, last = group_of(step.index, local, warm_up, len(plan))
        seen, first, since = config.buffer_size + config.seq_len - step.masked, 0, config.seq_len
        buffer = config.buffer_size
        if index != step.index:
            first, since = plan[last].remaining, plan[index].masked
            buffer = 0 if keep_buffer else buffer
        rows, hidden = buffer + since - step.masked, step.masked - first
        one = Launch(rows, rows + hidden, seen, hidden, step.count + step.ahead)
        found += [one] * (2 if step.guided and not step.reuses else 1)
    return found


def multiply_adds(config: ArinarConfig, num_iter: int, *, local: int = 0, refresh: int = 1, keep_buffer: bool = False) -> float:
    """Of a guided image's outer steps, in the cosine's counts."""
    plan = steps(config.seq_len, num_iter, guidance_refresh=refresh)
    return sum(one.multiply_adds(config) for one in launches(config, plan, local, keep_buffer=keep_buffer))


#: Keys of :func:`arithmetic`'s shares.
SHARES = ("rows", "multiply_adds", "multiply_adds_buffer_kept", "passes", "batch_1")


def arithmetic(config: ArinarConfig, schedule: str, num_iter: int) -> list[dict[str, Any]]:
    """What the outer steps of a guided image take, as shares of the exact plan's: rows computed; multiply-adds, and those
    where local steps leave the class buffer alone; passes over the weights (a launch for each branch); the least time at
    batch 1, the class buffer left alone.

    The last by what was measured on two cores in float32: a launch takes what its multiply-adds take, and no less than
    reading the weights (a causal model's step, of one token, does little else).
    """
    machine = json.loads((RESULTS / "causal-base-fp32-batch1-cpu.json").read_text(encoding="utf-8"))
    pass_ms = statistics.median(machine["outer_ms_per_token"]) / outer_parameters(PRESETS["base-causal"])
    least, peak_per_ms = pass_ms * outer_parameters(config), machine["gemm_peak_gflops"] / 2 * 1e6
    stages, found = stages_of(schedule, config.grid_size), []
    for local, warm_up in ((0, 0), (1, 0), (1, 16), (3, 0), (3, 16)):
        for refresh in (1, 2, 4):
            plan = steps(config.seq_len, num_iter, stages=stages, guidance_refresh=refresh)
            made = launches(config, plan, local, warm_up)
            cost = [one.multiply_adds(config) for one in made]
            few = [one.multiply_adds(config) for one in launches(config, plan, local, warm_up, keep_buffer=True)]
            rows = sum(one.encoder + one.decoder for one in made)
            time = sum(max(value / peak_per_ms, least) for value in few)
            values = dict(zip(SHARES, (rows, sum(cost), sum(few), len(made), time), strict=True))
            found.append({"local": local, "warm_up": warm_up, "guidance_refresh": refresh} | values)
    return [row | {key: row[key] / found[0][key] for key in SHARES} for row in found]


__all__ = ["SHARES", "Kept", "Launch", "Past", "Rows", "arithmetic", "generate", "group_of", "launches", "multiply_adds"]
