"""A split of images: rows read by number, in an order that depends on the seed and the epoch alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from s3a.data.decode import EncodedImage

if TYPE_CHECKING:
    from datasets import Dataset


class DataError(ValueError):
    """A fault in the data that was found while reading it, and that its owner must mend."""


@dataclass(frozen=True)
class Row:
    """An image before it is decoded: its row in the split, its file, its label."""

    index: int
    encoded: EncodedImage | None
    label: int


@dataclass(frozen=True)
class Shuffle:
    """What an epoch's order depends on. The epoch has `num_rows` of the split's rows, each once."""

    seed: int
    epoch: int
    num_rows: int

    def make_generator(self, *purpose: int) -> np.random.Generator:
        """A random generator of this epoch, independent for every purpose."""
        return np.random.default_rng((self.seed, self.epoch, *purpose))


class Images(ABC):
    """One split of a source. `num_images` is known before anything is read."""

    split: str
    num_images: int

    @abstractmethod
    def name_of(self, index: int) -> str:
        """What messages call a row, so that a person finds it: its path, or its number."""

    @abstractmethod
    def shuffle_rows(self, shuffle: Shuffle) -> np.ndarray:
        """The rows of an epoch, in its order: [shuffle.num_rows] int64."""

    @abstractmethod
    def read(
        self, indices: np.ndarray, shuffle: Shuffle | None, list_upcoming: Callable[[], np.ndarray]
    ) -> list[Iterator[Row]]:
        """For each of the rows: the row itself, followed by its substitutes if it cannot be decoded.

        Args:
            indices: rows of the split, [n] int64.
            shuffle: the epoch whose order they come from; None for the split's own order, without substitutes.
            list_upcoming: gives the rows that the caller will ask for afterwards in this order, [m] int64; a stream
                keeps them when it comes by.
        """


class MapImages(Images):
    """Images of which any can be read at any time."""

    @abstractmethod
    def read_rows(self, indices: list[int]) -> list[Row]:
        """Reads the rows with these numbers."""

    def shuffle_rows(self, shuffle: Shuffle) -> np.ndarray:
        return shuffle_whole_split(self.num_images, shuffle)

    def read(
        self, indices: np.ndarray, shuffle: Shuffle | None, list_upcoming: Callable[[], np.ndarray]
    ) -> list[Iterator[Row]]:
        return [self._with_substitutes(row) for row in self.read_rows(indices.tolist())]

    def _with_substitutes(self, row: Row) -> Iterator[Row]:
        """The row, then all behind it, and on from the start of the split."""
        yield row
        for offset in range(1, self.num_images):
            yield from self.read_rows([(row.index + offset) % self.num_images])


class DatasetImages(MapImages):
    """The rows of a Hugging Face dataset.

    Args:
        dataset: with the columns `image` and `label`.
        split: what it is called in messages.
    """

    def __init__(self, dataset: "Dataset", split: str) -> None:
        import datasets  # noqa: PLC0415  datasets is slow to import

        self.dataset = dataset.cast_column("image", datasets.Image(decode=False))
        self.split, self.num_images = split, len(dataset)

    def name_of(self, index: int) -> str:
        encoded = self.dataset[index]["image"]
        if encoded and encoded["path"] and encoded["bytes"] is None:
            return str(encoded["path"])
        return f"row {index} of {self.split}"

    def read_rows(self, indices: list[int]) -> list[Row]:
        columns = self.dataset[indices] if indices else {"image": [], "label": []}
        return [Row(*row) for row in zip(indices, columns["image"], columns["label"], strict=True)]


@lru_cache(maxsize=2)
def shuffle_whole_split(num_images: int, shuffle: Shuffle) -> np.ndarray:
    """The first `shuffle.num_rows` rows of a shuffled split; cached, since every batch of the epoch asks."""
    return shuffle.make_generator().permutation(num_images)[: shuffle.num_rows]


@dataclass(frozen=True)
class ImageData:
    """Both splits of a source, the names of its classes in label order, and a hash that changes when the data does."""

    train: Images
    val: Images
    label_names: list[str]
    fingerprint: str
