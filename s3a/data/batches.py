"""Micro-batches, made in a worker.

Whoever is asked for a micro-batch works out by itself which rows it has, so nothing depends on who asks, or on what was
asked before.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from s3a.data.decode import UnreadableImageError, decode_image
from s3a.data.images import DataError, Images, Row, Shuffle
from s3a.data.slices import EvalSlices, Slices

Transform = Callable[[Image.Image], Tensor]
BatchKey = tuple[int, int]
"""Which micro-batch of a process: the epoch, and its number in it."""


class Batch(NamedTuple):
    """The images and labels of one forward of a process."""

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
        self, images: Images, transform: Transform, mode: str, slices: Slices, repeats: int, seed: int
    ) -> None:
        self.images = copy(images)  # each loader has its own place in a stream
        self.transform, self.mode, self.slices = transform, mode, slices
        self.repeats, self.seed = repeats, seed
        self.num_rows = -(-slices.num_steps * slices.batch_size // repeats)

    def __getitem__(self, key: BatchKey) -> Batch:
        epoch, number = key
        shuffle = Shuffle(self.seed, epoch, self.num_rows)
        order = self.images.shuffle_rows(shuffle)

        def list_upcoming() -> np.ndarray:
            return order[list_upcoming_positions(self.slices, number) // self.repeats]

        positions = self.slices.list_positions(number)
        indices = order[positions // self.repeats]
        draws = (epoch * self.repeats + positions % self.repeats) * self.images.num_images + indices
        unreadable: list[str] = []
        images, rows = [], []
        with keep_generators():
            for draw, candidates in zip(draws, self.images.read(indices, shuffle, list_upcoming), strict=True):
                image, row = self._decode_first_readable(candidates, unreadable)
                seed_generators(self.seed, int(draw))
                images.append(self.transform(image))
                rows.append(row)
        return stack_batch(images, [row.label for row in rows], [row.index for row in rows], unreadable)

    def _decode_first_readable(self, candidates: Iterator[Row], unreadable: list[str]) -> tuple[Image.Image, Row]:
        """The first of the rows that can be decoded; the names of those before it are added to `unreadable`."""
        tried = []
        for row in candidates:
            try:
                return decode_image(row.encoded, self.mode), row
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

    def __getitem__(self, key: BatchKey) -> Batch:
        _, number = key
        black = Image.new(self.mode, (32, 32))  # stands where there is no image
        images, labels, indices, unreadable = [], [], [], []
        rows = self.slices.list_positions(number)
        for candidates in self.images.read(rows, None, lambda: list_upcoming_positions(self.slices, number)):
            row = next(candidates)
            try:
                image, label = decode_image(row.encoded, self.mode), row.label
            except UnreadableImageError:
                unreadable.append(self.images.name_of(row.index))
                image, label = black, -1
            images.append(self.transform(image))
            labels.append(label)
            indices.append(row.index)
        padding = self.slices.count_rows(number) - len(images)
        images += [self.transform(black)] * padding
        return stack_batch(images, labels + [-1] * padding, indices + [-1] * padding, unreadable)


def stack_batch(images: list[Tensor], labels: list[int], indices: list[int], unreadable: list[str]) -> Batch:
    """Makes a Batch of lists of equal length."""
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices), [*dict.fromkeys(unreadable)])


def list_upcoming_positions(slices: Slices | EvalSlices, number: int) -> np.ndarray:
    """The positions that this worker will be asked for after micro-batch `number`: [n] int64.

    Workers take turns. Of 3 workers the second makes the micro-batches 1, 4, 7, ...; asked for 1, it has 4, 7, ... to
    come.
    """
    info = get_worker_info()
    step = info.num_workers if info else 1
    later = range(number + step, slices.num_batches, step)
    return np.concatenate([np.arange(0), *map(slices.list_positions, later)])


def seed_generators(*seeds: int) -> None:
    """Seeds all three global generators, since timm's transforms draw from each."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every accelerator too, at each image


@contextmanager
def keep_generators() -> Iterator[None]:
    """Gives the three global generators their states back at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
