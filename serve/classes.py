"""The classes of a model, by number and by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from arinar.config import ArinarConfig
from arinar.text import printable, shown


class Classes:
    """Finds the class that a prompt names. Names may list synonyms between commas, as ImageNet's do."""

    def __init__(self, config: ArinarConfig) -> None:
        self.count, self.names = config.num_classes, config.class_names

    def name(self, label: int) -> str | None:
        return self.names[label] if self.names else None

    def label(self, prompt: str | int) -> int:
        """A class id, or the one class of that name: the very name first, then whatever its case. Raises ValueError."""
        text = str(prompt).strip()
        if text.isascii() and text.isdigit() and len(text) < 10:
            if int(text) < self.count:
                return int(text)
            raise ValueError(f"prompt is {text}; this model has classes 0..{self.count - 1}")
        if not self.names:
            raise ValueError(f"prompt is {shown(prompt)}; this model's classes have no names: give an id, 0..{self.count - 1}")
        for same in (str, str.casefold):
            for found in (self._whole(text, same), self._synonyms(text, same)):
                if len(found) == 1:
                    return found[0]
                if found:
                    raise ValueError(
                        f"prompt is {shown(prompt)}, which names several classes: give an id, {self._listed(found)}"
                    )
        near = difflib.get_close_matches(text.casefold(), [name.casefold() for name in self.names], 3, 0.6)
        close = [label for label, name in enumerate(self.names) if name.casefold() in near][:3]
        hint = (
            f"close to it are {self._listed(close)}" if close else f"give an id, 0..{self.count - 1}, or a name of /v1/models"
        )
        raise ValueError(f"prompt is {shown(prompt)}, no class of this model; {hint}")

    def _whole(self, text: str, same: Callable[[str], str]) -> list[int]:
        return [label for label, name in enumerate(self.names) if same(name) == same(text)]

    def _synonyms(self, text: str, same: Callable[[str], str]) -> list[int]:
        parts = ([same(part.strip()) for part in name.split(",")] for name in self.names)
        return [label for label, found in enumerate(parts) if same(text) in found]

    def _listed(self, labels: list[int]) -> str:
        return ", ".join(f"{label} ({printable(self.names[label], 40)})" for label in labels[:5])
