"""Encoded images as PIL images with the channels of a network, of whatever kind the file is."""

import io
from typing import Any

from PIL import Image

from s3a.images import read_image

Cell = dict[str, Any]
"""An image as datasets stores it: `bytes`, or None and a `path`."""


class UnreadableImageError(ValueError):
    """The file is missing, or is not an image that can be decoded."""


def decoded(cell: Cell | None, mode: str) -> Image.Image:
    """The image of a cell in `mode`, "RGB" or "L". See `images.read_image`.

    Raises:
        UnreadableImageError: where it cannot be read.
    """
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise UnreadableImageError("it is empty")
    file = cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
    try:
        return read_image(file, mode)
    except (ValueError, FileNotFoundError) as error:
        raise UnreadableImageError(str(error)) from error
