"""What a training run leaves in its folder, beside its checkpoints: recipe, metrics, curves, model card."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from filelock import FileLock, Timeout
from torch import nn

from s3a.training.checkpoints import checkpoints
from s3a.training.recipe import Recipe, option
from s3a.weights.card import Score, TrainingFacts, Weights, build_card
from s3a.weights.folder import save_folder

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECIPE_NAME, METRICS_NAME, CURVES_NAME = "recipe.json", "metrics.jsonl", "curves.png"
CHECKPOINT_FOLDER = "checkpoints"


# May differ between the parts of one run: places, and what does not change its weights.
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
)
INCIDENTAL = (*PLACES, *HOUSEKEEPING)


def check_folder(recipe: Recipe) -> None:
    """Raises ValueError where the run's folder holds something else: other files, or a run of another recipe."""
    folder, path = recipe.folder, recipe.folder / RECIPE_NAME
    if not path.exists():
        entries = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        strangers = [name for name in entries if not name.startswith(".")]
        if strangers:
            raise ValueError(f"--output-dir {folder} holds {strangers[0]} and no run: give an empty or a new folder")
    elif checkpoints(folder / CHECKPOINT_FOLDER):
        ours, theirs = json.loads(recipe.to_json()), read_recipe(path)
        changed = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
        shown = [f"{option(key)} {theirs.get(key)} (now {ours.get(key)})" for key in changed if key not in INCIDENTAL]
        if shown:
            raise ValueError(
                f"{folder} holds a run with {', '.join(shown[:3])}: give this one its own --output-dir, or delete that"
            )


def claim_folder(recipe: Recipe) -> FileLock:
    """Makes the run's folder, or takes up the run in it; for the main process.

    Returns:
        A lock on the folder, which ends with the process, however that ends.

    Raises:
        ValueError: where the folder cannot be made, holds something else (`check_folder`), or is in use.
    """
    check_folder(recipe)
    folder = recipe.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
        if not checkpoints(folder / CHECKPOINT_FOLDER):
            write_whole(folder / RECIPE_NAME, recipe.to_json())
    except Timeout as error:
        raise ValueError(
            f"{folder} is being trained by another process: wait for its end, or give this run its own --output-dir"
        ) from error
    except OSError as error:
        raise ValueError(f"--output-dir {folder} cannot be written ({error.strerror}): give another") from error
    return lock


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe that a run's folder holds."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no recipe ({error}): give this run its own --output-dir, or delete that"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Writes a text so that a reader sees the old one or the new one."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """Writes `metrics.jsonl`, a line per epoch."""
    write_whole(folder / METRICS_NAME, "".join(json.dumps(line) + "\n" for line in history))


def write_unreadable(folder: Path, split: str, names: Iterable[str]) -> Path:
    """Writes `unreadable_train.txt` or `unreadable_val.txt`, a line per image that cannot be read; returns its path."""
    path = folder / f"unreadable_{split}.txt"
    write_whole(path, "".join(f"{name}\n" for name in names))
    return path


def draw_curves(folder: Path, history: list[dict[str, Any]]) -> None:
    """Draws loss, accuracy and learning rate against the epoch into `curves.png`."""
    epochs = [line["epoch"] for line in history]
    figure, (loss, accuracy, rate) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    loss.plot(epochs, [line["train_loss"] for line in history], label="training")
    loss.plot(epochs, [line["val_loss"] for line in history], label="validation")
    loss.set(title="loss", xlabel="epoch")
    loss.legend(frameon=False)
    for key, label in (("val_top1", "top-1"), ("val_top5", "top-5"), ("ema_top1", "top-1, EMA")):
        if key in history[-1]:
            accuracy.plot(epochs, [100 * line[key] for line in history], label=label)
    accuracy.set(
        title=f"validation accuracy, last top-1 {100 * history[-1]['val_top1']:.2f} %", xlabel="epoch", ylabel="%"
    )
    accuracy.legend(frameon=False, loc="lower right")
    rate.plot(epochs, [line["learning_rate"] for line in history], color="tab:gray")
    rate.set(title="learning rate", xlabel="epoch")
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    partial = folder / f".{CURVES_NAME}"
    figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
    partial.replace(folder / CURVES_NAME)


def save_weights(
    model: nn.Module,
    folder: Path,
    recipe: Recipe,
    data_config: dict[str, Any],
    data: dict[str, Any],
    history: list[dict[str, Any]],
) -> None:
    """Writes a weights folder with its card.

    Args:
        folder: named by which weights these are, a key of WEIGHTS.
        data_config: timm's preprocessing.
        data: counts, label names and fingerprint of the data; they are kept in `config.json`.
        history: the run's metrics, epoch by epoch; those of these weights last.
    """
    kind = WEIGHTS[folder.name]
    options = {field: value for field, value in json.loads(recipe.to_json()).items() if field not in INCIDENTAL}
    scores = all_scores(history)
    facts = TrainingFacts(
        name=recipe.run_name,
        weights=kind,
        scores=scores,
        dataset=recipe.dataset or recipe.data,
        num_train=data["train"],
        num_val=data["val"],
        fingerprint=data["fingerprint"],
        recipe=options,
    )
    counts = {name: value for name, value in data.items() if name != "label_names"}
    score = {"weights": kind, "epoch": scores[kind].epoch, "top1": scores[kind].top1}
    config = {"label_names": data["label_names"], "data": counts, "score": score}
    card = build_card(model, facts, data_config=data_config)
    save_folder(model, folder, data_config=data_config, config=config, card=card)


# The weights folders of a run, and which weights each one holds.
WEIGHTS: dict[str, Weights] = {"model": "last", "best": "best", "ema": "ema", "ema-best": "ema-best"}


def all_scores(history: list[dict[str, Any]]) -> dict[Weights, Score]:
    """What the last and the best weights scored, plain and averaged."""
    last, best = history[-1], max(history, key=lambda line: line["val_top1"])
    scores = {
        "last": Score(epoch=last["epoch"], top1=last["val_top1"], top5=last["val_top5"]),
        "best": Score(epoch=best["epoch"], top1=best["val_top1"], top5=best["val_top5"]),
    }
    if "ema_top1" in last:
        best = max(history, key=lambda line: line["ema_top1"])
        scores["ema"] = Score(epoch=last["epoch"], top1=last["ema_top1"])
        scores["ema-best"] = Score(epoch=best["epoch"], top1=best["ema_top1"])
    return scores


def headline_weights(history: list[dict[str, Any]]) -> str:
    """The folder of the weights that scored highest, of the plain ones and the average: those that papers print."""
    scores = all_scores(history)
    return max(("best", "ema-best"), key=lambda name: scores[WEIGHTS[name]].top1 if WEIGHTS[name] in scores else -1)
