"""Loaders: which images a process sees in which step.

Each is a torch DataLoader whose items are whole micro-batches, asked for by epoch and number.
"""

import math
import multiprocessing
import multiprocessing.process
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.util import Finalize
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset, Sampler

from s3a.data.batches import (
    Batch,
    BatchKey,
    EvalMaker,
    JointTransform,
    MapEvalBatches,
    MapTrainBatches,
    StreamEvalBatches,
    StreamTrainBatches,
    TrainBatches,
    Transform,
    convert_error,
)
from s3a.data.decode import choose_mode
from s3a.data.images import DataError, Images, MapImages
from s3a.data.pixels import PixelNormalizer
from s3a.data.slices import EvalSlices, Slices
from s3a.data.stream import START, Place, StreamImages


class Schedule(Sampler[BatchKey]):
    """Which micro-batches are loaded next. Workers outlive an epoch, and learn the next one from these keys.

    Attributes:
        epoch: the epoch to iterate.
        first: the micro-batch that it begins with.
        places: of a stream, where the readers that make the first ones begin.
    """

    def __init__(self, num_batches: int) -> None:
        self.num_batches, self.epoch, self.first = num_batches, 0, 0
        self.places: dict[int, Place] = {}

    def __len__(self) -> int:
        return self.num_batches - self.first

    def __iter__(self) -> Iterator[BatchKey]:
        numbers = range(self.first, self.num_batches)
        return iter([(self.epoch, number, self.places.get(number)) for number in numbers])


class BatchesOrErrors(Dataset[Batch | DataError]):
    """Batches, or the error that kept one from being made: a DataLoader would bury its message in a traceback."""

    def __init__(self, batches: Dataset[Batch]) -> None:
        self.batches = batches

    def __getitem__(self, key: BatchKey) -> Batch | DataError:
        try:
            return self.batches[key]
        except (DataError, OSError, RuntimeError) as error:
            return convert_error(error)


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
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call each of them an error
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()

    Finalize(None, kill_workers, exitpriority=100)  # not atexit, which multiprocessing's own processes do not run


def kill_in_place_of_terminate(worker: multiprocessing.process.BaseProcess) -> None:
    """Has a worker ended by SIGKILL where torch would end it by SIGTERM, which it ignores.

    torch does that to a worker that has not heard of the end of its loader: where Python finds the loader among objects
    that only hold each other, such as an error and its frames, it closes the way to the worker first.
    """
    if hasattr(signal, "SIGKILL"):  # elsewhere nothing can be ignored
        # not worker.kill: the worker would hold itself, and its file descriptors would stay open until Python finds it
        worker.terminate = partial(os.kill, worker.pid, signal.SIGKILL)  # type: ignore[method-assign, arg-type]


def raise_errors(loader: DataLoader[Batch | DataError]) -> Iterator[Batch]:
    """The batches; raises the DataError that stands in place of one."""
    context = loader.multiprocessing_context or multiprocessing
    if loader.num_workers > 0 and context.get_start_method() != "fork":
        resource_tracker.ensure_running()  # at its own start it would unblock the signals again
    others = multiprocessing.active_children()
    with block_signals():
        iterator = iter(loader)  # starts workers
    for worker in {*multiprocessing.active_children()}.difference(others):
        kill_in_place_of_terminate(worker)
    for batch in iterator:
        if isinstance(batch, DataError):
            raise DataError(*batch.args)  # a new one: its frames must not hold it, or workers would outlive it
        yield batch


def make_loader(
    batches: Dataset[Batch | DataError],
    schedule: Schedule | None,
    num_workers: int,
    pin_memory: bool,
    *,
    keep_workers: bool,
) -> DataLoader[Batch | DataError]:
    """A DataLoader whose items are whole batches. It has a generator of its own: the model's must not advance.

    Args:
        keep_workers: let them outlive an iteration.
    """
    if num_workers > 0:
        kill_workers_at_exit(os.getpid())
    return DataLoader(
        batches,
        batch_size=None,
        sampler=schedule,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=keep_workers and num_workers > 0,
        generator=torch.Generator(),
        worker_init_fn=ignore_signals,
    )


def limit_workers(images: Images, num_processes: int, num_workers: int) -> int:
    """How many workers each process can have: of a stream, everyone needs shards of its own."""
    if not isinstance(images, StreamImages):
        return num_workers
    return min(num_workers, max(1, images.num_shards // num_processes))


def describe_idle_workers(images: Images, num_processes: int, num_workers: int) -> str | None:
    """What is said where a stream has fewer shards than workers; None where all can read."""
    limit = limit_workers(images, num_processes, num_workers)
    if limit == num_workers or not isinstance(images, StreamImages):
        return None
    processes = f"{num_processes} process{'es' if num_processes > 1 else ''}"
    return (
        f"{images.split} has {images.num_shards} shards for {processes}: {limit} of --num-workers {num_workers} can "
        f"read; write {num_workers * num_processes} or more to use all"
    )


class TrainLoader:
    """Shuffled, augmented images for the optimizer steps of a process.

    Of images that can be read in any order, a step has the same ones with the same augmentation on any number of
    processes and workers and for any `accumulate`: process p gets the p-th slice (see s3a.data.slices). Of a stream,
    every worker has shards of its own, so a step depends on how many workers there are; `state_dict` tells its place.
    An image that cannot be read is replaced by the one behind it, and named. Only one epoch is iterated at a time: a
    new one ends those begun before.

    Args:
        images: the training split.
        transform: PIL image to [channels, height, width], uint8 or floating point; may draw from any global generator.
            Where rows have targets, image and decoded target to such a pair.
        erasing: what is erased of each image after the transform, drawn by timm on the CPU; None erases nothing.
        normalizer: what the device makes of a batch, kept for whoever iterates; None is for transforms that give
            floating point.
        channels: of the network's input, 1 or 3.
        batch_size: images per optimizer step, over all processes.
        accumulate: micro-batches per step on each process.
        repeats: how often an image is in the epoch, each time augmented anew, side by side; an epoch has as many draws
            as without, and so fewer different images (repeated augmentation, arXiv 1902.05509 and 1901.09335, as in
            DeiT and timm's RepeatAugSampler).
        seed: of the order and the augmentation.
        process_index: of this process.
        num_processes: that share each step.
        num_workers: processes that decode and augment; 0 does it in this one. They live as long as the loader. A stream
            has at most one for each of the shards of a process.
        pin_memory: whether batches are put where a GPU copies from without waiting.

    Attributes:
        num_workers: of a stream as many as have shards of their own.
        num_readers: who divide the shards of a process among them: its workers, or itself.

    Raises:
        ValueError: where the batch cannot be cut that way, there are fewer images than one batch, or fewer shards of a
            stream than processes.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform | JointTransform,
        *,
        erasing: RandomErasing | None = None,
        normalizer: PixelNormalizer | None = None,
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
        self.normalizer = normalizer or PixelNormalizer()
        self.num_workers = limit_workers(images, num_processes, num_workers)
        self.num_readers = max(1, self.num_workers)
        how = images, transform, erasing, choose_mode(channels), slices, repeats, seed
        self._batches: TrainBatches
        if isinstance(images, StreamImages):
            if images.num_shards < num_processes:
                raise ValueError(
                    f"{images.split} has {images.num_shards} shards for {num_processes} processes: each must have one "
                    "of its own; write more and smaller shards, use fewer processes, or leave --streaming out"
                )
            self._batches = StreamTrainBatches(*how, num_readers=self.num_readers)
        else:
            self._batches = MapTrainBatches(*how)
        self._schedule = Schedule(slices.num_batches)
        self._epoch, self._step, self._places = 0, 0, [START] * self.num_readers
        self._iteration: object = None
        self._loader = make_loader(
            BatchesOrErrors(self._batches), self._schedule, self.num_workers, pin_memory, keep_workers=True
        )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """Iterates the steps of an epoch from `first_step` on, each a list of this process' micro-batches.

        Nothing before that step is decoded. A stream goes on at the place that it is at or that `load_state_dict` gave,
        where that is behind the step before, and else begins with the first of its shards.
        """
        if not 0 <= first_step <= self.steps_per_epoch:
            raise ValueError(f"first_step is {first_step}: an epoch has {self.steps_per_epoch} steps")
        if (epoch, first_step) != (self._epoch, self._step):
            self._epoch, self._step, self._places = epoch, first_step, [START] * self.num_readers
        number = first_step * self.accumulate
        self._schedule.epoch, self._schedule.first = epoch, number
        if isinstance(self._batches, StreamTrainBatches):
            turns = range(number, number + self.num_readers)
            self._schedule.places = {turn: self._places[turn % self.num_readers] for turn in turns}
        self._iteration = iteration = object()
        batches = raise_errors(self._loader)
        try:
            for step in range(first_step, self.steps_per_epoch):
                if self._iteration is not iteration:
                    return  # a new one has begun
                micro_batches = list(islice(batches, self.accumulate))
                for number, batch in enumerate(micro_batches, start=step * self.accumulate):
                    if batch.place is not None:
                        self._places[number % self.num_readers] = batch.place
                self._step = step + 1
                yield [batch._replace(place=None) for batch in micro_batches]
        finally:
            if self._iteration is iteration:
                self._batches.close()

    def state_dict(self) -> dict[str, Any]:
        """The place in a stream behind the last step that was given out, of JSON's types; empty for other images."""
        if not isinstance(self._batches, StreamTrainBatches):
            return {}
        return {"epoch": self._epoch, "step": self._step, "places": list(self._places)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Has `epoch` go on where another loader was, of the same process of as many processes and readers."""
        self._epoch, self._step, self._places = state["epoch"], state["step"], list(state["places"])


class EvalLoader:
    """Every image of a split exactly once over all processes.

    Images that can be read in any order come in the split's order, in equally many batches of equal shapes on each
    process. Of a stream every worker has shards of its own, and the processes may come to their ends at different
    times; see `make_padding`. What is missing in a batch is padded with black images of label -1 and index -1. An image
    that cannot be read has label -1 too, and is named.

    Args:
        images: the split.
        transform: PIL image to [channels, height, width], uint8 or floating point, without randomness; with targets as
            in training.
        normalizer: what the device makes of a batch, kept for whoever iterates; None is for transforms that give
            floating point.
        channels: of the network's input, 1 or 3.
        batch_size: images per batch, over all processes.
        process_index: of this process.
        num_processes: that share each batch.
        num_workers: processes that decode; 0 does it in this one. They end with each iteration.
        pin_memory: whether batches are put where a GPU copies from without waiting.

    Attributes:
        num_images: of the split.
        is_counted: whether that has been counted; else it is what the source says of itself.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform | JointTransform,
        *,
        normalizer: PixelNormalizer | None = None,
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
        self.split, self.num_images, self._num_batches = images.split, images.num_images, slices.num_batches
        self.is_counted = not isinstance(images, StreamImages) or images.sizes is not None
        self._batch_size = -(-batch_size // num_processes)
        self.normalizer = normalizer or PixelNormalizer()
        self._maker = EvalMaker(transform, choose_mode(channels), images.name_of, images.blank)
        batches: Dataset[Batch | DataError]
        schedule = None
        if isinstance(images, StreamImages):
            batches = StreamEvalBatches(images, self._maker, self._batch_size, process_index, num_processes)
        else:
            assert isinstance(images, MapImages)
            batches = BatchesOrErrors(MapEvalBatches(images, self._maker, slices))
            schedule = Schedule(slices.num_batches)
        num_workers = limit_workers(images, num_processes, num_workers)
        self._loader = make_loader(batches, schedule, num_workers, pin_memory, keep_workers=False)

    def __len__(self) -> int:
        """How many batches there are; of a stream about as many."""
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        return raise_errors(self._loader)

    def make_padding(self) -> Batch:
        """A batch without images, for a process that has come to its end before the others."""
        return self._maker.make_batch((), self._batch_size)
