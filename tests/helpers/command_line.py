"""The tools as a user runs them, in this process."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
Command = Callable[..., tuple[int, str, str]]


def make_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a tool as `python tools/NAME.py ARGUMENTS` does; returns its exit status, stdout and stderr."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *map(str, arguments)])
        try:
            runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return run


def check_refused(result: tuple[int, str, str], *words: str) -> None:
    """One line on stderr with all the words, nothing on stdout, exit status 2."""
    status, out, err = result
    assert (status, out, err.count("\n")) == (2, "", 1), result
    assert err.startswith("error: ")
    assert all(word in err for word in words), err
