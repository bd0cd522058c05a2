"""Sources of single images on this machine: digits, Fashion-MNIST, and folders of pictures."""

import errno
import gzip
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import sklearn.datasets
from datasets import ClassLabel, Dataset, DatasetInfo, Features
from PIL import Image
from sklearn.model_selection import train_test_split
from torchvision.datasets import FashionMNIST
from torchvision.datasets.folder import IMG_EXTENSIONS

from s3a.data.decode import EncodedImage
from s3a.data.images import DatasetImages, ImageData

SPLITS = ("train", "val")
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IDX_NAMES = {"train": "train", "val": "t10k"}


def make_images(
    images: Sequence[Image.Image] | Sequence[EncodedImage],
    labels: Sequence[int],
    class_names: list[str],
    split: str,
) -> DatasetImages:
    """Makes a split of decoded images, or of encoded ones."""
    features = Features(image=datasets.Image(), label=ClassLabel(names=class_names))
    return DatasetImages(Dataset.from_dict({"image": images, "label": labels}, features), split)


def hash_content(parts: Iterable[object]) -> str:
    """A hash of all that tells one set of images from another."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------
# Sets that come as arrays
# --------------------------------------------------------------------------------------------------------


def load_digits() -> ImageData:
    """scikit-learn's digits: 8 x 8 pixels, 1,437 to train on, and always the same 360 held out."""
    digits = sklearn.datasets.load_digits()
    images = [Image.fromarray((image * (255 / 16)).round().astype(np.uint8)) for image in digits.images]
    parts = train_test_split(np.arange(len(images)), test_size=360, random_state=0)
    names = [str(name) for name in digits.target_names]
    train, val = (
        make_images([images[i] for i in part], digits.target[part].tolist(), names, split)
        for split, part in zip(SPLITS, parts, strict=True)
    )
    content = (digits.images.tobytes(), digits.target.tobytes(), *(part.tobytes() for part in parts))
    return ImageData(train, val, names, hash_content(hashlib.sha256(part).hexdigest() for part in content))


def load_fashion_mnist(data_dir: Path | None) -> ImageData:
    """Fashion-MNIST: 28 x 28 pixels, 60,000 to train on and 10,000 held out, from Debian's package or the idx files."""
    folder = data_dir or FASHION_MNIST_FOLDER
    splits, hashes = [], []
    for split, name in IDX_NAMES.items():
        files = [find_idx(folder, f"{name}-{kind}") for kind in ("images-idx3", "labels-idx1")]
        images, labels = (read_unzipped(path) for path in files)
        splits.append(make_images(*parse_idx(images, labels, files), FashionMNIST.classes, split))
        hashes += [hashlib.sha256(content).hexdigest() for content in (images, labels)]
    train, val = splits
    return ImageData(train, val, FashionMNIST.classes, hash_content(hashes))


def find_idx(folder: Path, stem: str) -> Path:
    """An idx file, compressed or not; FileNotFoundError that says where to get it."""
    for name in (f"{stem}-ubyte.gz", f"{stem}-ubyte"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{folder / stem}-ubyte.gz does not exist: apt install dataset-fashion-mnist, "
        "or give the folder of the four idx files with --data-dir"
    )


def read_unzipped(path: Path) -> bytes:
    """The bytes of a file that may be compressed; ValueError where it is damaged."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): get it again") from error


def parse_idx(images: bytes, labels: bytes, files: list[Path]) -> tuple[list[EncodedImage], list[int]]:
    """The images and labels of a pair of idx files: big-endian sizes, then a byte for each pixel or label."""
    count, height, width = np.frombuffer(images[4:16].ljust(12, b"\0"), ">u4").tolist()
    if len(images) != 16 + count * height * width or len(labels) != 8 + count:
        raise ValueError(f"{files[0]} and {files[1]} do not belong together or are damaged: get them again")
    header, size = f"P5 {width} {height} 255\n".encode(), height * width  # as PGM, which needs no compression
    starts = (16 + i * size for i in range(count))
    return [{"bytes": header + images[start : start + size], "path": None} for start in starts], list(labels[8:])


# --------------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------------

FOLDER_SHAPE = "it must hold images in train/CLASS/* and val/CLASS/*"


class FolderSplit(NamedTuple):
    """A folder of class folders, and the images in them, class by class: a million of them are columns, not objects."""

    class_names: list[str]
    """sorted"""
    paths: list[str]
    sizes: list[int]
    """in bytes"""
    labels: list[int]


def load_image_folder(data_dir: Path) -> ImageData:
    """A folder with train/CLASS/* and val/CLASS/*; images in folders below belong to their CLASS too.

    What has an image's name is one: where it turns out to be none, it is an image that cannot be read.

    Raises:
        FileNotFoundError: where a folder is missing, or has no images.
        ValueError: where the splits have different classes, or classes whose names some file systems cannot tell
            apart; for links in a circle, and for folders that may not be read.
    """
    if not data_dir.is_dir():
        raise FileNotFoundError(f"data folder {str(data_dir)!r} does not exist: {FOLDER_SHAPE}")
    for split in SPLITS:
        if not (data_dir / split).is_dir():
            raise FileNotFoundError(
                f"data folder {str(data_dir)!r} has no folder {split!r}: {FOLDER_SHAPE}; {advise_split(data_dir)}"
            )
    splits = {split: list_images(data_dir / split) for split in SPLITS}
    check_class_names(data_dir, {split: folder.class_names for split, folder in splits.items()})
    for split, folder in splits.items():
        if not folder.paths:
            raise FileNotFoundError(
                f"{str(data_dir / split)!r} has no images in class folders: {FOLDER_SHAPE}"
                f"{describe_other_files(data_dir / split)}"
            )
    check_classes(data_dir, splits)
    names = splits["train"].class_names
    train, val = (DatasetImages(make_path_rows(folder), split, paths=True) for split, folder in splits.items())
    return ImageData(train, val, names, hash_files(data_dir, splits))


def advise_split(data_dir: Path) -> str:
    """How to make the folder `train` or `val` that an image folder lacks, in a few words."""
    if (data_dir / "train").is_dir():
        others = [name for name in ("validation", "valid", "test") if (data_dir / name).is_dir()]
        if others:
            return f"call the folder {others[0]!r} 'val', if its images are for validation"
        return "move about a tenth of the images of each class from train/CLASS to val/CLASS"
    return (
        "make both, and move about nine tenths of the images of each class to train/CLASS and the others to val/CLASS"
    )


def list_images(split_dir: Path) -> FolderSplit:
    """The classes and images of a split, in the order of torchvision's ImageFolder.

    One walk that looks at every file once: a million files take seconds.
    """
    way = follow_link(str(split_dir), ()) if split_dir.is_symlink() else ()
    with explain_access(str(split_dir)):
        folders = sorted((entry for entry in os.scandir(split_dir) if is_folder(entry)), key=attrgetter("name"))
    split = FolderSplit([folder.name for folder in folders], [], [], [])
    for label, folder in enumerate(folders):
        own_way = follow_link(folder.path, way) if folder.is_symlink() else way
        for path, size in list_class_images(folder.path, own_way):
            split.paths.append(path)
            split.sizes.append(size)
            split.labels.append(label)
    return split


def list_class_images(class_dir: str, way: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """The path and size of each image in a folder and those below it: folder by folder, both sorted.

    Args:
        way: of links that were followed, as `follow_link` has it.
    """
    found = []
    waiting = [(class_dir, way)]
    while waiting:
        folder, way = waiting.pop()
        images = []
        with explain_access(folder), os.scandir(folder) as entries:
            for entry in entries:
                if is_folder(entry):
                    waiting.append((entry.path, follow_link(entry.path, way) if entry.is_symlink() else way))
                elif is_image_file(entry.name):
                    images.append((entry.path, find_size(entry)))
        found.append((folder, sorted(images)))
    return chain.from_iterable(images for _, images in sorted(found))


@contextmanager
def explain_access(folder: str) -> Iterator[None]:
    """Turns the system's errors into a ValueError that names the file or folder."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{error.filename or folder} cannot be read ({error.strerror}): give the user of this run the right to, "
            "or take it out"
        ) from error


def scan_folder(folder: str) -> list[os.DirEntry[str]]:
    """What lies in a folder; ValueError where it may not be read."""
    with explain_access(folder), os.scandir(folder) as entries:
        return list(entries)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself
            raise
        return False


def is_image_file(name: str) -> bool:
    """Whether the name ends like that of an image."""
    return name.lower().endswith(IMG_EXTENSIONS)


def find_size(entry: os.DirEntry[str]) -> int:
    """Bytes of a file, or of what a link leads to; 0 where that is nothing."""
    try:
        return entry.stat().st_size
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        return 0


def follow_link(path: str, way: tuple[str, ...]) -> tuple[str, ...]:
    """Adds a link to a folder to the links that were followed to reach it; ValueError if they form a circle.

    Args:
        way: for each of those links the folder that it lies in, without links in its path. If this link leads to such
            a folder or one above it, the way comes by the same links again, and never ends.
    """
    way = (*way, os.path.realpath(Path(path).parent))
    target = os.path.realpath(path)
    if any(os.path.commonpath([target, folder]) == target for folder in way):
        raise ValueError(
            f"link {path} leads to {target}, from where the way leads back to the link: folders must end somewhere; "
            "take it out"
        )
    return way


def describe_other_files(split_dir: Path) -> str:
    """What lies where the images of a split are missed, to stand behind a message; empty where that is nothing."""
    entries = scan_folder(str(split_dir))
    loose = sum(is_image_file(entry.name) for entry in entries if not is_folder(entry))
    if loose:
        return f"; {loose} images lie in no class folder: make a folder for each class, and move them there"
    inner = [inner for entry in entries if is_folder(entry) for inner in scan_folder(entry.path)]
    endings = Counter(Path(entry.name).suffix.lower() for entry in [*entries, *inner] if not is_folder(entry))
    if not endings:
        return ""
    (ending, count), *_ = endings.most_common()
    kind = f"{count} files end with {ending!r}" if ending else f"{count} files have no ending"
    return f"; {kind}, images with {', '.join(IMG_EXTENSIONS)}: unpack archives, and convert others"


def check_class_names(data_dir: Path, class_names: Mapping[str, list[str]]) -> None:
    """Raises ValueError for names, in one split or both, that some file systems take for one."""
    seen: dict[str, tuple[str, Path]] = {}
    for split, names in class_names.items():
        for name in names:
            folder = data_dir / split
            other, other_folder = seen.setdefault(unicodedata.normalize("NFC", name.lower()), (name, folder))
            if other != name:
                same_letters = unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name)
                what = "in the Unicode form of their letters" if same_letters else "in upper and lower case"
                shown, other_shown = (ascii(each) if same_letters else repr(each) for each in (name, other))
                raise ValueError(
                    f"class folders {other_shown} of {other_folder} and {shown} of {folder} differ {what} alone, and "
                    "other file systems and programs that copy would make them one or rename them: "
                    "give one class one name, and two classes names that differ in more"
                )


def check_classes(data_dir: Path, splits: Mapping[str, FolderSplit]) -> None:
    """Raises ValueError unless both splits have images of the same classes."""
    seen = {split: {folder.class_names[label] for label in {*folder.labels}} for split, folder in splits.items()}
    for split, other in (SPLITS, SPLITS[::-1]):
        absent = sorted({*seen[other], *splits[other].class_names} - seen[split])
        if absent:
            raise ValueError(
                f"class {', '.join(absent[:3])} of {data_dir / other} has no images in {data_dir / split}: "
                "both splits must have the same classes; give it images there, or take its folders out"
            )


def make_path_rows(folder: FolderSplit) -> Dataset:
    """Rows of paths, as datasets would encode them one by one; ValueError for a name that is not UTF-8."""
    try:
        paths = pa.array(folder.paths, pa.string())
    except UnicodeEncodeError as error:
        raise ValueError(f"file name {error.object!a} is not UTF-8: rename the file") from error
    images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
    features = Features(image=datasets.Image(), label=ClassLabel(names=folder.class_names))
    return Dataset(
        pa.table({"image": images, "label": pa.array(folder.labels, pa.int64())}), DatasetInfo(features=features)
    )


def hash_files(data_dir: Path, splits: Mapping[str, FolderSplit]) -> str:
    """A fingerprint of the paths in the folder, sizes and labels of all images.

    Runs are resumed by it, so each line stays the text of a tuple with a Path, without making a million of these.
    """
    start = len(str(data_dir / "train")) - len("train")
    columns = (zip(folder.paths, folder.sizes, folder.labels, strict=True) for folder in splits.values())
    kind = type(data_dir).__name__
    return hash_content(f"({kind}({path[start:]!r}), {size}, {label})" for path, size, label in sorted(chain(*columns)))
