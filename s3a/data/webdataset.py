"""Folders of tars in the WebDataset layout, read where they are."""

import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from s3a.data.columns import check_labels, find_class_names
from s3a.data.decode import EncodedImage
from s3a.data.images import ImageData, Images, MapImages, Row
from s3a.data.parts import Part, Parts
from s3a.data.shards import find_shards, hash_shards, read_class_names, show_progress
from s3a.data.stream import StreamImages

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm")


def load_webdataset(data_dir: Path, streaming: bool) -> ImageData:
    """Tars with KEY.jpg (or another image) and KEY.cls side by side; classes.txt may name the classes.

    The headers are read once, to count the images and to note where they are and their labels: afterwards any of them
    can be read at any time, with no copy of the data. Streaming reads them in the order they are stored in, for disks
    and network folders that are slow otherwise.
    """
    shards = find_shards(data_dir, "tar")
    parts = {split: [index_tar(path) for path in show_progress(paths, split)] for split, paths in shards.items()}
    labels = {split: np.concatenate([part.labels for part in tars]) for split, tars in parts.items()}
    names = read_class_names(data_dir) or find_class_names({}, labels.values(), str(data_dir))
    images: dict[str, Images] = {}
    for split, tars in parts.items():
        check_labels(labels[split], len(names), f"{split} in {data_dir}")
        images[split] = StreamImages(tars, split, len(names)) if streaming else TarImages(tars, split)
    return ImageData(images["train"], images["val"], names, hash_shards(data_dir, shards, names))


class Sample(NamedTuple):
    """Where an image is in a tar, in bytes, and its label."""

    offset: int
    size: int
    label: int


class TarPart(Part):
    """A tar, and the place and label of each of its images."""

    def __init__(self, path: Path, samples: Sequence[Sample]) -> None:
        super().__init__(path.name, len(samples))
        self.path = path
        self.offsets, self.sizes, self.labels = np.array(samples, dtype=np.int64).reshape(-1, 3).T

    def read(self, needed: np.ndarray) -> Iterator[tuple[int, EncodedImage | None, int]]:
        with self.path.open("rb") as file:
            for row in np.flatnonzero(needed).tolist():
                file.seek(self.offsets[row])
                yield row, {"bytes": file.read(self.sizes[row]), "path": None}, int(self.labels[row])


def index_tar(path: Path) -> TarPart:
    """Finds the samples of a tar, in its order.

    Raises:
        ValueError: where it is not a whole tar, or a sample has no image, no label, or two of either.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            files = ((*split_key(member.name), member) for member in tar if member.isfile())
            keys = groupby((file for file in files if file[1]), key=itemgetter(0))
            samples = [find_sample(tar, group, f"{path}: {key}") for key, group in keys]
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes any end for the end
                raise tarfile.ReadError("it is cut off")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no tar that can be read ({error}): get it again, uncompressed") from error
    return TarPart(path, samples)


def split_key(member: str) -> tuple[str, str]:
    """WebDataset's cut of a file name: at the first dot behind the last slash; the ending in lower case."""
    folder, slash, name = member.rpartition("/")
    key, _, ending = name.partition(".")
    return folder + slash + key, ending.lower()


def find_sample(tar: tarfile.TarFile, group: Iterator[tuple[str, str, tarfile.TarInfo]], where: str) -> Sample:
    """The sample in the files of a key; ValueError unless these are one image and one label."""
    files = [(ending, member) for _, ending, member in group]
    images = [member for ending, member in files if ending in IMAGE_ENDINGS]
    label_files = [tar.extractfile(member) for ending, member in files if ending == "cls"]
    if len(images) != 1 or len(label_files) != 1 or label_files[0] is None:
        raise ValueError(
            f"{where} has the files {', '.join(ending for ending, _ in files)}: it must have one image "
            f"({', '.join(IMAGE_ENDINGS[:3])}, ...) and its label as cls, one behind the other"
        )
    label = label_files[0].read()
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

    def read_rows(self, indices: list[int]) -> list[Row]:
        return [self._read_row(index) for index in indices]

    def _read_row(self, index: int) -> Row:
        part, row = self.parts.locate(index)
        only = np.arange(self.parts.sizes[part]) == row
        _, encoded, label = next(self.parts[part].read(only))
        return Row(index, encoded, label)
