"""What host and device exchange, and that neither waits for it."""

import math

import numpy as np
import pytest
import torch
from helpers.host_reads import MethodWatch, OperatorWatch, watch_steps
from helpers.small_runs import train_changed

from s3a.data import Batch
from s3a.training.transfers import Readback, send_batches

METHODS = ("tolist", "numpy", "cpu", "item")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixup": 0.8, "cutmix": 1.0, "ema_decay": 0.9, "clip_grad": 1.0, "on_non_finite": "skip", "drop_path": 0.2},
        {"accumulate": 2, "precision": "bf16", "model": "test_resnet", "drop_path": None},
    ],
    ids=["plain", "all", "parts"],
)
def test_between_forward_and_update_the_host_reads_nothing(recipe, monkeypatch, changes):
    steps = watch_steps(monkeypatch)
    train_changed(recipe, **changes)
    assert len(steps) == 6
    assert steps[1:] == [[]] * 5, "the first one makes plans"


@pytest.mark.parametrize(
    "read",
    [
        float,
        bool,
        int,
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        torch.Tensor.cpu,
        torch.nonzero,
        np.asarray,
        math.isnan,
    ],
)
def test_the_watch_sees_every_way_of_reading(read):
    noted = []
    with MethodWatch(noted), OperatorWatch(noted):
        tensor = torch.ones(1)
        assert noted == []
        read(tensor)
    assert noted != []


# --------------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------------


def make_batch(number: int) -> Batch:
    return Batch(torch.full((2, 1, 4, 4), float(number)), torch.tensor([0, 1]), torch.tensor([number, -1]), ["torn"])


def test_on_a_cpu_batches_stay_as_they_are_and_none_is_asked_for_too_early():
    asked = []

    def load():
        for number in range(3):
            asked.append(number)
            yield make_batch(number)

    given = list(load())
    asked.clear()
    for batch, sent in zip(given, send_batches(iter(given), torch.device("cpu")), strict=True):
        assert sent.images is batch.images
        assert sent.labels is batch.labels
        assert sent.indices is batch.indices
    for number, _ in enumerate(send_batches(load(), torch.device("cpu"))):
        assert asked == list(range(number + 1))


def test_all_of_a_batch_is_sent_but_for_its_indices():
    """To the device without memory, which no tensor comes back from."""
    batch = make_batch(3)
    (sent,) = send_batches([batch], torch.device("meta"))
    assert (sent.images.device.type, sent.labels.device.type) == ("meta", "meta")
    assert sent.indices is batch.indices
    assert sent.unreadable == ["torn"]


def test_on_a_cpu_a_tensor_is_kept_and_read_later():
    tensor = torch.tensor([1.0, 2.0])
    readback = Readback(tensor)
    tensor += 1
    assert readback.is_there()
    assert readback.read() == [2.0, 3.0]
