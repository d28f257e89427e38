"""What lower precisions cost a VAE's decoder: errors of float16 and TF32 against float32, without a GPU.

    python -m benchmarks.vae [--images 4] [--size 256] [--json vae.json]

Of the demo VAE on the latents of real digits, and of the published architecture (KL-16) with random weights on normal
latents. TF32 is what tensor cores make of float32: factors of products are rounded to 10 bits of mantissa, sums stay in
float32; here the factors of every convolution and of the attention's products are rounded so. float16 is the module that
`arinar export --vae-precision fp16` traces: weights and activations in float16, norms in float32; its products have sums in
float32 here, as tensor cores have.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arinar.export.steps import VaeDecoder, half_precision_vae
from arinar.text import aligned
from arinar.vae import AutoencoderKL, posterior


def to_tf32(x: Tensor) -> Tensor:
    """float32 rounded to 10 bits of mantissa, halves away from zero, as the GPU's conversion does."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@contextlib.contextmanager
def tensor_cores() -> Iterator[None]:
    """Convolutions and matrix products as tensor cores make them: float32 factors rounded, sums in float32."""
    convolve, multiply = F.conv2d, torch.Tensor.__matmul__

    def factor(x: Tensor) -> Tensor:
        return to_tf32(x) if x.dtype == torch.float32 else x.float()

    def conv2d(x: Tensor, weight: Tensor, bias: Tensor, *others: Any, **options: Any) -> Tensor:
        return convolve(factor(x), factor(weight), bias.float(), *others, **options).to(x.dtype)

    def matmul(a: Any, b: Any) -> Tensor:
        out: Tensor = multiply(factor(a), factor(b)).to(a.dtype)
        return out

    F.conv2d = conv2d  # type: ignore[assignment]
    torch.Tensor.__matmul__ = matmul  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        F.conv2d, torch.Tensor.__matmul__ = convolve, multiply  # type: ignore[method-assign,assignment]


@contextlib.contextmanager
def peaks(vae: nn.Module) -> Iterator[list[float]]:
    """The largest absolute value that any of its layers makes, as the only item."""
    largest = [0.0]

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        largest[0] = max(largest[0], float(output.abs().max()))

    hooks = [module.register_forward_hook(look) for module in vae.modules() if not list(module.children())]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


def errors(vae: AutoencoderKL, latents: Tensor) -> dict[str, Any]:
    """Errors of the decoder in both precisions, in the decoder's range (-1 to 1) and in grey levels of 255."""
    with torch.no_grad(), peaks(vae) as largest:
        want, image = vae.decode(latents), VaeDecoder(vae)(latents)
    small = half_precision_vae(vae)
    runs: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "tf32": lambda: (vae.decode(latents), VaeDecoder(vae)(latents)),
        "fp16": lambda: (small.decode(latents.half()).float(), VaeDecoder(small)(latents)),
    }
    found: dict[str, Any] = {"largest_activation": largest[0], "deviation": float(want.std())}
    for name, run in runs.items():
        with torch.no_grad(), tensor_cores():
            have, pixels = run()
        grey = (pixels.int() - image.int()).abs()
        found[name] = {
            "max": float((have - want).abs().max()),
            "relative": float((have - want).pow(2).mean().sqrt() / want.std()),
            "grey_max": int(grey.max()),
            "grey_differ": float((grey > 0).float().mean()),
            "finite": bool(torch.isfinite(have).all()),
        }
    return found


def demo(images: int) -> tuple[AutoencoderKL, Tensor]:
    from arinar.checkpoint import load_vae
    from arinar.data import digit_images, to_float

    vae = load_vae("digits")
    pictures = to_float(torch.from_numpy(digit_images()[0][:images]).permute(0, 3, 1, 2))
    with torch.no_grad():
        return vae, posterior(vae.encode(pictures))[0]


def published(images: int, size: int) -> tuple[AutoencoderKL, Tensor]:
    torch.manual_seed(0)
    vae = AutoencoderKL().eval()
    side = size // vae.config.stride
    return vae, torch.randn(images, vae.config.embed_dim, side, side)


def table(results: dict[str, dict[str, Any]]) -> str:
    rows = [("VAE", "precision", "relative", "largest", "grey levels", "pixels that differ", "largest activation")]
    for name, found in results.items():
        for precision in ("tf32", "fp16"):
            error = found[precision]
            shares = f"{error['relative']:.2e}", f"{error['max']:.2e}", str(error["grey_max"]), f"{error['grey_differ']:.2%}"
            rows.append((name, precision, *shares, f"{found['largest_activation']:.3g}"))
    return "\n".join(aligned(rows))


@click.command()
@click.option("--images", default=4, show_default=True, help="Of the published VAE, a quarter, one at least.")
@click.option("--size", default=256, show_default=True, help="Side of the published VAE's images.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the results here.")
def main(images: int, size: int, path: Path | None) -> None:
    results = {"digits": errors(*demo(images)), "KL-16, random": errors(*published(max(1, images // 4), size))}
    click.echo(table(results))
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
