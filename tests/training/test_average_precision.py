"""AP equals that of COCO's own code, and what one can work out by hand."""

import contextlib
import copy
import io
import json
import logging
import warnings

import numpy as np
import pytest
import torch
from pycocotools import mask as oracle_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from s3a.training.average_precision import (
    AveragePrecision,
    encode_masks,
    make_predictions,
    write_predictions,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools

HEIGHT, WIDTH = 200, 240
CATEGORY_IDS = [2, 3, 7, 11, 40, 90]
NAMES = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]


def draw_ellipse(box):
    """[HEIGHT, WIDTH] bool: the ellipse in a box of left, top, width, height."""
    left, top, width, height = box
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return ((columns - left - width / 2) / width * 2) ** 2 + ((rows - top - height / 2) / height * 2) ** 2 < 1


def encode_with_oracle(mask):
    encoded = oracle_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def make_record(image_id, category_id, box):
    """What ground truth and predictions have in common."""
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box,
        "segmentation": encode_with_oracle(draw_ellipse(box)),
    }


def draw_box(rng, largest=5.2):
    width, height = np.exp(rng.uniform(2, largest, 2)).clip(max=[WIDTH, HEIGHT])
    return [
        round(float(value), 2)
        for value in (rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height), width, height)
    ]


def draw_scenes(seed, num_images=25, largest=5.2):
    """Ground truth with crowds, and predictions: objects that moved a little, in other classes at times, and noise."""
    rng = np.random.default_rng(seed)
    ground_truth = {
        "images": [{"id": 10 * i + 3, "height": HEIGHT, "width": WIDTH} for i in range(num_images)],
        "categories": [{"id": id_, "name": str(id_)} for id_ in CATEGORY_IDS],
        "annotations": [],
    }
    predictions = []
    for image in ground_truth["images"]:
        for _ in range(rng.integers(0, 9)):
            box = draw_box(rng, largest)
            object_ = make_record(image["id"], int(rng.choice(CATEGORY_IDS)), box)
            area = int(draw_ellipse(box).sum())
            number = len(ground_truth["annotations"]) + 1
            ground_truth["annotations"].append(
                {"id": number, "area": area, "iscrowd": int(rng.random() < 0.15), **object_}
            )
            for _ in range(rng.integers(0, 4)):
                moved = [round(value + float(rng.normal(0, 0.03 * max(box[2:]))), 2) for value in box]
                moved[2:] = [max(value, 3.0) for value in moved[2:]]
                category_id = object_["category_id"] if rng.random() < 0.8 else int(rng.choice(CATEGORY_IDS))
                predictions.append(
                    {**make_record(image["id"], category_id, moved), "score": round(float(rng.random()), 2)}
                )
    return ground_truth, predictions


def compute_with_oracle(ground_truth, predictions, kind, image_ids=None):
    """The first six numbers of COCO's own evaluation; predicted masks are as large as they are, not as their boxes."""
    left_out = "bbox" if kind == "segm" else "segmentation"
    found = [{key: value for key, value in each.items() if key != left_out} for each in predictions]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:6]


def name_scores(prefix, stats):
    return {f"{prefix}_{name}": value for name, value in zip(NAMES, stats, strict=True) if value > -1}


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_pycocotools(seed):
    ground_truth, predictions = draw_scenes(seed)
    scores = AveragePrecision(ground_truth, ("bbox", "segm")).compute(predictions)
    expected = name_scores("box", compute_with_oracle(ground_truth, predictions, "bbox"))
    expected |= name_scores("mask", compute_with_oracle(ground_truth, predictions, "segm"))
    assert len(expected) == 12 and 0.1 < expected["box_ap"] < 0.9
    assert list(scores) == list(expected)
    assert scores == pytest.approx(expected, abs=1e-9, rel=0)


def test_many_predictions_of_one_class_count_up_to_a_hundred():
    ground_truth, _ = draw_scenes(4, num_images=2)
    rng = np.random.default_rng(0)
    boxes = [draw_box(rng) for _ in range(300)] + [each["bbox"] for each in ground_truth["annotations"]]
    predictions = [
        {"image_id": 3, "category_id": category_id, "bbox": box, "score": float(rng.random())}
        for box in boxes
        for category_id in CATEGORY_IDS[:3]
    ]
    expected = name_scores("box", compute_with_oracle(ground_truth, predictions, "bbox"))
    assert AveragePrecision(ground_truth).compute(predictions) == pytest.approx(expected, abs=1e-9, rel=0)


def test_only_images_that_could_be_read_count():
    ground_truth, predictions = draw_scenes(5)
    read = [image["id"] for image in ground_truth["images"][::2]]
    expected = name_scores("box", compute_with_oracle(ground_truth, predictions, "bbox", read))
    scores = AveragePrecision(ground_truth).compute(predictions, read)
    assert scores == pytest.approx(expected, abs=1e-9, rel=0)
    assert scores != AveragePrecision(ground_truth).compute(predictions)


def test_sizes_that_no_object_has_are_absent():
    ground_truth, predictions = draw_scenes(6, largest=4)
    stats = compute_with_oracle(ground_truth, predictions, "bbox")
    assert stats[5] == -1
    assert "box_ap_large" not in AveragePrecision(ground_truth).compute(predictions)


# --------------------------------------------------------------------------------------------------------
# By hand
# --------------------------------------------------------------------------------------------------------


def score(truth: dict, predictions: list[dict], kinds: tuple[str, ...] = ("bbox",)) -> dict[str, float]:
    return AveragePrecision(truth, kinds).compute(predictions)


def make_truth(*boxes, first_id=1, **keys):
    """Objects of category 2 on image 3."""
    return {
        "images": [{"id": 3, "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 2, "name": "two"}],
        "annotations": [
            {"id": first_id + i, "area": box[2] * box[3], **make_record(3, 2, box), **keys}
            for i, box in enumerate(boxes)
        ],
    }


def predict(*boxes):
    return [{**make_record(3, 2, box), "score": 0.9 - 0.1 * i} for i, box in enumerate(boxes)]


FIRST, SECOND = [0, 0, 20, 20], [100, 100, 20, 20]


@pytest.mark.parametrize("first_id", [0, 1])
def test_perfect_predictions_score_1_whatever_annotations_are_called(first_id):
    truth = make_truth(FIRST, SECOND, first_id=first_id)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score(truth, predict(FIRST, SECOND), ("bbox", "segm"))
    names = [f"{kind}_{name}" for kind in ("box", "mask") for name in NAMES[:4]]
    assert scores == dict.fromkeys(names, 1.0)  # all objects are small


def test_half_of_the_objects_score_half():
    """Precision is 1 up to a recall of 0.5, which are 51 of the 101 points, and 0 above."""
    scores = score(make_truth(FIRST, SECOND), predict(FIRST))
    assert scores["box_ap"] == pytest.approx(51 / 101, abs=1e-12)


def test_a_better_scored_mistake_halves_precision():
    """The second of two predictions is right, so precision is 1/2 at every recall."""
    scores = score(make_truth(FIRST), predict(SECOND, FIRST))
    assert scores["box_ap50"] == pytest.approx(0.5, abs=1e-12)


def test_iou_of_two_thirds_is_right_at_four_of_ten_thresholds():
    """20 x 20 against 20 x 30 pixels: 400 / 600, right at 0.50, 0.55, 0.60 and 0.65."""
    scores = score(make_truth([0, 0, 20, 20]), predict([0, 0, 20, 30]))
    assert scores == pytest.approx({"box_ap": 0.4, "box_ap50": 1.0, "box_ap75": 0.0, "box_ap_small": 0.4}, abs=1e-12)


def test_a_crowd_is_neither_missed_nor_wrong():
    truth = make_truth(FIRST)
    truth["annotations"] += [{**make_truth(SECOND, iscrowd=1)["annotations"][0], "id": 2}]
    assert score(truth, predict(FIRST))["box_ap"] == 1
    assert score(truth, predict([105, 105, 5, 5], FIRST))["box_ap"] == 1
    assert score(truth, predict([50, 50, 5, 5], FIRST))["box_ap"] == pytest.approx(0.5)


def test_without_predictions_the_scores_are_0():
    scores = score(make_truth(FIRST), [], ("bbox", "segm"))
    assert scores == dict.fromkeys([f"{kind}_{name}" for kind in ("box", "mask") for name in NAMES[:4]], 0.0)


def test_one_evaluation_leaves_nothing_to_the_next(capfd, caplog):
    ground_truth, predictions = draw_scenes(7)
    before = copy.deepcopy((ground_truth, predictions))
    caplog.set_level(logging.WARNING)
    average_precision = AveragePrecision(ground_truth, ("bbox", "segm"))
    first = average_precision.compute(predictions)
    average_precision.compute(predictions[:5], image_ids=[3, 13])
    average_precision.compute([])
    assert average_precision.compute(predictions) == first
    assert (ground_truth, predictions) == before
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_predictions_on_unknown_images_are_an_error():
    with pytest.raises(ValueError, match="1 image ids are not in the ground truth, such as 4"):
        score(make_truth(FIRST), [{**predict(FIRST)[0], "image_id": 4}])


# --------------------------------------------------------------------------------------------------------
# Predictions
# --------------------------------------------------------------------------------------------------------


def test_predictions_have_the_format_of_coco(tmp_path):
    masks = torch.zeros(2, 5, 7, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    records = make_predictions(
        42,
        CATEGORY_IDS,
        boxes=torch.tensor([[2.0, 1.0, 6.0, 3.0], [0.123, 0.456, 1.789, 2.0]]),
        labels=torch.tensor([5, 0]),
        scores=torch.tensor([0.5, 0.25]),
        masks=masks,
    )
    for record, mask in zip(records, masks.numpy(), strict=True):
        segmentation = record.pop("segmentation")
        assert isinstance(segmentation["counts"], str) and segmentation["size"] == [5, 7]
        assert np.array_equal(oracle_masks.decode(segmentation), mask)
    assert records == [
        {"image_id": 42, "category_id": 90, "bbox": [2.0, 1.0, 4.0, 2.0], "score": 0.5},
        {"image_id": 42, "category_id": 2, "bbox": [0.12, 0.46, 1.67, 1.54], "score": 0.25},
    ]
    write_predictions(tmp_path / "predictions.json", records)
    assert json.loads((tmp_path / "predictions.json").read_text()) == records
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]


def test_no_predictions_are_an_empty_list(tmp_path):
    nothing = torch.zeros(0)
    records = make_predictions(
        42, CATEGORY_IDS, boxes=torch.zeros(0, 4), labels=nothing.long(), scores=nothing, masks=torch.zeros(0, 5, 7) > 0
    )
    assert records == [] == encode_masks(torch.zeros(0, 5, 7) > 0)
    write_predictions(tmp_path / "predictions.json", records)
    assert json.loads((tmp_path / "predictions.json").read_text()) == []
