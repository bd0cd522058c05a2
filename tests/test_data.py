"""Sources and loaders: the right images, each in its own reproducible augmentation."""

import random
import shutil

import numpy as np
import pytest
import sklearn.datasets
import torch
from image_folder import make_image_folder
from timm.data import create_transform

from s3a.data import EpochSampler, TransformedImages, eval_loader, load_data, train_loader


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture
def image_folder(tmp_path):
    return make_image_folder(tmp_path / "images")


def augment():
    return create_transform((3, 32, 32), is_training=True, scale=(0.5, 1.0), re_prob=0.5, re_mode="pixel")


def plain():
    return create_transform((3, 32, 32), is_training=False)


def test_digits_are_split_once_and_for_all(digits):
    assert (len(digits.train), len(digits.val)) == (1437, 360)
    assert digits.label_names == [str(digit) for digit in range(10)]
    again = load_data("digits")
    assert again.val["label"] == digits.val["label"]


def test_digits_are_those_of_scikit_learn(digits):
    source = sklearn.datasets.load_digits()
    known = sorted(
        zip(
            (np.round(image * 255 / 16).astype(np.uint8).tobytes() for image in source.images),
            source.target,
            strict=True,
        )
    )
    rows = [*digits.train, *digits.val]
    assert sorted((np.asarray(row["image"]).tobytes(), row["label"]) for row in rows) == known


def test_image_folder_has_classes_and_labels(image_folder):
    data = load_data("imagefolder", image_folder)
    assert data.label_names == ["dark", "light"]
    assert (len(data.train), len(data.val)) == (48, 18)
    for row in data.val:
        assert (np.asarray(row["image"]).mean() > 120) == (data.label_names[row["label"]] == "light")


def test_images_in_deeper_folders_belong_to_their_class(image_folder):
    deeper = image_folder / "train" / "light" / "more"
    deeper.mkdir()
    (image_folder / "train" / "light" / "000.jpg").rename(deeper / "000.jpg")
    (image_folder / "train" / "light" / "metadata.csv").write_text("file_name,label\n")
    data = load_data("imagefolder", image_folder)
    assert data.label_names == ["dark", "light"]
    assert data.train["label"].count(1) == 24


def test_names_with_brackets_and_spaces_are_fine(image_folder):
    data = load_data("imagefolder", image_folder.rename(image_folder.with_name("a [b] ü")))
    assert len(data.train) == 48


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist.*train/CLASS"):
        load_data("imagefolder", tmp_path / "nowhere")


def test_a_folder_is_needed():
    with pytest.raises(ValueError, match="--data-dir DIR"):
        load_data("imagefolder")


def test_digits_take_no_folder(tmp_path):
    with pytest.raises(ValueError, match="--data imagefolder"):
        load_data("digits", tmp_path)


def test_an_unknown_source_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'imagefolder'"):
        load_data("image-folder")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_named(image_folder, split):
    shutil.rmtree(image_folder / split)
    with pytest.raises(FileNotFoundError, match=f"no folder '{split}'"):
        load_data("imagefolder", image_folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_split_is_named(image_folder, split):
    shutil.rmtree(image_folder / split)
    (image_folder / split / "dark").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"{split}' has no images"):
        load_data("imagefolder", image_folder)


@pytest.mark.parametrize(("split", "other"), [("val", "train"), ("train", "val")])
def test_a_class_missing_from_a_split_is_named(image_folder, split, other):
    shutil.rmtree(image_folder / split / "light")
    with pytest.raises(ValueError, match=rf"class light of .*{other} has no images in .*{split}"):
        load_data("imagefolder", image_folder)


def test_a_class_folder_without_images_is_named(image_folder):
    shutil.rmtree(image_folder / "val" / "light")
    (image_folder / "val" / "light").mkdir()
    with pytest.raises(ValueError, match=r"class light of .*train has no images in .*val"):
        load_data("imagefolder", image_folder)


def test_an_epoch_draws_every_image_once_in_another_order():
    sampler = EpochSampler(50, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == list(range(50))
    assert sorted(second) == list(range(50, 100))
    assert [draw - 50 for draw in second] != first
    assert list(EpochSampler(50, seed=4)) != first
    assert list(EpochSampler(50, seed=3)) == first


def test_augmentation_depends_on_seed_and_epoch_and_image_alone(digits):
    images = TransformedImages(digits.train, augment(), "RGB", seed=0)
    first = images[7][0]
    random.random(), np.random.rand(), torch.rand(1)
    images[8]
    assert torch.equal(images[7][0], first)
    assert not torch.equal(images[7 + len(images)][0], first)
    assert images[7 + len(images)][1] == images[7][1]
    assert not torch.equal(TransformedImages(digits.train, augment(), "RGB", seed=1)[7][0], first)


def test_augmentation_leaves_the_global_generators_alone(digits):
    images = TransformedImages(digits.train, augment(), "RGB", seed=0)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = (random.random(), np.random.rand(), torch.rand(1))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    images[3]
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_workers_make_the_same_batches(digits):
    rows = digits.train.select(range(40))
    batches = [
        list(train_loader(rows, augment(), channels=3, batch_size=8, seed=0, num_workers=workers)) for workers in (0, 2)
    ]
    assert len(batches[0]) == 5
    for (images, labels), (worker_images, worker_labels) in zip(*batches, strict=True):
        assert torch.equal(images, worker_images)
        assert torch.equal(labels, worker_labels)


def test_evaluation_sees_every_image_once_in_order(digits):
    rows = digits.val.select(range(11))
    loader = eval_loader(rows, plain(), channels=3, batch_size=4, num_workers=0)
    assert torch.cat([labels for _, labels in loader]).tolist() == rows["label"]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_images_have_the_channels_of_the_network(image_folder, channels, mode):
    data = load_data("imagefolder", image_folder)
    loader = eval_loader(
        data.val, lambda image: torch.tensor(image.mode == mode), channels=channels, batch_size=4, num_workers=0
    )
    assert all(images.all() for images, _ in loader)


def test_other_channels_are_refused(digits):
    with pytest.raises(ValueError, match="in_chans is 4"):
        eval_loader(digits.val, plain(), channels=4, batch_size=4, num_workers=0)


def test_a_batch_larger_than_the_data_is_refused(digits):
    rows = digits.train.select(range(7))
    with pytest.raises(ValueError, match="--batch-size is 8 but there are 7 training images"):
        train_loader(rows, plain(), channels=3, batch_size=8, seed=0, num_workers=0)
