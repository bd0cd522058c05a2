"""Which columns of a dataset are the image and the label, and whether the labels can be trained on."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

Rows = TypeVar("Rows", Dataset, IterableDataset)

ENCODED = (Value("binary"), Value("large_binary"), {"bytes": Value("binary"), "path": Value("string")})
"""How images are stored by those who do not know of datasets.Image."""


def find_image_column(features: Features, where: str) -> str:
    """The name of the only image column, or of the only one of encoded images; ValueError if there is none."""
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    return choose_column(images or [name for name, feature in features.items() if feature in ENCODED], "image", where)


def find_label_column(features: Features, where: str) -> str:
    """The name of the only ClassLabel column, or else of the only one of integers; ValueError if there is none."""
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    scalars = {name: feature.dtype for name, feature in features.items() if isinstance(feature, Value)}
    integers = [name for name, dtype in scalars.items() if dtype.startswith(("int", "uint"))]
    return choose_column(labels or integers, "label", where)


def choose_column(names: list[str], wanted: str, where: str) -> str:
    """The only name, or among several the one that is `wanted`; ValueError without either."""
    if len(names) == 1:
        return names[0]
    if wanted in names:
        return wanted
    found = f"{len(names)} {wanted} columns ({', '.join(names)})" if names else f"no {wanted} column"
    raise ValueError(f"{where} has {found}: it must have one, or one that is called {wanted!r}")


def select_image_and_label(rows: Rows, image: str, label: str) -> Rows:
    """The two columns alone, renamed to `image` and `label` as all sources call them."""
    return rows.select_columns([image, label]).rename_columns({image: "image", label: "label"})


def find_class_names(label_features: Mapping[str, object], labels: Iterable[np.ndarray], where: str) -> list[str]:
    """The names of the classes: the label column's own, or the numbers up to the largest label.

    Args:
        label_features: of each split.
        labels: of both splits; looked at only where there are no names.
        where: for the message.

    Raises:
        ValueError: where a number means different classes in the two splits.
    """
    known = {split: feature.names for split, feature in label_features.items() if isinstance(feature, ClassLabel)}
    if not known:
        return [str(label) for label in range(1 + max((int(part.max()) for part in labels if len(part)), default=-1))]
    names = known.get("train", [])
    for split, others in known.items():
        if others != names:
            raise ValueError(
                f"{where} has the classes {', '.join(names[:3])}, ... in train and {', '.join(others[:3])}, ... in "
                f"{split}: both splits must number the same classes alike"
            )
    return list(names)


def convert_labels(column: pa.ChunkedArray) -> np.ndarray:
    """A label column as int64, with -1 where there is none."""
    return column.cast(pa.int64()).fill_null(-1).to_numpy()


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
