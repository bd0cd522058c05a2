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
    launchers = [
        subprocess.Popen(
            [*command, "recipes/train.py", *parted], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        errors = [launcher.communicate(timeout=300)[1] for launcher in launchers]
    except subprocess.TimeoutExpired:
        pytest.fail("\n\n".join(end_with_stacks(launcher) for launcher in launchers))
    finally:
        for launcher in launchers:
            launcher.terminate()  # and with it its process
    assert [launcher.returncode for launcher in launchers] == [0, 0], errors
    assert read_weights(tmp_path / "parted") == read_weights(tmp_path / "whole")
    assert read_metrics(tmp_path / "parted") == read_metrics(tmp_path / "whole")


def end_with_stacks(launcher: subprocess.Popen) -> str:
    """Ends the processes below a launcher that hangs; returns all they said, and where each of them was."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGABRT)
            process.wait(10)
    launcher.terminate()
    return str(launcher.communicate(timeout=60)[1])
