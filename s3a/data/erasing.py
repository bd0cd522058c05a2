"""Random erasing: a worker draws what is erased of each image, and the device puts it over the normalised pixels."""

from typing import NamedTuple

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor


class Rectangle(NamedTuple):
    """A part of an image of a batch, in pixels."""

    image: int
    """which one of the batch"""
    top: int
    left: int
    height: int
    width: int


class Erasure(NamedTuple):
    """What is erased of the images of a batch, once they are normalised."""

    rectangles: list[Rectangle]
    """where, in the order in which they are put there"""
    noise: Tensor
    """[pixels of all rectangles, times channels] float32: each rectangle's [channels, height, width], one behind the
    other. A single tensor, since each one that leaves a worker takes a file descriptor."""


class Canvas:
    """Stands for a normalised image where timm's RandomErasing erases: notes what would be put where.

    So what is drawn, and in which order, is timm's own, and no image of floating-point numbers is needed for it.

    Args:
        image: its number in the batch.
        shape: [channels, height, width].
    """

    dtype = torch.float32

    def __init__(self, image: int, shape: torch.Size) -> None:
        self.image, self.shape = image, shape
        self.erased: list[tuple[Rectangle, Tensor]] = []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], noise: Tensor) -> None:
        _, rows, columns = place
        height, width = rows.stop - rows.start, columns.stop - columns.start
        rectangle = Rectangle(self.image, rows.start, columns.start, height, width)
        self.erased.append((rectangle, noise.expand(self.shape[0], height, width)))  # one colour may stand for all


def draw_erased(erasing: RandomErasing, image: int, shape: torch.Size) -> list[tuple[Rectangle, Tensor]]:
    """Draws what is erased of an image: rectangles, each with its noise [channels, height, width].

    Args:
        image: its number in the batch.
        shape: [channels, height, width].
    """
    canvas = Canvas(image, shape)
    erasing(canvas)
    return canvas.erased


def join_erased(erased: list[tuple[Rectangle, Tensor]]) -> Erasure | None:
    """What is erased of a whole batch; None where nothing is."""
    if not erased:
        return None
    return Erasure([rectangle for rectangle, _ in erased], torch.cat([noise.flatten() for _, noise in erased]))


def erase(images: Tensor, erasure: Erasure) -> None:
    """Puts the noise of an erasure over images, in place."""
    start = 0
    for image, top, left, height, width in erasure.rectangles:
        part = images[image, :, top : top + height, left : left + width]  # [channels, height, width]
        part.copy_(erasure.noise[start : start + part.numel()].view(part.shape))
        start += part.numel()
