"""Pictures that clients send, as untrusted as anything: looked at before they are decoded."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from arinar.runtime.editing import Mask, Pixels, as_pixels
from arinar.runtime.images import check_size
from arinar.text import one_line

from .errors import ApiError, invalid

#: By Pillow's names; each decoder more is one more that a stranger's bytes can reach.
FORMATS = ("PNG", "JPEG", "WEBP")


def read_picture(name: str, data: bytes, side: int, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """An uploaded picture of the model's size, decoded, turned as its camera was held. Raises ApiError naming the part.

    One of another size is not decoded: a small file may hold a picture that fills the memory.
    """
    if not data:
        raise invalid(f"{name} is empty", name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, which are refused by their size
            with Image.open(io.BytesIO(data), formats=formats) as image:
                check_size(name, image, side)
                found = ImageOps.exif_transpose(image)
                found.load()
                return found
    except ValueError as error:  # of check_size; and Pillow's
        raise invalid(one_line(error), name) from None
    except Image.DecompressionBombError:
        raise invalid(f"{name} has far too many pixels; this model takes {side} x {side}", name) from None
    except Exception as error:  # what Pillow raises for damaged files has no common type
        kinds = " or ".join(["a PNG"] if formats == ("PNG",) else ["PNG", "JPEG", "WebP"])
        reason = "cannot be told as" if isinstance(error, UnidentifiedImageError) else "is a damaged"
        raise invalid(f"{name} {reason} {kinds} picture", name) from None


def pixels_and_mask(image: bytes, mask: bytes | None, side: int) -> tuple[Pixels, Mask]:
    """A picture (1, side, side, 3) and where it is to be generated anew (1, side, side): where the mask, or without one the
    picture itself, is wholly transparent. Raises ApiError."""
    picture = read_picture("image", image, side)
    marked, name = (picture, "image") if mask is None else (read_picture("mask", mask, side, ("PNG",)), "mask")
    anew = _transparent(name, marked)
    try:
        pixels = as_pixels([picture.convert("RGBA").convert("RGB")], side)
    except (ValueError, OSError) as error:
        raise invalid(one_line(error), "image") from None
    if not anew.any():
        raise invalid(f"{name} has no transparent pixel, so nothing is to be generated anew", name)
    return pixels, anew[None]


def _transparent(name: str, image: Image.Image) -> Mask:
    if "A" not in image.getbands() and "transparency" not in image.info:
        raise _without_alpha(name)
    alpha: Pixels = np.asarray(image.convert("RGBA").getchannel("A"))
    return np.equal(alpha, 0)


def _without_alpha(name: str) -> ApiError:
    if name == "image":
        return invalid(
            "mask is missing, and image has no transparent pixels that could say what is to be generated anew", "mask"
        )
    return invalid("mask has no alpha channel; expected a PNG whose transparent pixels are to be generated anew", "mask")
