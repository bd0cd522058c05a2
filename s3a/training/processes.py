"""The processes of a run: their share of the cores, what they agree on, their randomness, and requests to stop."""

import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import NoReturn, TextIO, cast

import numpy as np
import torch
from accelerate import Accelerator

from s3a.support.command_line import read_rank
from s3a.support.streams import WatchedStream

# --------------------------------------------------------------------------------------------------------
# Cores
# --------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------
# Agreement and randomness
# --------------------------------------------------------------------------------------------------------


def reduce_any(accelerator: Accelerator, value: bool) -> bool:
    """Whether the value is true on any process; all processes call this together."""
    if accelerator.num_processes == 1:
        return value
    return bool(accelerator.reduce(torch.tensor(float(value), device=accelerator.device), reduction="sum") > 0)


def raise_on_main(accelerator: Accelerator, error: Exception) -> NoReturn:
    """Raises an error that every process has on the main one; the others exit silently with status 2."""
    if accelerator.is_main_process:
        raise error
    raise SystemExit(2)


def seed_step(seed: int, step: int, process: int) -> None:
    """Seeds every generator for one step of one process, so that its draws do not depend on the steps before it."""
    entropy = np.random.SeedSequence((seed, step, process + 1))
    state = int(entropy.generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


# --------------------------------------------------------------------------------------------------------
# Requests to stop
# --------------------------------------------------------------------------------------------------------

LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # set by torchrun, by accelerate launch
Handler = Callable[[int, FrameType | None], object] | int | None


class StopRequests:
    """A context that notes what asks a run to stop, for it to do so between two steps.

    That is SIGTERM, SIGUSR1, Ctrl-C, or a terminal that hangs up, unless nohup said to ignore that. A second Ctrl-C
    interrupts at once. The end of the launcher is a request too: one that dies of a signal without passing it on leaves
    processes behind that nobody waits for. So is the end of the reader of stdout or stderr, as of `head`.
    """

    def __init__(self) -> None:
        self.noted: str | None = None
        self.was_interrupted = False
        self.process = os.getpid()
        self.launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None
        self.previous: dict[int, Handler] = {}
        self.streams: tuple[TextIO, TextIO] | None = None

    @property
    def reason(self) -> str | None:
        """Why to stop: the name of a signal, the end of the launcher or of a reader; None where nothing asks for it."""
        if self.noted is None and self.launcher not in (None, os.getppid()):
            return "the end of its launcher"
        return self.noted

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            names = ["SIGTERM", "SIGUSR1", "SIGINT"]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                names.append("SIGHUP")
            numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
            self.previous = {number: signal.signal(number, self.handle_signal) for number in numbers}
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (cast(TextIO, self.watch(stream)) for stream in self.streams)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
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
        if number != signal.SIGINT:
            return
        if self.was_interrupted:
            raise KeyboardInterrupt
        self.was_interrupted = True
        if read_rank() == 0 and sys.stderr is not None:
            launched = ", whatever the launcher prints" if self.launcher is not None else ""
            notice = f"\nending as soon as all is saved{launched}; Ctrl-C again ends it at once\n"
            with suppress(OSError):
                os.write(2, notice.encode())  # print might have been interrupted in the middle, and refuse
