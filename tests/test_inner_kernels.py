"""The kernels of the inner model, run by the CPU from their CUDA source, against `arinar.inner` in float64."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cpu_kernels import SCHEDULES, requires_compiler
from fake_driver import FakeDriver, FakeNvrtc
from fake_gpu import FakeCudaRuntime
from tiny_bundles import TINY

from arinar.config import ArinarConfig
from arinar.export.gmm_head import LAW, InnerCondition, specs
from arinar.export.trace import WeightStore, export_graph
from arinar.inner import InnerAR
from arinar.measure.cost import kernel_feature
from arinar.runtime import Bundle, gmm
from arinar.runtime.backends.cuda import Cuda
from arinar.runtime.kernels import compiler
from arinar.runtime.kernels.compiler import KernelError
from arinar.runtime.kernels.inner import PRODUCTS, TokenKernels, fits
from arinar.runtime.kernels.source import FOLDER, Source, block_columns, inner_source
from arinar.runtime.kernels.weights import BlockWeights, InnerWeights, Linear, read_inner_weights

pytestmark = requires_compiler

Array = npt.NDArray[Any]
#: Several blocks, sizes that fill no chunk and no tile.
DEEP = TINY.replace(inner_width=48, inner_heads=3, inner_depth=2, inner_mlp_ratio=2.5, num_gaussians=3, vae_embed_dim=5)
#: Width and heads of the published models, a token of few features.
WIDE = TINY.replace(inner_width=768, inner_heads=16, num_gaussians=4, vae_embed_dim=2)
CONFIGS = {"deep": DEEP, "16 heads": WIDE, "4 heads": WIDE.replace(inner_heads=4)}


def random_inner(config: ArinarConfig, seed: int = 0) -> InnerAR:
    """Float64; weights of a size at which every part of a feature matters."""
    generator = torch.Generator().manual_seed(seed)
    inner = InnerAR(config).double().eval()
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            fan_in = parameter.shape[-1] if parameter.ndim == 2 else 4
            size = 0.3 if "head." in name else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size / fan_in**0.5)
    return inner


def weights_of(inner: InnerAR, dtype: str) -> InnerWeights:
    def array(tensor: torch.Tensor, kind: str = dtype) -> Array:
        return tensor.detach().numpy().astype(kind)

    def linear(module: Any, kind: str = dtype) -> Linear:
        return Linear(array(module.weight, kind), array(module.bias, kind))

    blocks = []
    for block in inner.blocks:
        attn: Any = block.attn
        qkv = Linear(array(attn.mat_qkv.weight), array(torch.cat([attn.q_bias, attn.zero_k_bias, attn.v_bias])))
        ffn: Any = block.ffn
        blocks.append(BlockWeights(qkv, linear(attn.proj), linear(ffn.fc1), linear(ffn.fc2)))
    places = array(inner.pos_embedding[0])
    return InnerWeights(linear(inner.input_proj), places, tuple(blocks), linear(inner.head, "float32"))


def rounded(inner: InnerAR, dtype: str) -> InnerAR:
    """The same model with the weights that the kernels get; the head's stay in float32."""
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            kind = torch.float32 if name.startswith("head.") or dtype == "float32" else torch.float16
            parameter.copy_(parameter.to(kind))
    return inner


def make(
    inner: InnerAR, weights: InnerWeights, z: Array, settings: dict[str, Array], schedule: int = 0, text: str = ""
) -> Array:
    """Tokens (M, D) by the kernels, of z (N, C)."""
    runtime = FakeCudaRuntime()
    runtime.driver_api = driver = FakeDriver(runtime)
    driver.schedule = schedule
    cuda, config, nvrtc = Cuda(runtime=runtime), inner.config, FakeNvrtc()
    source = inner_source(config, 1000, weights.dtype)
    code = compiler.compiled(source if not text else Edited(source.file, source.constants, text), "sm_90", nvrtc)
    kernels = TokenKernels(cuda, code, weights, config, most_rows=len(z) + 3)
    with torch.no_grad():
        given = InnerCondition(inner)(torch.from_numpy(z))

    def upload(array: Array, dtype: str = "float32") -> Any:
        buffer = cuda.empty(array.shape, dtype)
        cuda.upload(array, buffer)
        return buffer

    start, modulation = (upload(value.numpy(), weights.dtype) for value in given)
    uniforms = [upload(np.ascontiguousarray(column)[:, None]) for column in settings["uniforms"].T]
    guidance = upload(settings["guidance_scale"]) if "guidance_scale" in settings else None
    tokens = cuda.empty((len(settings["uniforms"]), config.token_dim), "float32")
    kernels(start, modulation, uniforms, guidance, upload(settings["temperature"]), cuda.empty((len(z), 1), "float32"), tokens)
    made = cuda.download(tokens)
    names = [launch.name.removeprefix("inner_") for launch in driver.launches]
    block = ["qkv", "attend", "project", "expand", "contract"]
    assert names == (block * config.inner_depth + ["draw"]) * config.token_dim
    return made


class Edited(Source):
    """A source whose file has another text."""

    def __init__(self, file: str, constants: str, content: str) -> None:
        super().__init__(file, constants)
        object.__setattr__(self, "content", content)

    @property
    def text(self) -> str:
        return f"{self.constants}{self.content}"  # type: ignore[attr-defined]


def reference(inner: InnerAR, z: Array, settings: dict[str, Array]) -> Array:
    """In float64, feature after feature."""
    guided, drawn = "guidance_scale" in settings, len(settings["uniforms"])
    feature, cache, tokens = None, None, []
    for position in range(inner.config.token_dim):
        with torch.no_grad():
            mixture, cache = inner.step(torch.from_numpy(z).double(), feature, position, cache)
        parts = [value.numpy() for value in mixture]
        value = gmm.sample(
            tuple(part[:drawn] for part in parts),
            tuple(part[drawn:] for part in parts) if guided else None,
            settings["uniforms"][:, position : position + 1].astype(np.float64),
            guidance_scale=settings["guidance_scale"].astype(np.float64) if guided else 1.0,
            temperature=settings["temperature"].astype(np.float64),
        )
        tokens.append(value)
        feature = torch.from_numpy(np.tile(value, 2 if guided else 1))[:, None]
    return np.stack(tokens, 1)


def inputs(config: ArinarConfig, drawn: int, *, guided: bool, seed: int = 0) -> tuple[Array, dict[str, Array]]:
    rng = np.random.default_rng(seed)
    settings = {"uniforms": rng.random((drawn, config.token_dim)), "temperature": rng.uniform(0.8, 1.2, drawn)}
    if guided:
        settings["guidance_scale"] = rng.uniform(1, 4, drawn)
    z = rng.standard_normal((drawn * (2 if guided else 1), config.z_width))
    return z, {name: value.astype(np.float32) for name, value in settings.items()}


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_the_models(name: str, dtype: str, guided: bool) -> None:
    """Rows that fill no tile; the conditioning in the kernels' type, as the graph gives it."""
    config = CONFIGS[name]
    if name != "deep" and not guided:
        pytest.skip("one of the two is enough of the wide ones")
    inner = rounded(random_inner(config), dtype)
    z, settings = inputs(config, 5, guided=guided)
    error = np.abs(make(inner, weights_of(inner, dtype), z, settings) - reference(inner, z, settings))
    print(f"{name}, {dtype}, guided {guided}: worst error {error.max():.2e}, feature {error.max(0).argmax()}")
    assert error.max() < {"float32": 2e-4, "float16": 5e-2}[dtype]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tokens_of_a_trained_model(demo_bundle: Any, tmp_path: Path, dtype: str) -> None:
    """Digits: the weights out of the bundle's graph, the published model's numbers of features and Gaussians."""
    from arinar.checkpoint import load_arinar

    head: Any = load_arinar("digits").head
    inner = rounded(head.double().eval(), dtype)
    weights = read_inner_weights(digits_step(demo_bundle), inner.config)
    if dtype == "float16":
        weights = weights_of(inner, dtype)
    z, settings = inputs(inner.config, 5, guided=True, seed=1)
    error = np.abs(make(inner, weights, z, settings) - reference(inner, z, settings))
    print(f"digits, {dtype}: worst error {error.max():.2e}, feature {error.max(0).argmax()}")
    assert error.max() < {"float32": 2e-4, "float16": 5e-2}[dtype]


def digits_step(demo_bundle: Any) -> Path:
    bundle = Bundle.open(demo_bundle("digits"))
    return bundle.graph_path(bundle.manifest.precision_graphs("fp32")["inner_step"])


def test_a_rows_bits_do_not_depend_on_the_others_nor_on_the_order_of_threads() -> None:
    inner = rounded(random_inner(DEEP), "float32")
    z, settings = inputs(DEEP, 9, guided=False)
    weights = weights_of(inner, "float32")
    together = make(inner, weights, z, settings)
    for schedule in SCHEDULES[1:]:
        assert np.array_equal(make(inner, weights, z, settings, schedule), together)
    for row in (0, 8):
        one = slice(row, row + 1)
        alone = make(inner, weights, z[one], {name: value[one] for name, value in settings.items()})
        assert np.array_equal(alone, together[one])


CODE = (FOLDER / "inner.cu").read_text()
BARRIERS = [match.start() for match in re.finditer(r"__syncthreads\(\);", CODE)]


@pytest.mark.parametrize("index", range(len(BARRIERS)))
def test_a_barrier_that_is_left_out_is_noticed(index: int) -> None:
    # (Wide enough for several warps to share a column.)
    config = DEEP.replace(inner_width=192, inner_mlp_ratio=2, inner_depth=1, vae_embed_dim=2)
    inner = rounded(random_inner(config), "float32")
    z, settings = inputs(config, 3, guided=True)
    weights, place = weights_of(inner, "float32"), BARRIERS[index]
    right = make(inner, weights, z, settings)
    text = CODE[:place] + CODE[place:].replace("__syncthreads()", "", 1)
    made = (make(inner, weights, z, settings, schedule, text) for schedule in SCHEDULES)
    assert not all(np.array_equal(right, wrong) for wrong in made)


# -- the weights


def traced(inner: InnerAR, folder: Path) -> Path:
    """Its graph of a feature, as a bundle has it."""
    store = WeightStore(folder / "weights.data")
    (spec,) = (spec for spec in specs(inner, LAW) if spec.name == "inner_step")
    path = export_graph(spec, folder, store)
    store.close()
    return path


@pytest.mark.parametrize(("dtype", "biases"), [("float32", True), ("float16", True), ("float32", False)])
def test_weights_are_read_out_of_the_graph(tmp_path: Path, dtype: str, biases: bool) -> None:
    """Two blocks; a bias of zeros, as an untrained model has, is not in the graph."""
    inner = random_inner(DEEP).to(getattr(torch, dtype))
    inner.head.float()
    if not biases:
        with torch.no_grad():
            for name, parameter in inner.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
    found, want = read_inner_weights(traced(inner, tmp_path), DEEP), weights_of(inner, dtype)
    assert found.dtype == want.dtype and len(found.blocks) == DEEP.inner_depth
    pairs = [(found.entry, want.entry), (found.head, want.head)]
    pairs += [(getattr(a, name), getattr(b, name)) for a, b in zip(found.blocks, want.blocks, strict=True) for name in PRODUCTS]
    for have, right in pairs:
        assert np.array_equal(have.weight, right.weight) and np.array_equal(have.bias, right.bias)
        assert have.weight.dtype == right.weight.dtype
    assert np.array_equal(found.places, want.places)


def test_a_graph_of_another_model_is_refused(demo_bundle: Any) -> None:
    step = digits_step(demo_bundle)
    config = Bundle.open(demo_bundle("digits")).manifest.config
    for change in ({"inner_depth": 2}, {"inner_width": 32}, {"num_gaussians": 5}):
        with pytest.raises(KernelError, match=r"inner_step.onnx has other products than .* export the model again"):
            read_inner_weights(step, config.replace(**change))
    with pytest.raises(KernelError, match="other products"):
        read_inner_weights(step.with_name("inner_condition.onnx"), config)
    with pytest.raises(KernelError, match=r"no table of shape \(20, 64\)"):
        read_inner_weights(step, config.replace(vae_embed_dim=20, latent_scale=1.0, latent_shift=0.0))


def test_what_a_feature_costs() -> None:
    """Every tile of 8 rows reads all weights, whatever rows it has."""
    weights = (3 + 1 + 4 + 4) * 768**2
    for rows, tiles in ((1, 1), (8, 1), (9, 2), (64, 8)):
        cost = kernel_feature(ArinarConfig(), rows)
        assert (cost.launches, cost.weight_bytes, cost.multiply_adds) == (6, tiles * weights * 2, tiles * 8 * weights)
        assert cost.row_bytes == rows * kernel_feature(ArinarConfig(), 1).row_bytes
    blocks = {name: -(-columns // block_columns(name)) for name, columns in zip(PRODUCTS, (2304, 768, 3072, 768), strict=True)}
    assert blocks == {"qkv": 72, "project": 96, "expand": 96, "contract": 96}
    assert kernel_feature(ArinarConfig(inner_depth=3), 8, 4).weight_bytes == 3 * weights * 4


def test_shapes_that_the_kernels_lack() -> None:
    assert fits(ArinarConfig()) and all(fits(config) for config in CONFIGS.values())
    for change in (
        {"inner_width": 1536},
        {"inner_width": 48, "inner_heads": 4},
        {"patch_size": 2},
        {"num_gaussians": 33},
        {"inner_depth": 0},
        {"inner_mlp_ratio": 2.003},
    ):
        assert not fits(replace(ArinarConfig(), **change)), change  # type: ignore[arg-type]
