"""ImageNet-1k's validation images and the sets that test what models learnt from it, as distributed or from the Hub.

| set | images | what it is |
| --- | --- | --- |
| imagenet | 50,000 | the validation images of ILSVRC 2012 |
| imagenet-a | 7,500 of 200 classes | photographs that ResNet-50 gets wrong (arXiv 1907.07174) |
| imagenet-r | 30,000 of 200 classes | art, cartoons, toys and other renditions (arXiv 2006.16241) |
| imagenet-v2 | 10,000 | new photographs, collected in the same way (arXiv 1902.10811) |
| imagenet-sketch | 50,889 | sketches (arXiv 1905.13549) |
| imagenet-real | 46,837 | ImageNet's own images, with all labels that fit (arXiv 2006.07159) |
| imagenet-c | 75 times 50,000 | ImageNet's own images with 15 corruptions of 5 severities (arXiv 1903.12261) |

Labels are ImageNet's class numbers, from 0 to 999, in all of them.
"""

import pkgutil
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from timm.data import ImageNetInfo

from s3a.data.images import ImageData

ImageNetSet = Literal[
    "imagenet", "imagenet-a", "imagenet-r", "imagenet-v2", "imagenet-sketch", "imagenet-real", "imagenet-c"
]
NUM_CLASSES = 1000
NUM_REAL = 46_837
"""Validation images for which ImageNet ReaL has a label."""
ARCHIVES = ("noise", "blur", "weather", "digital", "extra")
"""Of ImageNet-C; people unpack each into a folder of its name, or all into one."""
SEVERITIES = (1, 2, 3, 4, 5)
WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class SetRule:
    """What a set is, and where it lies in a folder.

    Attributes:
        title: what people call it.
        num_images: that it has as distributed.
        folders: what its folder is called as distributed, where one is given that contains it.
        indices: timm's file with the classes that it has; None where it has all.
    """

    title: str
    num_images: int
    folders: tuple[str, ...]
    indices: str | None = None


SETS: dict[ImageNetSet, SetRule] = {
    "imagenet": SetRule("ImageNet", 50_000, ("val", "validation")),
    "imagenet-a": SetRule("ImageNet-A", 7_500, ("imagenet-a",), "imagenet_a_indices.txt"),
    "imagenet-r": SetRule("ImageNet-R", 30_000, ("imagenet-r",), "imagenet_r_indices.txt"),
    "imagenet-v2": SetRule(
        "ImageNet-V2",
        10_000,
        (
            "imagenetv2-matched-frequency-format-val",
            "imagenetv2-matched-frequency",
            "imagenet-v2",
            "imagenetv2",
        ),
    ),
    "imagenet-sketch": SetRule("ImageNet-Sketch", 50_889, ("sketch", "imagenet-sketch", "imagenet_sketch")),
    "imagenet-real": SetRule("ImageNet ReaL", 50_000, ("val", "validation")),
    "imagenet-c": SetRule("ImageNet-C", 50_000, ("imagenet-c", "ImageNet-C")),
}


@dataclass(frozen=True)
class ImageNetData(ImageData):
    """A set of images labelled with ImageNet's class numbers, for evaluation: it has none to train on.

    Attributes:
        classes: the numbers of the classes that are told apart, rising; all 1,000, or those that the set has.
        real_labels: for each row all classes that fit; None where the row's label is the only one.
        has_labels: whether rows have ImageNet's own label beside these.
        is_cropped: whether the images were cropped for the network when the set was made, and must not be again.
    """

    classes: Sequence[int] = range(NUM_CLASSES)
    real_labels: Sequence[Sequence[int]] | None = None
    has_labels: bool = True
    is_cropped: bool = False


# --------------------------------------------------------------------------------------------------------
# Classes
# --------------------------------------------------------------------------------------------------------


@lru_cache
def list_classes(name: ImageNetSet) -> tuple[int, ...]:
    """The numbers of the classes that a set has, rising, as timm lists them."""
    indices = SETS[name].indices
    return tuple(range(NUM_CLASSES)) if indices is None else tuple(map(int, read_timm_file(indices).split()))


def read_timm_file(name: str) -> str:
    """A file of facts on ImageNet that ships with timm."""
    content = pkgutil.get_data("timm.data", f"_info/{name}")
    assert content is not None
    return content.decode("utf-8")


@lru_cache
def list_numbers() -> dict[str, int]:
    """ImageNet's number of each class by its WordNet ID."""
    return {wordnet_id: number for number, wordnet_id in enumerate(list_wordnet_ids())}


@lru_cache
def list_wordnet_ids() -> list[str]:
    """The WordNet IDs of ImageNet's classes, in the order of their numbers."""
    return list(ImageNetInfo().label_names())


def find_class(class_name: str, folder: Path, name: ImageNetSet) -> int:
    """ImageNet's number of the class that a folder is called after; ValueError for one that the set does not have."""
    is_number = is_class_name(class_name) and not WORDNET_ID.fullmatch(class_name)
    number = int(class_name) if is_number else list_numbers().get(class_name, -1)
    classes = list_classes(name)
    if number not in classes:
        raise ValueError(
            f"class folder {class_name!r} of {folder} is none of the {len(classes):,} classes of {SETS[name].title}, "
            "which are called by their WordNet IDs or ImageNet's numbers: take it out, or give the folder of this set"
        )
    return number


def is_name_of(name: str, number: int) -> bool:
    """Whether a class of ImageNet is called so: by its WordNet ID, alone or before other words, or by its words."""
    wordnet_id = list_wordnet_ids()[number]
    words = describe_classes()[number]
    return name.startswith(wordnet_id) or name.replace("_", " ").lower() in (words, words.partition(",")[0])


@lru_cache
def describe_classes() -> list[str]:
    """The words for ImageNet's classes, in the order of their numbers: `tench, tinca tinca`."""
    info = ImageNetInfo()
    return [info.index_to_description(number).lower() for number in range(NUM_CLASSES)]


# --------------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------------


def find_set_folder(name: ImageNetSet, data_dir: Path) -> Path:
    """The folder of class folders, in the folder given; FileNotFoundError where there is none."""
    rule = SETS[name]
    shape = f"it must hold a folder for each class, called n01440764 or 0, of {rule.title}"
    if not data_dir.is_dir():
        raise FileNotFoundError(f"data folder {str(data_dir)!r} does not exist: {shape}")
    for folder in (data_dir, *(data_dir / each for each in rule.folders)):
        if folder.is_dir() and any(is_class_name(path.name) for path in folder.iterdir() if path.is_dir()):
            return folder
    raise FileNotFoundError(
        f"data folder {str(data_dir)!r} has no class folders, nor a folder {' or '.join(rule.folders)} of them: {shape}"
    )


def is_class_name(name: str) -> bool:
    """Whether a folder's name is a WordNet ID or a number, as those of classes are."""
    return WORDNET_ID.fullmatch(name) is not None or (name.isdecimal() and name.isascii())


def check_set_folder(name: ImageNetSet, data_dir: Path) -> dict[str, int]:
    """ImageNet's number of each class folder of a set, by its name; no image is looked at.

    Raises:
        FileNotFoundError: where there are none.
        ValueError: for a folder of no class of the set, and for two folders of one class.
    """
    folder = find_set_folder(name, data_dir)
    numbers: dict[str, int] = {}
    for class_name in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        number = find_class(class_name, folder, name)
        other = next((each for each, its_number in numbers.items() if its_number == number), None)
        if other is not None:
            raise ValueError(
                f"class folders {other!r} and {class_name!r} of {folder} are of one class, as where two sets are "
                "unpacked into one folder: unpack each into a folder of its own"
            )
        numbers[class_name] = number
    return numbers


def find_corruption_folders(data_dir: Path, corruptions: Iterable[str]) -> dict[tuple[str, int], Path]:
    """The folders of ImageNet-C, by corruption and severity: CORRUPTION/SEVERITY, or GROUP/CORRUPTION/SEVERITY.

    Args:
        corruptions: those that are wanted, if they are there.

    Raises:
        FileNotFoundError: where a corruption lacks a severity.
    """
    roots = [data_dir, *(data_dir / each for each in SETS["imagenet-c"].folders)]
    if not any(root.is_dir() for root in roots):
        raise FileNotFoundError(
            f"data folder {str(data_dir)!r} does not exist: it must hold CORRUPTION/SEVERITY/CLASS of ImageNet-C, such "
            "as fog/3/n01440764"
        )
    found: dict[tuple[str, int], Path] = {}
    places = [folder for root in roots for folder in (root, *(root / archive for archive in ARCHIVES))]
    for corruption in corruptions:
        folder = next((place / corruption for place in places if (place / corruption).is_dir()), None)
        if folder is None:
            continue
        for severity in SEVERITIES:
            if not (folder / str(severity)).is_dir():
                raise FileNotFoundError(
                    f"{folder} has no folder {severity}: it must have one for each severity from 1 to 5; unpack the "
                    "whole archive of ImageNet-C there"
                )
            found[corruption, severity] = folder / str(severity)
    return found
