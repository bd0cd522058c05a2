"""The runs of a comparison, each an ordinary one that resumes where it was stopped, and what they reached."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s3a.comparison.candidates import Contender
from s3a.comparison.results import Difference, Score, Spread
from s3a.data import ImageData
from s3a.training.recipe import ClassificationRecipe
from s3a.training.run_folder import METRICS_NAME, check_folder
from s3a.training.trainer import train
from s3a.weights.folder import CONFIG_NAME


def summarise_seeds(figures: Sequence[float]) -> Spread:
    """The mean and the deviation of what several seeds gave."""
    deviation = statistics.stdev(figures) if len(figures) > 1 else None
    return {"mean": statistics.fmean(figures), "deviation": deviation, "seeds": list(figures)}


def subtract_seeds(figures: Spread, reference: Spread) -> Difference:
    """The differences of each seed's figures, with the standard error of their mean."""
    difference = summarise_seeds([own - its for own, its in zip(figures["seeds"], reference["seeds"], strict=True)])
    deviation = difference["deviation"]
    error = None if deviation is None else deviation / math.sqrt(len(difference["seeds"]))
    return {**difference, "error": error}


def train_run(recipe: ClassificationRecipe, data: ImageData) -> list[dict[str, Any]]:
    """Trains a run to its end, or goes on with it, unless it is finished; returns its metrics, epoch by epoch.

    Raises:
        ValueError: where its folder holds another run.
        Interrupted: where a signal asked it to stop; the same comparison goes on from there.
    """
    if not is_finished(recipe, data):
        train(recipe)
    return read_metrics(recipe.folder)


def is_finished(recipe: ClassificationRecipe, data: ImageData) -> bool:
    """Whether the recipe's folder holds its whole run, on this data."""
    config = recipe.folder / "model" / CONFIG_NAME
    if not config.is_file() or len(read_metrics(recipe.folder)) != recipe.total_epochs:
        return False
    check_folder(recipe)
    return json.loads(config.read_text(encoding="utf-8"))["data"]["fingerprint"] == data.fingerprint


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics so far, epoch by epoch."""
    path = folder / METRICS_NAME
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def make_score(contender: Contender, histories: list[list[dict[str, Any]]], num_images: int) -> Score:
    """A candidate's row: what it is, costs and reached after its last epoch.

    Args:
        histories: the metrics of its runs, in the order of the seeds.
        num_images: that it was trained on.
    """
    candidate, cost = contender.candidate, contender.cost
    return {
        "label": contender.label,
        "model": candidate.model,
        "scan": candidate.scan,
        "size": candidate.size,
        "epochs": contender.recipe.total_epochs,
        "training_gmacs": round(contender.count_training_gmacs(num_images)),
        "parameters": cost.parameters,
        "published_gmacs": cost.published_gmacs,
        "gmacs": cost.gmacs,
        "top1": summarise_seeds([history[-1]["val_top1"] for history in histories]),
        "best_top1": summarise_seeds([max(line["val_top1"] for line in history) for history in histories]),
        "val_loss": summarise_seeds([history[-1]["val_loss"] for history in histories]),
    }


def add_differences(scores: list[Score], reference: str | None) -> None:
    """Adds to every other row how far its top-1 and loss lie above the reference's, seed by seed.

    Args:
        reference: a label; None is the first.
    """
    base = next(score for score in scores if score["label"] == (reference or scores[0]["label"]))
    for score in scores:
        if score is not base:
            score["top1_difference"] = subtract_seeds(score["top1"], base["top1"])
            score["val_loss_difference"] = subtract_seeds(score["val_loss"], base["val_loss"])
