"""Pixels on their device: timm's normalisation and erasing, however they travelled, and what is refused."""

import random
from functools import partial

import pytest
import torch
from helpers.host_reads import MethodWatch, OperatorWatch
from helpers.numbered_images import convert_to_tensor, make_images, make_loader
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing

from s3a.data.batches import Batch
from s3a.data.erasing import Erasure, Rectangle, draw_erased, join_erased
from s3a.data.pixels import PixelNormalizer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_batch(images: torch.Tensor, erasure: Erasure | None = None) -> Batch:
    """A batch of these images, with labels that nobody reads."""
    zeros = torch.zeros(len(images), dtype=torch.int64)
    return Batch(images, zeros, zeros, {}, erasure)


def seed_all(seed: int) -> None:
    """Seeds the generators that timm draws from here."""
    random.seed(seed)
    torch.manual_seed(seed)


# --------------------------------------------------------------------------------------------------------
# Normalisation
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_pixels_become_what_timms_transforms_make_of_them(mode, channels, is_training):
    """The same bits."""
    config = {"input_size": (channels, 24, 20), "mean": MEAN[:channels], "std": STD[:channels]}
    whole = create_transform(**config, is_training=is_training)
    bare = create_transform(**config, is_training=is_training, normalize=False)
    pictures = [Image.effect_noise((40, 31 + i), 90).convert(mode) for i in range(5)]
    seed_all(1)
    expected = torch.stack([whole(picture) for picture in pictures])
    seed_all(1)
    pixels = torch.stack([bare(picture) for picture in pictures])
    assert pixels.dtype == torch.uint8
    for lying in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
        ready = PixelNormalizer(config["mean"], config["std"])(make_batch(lying)).images
        assert ready.is_contiguous()
        assert torch.equal(ready, expected)


def test_one_mean_stands_for_all_channels():
    pixels = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    one, three = PixelNormalizer([0.5], [0.25]), PixelNormalizer([0.5] * 3, [0.25] * 3)
    assert torch.equal(one(make_batch(pixels)).images, three(make_batch(pixels)).images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_images_of_floating_point_stay_as_they_are(dtype):
    images = torch.randn(2, 3, 4, 4).to(dtype)
    assert PixelNormalizer(MEAN, STD)(make_batch(images)).images is images
    assert PixelNormalizer()(make_batch(images)).images is images


def test_a_device_gets_mean_and_std_once_and_reads_nothing_back(monkeypatch):
    """The device without memory has nothing to read; elsewhere nothing is read that a host would wait for."""
    copied, to = [], torch.Tensor.to
    batch = make_batch(
        torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8), Erasure([Rectangle(1, 2, 3, 4, 5)], torch.randn(60))
    )
    sent = batch._replace(
        images=batch.images.to("meta"), erasure=batch.erasure._replace(noise=torch.randn(60).to("meta"))
    )

    def note(tensor: torch.Tensor, *where: object, **layout: object) -> torch.Tensor:
        copied.append(tensor.shape)
        return to(tensor, *where, **layout)

    monkeypatch.setattr(torch.Tensor, "to", note)
    normalizer = PixelNormalizer(MEAN, STD)
    for _ in range(2):
        ready = normalizer(sent)
        assert (ready.images.device.type, ready.images.dtype) == ("meta", torch.float32)
    assert copied.count((3, 1, 1)) == 2
    noted = []
    with MethodWatch(noted), OperatorWatch(noted):
        PixelNormalizer(MEAN, STD)(batch)
    assert noted == []


# --------------------------------------------------------------------------------------------------------
# Erasing
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_what_is_erased_is_what_timm_erases(mode, count):
    """Noise, colours or nothing; in some images several rectangles, which overlap."""
    erasing = RandomErasing(0.7, max_area=0.9, mode=mode, max_count=count, device="cpu")
    images = torch.full((40, 3, 16, 12), 5.0)
    seed_all(2)
    expected = torch.stack([erasing(image.clone()) for image in images])
    state = torch.get_rng_state(), random.getstate()
    seed_all(2)
    erased = [each for number, image in enumerate(images) for each in draw_erased(erasing, number, image.shape)]
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    erasure = join_erased(erased)
    assert erasure.noise.shape == (sum(3 * height * width for *_, height, width in erasure.rectangles),)
    batch = PixelNormalizer()(make_batch(images, erasure))
    assert torch.equal(batch.images, expected)
    assert batch.erasure is None
    assert (images == 5).all(), "they are the loader's"


def enlarge(image: Image.Image) -> torch.Tensor:
    """A transform to pixels that draws before anything is erased: from a square of the image to all of it."""
    side = random.randint(1, 2)
    return convert_to_tensor(image.crop((0, 0, side, side)).resize((16, 16))).permute(2, 0, 1)


def measure(image: Image.Image, erasing: RandomErasing | None = None) -> torch.Tensor:
    """The same in floating point, and erased by timm where that is given."""
    measured = enlarge(image).float()
    return measured if erasing is None else erasing(measured)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_draws_what_is_erased_behind_the_transform(num_workers):
    """Of float images and of pixels alike, and nothing without being asked to."""
    erasing = RandomErasing(0.5, mode="pixel", device="cpu")
    images = make_images(24)

    def read(transform, **options):
        loader = make_loader(images, transform, num_workers=num_workers, **options)
        return [batch for (batch,) in loader.epoch(0)]

    assert all(batch.erasure is None for batch in read(enlarge))
    whole = read(partial(measure, erasing=erasing))
    pixels, floats = read(enlarge, erasing=erasing), read(measure, erasing=erasing)
    assert {batch.images.dtype for batch in pixels} == {torch.uint8}
    unit = PixelNormalizer([0.0], [1 / 255])  # leaves the pixels their own numbers
    for expected, pixel, number in zip(whole, pixels, floats, strict=True):
        torch.testing.assert_close(unit(pixel).images, expected.images, atol=1e-4, rtol=0)
        assert torch.equal(PixelNormalizer()(number).images, expected.images)


# --------------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalizer", "images", "message"),
    [
        (PixelNormalizer(), torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "give the loader the mean and std"),
        (PixelNormalizer(MEAN, STD), torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "have 1 channels, the mean 3"),
        (PixelNormalizer(MEAN, STD), torch.zeros(1, 3, 2, 2, dtype=torch.int64), "images are torch.int64"),
    ],
)
def test_images_that_cannot_be_normalised_are_refused(normalizer, images, message):
    with pytest.raises(ValueError, match=message):
        normalizer(make_batch(images))


@pytest.mark.parametrize(("mean", "std"), [(MEAN, None), (None, STD), (MEAN, (0.2, 0.0, 0.2))])
def test_a_mean_without_a_std_is_refused(mean, std):
    with pytest.raises(ValueError, match="give both, without a std of 0, or neither"):
        PixelNormalizer(mean, std)
