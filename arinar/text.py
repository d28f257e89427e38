"""Text for people to read: tables in columns."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equally many cells -> lines, each column as wide as its widest cell, columns two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def install_hint(extra: str) -> str:
    """The command that installs what an extra of the package names: from a checkout, as no index has the package."""
    return f"`pip install '.[{extra}]'` in a checkout of arinar"
