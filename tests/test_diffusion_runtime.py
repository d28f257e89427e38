"""The diffusion head deployed: tokens against the reference sampler's, micro-batches, the GPU backends on the fake GPU, and
requests that make no sense."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

pytest.importorskip("onnxruntime")

from fake_gpu import FakeCudaRuntime, fake_onnxruntime, fake_tensorrt, make_engines
from test_cuda_runtime import cpu, gpu
from tiny_bundles import TINY, TINY_MAR, TINY_VAE, tiny_bundle, tiny_model

from arinar.diffusion_law import forced_states
from arinar.diffusion_schedule import most_steps
from arinar.export.bundle import export_bundle
from arinar.head import Draw
from arinar.runtime import Bundle, Known, Noise, Pipeline
from arinar.runtime.request import with_sampling_steps
from arinar.sampler import sample
from arinar.vae import AutoencoderKL

LABELS = [2, 0, 1]


@pytest.fixture(scope="module")
def bundle(shared_folder: Path) -> Path:
    return tiny_bundle(shared_folder, TINY_MAR)


@pytest.fixture
def pipeline(bundle: Path) -> Pipeline:
    return Pipeline.load(bundle, threads=2)


def reference(steps: str | None = None, **settings: Any) -> np.ndarray:
    model, _ = tiny_model(TINY_MAR)
    noise = Noise.from_seed(3, range(len(LABELS)), with_sampling_steps(TINY_MAR, steps))
    tokens = sample(model, torch.tensor(LABELS), noise=noise, sampling_steps=steps, **settings)
    return tokens.numpy()


@pytest.mark.parametrize("guidance", [1.0, 2.9, [1.0, 3.0, 2.0]], ids=str)
@pytest.mark.parametrize("steps", [None, "ddim10", "ddim2", "30,20,10"])
def test_tokens_are_the_references(pipeline: Pipeline, guidance: Any, steps: str | None) -> None:
    want = reference(steps, guidance_scale=guidance, temperature=0.9)
    made = pipeline.generate(LABELS, guidance_scale=guidance, temperature=0.9, sampling_steps=steps, seed=3)
    assert np.abs(made.tokens - want).max() < 1e-4 * max(1, np.abs(want).max())


def test_fewer_sampling_steps_in_later_outer_steps(pipeline: Pipeline) -> None:
    counts: list[str] = []
    launch = pipeline.backend.launch

    def counted(graph: str, *rest: Any, **more: Any) -> None:
        counts.append(graph)
        launch(graph, *rest, **more)

    pipeline.backend.launch = counted  # type: ignore[method-assign]
    made = pipeline.generate(LABELS, guidance_scale=2.0, sampling_steps="8-2", num_iter=4, seed=3)
    want = reference("8-2", guidance_scale=2.0, num_iter=4)
    assert np.abs(made.tokens - want).max() < 1e-3 * np.abs(want).max()
    assert counts.count("head_step_guided") == 8 + 6 + 4 + 2 and counts.count("head_condition") == 4


def test_half_precision_keeps_the_step_exact(bundle: Path) -> None:
    """The network rounds; x and the step's arithmetic do not."""
    made = Pipeline.load(bundle, precision="fp16").generate(LABELS, guidance_scale=2.0, seed=3)
    want = reference(guidance_scale=2.0)
    assert np.abs(made.tokens - want).max() < 2e-2 * np.abs(want).max()
    graph = Bundle.open(bundle).manifest.graphs["fp16"]["head_step_guided"]
    kinds = {tensor.name: tensor.dtype for tensor in (*graph.inputs, *graph.outputs)}
    assert {name for name, dtype in kinds.items() if dtype == "float16"} == {"condition", "condition_uncond"}


def test_noise_is_made_per_image_and_has_its_size() -> None:
    noise = Noise.from_seed(1, [5, 9], TINY_MAR)
    alone = Noise.from_seed(1, [9], TINY_MAR)
    assert np.array_equal(noise.draws[1], alone.draws[0]) and np.array_equal(noise.order[1], alone.order[0])
    assert noise.draws.shape == (2, 16, 4, 5) and noise.draws.dtype == np.float32
    published = TINY_MAR.replace(img_size=64, vae_embed_dim=16, sampling_steps="100")
    assert published.seq_len * published.token_dim * (most_steps("100") + 1) * 4 == 1_654_784  # bytes an image


def test_an_image_does_not_depend_on_the_others(pipeline: Pipeline) -> None:
    together = pipeline.generate(LABELS, guidance_scale=[2.0, 1.0, 3.0], seed=3)
    for index, label in enumerate(LABELS):
        scale = [2.0, 1.0, 3.0][index]
        alone = pipeline.generate([label], guidance_scale=scale, seed=3, indices=[index])
        assert np.abs(alone.tokens[0] - together.tokens[index]).max() < 1e-4


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("steps", [None, "ddim10"])
def test_a_fixed_micro_batch_gives_the_same_bits(bundle: Path, threads: int, steps: str | None) -> None:
    """Whatever is generated beside an image, and wherever in the micro-batch it stands."""
    pipeline = Pipeline.load(bundle, threads=threads)
    full = pipeline.generate([*LABELS, 1], guidance_scale=2.0, sampling_steps=steps, seed=3, batch_size=4)
    for index, label in enumerate(LABELS):
        alone = pipeline.generate([label], guidance_scale=2.0, sampling_steps=steps, seed=3, indices=[index], batch_size=4)
        assert np.array_equal(alone.tokens[0], full.tokens[index])
        assert np.array_equal(np.asarray(alone.images[0]), np.asarray(full.images[index]))


def test_steps_of_one_request_do_not_leak_into_another(pipeline: Pipeline) -> None:
    first = pipeline.generate(LABELS, seed=3)
    for steps in ("ddim2", "8-2", "ddim10"):
        pipeline.generate(LABELS, seed=3, sampling_steps=steps)
    assert np.array_equal(pipeline.generate(LABELS, seed=3).tokens, first.tokens)


def test_the_law_is_the_references(pipeline: Pipeline) -> None:
    """Along given tokens, whatever rows are computed together."""
    model, _ = tiny_model(TINY_MAR)
    generator = torch.Generator().manual_seed(0)
    z, tokens = torch.randn(6, TINY_MAR.z_width, generator=generator), torch.randn(6, TINY_MAR.token_dim, generator=generator)
    ones = torch.ones(6)
    want = model.head.draw(z, None, Draw(ones, ones, generator), tokens)
    assert torch.equal(want.tokens, tokens)
    for images in (None, 3):
        have = pipeline.loop.head.law(z.numpy(), tokens.numpy(), images)
        for ours, theirs in zip(have, want.cond, strict=True):
            assert ours.shape == (6, 4, TINY_MAR.token_dim)
            assert np.abs(ours - theirs.detach().numpy()).max() < 1e-5
    assert forced_states(tokens.numpy(), "ddim4").shape == (6, 4, 4)


# -------------------------------------------------------------------------------------------------------------- GPUs


@pytest.mark.parametrize("name", ["tensorrt", "onnxruntime-cuda"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_images_on_a_gpu_are_the_cpus(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, guidance: float
) -> None:
    """On the fake GPU, replayed recordings included, with steps of another request in between."""
    made = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    make_engines(Bundle.open(made))
    host = cpu(made)
    calls: list[dict[str, Any]] = [
        {"guidance_scale": guidance, "sampling_steps": steps, "seed": 3} for steps in (None, "ddim2")
    ]
    wanted = [host.generate(LABELS, **call).tokens for call in calls]
    runtime = FakeCudaRuntime()
    library, fake = {"onnxruntime-cuda": ("onnxruntime", fake_onnxruntime), "tensorrt": ("tensorrt", fake_tensorrt)}[name]
    monkeypatch.setitem(sys.modules, library, fake(runtime))
    device = gpu(made, runtime, backend=name, cuda_graphs=True)
    for _ in range(3):  # warm-up, captured, replayed
        for call, want in zip(calls, wanted, strict=True):
            assert np.array_equal(device.generate(LABELS, **call).tokens, want)


def test_edits_on_a_gpu_are_the_cpus(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 9 steps, 16 and 14 unknown tokens come by 13 at different steps, which draw in different numbers of steps."""
    folder = Path(shutil.copytree(bundle, tmp_path / "b"))
    make_engines(Bundle.open(folder))
    runtime = FakeCudaRuntime()
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(runtime))
    device, host = gpu(folder, runtime, cuda_graphs=True), cpu(folder)
    tokens = host.generate(LABELS, seed=1).tokens
    length = host.config.seq_len
    for count in (0, 0, 2, 2, 0, 2, length, 0):
        known = Known(tokens, np.tile(np.arange(length) < count, (len(LABELS), 1)))
        for steps in ("8-2", "ddim2"):
            arguments: dict[str, Any] = {"seed": count, "known": known, "sampling_steps": steps, "num_iter": 9}
            ours, theirs = (pipeline.generate(LABELS, **arguments).tokens for pipeline in (device, host))
            assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_sizes_are_constants_of_the_graphs(bundle: Path, precision: str) -> None:
    """No size is measured as a step runs: neither a library nor a recording has to look at one."""
    manifest = Bundle.open(bundle).manifest
    for name in ("head_condition", "head_step", "head_step_guided"):
        model = onnx.load(bundle / manifest.graphs[precision][name].file, load_external_data=False)
        assert not {"Shape", "If", "Loop", "Scan", "Range"} & {node.op_type for node in model.graph.node}


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling_steps": "1"}, "sampling_steps is '1', 1 step; expected at least 2"),
        ({"sampling_steps": "1001"}, "sampling_steps is '1001'; expected 1 to 1000 steps"),
        ({"sampling_steps": "ddim60"}, "no whole stride"),
        ({"sampling_steps": 25}, "sampling_steps is 25; expected a text"),
        ({"sampling_steps": "5-25"}, "2 <= lower <= upper"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"guidance_scale": 0.0}, "guidance_scale"),
        ({"num_iter": 17}, "num_iter is 17; expected an integer from 1 to 16"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_requests_that_are_refused(pipeline: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.generate(LABELS, **arguments)


def test_noise_of_other_steps_is_refused(pipeline: Pipeline) -> None:
    noise = Noise.from_seed(0, range(3), TINY_MAR)
    with pytest.raises(ValueError, match=r"noise.draws is float32 \(3, 16, 4, 5\); expected float32 \(3, 16, 4, 11\)"):
        pipeline.generate(LABELS, noise=noise, sampling_steps="ddim10")


def test_sampling_steps_belong_to_this_head(shared_folder: Path) -> None:
    other = Pipeline.load(tiny_bundle(shared_folder, TINY))
    with pytest.raises(ValueError, match="sampling_steps is '25'; this model's head draws each feature at once"):
        other.generate([0], sampling_steps="25")


def test_there_is_no_graph_of_a_whole_token(bundle: Path) -> None:
    with pytest.raises(ValueError, match="inner is 'fused'; choose one of stepwise"):
        Pipeline.load(bundle, inner="fused")


def test_a_network_that_explodes_is_named(pipeline: Pipeline) -> None:
    """Random weights at timestep 999 are multiplied by thousands, step after step, until nothing is finite."""
    noise = Noise.from_seed(0, range(3), TINY_MAR.replace(sampling_steps="10"))
    huge = Noise(noise.order, noise.draws * np.float32(1e36))
    with pytest.raises(FloatingPointError, match="graph 'head_step_guided' made non-finite values"):
        pipeline.generate(LABELS, guidance_scale=2.0, noise=huge, sampling_steps="10")


def test_half_precision_that_overflows_is_named(bundle: Path) -> None:
    """A state beyond 65,504 has no float16."""
    noise = Noise.from_seed(0, range(3), TINY_MAR)
    huge = Noise(noise.order, noise.draws * np.float32(1e5))
    with pytest.raises(FloatingPointError, match="graph 'head_step_guided' made non-finite values"):
        Pipeline.load(bundle, precision="fp16").generate(LABELS, guidance_scale=2.0, noise=huge)


def test_an_autoencoder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, _ = tiny_model(TINY_MAR)
    other = AutoencoderKL(replace(TINY_VAE, embed_dim=8)).eval()
    with pytest.raises(ValueError, match="the VAE's latent channels is 8; the model expects 4"):
        export_bundle(model, other, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
