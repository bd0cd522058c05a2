"""The sources of images by name, and the options that each of them takes."""

from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Literal, cast

from s3a.data.images import ImageData
from s3a.support.errors import make_unknown_error

Source = Literal[
    "ade20k",
    "cifar-100",
    "coco",
    "digits",
    "fashion-mnist",
    "fashion-scenes",
    "hub",
    "imagefolder",
    "label-maps",
    "parquet",
    "scenes",
    "webdataset",
]
Kind = Literal["labels", "label-maps", "objects"]
"""What a source has for each image: a class, a class for each pixel, or boxes and masks of objects."""
KIND_NAMES: dict[Kind, str] = {
    "labels": "a class",
    "label-maps": "a label map",
    "objects": "boxes and masks of objects",
}


@dataclass(frozen=True)
class SourceRule:
    """The function that loads a source, and the options that it takes."""

    load: dict[Kind, str]
    """MODULE:FUNCTION for each kind of target, imported when it is called: datasets and scikit-learn take seconds"""
    data_dir: str | None = None
    """what --data-dir must hold; None where the source takes none"""
    needs_data_dir: bool = True
    remedy: str = ""
    """what an error says where --data-dir is given but not taken"""
    takes_dataset: bool = False
    streams: bool = False
    takes_ignore_zero: bool = False


SOURCES: dict[str, SourceRule] = {
    "ade20k": SourceRule(
        {"label-maps": "s3a.data.label_maps:load_ade20k"}, data_dir="images/ and annotations/ of ADEChallengeData2016"
    ),
    "cifar-100": SourceRule(
        {"labels": "s3a.data.cifar:load_cifar100"},
        data_dir="the files of cifar-100-binary.tar.gz or cifar-100-python.tar.gz",
    ),
    "coco": SourceRule(
        {"objects": "s3a.data.coco:load_coco"},
        data_dir="train2017/, val2017/ and annotations/, or others in their format",
    ),
    "digits": SourceRule(
        {"labels": "s3a.data.local:load_digits"}, remedy="the digits come with scikit-learn: use --data imagefolder"
    ),
    "fashion-mnist": SourceRule(
        {"labels": "s3a.data.local:load_fashion_mnist"}, data_dir="the four idx files", needs_data_dir=False
    ),
    "fashion-scenes": SourceRule(
        {
            "label-maps": "s3a.data.scenes:load_label_map_fashion_scenes",
            "objects": "s3a.data.scenes:load_object_fashion_scenes",
        },
        data_dir="the four idx files of Fashion-MNIST",
        needs_data_dir=False,
    ),
    "hub": SourceRule(
        {"labels": "s3a.data.hub:load_hub", "label-maps": "s3a.data.label_maps:load_hub_label_maps"},
        remedy="a folder is --data imagefolder, parquet or webdataset",
        takes_dataset=True,
        streams=True,
        takes_ignore_zero=True,
    ),
    "imagefolder": SourceRule({"labels": "s3a.data.local:load_image_folder"}, data_dir="train/CLASS/* and val/CLASS/*"),
    "label-maps": SourceRule(
        {"label-maps": "s3a.data.label_maps:load_label_map_folder"},
        data_dir="images/{train,val}/ and label-maps/{train,val}/",
        takes_ignore_zero=True,
    ),
    "parquet": SourceRule(
        {"labels": "s3a.data.parquet:load_parquet"}, data_dir="train*.parquet and val*.parquet", streams=True
    ),
    "scenes": SourceRule(
        {"label-maps": "s3a.data.scenes:load_label_map_scenes", "objects": "s3a.data.scenes:load_object_scenes"},
        remedy="scenes are made of scikit-learn's digits and photographs: use --data label-maps or coco",
    ),
    "webdataset": SourceRule(
        {"labels": "s3a.data.webdataset:load_webdataset"}, data_dir="train*.tar and val*.tar", streams=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where images come from: the options that all commands with data share."""

    data: Source
    """Where the images come from."""
    data_dir: Path | None = None
    """The folder of an imagefolder (train/CLASS/*, val/CLASS/*), of parquet or webdataset shards, of COCO, ADE20K or
    CIFAR-100."""
    dataset: str | None = None
    """For hub: ORG/NAME or ORG/NAME:CONFIG."""
    streaming: bool = False
    """Read shards as a stream instead of copying them to the cache of the datasets library."""


def load_data(
    data: str,
    data_dir: Path | None = None,
    *,
    dataset: str | None = None,
    streaming: bool = False,
    kind: Kind = "labels",
    ignore_zero: bool = False,
) -> ImageData:
    """Loads both splits of a source.

    Args:
        data: the source's name.
        data_dir: the folder it is in, for sources that are folders.
        dataset: for `hub`: ORG/NAME or ORG/NAME:CONFIG.
        streaming: for `hub`, `parquet` and `webdataset`: read the images as they are needed, with no copy of them.
        kind: of targets.
        ignore_zero: for label maps: 0 is no class, and the number n is class n - 1.

    Raises:
        FileNotFoundError: for files or a repository that are missing.
        ValueError: for an unknown source, options that do not fit it, or images without usable labels.
    """
    if data not in SOURCES:
        raise make_unknown_error("data", data, SOURCES)
    rule = SOURCES[data]
    if kind not in rule.load:
        others = ", ".join(name for name, other in SOURCES.items() if kind in other.load)
        raise ValueError(f"--data {data} has no {KIND_NAMES[kind].removeprefix('a ')} for each image: use {others}")
    if data_dir is None and rule.data_dir and rule.needs_data_dir:
        raise ValueError(f"--data {data} needs --data-dir DIR, a folder with {rule.data_dir}")
    if data_dir is not None and not rule.data_dir:
        raise ValueError(f"--data-dir is {str(data_dir)!r} but {rule.remedy}")
    if dataset is not None and not rule.takes_dataset:
        raise ValueError(f"--dataset is {dataset!r} but --data is {data}: use --data hub")
    if dataset is None and rule.takes_dataset:
        raise ValueError(f"--data {data} needs --dataset ORG/NAME or ORG/NAME:CONFIG, such as ILSVRC/imagenet-1k")
    streams = rule.streams and kind == "labels"
    if streaming and not streams:
        streaming_sources = (
            ", ".join(name for name, other in SOURCES.items() if other.streams)
            if kind == "labels"
            else "classes of images"
        )
        raise ValueError(f"--streaming is for --data {streaming_sources}: leave it out for {data}")
    options: dict[str, object] = {}
    if rule.data_dir:
        options["data_dir"] = data_dir
    if rule.takes_dataset:
        options["dataset"] = dataset
    if streams:
        options["streaming"] = streaming
    if kind == "label-maps" and rule.takes_ignore_zero:
        options["ignore_zero"] = ignore_zero
    elif ignore_zero:
        raise ValueError(f"--ignore-zero is for label maps of one's own: leave it out for --data {data}")
    return cast(ImageData, resolve_name(rule.load[kind])(**options))
