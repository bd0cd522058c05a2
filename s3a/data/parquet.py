"""Folders of parquet shards, copied into the cache of datasets or streamed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, load_dataset

from s3a.data.columns import check_labels, class_names, image_and_label, image_column, label_column, label_values
from s3a.data.decode import Cell
from s3a.data.images import DatasetImages, ImageData, Images
from s3a.data.parts import Part
from s3a.data.shards import find_shards, names_in_file, shards_fingerprint, tqdm_shards
from s3a.data.stream import StreamImages

Content = TypeVar("Content")
ROWS_AT_ONCE = 64  # while it streams


def load_parquet(data_dir: Path, streaming: bool) -> ImageData:
    """Parquet shards with a column of encoded images and one of labels; classes.txt may name the classes.

    Without streaming, datasets copies them once into its cache (HF_HOME), where any row can be read at any time.
    """
    shards = find_shards(data_dir, "parquet")
    columns = {split: columns_of(paths[0]) for split, paths in shards.items()}
    labels = {
        split: [labels_of(path, columns[split]) for path in tqdm_shards(paths, split)]
        for split, paths in shards.items()
    }
    every_label = [part for parts in labels.values() for part in parts]
    label_features = {split: found.label_feature for split, found in columns.items()}
    names = names_in_file(data_dir) or class_names(label_features, every_label, str(data_dir))
    images: dict[str, Images] = {}
    for split, paths in shards.items():
        check_labels(np.concatenate(labels[split]), len(names), f"{split} in {data_dir}")
        if streaming:
            files = zip(paths, map(len, labels[split]), strict=True)
            parts = [ParquetPart(path, num_rows, columns[split]) for path, num_rows in files]
            images[split] = StreamImages(parts, split, len(names))
        else:
            images[split] = copied(paths, columns[split], split)
    return ImageData(images["train"], images["val"], names, shards_fingerprint(data_dir, shards, names))


def copied(paths: list[Path], columns: "Columns", split: str) -> DatasetImages:
    """The rows of the files, in the cache of datasets."""
    rows = load_dataset("parquet", data_files=[str(path) for path in paths], split="train")
    return DatasetImages(image_and_label(rows, columns.image, columns.label), split)


class Columns(NamedTuple):
    """The two columns that count, by name, and the type of the labels."""

    image: str
    label: str
    label_feature: object


def columns_of(path: Path) -> Columns:
    """The columns of a parquet file, by datasets' types where it wrote them down; ValueError if they are not there."""
    features = Features.from_arrow_schema(reading(path, pq.read_schema))
    label = label_column(features, str(path))
    return Columns(image_column(features, str(path)), label, features[label])


def labels_of(path: Path, columns: Columns) -> np.ndarray:
    """All labels of a parquet file; ValueError if it is none, or has no such column."""
    return label_values(reading(path, partial(pq.read_table, columns=[columns.label])).column(columns.label))


def reading(path: Path, read: Callable[[Path], Content]) -> Content:
    """What `read` makes of a parquet file; ValueError with its name where it is damaged."""
    try:
        return read(path)
    except (pa.ArrowException, KeyError) as error:
        raise ValueError(f"{path} is no parquet file that can be read ({error}): get it again") from error


@dataclass(frozen=True)
class ParquetPart(Part):
    """A parquet file."""

    path: Path
    num_rows: int
    columns: Columns

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, needed: np.ndarray) -> Iterator[tuple[int, Cell | None, int]]:
        with pq.ParquetFile(self.path) as file:
            start = 0
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                if needed[start:end].any():
                    yield from self._needed_of_group(file, group, start, needed)
                start = end

    def _needed_of_group(
        self, file: pq.ParquetFile, group: int, start: int, needed: np.ndarray
    ) -> Iterator[tuple[int, Cell | None, int]]:
        for table in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=list(self.columns[:2])):
            mine = np.flatnonzero(needed[start : start + len(table)])
            part = table.take(mine)  # copies of its rows alone, so that the rest can be forgotten
            rows = zip(part[self.columns.image].to_pylist(), part[self.columns.label].to_pylist(), strict=True)
            yield from ((start + int(i), as_cell(image), label) for i, (image, label) in zip(mine, rows, strict=True))
            start += len(table)


def as_cell(image: Cell | bytes | None) -> Cell | None:
    """An encoded image as datasets would store it."""
    return {"bytes": image, "path": None} if isinstance(image, bytes) else image
