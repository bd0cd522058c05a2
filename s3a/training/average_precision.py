"""COCO's average precision (AP) of boxes and masks, by faster-coco-eval."""

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as mask_api
from torch import Tensor

from s3a.training.run_folder import write_whole

Kind = Literal["bbox", "segm"]
PREFIXES: dict[str, str] = {"bbox": "box", "segm": "mask"}
SCORES: dict[str, tuple[str, float | None]] = {
    "ap": ("all", None),
    "ap50": ("all", 0.5),
    "ap75": ("all", 0.75),
    "ap_small": ("small", None),
    "ap_medium": ("medium", None),
    "ap_large": ("large", None),
}
"""Of each score the sizes of objects that count, and the IoU from which on a prediction is right; None is the mean over
0.50, 0.55, ..., 0.95. Small objects have less than 32 x 32 pixels, large ones more than 96 x 96."""
MOST_PREDICTIONS = 100
"""Of each class and image, so many with the highest scores count."""


class AveragePrecision:
    """Scores predictions against one ground truth, which is indexed once.

    Args:
        ground_truth: images, categories and annotations as a dict of COCO's format. It is not changed. Annotations get
            ids of their own, from 1 on, since the evaluation takes the id 0 for none.
        kinds: whether boxes, masks or both are scored.
    """

    def __init__(self, ground_truth: dict[str, Any], kinds: Sequence[Kind] = ("bbox",)) -> None:
        annotations = [
            {"iscrowd": 0, **annotation, "id": number}
            for number, annotation in enumerate(ground_truth["annotations"], start=1)
        ]
        self.kinds = kinds
        self.ground_truth = COCO({**ground_truth, "annotations": annotations})

    def compute(
        self, predictions: Iterable[dict[str, Any]], image_ids: Collection[int] | None = None
    ) -> dict[str, float]:
        """The scores by name, as fractions of 1: box_ap, box_ap50, ..., mask_ap, ..., as SCORES lists them.

        Those of sizes that no object has are absent. Without predictions all are 0.

        Args:
            predictions: as `make_predictions` makes them.
            image_ids: of the images that count, such as those that could be read; None counts all.
        """
        known = set(self.ground_truth.imgs)
        counted = known if image_ids is None else set(image_ids)
        predictions = list(predictions)
        unknown = (counted | {each["image_id"] for each in predictions}) - known
        if unknown:
            raise ValueError(
                f"{len(unknown)} image ids are not in the ground truth, such as {min(unknown)}: predict for its images"
            )
        predictions = [each for each in predictions if each["image_id"] in counted]
        return {name: score for kind in self.kinds for name, score in self._score(predictions, counted, kind).items()}

    def _score(self, predictions: list[dict[str, Any]], image_ids: Collection[int], kind: Kind) -> dict[str, float]:
        region = "bbox" if kind == "bbox" else "segmentation"  # with both, areas would be those of boxes
        found = [{key: each[key] for key in ("image_id", "category_id", "score", region)} for each in predictions]
        evaluation = COCOeval_faster(
            self.ground_truth, self.ground_truth.loadRes(found), kind, print_function=lambda *_: None
        )
        parameters = evaluation.params
        parameters.imgIds = sorted(image_ids)
        parameters.maxDets = [MOST_PREDICTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
        precisions = evaluation.eval["precision"]  # [IoUs, recalls, categories, sizes, 1], -1 where there is no object
        scores = {}
        for name, (size, iou) in SCORES.items():
            of_size = precisions[:, :, :, parameters.areaRngLbl.index(size)]
            selected = of_size if iou is None else of_size[np.isclose(parameters.iouThrs, iou)]
            existing = selected[selected > -1]
            if len(existing):
                scores[f"{PREFIXES[kind]}_{name}"] = float(existing.mean())
        return scores


# --------------------------------------------------------------------------------------------------------
# Predictions
# --------------------------------------------------------------------------------------------------------


def make_predictions(
    image_id: int,
    category_ids: Sequence[int],
    *,
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor,
    masks: Tensor | None = None,
) -> list[dict[str, Any]]:
    """The objects that a model found on an image, as records of COCO's result format.

    Args:
        image_id: of the ground truth.
        category_ids: what the ground truth calls each class, in label order.
        boxes: [n, 4] floating point: left, top, right, bottom in pixels of the original image.
        labels: [n] integer.
        scores: [n] floating point.
        masks: [n, height, width] bool, of the original image.

    Returns:
        for each object image_id, category_id, bbox (left, top, width, height, with two decimals), score and, with
        masks, segmentation.
    """
    sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)  # [n, 4]: left, top, width, height
    records: list[dict[str, Any]] = [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [round(value, 2) for value in box],
            "score": score,
        }
        for box, label, score in zip(sides.double().tolist(), labels.tolist(), scores.tolist(), strict=True)
    ]
    if masks is not None:
        for record, segmentation in zip(records, encode_masks(masks), strict=True):
            record["segmentation"] = segmentation
    return records


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """COCO's compressed run lengths of masks [n, height, width] bool: their height and width, and counts as a text."""
    if not len(masks):
        return []
    stacked = np.asfortranarray(masks.cpu().numpy().astype(np.uint8).transpose(1, 2, 0))  # [height, width, n]
    return [{"size": list(each["size"]), "counts": each["counts"].decode()} for each in mask_api.encode(stacked)]


def write_predictions(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes records of COCO's result format as JSON, a line each, whole or not at all."""
    write_whole(path, "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
