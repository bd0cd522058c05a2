"""Targets as torchvision's transforms move them, and as batches carry them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from s3a.data import EvalLoader, TrainLoader
from s3a.data.decode import UnreadableImageError
from s3a.data.images import MapImages, Row
from s3a.data.targets import IGNORED, LabelMap, Objects, Target, find_box, pack_objects, split_targets


def make_masks(seed, count=4, height=20, width=30):
    """Rectangles anywhere, [count, height, width] bool."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, height, width), bool)
    for mask in masks:
        row, column = rng.integers(height - 4), rng.integers(width - 6)
        mask[row : row + rng.integers(1, 5), column : column + rng.integers(1, 7)] = True
    return masks


def test_a_label_map_keeps_its_numbers():
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    decoded = LabelMap(labels).decode(3, 4)["label_map"]
    assert isinstance(decoded, tv_tensors.Mask)
    assert decoded.dtype == torch.uint8
    assert decoded.tolist() == labels.tolist()


def test_a_blank_label_map_is_ignored_everywhere():
    decoded = LabelMap().decode(3, 4)["label_map"]
    assert decoded.shape == (3, 4)
    assert (decoded == IGNORED).all()


def test_objects_have_the_boxes_that_their_masks_fill():
    masks = make_masks(0)
    decoded = Objects([3, 1, 4, 1], list(masks)).decode(20, 30)
    expected = masks_to_boxes(torch.from_numpy(masks)) + torch.tensor([0.0, 0, 1, 1])  # torchvision's are inclusive
    assert torch.equal(decoded["boxes"], expected)
    assert decoded["boxes"].format is tv_tensors.BoundingBoxFormat.XYXY
    assert decoded["boxes"].canvas_size == (20, 30)
    assert decoded["labels"].tolist() == [3, 1, 4, 1]
    assert decoded["masks"].dtype == torch.uint8
    assert np.array_equal(decoded["masks"].numpy(), masks)
    assert decoded["is_crowd"].tolist() == [False] * 4


def test_objects_may_have_boxes_of_their_own():
    boxes = [[1.5, 2, 3, 4.25]]
    decoded = Objects([0], [make_masks(0, 1)[0]], boxes).decode(20, 30)
    assert decoded["boxes"].tolist() == boxes


def test_an_image_without_objects_has_empty_tensors():
    decoded = Objects().decode(20, 30)
    assert {key: tuple(value.shape) for key, value in decoded.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, 20, 30),
        "is_crowd": (0,),
    }
    assert decoded["labels"].dtype == torch.int64
    assert decoded["boxes"].dtype == torch.float32


def test_the_box_of_an_empty_mask_is_empty():
    assert find_box(np.zeros((4, 5), bool)) == (0, 0, 0, 0)
    corner = np.zeros((4, 5), bool)
    corner[3, 4] = True
    assert find_box(corner) == (4, 3, 5, 4)


def test_crowds_are_marked():
    decoded = pack_objects(np.zeros((2, 4)), [0, 1], np.zeros((2, 3, 5), np.uint8), np.array([False, True]))
    assert decoded["is_crowd"].tolist() == [False, True]


def test_transforms_move_targets_with_their_image():
    """An image whose pixels are its label map: whatever v2 does to both, they stay alike."""
    labels = np.random.default_rng(0).integers(0, 200, (40, 60)).astype(np.uint8)
    transform = v2.Compose([v2.PILToTensor(), v2.RandomHorizontalFlip(1), v2.RandomCrop(24), v2.Pad((0, 3), fill=0)])
    image, target = transform(Image.fromarray(labels), LabelMap(labels).decode(40, 60))
    assert image.shape == (1, 30, 24)
    assert torch.equal(image[0], target["label_map"])


def test_boxes_move_with_their_masks():
    masks = make_masks(1)
    transform = v2.Compose([v2.RandomHorizontalFlip(1), v2.Pad((5, 7)), v2.RandomVerticalFlip(1)])
    _, target = transform(Image.new("RGB", (30, 20)), Objects([0] * 4, list(masks)).decode(20, 30))
    assert torch.equal(target["boxes"], masks_to_boxes(target["masks"]) + torch.tensor([0.0, 0, 1, 1]))


# --------------------------------------------------------------------------------------------------------
# In batches
# --------------------------------------------------------------------------------------------------------


class Unreadable(Target):
    """A target that is damaged."""

    def decode(self, height, width):
        raise UnreadableImageError("it is damaged")


class Shades(MapImages):
    """Image i is full of i, [4 + i, 6], and so is its label map; those of `broken` cannot be decoded."""

    split, num_images, blank = "train", 8, LabelMap()

    def __init__(self, broken=()):
        self.broken = broken

    def name_of(self, index):
        return f"shade {index}"

    def read_rows(self, indices):
        rows = []
        for index in indices:
            labels = np.full((4 + index, 6), index, np.uint8)
            file = io.BytesIO()
            Image.fromarray(labels).save(file, "PNG")
            target = Unreadable() if index in self.broken else LabelMap(labels)
            rows.append(Row(index, {"bytes": file.getvalue(), "path": None}, target=target))
        return rows


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_carry_the_targets_of_their_images(num_workers):
    loader = TrainLoader(Shades(), v2.PILToTensor(), channels=1, batch_size=4, seed=0, num_workers=num_workers)
    seen = [batch for [batch] in loader.epoch(0)]
    assert sorted(index for batch in seen for index in batch.indices.tolist()) == [*range(8)]
    for batch in seen:
        assert batch.images.shape == (4, 1, 4 + batch.indices.max(), 6)  # of the tallest
        for image, target, index in zip(
            batch.images, split_targets(batch.targets), batch.indices.tolist(), strict=True
        ):
            assert target["label_map"].shape == (4 + index, 6)
            assert (target["label_map"] == index).all()
            assert (image[0, : 4 + index] == index).all()
            assert (image[0, 4 + index :] == 0).all()


def test_a_target_that_cannot_be_read_is_as_an_image_that_cannot():
    loader = TrainLoader(Shades(broken=(3,)), v2.PILToTensor(), channels=1, batch_size=8, seed=0)
    [[batch]] = loader.epoch(0)
    assert batch.unreadable == {"shade 3": "it is damaged"}
    assert sorted(batch.indices.tolist()) == [0, 1, 2, 4, 4, 5, 6, 7]
    [batch] = EvalLoader(Shades(broken=(3,)), v2.PILToTensor(), channels=1, batch_size=8)
    assert batch.unreadable == {"shade 3": "it is damaged"}
    assert batch.labels.tolist() == [0, 0, 0, -1, 0, 0, 0, 0]
    assert (split_targets(batch.targets)[3]["label_map"] == IGNORED).all()
