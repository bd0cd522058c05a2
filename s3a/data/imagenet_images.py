"""The images of ImageNet's sets, from folders and from the Hub; `imagenet` says which sets there are."""

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import compute

from s3a.data.columns import check_labels, convert_labels, find_columns, select_image_and_label
from s3a.data.hub import FOLDER_BUILDER, hash_repository, open_hub
from s3a.data.imagenet import (
    NUM_CLASSES,
    SETS,
    WORDNET_ID,
    ImageNetData,
    ImageNetSet,
    SetRule,
    check_set_folder,
    find_set_folder,
    is_class_name,
    is_name_of,
    list_classes,
    list_wordnet_ids,
    read_timm_file,
)
from s3a.data.images import DatasetImages, NoImages
from s3a.data.local import FolderSplit, hash_files, is_image_file, list_images, make_path_rows
from s3a.data.shards import SPLIT_NAMES

VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


def load_imagenet(
    name: ImageNetSet,
    data_dir: Path | None = None,
    *,
    dataset: str | None = None,
    classes: Sequence[int] | None = None,
) -> ImageNetData:
    """Loads one of the sets; ImageNet-C folder by folder, see `load_corruption`.

    Args:
        data_dir: the folder of class folders, or one that contains it under the name that it has as distributed.
        dataset: ORG/NAME or ORG/NAME:CONFIG of the Hub, in place of the folder.
        classes: of imagenet: take the images of these classes alone, and tell only them apart.

    Raises:
        FileNotFoundError: for folders or a repository that are missing.
        ValueError: for images that cannot be assigned to ImageNet's classes.
    """
    if (data_dir is None) == (dataset is None):
        given = "both are" if data_dir is not None else "neither is"
        raise ValueError(
            f"--data {name} needs --data-dir DIR, with its class folders, or --dataset ORG/NAME of the Hub: {given} "
            "given"
        )
    if data_dir is None:
        found = load_from_hub(name, cast(str, dataset))
    elif name == "imagenet-real":
        found = load_validation_files(data_dir)
    else:
        found = load_class_folders(find_set_folder(name, data_dir), name)
    check_num_images(found, SETS[name], dataset or data_dir)
    if name == "imagenet-real":
        return add_real_labels(found)
    return found if classes is None else select_classes(found, classes)


# --------------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------------


def load_class_folders(folder: Path, name: ImageNetSet) -> ImageNetData:
    """The images in a folder of class folders, in the order of ImageNet's classes."""
    split = list_images(folder)
    classes = list_classes(name)
    numbers = check_set_folder(name, folder)
    labels = [numbers[split.class_names[label]] for label in split.labels]
    order = np.argsort(labels, kind="stable").tolist()
    if not order:
        raise FileNotFoundError(f"{str(folder)!r} has no images in its class folders: unpack {SETS[name].title} there")
    return make_data(
        [split.paths[i] for i in order], [split.sizes[i] for i in order], [labels[i] for i in order], classes
    )


def load_validation_files(data_dir: Path) -> ImageNetData:
    """ImageNet's validation images, in class folders, or loose in one folder as their archive has them."""
    places = [data_dir, *(data_dir / each for each in SETS["imagenet-real"].folders)]
    for folder in (place for place in places if place.is_dir()):
        if any(is_class_name(path.name) for path in folder.iterdir() if path.is_dir()):
            return load_class_folders(folder, "imagenet-real")
        paths = sorted(path for path in folder.iterdir() if is_image_file(path.name))
        if paths:
            sizes = [path.stat().st_size for path in paths]
            data = make_data([str(path) for path in paths], sizes, [0] * len(paths), list_classes("imagenet"))
            return replace(data, has_labels=False)
    return load_class_folders(find_set_folder("imagenet-real", data_dir), "imagenet-real")


def make_data(paths: list[str], sizes: list[int], labels: list[int], classes: Sequence[int]) -> ImageNetData:
    """A set of image files on this machine, with labels of ImageNet's."""
    split = FolderSplit(list_wordnet_ids(), paths, sizes, labels)
    fingerprint = hash_files(Path(paths[0]).parent.parent, {"val": split})
    val = DatasetImages(make_path_rows(split), "val", paths=True)
    return ImageNetData(NoImages("train"), val, list_wordnet_ids(), fingerprint, classes=classes)


def load_corruption(folder: Path) -> ImageNetData:
    """The images of one corruption and severity of ImageNet-C, which were cropped to 224 px when it was made."""
    data = load_class_folders(find_set_folder("imagenet-c", folder), "imagenet-c")
    rule = SETS["imagenet-c"]
    if data.val.num_images != rule.num_images:  # the same words for each part, which are shown once
        warnings.warn(
            f"{rule.title} has {rule.num_images:,} images for each corruption and severity, and not all are here: the "
            "scores are of these alone, and not those that are published",
            stacklevel=2,
        )
    return replace(data, is_cropped=True)


# --------------------------------------------------------------------------------------------------------
# The Hub
# --------------------------------------------------------------------------------------------------------


def load_from_hub(name: ImageNetSet, dataset: str) -> ImageNetData:
    """A set that lies on the Hub, copied into the cache of datasets.

    Its labels are WordNet IDs, ImageNet's names of the classes, or its numbers of them.

    Raises:
        FileNotFoundError, ValueError: see `load_hub`; and for a label that is no class of the set.
    """
    where = f"--dataset {dataset}"
    builder, splits = open_hub(dataset, streaming=False)
    split = next((each for each in SPLIT_NAMES["val"] if each in splits), next(iter(splits)))
    if split not in SPLIT_NAMES["val"] and len(splits) > 1:
        raise ValueError(f"{where} has the splits {', '.join(splits)}: one must be called validation or test")
    rows = splits[split]
    image, label = find_set_columns(rows, where)
    rows = select_image_and_label(rows, image, label)
    numbers = find_numbers(rows, list_classes(name), where)
    rows = rows.remove_columns("label").add_column("label", numbers)
    val = DatasetImages(rows, "val", paths=rows.info.builder_name == FOLDER_BUILDER)
    names = list_wordnet_ids()
    return ImageNetData(
        NoImages("train"), val, names, hash_repository(builder, [split, *names]), classes=list_classes(name)
    )


def find_set_columns(rows: Dataset, where: str) -> tuple[str, str]:
    """The names of the image and the label column, which is the one of WordNet IDs if there is one."""
    strings = [name for name, feature in rows.features.items() if feature == Value("string")]
    first = rows.select_columns(strings)[0] if strings and len(rows) else {}
    ids = [name for name, value in first.items() if WORDNET_ID.fullmatch(value or "")]
    if len(ids) != 1:
        return find_columns(rows.features, where)
    others = {name: feature for name, feature in rows.features.items() if not isinstance(feature, ClassLabel)}
    return find_columns(Features({**others, ids[0]: ClassLabel(names=[])}), where)


def find_numbers(rows: Dataset, classes: Sequence[int], where: str) -> list[int]:
    """ImageNet's numbers of the classes of rows; ValueError for a label that is none of the set's classes."""
    feature = rows.features["label"]
    column = rows.data.column("label")
    if feature == Value("string"):
        names = sorted(set(column.to_pylist()))
        numbers = dict(zip(names, number_names(names, classes, where), strict=True))
        return [numbers[name] for name in column.to_pylist()]
    labels = convert_labels(column, where).tolist()
    if isinstance(feature, ClassLabel):
        found = number_names(feature.names, classes, where)
        check_labels(np.array(labels), len(found), where)
        return [found[label] for label in labels]
    wrong = next((label for label in labels if label not in {*classes}), None)
    if wrong is not None:
        raise ValueError(
            f"{where} has the label {wrong} without a name: it must be one of the {len(classes):,} numbers that "
            "ImageNet gives the classes of this set; take a copy that names them"
        )
    return labels


def number_names(names: Sequence[str], classes: Sequence[int], where: str) -> list[int]:
    """ImageNet's numbers of classes that are named; ValueError for a name that is none of `classes`, or of several.

    All 1,000 names must be in ImageNet's order, since two classes are called crane.
    """
    if len(names) == NUM_CLASSES == len(classes):
        other = next((number for number in classes if not is_name_of(names[number], number)), None)
        if other is None:
            return list(classes)
    if all(name.isdecimal() and int(name) in classes for name in names):
        return [int(name) for name in names]
    numbers = []
    for name in names:
        fitting = [number for number in classes if is_name_of(name, number)]
        if len(fitting) != 1:
            raise ValueError(
                f"{where} has a class {name!r}, which is {'none' if not fitting else len(fitting)} of the "
                f"{len(classes):,} classes of this set: they must be called by their WordNet IDs, or as in ImageNet"
            )
        numbers += fitting
    return numbers


# --------------------------------------------------------------------------------------------------------
# What is made of a set that was loaded
# --------------------------------------------------------------------------------------------------------


def check_num_images(data: ImageNetData, rule: SetRule, where: object) -> None:
    """Warns where a set does not have as many images as it was published with."""
    if data.val.num_images != rule.num_images:
        warnings.warn(
            f"{rule.title} has {rule.num_images:,} images and {where} has {data.val.num_images:,}: the scores are of "
            "these alone, and not those that are published",
            stacklevel=3,
        )


def select_classes(data: ImageNetData, classes: Sequence[int]) -> ImageNetData:
    """The images of some classes alone, to be told apart from each other; ValueError where there are none."""
    val = cast(DatasetImages, data.val)
    keep = np.flatnonzero(np.isin(val.dataset.data.column("label").to_numpy(), list(classes)))
    if not len(keep):
        raise ValueError(f"ImageNet's images have none of the {len(classes):,} classes of the set: give them all")
    return replace(data, val=val.select(keep.tolist()), classes=classes)


def add_real_labels(data: ImageNetData) -> ImageNetData:
    """ImageNet's validation images with all labels that fit, without those that none fits.

    Raises:
        ValueError: for an image whose name is not that of a validation image.
    """
    val = cast(DatasetImages, data.val)
    known = json.loads(read_timm_file("imagenet_real_labels.json"))
    labels = []
    for path in compute.struct_field(val.dataset.data.column("image"), "path").to_pylist():
        found = VAL_NAME.search(Path(path or "").name)
        if found is None or not 0 < int(found[1]) <= len(known):
            raise ValueError(
                f"image {path!r} is not called ILSVRC2012_val_00000001.JPEG or the like: the labels of ImageNet ReaL "
                "go by the names of ImageNet's validation images; keep these"
            )
        labels.append(known[int(found[1]) - 1])
    keep = [row for row, fitting in enumerate(labels) if fitting]
    if not keep:
        raise ValueError("none of these images has a label in ImageNet ReaL: give all of ImageNet's validation images")
    return replace(data, val=val.select(keep), real_labels=[labels[row] for row in keep])
