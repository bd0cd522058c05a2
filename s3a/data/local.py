"""Sources of single images on this machine: digits, Fashion-MNIST, and folders of pictures."""

import gzip
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import numpy as np
import sklearn.datasets
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from sklearn.model_selection import train_test_split
from torchvision.datasets import FashionMNIST, ImageFolder

from s3a.data.decode import EncodedImage
from s3a.data.images import DatasetImages, ImageData

SPLITS = ("train", "val")
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IDX_NAMES = {"train": "train", "val": "t10k"}


def make_images(
    images: Sequence[Image.Image] | Sequence[EncodedImage] | Sequence[str],
    labels: Sequence[int],
    class_names: list[str],
    split: str,
) -> DatasetImages:
    """Makes a split of decoded images, of encoded ones, or of paths."""
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


def load_image_folder(data_dir: Path) -> ImageData:
    """A folder with train/CLASS/* and val/CLASS/*; images in folders below belong to their CLASS too."""
    shape = "it must hold images in train/CLASS/* and val/CLASS/*"
    if not data_dir.is_dir():
        raise FileNotFoundError(f"data folder {str(data_dir)!r} does not exist: {shape}")
    folders = {}
    for split in SPLITS:
        if not (data_dir / split).is_dir():
            raise FileNotFoundError(
                f"data folder {str(data_dir)!r} has no folder {split!r}: {shape}; {advise_split(data_dir)}"
            )
        if not any(path.is_dir() for path in (data_dir / split).iterdir()):
            raise FileNotFoundError(f"{str(data_dir / split)!r} has no images in class folders: {shape}")
        folders[split] = ImageFolder(data_dir / split, allow_empty=True)
        if not folders[split].samples:
            raise FileNotFoundError(f"{str(data_dir / split)!r} has no images in class folders: {shape}")
    check_classes(data_dir, folders)
    names = folders["train"].classes
    train, val = (
        make_images([path for path, _ in folder.samples], folder.targets, names, split)
        for split, folder in folders.items()
    )
    samples = sorted(sample for folder in folders.values() for sample in folder.samples)
    lines = ((Path(path).relative_to(data_dir), Path(path).stat().st_size, label) for path, label in samples)
    return ImageData(train, val, names, hash_content(lines))


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


def check_classes(data_dir: Path, folders: dict[str, ImageFolder]) -> None:
    """Raises ValueError unless both splits have images of the same classes."""
    seen = {split: {folder.classes[label] for label in folder.targets} for split, folder in folders.items()}
    for split, other in (SPLITS, SPLITS[::-1]):
        absent = sorted({*seen[other], *folders[other].classes} - seen[split])
        if absent:
            raise ValueError(
                f"class {', '.join(absent[:3])} of {data_dir / other} has no images in {data_dir / split}: "
                "both splits must have the same classes"
            )
