"""What host and device exchange, and that neither waits for it."""

import contextlib
import math

import numpy as np
import pytest
import torch
from helpers.host_reads import MethodWatch, OperatorWatch, watch_steps
from helpers.small_runs import train_changed
from torch.utils.data._utils.pin_memory import pin_memory

from s3a.data import Batch
from s3a.data.erasing import Erasure, Rectangle
from s3a.data.stream import Place
from s3a.training import transfers
from s3a.training.transfers import Readback, send_batches

METHODS = ("tolist", "numpy", "cpu", "item")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "mixup": 0.8,
            "cutmix": 1.0,
            "ema_decay": 0.9,
            "clip_grad": 1.0,
            "on_non_finite": "skip",
            "drop_path": 0.2,
            "random_erasing": 0.5,
        },
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
    images, labels, indices = torch.full((2, 1, 4, 4), float(number)), torch.tensor([0, 1]), torch.tensor([number, -1])
    return Batch(images, labels, indices, {"torn": "it is cut off"})


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
    erasure = Erasure([Rectangle(1, 0, 1, 2, 3)], torch.randn(6))
    batch = make_batch(3)._replace(erasure=erasure)
    (sent,) = send_batches([batch], torch.device("meta"))
    assert sent.erasure.rectangles == erasure.rectangles
    assert sent.erasure.noise.device.type == "meta"
    assert (sent.images.device.type, sent.labels.device.type) == ("meta", "meta")
    assert sent.indices is batch.indices
    assert sent.unreadable == {"torn": "it is cut off"}


def test_on_cuda_all_that_was_sent_is_kept_until_it_is_computed_with(monkeypatch):
    """Streams and copies are stand-ins: this holds which tensors are kept, and for which stream, in which order."""
    calls = []
    erasure = Erasure([Rectangle(1, 0, 1, 2, 3)], torch.randn(6))
    batch = make_batch(3)._replace(erasure=erasure)

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def enter(stream):
        calls.append(f"into {stream.name}")
        yield
        calls.append(f"out of {stream.name}")

    def send(batch, device):
        calls.append("sent")
        return batch

    kept = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copying"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("computing"))
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(transfers, "send", send)
    monkeypatch.setattr(transfers, "reserve", lambda tensor, stream: kept.append((id(tensor), stream.name)))
    (sent,) = send_batches([batch], torch.device("cuda"))
    assert sent is batch
    assert calls == ["into copying", "sent", "out of copying", "computing waits for copying"]
    tensors = (batch.images, batch.labels, batch.indices, erasure.noise)
    assert sorted(kept) == sorted((id(tensor), "computing") for tensor in tensors)


def test_a_pinned_batch_is_the_same_batch(monkeypatch):
    """By the loader's own walk over what a batch holds; memory is pinned with CUDA alone, so a copy stands for that."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor.clone())
    place: Place = {"passes": 1, "shards": {"shard_idx": 2, "type": "_IterDataset"}, "used": 3}
    batch = make_batch(3)._replace(erasure=Erasure([Rectangle(1, 0, 1, 2, 3)], torch.randn(6)), place=place)
    pinned = pin_memory(batch)
    assert type(pinned) is Batch
    assert type(pinned.erasure) is Erasure
    assert {type(rectangle) for rectangle in pinned.erasure.rectangles} == {Rectangle}
    assert (pinned.erasure.rectangles, pinned.unreadable, pinned.place) == (
        batch.erasure.rectangles,
        batch.unreadable,
        place,
    )
    for ours, given in (
        (pinned.images, batch.images),
        (pinned.labels, batch.labels),
        (pinned.indices, batch.indices),
        (pinned.erasure.noise, batch.erasure.noise),
    ):
        assert ours is not given
        assert torch.equal(ours, given)


def test_on_a_cpu_a_tensor_is_kept_and_read_later():
    tensor = torch.tensor([1.0, 2.0])
    readback = Readback(tensor)
    tensor += 1
    assert readback.is_there()
    assert readback.read() == [2.0, 3.0]
