"""Trains an object detector: `accelerate launch recipes/detect.py [RECIPE] [--option value ...]`.

Without arguments it trains Mask R-CNN on scenes of digits. Running the same command again resumes.
`--print-recipe` shows the result of the options and trains nothing.
"""

import os

from _signals import end_at_signals

if __name__ == "__main__":
    end_at_signals()
# Read when torch loads. Threads that spin while they wait starve each other where anything else runs (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from s3a.support.command_line import one_line_errors
from s3a.training.named_recipes import DETECTION_RECIPES, Command
from s3a.training.tasks.detection import Detection
from s3a.training.trainer import train

COMMAND = Command(
    name="detect", purpose="Trains an object detector", recipes=DETECTION_RECIPES, default="mask_rcnn_scenes"
)


def main() -> None:
    with one_line_errors():
        COMMAND.run(lambda recipe, _: train(recipe, Detection))


if __name__ == "__main__":
    main()
