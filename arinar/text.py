"""Text for people to read: tables in columns, and text of unknown origin made fit for a terminal."""

from __future__ import annotations

import reprlib
import unicodedata
from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equally many cells -> lines, each column as wide as its widest cell, columns two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def one_line(text: object) -> str:
    """Its text, white space of every kind as single spaces."""
    return " ".join(str(text).split())


def printable(text: object, most: int = 2000) -> str:
    """Text of unknown origin as one line for a terminal: at most ``most`` characters, its middle left out where it has
    more; white space as single spaces, and control characters (escape sequences, text that runs backwards) as escapes."""
    words = str(text)
    if len(words) > 8 * most:  # before the work of looking at every character
        words = words[: 4 * most] + words[-4 * most :]
    line = "".join(_escaped(character) for character in one_line(words))
    if len(line) <= most:
        return line
    half = (most - 5) // 2
    return f"{line[:half]} ... {line[-half:]}" if most > 40 else f"{line[: max(most - 3, 0)]}..."


def _escaped(character: str) -> str:
    # Control and format characters, lone surrogates, private use, not assigned; separators of lines and paragraphs.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return character.encode("unicode_escape").decode()
    return character


# (Lists within lists, from a pickle, may be endless as text.)
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 3, 60, 80, 80


def shown(value: object, most: int = 60) -> str:
    """A value as it can be part of a message: short, control characters as escapes."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to write very long ones out
    try:
        text = repr(value[: most + 1]) if isinstance(value, str) else _BRIEF.repr(value)
    except Exception:  # the value's own, of whatever type
        text = f"a {type(value).__name__}"
    text = one_line(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def install_hint(extra: str) -> str:
    """The command that installs what an extra of the package names: from a checkout, as no index has the package."""
    return f"`pip install '.[{extra}]'` in a checkout of arinar"
