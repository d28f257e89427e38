"""Which kernels an engine of TensorRT-RTX launches, read from its file: nothing is run, and no GPU is needed.

Such a file holds the program of its fused part as text, one for each profile, an operation a line: products
(``fully_connected``), kernels that were generated for it (``function``), products fused with what follows once they are
compiled (``runtime_fusion``, each with a program of its own for a machine where that fails), and arithmetic of sizes. The
first three launch. It is no documented format: where nothing is found, nothing can be said.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PROGRAM = b"\nmain {"
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


def plan_kernels(path: Path) -> list[list[Kernel]]:
    """The launches of an engine's file, in their order, for each profile and variant of it (of a graph that is fused as a
    whole); none where the file does not tell."""
    programs = [_kernels(text) for text in path.read_bytes().split(PROGRAM)[1:]]
    fused = [kernel.nodes for program in programs for kernel in program if kernel.kind == "runtime_fusion"]
    # What a fusion falls back to is not launched beside it.
    instead = [all(any(kernel.nodes <= nodes for nodes in fused) for kernel in program) for program in programs]
    return [program for program, spare in zip(programs, instead, strict=True) if program and not spare]


def _kernels(text: bytes) -> list[Kernel]:
    return [
        Kernel(kind.decode(), name.decode(errors="replace"), frozenset(LAYER.findall(layers.decode(errors="replace"))))
        for kind, name, layers in OPERATION.findall(text)
    ]


def attention_sums(path: Path) -> list[str]:
    """In what the products of each fused attention sum, "fp32" or "fp16", queries by keys first; from the kernels' source."""
    return [kind.decode() for kind in re.findall(rb"fmha::\w+_hmma_(fp\d+)_traits", path.read_bytes())]


__all__ = ["ATTENTION", "Kernel", "attention_sums", "plan_kernels"]
