"""Loaders: which images a process sees in which step, decoded and transformed in workers.

A torch DataLoader whose items are whole micro-batches, named by epoch and number. Whoever is asked for one works out
by itself which rows it has, so nothing depends on who asks, or on what was asked before.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from s3a.data.decode import UnreadableImageError, decoded, image_mode
from s3a.data.images import Images, Row, Shuffle

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


# --------------------------------------------------------------------------------------------------------
# Which positions of an epoch a micro-batch has
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slices:
    """Cuts an epoch into optimizer steps, a step into a slice per process, a slice into micro-batches."""

    batch_size: int
    accumulate: int
    process_index: int
    num_processes: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be above 0")
        parts = self.num_processes * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"--batch-size is {self.batch_size} for {self.num_processes} processes and --accumulate "
                f"{self.accumulate}: it must be a multiple of {parts}, "
                f"such as {max(1, round(self.batch_size / parts)) * parts}"
            )

    def positions(self, number: int) -> np.ndarray:
        """Positions in the epoch of this process' micro-batch of that number: [n] int64."""
        step, part = divmod(number, self.accumulate)
        size = self.batch_size // self.num_processes // self.accumulate
        start = step * self.batch_size + (self.process_index * self.accumulate + part) * size
        return np.arange(start, start + size)


@dataclass(frozen=True)
class EvalSlices:
    """Cuts a split into batches and each batch into a slice per process; the last ones may be shorter."""

    num_images: int
    batch_size: int
    process_index: int
    num_processes: int

    @property
    def num_batches(self) -> int:
        """The same on every process."""
        return -(-self.num_images // self.batch_size)

    def size(self, number: int) -> int:
        """Images and padding in batch `number`, the same on every process."""
        left = min(self.batch_size, self.num_images - number * self.batch_size)
        return -(-left // self.num_processes)

    def positions(self, number: int) -> np.ndarray:
        """Rows of this process in batch `number`, which may be none: [n] int64."""
        end = min((number + 1) * self.batch_size, self.num_images)
        start = number * self.batch_size + self.process_index * self.size(number)
        return np.arange(min(start, end), min(start + self.size(number), end))


# --------------------------------------------------------------------------------------------------------
# Micro-batches, made in a worker
# --------------------------------------------------------------------------------------------------------


class TrainBatches(Dataset[Batch]):
    """The micro-batches of a process: item (epoch, number).

    Copy c of row r in epoch e is augmented from the seed and the draw `(e * repeats + c) * num_images + r`.
    """

    def __init__(
        self, images: Images, transform: Transform, mode: str, slices: Slices, num_steps: int, repeats: int, seed: int
    ) -> None:
        self.images, self.transform, self.mode = images, transform, mode
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
        raise ValueError(
            f"{len(tried)} neighbouring images cannot be read, the first is {tried[0]}: "
            f"mend {self.images.split} or take them out"
        )


class EvalBatches(Dataset[Batch]):
    """The batches of a process, in the split's order: item (0, number). There is no randomness and no substitute."""

    def __init__(self, images: Images, transform: Transform, mode: str, slices: EvalSlices) -> None:
        self.images, self.transform, self.mode, self.slices = images, transform, mode, slices

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


# --------------------------------------------------------------------------------------------------------
# Loaders
# --------------------------------------------------------------------------------------------------------


class Schedule(Sampler[MicroBatch]):
    """The micro-batches of the next pass, in order. Workers live on between passes and learn the epoch from it."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches, self.epoch, self.first = num_batches, 0, 0

    def __len__(self) -> int:
        return self.num_batches - self.first

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter([(self.epoch, number) for number in range(self.first, self.num_batches)])


def batch_loader(batches: Dataset[Batch], schedule: Schedule, num_workers: int, pin_memory: bool) -> DataLoader:
    """A DataLoader whose items are whole batches. Its own generator: a pass must not advance that of the model."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=schedule,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),
    )


class TrainLoader:
    """Shuffled, augmented images for the optimizer steps of a process.

    A step has the same images and augmentation on any number of processes and workers and for any `accumulate`: process
    p gets the p-th slice. An image that cannot be read is replaced by the one behind it in the split, and named.
    Only one pass at a time: a new one ends those begun before.

    Args:
        images: the training split.
        transform: PIL image to [channels, height, width] float32; may draw from any global generator.
        channels: of the network's input, 1 or 3.
        batch_size: images per optimizer step, over all processes.
        accumulate: micro-batches per step on each process.
        repeats: how often an image is in the epoch, each time augmented anew, side by side; an epoch has as many draws
            as without, and so fewer different images (repeated augmentation, arXiv 1902.05509 and 1901.09335, as in
            DeiT and timm's RepeatAugSampler).
        seed: of the order and the augmentation.
        process_index: of this process.
        num_processes: that share each step.
        num_workers: processes that decode and augment; 0 does it in this one. They live as long as the loader.
        pin_memory: whether batches are put where a GPU copies from without waiting.

    Raises:
        ValueError: where the batch cannot be cut that way, or there are fewer images than one batch.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform,
        *,
        channels: int,
        batch_size: int,
        accumulate: int = 1,
        repeats: int = 1,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if repeats < 1:
            raise ValueError(f"--repeats is {repeats}: it must be above 0; 1 has every image once an epoch")
        slices = Slices(batch_size, accumulate, process_index, num_processes)
        if images.num_images < batch_size:
            raise ValueError(
                f"--batch-size is {batch_size} but there are {images.num_images} training images: use a smaller one"
            )
        self.accumulate, self.steps_per_epoch = accumulate, images.num_images // batch_size
        batches = TrainBatches(images, transform, image_mode(channels), slices, self.steps_per_epoch, repeats, seed)
        self._schedule = Schedule(batches.num_batches)
        self._loader = batch_loader(batches, self._schedule, num_workers, pin_memory)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """This process' micro-batches of each optimizer step, from `first_step` on; nothing before it is decoded."""
        if not 0 <= first_step <= self.steps_per_epoch:
            raise ValueError(f"first_step is {first_step}: an epoch has {self.steps_per_epoch} steps")
        self._schedule.epoch, self._schedule.first = epoch, first_step * self.accumulate
        batches = iter(self._loader)
        for _ in range(first_step, self.steps_per_epoch):
            yield list(islice(batches, self.accumulate))


class EvalLoader:
    """Every image of a split exactly once over all processes, in order.

    Each process gets equally many batches of equal shapes; what is missing is padded with black images of label -1 and
    index -1. An image that cannot be read has label -1 too, and is named.

    Args:
        images: the split.
        transform: PIL image to [channels, height, width] float32, without randomness.
        channels: of the network's input, 1 or 3.
        batch_size: images per batch, over all processes.
        process_index: of this process.
        num_processes: that share each batch.
        num_workers: processes that decode; 0 does it in this one. They live as long as the loader.
        pin_memory: whether batches are put where a GPU copies from without waiting.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform,
        *,
        channels: int,
        batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"--batch-size is {batch_size}: it must be above 0")
        slices = EvalSlices(images.num_images, batch_size, process_index, num_processes)
        self._schedule = Schedule(slices.num_batches)
        batches = EvalBatches(images, transform, image_mode(channels), slices)
        self._loader = batch_loader(batches, self._schedule, num_workers, pin_memory)

    def __len__(self) -> int:
        return len(self._schedule)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)
