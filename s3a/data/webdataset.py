"""Folders of tars in the WebDataset layout, read where they are."""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from s3a.data.columns import check_labels, class_names
from s3a.data.decode import Cell
from s3a.data.images import ImageData, Images, MapImages, Row
from s3a.data.parts import Part, Parts
from s3a.data.shards import find_shards, names_in_file, shards_fingerprint, tqdm_shards
from s3a.data.stream import StreamImages

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm")


def load_webdataset(data_dir: Path, streaming: bool) -> ImageData:
    """Tars with KEY.jpg (or another image) and KEY.cls side by side; classes.txt may name the classes.

    One pass over the headers counts the images, and remembers where they are and their labels: afterwards any of them
    can be read at any time, with no copy of the data. Streaming reads them in the order they are stored in, for disks
    and network folders that are slow otherwise.
    """
    shards = find_shards(data_dir, "tar")
    parts = {split: [index_tar(path) for path in tqdm_shards(paths, split)] for split, paths in shards.items()}
    labels = {split: np.concatenate([part.labels for part in tars]) for split, tars in parts.items()}
    names = names_in_file(data_dir) or class_names({}, labels.values(), str(data_dir))
    images: dict[str, Images] = {}
    for split, tars in parts.items():
        check_labels(labels[split], len(names), f"{split} in {data_dir}")
        images[split] = StreamImages(tars, split, len(names)) if streaming else TarImages(tars, split)
    return ImageData(images["train"], images["val"], names, shards_fingerprint(data_dir, shards, names))


@dataclass(frozen=True)
class TarPart(Part):
    """A tar whose samples are known: where each image is, [num_rows] int64, and its label."""

    path: Path
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def num_rows(self) -> int:
        return len(self.labels)

    def read(self, needed: np.ndarray) -> Iterator[tuple[int, Cell | None, int]]:
        with self.path.open("rb") as file:
            for number in np.flatnonzero(needed).tolist():
                file.seek(self.offsets[number])
                yield number, {"bytes": file.read(self.sizes[number]), "path": None}, int(self.labels[number])


class Sample(NamedTuple):
    """Where an image is in a tar, in bytes, and its label."""

    offset: int
    size: int
    label: int


def index_tar(path: Path) -> TarPart:
    """Finds the samples of a tar, in its order.

    Raises:
        ValueError: where it is no whole tar, or a sample has no image, no label, or two of either.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            files = ((*split_key(member.name), member) for member in tar if member.isfile())
            keys = groupby((file for file in files if file[1]), key=itemgetter(0))
            samples = [sample_of(tar, group, f"{path}: {key}") for key, group in keys]
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes any end for the end
                raise tarfile.ReadError("it is cut off")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no tar that can be read ({error}): get it again, uncompressed") from error
    return TarPart(path, *np.array(samples, dtype=np.int64).reshape(-1, 3).T)


def split_key(member: str) -> tuple[str, str]:
    """WebDataset's cut of a file name: at the first dot behind the last slash; the ending in lower case."""
    folder, slash, name = member.rpartition("/")
    key, _, ending = name.partition(".")
    return folder + slash + key, ending.lower()


def sample_of(tar: tarfile.TarFile, group: Iterator[tuple[str, str, tarfile.TarInfo]], where: str) -> Sample:
    """The files of a key as a sample."""
    files = [(ending, member) for _, ending, member in group]
    images = [member for ending, member in files if ending in IMAGE_ENDINGS]
    labels = [member for ending, member in files if ending == "cls"]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"{where} has the files {', '.join(ending for ending, _ in files)}: it must have one image "
            f"({', '.join(IMAGE_ENDINGS[:3])}, ...) and its label as cls, one behind the other"
        )
    label = tar.extractfile(labels[0]).read()
    if not label.strip().isdigit():
        raise ValueError(f"{where} has the label {label[:20]!r} in its cls: it must be a number from 0 on")
    return Sample(images[0].offset_data, images[0].size, int(label))


class TarImages(MapImages):
    """The images of tars, in any order."""

    def __init__(self, parts: Sequence[TarPart], split: str) -> None:
        self.parts, self.split = Parts(parts, split), split
        self.num_images = self.parts.num_rows

    def name_of(self, index: int) -> str:
        return self.parts.name_of(index)

    def rows(self, indices: Sequence[int]) -> list[Row]:
        return [self._row(index) for index in indices]

    def _row(self, index: int) -> Row:
        part = int(self.parts.of(index))
        only = np.arange(self.parts.sizes[part]) == index - self.parts.starts[part]
        _, cell, label = next(self.parts[part].read(only))
        return Row(index, cell, label)
