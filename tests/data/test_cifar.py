"""CIFAR-100's files: what torchvision reads of the same images, and one line for wrong files."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from helpers.numbered_images import convert_to_tensor
from helpers.small_runs import call_command
from torchvision.datasets import CIFAR100

import s3a.data.cifar
from s3a.data import EvalLoader, ImageData, load_data
from s3a.weights.pretrained import load_pretrained

NUM_IMAGES = {"train": 24, "test": 10}
NAMES = [f"fine_{label:02}" for label in range(100)]


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    files = {"train": ("train.bin", NUM_IMAGES["train"]), "val": ("test.bin", NUM_IMAGES["test"])}
    monkeypatch.setattr(s3a.data.cifar, "SPLIT_FILES", files)


def draw_records(seed: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coarse labels, fine labels, and pixels of noise [images, 3 * 32 * 32]."""
    random = np.random.default_rng(seed)
    fine = random.integers(0, 100, count, np.uint8)
    return fine // 5, fine, random.integers(0, 256, (count, 3072), np.uint8)


def write_binary(folder: Path) -> Path:
    """The files of cifar-100-binary.tar.gz, small."""
    folder.mkdir(parents=True)
    for seed, (name, count) in enumerate(NUM_IMAGES.items()):
        coarse, fine, pixels = draw_records(seed, count)
        (folder / f"{name}.bin").write_bytes(
            b"".join(bytes([c, f]) + p.tobytes() for c, f, p in zip(coarse, fine, pixels, strict=True))
        )
    (folder / "fine_label_names.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "coarse_label_names.txt").write_text("\n".join(map(str, range(20))) + "\n")
    return folder


def write_pickles(folder: Path) -> Path:
    """The files of cifar-100-python.tar.gz, small."""
    folder.mkdir(parents=True)
    for seed, (name, count) in enumerate(NUM_IMAGES.items()):
        coarse, fine, pixels = draw_records(seed, count)
        columns = {"data": pixels, "fine_labels": fine.tolist(), "coarse_labels": coarse.tolist()}
        (folder / name).write_bytes(pickle.dumps(columns))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": NAMES}))
    return folder


def trust_pickles(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has torchvision take the files in `root`/cifar-100-python for the distributed ones."""
    hashes = {name: hashlib.md5((root / "cifar-100-python" / name).read_bytes()).hexdigest() for name in NUM_IMAGES}
    monkeypatch.setattr(CIFAR100, "train_list", [("train", hashes["train"])])
    monkeypatch.setattr(CIFAR100, "test_list", [("test", hashes["test"])])
    meta = hashlib.md5((root / "cifar-100-python" / "meta").read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": meta})


@pytest.mark.parametrize("kind", ["binary", "python"])
@pytest.mark.parametrize("inside", [False, True])
def test_images_and_labels_are_those_that_torchvision_reads(tmp_path, monkeypatch, inside, kind):
    write_pickles(tmp_path / "cifar-100-python")
    trust_pickles(tmp_path, monkeypatch)
    if kind == "binary":
        write_binary(tmp_path / "cifar-100-binary")
    data = load_data("cifar-100", tmp_path if inside else tmp_path / f"cifar-100-{kind}")
    for images, train in ((data.train, True), (data.val, False)):
        expected = CIFAR100(tmp_path, train=train)
        [batch] = EvalLoader(images, convert_to_tensor, channels=3, batch_size=100)
        assert batch.labels.tolist() == expected.targets
        assert torch.equal(batch.images, torch.from_numpy(expected.data))
        assert data.label_names == expected.classes


def test_there_are_as_many_images_as_distributed(monkeypatch):
    monkeypatch.undo()
    assert s3a.data.cifar.SPLIT_FILES == {"train": ("train.bin", 50_000), "val": ("test.bin", 10_000)}


def test_another_number_of_images_is_said(tmp_path):
    path = write_binary(tmp_path / "cifar-100-binary") / "test.bin"
    path.write_bytes(path.read_bytes()[: 3 * 3074])
    with pytest.warns(UserWarning, match=r"test\.bin has 3 images, and CIFAR-100's has 10"):
        assert load_data("cifar-100", tmp_path).val.num_images == 3


def test_fingerprints_change_with_pixels_labels_and_names(tmp_path):
    def load(change: str | None) -> ImageData:
        folder = write_binary(tmp_path / str(change))
        if change in ("train.bin", "test.bin"):
            content = bytearray((folder / change).read_bytes())
            content[-1] ^= 1
            (folder / change).write_bytes(content)
        elif change == "names":
            (folder / "fine_label_names.txt").write_text("\n".join(NAMES[::-1]))
        return load_data("cifar-100", folder)

    fingerprints = [load(change).fingerprint for change in (None, "same", "train.bin", "test.bin", "names")]
    assert fingerprints[0] == fingerprints[1]
    assert len({*fingerprints}) == 4


def test_weights_of_other_classes_are_fine_tuned_by_the_named_recipe(tmp_path, capsys):
    """With a new head for the 100 classes; the model and its images are small here."""
    weights = tmp_path / "imagenet"
    timm.create_model("vvt_nano", num_classes=7).save_pretrained(weights)
    write_binary(tmp_path / "cifar-100-binary")
    AcceleratorState._reset_state(reset_partial_state=True)
    small = "--model vvt_nano --image-size 32 --epochs 1 --batch-size 24 --num-workers 0 --precision no --no-compile"
    source = f"--data cifar-100 --data-dir {tmp_path} --weights {weights} --output-dir {tmp_path / 'run'}"
    call_command("train.py", "vvt_small_cifar100", *small.split(), *source.split(), "--cpu-threads", "1")
    trained = load_pretrained(str(tmp_path / "run" / "model"))
    assert trained.num_classes == 100
    assert list(trained.pretrained_cfg["label_names"]) == NAMES


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train.bin", lambda content: content[:-1], r"train\.bin has 73,775 bytes, which are no whole number"),
        ("test.bin", lambda content: b"", r"test\.bin has 0 bytes"),
        (
            "train.bin",
            lambda content: content[:3074] + bytes([3, 100]) + content[3076:],
            r"train\.bin is damaged, or not CIFAR-100: image 1 has the coarse label 3 and the fine label 100, of 20",
        ),
        (
            "test.bin",
            lambda content: bytes([20, 99]) + content[2:],
            r"image 0 has the coarse label 20 and the fine label 99",
        ),
        ("fine_label_names.txt", lambda content: content[:-9], r"names\.txt has 99 different names on 99 lines"),
        ("fine_label_names.txt", lambda content: content.replace(b"00", b"01"), "99 different names on 100 lines"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, change, message):
    path = write_binary(tmp_path / "cifar-100-binary") / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_data("cifar-100", tmp_path)


@pytest.mark.parametrize("name", ["train.bin", "test.bin", "fine_label_names.txt"])
def test_a_missing_file_is_named(tmp_path, name):
    (write_binary(tmp_path / "cifar") / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"cifar/{name} does not exist: unpack cifar-100-binary"):
        load_data("cifar-100", tmp_path / "cifar")


@pytest.mark.parametrize("inside", [False, True])
def test_other_pickles_are_not_read(tmp_path, inside):
    """They could run code: those of a stranger would leave a file here."""

    class Stranger:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder = write_pickles(tmp_path / "cifar-100-python")
    (folder / "train").write_bytes(pickle.dumps(Stranger()))
    with pytest.raises(ValueError, match=r"cifar-100-python has other files than the distributed ones"):
        load_data("cifar-100", tmp_path if inside else folder)
    assert not (tmp_path / "ran").exists()


def test_archives_and_empty_folders_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither train\.bin nor a folder cifar-100-binary or"):
        load_data("cifar-100", tmp_path)
    archive = tmp_path / "cifar-100-binary.tar.gz"
    archive.touch()
    for given in (tmp_path, archive):
        with pytest.raises(FileNotFoundError, match=r"binary\.tar\.gz is a file: unpack it, and give its folder"):
            load_data("cifar-100", given)
    with pytest.raises(FileNotFoundError, match="neither"):
        load_data("cifar-100", tmp_path / "nowhere")
