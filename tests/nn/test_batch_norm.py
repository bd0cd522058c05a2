"""Synchronised batch norms against one process that has all images."""

import socket
from pathlib import Path

import pytest
import timm
import torch
from helpers.fork_server import CONTEXT
from helpers.shared_statistics import make_batch, make_network, take_share, train_on
from torch import nn

from s3a.nn import batch_norm
from s3a.nn.batch_norm import SyncBatchNorm2d, synchronise_batch_norm


@pytest.mark.parametrize(
    ("shares", "backend"),
    [
        ((3, 5), None),
        ((3, 5), "aot_eager"),
        ((4, 1, 2), None),
        pytest.param((4, 1, 2), "inductor", marks=pytest.mark.slow),
    ],
)
def test_processes_give_what_one_gives(shares: tuple[int, ...], backend: str | None, tmp_path: Path):
    """Outputs, gradients and running statistics, for shares that differ; as one graph where it is compiled."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=take_share, args=(rank, shares, port, backend, tmp_path)) for rank in range(len(shares))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * len(shares)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(shares))]
    whole = train_on(make_network(), make_batch(sum(shares)), 0)
    for name, expected in whole.items():
        parts = [each[name] for each in found]
        if name in ("outputs", "images"):
            torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-9, atol=1e-6)
        elif name.startswith("gradient"):  # of parameters, which DDP adds up
            torch.testing.assert_close(sum(parts), expected, rtol=1e-9, atol=1e-6)
        else:
            for part in parts:
                torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12)
    for name in ("1.running_var", "5.running_mean"):
        assert len({each[name].numpy().tobytes() for each in found}) == 1, "the same bits on all processes"


@pytest.mark.parametrize(("training", "processes"), [(False, 1), (True, 1), (False, 2)])
def test_alone_and_in_evaluation_it_is_batch_norm(training: bool, processes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch_norm, "count_processes", lambda: processes)
    plain, synchronised = make_network().train(training), make_network().train(training)
    synchronise_batch_norm(synchronised)
    images = make_batch(4)
    assert torch.equal(synchronised(images), plain(images))


@pytest.mark.parametrize("name", ["ssvit_nano", "svit_nano", "resnet18", "efficientnet_b0"])
def test_all_batch_norms_of_a_model_are_synchronised_and_keys_stay(name: str):
    model = timm.create_model(name)
    keys = list(model.state_dict())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hook = norms[0].register_forward_hook(print)
    synchronise_batch_norm(model)
    assert all(isinstance(module, SyncBatchNorm2d) for module in norms)
    assert norms[0]._forward_hooks == {hook.id: print}
    assert list(model.state_dict()) == keys


def test_a_batch_norm_that_cannot_be_synchronised_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"^1 is a BatchNorm1d: only nn\.BatchNorm2d .*--no-sync-batch-norm$"):
        synchronise_batch_norm(model)
