"""Decodes image files of any kind into what networks take: upright, eight bits a channel, gray or RGB."""

import io
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypedDict, cast

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

# What Pillow raises at files that are broken, or are no images.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
)
SIXTEEN_BITS = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow would cut what is above 255

FILE_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISSOCK: "a socket",
    stat.S_ISBLK: "a device",
    stat.S_ISCHR: "a device",
}


class EncodedImage(TypedDict):
    """An image as the datasets library stores it: the bytes of its file, or None and a path."""

    bytes: bytes | None
    path: str | None


MAX_ENCODED_BYTES = 256 * 2**20
"""The largest file that is decoded: what the most pixels that Pillow allows take as uncompressed RGB."""


SHRINK = "shrink it or take it out"


class UnreadableImageError(ValueError):
    """The file is missing, or is not an image that can be decoded."""

    def __init__(self, reason: str, remedy: str = "mend it or take it out") -> None:
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy

    def __str__(self) -> str:
        return f"{self.reason}: {self.remedy}"


def choose_mode(channels: int) -> str:
    """Pillow's mode for a network's input channels; ValueError for a number that images do not have."""
    if channels not in (1, 3):
        raise ValueError(f"in_chans is {channels}: images are loaded with 1 or 3 channels")
    return "L" if channels == 1 else "RGB"


def decode_image(encoded: EncodedImage | Path | Image.Image | None, mode: str) -> Image.Image:
    """The image of a dataset's row in `mode`, "RGB" or "L"; see `read_image`.

    Inside of `silence_pillow` Pillow's warnings are not printed.

    Args:
        encoded: what the row holds; or a file that the source itself found, or an image that it made. A path in a row
            is never opened, since whoever wrote the row could have named any file of this machine.

    Raises:
        UnreadableImageError: where it cannot be read.
    """
    if isinstance(encoded, Image.Image):
        return encoded if encoded.mode == mode else encoded.convert(mode)
    with open_encoded(encoded) as file:
        return decode(file, mode)


@contextmanager
def open_encoded(encoded: EncodedImage | Path | None) -> Iterator[BinaryIO]:
    """Opens what a row holds, or a file that the source itself found, to be decoded; see `decode_image`.

    Raises:
        UnreadableImageError: where there is nothing to open.
    """
    if isinstance(encoded, Path):
        try:
            with open_file(encoded) as file:
                yield file
        except FileNotFoundError as error:
            raise UnreadableImageError("it does not exist") from error
        return
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        raise UnreadableImageError("it is empty")
    if encoded["bytes"] is None:
        raise UnreadableImageError(
            f"its row holds no bytes, only the path {encoded['path']!r}, and paths are for image folders",
            "store the bytes of the images, or use --data imagefolder",
        )
    check_size(len(encoded["bytes"]))
    yield io.BytesIO(encoded["bytes"])


def read_image(file: str | Path | BinaryIO, mode: str = "RGB", name: str | None = None) -> Image.Image:
    """Reads an image of any kind that Pillow knows, turned as its EXIF orientation says; of several frames the first.

    Transparency is left out, and of 16 bits the upper eight are taken, as Pillow does for colours.

    Args:
        file: a path, or an open file.
        mode: "RGB", or "L" for gray.
        name: what errors call the file; None is its path.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it cannot be read, is no regular file, holds numbers of no known range, or has more than
            MAX_ENCODED_BYTES, or more pixels than PIL.Image.MAX_IMAGE_PIXELS.
    """
    name = name or str(file)
    try:
        with silence_pillow():
            if not isinstance(file, str | Path):
                return decode(file, mode)
            with open_file(Path(file)) as opened:
                return decode(opened, mode)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image {name} does not exist: check the path") from error
    except UnreadableImageError as error:
        raise ValueError(f"image {name} cannot be read ({error.reason}): {error.remedy}") from error


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file to be decoded; others are not even opened, since a FIFO would wait for a writer for ever.

    Raises:
        FileNotFoundError: where there is no such file.
        UnreadableImageError: where it cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = next((kind for is_kind, kind in FILE_KINDS.items() if is_kind(status.st_mode)), "something else")
            raise UnreadableImageError(f"it is {kind}, and must be a regular file")
        check_size(status.st_size)
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        if not path.is_symlink():
            raise
        raise UnreadableImageError(f"it is a link to {path.readlink()}, which does not exist") from error
    except PermissionError as error:
        raise UnreadableImageError(
            str(error.strerror), "give the user of this command the right to, or take it out"
        ) from error
    except OSError as error:
        raise UnreadableImageError(str(error.strerror or error)) from error


def check_size(num_bytes: int) -> None:
    """Raises UnreadableImageError for a file without a byte, or of more of them than any image here needs."""
    if num_bytes == 0:
        raise UnreadableImageError("it has 0 bytes")
    if num_bytes > MAX_ENCODED_BYTES:
        raise UnreadableImageError(f"it has {num_bytes:,} bytes, and at most {MAX_ENCODED_BYTES:,} are decoded", SHRINK)


def decode(file: BinaryIO, mode: str) -> Image.Image:
    """Decodes an open file; UnreadableImageError where that cannot be done."""
    with open_image(file) as image:
        upright = reduce_to_eight_bits(image)
        ImageOps.exif_transpose(upright, in_place=True)
        return upright if upright.mode == mode else upright.convert(mode)  # a copy


@contextmanager
def open_image(file: BinaryIO) -> Iterator[ImageFile.ImageFile]:
    """Reads the header of an image; turns what Pillow raises there, and while it decodes, into UnreadableImageError."""
    try:
        with Image.open(file) as image:
            check_pixels(image.width * image.height)
            yield image
    except Image.DecompressionBombError as error:
        most = cast(int, Image.MAX_IMAGE_PIXELS)
        reason = f"it has more than {2 * most:,} pixels, and at most {most:,} are decoded"
        raise UnreadableImageError(reason, SHRINK) from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError("it is no image of a kind that Pillow knows") from error
    except UnreadableImageError:
        raise
    except UNREADABLE as error:
        raise UnreadableImageError(str(error)) from error


def check_pixels(num_pixels: int) -> None:
    """Raises UnreadableImageError where Pillow would only warn."""
    if Image.MAX_IMAGE_PIXELS is not None and num_pixels > Image.MAX_IMAGE_PIXELS:
        raise UnreadableImageError(
            f"it has {num_pixels:,} pixels, and at most {Image.MAX_IMAGE_PIXELS:,} are decoded", SHRINK
        )


@contextmanager
def silence_pillow() -> Iterator[None]:
    """Hides Pillow's warnings about files: they do not name these, and of many pixels there is an error.

    To change filters makes Python forget which warnings it has shown, so it is for many images at a time.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.\w+Plugin$")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


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
