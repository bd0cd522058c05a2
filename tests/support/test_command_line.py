"""How commands say that they were called wrongly."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from s3a.support.command_line import parse_options


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Draws."""

    output: Path
    """The file to write - a PNG."""
    sides: tuple[int, ...] = (1,)
    """Maps, in tokens per side; see --help."""
    both_sides: bool = False
    """Turn the sheet."""


@dataclass(frozen=True, kw_only=True)
class Count:
    """Counts."""

    files: Annotated[tyro.conf.Positional[tuple[Path, Path]], tyro.conf.arg(metavar="FIRST SECOND")]
    """What to count."""
    output: Path
    """The file to write."""
    sides: str = ""
    """Of the map."""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # tyro draws its frames with other characters
@pytest.mark.parametrize(
    ("options_type", "arguments", "expected"),
    [
        (
            Draw,
            ["--side", "3", "--output", "x"],
            "Unrecognized options: --side, 3; did you mean --sides or --both-sides?",
        ),
        (Draw, [], "--output must be given"),
        (Draw, ["--outputs", "x"], "--output must be given; Unrecognized options: --outputs x"),
        (Draw, ["--output"], "Missing value for argument '--output'. Expected 1 values."),
        (Draw, ["--sides", "a", "--output", "x"], "--sides: Could not find valid parse for arguments: ['a']"),
        (Draw, ["--out", "x"], "--output must be given; Unrecognized options: --out x"),
        (Draw, ["--output", "x", "-o", "y"], "Unrecognized options: -o, y; did you mean --output?"),
        (Draw, ["--output", "x", "-sides", "3"], "Unrecognized options: -sides, 3; did you mean --sides?"),
        (Draw, ["--output", "x", "--lr", "1"], "Unrecognized options: --lr, 1"),
        (
            Draw,
            ["--output", "x", "--both_sides", "yes"],
            "Unrecognized options: yes; --both_sides is a switch, without a value: leave yes out",
        ),
        (
            Draw,
            ["--both-sides=False", "--output", "x"],
            "Unrecognized options: False; --both-sides is a switch, without a value: leave --both-sides out",
        ),
        (Draw | Count, [], "Expected one of {draw, count}."),
        (Draw | Count, ["drew"], "Unrecognized options: drew; Available subcommands: draw, count"),
        (Draw | Count, ["count"], "FIRST, --output must be given"),
        (
            Draw | Count,
            ["draw", "--side", "3", "--output", "x"],
            "Unrecognized options: --side, 3; did you mean --sides or --both-sides?",
        ),
    ],
)
def test_wrong_calls_are_one_line(monkeypatch, encoding, options_type, arguments, expected):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(ValueError) as refusal:
        parse_options(options_type, arguments)
    assert str(refusal.value) == f"{expected} (--help lists the options)"


def test_right_calls_are_parsed():
    assert parse_options(Draw, ["--output", "x", "--sides", "1", "2"]) == Draw(output=Path("x"), sides=(1, 2))
    assert parse_options(Draw | Count, ["count", "a", "b", "--output", "x"]) == Count(
        files=(Path("a"), Path("b")), output=Path("x")
    )
    assert parse_options(Draw, [], default=Draw(output=Path("y"))) == Draw(output=Path("y"))
