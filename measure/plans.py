"""Which kernels an engine of TensorRT-RTX launches, read from its file: nothing is run, and no GPU is needed.

Such a file holds the program of its fused part as text, an operation a line: products (``fully_connected``), kernels that
were generated for it (``function``), products fused with what follows once they are compiled (``runtime_fusion``, with the
operations for a machine where that fails at the end), and arithmetic of sizes. The first three launch. It is no documented
format: where nothing is found, nothing can be said.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

LAUNCHING = ("fully_connected", "function", "runtime_fusion")
OPERATION = re.compile(rb'\n  (%s)=\{ name="?([^" ]+)[^\n]*?layers="([^"\n]*)"' % "|".join(LAUNCHING).encode())
LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
#: In the name of a kernel of fused attention.
ATTENTION = "_mha_"


@dataclass(frozen=True)
class Kernel:
    """One launch: its kind (one of LAUNCHING), its name, the names of the graph's nodes that it computes."""

    kind: str
    name: str
    nodes: frozenset[str]


def plan_kernels(path: Path) -> list[Kernel]:
    """The launches of an engine's file, in their order; none where the file does not tell."""
    found = [
        Kernel(kind.decode(), name.decode(errors="replace"), frozenset(LAYER.findall(layers.decode(errors="replace"))))
        for kind, name, layers in OPERATION.findall(path.read_bytes())
    ]
    fused = [kernel.nodes for kernel in found if kernel.kind == "runtime_fusion"]
    # What a fusion falls back to is not launched beside it.
    return [k for k in found if k.kind != "fully_connected" or not any(k.nodes and k.nodes <= nodes for nodes in fused)]


def attention_sums(path: Path) -> list[str]:
    """In what the products of each fused attention sum, "fp32" or "fp16", queries by keys first; from the kernels' source."""
    return [kind.decode() for kind in re.findall(rb"fmha::\w+_hmma_(fp\d+)_traits", path.read_bytes())]


__all__ = ["ATTENTION", "Kernel", "attention_sums", "plan_kernels"]
