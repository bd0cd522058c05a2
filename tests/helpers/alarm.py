"""Ends a test that hangs."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def stop_after(seconds: int) -> Iterator[None]:
    """Fails the test where the block takes longer, also in a system call that waits for ever."""

    def fail(*_: object) -> None:
        pytest.fail(f"it hangs: {seconds} s are over")  # no OSError, which would be taken for a file's

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
