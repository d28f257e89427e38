"""The sum of two buffers, run by the CPU from its CUDA source."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_kernels import SCHEDULES, on_cpu, requires_compiler

from arinar.runtime.kernels.source import ADD_THREADS, add_source

pytestmark = requires_compiler


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", [1, ADD_THREADS, 3 * ADD_THREADS + 1])
@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_sums_are_float32s_and_nothing_else_is_written(count: int, factor: float, schedule: int) -> None:
    left, right = np.random.default_rng(count).standard_normal((2, count)).astype(np.float32)
    target = np.full(count + 1, 77, np.float32)
    blocks = -(-count // ADD_THREADS)
    arguments = [left, right, target, count, factor]
    on_cpu(add_source()).run("add", (blocks, 1, 1), (ADD_THREADS, 1, 1), arguments, schedule=schedule)
    assert np.array_equal(target[:-1], left + np.float32(factor) * right) and target[-1] == 77
