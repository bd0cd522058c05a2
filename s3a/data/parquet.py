"""Folders of parquet shards, copied into the cache of datasets or streamed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, load_dataset
from datasets.exceptions import DatasetsError

from s3a.data.columns import check_labels, convert_labels, find_class_names, find_columns, make_images
from s3a.data.images import ImageData, Images
from s3a.data.shards import (
    find_shards,
    hash_shards,
    hide_bars_in_logs,
    read_class_names,
    shorten_error,
    show_progress,
)
from s3a.data.stream import READ_ROWS


def load_parquet(data_dir: Path, streaming: bool) -> ImageData:
    """Parquet shards with a column of encoded images and one of labels; classes.txt may name the classes.

    Without streaming, datasets copies them once into its cache (HF_HOME), where any row can be read at any time. The
    labels are read first, which parquet keeps apart from the images.
    """
    shards = find_shards(data_dir, "parquet")
    features = {split: read_features(paths[0]) for split, paths in shards.items()}
    columns = {split: find_columns(features[split], str(paths[0])) for split, paths in shards.items()}
    labels = {
        split: [read_labels(path, paths[0], features[split], columns[split]) for path in show_progress(paths, split)]
        for split, paths in shards.items()
    }
    label_features = {split: found[columns[split][1]] for split, found in features.items()}
    every_label = (part for parts in labels.values() for part in parts)
    names = read_class_names(data_dir) or find_class_names(label_features, every_label, str(data_dir))
    images: list[Images] = []
    for split, paths in shards.items():
        check_labels(np.concatenate(labels[split]), len(names), f"{split} in {data_dir}")
        filled = [(path, len(part)) for path, part in zip(paths, labels[split], strict=True) if len(part)]
        with hide_bars_in_logs(), explain_damage(f"{split} in {data_dir} has a file that cannot be read"):
            rows = load_dataset(
                "parquet",
                data_files=[str(path) for path, _ in filled],
                split="train",
                streaming=streaming,
                columns=list(columns[split]),
                **({"batch_size": READ_ROWS} if streaming else {}),
            )
        images.append(
            make_images(
                rows,
                columns[split],
                split,
                num_images=sum(size for _, size in filled),
                num_classes=len(names),
                shard_names=[str(path.relative_to(data_dir)) for path, _ in filled],
                sizes=[size for _, size in filled],
            )
        )
    train, val = images
    return ImageData(train, val, names, hash_shards(data_dir, shards, names))


def read_features(path: Path) -> Features:
    """The columns of a parquet file, by datasets' types where it wrote them down."""
    with explain_damage(f"{path} is no parquet file that can be read"):
        return Features.from_arrow_schema(pq.read_schema(path))


def read_labels(path: Path, first: Path, expected: Features, columns: tuple[str, str]) -> np.ndarray:
    """All labels of a parquet file.

    Args:
        first: the first file of the split, whose columns are expected.
        columns: the names of those of the image and the label.

    Raises:
        ValueError: where the file is damaged, or has images or classes of another kind than the first one.
    """
    image, label = columns
    with explain_damage(f"{path} is no parquet file that can be read"), pq.ParquetFile(path) as file:
        if file.metadata.num_rows == 0:  # its columns may have no type
            return np.zeros(0, np.int64)
        found = Features.from_arrow_schema(file.schema_arrow)
        if not (
            found.keys() >= {*columns}
            and found.arrow_schema.field(image).type == expected.arrow_schema.field(image).type
            and getattr(found[label], "names", None) == getattr(expected[label], "names", None)
        ):
            raise ValueError(
                f"{path} has other columns {image!r} and {label!r} than {first.name}: all shards of a split must have "
                "the same kind of images and the same classes; write them alike"
            )
        table = file.read(columns=[label])
    return convert_labels(table.column(label), str(path))


@contextmanager
def explain_damage(what: str) -> Iterator[None]:
    """Turns errors of pyarrow and datasets into a ValueError that says what is damaged."""
    try:
        yield
    except (pa.ArrowException, DatasetsError, KeyError) as error:
        raise ValueError(f"{what} ({shorten_error(error)}): get it again") from error
