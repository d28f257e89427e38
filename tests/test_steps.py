"""The savings of the step modules are exact: in float64 they agree with the full network to rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array, to_array
from onnx.reference import ReferenceEvaluator
from test_model import CAUSAL, MASKED, random_model, random_tokens

from arinar.config import ArinarConfig
from arinar.export.cpu import cpu_form, write_cpu_form
from arinar.export.gmm_head import InnerCondition, InnerStep
from arinar.export.graphs import graph_specs
from arinar.export.onnx_edit import split_products
from arinar.export.steps import CausalPrefill, CausalStep, MaskedStep, cache_slots
from arinar.export.trace import WeightStore, export_graph, validate_graph
from arinar.model import Arinar, initialize
from arinar.runtime import Pipeline
from arinar.runtime.backends.cpu import LAUNCH_POSITIONS, CpuBackend, _ranges
from arinar.runtime.first_step import KEPT_LABELS
from arinar.runtime.outer import MaskedOuter
from arinar.vae import AutoencoderKL

EXACT = 1e-12
ONE_BLOCK = MASKED.replace(decoder_depth=1)


@pytest.mark.parametrize("config", [MASKED, ONE_BLOCK], ids=["two decoder blocks", "one"])
@pytest.mark.parametrize("visible", [0, 1, 9, 15])
@pytest.mark.parametrize("branches", [1, 2])
@torch.no_grad()
def test_masked_step_is_the_full_network_at_the_predicted_positions(config: ArinarConfig, visible: int, branches: int) -> None:
    model, batch, length = random_model(config), 3, config.seq_len
    tokens = random_tokens(config, batch)
    order = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(i)) for i in range(batch)], 1)
    predicted = max(1, (length - visible) // 2)
    targets, hidden = order[visible : visible + predicted], order[visible + predicted :]
    mask = torch.ones(batch, length, dtype=torch.float64).scatter(1, order[:visible].T, 0.0)
    labels = torch.stack([torch.arange(batch), torch.full((batch,), -1)])[:branches]
    full = torch.stack([model.condition(tokens, mask, row) for row in labels])  # (G, B, L, C)
    want = full.transpose(1, 2)[:, targets, torch.arange(batch)]  # (G, P, B, C)

    by_position = tokens.transpose(0, 1)
    seen = by_position[order[:visible], torch.arange(batch)]  # (V, B, D)
    z = MaskedStep(model)(seen, order[:visible], targets, hidden, labels)
    assert z.dtype == torch.float64
    assert (z.reshape(want.shape) - want).abs().max() < EXACT


@torch.no_grad()
def test_causal_steps_are_the_full_sequence() -> None:
    model, batch = random_model(CAUSAL), 2
    config, tokens = model.config, random_tokens(CAUSAL, batch)
    labels = torch.tensor([1, -1])
    want = model.condition(tokens, None, labels)  # type: ignore[arg-type]
    heads, width, buffer = config.decoder_heads, config.decoder_width, config.buffer_size
    shape = (batch, heads, cache_slots(config), width // heads)
    cache = [torch.zeros(shape, dtype=torch.float64) for _ in range(2 * config.decoder_depth)]
    z, *rows = CausalPrefill(model)(labels)
    assert (z - want[:, config.generation_order[0]]).abs().max() < EXACT
    for past, new in zip(cache, rows, strict=True):
        past[:, :, :buffer] = new
    step = CausalStep(model)
    for index, (known, target) in enumerate(zip(config.generation_order, config.generation_order[1:], strict=False)):
        z, *rows = step(tokens[:, known], torch.arange(batch), torch.tensor([index]), *cache)
        assert (z - want[:, target]).abs().max() < EXACT
        for past, new in zip(cache, rows, strict=True):
            past[:, :, buffer + index : buffer + index + 1] = new


@torch.no_grad()
def test_inner_steps_are_the_full_sequence() -> None:
    model = random_model(MASKED)
    config, rows = model.config, 5
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(rows, config.z_width, generator=generator, dtype=torch.float64)
    features = torch.randn(rows, config.token_dim, generator=generator, dtype=torch.float64)
    want = model.mixture(z, features)
    start, modulation = InnerCondition(model.arhead)(z)
    shape = (rows, config.inner_heads, config.token_dim, config.inner_width // config.inner_heads)
    cache = [torch.zeros(shape, dtype=torch.float64) for _ in range(2 * config.inner_depth)]
    step, previous = InnerStep(model.arhead), torch.zeros(rows, 1, dtype=torch.float64)
    for position in range(config.token_dim):
        (*mixture,) = step(previous, torch.tensor([position]), start, modulation, *cache)
        for have, full in zip(mixture[:3], want, strict=True):
            assert (have - full[:, position]).abs().max() < EXACT
        for past, new in zip(cache, mixture[3:], strict=True):
            past[:, :, position : position + 1] = new
        previous = features[:, position : position + 1]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The masked step of a random model, as a graph."""
    folder = tmp_path_factory.mktemp("graph")
    store = WeightStore(folder / "weights.data")
    path = export_graph(spec(), folder, store)
    store.close()
    return path


def spec():  # type: ignore[no-untyped-def]
    from test_export import TINY_VAE

    config = MASKED.replace(vae_embed_dim=TINY_VAE.embed_dim)
    return graph_specs(initialize(Arinar(config), 0).eval(), AutoencoderKL(TINY_VAE).eval())["outer_step"]


def test_the_cpu_form_has_one_operator_per_attention_and_the_same_weights(graph: Path) -> None:
    path = write_cpu_form(graph)
    assert path is not None and path.name == "outer_step.cpu.onnx"
    plain, form = (onnx.load(p, load_external_data=False) for p in (graph, path))
    blocks = MASKED.encoder_depth + MASKED.decoder_depth
    kinds = [node.op_type for node in form.graph.node]
    assert kinds.count("Attention") == blocks and "Softmax" not in kinds
    assert [node.op_type for node in plain.graph.node].count("Softmax") == blocks
    # Only the first decoder block, whose queries, keys and values come from two sources, and the last still split.
    assert len([node for node in form.graph.node if node.op_type == "Gemm" and "/" in node.name]) == 3 * (blocks - 2)
    stored = {t.name: t for t in plain.graph.initializer}
    for tensor in form.graph.initializer:
        whole, _, index = tensor.name.rpartition("/")
        if tensor.name in stored:
            assert tensor.SerializeToString() == stored[tensor.name].SerializeToString()
        elif whole.endswith("attn.qkv.weight"):
            assert tensor.external_data[0].value == stored[whole].external_data[0].value
            rows = np.split(to_array(stored[whole], str(graph.parent)), 3)[int(index)]
            np.testing.assert_array_equal(to_array(tensor, str(graph.parent)), rows)
        else:
            assert np.prod(tensor.dims) <= MASKED.encoder_width  # part of a bias, or a number of columns
    assert validate_graph(path, spec()) < 1e-5  # at every shape that the plain form is checked at, nothing visible included


def test_a_product_is_replaced_by_its_parts_only_where_nothing_else_needs_it() -> None:
    def model(*, sizes: list[int] | None = None, also_read: bool = False) -> onnx.ModelProto:
        rng = np.random.default_rng(0)
        weight, bias = rng.standard_normal((12, 8), np.float32), rng.standard_normal(12, np.float32)
        constants = {"w": weight, "b": bias, "columns": np.array([12])} | ({"sizes": np.array(sizes)} if sizes else {})
        outputs = ["first", "second", "third"]
        split = {} if sizes else {"num_outputs": 3}
        nodes = [
            helper.make_node("Concat", ["rows", "positions", "columns"], ["shape"], "shape", axis=0),
            helper.make_node("Gemm", ["x", "w", "b"], ["product"], "product", transB=1),
            helper.make_node("Reshape", ["product", "shape"], ["shaped"], "shaped"),
            helper.make_node("Split", ["shaped", *(["sizes"] if sizes else [])], outputs, "split", axis=2, **split),
        ]
        inputs = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8]),
            *(helper.make_tensor_value_info(name, TensorProto.INT64, [1]) for name in ("rows", "positions")),
        ]
        made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["A", "S", 4]) for name in outputs]
        if also_read:
            made.append(helper.make_tensor_value_info("product", TensorProto.FLOAT, ["N", 12]))
        graph = helper.make_graph(nodes, "g", inputs, made, [from_array(value, name) for name, value in constants.items()])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    x = np.random.default_rng(1).standard_normal((6, 8), np.float32)
    feed = {"x": x, "rows": np.array([2]), "positions": np.array([3])}
    parts = model()
    assert split_products(parts) == {"product": ["product/0", "product/1", "product/2"]}
    onnx.checker.check_model(parts, full_check=True)
    assert [node.op_type for node in parts.graph.node].count("Gemm") == 3
    want, got = (ReferenceEvaluator(m).run(None, feed) for m in (model(), parts))
    for a, b in zip(want, got, strict=True):
        assert a.shape == (2, 3, 4)
        np.testing.assert_allclose(a, b, rtol=1e-6)
    for stays in (model(sizes=[4, 6, 2]), model(also_read=True)):
        before = stays.SerializeToString()
        assert not split_products(stays) and stays.SerializeToString() == before


def test_what_is_not_attention_stays_as_it_is(graph: Path) -> None:
    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "Mul":
            node.op_type = "Div"  # another function of the scores
    assert cpu_form(model) is None


def test_the_first_step_is_kept_per_label(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, plain = Pipeline.load(digits_bundle), Pipeline.load(digits_bundle)
    first, other = kept.loop.outer, plain.loop.outer
    assert isinstance(first, MaskedOuter) and isinstance(other, MaskedOuter)
    other.keep_first_step = False
    for labels in ([3], [3, 3, 8], [8, 1]):
        ours, theirs = (p.generate(labels, num_iter=6, seed=2).tokens for p in (kept, plain))
        assert np.abs(ours - theirs).max() < 1e-4
    launched: list[str] = []
    launch = kept.backend.launch
    monkeypatch.setattr(kept.backend, "launch", lambda graph, *others: (launched.append(graph), launch(graph, *others))[1])
    kept.generate([1, 3, 8, 8], num_iter=1, guidance_scale=2.0)
    assert launched[0] == "inner_token_guided"  # nothing of the first step is computed again
    assert {label for label, *_ in first.first.kept} == {-1, 1, 3, 8} and len(first.first.kept) == 4
    some = next(iter(first.first.kept.values()))
    first.first.kept = {(label, (), ()): some for label in range(100, 100 + KEPT_LABELS)}
    kept.generate([5], num_iter=1, guidance_scale=2.0)
    assert len(first.first.kept) == KEPT_LABELS and {5, -1} <= {label for label, *_ in first.first.kept}


def test_how_rows_are_divided(digits_bundle: Path) -> None:
    def parts(threads: int, rows: int, graph: str = "outer_step") -> int:
        backend = Pipeline.load(digits_bundle, threads=threads, verify=False).backend
        assert isinstance(backend, CpuBackend)
        return backend._parts(backend._info(graph), rows)

    assert [parts(2, rows) for rows in (1, 2, 3, 4)] == [1, 2, 1, 2]
    assert [parts(4, rows) for rows in (2, 4, 6, 8, 17)] == [1, 4, 1, 4, 4]
    config = Pipeline.load(digits_bundle, verify=False).config
    fitting = LAUNCH_POSITIONS // (config.buffer_size + config.seq_len)
    assert parts(2, 10 * fitting) == 10 and parts(2, 3 * fitting + 1) == 4
    assert [parts(2, rows, "inner_token_guided") for rows in (1, 2, 3, 64)] == [1, 2, 2, 2]
    for count in range(1, 9):
        for wanted in range(1, 9):
            found = list(_ranges(count, wanted))
            assert [i for part in found for i in range(count)[part]] == list(range(count))
            assert len(found) == min(count, wanted) and all(part.stop > part.start for part in found)
