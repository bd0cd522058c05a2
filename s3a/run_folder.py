"""What a training run leaves in its folder, beside its checkpoints: recipe, metrics, curves, model card."""

import json
from pathlib import Path
from typing import Any

import matplotlib
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from s3a.recipe import Recipe, option

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECIPE_NAME, METRICS_NAME, CURVES_NAME = "recipe.json", "metrics.jsonl", "curves.png"
MODEL_FOLDER, CHECKPOINT_FOLDER = "model", "checkpoints"


def claim_folder(recipe: Recipe) -> Path:
    """Makes the run's folder and writes its recipe, or makes sure that the one there is the same.

    Raises:
        ValueError: where the folder holds a run of another recipe.
    """
    folder = recipe.folder
    path = folder / RECIPE_NAME
    ours = json.loads(recipe.to_json())
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
        changed = [key for key in changed if key != "output_dir"]  # the folder may have been moved
        if changed:
            shown = ", ".join(f"{option(key)} {theirs.get(key)} (now {ours.get(key)})" for key in changed[:3])
            raise ValueError(f"{folder} holds a run with {shown}: give this one its own --output-dir, or delete that")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(recipe.to_json(), encoding="utf-8")
    return folder


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """Writes `metrics.jsonl`, a line per epoch; a reader sees the old file or the new one."""
    partial = folder / f".{METRICS_NAME}"
    partial.write_text("".join(json.dumps(line) + "\n" for line in history), encoding="utf-8")
    partial.replace(folder / METRICS_NAME)


def draw_curves(folder: Path, history: list[dict[str, Any]]) -> None:
    """Draws loss, accuracy and learning rate against the epoch into `curves.png`."""
    epochs = [line["epoch"] for line in history]
    figure, (loss, accuracy, rate) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    loss.plot(epochs, [line["train_loss"] for line in history], label="training")
    loss.plot(epochs, [line["val_loss"] for line in history], label="validation")
    loss.set(title="loss", xlabel="epoch")
    loss.legend(frameon=False)
    for key, label in (("val_top1", "top-1"), ("val_top5", "top-5")):
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


def model_card(recipe: Recipe, last: dict[str, Any], num_images: tuple[int, int], parameters: int) -> str:
    """The README of the weights folder.

    Args:
        last: the last epoch's line of metrics.
        num_images: training and validation images.
        parameters: trainable parameters.
    """
    top1 = EvalResult(
        task_type="image-classification",
        dataset_type=recipe.data,
        dataset_name=recipe.data,
        metric_type="accuracy",
        metric_name="top-1",
        metric_value=round(100 * last["val_top1"], 3),
    )
    data = ModelCardData(
        license="mit",
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "s3a"],
        model_name=recipe.name,
        eval_results=[top1],
    )
    places = ("output_dir", "data_dir")  # of one machine, nobody else's business
    rows = [(key, value) for key, value in json.loads(recipe.to_json()).items() if key not in places]
    options = "\n".join(f"| `{key}` | {value} |" for key, value in rows)
    text = f"""---
{data.to_yaml()}
---

# {recipe.model} trained on {recipe.data}

Sparse Scan Self-Attention ("Vision Transformer with Sparse Scan Prior", arXiv 2405.13335), {parameters:,} parameters.
Top-1 {100 * last["val_top1"]:.2f} %, top-5 {100 * last["val_top5"]:.2f} % on {num_images[1]:,} validation images
after epoch {last["epoch"]}, the last one; trained on {num_images[0]:,} images at {recipe.image_size} px.

```python
import s3a
model = s3a.SSViT.from_pretrained("FOLDER_OR_REPO")
```

## Recipe

| option | value |
| --- | --- |
{options}
"""
    return str(ModelCard(text))
