"""A request to generate a part of a picture anew."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from arinar.runtime import Known
from arinar.runtime.editing import Mask, Pixels, about_edit, hide, paste_back, token_mask
from arinar.runtime.request import Sampling

from .api import EditRequest
from .errors import invalid, of_value
from .uploads import pixels_and_mask

if TYPE_CHECKING:
    from .service import Service


@dataclass(frozen=True)
class Edit:
    """What `Pipeline.edit` would be called with, its picture encoded: the known tokens are in ``sampling``."""

    service: Service
    sampling: Sampling
    pixels: Pixels  # (1, H, W, 3)
    anew: Mask  # (1, L)
    about: dict[str, Any]  # for the results' files

    @classmethod
    async def prepare(cls, service: Service, asked: EditRequest, files: Mapping[str, bytes]) -> Edit:
        """Check everything, then encode the picture. Raises ApiError."""
        if unexpected := sorted(set(files) - {"image", "mask"}):
            raise invalid(
                f"unknown file {unexpected[0][:60]!r}; expected image and mask", unexpected[0][:60], "unknown_parameter"
            )
        if "image" not in files:
            raise invalid("image is missing; send it as a file", "image", "missing")
        pipeline, config = service.pipeline, service.pipeline.config
        sampling = asked.sampling(pipeline, service.classes)
        pixels, mask = await asyncio.to_thread(pixels_and_mask, files["image"], files.get("mask"), config.img_size)
        try:
            anew = token_mask(mask, config, asked.grow or 0)
        except ValueError as error:
            raise of_value(error, EditRequest.model_fields) from None
        unknown = np.broadcast_to(anew, (len(sampling), config.seq_len))
        blank = np.zeros((*unknown.shape, config.token_dim), np.float32)
        try:
            Known(blank, ~unknown).check(len(sampling), config)
        except ValueError as error:  # a causal model goes on from what it has
            raise invalid(str(error), "mask") from None
        tokens = await service.run(lambda: pipeline.encode(hide(pixels, anew, config)))
        known = Known(np.ascontiguousarray(np.broadcast_to(tokens, blank.shape)), ~unknown)
        about = about_edit(pixels[0], mask[0], asked.grow or 0, asked.paste is not False)
        return cls(service, replace(sampling, known=known), pixels, anew, about)

    def pasted(self, image: Image.Image) -> Image.Image:
        """A picture that was made, outside the mask with the pixels that were given."""
        if not self.about["paste"]:
            return image
        return paste_back([image], self.pixels, self.anew, self.service.pipeline.config)[0]
