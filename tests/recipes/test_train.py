"""recipes/train.py as launchers start it: two of torchrun's that find each other, as on two machines."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from helpers.real_runs import ROOT, make_options, read_metrics, read_weights, run_ranks
from helpers.slurm import find_ports


@pytest.mark.slow
def test_two_launchers_of_a_process_each_end_as_one_with_two(tmp_path: Path):
    whole, parted = (make_options(tmp_path / name, num_workers="1") for name in ("whole", "parted"))
    ended = run_ranks(2, "recipes/train.py", *whole, ACCELERATE_USE_CPU="true")
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr
    rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    rendezvous.append(f"--rdzv_endpoint=127.0.0.1:{find_ports(1)[0]}")
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--local_addr=127.0.0.1"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    logs = [tmp_path / f"launcher-{number}.txt" for number in range(2)]
    launchers = [
        subprocess.Popen([*command, "recipes/train.py", *parted], cwd=ROOT, env=environment, stderr=log.open("w"))
        for log in logs
    ]
    try:
        for launcher in launchers:
            launcher.wait(300)
    except subprocess.TimeoutExpired:
        for launcher in launchers:
            if launcher.poll() is None:
                write_stacks(launcher)
    finally:
        for launcher in launchers:
            launcher.terminate()  # and with it its process
    assert [launcher.wait(60) for launcher in launchers] == [0, 0], "\n\n".join(log.read_text() for log in logs)
    assert read_weights(tmp_path / "parted") == read_weights(tmp_path / "whole")
    assert read_metrics(tmp_path / "parted") == read_metrics(tmp_path / "whole")


def write_stacks(launcher: subprocess.Popen) -> None:
    """Ends the processes below a launcher that hangs; each writes where it was into the launcher's log."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            process.send_signal(signal.SIGABRT)
            process.wait(10)
