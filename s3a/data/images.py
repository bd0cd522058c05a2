"""What a split of images is: rows read by number, in an order that depends on the seed and the epoch alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import datasets
import numpy as np
from datasets import Dataset

from s3a.data.decode import Cell


class DataError(ValueError):
    """Something about the images that their owner must mend, met while reading them."""


class Row(NamedTuple):
    """An image before it is decoded: its row in the split, its bytes or path, its label."""

    index: int
    cell: Cell | None
    label: int


@dataclass(frozen=True)
class Shuffle:
    """What an epoch's order depends on; it has `num_rows` of the split's rows, each once."""

    seed: int
    epoch: int
    num_rows: int

    def generator(self, *purpose: int) -> np.random.Generator:
        """The randomness of the order, apart for every purpose."""
        return np.random.default_rng((self.seed, self.epoch, *purpose))


class Images(ABC):
    """One split of a source. `num_images` is known before anything is read."""

    split: str
    num_images: int

    @abstractmethod
    def name_of(self, index: int) -> str:
        """What a person finds row `index` by: its path, or its number."""

    @abstractmethod
    def order(self, shuffle: Shuffle) -> np.ndarray:
        """The rows of an epoch, in its order: [shuffle.num_rows] int64."""

    @abstractmethod
    def read(
        self, indices: Sequence[int], shuffle: Shuffle | None, later: Callable[[], np.ndarray]
    ) -> list[Iterator[Row]]:
        """For each of the rows `indices`: the row itself, and then those that stand in where it cannot be decoded.

        Args:
            indices: rows of the split.
            shuffle: the epoch whose order they come from; None for the split's own order, without substitutes.
            later: the rows that the caller will ask for afterwards in this order; a stream keeps them as it passes.
        """


class MapImages(Images):
    """Images at hand: any row can be read at any time."""

    @abstractmethod
    def rows(self, indices: Sequence[int]) -> list[Row]:
        """The rows of these numbers."""

    def order(self, shuffle: Shuffle) -> np.ndarray:
        return permutation(self.num_images, shuffle)

    def read(
        self, indices: Sequence[int], shuffle: Shuffle | None, later: Callable[[], np.ndarray]
    ) -> list[Iterator[Row]]:
        return [self._from(row) for row in self.rows([int(index) for index in indices])]

    def _from(self, row: Row) -> Iterator[Row]:
        """The row, then all others behind it, and round to the start."""
        yield row
        for offset in range(1, self.num_images):
            yield from self.rows([(row.index + offset) % self.num_images])


class DatasetImages(MapImages):
    """The rows of a Hugging Face dataset.

    Args:
        dataset: with the columns `image` and `label`.
        split: what it is called in messages.
    """

    def __init__(self, dataset: Dataset, split: str) -> None:
        self.dataset = dataset.cast_column("image", datasets.Image(decode=False))
        self.split, self.num_images = split, len(dataset)

    def name_of(self, index: int) -> str:
        cell = self.dataset[index]["image"]
        if cell and cell["path"] and cell["bytes"] is None:
            return cell["path"]
        return f"row {index} of {self.split}"

    def rows(self, indices: Sequence[int]) -> list[Row]:
        columns = self.dataset[list(indices)] if len(indices) else {"image": [], "label": []}
        return [Row(*row) for row in zip(indices, columns["image"], columns["label"], strict=True)]


@lru_cache(maxsize=2)
def permutation(num_images: int, shuffle: Shuffle) -> np.ndarray:
    """The first `shuffle.num_rows` rows of a shuffled split; kept, since every batch of the epoch asks."""
    return shuffle.generator().permutation(num_images)[: shuffle.num_rows]


@dataclass(frozen=True)
class ImageData:
    """Both splits of a source, the names of its classes in label order, and a hash that changes when the data does."""

    train: Images
    val: Images
    label_names: list[str]
    fingerprint: str
