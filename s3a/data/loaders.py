"""Loaders: which images a process sees in which step.

Each is a torch DataLoader whose items are whole micro-batches, asked for by epoch and number.
"""

import math
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from multiprocessing.util import Finalize

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from s3a.data.batches import Batch, BatchKey, EvalBatches, TrainBatches, Transform
from s3a.data.decode import choose_mode
from s3a.data.images import DataError, Images
from s3a.data.slices import EvalSlices, Slices


class Schedule(Sampler[BatchKey]):
    """Which micro-batches are loaded next. Workers outlive an epoch, and learn the next one from these keys.

    Attributes:
        epoch: the epoch to iterate.
        first: the micro-batch that it begins with.
    """

    def __init__(self, num_batches: int) -> None:
        self.num_batches, self.epoch, self.first = num_batches, 0, 0

    def __len__(self) -> int:
        return self.num_batches - self.first

    def __iter__(self) -> Iterator[BatchKey]:
        return iter([(self.epoch, number) for number in range(self.first, self.num_batches)])


class BatchesOrErrors(Dataset[Batch | DataError]):
    """Batches, or the error that kept one from being made: a DataLoader would bury its message in a traceback."""

    def __init__(self, batches: Dataset[Batch]) -> None:
        self.batches = batches

    def __getitem__(self, key: BatchKey) -> Batch | DataError:
        try:
            return self.batches[key]
        except (DataError, OSError) as error:
            return DataError(str(error))  # not the error itself: others' cannot always be sent between processes


# What a terminal, a launcher or a scheduler sends to all processes of a run.
SIGNALS = {getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)}


@contextmanager
def block_signals() -> Iterator[None]:
    """Has those signals wait; processes that are started meanwhile begin with them blocked too."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(worker: int) -> None:
    """Makes a worker ignore those signals: its run decides when to end, and the worker ends with it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # it was started with them blocked


@lru_cache(maxsize=1)
def kill_workers_at_exit(process: int) -> None:
    """Has workers that are left killed when this process exits, of which this is the number.

    Python would ask them to end by SIGTERM, which they ignore, and wait for ever.
    """

    def kill_workers() -> None:
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()

    Finalize(None, kill_workers, exitpriority=100)  # not atexit, which multiprocessing's own processes do not run


def raise_errors(batches: Iterable[Batch | DataError]) -> Iterator[Batch]:
    """The batches; raises the DataError that stands in place of one."""
    with block_signals():
        iterator = iter(batches)  # starts workers
    for batch in iterator:
        if isinstance(batch, DataError):
            raise DataError(*batch.args)  # a new one: its frames must not hold it, or workers would outlive it
        yield batch


def make_loader(
    batches: Dataset[Batch], schedule: Schedule, num_workers: int, pin_memory: bool
) -> DataLoader[Batch | DataError]:
    """A DataLoader whose items are whole batches. It has a generator of its own: the model's must not advance."""
    if num_workers > 0:
        kill_workers_at_exit(os.getpid())
    return DataLoader(
        BatchesOrErrors(batches),
        batch_size=None,
        sampler=schedule,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),
        worker_init_fn=ignore_signals,
    )


class TrainLoader:
    """Shuffled, augmented images for the optimizer steps of a process.

    A step has the same images and augmentation on any number of processes and workers and for any `accumulate`: process
    p gets the p-th slice (see s3a.data.slices). An image that cannot be read is replaced by the one behind it in the
    split, and named. Only one epoch is iterated at a time: a new one ends those begun before.

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
        slices = Slices(images.num_images, batch_size, accumulate, process_index, num_processes)
        if images.num_images < batch_size:
            parts = images.num_images // (num_processes * accumulate)
            example = f", such as {num_processes * accumulate * 2 ** int(math.log2(parts))}" if parts else ""
            raise ValueError(
                f"--batch-size is {batch_size} but there are {images.num_images} training images: "
                f"use a smaller one{example}"
            )
        self.accumulate, self.steps_per_epoch = accumulate, slices.num_steps
        batches = TrainBatches(images, transform, choose_mode(channels), slices, repeats, seed)
        self._schedule = Schedule(slices.num_batches)
        self._loader = make_loader(batches, self._schedule, num_workers, pin_memory)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """Iterates the steps of an epoch from `first_step` on, each a list of this process' micro-batches.

        Nothing before that step is decoded.
        """
        if not 0 <= first_step <= self.steps_per_epoch:
            raise ValueError(f"first_step is {first_step}: an epoch has {self.steps_per_epoch} steps")
        self._schedule.epoch, self._schedule.first = epoch, first_step * self.accumulate
        batches = raise_errors(self._loader)
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
        batches = EvalBatches(images, transform, choose_mode(channels), slices)
        self._loader = make_loader(batches, self._schedule, num_workers, pin_memory)

    def __len__(self) -> int:
        return len(self._schedule)

    def __iter__(self) -> Iterator[Batch]:
        return raise_errors(self._loader)
