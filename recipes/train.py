"""Trains a recipe: `accelerate launch recipes/train.py [RECIPE] [--option value ...]`.

Without arguments it trains `digits`. Running the same command again resumes. `--print-recipe` shows the result of
the options and trains nothing.
"""

import os

from _signals import end_at_signals

if __name__ == "__main__":
    end_at_signals()
# Read when torch loads. Threads that spin while they wait starve each other where anything else runs (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from s3a.support.command_line import one_line_errors
from s3a.training.named_recipes import RECIPES, Command
from s3a.training.recipe import Recipe
from s3a.training.trainer import train

COMMAND = Command(name="train", purpose="Trains a classifier", recipes=RECIPES, default="digits")


def main() -> None:
    with one_line_errors():
        COMMAND.run(lambda recipe, named: train(recipe, note=None if named else describe_default(recipe)))


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
