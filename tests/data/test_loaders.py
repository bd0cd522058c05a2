"""Loaders: each image where and how the seed, the epoch and the step say, on any number of processes and workers."""

import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.numbered_images import (
    NUM_CLASSES,
    list_indices,
    make_images,
    make_loader,
    read_steps,
    show_number,
    write_shards,
)
from PIL import Image
from timm.data import create_transform

import s3a.data.batches
from s3a.data import DatasetImages, EvalLoader, TrainLoader, load_data, loaders
from s3a.data.batches import shuffle_rows
from s3a.data.decode import decode_image
from s3a.data.images import MapImages, Row
from s3a.data.loaders import block_signals, ignore_signals
from s3a.data.targets import Objects, join_targets, split_targets

NUM_TRAIN, NUM_VAL = 61, 23
BROKEN = (3, 17, 18, NUM_TRAIN + 5)


@pytest.fixture(scope="module")
def images():
    return make_images(NUM_TRAIN)


@pytest.fixture(scope="module")
def broken_images():
    return make_images(NUM_TRAIN, BROKEN)


@pytest.fixture
def count_decoded(monkeypatch):
    """Counts what is decoded in this process."""
    counts = Counter()

    def counting(encoded, mode):
        counts["decoded"] += 1
        return decode_image(encoded, mode)

    monkeypatch.setattr(s3a.data.batches, "decode_image", counting)
    return counts


def assert_equal(seen, expected):
    assert len(seen) == len(expected) > 0
    for one, other in zip(seen, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
        assert one[3] == other[3]


# --------------------------------------------------------------------------------------------------------
# The order of an epoch
# --------------------------------------------------------------------------------------------------------


def test_an_epoch_has_whole_batches_of_different_images(images):
    seen = read_steps(images)
    assert len(seen) == make_loader(images).steps_per_epoch == NUM_TRAIN // 12
    assert len(set(list_indices(seen))) == 60
    assert set(list_indices(seen)) <= set(range(NUM_TRAIN))


def test_over_the_epochs_no_image_is_left_out(images):
    counts = Counter(index for epoch in range(12) for index in list_indices(read_steps(images, epoch)))
    assert set(counts) == set(range(NUM_TRAIN))
    assert min(counts.values()) >= 9  # one of 61 is missing in an epoch, and not always the same


def test_batches_hold_the_images_and_labels_they_name(images):
    for pixels, labels, indices, unreadable in read_steps(images, transform=show_number):
        assert pixels.dtype == torch.float32
        assert pixels.flatten().tolist() == indices.tolist()
        assert labels.tolist() == [index % NUM_CLASSES for index in indices.tolist()]
        assert not unreadable


def test_the_order_follows_seed_and_epoch_alone(images):
    first = list_indices(read_steps(images))
    assert list_indices(read_steps(images)) == first
    assert list_indices(read_steps(images, epoch=3)) != first
    assert list_indices(read_steps(images, seed=6)) != first
    assert sorted(first) != first


def test_images_at_hand_are_in_the_order_of_a_permutation():
    expected = np.random.default_rng((5, 2)).permutation(NUM_TRAIN)[:60]
    assert list_indices(read_steps(make_images(NUM_TRAIN))) == expected.tolist()


@pytest.mark.parametrize(
    ("num_processes", "accumulate", "num_workers"), [(1, 3, 0), (1, 1, 2), (2, 1, 0), (2, 3, 2), (4, 1, 0), (4, 3, 1)]
)
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_step_is_the_same_however_it_is_cut(images, num_processes, accumulate, num_workers, repeats):
    cut = {"num_processes": num_processes, "accumulate": accumulate, "num_workers": num_workers}
    assert_equal(read_steps(images, repeats=repeats, **cut), read_steps(images, repeats=repeats))


def test_a_process_gets_its_slice_in_micro_batches(images):
    loader = make_loader(images, accumulate=3, process_index=1, num_processes=2)
    step = next(loader.epoch(2))
    assert [len(batch.labels) for batch in step] == [2, 2, 2]
    assert torch.cat([batch.indices for batch in step]).tolist() == list_indices(read_steps(images))[6:12]


@pytest.mark.parametrize("first_step", [1, 4, 5])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_goes_on_where_it_was_left(images, first_step, num_workers):
    options = {"accumulate": 2, "repeats": 2, "num_workers": num_workers}
    rest = read_steps(images, first_step=first_step, **options)
    whole = read_steps(images, **options)
    assert len(whole) - len(rest) == first_step
    if rest:
        assert_equal(rest, whole[first_step:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_live_through_epochs_left_early(images, num_workers):
    loader = make_loader(images, num_workers=num_workers)
    for _ in zip(range(2), loader.epoch(1), strict=False):
        pass
    seen = [(*batch[:3], sorted(batch.unreadable)) for [batch] in loader.epoch(2, 1)]
    assert_equal(seen, read_steps(images)[1:])
    assert_equal([(*batch[:3], sorted(batch.unreadable)) for [batch] in loader.epoch(2, 0)], read_steps(images))


def test_what_is_skipped_is_not_decoded(images, count_decoded):
    read_steps(images, first_step=3)
    assert count_decoded["decoded"] == 24


def test_a_process_decodes_its_share_alone(images, count_decoded):
    list(make_loader(images, process_index=1, num_processes=4).epoch(0))
    assert count_decoded["decoded"] == 15


def test_what_is_skipped_is_not_read(monkeypatch):
    images = make_images(NUM_TRAIN)
    read, rows = [], DatasetImages.read_rows
    monkeypatch.setattr(DatasetImages, "read_rows", lambda self, indices: read.extend(indices) or rows(self, indices))
    read_steps(images, first_step=3)
    assert len(read) == 24


# --------------------------------------------------------------------------------------------------------
# Augmentation
# --------------------------------------------------------------------------------------------------------


def test_augmentation_is_drawn_anew_for_each_image_epoch_and_seed(images):
    def draws(**options):
        return {tuple(image.flatten().tolist()) for pixels, *_ in read_steps(images, **options) for image in pixels}

    seen = [draws(), draws(epoch=3), draws(seed=6)]
    assert len({draw[1:] for part in seen for draw in part}) == 180


def test_augmentation_follows_the_documented_draw():
    pixels, _, indices, _ = read_steps(make_images(NUM_TRAIN), repeats=3)[1]
    for position, (image, index) in enumerate(zip(pixels, indices.tolist(), strict=True), start=12):
        draw = (2 * 3 + position % 3) * NUM_TRAIN + index
        seed = int(np.random.SeedSequence((5, draw)).generate_state(1)[0])
        expected = random.Random(seed).random(), np.random.RandomState(seed).rand()
        assert image.flatten()[1:3].tolist() == pytest.approx(expected, abs=1e-6)


def test_repeats_are_side_by_side_and_augmented_apart(images):
    seen = read_steps(images, repeats=3)
    indices = list_indices(seen)
    assert len(indices) == 60
    assert [indices[i] for i in range(0, 60, 3)] == [indices[i] for i in range(1, 60, 3)] == indices[2::3]
    assert len(set(indices)) == 20
    draws = torch.cat([pixels for pixels, *_ in seen]).flatten(1)[:, 1:]
    assert len(draws.unique(dim=0)) == 60


def test_repeats_choose_from_the_whole_split(images):
    seen = {index for epoch in range(12) for index in list_indices(read_steps(images, epoch, repeats=3))}
    assert len(seen) > 0.9 * NUM_TRAIN


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loaders_leave_the_global_generators_alone(images, num_workers):
    def draws():
        return random.random(), np.random.rand(), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    read_steps(images, num_workers=num_workers)
    list(EvalLoader(images, show_number, channels=3, batch_size=8, num_workers=num_workers))
    assert draws() == expected


# --------------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (1, 2), (2, 0), (3, 2), (4, 0), (8, 0)])
def test_evaluation_sees_every_image_once(num_processes, num_workers):
    images = make_images(NUM_VAL)
    options = {"channels": 3, "batch_size": 8, "num_processes": num_processes, "num_workers": num_workers}
    loaders = [EvalLoader(images, show_number, process_index=i, **options) for i in range(num_processes)]
    for _ in range(2):
        seen = [list(loader) for loader in loaders]
        assert {len(batches) for batches in seen} == {len(loader) for loader in loaders} == {3}
        together = []
        for parts in zip(*seen, strict=True):
            assert len({batch.images.shape for batch in parts}) == 1
            for batch in parts:
                together += zip(batch.indices.tolist(), batch.labels.tolist(), batch.images.flatten(), strict=True)
        real = [row for row in together if row[1] >= 0]
        assert [index for index, *_ in real] == list(range(NUM_VAL))
        assert [label for _, label, _ in real] == [i % NUM_CLASSES for i in range(NUM_VAL)]
        assert [int(pixel) for *_, pixel in real] == list(range(NUM_VAL))
        assert {index for index, label, _ in together if label < 0} <= {-1}


def test_workers_of_an_evaluation_end_with_it():
    """Whether it comes to its end or is given up; those of the training stay for the next epoch."""
    others = set(multiprocessing.active_children())
    loader = EvalLoader(make_images(NUM_VAL), show_number, channels=3, batch_size=8, num_workers=2)
    for length in (3, 1):
        batches = iter(loader)
        for _ in range(length):
            next(batches)
        assert len(set(multiprocessing.active_children()) - others) == 2
        assert length == 1 or next(batches, None) is None
        del batches
        assert set(multiprocessing.active_children()) <= others
    train_loader = make_loader(make_images(NUM_TRAIN), num_workers=2)
    list(train_loader.epoch(0))
    assert len(set(multiprocessing.active_children()) - others) == 2


def test_few_images_for_many_processes_are_padded():
    loaders = [
        EvalLoader(make_images(3), show_number, channels=3, batch_size=64, process_index=i, num_processes=5)
        for i in range(5)
    ]
    batches = [batch for loader in loaders for batch in loader]
    assert [batch.labels.tolist() for batch in batches] == [[0], [1], [2], [-1], [-1]]
    assert all(batch.images.shape == (1, 1, 1, 1) for batch in batches)


# --------------------------------------------------------------------------------------------------------
# Images that cannot be read, and odd ones
# --------------------------------------------------------------------------------------------------------


def test_training_puts_the_next_image_in_place_and_names_the_unreadable(broken_images):
    seen = read_steps(broken_images, transform=show_number)
    read = list_indices(seen)
    assert not {*read} & {*BROKEN}
    order = shuffle_rows(NUM_TRAIN, seed=5, epoch=2)[:60].tolist()
    assert read == [{3: 4, 17: 19, 18: 19}.get(index, index) for index in order]
    named = {name for *_, unreadable in seen for name in unreadable}
    assert named == {broken_images.name_of(index) for index in BROKEN[:3] if index in order}
    for pixels, labels, indices, _ in seen:
        assert pixels.flatten().tolist() == indices.tolist()
        assert labels.tolist() == [index % NUM_CLASSES for index in indices.tolist()]


def test_an_unreadable_image_is_named_once_a_batch():
    """All rows before a readable one meet it, each as its substitute."""
    images = make_images(12, broken=(3, 4, 5))
    [batch] = next(make_loader(images, show_number).epoch(0))
    assert sorted(batch.unreadable) == [images.name_of(index) for index in (3, 4, 5)]


def test_replacement_is_the_same_however_a_step_is_cut(broken_images):
    assert_equal(
        read_steps(broken_images, num_processes=2, accumulate=3, num_workers=2, repeats=2),
        read_steps(broken_images, repeats=2),
    )


def test_replacement_goes_round():
    seen = read_steps(make_images(4, broken=(2, 3)), batch_size=4)
    assert sorted(list_indices(seen)) == [0, 0, 0, 1]


def test_evaluation_marks_the_unreadable():
    images = make_images(NUM_VAL, broken=(5,), split="val")
    batches = list(EvalLoader(images, show_number, channels=3, batch_size=8))
    labels = torch.cat([batch.labels for batch in batches])
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(NUM_VAL))
    assert (labels < 0).nonzero().flatten().tolist() == [5]
    assert [batch.unreadable for batch in batches] == [
        {"row 5 of val": "it is no image of a kind that Pillow knows"},
        {},
        {},
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_but_unreadable_images_is_an_error(num_workers):
    images = make_images(40, broken=tuple(range(40)))
    with pytest.raises(
        ValueError,
        match=r"^40 images of train in a row cannot be read, the first is row \d+ of train, since it is no i.*: mend",
    ):
        read_steps(images, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_is_taken_away_is_said_in_one_line(tmp_path, num_workers):
    data = load_data("webdataset", write_shards(tmp_path, "tar", 40, 3))
    (tmp_path / "train-0002.tar").unlink()
    with pytest.raises(ValueError, match=r"^.*No such file.*train-0002\.tar.: .* put them back and go on$"):
        read_steps(data.train, num_workers=num_workers)


def test_a_single_pixel_goes_through_timms_transforms(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "dot").mkdir(parents=True)
        Image.new("RGB", (1, 1), "red").save(tmp_path / split / "dot" / "dot.png")
    data = load_data("imagefolder", tmp_path)
    augment = create_transform((3, 32, 32), is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5)
    [[batch]] = make_loader(data.train, augment, batch_size=1).epoch(0)
    [shown] = EvalLoader(data.val, create_transform((3, 32, 32)), channels=3, batch_size=1)
    assert batch.images.shape == shown.images.shape == (1, 3, 32, 32)
    assert batch.images.isfinite().all()
    assert shown.images.isfinite().all()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_images_have_the_channels_of_the_network(channels, mode):
    [[batch]] = make_loader(
        make_images(3), lambda image: torch.tensor(image.mode == mode), channels=channels, batch_size=3
    ).epoch(0)
    assert batch.images.all()


# --------------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 64}, "--batch-size is 64 but there are 61 training images: use a smaller one"),
        ({"batch_size": 10, "num_processes": 2, "accumulate": 3}, "multiple of 6, such as 12"),
        ({"batch_size": 2, "num_processes": 4}, "--batch-size is 2 for 4 processes .* multiple of 4, such as 4"),
        ({"batch_size": 0}, "--batch-size is 0: it must be above 0"),
        ({"accumulate": 0}, "--accumulate is 0: it must be above 0"),
        ({"repeats": 0}, "--repeats is 0: it must be above 0"),
        ({"channels": 4}, "in_chans is 4: images are loaded with 1 or 3 channels"),
    ],
)
def test_what_cannot_be_cut_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(make_images(NUM_TRAIN), **options)


def test_evaluation_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="in_chans is 2"):
        EvalLoader(make_images(3), show_number, channels=2, batch_size=4)
    with pytest.raises(ValueError, match="--batch-size is 0"):
        EvalLoader(make_images(3), show_number, channels=3, batch_size=0)


@pytest.mark.parametrize("first_step", [-1, 6])
def test_steps_that_an_epoch_does_not_have_are_refused(first_step):
    with pytest.raises(ValueError, match="an epoch has 5 steps"):
        next(make_loader(make_images(NUM_TRAIN)).epoch(0, first_step))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_outlive_the_signals_of_their_run(method):
    """Launchers and schedulers send them to all its processes; their end would be an error of the run."""
    alone = make_loader(make_images(NUM_TRAIN), show_number, batch_size=4)
    loader = make_loader(make_images(NUM_TRAIN), show_number, batch_size=4, num_workers=2)
    loader._loader.multiprocessing_context = method
    seen = []
    for (batch,) in loader.epoch(0):
        seen.append(batch.indices.tolist())
        if len(seen) <= 4:
            for worker in loader._loader._iterator._workers:
                os.kill(worker.pid, getattr(signal, ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")[len(seen) - 1]))
    assert seen == [batch.indices.tolist() for (batch,) in alone.epoch(0)]
    assert len(seen) == 15


def test_a_worker_that_starts_keeps_a_signal_back_until_it_ignores_it():
    """Between the start of a process and its first own statement it would do what it does by default."""
    with block_signals():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
            ignore_signals(0)
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGUSR1}


def test_workers_end_with_a_loader_that_is_left_in_a_cycle(monkeypatch):
    """As an error and its frames are one; Python then closes the way to the workers before torch says that it ends."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds that torch waits
    loader = make_loader(make_images(NUM_TRAIN), num_workers=2)
    batches = loader.epoch(0)
    next(batches)
    workers = loader._loader._iterator._workers
    assert [worker.is_alive() for worker in workers] == [True, True]
    cycle = [loader, batches]
    cycle.append(cycle)
    del loader, batches, cycle
    gc.collect()
    for worker in workers:
        worker.join(5)
    left = [worker.is_alive() for worker in workers]
    for worker in workers:
        worker.kill()
    assert left == [False, False]


def count_files() -> int:
    """How many file descriptors this process has open."""
    return len([*Path("/proc/self/fd").iterdir()])


def test_evaluations_leave_no_file_descriptors():
    loader = EvalLoader(make_images(8), show_number, channels=3, batch_size=4, num_workers=2)
    list(loader)  # what the first one opens for good
    gc.collect()
    gc.disable()  # nothing may wait to be collected
    try:
        before = count_files()
        for _ in range(4):
            list(loader)
        deadline = time.monotonic() + 20
        while count_files() > before and time.monotonic() < deadline:  # threads of queues close theirs when they can
            time.sleep(0.05)
        assert count_files() <= before  # threads of other tests may close some meanwhile
    finally:
        gc.enable()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shared_memory_that_is_full_is_said_in_one_line(monkeypatch, num_workers):
    """What torch raises then in a worker; other errors of torch stay what they are."""
    raised = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"

    def fail(*_: object) -> None:
        raise RuntimeError(raised)

    monkeypatch.setattr(s3a.data.batches, "stack_batch", fail)
    loader = make_loader(make_images(NUM_TRAIN), num_workers=num_workers)
    with pytest.raises(ValueError, match=r"^/dev/shm has no room for a batch \(unable .*\): enlarge it .*accumulate$"):
        list(loader.epoch(0))
    raised = "mat1 and mat2 shapes cannot be multiplied"
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        list(make_loader(make_images(NUM_TRAIN), num_workers=num_workers).epoch(0))


class Hanging(torch.utils.data.Dataset):
    def __getitem__(self, key):
        time.sleep(600)


def leave_a_worker_that_hangs() -> None:
    loader = loaders.make_loader(Hanging(), loaders.Schedule(2), num_workers=1, pin_memory=False, keep_workers=True)
    iter(loader)
    time.sleep(0.5)  # it has begun to hang


HANGING = """
import sys
sys.path[:0] = ["tests", "tests/data"]
from test_loaders import leave_a_worker_that_hangs
leave_a_worker_that_hangs()
"""


@pytest.mark.slow
def test_a_worker_that_hangs_does_not_keep_its_process():
    """Workers ignore what asks a run to stop, also where multiprocessing asks them at the end of a process."""
    folder = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", HANGING], cwd=folder, timeout=60, check=True)
    child = multiprocessing.get_context("fork").Process(target=leave_a_worker_that_hangs)
    child.start()
    child.join(60)
    left = child.exitcode
    child.kill()
    assert left == 0


LEFT = """
import sys
sys.path[:0] = ["tests"]
from helpers.numbered_images import make_images, make_loader
loader = make_loader(make_images(60), batch_size=4, num_workers=6)  # lives until Python has ended
next(loader.epoch(0))
"""


def test_workers_that_are_left_at_the_end_of_a_process_end_silently():
    """Where something holds the loader, as an exception that a library keeps."""
    folder = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", LEFT]  # torch warns of more workers than cores
    ended = subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=True)
    assert ended.stderr == b""


# --------------------------------------------------------------------------------------------------------
# Targets
# --------------------------------------------------------------------------------------------------------


class Towers(MapImages):
    """Image i is full of i, of 4 + i rows, and has i % 3 objects: the object k is column k, of class 10i + k."""

    split, num_images, blank = "train", 12, Objects()

    def name_of(self, index):
        return f"tower {index}"

    def read_rows(self, indices):
        rows = []
        for index in indices:
            masks = [np.arange(6)[None].repeat(4 + index, axis=0) == column for column in range(index % 3)]
            target = Objects([10 * index + column for column in range(index % 3)], masks)
            rows.append(Row(index, Image.fromarray(np.full((4 + index, 6), index, np.uint8)), target=target))
        return rows


def brighten(image, target):
    """A joint transform: a hundred is added to the pixels, and a thousand to the classes."""
    pixels = torch.from_numpy(np.array(image))[None] + 100
    return pixels, {**target, "labels": target["labels"] + 1000, "size": torch.tensor(image.size[::-1])}


def assert_towers(batch):
    """The images and targets of a batch, by the rows that they name; a row of -1 is black and has no object."""
    largest = max(32 if index < 0 else 4 + index for index in batch.indices.tolist())
    widest = 32 if -1 in batch.indices.tolist() else 6
    assert batch.images.shape[1:] == (1, largest, widest)
    targets = split_targets(batch.targets)
    for image, target, index in zip(batch.images, targets, batch.indices.tolist(), strict=True):
        height, width, count = (32, 32, 0) if index < 0 else (4 + index, 6, index % 3)
        assert target["size"].tolist() == [height, width]
        assert (image[0, :height, :width] == 100 + max(index, 0)).all()
        assert (image[0, height:] == 0).all()
        assert (image[0, :, width:] == 0).all()
        assert target["labels"].tolist() == [1000 + 10 * index + column for column in range(count)]
        assert target["boxes"].tolist() == [[column, 0, column + 1, height] for column in range(count)]
        assert target["masks"].shape == (count, height, width)
        assert all(mask.sum() == mask[:, column].sum() == height for column, mask in enumerate(target["masks"]))
        assert target["is_crowd"].tolist() == [False] * count
        assert {type(each) for each in target.values()} == {torch.Tensor}


@pytest.mark.parametrize(("num_processes", "accumulate", "num_workers"), [(1, 1, 0), (2, 1, 0), (1, 2, 2)])
def test_targets_go_through_the_transform_with_their_images(num_processes, accumulate, num_workers):
    seen = []
    for process in range(num_processes):
        loader = TrainLoader(
            Towers(),
            brighten,
            channels=1,
            batch_size=4,
            accumulate=accumulate,
            seed=0,
            process_index=process,
            num_processes=num_processes,
            num_workers=num_workers,
        )
        for batch in (batch for step in loader.epoch(0) for batch in step):
            assert_towers(batch)
            seen += batch.indices.tolist()
    assert sorted(seen) == [*range(12)]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_evaluation_pads_with_images_without_objects(num_processes):
    seen = []
    for process in range(num_processes):
        loader = EvalLoader(
            Towers(), brighten, channels=1, batch_size=8, process_index=process, num_processes=num_processes
        )
        for batch in [*loader, loader.make_padding()]:
            assert_towers(batch)
            assert batch.labels.tolist() == [0 if index >= 0 else -1 for index in batch.indices.tolist()]
            seen += [index for index in batch.indices.tolist() if index >= 0]
    assert sorted(seen) == [*range(12)]


def test_joined_targets_are_few_tensors_and_come_apart_again():
    """One for each name, since each takes a file descriptor on its way from a worker."""
    targets = [row.target.decode(row.encoded.height, 6) for row in Towers().read_rows([2, 3, 4])]
    targets[1]["empty"] = targets[2]["empty"] = torch.zeros(0, 7)
    targets[0]["empty"] = torch.arange(14.0).view(2, 7)
    joined = join_targets(targets)
    assert set(joined["flat"]) == {"boxes", "labels", "masks", "is_crowd", "empty"}
    assert all(each.ndim == 1 and type(each) is torch.Tensor for each in joined["flat"].values())
    assert len(joined["flat"]["masks"]) == 2 * 6 * 6 + 0 + 1 * 8 * 6
    for one, other in zip(split_targets(joined), targets, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype
            assert torch.equal(tensor, other[name].as_subclass(torch.Tensor))


def test_labels_alone_are_no_targets(images):
    assert join_targets([]) is None
    assert {batch.targets for step in make_loader(images).epoch(0) for batch in step} == {None}
