"""Images while they are made, as a picture on disk: replaced at every step, or an animation of the steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from arinar.files import check_writable, replacing

from .images import contact_sheet, save_png

#: Images of such a picture; of an animation all frames are in memory.
MOST_IMAGES = 16
# Ending -> Pillow's name of the format, and how it keeps every pixel where it can.
ANIMATED = {".webp": ("WEBP", {"lossless": True}), ".apng": ("PNG", {}), ".gif": ("GIF", {})}
# Milliseconds that a frame is shown, and the last one.
FRAME, LAST_FRAME = 80, 2000


class GrowingPicture:
    """``.png`` is replaced whenever images are added; ``.webp``, ``.apng`` and ``.gif`` are written by :meth:`close`.

    Raises ValueError for another ending, or a file that cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._frames = Path(path), list[Image.Image]()
        self._kind = self.path.suffix.lower()
        if self._kind != ".png" and self._kind not in ANIMATED:
            raise ValueError(f"the preview {self.path} has no known ending; choose .png, or {', '.join(ANIMATED)} (animated)")
        check_writable(self.path)

    def check(self, images: int, size: int) -> None:
        """Raise ValueError where so many images are not made at one time (``size`` are), or are too many to be shown."""
        if images > MOST_IMAGES:
            raise ValueError(f"a preview shows at most {MOST_IMAGES} images; these are {images}")
        if images > size:
            raise ValueError(
                f"a preview shows images that are made at one time, here {size} of {images} are: add --batch-size {images}"
            )

    def add(self, images: Sequence[Image.Image]) -> None:
        """The images after one more step."""
        frame = images[0] if len(images) == 1 else contact_sheet(images)
        if self._kind == ".png":
            save_png(frame, self.path)
        else:
            self._frames.append(frame.copy())

    def close(self) -> None:
        """Write the animation, if it is one and has frames."""
        if not self._frames:
            return
        kind, lossless = ANIMATED[self._kind]
        first, *rest = self._frames
        times = [FRAME] * len(rest) + [LAST_FRAME]
        with replacing(self.path) as temporary:
            first.save(temporary, format=kind, save_all=True, append_images=rest, duration=times, loop=0, **lossless)
