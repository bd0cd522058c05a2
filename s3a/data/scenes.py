"""Scenes with exact targets for dense tasks: small pictures of objects over crops of scikit-learn's two photographs.

The objects are scikit-learn's handwritten digits, or the clothes of Fashion-MNIST. Training and validation have digits
and clothes of their own, and parts of the photographs of their own. Nothing is stored: a scene is drawn when its row is
read, and follows from the split and the row's number alone.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, radians, sin
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sklearn.datasets
from faster_coco_eval.core import mask as rle
from PIL import Image
from sklearn.model_selection import train_test_split
from torchvision.datasets import FashionMNIST

from s3a.data.images import ImageData, MapImages, Row
from s3a.data.local import (
    FASHION_MNIST_FOLDER,
    IDX_NAMES,
    SPLITS,
    find_idx,
    hash_content,
    parse_idx,
    read_unzipped,
)
from s3a.data.objects import ObjectImages
from s3a.data.targets import LabelMap, Objects, Target, find_box

TRAIN_PART = 0.75
"""So much of each photograph's width, on the left, is for training; the rest for validation."""
TRIES = 20
"""Places that are tried for an object before it is left out."""


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """What scenes look like, and how many there are.

    Attributes:
        side: of the square image, in pixels.
        num_train, num_val: scenes of each split.
        fewest, most: objects that a scene is given; those that find no place are left out.
        sides: the smallest and the largest side of an object's picture, before it is rotated.
        turn: the largest rotation either way, in degrees.
        visible: the part of each object's pixels that those in front of it leave, at least.
        gap: rows and columns that stay free around each object; None lets objects touch and hide each other.
        brightness: what the gray values of the photographs are multiplied by.
        level: the gray that objects are painted with, where their pictures are how opaque they are; None shows the
            grays of their pictures, in which 0 is what does not belong to the object.
    """

    side: int = 128
    num_train: int = 1500
    num_val: int = 200
    fewest: int = 2
    most: int = 4
    sides: tuple[int, int] = (44, 60)
    turn: float = 10.0
    visible: float = 1.0
    gap: int | None = 4
    brightness: float = 0.6
    level: int | None = 255

    def __post_init__(self) -> None:
        if not 1 <= self.fewest <= self.most <= 255:
            raise ValueError(
                f"fewest is {self.fewest} and most {self.most}: a scene has 1 to 255 objects, and fewest is the smaller"
            )
        largest = self.sides[1] * (cos(radians(self.turn)) + sin(radians(self.turn))) + 2  # Pillow rounds up
        if not 1 <= self.sides[0] <= self.sides[1] or not 0 <= self.turn <= 45 or largest > self.side:
            raise ValueError(
                f"sides are {self.sides}, turn {self.turn} and side {self.side}: rotated by turn (0 to 45 degrees), "
                "pictures of the sides (smallest, largest) must fit into a square of side; make the sides smaller"
            )
        if (self.gap or 0) < 0 or not 0 < self.brightness <= 1:
            raise ValueError(
                f"gap is {self.gap} and brightness {self.brightness}: the gap is 0 or more rows and columns, or None, "
                "and the brightness above 0 and at most 1"
            )


DIGIT_SCENES = SceneSettings()
FASHION_SCENES = SceneSettings(
    side=256,
    num_train=20_000,
    num_val=1000,
    fewest=2,
    most=10,
    sides=(40, 96),
    turn=20.0,
    visible=0.75,
    gap=None,
    brightness=1.0,
    level=None,
)


class Pictures(NamedTuple):
    """What scenes are made of, in one split."""

    photographs: Sequence[np.ndarray]
    """each [height, width, 3] uint8"""
    objects: np.ndarray
    """[n, height, width] uint8"""
    labels: np.ndarray
    """[n]: the class of each object"""


class Scene(NamedTuple):
    """A drawn scene of n objects."""

    image: Image.Image
    owners: np.ndarray
    """[side, side] uint8: 1 to n where an object is seen, the last in front of all; 0 is background"""
    labels: list[int]
    """of the objects 1 to n"""


class Sprite(NamedTuple):
    """An object as it is laid over a scene, [height, width] each."""

    opacity: np.ndarray
    """float32, from 0 to 1"""
    paint: np.ndarray
    """float32: the gray that is added, from 0 to 255, and 0 where nothing is opaque"""
    mask: np.ndarray
    """bool: what counts as the object"""


class Canvas:
    """A scene while objects are laid over it.

    Args:
        background: [side, side, 3] uint8.
        visible, gap: see `SceneSettings`.
    """

    def __init__(self, background: np.ndarray, visible: float, gap: int | None) -> None:
        self.visible, self.gap = visible, gap
        self.pixels = background.transpose(2, 0, 1).copy()  # [3, side, side], which numpy blends in half the time
        self.owners = np.zeros(background.shape[:2], np.uint8)
        self.blocked = np.zeros(background.shape[:2], bool)  # where no other object may be, for the gap
        self.labels: list[int] = []
        self.areas = np.zeros(0, np.int64)  # of each object, and what is seen of it
        self.seen = np.zeros(0, np.int64)

    def lay_over(self, sprite: Sprite, label: int, rng: np.random.Generator) -> None:
        """Lays an object over the scene where others leave it room, or leaves it out."""
        height, width = sprite.mask.shape
        area = np.count_nonzero(sprite.mask)
        for _ in range(TRIES if area else 0):
            row, column = (
                int(rng.integers(self.owners.shape[axis] - size + 1)) for axis, size in enumerate((height, width))
            )
            place = ..., slice(row, row + height), slice(column, column + width)
            hidden = np.bincount(self.owners[place][sprite.mask], minlength=len(self.areas) + 1)[1:]
            is_free = not np.any(self.blocked[place][sprite.mask])
            if is_free and np.all(self.seen - hidden >= self.visible * self.areas):
                break
        else:
            return
        self.labels.append(label)
        self.areas, self.seen = np.append(self.areas, area), np.append(self.seen - hidden, area)
        self.owners[place][sprite.mask] = len(self.labels)
        if self.gap is not None:
            self.blocked = widen(self.owners > 0, self.gap)
        blended = self.pixels[place] * (1 - sprite.opacity) + sprite.paint
        self.pixels[place] = np.minimum(blended, 255).round()

    def finish(self) -> Scene:
        """What was drawn."""
        image = Image.fromarray(np.ascontiguousarray(self.pixels.transpose(1, 2, 0)))
        return Scene(image, self.owners, self.labels)


@dataclass(frozen=True, eq=False)
class SceneRenderer:
    """Draws the scenes of a split."""

    settings: SceneSettings
    pictures: Pictures
    split: str

    def render(self, number: int) -> Scene:
        """The scene of a row."""
        settings = self.settings
        rng = np.random.default_rng((SPLITS.index(self.split), number))
        canvas = Canvas(self._draw_background(rng), settings.visible, settings.gap)
        for _ in range(rng.integers(settings.fewest, settings.most + 1)):
            which = int(rng.integers(len(self.pictures.objects)))
            canvas.lay_over(self._draw_sprite(which, rng), int(self.pictures.labels[which]), rng)
        return canvas.finish()

    def _draw_background(self, rng: np.random.Generator) -> np.ndarray:
        """A square of a photograph at the scene's size, [side, side, 3]; enlarged only where that is small."""
        side = self.settings.side
        photograph = self.pictures.photographs[int(rng.integers(len(self.pictures.photographs)))]
        height, width, _ = photograph.shape
        shorter = min(height, width)
        size = int(rng.integers(min(side, shorter), shorter + 1))
        row, column = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
        square = Image.fromarray(photograph[row : row + size, column : column + size])
        background = np.asarray(square.resize((side, side), Image.Resampling.BILINEAR))
        return (background * np.float32(self.settings.brightness)).round().astype(np.uint8)

    def _draw_sprite(self, which: int, rng: np.random.Generator) -> Sprite:
        """An object, scaled and rotated."""
        smallest, largest = self.settings.sides
        side, turn = int(rng.integers(smallest, largest + 1)), rng.uniform(-self.settings.turn, self.settings.turn)
        picture = self.pictures.objects[which]
        if self.settings.level is None:
            filled = scale_and_rotate(np.where(picture > 0, np.uint8(255), np.uint8(0)), side, turn)
            paint = scale_and_rotate(picture, side, turn)
            return Sprite(filled / np.float32(255), paint.astype(np.float32), filled > 127)
        filled = scale_and_rotate(picture, side, turn)
        opacity = np.minimum(filled * np.float32(1.5 / 255), 1)  # strokes are opaque to behind their middle
        return Sprite(opacity, opacity * self.settings.level, filled > 127)


def widen(mask: np.ndarray, margin: int) -> np.ndarray:
    """A mask [height, width] with all pixels that are at most so many rows and columns away from one of its own."""
    for _ in range(2):  # along the rows, and along the columns
        wider = mask.copy()
        for shift in range(1, margin + 1):
            wider[shift:] |= mask[:-shift]
            wider[:-shift] |= mask[shift:]
        mask = wider.T
    return mask


def scale_and_rotate(picture: np.ndarray, side: int, turn: float) -> np.ndarray:
    """A picture [height, width] uint8 at side x side, rotated by `turn` degrees, and 0 in the corners around it."""
    scaled = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(scaled.rotate(turn, Image.Resampling.BILINEAR, expand=True))  # smooth enough, at half the cost


# --------------------------------------------------------------------------------------------------------
# Splits
# --------------------------------------------------------------------------------------------------------


class SceneRows(MapImages):
    """A split of scenes: what those of all targets have in common."""

    def __init__(self, renderer: SceneRenderer) -> None:
        self.renderer, self.split = renderer, renderer.split
        settings = renderer.settings
        self.num_images = settings.num_train if self.split == "train" else settings.num_val

    def name_of(self, index: int) -> str:
        return f"scene {index} of {self.split}"

    def read_rows(self, indices: list[int]) -> list[Row]:
        scenes = ((index, self.renderer.render(index)) for index in indices)
        return [Row(index, scene.image, target=self.make_target(scene)) for index, scene in scenes]

    @abstractmethod
    def make_target(self, scene: Scene) -> Target:
        """What is to be predicted of a scene."""


class SceneImages(SceneRows):
    """Scenes with label maps: 0 is background, then the objects' classes."""

    blank = LabelMap()

    def make_target(self, scene: Scene) -> LabelMap:
        return LabelMap(np.array([0, *(1 + label for label in scene.labels)], np.uint8)[scene.owners])


class ObjectScenes(SceneRows, ObjectImages):
    """Scenes with their objects.

    Args:
        names: of the classes.
    """

    def __init__(self, renderer: SceneRenderer, names: Sequence[str]) -> None:
        super().__init__(renderer)
        self.names = names
        self.image_ids, self.category_ids = range(1, self.num_images + 1), range(1, len(names) + 1)

    def make_target(self, scene: Scene) -> Objects:
        return Objects(scene.labels, [scene.owners == number for number in range(1, 1 + len(scene.labels))])

    def build_ground_truth(self) -> dict[str, Any]:
        """See `ObjectImages`; masks are compressed run lengths, of all scenes of the split."""
        annotations: list[dict[str, Any]] = []
        for index, image_id in enumerate(self.image_ids):
            scene = self.renderer.render(index)
            for number, label in enumerate(scene.labels, 1):
                mask = scene.owners == number
                left, top, right, bottom = find_box(mask)
                run_lengths = rle.encode(np.asfortranarray(mask, np.uint8))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": self.category_ids[label],
                        "segmentation": {"size": list(mask.shape), "counts": run_lengths["counts"].decode()},
                        "area": float(np.count_nonzero(mask)),
                        "bbox": [float(left), float(top), float(right - left), float(bottom - top)],
                        "iscrowd": 0,
                    }
                )
        side = self.renderer.settings.side
        images = [
            {"id": image_id, "file_name": self.name_of(index), "height": side, "width": side}
            for index, image_id in enumerate(self.image_ids)
        ]
        categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.names, strict=True)]
        return {"info": {}, "images": images, "categories": categories, "annotations": annotations}


# --------------------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------------------


def load_label_map_scenes(settings: SceneSettings = DIGIT_SCENES) -> ImageData:
    """Scenes of scikit-learn's digits with label maps, in which 0 is background and digit d has d + 1."""
    return make_label_map_data(settings, *load_digit_pictures())


def load_object_scenes(settings: SceneSettings = DIGIT_SCENES) -> ImageData:
    """Scenes of scikit-learn's digits with their boxes and masks."""
    return make_object_data(settings, *load_digit_pictures())


def load_label_map_fashion_scenes(data_dir: Path | None, settings: SceneSettings = FASHION_SCENES) -> ImageData:
    """Scenes of Fashion-MNIST's clothes with label maps, in which 0 is background and class c has c + 1.

    Args:
        data_dir: the folder of the four idx files; None is where Debian's package has them.
    """
    return make_label_map_data(settings, *load_fashion_pictures(data_dir))


def load_object_fashion_scenes(data_dir: Path | None, settings: SceneSettings = FASHION_SCENES) -> ImageData:
    """Scenes of Fashion-MNIST's clothes with their boxes and masks.

    Args:
        data_dir: the folder of the four idx files; None is where Debian's package has them.
    """
    return make_object_data(settings, *load_fashion_pictures(data_dir))


def make_label_map_data(settings: SceneSettings, pictures: dict[str, Pictures], names: Sequence[str]) -> ImageData:
    """Both splits with label maps."""
    train, val = (SceneImages(SceneRenderer(settings, pictures[split], split)) for split in SPLITS)
    names = ["background", *names]
    return ImageData(train, val, names, hash_scenes(settings, pictures, names))


def make_object_data(settings: SceneSettings, pictures: dict[str, Pictures], names: Sequence[str]) -> ImageData:
    """Both splits with objects."""
    train, val = (ObjectScenes(SceneRenderer(settings, pictures[split], split), names) for split in SPLITS)
    return ImageData(train, val, list(names), hash_scenes(settings, pictures, names))


def hash_scenes(settings: SceneSettings, pictures: dict[str, Pictures], names: Sequence[str]) -> str:
    """A fingerprint of all that scenes are drawn from."""
    arrays = [
        array for part in pictures.values() for array in (*part.photographs, part.objects, part.labels.astype(np.int64))
    ]
    return hash_content([settings, *names, *(hashlib.sha256(array.tobytes()).hexdigest() for array in arrays)])


def load_digit_pictures() -> tuple[dict[str, Pictures], list[str]]:
    """The digits of each split, which are those of `load_digits` in s3a/data/local.py, and their names."""
    digits, photographs = sklearn.datasets.load_digits(), load_photographs()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    parts = train_test_split(np.arange(len(images)), test_size=360, random_state=0)
    pictures = {
        split: Pictures(photographs[split], images[part], digits.target[part])
        for split, part in zip(SPLITS, parts, strict=True)
    }
    return pictures, [str(name) for name in digits.target_names]


def load_fashion_pictures(data_dir: Path | None) -> tuple[dict[str, Pictures], list[str]]:
    """The clothes of each split of Fashion-MNIST, and the names of their classes."""
    folder, photographs = data_dir or FASHION_MNIST_FOLDER, load_photographs()
    pictures = {}
    for split, name in IDX_NAMES.items():
        files = [find_idx(folder, f"{name}-{kind}") for kind in ("images-idx3", "labels-idx1")]
        images, labels = (read_unzipped(path) for path in files)
        _, classes = parse_idx(images, labels, files)  # which checks them
        sizes = np.frombuffer(images[4:16], ">u4")
        objects = np.frombuffer(images, np.uint8, offset=16).reshape(sizes)
        pictures[split] = Pictures(photographs[split], objects, np.array(classes))
    return pictures, FashionMNIST.classes


def load_photographs() -> dict[str, list[np.ndarray]]:
    """The parts of scikit-learn's two photographs (427 x 640) that each split has, [height, width, 3] uint8."""
    photographs = sklearn.datasets.load_sample_images().images
    cut = int(photographs[0].shape[1] * TRAIN_PART)
    return {"train": [each[:, :cut] for each in photographs], "val": [each[:, cut:] for each in photographs]}
