"""What a training run leaves in its folder, beside its checkpoints: recipe, metrics, curves, model card."""

import json
from pathlib import Path
from typing import Any

import matplotlib
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from s3a.checkpoint import checkpoints
from s3a.recipe import Recipe, option
from s3a.weights import PretrainedMixin, save_folder

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECIPE_NAME, METRICS_NAME, CURVES_NAME = "recipe.json", "metrics.jsonl", "curves.png"
CHECKPOINT_FOLDER = "checkpoints"


# May differ between the parts of one run: places, and what does not change its weights.
PLACES = ("output_dir", "data_dir")
HOUSEKEEPING = ("num_workers", "cpu_threads", "keep_checkpoints", "checkpoint_every", "track", "max_bad_images")
INCIDENTAL = (*PLACES, *HOUSEKEEPING)


def claim_folder(recipe: Recipe) -> Path:
    """Makes the run's folder and writes its recipe, or makes sure that the one there is the same.

    Raises:
        ValueError: where the folder cannot be made, or holds something else: other files, or a run of another recipe.
    """
    folder, path = recipe.folder, recipe.folder / RECIPE_NAME
    ours = json.loads(recipe.to_json())
    if path.exists() and checkpoints(folder / CHECKPOINT_FOLDER):
        theirs = read_recipe(path)
        changed = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
        shown = [f"{option(key)} {theirs.get(key)} (now {ours.get(key)})" for key in changed if key not in INCIDENTAL]
        if shown:
            raise ValueError(
                f"{folder} holds a run with {', '.join(shown[:3])}: give this one its own --output-dir, or delete that"
            )
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strangers = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        if strangers and not path.exists():
            raise ValueError(f"--output-dir {folder} holds {strangers[0]} and no run: give an empty or a new folder")
        write_whole(path, recipe.to_json())
    except OSError as error:
        raise ValueError(f"--output-dir {folder} cannot be written ({error.strerror}): give another") from error
    return folder


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


def write_unreadable(folder: Path, names: list[str]) -> None:
    """Writes `unreadable.txt`, a line per training image that cannot be read."""
    write_whole(folder / "unreadable.txt", "".join(f"{name}\n" for name in names))


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
    line: dict[str, Any],
    key: str,
) -> None:
    """Writes a weights folder with its card.

    Args:
        data_config: timm's preprocessing.
        data: counts, label names and fingerprint of the data; they are kept in `config.json`.
        line: metrics of the epoch whose weights these are. key: the accuracy that is theirs.
    """
    counts = {name: value for name, value in data.items() if name != "label_names"}
    config = {"label_names": data["label_names"], "data": counts, "epoch": line["epoch"], "top1": line[key]}
    card = model_card(model, folder.name, recipe, data, line, key)
    save_folder(model, folder, data_config=data_config, config=config, card=card)


# What the weights of each folder are.
WEIGHTS = {
    "model": "weights after the last epoch",
    "best": "weights of the best epoch on the validation images",
    "ema": "moving average of the weights after the last epoch",
    "ema-best": "moving average of the weights, of its best epoch on the validation images",
}


def model_card(
    model: nn.Module, name: str, recipe: Recipe, data: dict[str, Any], line: dict[str, Any], key: str
) -> str:
    """The README of a weights folder.

    Args:
        name: which weights these are, a key of WEIGHTS.
        data: counts, label names and fingerprint.
        line: metrics of their epoch. key: the accuracy that is theirs.
    """
    top1 = EvalResult(
        task_type="image-classification",
        dataset_type=recipe.dataset or recipe.data,
        dataset_name=recipe.run_name,
        metric_type="accuracy",
        metric_name="top-1",
        metric_value=round(100 * line[key], 3),
    )
    header = ModelCardData(
        license="mit",
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "s3a"],
        model_name=recipe.run_name,
        eval_results=[top1],
    )
    rows = [(field, value) for field, value in json.loads(recipe.to_json()).items() if field not in INCIDENTAL]
    options = "\n".join(f"| `{field}` | {value} |" for field, value in rows)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    family = type(model).__name__
    load = (
        f'from s3a import {family}\n\nmodel = {family}.from_pretrained("FOLDER_OR_REPO")'
        if isinstance(model, PretrainedMixin)
        else 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)'
    )
    text = f"""---
{header.to_yaml()}
---

# {recipe.model} trained on {recipe.run_name}

The {WEIGHTS[name]}; {parameters:,} parameters.
Top-1 {100 * line[key]:.2f} % on {data["val"]:,} validation images after epoch {line["epoch"]}; trained on
{data["train"]:,} images at {recipe.image_size} px (data fingerprint `{data["fingerprint"][:16]}`).

```python
{load}
```

## Recipe

| option | value |
| --- | --- |
{options}
"""
    return str(ModelCard(text))
