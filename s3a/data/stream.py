"""Images that are read in the order they are stored in, and shuffled within a window.

The order of an epoch is a list of row numbers, known before anything is read. A worker therefore knows which rows it
will need, keeps their bytes when it comes by, and decodes them when their turn comes; the window of shuffling is shared
by all processes and workers, not held by each.

With two parts of 4 rows, a window of 3 and an epoch of 6 rows:

    parts in random order            part 1 (rows 4 5 6 7), part 0 (rows 0 1 2 3)
    their rows as stored             4   5   6   7   0   1   2   3
    6 of these, chosen at random     4   5   7   0   1   3
    place plus a delay below 3       0.0 3.1 2.5 3.9 6.2 5.4
    sorted by that: the epoch        4   7   5   0   3   1

A worker whose rows of the epoch are 7 and 3 reads part 1 up to row 7, decodes that row, and then reads part 0 up to row
3. Of those in between it keeps what may be a substitute for its own.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from s3a.data.images import DataError, Images, Row, Shuffle
from s3a.data.parts import Part, Parts

WINDOW = 8192
"""How many rows may overtake another while shuffling."""
SUBSTITUTES = 3
"""How many rows behind a row are kept beside it, in case that it cannot be decoded."""


class StreamImages(Images):
    """Sequentially streamed images with windowed shuffling.

    Parts are taken in another order each epoch, and rows overtake each other by up to WINDOW: parts whose images are
    sorted by class should be many or small. Every worker of every process walks all parts that have a row for it, and
    reads them as far as their format makes it; it decodes its own rows alone. The bytes read are thus up to (processes
    x workers) times the data: where that is too much, make do without streaming. All together they keep about
    WINDOW / 2 encoded images in memory, or that times 1 + SUBSTITUTES where each has a small share. To go on in the
    middle of an epoch, what was before is skipped.

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

    def shuffle_rows(self, shuffle: Shuffle) -> np.ndarray:
        return shuffle_in_window(self.parts.sizes, shuffle)

    def read(
        self, indices: np.ndarray, shuffle: Shuffle | None, list_upcoming: Callable[[], np.ndarray]
    ) -> list[Iterator[Row]]:
        if self._walk is None or not self._walk.has_ahead(indices, shuffle):
            self._walk = Walk(self, shuffle, np.concatenate([indices, list_upcoming()]))
        return [iter(candidates) for candidates in self._walk.take(indices)]


def shuffle_parts(num_parts: int, shuffle: Shuffle | None) -> np.ndarray:
    """The order in which parts are read; without a shuffle that in which they are stored."""
    return np.arange(num_parts) if shuffle is None else shuffle.make_generator().permutation(num_parts)


@lru_cache(maxsize=2)
def shuffle_in_window(sizes: tuple[int, ...], shuffle: Shuffle) -> np.ndarray:
    """An epoch's rows: chosen evenly from all parts, each then delayed by up to WINDOW rows: [num_rows] int64."""
    starts = np.cumsum([0, *sizes])
    stored = np.concatenate([np.arange(starts[part], starts[part + 1]) for part in shuffle_parts(len(sizes), shuffle)])
    generator = shuffle.make_generator(1)
    chosen = stored[np.sort(generator.choice(len(stored), shuffle.num_rows, replace=False))]
    return chosen[np.argsort(np.arange(len(chosen)) + generator.random(len(chosen)) * WINDOW, kind="stable")]


class Walk:
    """A worker's way through a stream in an epoch.

    Args:
        images: the stream.
        shuffle: the epoch; None walks in the stored order and keeps no substitutes.
        wanted: the rows that will be taken, in this order, with repetitions.

    Attributes:
        num_wanted: [num_images] how often each row is still to be taken.
        num_uses: [num_images] how often each is still to be taken as a row or as a substitute.
        kept: the rows that the walk has come by and that are still of use.
    """

    def __init__(self, images: StreamImages, shuffle: Shuffle | None, wanted: np.ndarray) -> None:
        self.images, self.shuffle = images, shuffle
        self.num_candidates = 1 if shuffle is None else 1 + SUBSTITUTES
        self.num_wanted = np.bincount(wanted, minlength=images.num_images)
        self.num_uses = np.bincount(self._find_candidates(wanted).reshape(-1), minlength=images.num_images)
        self.kept: dict[int, Row] = {}
        self._ahead = self._read_useful_rows()

    def has_ahead(self, rows: np.ndarray, shuffle: Shuffle | None) -> bool:
        """Whether these rows are still to be taken on this walk."""
        unique, counts = np.unique(rows, return_counts=True)
        return shuffle == self.shuffle and bool((self.num_wanted[unique] >= counts).all())

    def take(self, rows: np.ndarray) -> list[list[Row]]:
        """For each of the rows: the row and its substitutes. Reads on until all of them are kept."""
        candidates = self._find_candidates(rows)
        for row in candidates.reshape(-1).tolist():
            while row not in self.kept:
                self._keep_next()
        taken = [[self.kept[row] for row in each] for each in candidates.tolist()]
        np.subtract.at(self.num_wanted, rows, 1)
        np.subtract.at(self.num_uses, candidates.reshape(-1), 1)
        for row in np.unique(candidates[self.num_uses[candidates] == 0]).tolist():
            del self.kept[row]
        return taken

    def _find_candidates(self, rows: np.ndarray) -> np.ndarray:
        """Each row and those behind it, and on from the start of its part: [rows, num_candidates] int64.

        Row 6 of a part with the rows 4 to 7 has the candidates 6, 7, 4 and 5.
        """
        parts = self.images.parts
        part = parts.find_parts(rows)
        start, size = parts.starts[part], np.asarray(parts.sizes)[part]
        offsets = (rows - start)[:, None] + np.arange(self.num_candidates)
        return start[:, None] + offsets % size[:, None]

    def _keep_next(self) -> None:
        row = next(self._ahead, None)
        if row is None:
            raise DataError(
                f"{self.images.split} ended before its {self.images.num_images} images had been read: "
                "the files changed, or what they say of their number is wrong"
            )
        self.kept[row.index] = row

    def _read_useful_rows(self) -> Iterator[Row]:
        """Reads the rows that will be taken, or may be substitutes, in the order they are stored in."""
        parts = self.images.parts
        for part in shuffle_parts(len(parts), self.shuffle).tolist():
            start, end = parts.starts[part : part + 2].tolist()
            needed = self.num_uses[start:end] > 0
            if not needed.any():
                continue
            for row, encoded, label in parts[part].read(needed):
                if needed[row]:
                    self._check_label(start + row, label)
                    yield Row(start + row, encoded, label)

    def _check_label(self, row: int, label: int | None) -> None:
        if label is None or not 0 <= label < self.images.num_classes:
            raise DataError(
                f"{self.images.name_of(row)} has the label {label}: it must be 0 to {self.images.num_classes - 1}"
            )
