"""Streams: rows that overtake each other within a window, and are kept no longer than they are of use."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.numbered_images import make_loader, read_steps, write_shards

import s3a.data.stream
from s3a.data import load_data
from s3a.data.images import Shuffle
from s3a.data.stream import SUBSTITUTES, WINDOW, Walk, shuffle_in_window
from s3a.data.webdataset import TarPart

NUM_TRAIN = 61


@pytest.fixture
def shards(tmp_path):
    return load_data("parquet", write_shards(tmp_path, "parquet", NUM_TRAIN, 3), streaming=True)


def test_a_stream_keeps_nothing_behind(shards):
    loader = make_loader(shards.train, repeats=2)
    list(loader.epoch(0))
    walk = loader._loader.dataset.batches.images._walk
    assert walk.num_uses.sum() == walk.num_wanted.sum() == 0
    assert not walk.kept


def test_a_loader_walks_once_an_epoch(tmp_path, monkeypatch):
    images = load_data("webdataset", write_shards(tmp_path, "tar", NUM_TRAIN, 3), streaming=True).train
    walked, read = Counter(), TarPart.read
    monkeypatch.setattr(TarPart, "read", lambda part, needed: walked.update([part.name]) or read(part, needed))
    loaders = [make_loader(images, process_index=i, num_processes=2) for i in range(2)]
    next(loaders[0].epoch(1))
    walked.clear()
    assert len(list(zip(*(loader.epoch(2) for loader in loaders), strict=True))) == 5
    assert set(walked.values()) == {2}


def test_a_walk_has_a_row_ahead_as_often_as_it_is_still_to_be_taken(shards):
    """Or a loader that asks for a row twice would go on with a walk that keeps it once."""
    shuffle = Shuffle(seed=0, epoch=0, num_rows=4)
    walk = Walk(shards.train, shuffle, np.array([5, 5, 7]))
    assert walk.has_ahead(np.array([5, 7, 5]), shuffle)
    assert not walk.has_ahead(np.array([5, 7]), None)
    walk.take(np.array([5]))
    assert walk.has_ahead(np.array([5, 7]), shuffle)
    assert not walk.has_ahead(np.array([5, 5]), shuffle)
    assert not walk.has_ahead(np.array([6]), shuffle)


def test_a_part_without_a_needed_row_is_not_opened(tmp_path, monkeypatch):
    images = load_data("webdataset", write_shards(tmp_path, "tar", NUM_TRAIN, 3), streaming=True).train
    opened, read = [], TarPart.read
    monkeypatch.setattr(TarPart, "read", lambda part, needed: opened.append(part.name) or read(part, needed))
    [candidates] = images.read(np.array([NUM_TRAIN - 1]), None, lambda: np.array([], dtype=np.int64))
    assert [row.index for row in candidates] == [NUM_TRAIN - 1]
    assert opened == [images.parts[len(images.parts) - 1].name]


def test_rows_of_a_stream_overtake_each_other_within_the_window():
    order = shuffle_in_window((50_000,), Shuffle(seed=0, epoch=0, num_rows=50_000))
    assert sorted(order) == list(range(50_000))
    displacement = order - np.arange(50_000)
    assert np.abs(displacement).max() <= WINDOW
    assert np.abs(displacement).mean() > WINDOW / 8


def test_the_rows_that_are_repeated_are_spread_over_the_stream(tmp_path, monkeypatch):
    """A third of the rows, thrice each: of every part some, also where they hardly overtake each other."""
    monkeypatch.setattr(s3a.data.stream, "WINDOW", 1)
    shuffle_in_window.cache_clear()
    images = load_data("webdataset", write_shards(tmp_path, "tar", NUM_TRAIN, 3), streaming=True).train
    indices = {index for [batch] in make_loader(images, repeats=3).epoch(0) for index in batch.indices.tolist()}
    shuffle_in_window.cache_clear()
    assert len(images.parts) > 1
    assert {images.parts.locate(index)[0] for index in indices} == set(range(len(images.parts)))


def test_a_worker_holds_its_share_of_the_window_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(s3a.data.stream, "WINDOW", 30)
    shuffle_in_window.cache_clear()
    images = load_data("webdataset", write_shards(tmp_path, "tar", 400, 3), streaming=True).train
    loader = make_loader(images, process_index=0, num_processes=4)
    most = 0
    for _ in loader.epoch(0):
        most = max(most, len(loader._loader.dataset.batches.images._walk.kept))
    shuffle_in_window.cache_clear()
    assert 0 < most <= (30 / 4 + 12) * (1 + SUBSTITUTES)


def test_parts_change_places_and_what_is_left_out_is_spread():
    orders = [shuffle_in_window((500, 500, 500), Shuffle(0, epoch, 1490)) for epoch in range(60)]
    left_out = Counter(row for order in orders for row in {*range(1500)} - {*order.tolist()})
    assert sum(left_out.values()) == 600
    assert max(left_out.values()) <= 5
    orders = [shuffle_in_window((50_000,) * 3, Shuffle(0, epoch, 150_000)) for epoch in range(24)]
    assert len({order[0] // 50_000 for order in orders}) == 3


def test_a_stream_in_use_can_be_handed_to_a_process(shards):
    batches = make_loader(shards.train)._loader.dataset
    first = batches[0, 0]
    assert torch.equal(pickle.loads(pickle.dumps(batches))[0, 0].images, first.images)


def test_a_stream_that_ends_early_says_so(tmp_path):
    images = load_data("parquet", write_shards(tmp_path, "parquet", 40, 3), streaming=True).train
    (tmp_path / "train-0001.parquet").write_bytes((tmp_path / "train-0000.parquet").read_bytes())
    with pytest.raises(ValueError, match="train ended before its 40 images had been read"):
        read_steps(images)
