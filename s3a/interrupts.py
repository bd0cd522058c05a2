"""Requests to stop, from a scheduler, a user or a clock, taken note of and answered between two steps."""

import signal
import threading
import time
from types import FrameType, TracebackType

RESUME_STATUS = 75  # EX_TEMPFAIL of sysexits.h: not done, run the same command again


class Interrupted(Exception):  # noqa: N818  an outcome, not an error
    """The run was asked to stop; its checkpoint is written."""


class StopRequests:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C instead of dying of them; a second Ctrl-C interrupts at once.

    Attributes:
        received: the name of the signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            names = ("SIGTERM", "SIGUSR1", "SIGINT")
            numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
            self.previous = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


class CheckpointClock:
    """When a checkpoint is due, by `--checkpoint-every`: so many steps, so many minutes (10m), or never (None)."""

    def __init__(self, every: str | None) -> None:
        minutes = every is not None and every.endswith("m")
        self.seconds = 60 * int(every[:-1]) if minutes else None
        self.steps = int(every) if every is not None and not minutes else None
        self.written = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        if self.steps is not None:
            return step % self.steps == 0
        return self.seconds is not None and time.monotonic() - self.written >= self.seconds

    def restart(self) -> None:
        """A checkpoint was written."""
        self.written = time.monotonic()
