"""The measure of what TF32 and float16 cost a VAE's decoder."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from tiny_bundles import TINY_VAE

from arinar.vae import AutoencoderKL

vae_benchmark = pytest.importorskip("benchmarks.vae")


def test_tf32_keeps_ten_bits_of_mantissa() -> None:
    step = 2.0**-10
    values = torch.tensor([1.0, 1 + step, 1 + step / 2, 1 + step / 2.01, -(1 + step / 2), 3.0e38, 0.0, 1e-30])
    want = torch.tensor([1.0, 1 + step, 1 + step, 1.0, -(1 + step)])
    rounded = vae_benchmark.to_tf32(values)
    assert torch.equal(rounded[:5], want)
    assert torch.allclose(rounded, values, rtol=step / 2, atol=0)
    drawn = torch.randn(1000)
    assert not (vae_benchmark.to_tf32(drawn).view(torch.int32) & 0x1FFF).any()


def test_factors_are_rounded_and_sums_are_not() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 64), torch.randn(64, 3)
    exact = (a.double() @ b.double()).float()
    plain, convolve, multiply = a @ b, F.conv2d, torch.Tensor.__matmul__
    with vae_benchmark.tensor_cores():
        rounded, half = a @ b, a.half() @ b.half()
        pixels = F.conv2d(a.reshape(1, 5, 8, 8), torch.randn(2, 5, 1, 1), torch.zeros(2))
    assert (plain - exact).abs().max() < 1e-5 < (rounded - exact).abs().max() < 1e-2
    assert half.dtype == torch.float16 and pixels.dtype == torch.float32
    assert F.conv2d is convolve and torch.Tensor.__matmul__ is multiply


def test_errors_of_a_decoder() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(TINY_VAE).eval()
    found = vae_benchmark.errors(vae, torch.randn(2, TINY_VAE.embed_dim, 4, 4))
    assert 0 < found["tf32"]["relative"] < found["fp16"]["relative"] < 1e-2
    assert found["tf32"]["grey_max"] <= 1 and found["fp16"]["finite"] and found["largest_activation"] > 0
    assert "tf32" in vae_benchmark.table({"tiny": found})
