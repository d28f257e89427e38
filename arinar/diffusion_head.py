"""The diffusion head (MAR's): a small MLP that takes the noise out of a token step by step, its training loss, and the draw
of a token. Parameter names are those of the published code (github.com/LTH14/mar).

Letters: N or M rows (tokens), D features, C width of z, W of the network, S sampling steps.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from .config import ArinarConfig
from .diffusion_law import forced_states
from .diffusion_schedule import TRAIN_STEPS, NoiseSchedule, noise_schedule, respacings
from .head import Draw, Drawn, wide

FREQUENCIES = 128
# In training, half the width of an 8-bit pixel's bin in [-1, 1], and where the outermost bins begin: applied to latents.
_HALF_BIN, _OPEN_END = 1.0 / 255.0, 0.999


class TimeEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        """Timesteps (N,) int64 of training -> (N, W)."""
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(timestep_features(timesteps, dtype))  # type: ignore[no-any-return]


def timestep_features(timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,) int64 -> (N, 256): 128 cosines, then 128 sines. The angles are float32 whatever the dtype, as published."""
    angles = timesteps[:, None].float() * _frequencies().to(timesteps.device)
    angles = angles.double() if dtype == torch.float64 else angles
    return torch.cat([torch.cos(angles), torch.sin(angles)], -1).to(dtype)


@lru_cache
def _frequencies() -> Tensor:
    """(128,) float32, by PyTorch on the CPU: others' exponential differs in the last place, and is multiplied by up to 999."""
    index = torch.arange(FREQUENCIES, dtype=torch.float32, device="cpu")
    return torch.exp(-math.log(10000) * index / FREQUENCIES)


class ResBlock(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y (N, W) -> (N, W)."""
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)  # type: ignore[no-any-return]


class FinalLayer(nn.Module):
    def __init__(self, width: int, features: int, eps: float) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)  # type: ignore[no-any-return]


class DenoisingMlp(nn.Module):
    """x at a timestep, and z -> what noise is in x, and how wide the next step is."""

    def __init__(self, config: ArinarConfig) -> None:
        super().__init__()
        width, eps = config.inner_width, config.norm_eps
        self.time_embed = TimeEmbed(width)
        self.cond_embed = nn.Linear(config.z_width, width)
        self.input_proj = nn.Linear(config.token_dim, width)
        self.res_blocks = nn.ModuleList([ResBlock(width, eps) for _ in range(config.inner_depth)])
        self.final_layer = FinalLayer(width, 2 * config.token_dim, eps)

    def forward(self, x: Tensor, timesteps: Tensor, z: Tensor) -> Tensor:
        """x (N, D), timesteps (N,) int64, z (N, C) -> (N, 2 D): the noise (eps), then the variance value v."""
        y = self.time_embed(timesteps) + self.cond_embed(z)
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)  # type: ignore[no-any-return]


class DiffusionHead(nn.Module):
    """`arinar.head.Head` for `config.head` "diffusion"; ``inner_width`` and ``inner_depth`` are the network's."""

    #: Timesteps that each token is trained at in one training step (MAR's ``diffusion_batch_mul``): z costs more than they do.
    REPEATS = 4

    def __init__(self, config: ArinarConfig) -> None:
        super().__init__()
        self.config = config
        self.net = DenoisingMlp(config)

    def initialize(self, generator: torch.Generator) -> None:
        """As published: what modulates and what comes out last begin at zero."""
        for name, parameter in self.net.named_parameters():
            if name in ("time_embed.mlp.0.weight", "time_embed.mlp.2.weight"):
                parameter.normal_(0.0, 0.02, generator=generator)
            elif "adaLN_modulation" in name or name.startswith("final_layer."):
                parameter.zero_()

    def loss(self, z: Tensor, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """At a random timestep of each row."""
        timesteps = torch.randint(0, TRAIN_STEPS, (len(tokens),), generator=generator).to(tokens.device)
        noise = torch.randn(tokens.shape, generator=generator, dtype=tokens.dtype).to(tokens.device)
        return self.loss_at(z, tokens, timesteps, noise)

    def loss_at(self, z: Tensor, tokens: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """z (N, C), tokens and noise (N, D), timesteps (N,) int64 -> (N,): squared error of the noise plus the variational
        bound in bits that trains the variance (eps detached), each the mean over features. With weight 1, as published."""
        at = RowConstants(noise_schedule(), timesteps, tokens)
        x = at.sqrt_alphas_cumprod * tokens + at.sqrt_one_minus_alphas_cumprod * noise
        eps, value = wide(self.net(x, timesteps, z)).chunk(2, -1)
        squared = ((noise - eps) ** 2).mean(-1)
        mean, logvar, _ = at.posterior(x, eps.detach(), value)
        true_mean = at.posterior_mean_coef1 * tokens + at.posterior_mean_coef2 * x
        true_logvar = at.posterior_log_variance_clipped
        kl = 0.5 * (logvar - true_logvar - 1 + torch.exp(true_logvar - logvar) + (true_mean - mean) ** 2 * torch.exp(-logvar))
        last = -_binned_log_likelihood(tokens, mean, 0.5 * logvar)
        bound = torch.where(timesteps[:, None] == 0, last, kl).mean(-1) / math.log(2.0)
        return squared + bound

    def draw(self, z_cond: Tensor, z_uncond: Tensor | None, how: Draw, forced: Tensor | None = None) -> Drawn:
        """How many steps: ``how.sampling_steps``, or the config's.

        The law is told where it is wanted, at states that follow from the tokens alone (`_law`), not at those of the draw.
        """
        respacing = self.config.sampling_steps if how.sampling_steps is None else how.sampling_steps
        tokens = self._denoise(z_cond, z_uncond, how, noise_schedule(respacing)) if forced is None else forced
        if not how.recorded:
            return Drawn(tokens, (), None)
        return Drawn(tokens, self._law(z_cond, tokens), None if z_uncond is None else self._law(z_uncond, tokens))

    def _denoise(self, z_cond: Tensor, z_uncond: Tensor | None, how: Draw, schedule: NoiseSchedule) -> Tensor:
        z = z_cond if z_uncond is None else torch.cat([z_cond, z_uncond])
        copies, shape = len(z) // len(z_cond), (len(z_cond), self.config.token_dim)
        x = _normals(how, 0, shape, z_cond)
        for number, index in enumerate(reversed(range(len(schedule)))):
            cond, *uncond = self._network(x.repeat(copies, 1), z, schedule, index).chunk(copies)
            eps, value = guided(cond, uncond[0], how.guidance_scale) if uncond else cond.chunk(2, -1)
            mean, logvar, _ = RowConstants.of_all(schedule, index, x).posterior(x, eps, value)
            noise = _normals(how, number + 1, shape, z_cond)  # drawn at the last step too, as published, which adds none
            x = mean + (index != 0) * torch.exp(0.5 * logvar) * noise * how.temperature.to(x)[:, None]
        return x

    def _network(self, x: Tensor, z: Tensor, schedule: NoiseSchedule, index: int) -> Tensor:
        """x (N, D), z (N, C), all at one step of a schedule -> (N, 2 D)."""
        return wide(self.net(x, torch.full((len(z),), int(schedule.timesteps[index]), device=z.device), z))

    def _law(self, z: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """z (M, C), tokens (M, D) -> mean and log variance of each of the config's sampling steps, (M, S, D) each, at the
        states that `arinar.diffusion_law.forced_states` makes of the tokens."""
        respacing = respacings(self.config.sampling_steps, 1)[0]
        schedule = noise_schedule(respacing)
        states = torch.from_numpy(forced_states(tokens.cpu().numpy(), respacing)).to(tokens)
        means, logvars = [], []
        for x, index in zip(states.unbind(1), reversed(range(len(schedule))), strict=True):
            eps, value = self._network(x, z, schedule, index).chunk(2, -1)
            mean, logvar, _ = RowConstants.of_all(schedule, index, x).posterior(x, eps, value)
            means.append(mean)
            logvars.append(logvar)
        return torch.stack(means, 1), torch.stack(logvars, 1)


def guided(cond: Tensor, uncond: Tensor, guidance_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Network outputs (M, 2 D) of both branches, guidance (M,) -> eps, guided, and v of the conditional branch, (M, D)."""
    (eps, value), (eps_uncond, _) = cond.chunk(2, -1), uncond.chunk(2, -1)
    return eps_uncond + guidance_scale.to(eps)[:, None] * (eps - eps_uncond), value


class RowConstants:
    """A schedule's constants at the timestep of each row, (N, 1), rounded to float32 as published, in the rows' dtype."""

    def __init__(self, schedule: NoiseSchedule, index: Tensor, like: Tensor) -> None:
        self.schedule, self.index, self.like = schedule, index.cpu().numpy(), like

    @classmethod
    def of_all(cls, schedule: NoiseSchedule, index: int, like: Tensor) -> RowConstants:
        """All rows at one step."""
        return cls(schedule, torch.full((len(like),), index), like)

    def __getattr__(self, name: str) -> Tensor:
        values = getattr(self.schedule, name)[self.index].astype(np.float32)
        return torch.from_numpy(values).to(self.like)[:, None]

    def posterior(self, x: Tensor, eps: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, eps, v (N, D) -> mean and log variance of the next state, and the predicted token (not clipped)."""
        token = self.sqrt_recip_alphas_cumprod * x - self.sqrt_recipm1_alphas_cumprod * eps
        mean = self.posterior_mean_coef1 * token + self.posterior_mean_coef2 * x
        share = (value + 1) / 2
        logvar = share * self.log_betas + (1 - share) * self.posterior_log_variance_clipped
        return mean, logvar, token


def _binned_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of x (N, D) in bins of an 8-bit pixel under Gaussians; those beyond +-0.999 are open."""
    centred, inverse = x - mean, torch.exp(-log_std)
    above, below = (_normal_cdf(inverse * (centred + side * _HALF_BIN)) for side in (1, -1))
    least = 1e-12
    inside = torch.log((above - below).clamp(min=least))
    low, high = torch.log(above.clamp(min=least)), torch.log((1 - below).clamp(min=least))
    return torch.where(x < -_OPEN_END, low, torch.where(x > _OPEN_END, high, inside))


def _normal_cdf(x: Tensor) -> Tensor:
    """By the hyperbolic tangent, as published."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _normals(how: Draw, number: int, shape: tuple[int, int], like: Tensor) -> Tensor:
    """The ``number``-th of a token's normals: given, or the generator's."""
    if how.draws is not None:
        return how.draws[..., number].to(like)
    made = torch.randn(shape, generator=how.generator, dtype=like.dtype, device=how.generator.device)
    return made.to(like.device)
