"""Trains a model for semantic segmentation: `accelerate launch recipes/segment.py [RECIPE] [--option value ...]`.

Without arguments it trains Semantic FPN on scenes of digits. Running the same command again resumes.
`--print-recipe` shows the result of the options and trains nothing.
"""

import os

from _signals import end_at_signals

if __name__ == "__main__":
    end_at_signals()
# Read when torch loads. Threads that spin while they wait starve each other where anything else runs (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from s3a.support.command_line import one_line_errors
from s3a.training.named_recipes import SEGMENTATION_RECIPES, Command
from s3a.training.tasks.segmentation import Segmentation
from s3a.training.trainer import train

COMMAND = Command(
    name="segment",
    purpose="Trains a model for semantic segmentation",
    recipes=SEGMENTATION_RECIPES,
    default="semantic_fpn_scenes",
)


def main() -> None:
    with one_line_errors():
        COMMAND.run(lambda recipe, _: train(recipe, Segmentation))


if __name__ == "__main__":
    main()
