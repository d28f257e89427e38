"""What a GPU does at most, and the time that counts come to on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

#: Seconds of a launch: issued by the host one by one (what a library does between two launches included), and as a node of
#: a CUDA graph. Assumed, not measured.
ISSUED, CAPTURED = 5e-6, 2.2e-6
#: Shares of the published peaks that kernels are taken to reach: of the bandwidth; of the product rates, by type.
BANDWIDTH_SHARE = 0.9
RATE_SHARE = {"float16": 0.5, "tf32": 0.5, "float32": 0.67}


@dataclass(frozen=True)
class Gpu:
    """Published peaks: bytes per second of its memory, operations per second of dense products that sum in float32, by type
    ("float32": without tensor cores, "tf32": with them)."""

    name: str
    bandwidth: float
    rates: Mapping[str, float]
    source: str

    def seconds_of(self, nbytes: float, flops: Mapping[str, float]) -> tuple[float, float]:
        """Of so many bytes, and of so many operations by type."""
        operations = sum(count / (RATE_SHARE[kind] * self.rates[kind]) for kind, count in flops.items())
        return nbytes / (BANDWIDTH_SHARE * self.bandwidth), operations


_HOPPER = {"float16": 989e12, "tf32": 494e12, "float32": 67e12}
GPUS = {
    "H100": Gpu("H100 SXM", 3.35e12, _HOPPER, "NVIDIA H100 data sheet, SXM, half of the rates with sparsity"),
    "H200": Gpu("H200 SXM", 4.8e12, _HOPPER, "NVIDIA H200 data sheet, SXM, half of the rates with sparsity"),
    "L4": Gpu(
        "L4",
        0.3e12,
        {"float16": 121e12, "tf32": 60e12, "float32": 30.3e12},
        "NVIDIA L4 data sheet, half of the rates with sparsity",
    ),
    "RTX 4090": Gpu(
        "RTX 4090",
        1.008e12,
        {"float16": 165.2e12, "tf32": 82.6e12, "float32": 82.6e12},
        "NVIDIA Ada GPU architecture white paper, appendix A, sums in FP32, without sparsity",
    ),
}


def assumptions(gpus: Sequence[Gpu]) -> list[str]:
    """What the times rest on, a line each."""
    shares = ", ".join(f"{share:.0%} {kind}" for kind, share in RATE_SHARE.items())
    lines = [
        f"a launch costs {ISSUED * 1e6:g} us issued by the host, {CAPTURED * 1e6:g} us in a CUDA graph; launching a CUDA graph "
        f"as much as an issued one",
        f"kernels reach {BANDWIDTH_SHARE:.0%} of the published bandwidth, and of the rates of products {shares}",
    ]
    for gpu in gpus:
        rates = ", ".join(f"{rate / 1e12:g} TFLOP/s {kind}" for kind, rate in gpu.rates.items())
        lines.append(f"{gpu.name}: published {gpu.bandwidth / 1e12:g} TB/s, {rates} ({gpu.source})")
    return [
        *lines,
        "every byte comes from the GPU's memory and goes there (none from a cache)",
        "our own kernels read all of their arguments once; their products are few, and not counted",
        "sum: launches, bytes and operations one after another; overlapped: the longer of the launches and of the kernels, "
        "each of which takes the longer of its bytes and its operations",
    ]


def overlapped(gpu: Gpu, kernels: Iterable[tuple[float, Mapping[str, float]]], launching: float) -> float:
    """Seconds where launches overlap with kernels, and within a kernel its bytes with its operations."""
    return max(launching, sum(max(gpu.seconds_of(nbytes, flops)) for nbytes, flops in kernels))
