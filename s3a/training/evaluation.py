"""Evaluation on the validation images: every image counts once, on any number of processes."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from timm.data import resolve_model_data_config
from torch import nn

from s3a.data import Batch, EvalLoader, ImageData
from s3a.data.batches import JointTransform, Transform
from s3a.data.images import DataError
from s3a.data.loaders import describe_idle_workers
from s3a.data.pixels import PixelNormalizer
from s3a.models.detection import Detector
from s3a.models.segmentation import SegmentationModel
from s3a.support.errors import Interrupted
from s3a.training.processes import gather_on_main, raise_on_main, set_cpu_threads, sum_over_hosts
from s3a.training.progress import ProgressDisplay
from s3a.training.recipe import Precision
from s3a.training.tasks.classification import Classification
from s3a.training.tasks.detection import Detection
from s3a.training.tasks.segmentation import Segmentation
from s3a.training.tasks.task import ClassTask, Task
from s3a.training.transfers import Readback, find_exact_dtype, send_batches


class NonFiniteLossError(ValueError):
    """The loss became NaN or infinite."""


class UnreadableImagesError(ValueError):
    """More images than allowed cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model scored on the validation images.

    Attributes:
        scores: of the task, by name.
        images: how many were read.
        unreadable: the names of the others, sorted, and why they could not be read.
        records: of the task, from all processes; on the main one alone, the others have none.
    """

    scores: dict[str, float]
    images: int
    images_per_second: float
    unreadable: dict[str, str] = field(default_factory=dict)
    records: Sequence[Any] = ()

    def to_json(self) -> dict[str, Any]:
        """One flat object, with the loss behind the other scores, and the names of unreadable images if there are."""
        scores = dict(sorted(self.scores.items(), key=lambda item: item[0] == "loss"))
        unreadable = {"unreadable": list(self.unreadable)} if self.unreadable else {}
        return {**scores, "images": self.images, "images_per_second": self.images_per_second, **unreadable}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    loader: EvalLoader,
    accelerator: Accelerator,
    *,
    stop: Callable[[], bool] = lambda: False,
    progress: bool = False,
) -> Evaluation | None:
    """Evaluates a model; all processes call this together and get the same answer.

    Args:
        model: on the accelerator's device, the same on every process.
        stop: called before every batch: whether this process wants to stop. If any does, all return None.
        progress: show how far it is, on stderr.

    Raises:
        DataError: where there were more or fewer images than the source had counted.
        NonFiniteLossError: where a score is not finite, as that of a model that returns NaN.
        ValueError: where the task has no score of the name that ranks epochs.
    """
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    exact = find_exact_dtype(accelerator.device)
    sums = torch.zeros(1, dtype=exact, device=accelerator.device)  # as long as the task's from the first batch on
    records: list[Any] = []
    unreadable: dict[str, str] = {}
    num_read = 0
    behind: Readback | None = None
    with ProgressDisplay(len(loader), unit="batch", show=progress) as display:
        for batch in map(loader.normalizer, send_batches(follow_with_padding(loader), accelerator.device)):
            stopping, num_images = sum_over_hosts(accelerator, stop(), int((batch.indices >= 0).sum()))
            if stopping:
                model.train(was_training)
                return None
            if num_images == 0:
                break
            num_read += num_images
            with accelerator.autocast():
                measured = task.measure(model, batch)
            num_scored = (batch.labels >= 0).sum()  # the others are padding, or could not be read
            sums = sums + torch.cat([measured.sums, num_scored.to(measured.sums.dtype).reshape(1)])
            records += measured.records
            if behind is not None:
                behind.read()  # the device is a batch behind at most, and what is shown has been computed
            behind = Readback(sums)
            unreadable |= batch.unreadable
            display.advance("evaluating", f"{num_read / (time.perf_counter() - started):.0f} images/s")
    model.train(was_training)
    check_count(loader, num_read, accelerator)
    *totals, counted = accelerator.reduce(sums, reduction="sum").tolist()
    records = gather_on_main(accelerator, records)
    return Evaluation(
        scores=score_on_main(accelerator, task, totals, int(counted), records),
        images=int(counted),
        images_per_second=round(counted / (time.perf_counter() - started), 1),
        unreadable=dict(sorted(gather_object([*unreadable.items()]))),
        records=records,
    )


def score_on_main(
    accelerator: Accelerator, task: Task, totals: Sequence[float], num_images: int, records: Sequence[Any]
) -> dict[str, float]:
    """The scores of the task, which the main process computes and all get; so do its errors."""
    outcome: list[dict[str, float] | Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            scores = task.compute_scores(totals, num_images, records)
            check_scores(task, scores)
            outcome = [scores]
        except Exception as error:  # whatever it is, the others wait for it
            outcome = [error]
    (outcome_of_main,) = broadcast_object_list(outcome)
    if isinstance(outcome_of_main, Exception):
        raise_on_main(accelerator, outcome_of_main)
    return cast(dict[str, float], outcome_of_main)


def check_count(loader: EvalLoader, num_read: int, accelerator: Accelerator) -> None:
    """Raises DataError where other images were read than were counted; warns where that is but what a card says."""
    if num_read == loader.num_images:
        return
    if loader.is_counted:
        error = DataError(
            f"{loader.split} has {num_read} images, and had {loader.num_images} when it was loaded: its files changed; "
            "put those back that it had"
        )
        raise_on_main(accelerator, error)
    if accelerator.is_main_process:
        warnings.warn(
            f"{loader.split} has {num_read} images, and its card says {loader.num_images}: those that it has were "
            "scored; mend the card",
            stacklevel=2,
        )


def check_scores(task: Task, scores: Mapping[str, float]) -> None:
    """Raises ValueError without the score that ranks epochs, NonFiniteLossError where one is not finite."""
    if task.best not in scores:
        raise ValueError(
            f"{type(task).__name__}.best is {task.best!r}: it must be one of the scores, which are {', '.join(scores)}"
        )
    for name, score in scores.items():
        if not math.isfinite(score):
            raise NonFiniteLossError(
                f"the validation {name} is {score}: the weights or the images hold non-finite numbers"
            )


def follow_with_padding(loader: EvalLoader) -> Iterator[Batch]:
    """The batches, and then padding without an end: the processes of a stream come to their ends at different times."""
    yield from loader
    yield from repeat(loader.make_padding())


def make_eval_loader(
    data: ImageData,
    transform: Transform | JointTransform,
    accelerator: Accelerator,
    *,
    data_config: Mapping[str, Any],
    batch_size: int,
    num_workers: int,
) -> EvalLoader:
    """This process' share of the validation images.

    Args:
        data_config: timm's preprocessing keys, of which input_size, mean and std are read.
    """
    return EvalLoader(
        data.val,
        transform,
        normalizer=PixelNormalizer(data_config["mean"], data_config["std"]),
        channels=data_config["input_size"][0],
        batch_size=batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )


def evaluate_weights(
    model: nn.Module,
    task: Task,
    *,
    batch_size: int,
    precision: Precision = "no",
    num_workers: int = 0,
    max_bad_images: float = 0.0,
    stop: Callable[[], str | None] = lambda: None,
) -> Evaluation:
    """Evaluates a model with loaded weights on the validation images of a task, with its own preprocessing.

    Args:
        task: whose `check_weights` takes the model.
        max_bad_images: share of the images that may be unreadable; the scores leave them out.
        stop: called before every batch: why this process wants to stop, if it does.

    Raises:
        Interrupted: where any process wants to stop.
        ValueError: where too many images cannot be read, or a score is not finite.
    """
    accelerator = Accelerator(mixed_precision=precision)
    set_cpu_threads(accelerator, threads=None)
    config = resolve_model_data_config(model)
    transform = task.make_eval_transform(config)
    loader = make_eval_loader(
        task.data, transform, accelerator, data_config=config, batch_size=batch_size, num_workers=num_workers
    )
    idle = describe_idle_workers(task.data.val, accelerator.num_processes, num_workers)
    if idle and accelerator.is_main_process:
        warnings.warn(idle, stacklevel=2)
    evaluation = evaluate(
        model.to(accelerator.device),
        task,
        loader,
        accelerator,
        stop=lambda: stop() is not None,
        progress=accelerator.is_main_process,
    )
    if evaluation is None:
        raise Interrupted(f"stopped by {stop() or 'another process'}: the same command begins this evaluation again")
    check_unreadable(evaluation.unreadable, int(max_bad_images * task.data.val.num_images))
    return evaluation


def choose_task(model: nn.Module) -> type[ClassTask]:
    """What a model with loaded weights was trained to do."""
    if isinstance(model, Detector):
        return Detection
    return Segmentation if isinstance(model, SegmentationModel) else Classification


def check_unreadable(unreadable: Mapping[str, str], most: int) -> None:
    """Raises UnreadableImagesError where more validation images cannot be read than allowed."""
    if len(unreadable) > most:
        first = "; ".join(f"{name}, since {reason}" for name, reason in list(unreadable.items())[:3])
        more = f"; and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
        raise UnreadableImagesError(
            f"{len(unreadable)} of the validation images cannot be read ({first}{more}), {most} are allowed: mend them "
            "or take them out, or allow as many with --max-bad-images"
        )
