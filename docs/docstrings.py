"""An extension of griffe, which reads the reference's docstrings: ours as Markdown.

``name : what it is`` lines, after a line ``Parameters``, ``Raises`` or ``Returns`` with its rule, or anywhere in a class's
docstring, become a list; ``:meth:`` and the like go.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# At the least indentation of its paragraph: names (several between commas), a colon, text.
_ENTRY = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*) : (.*)$")
_RULE = re.compile(r"^(Parameters|Returns|Raises)\n-+$", re.M)


def markdown(text: str) -> str:
    """A docstring's text as Markdown."""
    text = _RULE.sub(r"**\1**\n", re.sub(r":(?:meth|class|func):`~?([^`]+)`", r"`\1`", text))
    lines: list[str] = []
    for line in text.splitlines():
        entry = _ENTRY.match(line)
        if entry is None:
            lines.append(line)
            continue
        if lines and lines[-1] and not lines[-1].startswith(("* ", "  ")):
            lines.append("")
        lines.append(f"* **{entry[1]}**: {entry[2]}")
    return "\n".join(lines)


class Markdown(griffe.Extension):
    """Applied to whatever has a docstring."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
