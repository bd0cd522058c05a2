"""How every command of the project is parsed and how it fails: one line on stderr, exit status 2."""

import io
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from typing import TypeVar

import tyro

from s3a.support.compiler import CompilationError
from s3a.support.errors import RESUME_STATUS, Interrupted

OptionsT = TypeVar("OptionsT")
PARSING = re.compile(r"^Error parsing (?:[^-\s]\S*: )?")
OPTION = re.compile(r"--(?!help\b)\w|[A-Z]{2}")  # a line break may put "--help" of tyro's own words first in a line
BOX = str.maketrans("", "", "╭╮╰╯│─")


def run_command(options_type: type[OptionsT], main: Callable[[OptionsT], object]) -> None:
    """Parses the command line into `options_type` (a dataclass with docstrings as help) and calls `main` with it."""
    with one_line_errors():
        main(parse_options(options_type))


def parse_options(
    options_type: type[OptionsT],
    arguments: Sequence[str] | None = None,
    default: OptionsT | None = None,
    description: str | None = None,
) -> OptionsT:
    """Parses arguments with tyro; a wrong one is a ValueError of one line instead of tyro's framed text.

    Args:
        arguments: None takes those of the process.
        default: where options that are not given come from; None for the type's own defaults.
        description: what the help says first; None for the type's docstring.
    """
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return tyro.cli(
                options_type,
                args=arguments,
                default=tyro.MISSING_NONPROP if default is None else default,
                description=description,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code != 2:
            raise
        raise ValueError(summarise_tyro_error(printed.getvalue())) from None


def summarise_tyro_error(message: str) -> str:
    """One line out of tyro's framed error: what is wrong, and the options it thinks were meant."""
    wrong, meant = [], []
    for head, *rest in split_sections(message):
        options = [line.split()[0] for line in rest if OPTION.match(line)]  # among lines of help
        if head.startswith("Missing from"):
            wrong.append(f"{', '.join(options)} must be given")
        elif head.startswith("Perhaps you meant"):
            meant = list(dict.fromkeys(options))
        elif not head.startswith(("Argument helptext", "For full helptext")):
            wrong.append(" ".join([head, *rest]))
    summary = PARSING.sub("", "; ".join(wrong))
    if meant:
        given = re.findall(r"--[\w-]+", summary)
        nearest = get_close_matches(given[0], meant, n=len(meant), cutoff=0) if given else meant
        summary += f"; did you mean {' or '.join(nearest)}?"
    return f"{summary} (--help lists the options)"


def split_sections(message: str) -> Iterator[list[str]]:
    """The parts of tyro's framed error between its rules, which are hyphens where the output is not UTF-8."""
    lines = [line.translate(BOX).strip() for line in message.splitlines()[1:]]
    for is_rule, part in itertools.groupby(lines, key=lambda line: not line.strip("-")):
        if not is_rule:
            yield list(part)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with `error: ...` and status 2 at the errors that this library writes for users.

    All else keeps its traceback; S3A_TRACEBACK=1 shows it for these too. A run that was asked to stop ends with
    status 75, which means that the same command goes on with it.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # the commands have it so while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except (ValueError, OSError, CompilationError) as error:
        if os.environ.get("S3A_TRACEBACK"):
            raise
        print_error(error)
        sys.exit(2)
    except Interrupted as notice:
        if read_rank() == 0:
            print(notice, file=sys.stderr)
        sys.exit(RESUME_STATUS)
    except KeyboardInterrupt:
        print("interrupted; a training run goes on from its last checkpoint with the same command", file=sys.stderr)
        sys.exit(130)


def print_error(error: Exception) -> None:
    """Prints an error as one line on stderr."""
    rank = read_rank()
    print(f"error{f' in process {rank}' if rank else ''}: {' '.join(str(error).split())}", file=sys.stderr)


def read_rank() -> int:
    """The number of this process (RANK) among those that a launcher started together; 0 for a single one."""
    return int(os.environ.get("RANK", "0"))
