"""Trains a recipe: `accelerate launch recipes/train.py [RECIPE] [--option value ...]`.

Without arguments it trains `digits`. Running the same command again resumes. `--print-recipe` shows the result of
the options and trains nothing.
"""

import os
import signal
import sys

# Read when torch loads. Threads that spin while they wait starve each other where anything else runs (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below shows no traceback

from s3a.support.command_line import one_line_errors, parse_options
from s3a.training.named_recipes import RECIPES, forget_other_source, get_recipe
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
        default = get_recipe(arguments[0] if named else "digits")
        recipe = parse_options(Recipe, arguments[named:], default=default, description=HELP)
        recipe = forget_other_source(recipe, default)
        if "--print-recipe" in sys.argv:
            print(recipe.to_json(), end="")
        else:
            train(recipe)


if __name__ == "__main__":
    main()
