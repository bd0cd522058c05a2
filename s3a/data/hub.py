"""Datasets of the Hugging Face Hub by name, copied into the cache of datasets or streamed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import datasets
import numpy as np
from datasets import Dataset, DatasetBuilder, IterableDataset, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import GatedRepoError

from s3a.data.columns import check_labels, class_names, image_and_label, image_column, label_column, label_values
from s3a.data.decode import Cell
from s3a.data.images import DatasetImages, ImageData
from s3a.data.local import fingerprint
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
    path, config = path_and_config(dataset)
    with one_line_errors(dataset):
        builder = load_dataset_builder(path, config)
        splits = streams(builder) if streaming else copies(builder)
    splits = {split: splits[name] for split, name in split_names(splits, dataset).items()}
    return streamed(dataset, builder, splits) if streaming else at_hand(dataset, builder, splits)


def path_and_config(dataset: str) -> tuple[str, str | None]:
    """ORG/NAME:CONFIG in its two parts."""
    path, colon, config = dataset.rpartition(":")
    return (path, config) if colon and "/" not in config else (dataset, None)


def copies(builder: DatasetBuilder) -> dict[str, Dataset]:
    """Every split, downloaded and prepared if it is not there yet."""
    builder.download_and_prepare()
    return builder.as_dataset()


def streams(builder: DatasetBuilder) -> dict[str, IterableDataset]:
    """Every split, as it is read over the network."""
    return builder.as_streaming_dataset()


def split_names(splits: dict, dataset: str) -> dict[str, str]:
    """What the dataset calls our two splits; ValueError where it lacks one."""
    names = {split: next((name for name in known if name in splits), None) for split, known in SPLIT_NAMES.items()}
    for split, name in names.items():
        if name is None:
            raise ValueError(
                f"--dataset {dataset} has the splits {', '.join(splits)}: for {split} it must have one called "
                f"{' or '.join(SPLIT_NAMES[split])}"
            )
    return names


@contextmanager
def one_line_errors(dataset: str) -> Iterator[None]:
    """What the Hub and datasets raise, as one line with a remedy."""
    try:
        yield
    except (DatasetNotFoundError, GatedRepoError) as error:
        if isinstance(error, GatedRepoError) or "gated" in str(error):
            page = f"https://huggingface.co/datasets/{path_and_config(dataset)[0]}"
            raise FileNotFoundError(
                f"--dataset {dataset} is gated: accept its terms at {page}, then log in with hf auth login"
            ) from error
        raise FileNotFoundError(
            f"--dataset {dataset} is not on the Hub, or is private: check the name, or log in with hf auth login"
        ) from error
    except ConnectionError as error:
        raise FileNotFoundError(
            f"--dataset {dataset} is not in the cache and the Hub cannot be reached ({first_line(error)}): connect "
            "once without --streaming to copy it, or use --data parquet with the files"
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--dataset {dataset} has no files that datasets can load ({first_line(error)}): "
            "it must hold images, parquet or webdataset shards"
        ) from error
    except (ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(
            f"--dataset {dataset} cannot be loaded ({first_line(error)}): "
            "it must be data without a script; a configuration is named with ORG/NAME:CONFIG"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, as far as a single line goes."""
    return " ".join(str(error.__cause__ or error).split())[:200]


# --------------------------------------------------------------------------------------------------------
# Copied
# --------------------------------------------------------------------------------------------------------


def at_hand(dataset: str, builder: DatasetBuilder, splits: dict[str, Dataset]) -> ImageData:
    """Both splits as images that can be read in any order."""
    columns = {split: columns_of(rows, dataset) for split, rows in splits.items()}
    labels = {split: label_values(rows.data.column(columns[split][1])) for split, rows in splits.items()}
    label_features = {split: rows.features[columns[split][1]] for split, rows in splits.items()}
    names = class_names(label_features, labels.values(), f"--dataset {dataset}")
    for split, values in labels.items():
        check_labels(values, len(names), f"{split} of {dataset}")
    train, val = (DatasetImages(image_and_label(rows, *columns[split]), split) for split, rows in splits.items())
    return ImageData(train, val, names, hub_fingerprint(builder, names))


def columns_of(rows: Dataset | IterableDataset, dataset: str) -> tuple[str, str]:
    """The names of the image and the label column."""
    if rows.features is None:
        raise ValueError(f"--dataset {dataset} does not say what its columns are: leave --streaming out")
    return image_column(rows.features, f"--dataset {dataset}"), label_column(rows.features, f"--dataset {dataset}")


def hub_fingerprint(builder: DatasetBuilder, names: list[str]) -> str:
    """Changes with the revision on the Hub (a folder's files, if it is one), the configuration, and the classes."""
    return fingerprint([builder.hash, builder.config_id, *names])


# --------------------------------------------------------------------------------------------------------
# Streamed
# --------------------------------------------------------------------------------------------------------


def streamed(dataset: str, builder: DatasetBuilder, splits: dict[str, IterableDataset]) -> ImageData:
    """Both splits as streams.

    The shards of a repository do not say how many rows they have, so a split is one part here: rows are shuffled
    within the window, from the first to the last.
    """
    columns = {split: columns_of(rows, dataset) for split, rows in splits.items()}
    label_features = {split: rows.features[columns[split][1]] for split, rows in splits.items()}
    names = class_names(label_features, [], f"--dataset {dataset}")
    if not names:
        raise ValueError(
            f"column {columns['train'][1]!r} of --dataset {dataset} is of numbers without names, whose classes "
            "a stream cannot count: leave --streaming out"
        )
    images = {}
    for split, rows in splits.items():
        part = HubPart(split, num_examples(builder, str(rows.split), dataset), undecoded(rows, *columns[split]))
        images[split] = StreamImages([part], split, len(names))
    return ImageData(images["train"], images["val"], names, hub_fingerprint(builder, names))


def num_examples(builder: DatasetBuilder, split: str, dataset: str) -> int:
    """How many rows the repository says that a split has; ValueError where it does not."""
    known = (builder.info.splits or {}).get(split)
    if not known or not known.num_examples:
        raise ValueError(
            f"--dataset {dataset} does not say how many images {split!r} has, which a stream must know: "
            "leave --streaming out"
        )
    return known.num_examples


def undecoded(rows: IterableDataset, image: str, label: str) -> IterableDataset:
    """The two columns, as `image` and `label`; images stay encoded."""
    return image_and_label(rows, image, label).cast_column("image", datasets.Image(decode=False))


@dataclass(frozen=True)
class HubPart(Part):
    """A split of a repository."""

    name: str
    num_rows: int
    rows: IterableDataset

    def read(self, needed: np.ndarray) -> Iterator[tuple[int, Cell | None, int]]:
        last = int(np.flatnonzero(needed)[-1])
        start = 0
        for table in self.rows.iter(ROWS_AT_ONCE):  # unlike plain iteration, it gives every worker all rows
            labels = table["label"]
            yield from zip(range(start, start + len(labels)), table["image"], labels, strict=True)
            start += len(labels)
            if start > last:
                return
