"""Encoded images as PIL images with the channels of a network, of whatever kind the file is."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

Cell = dict[str, Any]
"""An image as datasets stores it: `bytes`, or None and a `path`."""

BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises for files that are cut off, damaged, no image at all, or larger than it dares to unpack."""


class UnreadableImageError(ValueError):
    """The file is missing, or is not an image that can be decoded."""


def image_mode(channels: int) -> str:
    """PIL's mode for a network's input channels; ValueError where there is none."""
    if channels not in (1, 3):
        raise ValueError(f"in_chans is {channels}: images are loaded with 1 or 3 channels")
    return "L" if channels == 1 else "RGB"


def decoded(cell: Cell | None, mode: str) -> Image.Image:
    """The image of a cell in `mode`, "RGB" or "L". Transparency is dropped, orientation tags are not followed.

    Raises:
        UnreadableImageError: where it cannot be read.
    """
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise UnreadableImageError("it is empty")
    try:
        with Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])) as image:
            return converted(image, mode)
    except BROKEN as error:
        raise UnreadableImageError(str(error)) from error


def converted(image: Image.Image, mode: str) -> Image.Image:
    """An opened image in `mode`; Pillow alone would cut 16 bits off at 255 and warn of transparent palettes."""
    if image.mode.startswith("I"):
        image = Image.fromarray(eight_bits(np.asarray(image)))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Samples of 0 to 65,535, which Pillow hands out as modes I and I;16, as the nearest of 0 to 255."""
    return ((np.clip(pixels, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)
