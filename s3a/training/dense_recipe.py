"""Recipes of the dense tasks: what a training of segmentation or detection has beyond `Recipe`."""

import dataclasses
from abc import ABC
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from s3a.training.recipe import Given, Recipe, spell_option

SegmentationHead = Literal["semantic_fpn", "upernet"]
DetectionHead = Literal["retinanet", "mask_rcnn", "cascade_mask_rcnn"]
Decay = Literal["poly", "steps"]
DenseRecipeT = TypeVar("DenseRecipeT", bound="DenseRecipe")


@dataclass(frozen=True, kw_only=True)
class DenseRecipe(Recipe, ABC):
    """A training run of a backbone with a dense head. `model` is the backbone; weights are those of a classifier."""

    head: str
    """What stands on the backbone."""
    learning_rate: float
    """Peak learning rate of the whole batch; it does not follow the batch size."""
    steps: int | None = None
    """Optimizer steps of the run, of which the last epoch may have a part; None takes those of all epochs."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_start: float = 0.001
    """Where the warm-up begins, as a share of the learning rate."""
    decay: Decay
    """How the learning rate falls behind the warm-up: poly, to 0 as a power of what is left of the run, or steps, to a
    tenth after each of --decay-epochs."""
    decay_power: float = 1.0
    """That power."""
    decay_epochs: tuple[int, ...] = ()
    """Those epochs, counted from 1."""
    pyramid_dim: int = 256
    """Channels of the feature pyramid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("steps", "pyramid_dim", "decay_power")
        self.check_not_negative("warmup_steps")
        self.check_shares("warmup_start")
        if list(self.decay_epochs) != sorted({*self.decay_epochs}) or min(self.decay_epochs, default=1) < 1:
            given = " ".join(map(str, self.decay_epochs))
            raise ValueError(f"--decay-epochs is {given}: they must be above 0, and rise")
        if self.decay == "steps" and not self.decay_epochs:
            raise ValueError("--decay is steps, without --decay-epochs: name the epochs, or use --decay poly")

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate

    @property
    def moves_each_step(self) -> bool:
        return True

    @property
    def head_args(self) -> dict[str, Any]:
        """The arguments of the head, by name."""
        return {"pyramid_dim": self.pyramid_dim}

    def make_scheduler(self, optimizer: Optimizer, steps_per_epoch: int) -> "StepScheduler":
        steps = self.count_steps(steps_per_epoch)
        if self.warmup_steps >= steps:
            raise ValueError(
                f"--warmup-steps is {self.warmup_steps} and the run has {steps} steps: the warm-up must be shorter; "
                f"use --warmup-steps {steps // 10}, or more --epochs"
            )
        return StepScheduler(optimizer, self, steps_per_epoch)

    def count_steps(self, steps_per_epoch: int) -> int:
        return self.steps or self.epochs * steps_per_epoch

    def change_epochs(self: DenseRecipeT, epochs: int) -> DenseRecipeT:
        """The recipe with another number of epochs, in place of steps; warm-up and decay keep their shares.

        A decay comes in front of the last epoch at the latest, if there are two.
        """
        share, last = epochs / self.epochs, max(1, epochs - 1)
        return dataclasses.replace(
            self,
            epochs=epochs,
            steps=None,
            warmup_steps=round(share * self.warmup_steps),
            decay_epochs=tuple(sorted({min(max(1, round(share * epoch)), last) for epoch in self.decay_epochs})),
        )

    def adapt(self: DenseRecipeT, given: Given) -> DenseRecipeT:
        """See `Recipe.adapt`; epochs that are given take the place of the recipe's steps."""
        return super().adapt(given) if given.epochs <= self.epochs else dataclasses.replace(self, steps=None)

    def find_rate(self, step: int, steps_per_epoch: int) -> float:
        """The share of the learning rate that a step has, counted from 0.

        As in mmdetection and mmsegmentation, whose warm-up multiplies what the step would have without it.
        """
        if self.decay == "poly":
            share = max(0.0, 1 - step / self.count_steps(steps_per_epoch)) ** self.decay_power
        else:
            share = 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in self.decay_epochs)
        if step < self.warmup_steps:
            share *= self.warmup_start + (1 - self.warmup_start) * step / self.warmup_steps
        return share


class StepScheduler(Scheduler):
    """The learning rate of a dense recipe, as timm's schedulers are called: a function of the step alone.

    `step_update` takes the number of the step that follows, counted from 1.
    """

    def __init__(self, optimizer: Optimizer, recipe: DenseRecipe, steps_per_epoch: int) -> None:
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=False)
        self.recipe, self.steps_per_epoch = recipe, steps_per_epoch
        self.update_groups(self._get_lr(0))

    def _get_lr(self, t: int) -> list[float]:
        return [base * self.recipe.find_rate(max(t - 1, 0), self.steps_per_epoch) for base in self.base_values]


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(DenseRecipe):
    """A training run of semantic segmentation."""

    head: SegmentationHead = "semantic_fpn"
    """What stands on the backbone: semantic_fpn or upernet."""
    head_dim: int | None = None
    """Channels of the head; None is 128 for semantic_fpn and 512 for upernet."""
    drop_rate: float = 0.1
    """How often a channel is dropped in front of the classifier of the pixels."""
    auxiliary_weight: float = 0.4
    """Weight of the auxiliary loss of upernet."""
    ignore_zero: bool = False
    """For label maps of one's own: 0 is no class, and the number n is class n - 1, as in ADE20K."""
    image_size: int = 512
    """Side of the square crop in training, in pixels. Images are resized before: to this shorter side, but to a longer
    one of at most four times as much; in training times a factor."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest of those factors."""
    largest_class: float = 0.75
    """Share of a crop that no class may exceed; crops are drawn up to ten times for it."""
    color_jitter: bool = True
    """Whether brightness, contrast, saturation and hue of training images are distorted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("head_dim", "image_size", "largest_class")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"--drop-rate is {self.drop_rate}: it must be 0 or more and below 1")
        self.check_not_negative("auxiliary_weight")
        check_range("scale", self.scale)

    @property
    def head_args(self) -> dict[str, Any]:
        head_dim = {} if self.head_dim is None else {"head_dim": self.head_dim}
        pyramid = super().head_args if self.head == "semantic_fpn" else {}
        return {**pyramid, **head_dim, "drop_rate": self.drop_rate}


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(DenseRecipe):
    """A training run of detection, with masks or without."""

    head: DetectionHead = "mask_rcnn"
    """What stands on the backbone: retinanet, mask_rcnn or cascade_mask_rcnn."""
    short_sides: tuple[int, ...] = (800,)
    """Lengths that the shorter side of a training image is resized to, of which one is drawn; the longest one is that
    of the evaluation."""
    long_side: int = 1333
    """Longest that the longer side may become."""
    crop: bool = False
    """Whether half of the training images are resized to 400, 500 or 600, cropped to 384 to 600 pixels, and then
    resized, as in DETR."""
    anchor_scale: float = 8.0
    """Side of the anchors, in strides of their level."""
    box_dim: int = 1024
    """Width of the box heads."""
    mask_convs: int = 4
    """Convolutions of the mask heads."""
    num_proposals: int | None = None
    """Proposals of an image, in training and after it; None is the head's own: 1000, and for cascade_mask_rcnn 2000 in
    training."""
    num_samples: int = 512
    """Proposals of an image that train the box heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("long_side", "anchor_scale", "box_dim", "mask_convs", "num_proposals", "num_samples")
        if not self.short_sides or min(self.short_sides) < 32:
            given = " ".join(map(str, self.short_sides))
            raise ValueError(f"--short-sides is {given!r}: give one or more, each at least 32")

    @property
    def head_args(self) -> dict[str, Any]:
        if self.head == "retinanet":
            return super().head_args
        fields = ("anchor_scale", "box_dim", "mask_convs", "num_samples")
        proposals = ("num_proposals", "num_training_proposals") if self.num_proposals is not None else ()
        return (
            super().head_args
            | {field: getattr(self, field) for field in fields}
            | dict.fromkeys(proposals, self.num_proposals)
        )


def check_range(field: str, pair: tuple[float, float]) -> None:
    """Raises ValueError where a pair is not a smaller and a larger number above 0."""
    low, high = pair
    if not 0 < low <= high:
        raise ValueError(f"{spell_option(field)} is {low} {high}: it must be a smaller and a larger number above 0")
