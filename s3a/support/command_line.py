"""How every command of the project is parsed and how it fails: one line on stderr, exit status 2."""

import dataclasses
import io
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from typing import TypeVar, get_args

import tyro

from s3a.support.compiler import CompilationError
from s3a.support.errors import RESUME_STATUS, Interrupted
from s3a.support.streams import drop_unread_output

OptionsT = TypeVar("OptionsT")
PARSING = re.compile(r"^Error parsing (?:[^-\s]\S*: )?")
OPTION = re.compile(r"--(?!help\b)\w|[A-Z]{2}")  # a line break may put "--help" of tyro's own words first in a line
CONFIG = (tyro.conf.FlagCreatePairsOff,)
BOX = str.maketrans("", "", "╭╮╰╯│─")

# What other libraries of the field call our options. Only names that spelling does not lead to.
OTHER_NAMES = {
    "--learning-rate": ("--lr", "--base-lr", "--blr", "--max-lr"),
    "--min-learning-rate": ("--min-lr", "--lr-min", "--eta-min"),
    "--batch-size": ("--bs", "--batch", "-b", "-bs", "--per-device-train-batch-size", "--imgs-per-batch"),
    "--weight-decay": ("--wd", "--decay"),
    "--num-workers": ("--workers", "-j", "--nw", "--dataloader-num-workers"),
    "--epochs": ("--ep", "-e", "--num-train-epochs", "--max-epochs"),
    "--warmup-epochs": ("--warmup", "--warm-up", "--lr-warmup-epochs"),
    "--image-size": ("--img-size", "--imgsz", "--img", "--input-size", "--resolution", "--res", "--img-dim"),
    "--model": ("--arch", "-a", "-m", "--net", "--network", "--backbone", "--model-name-or-path"),
    "--weights": ("--pretrained", "--checkpoint", "--ckpt", "--finetune", "--init-from", "--initial-checkpoint"),
    "--output-dir": ("--out", "-o", "--save-dir", "--log-dir", "--work-dir", "--exp-dir", "--project"),
    "--output": ("--out", "-o", "--out-file"),
    "--data-dir": ("--path", "--data-path", "--root", "--dir", "--folder", "--train-dir", "--imagenet"),
    "--dataset": ("--dataset-name", "--ds"),
    "--precision": ("--amp", "--dtype", "--mixed-precision", "--fp16", "--bf16", "--half"),
    "--clip-grad": ("--max-grad-norm", "--gradient-clip-val", "--clip"),
    "--accumulate": ("--grad-accum-steps", "--gradient-accumulation-steps", "--accum-iter", "--update-freq"),
    "--label-smoothing": ("--smoothing",),
    "--horizontal-flip": ("--hflip", "--mirror", "--fliplr"),
    "--crop-scale": ("--scale",),
    "--crop-ratio": ("--ratio",),
    "--auto-augment": ("--aa", "--randaug", "--randaugment"),
    "--random-erasing": ("--reprob", "--erasing"),
    "--color-jitter": ("--jitter",),
    "--ema-decay": ("--ema", "--model-ema", "--model-ema-decay"),
    "--grad-checkpointing": ("--gradient-checkpointing", "--use-checkpoint", "--checkpointing"),
    "--compile": ("--torchcompile", "--torch-compile"),
    "--track": ("--wandb", "--tensorboard", "--log-wandb", "--report-to", "--logger"),
    "--seed": ("--random-state", "--rng"),
    "--push-to-hub": ("--hub-model-id", "--upload"),
    "--checkpoint-every": ("--save-every", "--save-steps", "--save-freq", "--recovery-interval"),
}
# Python's words for wrong values, in plain ones.
PLAIN_WORDS = [
    (re.compile(r"(--[\w-]+): invalid literal for int\(\) with base 10: (.*)"), r"\1 is \2: it must be a whole number"),
    (re.compile(r"(--[\w-]+): could not convert string to float: (.*)"), r"\1 is \2: it must be a number"),
    (
        re.compile(r"(--[\w-]+): no type matching \{(.*)\}\|\{(.*)\} could be instantiated from \[(.*?)\]\..*"),
        r"\1 is \4: it must be \2 or \3",
    ),
]
UNREAD_STATUS = 128 + 13  # SIGPIPE
UNRECOGNIZED = "Unrecognized options: "


def run_command(options_type: type[OptionsT], main: Callable[[OptionsT], object]) -> None:
    """Parses the command line into `options_type` (a dataclass with docstrings as help) and calls `main` with it."""
    with one_line_errors():
        main(parse_options(options_type))


def parse_options(
    options_type: type[OptionsT],
    arguments: Sequence[str] | None = None,
    default: OptionsT | None = None,
    description: str | None = None,
    hints: Mapping[str, str] | None = None,
) -> OptionsT:
    """Parses arguments with tyro; a wrong one is a ValueError of one line instead of tyro's framed text.

    Args:
        arguments: None takes those of the process.
        default: where options that are not given come from; None for the type's own defaults.
        description: what the help says first; None for the type's docstring.
        hints: for options that a user may look for and that do not exist, what to do instead.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with raise_one_line(options_type, words, hints or {}):
        return tyro.cli(
            options_type,
            args=words,
            default=tyro.MISSING_NONPROP if default is None else default,
            description=description,
            config=CONFIG,
        )


def parse_known_options(options_type: type[OptionsT], arguments: Sequence[str], default: OptionsT) -> OptionsT:
    """The options of this type among others, which are left out of account."""
    with raise_one_line(options_type, list(arguments), {}):
        found, _ = tyro.cli(
            options_type, args=arguments, default=default, config=CONFIG, return_unknown_args=True, add_help=False
        )
    return found


@contextmanager
def raise_one_line(options_type: object, arguments: Sequence[str], hints: Mapping[str, str]) -> Iterator[None]:
    """Turns tyro's exit with a framed text into a ValueError of one line."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            yield
    except SystemExit as stop:
        if stop.code != 2:
            raise
        message = summarise_tyro_error(printed.getvalue())
        advice = find_advice(message, list_options(options_type), arguments, hints)
        if advice is not None:  # of more use than what tyro finds by spelling
            message = f"{message.partition('; did you mean')[0]}; {advice}"
        raise ValueError(f"{message} (--help lists the options)") from None


def list_options(options_type: object) -> dict[str, object]:
    """The types of the options of a dataclass, or of all in a union, by their names on the command line."""
    fields = [field for part in get_args(options_type) or (options_type,) for field in dataclasses.fields(part)]
    return {"--" + field.name.replace("_", "-"): field.type for field in fields}


def find_advice(
    message: str, known: Mapping[str, object], arguments: Sequence[str], hints: Mapping[str, str]
) -> str | None:
    """What a user may have meant, where spelling does not tell: other libraries' names, and values of switches."""
    if not message.startswith(UNRECOGNIZED):
        return None
    unknown = message.removeprefix(UNRECOGNIZED).partition(";")[0].split(", ")
    for word in unknown:
        spelled = word.partition("=")[0].replace("_", "-").lower()
        dashed = f"--{spelled.lstrip('-')}"
        if spelled in hints:
            return hints[spelled]
        meant = next((name for name, others in OTHER_NAMES.items() if name in known and spelled in others), None)
        if meant is not None or (dashed in known and dashed != spelled):
            return f"did you mean {meant or dashed}?"
    words = [part for argument in arguments for part in argument.split("=", 1)]
    for word, value in itertools.pairwise(words):
        if value in unknown and word not in unknown and known.get(word.replace("_", "-")) is bool:
            superfluous = word if value.lower() in ("false", "no", "off", "0") else value
            return f"{word} is a switch, without a value: leave {superfluous} out"
    return None


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
    for pattern, words in PLAIN_WORDS:
        summary = pattern.sub(words, summary)
    if meant:
        given = re.findall(r"--[\w-]+", summary)
        nearest = get_close_matches(given[0], meant, n=len(meant), cutoff=0) if given else meant
        summary += f"; did you mean {' or '.join(nearest)}?"
    return summary


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
    status 75, which means that the same command goes on with it. A command whose output nobody reads any more, as
    before `| head`, ends silently, with the status that shells show for other programs then.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # the commands have it so while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # not at the end of the process, where it is too late to end quietly
    except (ValueError, OSError, CompilationError) as error:
        if drop_unread_output() and isinstance(error, BrokenPipeError):
            sys.exit(UNREAD_STATUS)
        if os.environ.get("S3A_TRACEBACK"):
            raise
        print_error(error)
        sys.exit(2)
    except Interrupted as notice:
        drop_unread_output()
        if read_rank() == 0:
            print(notice, file=sys.stderr)
        sys.exit(RESUME_STATUS)
    except KeyboardInterrupt:
        drop_unread_output()
        print("interrupted; a training run goes on from its last checkpoint with the same command", file=sys.stderr)
        sys.exit(130)


def print_error(error: Exception) -> None:
    """Prints an error as one line on stderr."""
    rank = read_rank()
    print(f"error{f' in process {rank}' if rank else ''}: {' '.join(str(error).split())}", file=sys.stderr)


def read_rank() -> int:
    """The number of this process (RANK) among those that a launcher started together; 0 for a single one."""
    return int(os.environ.get("RANK", "0"))


def print_progress(message: str) -> None:
    """Prints on stderr how far it is, once for all processes."""
    if read_rank() == 0:
        print(message, file=sys.stderr, flush=True)
