"""recipes/slurm/train.sbatch: when a job is queued again, and when not; on a Slurm of two nodes on this machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.real_runs import ROOT, make_options, read_metrics, read_weights, run_ranks
from helpers.slurm import Cluster, find_obstacle, wait_until

JOB_FILE = "recipes/slurm/train.sbatch"

# --------------------------------------------------------------------------------------------------------
# The job file alone, with programs that stand in for Slurm's
# --------------------------------------------------------------------------------------------------------

# The tasks of one node of two, one after the other.
SRUN = """#!/bin/bash
echo "srun $*" >> "$CALLS"
while [ "$1" != bash ]; do shift; done
for local in 0 1; do SLURM_PROCID=$((2 + local)) SLURM_LOCALID=$local "$@" || status=$?; done
exit ${status:-0}
"""
PYTHON = """#!/bin/bash
echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE, $MASTER_PORT: $(printf '[%s]' "$@")" >> "$CALLS"
exit $STATUS
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
"""


@pytest.mark.parametrize("status", [0, 1, 2, 75, 137, 143])
def test_the_job_file_queues_again_at_status_75_alone(status: int, tmp_path: Path):
    for name, text in {"srun": SRUN, "python": PYTHON, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "STATUS": str(status),
        "SLURM_JOB_ID": "20007",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_GPUS_ON_NODE": "2",
    }
    ended = subprocess.run(
        ["bash", ROOT / JOB_FILE, "digits", "--output-dir", "two words"], env=environment, check=False
    )
    assert ended.returncode == status
    srun, *calls = (tmp_path / "calls").read_text().splitlines()
    assert "--ntasks=4 --ntasks-per-node=2" in srun
    command = "[recipes/train.py][digits][--output-dir][two words]"
    places = ["rank 2 of 4, 0 of 2", "rank 3 of 4, 1 of 2"]
    requeued = ["scontrol requeue 20007"] if status == 75 else []
    assert calls == [*(f"{place}, 10007: {command}" for place in places), *requeued]


# --------------------------------------------------------------------------------------------------------
# Real jobs
# --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose jobs run this project, on CPUs."""
    if obstacle := find_obstacle():
        pytest.skip(obstacle)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with cluster:
        yield cluster


class Job:
    """A submitted training run."""

    def __init__(self, cluster: Cluster, log: Path, sbatch_options: list[str], arguments: list[str]) -> None:
        self.cluster, self.log = cluster, log
        log.touch()
        self.number = cluster.run("sbatch", "--parsable", f"--output={log}", *sbatch_options, JOB_FILE, *arguments)

    @property
    def facts(self) -> dict[str, str]:
        return self.cluster.show(self.number)

    def count_lines(self, *beginnings: str) -> int:
        """How many lines of the log begin so."""
        return sum(line.startswith(beginnings) for line in self.log.read_text().splitlines())

    def wait_for_start(self, count: int) -> None:
        """Waits until the run has begun to train for the so-manieth time."""
        wait_until(lambda: self.count_lines("beginning", "resuming") == count, self.describe)

    def wait_for_end(self) -> dict[str, str]:
        """Waits until the job has ended and will not be queued again; returns what Slurm knows of it then."""
        alive = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
        wait_until(lambda: self.facts["JobState"] not in alive, self.describe)
        return self.facts

    def describe(self) -> str:
        return f"{self.facts}\n{self.log.read_text()[-5000:]}\n{self.cluster.read_logs()}"


OPTIONS = {"epochs": "3", "num_workers": "1", "checkpoint_every": "1000"}


@pytest.mark.slow
@pytest.mark.parametrize(("count", "partition"), [(1, "plain"), (2, "graceful")], ids=["one process", "two processes"])
def test_preempted_twice_a_run_ends_with_the_same_bytes(count: int, partition: str, cluster: Cluster, tmp_path: Path):
    """Where preemption gives notice, the job file queues the job again; where not, Slurm does: once in either case."""
    whole = run_ranks(count, "recipes/train.py", *make_options(tmp_path / "whole", **OPTIONS), ACCELERATE_USE_CPU="1")
    assert [ended.returncode for ended in whole] == [0] * count, whole[0].stderr
    options = [f"--ntasks-per-node={count}", f"--partition={partition}"]
    job = Job(cluster, tmp_path / "log", options, make_options(tmp_path / "run", **OPTIONS))
    for start in (1, 2):
        job.wait_for_start(start)
        cluster.preempt()
    facts = job.wait_for_end()
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("COMPLETED", "2", "0:0"), job.describe()
    assert job.count_lines("stopped by SIGTERM") == 2
    assert (job.count_lines("beginning"), job.count_lines("resuming")) == (1, 2)
    assert read_weights(tmp_path / "run") == read_weights(tmp_path / "whole")
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


@pytest.mark.slow
def test_time_limits_and_requests_queue_again_and_scancel_does_not(cluster: Cluster, tmp_path: Path):
    """A run on two nodes that would not end today. Slurm looks at time limits twice a minute."""
    options = ["--nodes=2", "--gpus-per-node=1", "--signal=USR1@30"]
    job = Job(cluster, tmp_path / "log", options, make_options(tmp_path / "run", **(OPTIONS | {"epochs": "1000"})))
    job.wait_for_start(1)
    cluster.run("scontrol", "update", f"job={job.number}", "timelimit=1")
    wait_until(lambda: job.facts["Restarts"] == "1", job.describe)
    cluster.run("scontrol", "update", f"job={job.number}", "timelimit=30")
    job.wait_for_start(2)
    assert job.count_lines("stopped by SIGUSR1") == 1
    cluster.run("scontrol", "requeue", job.number)
    job.wait_for_start(3)
    cluster.run("scancel", job.number)
    facts = job.wait_for_end()
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "2"), job.describe()
    assert job.count_lines("stopped by SIGTERM") == 2


@pytest.mark.slow
def test_a_run_that_fails_is_not_queued_again(cluster: Cluster, tmp_path: Path):
    job = Job(cluster, tmp_path / "log", [], ["digits", "--epoch", "2"])
    facts = job.wait_for_end()
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("FAILED", "0", "2:0"), job.describe()
    assert "did you mean --epochs" in job.log.read_text()
