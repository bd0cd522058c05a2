"""Which positions of an epoch a process has in a micro-batch.

Training, with batch_size 8 on 2 processes that accumulate 2 micro-batches. The numbers are positions in the epoch:

    step                  0                     1
    process        0           1          0           1
    micro-batch    0    1      0    1     2     3     2     3
    positions     0 1  2 3    4 5  6 7   8 9  10 11 12 13 14 15

Evaluation of 11 images in batches of 4 on 2 processes; the last batch is short, and padded to equal shapes (-):

    batch          0           1          2
    process       0    1      0    1     0     1
    positions    0 1  2 3    4 5  6 7   8 9  10 -
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Slices:
    """Cuts an epoch into optimizer steps, a step into a slice per process, a slice into micro-batches."""

    num_images: int
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

    @property
    def num_steps(self) -> int:
        """Optimizer steps of an epoch, of whole batches."""
        return self.num_images // self.batch_size

    @property
    def num_batches(self) -> int:
        """Micro-batches of an epoch, the same on every process."""
        return self.num_steps * self.accumulate

    @property
    def micro_batch_size(self) -> int:
        """Images of a micro-batch."""
        return self.batch_size // self.num_processes // self.accumulate

    def list_positions(self, number: int) -> np.ndarray:
        """Positions in the epoch of this process' micro-batch of that number: [n] int64."""
        step, part = divmod(number, self.accumulate)
        size = self.micro_batch_size
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
        """Batches of the split, the same on every process."""
        return -(-self.num_images // self.batch_size)

    def count_rows(self, number: int) -> int:
        """Images and padding of a process in batch `number`, the same on every process."""
        left = min(self.batch_size, self.num_images - number * self.batch_size)
        return -(-left // self.num_processes)

    def list_positions(self, number: int) -> np.ndarray:
        """Rows of this process in batch `number`, which may be none: [n] int64."""
        size = self.count_rows(number)
        end = min((number + 1) * self.batch_size, self.num_images)
        start = number * self.batch_size + self.process_index * size
        return np.arange(min(start, end), min(start + size, end))
