"""Training runs in this process, on images small enough for a test, and what they leave."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from s3a.training.recipe import ClassificationRecipe
from s3a.training.tasks.classification import Classification
from s3a.training.tasks.task import Task
from s3a.training.trainer import train
from s3a.weights.pretrained import load_pretrained

RECIPES_FOLDER = Path(__file__).parents[2] / "recipes"


def train_changed(
    recipe: ClassificationRecipe, name: str | None = None, task: type[Task] = Classification, **changes: object
) -> Path:
    """Trains a changed recipe, into a folder of that name beside the recipe's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = recipe.output_dir.with_name(name) if name else recipe.output_dir
    return train(dataclasses.replace(recipe, output_dir=folder, **changes), task)


def call_command(name: str, *arguments: object) -> None:
    """Runs a command of recipes/ in this process."""
    before, path = sys.argv, list(sys.path)
    sys.argv = [str(RECIPES_FOLDER / name), *map(str, arguments)]
    sys.path.insert(0, str(RECIPES_FOLDER))  # as where Python runs the file
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before, path


def fail_command(capsys: pytest.CaptureFixture[str], name: str, *arguments: object) -> str:
    """Runs a command that must fail as the commands do; returns its one line."""
    with pytest.raises(SystemExit) as stop:
        call_command(name, *arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def list_scores(folder: Path) -> list[float]:
    """Losses and top-1 of a run, epoch by epoch."""
    return [line[key] for line in read_metrics(folder) for key in ("train_loss", "val_loss", "val_top1")]


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights folder."""
    return load_pretrained(str(folder)).state_dict()
