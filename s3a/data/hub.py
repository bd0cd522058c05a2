"""Datasets of the Hugging Face Hub by name, copied into the cache of datasets or streamed."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import datasets
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
    find_columns,
    make_images,
)
from s3a.data.images import ImageData, Images
from s3a.data.local import hash_content
from s3a.data.shards import SPLIT_NAMES, hide_bars_in_logs, shorten_error

FOLDER_BUILDER = "imagefolder"
"""What datasets calls its reader of repositories of single images; the paths in their rows are its own."""


def load_hub(dataset: str, streaming: bool) -> ImageData:
    """ORG/NAME or ORG/NAME:CONFIG of the Hub, or a local folder that datasets can load.

    Without streaming it is downloaded once, into the cache of datasets (HF_HOME), and found there without a network.

    Raises:
        FileNotFoundError: where it is absent, gated, or out of reach.
        ValueError: where its splits or columns are not those of labelled images, or it cannot be streamed.
    """
    builder, splits = open_hub(dataset, streaming)
    splits = {split: splits[name] for split, name in find_splits(splits, dataset).items()}
    return make_splits(dataset, builder, splits)


def open_hub(
    dataset: str, streaming: bool
) -> tuple[DatasetBuilder, Mapping[str, Dataset] | Mapping[str, IterableDataset]]:
    """All splits of a dataset of the Hub, and what read them; errors are those of `load_hub`."""
    path, config = split_config(dataset)
    obstacle = find_obstacle(path)
    if obstacle is not None and streaming:
        raise FileNotFoundError(explain_obstacle(dataset, obstacle)) from obstacle
    try:
        with explain_hub_errors(dataset), look_in_cache_alone(obstacle is not None), hide_bars_in_logs():
            builder = load_dataset_builder(path, config)
            if streaming:
                return builder, builder.as_streaming_dataset()
            builder.download_and_prepare()
            return builder, builder.as_dataset()
    except (FileNotFoundError, ValueError) as error:
        if obstacle is None:
            raise
        raise FileNotFoundError(explain_obstacle(dataset, obstacle)) from error


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


def hash_repository(builder: DatasetBuilder, class_names: list[str]) -> str:
    """A fingerprint that changes with the revision (or a folder's files), the configuration, and the classes."""
    return hash_content([builder.hash, builder.config_id, *class_names])


def make_splits(dataset: str, builder: DatasetBuilder, splits: Mapping[str, Dataset | IterableDataset]) -> ImageData:
    """Both splits, of copied or streamed rows.

    A stream must be told what a copy can count: how many images and classes there are.
    """
    where = f"--dataset {dataset}"
    for rows in splits.values():
        if isinstance(rows, IterableDataset) and rows.info.builder_name == FOLDER_BUILDER:
            raise ValueError(f"{where} is a folder of single images, and a stream reads shards: leave --streaming out")
        if rows.features is None:
            raise ValueError(f"{where} does not say what its columns are: leave --streaming out")
    columns = {
        split: find_columns(rows.features, where, rows if isinstance(rows, Dataset) else None)
        for split, rows in splits.items()
    }
    label_features = {split: rows.features[columns[split][1]] for split, rows in splits.items()}
    labels = {
        split: convert_labels(rows.data.column(columns[split][1]), where)
        for split, rows in splits.items()
        if isinstance(rows, Dataset)
    }
    names = find_class_names(label_features, labels.values(), where)
    if not names and not labels:
        raise ValueError(
            f"column {columns['train'][1]!r} of {where} is of numbers without names, whose classes a stream cannot "
            "count: leave --streaming out"
        )
    for split, values in labels.items():
        check_labels(values, len(names), f"{split} of {dataset}")
    images: list[Images] = []
    for split, rows in splits.items():
        name = str(rows.split)
        files = builder.config.data_files[name] if builder.config.data_files else ()
        num_images = len(rows) if isinstance(rows, Dataset) else find_num_rows(builder, name, dataset)
        images.append(
            make_images(
                rows,
                columns[split],
                split,
                num_images=num_images,
                num_classes=len(names),
                shard_names=name_shards(files),
                paths=rows.info.builder_name == FOLDER_BUILDER,
            )
        )
    train, val = images
    return ImageData(train, val, names, hash_repository(builder, names))


def name_shards(files: Sequence[str]) -> list[str]:
    """Short names of files, which are still different: their paths behind the folder that all are in."""
    paths = [PurePosixPath(file) for file in files]
    folder = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return [str(path.relative_to(folder)) for path in paths]


def find_num_rows(builder: DatasetBuilder, split: str, dataset: str) -> int:
    """How many rows the repository says that a split has; ValueError where it does not."""
    known = (builder.info.splits or {}).get(split)
    if not known or not known.num_examples:
        raise ValueError(
            f"--dataset {dataset} does not say how many images {split!r} has, which a stream must know: "
            "leave --streaming out"
        )
    return int(known.num_examples)
