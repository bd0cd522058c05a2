"""Folders of parquet shards, copied into the cache of datasets or streamed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, load_dataset

from s3a.data.columns import (
    check_labels,
    convert_labels,
    find_class_names,
    find_image_column,
    find_label_column,
    select_image_and_label,
)
from s3a.data.decode import EncodedImage
from s3a.data.images import DatasetImages, ImageData, Images
from s3a.data.parts import Part
from s3a.data.shards import find_shards, hash_shards, hide_bars_in_logs, read_class_names, show_progress
from s3a.data.stream import StreamImages

ROWS_AT_ONCE = 64  # while it streams


class Columns(NamedTuple):
    """The names of the image and the label column, and the type of the labels."""

    image: str
    label: str
    label_feature: object


def load_parquet(data_dir: Path, streaming: bool) -> ImageData:
    """Parquet shards with a column of encoded images and one of labels; classes.txt may name the classes.

    Without streaming, datasets copies them once into its cache (HF_HOME), where any row can be read at any time.
    """
    shards = find_shards(data_dir, "parquet")
    columns = {split: find_columns(paths[0]) for split, paths in shards.items()}
    labels = {
        split: [read_labels(path, columns[split].label) for path in show_progress(paths, split)]
        for split, paths in shards.items()
    }
    every_label = [part for parts in labels.values() for part in parts]
    label_features = {split: found.label_feature for split, found in columns.items()}
    names = read_class_names(data_dir) or find_class_names(label_features, every_label, str(data_dir))
    images: dict[str, Images] = {}
    for split, paths in shards.items():
        check_labels(np.concatenate(labels[split]), len(names), f"{split} in {data_dir}")
        image, label, _ = columns[split]
        if streaming:
            files = zip(paths, map(len, labels[split]), strict=True)
            parts = [ParquetPart(path, num_rows, image, label) for path, num_rows in files]
            images[split] = StreamImages(parts, split, len(names))
        else:
            with hide_bars_in_logs():
                rows = load_dataset("parquet", data_files=[str(path) for path in paths], split="train")
            images[split] = DatasetImages(select_image_and_label(rows, image, label), split)
    return ImageData(images["train"], images["val"], names, hash_shards(data_dir, shards, names))


def find_columns(path: Path) -> Columns:
    """The columns of a parquet file, by datasets' types where it wrote them down; ValueError if they are not there."""
    with explain_damage(path):
        schema = pq.read_schema(path)
    features = Features.from_arrow_schema(schema)
    label = find_label_column(features, str(path))
    return Columns(find_image_column(features, str(path)), label, features[label])


def read_labels(path: Path, column: str) -> np.ndarray:
    """All labels of a parquet file; ValueError if it is damaged."""
    with explain_damage(path):
        table = pq.read_table(path, columns=[column])
    return convert_labels(table.column(column))


@contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Turns pyarrow's errors into a ValueError that names the parquet file."""
    try:
        yield
    except (pa.ArrowException, KeyError) as error:
        raise ValueError(f"{path} is no parquet file that can be read ({error}): get it again") from error


class ParquetPart(Part):
    """A parquet file, and the names of its image and label column."""

    def __init__(self, path: Path, num_rows: int, image: str, label: str) -> None:
        super().__init__(path.name, num_rows)
        self.path, self.image, self.label = path, image, label

    def read(self, needed: np.ndarray) -> Iterator[tuple[int, EncodedImage | None, int]]:
        with pq.ParquetFile(self.path) as file:
            start = 0
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                if needed[start:end].any():
                    yield from self._read_group(file, group, start, needed)
                start = end

    def _read_group(
        self, file: pq.ParquetFile, group: int, start: int, needed: np.ndarray
    ) -> Iterator[tuple[int, EncodedImage | None, int]]:
        """The needed rows of a row group, which begins with row `start` of the file."""
        for table in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[self.image, self.label]):
            rows = np.flatnonzero(needed[start : start + len(table)])
            part = table.take(rows)  # copies of its rows alone, so that the rest can be forgotten
            columns = part[self.image].to_pylist(), part[self.label].to_pylist()
            for row, image, label in zip(rows.tolist(), *columns, strict=True):
                encoded: EncodedImage | None = {"bytes": image, "path": None} if isinstance(image, bytes) else image
                yield start + row, encoded, label
            start += len(table)
