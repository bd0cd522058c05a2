"""`Recipe`: everything that determines a training run, as typed fields that are options of the command line too."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from s3a.data import DataOptions
from s3a.geometry import find_scan_pattern
from s3a.quantization.schemes import SchemeName

Precision = Literal["no", "bf16", "fp16"]
Schedule = Literal["epoch", "step"]
OnNonFinite = Literal["stop", "skip"]
Tracker = Literal["tensorboard", "wandb"]


@dataclass(frozen=True, kw_only=True)
class Recipe(DataOptions):
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
    image_size: int
    """Side of the square that the network sees, in pixels."""
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
    warmup_epochs: float = 0
    """Epochs of linear warm-up."""
    cooldown_epochs: int = 0
    """Epochs at the smallest learning rate, after the others."""
    schedule: Schedule = "epoch"
    """Whether the learning rate moves each epoch or each step."""
    min_learning_rate: float = 1e-5
    """Where the cosine ends."""
    weight_decay: float = 0.05
    """AdamW's; not on biases and 1-d parameters."""
    clip_grad: float | None = None
    """Largest norm of the gradient; None does not clip."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    drop_path: float | None = None
    """Stochastic depth of the last block; None is the model's own."""
    late_drop_path: tuple[float, int] | None = None
    """Another stochastic depth for the last epochs: the rate, and how many epochs, cooldown included."""
    ema_decay: float | None = None
    """Decay of the moving average of the weights, for 512 images a step; None keeps no average."""
    sync_batch_norm: bool = True
    """Normalise by the statistics of the images of all processes, as one process with all of them would."""
    freeze_batch_norm: bool = False
    """Leave BatchNorm's statistics as they are."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of the random crop, as shares of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Narrowest and widest aspect of the random crop."""
    horizontal_flip: float = 0.5
    """How often an image is mirrored."""
    auto_augment: str | None = None
    """timm's augmentation policy, such as rand-m9-mstd0.5-inc1."""
    color_jitter: float | None = None
    """Strength of the colour jitter; auto_augment takes its place."""
    random_erasing: float = 0.0
    """How often a rectangle is overwritten with noise."""
    repeats: int = 1
    """Repeated augmentation: how often an image stands in an epoch, each time augmented anew."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is none."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 is none."""
    mixup_switch: float = 0.5
    """How often cutmix stands in for mixup, where both are on."""
    crop_pct: float = 0.875
    """Evaluation: side of the centre crop as a share of the resized image's shorter side."""
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
        positive = ("image_size", "epochs", "batch_size", "learning_rate", "keep_checkpoints", "cpu_threads", "repeats")
        for field in (*positive, "accumulate", "clip_grad", "size"):
            if getattr(self, field) is not None and not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{spell_option(field)} is {getattr(self, field)}: it must be above 0")
        counts = ("warmup_epochs", "cooldown_epochs", "num_workers", "weight_decay", "seed", "min_learning_rate")
        for field in (*counts, "color_jitter", "mixup", "cutmix"):
            if not 0 <= (getattr(self, field) or 0) < math.inf:
                raise ValueError(f"{spell_option(field)} is {getattr(self, field)}: it must be 0 or more")
        for field, most in (("crop_scale", 1), ("crop_ratio", math.inf)):
            low, high = getattr(self, field)
            if not 0 < low <= high <= most:
                raise ValueError(
                    f"{spell_option(field)} is {low} {high}: it must be a smaller and a larger number above 0"
                )
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"--crop-pct is {self.crop_pct}: it must be above 0 and at most 1")
        shares = ("label_smoothing", "horizontal_flip", "random_erasing", "mixup_switch", "max_bad_images")
        for field in (*shares, "max_bad_val_images"):
            if not 0 <= (getattr(self, field) or 0) <= 1:
                raise ValueError(f"{spell_option(field)} is {getattr(self, field)}: it must be between 0 and 1")
        for field in ("drop_path", "ema_decay"):
            if not 0 <= (getattr(self, field) or 0) < 1:
                raise ValueError(f"{spell_option(field)} is {getattr(self, field)}: it must be 0 or more and below 1")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"--warmup-epochs is {self.warmup_epochs} and --epochs is {self.epochs}: "
                "the warm-up must be shorter than the run; use --warmup-epochs 0 for none"
            )
        if self.scan is not None:
            find_scan_pattern(self.scan)
        if self.late_drop_path is not None:
            rate, epochs = self.late_drop_path
            if not 0 <= rate <= 1 or not 0 < epochs <= self.total_epochs:
                raise ValueError(
                    f"--late-drop-path is {rate} {epochs}: it must be a rate between 0 and 1, and how many of the "
                    f"{self.total_epochs} epochs have it"
                )
        if self.checkpoint_every is not None and not re.fullmatch(r"[1-9]\d*m?", self.checkpoint_every):
            raise ValueError(
                f"--checkpoint-every is {self.checkpoint_every!r}: it must be steps (500) or minutes (10m), above 0"
            )

    @property
    def total_epochs(self) -> int:
        """Epochs with the cooldown."""
        return self.epochs + self.cooldown_epochs

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate that the warm-up leads to, for this batch size."""
        return self.learning_rate * self.batch_size / 512

    def drop_path_at(self, epoch: int) -> float | None:
        """Stochastic depth of the last block in an epoch, counted from 0; None is the model's own."""
        if self.late_drop_path is not None and epoch >= self.total_epochs - self.late_drop_path[1]:
            return self.late_drop_path[0]
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

    def change_epochs(self, epochs: int) -> "Recipe":
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


def spell_option(field: str) -> str:
    """The option of the command line that sets a field: `--batch-size` for `batch_size`."""
    return "--" + field.replace("_", "-")
