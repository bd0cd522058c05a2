"""The folder of a run and what stands in it beside the checkpoints: recipe, metrics, curves, weights folders."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import AcquireReturnProxy, FileLock, Timeout

from s3a.support.palette import SERIES
from s3a.training.checkpoints import list_checkpoints
from s3a.training.recipe import Recipe, spell_option
from s3a.weights.card import Weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RECIPE_NAME, METRICS_NAME, CURVES_NAME = "recipe.json", "metrics.jsonl", "curves.png"
EXAMPLES_NAME = "examples.png"
CHECKPOINT_FOLDER = "checkpoints"

# May differ between the parts of one run: places, and what does not change its weights by more than rounding.
PLACES = ("output_dir", "data_dir")
HOUSEKEEPING = (
    "num_workers",
    "cpu_threads",
    "keep_checkpoints",
    "checkpoint_every",
    "track",
    "max_bad_images",
    "max_bad_val_images",
    "push_to_hub",
    "backend",
    "tf32",
    "cudnn_benchmark",
    "deterministic",
)
INCIDENTAL = (*PLACES, *HOUSEKEEPING)

# --------------------------------------------------------------------------------------------------------
# The folder
# --------------------------------------------------------------------------------------------------------


def check_folder(recipe: Recipe) -> None:
    """Raises ValueError where the recipe's folder holds other files, or a run of another recipe."""
    folder, path = recipe.folder, recipe.folder / RECIPE_NAME
    if not path.exists():
        entries = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        strangers = [name for name in entries if not name.startswith(".")]
        if strangers:
            raise ValueError(f"--output-dir {folder} holds {strangers[0]} and no run: give an empty or a new folder")
    elif list_checkpoints(folder / CHECKPOINT_FOLDER):
        ours, theirs = json.loads(recipe.to_json()), read_recipe(path)
        defaults = {each.name: each.default for each in dataclasses.fields(recipe)}
        younger = {name: value for name, value in defaults.items() if value is not dataclasses.MISSING}
        theirs = json.loads(json.dumps(younger, default=str)) | theirs  # what the run did not know was so by default
        keys = sorted((ours.keys() | theirs.keys()) - set(INCIDENTAL))
        changed = [key for key in keys if ours.get(key) != theirs.get(key)]
        if changed:
            first = ", ".join(f"{spell_option(key)} {theirs.get(key)} (now {ours.get(key)})" for key in changed[:3])
            raise ValueError(f"{folder} holds a run with {first}: give this one its own --output-dir, or delete that")


def claim_folder(recipe: Recipe) -> AcquireReturnProxy:
    """Makes and locks the recipe's folder, and writes the recipe into it where no checkpoint is; for the main process.

    Returns:
        A context that unlocks the folder at its end; the end of the process, of whatever kind, unlocks it too.

    Raises:
        ValueError: where the folder cannot be made, is in use, or holds something else (`check_folder`).
    """
    folder = recipe.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire(timeout=0)
        check_folder(recipe)  # again: while data was loaded, another run may have begun here and ended
        if not list_checkpoints(folder / CHECKPOINT_FOLDER):
            write_whole(folder / RECIPE_NAME, recipe.to_json())
    except Timeout as error:
        raise ValueError(
            f"{folder} is being trained by another process: wait for its end, or give this run its own --output-dir"
        ) from error
    except OSError as error:
        raise ValueError(f"--output-dir {folder} cannot be written ({error.strerror}): give another") from error
    return lock


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of a `recipe.json`; ValueError where it is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no recipe ({error}): give this run its own --output-dir, or delete that"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees the old text or the new one, and never a part."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


# --------------------------------------------------------------------------------------------------------
# What a user watches
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """What was measured in an epoch: a line of `metrics.jsonl`.

    Attributes:
        epoch: counted from 1.
        train_loss: mean over the steps that were not skipped.
        scores: what the task measured on the validation images, by column; names begin with val_, or with ema_ for
            the moving average of the weights.
        learning_rate: of the last step.
        images_per_second: in training, since the epoch was begun or resumed.
        loader_wait: share of that time spent waiting for images.
        skipped_steps: steps with a loss or gradient that is not finite.
        unreadable_val: validation images that could not be read.
    """

    epoch: int
    train_loss: float
    scores: Mapping[str, float]
    learning_rate: float
    images_per_second: float
    loader_wait: float
    skipped_steps: int = 0
    unreadable_val: int = 0

    def to_line(self) -> dict[str, Any]:
        """The metrics by column, with the scores side by side with the others; counts of 0 are left out."""
        counts = {"skipped_steps": self.skipped_steps, "unreadable_val": self.unreadable_val}
        return {
            "epoch": self.epoch,
            "train_loss": self.train_loss,
            **self.scores,
            "learning_rate": self.learning_rate,
            "images_per_second": self.images_per_second,
            "loader_wait": self.loader_wait,
            **{column: count for column, count in counts.items() if count},
        }

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> "EpochMetrics":
        """The metrics that `to_line` made this line of."""
        own = {field.name for field in dataclasses.fields(cls)}
        scores = {column: value for column, value in line.items() if column not in own}
        return cls(scores=scores, **{column: value for column, value in line.items() if column in own})


def write_metrics(folder: Path, history: Iterable[EpochMetrics]) -> None:
    """Writes `metrics.jsonl`, a line per epoch."""
    write_whole(folder / METRICS_NAME, "".join(json.dumps(metrics.to_line()) + "\n" for metrics in history))


def write_unreadable(folder: Path, split: str, names: Iterable[str]) -> None:
    """Writes `unreadable_train.txt` or `unreadable_val.txt`, a line per image that cannot be read."""
    write_whole(folder / f"unreadable_{split}.txt", "".join(f"{name}\n" for name in names))


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A part of `curves.png`: curves over the epochs, by label; several get a legend.

    Attributes:
        legend: where matplotlib puts the legend.
        color: of the curves; None takes those of SERIES, one after the other.
    """

    title: str
    curves: Mapping[str, Sequence[float]]
    ylabel: str = ""
    legend: Literal["best", "lower right", "upper right"] = "best"
    color: str | None = None

    def draw(self, axes: "Axes", epochs: Sequence[int]) -> None:
        """Draws the panel."""
        from matplotlib.ticker import MaxNLocator  # noqa: PLC0415  matplotlib is slow to import

        for (label, values), (color, _) in zip(self.curves.items(), itertools.cycle(SERIES), strict=False):
            axes.plot(epochs, values, label=label, color=self.color or color, marker="." if len(epochs) == 1 else "")
        axes.set_title(self.title, fontsize=11)
        axes.set(xlabel="epoch", ylabel=self.ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if len(self.curves) > 1:
            axes.legend(frameon=False, loc=self.legend, fontsize=8.5)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def draw_curves(folder: Path, epochs: Sequence[int], panels: Sequence[Panel]) -> None:
    """Draws the panels side by side into `curves.png`."""
    from matplotlib.figure import Figure  # noqa: PLC0415  matplotlib is slow to import

    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel.draw(axes, epochs)
    partial = folder / f".{CURVES_NAME}"
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(folder / CURVES_NAME)


# --------------------------------------------------------------------------------------------------------
# Weights folders
# --------------------------------------------------------------------------------------------------------

# Those that a run can leave, and which of its weights each holds.
WEIGHTS: dict[str, Weights] = {"model": "last", "best": "best", "ema": "ema", "ema-best": "ema-best"}

Prefix = Literal["val", "ema"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the weights of a weights folder come from.

    Attributes:
        metrics: of their epoch.
        prefix: what the columns with their scores begin with: val, or ema for the moving average.
        score: the one that ranks epochs.
    """

    metrics: EpochMetrics
    prefix: Prefix
    score: float


def list_origins(history: Sequence[EpochMetrics], best: str) -> dict[str, Origin]:
    """The weights folders of a run by name, each with the origin of its weights.

    Args:
        best: the score that ranks epochs, without its prefix; of equal epochs the first is the best one.
    """
    averages: dict[Prefix, tuple[str, str]] = {"val": ("model", "best"), "ema": ("ema", "ema-best")}
    origins = {}
    for prefix, (of_last, of_best) in averages.items():
        column = f"{prefix}_{best}"
        if column in history[-1].scores:
            highest = max(history, key=lambda metrics: metrics.scores[column])
            for folder, metrics in ((of_last, history[-1]), (of_best, highest)):
                origins[folder] = Origin(metrics=metrics, prefix=prefix, score=metrics.scores[column])
    return origins
