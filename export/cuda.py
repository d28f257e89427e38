"""The form of a masked model's step that ONNX Runtime's CUDA kernels run in the fewest launches: nine for a block.

A product for queries, keys and values, their bias with the split into heads, fused attention (all three one operator), then
each of the other products followed by one kernel: bias, skip connection and norm; bias and GELU. Written for float16, where
the fused attention is flash attention; the norms' kernels keep statistics in float32 by themselves. Operators of the domain
com.microsoft: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

The plain form is what TensorRT builds. Both are traced from the same sub-modules and proven against the same float32 module.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor, nn

from arinar.head import wide
from arinar.outer import Attention, Block, MaskedOuter

from .onnx_edit import blank_unread_outputs
from .steps import MaskedStep, attend, class_vectors, head_scale, split_heads
from .trace import write_model

DOMAIN = "com.microsoft"


class MaskedStepCuda(MaskedStep):
    """As `MaskedStep`, in operators of ONNX Runtime where it is exported. Tokens of all rows are one matrix (N * S, C).

    Hidden positions' queries, keys and values in the first decoder block are computed here: one product for all rows is
    fewer launches than a table for some.
    """

    def __init__(self, outer: MaskedOuter) -> None:
        super().__init__(outer)
        self.dtype = self.encoder_pos.dtype
        # Its bias goes with the positions, which are added next.
        bias = wide(outer.decoder_embed.bias)
        self.known_pos_buffer = self._table(wide(self.decoder_pos_buffer) + bias)
        self.known_pos = self._table(wide(self.decoder_pos) + bias)
        self.wide_class_table = wide(self.class_table)

    def _table(self, values: Tensor) -> Tensor:
        return values.to(self.dtype).detach()

    def forward(
        self,
        visible_tokens: Tensor,
        visible_positions: Tensor,
        target_positions: Tensor,
        hidden_positions: Tensor,
        labels: Tensor,
        mixed_labels: Tensor | None = None,
        mixed_weights: Tensor | None = None,
    ) -> Tensor:
        """As `MaskedStep.forward`."""
        outer = self.outer
        branches, batch = labels.shape
        predicted, rows = target_positions.shape[0], branches * batch

        tokens = product(visible_tokens.to(self.dtype).flatten(0, 1), outer.z_proj.weight)  # (VB, C)
        positions = F.embedding(visible_positions, self.encoder_pos).flatten(0, 1)
        visible, _ = skip_norm(tokens, positions, outer.z_proj.bias, outer.z_proj_ln)
        visible = self.per_branch(visible.unflatten(0, visible_positions.shape), branches, batch)  # (GB, V, C)
        prefix = class_vectors(self.wide_class_table, labels, mixed_labels, mixed_weights).to(self.dtype).flatten(0, 1)
        prefix = norm(prefix[:, None] + self.encoder_pos_buffer, outer.z_proj_ln)  # (GB, buffer, C)
        x = torch.cat([prefix, visible], 1).flatten(0, 1)  # (GB(buffer + V), C)
        encoded, _ = self.blocks(outer.encoder_blocks, x, rows, outer.encoder_norm)

        known = product(encoded, outer.decoder_embed.weight).unflatten(0, (rows, -1))  # (GB, buffer + V, C)
        seen = F.embedding(visible_positions, self.known_pos)  # (V, B, C)
        places = torch.cat([self.known_pos_buffer[:, None].expand(-1, batch, -1), seen])  # (buffer + V, B, C)
        known = known + self.per_branch(places, branches, batch)
        unknown = F.embedding(torch.cat([target_positions, hidden_positions]), self.unknown_table)
        x = torch.cat([self.per_branch(unknown, branches, batch), known], 1).flatten(0, 1)  # (GB S, C), targets first
        last = outer.decoder_blocks[-1]
        assert isinstance(last, Block)
        normed, x = self.blocks(outer.decoder_blocks[:-1], x, rows, last.norm1)
        z = self.predict(last, normed, x, rows, predicted)  # (GB P, C)
        z = z.unflatten(0, (branches, batch, predicted)).transpose(1, 2)  # (G, P, B, C)
        out: Tensor = wide((z + F.embedding(target_positions, self.target_pos)).flatten(0, 2))
        return out

    def blocks(self, modules: nn.ModuleList, x: Tensor, rows: int, after: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """x (N S, C) of N rows through blocks -> normed by what comes after them, and itself."""
        blocks = [module for module in modules if isinstance(module, Block)]
        norms = [*(block.norm1 for block in blocks), after]
        normed = norm(x, norms[0])
        for block, following in zip(blocks, norms[1:], strict=True):
            attended = self_attention(normed.unflatten(0, (rows, -1)), block.attn).flatten(0, 1)
            normed, x = self.rest(block, attended, x, following)
        return normed, x

    def predict(self, block: Block, normed: Tensor, x: Tensor, rows: int, predicted: int) -> Tensor:
        """The last block, at the first P positions of each row: normed and x (N S, C) -> (N P, C), normed by the last norm."""
        attn, width = block.attn, x.shape[-1]
        first = normed.unflatten(0, (rows, -1))[:, :predicted].flatten(0, 1)
        of_targets = x.unflatten(0, (rows, -1))[:, :predicted].flatten(0, 1)
        weights = attn.qkv.weight.split(width)
        q, k, v = (product(part, weight) for part, weight in zip((first, normed, normed), weights, strict=True))
        parts = [part.unflatten(0, (rows, -1)) for part in (q, k, v)]
        attended = cross_attention(parts, attn).flatten(0, 1)
        return self.rest(block, attended, of_targets, self.outer.decoder_norm)[0]

    def rest(self, block: Block, attended: Tensor, x: Tensor, following: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """What follows attention, and the norm of what comes next: attended and x (rows, C) -> normed, x."""
        attn, mlp = block.attn, block.mlp
        normed, x = skip_norm(product(attended, attn.proj.weight), x, attn.proj.bias, block.norm2)
        hidden = bias_gelu(product(normed, mlp.fc1.weight), mlp.fc1.bias)
        return skip_norm(product(hidden, mlp.fc2.weight), x, mlp.fc2.bias, following)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, K), weight (C, K) -> (rows, C). (A Gemm takes the weight as it is stored; its bias would be another launch.)"""
    if torch.compiler.is_exporting():
        shape = (x.shape[0], weight.shape[0])
        out: Tensor = torch.onnx.ops.symbolic("Gemm", (x, weight), {"transB": 1}, dtype=x.dtype, shape=shape)
        return out
    return F.linear(x, weight)


def norm(x: Tensor, by: nn.LayerNorm) -> Tensor:
    """LayerNorm in the tensor's own dtype; its statistics are in float32 all the same (ONNX's stash_type)."""
    return F.layer_norm(x, by.normalized_shape, by.weight.to(x.dtype), by.bias.to(x.dtype), by.eps)


def skip_norm(x: Tensor, skip: Tensor, bias: Tensor, by: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """x + skip + bias, each (rows, C) but for the bias (C,) -> its LayerNorm, and the sum itself."""
    if torch.compiler.is_exporting():
        gamma, beta = by.weight.to(x.dtype), by.bias.to(x.dtype)
        normed, _, _, total = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::SkipLayerNormalization",
            (x, skip, gamma, beta, bias),
            {"epsilon": by.eps},
            dtypes=(x.dtype, torch.float32, torch.float32, x.dtype),
            shapes=(x.shape, (x.shape[0], 1), (x.shape[0], 1), x.shape),
            version=1,
        )
        return normed, total
    total = x + skip + bias
    return norm(total, by), total


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """x (rows, C), bias (C,) -> exact GELU of the sum."""
    if torch.compiler.is_exporting():
        out: Tensor = torch.onnx.ops.symbolic(f"{DOMAIN}::BiasGelu", (x, bias), dtype=x.dtype, shape=x.shape, version=1)
        return out
    return F.gelu(x + bias)


def self_attention(x: Tensor, attn: Attention) -> Tensor:
    """x (N, S, C) -> (N, S, C): queries, keys, values and attention, without the output projection.

    (The operator takes its weight the other way round: `finish_cuda_form` turns it, where the exporter would store a copy.)
    """
    if torch.compiler.is_exporting():
        out: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Attention",
            (x, attn.qkv.weight, attn.qkv.bias),
            {"num_heads": attn.heads, "scale": head_scale(attn)},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        return out
    return _attended(attn, *split_heads(attn, attn.qkv(x)))


def cross_attention(parts: list[Tensor], attn: Attention) -> Tensor:
    """Queries (N, P, C), keys and values (N, S, C), all without bias -> (N, P, C)."""
    if torch.compiler.is_exporting():
        out: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::MultiHeadAttention",
            (*parts, attn.qkv.bias),
            {"num_heads": attn.heads, "scale": head_scale(attn)},
            dtype=parts[0].dtype,
            shape=parts[0].shape,
            version=1,
        )
        return out
    biases = attn.qkv.bias.split(parts[0].shape[-1])
    return _attended(attn, *(split_heads(attn, part + bias)[0] for part, bias in zip(parts, biases, strict=True)))


def _attended(attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, head_scale(attn)).transpose(1, 2).flatten(2)


def cuda_path(path: Path) -> Path:
    """Where the CUDA form of a graph's file lies."""
    return path.with_name(f"{path.stem}.cuda.onnx")


def finish_cuda_form(path: Path) -> None:
    """Name a traced form as its graph, turn attention's weights, and leave out the outputs that nobody reads: kernels would
    have to make them."""
    model = onnx.load(path, load_external_data=False)
    model.graph.name = path.name.split(".")[0]
    for node in [node for node in model.graph.node if node.domain == DOMAIN and node.op_type == "Attention"]:
        turned = f"{node.input[1]}/turned"
        before = list(model.graph.node).index(node)
        model.graph.node.insert(before, helper.make_node("Transpose", [node.input[1]], [turned], name=turned, perm=[1, 0]))
        node.input[1] = turned
    blank_unread_outputs(model)
    write_model(model, path)


__all__ = ["MaskedStepCuda", "cuda_path", "finish_cuda_form"]
