"""The Gaussian mixture head as graphs: conditioning, one feature, one draw, and a whole token composed of them.

`inner_token` is not traced (sixteen unrolled copies would take the exporter minutes) but composed from the very graphs
`inner_condition`, `inner_step` and `mixture_sample` that stand beside it in the bundle, their weights shared. It
therefore cannot drift from them. Letters as in `arinar.export.steps`, and M drawn rows (N = M, or 2 M with guidance).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from onnx import ModelProto, helper, numpy_helper
from torch import Tensor, nn

from arinar.config import ArinarConfig
from arinar.head import wide
from arinar.inner import InnerAR, InnerBlock
from arinar.mixture import MixtureSample, PlainMixtureSample
from arinar.mixture_law import NUM_CANDIDATES, NUM_UNIFORMS
from arinar.runtime.bundle import TensorInfo

from .compose import GraphComposer
from .spec import Array, GraphSpec, cache_tensors, tensor
from .steps import attend_cached, filled_bias

#: What the law of a draw depends on besides the config: recorded in the manifest, built into the graphs.
LAW = {"num_candidates": NUM_CANDIDATES}
MIXTURE = ("weight", "mu", "logvar")
#: What a draw takes besides mixtures and uniforms, a value per row; a plain draw has no guidance.
SETTINGS = ("guidance_scale", "temperature")
#: Composed graphs, and what each is made of: conditioning, step, draw.
COMPOSED = {
    "inner_token": ("inner_condition", "inner_step", "mixture_sample"),
    "inner_token_guided": ("inner_condition", "inner_step", "mixture_sample_guided"),
}
# Largest error of a composed graph that computes in float16, for this share of a token's features (the rest may follow
# another draw). Measured on random inputs at the published size: 1.2e-2.
FP16_DRAW_ATOL, FP16_DRAW_SHARE = 0.1, 0.75


def float32_islands(head: InnerAR) -> list[nn.Module]:
    """What stays in float32 when the rest computes in float16."""
    return [head.head]


class InnerCondition(nn.Module):
    """Everything that depends on z alone, once per token instead of once per feature: the start of the sequence and
    the AdaLN modulation of every block and of the head, as one GEMM."""

    weight: Tensor
    bias: Tensor

    def __init__(self, inner: InnerAR) -> None:
        super().__init__()
        self.inner = inner
        linears: list[nn.Linear] = [block.ada_lin[1] for block in inner.blocks]  # type: ignore[index,misc]
        linears.append(inner.head_nm.ada_lin[1])  # type: ignore[arg-type]
        self.register_buffer("weight", torch.cat([linear.weight.detach() for linear in linears]))
        self.register_buffer("bias", torch.cat([linear.bias.detach() for linear in linears]))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (N, C) float32 -> start (N, W), modulation (N, 6 * depth + 2, W)."""
        z = z.to(self.weight.dtype)
        start = self.inner.cond_proj(z) + self.inner.start_token[0]
        modulation = F.linear(F.silu(z), self.weight, self.bias)
        return start, modulation.unflatten(-1, (-1, self.inner.config.inner_width))


class InnerStep(nn.Module):
    """One feature: mixture parameters, and the new cache rows."""

    filled: Tensor

    def __init__(self, inner: InnerAR) -> None:
        super().__init__()
        self.inner = inner
        features = inner.config.token_dim
        self.register_buffer("filled", filled_bias(features, 0, features))

    def forward(
        self, feature: Tensor, position: Tensor, start: Tensor, modulation: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """feature (N, 1) float32: the previous one (ignored at position 0), position (1,) int64, start and modulation
        from the conditioning, past keys and values per block (N, H, S, d), S at most D
        -> weight, mu, logvar (N, K) float32, then per block the new key and value rows (N, H, 1, d)."""
        inner = self.inner
        x = torch.where(position == 0, start, inner.input_proj(feature.to(start.dtype)))
        x = (x + F.embedding(position, inner.pos_embedding[0]))[:, None]  # (N, 1, W)
        parts = modulation[:, :, None].unbind(1)  # each (N, 1, W)
        new: list[Tensor] = []
        for index, block in enumerate(inner.blocks):
            assert isinstance(block, InnerBlock)
            gamma1, gamma2, scale1, scale2, shift1, shift2 = parts[6 * index : 6 * index + 6]
            h = modulate(x, scale1, shift1, block.norm_eps)
            q, k, v = inner_heads(block, h)
            past_k, past_v = past[2 * index], past[2 * index + 1]
            bias = F.embedding(position, self.filled)[0, : past_k.shape[2]]
            h = attend_cached(q, k, v, past_k, past_v, bias, block.attn.scale)
            x = x + gamma1 * block.attn.proj(h.transpose(1, 2).flatten(2))
            x = x + gamma2 * block.ffn(modulate(x, scale2, shift2, block.norm_eps))
            new += [k, v]
        x = modulate(x, parts[-2], parts[-1], inner.head_nm.norm_eps)[:, 0]
        out = F.linear(wide(x), wide(inner.head.weight), wide(inner.head.bias))
        mu, logvar, logits = out.chunk(3, -1)
        return (torch.softmax(logits, -1), mu, logvar, *new)


def inner_heads(block: InnerBlock, x: Tensor) -> list[Tensor]:
    """(N, 1, W) -> queries, keys, values, each (N, H, 1, d)."""
    attn = block.attn
    bias = torch.cat([attn.q_bias, attn.zero_k_bias, attn.v_bias])
    qkv = F.linear(x, attn.mat_qkv.weight, bias)
    return [part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)]


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine (float32 statistics), then (1 + scale) and shift."""
    normed = F.layer_norm(wide(x), x.shape[-1:], eps=eps).to(x.dtype)
    return normed * (1 + scale) + shift


def specs(head: InnerAR, law: Mapping[str, int]) -> list[GraphSpec]:
    """The graphs that are traced, in the order of the data."""
    config = head.config
    dtype = str(next(head.parameters()).dtype).removeprefix("torch.")
    depth, heads, features = config.inner_depth, config.inner_heads, config.token_dim
    rows: tuple[dict[str, int], ...] = ({"N": 1}, {"N": 2}, {"N": 7})
    steps = tuple({"N": n, "S": s} for n, s in ((1, features), (2, 1), (7, features - 1)))
    start = tensor("start", ("N", config.inner_width), dtype)
    modulation = tensor("modulation", ("N", 6 * depth + 2, config.inner_width), dtype)
    caches = [
        cache_tensors(kind, depth, "N", heads, slots, config.inner_head_dim, dtype)
        for kind, slots in (("past_key_values", "S"), ("present", 1))
    ]
    return [
        GraphSpec(
            "inner_condition",
            InnerCondition(head),
            (tensor("z", ("N", config.z_width)),),
            (start, modulation),
            {},
            rows,
            phase="head",
        ),
        GraphSpec(
            "inner_step",
            InnerStep(head),
            (tensor("feature", ("N", 1)), tensor("position", (1,), "int64"), start, modulation, *caches[0]),
            (*(tensor(name, ("N", config.num_gaussians)) for name in MIXTURE), *caches[1]),
            {"position": (0, features)},
            steps,
            phase="head",
        ),
        _draw_spec(config, guided=False, num_candidates=law["num_candidates"]),
        _draw_spec(config, guided=True, num_candidates=law["num_candidates"]),
    ]


def _draw_spec(config: ArinarConfig, *, guided: bool, num_candidates: int) -> GraphSpec:
    """One draw a row."""
    gaussians = config.num_gaussians
    names = [*MIXTURE, *(f"{name}_uncond" for name in MIXTURE if guided)]
    make = MixtureSample if guided else PlainMixtureSample
    return GraphSpec(
        "mixture_sample_guided" if guided else "mixture_sample",
        make(gaussians, num_candidates),
        (*(tensor(n, ("M", gaussians)) for n in names), tensor("uniforms", ("M", NUM_UNIFORMS)), *_settings(guided)),
        (tensor("feature", ("M", 1)),),
        {},
        ({"M": 1}, {"M": 3}, {"M": 64}),
        phase="head",
        draws="one",
        small=True,
        atol=1e-3 if guided else 1e-4,
    )


def _settings(guided: bool) -> tuple[TensorInfo, ...]:
    return tuple(tensor(name, ("M",)) for name in (SETTINGS if guided else SETTINGS[1:]))


def composed_spec(name: str, config: ArinarConfig) -> GraphSpec:
    """A whole token: what `compose` gives. It has no module; `reference` says what it must compute."""
    guided = name.endswith("_guided")
    copies = 2 if guided else 1
    return GraphSpec(
        name,
        nn.Identity(),
        (
            tensor("z", ("N" if guided else "M", config.z_width)),
            tensor("uniforms", ("M", config.token_dim, NUM_UNIFORMS)),
            *_settings(guided),
        ),
        (tensor("tokens", ("M", config.token_dim)),),
        {},
        tuple({"M": m, "N": copies * m} for m in (1, 3, 16)),
        phase="head",
        draws="chain",
        small=True,
        atol=5e-3 if guided else 1e-3,
    )


def in_float16(spec: GraphSpec) -> GraphSpec:
    """A composed graph with the tolerances of float16."""
    return replace(spec, atol=FP16_DRAW_ATOL, share=FP16_DRAW_SHARE)


def reference(name: str, exact: Mapping[str, GraphSpec], config: ArinarConfig) -> Callable[[dict[str, Array]], Sequence[Array]]:
    """What a composed graph must compute: its float32 step modules, one feature after another in PyTorch."""
    condition, step, draw = (exact[part].module for part in COMPOSED[name])
    guided = name.endswith("_guided")

    @torch.no_grad()
    def run(feed: dict[str, Array]) -> list[Array]:
        tensors = {name: torch.from_numpy(value) for name, value in feed.items()}
        start, modulation = condition(tensors["z"])
        rows, heads, size = len(start), config.inner_heads, config.inner_head_dim
        cache = [torch.zeros(rows, heads, config.token_dim, size, dtype=start.dtype) for _ in range(2 * config.inner_depth)]
        feature = torch.zeros(rows, 1)
        drawn: list[Tensor] = []
        for position in range(config.token_dim):
            weight, mu, logvar, *new = step(feature, torch.tensor([position]), start, modulation, *cache)
            for past, row in zip(cache, new, strict=True):
                past[:, :, position : position + 1] = row
            uniforms = tensors["uniforms"][:, position]
            if guided:
                cond, uncond = zip(*(t.chunk(2) for t in (weight, mu, logvar)), strict=True)
                value = draw(*cond, *uncond, uniforms, tensors["guidance_scale"], tensors["temperature"])
                feature = torch.cat([value, value])
            else:
                value = feature = draw(weight, mu, logvar, uniforms, tensors["temperature"])
            drawn.append(value)
        return [torch.cat(drawn, 1).numpy()]

    return run


def compose(name: str, parts: Mapping[str, ModelProto], config: ArinarConfig) -> ModelProto:
    """A whole token of M rows in one graph, of ``parts`` by name.

    z (M, C), or (2 M, C) conditional rows first when guided, uniforms (M, D, U), guidance_scale when guided and temperature,
    as the drawing part takes them -> tokens (M, D). Guided: both branches see the features sampled from the guided draw.
    """
    condition, step, draw = (parts[part] for part in COMPOSED[name])
    guided, features = name.endswith("_guided"), config.token_dim
    build = GraphComposer()
    given = build.inline(condition, "condition/", {"z": "z"})
    previous = _nothing_yet(build, step, config)
    past: dict[str, list[str]] = {f"{layer}.{kind}": [] for layer in range(config.inner_depth) for kind in ("key", "value")}
    drawn = []
    for position in range(features):
        prefix = f"feature.{position}/"
        index = build.constant(np.array([position], np.int64), f"position.{position}")
        inputs = {"feature": previous, "position": index, **given}
        for cache, rows in past.items():
            inputs[f"past_key_values.{cache}"] = _joined(build, rows, f"{prefix}past.{cache}")
        out = build.inline(step, prefix, inputs)
        for cache, rows in past.items():
            rows.append(out[f"present.{cache}"])
        feature = build.inline(draw, f"{prefix}draw/", _draw_inputs(build, prefix, position, out, guided))["feature"]
        drawn.append(feature)
        previous = feature
        if guided and position < features - 1:
            previous = f"{prefix}both"
            build.node("Concat", [feature, feature], [previous], axis=0)
    build.node("Concat", drawn, ["tokens"], axis=1)
    spec, own = composed_spec(name, config), {value.name: value for value in draw.graph.input}
    shapes = {key: [d.dim_param or d.dim_value for d in own[key].type.tensor_type.shape.dim] for key in own}
    # (Bundles of version 0.1 hold drawing parts that take one value for all rows.)
    taken = [replace(t, shape=tuple(shapes[t.name])) if t.name in SETTINGS else t for t in spec.inputs]
    opset = next(item.version for item in step.opset_import if item.domain == "")
    return build.model(name, taken, spec.outputs, opset, step.ir_version)


def _nothing_yet(build: GraphComposer, step: ModelProto, config: ArinarConfig) -> str:
    """What stands for the past of position 0: one empty cache slot, which the step's own mask hides, and a feature that is
    not read -> the latter's name."""
    cache = next(v.type.tensor_type.elem_type for v in step.graph.input if v.name.startswith("past_key_values."))
    build.node("Shape", ["z"], ["cache/rows"], start=0, end=1)
    tail = build.constant(np.array([config.inner_heads, 1, config.inner_head_dim], np.int64), "cache/tail")
    build.node("Concat", ["cache/rows", tail], ["cache/shape"], axis=0)
    zero = numpy_helper.from_array(np.zeros(1, helper.tensor_dtype_to_np_dtype(cache)))
    build.node("ConstantOfShape", ["cache/shape"], ["cache/empty"], value=zero)
    build.node("Shape", ["z"], ["feature/rows"], start=0, end=1)
    build.node("Concat", ["feature/rows", build.constant(np.array([1], np.int64), "one")], ["feature/shape"], axis=0)
    build.node("ConstantOfShape", ["feature/shape"], ["feature/none"], value=numpy_helper.from_array(np.zeros(1, np.float32)))
    return "feature/none"


def _joined(build: GraphComposer, rows: Sequence[str], name: str) -> str:
    """The cache of so many positions."""
    if len(rows) > 1:
        build.node("Concat", rows, [name], axis=2)
        return name
    return rows[0] if rows else "cache/empty"


def _draw_inputs(build: GraphComposer, prefix: str, position: int, out: Mapping[str, str], guided: bool) -> dict[str, str]:
    """The drawing part's inputs at a position: the mixtures that the step gave, its uniforms, the settings."""
    inputs = {name: name for name in (SETTINGS if guided else SETTINGS[1:])} | {"uniforms": f"{prefix}uniforms"}
    scalar = build.constant(np.array(position, np.int64), f"position.{position}.scalar")
    build.node("Gather", ["uniforms", scalar], [inputs["uniforms"]], axis=1)
    for name in MIXTURE:
        inputs[name] = out[name]
        if guided:
            inputs[name], inputs[f"{name}_uncond"] = f"{prefix}{name}.cond", f"{prefix}{name}.uncond"
            build.node("Split", [out[name]], [inputs[name], inputs[f"{name}_uncond"]], axis=0, num_outputs=2)
    return inputs
