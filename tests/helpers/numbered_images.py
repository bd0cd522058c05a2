"""Images that carry their own number, so that a test can tell which one it was given, from whatever source."""

import io
import random
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor

from s3a.data import DatasetImages, EvalLoader, ImageData, Images, TrainLoader
from s3a.data.batches import Transform

NUM_CLASSES = 3
NAMES = ["cat", "dog", "owl"]


def encode_number(number: int, kind: str = "PNG") -> bytes:
    """A 2 x 2 image, exactly of that number."""
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (number % 256, number // 256, 7)).save(file, kind, lossless=True)
    return file.getvalue()


def read_number(image: Image.Image) -> int:
    """The number of a decoded image; that of evaluation's black ones is 0."""
    red, green, _ = image.getpixel((1, 1))
    return red + 256 * green


def show_number(image: Image.Image) -> Tensor:
    """A transform without randomness: the number, as an image of one pixel."""
    return torch.full((1, 1, 1), float(read_number(image)))


def add_noise(image: Image.Image) -> Tensor:
    """A transform that draws from all three generators: the number, then the draws, as four channels."""
    draws = (random.random(), np.random.rand(), float(torch.rand(())))
    return torch.tensor([read_number(image), *draws]).reshape(4, 1, 1)


def make_images(count: int, broken: tuple[int, ...] = (), split: str = "train") -> DatasetImages:
    """Images 0 to count - 1 with the label number % NUM_CLASSES, in any order; `broken` ones cannot be decoded."""
    return DatasetImages(make_dataset(range(count), broken), split)


def make_dataset(numbers: range, broken: tuple[int, ...] = ()) -> Dataset:
    """The images of these numbers."""
    files = [{"bytes": b"no image" if i in broken else encode_number(i), "path": None} for i in numbers]
    features = Features(image=ImageFeature(), label=ClassLabel(names=NAMES))
    return Dataset.from_dict({"image": files, "label": [i % NUM_CLASSES for i in numbers]}, features)


def write_parquet(path: Path, numbers: range, broken: tuple[int, ...] = ()) -> None:
    """A shard as pyarrow alone writes it, in groups of 7 rows: encoded images, numbers as labels, another column."""
    table = pa.table(
        {
            "caption": [f"image {i}" for i in numbers],
            "picture": [b"no image" if i in broken else encode_number(i) for i in numbers],
            "class": pa.array([i % NUM_CLASSES for i in numbers], pa.int32()),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7)


def write_tar(path: Path, numbers: range, broken: tuple[int, ...] = ()) -> None:
    """A shard in the WebDataset layout, with images of three endings and a file that is of no use."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            ending, kind = (("png", "PNG"), ("webp", "WEBP"), ("BMP", "BMP"))[i % 3]
            image = b"no image" if i in broken else encode_number(i, kind)
            for name, content in ((ending, image), ("json", b"{}"), ("cls", f"{i % NUM_CLASSES}\n".encode())):
                member = tarfile.TarInfo(f"folder.v1/{i:04d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


SHARDS = [("parquet", "parquet"), ("webdataset", "tar")]
"""The sources that are folders of shards, and the kind that each of them reads."""


def write_shards(folder: Path, kind: str, num_train: int, num_val: int, broken: tuple[int, ...] = ()) -> Path:
    """Both splits in uneven shards of a kind, "parquet" or "tar"; the numbers of val follow those of train."""
    write = write_parquet if kind == "parquet" else write_tar
    cuts = [0, num_train // 5, num_train // 2, num_train]
    for shard, (start, end) in enumerate(pairwise(cuts)):
        write(folder / f"train-{shard:04d}.{kind}", range(start, end), broken)
    write(folder / "val" / f"0.{kind}", range(num_train, num_train + num_val), broken)
    return folder


def make_loader(images: Images, transform: Transform = add_noise, **options: Any) -> TrainLoader:
    """A loader of 12 images a step, unless the options say otherwise."""
    return TrainLoader(images, transform, **{"channels": 3, "batch_size": 12, "seed": 5} | options)


def read_steps(
    images: Images,
    epoch: int = 2,
    first_step: int = 0,
    num_processes: int = 1,
    transform: Transform = add_noise,
    **options: Any,
) -> list[tuple[Tensor, Tensor, Tensor, list[str]]]:
    """What all processes together see in each step: image tensors, labels, indices, unreadable names."""
    loaders = [
        make_loader(images, transform, process_index=i, num_processes=num_processes, **options)
        for i in range(num_processes)
    ]
    seen = []
    for parts in zip(*(loader.epoch(epoch, first_step) for loader in loaders), strict=True):
        batches = [batch for part in parts for batch in part]
        tensors = [torch.cat(column) for column in list(zip(*batches, strict=True))[:3]]
        seen.append((*tensors, sorted({name for batch in batches for name in batch.unreadable})))
    return seen


def list_indices(steps: list[tuple[Tensor, Tensor, Tensor, list[str]]]) -> list[int]:
    """The rows that the steps of `read_steps` have, in their order."""
    return torch.cat([indices for _, _, indices, _ in steps]).tolist()


def read_split(images: Images, transform: Transform = show_number) -> tuple[Tensor, Tensor, list[str]]:
    """Everything a split shows, in order: image tensors, labels, unreadable names."""
    batches = list(EvalLoader(images, transform, channels=3, batch_size=8))
    names = [name for batch in batches for name in batch.unreadable]
    shown, labels, indices = (torch.cat(column) for column in list(zip(*batches, strict=True))[:3])
    return shown[indices >= 0], labels[indices >= 0], names


def check_numbers(data: ImageData, num_train: int, num_val: int) -> None:
    """Both splits hold the images that this module writes, in its order; the numbers of val follow those of train."""
    for images, start, count in ((data.train, 0, num_train), (data.val, num_train, num_val)):
        pixels, labels, unreadable = read_split(images)
        assert images.num_images == count
        assert pixels.flatten().tolist() == [*range(start, start + count)]
        assert labels.tolist() == [number % NUM_CLASSES for number in range(start, start + count)]
        assert not unreadable


def convert_to_tensor(image: Image.Image) -> Tensor:
    """A transform that keeps the pixels as they are."""
    return torch.from_numpy(np.asarray(image).copy())
