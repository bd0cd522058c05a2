"""`Task`: all that the trainer asks of what a model is trained to do.

A task is one class in one file, which `train(recipe, task=...)` takes. It has to say how many outputs the model has,
what the loss of a batch is, and how the model is scored; all else has a default.
"""

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from s3a.data import Batch, ImageData
from s3a.data.batches import Transform
from s3a.training.recipe import Recipe
from s3a.training.run_folder import EpochMetrics, Panel, Prefix
from s3a.weights.card import Purpose

Loss = Callable[[nn.Module, Batch], Tensor]
"""Calls the model on a batch, which is on its device, and returns the mean loss: a scalar to go backward from."""


class TimmModel(Protocol):
    """What every model of timm's registry has beyond a module of torch."""

    pretrained_cfg: dict[str, Any]
    num_classes: int

    def get_classifier(self) -> nn.Module:
        """The head."""

    def reset_classifier(self, num_classes: int) -> None:
        """Gives the model a new head."""

    def set_grad_checkpointing(self) -> None:
        """Trades a second forward of every block for its activations."""


class Task(ABC):
    """What a model is trained to do, on one source of images.

    Attributes:
        num_outputs: of the model's head; timm calls it num_classes.
        best: the score that ranks epochs; a larger one is better. The weights folders `best` and `ema-best` hold those
            of the epoch where it was the largest.
        title: what people call that score.
        purpose: what model cards say of the model.
    """

    num_outputs: int
    best: str
    title: str
    purpose = Purpose(description="A model", outputs="outputs")

    def __init__(self, data: ImageData) -> None:
        """For training and for evaluation; the recipe comes with the calls that need it."""
        self.data = data

    # ----------------------------------------------------------------------------------------------------
    # Training
    # ----------------------------------------------------------------------------------------------------

    def check_recipe(self, recipe: Recipe, images_per_forward: int) -> None:  # noqa: B027  nothing to refuse by default
        """Raises ValueError for a recipe that this task cannot train by, with so many images on a process at a time."""

    def fit_head(self, model: nn.Module) -> bool:
        """Gives a model with loaded weights the head that this task needs, by default a new one; whether it is new."""
        cast(TimmModel, model).reset_classifier(self.num_outputs)
        return True

    def make_train_transform(self, recipe: Recipe, data_config: dict[str, Any]) -> Transform:
        """From an image of the training split to a tensor of the model's shape; by default that of the evaluation.

        uint8 are pixels, which the device normalises by the mean and std of `data_config`; floating point reaches the
        model as it is. It may draw from any global generator: they are seeded for each image and epoch.

        Args:
            data_config: timm's preprocessing keys: input_size, interpolation, mean, std, crop_pct.

        Raises:
            ValueError: for options of the recipe that make no transform.
        """
        return self.make_eval_transform(data_config)

    def make_erasing(self, recipe: Recipe) -> RandomErasing | None:
        """timm's random erasing of normalised training images, with `device="cpu"`; by default None, which erases none.

        It is drawn after the transform of each image, from the same generators, and done on the device.
        """
        return None

    def make_eval_transform(self, data_config: dict[str, Any]) -> Transform:
        """From an image of the validation split to a tensor of the model's shape; by default timm's, to uint8.

        There is no randomness. uint8 and floating point are what they are in `make_train_transform`.
        """
        transform: Transform = create_transform(**data_config, is_training=False, normalize=False)
        return transform

    @abstractmethod
    def make_loss(self, recipe: Recipe) -> Loss:
        """The loss of a batch. It may draw from any global generator: they are seeded for each step and process."""

    # ----------------------------------------------------------------------------------------------------
    # Evaluation
    # ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """What a validation batch adds to the sums that the scores are made of: a vector, on the model's device.

        Rows with the label -1 are no images but padding, or could not be read, and must add nothing.
        """

    @abstractmethod
    def compute_scores(self, sums: Sequence[float], num_images: int) -> dict[str, float]:
        """The scores, by name, of the sums over all validation images.

        They become the columns val_NAME of `metrics.jsonl`, in this order; of the moving average of the weights
        `best` alone becomes a column, ema_NAME. One that is not finite stops the run.
        """

    # ----------------------------------------------------------------------------------------------------
    # For people
    # ----------------------------------------------------------------------------------------------------

    def format_score(self, score: float) -> str:
        """The score that ranks epochs, as people read it."""
        return f"{score:.4f}"

    def describe_epoch(self, scores: Mapping[str, float]) -> str:
        """The scores of an epoch, for the line that the trainer prints after it.

        Args:
            scores: by column of `metrics.jsonl`.
        """
        return ", ".join(f"{column} {score:.4f}" for column, score in scores.items())

    def describe_result(self, scores: Mapping[str, float]) -> str:
        """The scores of the last epoch, for the end of the run."""
        return self.describe_epoch(scores)

    def list_panels(self, recipe: Recipe, history: Sequence[EpochMetrics]) -> list[Panel]:
        """The panels of `curves.png`, which the learning rate follows; by default the loss and the best score."""
        labels = {f"val_{self.best}": self.title, f"ema_{self.best}": f"{self.title}, EMA"}
        return [make_loss_panel(history), Panel(title=self.title, curves=select_columns(history, labels))]

    def evaluate_command(self, recipe: Recipe, folder: Path) -> str | None:
        """The command that evaluates a weights folder again, for the end of the run; None where there is none."""
        return None

    # ----------------------------------------------------------------------------------------------------
    # Weights folders
    # ----------------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """Entries of `config.json` that say what the outputs mean; a run is resumed only where they are the same."""
        return {}

    def list_card_scores(self, scores: Mapping[str, float], prefix: Prefix) -> dict[str, float]:
        """What the model card prints of an epoch's scores, by title; by default the one that ranks epochs.

        Args:
            scores: by column of `metrics.jsonl`.
            prefix: of the columns to take: val, or ema for the moving average of the weights.
        """
        return {self.title: scores[f"{prefix}_{self.best}"]}


def make_loss_panel(history: Sequence[EpochMetrics], hardened_by: Sequence[str] = ()) -> Panel:
    """The panel with the loss in training, and in validation where the task has a score of that name.

    Args:
        hardened_by: what makes the loss in training larger than that of the plain images, such as "mixup"; the legend
            says it, for whoever wonders why the validation is below.
    """
    label = textwrap.fill(f"training, with {', '.join(hardened_by)}" if hardened_by else "training", 36)
    training = {label: [metrics.train_loss for metrics in history]}
    plain = "validation, plain" if hardened_by else "validation"
    return Panel(title="loss", curves=training | select_columns(history, {"val_loss": plain}), legend="upper right")


def select_columns(
    history: Sequence[EpochMetrics], labels: Mapping[str, str], scale: float = 1.0
) -> dict[str, list[float]]:
    """The scores of all epochs times `scale`, by label, for those of the columns that the run has."""
    return {
        label: [scale * metrics.scores[column] for metrics in history]
        for column, label in labels.items()
        if column in history[-1].scores
    }
