"""Nothing lost: runs that are killed, stopped, tampered with or short of disk, as real processes."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.image_folder import make_image_folder
from helpers.real_runs import ROOT, STEPS, get_signal, kill_at, make_options, read_metrics, read_weights, train
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = train(*make_options(folder))
    assert ended.returncode == 0, ended.stderr
    assert set(read_weights(folder)) == {"model", "best", "ema", "ema-best"}
    return folder


def test_killed_anywhere_a_run_ends_with_the_same_bytes(undisturbed, tmp_path):
    """One run, killed in a step, while a checkpoint is written and put in place, in evaluation, at the end."""
    options = make_options(tmp_path / "run")
    kill_at("training.trainer:forward_backward", 3, *options)  # nothing written yet
    kill_at("training.trainer:forward_backward", 7, *options)
    kill_at("training.checkpoints:hash_file", 4, *options)  # one file of the second checkpoint is there
    kill_at("training.tasks.classification:count_correct", 2, *options)
    kill_at("training.checkpoints:list_checkpoints", 3, *options)  # in place, the old ones not yet deleted
    kill_at("training.trainer:save_best", 1, *options)
    kill_at("training.trainer:finish", 1, *options)
    ended = train(*options)
    assert ended.returncode == 0, ended.stderr
    assert "nothing left to train" in ended.stderr
    assert read_weights(tmp_path / "run") == read_weights(undisturbed)
    assert read_metrics(tmp_path / "run") == read_metrics(undisturbed)
    assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == [1, 2]
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial*"))


@pytest.mark.slow
def test_signals_checkpoint_the_step_and_say_resume_me(undisturbed, tmp_path):
    """A scheduler's two signals and Ctrl-C, one after the other: in a step, in the evaluation, in a step."""
    options = make_options(tmp_path / "run", checkpoint_every="1000")
    step, measure = "training.trainer:forward_backward", "training.tasks.classification:count_correct"
    signals = [
        (signal.SIGTERM, step, 6, "epoch 1, step 6", "step-000000006-epoch-00000"),
        (signal.SIGUSR1, measure, 2, f"epoch 1, step {STEPS}", f"step-{STEPS:09d}-epoch-00000"),
        (signal.SIGINT, "training.trainer:exchange", 3, "epoch 2, step 3", f"step-{STEPS + 3:09d}-epoch-00001"),
    ]
    for number, place, times, where, checkpoint in signals:
        ended = get_signal(place, times, number, *options)
        assert ended.returncode == 75, ended.stderr
        assert f"stopped by {number.name} at {where} of {STEPS}" in ended.stderr
        assert (tmp_path / "run" / "checkpoints" / checkpoint).is_dir()
    ended = train(*options)
    assert f"resuming {tmp_path / 'run'} after epoch 1 of 2, at step 3 of {STEPS}" in ended.stderr
    assert read_weights(tmp_path / "run") == read_weights(undisturbed)


def kill_at_random(command: list[str], kills: int, seed: int) -> None:
    """Starts the command again and again and kills it some time after it has begun to train."""
    draw = random.Random(seed)
    for _ in range(kills):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for line in process.stderr:
            if line.startswith(("beginning", "resuming")) or "nothing left" in line:
                break
        time.sleep(draw.uniform(0, 3))
        process.kill()
        process.wait()


@pytest.mark.slow
def test_ten_random_kills_change_no_byte(tmp_path):
    changes = {"epochs": "6", "checkpoint_every": "3", "num_workers": "1"}
    make_image_folder(tmp_path / "images", num_train=60)
    extra = ["--data", "imagefolder", "--data-dir", str(tmp_path / "images"), "--batch-size", "16"]
    killed, whole = (make_options(tmp_path / name, **changes) + extra for name in ("killed", "whole"))
    command = [sys.executable, "recipes/train.py"]
    kill_at_random([*command, *killed], kills=10, seed=0)
    assert train(*killed).returncode == 0
    assert train(*whole).returncode == 0
    assert read_weights(tmp_path / "killed") == read_weights(tmp_path / "whole")
    assert read_metrics(tmp_path / "killed") == read_metrics(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 30 MB; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs privileges")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_keeps_the_last_checkpoint_and_says_how_much_is_needed(undisturbed, small_disk):
    options = make_options(small_disk / "run", keep_checkpoints="1")
    filler = small_disk / "filler"
    filler.write_bytes(b"0" * 14_000_000)
    ended = train(*options)
    assert ended.returncode == 2
    assert len(ended.stderr.strip().splitlines()[-1]) < 400
    assert "is full: a checkpoint needs" in ended.stderr
    assert "it goes on from step-" in ended.stderr
    assert len(list((small_disk / "run" / "checkpoints").glob("step-*"))) == 1
    filler.unlink()
    ended = train(*options)
    assert ended.returncode == 0, ended.stderr
    assert read_weights(small_disk / "run") == read_weights(undisturbed)


@pytest.mark.slow
def test_a_tampered_checkpoint_is_said_and_the_one_before_it_used(undisturbed, tmp_path):
    options = make_options(tmp_path / "run")
    kill_at("training.trainer:forward_backward", 10, *options)
    newest, before = sorted((tmp_path / "run" / "checkpoints").glob("step-*"), reverse=True)
    content = bytearray((newest / "tensors.safetensors").read_bytes())
    content[-100] ^= 1
    (newest / "tensors.safetensors").write_bytes(content)
    ended = train(*options)
    assert ended.returncode == 0, ended.stderr
    assert f"checkpoint {newest} is damaged (tensors.safetensors is not as it was written)" in ended.stderr
    assert f"at step {int(before.name.split('-')[1])} of {STEPS}" in ended.stderr
    assert read_weights(tmp_path / "run") == read_weights(undisturbed)
    shutil.rmtree(tmp_path / "run")


@pytest.mark.slow
def test_the_whole_imagenet_recipe_takes_steps_stops_and_goes_on(tmp_path):
    """`ssvit_tiny_imagenet` as it stands, compiled, bf16, 224 px, a thousand classes; but for a smaller batch."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for index in range(1000):
            folder = tmp_path / "images" / split / f"class_{index:03d}"
            folder.mkdir(parents=True)
            pixels = generator.integers(0, 255, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "image.jpg")
    options = ["ssvit_tiny_imagenet", "--data", "imagefolder", "--data-dir", str(tmp_path / "images")]
    options += ["--batch-size", "8", "--output-dir", str(tmp_path / "run")]
    for times, step in ((3, 3), (2, 5)):
        ended = get_signal("training.trainer:forward_backward", times, signal.SIGTERM, *options)
        assert ended.returncode == 75, ended.stderr
        assert f"stopped by SIGTERM at epoch 1, step {step} of 125" in ended.stderr
    assert f"resuming {tmp_path / 'run'} after epoch 0 of 310, at step 3 of 125" in ended.stderr
    [*_, newest] = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "tensors.safetensors").values())
