"""Image classification: one label for an image, trained by cross-entropy and scored by top-1 and top-5."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms import Compose

from s3a.data import Batch
from s3a.data.batches import Transform
from s3a.training.model import TimmModel
from s3a.training.recipe import ClassificationRecipe
from s3a.training.run_folder import EpochMetrics, Panel, Prefix
from s3a.training.tasks.task import ClassTask, Measurement, make_loss_panel, select_columns
from s3a.weights.card import CLASSIFIER


class Classification(ClassTask):
    """One label for an image. All scores but the loss are fractions of 1."""

    best = "top1"
    title = "top-1"
    purpose = CLASSIFIER

    def check_recipe(self, recipe: ClassificationRecipe, images_per_forward: int) -> None:
        if self.num_outputs < 2:
            classes = ", ".join(map(repr, self.data.label_names)) or "none"
            raise ValueError(
                f"the images of --data {recipe.data} have {self.num_outputs} class ({classes}): a classifier needs two "
                "or more to choose from"
            )
        if mixes_images(recipe) and images_per_forward % 2:
            raise ValueError(
                f"--batch-size is {recipe.batch_size}, {images_per_forward} images a forward: mixup and cutmix need an "
                "even number; change it, or use --mixup 0 --cutmix 0"
            )

    def fit_head(self, model: nn.Module) -> bool:
        """Keeps the head of loaded weights where they know the same classes; whether it is new."""
        knows_same = cast(TimmModel, model).pretrained_cfg.get("label_names") == self.data.label_names
        return not knows_same and super().fit_head(model)

    def make_train_transform(self, recipe: ClassificationRecipe, data_config: dict[str, Any]) -> Transform:
        return make_augmentation(recipe, data_config)

    def make_erasing(self, recipe: ClassificationRecipe) -> RandomErasing | None:
        return RandomErasing(recipe.random_erasing, mode="pixel", device="cpu") if recipe.random_erasing else None

    def make_loss(self, recipe: ClassificationRecipe) -> "ClassificationLoss":
        return ClassificationLoss(recipe, self.num_outputs)

    def measure(self, model: nn.Module, batch: Batch) -> Measurement:
        return Measurement(count_correct(model(batch.images).float(), batch.labels))

    def compute_scores(self, sums: Sequence[float], num_images: int, records: Sequence[Any]) -> dict[str, float]:
        top1, top5, loss = (total / max(num_images, 1) for total in sums)
        return {"loss": loss, "top1": top1, "top5": top5}

    def format_score(self, score: float) -> str:
        return f"{100 * score:.2f} %"

    def describe_epoch(self, scores: Mapping[str, float]) -> str:
        top1 = self.format_score(scores["val_top1"])
        return f"val loss {scores['val_loss']:.4f}, top-1 {top1}{self.describe_average(scores)}"

    def describe_result(self, scores: Mapping[str, float]) -> str:
        num_images = self.data.val.num_images
        return (
            f"top-1 {self.format_score(scores['val_top1'])} ({round(scores['val_top1'] * num_images)} of {num_images} "
            f"validation images), top-5 {self.format_score(scores['val_top5'])}{self.describe_average(scores)}"
        )

    def describe_average(self, scores: Mapping[str, float]) -> str:
        """What the moving average of the weights scored, to stand behind a comma; empty where there is none."""
        return f", with EMA {self.format_score(scores['ema_top1'])}" if "ema_top1" in scores else ""

    def list_panels(self, recipe: ClassificationRecipe, history: Sequence[EpochMetrics]) -> list[Panel]:
        labels = {"val_top1": "top-1", "val_top5": "top-5", "ema_top1": "top-1, EMA"}
        accuracy = Panel(
            title=f"validation accuracy, last top-1 {self.format_score(history[-1].scores['val_top1'])}",
            curves=select_columns(history, labels, scale=100),
            ylabel="%",
            legend="lower right",
        )
        return [make_loss_panel(history, list_hardenings(recipe)), accuracy]

    def list_card_scores(self, scores: Mapping[str, float], prefix: Prefix) -> dict[str, float]:
        titles = {f"{prefix}_top1": "top-1", f"{prefix}_top5": "top-5"}
        return {title: scores[column] for column, title in titles.items() if column in scores}


# --------------------------------------------------------------------------------------------------------
# Loss and scores
# --------------------------------------------------------------------------------------------------------


def mixes_images(recipe: ClassificationRecipe) -> bool:
    """Whether the recipe mixes images and their labels with each other."""
    return recipe.mixup > 0 or recipe.cutmix > 0


def list_hardenings(recipe: ClassificationRecipe) -> list[str]:
    """What makes the loss in training larger than in validation, which has none of it; for the legend of the curves."""
    mixed = [name for name in ("mixup", "cutmix") if getattr(recipe, name) > 0]
    smoothed = [f"label smoothing {recipe.label_smoothing:g}"] if recipe.label_smoothing else []
    return [*mixed, *smoothed, "augmentation"]  # a crop at least


class ClassificationLoss:
    """Smoothed cross-entropy of a batch, whose images and labels timm mixes where the recipe says so."""

    def __init__(self, recipe: ClassificationRecipe, num_classes: int) -> None:
        self.mixup: Mixup | None = None
        self.criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        if mixes_images(recipe):
            self.mixup = Mixup(
                mixup_alpha=recipe.mixup,
                cutmix_alpha=recipe.cutmix,
                switch_prob=recipe.mixup_switch,
                label_smoothing=recipe.label_smoothing,
                num_classes=num_classes,
            )
            self.criterion = SoftTargetCrossEntropy()  # of labels that Mixup has smoothed

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch.images, batch.labels
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)  # labels are [n, classes] now
        loss: Tensor = self.criterion(model(images).float(), labels)
        return loss


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many images of a batch are right at 1 and at 5, and the sum of their losses; a label of -1 is no image."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [batch, 5]
    losses = cross_entropy(logits, labels, reduction="none", ignore_index=-1)
    return torch.stack([hits[:, 0].sum(), hits.any(1).sum(), losses.sum()])


# --------------------------------------------------------------------------------------------------------
# Augmentation
# --------------------------------------------------------------------------------------------------------


def make_augmentation(recipe: ClassificationRecipe, data_config: dict[str, Any]) -> Compose:
    """timm's augmentation with the recipe's options, from an image to uint8 pixels; without the erasing.

    Raises:
        ValueError: for a policy that timm does not know.
    """
    try:
        transform: Compose = create_transform(
            input_size=data_config["input_size"],
            is_training=True,
            scale=recipe.crop_scale,
            ratio=recipe.crop_ratio,
            hflip=recipe.horizontal_flip,
            color_jitter=recipe.color_jitter,  # type: ignore[arg-type]  # timm takes None too
            auto_augment=recipe.auto_augment,
            interpolation=data_config["interpolation"],
            mean=data_config["mean"],  # the colour of what operations leave empty
            normalize=False,
        )
    except AssertionError as error:
        raise ValueError(
            f"--auto-augment is {recipe.auto_augment!r}: it must be a policy of timm's, such as rand-m9-mstd0.5-inc1"
        ) from error
    replace_posterize(transform)
    return transform


def replace_posterize(transform: Compose) -> None:
    """Has the policies in a transform of timm's posterize by `posterize`."""
    for operation in list_operations(transform):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize


def list_operations(transform: Compose) -> Iterator[auto_augment.AugmentOp]:
    """The operations of the policies in a transform of timm's."""
    for step in transform.transforms:
        if isinstance(step, auto_augment.RandAugment | auto_augment.AugMixAugment):
            yield from step.ops
        elif isinstance(step, auto_augment.AutoAugment):
            yield from chain.from_iterable(step.policy)


def posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's posterization, and black where no bits are kept: what Pillow did when the recipes were written.

    Pillow now refuses to keep no bits, which timm's policies ask for at their strongest.
    """
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)
