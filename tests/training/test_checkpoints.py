"""Checkpoints are whole or not there, and come when they are due."""

import errno
import os
import time
from pathlib import Path

import pytest
import torch

from s3a.training.checkpoints import (
    CheckpointClock,
    find_fault,
    find_newest,
    list_checkpoints,
    read_state,
    write_checkpoint,
)


def state_of_training(value: float) -> dict:
    parameter = torch.nn.Parameter(torch.full((3,), value))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    return {
        "model": {"weight": parameter, "steps": torch.tensor(3), "half": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer": optimizer.state_dict(),
        "history": [{"epoch": 1, "val_top1": value}],
        "nothing": None,
    }


def complain(message: str) -> None:
    raise AssertionError(f"nothing should be said, but: {message}")


def read_newest(parent: Path, say) -> dict | None:
    """The state of the newest whole checkpoint."""
    newest = find_newest(parent, say)
    return None if newest is None else read_state(parent / newest.name)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    state = state_of_training(0.1)
    write_checkpoint(tmp_path / "step-00001", state, keep=2)
    read = read_newest(tmp_path, complain)
    assert read["history"] == state["history"]
    assert read["nothing"] is None
    for key, tensor in state["model"].items():
        assert torch.equal(read["model"][key], tensor)
        assert read["model"][key].dtype == tensor.dtype


def test_an_optimizer_goes_on_from_its_checkpoint(tmp_path):
    write_checkpoint(tmp_path / "step-00001", state_of_training(0.1), keep=2)
    read = read_newest(tmp_path, complain)
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.load_state_dict(read["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.state[parameter]["step"] == 1
    assert optimizer.state[parameter]["exp_avg"].tolist() == pytest.approx([0.1] * 3)


def test_the_newest_few_stay(tmp_path):
    for epoch in range(1, 5):
        write_checkpoint(tmp_path / f"step-{epoch:05d}", {"epoch": epoch}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00004", "step-00003"]
    assert read_newest(tmp_path, complain) == {"epoch": 4}


def test_folders_of_the_user_are_left_alone(tmp_path):
    for name in ("best", "zzz", "step-notes"):
        (tmp_path / name).mkdir()
    for epoch in (1, 2):
        write_checkpoint(tmp_path / f"step-{epoch:05d}", {"epoch": epoch}, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"best", "zzz", "step-notes", "step-00002"}
    assert read_newest(tmp_path, complain) == {"epoch": 2}


def test_there_may_be_none(tmp_path):
    assert read_newest(tmp_path, complain) is None
    assert read_newest(tmp_path / "absent", complain) is None


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["tensors.safetensors", "tree.json", "manifest.json"])
@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink()], ids=["torn", "altered", "missing"])
def test_a_damaged_checkpoint_is_said_and_skipped(tmp_path, name, damage):
    for epoch in (1, 2):
        write_checkpoint(tmp_path / f"step-{epoch:05d}", {"epoch": epoch, "tensor": torch.ones(4)}, keep=2)
    damage(tmp_path / "step-00002" / name)
    said = []
    assert read_newest(tmp_path, said.append)["epoch"] == 1
    assert len(said) == 1
    assert "step-00002" in said[0]
    assert name in said[0]


def test_a_file_that_cannot_be_read_is_a_damage(tmp_path, monkeypatch):
    """As on a disk that fails: the other processes of the run wait to be told."""
    write_checkpoint(tmp_path / "step-00001", {"epoch": 1}, keep=1)

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("s3a.training.checkpoints.hash_file", fail)
    assert find_fault(tmp_path / "step-00001") == "tensors.safetensors: Input/output error"


def test_a_write_that_stops_half_way_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "step-00001", {"epoch": 1}, keep=1)

    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("s3a.training.checkpoints.hash_file", full_disk)
    with pytest.raises(OSError, match="is full: a checkpoint needs"):
        write_checkpoint(tmp_path / "step-00002", {"epoch": 2}, keep=1)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00001"], "the room is free again"
    assert read_newest(tmp_path, complain) == {"epoch": 1}
    write_checkpoint(tmp_path / "step-00002", {"epoch": 2}, keep=1)
    assert read_newest(tmp_path, complain) == {"epoch": 2}


def test_files_are_on_the_disk_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    """The order of fsync and rename, by the numbers that the file system has for files and folders."""
    events, fsync, rename = [], os.fsync, Path.rename

    def watched_fsync(descriptor):
        events.append(("flush", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def watched_rename(path, target):
        events.append(("rename", path.stat().st_ino))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    folder = tmp_path / "step-00001"
    write_checkpoint(folder, {"tensor": torch.ones(2)}, keep=1)
    [renamed] = [index for index, (event, _) in enumerate(events) if event == "rename"]
    assert events[renamed] == ("rename", folder.stat().st_ino)
    written = {path.stat().st_ino for path in (folder, *folder.iterdir())}
    assert len(written) == 4
    assert {number for _, number in events[:renamed]} == written
    assert events[renamed + 1 :] == [("flush", tmp_path.stat().st_ino)]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    """Also where the run goes on from an earlier step, and so writes under another name."""
    for name in (".partial-step-00001", ".partial-step-00007"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tensors.safetensors").write_bytes(b"half")
    write_checkpoint(tmp_path / "step-00001", {"epoch": 1}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00001"]


def test_a_clock_of_minutes(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = CheckpointClock("2m")
    due = []
    for now in (100.0, 219.0, 221.0):  # noqa: B007  read by the clock
        due.append(clock.is_due(step=1))
    clock.restart()
    assert [*due, clock.is_due(step=2)] == [False, False, True, False]
    steps = CheckpointClock("3")
    assert [steps.is_due(step) for step in range(1, 8)] == [False, False, True, False, False, True, False]
    assert not CheckpointClock(None).is_due(step=1)
