"""Evaluation: every image counts once, on any number of processes."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from s3a.data import EvalLoader, ImageData
from s3a.training.processes import agreed, use_cores


class NonFiniteLossError(ValueError):
    """The loss became NaN or infinite."""


class UnreadableImagesError(ValueError):
    """More images than allowed cannot be read."""


@dataclass(frozen=True)
class Metrics:
    """What an evaluation found. top1 and top5 are fractions of 1, loss is the mean cross-entropy.

    Attributes:
        images: that were read; `unreadable` names the others.
    """

    top1: float
    top5: float
    loss: float
    images: int
    images_per_second: float
    unreadable: tuple[str, ...] = ()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    accelerator: Accelerator,
    *,
    max_unreadable: int = 0,
    stop: Callable[[], bool] = lambda: False,
    progress: bool = False,
) -> Metrics | None:
    """Evaluates a model; all processes call this together and get the same answer.

    Args:
        model: on the accelerator's device, the same on every process.
        max_unreadable: how many images may be unreadable; they are left out and named.
        stop: asked after every batch whether this process wants to stop; if any does, all return None.

    Raises:
        NonFiniteLossError: where the model returns NaN.
        UnreadableImagesError: where more images cannot be read than allowed.
    """
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
    totals = torch.zeros(4, dtype=exact, device=accelerator.device)  # right at 1, right at 5, loss, images
    unreadable: list[str] = []
    for batch in tqdm(loader, desc="evaluating", disable=not progress, leave=False):
        images, labels = send_to_device((batch.images, batch.labels), accelerator.device)
        with accelerator.autocast():
            logits = model(images)
        totals += count(logits.float(), labels)
        unreadable += batch.unreadable
        if agreed(accelerator, stop()):
            model.train(was_training)
            return None
    model.train(was_training)
    totals = accelerator.reduce(totals, reduction="sum").tolist()
    names = tuple(sorted(gather_object(unreadable)))
    check_unreadable(names, max_unreadable)
    top1, top5, loss = (total / max(totals[3], 1) for total in totals[:3])
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the validation loss is {loss}: the weights or the images hold non-finite numbers")
    num_images = int(totals[3])
    speed = round(num_images / (time.perf_counter() - started), 1)
    return Metrics(top1, top5, loss, num_images, images_per_second=speed, unreadable=names)


def count(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of a batch are right at 1 and at 5, their summed loss, and how many there are; a label of -1 is none."""
    there = labels >= 0
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [batch, 5]
    losses = cross_entropy(logits, labels, reduction="none", ignore_index=-1)
    return torch.stack([best[:, 0].sum(), best.any(1).sum(), losses.sum(), there.sum()])


def check_unreadable(names: tuple[str, ...], most: int) -> None:
    """Raises UnreadableImagesError where there are too many."""
    if len(names) > most:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise UnreadableImagesError(
            f"{len(names)} validation images cannot be read ({shown}), {most} are allowed: mend them or take them out, "
            "or allow as many with --max-bad-images"
        )


def evaluate_weights(
    model: nn.Module,
    data: ImageData,
    *,
    batch_size: int,
    precision: str = "no",
    num_workers: int = 0,
    max_bad_images: float = 0.0,
    other_label_names: bool = False,
) -> dict[str, Any]:
    """Evaluates a loaded model on the validation images with its own preprocessing; for `recipes/evaluate.py`.

    Args:
        max_bad_images: share of the images that may be unreadable; they are left out of the figures.
        other_label_names: let the data call the classes otherwise than the weights, in the same order.

    Raises:
        ValueError: where the data has another number of classes than the model, or other ones.
    """
    if len(data.label_names) != model.num_classes:
        raise ValueError(
            f"the weights know {model.num_classes} classes and the data has {len(data.label_names)}: "
            "evaluate on the data set they were trained for"
        )
    known = model.pretrained_cfg.get("label_names") or data.label_names
    other = next((pair for pair in zip(known, data.label_names, strict=True) if pair[0] != pair[1]), None)
    if other and not other_label_names:
        raise ValueError(
            f"the weights know a class {other[0]!r} where the data has {other[1]!r}: evaluate on the data set they "
            "were trained for, or, where only the names differ, by recipes/evaluate.py --other-label-names"
        )
    accelerator = Accelerator(mixed_precision=precision)
    use_cores(accelerator, threads=None)
    config = resolve_model_data_config(model)
    loader = EvalLoader(
        data.val,
        create_transform(**config, is_training=False),
        channels=config["input_size"][0],
        batch_size=batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    metrics = evaluate(
        model.to(accelerator.device),
        loader,
        accelerator,
        max_unreadable=int(max_bad_images * data.val.num_images),
        progress=accelerator.is_main_process,
    )
    found = asdict(metrics)
    unreadable = found.pop("unreadable")
    return found | ({"unreadable": list(unreadable)} if unreadable else {})
