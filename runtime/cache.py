"""KV caches of the outer and the inner model: allocated once, written row by row, never grown or copied."""

from __future__ import annotations

from typing import Any

from .backends.base import Backend
from .bundle import GraphInfo


class KVCache:
    """Keys and values of every layer, each (N, H, slots, head_dim), and the buffers for a step's new rows.

    Shapes and dtype are read off the step graph's `past_key_values.*` inputs. Slots that hold nothing are zero (the
    graphs mask them, but masked garbage that is not finite would still spread).

    A graph gives back either the new rows, which :meth:`write` moves into their slot, or the whole cache with the rows
    in it: then ``present`` is ``past``, and there is nothing to write.
    """

    def __init__(self, backend: Backend, graph: GraphInfo, rows: int, slots: int | None = None) -> None:
        self._backend = backend
        made = {tensor.name: tensor.shape for tensor in graph.outputs}
        self.in_place = False
        self.past: dict[str, Any] = {}
        self.present: dict[str, Any] = {}
        for tensor in graph.inputs:
            if not tensor.name.startswith("past_key_values."):
                continue
            _, heads, fixed, head_dim = tensor.shape
            length = fixed if isinstance(fixed, int) else slots
            if length is None:
                raise ValueError(f"graph {graph.name!r} does not fix its cache length; give slots")
            assert isinstance(heads, int) and isinstance(head_dim, int)
            self.slots = length
            self.past[tensor.name] = backend.empty((rows, heads, length, head_dim), tensor.dtype)
            name = tensor.name.replace("past_key_values", "present", 1)
            given = made.get(name)  # as (N, H, rows, d)
            self.in_place = isinstance(fixed, int) and fixed > 1 and given is not None and given[2] == fixed
            if self.in_place:
                self.present[name] = self.past[tensor.name]
            else:
                self.present[name] = backend.empty((rows, heads, 1, head_dim), tensor.dtype)

    def write(self, slot: int) -> None:
        """Move the new rows (``present``, filled by a step) into a slot."""
        if not 0 <= slot < self.slots:
            raise ValueError(f"KV cache overrun: slot {slot} of {self.slots}")
        if self.in_place:
            return
        for name, rows in self.present.items():
            self._backend.write_slots(rows, self.past[name.replace("present", "past_key_values", 1)], slot)

    def fill(self, rows: dict[str, Any]) -> None:
        """Write the first slots at once: rows (N, H, count, d) per cache input name."""
        for name, value in rows.items():
            self._backend.write_slots(value, self.past[name], 0)
