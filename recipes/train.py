"""Trains a recipe: `accelerate launch recipes/train.py [RECIPE] [--option value ...]`.

Without arguments it trains `digits`. Running the same command again resumes. `--print-recipe` shows the result of
the options and trains nothing.
"""

import atexit
import os
import signal
import sys
import threading

RESUME_STATUS = 75  # as in s3a.support.errors, which takes seconds to import
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


def end_at_signals() -> None:
    """Makes signals end this process at once and silently, with status 75, wherever no run is under way to be saved.

    That is until a run begins, and again when it is done. It takes a thread: a handler in Python would have to wait for
    a library that is being loaded, or for other processes that are to be connected and never come.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while os.read(reader, 1)[0] not in SIGNALS:
            pass
        os._exit(RESUME_STATUS)

    threading.Thread(target=watch, daemon=True).start()
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, lambda *_: None)  # without a handler nothing is written to the pipe
    signal.set_wakeup_fd(writer)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    # Python puts back what signals do by default before a process is gone; by then the status is decided.
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in SIGNALS])


if __name__ == "__main__":
    end_at_signals()
# Read when torch loads. Threads that spin while they wait starve each other where anything else runs (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from s3a.support.command_line import one_line_errors
from s3a.training.named_recipes import RECIPES, find_late_name, parse_recipe
from s3a.training.recipe import Recipe
from s3a.training.trainer import train

HELP = (
    "Trains a recipe: recipes/train.py [RECIPE] [--print-recipe] [--option value ...]. The recipe comes first, and is "
    f"one of {', '.join(RECIPES)}; without one it is digits. --print-recipe shows what would run, and trains nothing."
)


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--print-recipe"]
    named = bool(arguments) and not arguments[0].startswith("-")
    with one_line_errors():
        recipe = parse_arguments(arguments[0] if named else "digits", arguments[named:])
        if "--print-recipe" in sys.argv:
            print(recipe.to_json(), end="")
        else:
            train(recipe, note=None if named else describe_default(recipe))


def parse_arguments(name: str, options: list[str]) -> Recipe:
    """The named recipe with these options; ValueError for wrong ones, and for a name that stands behind options."""
    try:
        return parse_recipe(name, options, description=HELP)
    except ValueError as error:
        in_order = find_late_name(options, str(error))
        if in_order is None:
            raise
        raise ValueError(f"the name of a recipe comes before its options: recipes/train.py {in_order}") from None


def describe_default(recipe: Recipe) -> str | None:
    """Which settings a run on other images has that was started without a recipe's name; None for the digits."""
    if recipe.data == "digits":
        return None
    return (
        "without a recipe's name, settings that are not given are those of digits, for small drawings that are not "
        "mirrored; for photographs there is recipes/train.py photos"
    )


if __name__ == "__main__":
    main()
