"""The sources of images by name, and the options that each of them takes."""

from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Literal, cast

from s3a.data.images import ImageData
from s3a.support.errors import make_unknown_error

Source = Literal["digits", "fashion-mnist", "hub", "imagefolder", "parquet", "webdataset"]


@dataclass(frozen=True)
class SourceRule:
    """The function that loads a source, and the options that it takes."""

    load: str
    """MODULE:FUNCTION, imported when it is called: datasets and scikit-learn take seconds to import"""
    data_dir: str | None = None
    """what --data-dir must hold; None where the source takes none"""
    needs_data_dir: bool = True
    remedy: str = ""
    """what an error says where --data-dir is given but not taken"""
    takes_dataset: bool = False
    streams: bool = False


SOURCES: dict[str, SourceRule] = {
    "digits": SourceRule(
        "s3a.data.local:load_digits", remedy="the digits come with scikit-learn: use --data imagefolder"
    ),
    "fashion-mnist": SourceRule(
        "s3a.data.local:load_fashion_mnist", data_dir="the four idx files", needs_data_dir=False
    ),
    "hub": SourceRule(
        "s3a.data.hub:load_hub",
        remedy="a folder is --data imagefolder, parquet or webdataset",
        takes_dataset=True,
        streams=True,
    ),
    "imagefolder": SourceRule("s3a.data.local:load_image_folder", data_dir="train/CLASS/* and val/CLASS/*"),
    "parquet": SourceRule("s3a.data.parquet:load_parquet", data_dir="train*.parquet and val*.parquet", streams=True),
    "webdataset": SourceRule("s3a.data.webdataset:load_webdataset", data_dir="train*.tar and val*.tar", streams=True),
}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where images come from: the options that all commands with data share."""

    data: Source
    """Where the images come from."""
    data_dir: Path | None = None
    """The folder of an imagefolder (train/CLASS/*, val/CLASS/*), or of parquet or webdataset shards."""
    dataset: str | None = None
    """For hub: ORG/NAME or ORG/NAME:CONFIG."""
    streaming: bool = False
    """Read shards as a stream instead of copying them to the cache of the datasets library."""


def load_data(
    data: str, data_dir: Path | None = None, *, dataset: str | None = None, streaming: bool = False
) -> ImageData:
    """Loads both splits of a source.

    Args:
        data: the source's name.
        data_dir: the folder it is in, for sources that are folders.
        dataset: for `hub`: ORG/NAME or ORG/NAME:CONFIG.
        streaming: for `hub`, `parquet` and `webdataset`: read the images as they are needed, with no copy of them.

    Raises:
        FileNotFoundError: for files or a repository that are missing.
        ValueError: for an unknown source, options that do not fit it, or images without usable labels.
    """
    if data not in SOURCES:
        raise make_unknown_error("data", data, SOURCES)
    rule = SOURCES[data]
    if data_dir is None and rule.data_dir and rule.needs_data_dir:
        raise ValueError(f"--data {data} needs --data-dir DIR, a folder with {rule.data_dir}")
    if data_dir is not None and not rule.data_dir:
        raise ValueError(f"--data-dir is {str(data_dir)!r} but {rule.remedy}")
    if dataset is not None and not rule.takes_dataset:
        raise ValueError(f"--dataset is {dataset!r} but --data is {data}: use --data hub")
    if dataset is None and rule.takes_dataset:
        raise ValueError(f"--data {data} needs --dataset ORG/NAME or ORG/NAME:CONFIG, such as ILSVRC/imagenet-1k")
    if streaming and not rule.streams:
        streaming_sources = ", ".join(name for name, other in SOURCES.items() if other.streams)
        raise ValueError(f"--streaming is for --data {streaming_sources}: leave it out for {data}")
    options: dict[str, object] = {}
    if rule.data_dir:
        options["data_dir"] = data_dir
    if rule.takes_dataset:
        options["dataset"] = dataset
    if rule.streams:
        options["streaming"] = streaming
    return cast(ImageData, resolve_name(rule.load)(**options))
