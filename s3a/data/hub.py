"""Datasets of the Hugging Face Hub by name, copied into the cache of datasets or streamed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import datasets
import numpy as np
from datasets import Dataset, DatasetBuilder, IterableDataset, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import GatedRepoError

from s3a.data.columns import (
    check_labels,
    convert_labels,
    find_class_names,
    find_image_column,
    find_label_column,
    select_image_and_label,
)
from s3a.data.decode import EncodedImage
from s3a.data.images import DatasetImages, ImageData
from s3a.data.local import hash_content
from s3a.data.parts import SPLIT_NAMES, Part
from s3a.data.stream import StreamImages

ROWS_AT_ONCE = 64  # while it streams


def load_hub(dataset: str, streaming: bool) -> ImageData:
    """ORG/NAME or ORG/NAME:CONFIG of the Hub, or a local folder that datasets can load.

    Without streaming it is downloaded once, into the cache of datasets (HF_HOME), and found there without a network.

    Raises:
        FileNotFoundError: where it is absent, gated, or out of reach.
        ValueError: where its splits or columns are not those of labelled images, or it cannot be streamed.
    """
    path, config = split_config(dataset)
    with explain_hub_errors(dataset):
        builder = load_dataset_builder(path, config)
        if streaming:
            splits = builder.as_streaming_dataset()
        else:
            builder.download_and_prepare()
            splits = builder.as_dataset()
    splits = {split: splits[name] for split, name in find_splits(splits, dataset).items()}
    return make_streams(dataset, builder, splits) if streaming else make_copies(dataset, builder, splits)


def split_config(dataset: str) -> tuple[str, str | None]:
    """ORG/NAME:CONFIG in its two parts."""
    path, colon, config = dataset.rpartition(":")
    return (path, config) if colon and "/" not in config else (dataset, None)


def find_splits(splits: Mapping[str, object], dataset: str) -> dict[str, str]:
    """What the dataset calls our two splits; ValueError where it lacks one."""
    names = {}
    for split, known in SPLIT_NAMES.items():
        found = [name for name in known if name in splits]
        if not found:
            raise ValueError(
                f"--dataset {dataset} has the splits {', '.join(splits)}: for {split} it must have one called "
                f"{' or '.join(known)}"
            )
        names[split] = found[0]
    return names


@contextmanager
def explain_hub_errors(dataset: str) -> Iterator[None]:
    """Turns what the Hub and datasets raise into one line with a remedy."""
    try:
        yield
    except (DatasetNotFoundError, GatedRepoError) as error:
        if isinstance(error, GatedRepoError) or "gated" in str(error):
            page = f"https://huggingface.co/datasets/{split_config(dataset)[0]}"
            raise FileNotFoundError(
                f"--dataset {dataset} is gated: accept its terms at {page}, then log in with hf auth login"
            ) from error
        raise FileNotFoundError(
            f"--dataset {dataset} is not on the Hub, or is private: check the name, or log in with hf auth login"
        ) from error
    except ConnectionError as error:
        raise FileNotFoundError(
            f"--dataset {dataset} is not in the cache and the Hub cannot be reached ({shorten_error(error)}): connect "
            "once without --streaming to copy it, or use --data parquet with the files"
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--dataset {dataset} has no files that datasets can load ({shorten_error(error)}): "
            "it must hold images, parquet or webdataset shards"
        ) from error
    except (ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(
            f"--dataset {dataset} cannot be loaded ({shorten_error(error)}): "
            "it must be data without a script; a configuration is named with ORG/NAME:CONFIG"
        ) from error


def shorten_error(error: BaseException) -> str:
    """An error's cause or message, cut to a single line."""
    return " ".join(str(error.__cause__ or error).split())[:200]


def find_columns(rows: Dataset | IterableDataset, dataset: str) -> tuple[str, str]:
    """The names of the image and the label column."""
    if rows.features is None:
        raise ValueError(f"--dataset {dataset} does not say what its columns are: leave --streaming out")
    where = f"--dataset {dataset}"
    return find_image_column(rows.features, where), find_label_column(rows.features, where)


def hash_repository(builder: DatasetBuilder, class_names: list[str]) -> str:
    """A fingerprint that changes with the revision (or a folder's files), the configuration, and the classes."""
    return hash_content([builder.hash, builder.config_id, *class_names])


# --------------------------------------------------------------------------------------------------------
# Copied
# --------------------------------------------------------------------------------------------------------


def make_copies(dataset: str, builder: DatasetBuilder, splits: Mapping[str, Dataset]) -> ImageData:
    """Both splits, of rows in the cache of datasets that can be read in any order."""
    columns = {split: find_columns(rows, dataset) for split, rows in splits.items()}
    labels = {split: convert_labels(rows.data.column(columns[split][1])) for split, rows in splits.items()}
    label_features = {split: rows.features[columns[split][1]] for split, rows in splits.items()}
    names = find_class_names(label_features, labels.values(), f"--dataset {dataset}")
    for split, values in labels.items():
        check_labels(values, len(names), f"{split} of {dataset}")
    train, val = (DatasetImages(select_image_and_label(rows, *columns[split]), split) for split, rows in splits.items())
    return ImageData(train, val, names, hash_repository(builder, names))


# --------------------------------------------------------------------------------------------------------
# Streamed
# --------------------------------------------------------------------------------------------------------


def make_streams(dataset: str, builder: DatasetBuilder, splits: Mapping[str, IterableDataset]) -> ImageData:
    """Both splits, of rows that are read over the network in the order they are stored in.

    The shards of a repository do not say how many rows they have, so a split is one part here: rows are shuffled
    within the window, from the first to the last.
    """
    columns = {split: find_columns(rows, dataset) for split, rows in splits.items()}
    label_features = {split: rows.features[columns[split][1]] for split, rows in splits.items()}
    names = find_class_names(label_features, [], f"--dataset {dataset}")
    if not names:
        raise ValueError(
            f"column {columns['train'][1]!r} of --dataset {dataset} is of numbers without names, whose classes "
            "a stream cannot count: leave --streaming out"
        )
    images = {}
    for split, rows in splits.items():
        num_rows = find_num_rows(builder, str(rows.split), dataset)
        encoded = select_image_and_label(rows, *columns[split]).cast_column("image", datasets.Image(decode=False))
        images[split] = StreamImages([HubPart(split, num_rows, encoded)], split, len(names))
    return ImageData(images["train"], images["val"], names, hash_repository(builder, names))


def find_num_rows(builder: DatasetBuilder, split: str, dataset: str) -> int:
    """How many rows the repository says that a split has; ValueError where it does not."""
    known = (builder.info.splits or {}).get(split)
    if not known or not known.num_examples:
        raise ValueError(
            f"--dataset {dataset} does not say how many images {split!r} has, which a stream must know: "
            "leave --streaming out"
        )
    return int(known.num_examples)


class HubPart(Part):
    """A split of a repository, with encoded images."""

    def __init__(self, name: str, num_rows: int, rows: IterableDataset) -> None:
        super().__init__(name, num_rows)
        self.rows = rows

    def read(self, needed: np.ndarray) -> Iterator[tuple[int, EncodedImage | None, int]]:
        last = int(np.flatnonzero(needed)[-1])
        start = 0
        for table in self.rows.iter(ROWS_AT_ONCE):  # unlike plain iteration, it gives every worker all rows
            labels = table["label"]
            yield from zip(range(start, start + len(labels)), table["image"], labels, strict=True)
            start += len(labels)
            if start > last:
                return
