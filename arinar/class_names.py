"""What the classes of a model are called: by names of its own, or as ImageNet's 1,000 are. Plain Python."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cache
from pathlib import Path

from .config import ArinarConfig
from .text import printable, shown

#: The label of an image of no class: the model's unconditional branch.
UNCONDITIONAL = -1
# Line i names class i of ILSVRC 2012: WordNet 3.0's words for the synset, the synsets in the order of their numbers.
_IMAGENET = Path(__file__).resolve().parent / "imagenet_classes.txt"
_MOST_NEAR = 5


@cache
def imagenet_names() -> tuple[str, ...]:
    """ImageNet's 1,000 classes by their ids; synonyms stand between commas."""
    return tuple(_IMAGENET.read_text(encoding="utf-8").splitlines())


class Classes:
    """The classes of a model, by id and by name. Names may list synonyms between commas, as ImageNet's do.

    names : by id; empty where they are not known. A model of 1,000 classes without names of its own is taken for one of
    ImageNet, which the published ones are (``guessed``).
    """

    def __init__(self, config: ArinarConfig) -> None:
        self.count = config.num_classes
        self.guessed = not config.class_names and self.count == len(imagenet_names())
        self.names = imagenet_names() if self.guessed else config.class_names

    def name(self, label: int) -> str | None:
        if label == UNCONDITIONAL:
            return "unconditional"
        return self.names[label] if self.names else None

    def short(self, label: int) -> str:
        """The first of a class's names, or its id."""
        return (self.name(label) or str(label)).split(",")[0].strip()

    def caption(self, label: int) -> str:
        """Id and first name; of an id that is the name, or has none, that alone."""
        short = self.short(label)
        return short if label == UNCONDITIONAL or short == str(label) else f"{label} {short}"

    def label(self, prompt: str | int, what: str = "label") -> int:
        """A class id, or the one class of that name: the very name first, then whatever its case.

        Raises ValueError, which calls the prompt ``what``, for none and for several.
        """
        text = str(prompt).strip()
        if text == str(UNCONDITIONAL) or (text.isascii() and text.isdigit() and len(text) < 10):
            if int(text) < self.count:
                return int(text)
            raise ValueError(f"{what} is {text}; this model has classes 0..{self.count - 1}")
        if not self.names:
            raise ValueError(f"{what} is {shown(prompt)}; this model's classes have no names: give an id, 0..{self.count - 1}")
        for same in (str, str.casefold):
            for found in (self._whole(text, same), self._synonyms(text, same)):
                if len(found) == 1:
                    return found[0]
                if found:
                    raise ValueError(
                        f"{what} is {shown(prompt)}, which names several classes: give an id, {self._listed(found)}"
                    )
        near = self._near(text.casefold())
        hint = f"close to it are {self._listed(near)}" if near else f"give an id, 0..{self.count - 1}, or a name"
        raise ValueError(f"{what} is {shown(prompt)}, no class of this model; {hint}")

    def _whole(self, text: str, same: Callable[[str], str]) -> list[int]:
        return [label for label, name in enumerate(self.names) if same(name) == same(text)]

    def _synonyms(self, text: str, same: Callable[[str], str]) -> list[int]:
        return [label for label, parts in enumerate(self._parts(same)) if same(text) in parts]

    def _parts(self, same: Callable[[str], str]) -> list[list[str]]:
        return [[same(part.strip()) for part in name.split(",")] for name in self.names]

    def _near(self, text: str) -> list[int]:
        """Classes with a name that is spelt nearly so, the nearest first; else those whose name has the word."""
        by_name: dict[str, list[int]] = {}
        for label, parts in enumerate(self._parts(str.casefold)):
            for part in {*parts, self.names[label].casefold()}:
                by_name.setdefault(part, []).append(label)
        close = difflib.get_close_matches(text, by_name, _MOST_NEAR, 0.75)
        holding = [name for name in by_name if text in name.split()] if text else []
        found = [label for name in close + holding for label in by_name[name]]
        return list(dict.fromkeys(found))[:_MOST_NEAR]

    def _listed(self, labels: list[int]) -> str:
        return ", ".join(f"{label} ({printable(self.names[label], 40)})" for label in labels[:_MOST_NEAR])
