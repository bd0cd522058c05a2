"""Micro-batches, made in a worker.

Whoever is asked for a micro-batch works out by itself which rows it has, so nothing depends on who asks, or on what was
asked before.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from s3a.data.decode import UnreadableImageError, decoded
from s3a.data.images import DataError, Images, Row, Shuffle
from s3a.data.slices import EvalSlices, Slices

Transform = Callable[[Image.Image], Tensor]
MicroBatch = tuple[int, int]
"""A micro-batch of a process: the epoch, and its number in it."""


class Batch(NamedTuple):
    """What a process computes on at once."""

    images: Tensor
    """[n, channels, height, width] float32"""
    labels: Tensor
    """[n] int64; in evaluation -1 where there is no image: padding, or unreadable"""
    indices: Tensor
    """[n] int64, the row in the split of what was read, for `name_of`; -1 for padding"""
    unreadable: list[str]
    """names of the images that could not be read while this batch was made, each once"""


class TrainBatches(Dataset[Batch]):
    """The micro-batches of a process: item (epoch, number).

    Copy c of row r in epoch e is augmented from the seed and the draw `(e * repeats + c) * num_images + r`.
    """

    def __init__(
        self, images: Images, transform: Transform, mode: str, slices: Slices, num_steps: int, repeats: int, seed: int
    ) -> None:
        self.images, self.transform, self.mode = copy(images), transform, mode  # a loader has its own way in a stream
        self.slices, self.repeats, self.seed = slices, repeats, seed
        self.num_batches = num_steps * slices.accumulate
        self.num_rows = -(-num_steps * slices.batch_size // repeats)

    def __getitem__(self, which: MicroBatch) -> Batch:
        epoch, number = which
        shuffle = Shuffle(self.seed, epoch, self.num_rows)
        order = self.images.order(shuffle)

        def later() -> np.ndarray:
            numbers = range(number, self.num_batches, num_workers())[1:]
            return order[np.concatenate([np.arange(0), *map(self.slices.positions, numbers)]) // self.repeats]

        positions = self.slices.positions(number)
        indices = order[positions // self.repeats]
        draws = (epoch * self.repeats + positions % self.repeats) * self.images.num_images + indices
        unreadable: list[str] = []
        images, rows = [], []
        for draw, candidates in zip(draws, self.images.read(indices, shuffle, later), strict=True):
            image, row = self._first_readable(candidates, unreadable)
            images.append(seeded(partial(self.transform, image), self.seed, int(draw)))
            rows.append(row)
        return stacked(images, [row.label for row in rows], [row.index for row in rows], unreadable)

    def _first_readable(self, candidates: Iterator[Row], unreadable: list[str]) -> tuple[Image.Image, Row]:
        tried = []
        for row in candidates:
            try:
                return decoded(row.cell, self.mode), row
            except UnreadableImageError:
                tried.append(self.images.name_of(row.index))
                unreadable.append(tried[-1])
        raise DataError(
            f"{len(tried)} neighbouring images cannot be read, the first is {tried[0]}: "
            f"mend {self.images.split} or take them out"
        )


class EvalBatches(Dataset[Batch]):
    """The batches of a process, in the split's order: item (0, number). There is no randomness and no substitute."""

    def __init__(self, images: Images, transform: Transform, mode: str, slices: EvalSlices) -> None:
        self.images, self.transform, self.mode, self.slices = copy(images), transform, mode, slices

    def __getitem__(self, which: MicroBatch) -> Batch:
        _, number = which

        def later() -> np.ndarray:
            numbers = range(number, self.slices.num_batches, num_workers())[1:]
            return np.concatenate([np.arange(0), *map(self.slices.positions, numbers)])

        images, labels, indices, unreadable = [], [], [], []
        for candidates in self.images.read(self.slices.positions(number), None, later):
            row = next(candidates)
            try:
                image, label = decoded(row.cell, self.mode), row.label
            except UnreadableImageError:
                unreadable.append(self.images.name_of(row.index))
                image, label = self._blank(), -1
            images.append(self.transform(image))
            labels.append(label)
            indices.append(row.index)
        padding = self.slices.size(number) - len(images)
        images += [self.transform(self._blank())] * padding
        return stacked(images, labels + [-1] * padding, indices + [-1] * padding, unreadable)

    def _blank(self) -> Image.Image:
        """Stands where there is no image; black."""
        return Image.new(self.mode, (32, 32))


def stacked(images: Sequence[Tensor], labels: list[int], indices: list[int], unreadable: list[str]) -> Batch:
    """One Batch of lists of equal length."""
    return Batch(torch.stack(list(images)), torch.tensor(labels), torch.tensor(indices), [*dict.fromkeys(unreadable)])


def num_workers() -> int:
    """How many workers take turns with the caller: it makes every so-many-th micro-batch."""
    info = get_worker_info()
    return info.num_workers if info else 1


def seeded(call: Callable[[], Tensor], *seeds: int) -> Tensor:
    """Calls with all three global generators seeded, and puts them back: timm's transforms draw from each."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every accelerator too, at each image
    try:
        return call()
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
