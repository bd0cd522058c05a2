"""Streams: every row once a pass, every byte once an epoch, and the same rows again behind any place."""

import io
import itertools
import json
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.numbered_images import (
    NUM_CLASSES,
    add_noise,
    check_numbers,
    encode_number,
    make_loader,
    show_number,
    write_parquet,
    write_shards,
    write_tar,
)

import s3a.data.batches
import s3a.data.stream
from s3a.data import EvalLoader, TrainLoader, load_data
from s3a.data.images import DataError
from s3a.data.stream import START, Share, StreamImages

NUM_TRAIN, NUM_VAL = 61, 23
KINDS = {"parquet": ("parquet", write_parquet), "webdataset": ("tar", write_tar)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a reader has several of these few images."""
    monkeypatch.setattr(s3a.data.stream, "SHUFFLE_ROWS", 5)
    monkeypatch.setattr(s3a.data.stream, "READ_ROWS", 1)


def write_even_shards(folder, source="parquet", num_shards=6, rows=4, num_val=NUM_VAL):
    """Shards of as many rows each, and one of the validation images."""
    kind, write = KINDS[source]
    for shard in range(num_shards):
        write(folder / f"train-{shard:02d}.{kind}", range(shard * rows, (shard + 1) * rows))
    write(folder / f"val-00.{kind}", range(num_shards * rows, num_shards * rows + num_val))
    return load_data(source, folder, streaming=True)


@pytest.fixture(params=list(KINDS))
def uneven(request, tmp_path):
    """Shards of 12, 18 and 31 rows."""
    return load_data(request.param, write_shards(tmp_path, KINDS[request.param][0], NUM_TRAIN, NUM_VAL), streaming=True)


def take_pass(images, share, seed=0, epoch=0, repeats=1, place=START):
    """The draws of a share until its second pass."""
    return list(
        itertools.takewhile(lambda draw: draw.place["passes"] == 0, images.draw(share, seed, epoch, repeats, place))
    )


# --------------------------------------------------------------------------------------------------------
# Which rows a reader has
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("repeats", [1, 3])
def test_in_a_pass_readers_have_every_row_once(uneven, count, repeats):
    shares = [take_pass(uneven.train, Share(index, count), repeats=repeats) for index in range(count)]
    rows = Counter(draw.row.index for share in shares for draw in share)
    assert len(rows) == NUM_TRAIN
    assert set(rows.values()) == {repeats}
    shards = [{draw.row.index % uneven.train.num_shards for draw in share} for share in shares]
    assert sum(map(len, shards)) == 3, "a shard has one reader"
    assert len({draw.seeds for share in shares for draw in share}) == NUM_TRAIN * repeats


def test_rows_are_shuffled_in_blocks_and_shards_among_each_other(tmp_path):
    images = write_even_shards(tmp_path, num_shards=8).train
    orders = [[draw.row.index for draw in take_pass(images, Share(0, 1), epoch=epoch)] for epoch in range(12)]
    assert len({tuple(order) for order in orders}) == 12
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({index % 8 for order in orders for index in order[:1]}) > 3, "another shard is first"
    for order in orders:
        block = [index % 8 for index in order[:5]]
        assert len({*block}) <= 2, "no row comes from behind its block"
    assert any([index // 8 for index in order[:5]] != sorted(index // 8 for index in order[:5]) for order in orders)
    other_seed = [draw.row.index for draw in take_pass(images, Share(0, 1), seed=1)]
    assert other_seed != orders[0]


def test_epochs_deal_the_shards_anew(tmp_path):
    images = write_even_shards(tmp_path, num_shards=8).train
    dealt = {
        frozenset(draw.row.index % 8 for draw in take_pass(images, Share(0, 2), epoch=epoch)) for epoch in range(8)
    }
    assert len(dealt) > 4


def test_a_reader_that_has_come_to_its_end_begins_another_pass(uneven):
    draws = itertools.islice(uneven.train.draw(Share(1, 3), 0, 0, 1), 3 * 31)
    rows = [(draw.place["passes"], draw.row.index) for draw in draws]
    passes = [[row for number, row in rows if number == each] for each in range(2)]
    assert sorted(passes[0]) == sorted(passes[1])
    assert passes[0] != passes[1]


@pytest.mark.parametrize("repeats", [1, 2])
def test_behind_any_place_come_the_same_draws(uneven, repeats):
    def describe(draw):
        return draw.row.index, draw.row.encoded, draw.row.label, draw.seeds, draw.place

    whole = list(itertools.islice(uneven.train.draw(Share(0, 2), 3, 2, repeats), 60 * repeats))
    assert whole[-1].place["passes"] > 0
    for position in (0, 3, 4, 5, 11, 30, 31, 48):
        place = json.loads(json.dumps(whole[position].place))
        rest = itertools.islice(uneven.train.draw(Share(0, 2), 3, 2, repeats, place), len(whole) - position - 1)
        assert [*map(describe, rest)] == [*map(describe, whole[position + 1 :])]


def test_a_place_is_small(uneven):
    (draw,) = itertools.islice(uneven.train.draw(Share(0, 1), 0, 0, 1), 20, 21)
    assert len(json.dumps(draw.place)) < 300


# --------------------------------------------------------------------------------------------------------
# Loaders
# --------------------------------------------------------------------------------------------------------


def iterate(images, num_processes=1, epoch=0, first_step=0, states=None, **options):
    """The steps of an epoch: of each process its micro-batches, and the states of the loaders behind them."""
    options = {"batch_size": 12, "seed": 5, "channels": 3} | options
    loaders = [
        TrainLoader(images, add_noise, process_index=process, num_processes=num_processes, **options)
        for process in range(num_processes)
    ]
    for loader, state in zip(loaders, states or (), strict=False):
        loader.load_state_dict(json.loads(json.dumps(state)))
    for parts in zip(*(loader.epoch(epoch, first_step) for loader in loaders), strict=True):
        yield parts, [loader.state_dict() for loader in loaders]


def flatten(parts):
    return [tensor for batches in parts for batch in batches for tensor in (batch.images, batch.labels, batch.indices)]


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (3, 1)])
@pytest.mark.parametrize(("accumulate", "repeats"), [(1, 1), (2, 3)])
def test_an_epoch_goes_on_exactly_where_it_was_left(tmp_path, num_processes, num_workers, accumulate, repeats):
    images = write_even_shards(tmp_path, num_shards=7, rows=9).train
    options = {
        "num_processes": num_processes, "num_workers": num_workers, "accumulate": accumulate, "repeats": repeats,
        "epoch": 4,
    }  # fmt: skip
    whole = list(iterate(images, **options))
    assert len(whole) == 5
    for step in (1, 4):
        rest = list(iterate(images, first_step=step, states=whole[step - 1][1], **options))
        assert len(rest) == 5 - step
        for (parts, states), (expected, expected_states) in zip(rest, whole[step:], strict=True):
            assert all(torch.equal(*pair) for pair in zip(flatten(parts), flatten(expected), strict=True))
            assert states == expected_states


@pytest.mark.parametrize(("num_processes", "num_workers", "batch_size"), [(1, 0, 6), (2, 0, 4), (2, 3, 4), (3, 2, 6)])
def test_an_epoch_of_even_shards_has_every_image_once(tmp_path, num_processes, num_workers, batch_size):
    images = write_even_shards(tmp_path, num_shards=6, rows=4).train
    steps = iterate(images, num_processes, num_workers=num_workers, batch_size=batch_size, epoch=1)
    seen = [index for parts, _ in steps for [batch] in parts for index in batch.indices.tolist()]
    assert sorted(seen) == list(range(24))


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_the_steps_of_an_epoch_do_not_depend_on_the_processes(uneven, num_processes):
    assert len(list(iterate(uneven.train, num_processes))) == NUM_TRAIN // 12


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_that_is_left_begins_again(uneven, num_workers):
    loader = make_loader(uneven.train, batch_size=4, num_workers=num_workers)
    first = [batch.indices.tolist() for [batch] in loader.epoch(0)]
    for _ in zip(range(2), loader.epoch(1), strict=False):
        pass
    assert [batch.indices.tolist() for [batch] in loader.epoch(0)] == first
    next(loader.epoch(0))
    assert [batch.indices.tolist() for [batch] in loader.epoch(0, 1)] == first[1:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_new_epoch_ends_those_begun_before(uneven, num_workers):
    loader = make_loader(uneven.train, batch_size=4, num_workers=num_workers)
    second = [batch.indices.tolist() for [batch] in make_loader(uneven.train, batch_size=4).epoch(1)]
    if num_workers:
        second = [batch.indices.tolist() for [batch] in loader.epoch(1)]
    first = loader.epoch(0)
    next(first)
    steps = loader.epoch(1)
    seen = [next(steps)[0].indices.tolist() for _ in range(2)]
    assert list(first) == []
    del first
    assert seen + [batch.indices.tolist() for [batch] in steps] == second


def test_readers_read_their_next_block_at_different_times(uneven):
    """The first block of each has its own length, up to that of the others."""

    def measure_blocks(index: int) -> list[int]:
        draws = itertools.islice(uneven.train.draw(Share(index, 3), 0, 0, 1), 12)
        return [len([*group]) for _, group in itertools.groupby(draws, key=lambda draw: draw.place["shards"])]

    assert [measure_blocks(index)[:2] for index in range(3)] == [[1, 5], [3, 5], [5, 5]]


def test_a_stream_needs_no_cache(tmp_path, monkeypatch):
    """Where datasets would leave a file for each order of the shards, locked by all workers."""
    images = write_even_shards(tmp_path, "webdataset").train
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    before = {*cache.rglob("*")}
    for epoch in range(2):
        assert list(make_loader(images).epoch(epoch))
    assert {*cache.rglob("*")} == before
    assert not (tmp_path / "cache").exists()


def test_an_epoch_without_a_place_begins_with_the_first_shards(uneven):
    whole = [batch.indices.tolist() for [batch] in make_loader(uneven.train).epoch(0)]
    assert [batch.indices.tolist() for [batch] in make_loader(uneven.train).epoch(0, 2)] == whole[:-2]


def test_images_and_labels_belong_together(uneven):
    for [batch] in make_loader(uneven.train, show_number).epoch(0):
        starts = [0, 12, 30]
        numbers = [starts[index % 3] + index // 3 for index in batch.indices.tolist()]
        assert batch.images.flatten().tolist() == numbers
        assert batch.labels.tolist() == [number % NUM_CLASSES for number in numbers]


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (1, 3), (2, 0), (2, 2), (3, 1), (5, 2)])
def test_evaluation_has_every_image_once(uneven, num_processes, num_workers):
    """Also where there are fewer shards than processes: some have none."""
    options = {"channels": 3, "batch_size": 8, "num_processes": num_processes, "num_workers": num_workers}
    for images, count in ((uneven.train, NUM_TRAIN), (uneven.val, NUM_VAL)):
        loaders = [EvalLoader(images, show_number, process_index=i, **options) for i in range(num_processes)]
        batches = [batch for loader in loaders for batch in loader]
        indices = torch.cat([batch.indices for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        assert len(indices[indices >= 0].unique()) == (indices >= 0).sum() == count
        assert ((labels >= 0) == (indices >= 0)).all()
        assert {len(batch.labels) for batch in [*batches, loaders[0].make_padding()]} == {-(-8 // num_processes)}
        assert (loaders[0].make_padding().labels == -1).all()


# --------------------------------------------------------------------------------------------------------
# Bytes
# --------------------------------------------------------------------------------------------------------


def write_large_shards(folder, source, num_shards=6, rows=30):
    """Shards of incompressible images, 2 MB each; the parquet ones in groups of 10 rows."""
    noise = np.random.default_rng(0)
    for split, shards in (("train", num_shards), ("val", 1)):
        for shard in range(shards):
            images = [encode_number(row) + noise.bytes(64_000) for row in range(rows)]
            if source == "parquet":
                table = pa.table({"image": images, "label": [0, 1] * (rows // 2), "caption": ["long " * 500] * rows})
                pq.write_table(table, folder / f"{split}-{shard}.parquet", row_group_size=10)
            else:
                write_tar_of(folder / f"{split}-{shard}.tar", images)
    return load_data(source, folder, streaming=True)


def write_tar_of(path, images):
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(images):
            for ending, content in (("png", image), ("cls", b"1")):
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def count_read(pids):
    """Bytes that these processes have asked for in read calls so far."""
    return sum(int(Path(f"/proc/{pid}/io").read_text().split()[1]) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of bytes is in /proc")
@pytest.mark.parametrize("source", list(KINDS))
def test_two_processes_of_three_workers_read_every_byte_once(tmp_path, source):
    images = write_large_shards(tmp_path, source).train
    size = sum(path.stat().st_size for path in tmp_path.glob("train*"))
    loaders = [
        TrainLoader(
            images, show_number, channels=3, batch_size=12, seed=0, process_index=i, num_processes=2, num_workers=3
        )
        for i in range(2)
    ]
    for loader in loaders:
        list(loader.epoch(0))  # also reads what Python imports on the way
    workers = [worker.pid for loader in loaders for worker in loader._loader._iterator._workers]
    assert len({*workers}) == 6
    before = count_read(workers)
    indices = [index for loader in loaders for [batch] in loader.epoch(1) for index in batch.indices.tolist()]
    assert sorted(indices) == list(range(180))
    assert 0.95 * size < count_read(workers) - before < 1.05 * size


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of bytes is in /proc")
def test_looking_through_tars_reads_no_images(tmp_path):
    write_large_shards(tmp_path, "webdataset")
    size = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    before = count_read([os.getpid()])
    load_data("webdataset", tmp_path, streaming=True)
    assert count_read([os.getpid()]) - before < 0.05 * size


# --------------------------------------------------------------------------------------------------------
# What is refused, and what breaks on the way
# --------------------------------------------------------------------------------------------------------


def test_more_workers_than_shards_are_not_started(uneven):
    for num_processes, expected in ((1, 3), (2, 1), (3, 1)):
        loader = make_loader(uneven.train, num_processes=num_processes, num_workers=8)
        assert loader.num_workers == loader.num_readers == expected


def test_more_processes_than_shards_are_refused(uneven):
    with pytest.raises(
        ValueError, match=r"train has 3 shards for 4 processes: each must have one of its own.*leave --streaming out"
    ):
        make_loader(uneven.train, num_processes=4)


@pytest.mark.parametrize("source", list(KINDS))
def test_an_image_that_cannot_be_read_is_replaced_by_the_next_one_and_named(tmp_path, source):
    kind, _ = KINDS[source]
    data = load_data(source, write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL, broken=(3, 40)), streaming=True)
    batches = [batch for [batch] in make_loader(data.train, show_number, batch_size=10, repeats=1).epoch(0)]
    assert all(len(batch.labels) == 10 for batch in batches)
    named = {name for batch in batches for name in batch.unreadable}
    assert named == {f"row 3 of train-0000.{kind}", f"row 10 of train-0002.{kind}"}
    assert not {3, 40} & {int(number) for batch in batches for number in batch.images.flatten()}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_but_unreadable_images_is_an_error(tmp_path, num_workers):
    images = load_data("parquet", write_shards(tmp_path, "parquet", 40, 3, tuple(range(40))), streaming=True).train
    with pytest.raises(DataError, match=r"^40 images of train in a row .* is row \d+ of train-000.*, since it is no i"):
        list(make_loader(images, num_workers=num_workers).epoch(0))


def test_broken_images_end_a_run_where_they_are_neighbours(tmp_path, monkeypatch):
    """Others are replaced, however many they are."""
    monkeypatch.setattr(s3a.data.batches, "MOST_UNREADABLE", 3)
    monkeypatch.setattr(s3a.data.stream, "SHUFFLE_ROWS", 1)

    def read(broken):
        images = load_data("parquet", write_shards(tmp_path, "parquet", NUM_TRAIN, NUM_VAL, broken), streaming=True)
        return [batch for [batch] in make_loader(images.train, batch_size=12).epoch(0)]

    assert len({name for batch in read(range(0, NUM_TRAIN, 2)) for name in batch.unreadable}) > 20
    with pytest.raises(DataError, match=r"^3 images of train in a row cannot be read, the first is row 10 of train-00"):
        read((40, 41, 42))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda path: path.unlink(),
            r"train-0002\.parquet cannot be read behind 0 rows \(.*: see that it can be reached and is whole, then go",
            id="gone",
        ),
        pytest.param(
            lambda path: write_parquet(path, range(30, 50)),
            r"train-0002\.parquet has 20 rows, and had 31 when",
            id="shorter",
        ),
        pytest.param(
            lambda path: write_parquet(path, range(30, 70)),
            r"train-0002\.parquet has 40 rows, and had 31 when",
            id="longer",
        ),
    ],
)
def test_a_shard_that_changes_is_named(tmp_path, num_workers, change, message):
    images = load_data("parquet", write_shards(tmp_path, "parquet", NUM_TRAIN, NUM_VAL), streaming=True).train
    change(tmp_path / "train-0002.parquet")
    with pytest.raises(DataError, match=message):
        list(make_loader(images, num_workers=num_workers).epoch(0))


def test_a_label_that_is_no_class_is_named(uneven):
    uneven.train.num_classes = 2
    with pytest.raises(DataError, match=r"^row \d+ of train-\d+\.\w+ has the label 2: it must be 0 to 1$"):
        list(make_loader(uneven.train).epoch(0))


def test_a_reader_of_empty_shards_says_so():
    """Where nobody has counted the rows, as on the Hub."""
    cell = {"bytes": encode_number(1), "path": None}
    images = StreamImages(
        lambda shard: [(cell, 0)] * 10 * shard, ["a", "b"], split="train", num_images=10, num_classes=1
    )
    with pytest.raises(DataError, match=r"reader [01] of 2 has shards of train without a row: write fewer and larger"):
        for index in range(2):
            next(images.draw(Share(index, 2), 0, 0, 1))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", list(KINDS))
def test_empty_shards_are_left_out(tmp_path, source, streaming):
    kind, write = KINDS[source]
    write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL)
    write(tmp_path / f"train-0001b.{kind}", range(0))
    write(tmp_path / f"train-0003.{kind}", range(0))
    data = load_data(source, tmp_path, streaming=streaming)
    assert data.train.num_images == NUM_TRAIN
    check_numbers(data, NUM_TRAIN, NUM_VAL)
    if streaming:
        assert data.train.num_shards == 3
