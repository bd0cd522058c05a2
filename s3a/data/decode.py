"""Decodes image files of any kind into what networks take: upright, eight bits a channel, gray or RGB."""

import io
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, TypedDict

import numpy as np
from PIL import Image, ImageOps

# What Pillow raises at files that are broken, or are no images.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
SIXTEEN_BITS = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow would cut what is above 255


class EncodedImage(TypedDict):
    """An image as the datasets library stores it: the bytes of its file, or None and a path."""

    bytes: bytes | None
    path: str | None


class UnreadableImageError(ValueError):
    """The file is missing, or is not an image that can be decoded."""


def choose_mode(channels: int) -> str:
    """Pillow's mode for a network's input channels; ValueError for a number that images do not have."""
    if channels not in (1, 3):
        raise ValueError(f"in_chans is {channels}: images are loaded with 1 or 3 channels")
    return "L" if channels == 1 else "RGB"


def decode_image(encoded: EncodedImage | None, mode: str) -> Image.Image:
    """The image of a dataset's row in `mode`, "RGB" or "L"; see `read_image`.

    Raises:
        UnreadableImageError: where it cannot be read.
    """
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        raise UnreadableImageError("it is empty")
    content, path = encoded["bytes"], encoded["path"]
    try:
        return read_image(str(path) if content is None else io.BytesIO(content), mode)
    except (ValueError, FileNotFoundError) as error:
        raise UnreadableImageError(str(error)) from error


def read_image(file: str | Path | BinaryIO, mode: str = "RGB", name: str | None = None) -> Image.Image:
    """Reads an image of any kind that Pillow knows, turned as its EXIF orientation says; of several frames the first.

    Transparency is left out, and of 16 bits the upper eight are taken, as Pillow does for colours.

    Args:
        file: a path, or an open file.
        mode: "RGB", or "L" for gray.
        name: what errors call the file; None is its path.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it cannot be read, or holds numbers of no known range.
    """
    name = name or str(file)
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(reduce_to_eight_bits(image)).convert(mode)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image {name} does not exist: check the path") from error
    except UNREADABLE as error:
        raise ValueError(f"image {name} cannot be read ({error}): mend it or take it out") from error


def reduce_to_eight_bits(image: Image.Image) -> Image.Image:
    """The image in a mode that converts to gray and RGB without loss of range."""
    if image.mode in SIXTEEN_BITS:
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError(f"its pixels are from {pixels.min()} to {pixels.max()}, more than 16 bits hold")
        gray = Image.fromarray((pixels >> 8).astype(np.uint8))
        gray.info = dict(image.info)
        return gray
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of no known range")
    return image.convert("RGBA") if "transparency" in image.info else image
