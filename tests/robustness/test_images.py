"""Corrupted images: against the library called by hand, whoever reads them, and what is refused."""

import random
import sys

import imagecorruptions
import numpy as np
import pytest
import torch
from helpers.corrupted import corrupt_by_hand, prepare_by_hand
from helpers.image_folder import make_image_folder
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.functional import pil_to_tensor

from s3a.data import load_data
from s3a.data.images import MapImages, Row
from s3a.data.loaders import EvalLoader
from s3a.robustness.corruptions import ALL
from s3a.robustness.images import (
    CLEAN,
    CorruptedImages,
    Part,
    choose_rows,
    corrupt_image,
    load_library,
    make_tensor_transform,
)


class Pictures(MapImages):
    """Images in memory, the labels of which are their rows."""

    def __init__(self, pictures: list[Image.Image | None]) -> None:
        self.pictures, self.split, self.num_images = pictures, "val", len(pictures)

    def name_of(self, index: int) -> str:
        return f"picture {index}"

    def read_rows(self, indices: list[int]) -> list[Row]:
        return [Row(index, self.pictures[index], index) for index in indices]


def draw_picture(height: int, width: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, size=(6, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def corrupt(pictures: list, part: Part, *, side: int = 32, mode: str = "RGB", rows=None, seed: int = 0):
    size = (3 if mode == "RGB" else 1, side, side)
    transform = create_transform(size, crop_pct=0.9, interpolation="bicubic", normalize=False)
    rows = np.arange(len(pictures)) if rows is None else np.array(rows)
    return CorruptedImages(Pictures(pictures), rows, transform, mode, part, seed)


@pytest.mark.parametrize("name", ALL)
def test_images_are_what_the_library_makes_of_the_models_view(name):
    """The height and width differ, and so do those of the model's input and of the image."""
    pictures = [draw_picture(50, 70), draw_picture(90, 41, seed=1)]
    for side, severity in ((32, 2), (48, 5)):
        images = corrupt(pictures, Part(name, severity), side=side, seed=7)
        for row, picture in zip(images.read_rows([0, 1]), pictures, strict=True):
            view = prepare_by_hand(picture, side)
            expected = np.asarray(corrupt_by_hand(view, name, severity, 7, row.index))
            assert np.array_equal(np.asarray(row.encoded), expected)
            assert not np.array_equal(expected, np.asarray(view))
            assert row.label == row.index


def test_clean_images_are_the_models_view():
    picture = draw_picture(50, 70)
    (row,) = corrupt([picture], CLEAN).read_rows([0])
    assert np.array_equal(np.asarray(row.encoded), np.asarray(prepare_by_hand(picture, 32)))


def test_gray_images_are_corrupted_as_rgb():
    picture = draw_picture(40, 40)
    (row,) = corrupt([picture], Part("frost", 3), mode="L").read_rows([0])
    gray = prepare_by_hand(picture, 32, mode="L")
    assert row.encoded.mode == "L"
    assert np.array_equal(np.asarray(row.encoded), np.asarray(corrupt_by_hand(gray, "frost", 3, 0, 0).convert("L")))


@pytest.mark.parametrize("name", ["gaussian_noise", "glass_blur", "impulse_noise", "frost"])
def test_noise_is_the_rows_whoever_reads_it(name):
    """Other batches and processes, other images beside it, and what was drawn before, change nothing."""
    picture = draw_picture(40, 44)
    images = corrupt([picture] * 7, Part(name, 3))
    alone = [np.asarray(images.read_rows([index])[0].encoded) for index in range(7)]
    assert len({each.tobytes() for each in alone}) == 7
    few = corrupt([picture] * 7, Part(name, 3), rows=[1, 4])
    assert [row.index for row in few.read_rows([1, 0])] == [4, 1]
    for options in (
        {"batch_size": 3},
        {"batch_size": 4, "num_processes": 2, "process_index": 1},
    ):
        for split in (images, few):
            loader = EvalLoader(split, make_tensor_transform(32, 32), channels=3, **options)
            seen = [pair for batch in loader for pair in zip(batch.indices, batch.images, strict=True) if pair[0] >= 0]
            for index, pixels in seen:
                assert torch.equal(pixels, pil_to_tensor(Image.fromarray(alone[index])))
            assert len(seen) == split.num_images or "num_processes" in options


def test_workers_change_nothing():
    images = corrupt([draw_picture(40, 44)] * 3, Part("glass_blur", 2))
    plain, by_worker = (
        [batch.images for batch in EvalLoader(images, make_tensor_transform(32, 32), channels=3, **options)]
        for options in ({"batch_size": 3}, {"batch_size": 3, "num_workers": 1})
    )
    assert torch.equal(plain[0], by_worker[0])


def test_noise_depends_on_seed_and_corruption():
    picture = Image.new("RGB", (40, 40), (128, 128, 128))
    first, other, seeded = (
        np.asarray(corrupt([picture], part, seed=seed).read_rows([0])[0].encoded, dtype=float) - 128
        for part, seed in ((("gaussian_noise", 1), 0), (("speckle_noise", 1), 0), (("gaussian_noise", 1), 1))
        for part in [Part(*part)]
    )
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.1
    assert abs(np.corrcoef(first.ravel(), seeded.ravel())[0, 1]) < 0.1


def test_severities_scale_one_noise():
    """The standard deviations of the severities 1 and 2 are 0.08 and 0.12 of white."""
    picture = Image.new("RGB", (40, 40), (128, 128, 128))
    weak, strong = (
        np.asarray(corrupt([picture], Part("gaussian_noise", severity)).read_rows([0])[0].encoded, dtype=float)
        for severity in (1, 2)
    )
    inside = (strong > 0) & (strong < 255)
    assert np.abs((strong - 128) * 0.08 - (weak - 128) * 0.12)[inside].max() < 0.21  # a pixel is cut to a whole number


def test_generators_are_left_as_they_are():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    corrupt([draw_picture(40, 40)], Part("snow", 3)).read_rows([0])
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_unreadable_images_are_reported_and_padding_is_black(tmp_path):
    folder = make_image_folder(tmp_path / "images", num_val=3)
    (folder / "val" / "dark" / "001.png").write_bytes(b"no picture")
    val = load_data("imagefolder", folder).val
    transform = create_transform((3, 48, 48), crop_pct=0.9, normalize=False)
    images = CorruptedImages(val, np.arange(6), transform, "RGB", Part("fog", 2), 0)
    loader = EvalLoader(images, make_tensor_transform(48, 48), channels=3, batch_size=4, num_processes=3)
    first, second = loader
    assert [*first.unreadable] == [str(folder / "val" / "dark" / "001.png")]
    assert (first.labels.tolist(), second.labels.tolist()) == ([0, -1], [1])
    assert first.images.shape == (2, 3, 48, 48)
    assert not first.images[1].any()
    padded = EvalLoader(
        images, make_tensor_transform(48, 48), channels=3, batch_size=4, num_processes=3, process_index=2
    )
    assert [batch.labels.tolist() for batch in padded] == [[-1, -1], [-1]]
    assert all(batch.images.shape[-2:] == (48, 48) and not batch.images.any() for batch in padded)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_an_image_on_which_no_drop_falls_stays_as_it_is():
    """The library makes it black: it divides 0 by 0."""
    picture = Image.new("RGB", (32, 32), (100, 100, 100))
    dry = 0
    for seed in range(100):
        np.random.seed(seed)
        theirs = imagecorruptions.corrupt(np.array(picture), 1, "spatter")
        ours = np.asarray(corrupt_image(picture, Part("spatter", 1), seed))
        assert np.array_equal(ours, theirs if theirs.any() else np.asarray(picture))
        dry += not theirs.any()
    assert dry > 0


def test_a_transform_without_pixels_is_refused():
    with pytest.raises(ValueError, match=r"gives torch.float32 of shape \[3, 32, 32\].*must give pixels"):
        CorruptedImages(Pictures([draw_picture(40, 40)]), np.arange(1), create_transform((3, 32, 32)), "RGB", CLEAN, 0)


def test_a_missing_library_is_one_line(monkeypatch):
    load_library.cache_clear()
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ValueError, match=r'corruptions need imagecorruptions-imaug.*pip install -e "\.\[robustness\]"'):
        load_library()


def test_a_missing_system_library_is_one_line(monkeypatch, tmp_path):
    load_library.cache_clear()
    lines = 'raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")'
    (tmp_path / "imagecorruptions.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "imagecorruptions")
    with pytest.raises(ValueError, match=r"cannot be imported \(libGL\.so\.1: .*apt install libgl1 libglib2\.0-0"):
        load_library()


def test_rows_are_evenly_spaced():
    assert choose_rows(10, None).tolist() == [*range(10)]
    assert choose_rows(10, 4).tolist() == [0, 2, 5, 7]
    assert choose_rows(10, 1).tolist() == [0]
    for wanted in (0, 11):
        with pytest.raises(ValueError, match=f"--num-images is {wanted}: it must be from 1 to 10"):
            choose_rows(10, wanted)
