"""Tables as text."""

from __future__ import annotations

import pytest

from arinar.text import aligned


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert aligned([("name", "value", ""), ("a", "1", "ok"), ("longer name", "", "")]) == [
        "name         value",
        "a            1      ok",
        "longer name",
    ]
    assert aligned([]) == []
    with pytest.raises(ValueError):
        aligned([("a", "b"), ("c",)])
