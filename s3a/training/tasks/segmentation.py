"""Semantic segmentation: a class for each pixel, trained by cross-entropy and scored by mIoU."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from s3a.data import Batch, Kind
from s3a.data.batches import Decoded, JointTransform
from s3a.data.targets import IGNORED, LabelMap, split_targets
from s3a.models.segmentation import SegmentationModel
from s3a.support.drawing import paint_label_map, pick_colors
from s3a.training.dense_recipe import SegmentationRecipe
from s3a.training.model import build_dense_model
from s3a.training.run_folder import EpochMetrics, Panel
from s3a.training.tasks.dense_transforms import (
    INTERPOLATIONS,
    SegmentationAugmentation,
    SegmentationView,
    find_mean_color,
)
from s3a.training.tasks.examples import list_examples, make_batch, save_examples
from s3a.training.tasks.task import ClassTask, Loss, Measurement, make_loss_panel, select_columns
from s3a.training.transfers import find_exact_dtype
from s3a.weights.card import SEGMENTER

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Of an evaluation at several sizes, as in mmsegmentation."""
OPACITY = 0.65
"""Of the colours of a label map over the image."""
COMPILED_MULTIPLE = 256
"""Sides are padded to multiples of it where the backbone is compiled, since each size has code of its own."""


class SegmentationPredictor:
    """What a segmentation model makes of images, whatever they are from.

    Attributes:
        scales: of an image's views, whose probabilities are averaged.
        flips: whether there is a mirrored view of each too.
    """

    scales: tuple[float, ...] = (1.0,)
    flips = False

    def predict_image(self, model: nn.Module, image: Image.Image, data_config: dict[str, Any]) -> Tensor:
        """The probabilities of the classes in one image of any size, [classes, height, width], on the model's device.

        Args:
            model: in evaluation mode.
            image: in the mode of the model's channels.
            data_config: timm's preprocessing keys.
        """
        example = Decoded(image, LabelMap().decode(image.height, image.width))
        return self.predict_example(model, example, data_config)

    def predict_example(self, model: nn.Module, example: Decoded, data_config: dict[str, Any]) -> Tensor:
        """The same for an image with its label map."""
        transform, device = self.make_eval_transform(data_config), next(model.parameters()).device
        ((_, probabilities),) = self.predict_groups(model, make_batch(example, transform, data_config, device))
        return probabilities[0]

    def make_eval_transform(self, data_config: dict[str, Any]) -> JointTransform:
        """Of an evaluation at several sizes the largest; the others are made of it."""
        return SegmentationView(
            short=round(max(self.scales) * data_config["input_size"][1]),
            multiple=data_config.get("multiple", 1),
            mode=INTERPOLATIONS[data_config["interpolation"]],
            color=find_mean_color(data_config["mean"]),
        )

    def predict_groups(self, model: nn.Module, batch: Batch) -> Iterator[tuple[list[int], Tensor]]:
        """The rows of a batch that are images, neighbours of one size together, and their probabilities.

        Each image is seen without the padding that its neighbours in the batch need, so that they do not matter.

        Returns:
            Rows, and [rows, classes, height, width] of their label maps' size.
        """
        assert batch.targets is not None
        targets = split_targets(batch.targets)
        shapes = [[*each["padded_size"].tolist(), *each["size"].tolist(), *each["label_map"].shape] for each in targets]
        rows = [row for row, label in enumerate(batch.labels.tolist()) if label >= 0]
        for shape, group in groupby(rows, key=lambda row: shapes[row]):
            same, (height, width) = list(group), shape[:2]
            yield same, self.predict(model, batch.images[same, :, :height, :width], shape[2:4], (shape[4], shape[5]))

    def predict(self, model: nn.Module, images: Tensor, size: Sequence[int], shown: tuple[int, int]) -> Tensor:
        """The probabilities of the classes, averaged over views, [n, classes, *shown].

        Args:
            images: [n, channels, height, width], of which (height, width) `size` is image and the rest padding.
            shown: height and width of the images as they were.
        """
        total = torch.zeros(())
        views = [(scale, mirrored) for scale in self.scales for mirrored in ((False, True) if self.flips else (False,))]
        for scale, mirrored in views:
            share = scale / max(self.scales)
            seen = images if share == 1 else interpolate(images, scale_factor=share, mode="bilinear", antialias=True)
            logits = model(seen.flip(3)).flip(3) if mirrored else model(seen)
            height, width = (max(1, round(share * side)) for side in size)
            logits = interpolate(logits.float()[:, :, :height, :width], shown, mode="bilinear", align_corners=False)
            total = total.to(logits.device) + logits.softmax(1)
        return total / len(views)


class Segmentation(SegmentationPredictor, ClassTask):
    """A class for each pixel. All scores but the loss are fractions of 1."""

    kind: Kind = "label-maps"
    best = "miou"
    title = "mIoU"
    purpose = SEGMENTER
    eval_batch_size = 4

    def build_model(
        self, recipe: SegmentationRecipe, say: Callable[[str], object] = lambda line: None
    ) -> SegmentationModel:
        model = build_dense_model(recipe, self.num_outputs, say)
        assert isinstance(model, SegmentationModel)
        return model

    def configure_data(self, recipe: SegmentationRecipe, model: nn.Module) -> dict[str, Any]:
        data_config = resolve_model_data_config(model)
        size = (data_config["input_size"][0], recipe.image_size, recipe.image_size)
        multiple = COMPILED_MULTIPLE if recipe.compile else 1
        return {**data_config, "input_size": size, "crop_pct": 1.0, "multiple": multiple}

    def make_train_transform(self, recipe: SegmentationRecipe, data_config: dict[str, Any]) -> JointTransform:
        return SegmentationAugmentation(
            side=recipe.image_size,
            scale=recipe.scale,
            largest_class=recipe.largest_class,
            flip=recipe.horizontal_flip,
            distorts=recipe.color_jitter,
            mode=INTERPOLATIONS[data_config["interpolation"]],
            color=find_mean_color(data_config["mean"]),
        )

    def make_loss(self, recipe: SegmentationRecipe) -> Loss:
        return SegmentationLoss(recipe.auxiliary_weight)

    # ----------------------------------------------------------------------------------------------------
    # Evaluation
    # ----------------------------------------------------------------------------------------------------

    def configure_evaluation(self, *, multi_scale: bool, flip: bool) -> None:
        self.scales, self.flips = (SCALES if multi_scale else (1.0,)), flip

    def measure(self, model: nn.Module, batch: Batch) -> Measurement:
        """The confusion matrix, [classes, classes] by rows of the true class, and behind it the sum of the losses."""
        assert batch.targets is not None
        sums = torch.zeros(
            self.num_outputs**2 + 1, device=batch.images.device, dtype=find_exact_dtype(batch.images.device)
        )
        targets = split_targets(batch.targets)
        for rows, probabilities in self.predict_groups(model, batch):
            sums += self.compare(probabilities, torch.stack([targets[row]["label_map"] for row in rows]).long())
        return Measurement(sums)

    def compare(self, probabilities: Tensor, labels: Tensor) -> Tensor:
        """What images add to the sums: probabilities [n, classes, height, width], labels [n, height, width]."""
        known = labels != IGNORED
        places = labels[known] * self.num_outputs + probabilities.argmax(1)[known]
        confusion = places.bincount(minlength=self.num_outputs**2)
        chosen = probabilities.gather(1, labels.where(known, 0)[:, None])[:, 0]
        exact = find_exact_dtype(labels.device)
        loss = -chosen[known].clamp(min=1e-12).log().to(exact).sum()
        return torch.cat([confusion.to(loss.dtype), loss[None]])

    def compute_scores(self, sums: Sequence[float], num_images: int, records: Sequence[Any]) -> dict[str, float]:
        """mIoU is the mean over the classes that are in the label maps or in the predictions."""
        confusion = torch.tensor(sums[:-1], dtype=torch.float64).view(self.num_outputs, self.num_outputs)
        right, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        union = true + predicted - right
        num_pixels = max(confusion.sum().item(), 1.0)
        ious = right[union > 0] / union[union > 0]
        return {
            "loss": sums[-1] / num_pixels,
            "miou": ious.mean().item() if len(ious) else 0.0,
            "pixel_accuracy": right.sum().item() / num_pixels,
        }

    # ----------------------------------------------------------------------------------------------------
    # For people
    # ----------------------------------------------------------------------------------------------------

    def format_score(self, score: float) -> str:
        return f"{100 * score:.2f} %"

    def describe_epoch(self, scores: Mapping[str, float]) -> str:
        average = f", with EMA {self.format_score(scores['ema_miou'])}" if "ema_miou" in scores else ""
        return (
            f"val loss {scores['val_loss']:.4f}, mIoU {self.format_score(scores['val_miou'])}, "
            f"pixel accuracy {self.format_score(scores['val_pixel_accuracy'])}{average}"
        )

    def list_panels(self, recipe: SegmentationRecipe, history: Sequence[EpochMetrics]) -> list[Panel]:
        labels = {"val_miou": "mIoU", "ema_miou": "mIoU, EMA", "val_pixel_accuracy": "pixel accuracy"}
        title = f"validation, last mIoU {self.format_score(history[-1].scores['val_miou'])}"
        curves = select_columns(history, labels, scale=100)
        return [make_loss_panel(history), Panel(title=title, curves=curves, ylabel="%")]

    def draw_examples(self, model: nn.Module, data_config: dict[str, Any], path: Path) -> bool:
        colors = pick_colors(self.num_outputs)

        def draw(example: Decoded) -> list[Image.Image]:
            assert example.target is not None
            probabilities = self.predict_example(model, example, data_config)
            maps = (example.target["label_map"].numpy(), probabilities.argmax(0).cpu().numpy())
            return [example.image, *(paint_label_map(example.image, each, colors, OPACITY) for each in maps)]

        save_examples(path, list_examples(self.data, data_config["input_size"][0]), draw)
        return True


class SegmentationLoss:
    """Cross-entropy of the pixels, and of the auxiliary head where there is one.

    The mean is over all pixels, ignored ones too, as in mmsegmentation: so it is one for all processes together.
    """

    def __init__(self, auxiliary_weight: float) -> None:
        self.auxiliary_weight = auxiliary_weight

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        assert batch.targets is not None
        labels = torch.stack([each["label_map"] for each in split_targets(batch.targets)]).long()
        logits, auxiliary = model(batch.images, auxiliary=True)
        loss = average_loss(logits, labels)
        return loss if auxiliary is None else loss + self.auxiliary_weight * average_loss(auxiliary, labels)


def average_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of logits [n, classes, height, width], with 0 for ignored pixels."""
    return cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum") / labels.numel()
