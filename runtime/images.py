"""Pictures on disk: PNG files that know how they were made, and contact sheets."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from arinar.files import replacing

METADATA_KEY = "arinar"


def save_png(image: Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
    """Write a PNG in one step (a temporary name, then renamed); ``metadata`` goes into it as JSON text."""
    path = Path(path)
    info = PngImagePlugin.PngInfo()
    if metadata:
        info.add_text(METADATA_KEY, json.dumps(dict(metadata), sort_keys=True))
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What :func:`save_png` put into a file; None where it is not a whole PNG of ours."""
    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(METADATA_KEY)
        return dict(json.loads(text)) if text else None
    except (OSError, ValueError, SyntaxError):
        return None


def contact_sheet(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2, scale: int = 1) -> Image.Image:
    """Images of one size in rows on a white ground, ``gap`` pixels apart; ``scale`` enlarges each (nearest)."""
    if not images:
        raise ValueError("a contact sheet needs at least one image")
    columns = columns or max(1, round(len(images) ** 0.5))
    width, height = (side * scale for side in images[0].size)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        tile = image if scale == 1 else image.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
