"""Folders of tars in the WebDataset layout, read where they are.

datasets reads tars from the first byte to the last alone, copies them to read them in any order, takes every member
whole into memory, and asks that all samples have files of the same endings. So tars are read here.
"""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from s3a.data.columns import check_labels, find_class_names
from s3a.data.decode import MAX_ENCODED_BYTES, EncodedImage
from s3a.data.images import ImageData, Images, MapImages, Row
from s3a.data.shards import find_shards, hash_shards, read_class_names, show_progress
from s3a.data.stream import StreamImages

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm")
LABEL_BYTES = 18
"""A label has no more: digits, and what stands around them."""


def load_webdataset(data_dir: Path, streaming: bool) -> ImageData:
    """Tars with KEY.jpg (or another image) and KEY.cls side by side; classes.txt may name the classes.

    The headers and labels are read once, to count the images and to note where they are: afterwards any of them can be
    read at any time, with no copy of the data. Streaming reads them in the order they are stored in, for disks and
    network folders that are slow otherwise.
    """
    shards = find_shards(data_dir, "tar")
    tars = {
        split: [tar for path in show_progress(paths, split) if len((tar := index_tar(path)).labels)]
        for split, paths in shards.items()
    }
    labels = {
        split: np.concatenate([np.zeros(0, np.int64), *(tar.labels for tar in parts)]) for split, parts in tars.items()
    }
    names = read_class_names(data_dir) or find_class_names({}, labels.values(), str(data_dir))
    images: list[Images] = []
    for split, parts in tars.items():
        check_labels(labels[split], len(names), f"{split} in {data_dir}")
        every = TarImages(parts, split)
        streamed = StreamImages(
            every.read_tar,
            [str(tar.path.relative_to(data_dir)) for tar in parts],
            split=split,
            num_images=every.num_images,
            num_classes=len(names),
            sizes=[len(tar.labels) for tar in parts],
        )
        images.append(streamed if streaming else every)
    train, val = images
    return ImageData(train, val, names, hash_shards(data_dir, shards, names))


@dataclass(frozen=True)
class Tar:
    """A tar, and where its images are in it, in bytes, and their labels: [n] int64 each."""

    path: Path
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


class Sample(NamedTuple):
    """Where an image is in a tar, in bytes, and its label."""

    offset: int
    size: int
    label: int


def index_tar(path: Path) -> Tar:
    """Finds the samples of a tar, in its order.

    Raises:
        ValueError: where it is not a whole tar, or a sample has no image, no label, two of either, or one too large.
    """
    try:
        # without a buffer: it would read up to 128 KB of an image behind each header
        with path.open("rb", buffering=0) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            files = ((*split_key(member.name), member) for member in tar if member.isfile())
            keys = groupby((file for file in files if file[1]), key=itemgetter(0))
            samples = [find_sample(tar, group, f"{path}: {key}") for key, group in keys]
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes any end for the end
                raise tarfile.ReadError("it is cut off")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no tar that can be read ({error}): get it again, uncompressed") from error
    return Tar(path, *np.array(samples, dtype=np.int64).reshape(-1, 3).T)


def split_key(member: str) -> tuple[str, str]:
    """WebDataset's cut of a file name: at the first dot behind the last slash; the ending in lower case."""
    folder, slash, name = member.rpartition("/")
    key, _, ending = name.partition(".")
    return folder + slash + key, ending.lower()


def find_sample(tar: tarfile.TarFile, group: Iterator[tuple[str, str, tarfile.TarInfo]], where: str) -> Sample:
    """The sample in the files of a key; ValueError unless these are one image and one label."""
    files = [(ending, member) for _, ending, member in group]
    images = [member for ending, member in files if ending in IMAGE_ENDINGS]
    label_files = [member for ending, member in files if ending == "cls"]
    if len(images) != 1 or len(label_files) != 1:
        raise ValueError(
            f"{where} has the files {', '.join(ending for ending, _ in files[:6])}{', ...' if len(files) > 6 else ''}: "
            f"of one name up to its first dot there must be one image ({', '.join(IMAGE_ENDINGS[:3])}, ...) and its "
            "label as cls, one behind the other"
        )
    if images[0].size > MAX_ENCODED_BYTES:
        raise ValueError(
            f"{where} has an image of {images[0].size:,} bytes, and at most {MAX_ENCODED_BYTES:,} are decoded: "
            "shrink it or take it out"
        )
    file = tar.extractfile(label_files[0])
    label = file.read(LABEL_BYTES + 1) if file is not None else b""
    if not label.strip().isdigit() or len(label) > LABEL_BYTES:
        shown = label.decode(errors="replace")
        raise ValueError(
            f"{where} has the label {shown!r} in its cls: it must be a whole number from 0 on, of at most "
            f"{LABEL_BYTES} bytes"
        )
    return Sample(images[0].offset_data, images[0].size, int(label))


class TarImages(MapImages):
    """The images of tars, one tar behind the other."""

    def __init__(self, tars: Sequence[Tar], split: str) -> None:
        self.tars, self.split = list(tars), split
        self.starts = np.cumsum([0, *(len(tar.labels) for tar in tars)])  # the first row of each, and the end
        self.num_images = int(self.starts[-1])

    def name_of(self, index: int) -> str:
        tar, row = self._locate(index)
        name = f"row {index} of {self.split}"
        return name if len(self.tars) == 1 else f"{name} (row {row} of {self.tars[tar].path.name})"

    def read_rows(self, indices: list[int]) -> list[Row]:
        return [self._read_row(index) for index in indices]

    def _read_row(self, index: int) -> Row:
        number, row = self._locate(index)
        tar = self.tars[number]
        with tar.path.open("rb") as file:
            file.seek(tar.offsets[row])
            return Row(index, {"bytes": file.read(tar.sizes[row]), "path": None}, int(tar.labels[row]))

    def _locate(self, index: int) -> tuple[int, int]:
        """The number of the tar that a row is in, and its row there: with tars of 3 and 4 rows, row 3 is (1, 0)."""
        tar = int(np.searchsorted(self.starts, index, side="right")) - 1
        return tar, index - int(self.starts[tar])

    def read_tar(self, number: int) -> Iterator[tuple[EncodedImage | None, int | None]]:
        """The images and labels of a tar, from the first to the last."""
        tar = self.tars[number]
        with tar.path.open("rb") as file:
            for offset, size, label in zip(
                *(column.tolist() for column in (tar.offsets, tar.sizes, tar.labels)), strict=True
            ):
                file.seek(offset)
                yield {"bytes": file.read(size), "path": None}, label
