"""Nothing lost: runs that are killed, stopped, spread over processes or short of disk, as real processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from image_folder import make_image_folder

ROOT = Path(__file__).parent.parent
# Everything that could break a resume: averages, mixing, drop path, repeats, checkpoints inside epochs.
OPTIONS = {
    "--image-size": "32",
    "--epochs": "2",
    "--warmup-epochs": "0.5",
    "--batch-size": "128",
    "--repeats": "2",
    "--mixup": "0.8",
    "--cutmix": "1.0",
    "--ema-decay": "0.9",
    "--random-erasing": "0.3",
    "--clip-grad": "1.0",
    "--checkpoint-every": "4",
    "--cpu-threads": "1",
}
STEPS = 1437 // 128  # of an epoch

# Dies, or signals itself, when a function of the library is called for the so-manieth time.
DRIVER = """
import importlib, os, signal, sys
sys.path.insert(0, "recipes")
place, times, number, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
del sys.argv[1:5]
import train
module, name = place.split(":")
module = importlib.import_module(f"s3a.{module}")
original, calls = getattr(module, name), 0

def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == times and os.environ.get("RANK", "0") == rank:
        os.kill(os.getpid(), number)
    return original(*args, **kwargs)

setattr(module, name, counted)
train.main()
"""


def arguments(folder: Path, **changes: str) -> list[str]:
    options = OPTIONS | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return ["digits", "--output-dir", str(folder), *(word for pair in options.items() for word in pair)]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


def train(*args: str) -> subprocess.CompletedProcess:
    return run([sys.executable, "recipes/train.py", *args])


def die_at(place: str, times: int, *args: str) -> subprocess.CompletedProcess:
    ended = run([sys.executable, "-c", DRIVER, place, str(times), str(int(signal.SIGKILL)), "0", *args])
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    return ended


def weights(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob("*/model.safetensors")}


def metrics(folder: Path) -> list[dict]:
    measured = ("images_per_second", "loader_wait")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = train(*arguments(folder))
    assert ended.returncode == 0, ended.stderr
    assert set(weights(folder)) == {"model", "best", "ema", "ema-best"}
    return folder


def test_killed_anywhere_a_run_ends_with_the_same_bytes(undisturbed, tmp_path):
    """One run, killed in a step, while a checkpoint is written and put in place, in evaluation, at the end."""
    options = arguments(tmp_path / "run")
    die_at("engine:forward_backward", 3, *options)  # nothing written yet
    die_at("engine:forward_backward", 7, *options)
    die_at("checkpoint:fingerprint", 4, *options)  # one file of the second checkpoint is there
    die_at("evaluation:count", 2, *options)
    die_at("checkpoint:checkpoints", 3, *options)  # in place, the old ones not yet deleted
    die_at("engine:save_best", 1, *options)
    die_at("engine:finish", 1, *options)
    ended = train(*options)
    assert ended.returncode == 0, ended.stderr
    assert "nothing left to train" in ended.stderr
    assert weights(tmp_path / "run") == weights(undisturbed)
    assert metrics(tmp_path / "run") == metrics(undisturbed)
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial*"))


def test_signals_checkpoint_the_step_and_say_resume_me(undisturbed, tmp_path):
    """A scheduler's two signals and Ctrl-C, one after the other: in a step, in the evaluation, in a step."""
    options = arguments(tmp_path / "run", checkpoint_every="1000")
    signals = [
        (signal.SIGTERM, "engine:forward_backward", 6, "epoch 1, step 6", "step-000000006-epoch-00000"),
        (signal.SIGUSR1, "evaluation:count", 2, f"epoch 1, step {STEPS}", f"step-{STEPS:09d}-epoch-00000"),
        (signal.SIGINT, "engine:tell", 3, "epoch 2, step 3", f"step-{STEPS + 3:09d}-epoch-00001"),
    ]
    for number, place, times, where, checkpoint in signals:
        ended = run([sys.executable, "-c", DRIVER, place, str(times), str(int(number)), "0", *options])
        assert ended.returncode == 75, ended.stderr
        assert f"stopped by {number.name} at {where} of {STEPS}" in ended.stderr
        assert (tmp_path / "run" / "checkpoints" / checkpoint).is_dir()
    ended = train(*options)
    assert f"resuming {tmp_path / 'run'} after epoch 1 of 2, at step 3 of {STEPS}" in ended.stderr
    assert weights(tmp_path / "run") == weights(undisturbed)


def processes(count: int, *args: str, driver: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    script = [str(ROOT / "recipes" / "train.py")]
    if driver:
        path = Path(args[args.index("--output-dir") + 1]).parent / "driver.py"
        path.write_text(DRIVER)
        script = [str(path), *driver]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return run([*launcher, *script, *args], ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT))


LOSSES = """
import sys
sys.path.insert(0, "recipes")
import train
from s3a import engine
tell = engine.tell

def told(run, *args):
    result = tell(run, *args)
    run.say(f"loss {result.loss!r}")
    return result

engine.tell = told
train.main()
"""


def losses(folder: Path, count: int) -> list[float]:
    """The first 20 losses on so many processes; nothing in the run may depend on the process."""
    alone = {"mixup": "0", "cutmix": "0", "drop_path": "0", "batch_size": "64", "epochs": "1", "warmup_epochs": "0"}
    options = [*arguments(folder / "run", **alone), "--freeze-batch-norm"]
    path = folder / "losses.py"
    path.write_text(LOSSES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*launcher, str(path), *options] if count > 1 else [sys.executable, str(path), *options]
    ended = run(command, ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT))
    assert ended.returncode == 0, ended.stderr
    return [float(line.split()[1]) for line in ended.stderr.splitlines() if line.startswith("loss ")][:20]


def test_two_processes_give_the_losses_of_one(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    one, two = (losses(folder, count) for folder, count in zip(folders, (1, 2), strict=True))
    assert len(one) == len(two) == 20
    assert one[0] != one[-1]
    assert two == pytest.approx(one, rel=1e-4)
    last_one, last_two = (metrics(folder / "run")[-1] for folder in folders)
    assert last_two["val_loss"] == pytest.approx(last_one["val_loss"], rel=1e-3)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_both_resume(tmp_path):
    options = arguments(tmp_path / "run", epochs="1", warmup_epochs="0")
    driver = ("engine:forward_backward", "6", str(int(signal.SIGUSR1)), "1")  # the second process gets it
    ended = processes(2, *options, driver=driver)
    assert ended.returncode != 0
    assert f"at epoch 1, step 6 of {STEPS}" in ended.stderr
    assert "exitcode  : 75" in ended.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-000000006-epoch-00000").is_dir()
    ended = processes(2, *options)
    assert ended.returncode == 0, ended.stderr
    whole = processes(2, *arguments(tmp_path / "whole", epochs="1", warmup_epochs="0"))
    assert whole.returncode == 0, whole.stderr
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def kill_at_random(command: list[str], kills: int, seed: int) -> None:
    """Starts the command again and again and kills it some time after it has begun to train."""
    draw = random.Random(seed)
    for _ in range(kills):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for line in process.stderr:
            if "step/s" in line or "s/step" in line or "nothing left" in line:
                break
        time.sleep(draw.uniform(0, 3))
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["digits", "imagefolder"])
def test_ten_random_kills_change_no_byte(source, tmp_path):
    changes = {"epochs": "6", "checkpoint_every": "3", "num_workers": "1"}
    extra = []
    if source == "imagefolder":
        make_image_folder(tmp_path / "images", num_train=60)
        extra = ["--data", "imagefolder", "--data-dir", str(tmp_path / "images"), "--batch-size", "16"]
    killed, whole = (arguments(tmp_path / name, **changes) + extra for name in ("killed", "whole"))
    command = [sys.executable, "recipes/train.py"]
    kill_at_random([*command, *killed], kills=10, seed=0)
    assert train(*killed).returncode == 0
    assert train(*whole).returncode == 0
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


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
    options = arguments(small_disk / "run", keep_checkpoints="1")
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
    assert weights(small_disk / "run") == weights(undisturbed)


def test_a_tampered_checkpoint_is_said_and_the_one_before_it_used(undisturbed, tmp_path):
    options = arguments(tmp_path / "run")
    die_at("engine:forward_backward", 10, *options)
    newest, before = sorted((tmp_path / "run" / "checkpoints").glob("step-*"), reverse=True)
    content = bytearray((newest / "tensors.safetensors").read_bytes())
    content[-100] ^= 1
    (newest / "tensors.safetensors").write_bytes(content)
    ended = train(*options)
    assert ended.returncode == 0, ended.stderr
    assert f"checkpoint {newest} is damaged (tensors.safetensors is not as it was written)" in ended.stderr
    assert f"at step {int(before.name.split('-')[1])} of {STEPS}" in ended.stderr
    assert weights(tmp_path / "run") == weights(undisturbed)
    shutil.rmtree(tmp_path / "run")
