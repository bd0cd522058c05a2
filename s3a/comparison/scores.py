"""The runs of a comparison, each an ordinary one that resumes where it was stopped, and what they reached."""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s3a.comparison.candidates import Contender
from s3a.data import ImageData
from s3a.training.recipe import Recipe
from s3a.training.run_folder import METRICS_NAME, check_folder
from s3a.training.trainer import train
from s3a.weights.folder import CONFIG_NAME


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Figures of several seeds.

    Attributes:
        mean, deviation: the deviation is that of a sample, divided by one less than the count; None for one seed.
        seeds: each figure, in the order of the seeds.
    """

    mean: float
    deviation: float | None
    seeds: tuple[float, ...]

    @property
    def error(self) -> float | None:
        """The standard error of the mean; None for one seed."""
        return None if self.deviation is None else self.deviation / math.sqrt(len(self.seeds))


def spread(figures: Sequence[float]) -> Spread:
    """The mean and the deviation of what several seeds gave."""
    deviation = statistics.stdev(figures) if len(figures) > 1 else None
    return Spread(mean=statistics.fmean(figures), deviation=deviation, seeds=tuple(figures))


def train_run(recipe: Recipe, data: ImageData) -> list[dict[str, Any]]:
    """Trains a run to its end, from where it was stopped, if it is not there yet; returns its metrics by epoch.

    Raises:
        ValueError: where its folder holds another run.
        Interrupted: where a signal asked it to stop; the same comparison goes on from there.
    """
    if not is_finished(recipe, data):
        train(recipe)
    return read_metrics(recipe.folder)


def is_finished(recipe: Recipe, data: ImageData) -> bool:
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


def score(contender: Contender, histories: list[list[dict[str, Any]]], num_images: int) -> dict[str, Any]:
    """A candidate's row: what it is, costs and reached after its last epoch.

    Args:
        histories: the metrics of its runs, in the order of the seeds.
        num_images: that it was trained on.
    """
    return {
        "label": contender.label,
        **asdict(contender.candidate),
        "epochs": contender.recipe.total_epochs,
        "training_gmacs": round(contender.gmacs(num_images)),
        **asdict(contender.cost),
        "top1": asdict(spread([history[-1]["val_top1"] for history in histories])),
        "best_top1": asdict(spread([max(line["val_top1"] for line in history) for history in histories])),
        "val_loss": asdict(spread([history[-1]["val_loss"] for history in histories])),
    }


def compare_scores(rows: list[dict[str, Any]], reference: str | None) -> None:
    """Adds to every other row how far its top-1 and loss lie above the reference's, seed by seed.

    Args:
        reference: a label; None is the first.
    """
    base = next(row for row in rows if row["label"] == (reference or rows[0]["label"]))
    for row, figure in itertools.product(rows, ("top1", "val_loss")):
        if row is not base:
            pairs = zip(row[figure]["seeds"], base[figure]["seeds"], strict=True)
            difference = spread([own - its for own, its in pairs])
            row[f"{figure}_difference"] = {**asdict(difference), "error": difference.error}
