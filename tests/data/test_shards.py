"""Parquet and WebDataset: what was written is read, copied or streamed; faults are named in one line."""

import io
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from helpers.numbered_images import (
    NAMES,
    SHARDS,
    add_noise,
    check_numbers,
    encode_number,
    make_dataset,
    read_split,
    write_shards,
)

import s3a.data.columns
from s3a.data import TrainLoader, load_data
from s3a.data.decode import MAX_ENCODED_BYTES
from s3a.data.webdataset import split_key

NUM_TRAIN, NUM_VAL = 31, 11
IMAGE = encode_number(0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("source", "kind"), SHARDS)
def test_shards_hold_what_was_written(tmp_path, source, kind, streaming):
    data = load_data(source, write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL), streaming=streaming)
    assert data.label_names == ["0", "1", "2"]
    check_numbers(data, NUM_TRAIN, NUM_VAL)


@pytest.mark.parametrize(("source", "kind"), SHARDS)
def test_shards_train_alike_with_any_workers(tmp_path, source, kind):
    data = load_data(source, write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL))
    options = {"channels": 3, "batch_size": 10, "seed": 1}
    seen = [
        torch.cat([batch.images for [batch] in TrainLoader(data.train, add_noise, num_workers=n, **options).epoch(0)])
        for n in (0, 2)
    ]
    assert torch.equal(*seen)
    assert len(seen[0].unique(dim=0)) == 30


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("source", "kind"), SHARDS)
def test_unreadable_images_of_shards_are_named(tmp_path, source, kind, streaming):
    write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL, broken=(20,))
    _, labels, unreadable = read_split(load_data(source, tmp_path, streaming=streaming).train)
    assert (labels < 0).nonzero().flatten().tolist() == [20]
    copied = {"parquet": "row 20 of train", "tar": "row 20 of train (row 5 of train-0002.tar)"}[kind]
    assert unreadable == [f"row 5 of train-0002.{kind}" if streaming else copied]


@pytest.mark.parametrize("name", ["validation", "val", "valid", "test"])
@pytest.mark.parametrize(("source", "kind"), SHARDS)
def test_the_held_out_split_goes_by_several_names(tmp_path, source, kind, name):
    folder = write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL)
    (folder / "val").rename(folder / name)
    assert load_data(source, folder, streaming=True).val.num_images == NUM_VAL
    (folder / name / f"0.{kind}").rename(folder / f"{name}-00000-of-00001.{kind}")
    assert load_data(source, folder, streaming=True).val.num_images == NUM_VAL


@pytest.mark.parametrize(("source", "kind"), SHARDS)
def test_classes_are_named_by_a_file(tmp_path, source, kind):
    write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL)
    (tmp_path / "classes.txt").write_text("cat\ndog\nhorned owl\n")
    assert load_data(source, tmp_path, streaming=True).label_names == ["cat", "dog", "horned owl"]
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"10 images of train .* no label of the 2 classes, the first is row 2 with 2"):
        load_data(source, tmp_path, streaming=True)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("source", "kind"), SHARDS)
def test_missing_shards_are_named(tmp_path, source, kind, split):
    write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL)
    for path in (*tmp_path.glob(f"{split}*.{kind}"), *tmp_path.glob(f"{split}/*")):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {kind} shards of '{split}'"):
        load_data(source, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        load_data(source, tmp_path / "nowhere")


@pytest.mark.parametrize(("source", "kind"), SHARDS)
@pytest.mark.parametrize("damage", [lambda content: b"neither", lambda content: content[: len(content) // 2 + 100]])
def test_damaged_shards_are_named(tmp_path, source, kind, damage):
    path = write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL) / f"train-0001.{kind}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"train-0001.{kind} is no \w+ .*that can be read"):
        load_data(source, tmp_path)


@pytest.mark.parametrize("rows_at_once", [1, 3, 7])
def test_parquet_streams_in_chunks_of_any_size(tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr(s3a.data.columns, "READ_ROWS", rows_at_once)
    data = load_data("parquet", write_shards(tmp_path, "parquet", NUM_TRAIN, NUM_VAL), streaming=True)
    check_numbers(data, NUM_TRAIN, NUM_VAL)


def test_parquet_by_datasets_keeps_the_names_of_classes(tmp_path):
    for split, numbers in (("train", range(NUM_TRAIN)), ("test", range(NUM_TRAIN, NUM_TRAIN + NUM_VAL))):
        make_dataset(numbers).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    for streaming in (False, True):
        data = load_data("parquet", tmp_path, streaming=streaming)
        assert data.label_names == NAMES
        check_numbers(data, NUM_TRAIN, NUM_VAL)


def write_columns(tmp_path, **columns):
    for split in ("train", "val"):
        pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [IMAGE]}, "has no label column"),
        ({"label": [1]}, "has no image column"),
        ({"image": [IMAGE], "fine": [1], "coarse": [0]}, r"has 2 label columns \(fine, coarse\)"),
        (
            {"left": [IMAGE], "right": [IMAGE], "label": [1]},
            r"has 2 image columns \(left, right\)",
        ),
        ({"image": [IMAGE], "label": pa.array([None], pa.int64())}, "has no images|no label of the"),
        ({"image": [IMAGE] * 2, "label": [0, -1]}, "first is row 1 with -1"),
        ({"image": [IMAGE] * 2, "label": [0, 10**10]}, "has the label 10000000000: .* name them in classes.txt"),
        ({"image": [IMAGE], "label": pa.array([2**64 - 1], pa.uint64())}, "has labels that cannot be classes"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "has no images"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        load_data("parquet", write_columns(tmp_path, **columns), streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "columns",
    [
        {"image": [{"bytes": IMAGE, "path": "0.png"}], "label": [0]},
        {"image": [{"bytes": None, "path": "/dev/zero"}], "label": [0]},
        {"picture": [IMAGE], "label": [0]},
        {"image": [IMAGE], "class": [0]},
    ],
)
def test_shards_with_other_columns_are_named(tmp_path, streaming, columns):
    folder = write_columns(tmp_path, image=[IMAGE] * 2, label=[0, 1])
    pq.write_table(pa.table(columns), folder / "train_b.parquet")  # behind train.parquet
    with pytest.raises(ValueError, match=r"train_b\.parquet has other columns 'image' and 'label' than train\.p"):
        load_data("parquet", folder, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_nobody_needs_may_differ(tmp_path, streaming):
    folder = write_columns(tmp_path, image=[IMAGE] * 2, label=[0, 1])
    pq.write_table(pa.table({"image": [IMAGE], "label": [1], "caption": ["a cat"]}), folder / "train_b.parquet")
    _, labels, _ = read_split(load_data("parquet", folder, streaming=streaming).train)
    assert labels.tolist() == [0, 1, 1]


def test_damage_that_is_found_when_shards_are_copied_is_one_line(tmp_path):
    """Of the images: labels and the end of the file are whole."""
    folder = write_columns(tmp_path, label=[0, 1] * 50, image=[IMAGE + bytes(50_000)] * 100)
    content = bytearray((folder / "train.parquet").read_bytes())
    start = len(content) // 3
    content[start : start + 400] = bytes(255 - byte for byte in content[start : start + 400])
    (folder / "train.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"^train in \S+ has a file that cannot be read \(.*\): get it again$"):
        load_data("parquet", folder)


def test_an_image_that_is_no_column_of_images_is_said(tmp_path):
    folder = write_columns(tmp_path, image=["a.png"], label=["cat"])
    with pytest.raises(ValueError, match=r"no image column of encoded images among image \(string\), label \(string\)"):
        load_data("parquet", folder)


def test_shards_that_number_their_classes_otherwise_are_named(tmp_path):
    for name, names in (("train-a", ["cat", "dog"]), ("train-b", ["dog", "cat"]), ("val", ["cat", "dog"])):
        features = Features(image=datasets.Image(), label=ClassLabel(names=names))
        cells = [{"bytes": IMAGE, "path": None}] * 2
        Dataset.from_dict({"image": cells, "label": [0, 1]}, features).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"train-b\.parquet has other columns .* the same classes; write them alike$"):
        load_data("parquet", tmp_path)


def test_of_several_columns_the_one_called_label_is_taken(tmp_path):
    folder = write_columns(tmp_path, image=[IMAGE] * 2, width=[2, 2], label=[0, 1])
    assert load_data("parquet", folder, streaming=True).label_names == ["0", "1"]


def test_classes_numbered_otherwise_in_the_other_split_are_refused(tmp_path):
    for split, names in (("train", ["cat", "dog"]), ("val", ["dog", "cat"])):
        features = Features(image=datasets.Image(), label=ClassLabel(names=names))
        cells = [{"bytes": IMAGE, "path": None}]
        Dataset.from_dict({"image": cells, "label": [0]}, features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match="both splits must number the same classes alike"):
        load_data("parquet", tmp_path, streaming=True)


def write_members(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("0.png", IMAGE), ("1.png", IMAGE), ("1.cls", b"0")],
            r"train.tar: 0 has the files png",
        ),
        ([("0.cls", b"0")], r"train.tar: 0 has the files cls: of one name .* must be one image"),
        ([("0.png", IMAGE), ("0.jpg", IMAGE), ("0.cls", b"0")], "must be one image"),
        ([("0.png", IMAGE), ("0.cls", b"0")] * 2, "has the files png, cls, png, cls"),
        ([("0.png", IMAGE), ("0.cls", b"dog")], "has the label 'dog'"),
        ([("0.png", IMAGE), ("0.cls", b"-1")], "has the label '-1'"),
        ([("0.png", IMAGE), ("0.cls", b"1" * 10**6)], "has the label '1{19}' in its cls: .* at most 18 bytes"),
        ([("0.png", IMAGE), ("0.cls", b"9" * 18)], "has the label 999999999999999999: labels are the numbers of"),
        ([("0.png", IMAGE), ("0.cls", b"10000000000")], "has the label 10000000000: labels are the numbers of classes"),
    ],
)
def test_samples_that_are_not_whole_are_named(tmp_path, members, message):
    for split in ("train", "val"):
        write_members(tmp_path / f"{split}.tar", members)
    with pytest.raises(ValueError, match=message):
        load_data("webdataset", tmp_path)


def test_a_member_that_is_too_large_is_named_and_not_read(tmp_path):
    """Its file is sparse: it takes no space."""
    for split in ("train", "val"):
        write_members(tmp_path / f"{split}.tar", [("0.png", IMAGE), ("0.cls", b"0")])
    with (tmp_path / "train.tar").open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        huge = tarfile.TarInfo("1.jpg")
        huge.size = MAX_ENCODED_BYTES + 1
        tar.addfile(huge)
        file.seek(-(-huge.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, io.SEEK_CUR)
        tar.offset = file.tell()
        label = tarfile.TarInfo("1.cls")
        label.size = 1
        tar.addfile(label, io.BytesIO(b"0"))
    with pytest.raises(
        ValueError, match=r"train\.tar: 1 has an image of 268,435,457 bytes, and at most 268,435,456 are"
    ):
        load_data("webdataset", tmp_path)


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("a.b/0001.JPEG", ("a.b/0001", "jpeg")),
        ("0001.left.png", ("0001", "left.png")),
        ("folder.v2/README", ("folder.v2/README", "")),
    ],
)
def test_file_names_are_cut_as_webdataset_does(member, expected):
    assert split_key(member) == expected


@pytest.mark.parametrize(("source", "kind"), SHARDS)
def test_fingerprints_change_with_shards(tmp_path, source, kind):
    def fingerprint(streaming=True):
        return load_data(source, tmp_path, streaming=streaming).fingerprint

    write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL)
    first = fingerprint()
    assert fingerprint(streaming=False) == first
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    second = fingerprint()
    write_shards(tmp_path, kind, NUM_TRAIN + 30, NUM_VAL)
    assert len({first, second, fingerprint()}) == 3
