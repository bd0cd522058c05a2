"""Images that are read in the order they are stored in, shuffled on the way.

The order of an epoch is a list of row numbers, known before anything is read. A worker therefore knows which rows it
will need, keeps the bytes of those as they pass, and decodes them when their turn comes; the window of shuffling is
shared by all processes and workers, not held by each.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np

from s3a.data.images import DataError, Images, Row, Shuffle
from s3a.data.parts import Part, Parts

WINDOW = 8192
"""How many rows may overtake another while shuffling."""
SUBSTITUTES = 3
"""How many rows behind a row are kept beside it, in case that it cannot be decoded."""


class StreamImages(Images):
    """Images that pass by.

    Parts are taken in another order each epoch, and rows overtake each other by up to WINDOW: parts whose images are
    sorted by class should be many or small. Every worker of every process walks all parts that have a row for it, and
    reads them as far as their format makes it; it decodes its own rows alone. The bytes read are thus up to (processes
    x workers) times the data: where that is too much, make do without streaming. All together they keep about
    WINDOW / 2 encoded images in memory, or that times 1 + SUBSTITUTES where each has a small share. To go on in the
    middle of an epoch, what was before is passed over.

    Args:
        parts: the shards.
        split: what it is called in messages.
        num_classes: labels must be below it.
    """

    def __init__(self, parts: Sequence[Part], split: str, num_classes: int) -> None:
        self.parts, self.split, self.num_classes = Parts(parts, split), split, num_classes
        self.num_images = self.parts.num_rows
        self._walk: Walk | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_walk": None}  # a place in a stream cannot be copied

    def name_of(self, index: int) -> str:
        return self.parts.name_of(index)

    def order(self, shuffle: Shuffle) -> np.ndarray:
        return stream_order(self.parts.sizes, shuffle)

    def read(
        self, indices: Sequence[int], shuffle: Shuffle | None, later: Callable[[], np.ndarray]
    ) -> list[Iterator[Row]]:
        rows = np.asarray(indices, dtype=np.int64)
        if self._walk is None or not self._walk.will_pass(rows, shuffle):
            self._walk = Walk(self, shuffle, np.concatenate([rows, later()]))
        return [iter(candidates) for candidates in self._walk.take(rows)]


def part_order(num_parts: int, shuffle: Shuffle | None) -> np.ndarray:
    """The order in which parts are walked."""
    return np.arange(num_parts) if shuffle is None else shuffle.generator().permutation(num_parts)


@lru_cache(maxsize=2)
def stream_order(sizes: tuple[int, ...], shuffle: Shuffle) -> np.ndarray:
    """An epoch's rows: chosen evenly from the whole way, each then delayed by up to WINDOW rows: [num_rows] int64."""
    starts = np.cumsum([0, *sizes])
    way = np.concatenate([np.arange(starts[part], starts[part + 1]) for part in part_order(len(sizes), shuffle)])
    generator = shuffle.generator(1)
    chosen = way[np.sort(generator.choice(len(way), shuffle.num_rows, replace=False))]
    return chosen[np.argsort(np.arange(len(chosen)) + generator.random(len(chosen)) * WINDOW, kind="stable")]


class Walk:
    """A worker's way through a stream in an epoch.

    Args:
        images: the stream.
        shuffle: the epoch; None walks in the stored order and keeps no substitutes.
        wanted: the rows that will be taken, in this order, with repetitions.
    """

    def __init__(self, images: StreamImages, shuffle: Shuffle | None, wanted: np.ndarray) -> None:
        self.images, self.shuffle = images, shuffle
        self.num_kept = 1 if shuffle is None else 1 + SUBSTITUTES
        self.wanted = np.bincount(wanted, minlength=images.num_images)
        self.uses = np.bincount(self._neighbours(wanted).reshape(-1), minlength=images.num_images)
        self.kept: dict[int, Row] = {}
        self.passing = self._rows()

    def will_pass(self, rows: np.ndarray, shuffle: Shuffle | None) -> bool:
        """Whether these rows are still to be taken on this way."""
        unique, counts = np.unique(rows, return_counts=True)
        return shuffle == self.shuffle and bool((self.wanted[unique] >= counts).all())

    def take(self, rows: np.ndarray) -> list[list[Row]]:
        """For each of the rows: the row, and those behind it in its part. Walks on until they have passed."""
        neighbours = self._neighbours(rows)
        for row in neighbours.reshape(-1).tolist():
            while row not in self.kept:
                self._keep_next()
        taken = [[self.kept[row] for row in candidates] for candidates in neighbours.tolist()]
        np.subtract.at(self.wanted, rows, 1)
        np.subtract.at(self.uses, neighbours.reshape(-1), 1)
        for row in np.unique(neighbours[self.uses[neighbours] == 0]).tolist():
            del self.kept[row]
        return taken

    def _neighbours(self, rows: np.ndarray) -> np.ndarray:
        """Each row and those behind it, round to the start of its part: [rows, num_kept] int64."""
        parts = self.images.parts
        part = parts.of(rows)
        start, size = parts.starts[part], np.asarray(parts.sizes)[part]
        offsets = (rows - start)[:, None] + np.arange(self.num_kept)
        return start[:, None] + offsets % size[:, None]

    def _keep_next(self) -> None:
        row = next(self.passing, None)
        if row is None:
            raise DataError(
                f"{self.images.split} ended before its {self.images.num_images} images had been read: "
                "the files changed, or what they say of their number is wrong"
            )
        self.kept[row.index] = row

    def _rows(self) -> Iterator[Row]:
        """The rows that are of use, as they pass."""
        parts = part_order(len(self.images.parts), self.shuffle)
        return chain.from_iterable(map(self._rows_of_part, parts))

    def _rows_of_part(self, part: int) -> Iterator[Row]:
        start, end = self.images.parts.starts[part : part + 2].tolist()
        needed = self.uses[start:end] > 0
        if not needed.any():
            return
        for number, cell, label in self.images.parts[part].read(needed):
            if needed[number]:
                self._check(start + number, label)
                yield Row(start + number, cell, label)

    def _check(self, row: int, label: int | None) -> None:
        if label is None or not 0 <= label < self.images.num_classes:
            raise DataError(
                f"{self.images.name_of(row)} has the label {label}: it must be 0 to {self.images.num_classes - 1}"
            )
