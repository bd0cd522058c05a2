"""What is shown of a loop, on a terminal and in a log."""

import io
import re
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from s3a.training import progress
from s3a.training.progress import ProgressDisplay, format_duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_loop(monkeypatch, stream: io.StringIO, steps: int, done: int = 0, show: bool = True) -> str:
    """What a loop of one second a step writes."""
    now = iter(range(10**6))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressDisplay(steps, done=done, show=show) as display:
        for step in range(done, steps):
            display.advance("epoch 1/2", f"loss {step}")
    return stream.getvalue()


def test_a_log_has_a_line_every_three_minutes(monkeypatch):
    text = run_loop(monkeypatch, io.StringIO(), 3600)
    lines = text.splitlines()
    assert lines[0] == "epoch 1/2, step 10 of 3600: loss 9, 1 h 0 min left"
    assert [int(re.search(r"step (\d+)", line)[1]) for line in lines] == list(range(10, 3600, 180))
    assert len(text) < 1200, "of an hour"
    assert "\r" not in text


def test_the_time_left_is_that_of_the_steps_taken_here(monkeypatch):
    """A resumed loop has not spent any on those before."""
    [line, *_] = run_loop(monkeypatch, io.StringIO(), 3600, done=3000).splitlines()
    assert line == "epoch 1/2, step 3010 of 3600: loss 3009, 10 min left"


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(progress, "tqdm", partial(progress.tqdm, mininterval=0))
    text = run_loop(monkeypatch, Terminal(), 500)
    assert "\n" not in text
    assert "500" in text
    assert "epoch 1/2:" in text


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal(), None])
def test_other_processes_show_nothing(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressDisplay(3, show=False) as display:
        display.advance("epoch 1/2", "")
    assert not (stream and stream.getvalue())


def test_a_closed_stderr_is_left_alone(monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST_LINE", 0)
    monkeypatch.setattr(sys, "stderr", None)
    with ProgressDisplay(3) as display:
        display.advance("epoch 1/2", "")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (90, "2 min"), (3540, "59 min"), (3900, "1 h 5 min"), (187200, "2 d 4 h")],
)
def test_times_are_rounded_for_people(seconds, text):
    assert format_duration(seconds) == text
