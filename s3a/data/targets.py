"""What dense tasks predict of an image: encoded in its row, and decoded in a worker, to be moved with the image.

A decoded target is a dict of tensors, those that lie on the image as torchvision's tv_tensors: its transforms (v2) move
boxes, masks and label maps as they move the image.

    label maps      label_map    tv_tensors.Mask [height, width] uint8: the class of each pixel, or IGNORED
    objects         boxes        tv_tensors.BoundingBoxes [n, 4] float32: left, top, right, bottom in pixels
                    labels       [n] int64: the class of each object
                    masks        tv_tensors.Mask [n, height, width] uint8: 1 on the object; absent where data have none
                    is_crowd     [n] bool: whether it stands for many objects, which training leaves out
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

IGNORED = 255
"""In a label map: a pixel of no class, which neither trains nor counts."""

DecodedTarget = dict[str, Tensor]


class Target(ABC):
    """What a dense task predicts of an image."""

    @abstractmethod
    def decode(self, height: int, width: int) -> DecodedTarget:
        """The target of an image of this size.

        Raises:
            UnreadableImageError: where it cannot be decoded, or is of another size.
        """


@dataclass(frozen=True, eq=False)
class LabelMap(Target):
    """The class of each pixel, in memory.

    Attributes:
        labels: [height, width] uint8; None is a map of the image's size with IGNORED everywhere.
    """

    labels: np.ndarray | None = None

    def decode(self, height: int, width: int) -> DecodedTarget:
        labels = np.full((height, width), IGNORED, np.uint8) if self.labels is None else self.labels
        return {"label_map": tv_tensors.Mask(torch.from_numpy(labels))}


@dataclass(frozen=True, eq=False)
class Objects(Target):
    """The objects of an image, in memory.

    Attributes:
        labels: the class of each.
        masks: of each, [height, width] bool, without a pixel that another one hides.
        boxes: of each, left, top, right, bottom; None takes those that its mask fills.
    """

    labels: Sequence[int] = ()
    masks: Sequence[np.ndarray] = ()
    boxes: Sequence[Sequence[float]] | None = None

    def decode(self, height: int, width: int) -> DecodedTarget:
        masks = np.zeros((len(self.labels), height, width), np.uint8)
        for mask, filled in zip(masks, self.masks, strict=True):
            mask[filled] = 1
        boxes = [find_box(mask) for mask in masks] if self.boxes is None else self.boxes
        return pack_objects(boxes, self.labels, masks, np.zeros(len(self.labels), bool))


def pack_objects(
    boxes: Sequence[Sequence[float]] | np.ndarray,
    labels: Sequence[int] | np.ndarray,
    masks: np.ndarray | None,
    is_crowd: np.ndarray,
    size: tuple[int, int] | None = None,
) -> DecodedTarget:
    """The decoded target of n objects.

    Args:
        boxes: [n, 4].
        masks: [n, height, width] uint8; None where objects have boxes alone: then the target has no masks either.
        is_crowd: [n] bool.
        size: height and width of the image; None takes those of the masks.
    """
    size = masks.shape[1:] if size is None and masks is not None else size
    assert size is not None
    corners = torch.as_tensor(np.asarray(boxes, np.float32).reshape(-1, 4))
    target: DecodedTarget = {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size),
        "labels": torch.as_tensor(np.asarray(labels, np.int64)),
    }
    if masks is not None:
        target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
    return target | {"is_crowd": torch.from_numpy(is_crowd)}


def find_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest box around a mask [height, width]: left, top, and exclusive right and bottom; 0 for an empty one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# --------------------------------------------------------------------------------------------------------
# Batches of them
# --------------------------------------------------------------------------------------------------------


class JoinedTargets(TypedDict):
    """The decoded targets of a batch: few tensors, since a worker hands each one over with a file descriptor."""

    flat: dict[str, Tensor]
    """by name, all images' values behind each other: [values]"""
    shapes: dict[str, list[list[int]]]
    """by name, the shape of each image's tensor"""


def join_targets(targets: Sequence[DecodedTarget]) -> JoinedTargets | None:
    """The targets of a batch as one; None where there are none."""
    if not targets:
        return None
    return JoinedTargets(
        flat={name: torch.cat([each[name].as_subclass(Tensor).flatten() for each in targets]) for name in targets[0]},
        shapes={name: [list(each[name].shape) for each in targets] for name in targets[0]},
    )


def split_targets(joined: JoinedTargets) -> list[DecodedTarget]:
    """The targets of each image of a batch, as plain tensors."""
    columns = []
    for name, flat in joined["flat"].items():
        shapes = joined["shapes"][name]
        parts = flat.split([prod(shape) for shape in shapes])
        columns.append([(name, part.view(shape)) for part, shape in zip(parts, shapes, strict=True)])
    return [dict(target) for target in zip(*columns, strict=True)]
