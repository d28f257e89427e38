"""KV caches in the runtime: allocated once, never grown, never copied whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arinar.runtime import Pipeline
from arinar.runtime.bundle import GraphInfo, TensorInfo
from arinar.runtime.cache import KVCache


class Host:
    """A backend of NumPy arrays that counts what it copies."""

    name, synchronous = "host", True

    def __init__(self) -> None:
        self.copied = 0

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return np.zeros(shape, dtype)

    def write_slots(self, rows: Any, target: Any, slot: int) -> None:
        self.copied += rows.nbytes
        target[:, :, slot : slot + rows.shape[2]] = rows


def graph(slots: int | str) -> GraphInfo:
    past = tuple(TensorInfo(f"past_key_values.0.{p}", "float32", ("N", 2, slots, 3)) for p in ("key", "value"))
    return GraphInfo("step", "step.onnx", 20, (TensorInfo("token", "float32", ("B", 4)), *past), (), "outer")


def test_rows_land_in_their_slot() -> None:
    cache = KVCache(Host(), graph(5), 4)  # type: ignore[arg-type]
    cache.present["present.0.key"][:] = 7
    cache.write(3)
    key = cache.past["past_key_values.0.key"]
    assert key.shape == (4, 2, 5, 3) and (key[:, :, 3] == 7).all() and key.sum() == 7 * 4 * 2 * 3
    prefix = {name: np.full((4, 2, 2, 3), 1.0, np.float32) for name in cache.past}
    cache.fill(prefix)
    assert (key[:, :, :2] == 1).all() and (key[:, :, 2] == 0).all()


@pytest.mark.parametrize("slot", [-1, 5, 99])
def test_overrun_is_an_error(slot: int) -> None:
    cache = KVCache(Host(), graph(5), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"KV cache overrun: slot {slot} of 5"):
        cache.write(slot)


def test_a_cache_of_open_length_needs_one() -> None:
    with pytest.raises(ValueError, match="does not fix its cache length"):
        KVCache(Host(), graph("S"), 1)  # type: ignore[arg-type]
    assert KVCache(Host(), graph("S"), 1, slots=16).slots == 16  # type: ignore[arg-type]


def test_a_generation_feeds_the_same_cache_memory_at_every_step(causal_bundle: Path) -> None:
    """The arrays that the outer step reads are the same objects from the first step to the last, and per step only the
    new rows are written."""
    pipeline = Pipeline.load(causal_bundle)
    seen: list[dict[str, int]] = []
    written: list[int] = []
    launch, write_slots = pipeline.backend.launch, pipeline.backend.write_slots

    def spy(name: str, inputs: Any, outputs: Any, rows: Any = None) -> None:
        if name == "outer_step":
            seen.append({key: id(value) for key, value in inputs.items() if key.startswith("past_key_values")})
            written.append(0)
        launch(name, inputs, outputs, rows)

    def count(rows: Any, target: Any, slot: int) -> None:
        if written:
            written[-1] += rows.nbytes
        write_slots(rows, target, slot)

    pipeline.backend.launch, pipeline.backend.write_slots = spy, count  # type: ignore[method-assign]
    pipeline.generate([1, 2], guidance_scale=2.0)
    config = pipeline.config
    assert len(seen) == config.seq_len - 1 and all(step == seen[0] for step in seen)
    row = 4 * 4 * config.decoder_width  # 2 images x 2 branches, float32
    assert set(written) == {2 * config.decoder_depth * row}
    pipeline.generate([3, 4], guidance_scale=2.0)
    assert seen[-1] == seen[0], "the second generation uses the buffers of the first"
