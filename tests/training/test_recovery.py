"""Nothing lost: runs that are killed, stopped, tampered with or short of disk, as real processes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from helpers.image_folder import make_image_folder
from helpers.numbered_images import write_parquet
from helpers.real_runs import (
    BEGINNINGS,
    MOMENTS,
    ROOT,
    STEPS,
    get_signal,
    kill_at,
    kill_at_random,
    make_launcher,
    make_options,
    read_metrics,
    read_weights,
    run_command,
    train,
)
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = train(*make_options(folder))
    assert ended.returncode == 0, ended.stderr
    assert set(read_weights(folder)) == {"model", "best", "ema", "ema-best"}
    return folder


@pytest.mark.slow
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


@pytest.mark.parametrize("kills", MOMENTS)
def test_random_kills_change_no_byte(tmp_path, kills):
    changes = {"epochs": "6", "checkpoint_every": "3", "num_workers": "1"}
    make_image_folder(tmp_path / "images", num_train=60)
    extra = ["--data", "imagefolder", "--data-dir", str(tmp_path / "images"), "--batch-size", "16"]
    killed, whole = (make_options(tmp_path / name, **changes) + extra for name in ("killed", "whole"))
    command = [sys.executable, "recipes/train.py"]
    kill_at_random([*command, *killed], tmp_path / "killed", kills, seconds=3)
    assert train(*killed).returncode == 0
    assert train(*whole).returncode == 0
    assert read_weights(tmp_path / "killed") == read_weights(tmp_path / "whole")
    assert read_metrics(tmp_path / "killed") == read_metrics(tmp_path / "whole")


# recipes/train.py with blocks of so few images that its readers go through several.
SMALL_BLOCKS = """
import runpy, sys
import s3a.data.stream
s3a.data.stream.READ_ROWS, s3a.data.stream.SHUFFLE_ROWS = 1, 7
sys.argv[0] = "recipes/train.py"
sys.path.insert(0, "recipes")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("kills", MOMENTS)
@pytest.mark.parametrize(("count", "num_workers"), [(1, "3"), (2, "2")])
def test_random_kills_of_a_stream_change_no_byte(tmp_path, count, num_workers, kills):
    """Of all its processes at the same moment, in shards of unequal sizes that some readers go through twice.

    Of the validation images one process has none.
    """
    for shard, rows in enumerate((20, 30, 10, 25, 15, 20, 40, 10)):
        write_parquet(tmp_path / f"train-{shard}.parquet", range(shard * 50, shard * 50 + rows))
    write_parquet(tmp_path / "val-0.parquet", range(400, 430))
    driver = tmp_path / "driver.py"
    driver.write_text(SMALL_BLOCKS)
    changes = {"epochs": "12", "checkpoint_every": "2", "num_workers": num_workers, "batch_size": "16"}
    extra = ["--data", "parquet", "--data-dir", str(tmp_path), "--streaming"]
    killed, whole = (make_options(tmp_path / name, **changes) + extra for name in ("killed", "whole"))
    command = [*make_launcher(count), str(driver)]
    mark = f"RUN_LOG={tmp_path}"
    environment = {**os.environ, "RUN_LOG": str(tmp_path), "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    draw, begun = random.Random(count), []
    for _ in range(kills):
        process = subprocess.Popen([*command, *killed], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        begun.append(next(line for line in process.stderr if line.startswith(BEGINNINGS)))
        time.sleep(draw.uniform(0, 1.5))
        assert process.poll() is None, "it was through, and none is left to be killed"
        for each in list_processes(mark):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        process.wait()
        assert wait_until(lambda: not list_processes(mark), 60)
    assert any("at step" in line for line in begun), begun
    for options in (killed, whole):
        ended = run_command([*command, *options], **environment)
        assert ended.returncode == 0, ended.stderr
        assert "the stream was read by" not in ended.stderr
    assert read_weights(tmp_path / "killed") == read_weights(tmp_path / "whole")
    assert read_metrics(tmp_path / "killed") == read_metrics(tmp_path / "whole")


# recipes/train.py, whose process writes what it says and its exit status to files that its launcher does not touch.
NOTED = """
import os, runpy, sys
place = os.environ["RUN_LOG"] + "-" + os.environ.get("RANK", "0")
os.dup2(os.open(place + ".err", os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
end, me = os._exit, os.getpid()

def note(status):
    if os.getpid() == me:
        with open(place + ".status", "w") as file:
            file.write(str(status))

os._exit = lambda status: (note(status), end(status))
sys.argv[0], sys.path[0] = "recipes/train.py", "recipes"
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    note(stop.code or 0)
    raise
note(0)
"""
# Signals reach the run's processes in each way by another path: at once, through the agent of torchrun, which has them
# in sessions of their own, and beside `accelerate launch`, which dies.
STARTS = {
    "python": [sys.executable],
    "torchrun": [*make_launcher(2), "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"],
}


def list_processes(mark: str) -> dict[int, str]:
    """The command lines of all processes that were started with this in their environment, by their numbers."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return found


def catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true within so long."""
    deadline = time.monotonic() + seconds
    while not (fulfilled := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return fulfilled


def disturb(way: str, options: list[str], number: signal.Signals, in_training: bool, delay: float, log: Path) -> str:
    """Starts a run in one of STARTS, and sends a signal to its process group some time after it could.

    Returns:
        What its processes said; none of them is left.
    """
    driver = log.with_suffix(".py")
    driver.write_text(NOTED)
    mark = f"RUN_LOG={log}"
    environment = {**os.environ, "RUN_LOG": str(log), "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    with log.with_suffix(".launcher").open("w") as output:
        started = subprocess.Popen(
            [*STARTS[way], str(driver), *options],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    count = 2 if way == "torchrun" else 1
    errors = [Path(f"{log}-{rank}.err") for rank in range(count)]

    def is_ready() -> bool:
        if in_training:
            said = errors[0].read_text() if errors[0].exists() else ""
            return any(word in said for word in ("beginning", "resuming", "finished"))
        commands = list_processes(mark).items()
        runs = [process for process, command in commands if str(driver) in command and " -m " not in command]
        return sum(catches(process, signal.SIGUSR1) for process in runs) >= count

    try:
        assert wait_until(lambda: is_ready() or started.poll() is not None, 120)
        time.sleep(delay)
        with suppress(ProcessLookupError):  # it was through
            os.killpg(started.pid, number)
        started.wait(120)
        assert wait_until(lambda: not list_processes(mark), 60), list_processes(mark)
    finally:
        for process in list_processes(mark):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    said = "".join(path.read_text() for path in errors)
    notes = [Path(f"{log}-{rank}.status") for rank in range(count)]
    statuses = [note.read_text() if note.exists() else "none" for note in notes]
    expected = ["75"] if "nothing left to train" not in said and "evaluate:" not in said else ["0", "75"]
    assert all(status in expected for status in statuses), (statuses, said)
    if way == "python":
        assert started.returncode in map(int, expected)
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("moments", MOMENTS)
def test_signals_at_random_moments_change_no_byte_and_leave_no_process(tmp_path, moments):
    """To the whole process group, as terminals, launchers and schedulers send them; the workers are in it."""
    make_image_folder(tmp_path / "images", num_train=60)
    changes = {"epochs": "12", "checkpoint_every": "3", "num_workers": "2"}
    extra = ["--data", "imagefolder", "--data-dir", str(tmp_path / "images"), "--batch-size", "16"]
    options = {way: make_options(tmp_path / way, **changes) + extra for way in STARTS}
    draw, endings = random.Random(0), []
    for moment in range(moments):
        way = list(STARTS)[moment % len(STARTS)]
        number = draw.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
        in_training = moment % 2 == 0
        delay = draw.uniform(0, 3)
        print(
            f"moment {moment}: {number.name} to {way}, {delay:.2f} s after it {'trains' if in_training else 'starts'}"
        )
        said = disturb(way, options[way], number, in_training, delay, tmp_path / f"moment-{moment}")
        print(said)
    for way, count in (("python", 1), ("torchrun", 2), ("accelerate", 1)):
        whole = tmp_path / f"whole-{count}"
        for folder in (tmp_path / way, whole):
            arguments = make_options(folder, **changes) + extra
            ended = run_command([*make_launcher(count), "recipes/train.py", *arguments], ACCELERATE_USE_CPU="true")
            assert ended.returncode == 0, ended.stderr
            endings.append(ended.stderr)
        assert read_weights(tmp_path / way) == read_weights(whole)
        assert read_metrics(tmp_path / way) == read_metrics(whole)
    assert any("resuming" in said for said in endings)


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


@pytest.mark.slow
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
