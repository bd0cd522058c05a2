"""Requests to stop, from a scheduler, a user or a clock, taken note of and answered between two steps."""

import os
import signal
import threading
from types import FrameType, TracebackType

LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # set by torchrun, by accelerate launch


class StopRequests:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C instead of dying of them; a second Ctrl-C interrupts at once.

    The end of the launcher is a request too: one that dies of a signal without passing it on leaves processes behind
    that nobody waits for.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None
        self.previous: dict[int, object] = {}

    @property
    def received(self) -> str | None:
        """The name of the signal, or that the launcher has ended; None as long as nothing asks to stop."""
        if self.signal is None and self.launcher not in (None, os.getppid()):
            return "the end of its launcher"
        return self.signal

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
        if number == signal.SIGINT and self.signal:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
