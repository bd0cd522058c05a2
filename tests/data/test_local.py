"""Images on this machine: the right ones with the right labels, and one line where something is missing."""

import errno
import gzip
import hashlib
import os
import shutil
import socket
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from helpers.alarm import stop_after
from helpers.image_folder import make_image_folder
from helpers.numbered_images import convert_to_tensor, read_split
from sklearn.model_selection import train_test_split
from timm.data import create_transform
from torchvision.datasets import ImageFolder

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


def hash_by_paths(data_dir):
    """The fingerprint by its first formula: the text of tuples of a relative path, a size and a label."""
    samples = sorted(sample for split in ("train", "val") for sample in ImageFolder(data_dir / split).samples)
    lines = [str((Path(path).relative_to(data_dir), Path(path).stat().st_size, label)) for path, label in samples]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("relative", [True, False])
def test_order_and_fingerprint_are_those_of_torchvision(image_folder, monkeypatch, relative):
    """Runs are resumed by them."""
    for split in ("train", "val"):
        names = ("dark-grey/a", "dark-grey/Z", "dark/b/c", "dark/b-c", "dark/b.png", 'Übrig \'n "quoted"', "light/ü")
        for size, folder in enumerate(names):
            (image_folder / split / folder).mkdir(parents=True)
            for name in ("1.JPeG", "10.png", "9.WEBP", ".hidden.tif", "ü\n.bmp", "notes.txt", "2.jpg.txt", "jpg"):
                (image_folder / split / folder / name).write_bytes(bytes(size))
        (image_folder / split / "loose.png").write_bytes(b"")
        (image_folder / split / "light" / "linked.jpg").symlink_to(image_folder / "train" / "dark" / "000.png")
        (image_folder / split / "light" / "linked").symlink_to(image_folder / "train" / "dark-grey")
    (image_folder / "val" / "dark" / "linked").symlink_to("../../train/light/ü")
    if relative:
        monkeypatch.chdir(image_folder)
        image_folder = Path()
    data = load_data("imagefolder", image_folder)
    assert data.fingerprint == hash_by_paths(image_folder)
    for images, split in ((data.train, "train"), (data.val, "val")):
        expected = ImageFolder(image_folder / split)
        assert data.label_names == expected.classes
        rows = images.read_rows([*range(images.num_images)])
        assert [(str(row.encoded), row.label) for row in rows] == expected.samples


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


# --------------------------------------------------------------------------------------------------------
# Links, and names of strangers
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "/"])
def test_a_link_to_a_folder_above_it_is_named(image_folder, target):
    link = image_folder / "train" / "light" / "more"
    link.symlink_to(target)
    with pytest.raises(
        ValueError, match=rf"link {link} leads to .*, from where the way leads back to the link: .*take it out"
    ):
        load_data("imagefolder", image_folder)


def test_links_that_lead_to_each_other_s_folders_are_named(image_folder):
    (image_folder / "train" / "light" / "there").symlink_to("../../val/dark")
    (image_folder / "val" / "dark" / "back").symlink_to("../../train/light")
    with pytest.raises(
        ValueError, match=r"link .*train/light/there/back leads to .*train/light, from where the way leads back"
    ):
        load_data("imagefolder", image_folder)


@pytest.mark.parametrize("link", ["train/light/deep/er/more", "train/other", "val"])
def test_links_in_a_circle_are_named_wherever_they_are(image_folder, tmp_path, link):
    """Also in folders that lie elsewhere, where the folder above is none of the image folder's."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "photos").mkdir(parents=True)
    (elsewhere / "photos" / "up").symlink_to("..")
    shutil.rmtree(image_folder / link, ignore_errors=True)
    (image_folder / link).parent.mkdir(parents=True, exist_ok=True)
    (image_folder / link).symlink_to(elsewhere)
    with pytest.raises(
        ValueError, match=rf"link .*{link}/photos/up leads to {elsewhere}, from where the way leads back"
    ):
        load_data("imagefolder", image_folder)


def test_links_to_other_folders_are_followed(image_folder, tmp_path):
    """A split, a class, folders in a class; the same one twice, and one beside it."""
    elsewhere = make_image_folder(tmp_path / "elsewhere")
    shutil.rmtree(image_folder / "val")
    (image_folder / "val").symlink_to(elsewhere / "val")
    shutil.rmtree(image_folder / "train" / "dark")
    (image_folder / "train" / "dark").symlink_to("../../elsewhere/train/dark")
    for name in ("once", "twice"):
        (image_folder / "train" / "light" / name).symlink_to(elsewhere / "train" / "light")
    (elsewhere / "train" / "light" / "beside").symlink_to("../dark")
    data = load_data("imagefolder", image_folder)
    assert data.fingerprint == hash_by_paths(image_folder)
    assert (data.train.num_images, data.val.num_images) == (24 + 24 + 2 * (24 + 24), 18)
    assert not read_split(data.train, convert_to_tensor)[2]


def test_what_is_no_file_is_an_image_that_cannot_be_read(image_folder):
    """It is not opened: a FIFO would wait for ever."""
    folder = image_folder / "val" / "light"
    os.mkfifo(folder / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.jpg"))
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "nowhere.jpg").symlink_to("gone.jpg")
    (folder / "self.jpg").symlink_to("self.jpg")
    with stop_after(seconds=60):
        data = load_data("imagefolder", image_folder)
        _, labels, unreadable = read_split(data.val, create_transform((3, 32, 32)))
    names = ("device", "fifo", "nowhere", "self", "socket")
    assert unreadable == [str(folder / f"{name}.jpg") for name in names]
    assert labels.tolist() == [0] * 9 + [1] * 9 + [-1] * 5


@pytest.mark.parametrize(
    ("names", "shown", "words"),
    [
        (("light", "LIGHT"), ("'light'", "'LIGHT'"), "differ in upper and lower case alone"),
        (("Äpfel", "äpfel"), ("'Äpfel'", "'äpfel'"), "differ in upper and lower case alone"),
        (
            [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")],
            (r"'caf\xe9'", r"'cafe\u0301'"),
            "differ in the Unicode form of their letters alone",
        ),
    ],
)
@pytest.mark.parametrize("within", [True, False])
def test_class_names_that_other_file_systems_take_for_one_are_named(image_folder, names, shown, words, within):
    for split, own in {"train": names if within else names[:1], "val": names if within else names[1:]}.items():
        for name in own:
            shutil.copytree(image_folder / split / "dark", image_folder / split / name, dirs_exist_ok=True)
        if "light" not in own:
            shutil.rmtree(image_folder / split / "light")
    with pytest.raises(ValueError, match=rf"^class folders .* {words}, and .* give one class one name") as raised:
        load_data("imagefolder", image_folder)
    for name in shown:
        assert name in str(raised.value)


def test_class_names_that_no_file_system_confuses_are_fine(image_folder):
    for split in ("train", "val"):
        for name in ("Masse", "Maße", "dark ", "dark-", "lights"):
            shutil.copytree(image_folder / split / "dark", image_folder / split / name)
    assert len(load_data("imagefolder", image_folder).label_names) == 7


def test_a_folder_that_may_not_be_read_is_named(image_folder, monkeypatch):
    """Its images would be missing from the run."""
    closed, scandir = str(image_folder / "train" / "light" / "closed"), os.scandir
    Path(closed).mkdir()

    def refuse(path):
        if str(path) == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), closed)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=rf"^{closed} cannot be read \(Permission denied\): give the user .*$"):
        load_data("imagefolder", image_folder)


def test_a_file_whose_size_may_not_be_known_is_named(image_folder, monkeypatch):
    """As in a folder that may be listed but not entered."""

    class Refused:
        def __init__(self, entry):
            self.name, self.path, self.is_dir = entry.name, entry.path, entry.is_dir

        def stat(self):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.path)

    entry = next(each for each in os.scandir(image_folder / "train" / "dark") if each.name == "003.png")
    with (
        pytest.raises(ValueError, match=r"dark/003\.png cannot be read \(Permission denied\): give the user"),
        s3a.data.local.explain_access("folder"),
    ):
        s3a.data.local.find_size(Refused(entry))


def test_images_outside_of_class_folders_are_counted(image_folder):
    """As ImageNet's validation images come."""
    for path in (image_folder / "val").glob("*/*"):
        path.rename(image_folder / "val" / f"{path.parent.name}-{path.name}")
    with pytest.raises(FileNotFoundError, match=r"val' has no images in class folders: .*; 18 images lie in no class"):
        load_data("imagefolder", image_folder)


@pytest.mark.parametrize("folder", ["train", "train/dark"])
def test_archives_in_place_of_images_are_counted(image_folder, folder):
    """As ImageNet's training images come."""
    for path in (image_folder / "train").glob("*/*"):
        path.unlink()
    for number in range(3):
        (image_folder / folder / f"n0{number}.tar").write_bytes(b"")
    (image_folder / "train" / "LICENSE").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"; 3 files end with '\.tar', images with \.jpg, .*: unpack archives"):
        load_data("imagefolder", image_folder)


def test_a_name_that_is_not_utf_8_is_named(image_folder):
    Path(os.fsdecode(os.fsencode(image_folder / "val" / "dark") + b"/\xff.png")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"file name '.*dark/\\udcff\.png' is not UTF-8: rename the file"):
        load_data("imagefolder", image_folder)
