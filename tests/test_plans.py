"""What TensorRT-RTX makes of an outer step in float16: kernels and fusions, read from engines that are built here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

from tiny_bundles import TINY

from arinar.config import ArinarConfig
from arinar.export import gmm_head
from arinar.export.builder import run_child
from arinar.export.engine import axis_ranges, profiles
from arinar.export.graphs import graph_specs
from arinar.export.steps import half_precision
from arinar.export.trace import WeightStore, export_graph
from arinar.measure.plans import ATTENTION, Kernel, attention_sums, plan_kernels
from arinar.model import Arinar, initialize
from arinar.runtime.bundle import GraphInfo
from arinar.vae import AutoencoderKL

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
#: Heads as wide as the published model's: what is fused depends on it.
CONFIG = TINY.replace(encoder_width=128, decoder_width=128, encoder_depth=1, decoder_depth=2)
PER_BLOCK = 7


def engine(config: ArinarConfig, folder: Path) -> Path:
    """The engine of a half precision outer step."""
    model = half_precision(initialize(Arinar(config), 0).eval(), gmm_head.float32_islands)
    spec = graph_specs(model, AutoencoderKL().eval())["outer_step"]
    store = WeightStore(folder / "weights.data")
    path = export_graph(spec, folder, store)
    store.close()
    info = GraphInfo("outer_step", path.name, 20, spec.inputs, spec.outputs, "outer")
    job: dict[str, Any] = {
        "what": "build",
        "module": "tensorrt_rtx",
        "onnx": str(path),
        "profiles": profiles(info, axis_ranges(config, (1, 2, 4), 4, 8, least_visible=1))[:1],
        "targets": [],
        "flags": {"workspace": None, "optimization_level": None, "tf32": False, "version_compatible": False},
        "timing_cache": None,
        "out": str(folder / "outer_step.engine"),
    }
    run_child(job, 600)
    return folder / "outer_step.engine"


@pytest.mark.requires_rtx
@needs_rtx
def test_attention_and_norms_are_fused_across_the_casts(tmp_path: Path, torch_onnx_export: object) -> None:
    path = engine(CONFIG, tmp_path)
    (kernels,) = plan_kernels(path)
    blocks = CONFIG.encoder_depth + CONFIG.decoder_depth
    attention = [kernel for kernel in kernels if ATTENTION in kernel.name]
    assert len(attention) == blocks
    for kernel in attention:  # both products and the softmax between casts
        assert any("softmax" in node for node in kernel.nodes) and sum("matmul" in node for node in kernel.nodes) == 2
    assert attention_sums(path)[::2] == ["fp32"] * blocks  # queries by keys: what the casts are for
    assert not any("softmax" in node for kernel in kernels if kernel not in attention for node in kernel.nodes)
    # A norm, the sum before it and the casts around it are one kernel, but where one is cut into statistics and use.
    norms = [kernel for kernel in kernels if any("layer_norm" in node for node in kernel.nodes)]
    assert len(norms) <= 2 * blocks + 8
    assert len(kernels) <= 37 + PER_BLOCK * (blocks - 3)


def test_operations_of_a_plan(tmp_path: Path) -> None:
    """The text as it stands in an engine, with what is not launched around it."""

    def line(kind: str, name: str, *nodes: str) -> str:
        return f'\n  {kind}={{ name={name} stream=0 layers="{"".join(f"[ONNX Layer: {node}]" for node in nodes)}" }}'

    text = "\x00\x01\nmain {" + line("fully_connected", '"fc1"', "node_fc1") + line("function", "__myl_AddNorm", "add", "norm")
    text += line("runtime_fusion", "__myl_FcGelu", "gemm", "gelu") + line("mul", '"sizes"', "shape")
    text += "}\x00"
    fallback = "\nmain {" + line("fully_connected", '"gemm"', "gemm") + line("div", '"gelu"', "gelu") + "}\x00"
    path = tmp_path / "plan"
    path.write_bytes((text + fallback).encode() + b"\xff\xfe" + (text + fallback).encode())  # two profiles
    first, second = plan_kernels(path)
    assert (
        first
        == second
        == [
            Kernel("fully_connected", "fc1", frozenset({"node_fc1"})),
            Kernel("function", "__myl_AddNorm", frozenset({"add", "norm"})),
            Kernel("runtime_fusion", "__myl_FcGelu", frozenset({"gemm", "gelu"})),
        ]
    )
    assert attention_sums(path) == []
    path.write_bytes(b"an engine that tells nothing")
    assert plan_kernels(path) == []
