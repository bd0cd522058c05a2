"""Images on this machine: the right ones with the right labels, and one line where something is missing."""

import gzip
import shutil

import numpy as np
import pytest
import sklearn.datasets
import torch
from helpers.numbered_images import convert_to_tensor, read_split
from sklearn.model_selection import train_test_split
from timm.data import create_transform

import s3a.data.hub
from s3a.data import EvalLoader, load_data
from s3a.data.local import FASHION_MNIST_FOLDER

# --------------------------------------------------------------------------------------------------------
# Digits and Fashion-MNIST
# --------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    data, source = load_data("digits"), sklearn.datasets.load_digits()
    assert data.label_names == [str(digit) for digit in range(10)]
    parts = train_test_split(np.arange(1797), test_size=360, random_state=0)
    for images, part in zip((data.train, data.val), parts, strict=True):
        loader = EvalLoader(images, convert_to_tensor, channels=1, batch_size=100)
        assert torch.cat([batch.labels for batch in loader]).tolist() == source.target[part].tolist()
        expected = np.round(source.images[part] * 255 / 16).astype(np.uint8)
        assert np.array_equal(torch.cat([batch.images for batch in loader]), expected)


def write_idx(folder, num_train=12, num_val=5, ending=".gz"):
    """Fashion-MNIST's files, small: image i is full of i."""
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if ending else bytes
    start = 0
    for name, count in (("train", num_train), ("t10k", num_val)):
        numbers = np.arange(start, start + count, dtype=np.uint8)
        images = np.array([0x803, count, 28, 28], ">u4").tobytes() + numbers.repeat(28 * 28).tobytes()
        labels = np.array([0x801, count], ">u4").tobytes() + (numbers % 10).tobytes()
        (folder / f"{name}-images-idx3-ubyte{ending}").write_bytes(pack(images))
        (folder / f"{name}-labels-idx1-ubyte{ending}").write_bytes(pack(labels))
        start += count
    return folder


@pytest.mark.parametrize("ending", [".gz", ""])
def test_fashion_mnist_is_read_from_idx_files(tmp_path, ending):
    data = load_data("fashion-mnist", write_idx(tmp_path, ending=ending))
    assert data.label_names[:2] == ["T-shirt/top", "Trouser"]
    for images, start, count in ((data.train, 0, 12), (data.val, 12, 5)):
        [batch] = EvalLoader(images, convert_to_tensor, channels=1, batch_size=100)
        assert batch.images.shape == (count, 28, 28)
        assert (batch.images == torch.arange(start, start + count)[:, None, None]).all()
        assert batch.labels.tolist() == [i % 10 for i in range(start, start + count)]


def test_fashion_mnist_is_found_where_debian_puts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(s3a.data.local, "FASHION_MNIST_FOLDER", write_idx(tmp_path))
    assert load_data("fashion-mnist").train.num_images == 12
    assert str(FASHION_MNIST_FOLDER) == "/usr/share/datasets/fashion-mnist"


def test_fashion_mnist_that_is_absent_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(s3a.data.local, "FASHION_MNIST_FOLDER", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        load_data("fashion-mnist")


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"no gzip", lambda content: b""])
def test_damaged_idx_files_are_named(tmp_path, damage):
    path = write_idx(tmp_path) / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz .*damaged"):
        load_data("fashion-mnist", tmp_path)


def test_idx_files_that_do_not_belong_together_are_named(tmp_path):
    write_idx(tmp_path)
    shutil.copy(tmp_path / "t10k-labels-idx1-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz")
    with pytest.raises(ValueError, match="do not belong together"):
        load_data("fashion-mnist", tmp_path)


# --------------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------------


def test_image_folder_has_classes_and_labels(image_folder):
    data = load_data("imagefolder", image_folder)
    assert data.label_names == ["dark", "light"]
    assert (data.train.num_images, data.val.num_images) == (48, 18)
    pixels, labels, _ = read_split(data.val, convert_to_tensor)
    assert ((pixels.float().mean((1, 2, 3)) > 120).long() == labels).all()
    assert data.val.name_of(17) == str(image_folder / "val" / "light" / "008.jpg")


def test_an_image_that_is_cut_off_is_named_by_its_path(image_folder):
    path = image_folder / "val" / "light" / "003.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    _, labels, unreadable = read_split(load_data("imagefolder", image_folder).val, create_transform((3, 32, 32)))
    assert unreadable == [str(path)]
    assert labels.tolist() == [0] * 9 + [1, 1, 1, -1, 1, 1, 1, 1, 1]


def test_images_in_deeper_folders_belong_to_their_class(image_folder):
    deeper = image_folder / "train" / "light" / "more"
    deeper.mkdir()
    (image_folder / "train" / "light" / "000.jpg").rename(deeper / "000.jpg")
    (image_folder / "train" / "light" / "metadata.csv").write_text("file_name,label\n")
    data = load_data("imagefolder", image_folder)
    assert data.label_names == ["dark", "light"]
    assert read_split(data.train, convert_to_tensor)[1].tolist().count(1) == 24


def test_names_with_brackets_and_spaces_are_fine(image_folder):
    data = load_data("imagefolder", image_folder.rename(image_folder.with_name("a [b] ü")))
    assert data.train.num_images == 48
    assert not read_split(data.train, convert_to_tensor)[2]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist.*train/CLASS"):
        load_data("imagefolder", tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_named(image_folder, split):
    shutil.rmtree(image_folder / split)
    advice = {"val": "move about a tenth of .* from train/CLASS to val/CLASS", "train": "nine tenths .* to train/CLASS"}
    with pytest.raises(FileNotFoundError, match=f"no folder '{split}': .*{advice[split]}"):
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


def test_fingerprints_change_with_a_folder(image_folder):
    seen = {load_data("imagefolder", image_folder).fingerprint}
    (image_folder / "val" / "dark" / "000.png").rename(image_folder / "val" / "dark" / "100.png")
    seen.add(load_data("imagefolder", image_folder).fingerprint)
    (image_folder / "train" / "dark" / "000.png").rename(image_folder / "train" / "light" / "000.png")
    seen.add(load_data("imagefolder", image_folder).fingerprint)
    (image_folder / "train" / "dark" / "001.png").write_bytes(b"longer or shorter")
    seen.add(load_data("imagefolder", image_folder).fingerprint)
    assert len(seen) == 4
    moved = image_folder.rename(image_folder.with_name("moved"))
    assert load_data("imagefolder", moved).fingerprint in seen, "the same images in another place"
