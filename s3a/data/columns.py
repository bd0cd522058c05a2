"""Which columns of a dataset are the image and the label, whether the labels can be trained on, and their split."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from s3a.data.decode import EncodedImage
from s3a.data.images import DatasetImages, Images
from s3a.data.stream import READ_ROWS, StreamImages

Rows = TypeVar("Rows", Dataset, IterableDataset)

ENCODED = (Value("binary"), Value("large_binary"), {"bytes": Value("binary"), "path": Value("string")})
"""How images are stored by those who do not know of datasets.Image."""
MOST_CLASSES = 1_000_000
"""More of them are counted from no labels: a single large number would ask for as many names."""


def find_columns(features: Features, where: str, rows: Dataset | None = None) -> tuple[str, str]:
    """The names of the image and the label column; ValueError if there is none, or several that may be meant.

    The image is the only datasets.Image, or else the only column of encoded ones; the label is the only ClassLabel, or
    else the only column of integers. Among several of a kind it is the one called `image` or `label`; without one of
    that name, among several ClassLabels, it is the finest one, as `find_finest` has it.

    Args:
        where: for messages.
        rows: a copy, in which the finest label is looked up; None refuses several.
    """
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    encoded = [name for name, feature in features.items() if feature in ENCODED]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    scalars = {name: feature.dtype for name, feature in features.items() if isinstance(feature, Value)}
    integers = [name for name, dtype in scalars.items() if dtype.startswith(("int", "uint"))]
    found = ", ".join(f"{name} ({describe_type(feature)})" for name, feature in features.items())
    image = choose_column(images or encoded, "image", where, f"of encoded images among {found}")
    if len(labels) > 1 and "label" not in labels:
        labels = [find_finest({name: features[name].names for name in labels}, where, rows)]
    return image, choose_column(labels or integers, "label", where, f"of whole numbers among {found}")


def find_finest(names: Mapping[str, list[str]], where: str, rows: Dataset | None) -> str:
    """The label column with the most classes, where each of these lies within one class of every other column.

    Then the others only group its classes, as `coarse_label` does those of `fine_label` in CIFAR-100.

    Args:
        names: of the classes of each column.
        where: for messages.
        rows: in which that is looked up.

    Raises:
        ValueError: where no column is the finest, and without rows.
    """
    finest, *others = sorted(names, key=lambda column: len(names[column]), reverse=True)
    found = f"{where} has {len(names)} label columns ({', '.join(names)})"
    if rows is None:
        raise ValueError(
            f"{found}: it must have one, or one that is called 'label'; --data hub without --streaming finds out which "
            "of several is the finest"
        )
    labels = {column: convert_labels(rows.data.column(column), where) for column in names}
    num_classes = len(np.unique(labels[finest]))
    for other in others:
        pairs = np.unique(np.stack([labels[finest], labels[other]]), axis=1)
        if len(names[other]) == len(names[finest]) or pairs.shape[1] > num_classes:
            raise ValueError(
                f"{found}, and the classes of {finest!r} are no parts of those of {other!r}: it must have one, one "
                "that is called 'label', or one whose classes the others group"
            )
    return finest


def describe_type(feature: object) -> str:
    """A column's type in a word: that of its values, or of what they stand for."""
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def choose_column(names: list[str], wanted: str, where: str, rule: str) -> str:
    """The only name, or among several the one that is `wanted`; ValueError without either, which states the rule."""
    if len(names) == 1:
        return names[0]
    if wanted in names:
        return wanted
    found = f"{len(names)} {wanted} columns ({', '.join(names)})" if names else f"no {wanted} column {rule}"
    raise ValueError(f"{where} has {found}: it must have one, or one that is called {wanted!r}")


def find_class_names(label_features: Mapping[str, object], labels: Iterable[np.ndarray], where: str) -> list[str]:
    """The names of the classes: the label column's own, or the numbers up to the largest label.

    Args:
        label_features: of each split.
        labels: of both splits; looked at only where there are no names.
        where: for the message.

    Raises:
        ValueError: where a number means different classes in the two splits, or is too large to be one of a class.
    """
    known = {split: feature.names for split, feature in label_features.items() if isinstance(feature, ClassLabel)}
    if not known:
        largest = max((int(part.max()) for part in labels if len(part)), default=-1)
        if largest >= MOST_CLASSES:
            raise ValueError(
                f"{where} has the label {largest}: labels are the numbers of classes from 0 on, and more than "
                f"{MOST_CLASSES:,} classes must be named; number them anew, or name them in classes.txt"
            )
        return [str(label) for label in range(1 + largest)]
    names = known.get("train", [])
    for split, others in known.items():
        if others != names:
            raise ValueError(
                f"{where} has the classes {', '.join(names[:3])}, ... in train and {', '.join(others[:3])}, ... in "
                f"{split}: both splits must number the same classes alike"
            )
    return list(names)


def convert_labels(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """A label column as int64, with -1 where there is none; ValueError for numbers that do not fit."""
    try:
        return column.cast(pa.int64()).fill_null(-1).to_numpy()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{where} has labels that cannot be classes ({error}): number these from 0 on") from error


def check_labels(labels: np.ndarray, num_classes: int, where: str) -> None:
    """Raises ValueError for a split without images, or with an image whose label is not a class."""
    if not len(labels):
        raise ValueError(f"{where} has no images: it must have some")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} images of {where} have no label of the {num_classes} classes, the first is row {wrong[0]} "
            f"with {labels[wrong[0]]}: every image must be labelled with 0 to {num_classes - 1}"
        )


def make_images(
    rows: Dataset | IterableDataset,
    columns: tuple[str, str],
    split: str,
    *,
    num_images: int,
    num_classes: int,
    shard_names: Sequence[str] = (),
    sizes: Sequence[int] | None = None,
    paths: bool = False,
) -> Images:
    """A split of rows that datasets reads: from a copy in any order, or as a stream.

    Args:
        columns: the names of the image and the label column.
        num_images, num_classes, shard_names, sizes: of a stream; see `StreamImages`.
        paths: whether a cell may name a file instead of holding it; of copies.
    """
    if isinstance(rows, Dataset):
        return DatasetImages(select_image_and_label(rows, *columns), split, paths=paths)
    encoded = select_image_and_label(rows, *columns).cast_column("image", datasets.Image(decode=False))
    names = list(shard_names)
    if len(names) != rows.num_shards:
        names = [f"shard {shard} of {split}" for shard in range(rows.num_shards)]
    return StreamImages(
        TableReader(encoded), names, split=split, num_images=num_images, num_classes=num_classes, sizes=sizes
    )


def select_image_and_label(rows: Rows, image: str, label: str) -> Rows:
    """The two columns alone, renamed to `image` and `label` as all sources call them."""
    names = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    rows = rows.select_columns([image, label])
    return rows.rename_columns(names) if names else rows


@dataclass(frozen=True)
class TableReader:
    """Reads a shard of a streamed dataset with the columns `image` and `label`."""

    rows: IterableDataset

    def __call__(self, shard: int) -> Iterator[tuple[EncodedImage | None, int | None]]:
        # unlike plain iteration, iteration by batches does not deal the rows to the workers once more
        for batch in self.rows.shard(self.rows.num_shards, shard).iter(READ_ROWS):
            yield from zip(batch["image"], batch["label"], strict=True)
