"""`Recipe`: everything that determines a training run, as typed fields that are options of the command line too.

What all tasks share is `Recipe`, and what classification adds `ClassificationRecipe`; the dense tasks add theirs in
`dense_recipe`.
"""

import dataclasses
import json
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from s3a.data import DataOptions
from s3a.geometry import find_scan_pattern
from s3a.quantization.schemes import SchemeName

Precision = Literal["no", "bf16", "fp16"]
Schedule = Literal["epoch", "step"]
OnNonFinite = Literal["stop", "skip"]
Tracker = Literal["tensorboard", "wandb"]
RecipeT = TypeVar("RecipeT", bound="Recipe")


@dataclass(frozen=True, kw_only=True)
class Given:
    """Options that decide what a named recipe has for others."""

    epochs: int
    schedule: Schedule | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe(DataOptions, ABC):
    """A training run. Every field is an option of the command line."""

    name: str | None = None
    """What the run is called; None names it after its images: digits, or FOLDER-data for the images of FOLDER/data."""
    model: str
    """A model that timm knows; `import s3a` adds ours."""
    scan: str | None = None
    """Which scans S3A's blocks run: alternate (as published), window-first, anchors-first, local-only, anchor-only or
    dense; None is the model's own."""
    size: int | None = None
    """Size of those scans, in tokens per axis; None is the model's own."""
    backend: str | None = None
    """What runs those scans: flex, tiled or reference, used exactly; None chooses for this machine. Weights do not
    depend on it by more than rounding, and weights folders do not name it."""
    weights: str | None = None
    """Fine-tune from a weights folder, or from ORG/NAME on the Hub; None starts from fresh weights."""
    seed: int = 0
    """Seed of the weights, of the order of the images and of their augmentation."""
    output_dir: Path | None = None
    """Where the run is written; None is runs/NAME, with the name of the run."""

    epochs: int
    """How often the run goes through the training images, warm-up included and cooldown not."""
    batch_size: int
    """Images per optimizer step, over all processes."""
    accumulate: int = 1
    """Parts that the images of an optimizer step are cut into; each has a forward and a backward of its own."""
    learning_rate: float
    """Peak learning rate for 512 images a step; follows the batch size in proportion."""
    weight_decay: float = 0.05
    """AdamW's; not on biases and 1-d parameters."""
    clip_grad: float | None = None
    """Largest norm of the gradient; None does not clip."""
    drop_path: float | None = None
    """Stochastic depth of the last block; None is the model's own."""
    ema_decay: float | None = None
    """Decay of the moving average of the weights, for 512 images a step; None keeps no average."""
    sync_batch_norm: bool = True
    """Normalise by the statistics of the images of all processes, as one process with all of them would."""
    freeze_batch_norm: bool = False
    """Leave BatchNorm's statistics as they are."""

    horizontal_flip: float = 0.5
    """How often an image is mirrored."""
    repeats: int = 1
    """Repeated augmentation: how often an image stands in an epoch, each time augmented anew."""
    max_bad_images: float = 0.001
    """Share of the training images that may be unreadable; they are skipped and listed. More stop the run."""
    max_bad_val_images: float = 0.0
    """Share of the validation images that may be unreadable; the scores leave them out. More stop the run."""

    precision: Precision = "no"
    """Mixed precision: no, bf16 or fp16."""
    compile: bool = False
    """Compile the model."""
    tf32: bool = True
    """Multiply float32 numbers in TF32 on GPUs that have it: 10 bits of mantissa, several times as fast. On, as in
    timm's training script; products of bf16 and fp16 are what they are."""
    cudnn_benchmark: bool = True
    """Let cuDNN try its algorithms on each new shape, and keep the fastest. On, as in timm's training script: the
    images of a run have one shape. Which one wins can vary from run to run."""
    deterministic: bool = False
    """Use deterministic algorithms alone, for the same bytes on the same GPUs each time; slower, and without
    cudnn_benchmark. An operation that has none raises an error. A CPU gives the same bytes without it."""
    quantize: SchemeName | None = None
    """Train for a quantization scheme, such as int8-dynamic, and write quantized weights; None writes float32."""
    grad_checkpointing: bool = False
    """Trade a second forward of every block for its activations."""
    num_workers: int = 0
    """Processes that decode and augment, and half as many for the validation images; 0 does it in the training
    process."""
    cpu_threads: int | None = None
    """Threads of each process on the CPU; None shares the machine's cores among the processes."""
    checkpoint_every: str | None = None
    """A checkpoint between those at the ends of epochs: every so many steps (500) or minutes (10m)."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    on_non_finite: OnNonFinite = "stop"
    """At a loss or gradient that is not finite: stop the run, or skip the step and count it."""
    track: Tracker | None = None
    """Where Accelerate logs the run too."""
    push_to_hub: str | None = None
    """Publish the best weights as ORG/NAME on the Hub at the end."""

    def __post_init__(self) -> None:
        self.check_positive("epochs", "batch_size", "learning_rate", "keep_checkpoints", "cpu_threads", "repeats")
        self.check_positive("accumulate", "clip_grad", "size")
        self.check_not_negative("num_workers", "weight_decay", "seed")
        self.check_shares("horizontal_flip", "max_bad_images", "max_bad_val_images")
        for field in ("drop_path", "ema_decay"):
            if not 0 <= (getattr(self, field) or 0) < 1:
                raise ValueError(f"{spell_option(field)} is {getattr(self, field)}: it must be 0 or more and below 1")
        if self.scan is not None:
            find_scan_pattern(self.scan)
        if self.checkpoint_every is not None and not re.fullmatch(r"[1-9]\d*m?", self.checkpoint_every):
            raise ValueError(
                f"--checkpoint-every is {self.checkpoint_every!r}: it must be steps (500) or minutes (10m), above 0"
            )

    def check_positive(self, *fields: str) -> None:
        """Raises ValueError for a field that is given and not a number above 0."""
        for field in fields:
            if getattr(self, field) is not None and not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{spell_option(field)} is {getattr(self, field)}: it must be above 0")

    def check_not_negative(self, *fields: str) -> None:
        """Raises ValueError for a field that is given and not a number from 0 on."""
        for field in fields:
            if not 0 <= (getattr(self, field) or 0) < math.inf:
                raise ValueError(f"{spell_option(field)} is {getattr(self, field)}: it must be 0 or more")

    def check_shares(self, *fields: str) -> None:
        """Raises ValueError for a field that is not a number from 0 to 1."""
        for field in fields:
            if not 0 <= (getattr(self, field) or 0) <= 1:
                raise ValueError(f"{spell_option(field)} is {getattr(self, field)}: it must be between 0 and 1")

    # ----------------------------------------------------------------------------------------------------
    # What each kind of recipe has in its own way
    # ----------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def peak_learning_rate(self) -> float:
        """The learning rate that the warm-up leads to, for this batch size."""

    @property
    @abstractmethod
    def moves_each_step(self) -> bool:
        """Whether the learning rate moves with each step, or else with each epoch."""

    @abstractmethod
    def make_scheduler(self, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
        """timm's scheduler of the learning rate; a function of the epoch or step alone."""

    @abstractmethod
    def change_epochs(self: RecipeT, epochs: int) -> RecipeT:
        """The recipe with another number of epochs, in which its phases keep their shares of the run."""

    def adapt(self: RecipeT, given: Given) -> RecipeT:
        """The recipe as those options want it. In fewer epochs than its own, its phases keep their shares."""
        return self.change_epochs(given.epochs) if given.epochs < self.epochs else self

    def count_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the run; the last epoch may have fewer than the others."""
        return self.epochs * steps_per_epoch

    def drop_path_at(self, epoch: int) -> float | None:
        """Stochastic depth of the last block in an epoch, counted from 0; None is the model's own."""
        return self.drop_path

    @property
    def run_name(self) -> str:
        """The name given, or one that says which images these are.

        Many folders are called data or images: the folder that they lie in tells them apart.
        """
        if self.name:
            return self.name
        if self.dataset is not None:
            return re.sub(r"[^\w.-]+", "-", self.dataset).strip("-.")
        if self.data_dir is not None and self.data != "fashion-mnist":
            return "-".join(self.data_dir.resolve().parts[1:][-2:]) or self.data
        return self.data

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(self.output_dir or Path("runs") / self.run_name)

    def to_tracker(self) -> dict[str, int | float | str | bool]:
        """The fields that are set, as trackers take them: numbers, strings and booleans."""
        return {
            field: value if isinstance(value, int | float | str | bool) else str(value)
            for field, value in vars(self).items()
            if value is not None
        }

    def to_json(self) -> str:
        """The text of `recipe.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(Recipe):
    """A training run of a classifier."""

    image_size: int
    """Side of the square that the network sees, in pixels."""
    warmup_epochs: float = 0
    """Epochs of linear warm-up."""
    cooldown_epochs: int = 0
    """Epochs at the smallest learning rate, after the others."""
    schedule: Schedule = "epoch"
    """Whether the learning rate moves each epoch or each step."""
    min_learning_rate: float = 1e-5
    """Where the cosine ends."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    late_drop_path: tuple[float, int] | None = None
    """Another stochastic depth for the last epochs: the rate, and how many epochs, cooldown included."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of the random crop, as shares of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Narrowest and widest aspect of the random crop."""
    auto_augment: str | None = None
    """timm's augmentation policy, such as rand-m9-mstd0.5-inc1."""
    color_jitter: float | None = None
    """Strength of the colour jitter; auto_augment takes its place."""
    random_erasing: float = 0.0
    """How often a rectangle is overwritten with noise."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is none."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 is none."""
    mixup_switch: float = 0.5
    """How often cutmix stands in for mixup, where both are on."""
    crop_pct: float = 0.875
    """Evaluation: side of the centre crop as a share of the resized image's shorter side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("image_size")
        self.check_not_negative("warmup_epochs", "cooldown_epochs", "min_learning_rate")
        self.check_not_negative("color_jitter", "mixup", "cutmix")
        self.check_shares("label_smoothing", "random_erasing", "mixup_switch")
        for field, most in (("crop_scale", 1), ("crop_ratio", math.inf)):
            low, high = getattr(self, field)
            if not 0 < low <= high <= most:
                raise ValueError(
                    f"{spell_option(field)} is {low} {high}: it must be a smaller and a larger number above 0"
                )
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"--crop-pct is {self.crop_pct}: it must be above 0 and at most 1")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"--warmup-epochs is {self.warmup_epochs} and --epochs is {self.epochs}: "
                "the warm-up must be shorter than the run; use --warmup-epochs 0 for none"
            )
        if self.late_drop_path is not None:
            rate, epochs = self.late_drop_path
            if not 0 <= rate <= 1 or not 0 < epochs <= self.total_epochs:
                raise ValueError(
                    f"--late-drop-path is {rate} {epochs}: it must be a rate between 0 and 1, and how many of the "
                    f"{self.total_epochs} epochs have it"
                )

    @property
    def total_epochs(self) -> int:
        """Epochs with the cooldown."""
        return self.epochs + self.cooldown_epochs

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate * self.batch_size / 512

    @property
    def moves_each_step(self) -> bool:
        return self.schedule == "step"

    def make_scheduler(self, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
        """timm's cosine with warm-up and cooldown; a function of the epoch or step alone."""
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched="cosine",
            num_epochs=self.epochs,
            cooldown_epochs=self.cooldown_epochs,
            warmup_epochs=self.warmup_epochs,  # type: ignore[arg-type]  # timm takes fractions of epochs too
            warmup_lr=1e-6,
            min_lr=self.min_learning_rate,
            step_on_epochs=not self.moves_each_step,
            updates_per_epoch=steps_per_epoch,
        )
        return scheduler

    def adapt(self, given: Given) -> "ClassificationRecipe":
        """The recipe as those options want it. A warm-up of less than an epoch moves the learning rate each step."""
        recipe = dataclasses.replace(self, schedule=given.schedule or self.schedule)
        if given.epochs >= self.epochs:
            return recipe
        shorter = recipe.change_epochs(given.epochs)
        if self.warmup_epochs and not shorter.warmup_epochs and given.schedule is None:
            return dataclasses.replace(self, schedule="step").change_epochs(given.epochs)
        return shorter

    def count_steps(self, steps_per_epoch: int) -> int:
        return self.total_epochs * steps_per_epoch

    def drop_path_at(self, epoch: int) -> float | None:
        if self.late_drop_path is not None and epoch >= self.total_epochs - self.late_drop_path[1]:
            return self.late_drop_path[0]
        return self.drop_path

    def change_epochs(self, epochs: int) -> "ClassificationRecipe":
        """The recipe with another number of epochs; warm-up, cooldown and late drop path keep their shares of the run.

        300 epochs with 5 of warm-up and 10 of cooldown become 60 with 1 and 2. A learning rate that moves between
        epochs alone has whole epochs of warm-up: a part of the first one would leave it all at the smallest rate.
        """
        share = epochs / self.epochs
        warmup = share * self.warmup_epochs
        if self.schedule == "epoch":
            warmup = min(round(warmup), max(epochs - 1, 0))
        late = self.late_drop_path and (self.late_drop_path[0], max(1, round(share * self.late_drop_path[1])))
        return dataclasses.replace(
            self,
            epochs=epochs,
            warmup_epochs=warmup,
            cooldown_epochs=round(share * self.cooldown_epochs),
            late_drop_path=late,
        )


def spell_option(field: str) -> str:
    """The option of the command line that sets a field: `--batch-size` for `batch_size`."""
    return "--" + field.replace("_", "-")
