"""What a training run is: a typed recipe, and the named ones."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from s3a.data import Source
from s3a.errors import unknown

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run. Every field is an option of the command line."""

    name: str | None = None
    """What the run is called; None is the data's name."""
    model: str
    """A model that timm knows; `import s3a` adds ours."""
    data: Source
    """Where the images come from."""
    data_dir: Path | None = None
    """For imagefolder: the folder with train/CLASS/* and val/CLASS/*."""
    image_size: int
    """Side of the square that the network sees, in pixels."""
    seed: int = 0
    """Of the weights, the order of the images and their augmentation."""
    output_dir: Path | None = None
    """Where the run is written; None is runs/NAME, with the name of the run."""

    epochs: int
    """Passes over the training images, warm-up included."""
    batch_size: int
    """Images per optimizer step, over all processes."""
    learning_rate: float
    """Peak learning rate for 512 images a step; follows the batch size in proportion."""
    warmup_epochs: float = 0
    """Epochs of linear warm-up."""
    min_learning_rate: float = 1e-5
    """Where the cosine ends."""
    weight_decay: float = 0.05
    """AdamW's; not on biases and 1-d parameters."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    drop_path: float | None = None
    """Stochastic depth of the last block; None is the model's own."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of the random crop, as shares of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Narrowest and widest aspect of the random crop."""
    horizontal_flip: float = 0.5
    """How often an image is mirrored."""
    auto_augment: str | None = None
    """timm's augmentation policy, such as rand-m9-mstd0.5-inc1."""
    color_jitter: float | None = None
    """Strength of the colour jitter."""
    random_erasing: float = 0.0
    """How often a rectangle is overwritten with noise."""
    crop_pct: float = 0.875
    """Evaluation: side of the centre crop as a share of the resized image's shorter side."""

    precision: Precision = "no"
    """Mixed precision: no, bf16 or fp16."""
    num_workers: int = 0
    """Processes that decode and augment; 0 does it in the training process."""
    cpu_threads: int | None = None
    """Threads of each process on the CPU; None shares the machine's cores among the processes."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""

    def __post_init__(self) -> None:
        for field in ("image_size", "epochs", "batch_size", "learning_rate", "keep_checkpoints", "cpu_threads"):
            if getattr(self, field) is not None and not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{option(field)} is {getattr(self, field)}: it must be above 0")
        for field in ("warmup_epochs", "num_workers", "weight_decay", "seed", "min_learning_rate", "color_jitter"):
            if not 0 <= (getattr(self, field) or 0) < math.inf:
                raise ValueError(f"{option(field)} is {getattr(self, field)}: it must be 0 or more")
        for field, most in (("crop_scale", 1), ("crop_ratio", math.inf)):
            low, high = getattr(self, field)
            if not 0 < low <= high <= most:
                raise ValueError(f"{option(field)} is {low} {high}: it must be a smaller and a larger number above 0")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"--crop-pct is {self.crop_pct}: it must be above 0 and at most 1")
        for field in ("label_smoothing", "horizontal_flip", "random_erasing", "drop_path"):
            if not 0 <= (getattr(self, field) or 0) <= 1:
                raise ValueError(f"{option(field)} is {getattr(self, field)}: it must be between 0 and 1")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"--warmup-epochs is {self.warmup_epochs} and --epochs is {self.epochs}: "
                "the warm-up must be shorter than the run; use --warmup-epochs 0 for none"
            )

    @property
    def run_name(self) -> str:
        """The name given, or that of the data."""
        return self.name or (self.data_dir.resolve().name if self.data_dir else self.data)

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return self.output_dir or Path("runs") / self.run_name

    def to_json(self) -> str:
        """The recipe as `recipe.json` holds it."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"


def option(field: str) -> str:
    """How a field is called on the command line."""
    return "--" + field.replace("_", "-")


def digits() -> Recipe:
    """scikit-learn's 1,797 handwritten digits at 64 px: 99 % top-1 in about two minutes on two CPU cores."""
    return Recipe(
        model="ssvit_nano",
        data="digits",
        image_size=64,
        epochs=28,
        batch_size=64,
        learning_rate=1.6e-2,
        warmup_epochs=1.5,
        drop_path=0.1,
        crop_scale=(0.8, 1.0),
        crop_ratio=(0.9, 1.1),
        horizontal_flip=0.0,
        crop_pct=1.0,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {recipe.__name__: recipe for recipe in (digits,)}


def named_recipe(name: str) -> Recipe:
    """The recipe of that name; ValueError with the nearest one if there is none."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()
