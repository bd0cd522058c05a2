"""How the images of dense tasks are resized, cropped and coloured, together with their targets.

The arithmetic is torchvision's (transforms.v2); what is drawn, and in which order, is that of mmsegmentation and
mmdetection, by which the papers' figures came to be.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import ColorJitter, Compose, RandomApply, RandomChoice
from torchvision.transforms.v2 import functional as F

from s3a.data.targets import IGNORED, DecodedTarget
from s3a.models.detection import SIDE_MULTIPLE

LONGEST = 4
"""The longer side of an image for segmentation is at most so many times the length of the shorter one."""
CROP_TRIES = 10
INTERPOLATIONS = {mode.value: mode for mode in InterpolationMode}
BRIGHTNESS, CONTRAST, SATURATION, HUE = (
    RandomApply([ColorJitter(**{name: strength})], p=0.5)
    for name, strength in (("brightness", 0.125), ("contrast", 0.5), ("saturation", 0.5), ("hue", 0.1))
)
DISTORTION = RandomChoice(
    [Compose([BRIGHTNESS, CONTRAST, SATURATION, HUE]), Compose([BRIGHTNESS, SATURATION, HUE, CONTRAST])]
)
"""mmsegmentation's photometric distortion by torchvision's arithmetic, which scales the brightness instead of adding to
it; unlike torchvision's own RandomPhotometricDistort it leaves the order of the channels alone."""


def fit_size(height: int, width: int, short: float, long: float) -> tuple[int, int]:
    """The largest height and width of the same aspect whose shorter side is at most `short`, the longer at most `long`.

    `fit_size(480, 640, 800, 1333)` is (800, 1067).
    """
    factor = min(short / min(height, width), long / max(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize(
    image: Image.Image, target: DecodedTarget, size: tuple[int, int], mode: InterpolationMode
) -> tuple[Image.Image, DecodedTarget]:
    """Image and target resized to (height, width); label maps and masks by the nearest pixel."""
    if (image.height, image.width) == size:
        return image, target
    resized = F.resize(image, list(size), interpolation=mode, antialias=True)
    return resized, {name: F.resize(each, list(size)) if is_spatial(name) else each for name, each in target.items()}


def is_spatial(name: str) -> bool:
    """Whether what a target has under a name lies on the image."""
    return name in ("label_map", "boxes", "masks")


def crop(
    image: Image.Image, target: DecodedTarget, top: int, left: int, height: int, width: int
) -> tuple[Image.Image, DecodedTarget]:
    """A part of image and target."""
    place = top, left, height, width
    return F.crop(image, *place), {
        name: F.crop(each, *place) if is_spatial(name) else each for name, each in target.items()
    }


def mirror(image: Image.Image, target: DecodedTarget) -> tuple[Image.Image, DecodedTarget]:
    """Image and target mirrored left to right."""
    return F.horizontal_flip(image), {
        name: F.horizontal_flip(each) if is_spatial(name) else each for name, each in target.items()
    }


def pad_pixels(pixels: Tensor, height: int, width: int, color: Sequence[int]) -> Tensor:
    """Pixels [channels, height, width] uint8 with a color on the right and below, up to a size."""
    if tuple(pixels.shape[1:]) == (height, width):
        return pixels
    padded = torch.tensor(color, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    padded[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return padded


def find_mean_color(mean: Sequence[float]) -> list[int]:
    """The pixel that normalisation makes 0, up to rounding: what the authors pad normalised images with."""
    return [round(255 * each) for each in mean]


@dataclass(frozen=True, kw_only=True)
class SegmentationAugmentation:
    """A training crop and its label map, in the steps of mmsegmentation: resize, crop, mirror, distort, pad.

    Attributes:
        side: of the crop.
        scale: smallest and largest factor of the image's size.
        largest_class: share of a crop that no class may exceed; ten crops are tried.
        flip: how often a crop is mirrored.
        distorts: whether brightness, contrast, saturation and hue change.
        color: of padding; label maps are padded with IGNORED.
    """

    side: int
    scale: tuple[float, float]
    largest_class: float
    flip: float
    distorts: bool
    mode: InterpolationMode
    color: Sequence[int]

    def __call__(self, image: Image.Image, target: DecodedTarget) -> tuple[Tensor, DecodedTarget]:
        short = self.side * random.uniform(*self.scale)
        image, target = resize(image, target, fit_size(image.height, image.width, short, LONGEST * short), self.mode)
        image, target = self.crop(image, target)
        if random.random() < self.flip:
            image, target = mirror(image, target)
        if self.distorts:
            image = DISTORTION(image)
        pixels = pad_pixels(F.pil_to_tensor(image), self.side, self.side, self.color)
        label_map = torch.full((self.side, self.side), IGNORED, dtype=torch.uint8)
        label_map[: image.height, : image.width] = target["label_map"]
        return pixels, {"label_map": label_map}

    def crop(self, image: Image.Image, target: DecodedTarget) -> tuple[Image.Image, DecodedTarget]:
        """A square of the image, or all of a smaller side; another one while a class fills too much of it."""
        height, width = min(self.side, image.height), min(self.side, image.width)
        for _ in range(CROP_TRIES):
            place = random.randint(0, image.height - height), random.randint(0, image.width - width)
            if self.largest_class >= 1 or self.is_mixed(target["label_map"], *place, height, width):
                break
        return crop(image, target, *place, height, width)

    def is_mixed(self, label_map: Tensor, top: int, left: int, height: int, width: int) -> bool:
        """Whether a part of a label map has several classes, of which none is too large."""
        part = label_map[top : top + height, left : left + width].numpy()
        counts = np.bincount(part.ravel(), minlength=IGNORED + 1)[:IGNORED]
        return bool(np.count_nonzero(counts) > 1 and counts.max() < self.largest_class * counts.sum())


@dataclass(frozen=True, kw_only=True)
class SegmentationView:
    """A whole validation image, resized, beside its label map as it is.

    The target says what of the pixels is image (`size`), and which size it is to be seen at (`padded_size`).

    Attributes:
        short: length of the shorter side; the longer one has at most four times as much.
        multiple: of the sides, to which the image is padded.
    """

    short: int
    multiple: int
    mode: InterpolationMode
    color: Sequence[int]

    def __call__(self, image: Image.Image, target: DecodedTarget) -> tuple[Tensor, DecodedTarget]:
        size = fit_size(image.height, image.width, self.short, LONGEST * self.short)
        pixels = F.pil_to_tensor(resize(image, {}, size, self.mode)[0])
        padded = [-(-side // self.multiple) * self.multiple for side in size]
        sizes = {"size": torch.tensor(size), "padded_size": torch.tensor(padded)}
        return pad_pixels(pixels, padded[0], padded[1], self.color), {**target, **sizes}


CROPPED_SIDES = (400, 500, 600)
SMALLEST_CROP, LARGEST_CROP = 384, 600
SMALLEST_SIDE = 1e-2
"""Boxes that a crop leaves less of, in pixels, are left out."""


@dataclass(frozen=True, kw_only=True)
class DetectionAugmentation:
    """A training image and its objects, in the steps of mmdetection: mirror, resize, and for half of them crop before.

    Attributes:
        short_sides: of which the length of the shorter side is drawn.
        long_side: longest that the longer side may become.
        crops: whether half of the images are resized to a shorter side of 400, 500 or 600 and cropped, before they are
            resized (arXiv 2005.12872).
        flip: how often an image is mirrored.
        masks: whether masks are moved with the image; else they are left out.
    """

    short_sides: Sequence[int]
    long_side: int
    crops: bool
    flip: float
    mode: InterpolationMode
    masks: bool = True

    def __call__(self, image: Image.Image, target: DecodedTarget) -> tuple[Tensor, DecodedTarget]:
        target = {name: each for name, each in target.items() if self.masks or name != "masks"}
        target = select_objects(target, ~target["is_crowd"])
        if random.random() < self.flip:
            image, target = mirror(image, target)
        if self.crops and random.random() < 0.5:
            image, target = self.crop(image, target)
        size = fit_size(image.height, image.width, random.choice(self.short_sides), self.long_side)
        image, target = resize(image, target, size, self.mode)
        return F.pil_to_tensor(image), {**target, "size": torch.tensor(size)}

    def crop(self, image: Image.Image, target: DecodedTarget) -> tuple[Image.Image, DecodedTarget]:
        """A part of the resized image, and what of its objects lies in it."""
        size = fit_size(image.height, image.width, random.choice(CROPPED_SIDES), float("inf"))
        image, target = resize(image, target, size, self.mode)
        sides = [random.randint(min(side, SMALLEST_CROP), min(side, LARGEST_CROP)) for side in size]
        place = [random.randint(0, side - part) for side, part in zip(size, sides, strict=True)]
        image, target = crop(image, target, place[0], place[1], sides[0], sides[1])
        corners = target["boxes"].as_subclass(Tensor)
        return image, select_objects(target, (corners[:, 2:] - corners[:, :2] > SMALLEST_SIDE).all(1))


def select_objects(target: DecodedTarget, chosen: Tensor) -> DecodedTarget:
    """Those of the objects; `chosen` is [n] bool."""
    return {name: tv_tensors.wrap(each[chosen], like=each) for name, each in target.items()}


@dataclass(frozen=True, kw_only=True)
class DetectionView:
    """A whole validation image, resized.

    The target has its size, the one that it is to be padded to, and the one that it had; objects are left out.

    Attributes:
        buckets: see `choose_bucket`.
    """

    short_side: int
    long_side: int
    mode: InterpolationMode
    buckets: Sequence[tuple[int, int]]

    def __call__(self, image: Image.Image, target: DecodedTarget) -> tuple[Tensor, DecodedTarget]:
        size = fit_size(image.height, image.width, self.short_side, self.long_side)
        pixels = F.pil_to_tensor(resize(image, {}, size, self.mode)[0])
        sizes = {
            "size": size,
            "padded_size": choose_bucket(size[0], size[1], self.buckets),
            "original_size": (image.height, image.width),
        }
        return pixels, {name: torch.tensor(each) for name, each in sizes.items()}


def choose_bucket(height: int, width: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size that images of height x width are padded to: the first bucket that holds them, or multiples of 32."""
    fitting = (bucket for bucket in buckets if bucket[0] >= height and bucket[1] >= width)
    return next(fitting, (height + -height % SIDE_MULTIPLE, width + -width % SIDE_MULTIPLE))


def list_buckets(short_side: int, long_side: int) -> list[tuple[int, int]]:
    """The three sizes of the batches of a compiled run: of landscapes, of portraits, and of both."""
    short, long = choose_bucket(short_side, long_side, [])
    return [(short, long), (long, short), (long, long)]
