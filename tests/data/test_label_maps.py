"""Label maps of files and of the Hub: each number is the right class, and one line says what is wrong."""

import io
import json
import os
import re
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from torchvision.transforms import v2

from s3a.data import EvalLoader, TrainLoader
from s3a.data.decode import UnreadableImageError
from s3a.data.hub_label_maps import find_map_columns, load_hub_label_maps
from s3a.data.images import Row
from s3a.data.label_maps import EncodedLabelMap, Numbering, load_ade20k, load_label_map_folder
from s3a.data.targets import split_targets

NAMES = ["wall", "floor", "sky"]


def encode(numbers, kind="PNG", **options):
    """The bytes of a file of these numbers or colours."""
    image = numbers if isinstance(numbers, Image.Image) else Image.fromarray(np.asarray(numbers))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def draw_numbers(seed, known, shape=(6, 9)):
    """A map of these numbers."""
    return np.random.default_rng(seed).choice(np.array(known, np.uint8), shape)


def decode(content, num_classes=3, ignore_zero=False, shape=(6, 9)):
    """The decoded label map of a file's bytes."""
    encoded = content if isinstance(content, Path) else {"bytes": content, "path": None}
    return EncodedLabelMap(encoded, Numbering(num_classes, ignore_zero)).decode(*shape)["label_map"]


def write_folder(folder, splits=("train", "val"), maps="label-maps", known=(0, 1, 2, 255), count=4):
    """A folder of pairs; image i of a split is of the numbers that `draw_numbers` gives for i."""
    for split in splits:
        (folder / "images" / split).mkdir(parents=True)
        (folder / maps / split).mkdir(parents=True)
        for i in range(count):
            numbers = draw_numbers(i, known)
            (folder / "images" / split / f"view_{i}.jpg").write_bytes(encode(np.stack([numbers] * 3, -1), "JPEG"))
            (folder / maps / split / f"view_{i}.png").write_bytes(encode(numbers))
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return folder


def read_maps(images):
    """The decoded label maps of all rows."""
    rows = images.read_rows(list(range(images.num_images)))
    return [row.target.decode(6, 9)["label_map"].numpy() for row in rows]


# --------------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------------


def test_numbers_are_classes_and_255_is_ignored():
    numbers = draw_numbers(0, (0, 1, 2, 255))
    decoded = decode(encode(numbers))
    assert decoded.dtype == torch.uint8
    assert np.array_equal(decoded, numbers)


def test_zero_may_be_ignored_too():
    numbers = draw_numbers(0, (0, 1, 2, 3, 255))
    decoded = decode(encode(numbers), ignore_zero=True).numpy()
    for number, label in ((0, 255), (1, 0), (2, 1), (3, 2), (255, 255)):
        assert (decoded[numbers == number] == label).all()


def test_sixteen_bits_hold_the_same_numbers():
    numbers = draw_numbers(0, (0, 1, 2, 255))
    for wide in (numbers.astype(np.uint16), numbers.astype(">u2"), numbers.astype(np.int32)):
        kind = "TIFF" if wide.dtype == np.int32 else "PNG"  # 32 bits are stored so by datasets
        assert np.array_equal(decode(encode(wide, kind)), numbers)


def test_palettes_are_read_by_index():
    """Also where several indices have one colour, or a colour is transparent."""
    numbers = draw_numbers(0, (0, 1, 2, 255))
    image = Image.fromarray(numbers)
    image.putpalette([7, 7, 7] * 256)
    assert image.mode == "P"
    for options in ({}, {"transparency": 1}):
        assert np.array_equal(decode(encode(image, **options)), numbers)
    assert np.array_equal(decode(encode(image, "TIFF")), numbers)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grays_of_few_bits_are_numbers(bits):
    """PNG optimisers write them; Pillow stretches them to 0 ... 255."""
    numbers = draw_numbers(0, range(min(2**bits, 11)), (6, 8))
    packed = np.packbits(np.unpackbits(numbers[..., None], axis=-1)[..., 8 - bits :].reshape(6, -1), axis=-1)

    def make_chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = make_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 6, bits, 0, 0, 0, 0))
    pixels = make_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed)))
    content = b"\x89PNG\r\n\x1a\n" + header + pixels + make_chunk(b"IEND", b"")
    assert np.array_equal(decode(content, 11, shape=(6, 8)), numbers)


@pytest.mark.parametrize("ignore_zero", [False, True])
def test_all_numbers_that_bytes_hold_may_be_classes(ignore_zero):
    numbers = np.arange(256, dtype=np.uint8).reshape(16, 16)
    decoded = decode(encode(numbers), 255 - ignore_zero, ignore_zero, (16, 16)).flatten().tolist()
    assert decoded == ([255, *range(254), 255] if ignore_zero else [*range(255), 255])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (encode(np.full((6, 9, 3), 2, np.uint8)), "its pixels are RGB, and must be one whole number each"),
        (encode(np.full((6, 9, 4), 2, np.uint8)), "its pixels are RGBA"),
        (encode(np.full((6, 9), 2, np.uint8), "JPEG"), "it is JPEG, which need not keep numbers"),
        (encode(np.zeros((6, 9), np.uint8))[:40], "its label map cannot be read"),
        (b"no image", "its label map cannot be read (it is no image"),
        (b"", "it has 0 bytes"),
        (None, "it is empty"),
        (encode(np.zeros((9, 6), np.uint8)), "has 9 x 6 pixels (height x width), and its image 6 x 9"),
    ],
)
def test_what_is_no_label_map_of_the_image_is_unreadable(content, words):
    with pytest.raises(UnreadableImageError, match=re.escape(words)):
        decode(content)


def test_colours_are_answered_with_how_to_write_numbers():
    with pytest.raises(UnreadableImageError, match="write it as a grayscale or palette PNG, with the number"):
        decode(encode(np.full((6, 9, 3), 2, np.uint8)))


@pytest.mark.parametrize(
    ("ignore_zero", "numbers", "words"),
    [
        (False, {3: 5}, "its label map has 3 in 5 pixels; classes are 0 to 2, and 255 is ignored"),
        (True, {4: 2}, "its label map has 4 in 2 pixels; classes are 1 to 3, and 0 and 255 are ignored"),
        (False, {254: 3, 7: 4}, "has 7 in 4 pixels, and 1 more numbers are no classes either; classes"),
        (False, {256: 1}, "has 256 in 1 pixels"),
        (False, {511: 2}, "has 511 in 2 pixels"),
        (False, {65535: 9}, "has 65535 in 9 pixels"),
        (False, {-1: 9}, "has -1 in 9 pixels"),
    ],
)
def test_numbers_of_no_class_are_named(ignore_zero, numbers, words):
    pixels = np.ones((6, 9), np.int32)
    pixels.flat[: sum(numbers.values())] = np.repeat([*numbers], [*numbers.values()])
    narrow = pixels.astype(np.uint8) if max(numbers) < 256 and min(numbers) >= 0 else pixels
    with pytest.raises(UnreadableImageError, match=re.escape(words)):
        decode(encode(narrow, "PNG" if narrow.dtype == np.uint8 else "TIFF"), ignore_zero=ignore_zero)


def test_a_large_number_of_sixteen_bits_does_not_wrap():
    """256 is not 0."""
    pixels = np.full((6, 9), 256, np.uint16)
    with pytest.raises(UnreadableImageError, match="has 256 in 54 pixels"):
        decode(encode(pixels))


def test_paths_in_rows_of_others_are_not_opened(tmp_path):
    (tmp_path / "map.png").write_bytes(encode(np.zeros((6, 9), np.uint8)))
    assert decode(tmp_path / "map.png").shape == (6, 9)
    with pytest.raises(UnreadableImageError, match="only the path"):
        EncodedLabelMap({"bytes": None, "path": str(tmp_path / "map.png")}, Numbering(3, False)).decode(6, 9)


def test_a_map_of_a_file_is_named_by_its_path(tmp_path):
    with pytest.raises(
        UnreadableImageError, match=re.escape(f"label map {tmp_path / 'map.png'} cannot be read (it do")
    ):
        decode(tmp_path / "map.png")
    (tmp_path / "map.png").write_bytes(encode(np.full((6, 9), 77, np.uint8)))
    with pytest.raises(UnreadableImageError, match=re.escape(f"label map {tmp_path / 'map.png'} has 77 in 54 pixels")):
        decode(tmp_path / "map.png")


@pytest.mark.parametrize(("num_classes", "ignore_zero"), [(256, False), (255, True), (0, False)])
def test_bytes_hold_so_many_classes(num_classes, ignore_zero):
    with pytest.raises(ValueError, match=rf"there are {num_classes} classes: label maps have 1 to {255 - ignore_zero}"):
        Numbering(num_classes, ignore_zero)


# --------------------------------------------------------------------------------------------------------
# ADE20K
# --------------------------------------------------------------------------------------------------------


def write_ade20k(folder):
    """Small, as it is distributed: a training pair more than for validation, and a map of all numbers."""
    for split, count in (("training", 3), ("validation", 2)):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(1, 1 + count):
            stem = f"ADE_{split[:-3]}_{i:08}"
            (folder / "images" / split / f"{stem}.jpg").write_bytes(encode(np.full((10, 16, 3), i, np.uint8), "JPEG"))
            numbers = np.minimum(np.arange(160), 150).astype(np.uint8).reshape(10, 16)
            (folder / "annotations" / split / f"{stem}.png").write_bytes(encode(numbers))
    rows = [f"{i}\t0.1\t11664\t1172\t1\tthing {i}, sort of thing\t\t" for i in range(1, 151)]
    (folder / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName\t\t", *rows]) + "\n")
    (folder / "sceneCategories.txt").write_text("ADE_train_00000001 airport_terminal\n")
    return folder


def test_ade20k_has_150_classes_and_ignores_zero(tmp_path):
    data = load_ade20k(write_ade20k(tmp_path))
    assert (data.train.num_images, data.val.num_images) == (3, 2)
    assert data.label_names == [f"thing {i}, sort of thing" for i in range(1, 151)]
    for images in (data.train, data.val):
        for row in images.read_rows(list(range(images.num_images))):
            decoded = row.target.decode(10, 16)["label_map"].flatten().tolist()
            assert decoded == [255, *range(150), *[149] * 9]
    assert data.val.name_of(1) == str(tmp_path / "images" / "validation" / "ADE_validat_00000002.jpg")


def test_ade20k_in_its_archive_folder_is_named(tmp_path):
    write_ade20k(tmp_path / "ADEChallengeData2016")
    with pytest.raises(FileNotFoundError, match="has no folder 'images': name its ADEChallengeData2016"):
        load_ade20k(tmp_path)


def test_ade20k_that_is_not_whole_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images/training' does not exist.*ADEChallengeData2016\.zip"):
        load_ade20k(tmp_path)
    folder = write_ade20k(tmp_path / "ade")
    lines = (folder / "objectInfo150.txt").read_text().splitlines()
    (folder / "objectInfo150.txt").write_text("\n".join(lines[:-3]))
    with pytest.raises(ValueError, match=r"objectInfo150\.txt names 147 classes and must name 150: unpack it anew"):
        load_ade20k(folder)
    (folder / "objectInfo150.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"objectInfo150\.txt does not exist"):
        load_ade20k(folder)


# --------------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maps", ["label-maps", "annotations"])
def test_a_folder_has_pairs_of_one_name(tmp_path, maps):
    data = load_label_map_folder(write_folder(tmp_path, maps=maps), ignore_zero=False)
    assert data.label_names == NAMES
    for images in (data.train, data.val):
        for i, decoded in enumerate(read_maps(images)):
            assert np.array_equal(decoded, draw_numbers(i, (0, 1, 2, 255)))
            assert images.name_of(i).endswith(f"images/{images.split}/view_{i}.jpg")


def test_zero_of_a_folder_may_be_ignored(tmp_path):
    data = load_label_map_folder(write_folder(tmp_path, known=(0, 1, 2, 3)), ignore_zero=True)
    assert data.label_names == NAMES
    for i, decoded in enumerate(read_maps(data.train)):
        assert np.array_equal(decoded, draw_numbers(i, (0, 1, 2, 3)) - np.uint8(1))  # 0 - 1 is 255


def test_images_of_any_kind_and_dots_in_names_are_paired(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "images" / "train" / "view_1.jpg").rename(folder / "images" / "train" / "a.b.JPEG")
    (folder / "label-maps" / "train" / "view_1.png").rename(folder / "label-maps" / "train" / "a.b.PNG")
    (folder / "images" / "train" / ".hidden.jpg").write_bytes(b"")
    (folder / "images" / "train" / "notes.txt").write_text("of the photographer")
    images = load_label_map_folder(folder, ignore_zero=False).train
    assert [Path(images.name_of(i)).name for i in range(4)] == ["a.b.JPEG", "view_0.jpg", "view_2.jpg", "view_3.jpg"]
    assert np.array_equal(read_maps(images)[0], draw_numbers(1, (0, 1, 2, 255)))


def remove(*parts):
    return lambda folder: folder.joinpath(*parts).unlink()


def remove_folder(*parts):
    return lambda folder: shutil.rmtree(folder.joinpath(*parts))


def add(*parts):
    def write(folder):
        folder.joinpath(*parts).parent.mkdir(parents=True, exist_ok=True)
        folder.joinpath(*parts).write_bytes(b"")

    return write


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (
            remove("label-maps", "val", "view_2.png"),
            FileNotFoundError,
            "images/val/view_2.jpg has no label map {}/label",
        ),
        (remove("images", "val", "view_2.jpg"), FileNotFoundError, "label-maps/val/view_2.png has no image {}/images"),
        (
            remove_folder("images"),
            FileNotFoundError,
            "images/train' does not exist: it must hold images/train/NAME.jpg",
        ),
        (remove_folder("images", "val"), FileNotFoundError, "images/val' does not exist: it must hold"),
        (remove_folder("label-maps"), FileNotFoundError, "label-maps/train' does not exist: it must hold"),
        (remove("classes.txt"), FileNotFoundError, "write the names of the classes into it, one a line, in the order"),
        (add("classes.txt"), FileNotFoundError, "classes.txt does not exist or is empty"),
        (add("annotations", "train", "a.png"), ValueError, "has the folders label-maps and annotations: take one"),
        (add("images", "train", "view_1.png"), ValueError, "have one name: take one of them out"),
        (add("images", "train", "Paris", "a.jpg"), ValueError, "holds the folder 'Paris': move its files into"),
    ],
)
def test_a_fault_of_a_folder_is_said_in_one_line(tmp_path, damage, error, words):
    damage(write_folder(tmp_path))
    with pytest.raises(error, match=re.escape(words.format(tmp_path))) as caught:
        load_label_map_folder(tmp_path, ignore_zero=False)
    assert "\n" not in str(caught.value)


def test_a_split_without_files_is_an_error(tmp_path):
    write_folder(tmp_path, splits=("train",))
    for kind in ("images", "label-maps"):
        (tmp_path / kind / "val").mkdir()
    with pytest.raises(FileNotFoundError, match=r"images/val has no images: it must hold"):
        load_label_map_folder(tmp_path, ignore_zero=False)


def test_too_many_names_are_an_error(tmp_path):
    (write_folder(tmp_path) / "classes.txt").write_text("\n".join(map(str, range(256))))
    with pytest.raises(ValueError, match="there are 256 classes: label maps have 1 to 255"):
        load_label_map_folder(tmp_path, ignore_zero=False)


def test_nothing_is_decoded_while_loading(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("opened an image")

    monkeypatch.setattr(Image, "open", refuse)
    load_label_map_folder(write_folder(tmp_path), ignore_zero=False)


def test_fingerprints_tell_files_classes_and_numbers_apart(tmp_path):
    folder = write_folder(tmp_path / "one")
    known = [load_label_map_folder(folder, ignore_zero=zero).fingerprint for zero in (False, True)]
    moved = shutil.copytree(folder, tmp_path / "two")
    assert load_label_map_folder(moved, ignore_zero=False).fingerprint == known[0]
    with (folder / "label-maps" / "val" / "view_3.png").open("ab") as file:
        file.write(b"\0")
    known.append(load_label_map_folder(folder, ignore_zero=False).fingerprint)
    (folder / "classes.txt").write_text("wall\nsky\nfloor\n")
    known.append(load_label_map_folder(folder, ignore_zero=False).fingerprint)
    for kind, ending in (("images", "jpg"), ("label-maps", "png")):
        file = folder / kind / "train" / f"view_3.{ending}"
        file.rename(file.with_stem("view_4"))
    known.append(load_label_map_folder(folder, ignore_zero=False).fingerprint)
    assert len({*known}) == 5


def test_names_that_are_not_utf_8_are_read(tmp_path):
    folder = write_folder(tmp_path)
    for kind, ending in (("images", b".jpg"), ("label-maps", b".png")):
        file = folder / kind / "train" / f"view_0{ending.decode()}"
        file.rename(os.fsdecode(os.fsencode(file.parent) + b"/\xff" + ending))
    assert load_label_map_folder(folder, ignore_zero=False).train.num_images == 4


# --------------------------------------------------------------------------------------------------------
# In batches
# --------------------------------------------------------------------------------------------------------


def test_batches_are_the_same_with_and_without_workers(tmp_path):
    data = load_label_map_folder(write_folder(tmp_path, count=9), ignore_zero=False)
    transform = v2.Compose([v2.PILToTensor(), v2.RandomCrop(5), v2.RandomHorizontalFlip()])
    seen = []
    for num_workers in (0, 2):
        loader = TrainLoader(data.train, transform, channels=3, batch_size=4, seed=1, num_workers=num_workers)
        seen.append([batch for [batch] in loader.epoch(0)])
    assert len(seen[0]) == 2
    for batch, other in zip(*seen, strict=True):
        assert torch.equal(batch.images, other.images)
        for target, other_target in zip(split_targets(batch.targets), split_targets(other.targets), strict=True):
            assert target["label_map"].shape == (5, 5)
            assert torch.equal(target["label_map"], other_target["label_map"])


def test_a_faulty_map_makes_its_image_unreadable(tmp_path):
    folder = write_folder(tmp_path)
    faulty = folder / "label-maps" / "val" / "view_2.png"
    faulty.write_bytes(encode(np.full((6, 9), 9, np.uint8)))
    data = load_label_map_folder(folder, ignore_zero=False)
    [batch] = EvalLoader(data.val, v2.PILToTensor(), channels=3, batch_size=4)
    [(name, reason)] = batch.unreadable.items()
    assert name == str(folder / "images" / "val" / "view_2.jpg")
    assert reason.startswith(f"label map {faulty} has 9 in 54 pixels")
    assert batch.labels.tolist() == [0, 0, -1, 0]
    assert (split_targets(batch.targets)[2]["label_map"] == 255).all()


# --------------------------------------------------------------------------------------------------------
# The Hub
# --------------------------------------------------------------------------------------------------------


def write_repository(folder, image="image", label_map="annotation", known=(0, 1, 2, 255), **names):
    """A folder as a dataset repository is, with maps by `draw_numbers` and a column that is neither."""
    (folder / "data").mkdir(parents=True)
    features = Features(
        {image: datasets.Image(), label_map: datasets.Image(), "scene": ClassLabel(names=["in", "out"])}
    )
    for split, count in (("train", 5), ("validation", 3)):
        maps = [draw_numbers(i, known) for i in range(count)]
        rows = {
            image: [{"bytes": encode(np.stack([each] * 3, -1)), "path": None} for each in maps],
            label_map: [{"bytes": encode(each), "path": None} for each in maps],
            "scene": [0] * count,
        }
        Dataset.from_dict(rows, features).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    for name, text in names.items():
        (folder / {"id2label": "id2label.json", "classes": "classes.txt"}[name]).write_text(text)
    return folder


ID2LABEL = json.dumps({str(i): name for i, name in enumerate(NAMES)})


@pytest.mark.parametrize("columns", [("image", "annotation"), ("pixel_values", "label"), ("image", "parts")])
def test_a_repository_has_a_column_of_images_and_one_of_label_maps(tmp_path, columns):
    repository = write_repository(tmp_path / "rooms", *columns, id2label=ID2LABEL)
    data = load_hub_label_maps(str(repository), ignore_zero=False)
    assert data.label_names == NAMES
    assert (data.train.num_images, data.val.num_images) == (5, 3)
    for images in (data.train, data.val):
        for i, decoded in enumerate(read_maps(images)):
            assert np.array_equal(decoded, draw_numbers(i, (0, 1, 2, 255)))
    assert data.val.name_of(1) == "row 1 of val"
    [batch] = EvalLoader(data.val, v2.PILToTensor(), channels=3, batch_size=3, num_workers=1)
    for i, (image, target) in enumerate(zip(batch.images, split_targets(batch.targets), strict=True)):
        assert torch.equal(image[0], target["label_map"])
        assert np.array_equal(target["label_map"], draw_numbers(i, (0, 1, 2, 255)))


@pytest.mark.parametrize(
    "names",
    [
        {"classes": "wall\nfloor\nsky\n"},
        {"id2label": json.dumps({"0": "nothing", "1": "wall", "2": "floor", "3": "sky", "255": "unlabelled"})},
        {"id2label": json.dumps({"1": "wall", "2": "floor", "3": "sky"})},
    ],
)
def test_zero_of_a_repository_may_be_ignored(tmp_path, names):
    repository = write_repository(tmp_path / "rooms", known=(0, 1, 2, 3), **names)
    data = load_hub_label_maps(str(repository), ignore_zero=True)
    assert data.label_names == NAMES
    assert np.array_equal(read_maps(data.val)[1], draw_numbers(1, (0, 1, 2, 3)) - np.uint8(1))


@pytest.mark.parametrize("names", [{"id2label": ID2LABEL}, {"classes": "\n".join(NAMES)}])
def test_a_repository_of_the_hub_stays_in_the_cache(hub, tmp_path, names):
    """Its names too, whichever of their files it has."""
    folder = write_repository(tmp_path / "rooms", **names)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.publish("org/rooms", files)
    data = load_hub_label_maps("org/rooms", ignore_zero=False)
    assert data.label_names == NAMES
    with hub.down():
        again = load_hub_label_maps("org/rooms", ignore_zero=False)
    assert (again.label_names, again.fingerprint) == (NAMES, data.fingerprint)
    assert np.array_equal(read_maps(again.val)[2], draw_numbers(2, (0, 1, 2, 255)))


def test_folders_of_single_files_are_refused(tmp_path):
    for split in ("train", "validation"):
        for label in ("a", "b"):
            (tmp_path / "rooms" / split / label).mkdir(parents=True)
            (tmp_path / "rooms" / split / label / "0.png").write_bytes(encode(np.zeros((3, 3), np.uint8)))
    with pytest.raises(ValueError, match="is a folder of single files: download it, and give the folder with --data-"):
        load_hub_label_maps(str(tmp_path / "rooms"), ignore_zero=False)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"id2label": "[1]"}, 'id2label.json of --dataset {} must be like {{"0": "wall", "1": "sky"}}'),
        ({"id2label": "{"}, "id2label.json of --dataset {} must be like"),
        ({"id2label": '{"wall": 0}'}, "id2label.json of --dataset {} must be like"),
        ({"id2label": '{"0": "wall", "2": "sky"}'}, "id2label.json of --dataset {} names 0, 2, ...: it must name"),
        ({"id2label": "{}"}, "it must name the classes from 0 on, without gaps"),
    ],
)
def test_names_that_are_no_table_are_refused(tmp_path, names, words):
    repository = write_repository(tmp_path / "rooms", **names)
    with pytest.raises(ValueError, match=re.escape(words.format(repository))):
        load_hub_label_maps(str(repository), ignore_zero=False)


def test_a_repository_without_names_is_told_how_to_get_them(hub, tmp_path):
    folder = write_repository(tmp_path / "rooms")
    hub.publish("org/rooms", {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")})
    for repository in (str(folder), "org/rooms"):
        with pytest.raises(FileNotFoundError, match=r"must have id2label\.json or classes\.txt; or download it"):
            load_hub_label_maps(repository, ignore_zero=False)


def test_a_repository_out_of_reach_is_said_in_one_line(hub):
    with pytest.raises(FileNotFoundError, match=r"--dataset org/rooms is not on the Hub, or is private"):
        load_hub_label_maps("org/rooms", ignore_zero=False)


PICTURE = datasets.Image()


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"image": PICTURE, "annotation": PICTURE, "depth": PICTURE}, ("image", "annotation")),
        ({"left": PICTURE, "mask": PICTURE, "label": ClassLabel(names=["a"])}, ("left", "mask")),
        ({"image": Value("binary"), "labels": Value("binary")}, ("image", "labels")),
    ],
)
def test_columns_are_found_by_type_and_name(features, expected):
    assert find_map_columns(Features(features), "it") == expected


@pytest.mark.parametrize(
    "features",
    [
        {"image": PICTURE, "label": ClassLabel(names=["a"])},
        {"image": PICTURE, "mask": PICTURE, "annotation": PICTURE},
        {"left": PICTURE, "right": PICTURE},
        {"mask": PICTURE},
        {"image": PICTURE, "depth": PICTURE, "normals": PICTURE},
    ],
)
def test_columns_that_could_be_meant_otherwise_are_refused(features):
    with pytest.raises(ValueError, match=f"it has the columns {', '.join(features)}, of images .*; rename them"):
        find_map_columns(Features(features), "it")


def test_fingerprints_of_repositories_tell_numbers_apart(tmp_path):
    repository = str(write_repository(tmp_path / "rooms", classes="\n".join(NAMES)))
    known = {load_hub_label_maps(repository, ignore_zero=zero).fingerprint for zero in (False, True)}
    assert len(known) == 2


def test_rows_are_plain(tmp_path):
    """What is read in a worker is small: no decoded pixels."""
    images = load_label_map_folder(write_folder(tmp_path), ignore_zero=False).train
    [row] = images.read_rows([2])
    assert replace(row, target=None) == Row(2, tmp_path / "images" / "train" / "view_2.jpg")
    assert row.target.encoded == tmp_path / "label-maps" / "train" / "view_2.png"
