"""COCO 2017, and all data in its format: a folder of images for each split, and a JSON file of their objects."""

import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval import mask as mask_api

from s3a.data.coco_annotations import Annotations, Segmentation, find_corners, read_annotations
from s3a.data.decode import UnreadableImageError
from s3a.data.images import ImageData, Row
from s3a.data.local import hash_content
from s3a.data.objects import ObjectImages
from s3a.data.targets import DecodedTarget, Target, pack_objects
from s3a.support.command_line import read_rank

SMALLEST_IMAGE = 32
"""A training image has so many pixels in height and width at least, as in MMDetection (`filter_cfg`, `min_size`)."""
SMALLEST_BOX = 1.0
"""So has a box that is learned, as in MMDetection's `CocoDataset`."""


class SplitFiles(NamedTuple):
    """Where a split lies, relative to the folder of the data."""

    images: str
    annotations: str


LAYOUTS = (
    (
        SplitFiles("train2017", "annotations/instances_train2017.json"),
        SplitFiles("val2017", "annotations/instances_val2017.json"),
    ),
    (
        SplitFiles("train", "annotations/instances_train.json"),
        SplitFiles("val", "annotations/instances_val.json"),
    ),
    (
        SplitFiles("train", "train/_annotations.coco.json"),
        SplitFiles("valid", "valid/_annotations.coco.json"),
    ),
)
"""Of the training and the validation split: COCO 2017, the same without the year, and Roboflow's."""


@dataclass(frozen=True, eq=False)
class CocoObjects(Target):
    """The objects of an image, as COCO's format has them.

    Attributes:
        labels: [n] int64.
        boxes: [n, 4] float64: left, top, right, bottom in pixels, inside of the image.
        is_crowd: [n] bool.
        segmentations: of each; None where data have boxes alone.
        size: height and width by the annotations; None takes the image's.
    """

    labels: np.ndarray
    boxes: np.ndarray
    is_crowd: np.ndarray
    segmentations: Sequence[Segmentation] | None
    size: tuple[int, int] | None

    def decode(self, height: int, width: int) -> DecodedTarget:
        """The target; without objects whose polygons are so small that no pixel's centre is inside."""
        if self.size is not None and self.size != (height, width):
            raise UnreadableImageError(
                f"it has {height} x {width} pixels, and its annotations are for {self.size[0]} x {self.size[1]}",
                "annotate the image as it is now, or put back the one that was annotated",
            )
        if self.segmentations is None:
            return pack_objects(self.boxes, self.labels, None, self.is_crowd, (height, width))
        masks = decode_masks(self.segmentations, height, width)
        seen = masks.any((1, 2))
        return pack_objects(self.boxes[seen], self.labels[seen], masks[seen], self.is_crowd[seen])


def decode_masks(segmentations: Sequence[Segmentation], height: int, width: int) -> np.ndarray:
    """[n, height, width] uint8: 1 on the object."""
    if not segmentations:
        return np.zeros((0, height, width), np.uint8)
    encoded = [
        {"size": [height, width], "counts": each}
        if isinstance(each, bytes)
        else mask_api.segmToRle(each, width, height)
        for each in segmentations
    ]
    return np.ascontiguousarray(mask_api.decode(encoded).transpose(2, 0, 1))  # [n, height, width]


class CocoImages(ObjectImages):
    """A split of data in COCO's format. Its annotations are arrays, which other processes get as they are.

    Objects with boxes narrower or lower than a pixel are in no target; COCO has a few. Evaluation counts them, as
    COCO's own does.

    Args:
        folder: of the images.
        split: what it is called in messages.
        rows: which of the annotated images belong to it; None takes all.
    """

    def __init__(self, annotations: Annotations, folder: Path, split: str, rows: np.ndarray | None = None) -> None:
        self.annotations, self.folder, self.split = annotations, folder, split
        self.rows = np.arange(len(annotations.image_ids)) if rows is None else rows
        self.num_images = len(self.rows)
        self.image_ids = annotations.image_ids[self.rows].tolist()
        self.category_ids = annotations.category_ids
        self.has_masks = annotations.segmentations is not None
        segmentations: list[Segmentation] | None = [] if self.has_masks else None
        self.blank = CocoObjects(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0, bool), segmentations, None)

    def name_of(self, index: int) -> str:
        return str(self.folder / self.annotations.file_names[self.rows[index]])

    def read_rows(self, indices: list[int]) -> list[Row]:
        return [Row(index, Path(self.name_of(index)), target=self._read_objects(index)) for index in indices]

    def _read_objects(self, index: int) -> CocoObjects:
        held, packed = self.annotations, self.annotations.segmentations
        row = self.rows[index]
        numbers = np.arange(*held.starts[row : row + 2])
        corners = clip_boxes(held.boxes[numbers], held.sizes[[row]])
        large = is_learnable(corners)
        numbers, corners = numbers[large], corners[large]
        height, width = held.sizes[row].tolist()
        return CocoObjects(
            labels=held.labels[numbers],
            boxes=corners,
            is_crowd=held.is_crowd[numbers],
            segmentations=None if packed is None else [packed.read(number) for number in numbers.tolist()],
            size=(height, width),
        )

    def build_ground_truth(self) -> dict[str, Any]:
        held = self.annotations
        names = zip(held.category_ids, held.label_names, strict=True)
        return {
            "images": [
                {
                    "id": held.image_ids[row].item(),
                    "file_name": str(held.file_names[row]),
                    "height": height,
                    "width": width,
                }
                for row, (height, width) in zip(self.rows.tolist(), held.sizes[self.rows].tolist(), strict=True)
            ],
            "categories": [{"id": id_, "name": name} for id_, name in names],
            "annotations": [
                self._describe_annotation(row, number)
                for row in self.rows.tolist()
                for number in range(*held.starts[row : row + 2].tolist())
            ],
        }

    def _describe_annotation(self, row: int, number: int) -> dict[str, Any]:
        """An annotation of an image in COCO's format."""
        held = self.annotations
        annotation: dict[str, Any] = {
            "id": held.ids[number].item(),
            "image_id": held.image_ids[row].item(),
            "category_id": held.category_ids[held.labels[number]],
            "bbox": held.boxes[number].tolist(),
            "area": held.areas[number].item(),
            "iscrowd": int(held.is_crowd[number]),
        }
        if held.segmentations is not None:
            each = held.segmentations.read(number)
            runs = {"size": held.sizes[row].tolist(), "counts": each.decode()} if isinstance(each, bytes) else None
            annotation["segmentation"] = runs or each
        return annotation


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[n, 4]: left, top, right, bottom inside of images of these sizes.

    Args:
        boxes: [n, 4], left, top, width, height.
        sizes: [n or 1, 2], height and width.
    """
    return find_corners(boxes).clip(0, sizes[:, [1, 0, 1, 0]])


def is_learnable(corners: np.ndarray) -> np.ndarray:
    """[n] bool: whether boxes with these corners are as large as those that are learned."""
    return (corners[:, 2:] - corners[:, :2] >= SMALLEST_BOX).all(1)


def load_coco(data_dir: Path) -> ImageData:
    """COCO 2017 or data in its format, in one of LAYOUTS; images are not opened.

    The training split has the images with a side of at least SMALLEST_IMAGE and at least one object that is learned,
    which a crowd is not. The validation split has all.

    Raises:
        FileNotFoundError: where a file or folder is missing.
        ValueError: for annotations that `read_annotations` refuses; where the splits have different categories, or
            masks in one of them alone; where no image can be trained on.
    """
    train_files, val_files = find_layout(data_dir)
    with pause_garbage_collection():
        train, val = (read_annotations(data_dir / files.annotations) for files in (train_files, val_files))
    check_categories(train, val)
    if (train.segmentations is None) != (val.segmentations is None):
        without, other = (train, val) if train.segmentations is None else (val, train)
        raise ValueError(
            f"{without.path} has no segmentations and {other.path} has: leave them out of both, or draw them"
        )
    corners = clip_boxes(train.boxes, train.sizes[train.image_rows])
    small = ~is_learnable(corners)
    warn_of_small(train, small)
    counts = np.bincount(train.image_rows[~small & ~train.is_crowd], minlength=len(train.image_ids))
    rows = np.flatnonzero((counts > 0) & (train.sizes.min(1) >= SMALLEST_IMAGE))
    if not len(rows):
        raise ValueError(
            f"{train.path} has no image to train on: one must have {SMALLEST_IMAGE} pixels in height and width, and "
            "an object that is no crowd; enlarge the images or annotate objects"
        )
    return ImageData(
        CocoImages(train, data_dir / train_files.images, "train", rows),
        CocoImages(val, data_dir / val_files.images, "val"),
        train.label_names,
        hash_content([train.digest, val.digest, *train_files, *val_files]),
    )


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Lets Python make a million of objects, none of them in a circle, without looking through them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def find_layout(data_dir: Path) -> tuple[SplitFiles, SplitFiles]:
    """The first of LAYOUTS of which the folder has a file of annotations; FileNotFoundError where it lacks a part."""
    layouts = "; or ".join(
        " and ".join(f"{files.images}/ with {files.annotations}" for files in layout) for layout in LAYOUTS
    )
    known = f"it must hold {layouts}"
    if not data_dir.is_dir():
        raise FileNotFoundError(f"data folder {str(data_dir)!r} does not exist: {known}")
    for layout in LAYOUTS:
        if any((data_dir / files.annotations).is_file() for files in layout):
            for path in (data_dir / name for files in layout for name in files):
                if not path.exists():
                    raise FileNotFoundError(f"{path} does not exist: put it there; --data-dir is a folder, and {known}")
            return layout
    raise FileNotFoundError(f"data folder {str(data_dir)!r} has no annotations in COCO's format: {known}")


def check_categories(train: Annotations, val: Annotations) -> None:
    """Raises ValueError unless both splits have the same categories."""
    train_named, val_named = (dict(zip(each.category_ids, each.label_names, strict=True)) for each in (train, val))
    for id_ in sorted(train_named.keys() | val_named.keys()):
        name, other = train_named.get(id_), val_named.get(id_)
        if name != other:
            here, there = (repr(each) if each is not None else "absent" for each in (name, other))
            raise ValueError(
                f"category {id_} is {here} in {train.path} and {there} in {val.path}: both splits must list the same "
                "categories, with the same ids and names"
            )


def warn_of_small(annotations: Annotations, small: np.ndarray) -> None:
    """Says which objects have boxes that are too small to be learned."""
    if small.any() and read_rank() == 0:
        first = int(np.flatnonzero(small)[0])
        image = annotations.file_names[annotations.image_rows[first]]
        warnings.warn(
            f"{annotations.path}: {small.sum()} of {len(small)} objects are not trained on, since their boxes are less "
            f"than {SMALLEST_BOX:g} pixel high or wide: the first is annotation {annotations.ids[first]} of {image}",
            stacklevel=3,
        )
