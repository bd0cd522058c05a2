"""The processes of a run: their cores and kernels, what they agree on, their randomness, and requests to stop."""

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from types import FrameType, TracebackType
from typing import Any, NoReturn, TextIO, cast

import numpy as np
import torch
import torch.distributed
from accelerate import Accelerator

from s3a.support.command_line import read_rank
from s3a.support.streams import WatchedStream

# --------------------------------------------------------------------------------------------------------
# Cores and kernels
# --------------------------------------------------------------------------------------------------------

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def set_cpu_threads(accelerator: Accelerator, threads: int | None) -> None:
    """Gives this process so many threads, where it computes on the CPU; None is its share of the cores.

    `accelerate launch` leaves each process with a single thread.
    """
    if accelerator.device.type == "cpu":
        torch.set_num_threads(threads or count_own_cores())


def count_own_cores() -> int:
    """How many cores this process may use, if the processes on this machine share them evenly."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


@contextmanager
def configure_kernels(*, tf32: bool, cudnn_benchmark: bool, deterministic: bool) -> Iterator[None]:
    """Chooses which kernels torch uses for the time of a run; afterwards they are chosen as before.

    Enter it before CUDA starts: cuBLAS reads its setting then.

    Args:
        tf32: whether products and convolutions of float32 numbers on CUDA may round them to TF32.
        cudnn_benchmark: whether cuDNN times its algorithms; not where they are to be deterministic.
        deterministic: whether operations without a deterministic algorithm raise a RuntimeError.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    workspace = os.environ.get(CUBLAS_WORKSPACE)
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    cudnn.benchmark = cudnn_benchmark and not deterministic
    if deterministic:
        cudnn.deterministic = True
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")  # without it cuBLAS shares one among streams
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
        torch.use_deterministic_algorithms(was_deterministic, warn_only=warned_only)
        if workspace is None:
            os.environ.pop(CUBLAS_WORKSPACE, None)


# --------------------------------------------------------------------------------------------------------
# Agreement and randomness
# --------------------------------------------------------------------------------------------------------


def sum_over_hosts(accelerator: Accelerator, *counts: int) -> list[int]:
    """Each of the counts summed over all processes, which call this together; no device takes part or is waited for."""
    if accelerator.num_processes == 1:
        return list(counts)
    sums = torch.tensor(counts)
    torch.distributed.all_reduce(sums, group=get_host_group(torch.distributed.group.WORLD))
    return sums.tolist()


@lru_cache(maxsize=1)
def get_host_group(world: torch.distributed.ProcessGroup) -> torch.distributed.ProcessGroup:
    """All processes, connected by gloo; made at the first call, which all processes make together."""
    if torch.distributed.get_backend(world) == "gloo":
        return world
    return cast(torch.distributed.ProcessGroup, torch.distributed.new_group(backend="gloo"))


def reduce_any(accelerator: Accelerator, value: bool) -> bool:
    """Whether the value is true on any process; all processes call this together."""
    return sum_over_hosts(accelerator, value) != [0]


def gather_on_main(accelerator: Accelerator, records: list[Any]) -> list[Any]:
    """What all processes have, in their order, on the main one; the others get nothing, and need no memory for it."""
    if accelerator.num_processes == 1:
        return records
    parts: list[Any] | None = [None] * accelerator.num_processes if accelerator.is_main_process else None
    group = get_host_group(torch.distributed.group.WORLD)  # records are the hosts', and have no place on a device
    torch.distributed.gather_object(records, parts, dst=0, group=group)
    return [record for part in parts or () for record in part]


def raise_on_main(accelerator: Accelerator, error: Exception) -> NoReturn:
    """Raises an error that every process has on the main one; the others exit silently with status 2."""
    if accelerator.is_main_process:
        raise error
    raise SystemExit(2)


def seed_step(seed: int, step: int, process: int) -> None:
    """Seeds every generator for one step of one process, so that its draws do not depend on the steps before it."""
    state = combine_seeds(seed, step, process + 1)
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def combine_seeds(*numbers: int) -> int:
    """A seed of 32 bits that follows from all of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# --------------------------------------------------------------------------------------------------------
# Requests to stop
# --------------------------------------------------------------------------------------------------------

LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # set by torchrun, by accelerate launch
Handler = Callable[[int, FrameType | None], object] | int | None


def is_main_thread() -> bool:
    """Whether this is the thread that Python lets set handlers of signals."""
    return threading.current_thread() is threading.main_thread()


class StopRequests:
    """A context that notes what asks a run to stop, for it to do so between two steps.

    That is SIGTERM, SIGUSR1, Ctrl-C, or a terminal that hangs up, unless nohup said to ignore that. A second Ctrl-C
    interrupts at once. The end of the launcher is a request too: one that dies of a signal without passing it on leaves
    processes behind that nobody waits for. So is the end of the reader of stdout or stderr, as of `head`.

    A command may have something else woken by signals, which ends a process where there is nothing to save yet
    (`signal.set_wakeup_fd`); `begin` says that there is.
    """

    def __init__(self) -> None:
        self.noted: str | None = None
        self.was_interrupted = False
        self.process = os.getpid()
        self.launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None
        self.previous: dict[int, Handler] = {}
        self.streams: tuple[TextIO, TextIO] | None = None
        self.others_are_woken = False
        self.wakeup: int | None = None  # the file that signals were written to before the run began

    @property
    def reason(self) -> str | None:
        """Why to stop: the name of a signal, the end of the launcher or of a reader; None where nothing asks for it."""
        if self.noted is None and self.launcher not in (None, os.getppid()):
            return "the end of its launcher"
        return self.noted

    def __enter__(self) -> "StopRequests":
        if is_main_thread():
            names = ["SIGTERM", "SIGUSR1", "SIGINT"]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                names.append("SIGHUP")
            numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
            self.previous = {number: signal.signal(number, self.handle_signal) for number in numbers}
            wakeup = signal.set_wakeup_fd(-1)
            self.others_are_woken = wakeup != -1
            signal.set_wakeup_fd(wakeup)
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (cast(TextIO, self.watch(stream)) for stream in self.streams)
        return self

    def begin(self) -> None:
        """Leaves signals to this context alone: from here on there is a run to be saved."""
        if is_main_thread():
            self.wakeup, self.others_are_woken = signal.set_wakeup_fd(-1), False

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.wakeup is not None:
            signal.set_wakeup_fd(self.wakeup)
        assert self.streams is not None
        sys.stdout, sys.stderr = self.streams

    def watch(self, stream: TextIO | WatchedStream | None) -> WatchedStream | None:
        """The stream, the end of whose reader this notes, in place of a context around this one; None is closed."""
        if isinstance(stream, WatchedStream):
            stream = stream.stream
        return None if stream is None else WatchedStream(stream, self.note_end_of_reader)

    def note_end_of_reader(self) -> None:
        """Notes that nobody reads the output any more."""
        self.noted = self.noted or "the end of the reader of its output"

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Notes the signal, and says so where it is Ctrl-C; a second Ctrl-C raises KeyboardInterrupt."""
        if os.getpid() != self.process:  # a worker of a loader, which has inherited this: its run ends it
            return
        self.noted = signal.Signals(number).name
        if number != signal.SIGINT or self.others_are_woken:
            return
        if self.was_interrupted:
            raise KeyboardInterrupt
        self.was_interrupted = True
        if read_rank() == 0 and sys.stderr is not None:
            launched = ", whatever the launcher prints" if self.launcher is not None else ""
            notice = f"\nending as soon as all is saved{launched}; Ctrl-C again ends it at once\n"
            with suppress(OSError):
                os.write(2, notice.encode())  # print might have been interrupted in the middle, and refuse
