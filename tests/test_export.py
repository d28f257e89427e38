"""Exporting: deterministic, all or nothing, and honest about what it checks."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from tiny_bundles import TINY_VAE

from arinar.config import ArinarConfig, VaeConfig
from arinar.export.bundle import export_bundle
from arinar.export.graphs import graph_specs
from arinar.export.spec import ExportError, GraphSpec
from arinar.export.trace import WeightStore, export_graph, fix_shapes, validate_graph
from arinar.model import Arinar, initialize
from arinar.runtime import BundleError, Pipeline
from arinar.runtime.bundle import TensorInfo
from arinar.vae import AutoencoderKL

TINY = ArinarConfig(
    img_size=16,
    vae_stride=4,
    vae_embed_dim=4,
    num_classes=3,
    buffer_size=2,
    encoder_width=16,
    encoder_depth=1,
    encoder_heads=2,
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=2,
    inner_width=16,
    inner_depth=2,
    inner_heads=2,
    num_gaussians=2,
    default_num_iter=4,
)
TINY_CAUSAL = TINY.replace(outer="causal", encoder_depth=0, order=tuple(reversed(range(16))))


def tiny(config: ArinarConfig = TINY, seed: int = 0) -> tuple[Arinar, AutoencoderKL]:
    model = initialize(Arinar(config), seed).eval()
    torch.manual_seed(seed)
    return model, AutoencoderKL(TINY_VAE).eval()


@pytest.fixture(scope="module", params=[TINY, TINY_CAUSAL], ids=["masked", "causal"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "bundle"
    export_bundle(*tiny(request.param), out)
    return out


def test_two_inner_blocks_and_any_order_generate_like_the_reference(exported: Path) -> None:
    from arinar.runtime import Noise
    from arinar.sampler import sample

    pipeline = Pipeline.load(exported)
    model, _ = tiny(pipeline.config)
    noise = Noise.from_seed(0, range(3), pipeline.config)
    for scale in (1.0, 3.0):
        want = sample(model, torch.tensor([0, 1, 2]), guidance_scale=scale, noise=noise).numpy()
        for inner in ("fused", "stepwise"):
            out = Pipeline.load(exported, inner=inner).generate([0, 1, 2], guidance_scale=scale, noise=noise)
            # Random weights give wild mixtures: single draws in a tail may differ visibly, most may not.
            assert np.median(np.abs(out.tokens - want)) < 1e-4
            assert (np.abs(out.tokens - want) < 1e-2).mean() > 0.9


def test_graphs_are_clean_and_dynamic(exported: Path) -> None:
    for path in sorted((exported / "graphs" / "fp32").glob("*.onnx")):
        text = path.read_bytes()
        for private in (b"/home", b"site-packages", b"steps.py", b"stack_trace", b"torch"):
            assert private not in text, f"{path.name} holds {private!r}"
        graph = onnx.load(path, load_external_data=False).graph
        assert graph.name == path.name.split(".")[0]
        for value in graph.input if graph.name != "outer_first" else ():  # one class at a time
            if value.name not in ("position", "temperature", "guidance_scale"):
                assert any(dim.dim_param for dim in value.type.tensor_type.shape.dim), f"{path.name}: {value.name}"


def test_export_is_deterministic(tmp_path: Path, torch_onnx_export: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace that this run may have taken earlier, or another process, and one that is taken here."""
    hashes = []
    for run in range(2):
        if run == 1:
            monkeypatch.setattr(torch.onnx, "export", torch_onnx_export)
        folder = tmp_path / str(run)
        folder.mkdir()
        store = WeightStore(folder / "weights.data")
        specs = graph_specs(*tiny())
        for name in ("outer_step", "inner_step"):
            export_graph(specs[name], folder, store)
        store.close()
        hashes.append([hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())])
    assert hashes[0] == hashes[1] and len(hashes[0]) == 3


def test_a_weight_of_several_graphs_is_stored_once(exported: Path) -> None:
    folder = exported / "graphs" / "fp32"
    stored = sum(path.stat().st_size for path in folder.glob("*.data"))
    entries: dict[tuple[str, str], int] = {}
    for path in folder.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            info = {e.key: e.value for e in tensor.external_data}
            if info:
                entries[info["location"], info["offset"]] = int(info["length"])
                assert int(info["offset"]) + int(info["length"]) <= (folder / info["location"]).stat().st_size
    assert sum(entries.values()) <= stored < sum(entries.values()) + 64 * (len(entries) + 1)


@pytest.mark.parametrize("name", ["vae_decoder", "vae_encoder"])
def test_group_norms_know_their_sizes(exported: Path, name: str) -> None:
    graph = onnx.load(exported / "graphs" / "fp32" / f"{name}.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    constants = {tensor.name: tensor for tensor in graph.initializer}
    assert "Shape" not in kinds and kinds.count("InstanceNormalization") > 4
    restored = [n for n in graph.node if n.op_type == "Reshape" and n.input[1].startswith("shape_0_")]
    assert len(restored) >= kinds.count("InstanceNormalization")
    for node in restored:
        first, *rest = onnx.numpy_helper.to_array(constants[node.input[1]]).tolist()
        assert first == 0 and all(size > 0 for size in rest) and not node.attribute


def _reshaped(to: str) -> onnx.ModelProto:
    """x (N, 6) in the shape of another tensor."""

    def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    inputs = [value("x", "N", 6), value("of_n", "N", 2, 3), value("of_m", "M", 2, 3), value("unknown", "N", "A", 3)]
    nodes = [
        helper.make_node("Shape", [to], ["shape"]),
        helper.make_node("Reshape", ["x", "shape"], ["y"], allowzero=1),
    ]
    graph = helper.make_graph(nodes, "reshaped", inputs, [value("y", "a", "b", 3)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_a_shape_becomes_constant_only_where_it_is_known() -> None:
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    model = _reshaped("of_n")
    assert fix_shapes(model) == 1 and [node.op_type for node in model.graph.node] == ["Reshape"]
    assert ReferenceEvaluator(model).run(None, {"x": x})[0].shape == (2, 2, 3)
    for other in ("of_m", "unknown"):
        model = _reshaped(other)
        before = model.SerializeToString()
        assert fix_shapes(model) == 0 and model.SerializeToString() == before


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import arinar.export.bundle as module

    def interrupted(*args: object, **kwargs: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "export_graph", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(*tiny(), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_keeps_the_old_bundle(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import arinar.export.bundle as module

    def broken(*args: object, **kwargs: object) -> Path:
        raise ExportError("no")

    before = (exported / "manifest.json").read_bytes()
    monkeypatch.setattr(module, "export_graph", broken)
    with pytest.raises(ExportError):
        export_bundle(*tiny(Pipeline.load(exported).config), exported, overwrite=True)
    assert (exported / "manifest.json").read_bytes() == before
    assert sorted(p.name for p in exported.parent.iterdir()) == ["bundle"]
    Pipeline.load(exported)


def test_output_folder_rules(exported: Path, tmp_path: Path) -> None:
    same = tiny(Pipeline.load(exported).config)
    with pytest.raises(BundleError, match="already holds fp32 graphs of this model; pass --overwrite"):
        export_bundle(*same, exported)
    with pytest.raises(BundleError, match="is a bundle of another model"):
        export_bundle(*tiny(TINY.replace(num_classes=5)), exported)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="is not a readable bundle.*choose another output folder"):
        export_bundle(*same, tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    blocker = tmp_path / "file"
    blocker.write_text("x")
    with pytest.raises(BundleError, match="cannot write to"):
        export_bundle(*same, blocker / "bundle")


def test_bad_arguments(tmp_path: Path) -> None:
    model, vae = tiny()
    with pytest.raises(ValueError, match="precision is 'fp12'"):
        export_bundle(model, vae, tmp_path / "b", precision="fp12")
    with pytest.raises(ValueError, match="opset is 9; choose one of 20"):
        export_bundle(model, vae, tmp_path / "b", opset=9)
    with pytest.raises(ValueError, match="the VAE's stride is 2; the model expects 4"):
        other = VaeConfig(embed_dim=4, channels=8, channel_multipliers=(1, 1), encoder_attention_levels=(), norm_groups=4)
        export_bundle(model, AutoencoderKL(other), tmp_path / "b")


class _Double(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def _spec(factor: float, shape: tuple[int | str, ...] = ("N", 4)) -> GraphSpec:
    info = TensorInfo("x", "float32", shape)
    return GraphSpec("double", _Double(factor), (info,), (TensorInfo("y", "float32", shape),), {}, ({"N": 1}, {"N": 5}), "head")


def test_validation_names_graph_output_and_error(tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "weights.data")
    path = export_graph(_spec(2.0), tmp_path, store)
    assert validate_graph(path, _spec(2.0)) == 0
    with pytest.raises(ExportError, match=r"graph 'double', output 'y' at \{'N': 1\}: ONNX Runtime differs from PyTorch"):
        validate_graph(path, _spec(2.5))


def test_an_axis_that_came_out_fixed_is_an_error(tmp_path: Path) -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(3, 4) + x.sum()

    spec = _spec(1.0)
    broken = GraphSpec(spec.name, Fixed(), spec.inputs, spec.outputs, {}, spec.sizes, "head")
    with pytest.raises(ExportError, match=r"axis 0 \(N\) of output 'y' came out fixed at 3"):
        export_graph(broken, tmp_path, WeightStore(tmp_path / "weights.data"))


@pytest.mark.slow
def test_full_size_base_exports_and_runs(tmp_path: Path) -> None:
    from arinar.config import PRESETS

    model = initialize(Arinar(PRESETS["base"])).eval()
    vae = AutoencoderKL().eval()
    manifest = export_bundle(model, vae, tmp_path / "bundle")
    assert all(graph.max_abs_err is not None for graph in manifest.graphs["fp32"].values())
    out = Pipeline.load(tmp_path / "bundle").generate([207], num_iter=4)
    assert out.images[0].size == (256, 256)
