"""Scenes: what is drawn is what the targets say, and nothing of validation is in training."""

import gzip
import re
from dataclasses import replace

import numpy as np
import pytest
import sklearn.datasets
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy.ndimage import distance_transform_cdt
from sklearn.model_selection import train_test_split
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from s3a.data import EvalLoader, TrainLoader, scenes
from s3a.data.scenes import (
    DIGIT_SCENES,
    FASHION_SCENES,
    Canvas,
    Pictures,
    SceneRenderer,
    SceneSettings,
    Sprite,
    load_label_map_fashion_scenes,
    load_label_map_scenes,
    load_object_fashion_scenes,
    load_object_scenes,
)
from s3a.data.targets import split_targets

FEW = replace(DIGIT_SCENES, num_train=12, num_val=20)
FEW_CLOTHES = replace(FASHION_SCENES, num_train=6, num_val=8)


@pytest.fixture(scope="module")
def label_maps():
    return load_label_map_scenes(FEW)


@pytest.fixture(scope="module")
def objects():
    return load_object_scenes(FEW)


@pytest.fixture
def clothes(tmp_path):
    """Fashion-MNIST's files with pictures of the class number c: a bar of 12 + c columns, of the gray 60 + 10c."""
    for name, count in (("train", 30), ("t10k", 20)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.zeros((count, 28, 28), np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2:26, 2 : 14 + label] = 60 + 10 * label
        header = np.array([0x803, count, 28, 28], ">u4").tobytes()
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = np.array([0x801, count], ">u4").tobytes()
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    return tmp_path


def read(images, indices=None):
    """Image, decoded target and number of the rows, all of them unless some are named."""
    for row in images.read_rows(list(range(images.num_images)) if indices is None else indices):
        yield np.asarray(row.encoded), row.target.decode(row.encoded.height, row.encoded.width), row.index


def black_renderer(pictures, labels, **settings):
    """Scenes of these pictures on black."""
    photographs = [np.zeros((150, 200, 3), np.uint8)]
    return SceneRenderer(SceneSettings(**settings), Pictures(photographs, pictures, labels), "train")


# --------------------------------------------------------------------------------------------------------
# What is drawn
# --------------------------------------------------------------------------------------------------------


def test_masks_are_where_digits_are_bright():
    """Painted by 1.5 times its value, a digit has what is above half its value painted to above three quarters."""
    digits = sklearn.datasets.load_digits()
    pictures = (digits.images[:40] * (255 / 16)).astype(np.uint8)
    renderer = black_renderer(pictures, digits.target[:40], fewest=1, most=1)
    for number in range(30):
        scene = renderer.render(number)
        pixels = np.asarray(scene.image)
        assert (pixels[..., :1] == pixels).all()
        assert np.array_equal(scene.owners == 1, pixels[..., 0] > 0.75 * 255)
        assert 200 < np.count_nonzero(scene.owners) < 3600
        assert scene.labels[0] in digits.target[:40]


def test_pixels_of_digits_are_painted_over_photographs(label_maps):
    for split in (label_maps.train, label_maps.val):
        for image, target, _ in read(split):
            assert image[target["label_map"].numpy() > 0].min() >= 0.75 * 255 - 1


def test_far_from_digits_the_photographs_are_as_they_were(label_maps):
    """A pixel with no digit around it is one of a crop that no digit was painted on, drawn in the same way."""
    bare = replace(FEW, sides=(1, 1))
    renderer = label_maps.train.renderer
    for image, target, number in read(label_maps.train):
        background = np.asarray(SceneRenderer(bare, renderer.pictures, "train").render(number).image)
        free = np.ones((128, 128), bool)
        for row, column in np.argwhere(target["label_map"].numpy() > 0):
            free[max(0, row - 25) : row + 25, max(0, column - 25) : column + 25] = False
        differ = np.any(image != background, axis=-1) & free
        assert np.count_nonzero(differ) <= FEW.most


def test_photographs_are_dimmed():
    pictures = Pictures([np.full((150, 200, 3), 201, np.uint8)], np.zeros((1, 8, 8), np.uint8), np.array([0]))
    for brightness, expected in ((1.0, 201), (0.6, 121), (0.5, 100)):  # 120.6, and 100.5 to the even number
        renderer = SceneRenderer(SceneSettings(brightness=brightness), pictures, "train")
        assert (np.asarray(renderer.render(0).image) == expected).all()


def test_digits_keep_their_shape():
    """A digit that fills the range of sides and is not rotated is Pillow's enlarged picture at some place."""
    picture = np.zeros((1, 8, 8), np.uint8)
    picture[0, 2:6, 3:5] = 255
    scene = black_renderer(picture, np.array([7]), fewest=1, most=1, sides=(48, 48), turn=0.0).render(0)
    rows, columns = np.nonzero(scene.owners)
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (24, 12)  # six times 4 and 2
    assert scene.labels == [7]


def test_clothes_are_shown_in_their_gray(clothes):
    for image, target, _ in read(load_object_fashion_scenes(clothes, FEW_CLOTHES).val):
        assert image.shape == (256, 256, 3)
        for label, mask in zip(target["labels"].tolist(), target["masks"].numpy(), strict=True):
            assert abs(np.median(image[mask.astype(bool)]) - (60 + 10 * label)) < 5


def test_what_belongs_to_clothes_is_above_zero():
    """Dark cloth belongs to its mask as bright cloth does."""
    picture = np.zeros((1, 28, 28), np.uint8)
    picture[0, 4:24, 4:14], picture[0, 4:24, 14:24] = 1, 255
    settings = {"side": 128, "sides": (56, 56), "turn": 0.0, "fewest": 1, "most": 1, "level": None}
    scene = black_renderer(picture, np.array([0]), **settings).render(0)
    assert np.count_nonzero(scene.owners) == 40 * 40


# --------------------------------------------------------------------------------------------------------
# Objects that overlap
# --------------------------------------------------------------------------------------------------------


def test_later_objects_are_in_front_and_hide_little():
    digits = sklearn.datasets.load_digits()
    pictures = (digits.images[:50] * (255 / 16)).astype(np.uint8)
    renderer = black_renderer(pictures, digits.target[:50], fewest=12, most=12, visible=0.6)
    overlaps = 0
    for number in range(10):
        canvas, whole = Canvas(np.zeros((128, 128, 3), np.uint8), 0.6, None), []
        rng = np.random.default_rng(number)
        for _ in range(12):
            sprite, before = renderer._draw_sprite(int(rng.integers(50)), rng), len(canvas.labels)
            canvas.lay_over(sprite, 3, rng)
            if len(canvas.labels) > before:
                whole.append(canvas.owners == len(canvas.labels))  # nothing hides it yet
                assert np.count_nonzero(whole[-1]) == np.count_nonzero(sprite.mask)
        for owner, mask in enumerate(whole, 1):
            seen = canvas.owners == owner
            assert not np.any(seen & ~mask)
            assert np.count_nonzero(seen) >= 0.6 * np.count_nonzero(mask)
            overlaps += np.count_nonzero(seen) < np.count_nonzero(mask)
    assert overlaps > 5


@pytest.mark.parametrize("gap", [0, 1, 4])
def test_objects_stand_apart(gap):
    """Between any two pixels of two objects there are as many rows or columns as the gap; and not always more."""
    digits = sklearn.datasets.load_digits()
    pictures = (digits.images[:50] * (255 / 16)).astype(np.uint8)
    renderer = black_renderer(pictures, digits.target[:50], fewest=6, most=6, sides=(40, 50), gap=gap)
    nearest = []
    for number in range(20):
        owners = renderer.render(number).owners
        for owner in range(1, owners.max()):
            distances = distance_transform_cdt(owners != owner, "chessboard")
            nearest.append(distances[owners > owner].min() - 1)
    assert min(nearest) == gap


def test_objects_without_a_place_are_left_out():
    """Two squares that fill the scene cannot both be seen; an empty one is none."""
    full = Sprite(*(np.ones((16, 16), np.float32),) * 2, np.ones((16, 16), bool))
    canvas, rng = Canvas(np.zeros((16, 16, 3), np.uint8), 0.5, None), np.random.default_rng(0)
    canvas.lay_over(full._replace(mask=np.zeros((16, 16), bool)), 4, rng)
    canvas.lay_over(full, 5, rng)
    canvas.lay_over(full, 6, rng)
    assert canvas.finish().labels == [5]
    assert (canvas.finish().owners == 1).all()


def test_scenes_have_from_the_fewest_to_the_most_objects():
    settings = replace(FEW, num_train=80, fewest=1, sides=(24, 32))  # all find a place
    counts = [len(scene["labels"]) for _, scene, _ in read(load_object_scenes(settings).train)]
    assert {*counts} == {1, 2, 3, 4}


# --------------------------------------------------------------------------------------------------------
# Targets
# --------------------------------------------------------------------------------------------------------


def test_both_kinds_of_targets_describe_the_same_scenes(label_maps, objects):
    assert label_maps.label_names == ["background", *map(str, range(10))]
    assert objects.label_names == [str(digit) for digit in range(10)]
    pairs = zip(read(label_maps.val), read(objects.val), strict=True)
    for (image, of_pixels, _), (same_image, of_objects, _) in pairs:
        assert np.array_equal(image, same_image)
        expected = torch.zeros(128, 128, dtype=torch.uint8)
        for label, mask in zip(of_objects["labels"], of_objects["masks"], strict=True):
            expected += mask * (1 + label.to(torch.uint8))  # no two masks share a pixel
        assert torch.equal(of_pixels["label_map"], expected)


def test_boxes_are_those_of_the_masks(objects):
    for _, target, _ in read(objects.val):
        inclusive = masks_to_boxes(target["masks"])
        assert torch.equal(target["boxes"], inclusive + torch.tensor([0.0, 0, 1, 1]))
        assert not target["is_crowd"].any()


def test_ground_truth_is_what_pycocotools_reads_of_the_masks(objects):
    truth = COCO()
    truth.dataset = objects.val.build_ground_truth()
    truth.createIndex()
    assert truth.getCatIds() == list(objects.val.category_ids) == list(range(1, 11))
    assert [each["name"] for each in truth.loadCats([1, 10])] == ["0", "9"]
    assert truth.getImgIds() == list(objects.val.image_ids)
    for image, target, number in read(objects.val):
        image_id = objects.val.image_ids[number]
        assert (truth.imgs[image_id]["height"], truth.imgs[image_id]["width"]) == image.shape[:2]
        annotations = truth.loadAnns(truth.getAnnIds(image_id))
        assert [each["category_id"] - 1 for each in annotations] == target["labels"].tolist()
        for annotation, mask in zip(annotations, target["masks"].numpy(), strict=True):
            assert np.array_equal(truth.annToMask(annotation), mask)
            assert annotation["area"] == coco_mask.area(annotation["segmentation"])
            assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()
            assert annotation["iscrowd"] == 0
    assert [each["id"] for each in truth.dataset["annotations"]] == [*range(1, 1 + len(truth.anns))]


# --------------------------------------------------------------------------------------------------------
# Splits
# --------------------------------------------------------------------------------------------------------


def test_splits_have_digits_and_photographs_of_their_own(label_maps):
    digits = sklearn.datasets.load_digits()
    parts = train_test_split(np.arange(1797), test_size=360, random_state=0)
    whole = sklearn.datasets.load_sample_images().images
    for images, part in zip((label_maps.train, label_maps.val), parts, strict=True):
        pictures = images.renderer.pictures
        assert np.array_equal(pictures.objects, np.round(digits.images[part] * 255 / 16))
        assert np.array_equal(pictures.labels, digits.target[part])
    train, val = label_maps.train.renderer.pictures, label_maps.val.renderer.pictures
    for left, right, photograph in zip(train.photographs, val.photographs, whole, strict=True):
        assert np.array_equal(np.concatenate([left, right], axis=1), photograph)
        assert left.shape[1] == 3 * right.shape[1]


def test_backgrounds_are_crops_of_their_split_alone():
    """Photographs whose columns say where they are: crops of training end where those of validation begin."""
    shade = np.broadcast_to(np.linspace(0, 255, 640).round().astype(np.uint8)[:, None], (427, 640, 3))
    for split, part in (("train", shade[:, :480]), ("val", shade[:, 480:])):
        pictures = Pictures([np.ascontiguousarray(part)], np.zeros((1, 8, 8), np.uint8), np.array([0]))
        renderer = SceneRenderer(replace(DIGIT_SCENES, brightness=1.0), pictures, split)
        seen = [np.asarray(renderer.render(i).image) for i in range(40)]
        assert min(image.min() for image in seen) < part.min() + 10
        assert max(image.max() for image in seen) > part.max() - 10
        assert all(image.shape == (128, 128, 3) for image in seen)


def test_clothes_of_the_two_splits_come_from_their_files(clothes):
    data = load_label_map_fashion_scenes(clothes, FEW_CLOTHES)
    assert data.label_names[:2] == ["background", "T-shirt/top"]
    assert len(data.train.renderer.pictures.objects) == 30
    assert len(data.val.renderer.pictures.objects) == 20
    assert load_object_fashion_scenes(clothes, FEW_CLOTHES).label_names == data.label_names[1:]


def test_clothes_that_are_absent_say_where_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        load_label_map_fashion_scenes(tmp_path)


# --------------------------------------------------------------------------------------------------------
# The same scene always
# --------------------------------------------------------------------------------------------------------


def test_a_scene_follows_from_its_number_alone(label_maps):
    in_order = {index: (image, target) for image, target, index in read(label_maps.train)}
    for image, target, index in read(label_maps.train, [7, 3, 7, 0]):
        assert np.array_equal(image, in_order[index][0])
        assert torch.equal(target["label_map"], in_order[index][1]["label_map"])
    first, second = (image for image, _, _ in read(label_maps.train, [0, 1]))
    assert not np.array_equal(first, second)


def test_training_and_validation_differ_in_the_same_number(label_maps):
    """Also where they would have the same pictures."""
    pictures = label_maps.train.renderer.pictures
    train, val = (SceneRenderer(FEW, pictures, split).render(0) for split in ("train", "val"))
    assert train.image.tobytes() != val.image.tobytes()


@pytest.mark.parametrize("kind", ["label maps", "objects"])
def test_batches_are_the_same_with_and_without_workers(kind, label_maps, objects):
    images = (label_maps if kind == "label maps" else objects).train
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(96, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.SanitizeBoundingBoxes(labels_getter=lambda sample: [sample[1][key] for key in ("labels", "is_crowd")])
            if kind == "objects"
            else v2.Identity(),
        ]
    )
    seen = []
    for num_workers in (0, 2):
        loader = TrainLoader(images, transform, channels=3, batch_size=4, seed=3, num_workers=num_workers)
        seen.append([batch for [batch] in loader.epoch(1)])
    assert len(seen[0]) == 3
    for batch, other in zip(*seen, strict=True):
        assert torch.equal(batch.images, other.images)
        assert batch.images.shape == (4, 3, 96, 96)
        for target, other_target in zip(split_targets(batch.targets), split_targets(other.targets), strict=True):
            assert target.keys() == other_target.keys()
            assert all(torch.equal(target[key], other_target[key]) for key in target)


def test_evaluation_pads_with_blank_targets(label_maps, objects):
    transform = v2.PILToTensor()
    batch = EvalLoader(label_maps.val, transform, channels=3, batch_size=1).make_padding()
    assert (split_targets(batch.targets)[0]["label_map"] == 255).all()
    batch = EvalLoader(objects.val, transform, channels=3, batch_size=1).make_padding()
    assert split_targets(batch.targets)[0]["boxes"].shape == (0, 4)


def test_scenes_have_names(label_maps):
    assert label_maps.val.name_of(3) == "scene 3 of val"


# --------------------------------------------------------------------------------------------------------
# Settings and fingerprints
# --------------------------------------------------------------------------------------------------------


def test_fingerprints_tell_settings_and_pictures_apart(clothes, monkeypatch):
    known = [load_label_map_scenes(FEW).fingerprint]
    assert load_label_map_scenes(FEW).fingerprint == known[0]
    for change in ({"num_val": 21}, {"sides": (40, 61)}, {"turn": 9.0}, {"level": 200}, {"visible": 0.9}):
        known.append(load_label_map_scenes(replace(FEW, **change)).fingerprint)
    known.append(load_label_map_fashion_scenes(clothes, FEW).fingerprint)
    dark = {split: [each // 2 for each in parts] for split, parts in scenes.load_photographs().items()}
    monkeypatch.setattr(scenes, "load_photographs", lambda: dark)
    known.append(load_label_map_scenes(FEW).fingerprint)
    assert len({*known}) == len(known)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fewest": 5}, "fewest is 5 and most 4: a scene has 1 to 255 objects"),
        ({"most": 256}, "fewest is 2 and most 256"),
        ({"gap": -1}, "gap is -1 and brightness 0.6: the gap is 0 or more"),
        ({"brightness": 1.5}, "gap is 4 and brightness 1.5"),
        ({"brightness": 0.0}, "gap is 4 and brightness 0.0"),
        ({"fewest": 0}, "fewest is 0"),
        ({"sides": (60, 40)}, "sides are (60, 40), turn 10.0 and side 128"),
        ({"sides": (40, 120)}, "must fit into a square of side"),
        ({"turn": 50.0}, "turn 50.0"),
    ],
)
def test_settings_that_cannot_be_drawn_are_refused(change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        replace(DIGIT_SCENES, **change)


def test_the_largest_objects_fit_into_their_scenes():
    """Rotated to all sides, as the settings just allow."""
    pictures = np.full((1, 8, 8), 255, np.uint8)
    for settings in ({"sides": (108, 108)}, {"sides": (126, 126), "turn": 0.0}, {"sides": (89, 89), "turn": 45.0}):
        renderer = black_renderer(pictures, np.array([0]), **settings)
        assert all(len(renderer.render(number).labels) for number in range(20))
