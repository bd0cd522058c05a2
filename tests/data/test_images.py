"""Rows of datasets: their images are the bytes in them, and files only where the source itself found these."""

import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Value
from helpers.alarm import stop_after
from helpers.numbered_images import encode_number, make_images, make_loader, read_split, write_shards
from PIL import Image

from s3a.data import DatasetImages, load_data
from s3a.data.decode import EncodedImage
from s3a.data.images import DataError


def make_rows(files: list[EncodedImage | None]) -> Dataset:
    """A dataset of these images, with their numbers as labels."""
    features = Features(image=datasets.Image(), label=Value("int64"))
    return Dataset.from_dict({"image": files, "label": [*range(len(files))]}, features)


def test_rows_are_those_that_are_asked_for():
    images = make_images(9)
    assert [(row.index, row.encoded["bytes"], row.label) for row in images.read_rows([7, 0, 7])] == [
        (index, encode_number(index), index % 3) for index in (7, 0, 7)
    ]
    assert images.read_rows([]) == []


def test_rows_of_a_selection_are_its_own():
    """datasets keeps a table of indices then."""
    rows = make_images(9).dataset.with_format(None).select([8, 3, 5])
    assert [row.label for row in DatasetImages(rows, "train").read_rows([2, 0])] == [5 % 3, 8 % 3]


def test_paths_are_opened_where_the_source_made_them_alone(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode_number(300))
    content = {"bytes": encode_number(301), "path": "a.png"}
    rows = make_rows([{"bytes": None, "path": str(path)}, content, None])
    own, others = DatasetImages(rows, "train", paths=True), DatasetImages(rows, "train")
    assert read_split(own)[0].flatten().tolist() == [300, 301, 0]
    assert read_split(own)[2] == ["row 2 of train"]
    assert own.name_of(0) == str(path)
    assert read_split(others)[0].flatten().tolist() == [0, 301, 0]
    assert read_split(others)[2] == ["row 0 of train", "row 2 of train"]


@pytest.mark.parametrize("streaming", [False, True])
def test_paths_in_shards_are_not_opened(tmp_path, streaming):
    """Neither an image, nor a FIFO, which would wait for ever."""
    (tmp_path / "a.png").write_bytes(encode_number(7))
    os.mkfifo(tmp_path / "b.png")
    files = [
        *[{"bytes": None, "path": str(tmp_path / name)} for name in ("a.png", "b.png")],
        {"bytes": encode_number(9), "path": str(tmp_path / "a.png")},
    ]
    table = pa.table({"image": files, "label": [0, 1, 1]})
    for split in ("train", "val"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    with stop_after(seconds=60):
        pixels, labels, unreadable = read_split(load_data("parquet", tmp_path, streaming=streaming).val)
    assert pixels.flatten().tolist() == [0, 0, 9]
    assert labels.tolist() == [-1, -1, 1]
    assert len(unreadable) == 2
    assert not any(str(tmp_path) in name for name in unreadable)


@pytest.mark.parametrize("streaming", [False, True])
def test_loaders_refuse_images_of_many_pixels_without_a_warning(tmp_path, monkeypatch, recwarn, streaming):
    """Those of four, for that matter."""
    data = load_data("parquet", write_shards(tmp_path, "parquet", 12, 5), streaming=streaming)
    recwarn.clear()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    assert len(read_split(data.val)[2]) == 5
    with pytest.raises(DataError, match=r"since it has 4 pixels, and at most 3 are decoded"):
        list(make_loader(data.train).epoch(0))
    assert not recwarn.list
