"""CIFAR-100's files as they are distributed, in cifar-100-binary.tar.gz or cifar-100-python.tar.gz."""

import hashlib
import warnings
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR100

from s3a.data.decode import EncodedImage
from s3a.data.images import DatasetImages, ImageData
from s3a.data.local import hash_content, make_images

FOLDER = "cifar-100-binary"
PICKLE_FOLDER = CIFAR100.base_folder
PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
SPLIT_FILES = {"train": ("train.bin", 50_000), "val": ("test.bin", 10_000)}
"""The file of each split, and how many images it has as distributed."""
NAMES_FILE = "fine_label_names.txt"
NUM_FINE, NUM_COARSE = 100, 20
SIDE = 32
RECORD_BYTES = 2 + 3 * SIDE * SIDE
"""The coarse label and the fine label, a byte each; then all red, all green and all blue pixels, row by row."""


def load_cifar100(data_dir: Path) -> ImageData:
    """CIFAR-100 with its 100 fine classes: 32 x 32 pixels, 50,000 to train on and the 10,000 of the test set held out.

    The binary files are read here; the pickles of the other archive by torchvision, which reads none but those that
    have the checksums of the distributed ones: other pickles could run code.

    Args:
        data_dir: the unpacked folder, or the one that contains it.

    Raises:
        FileNotFoundError: where files are missing, or lie there as an archive.
        ValueError: for damaged files, and for other pickles.
    """
    for folder in (data_dir, data_dir / FOLDER):
        if any((folder / name).is_file() for name, _ in SPLIT_FILES.values()):
            return load_binary(folder)
    for root in (data_dir, data_dir.parent if data_dir.name == PICKLE_FOLDER else data_dir):
        if (root / PICKLE_FOLDER / "meta").is_file():
            return load_pickles(root)
    for archive in (data_dir / f"{FOLDER}.tar.gz", data_dir / CIFAR100.filename, data_dir):
        if archive.is_file():
            raise FileNotFoundError(f"{archive} is a file: unpack it, and give its folder with --data-dir")
    raise FileNotFoundError(
        f"{str(data_dir)!r} has neither train.bin nor a folder {FOLDER} or {PICKLE_FOLDER}: get {FOLDER}.tar.gz of "
        f"{PAGE}, unpack it, and give its folder with --data-dir"
    )


def load_binary(folder: Path) -> ImageData:
    """Both splits of the binary files."""
    paths = {split: folder / name for split, (name, _) in SPLIT_FILES.items()}
    for path in (*paths.values(), folder / NAMES_FILE):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: unpack {FOLDER}.tar.gz again, of {PAGE}")
    class_names = read_class_names(folder / NAMES_FILE)
    splits, hashes = [], []
    for split, path in paths.items():
        content = path.read_bytes()
        labels, images = parse_records(content, SPLIT_FILES[split][1], path)
        splits.append(encode_images(images, labels.tolist(), class_names, split))
        hashes.append(hashlib.sha256(content).hexdigest())
    train, val = splits
    return ImageData(train, val, class_names, hash_content([*hashes, *class_names]))


def load_pickles(root: Path) -> ImageData:
    """Both splits of the pickles, as torchvision reads them; ValueError for others than the distributed ones."""
    try:
        sets = {split: CIFAR100(root, train=split == "train") for split in SPLIT_FILES}
    except RuntimeError as error:  # a checksum differs
        raise ValueError(
            f"{root / PICKLE_FOLDER} has other files than the distributed ones, whose pickles alone are read: get "
            f"{CIFAR100.filename} or {FOLDER}.tar.gz of {PAGE} again"
        ) from error
    names = sets["train"].classes
    train, val = (encode_images(each.data, each.targets, names, split) for split, each in sets.items())
    hashes = [hashlib.sha256(each.data.tobytes() + bytes(each.targets)).hexdigest() for each in sets.values()]
    return ImageData(train, val, names, hash_content([*hashes, *names]))


def encode_images(images: np.ndarray, labels: list[int], class_names: list[str], split: str) -> DatasetImages:
    """A split of images [images, height, width, channels] uint8, as PPM, which needs no compression."""
    header = f"P6 {SIDE} {SIDE} 255\n".encode()
    encoded: list[EncodedImage] = [{"bytes": header + image.tobytes(), "path": None} for image in images]
    return make_images(encoded, labels, class_names, split)


def read_class_names(path: Path) -> list[str]:
    """The names of the fine classes, a line each; ValueError unless there are 100 different ones."""
    names = path.read_text("ascii", errors="replace").split()
    if len(names) != NUM_FINE or len({*names}) != NUM_FINE:
        raise ValueError(
            f"{path} has {len({*names})} different names on {len(names)} lines: it must have {NUM_FINE}; "
            f"unpack {FOLDER}.tar.gz again"
        )
    return names


def parse_records(content: bytes, num_images: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The fine labels [images] and the images [images, height, width, channels] of a binary file, uint8.

    Args:
        num_images: as distributed; a warning says where there are others.

    Raises:
        ValueError: for a file that does not hold whole images, and for labels that are none of CIFAR-100's.
    """
    if not content or len(content) % RECORD_BYTES:
        raise ValueError(
            f"{path} has {len(content):,} bytes, which are no whole number of images of {RECORD_BYTES:,}: get "
            f"{FOLDER}.tar.gz of {PAGE} again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD_BYTES)
    if len(records) != num_images:
        warnings.warn(f"{path} has {len(records):,} images, and CIFAR-100's has {num_images:,}", stacklevel=2)
    wrong = np.flatnonzero((records[:, 0] >= NUM_COARSE) | (records[:, 1] >= NUM_FINE))
    if len(wrong):
        coarse, fine = records[wrong[0], :2].tolist()
        raise ValueError(
            f"{path} is damaged, or not CIFAR-100: image {wrong[0]} has the coarse label {coarse} and the fine label "
            f"{fine}, of {NUM_COARSE} and {NUM_FINE} classes; get {FOLDER}.tar.gz of {PAGE} again"
        )
    return records[:, 1], records[:, 2:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
