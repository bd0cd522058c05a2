"""A Slurm cluster of two nodes on this machine's loopback interface, with GPUs that are files."""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")

# Two nodes of the same machine, each with all its cores: slurmd runs once for each, under another name and port.
# cred_expire is also how long a job waits that was queued again: 120 s by default, 5 at least.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
JobRequeue=1
KillWait=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={ports[0]}
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cores} Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cores} Gres=gpu:2
PartitionName=plain Nodes=n1,n2 PriorityTier=1 DefaultTime=30 Default=YES
PartitionName=graceful Nodes=n1,n2 PriorityTier=1 DefaultTime=30 GraceTime=60
PartitionName=urgent Nodes=n1,n2 PriorityTier=9 DefaultTime=30 PreemptMode=OFF
"""


def find_obstacle() -> str | None:
    """Why no cluster can be started here; None where one can."""
    missing = [program for program in PROGRAMS if find_program(program) is None]
    if missing:
        return f"Slurm is not installed, and pip cannot install it: {', '.join(missing)} missing"
    return None if os.geteuid() == 0 else "Slurm's daemons start jobs as any user, so they must be started by root"


def find_program(name: str) -> str | None:
    """Where a program is; daemons are not on every user's path."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


class Cluster:
    """A context: the cluster is up within it, and no process of it is left afterwards, whatever happened.

    Attributes:
        environment: what Slurm's commands need, and what jobs inherit. Processes of the cluster are known by it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        self.previous = signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # or tests that are ended leave daemons
        try:
            self.start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self) -> None:
        """Configures the cluster, starts its daemons, and waits until both nodes take jobs."""
        host = socket.gethostname().partition(".")[0]
        settings = {"folder": self.folder, "host": host, "cores": max(2, os.cpu_count() or 1), "ports": find_ports(3)}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**settings))
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.folder}/gpu[0-1]\n")
        for name in ("gpu0", "gpu1"):
            (self.folder / name).touch()
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.run("munged", "--force", *(f"--{name}={self.folder}/munge.{end}" for name, end in names.items()))
        self.run("slurmctld", "-c")
        self.run("slurmd", "-N", "n1")
        self.run("slurmd", "-N", "n2")
        wait_until(
            lambda: self.run("sinfo", "-h", "-N", "-p", "plain", "-o", "%t").split() == ["idle"] * 2, self.read_logs
        )

    def end(self) -> None:
        """Ends every process that was started in the environment of the cluster: its daemons, its jobs, their steps."""
        self.send("terminate")
        psutil.wait_procs(self.list_processes(), timeout=10)
        self.send("kill")
        signal.signal(signal.SIGTERM, self.previous)
        assert not psutil.wait_procs(self.list_processes(), timeout=10)[1]

    def send(self, request: str) -> None:
        """Asks every process of the cluster to `terminate`, or has it `kill`ed."""
        for process in self.list_processes():
            with suppress(psutil.NoSuchProcess):
                getattr(process, request)()

    def list_processes(self) -> list[psutil.Process]:
        """The processes of the cluster, and what they started."""
        return [process for process in psutil.process_iter() if self.owns(process)]

    def owns(self, process: psutil.Process) -> bool:
        """Whether a process was started in the environment of the cluster, or in its folder, as slurmstepd is."""
        try:
            of_cluster = process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
            return of_cluster or Path(process.cwd()) == self.folder
        except psutil.Error:  # it has ended
            return False

    def run(self, program: str, *arguments: str, **environment: str) -> str:
        """Runs a program in the repository, in the environment of the cluster; returns what it prints."""
        command = [find_program(program) or program, *arguments]
        options = {"env": self.environment | environment, "cwd": Path(__file__).parents[2], "timeout": 60}
        ended = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        assert ended.returncode == 0, f"{command}: {ended.stderr}\n{self.read_logs()}"
        return ended.stdout.strip()

    def list_states(self) -> list[str]:
        """The states of both nodes."""
        return self.run("sinfo", "--noheader", "--Node", "--partition=plain", "--format=%t").split()

    def preempt(self) -> None:
        """Submits a short job of the partition `urgent` that needs both nodes, now."""
        self.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=:")

    def show(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode and more."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def read_logs(self) -> str:
        """The ends of the daemons' logs, for messages."""
        return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))


def wait_until(condition: Callable[[], bool], describe: Callable[[], str], seconds: float = 600) -> None:
    """Waits for a condition; fails, with a description of what is, where it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.2)


def find_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
