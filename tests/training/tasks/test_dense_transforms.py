"""Resizing, cropping, mirroring and colouring for dense tasks: image and target move together.

Images are coloured by their label maps, or by their objects, so that each pixel says which target it must have.
"""

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode

from s3a.data.targets import IGNORED, Objects, pack_objects
from s3a.training.tasks import dense_transforms
from s3a.training.tasks.dense_transforms import (
    DetectionAugmentation,
    DetectionView,
    SegmentationAugmentation,
    SegmentationView,
    find_mean_color,
    fit_size,
    pad_pixels,
    resize,
)

COLORS = np.random.default_rng(0).permutation(256 * 3).reshape(256, 3).astype(np.uint8)  # of each class
MEAN_COLOR = [124, 116, 104]  # 255 times 0.485, 0.456 and 0.406
NEAREST, BICUBIC = InterpolationMode.NEAREST, InterpolationMode.BICUBIC


def paint(label_map: np.ndarray) -> Image.Image:
    """The image that shows a label map."""
    return Image.fromarray(COLORS[label_map])


def make_label_map(height: int, width: int, num_classes: int = 6) -> np.ndarray:
    """A noisy label map, of which some pixels are ignored."""
    drawn = np.random.default_rng(height * width).integers(0, num_classes + 1, (height, width))
    return np.where(drawn == num_classes, IGNORED, drawn).astype(np.uint8)


def wrap(label_map: np.ndarray) -> dict[str, Tensor]:
    return {"label_map": tv_tensors.Mask(torch.from_numpy(label_map))}


def make_augmentation(side: int, **changes: object) -> SegmentationAugmentation:
    """Without any randomness but the place of the crop."""
    plain = {"scale": (1.0, 1.0), "largest_class": 1.0, "flip": 0.0, "distorts": False, "mode": NEAREST}
    return SegmentationAugmentation(**{"side": side, **plain, "color": MEAN_COLOR, **changes})


def script_places(monkeypatch: pytest.MonkeyPatch, places: Sequence[tuple[int, int]]) -> list[int]:
    """Has crops be drawn at these places (top, left); what is left to be drawn is in the list that is returned."""
    left = [number for place in places for number in place]
    monkeypatch.setattr(dense_transforms.random, "randint", lambda low, high: left.pop(0))
    return left


# --------------------------------------------------------------------------------------------------------
# Sizes
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "short", "long", "expected"),
    [
        (480, 640, 512, 2048, (512, 683)),  # 682.67
        (640, 480, 512, 2048, (683, 512)),
        (512, 512, 512, 2048, (512, 512)),
        (300, 2000, 512, 2048, (307, 2048)),  # the longer side decides: 1.024
        (600, 800, 256, 1024, (256, 341)),  # half of (2048, 512)
        (480, 640, 800, 1333, (800, 1067)),
        (427, 640, 800, 1333, (800, 1199)),
        (1333, 400, 800, 1333, (1333, 400)),
        (3, 40000, 512, 2048, (1, 2048)),
    ],
)
def test_sizes_by_hand(height: int, width: int, short: float, long: float, expected: tuple[int, int]):
    assert fit_size(height, width, short, long) == expected


@pytest.mark.parametrize("size", [(30, 42), (7, 11), (23, 5), (10, 14)])
def test_images_are_resized_by_pillow_and_label_maps_by_the_nearest_pixel(size):
    label_map = make_label_map(10, 14)
    image, target = resize(paint(label_map), {**wrap(label_map), "size": torch.tensor(3)}, size, BICUBIC)
    assert np.array_equal(image, paint(label_map).resize(size[::-1], Image.Resampling.BICUBIC))
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, label_map.shape, strict=True))
    assert np.array_equal(target["label_map"].numpy(), label_map[rows][:, columns])
    assert target["size"] == 3


def test_the_color_of_padding_is_zero_behind_the_normalisation():
    assert find_mean_color((0.485, 0.456, 0.406)) == MEAN_COLOR
    pixels = torch.arange(24, dtype=torch.uint8).view(3, 2, 4)
    padded = pad_pixels(pixels, 3, 7, MEAN_COLOR)
    assert padded.shape == (3, 3, 7)
    assert torch.equal(padded[:, :2, :4], pixels)
    for channel, value in zip(padded, MEAN_COLOR, strict=True):
        assert set(channel[2].tolist()) == set(channel[:, 4:].flatten().tolist()) == {value}


# --------------------------------------------------------------------------------------------------------
# Segmentation
# --------------------------------------------------------------------------------------------------------


def test_crops_are_parts_of_the_image_and_of_its_map():
    label_map = make_label_map(16, 22)
    large = label_map.repeat(2, axis=0).repeat(2, axis=1)  # 32 x 44
    seen = set()
    for seed in range(60):
        random.seed(seed)
        pixels, target = make_augmentation(24, scale=(32 / 24, 32 / 24), flip=0.5)(paint(label_map), wrap(label_map))
        found = target["label_map"].numpy()
        assert np.array_equal(pixels.permute(1, 2, 0), COLORS[found])
        [place] = [
            (top, left, mirrored)
            for top in range(9)
            for left in range(21)
            for mirrored in (False, True)
            if np.array_equal(large[top : top + 24, left : left + 24][:, :: -1 if mirrored else 1], found)
        ]
        seen.add(place)
    tops, lefts, mirrored = map(set, zip(*seen, strict=True))
    assert len(tops) > 6
    assert len(lefts) > 12
    assert mirrored == {False, True}


def test_what_is_smaller_than_the_crop_is_padded_and_ignored_there():
    label_map = make_label_map(12, 10)
    pixels, target = make_augmentation(40, scale=(0.5, 0.5))(paint(label_map), wrap(label_map))
    large = label_map.repeat(2, axis=0).repeat(2, axis=1)  # 24 x 20
    assert np.array_equal(target["label_map"][:24, :20], large)
    assert np.array_equal(pixels[:, :24, :20].permute(1, 2, 0), COLORS[large])
    outside = torch.ones(40, 40, dtype=torch.bool)
    outside[:24, :20] = False
    assert (target["label_map"][outside] == IGNORED).all()
    assert (pixels[:, outside] == torch.tensor(MEAN_COLOR)[:, None]).all()


def test_factors_are_drawn_from_the_whole_range():
    label_map = np.zeros((20, 80), np.uint8)  # of which the crop shows the whole height
    heights = []
    for seed in range(60):
        random.seed(seed)
        _, target = make_augmentation(40, scale=(0.5, 2.0))(paint(label_map), wrap(label_map))
        heights.append(int((target["label_map"][:, 0] == 0).sum()))
    assert min(heights) in (20, 21, 22, 23)
    assert max(heights) == 40
    assert len(set(heights)) > 10


BARS = np.repeat(np.array([0] * 70 + [1] * 10, np.uint8)[None], 20, axis=0)  # 20 x 80, the last ten columns are of 1


def crop_bars(label_map: np.ndarray, share: float) -> np.ndarray:
    _, target = make_augmentation(20, largest_class=share)(paint(label_map), wrap(label_map))
    return target["label_map"].numpy()


def test_no_class_has_more_than_its_share_of_a_crop(monkeypatch):
    """Of crops at 0, 55 and 56, class 0 has all, exactly 75 % and 70 %."""
    left = script_places(monkeypatch, [(0, 0), (0, 55), (0, 56), (0, 60)])
    assert np.array_equal(crop_bars(BARS, 0.75), BARS[:, 56:76])
    assert left == [0, 60]


def test_without_a_limit_the_first_crop_is_taken(monkeypatch):
    left = script_places(monkeypatch, [(0, 0), (0, 55)])
    assert np.array_equal(crop_bars(BARS, 1.0), BARS[:, :20])
    assert left == [0, 55]


def test_an_image_of_one_class_ends_after_ten_crops(monkeypatch):
    ignored = np.where(np.arange(80) % 2, BARS * 0, IGNORED).astype(np.uint8)
    for label_map in (BARS * 0, BARS * 0 + IGNORED, ignored):
        left = script_places(monkeypatch, [(0, place) for place in range(12)])
        assert np.array_equal(crop_bars(label_map, 0.75), label_map[:, 9:29])
        assert len(left) == 4


def test_ignored_pixels_have_no_share(monkeypatch):
    """Of the crop at 0, class 0 has 9 of 12 columns that are known; of that at 40, 8 of 12."""
    label_map = np.full((20, 80), IGNORED, np.uint8)
    label_map[:, :9], label_map[:, 9:12] = 0, 1
    label_map[:, 40:48], label_map[:, 48:52] = 0, 1
    script_places(monkeypatch, [(0, 0), (0, 40)])
    assert np.array_equal(crop_bars(label_map, 0.75), label_map[:, 40:60])


def distort(color: Sequence[int], count: int) -> list[list[int]]:
    """What becomes of an image full of a colour."""
    image, target = Image.new("RGB", (8, 8), tuple(color)), wrap(make_label_map(8, 8))
    seen = []
    for seed in range(count):
        torch.manual_seed(seed)
        pixels, moved = make_augmentation(8, distorts=True)(image, target)
        assert torch.equal(moved["label_map"], target["label_map"])
        assert (pixels == pixels[:, :1, :1]).all()
        seen.append(pixels[:, 0, 0].tolist())
    return seen


def test_brightness_of_half_the_images_is_changed_by_an_eighth():
    """Contrast, saturation and hue leave a gray image as it is."""
    values = distort([128] * 3, 100)
    assert all(len(set(value)) == 1 for value in values)
    grays = [value[0] for value in values]
    assert 112 <= min(grays) < 116 < 140 < max(grays) <= 144
    assert 30 < grays.count(128) < 70


def test_colors_are_distorted_and_channels_stay():
    """Hues move by at most a tenth of the circle: red stays between magenta and yellow."""
    colors = distort([200, 20, 20], 80)
    assert all(red > max(green, blue) for red, green, blue in colors)
    assert any(green > blue + 20 for _, green, blue in colors)
    assert any(blue > green + 20 for _, green, blue in colors)
    assert 2 < colors.count([200, 20, 20]) < 20  # a sixteenth


def test_contrast_is_distorted():
    image = Image.fromarray(np.array([[60] * 8, [160] * 8] * 4, np.uint8)).convert("RGB")
    spreads = []
    for seed in range(60):
        torch.manual_seed(seed)
        pixels, _ = make_augmentation(8, distorts=True)(image, wrap(np.zeros((8, 8), np.uint8)))
        spreads.append(int(pixels.max()) - int(pixels.min()))
    assert min(spreads) < 70
    assert max(spreads) > 130  # beyond what brightness does to 100


def test_a_view_is_the_whole_image_beside_its_map_as_it_is():
    label_map = make_label_map(20, 50)
    for multiple, (height, width) in ((1, (40, 100)), (32, (64, 128))):
        view = SegmentationView(short=40, multiple=multiple, mode=BICUBIC, color=MEAN_COLOR)
        pixels, target = view(paint(label_map), wrap(label_map))
        assert pixels.shape == (3, height, width)
        expected = np.asarray(paint(label_map).resize((100, 40), Image.Resampling.BICUBIC))
        assert np.array_equal(pixels[:, :40, :100].permute(1, 2, 0), expected)
        assert (pixels[:, 40:] == torch.tensor(MEAN_COLOR)[:, None, None]).all()
        assert np.array_equal(target["label_map"], label_map)
        assert target["size"].tolist() == [40, 100]
        assert target["padded_size"].tolist() == [height, width]


def test_the_longer_side_of_a_view_is_at_most_four_shorter_ones():
    view = SegmentationView(short=40, multiple=1, mode=BICUBIC, color=MEAN_COLOR)
    assert view(Image.new("RGB", (100, 10)), {})[0].shape == (3, 16, 160)


# --------------------------------------------------------------------------------------------------------
# Detection
# --------------------------------------------------------------------------------------------------------

PLACES = ((4, 6, 20, 30), (22, 2, 39, 19), (30, 40, 58, 77), (3, 50, 12, 79))  # top, left, bottom, right


def make_objects(crowds: Sequence[int] = (), masks: bool = True) -> tuple[Image.Image, dict[str, Tensor]]:
    """An image of 60 x 80 with a rectangle of its own colour for each object, whose label is its number."""
    owners = np.full((60, 80), IGNORED, np.uint8)
    for label, (top, left, bottom, right) in enumerate(PLACES):
        owners[top:bottom, left:right] = label
    labels = range(len(PLACES))
    target = Objects([*labels], [owners == label for label in labels]).decode(60, 80)
    is_crowd = np.isin(labels, crowds)
    boxes = target["boxes"].numpy()
    return paint(owners), pack_objects(boxes, [*labels], target["masks"].numpy() if masks else None, is_crowd, (60, 80))


def make_detection(**changes: object) -> DetectionAugmentation:
    plain = {"short_sides": (60,), "long_side": 1000, "crops": False, "flip": 0.0, "mode": NEAREST}
    return DetectionAugmentation(**{**plain, **changes})


def assert_follows(pixels: Tensor, target: dict[str, Tensor]) -> None:
    """Masks are where their objects' colours are, and boxes are around them."""
    assert target["masks"].shape[1:] == pixels.shape[1:]
    for mask, label in zip(target["masks"], target["labels"].tolist(), strict=True):
        shown = (pixels == torch.from_numpy(COLORS[label])[:, None, None]).all(0)
        assert shown.any()
        assert torch.equal(mask.as_subclass(Tensor).bool(), shown)
    expected = masks_to_boxes(target["masks"].as_subclass(Tensor)) + torch.tensor([0.0, 0, 1, 1])
    assert torch.equal(target["boxes"].as_subclass(Tensor), expected)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("factor", [1, 3])
def test_boxes_and_masks_follow_their_objects(flip: float, factor: int):
    image, target = make_objects()
    pixels, moved = make_detection(short_sides=(60 * factor,), flip=flip)(image, target)
    assert pixels.shape == (3, 60 * factor, 80 * factor)
    assert moved["size"].tolist() == [60 * factor, 80 * factor]
    assert moved["labels"].tolist() == [0, 1, 2, 3]
    assert_follows(pixels, moved)
    left = 80 - 30 if flip else 6
    assert moved["boxes"][0].tolist() == [left * factor, 4 * factor, (left + 24) * factor, 20 * factor]


def test_objects_without_masks_have_their_boxes_moved():
    image, target = make_objects(masks=False)
    _, moved = make_detection(short_sides=(120,), flip=1.0)(image, target)
    _, other = make_detection(short_sides=(120,), flip=1.0)(*make_objects())
    assert "masks" not in moved
    assert torch.equal(moved["boxes"], other["boxes"])


def test_crowds_are_left_out():
    image, target = make_objects(crowds=(1, 2))
    pixels, moved = make_detection()(image, target)
    assert moved["labels"].tolist() == [0, 3]
    assert_follows(pixels, moved)


def test_short_sides_are_drawn_and_the_longer_side_is_limited():
    image, target = make_objects()
    seen = set()
    for seed in range(40):
        random.seed(seed)
        pixels, moved = make_detection(short_sides=(30, 90, 120), long_side=140)(image, target)
        assert list(pixels.shape[1:]) == moved["size"].tolist()
        seen.add(tuple(pixels.shape[1:]))
    assert seen == {(30, 40), (90, 120), (105, 140)}


def test_parts_of_objects_stay_in_a_crop_and_others_leave(monkeypatch):
    """At twice the size, rows 30 to 100 and columns 40 to 120 hold half of objects 0 and 1 and the corner of 2."""
    monkeypatch.setattr(dense_transforms, "CROPPED_SIDES", (120,))
    script_places(monkeypatch, [(70, 80), (30, 40)])
    image, target = make_detection().crop(*make_objects())
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert pixels.shape == (3, 70, 80)
    assert target["labels"].tolist() == [0, 2]
    assert_follows(pixels, target)
    assert target["boxes"].tolist() == [[0, 0, 20, 10], [40, 30, 80, 70]]


def test_a_crop_without_an_object_works(monkeypatch):
    monkeypatch.setattr(dense_transforms, "CROPPED_SIDES", (60,))
    monkeypatch.setattr(dense_transforms.random, "random", lambda: 0.4)  # half of the images are cropped
    script_places(monkeypatch, [(10, 12), (48, 5)])
    pixels, target = make_detection(crops=True, short_sides=(20,))(*make_objects())
    assert pixels.shape == (3, 20, 24)
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 20, 24)
    assert target["labels"].shape == (0,)


def test_half_of_the_images_are_cropped():
    """An image of 3 x 2, resized to 400, 500 or 600, of which 384 to 600 pixels are cut, has another aspect then."""
    image = Image.new("RGB", (96, 64))
    target = Objects().decode(64, 96)
    sizes = []
    for seed in range(60):
        random.seed(seed)
        pixels, _ = make_detection(crops=True, short_sides=(64,))(image, target)
        sizes.append(tuple(pixels.shape[1:]))
    assert 15 < sizes.count((64, 96)) < 45
    assert len(set(sizes)) > 15


def test_crops_have_the_sizes_of_detr():
    image, target = Image.new("RGB", (96, 64)), Objects().decode(64, 96)
    seen = set()
    for seed in range(40):
        random.seed(seed)
        cropped, moved = make_detection().crop(image, target)
        seen.add(cropped.size)
        assert moved["masks"].shape == (0, cropped.height, cropped.width)
    widths, heights = map(sorted, zip(*seen, strict=True))
    assert 384 <= heights[0] < 400 < 500 < heights[-1] <= 600
    assert 384 <= widths[0] < 420 < 560 < widths[-1] <= 600


def test_a_detection_view_says_its_size_and_the_one_before():
    image, target = make_objects()
    pixels, moved = DetectionView(short_side=90, long_side=100, mode=BICUBIC, buckets=[])(image, target)
    assert set(moved) == {"size", "padded_size", "original_size"}
    assert moved["padded_size"].tolist() == [96, 128]
    assert moved["size"].tolist() == [75, 100]
    assert moved["original_size"].tolist() == [60, 80]
    expected = np.asarray(image.resize((100, 75), Image.Resampling.BICUBIC))
    assert np.array_equal(pixels.permute(1, 2, 0), expected)
