"""CIFAR-100's files as they are distributed in cifar-100-binary.tar.gz."""

import hashlib
from pathlib import Path

import numpy as np

from s3a.data.decode import EncodedImage
from s3a.data.images import ImageData
from s3a.data.local import hash_content, make_images

FOLDER = "cifar-100-binary"
PICKLE_FOLDER = "cifar-100-python"
PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
SPLIT_FILES = {"train": ("train.bin", 50_000), "val": ("test.bin", 10_000)}
"""The file of each split, and how many images it has."""
NAMES_FILE = "fine_label_names.txt"
NUM_FINE, NUM_COARSE = 100, 20
SIDE = 32
RECORD_BYTES = 2 + 3 * SIDE * SIDE
"""The coarse label and the fine label, a byte each; then all red, all green and all blue pixels, row by row."""


def load_cifar100(data_dir: Path) -> ImageData:
    """CIFAR-100 with its 100 fine classes: 32 x 32 pixels, 50,000 to train on and the 10,000 of the test set held out.

    Args:
        data_dir: the unpacked folder, or the one that contains it.

    Raises:
        FileNotFoundError: where files are missing, or lie there as an archive.
        ValueError: for the files with pickles, and for damaged files.
    """
    folder = find_binary_folder(data_dir)
    paths = {split: folder / name for split, (name, _) in SPLIT_FILES.items()}
    for path in (*paths.values(), folder / NAMES_FILE):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: unpack {FOLDER}.tar.gz again, of {PAGE}")
    class_names = read_class_names(folder / NAMES_FILE)
    splits, hashes = [], []
    header = f"P6 {SIDE} {SIDE} 255\n".encode()  # as PPM, which needs no compression
    for split, path in paths.items():
        content = path.read_bytes()
        labels, images = parse_records(content, SPLIT_FILES[split][1], path)
        encoded: list[EncodedImage] = [{"bytes": header + image.tobytes(), "path": None} for image in images]
        splits.append(make_images(encoded, labels.tolist(), class_names, split))
        hashes.append(hashlib.sha256(content).hexdigest())
    train, val = splits
    return ImageData(train, val, class_names, hash_content([*hashes, *class_names]))


def find_binary_folder(data_dir: Path) -> Path:
    """The folder with the binary files; an error with what to do where there are others, or none."""
    for folder in (data_dir, data_dir / FOLDER):
        if any((folder / name).is_file() for name, _ in SPLIT_FILES.values()):
            return folder
    for folder in (data_dir, data_dir / PICKLE_FOLDER):
        if all((folder / name).is_file() for name in ("train", "test", "meta")):
            raise ValueError(
                f"{folder} holds CIFAR-100 as pickles, which can run code where they are read: "
                f"get the binary version of the same page, {PAGE}, unpack it, and give its folder with --data-dir"
            )
    for archive in (data_dir / f"{FOLDER}.tar.gz", data_dir):
        if archive.is_file():
            raise FileNotFoundError(f"{archive} is a file: unpack it, and give its folder {FOLDER} with --data-dir")
    raise FileNotFoundError(
        f"{str(data_dir)!r} has neither train.bin nor a folder {FOLDER}: get {FOLDER}.tar.gz of {PAGE}, unpack it, "
        "and give its folder with --data-dir"
    )


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

    Raises:
        ValueError: for a file of another length, and for labels that are none of CIFAR-100's.
    """
    if len(content) != num_images * RECORD_BYTES:
        raise ValueError(
            f"{path} has {len(content):,} bytes: it must have {num_images * RECORD_BYTES:,}, for {num_images:,} images "
            f"of {RECORD_BYTES:,} each; get {FOLDER}.tar.gz of {PAGE} again"
        )
    records = np.frombuffer(content, np.uint8).reshape(num_images, RECORD_BYTES)
    wrong = np.flatnonzero((records[:, 0] >= NUM_COARSE) | (records[:, 1] >= NUM_FINE))
    if len(wrong):
        coarse, fine = records[wrong[0], :2].tolist()
        raise ValueError(
            f"{path} is damaged, or not CIFAR-100: image {wrong[0]} has the coarse label {coarse} and the fine label "
            f"{fine}, of {NUM_COARSE} and {NUM_FINE} classes; get {FOLDER}.tar.gz of {PAGE} again"
        )
    return records[:, 1], records[:, 2:].reshape(num_images, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
