"""Evaluates a weights folder or Hub repository: `python recipes/evaluate.py --weights FOLDER_OR_REPO --data ...`.

Prints one JSON object on stdout: the scores of the weights' task (of a classifier top1 and top5, of segmentation miou,
of detection box_ap and more, all fractions of 1), loss where there is one, images, images_per_second, and the names of
images that could not be read, where that was allowed. Of ImageNet-C also mce, and of the other sets that test what was
learnt from ImageNet the clean scores on the same classes, where --imagenet is given.
"""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

# Read when torch loads. Threads that spin while they wait starve each other where anything else runs (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below shows no traceback

from accelerate import PartialState
from torch import nn

from s3a.data import DataOptions, Source
from s3a.data.imagenet import ImageNetData, ImageNetSet
from s3a.robustness.imagenet import (
    Figures,
    ImageNetResults,
    list_subsets,
    measure_subsets,
    open_imagenet_results,
    summarise_subsets,
)
from s3a.support.command_line import run_command
from s3a.support.timing import describe_machine
from s3a.training.evaluation import choose_task, evaluate_weights
from s3a.training.processes import StopRequests
from s3a.training.recipe import Precision, spell_option
from s3a.training.tasks.imagenet import ImageNetClassification
from s3a.training.tasks.task import ClassTask
from s3a.weights.folder import hash_weights
from s3a.weights.pretrained import download_weights, load_pretrained


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """Evaluates weights on the validation images of a data source."""

    data: Source | ImageNetSet
    """Where the images come from: a source of images, or ImageNet's validation images (imagenet), ImageNet-A, -R, -V2,
    -Sketch, -C (-a, -r, ...), or ImageNet with all labels that fit (imagenet-real), in --data-dir or --dataset."""
    imagenet: Path | None = None
    """Of ImageNet-A, -R, -V2, -Sketch and -C: the folder of ImageNet's validation images (CLASS/*, or val/CLASS/*), for
    the clean scores on the same classes beside the set's."""
    output_dir: Path | None = None
    """Of ImageNet's sets: keep each score in results.json of this folder; the same command goes on where it was
    stopped, which saves hours of ImageNet-C. Several weights can share a folder."""
    weights: str
    """A weights folder, or ORG/NAME on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repository."""
    batch_size: int | None = None
    """Images at a time, over all processes; None is 64 for classifiers, and 4 for segmentation and detection."""
    precision: Precision = "no"
    """Mixed precision: no, bf16 or fp16."""
    num_workers: int = 0
    """Processes that decode; 0 does it in the main process."""
    max_bad_images: float = 0.0
    """Share of the images that may be unreadable; they are left out of the figures and named."""
    other_label_names: bool = False
    """Let the data call the classes otherwise than the weights do, in the same order."""
    ignore_zero: bool = False
    """For label maps of one's own: 0 is no class, and the number n is class n - 1."""
    multi_scale: bool = False
    """Of segmentation: average over the image at 0.5, 0.75, 1, 1.25, 1.5 and 1.75 times its size."""
    flip: bool = False
    """Of segmentation: average over the image and its mirror image."""

    def __post_init__(self) -> None:
        if self.imagenet is not None and self.data not in get_args(ImageNetSet):
            raise ValueError(
                f"--imagenet is {str(self.imagenet)!r}: it is for imagenet-a, -r, -v2, -sketch and -c, not --data "
                f"{self.data}"
            )
        if self.output_dir is not None and self.data not in get_args(ImageNetSet):
            raise ValueError(
                f"--output-dir is {str(self.output_dir)!r}: it keeps scores of ImageNet's sets, not of --data "
                f"{self.data}; redirect what is printed into a file"
            )
        if not 0 <= self.max_bad_images <= 1:
            raise ValueError(f"--max-bad-images is {self.max_bad_images}: it must be between 0 and 1")
        if (self.batch_size is not None and self.batch_size < 1) or self.num_workers < 0:
            raise ValueError(
                f"--batch-size is {self.batch_size} and --num-workers {self.num_workers}: "
                "the one must be at least 1 and the other at least 0"
            )


def main(options: Options) -> None:
    model = load_pretrained(options.weights, options.revision)
    if options.data in get_args(ImageNetSet):
        result = evaluate_imagenet(options, model)
    else:
        task = choose_task(model).load(options)
        task.configure_evaluation(multi_scale=options.multi_scale, flip=options.flip)
        result = evaluate(options, model, task)
    if int(os.environ.get("RANK", "0")) == 0:  # the others have the same
        print(json.dumps(result))


def evaluate_imagenet(options: Options, model: nn.Module) -> dict[str, object]:
    """The scores on one of ImageNet's sets; ValueError for options that none of them takes."""
    for option in ("streaming", "ignore_zero", "multi_scale", "flip"):
        if getattr(options, option):
            raise ValueError(f"{spell_option(option)} is given, and --data {options.data} takes none: leave it out")
    subsets = list_subsets(options.data, options.data_dir, dataset=options.dataset, imagenet=options.imagenet)
    if options.output_dir is None:
        results, key = ImageNetResults(options.precision), options.weights
    else:
        results = open_imagenet_results(options.output_dir, options.precision)
        results.machine = describe_machine(PartialState().device)
        local = Path(options.weights)
        key = hash_weights(local if local.is_dir() else download_weights(options.weights, options.revision))
    with StopRequests() as requests:

        def evaluate_on(data: ImageNetData) -> Figures:
            return evaluate(options, model, ImageNetClassification(data), stop=lambda: requests.reason)

        measure_subsets(results, options.data, subsets, {key: evaluate_on}, options.output_dir)
    figures = results.get_figures(key, options.data)
    return summarise_subsets(options.data, {subset.name: figures[subset.name] for subset in subsets})


def evaluate(
    options: Options, model: nn.Module, task: ClassTask, stop: Callable[[], str | None] = lambda: None
) -> dict[str, object]:
    """The scores on the validation images of a task, as JSON has them; Interrupted where `stop` gives a reason."""
    task.check_weights(model, other_label_names=options.other_label_names)
    evaluation = evaluate_weights(
        model,
        task,
        batch_size=options.batch_size or task.eval_batch_size,
        precision=options.precision,
        num_workers=options.num_workers,
        max_bad_images=options.max_bad_images,
        stop=stop,
    )
    return evaluation.to_json()


if __name__ == "__main__":
    run_command(Options, main)
