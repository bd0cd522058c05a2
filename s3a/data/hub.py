"""Datasets of the Hugging Face Hub by name, copied into the cache of datasets or streamed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, DatasetBuilder, IterableDataset, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from httpx2 import ReadTimeout, TransportError
from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

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
from s3a.data.shards import hide_bars_in_logs
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
    obstacle = find_obstacle(path)
    if obstacle is not None and streaming:
        raise FileNotFoundError(explain_obstacle(dataset, obstacle)) from obstacle
    try:
        with explain_hub_errors(dataset), look_in_cache_alone(obstacle is not None), hide_bars_in_logs():
            builder = load_dataset_builder(path, config)
            if streaming:
                splits = builder.as_streaming_dataset()
            else:
                builder.download_and_prepare()
                splits = builder.as_dataset()
    except (FileNotFoundError, ValueError) as error:
        if obstacle is None:
            raise
        raise FileNotFoundError(explain_obstacle(dataset, obstacle)) from error
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


# --------------------------------------------------------------------------------------------------------
# What keeps a repository from being read
# --------------------------------------------------------------------------------------------------------

# The size of a repository, to be known before its download begins. ImageNet's own archives of the two splits, of which
# this is a copy, have 147.9 and 6.7 GB (image-net.org).
SIZES = {"ILSVRC/imagenet-1k": " (more than 150 GB)"}
PAGES = "https://huggingface.co/datasets"  # also for those who read from a mirror
LOG_IN = "log in with hf auth login"
COPY = "read a copy on disk with --data imagefolder --data-dir DIR, which holds train/CLASS/* and val/CLASS/*"


def find_obstacle(path: str) -> Exception | None:
    """What keeps a repository of the Hub from being read; None where nothing does, or for a folder.

    Asked first, since datasets tries again and again for half a minute where there is no network. A Hub that is there
    and busy is asked a few times. (HfApi.auth_check asks the same, without a limit of time.)
    """
    if path.count("/") != 1 or path.startswith((".", "/", "~")) or Path(path).is_dir():
        return None
    try:
        if datasets.config.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set")
        url = f"{datasets.config.HF_ENDPOINT}/api/datasets/{path}/auth-check"
        answer = http_backoff(
            "GET",
            url,
            max_retries=3,
            retry_on_exceptions=ReadTimeout,
            headers=build_hf_headers(),
            timeout=HF_HUB_ETAG_TIMEOUT,
        )
        hf_raise_for_status(answer)
    except HfHubHTTPError as error:
        known = isinstance(error, (GatedRepoError, RepositoryNotFoundError, DisabledRepoError))
        # a mirror may know nothing of this endpoint, and still have the files
        return None if not known and error.response.status_code == 404 else error
    except (TransportError, OfflineModeIsEnabled) as error:
        return error
    return None


def explain_obstacle(dataset: str, obstacle: Exception) -> str:
    """The line for an obstacle: what it is, and what helps."""
    path = split_config(dataset)[0]
    terms = f"accept its terms at {PAGES}/{path}"
    if isinstance(obstacle, GatedRepoError):
        if obstacle.response.status_code == 401:
            reason = f"is gated: {terms}, then {LOG_IN}"
        else:
            reason = f"is gated, and the account that is logged in has no access: {terms}"
    elif isinstance(obstacle, RepositoryNotFoundError):
        return f"--dataset {dataset} is not on the Hub, or is private: check the name, or {LOG_IN}"
    elif isinstance(obstacle, DisabledRepoError):
        reason = f"is disabled by the Hub: {PAGES}/{path} says why"
    else:
        reason = f"is not in the cache, and {explain_failure(obstacle)}"
        if path in SIZES:
            reason += f"; it is gated, too: {terms} and {LOG_IN}"
    return f"--dataset {dataset}{SIZES.get(path, '')} {reason}; or {COPY}; --streaming keeps no copy of the Hub's"


def explain_failure(error: Exception) -> str:
    """Why the Hub gave no usable answer, and what helps."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE forbids to ask the Hub: unset it"
    if not isinstance(error, HfHubHTTPError):
        message = shorten_error(error) or type(error).__name__
        return f"the Hub cannot be reached ({message}): check the network, HF_ENDPOINT and the proxy"
    status = error.response.status_code
    if status == 401:
        return f"the Hub does not know the token (401): {LOG_IN} again, or unset HF_TOKEN"
    if status in (403, 407):
        return f"the Hub, or a proxy before it, answers {status}: check HTTPS_PROXY, and the rights of the token"
    return f"the Hub answers {status}: try again later, and check HF_ENDPOINT"


@contextmanager
def look_in_cache_alone(alone: bool) -> Iterator[None]:
    """Keeps datasets from asking the Hub, if `alone`."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = alone or before
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def explain_hub_errors(dataset: str) -> Iterator[None]:
    """Turns what the Hub and datasets raise into one line with a remedy."""
    try:
        yield
    except (DatasetNotFoundError, GatedRepoError) as error:
        if isinstance(error, GatedRepoError) or "gated" in str(error):
            page = f"{PAGES}/{split_config(dataset)[0]}"
            raise FileNotFoundError(
                f"--dataset {dataset} is gated: accept its terms at {page}, then {LOG_IN}"
            ) from error
        raise FileNotFoundError(
            f"--dataset {dataset} is not on the Hub, or is private: check the name, or {LOG_IN}"
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
