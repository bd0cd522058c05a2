"""Images: where they come from, and the loaders that feed the engine.

Every source becomes two Hugging Face datasets with the columns `image` and `label`. What happens to an image in
an epoch depends on the seed, the epoch and the image alone, not on the order, the workers or the processes.
"""

import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import sklearn.datasets
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision.datasets import ImageFolder

from s3a.errors import unknown

Source = Literal["digits", "imagefolder"]
SPLITS = ("train", "val")


@dataclass(frozen=True)
class ImageData:
    """The two splits of a source, and the names of its classes in label order."""

    train: Dataset
    val: Dataset
    label_names: list[str]


def load_data(source: str, data_dir: Path | None = None) -> ImageData:
    """The images of a source.

    Raises:
        FileNotFoundError: for a folder that is missing or has no images.
        ValueError: for an unknown source, a missing `data_dir`, or classes that differ between the splits.
    """
    if source not in SOURCES:
        raise unknown("data", source, SOURCES)
    return SOURCES[source](data_dir)


def load_digits(data_dir: Path | None) -> ImageData:
    """scikit-learn's digits: 8 x 8 pixels, 1,437 to train on and 360 held out, the same ones always."""
    if data_dir is not None:
        raise ValueError(
            f"--data-dir is {str(data_dir)!r} but the digits come with scikit-learn: use --data imagefolder"
        )
    digits = sklearn.datasets.load_digits()
    images = [Image.fromarray((image * (255 / 16)).round().astype(np.uint8)) for image in digits.images]
    split = train_test_split(np.arange(len(images)), test_size=360, random_state=0)
    names = [str(name) for name in digits.target_names]
    features = Features(image=datasets.Image(), label=ClassLabel(names=names))
    train, val = (
        Dataset.from_dict({"image": [images[i] for i in part], "label": digits.target[part].tolist()}, features)
        for part in split
    )
    return ImageData(train=train, val=val, label_names=names)


def load_image_folder(data_dir: Path | None) -> ImageData:
    """A folder with train/CLASS/* and val/CLASS/*; images in folders below belong to their CLASS too."""
    if data_dir is None:
        raise ValueError("--data imagefolder needs --data-dir DIR, a folder with train/CLASS/* and val/CLASS/*")
    shape = "it must hold images in train/CLASS/* and val/CLASS/*"
    if not data_dir.is_dir():
        raise FileNotFoundError(f"data folder {str(data_dir)!r} does not exist: {shape}")
    splits = {}
    for split in SPLITS:
        if not (data_dir / split).is_dir():
            raise FileNotFoundError(f"data folder {str(data_dir)!r} has no folder {split!r}: {shape}")
        if not any(path.is_dir() for path in (data_dir / split).iterdir()):
            raise FileNotFoundError(f"{str(data_dir / split)!r} has no images in class folders: {shape}")
        splits[split] = ImageFolder(data_dir / split, allow_empty=True)
        if not splits[split].samples:
            raise FileNotFoundError(f"{str(data_dir / split)!r} has no images in class folders: {shape}")
    check_classes(data_dir, splits)
    names = splits["train"].classes
    features = Features(image=datasets.Image(), label=ClassLabel(names=names))
    train, val = (
        Dataset.from_dict({"image": [path for path, _ in split.samples], "label": split.targets}, features)
        for split in splits.values()
    )
    return ImageData(train=train, val=val, label_names=names)


def check_classes(data_dir: Path, splits: dict[str, ImageFolder]) -> None:
    """Raises ValueError unless both splits have images of the same classes."""
    seen = {split: {folder.classes[label] for label in folder.targets} for split, folder in splits.items()}
    for split, other in (SPLITS, SPLITS[::-1]):
        absent = sorted({*seen[other], *splits[other].classes} - seen[split])
        if absent:
            raise ValueError(
                f"class {', '.join(absent[:3])} of {data_dir / other} has no images in {data_dir / split}: "
                "both splits must have the same classes"
            )


SOURCES: dict[str, Callable[[Path | None], ImageData]] = {"digits": load_digits, "imagefolder": load_image_folder}


# --------------------------------------------------------------------------------------------------------
# Loaders
# --------------------------------------------------------------------------------------------------------


class EpochSampler(Sampler[int]):
    """A new order of the images each epoch. A draw `epoch * num_images + index` says which image and when."""

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images, self.seed, self.epoch = num_images, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_images)
        return iter((self.epoch * self.num_images + order).tolist())


class TransformedImages(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Rows of a dataset as (image tensor, label); item `epoch * num_images + index` is the image in that epoch.

    Args:
        rows: with the columns `image` and `label`.
        transform: PIL image to [channels, height, width] float32.
        mode: PIL's, "RGB" or "L".
        seed: of the transform's randomness; None for a transform without.
    """

    def __init__(self, rows: Dataset, transform: Callable[[Image.Image], Tensor], mode: str, seed: int | None) -> None:
        self.rows = rows.cast_column("image", datasets.Image(decode=False))
        self.transform, self.mode, self.seed = transform, mode, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: int) -> tuple[Tensor, int]:
        row = self.rows[draw % len(self.rows)]
        image = decoded(row["image"], self.mode)
        if self.seed is None:
            return self.transform(image), row["label"]
        return seeded(partial(self.transform, image), self.seed, draw), row["label"]


def decoded(cell: dict[str, Any], mode: str) -> Image.Image:
    """The image of an undecoded cell; ValueError with its name where it cannot be read."""
    try:
        with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"]) as image:
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {cell['path']} cannot be read ({error}): mend it or take it out") from error


def seeded(call: Callable[[], Tensor], *seeds: int) -> Tensor:
    """Calls with all three global generators seeded, and puts them back: timm's transforms draw from each."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every accelerator too, at each image
    result = call()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return result


def image_mode(channels: int) -> str:
    """PIL's mode for a network's input channels."""
    if channels not in (1, 3):
        raise ValueError(f"in_chans is {channels}: images are loaded with 1 or 3 channels")
    return "L" if channels == 1 else "RGB"


def train_loader(
    rows: Dataset, transform: Callable[..., Any], *, channels: int, batch_size: int, seed: int, num_workers: int
) -> DataLoader:
    """Shuffled whole batches; the sampler's `set_epoch` chooses the order.

    Raises:
        ValueError: where there are fewer images than one batch.
    """
    if len(rows) < batch_size:
        raise ValueError(f"--batch-size is {batch_size} but there are {len(rows)} training images: use a smaller one")
    return DataLoader(
        TransformedImages(rows, transform, image_mode(channels), seed),
        batch_size=batch_size,
        sampler=EpochSampler(len(rows), seed),
        num_workers=num_workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )


def eval_loader(
    rows: Dataset, transform: Callable[..., Any], *, channels: int, batch_size: int, num_workers: int
) -> DataLoader:
    """Every image once, in order."""
    return DataLoader(
        TransformedImages(rows, transform, image_mode(channels), seed=None),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )
