"""Images with label maps that are files: ADE20K, and folders; and how label maps are decoded.

A label map is a grayscale or palette PNG of its image's size: the number in a pixel is that of its class. 255 is
ignored everywhere, and 0 too where a source says so: classes are numbered from 1 on then, and from 0 on otherwise.
"""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS

from s3a.data.decode import EncodedImage, UnreadableImageError, open_encoded, open_image
from s3a.data.images import ImageData, MapImages, Row
from s3a.data.local import SPLITS, find_size, hash_content, is_folder, scan_folder
from s3a.data.shards import read_class_names
from s3a.data.targets import IGNORED, DecodedTarget, LabelMap, Target

NUMBERS = 256
"""Larger ones, which 16 bits hold, are never those of a class."""
NO_CLASS = -1
FORMATS = ("PNG", "TIFF")  # which keep every number; datasets stores 16 bits and palettes as TIFF
MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # Pillow's, of one number a pixel
GRAY_STEPS = {"L;2": 85, "L;4": 17}  # Pillow stretches grays of 2 and 4 bits to 0 ... 255
REWRITE = "write it as a grayscale or palette PNG, with the number of its class in each pixel"

# --------------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbering:
    """Which number in a label map is which class.

    Attributes:
        num_classes: at most 255, so that a label map is of bytes.
        ignore_zero: whether 0 is ignored and classes are numbered from 1 on, instead of from 0.
    """

    num_classes: int
    ignore_zero: bool

    def __post_init__(self) -> None:
        most = IGNORED - self.first
        if not 1 <= self.num_classes <= most:
            raise ValueError(
                f"there are {self.num_classes} classes: label maps have 1 to {most}, numbered from {self.first} on, "
                "since 255 is ignored; join classes"
            )

    @property
    def first(self) -> int:
        """The number of the first class."""
        return int(self.ignore_zero)

    @cached_property
    def table(self) -> np.ndarray:
        """[NUMBERS + 1] int16: the class of each number, IGNORED or NO_CLASS; the last is for all larger numbers."""
        table = np.full(NUMBERS + 1, NO_CLASS, np.int16)
        table[: self.first] = table[IGNORED] = IGNORED
        table[self.first : self.first + self.num_classes] = np.arange(self.num_classes)
        return table

    def find_classes(self, numbers: np.ndarray, what: str) -> np.ndarray:
        """The classes of numbers [height, width] as uint8.

        Args:
            what: what errors call the label map.

        Raises:
            UnreadableImageError: for a number of no class.
        """
        small = numbers if numbers.dtype.itemsize == 1 else np.minimum(numbers.astype(np.uint32), NUMBERS)
        classes = self.table[small]
        if classes.min() == NO_CLASS:
            wrong, counts = np.unique(numbers[classes == NO_CLASS], return_counts=True)
            others = f", and {len(wrong) - 1} more numbers are no classes either" if len(wrong) > 1 else ""
            ignored = "0 and 255 are" if self.ignore_zero else "255 is"
            raise UnreadableImageError(
                f"{what} has {wrong[0]} in {counts[0]} pixels{others}; classes are {self.first} to "
                f"{self.first + self.num_classes - 1}, and {ignored} ignored",
                "number the classes so, or put 255 where there is none",
            )
        return classes.astype(np.uint8)


@dataclass(frozen=True, eq=False)
class EncodedLabelMap(Target):
    """A label map before it is decoded.

    Attributes:
        encoded: what the row holds, or the path of a file that the source itself found on this machine.
        numbering: of its classes.
    """

    encoded: EncodedImage | Path | None
    numbering: Numbering

    def decode(self, height: int, width: int) -> DecodedTarget:
        what = f"label map {self.encoded}" if isinstance(self.encoded, Path) else "its label map"
        try:
            numbers = read_numbers(self.encoded)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"{what} cannot be read ({error.reason})", error.remedy) from error
        if numbers.shape != (height, width):
            raise UnreadableImageError(
                f"{what} has {numbers.shape[0]} x {numbers.shape[1]} pixels (height x width), and its image "
                f"{height} x {width}",
                "give both one size; where the image is turned by its EXIF orientation, turn the label map too",
            )
        return {"label_map": tv_tensors.Mask(torch.from_numpy(self.numbering.find_classes(numbers, what)))}


def read_numbers(encoded: EncodedImage | Path | None) -> np.ndarray:
    """The numbers in a label map, [height, width], of a palette the indices, never its colours.

    Raises:
        UnreadableImageError: where it cannot be decoded, or has colours, or a format that changes numbers.
    """
    with open_encoded(encoded) as file, open_image(file) as image:
        if image.format not in FORMATS:
            raise UnreadableImageError(f"it is {image.format}, which need not keep numbers as they were", REWRITE)
        if image.mode not in MODES:
            raise UnreadableImageError(f"its pixels are {image.mode}, and must be one whole number each", REWRITE)
        raw_modes = [tile.args if isinstance(tile.args, str) else (tile.args or ("",))[0] for tile in image.tile]
        step = GRAY_STEPS.get(raw_modes[0], 1) if raw_modes else 1
        numbers = np.asarray(image)
    if image.mode == "1":
        return numbers.astype(np.uint8)
    return numbers if step == 1 else numbers // step


# --------------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------------

MAP_FOLDERS = ("label-maps", "annotations")
FOLDER_SHAPE = (
    "it must hold images/train/NAME.jpg and label-maps/train/NAME.png, the same in folders val, and classes.txt"
)
ADE20K_SPLITS = {"train": "training", "val": "validation"}
ADE20K_CLASSES = 150
ADE20K_SHAPE = (
    "it must be the folder ADEChallengeData2016 of the MIT Scene Parsing benchmark "
    "(http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip), unpacked"
)


class LabelledFiles(NamedTuple):
    """The images of a split and their label maps, in the order of their names: columns, not objects."""

    images: list[str]
    maps: list[str]
    sizes: list[tuple[int, int]]
    """of both files, in bytes"""


class LabelMapFiles(MapImages):
    """A split of files."""

    blank = LabelMap()

    def __init__(self, files: LabelledFiles, split: str, numbering: Numbering) -> None:
        self.files, self.split, self.numbering = files, split, numbering
        self.num_images = len(files.images)

    def name_of(self, index: int) -> str:
        return self.files.images[index]

    def read_rows(self, indices: list[int]) -> list[Row]:
        images, maps, _ = self.files
        return [
            Row(index, Path(images[index]), target=EncodedLabelMap(Path(maps[index]), self.numbering))
            for index in indices
        ]


def load_ade20k(data_dir: Path) -> ImageData:
    """ADE20K as the MIT Scene Parsing benchmark distributes it: 150 classes; 0 of its files is ignored.

    Raises:
        FileNotFoundError: where a folder, a file or the half of a pair is missing.
        ValueError: for names of classes that are not those of the benchmark, and files that may not be read.
    """
    if not (data_dir / "images").is_dir() and (data_dir / "ADEChallengeData2016").is_dir():
        raise FileNotFoundError(f"data folder {str(data_dir)!r} has no folder 'images': name its ADEChallengeData2016")
    splits = {
        split: list_pairs(data_dir, "images", "annotations", name, ADE20K_SHAPE)
        for split, name in ADE20K_SPLITS.items()
    }
    return make_file_data(data_dir, splits, read_ade20k_names(data_dir / "objectInfo150.txt"), ignore_zero=True)


def read_ade20k_names(path: Path) -> list[str]:
    """The names of the benchmark's classes, each with its synonyms, from its table of them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: it names the classes, and comes with ADE20K; {ADE20K_SHAPE}")
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        names = [row.get("Name") for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    known = [name.strip() for name in names if name]
    if len(known) != ADE20K_CLASSES:
        raise ValueError(f"{path} names {len(known)} classes and must name {ADE20K_CLASSES}: unpack it anew")
    return known


def load_label_map_folder(data_dir: Path, ignore_zero: bool) -> ImageData:
    """A folder with images/{train,val}/NAME.jpg, label-maps/{train,val}/NAME.png and classes.txt.

    Images may be of any kind. Label maps may lie in `annotations` instead.

    Args:
        ignore_zero: whether 0 is ignored and the first line of classes.txt names 1, instead of 0.

    Raises:
        FileNotFoundError: where a folder, a file or the half of a pair is missing.
        ValueError: where there are too many classes or two images of one name; for files that may not be read.
    """
    found = [name for name in MAP_FOLDERS if (data_dir / name).is_dir()]
    if len(found) > 1:
        raise ValueError(f"data folder {str(data_dir)!r} has the folders {' and '.join(found)}: take one of them out")
    maps = found[0] if found else MAP_FOLDERS[0]
    splits = {split: list_pairs(data_dir, "images", maps, split, FOLDER_SHAPE) for split in SPLITS}
    names = read_class_names(data_dir)
    if not names:
        raise FileNotFoundError(
            f"{data_dir / 'classes.txt'} does not exist or is empty: write the names of the classes into it, one a "
            f"line, in the order of their numbers from {int(ignore_zero)} on"
        )
    return make_file_data(data_dir, splits, names, ignore_zero)


def make_file_data(
    data_dir: Path, splits: Mapping[str, LabelledFiles], names: list[str], ignore_zero: bool
) -> ImageData:
    """Both splits, and a fingerprint of the paths in the folder and the sizes of all files, and the classes."""
    numbering = Numbering(len(names), ignore_zero)
    train, val = (LabelMapFiles(files, split, numbering) for split, files in splits.items())
    start = len(str(data_dir / "x")) - 1
    lines = (
        f"{image[start:]!a} {labels[start:]!a} {sizes}"
        for files in splits.values()
        for image, labels, sizes in zip(*files, strict=True)
    )
    return ImageData(train, val, names, hash_content([numbering, *names, *lines]))


def list_pairs(data_dir: Path, images: str, maps: str, split: str, shape: str) -> LabelledFiles:
    """The images of a split and their label maps, found by the names without endings.

    Args:
        images, maps: the folders of the splits' folders.
        split: what both call the split.
        shape: what the data folder must be, for messages.
    """
    found_images = list_stems(data_dir / images / split, IMG_EXTENSIONS, shape)
    found_maps = list_stems(data_dir / maps / split, (".png",), shape)
    for stem in sorted(found_images.keys() ^ found_maps.keys()):
        if stem in found_images:
            reason = f"image {found_images[stem][0]} has no label map {data_dir / maps / split / stem}.png"
        else:
            reason = f"label map {found_maps[stem][0]} has no image {data_dir / images / split / stem}.jpg"
        raise FileNotFoundError(f"{reason}: put it there, or take out the one that is alone")
    if not found_images:
        raise FileNotFoundError(f"{data_dir / images / split} has no images: {shape}")
    stems = sorted(found_images)
    return LabelledFiles(
        [found_images[stem][0] for stem in stems],
        [found_maps[stem][0] for stem in stems],
        [(found_images[stem][1], found_maps[stem][1]) for stem in stems],
    )


def list_stems(folder: Path, endings: Sequence[str], shape: str) -> dict[str, tuple[str, int]]:
    """The path and size of each file with one of the endings, by its name without it.

    Raises:
        FileNotFoundError: where the folder is missing.
        ValueError: for folders in it, and two files of one name.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {str(folder)!r} does not exist: {shape}")
    files: dict[str, tuple[str, int]] = {}
    for entry in scan_folder(str(folder)):
        if entry.name.startswith("."):
            continue
        if is_folder(entry):
            raise ValueError(f"{folder} holds the folder {entry.name!r}: move its files into {folder} itself")
        stem, ending = os.path.splitext(entry.name)  # noqa: PTH122  paths take ten times as long
        if ending.lower() not in endings:
            continue
        if stem in files:
            raise ValueError(f"{entry.path} and {files[stem][0]} have one name: take one of them out")
        files[stem] = entry.path, find_size(entry)
    return files
