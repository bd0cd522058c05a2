"""Images that are read in the order they are stored in: every reader has shards of its own and reads them once.

Dealing the shards and knowing the place in them is done by the library datasets. Its buffer for shuffling forgets what
it holds when a run is stopped, so rows are shuffled in blocks here, of which a place can be told by two numbers.

Four shards of 3 rows, two readers, blocks of 4 rows (SHARD.ROW):

    shards, shuffled               2, 0, 3, 1
    reader 1 has every other       0.0 0.1 0.2 1.0 | 1.1 1.2
    and shuffles each block        1.0 0.1 0.0 0.2 | 1.2 1.1

A reader decodes a block and then reads the next one. The first block of each has a length of its own, so that they do
not all read at once: here reader 0 begins with two rows.

With shards of unequal sizes some readers come to the end of theirs before the epoch ends, and begin another pass over
them; others leave rows out. The next epoch deals the shards anew.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from s3a.data.decode import EncodedImage
from s3a.data.images import DataError, Images, Row

if TYPE_CHECKING:
    from datasets import IterableDataset

READ_ROWS = 64
"""So many rows are read at once."""
SHUFFLE_ROWS = 16 * READ_ROWS
"""Rows of a block; a reader keeps the files of so many images in memory."""

ReadShard = Callable[[int], Iterable[tuple[EncodedImage | None, int | None]]]
"""Reads a shard by its number, from the first row to the last: image and label. It is handed to other processes."""


@dataclass(frozen=True)
class Share:
    """One of `count` readers, which divide the shards among them."""

    index: int
    count: int


class Place(TypedDict):
    """How far a reader has come in an epoch; of JSON's types alone."""

    passes: int
    """how often it has come to the end of its shards"""
    shards: dict[str, object] | None
    """where its block begins, as datasets says it; None is the beginning"""
    used: int
    """how many draws of the block it has taken"""


START = Place(passes=0, shards=None, used=0)


@dataclass(frozen=True)
class Draw:
    """A row of the stream, for one augmentation of it.

    Attributes:
        seeds: differ from those of all other draws of an epoch.
        place: behind it.
    """

    row: Row
    seeds: tuple[int, ...]
    place: Place


class StreamImages(Images):
    """Images in shards, which several readers divide among them.

    A row has the number `row * num_shards + shard`, which needs no knowledge of how many rows the shards have.

    Args:
        read_shard: reads one.
        shard_names: what messages call each.
        num_images: of all shards, as far as is known before they are read.
        num_classes: labels must be below it.
        sizes: rows of each shard; None where nobody has counted them, and `num_images` is what somebody says.
    """

    def __init__(
        self,
        read_shard: ReadShard,
        shard_names: Sequence[str],
        *,
        split: str,
        num_images: int,
        num_classes: int,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self.read_shard, self.shard_names, self.sizes = read_shard, list(shard_names), sizes
        self.split, self.num_images, self.num_classes = split, num_images, num_classes

    @property
    def num_shards(self) -> int:
        """How many readers can have shards of their own."""
        return len(self.shard_names)

    def name_of(self, index: int) -> str:
        row, shard = divmod(index, self.num_shards)
        return f"row {row} of {self.shard_names[shard]}"

    def draw(self, share: Share, seed: int, epoch: int, repeats: int, place: Place = START) -> Iterator[Draw]:
        """The share's rows of an epoch in shuffled blocks, each `repeats` times side by side; without an end.

        Args:
            place: where to begin.
        """
        passes, shards, used = place["passes"], place["shards"], place["used"]
        order = np.random.default_rng((seed, epoch)).permutation(self.num_shards)
        first_length = max(1, SHUFFLE_ROWS // READ_ROWS * (share.index + 1) // share.count)
        while True:
            is_empty = shards is None
            rows = self._deal(order, share)
            if shards is not None:
                rows.load_state_dict(shards)
            batches = rows.iter(READ_ROWS)
            while block := read_block(batches, first_length if shards is None else SHUFFLE_ROWS // READ_ROWS):
                shuffled = np.random.default_rng((seed, epoch, passes, block[0].index)).permutation(len(block))
                for position in range(used, repeats * len(block)):
                    row = block[shuffled[position // repeats]]
                    seeds = (seed, epoch, passes, row.index, position % repeats)
                    yield Draw(row, seeds, Place(passes=passes, shards=shards, used=position + 1))
                shards, used, is_empty = rows.state_dict(), 0, False
                block.clear()  # or it and the next one would be in memory
            if is_empty:
                raise DataError(
                    f"reader {share.index} of {share.count} has shards of {self.split} without a row: "
                    "write fewer and larger ones, or use fewer --num-workers"
                )
            passes, shards = passes + 1, None

    def read(self, share: Share) -> Iterator[Row]:
        """The share's rows, once and as they are stored."""
        if share.index < self.num_shards:
            for batch in self._deal(np.arange(self.num_shards), share).iter(READ_ROWS):
                yield from batch["row"]

    def _deal(self, order: np.ndarray, share: Share) -> "IterableDataset":
        """The shards of a share, in this order of all shards."""
        from datasets import IterableDataset  # noqa: PLC0415  datasets is slow to import
        from datasets.distributed import split_dataset_by_node  # noqa: PLC0415
        from datasets.iterable_dataset import ExamplesIterable  # noqa: PLC0415

        # what IterableDataset.from_generator makes, without its builder, which locks files of the cache
        rows = IterableDataset(ExamplesIterable(self._read_shards, {"shards": order.tolist()}))
        count = min(share.count, self.num_shards)
        return split_dataset_by_node(rows, rank=share.index, world_size=count, strategy="shards")

    def _read_shards(self, shards: list[int]) -> Iterator[tuple[int, dict[str, Row]]]:
        """The rows of shards, as datasets takes them: a number, and columns.

        Raises:
            DataError: where a shard cannot be read, has other rows than were counted, or a label that is no class.
        """
        from datasets.exceptions import DatasetsError  # noqa: PLC0415  datasets is slow to import

        for shard in shards:
            name, known = self.shard_names[shard], self.sizes[shard] if self.sizes else None
            num_rows = 0
            try:
                for image, label in self.read_shard(shard):
                    row = self._make_row(num_rows * self.num_shards + shard, image, label)
                    yield row.index, {"row": row}
                    num_rows += 1
            except DataError:
                raise
            except (OSError, ValueError, TypeError, DatasetsError) as error:
                raise DataError(
                    f"{name} cannot be read behind {num_rows} rows ({error}): see that it can be reached and is whole, "
                    "then go on with the same command"
                ) from error
            if known is not None and num_rows != known:
                raise DataError(f"{name} has {num_rows} rows, and had {known} when the run began: it has changed")

    def _make_row(self, index: int, image: EncodedImage | None, label: int | None) -> Row:
        if label is None or not 0 <= label < self.num_classes:
            raise DataError(f"{self.name_of(index)} has the label {label}: it must be 0 to {self.num_classes - 1}")
        return Row(index, image, label)


def read_block(batches: Iterator[dict[str, list[Row]]], num_batches: int) -> list[Row]:
    """The rows of the next batches, as datasets gives them."""
    return [row for batch in islice(batches, num_batches) for row in batch["row"]]
