"""Corrupted images, made as they are read by the library `imagecorruptions`, as ImageNet-C was made.

An image first becomes what the model sees of it, by the resizing and cropping of its evaluation, and is corrupted then:
the strength of a blur or a noise is in pixels of the model's input.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, PILToTensor

from s3a.data.batches import Transform, keep_generators, mix_seeds, seed_generators
from s3a.data.decode import UnreadableImageError, decode_image, silence_pillow
from s3a.data.images import MapImages, Row
from s3a.robustness.corruptions import ALL

LIBRARY = "imagecorruptions-imaug"
SMALLEST = 32  # pixels of height and width that the library takes
# They draw from a generator of their own, not from numpy's global one.
SEEDED_BY_ARGUMENT = ("glass_blur", "impulse_noise")


class Part(NamedTuple):
    """A corruption at a severity; that of the images as they are is `clean`, at the severity 0."""

    corruption: str
    severity: int


CLEAN = Part("clean", 0)


@lru_cache(maxsize=1)
def load_library() -> ModuleType:
    """The library, which takes seconds to import.

    Raises:
        ValueError: where it, or what it needs of the system, is not installed.
    """
    try:
        import imagecorruptions  # noqa: PLC0415  an extra of the installation
    except ModuleNotFoundError as error:
        raise ValueError(f'corruptions need {LIBRARY} ({error}): pip install -e ".[robustness]"') from error
    except ImportError as error:  # OpenCV needs libGL.so.1 and libgthread-2.0.so.0, which containers often lack
        raise ValueError(
            f"{LIBRARY} cannot be imported ({error}): for a missing system library, apt install libgl1 libglib2.0-0"
        ) from error
    return imagecorruptions


def get_library_version() -> str:
    """The installed version of the library."""
    load_library()
    return version(LIBRARY)


@contextmanager
def use_one_thread() -> Iterator[None]:
    """Has OpenCV compute in the calling thread: it hangs in a forked worker where its threads stayed in the parent."""
    load_library()
    import cv2  # noqa: PLC0415  comes with the library

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def corrupt_image(image: Image.Image, part: Part, seed: int) -> Image.Image:
    """The corrupted image, in the same mode; it is another one for every seed where the corruption is random.

    Gray images are corrupted as RGB, with coloured noise and frost, and turned gray again. Seeds all global generators;
    put `keep_generators` around it.

    Args:
        image: "RGB" or "L", of at least 32 x 32 pixels.
        seed: between 0 and 2**32 - 1.
    """
    seed_generators(seed)
    options = {"seed": seed} if part.corruption in SEEDED_BY_ARGUMENT else {}
    pixels = np.asarray(image.convert("RGB"))
    try:
        with np.errstate(invalid="raise"):
            corrupted = load_library().corrupt(pixels, part.severity, part.corruption, **options)
    except FloatingPointError:
        if part.corruption != "spatter":
            raise
        return image  # no drop fell on a small image: the library divides by the largest one, and returns black
    return Image.fromarray(corrupted).convert(image.mode)


class CorruptedImages(MapImages):
    """What a model sees of a split's images, corrupted; to be made a tensor by `make_tensor_transform`.

    The noise of an image follows from the seed, its row and the corruption alone: it is the same for all batches,
    workers, processes and models of one input size, and the severities differ in strength, not in what is drawn first.

    Args:
        images: the split.
        rows: those of its rows to take, [n] int64.
        transform: of the model's evaluation, from an image to uint8 [channels, height, width].
        mode: of the images that it takes, "RGB" or "L".
        part: what is done to them.
    """

    def __init__(
        self, images: MapImages, rows: np.ndarray, transform: Transform, mode: str, part: Part, seed: int
    ) -> None:
        self.images, self.rows, self.transform, self.mode = images, rows, transform, mode
        self.part, self.seed = part, seed
        self.split, self.num_images = images.split, len(rows)
        # Once in this process: workers that are forked from it have what that imports and compiles
        with keep_generators(), use_one_thread():
            self._corrupt(Row(0, Image.new(mode, (SMALLEST, SMALLEST))))

    def name_of(self, index: int) -> str:
        return self.images.name_of(index)

    def read_rows(self, indices: list[int]) -> list[Row]:
        """The corrupted rows; those that cannot be decoded are as the source has them, for whoever tries again.

        Their `index` is the row in the whole split.
        """
        rows = self.images.read_rows(self.rows[indices].tolist())
        with keep_generators(), use_one_thread(), silence_pillow():
            return [self._corrupt(row) for row in rows]

    def _corrupt(self, row: Row) -> Row:
        try:
            image = self._show(decode_image(row.encoded, self.mode))
        except UnreadableImageError:
            return row
        if self.part != CLEAN:
            image = corrupt_image(image, self.part, mix_seeds(self.seed, ALL.index(self.part.corruption), row.index))
        return Row(row.index, image, row.label)

    def _show(self, image: Image.Image) -> Image.Image:
        """The image as the model would see it; ValueError where its transform gives no pixels."""
        pixels = self.transform(image)
        if pixels.dtype != torch.uint8 or pixels.ndim != 3:
            raise ValueError(
                f"the preprocessing of the weights gives {pixels.dtype} of shape {list(pixels.shape)}: it must give "
                "pixels, uint8 [channels, height, width], which are then corrupted and normalised"
            )
        if self.mode == "L":
            return Image.fromarray(pixels[0].numpy())
        return Image.fromarray(rearrange(pixels, "channels height width -> height width channels").numpy())


def make_tensor_transform(height: int, width: int) -> Transform:
    """From an image of that size to uint8 [channels, height, width]; black images of padding become as large."""
    transform: Transform = Compose([CenterCrop((height, width)), PILToTensor()])
    return transform


def choose_rows(num_images: int, wanted: int | None) -> np.ndarray:
    """The rows of so many images, evenly spaced over a split; None is all. [n] int64

    Raises:
        ValueError: for fewer than one, or more than there are.
    """
    wanted = num_images if wanted is None else wanted
    if not 1 <= wanted <= num_images:
        raise ValueError(f"--num-images is {wanted}: it must be from 1 to {num_images}, or left out for all")
    return np.arange(wanted) * num_images // wanted
