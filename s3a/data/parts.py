"""A split that is stored in several files: which of them has a row, and which of its rows that is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from s3a.data.decode import EncodedImage

SPLIT_NAMES = {"train": ("train",), "val": ("validation", "val", "valid", "test")}
"""What others may call our two splits; the first that is there is taken."""


class Part(ABC):
    """A shard: `num_rows` rows, read from the first to the last."""

    def __init__(self, name: str, num_rows: int) -> None:
        self.name, self.num_rows = name, num_rows

    @abstractmethod
    def read(self, needed: np.ndarray) -> Iterator[tuple[int, EncodedImage | None, int]]:
        """At least the rows where `needed` ([num_rows] bool) is true, ascending: row in the part, image, label."""


class Parts:
    """The shards of a split, one behind the other. `starts` has the first row of each, and the end.

    Parts of 3, 2 and 4 rows have the starts 0, 3, 5 and 9; row 6 of the split is row 1 of part 2.
    """

    def __init__(self, parts: Sequence[Part], split: str) -> None:
        self.parts, self.split = list(parts), split
        self.sizes = tuple(part.num_rows for part in parts)
        self.starts = np.cumsum([0, *self.sizes])

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Part:
        return self.parts[index]

    @property
    def num_rows(self) -> int:
        """The number of rows of the whole split."""
        return int(self.starts[-1])

    def find_parts(self, rows: np.ndarray) -> np.ndarray:
        """The index of the part that each row is in."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def locate(self, row: int) -> tuple[int, int]:
        """The index of the part that a row is in, and its row in that part."""
        part = int(self.find_parts(np.asarray(row)))
        return part, row - int(self.starts[part])

    def name_of(self, row: int) -> str:
        """The row by its number in the split, and in its part where there are several."""
        part, row_in_part = self.locate(row)
        name = f"row {row} of {self.split}"
        return name if len(self) == 1 else f"{name} (row {row_in_part} of {self[part].name})"
