"""This machine: its processor, and what it can do at most, measured: products of matrices, in float32 and in 8-bit
integers, copying memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from arinar.runtime.backends.products import keep_products_exact, product_session
from arinar.runtime.machine import usable_cores


def gemm_peak(size: int = 2048, repeats: int = 5) -> float:
    """Float32 operations per second of NumPy's matrix product, with as many threads as it takes."""
    a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    return float(2 * size**3 / _fastest(lambda: a @ a, repeats))


def onnxruntime_peak(dtype: str, threads: int | None = None, *, size: int = 2048, repeats: int = 5) -> float:
    """Operations per second of ONNX Runtime's matrix product with a constant weight: "float32", or "int8" (uint8
    activations by int8 weights, as its dynamic quantisation computes). ``threads`` as for the CPU backend."""
    import onnxruntime

    rng = np.random.default_rng(0)
    if dtype == "int8":
        weight: npt.NDArray[Any] = rng.integers(-127, 128, (size, size), dtype=np.int8)
        a: npt.NDArray[Any] = rng.integers(0, 256, (size, size), dtype=np.uint8)
    else:
        weight = rng.standard_normal((size, size), dtype=np.float32)
        a = weight
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    keep_products_exact(options)
    session = product_session(weight, options)
    return float(2 * size**3 / _fastest(lambda: session.run(None, {"a": a}), repeats))


def copy_bandwidth(threads: int | None = None, *, size: int = 256_000_000, repeats: int = 5) -> float:
    """Bytes per second of copying memory, read and written ones together; ``size`` bytes, beyond what caches hold."""
    count = threads or usable_cores()
    pairs = [(np.ones(size // count, np.uint8), np.zeros(size // count, np.uint8)) for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:  # NumPy copies without holding the interpreter's lock
        return 2 * size / _fastest(lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs)), repeats)


def _fastest(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest run: what disturbs only ever slows."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


__all__ = ["copy_bandwidth", "gemm_peak", "onnxruntime_peak"]
