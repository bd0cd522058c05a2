"""A split of images, and one whose rows are read by number."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from s3a.data.decode import EncodedImage
from s3a.data.targets import Target

if TYPE_CHECKING:
    from datasets import Dataset


class DataError(ValueError):
    """A fault in the data that was found while reading it, and that its owner must mend."""


@dataclass(frozen=True)
class Row:
    """An image before it is decoded.

    Attributes:
        index: its row in the split.
        encoded: what the row holds, or the path of a file that the source itself found on this machine; or an image
            that the source made.
        label: its class; 0 where a source has other targets.
        target: what a dense task predicts of it; None where that is the label.
    """

    index: int
    encoded: EncodedImage | Path | Image.Image | None
    label: int = 0
    target: Target | None = None


class Images(ABC):
    """One split of a source. `num_images` is known before anything is read.

    Attributes:
        blank: the target of a black image without a content, which stands for padding; None where targets are labels.
    """

    split: str
    num_images: int
    blank: Target | None = None

    @abstractmethod
    def name_of(self, index: int) -> str:
        """What messages call a row, so that a person finds it: its path, or its number."""


class NoImages(Images):
    """A split that a source does not have."""

    num_images = 0

    def __init__(self, split: str) -> None:
        self.split = split

    def name_of(self, index: int) -> str:
        raise IndexError(f"{self.split} has no row {index}: it has none")


class MapImages(Images):
    """Images of which any can be read at any time, by row number."""

    @abstractmethod
    def read_rows(self, indices: list[int]) -> list[Row]:
        """Reads the rows with these numbers."""

    def read_with_substitutes(self, indices: list[int]) -> list[Iterator[Row]]:
        """For each of the rows: the row itself, then all behind it, and on from the start of the split."""
        return [self._follow(row) for row in self.read_rows(indices)]

    def _follow(self, row: Row) -> Iterator[Row]:
        yield row
        for offset in range(1, self.num_images):
            yield from self.read_rows([(row.index + offset) % self.num_images])


class DatasetImages(MapImages):
    """The rows of a Hugging Face dataset.

    Args:
        dataset: with the columns `image` and `label`.
        split: what it is called in messages.
        paths: whether images may be files whose paths are in the rows. Only for rows that were made on this machine:
            those of others could name any of its files.
    """

    def __init__(self, dataset: "Dataset", split: str, paths: bool = False) -> None:
        import datasets  # noqa: PLC0415  datasets is slow to import

        self.dataset = dataset.cast_column("image", datasets.Image(decode=False)).with_format("arrow")
        self.split, self.num_images, self.paths = split, len(dataset), paths

    def name_of(self, index: int) -> str:
        (row,) = self.read_rows([index])
        return str(row.encoded) if isinstance(row.encoded, Path) else f"row {index} of {self.split}"

    def select(self, indices: list[int]) -> "DatasetImages":
        """Some of the rows, numbered anew."""
        return DatasetImages(self.dataset.with_format(None).select(indices), self.split, self.paths)

    def read_rows(self, indices: list[int]) -> list[Row]:
        if not indices:
            return []
        table = self.dataset[indices]
        images, labels = table["image"].to_pylist(), table["label"].to_pylist()
        if self.paths:
            images = [
                Path(each["path"]) if each and each["bytes"] is None and each["path"] else each for each in images
            ]
        return [Row(*row) for row in zip(indices, images, labels, strict=True)]


@dataclass(frozen=True)
class ImageData:
    """Both splits of a source, the names of its classes in label order, and a hash that changes when the data does."""

    train: Images
    val: Images
    label_names: list[str]
    fingerprint: str
