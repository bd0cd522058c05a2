"""Micro-batches, made in a worker."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from s3a.data.decode import UnreadableImageError, decode_image, silence_pillow
from s3a.data.erasing import Erasure, Rectangle, draw_erased, join_erased
from s3a.data.images import DataError, Images, MapImages, Row
from s3a.data.slices import EvalSlices, Slices
from s3a.data.stream import Draw, Place, Share, StreamImages
from s3a.data.targets import DecodedTarget, JoinedTargets, Target, join_targets

Transform = Callable[[Image.Image], Tensor]
"""PIL image to [channels, height, width]: uint8 are pixels, which the device normalises (`s3a.data.pixels`); floating
point is taken as it is."""
JointTransform = Callable[[Image.Image, DecodedTarget], tuple[Tensor, DecodedTarget]]
"""The same for an image and its target. Images may be of different sizes then."""
BatchKey = tuple[int, int, Place | None]
"""Which micro-batch of a process: the epoch, its number in it, and for a stream where its reader begins; None is where
the reader is, and for images that can be read in any order."""
MOST_UNREADABLE = 1000
"""So many rows without an image, one behind the other, end a run."""


class Batch(NamedTuple):
    """The images and labels of one forward of a process."""

    images: Tensor
    """[n, channels, height, width] as the transform gave them: floating point, or uint8, which lie channels last.
    Smaller images are padded with 0 to the largest height and width, on the right and below"""
    labels: Tensor
    """[n] int64, 0 where a source has other targets; in evaluation -1 where there is no image: padding or unreadable"""
    indices: Tensor
    """[n] int64, the row in the split of what was read, for `name_of`; -1 for padding"""
    unreadable: dict[str, str]
    """the names of images that could not be read while this batch was made, and why"""
    erasure: Erasure | None = None
    """what is still to be erased; None where nothing is"""
    place: Place | None = None
    """behind this batch, of the reader that made it; None where images can be read in any order"""
    targets: JoinedTargets | None = None
    """what a joint transform made of each image's target, see `split_targets`; None where targets are labels"""


@dataclass(frozen=True)
class Decoded:
    """An image and its target, which is None where it is the row's label."""

    image: Image.Image
    target: DecodedTarget | None

    def transform(self, transform: Transform | JointTransform) -> "Sample":
        """What the transform of such images makes of it."""
        if self.target is None:
            return cast(Transform, transform)(self.image), None
        return cast(JointTransform, transform)(self.image, self.target)


Sample = tuple[Tensor, DecodedTarget | None]


def decode_row(row: Row, mode: str) -> Decoded:
    """The image of a row in `mode`, and its target; UnreadableImageError where one of them cannot be read."""
    image = decode_image(row.encoded, mode)
    return Decoded(image, None if row.target is None else row.target.decode(image.height, image.width))


class TrainBatches(Dataset[Batch]):
    """The micro-batches of a process: what those of all kinds of images have in common."""

    def __init__(
        self,
        images: Images,
        transform: Transform | JointTransform,
        erasing: RandomErasing | None,
        mode: str,
        slices: Slices,
        repeats: int,
        seed: int,
    ) -> None:
        self.images, self.transform, self.erasing, self.mode = images, transform, erasing, mode
        self.slices, self.repeats, self.seed = slices, repeats, seed

    def close(self) -> None:
        """Closes files, at the end of an epoch in this process."""

    def decode(self, row: Row, tried: list[str], unreadable: dict[str, str]) -> "Decoded | None":
        """The image of a row and its target; None where one of them cannot be read.

        Args:
            tried: what is said of such images one behind the other, to be added to.
            unreadable: those of the batch, to be added to.

        Raises:
            DataError: where too many of them are neighbours.
        """
        try:
            return decode_row(row, self.mode)
        except UnreadableImageError as error:
            name = self.images.name_of(row.index)
            unreadable[name] = error.reason
            tried.append(f"{name}, since {error}")
            if len(tried) == min(MOST_UNREADABLE, self.images.num_images):
                raise DataError(
                    f"{len(tried)} images of {self.images.split} in a row cannot be read, the first is {tried[0]}"
                ) from error
            return None

    def augment(self, drawn: Iterable[tuple["Decoded", Row, int]], unreadable: dict[str, str]) -> Batch:
        """A batch of decoded images with their rows, each augmented from its seed.

        Args:
            unreadable: added to while `drawn` is iterated.
        """
        samples, rows = [], []
        erased: list[tuple[Rectangle, Tensor]] = []
        with keep_generators(), silence_pillow():
            for decoded, row, seed in drawn:
                seed_generators(seed)
                samples.append(decoded.transform(self.transform))
                rows.append(row)
                if self.erasing is not None:
                    erased += draw_erased(self.erasing, len(samples) - 1, samples[-1][0].shape)
        batch = stack_batch(samples, [row.label for row in rows], [row.index for row in rows], unreadable)
        return batch._replace(erasure=join_erased(erased))


class MapTrainBatches(TrainBatches):
    """Micro-batches of images that can be read in any order.

    Whoever is asked for one works out by itself which rows it has, so nothing depends on who asks, or on what was asked
    before. Copy c of row r in epoch e is augmented from the seed and the draw `(e * repeats + c) * num_images + r`.
    """

    images: MapImages

    def __getitem__(self, key: BatchKey) -> Batch:
        epoch, number, _ = key
        order = shuffle_rows(self.images.num_images, self.seed, epoch)
        positions = self.slices.list_positions(number)
        indices = order[positions // self.repeats]
        draws = (epoch * self.repeats + positions % self.repeats) * self.images.num_images + indices
        unreadable: dict[str, str] = {}
        seeds = [mix_seeds(self.seed, draw) for draw in draws.tolist()]  # faster in a row than between images
        candidates = zip(self.images.read_with_substitutes(indices.tolist()), seeds, strict=True)
        drawn = ((*self._decode_first_readable(rows, unreadable), seed) for rows, seed in candidates)
        return self.augment(drawn, unreadable)

    def _decode_first_readable(self, candidates: Iterator[Row], unreadable: dict[str, str]) -> tuple["Decoded", Row]:
        """The first of the rows that can be decoded; the names of those before it are added to `unreadable`."""
        tried: list[str] = []
        decoded = ((self.decode(row, tried, unreadable), row) for row in candidates)
        return next((each, row) for each, row in decoded if each is not None)


@lru_cache(maxsize=2)
def shuffle_rows(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's images, [num_images] int64; cached, since every batch of the epoch asks."""
    return np.random.default_rng((seed, epoch)).permutation(num_images)


class StreamTrainBatches(TrainBatches):
    """Micro-batches of images that are read in the order they are stored in.

    The readers of a process take turns: of 3, the second makes the micro-batches 1, 4, 7, ... of every epoch. Whichever
    worker is asked for one of these is that reader until the epoch ends. An image that cannot be read is replaced by
    the next one of its reader.

    Args:
        num_readers: of each process.
    """

    images: StreamImages

    def __init__(self, *args: Any, num_readers: int) -> None:
        super().__init__(*args)
        self.num_readers = num_readers
        self.close()

    def close(self) -> None:
        """Forgets the place in the stream, and closes its files."""
        self._draws: Iterator[Draw] | None = None

    def __getitem__(self, key: BatchKey) -> Batch:
        epoch, number, place = key
        if place is not None:
            share = Share(
                self.slices.process_index + self.slices.num_processes * (number % self.num_readers),
                self.slices.num_processes * self.num_readers,
            )
            self._draws = self.images.draw(share, self.seed, epoch, self.repeats, place)
        assert self._draws is not None  # the first keys of an epoch have places
        unreadable: dict[str, str] = {}
        places: list[Place] = []
        drawn = self._decode_readable(self._draws, unreadable, places)
        batch = self.augment(islice(drawn, self.slices.micro_batch_size), unreadable)
        if number + self.num_readers >= self.slices.num_batches:
            self.close()
        return batch._replace(place=places[-1])

    def _decode_readable(
        self, draws: Iterator[Draw], unreadable: dict[str, str], places: list[Place]
    ) -> Iterator[tuple["Decoded", Row, int]]:
        """Those of the draws that can be decoded; the names of the others are added to `unreadable`."""
        tried: list[str] = []
        for draw in draws:
            places.append(draw.place)
            decoded = self.decode(draw.row, tried, unreadable)
            if decoded is not None:
                tried.clear()
                yield decoded, draw.row, mix_seeds(*draw.seeds)


class EvalMaker:
    """Makes batches without randomness and substitutes.

    Args:
        name_of: what messages call a row.
        blank: the target of a black image; see `Images`.
    """

    def __init__(
        self, transform: Transform | JointTransform, mode: str, name_of: Callable[[int], str], blank: Target | None
    ) -> None:
        self.transform, self.mode, self.name_of, self.blank = transform, mode, name_of, blank

    def make_batch(self, rows: Iterable[Row], size: int) -> Batch:
        """The rows, and padding up to `size`."""
        black = decode_row(Row(-1, Image.new(self.mode, (32, 32)), target=self.blank), self.mode)  # where there is none
        samples, labels, indices, unreadable = [], [], [], dict[str, str]()
        with silence_pillow():
            for row in rows:
                try:
                    decoded, label = decode_row(row, self.mode), row.label
                except UnreadableImageError as error:
                    unreadable[self.name_of(row.index)] = error.reason
                    decoded, label = black, -1
                samples.append(decoded.transform(self.transform))
                labels.append(label)
                indices.append(row.index)
        padding = size - len(samples)
        samples += [black.transform(self.transform)] * padding
        return stack_batch(samples, labels + [-1] * padding, indices + [-1] * padding, unreadable)


class MapEvalBatches(Dataset[Batch]):
    """The batches of a process, in the split's order: item (0, number, None)."""

    def __init__(self, images: MapImages, maker: EvalMaker, slices: EvalSlices) -> None:
        self.images, self.maker, self.slices = images, maker, slices

    def __getitem__(self, key: BatchKey) -> Batch:
        number = key[1]
        rows = self.images.read_rows(self.slices.list_positions(number).tolist())
        return self.maker.make_batch(rows, self.slices.count_rows(number))


class StreamEvalBatches(IterableDataset[Batch | DataError]):
    """The batches of a process from a stream: each worker's in the order they are stored in, the last one padded.

    An error stands in place of a batch and ends them.
    """

    def __init__(
        self, images: StreamImages, maker: EvalMaker, batch_size: int, process_index: int, num_processes: int
    ) -> None:
        self.images, self.maker, self.batch_size = images, maker, batch_size
        self.process_index, self.num_processes = process_index, num_processes

    def __iter__(self) -> Iterator[Batch | DataError]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        share = Share(self.process_index + self.num_processes * worker, self.num_processes * num_workers)
        rows = self.images.read(share)
        try:
            while taken := list(islice(rows, self.batch_size)):
                yield self.maker.make_batch(taken, self.batch_size)
        except (DataError, OSError, RuntimeError) as error:
            yield convert_error(error)


def convert_error(error: DataError | OSError | RuntimeError) -> DataError:
    """A DataError in place of what ended the making of a batch; raises what is no fault of data or machine.

    It has no cause, since others' errors cannot always be sent between processes.
    """
    if isinstance(error, DataError):
        return DataError(str(error))
    if isinstance(error, OSError):
        return DataError(f"{error}: while a run reads its data, they must stay; put them back and go on")
    if "shared memory" not in str(error):
        raise error
    return DataError(
        f"/dev/shm has no room for a batch ({error}): enlarge it (--shm-size of a container), use fewer --num-workers "
        "or a larger --accumulate"
    )


def stack_batch(samples: list[Sample], labels: list[int], indices: list[int], unreadable: dict[str, str]) -> Batch:
    """Makes a Batch of lists of equal length."""
    images = stack_images(pad_to_largest([image for image, _ in samples]))
    targets = join_targets([target for _, target in samples if target is not None])
    return Batch(images, torch.tensor(labels), torch.tensor(indices), unreadable, targets=targets)


def pad_to_largest(images: list[Tensor]) -> list[Tensor]:
    """The images of the largest height and width among them, with 0 on the right and below."""
    if len({image.shape for image in images}) == 1:
        return images
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    return [pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]


def stack_images(images: list[Tensor]) -> Tensor:
    """[n, channels, height, width] of images of one size, in shared memory where this is a worker.

    Pixels stay as pictures have them in memory, channels last: to lay them out otherwise takes ten times as long as to
    copy them, and the device does that as it normalises them.
    """
    if images[0].dtype != torch.uint8 or images[0].ndim != 3:
        return cast(Tensor, default_collate(images))
    pictures = default_collate([image.permute(1, 2, 0) for image in images])  # [n, height, width, channels]
    return cast(Tensor, pictures.permute(0, 3, 1, 2))


def mix_seeds(*seeds: int) -> int:
    """One seed of 32 bits, made of several of any size."""
    return int(np.random.SeedSequence(seeds).generate_state(1)[0])


def seed_generators(seed: int) -> None:
    """Seeds all three global generators, since timm's transforms draw from each."""
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
