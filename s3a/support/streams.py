"""Standard streams that nobody reads any more: of a pipe whose reader has ended, or of a terminal that hung up."""

import errno
import io
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

UNREAD = (errno.EPIPE, errno.EIO)  # errors of writing to a pipe without a reader, to a terminal that hung up


class WatchedStream:
    """A text stream that outlives its reader: what nobody can read is dropped, and `on_end` is called."""

    def __init__(self, stream: TextIO, on_end: Callable[[], None]) -> None:
        self.stream, self.on_end = stream, on_end

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes a text; the number of its characters."""
        try:
            return self.stream.write(text)
        except OSError as error:
            self.end(error)
            return len(text)

    def flush(self) -> None:
        """Writes what is buffered."""
        try:
            self.stream.flush()
        except OSError as error:
            self.end(error)

    def end(self, error: OSError) -> None:
        """Drops all output from now on, if the error means that nobody reads it; raises others."""
        if error.errno not in UNREAD:
            raise error
        drop_output(self.stream)
        self.on_end()


def drop_output(stream: TextIO) -> None:
    """Sends what is still written to a stream nowhere, and what waits in its buffer too."""
    with suppress(io.UnsupportedOperation):  # of streams without a file, as notebooks have them
        unread = stream.fileno()
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, unread)
        os.close(descriptor)


def drop_unread_output() -> bool:
    """Sends nowhere what is written to those of stdout and stderr that nobody reads; whether there are such."""
    unread = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and is_unread(stream)]
    for stream in unread:
        drop_output(stream)
    return bool(unread)


def is_unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe without a reader, or a terminal that hung up."""
    if not hasattr(select, "poll"):
        return False
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors and hang-ups are always reported
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (io.UnsupportedOperation, ValueError):  # no file, or a closed one
        return False
