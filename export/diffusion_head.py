"""The diffusion head as graphs: conditioning, and one sampling step with guidance and posterior inside.

There is no graph of a whole token: a hundred copies of the step would take the libraries minutes to load, and on a CPU the
step is bound by the weights that it reads, on a GPU it is recorded. Letters as in `arinar.export.steps`, M rows (tokens).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arinar.config import ArinarConfig
from arinar.diffusion_head import DiffusionHead, ResBlock
from arinar.diffusion_schedule import STEP_CONSTANTS, TRAIN_STEPS
from arinar.head import wide
from arinar.runtime.bundle import TensorInfo

from .spec import GraphSpec, tensor

#: Nothing but the config decides the law of a draw.
LAW: dict[str, int] = {}
COMPOSED: dict[str, tuple[str, ...]] = {}


def float32_islands(head: DiffusionHead) -> list[nn.Module]:
    """What stays in float32 when the rest computes in float16: the last layer, whose errors the first sampling step multiplies
    by hundreds, and the embedding of timesteps, which becomes a table."""
    return [head.net.time_embed, head.net.final_layer.linear]


class HeadCondition(nn.Module):
    """What depends on z alone, once per token instead of once per step."""

    def __init__(self, head: DiffusionHead) -> None:
        super().__init__()
        self.cond_embed = head.net.cond_embed

    def forward(self, z: Tensor) -> Tensor:
        """z (N, C) float32 -> condition (N, W), of all branches' rows."""
        return self.cond_embed(z.to(self.cond_embed.weight.dtype))  # type: ignore[no-any-return]


class HeadStep(nn.Module):
    """One sampling step. x and the step's arithmetic are float32 whatever the network's precision, in the form that has no
    large intermediate (`arinar.diffusion_schedule.step_table`).

    The modulations of all blocks are one product. Timesteps are embedded in a table.
    """

    time_table: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, head: DiffusionHead) -> None:
        super().__init__()
        self.net = net = head.net
        with torch.no_grad():
            self.register_buffer("time_table", net.time_embed(torch.arange(TRAIN_STEPS)).to(net.input_proj.weight.dtype))
        linears: list[nn.Linear] = [block.adaLN_modulation[1] for block in net.res_blocks]  # type: ignore[index,misc]
        linears.append(net.final_layer.adaLN_modulation[1])  # type: ignore[arg-type]
        self.register_buffer("weight", torch.cat([linear.weight.detach() for linear in linears]))
        self.register_buffer("bias", torch.cat([linear.bias.detach() for linear in linears]))

    def forward(
        self, x: Tensor, condition: Tensor, timestep: Tensor, constants: Tensor, noise: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x and noise (M, D), condition (M, W), timestep (1,) int64, constants (1, 5), temperature (M,)
        -> the next x, the mean and the log variance of its law, (M, D) each."""
        eps, value = self.network(self.net.input_proj(self.narrow(x)), condition, timestep).chunk(2, -1)
        return self.advance(x, eps, value, constants, noise, temperature)

    def narrow(self, x: Tensor) -> Tensor:
        return x.to(self.time_table.dtype)

    def network(self, x: Tensor, condition: Tensor, timestep: Tensor) -> Tensor:
        """x (N, W) after its projection, condition (N, W), timestep (1,) -> eps and v (N, 2 D) float32."""
        net = self.net
        y = F.silu(condition + F.embedding(timestep, self.time_table))
        parts = F.linear(y, self.weight, self.bias).chunk(3 * len(net.res_blocks) + 2, -1)
        for index, block in enumerate(net.res_blocks):
            assert isinstance(block, ResBlock)
            shift, scale, gate = parts[3 * index : 3 * index + 3]
            x = x + gate * block.mlp(self.normed(x, block.in_ln) * (1 + scale) + shift)
        x = self.normed(x, net.final_layer.norm_final) * (1 + parts[-1]) + parts[-2]
        last = net.final_layer.linear
        return F.linear(wide(x), wide(last.weight), wide(last.bias))

    def normed(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """With float32 statistics."""
        weight, bias = (None if part is None else wide(part) for part in (norm.weight, norm.bias))
        return F.layer_norm(wide(x), x.shape[-1:], weight, bias, norm.eps).to(x.dtype)

    def advance(
        self, x: Tensor, eps: Tensor, value: Tensor, constants: Tensor, noise: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from_x, from_eps, log_beta, log_posterior, adds = constants.chunk(len(STEP_CONSTANTS), -1)
        mean = from_x * x - from_eps * eps
        share = 0.5 * value + 0.5
        logvar = share * log_beta + (1 - share) * log_posterior
        return mean + adds * torch.exp(0.5 * logvar) * noise * temperature[:, None], mean, logvar


class GuidedHeadStep(HeadStep):
    """As `HeadStep`, of both branches, which share x: eps is guided, the variance is the conditional branch's."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        condition: Tensor,
        condition_uncond: Tensor,
        timestep: Tensor,
        constants: Tensor,
        noise: Tensor,
        guidance_scale: Tensor,
        temperature: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `HeadStep.forward`; condition_uncond (M, W), guidance_scale (M,)."""
        projected = self.net.input_proj(self.narrow(x))
        both = self.network(torch.cat([projected, projected]), torch.cat([condition, condition_uncond]), timestep)
        cond, uncond = both.unflatten(0, (2, -1)).unbind(0)
        (eps, value), (eps_uncond, _) = cond.chunk(2, -1), uncond.chunk(2, -1)
        eps = eps_uncond + guidance_scale[:, None] * (eps - eps_uncond)
        return self.advance(x, eps, value, constants, noise, temperature)


def specs(head: DiffusionHead, law: Mapping[str, int]) -> list[GraphSpec]:
    """The graphs that are traced, in the order of the data."""
    config = head.config
    dtype = str(head.net.input_proj.weight.dtype).removeprefix("torch.")
    rows: tuple[dict[str, int], ...] = ({"M": 1}, {"M": 2}, {"M": 7})
    condition = tensor("condition", ("M", config.inner_width), dtype)
    return [
        GraphSpec(
            "head_condition",
            HeadCondition(head),
            (tensor("z", ("N", config.z_width)),),
            (tensor("condition", ("N", config.inner_width), dtype),),
            {},
            tuple({"N": row["M"]} for row in rows),
            phase="head",
        ),
        *(
            GraphSpec(
                name,
                step(head),
                _step_inputs(config, condition, guided),
                tuple(tensor(part, ("M", config.token_dim)) for part in ("next_x", "mean", "logvar")),
                {"timestep": (0, TRAIN_STEPS)},
                rows,
                phase="head",
            )
            for name, step, guided in (("head_step", HeadStep, False), ("head_step_guided", GuidedHeadStep, True))
        ),
    ]


def _step_inputs(config: ArinarConfig, condition: TensorInfo, guided: bool) -> tuple[TensorInfo, ...]:
    x = ("M", config.token_dim)
    uncond = [tensor("condition_uncond", condition.shape, condition.dtype)] if guided else []
    scale = [tensor("guidance_scale", ("M",))] if guided else []
    return (
        tensor("x", x),
        condition,
        *uncond,
        tensor("timestep", (1,), "int64"),
        tensor("constants", (1, len(STEP_CONSTANTS))),
        tensor("noise", x),
        *scale,
        tensor("temperature", ("M",)),
    )
