"""The Gaussian mixture head: the inner autoregressive model with its loss, and the draw of a token's features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .head import Draw, Drawn, wide
from .inner import InnerAR, Mixture, log_density
from .mixture import draw_mixture
from .mixture_law import NUM_CANDIDATES


class GmmHead(InnerAR):
    """`arinar.head.Head` for `config.head` "gmm". What ``law`` may say: ``num_candidates``, N of the guided draw."""

    REPEATS = 1  # nothing in its loss is random

    def initialize(self, generator: torch.Generator) -> None:
        """Normal embeddings, of std 0.02."""
        for table in (self.start_token, self.pos_embedding):
            table.normal_(0.0, 0.02, generator=generator)

    def loss(self, z: Tensor, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Negative log-likelihood, without the constant 0.5 log(2 pi) per feature, as published."""
        mixture = Mixture(*(wide(value) for value in self(z, tokens)))
        per_feature = -log_density(tokens, mixture) - 0.5 * math.log(2 * math.pi)
        return per_feature.sum(-1)

    def draw(self, z_cond: Tensor, z_uncond: Tensor | None, how: Draw, forced: Tensor | None = None) -> Drawn:
        z = z_cond if z_uncond is None else torch.cat([z_cond, z_uncond])
        copies = 1 if z_uncond is None else 2
        feature, cache = None, None
        drawn: list[Tensor] = []
        conds: list[Mixture] = []
        unconds: list[Mixture] = []
        for position in range(self.config.token_dim):
            previous: Tensor | None = None if feature is None else feature.repeat(copies, 1)
            both, cache = self.step(z, previous, position, cache)
            cond = Mixture(*(wide(value.chunk(copies)[0]) for value in both))
            uncond = None if z_uncond is None else Mixture(*(wide(value.chunk(copies)[1]) for value in both))
            value = draw_feature(cond, uncond, how, position) if forced is None else forced[:, position]
            feature = value[:, None]
            drawn.append(value)
            conds.append(cond)
            if uncond is not None:
                unconds.append(uncond)
        return Drawn(torch.stack(drawn, 1), _stack(conds), _stack(unconds) if unconds else None)


def draw_feature(cond: Mixture, uncond: Mixture | None, how: Draw, position: int) -> Tensor:
    """One draw from each row's mixtures (M, K) -> (M,)."""
    candidates = how.law.get("num_candidates", NUM_CANDIDATES)
    if how.draws is not None:
        return draw_mixture(
            cond,
            uncond,
            how.draws[:, position],
            guidance_scale=how.guidance_scale,
            temperature=how.temperature,
            num_candidates=candidates,
        )
    if uncond is None:
        return draw_plain(cond, how.temperature, how.generator)
    return draw_guided(cond, uncond, how.guidance_scale, how.temperature, how.generator, candidates)


def draw_plain(mixture: Mixture, temperature: Tensor, generator: torch.Generator, count: int = 1) -> Tensor:
    """``count`` draws from each mixture (M, K) with component std * temperature (M,) -> (M,), or (count, M) for more."""
    weight, mu, logvar = mixture
    where = generator.device
    pick = torch.multinomial(weight.float().to(where), count, replacement=True, generator=generator).to(mu.device)
    eps = torch.randn(pick.shape, generator=generator, dtype=mu.dtype, device=where).to(mu.device)
    values = mu.gather(1, pick) + torch.exp(0.5 * logvar.gather(1, pick)) * temperature.to(mu)[:, None] * eps
    return values[:, 0] if count == 1 else values.T


def draw_guided(
    cond: Mixture,
    uncond: Mixture,
    guidance_scale: Tensor,
    temperature: Tensor,
    generator: torch.Generator,
    num_candidates: int = NUM_CANDIDATES,
) -> Tensor:
    """Published guided draw, mixtures (M, K), guidance_scale and temperature (M,) -> (M,).

    1000 proposals from the tempered conditional mixture, one picked with probability proportional to
    (p_cond / p_uncond) ** (guidance_scale - 1), densities without the temperature.
    """
    proposals = draw_plain(cond, temperature, generator, num_candidates)  # (N, M)
    ratio = log_density(proposals, cond) - log_density(proposals, uncond)
    probability = torch.softmax(ratio * (guidance_scale - 1).to(ratio), 0).T  # (M, N)
    where = generator.device
    pick = torch.multinomial(probability.float().to(where), 1, generator=generator).to(proposals.device)
    return proposals.T.gather(1, pick)[:, 0]


def _stack(mixtures: list[Mixture]) -> Mixture:
    return Mixture(*(torch.stack(values, 1) for values in zip(*mixtures, strict=True)))


__all__ = ["GmmHead", "draw_guided", "draw_plain"]
