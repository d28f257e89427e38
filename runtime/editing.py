"""What editing takes, a picture and a mask, checked here and turned into arrays; and the way from the VAE's latents to
tokens.

Pixels are (B, H, W, 3) uint8, H = W = the model's side. A mask is True where a picture is to be generated anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from arinar.config import ArinarConfig
from arinar.text import shown
from arinar.values import is_whole

from .images import MOST_PIXELS, check_size

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

#: What the model is not to see: of 0..255 the value nearest to 0 in [-1, 1] (halves go to the even one).
MID_GREY = 128
# Modes of Pillow that RGB can show.
_MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")


def as_pixels(images: Any, side: int, *, resize: bool = False) -> Pixels:
    """Pictures as (B, side, side, 3) uint8: a PIL image, a list of them, or uint8 arrays (B, H, W, 3) or (H, W, 3).

    ``resize``: those of another size are cut to a square about their centre and resized.
    Raises ValueError for what is no picture, and for one of another size where ``resize`` was not asked for.
    """
    if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
        images = [images]
    if not isinstance(images, (Sequence, np.ndarray)) or isinstance(images, (str, bytes)):
        raise ValueError(f"images is {shown(images)}; expected PIL images, or an array (B, {side}, {side}, 3) of uint8")
    if not len(images):
        raise ValueError("images is empty; give at least one")
    return np.stack([_square(f"images[{place}]", image, side, resize) for place, image in enumerate(images)])


def _square(name: str, image: Any, side: int, resize: bool) -> Pixels:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"{name} is {image.dtype} {image.shape}; expected uint8 ({side}, {side}, 3), RGB")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"{name} is {shown(image)}; expected a PIL image (PIL.Image.open reads a file) or an array of uint8")
    if resize:
        width, height = image.size
        if not 0 < width * height <= MOST_PIXELS:
            raise ValueError(f"{name} has {width} x {height} pixels; expected 1 to {MOST_PIXELS:,}: make it smaller first")
        image = ImageOps.fit(_opaque(name, image, "RGB"), (side, side), Image.Resampling.LANCZOS)
    check_size(name, image, side)
    return np.asarray(_opaque(name, image, "RGB"))


def _opaque(name: str, image: Image.Image, mode: str) -> Image.Image:
    """An image in another mode. Raises ValueError for what would be lost: transparency, more than 8 bits."""
    if image.mode not in _MODES:
        raise ValueError(f"{name} has pixels of the kind {shown(image.mode)}; expected 8 bits a channel, RGB or grey")
    try:
        layered = image.mode.endswith("A") or "transparency" in image.info
        if layered and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise ValueError(f"{name} is transparent in places; put it on a ground, or drop its alpha channel first")
        return image.convert(mode)
    except OSError as error:  # decoded only now: a damaged file
        raise ValueError(f"{name} cannot be decoded: {error}") from error


def as_mask(mask: Any, side: int) -> Mask:
    """A mask as (B, side, side) bool, B = 1 for one of all images: a bool array (H, W) or (B, H, W), or a PIL image (white
    is True) or a list of them. Raises ValueError for anything else, and another size."""
    if isinstance(mask, Image.Image):
        mask = [mask]
    if isinstance(mask, (list, tuple)) and mask and all(isinstance(item, Image.Image) for item in mask):
        for place, item in enumerate(mask):
            check_size(f"mask[{place}]", item, side)
        mask = np.stack([np.asarray(_opaque(f"mask[{place}]", item, "L")) > 127 for place, item in enumerate(mask)])
    if not isinstance(mask, np.ndarray):
        raise ValueError(f"mask is {shown(mask)}; expected an array of bool, True = generate anew, or a black and white image")
    if mask.dtype != np.bool_ or mask.ndim not in (2, 3) or mask.shape[-2:] != (side, side) or not len(mask):
        raise ValueError(
            f"mask is {mask.dtype} {mask.shape}; expected bool ({side}, {side}) or (B, {side}, {side}), True = generate anew"
        )
    return mask if mask.ndim == 3 else mask[None]


def about_edit(pixels: Pixels, mask: Mask, grow: int, paste: bool) -> dict[str, Any]:
    """What an edited image tells of the picture (H, W, 3) and the mask (H, W) that were given, and how they were taken.
    JSON-ready."""
    return {
        "image_sha256": hashlib.sha256(pixels.tobytes()).hexdigest()[:16],
        "mask_sha256": hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:16],
        "grow": int(grow),
        "paste": paste,
    }


def box_mask(box: Sequence[int], side: int) -> Mask:
    """(side, side) bool, True inside a box (x0, y0, x1, y1) of pixels from the upper left corner, x1 and y1 just outside it.
    Raises ValueError for one that is empty, or not all within the image."""
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"the box {x0},{y0},{x1},{y1} is empty; expected x0,y0,x1,y1 with x0 < x1 and y0 < y1")
    if x0 < 0 or y0 < 0 or x1 > side or y1 > side:
        raise ValueError(f"the box {x0},{y0},{x1},{y1} leaves the image, whose pixels run from 0,0 to {side},{side}")
    mask = np.zeros((side, side), np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


def token_mask(mask: Mask, config: ArinarConfig, grow: int = 0) -> Mask:
    """(B, L) bool: the tokens that have a pixel of the mask (B, H, W), and those up to ``grow`` tokens away from such, in
    all eight directions. Raises ValueError for a ``grow`` that is no number of tokens."""
    grid, step = config.grid_size, config.img_size // config.grid_size
    if not is_whole(grow) or not 0 <= grow <= grid:
        raise ValueError(f"grow is {shown(grow)}; expected an integer from 0 to {grid} (tokens along a side)")
    found = mask.reshape(len(mask), grid, step, grid, step).any((2, 4))  # (B, grid, grid)
    for _ in range(int(grow)):
        wide = np.pad(found, ((0, 0), (1, 1), (1, 1)))
        found = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), (1, 2)).any((3, 4))
    return found.reshape(len(mask), -1)


def per_image(name: str, values: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """Values of ``count`` images, or of one for all. Raises ValueError for another number."""
    if len(values) not in (1, count):
        raise ValueError(f"{name} has {len(values)} pictures for {count} labels; give one for each label, or one for all")
    return values


def hide(pixels: Pixels, anew: Mask, config: ArinarConfig) -> Pixels:
    """Pictures with every pixel of the tokens ``anew`` (B, L) grey; one picture, or one mask, serves for all."""
    return np.where(_pixels_of(anew, config), np.uint8(MID_GREY), pixels)


def paste_back(made: Sequence[Image.Image], pixels: Pixels, anew: Mask, config: ArinarConfig) -> list[Image.Image]:
    """Pictures that were made, with the given pixels wherever no token of ``anew`` is."""
    whole = np.where(_pixels_of(anew, config), np.stack([np.asarray(image) for image in made]), pixels)
    return [Image.fromarray(picture) for picture in whole]


def _pixels_of(tokens: Mask, config: ArinarConfig) -> Mask:
    """(B, L) -> (B, H, W, 1): every pixel of these tokens."""
    grid, step = config.grid_size, config.img_size // config.grid_size
    return tokens.reshape(-1, grid, grid).repeat(step, 1).repeat(step, 2)[..., None]


def to_tokens(latents: npt.NDArray[np.float32], config: ArinarConfig) -> npt.NDArray[np.float32]:
    """Latents as the VAE makes them (B, channels, h, w) -> what the model works on: normalised tokens (B, L, D), raster
    order, features ordered (channel, row, column)."""
    scale, shift = (np.asarray(value, np.float32).reshape(-1, 1, 1) for value in (config.latent_scale, config.latent_shift))
    grid, patch = config.grid_size, config.patch_size
    normal = ((latents - shift) * scale).reshape(-1, config.vae_embed_dim, grid, patch, grid, patch)
    return np.ascontiguousarray(normal.transpose(0, 2, 4, 1, 3, 5).reshape(len(latents), grid * grid, -1), np.float32)


__all__ = [
    "MID_GREY",
    "Mask",
    "Pixels",
    "as_mask",
    "as_pixels",
    "box_mask",
    "check_size",
    "hide",
    "paste_back",
    "per_image",
    "to_tokens",
    "token_mask",
]
