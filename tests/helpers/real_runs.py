"""Training runs as real processes that die, get signals, or are several."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.fork_server import run_python, run_together

ROOT = Path(__file__).parents[2]
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
BEGINNINGS = ("beginning", "resuming")
# How often a run is killed or stopped at random.
MOMENTS = [pytest.param(3, marks=pytest.mark.slow), pytest.param(10, marks=pytest.mark.exhaustive)]

# Gets a signal when a function of the library, named by its place, is called for the so-manieth time.
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


def make_options(folder: Path, **changes: str) -> list[str]:
    """The arguments of recipes/train.py for OPTIONS and changes of them."""
    options = OPTIONS | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return ["digits", "--output-dir", str(folder), *(word for pair in options.items() for word in pair)]


def run_command(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Runs a command in the repository to its end."""
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)


def train(*args: str) -> subprocess.CompletedProcess:
    """Runs recipes/train.py to its end."""
    return run_python(["recipes/train.py", *args], ROOT, dict(os.environ))


def get_signal(place: str, times: int, number: signal.Signals, *args: str) -> subprocess.CompletedProcess:
    """Runs recipes/train.py, which gets a signal when the function at this place is called for the so-manieth time."""
    return run_python(["-c", DRIVER, place, str(times), str(int(number)), "0", *args], ROOT, dict(os.environ))


def kill_at(place: str, times: int, *args: str) -> None:
    """Runs recipes/train.py until it is killed when the function at this place is called for the so-manieth time."""
    ended = get_signal(place, times, signal.SIGKILL, *args)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def kill_at_random(command: list[str], folder: Path, kills: int, seconds: float) -> None:
    """Starts a training again and again, and kills it up to so many seconds after it has said how it begins.

    The first time it may have no checkpoint yet; later it has one, so that at least one start goes on from there.
    """
    draw, said = random.Random(0), []
    for _ in range(kills):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        said.append(next(line for line in process.stderr if "nothing left" in line or line.startswith(BEGINNINGS)))
        while len(said) > 1 and process.poll() is None and not list((folder / "checkpoints").glob("*")):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, seconds))
        process.kill()
        process.wait()
    assert any(line.startswith("resuming") for line in said), said


def read_weights(folder: Path) -> dict[str, bytes]:
    """The weights files of a run, by the name of their folder."""
    return {path.parent.name: path.read_bytes() for path in folder.glob("*/model.safetensors")}


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without those figures that a clock measured."""
    measured = ("images_per_second", "loader_wait")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


def make_launcher(count: int) -> list[str]:
    """The command that starts a script in so many processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]


def run_ranks(count: int, *arguments: str, **environment: str) -> list[subprocess.CompletedProcess]:
    """Runs a script in so many processes that know each other, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    places = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return run_together([list(arguments)] * count, ROOT, places if count > 1 else [{**os.environ, **environment}])


def launch(count: int, *args: str, driver: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Runs recipes/train.py in so many processes; with `driver`, the arguments of DRIVER, one of them gets a signal."""
    script = [str(ROOT / "recipes" / "train.py")]
    if driver:
        path = Path(args[args.index("--output-dir") + 1]).parent / "driver.py"
        path.write_text(DRIVER)
        script = [str(path), *driver]
    return run_command([*make_launcher(count), *script, *args], ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT))
