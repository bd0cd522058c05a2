"""Stochastic depth (arXiv 1603.09382): residual branches are left out at random, image by image."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from s3a.support.caches import cache_results
from s3a.support.compiler import make_plain_tensors, to_device


@dataclass(frozen=True)
class BatchPlace:
    """Which images of a larger batch a forward has.

    Attributes:
        generator: of the draws for the larger batch.
        first: the place of its first image in the larger batch, which has `total`.
    """

    generator: torch.Generator
    first: int
    total: int


PLACE: ContextVar[BatchPlace | None] = ContextVar("place", default=None)


@contextmanager
def place_in_batch(seed: int, first: int, total: int, device: torch.device) -> Iterator[None]:
    """Inside, what is drawn for an image follows from the seed and from its place in a larger batch.

    So a batch may be cut in any way, over processes and into parts, and its images keep the same branches.

    Args:
        first: the place of a forward's first image in the larger batch, which has `total` images.
        device: of the forward.
    """
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    token = PLACE.set(BatchPlace(generator, first, total))
    try:
        yield
    finally:
        PLACE.reset(token)


def draw_branch_scales(rates: tuple[float, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Draws once for several blocks, since each draw is a few small kernels.

    Args:
        rates: how often each block drops a branch.
        x: [batch, ...], whose dtype and device are taken.

    Returns:
        For each block [2, batch, 1, 1, 1]: a factor for each of two branches of each image, 0 if dropped. At rate 0.5
        and for two images, [[0, 2], [2, 2]] drops the first branch of the first image alone.
    """
    kept = find_kept_shares(rates, x.device)
    place = PLACE.get()
    if place is None:
        drawn = torch.rand(len(rates), 2, x.shape[0], 1, 1, 1, device=x.device)
    else:
        drawn = torch.rand(len(rates), 2, place.total, 1, 1, 1, generator=place.generator, device=x.device)
        drawn = drawn[:, :, place.first : place.first + x.shape[0]]
    return ((drawn < kept) / kept.clamp(min=1e-12)).to(x.dtype).unbind()


@cache_results(maxsize=256)
def build_kept_shares(rates: tuple[float, ...], device: torch.device) -> Tensor:
    """How often each block keeps a branch: [blocks, 1, 1, 1, 1, 1] float32."""
    with make_plain_tensors():
        return to_device(1 - np.array(rates, dtype=np.float32).reshape(-1, 1, 1, 1, 1, 1), device)


@torch.compiler.assume_constant_result
def find_kept_shares(rates: tuple[float, ...], device: torch.device) -> Tensor:
    """`build_kept_shares`, whose result a tracer takes as a constant: it is copied to the device once."""
    return build_kept_shares(rates, device)


class PlacedDropout2d(nn.Module):
    """Drops channels of images in training, as `nn.Dropout2d`, by their images' places in a larger batch.

    Args:
        rate: how often a channel of an image is dropped; the others grow by 1 / (1 - rate).

    Shape:
        [batch, channels, height, width] to the same.

    Raises:
        ValueError: for a rate that is not from 0 up to, but below, 1.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"the dropout rate is {rate}: it must be at least 0 and less than 1")
        self.rate = rate

    def extra_repr(self) -> str:
        return f"rate={self.rate}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        place = PLACE.get()
        if place is None:
            drawn = torch.rand(*x.shape[:2], 1, 1, device=x.device)
        else:
            drawn = torch.rand(place.total, x.shape[1], 1, 1, generator=place.generator, device=x.device)
            drawn = drawn[place.first : place.first + x.shape[0]]
        return x * ((drawn >= self.rate) / (1 - self.rate)).to(x.dtype)


def make_image_generators(num_images: int, device: torch.device) -> list[torch.Generator]:
    """A generator for each image of a forward, for draws whose number differs from image to image.

    Inside of `place_in_batch` an image's generator follows from the seed and from its place in the larger batch, and
    elsewhere from torch's global generator. A second call in the same place returns generators that start alike, so
    a forward makes them once.

    Args:
        device: of what they draw.
    """
    place = PLACE.get()
    seed = int(torch.randint(2**63 - 1, ())) if place is None else place.generator.initial_seed()
    first = 0 if place is None else place.first
    generators = []
    for index in range(first, first + num_images):
        low, high = np.random.SeedSequence([seed, index]).generate_state(2, np.uint32).tolist()
        generators.append(torch.Generator(device).manual_seed(low + (high << 32)))
    return generators
