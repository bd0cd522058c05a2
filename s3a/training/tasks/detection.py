"""Object detection, with masks or without: trained by the detector's own losses and scored by COCO's AP."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.functional import pad

from s3a.data import Batch, ImageData
from s3a.data.batches import Decoded, JointTransform
from s3a.data.objects import ObjectImages
from s3a.data.targets import Objects, split_targets
from s3a.models.detection import Detector
from s3a.models.regions import paste_masks
from s3a.support.drawing import Color, paint_objects, pick_colors
from s3a.training.average_precision import AveragePrecision, Kind, make_predictions, write_predictions
from s3a.training.dense_recipe import DetectionRecipe
from s3a.training.model import build_dense_model
from s3a.training.run_folder import EpochMetrics, Panel
from s3a.training.tasks.dense_transforms import (
    INTERPOLATIONS,
    DetectionAugmentation,
    DetectionView,
    choose_bucket,
    list_buckets,
)
from s3a.training.tasks.examples import list_examples, make_batch, save_examples
from s3a.training.tasks.task import ClassTask, Loss, Measurement, make_loss_panel, select_columns
from s3a.weights.card import DETECTOR

PREDICTIONS_NAME = "predictions.json"
SHOWN_SCORE = 0.5
"""Of the predictions that are drawn, at least."""
TITLES = {"box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP", "mask_ap50": "mask AP50"}


class ImagePredictions(NamedTuple):
    """What was found on one image: a record of an evaluation."""

    image_id: int
    objects: list[dict[str, Any]]
    """in COCO's result format"""
    has_masks: bool


class DetectionPredictor:
    """What a detector makes of images, whatever they are from."""

    def predict_image(self, model: Detector, image: Image.Image, data_config: dict[str, Any]) -> dict[str, Tensor]:
        """What is found on one image of any size, in its pixels and on the model's device, the best first.

        Args:
            model: in evaluation mode.
            image: in the mode of the model's channels.
            data_config: timm's preprocessing keys; of input_size the longest shorter and the longest longer side.

        Returns:
            "boxes" [found, 4] float32, left, top, right and bottom; "labels" [found] int64; "scores" [found] float32;
            and "masks" [found, height, width] bool where the detector has them.
        """
        transform, device = self.make_eval_transform(data_config), next(model.parameters()).device
        example = Decoded(image, Objects().decode(image.height, image.width))
        ((_, found),) = self.predict_rows(model, make_batch(example, transform, data_config, device))
        return found

    def make_eval_transform(self, data_config: dict[str, Any]) -> JointTransform:
        _, short_side, long_side = data_config["input_size"]
        mode = INTERPOLATIONS[data_config["interpolation"]]
        buckets = data_config.get("buckets", [])
        return DetectionView(short_side=short_side, long_side=long_side, mode=mode, buckets=buckets)

    def predict_rows(self, model: nn.Module, batch: Batch) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The rows of a batch that are images, and what is found on each, in pixels of the image as it was.

        Neighbours of one size are seen together; none is padded for another, so that they do not matter.
        """
        assert batch.targets is not None
        targets = split_targets(batch.targets)
        sizes = [(each["size"].tolist(), each["padded_size"].tolist()) for each in targets]
        rows = [row for row, label in enumerate(batch.labels.tolist()) if label >= 0]
        for ((height, width), padded), group in groupby(rows, key=lambda row: sizes[row]):
            same = list(group)
            images = pad_to(batch.images[same, :, :height, :width], *padded)
            for row, found in zip(same, model(images, [(height, width)] * len(same)), strict=True):
                yield row, scale_back(found, (height, width), targets[row]["original_size"].tolist())


class Detection(DetectionPredictor, ClassTask):
    """Boxes, classes and, where the detector has them, masks of objects. All scores are fractions of 1."""

    kind = "objects"
    best = "box_ap"
    title = "box AP"
    purpose = DETECTOR
    eval_batch_size = 4

    def __init__(self, data: ImageData) -> None:
        super().__init__(data)
        assert isinstance(data.train, ObjectImages) and isinstance(data.val, ObjectImages)
        self.val = data.val
        self.has_masks = data.train.has_masks and data.val.has_masks
        self.scorers: dict[bool, AveragePrecision] = {}

    def check_recipe(self, recipe: DetectionRecipe, images_per_forward: int) -> None:
        if recipe.head != "retinanet" and not self.has_masks:
            raise ValueError(
                f"--head is {recipe.head}, and the objects of --data {recipe.data} have no masks: use retinanet"
            )

    def build_model(self, recipe: DetectionRecipe, say: Callable[[str], object] = lambda line: None) -> Detector:
        model = build_dense_model(recipe, self.num_outputs, say)
        assert isinstance(model, Detector)
        return model

    def configure_data(self, recipe: DetectionRecipe, model: nn.Module) -> dict[str, Any]:
        """timm's preprocessing keys; the input size is that of the evaluation: shorter side, longest longer side."""
        data_config = resolve_model_data_config(model)
        size = (data_config["input_size"][0], max(recipe.short_sides), recipe.long_side)
        buckets = list_buckets(*size[1:]) if recipe.compile else []
        return {**data_config, "input_size": size, "crop_pct": 1.0, "buckets": buckets}

    def make_train_transform(self, recipe: DetectionRecipe, data_config: dict[str, Any]) -> JointTransform:
        return DetectionAugmentation(
            short_sides=recipe.short_sides,
            long_side=recipe.long_side,
            crops=recipe.crop,
            flip=recipe.horizontal_flip,
            mode=INTERPOLATIONS[data_config["interpolation"]],
            masks=recipe.head != "retinanet",
        )

    def make_loss(self, recipe: DetectionRecipe) -> Loss:
        return DetectionLoss(list_buckets(max(recipe.short_sides), recipe.long_side) if recipe.compile else [])

    # ----------------------------------------------------------------------------------------------------
    # Evaluation
    # ----------------------------------------------------------------------------------------------------

    def measure(self, model: nn.Module, batch: Batch) -> Measurement:
        """No sums, and what was found on each image."""
        assert isinstance(model, Detector)
        records = []
        for row, found in self.predict_rows(model, batch):
            image_id = int(self.val.image_ids[int(batch.indices[row])])
            objects = make_predictions(image_id, self.val.category_ids, **found)
            records.append(ImagePredictions(image_id, objects, "masks" in found))
        return Measurement(torch.zeros(0, device=batch.images.device), records)

    def compute_scores(
        self, sums: Sequence[float], num_images: int, records: Sequence[ImagePredictions]
    ) -> dict[str, float]:
        """Those of the images that could be read."""
        has_masks = self.has_masks and any(record.has_masks for record in records)
        if has_masks not in self.scorers:  # once in a run
            kinds: list[Kind] = ["bbox", "segm"] if has_masks else ["bbox"]
            self.scorers[has_masks] = AveragePrecision(self.val.build_ground_truth(), kinds)
        objects = chain.from_iterable(record.objects for record in records)
        scores = self.scorers[has_masks].compute(objects, [record.image_id for record in records])
        return {"box_ap": 0.0, **scores}  # without an object in the images there is none

    def write_records(self, folder: Path, records: Sequence[ImagePredictions]) -> None:
        """Writes `predictions.json`, in COCO's result format."""
        in_order = sorted(records, key=lambda record: record.image_id)
        write_predictions(folder / PREDICTIONS_NAME, [each for record in in_order for each in record.objects])

    # ----------------------------------------------------------------------------------------------------
    # For people
    # ----------------------------------------------------------------------------------------------------

    def format_score(self, score: float) -> str:
        return f"{100 * score:.1f} %"

    def describe_epoch(self, scores: Mapping[str, float]) -> str:
        columns = {f"val_{name}": title for name, title in TITLES.items()} | {"ema_box_ap": "with EMA box AP"}
        return ", ".join(
            f"{title} {self.format_score(scores[name])}" for name, title in columns.items() if name in scores
        )

    def list_panels(self, recipe: DetectionRecipe, history: Sequence[EpochMetrics]) -> list[Panel]:
        labels = {f"val_{name}": title for name, title in TITLES.items()} | {"ema_box_ap": "box AP, EMA"}
        title = f"validation, last box AP {self.format_score(history[-1].scores['val_box_ap'])}"
        curves = select_columns(history, labels, scale=100)
        return [make_loss_panel(history), Panel(title=title, curves=curves, ylabel="%")]

    def list_card_scores(self, scores: Mapping[str, float], prefix: str) -> dict[str, float]:
        columns = {f"{prefix}_{name}": title for name, title in TITLES.items()}
        return {title: scores[column] for column, title in columns.items() if column in scores}

    def draw_examples(self, model: nn.Module, data_config: dict[str, Any], path: Path) -> bool:
        assert isinstance(model, Detector)
        colors = pick_colors(self.num_outputs)

        def draw(example: Decoded) -> list[Image.Image]:
            assert example.target is not None
            found = self.predict_image(model, example.image, data_config)
            shown = {name: each[found["scores"] > SHOWN_SCORE] for name, each in found.items()}
            return [example.image, self.paint(example, example.target, colors), self.paint(example, shown, colors)]

        save_examples(path, list_examples(self.data, data_config["input_size"][0]), draw)
        return True

    def paint(self, example: Decoded, objects: Mapping[str, Tensor], colors: Sequence[Color]) -> Image.Image:
        """The image of an example with objects on it."""
        labels, masks = objects["labels"].tolist(), objects.get("masks")
        names, own_colors = [self.data.label_names[label] for label in labels], [colors[label] for label in labels]
        return paint_objects(
            example.image, objects["boxes"], names, own_colors, None if masks is None else masks.bool()
        )


def scale_back(found: dict[str, Tensor], size: tuple[int, int], original: Sequence[int]) -> dict[str, Tensor]:
    """What was found on a resized image, as boxes and pasted masks of the image as it was (height, width)."""
    (height, width), (original_height, original_width) = size, original
    factors = torch.tensor([original_width / width, original_height / height] * 2, device=found["boxes"].device)
    boxes = found["boxes"] * factors
    scaled = {"boxes": boxes, "labels": found["labels"], "scores": found["scores"]}
    if "masks" in found:
        scaled["masks"] = paste_masks(found["masks"], boxes, original_height, original_width)
    return scaled


# --------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------


class DetectionLoss:
    """The sum of the detector's losses.

    Args:
        buckets: see `choose_bucket`.
    """

    def __init__(self, buckets: Sequence[tuple[int, int]]) -> None:
        self.buckets = buckets

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        assert batch.targets is not None
        targets = split_targets(batch.targets)
        sizes = [(int(each["size"][0]), int(each["size"][1])) for each in targets]
        height, width = batch.images.shape[2:]
        shape = choose_bucket(height, width, self.buckets)
        images = blank_padding(pad_to(batch.images, *shape), sizes)
        losses = model(images, sizes, [pad_target(target, shape) for target in targets])
        total: Tensor = sum(losses.values())
        return total


def pad_to(images: Tensor, height: int, width: int) -> Tensor:
    """Images [..., height, width] with zeros on the right and below."""
    return pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))


def blank_padding(images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Images whose padding is 0 behind the normalisation, as the authors pad; a loader pads before it."""
    blank = images.clone()
    for image, (height, width) in zip(blank, sizes, strict=True):
        image[:, height:], image[:, :, width:] = 0, 0
    return blank


def pad_target(target: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    """The objects of an image, with masks of the padded image's size."""
    kept = {name: target[name] for name in ("boxes", "labels")}
    return kept | ({"masks": pad_to(target["masks"], *shape)} if "masks" in target else {})
