"""Detection: objects of images as they were, scored as pycocotools scores them; and the images that the losses see."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.detections import (
    CATEGORIES,
    IMAGES,
    LARGEST,
    MEAN,
    OBJECTS,
    STD,
    TruthDetector,
    evaluate_in_pair,
    evaluate_truth,
    make_coco_content,
    score_with_oracle,
    write_coco,
)
from helpers.ranks import start_pair
from PIL import Image
from pycocotools import mask as oracle_masks
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from s3a.data import Batch
from s3a.data.batches import Sample, stack_batch
from s3a.data.coco import load_coco
from s3a.data.pixels import PixelNormalizer
from s3a.training.dense_recipe import DetectionRecipe
from s3a.training.named_recipes import DETECTION_RECIPES
from s3a.training.tasks.dense_transforms import list_buckets
from s3a.training.tasks.detection import Detection, DetectionLoss

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """COCO data whose ids follow no order: five images of four sizes, one of them without objects."""
    return write_coco(tmp_path / "coco")


@pytest.fixture
def task(folder: Path) -> Detection:
    """On that data."""
    return Detection(load_coco(folder))


# --------------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_truth_scores_1(task, batch_size):
    """Each image is resized and padded; its boxes and masks are those of the image as it was."""
    found = evaluate_truth(task, TruthDetector(), batch_size)
    assert found.images == 5
    for name in ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"):
        assert found.scores[name] == pytest.approx(1, abs=1e-9), name


def test_predictions_are_written_in_the_format_of_coco(task, tmp_path):
    """By rising image id; pixels, ids and runs of the masks are those of the annotations."""
    found = evaluate_truth(task, TruthDetector(), 2)
    task.write_records(tmp_path, found.records)
    written = json.loads((tmp_path / "predictions.json").read_text())
    wanted = sorted(make_coco_content()["annotations"], key=lambda each: each["image_id"])
    assert [each["image_id"] for each in written] == [each["image_id"] for each in wanted]
    assert len(written) == 5
    for record, annotation in zip(written, wanted, strict=True):
        assert list(record) == ["image_id", "category_id", "bbox", "score", "segmentation"]
        assert record["category_id"] == annotation["category_id"]
        assert record["bbox"] == pytest.approx(annotation["bbox"], abs=0.01)
        mask = oracle_masks.decode(record["segmentation"])
        left, top, width, height = map(int, annotation["bbox"])
        filled = np.zeros_like(mask)
        filled[top : top + height, left : left + width] = 1
        assert np.array_equal(mask, filled)


@pytest.mark.parametrize("shift", [2.0, 5.0])
def test_shifted_predictions_score_what_pycocotools_says(task, tmp_path, shift):
    found = evaluate_truth(task, TruthDetector(shift=shift, confused=True), 3)
    task.write_records(tmp_path, found.records)
    for prefix, kind in (("box", "bbox"), ("mask", "segm")):
        scores = [found.scores[f"{prefix}_{name}"] for name in ("ap", "ap50")]
        assert scores == pytest.approx(score_with_oracle(make_coco_content(), tmp_path / "predictions.json", kind))
        assert 0.02 < scores[0] < 0.98


def test_an_image_is_seen_without_its_neighbours(task, folder):
    """Resized, normalised, and padded with zeros up to multiples of 32, whatever else is in the batch."""
    for batch_size in (1, 2, 5):
        model = TruthDetector()
        evaluate_truth(task, model, batch_size)
        assert len(model.seen) == 5
        for index, (seen, size) in model.seen.items():
            with Image.open(folder / "val" / f"{index}.png") as image:
                factor = min(LARGEST[0] / min(image.size), LARGEST[1] / max(image.size))
                height, width = (int(side * factor + 0.5) for side in (image.height, image.width))
                pixels = F.pil_to_tensor(F.resize(image, [height, width], antialias=True)) / 255
            assert size == (height, width)
            assert seen.shape[1:] == (-(-height // 32) * 32, -(-width // 32) * 32)
            normalised = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
            assert torch.allclose(seen[:, :height, :width], normalised, atol=1e-6)
            assert not seen[:, height:].any() and not seen[:, :, width:].any()


def test_images_that_cannot_be_read_do_not_count(folder, tmp_path):
    """Neither as missed objects, nor by what is found where they should be."""
    (folder / "val" / "0.png").write_bytes(b"")
    task = Detection(load_coco(folder))
    found = evaluate_truth(task, TruthDetector(), 2)
    assert found.scores["box_ap"] == found.scores["mask_ap"] == pytest.approx(1)
    assert (found.images, list(found.unreadable)) == (4, [str(folder / "val" / "0.png")])
    task.write_records(tmp_path, found.records)
    content = make_coco_content()
    broken, *others = [image["id"] for image in content["images"]]
    written = json.loads((tmp_path / "predictions.json").read_text())
    assert {each["image_id"] for each in written} < set(others) and broken not in others
    shifted = evaluate_truth(task, TruthDetector(shift=3.0), 2)
    task.write_records(tmp_path, shifted.records)
    expected = score_with_oracle(content, tmp_path / "predictions.json", "bbox", others)[0]
    assert shifted.scores["box_ap"] == pytest.approx(expected)


def test_where_nothing_is_found_the_scores_are_0(task, tmp_path):
    found = evaluate_truth(task, TruthDetector(finds=False), 2)
    assert {found.scores[f"{kind}_{name}"] for kind in ("box", "mask") for name in ("ap", "ap50", "ap75")} == {0.0}
    task.write_records(tmp_path, found.records)
    assert json.loads((tmp_path / "predictions.json").read_text()) == []


@pytest.mark.parametrize("finds", [True, False])
def test_where_no_image_that_counts_has_objects_ap_is_0(tmp_path, finds):
    """COCO's own evaluation gives no number then. The one image with objects cannot be read."""
    content = make_coco_content()
    annotations = [each for each in content["annotations"] if each["image_id"] == 70]
    folder = write_coco(tmp_path / "coco", val={**content, "annotations": annotations})
    (folder / "val" / "0.png").write_bytes(b"")
    found = evaluate_truth(Detection(load_coco(folder)), TruthDetector(finds=finds), 2)
    assert (found.scores, found.images) == ({"box_ap": 0.0}, 4)


def test_a_detector_without_masks_is_scored_by_its_boxes(task, tmp_path):
    found = evaluate_truth(task, TruthDetector(draws=False), 2)
    assert found.scores["box_ap"] == pytest.approx(1)
    assert not [name for name in found.scores if name.startswith("mask")]
    task.write_records(tmp_path, found.records)
    assert "segmentation" not in json.loads((tmp_path / "predictions.json").read_text())[0]


def test_masks_of_a_model_are_not_scored_where_the_data_have_none(tmp_path):
    content = make_coco_content()
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    task = Detection(load_coco(write_coco(tmp_path / "coco", train=content, val=content)))
    found = evaluate_truth(task, TruthDetector(), 2)
    assert found.scores["box_ap"] == pytest.approx(1)
    assert not [name for name in found.scores if name.startswith("mask")]


def test_the_ground_truth_is_indexed_once_in_a_run(task, monkeypatch):
    """Of COCO it takes seconds."""
    calls = []
    build = task.val.build_ground_truth
    monkeypatch.setattr(task.val, "build_ground_truth", lambda: calls.append(0) or build())
    first = evaluate_truth(task, TruthDetector(shift=2.0), 2)
    assert evaluate_truth(task, TruthDetector(), 2).scores["box_ap"] == pytest.approx(1)
    assert evaluate_truth(task, TruthDetector(shift=2.0), 5).scores == first.scores
    assert len(calls) == 1


def test_two_processes_score_as_one(task, folder, tmp_path):
    """The records of both are gathered on the main one, those of padding left out; the other is told the scores."""
    assert start_pair(evaluate_in_pair, folder, 3.0, tmp_path / "report") == [0, 0]
    first, second = (json.loads((tmp_path / f"report.{rank}").read_text()) for rank in range(2))
    alone = evaluate_truth(task, TruthDetector(3.0, confused=True), 2)
    assert sorted(first["ids"]) == sorted(IMAGES)
    assert second["ids"] == []
    assert first["scores"] == second["scores"] == alone.scores
    assert first["images"] == second["images"] == 5


def test_examples_show_what_is_there_and_what_is_found(task, folder, tmp_path, monkeypatch):
    """Each image beside its objects and what is found with a score above one half, in pixels of the image as it was."""
    (folder / "val" / "1.png").write_bytes(b"")
    painted, paint = [], task.paint

    def note(example, objects, colors):
        painted.append((example.image.size, objects["boxes"].tolist(), objects["labels"].tolist()))
        return paint(example, objects, colors)

    monkeypatch.setattr(task, "paint", note)
    config = {"input_size": (3, *LARGEST), "mean": MEAN, "std": STD, "interpolation": "bilinear"}
    assert task.draw_examples(TruthDetector(), config, tmp_path / "examples.png")
    with Image.open(tmp_path / "examples.png") as picture:
        picture.load()
    names = sorted(CATEGORIES)
    for place, image_id in enumerate((70, 12, 33, 1)):  # 7 cannot be read
        (size, boxes, labels), (_, found, found_labels) = painted[2 * place : 2 * place + 2]
        objects = [(category, box) for owner, category, box in OBJECTS if owner == image_id]
        corners = [[x, y, x + width, y + height] for _, (x, y, width, height) in objects]
        assert size == IMAGES[image_id][::-1]
        assert boxes == corners
        assert labels == [names.index(category) for category, _ in objects]
        assert np.allclose(found, corners[:1], atol=1e-3), "the second one of image 70 scores 0.4"
        assert found_labels == labels[:1]
    assert len(painted) == 8


# --------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------


class SeenBatch(nn.Module):
    """Notes what the losses are computed of."""

    def forward(self, images: Tensor, sizes: list, targets: list) -> dict[str, Tensor]:
        self.images, self.sizes, self.targets = images, sizes, targets
        return {"class": images.new_tensor(0.5), "box": images.new_tensor(0.25)}


def make_sample(height: int, width: int, number: int, masks: bool = True) -> Sample:
    """A gray image, and so many objects that fill its left half."""
    filled = torch.zeros(number, height, width, dtype=torch.uint8)
    filled[:, :, : width // 2] = 1
    target = {
        "boxes": torch.tensor([[0.0, 0.0, width // 2, height]] * number).view(-1, 4),
        "labels": torch.arange(number),
        "is_crowd": torch.zeros(number, dtype=torch.bool),
        "size": torch.tensor([height, width]),
    }
    pixels = torch.full((3, height, width), 100, dtype=torch.uint8)
    return pixels, {**target, "masks": filled} if masks else target


def pass_batch(samples: list[Sample], buckets: list[tuple[int, int]]) -> SeenBatch:
    """What the model sees of a batch with these samples."""
    count = len(samples)
    batch: Batch = stack_batch(samples, [0] * count, list(range(count)), {})
    seen = SeenBatch()
    loss = DetectionLoss(buckets)(seen, PixelNormalizer(MEAN, STD)(batch))
    assert loss.item() == 0.75, "the sum of the losses"
    return seen


def test_padding_is_0_behind_the_normalisation():
    seen = pass_batch([make_sample(40, 70, 1), make_sample(50, 33, 2)], [])
    assert seen.images.shape == (2, 3, 64, 96)
    assert seen.sizes == [(40, 70), (50, 33)]
    expected = (torch.full((3,), 100 / 255) - torch.tensor(MEAN)) / torch.tensor(STD)
    for image, (height, width) in zip(seen.images, seen.sizes, strict=True):
        assert torch.allclose(image[:, :height, :width], expected[:, None, None].expand(3, height, width))
        assert not image[:, height:].any() and not image[:, :, width:].any()


def test_targets_are_those_of_the_padded_image():
    seen = pass_batch([make_sample(40, 70, 1), make_sample(50, 33, 2)], [])
    for target, number, (height, width) in zip(seen.targets, (1, 2), seen.sizes, strict=True):
        assert set(target) == {"boxes", "labels", "masks"}
        assert target["boxes"].tolist() == [[0, 0, width // 2, height]] * number
        assert target["labels"].tolist() == list(range(number))
        assert target["masks"].shape == (number, 64, 96)
        assert target["masks"][:, :height, : width // 2].all()
        assert target["masks"].sum() == number * height * (width // 2)


def test_images_without_objects_and_objects_without_masks():
    seen = pass_batch([make_sample(32, 32, 0), make_sample(32, 32, 2)], [])
    assert [target["boxes"].shape for target in seen.targets] == [(0, 4), (2, 4)]
    assert [target["masks"].shape for target in seen.targets] == [(0, 32, 32), (2, 32, 32)]
    seen = pass_batch([make_sample(32, 32, 0, masks=False), make_sample(32, 32, 2, masks=False)], [])
    assert all(set(target) == {"boxes", "labels"} for target in seen.targets)


@pytest.mark.parametrize(
    ("sizes", "padded"),
    [
        ([(800, 1333), (800, 1067)], (800, 1344)),  # landscapes
        ([(480, 640)], (800, 1344)),
        ([(1333, 800), (1067, 800)], (1344, 800)),  # portraits
        ([(800, 1333), (1333, 800)], (1344, 1344)),
        ([(800, 800)], (800, 1344)),
    ],
)
def test_a_compiled_run_sees_three_sizes(sizes, padded):
    """Since each has code of its own."""
    recipe: DetectionRecipe = DETECTION_RECIPES["ssvit_small_mask_rcnn_3x_coco"]()
    buckets = list_buckets(max(recipe.short_sides), recipe.long_side)
    assert len(buckets) == 3
    seen = pass_batch([make_sample(height, width, 1) for height, width in sizes], buckets)
    assert seen.images.shape[2:] == padded
    assert seen.targets[0]["masks"].shape[1:] == padded
    assert seen.sizes == sizes


@pytest.mark.parametrize("given", [True, False])
def test_only_a_compiled_run_has_buckets(task, given):
    recipe = dataclasses.replace(DETECTION_RECIPES["mask_rcnn_scenes"](), compile=given)
    assert bool(task.make_loss(recipe).buckets) is given


def test_heads_with_masks_are_refused_for_data_without(tmp_path):
    content = make_coco_content()
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    task = Detection(load_coco(write_coco(tmp_path / "coco", train=content, val=content)))
    recipe = dataclasses.replace(DETECTION_RECIPES["ssvit_tiny_mask_rcnn_1x_coco"](), weights=None)
    with pytest.raises(ValueError, match=r"--head is mask_rcnn, and the objects of --data coco have no masks: use ret"):
        task.check_recipe(recipe, 2)
    task.check_recipe(dataclasses.replace(recipe, head="retinanet"), 2)
