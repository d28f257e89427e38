"""Pictures on disk: PNG files that know how they were made, pictures of others, and contact sheets."""

from __future__ import annotations

import io
import json
import math
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from arinar.files import replacing
from arinar.reading import check_regular, parse_json
from arinar.text import one_line, printable

METADATA_KEY = "arinar"
# Larger files are none of ours: the largest image that a model may make, stored without compression.
MAX_BYTES = 1 << 32
#: Kinds of files that a picture of somebody else may be, by Pillow's names, and its most pixels: all are decoded.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOST_PIXELS = 1 << 26
#: Height of a contact sheet's letters in pixels: a twelfth of an image's width, within these.
LEAST_LETTERS, MOST_LETTERS = 10, 20
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def save_png(image: Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
    """Write a PNG in one step (a temporary name, then renamed); ``metadata`` goes into it as JSON text."""
    data = png_bytes(image, metadata)
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(data)


def png_bytes(image: Image.Image, metadata: Mapping[str, Any] | None = None) -> bytes:
    """The content of a PNG file, with ``metadata`` in it as JSON text."""
    info, data = PngImagePlugin.PngInfo(), io.BytesIO()
    if metadata:
        info.add_text(METADATA_KEY, json.dumps(dict(metadata), sort_keys=True))
    image.save(data, format="PNG", pnginfo=info)
    return data.getvalue()


def save_all(pictures: Iterable[tuple[Image.Image, Path, Mapping[str, Any]]]) -> None:
    """`save_png` of each (image, path, metadata). Ctrl-C on the way takes effect when all are written; a second one at once."""
    left = list(pictures)
    try:
        while left:
            save_png(*left[0])
            del left[0]
    except KeyboardInterrupt:
        for picture in left:
            save_png(*picture)
        raise


def about(image: Image.Image) -> dict[str, Any]:
    """How an image was made that a pipeline made: its ``info``, JSON-ready."""
    return {str(name): value for name, value in image.info.items()}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What :func:`save_png` put into a file; None where it is not a whole PNG of ours."""
    try:
        check_regular(Path(path))
        if Path(path).stat().st_size > MAX_BYTES:
            return None
        found = dict(_text(content) for kind, content in _chunks(Path(path).read_bytes()) if kind == b"tEXt")
        metadata = parse_json(found[METADATA_KEY])
    except (OSError, ValueError, KeyError):
        return None
    return metadata if isinstance(metadata, dict) else None


def read_png(path: str | os.PathLike[str], size: tuple[int, int]) -> Image.Image:
    """A PNG of (width, height) pixels as RGB. Raises ValueError for a file that is no whole one of that size."""
    try:
        check_regular(Path(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its size is known, and looked at first
            with Image.open(path, formats=("PNG",)) as image:
                if image.size != size:
                    raise ValueError(f"it has {image.size[0]} x {image.size[1]} pixels, expected {size[0]} x {size[1]}")
                return image.convert("RGB")
    except Exception as error:  # what Pillow raises for damaged files has no common type
        raise ValueError(f"{path} cannot be shown: {error}; delete it, and it is made again") from None


def check_size(name: str, image: Image.Image, side: int, remedy: str = "crop or resize it first") -> None:
    """Raise ValueError for an image that is not of the model's size. Decodes nothing."""
    if image.size != (side, side):
        raise ValueError(f"{name} has {image.size[0]} x {image.size[1]} pixels; this model takes {side} x {side}: {remedy}")


def read_picture(path: str | os.PathLike[str], side: int | None = None, remedy: str = "crop or resize it") -> Image.Image:
    """A picture from a file, decoded, turned as its camera was held.

    Raises ValueError for what is none, is damaged, is not of ``side`` x ``side`` pixels (None: any, but not more than
    MOST_PIXELS): the last are not decoded. ``remedy``: against another size.
    """
    try:
        check_regular(Path(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"it has {image.width} x {image.height} pixels; expected at most {MOST_PIXELS:,}")
                if side is not None:
                    check_size("it", image, side, remedy)
                found = ImageOps.exif_transpose(image)
                found.load()
                return found
    except Exception as error:  # what Pillow raises for damaged files has no common type
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ValueError(f"{path} cannot be used as a picture: {one_line(reason)}") from None


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of a PNG's chunks. Raises ValueError where the file is cut off, or damaged.

    The checksums tell: the pixels need not be decoded, which takes some thirty times as long.
    """
    if not data.startswith(SIGNATURE):
        raise ValueError("not a PNG")
    place, kind = len(SIGNATURE), b""
    while kind != b"IEND":
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        content, checksum = data[place + 8 : place + 8 + size], data[place + 8 + size : place + 12 + size]
        if len(checksum) < 4 or zlib.crc32(kind + content) != int.from_bytes(checksum, "big"):
            raise ValueError(f"cut off or damaged at byte {place}")
        yield kind, content
        place += 12 + size


def _text(content: bytes) -> tuple[str, str]:
    key, _, value = content.partition(b"\0")
    return key.decode("latin-1"), value.decode("latin-1")


def contact_sheet(
    images: Sequence[Image.Image],
    columns: int | None = None,
    gap: int = 2,
    scale: int = 1,
    *,
    captions: Sequence[str] = (),
    rows: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """Images of one size in rows on a white ground, ``gap`` pixels apart; ``scale`` enlarges each (nearest).

    captions : below each image. rows : left of each row. title : a line above. What is too long for its place is cut.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one image")
    columns = columns or max(1, round(len(images) ** 0.5))
    width, height = (side * scale for side in images[0].size)
    font = ImageFont.load_default(max(LEAST_LETTERS, min(MOST_LETTERS, width // 12)))
    line = 2 * gap + math.ceil(font.getbbox("Áy")[3])
    left = max((2 * gap + math.ceil(font.getlength(text)) for text in rows), default=0)
    top, below = (line if title else 0), (line if captions else 0)
    count = -(-len(images) // columns)
    size = (left + columns * (width + gap) + gap, top + count * (height + below + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)

    def write(text: str, x: int, y: int, room: int) -> None:
        draw.text((x, y + gap), _shortened(text, font, room), "black", font)

    if title:
        write(title, gap, 0, size[0] - 2 * gap)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        x, y = left + gap + column * (width + gap), top + gap + row * (height + below + gap)
        sheet.paste(image if scale == 1 else image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if number < len(captions):
            write(captions[number], x, y + height, width)
        if column == 0 and row < len(rows):
            write(rows[row], gap, y + (height - line) // 2, left)
    return sheet


def _shortened(text: str, font: Any, room: int) -> str:
    """A text, its end left out where it is wider than ``room`` pixels."""
    text = printable(text, 200)
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}...") > room:
        text = text[:-1]
    return f"{text.rstrip()}..." if text else ""
