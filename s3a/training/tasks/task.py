"""`Task`: all that the trainer asks of what a model is trained to do.

A task is one class in one file, which `train(recipe, task=...)` takes. It has to say how many outputs the model has,
what the loss of a batch is, and how the model is scored; all else has a default.
"""

import shlex
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from timm.data import create_transform, resolve_model_data_config
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from s3a.data import Batch, DataOptions, ImageData, Kind, load_data
from s3a.data.batches import JointTransform, Transform
from s3a.training.model import TimmModel, build_model
from s3a.training.recipe import spell_option
from s3a.training.run_folder import EpochMetrics, Panel, Prefix
from s3a.weights.card import Purpose

TaskT = TypeVar("TaskT", bound="Task")
Loss = Callable[[nn.Module, Batch], Tensor]
"""Calls the model on a batch, which is on its device, and returns the mean loss: a scalar to go backward from."""


class Measurement(NamedTuple):
    """What a validation batch adds to the scores."""

    sums: Tensor
    """a vector on the model's device, to be summed over all batches and processes"""
    records: Sequence[Any] = ()
    """what cannot be summed, such as the objects found: collected from all batches and processes, in no order"""


class Task(ABC):
    """What a model is trained to do, on one source of images.

    Attributes:
        kind: of targets that the task learns.
        num_outputs: of the model's head; timm calls it num_classes.
        best: the score that ranks epochs; a larger one is better. The weights folders `best` and `ema-best` hold those
            of the epoch where it was the largest.
        title: what people call that score.
        purpose: what model cards say of the model.
    """

    kind: Kind = "labels"
    num_outputs: int
    best: str
    title: str
    purpose = Purpose(description="A model", outputs="outputs")

    def __init__(self, data: ImageData) -> None:
        """For training and for evaluation; the recipe comes with the calls that need it."""
        self.data = data

    @classmethod
    def load(cls: type[TaskT], options: DataOptions) -> TaskT:
        """The task on the data that the options name; for errors see `load_data`."""
        data = load_data(
            options.data,
            options.data_dir,
            dataset=options.dataset,
            streaming=options.streaming,
            kind=cls.kind,
            ignore_zero=getattr(options, "ignore_zero", False),
        )
        return cls(data)

    # ----------------------------------------------------------------------------------------------------
    # Training
    # ----------------------------------------------------------------------------------------------------

    def check_recipe(self, recipe: Any, images_per_forward: int) -> None:  # noqa: B027  nothing to refuse by default
        """Raises ValueError for a recipe that this task cannot train by, with so many images on a process at a time."""

    def build_model(self, recipe: Any, say: Callable[[str], object] = lambda line: None) -> nn.Module:
        """The recipe's model with the head that the task needs, drawing from torch's global generator.

        Args:
            say: is given a line about what of loaded weights is new, if anything is.

        Raises:
            ValueError, FileNotFoundError: see `s3a.training.model.build_model`.
        """
        model = build_model(recipe, self.num_outputs)
        if recipe.weights is not None:
            known = model.num_classes
            if self.fit_head(model):
                outputs = self.purpose.outputs
                say(f"a new head of {self.num_outputs} {outputs}: {recipe.weights} knows {known}; all else is kept")
        return model

    def fit_head(self, model: nn.Module) -> bool:
        """Gives a model with loaded weights the head that this task needs, by default a new one; whether it is new."""
        cast(TimmModel, model).reset_classifier(self.num_outputs)
        return True

    def configure_data(self, recipe: Any, model: nn.Module) -> dict[str, Any]:
        """timm's preprocessing keys: the model's own, at the recipe's image size and crop."""
        data_config: dict[str, Any] = resolve_model_data_config(model)
        size = (data_config["input_size"][0], recipe.image_size, recipe.image_size)
        return {**data_config, "input_size": size, "crop_pct": recipe.crop_pct}

    def make_train_transform(self, recipe: Any, data_config: dict[str, Any]) -> Transform | JointTransform:
        """From an image of the training split to a tensor of the model's shape; by default that of the evaluation.

        uint8 are pixels, which the device normalises by the mean and std of `data_config`; floating point reaches the
        model as it is. It may draw from any global generator: they are seeded for each image and epoch.

        Args:
            data_config: timm's preprocessing keys: input_size, interpolation, mean, std, crop_pct.

        Raises:
            ValueError: for options of the recipe that make no transform.
        """
        return self.make_eval_transform(data_config)

    def make_erasing(self, recipe: Any) -> RandomErasing | None:
        """timm's random erasing of normalised training images, with `device="cpu"`; by default None, which erases none.

        It is drawn after the transform of each image, from the same generators, and done on the device.
        """
        return None

    def make_eval_transform(self, data_config: dict[str, Any]) -> Transform | JointTransform:
        """From an image of the validation split to a tensor of the model's shape; by default timm's, to uint8.

        There is no randomness. uint8 and floating point are what they are in `make_train_transform`.
        """
        transform: Transform = create_transform(**data_config, is_training=False, normalize=False)
        return transform

    @abstractmethod
    def make_loss(self, recipe: Any) -> Loss:
        """The loss of a batch. It may draw from any global generator: they are seeded for each step and process."""

    # ----------------------------------------------------------------------------------------------------
    # Evaluation
    # ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def measure(self, model: nn.Module, batch: Batch) -> Measurement:
        """What a validation batch adds to the sums and records that the scores are made of.

        Rows with the label -1 are no images but padding, or could not be read, and must add nothing.
        """

    @abstractmethod
    def compute_scores(self, sums: Sequence[float], num_images: int, records: Sequence[Any]) -> dict[str, float]:
        """The scores, by name, of the sums and records of all validation images; on the main process alone.

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

    def list_panels(self, recipe: Any, history: Sequence[EpochMetrics]) -> list[Panel]:
        """The panels of `curves.png`, which the learning rate follows; by default the loss and the best score."""
        labels = {f"val_{self.best}": self.title, f"ema_{self.best}": f"{self.title}, EMA"}
        return [make_loss_panel(history), Panel(title=self.title, curves=select_columns(history, labels))]

    def write_records(self, folder: Path, records: Sequence[Any]) -> None:  # noqa: B027  nothing to write by default
        """Writes the records of an evaluation into the run's folder."""

    def draw_examples(self, model: nn.Module, data_config: dict[str, Any], path: Path) -> bool:
        """Draws what the model makes of some validation images into a file; whether the task has such a picture.

        Args:
            model: in evaluation mode, on its device.
        """
        return False

    def evaluate_command(self, recipe: Any, folder: Path) -> str | None:
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


class ClassTask(Task):
    """A task whose outputs are the classes of the data; `recipes/evaluate.py` evaluates its weights again.

    Attributes:
        eval_batch_size: images at a time in that evaluation, over all processes, unless told otherwise.
    """

    eval_batch_size = 64

    def __init__(self, data: ImageData) -> None:
        super().__init__(data)
        self.num_outputs = len(data.label_names)

    @property
    def config(self) -> dict[str, Any]:
        return {"label_names": self.data.label_names}

    def evaluate_command(self, recipe: Any, folder: Path) -> str:
        options = {
            "--weights": folder,
            "--data": recipe.data,
            "--data-dir": recipe.data_dir,
            "--dataset": recipe.dataset,
            "--precision": None if recipe.precision == "no" else recipe.precision,
        }
        words = [word for name, value in options.items() if value is not None for word in (name, str(value))]
        switches = [spell_option(name) for name in ("streaming", "ignore_zero") if getattr(recipe, name, False)]
        return shlex.join(["python", "recipes/evaluate.py", *words, *switches])

    def configure_evaluation(self, *, multi_scale: bool, flip: bool) -> None:
        """Has each image evaluated at several sizes, and mirrored; ValueError where the task has no such thing."""
        for option, given in (("--multi-scale", multi_scale), ("--flip", flip)):
            if given:
                raise ValueError(f"{option} is for segmentation: leave it out for {self.purpose.description.lower()}")

    def check_weights(self, model: nn.Module, *, other_label_names: bool = False) -> None:
        """Raises ValueError where a model with loaded weights knows other classes than the data has.

        Args:
            other_label_names: let the data call the classes otherwise than the weights do, in the same order.
        """
        if self.num_outputs != model.num_classes:
            raise ValueError(
                f"the weights know {model.num_classes} classes and the data has {self.num_outputs}: "
                "evaluate on the data set they were trained for"
            )
        known = cast(TimmModel, model).pretrained_cfg.get("label_names") or self.data.label_names
        other = next((pair for pair in zip(known, self.data.label_names, strict=True) if pair[0] != pair[1]), None)
        if other and not other_label_names:
            raise ValueError(
                f"the weights know a class {other[0]!r} where the data has {other[1]!r}: evaluate on the data set they "
                "were trained for, or, where only the names differ, by recipes/evaluate.py --other-label-names"
            )


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
