"""Output that nobody reads any more."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest

from s3a.support.command_line import UNREAD_STATUS, one_line_errors
from s3a.support.errors import RESUME_STATUS, Interrupted
from s3a.support.streams import WatchedStream


@contextmanager
def piped_output() -> Iterator[int]:
    """stdout and stderr as a pipe, whose reader ends when its number is closed."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, redirect_stdout(stream), redirect_stderr(stream):
        yield reader


class FailingStream(io.StringIO):
    """A stream that can be written to no more, without a file below it."""

    number = errno.EPIPE

    def write(self, text: str) -> int:
        raise OSError(self.number, "cannot be written")


def test_a_command_before_head_ends_as_other_programs_do():
    with piped_output() as reader:
        with pytest.raises(SystemExit) as stop, one_line_errors():
            print("first", flush=True)
            os.close(reader)
            print("second")
        sys.stdout.flush()  # as Python does at its end: goes nowhere, and raises nothing
    assert stop.value.code == UNREAD_STATUS == 141


@pytest.mark.parametrize(("error", "status"), [(ValueError("wrong"), 2), (Interrupted("stopped"), RESUME_STATUS)])
def test_what_nobody_reads_changes_no_exit_status(error, status):
    with piped_output() as reader:
        os.close(reader)
        with pytest.raises(SystemExit) as stop, one_line_errors():
            raise error
    assert stop.value.code == status


def test_a_broken_pipe_that_is_not_the_output_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert stop.value.code == 2
    assert "Broken pipe" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO])
def test_a_watched_stream_tells_when_its_reader_ends(number, monkeypatch):
    monkeypatch.setattr(FailingStream, "number", number)
    told = []
    stream = WatchedStream(FailingStream(), lambda: told.append(True))
    assert stream.write("lost") == 4
    assert told
    assert stream.getvalue() == "", "all else is the stream's own"


def test_other_failures_of_a_watched_stream_are_raised(monkeypatch):
    monkeypatch.setattr(FailingStream, "number", errno.ENOSPC)
    with pytest.raises(OSError, match="cannot be written"):
        WatchedStream(FailingStream(), list).write("lost")
