"""A task in one file: the toy below, trained by `train(recipe, task=Brightness)`, stopped, killed and resumed."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import timm
import torch
from helpers.small_runs import read_metrics, train_changed
from PIL import Image
from torch import Tensor
from torch.nn.functional import mse_loss

import s3a
from s3a.support.errors import Interrupted
from s3a.training import trainer
from s3a.training.evaluation import NonFiniteLossError
from s3a.training.named_recipes import get_recipe
from s3a.training.recipe import ClassificationRecipe
from s3a.training.tasks.task import Measurement, Task


class Brightness(Task):
    """How bright an image is on average: one number, by its square error."""

    num_outputs = 1
    best = "accuracy"
    title = "accuracy"

    def make_loss(self, recipe):
        return lambda model, batch: mse_loss(model(batch.images)[:, 0], brightness(batch.images))

    def measure(self, model, batch):
        errors = (model(batch.images)[:, 0] - brightness(batch.images)).square()
        return Measurement(errors.where(batch.labels >= 0, 0).sum().reshape(1))

    def compute_scores(self, sums, num_images, records):
        return {"error": sums[0] / num_images, "accuracy": 1 / (1 + sums[0] / num_images)}


def brightness(images: Tensor) -> Tensor:
    """The mean of each image."""
    return images.mean((1, 2, 3))


@pytest.fixture
def recipe(images: Path, tmp_path: Path) -> ClassificationRecipe:
    """Two short epochs, with what could break a resume: drop path, crops, an average of the weights."""
    return dataclasses.replace(
        get_recipe("digits"),
        data="imagefolder",
        data_dir=images,
        image_size=32,
        epochs=2,
        warmup_epochs=0.5,
        batch_size=9,
        drop_path=0.2,
        ema_decay=0.9,
        cpu_threads=1,
        output_dir=tmp_path / "run",
    )


class Killed(BaseException):
    """Stands for the end of the process."""


def interrupt_step(monkeypatch: pytest.MonkeyPatch, number: int, signal_number: int | None) -> None:
    """Lets the step of that number get a signal, or end the process where there is none."""
    step = trainer.train_step

    def interrupted_step(run, progress, batches):
        if trainer.count_steps(run, progress) == number:
            if signal_number is None:
                raise Killed
            os.kill(os.getpid(), signal_number)
        step(run, progress, batches)

    monkeypatch.setattr(trainer, "train_step", interrupted_step)


def test_a_toy_task_trains_stops_resumes_and_keeps_its_best(recipe, monkeypatch, capsys):
    whole = train_changed(recipe, "whole", task=Brightness)
    with monkeypatch.context() as patch:  # stopped after its third step
        interrupt_step(patch, 2, signal.SIGTERM)
        with pytest.raises(Interrupted, match="stopped by SIGTERM at epoch 1, step 3 of 5"):
            train_changed(recipe, task=Brightness)
    with monkeypatch.context() as patch:  # killed in the second epoch
        interrupt_step(patch, 7, None)
        with pytest.raises(Killed):
            train_changed(recipe, task=Brightness)
    capsys.readouterr()
    folder = train_changed(recipe, task=Brightness)
    said = capsys.readouterr().err
    assert f"resuming {folder} after epoch 1 of 2" in said
    files = {path.parent.name: path.read_bytes() for path in folder.glob("*/model.safetensors")}
    assert files == {path.parent.name: path.read_bytes() for path in whole.glob("*/model.safetensors")}
    assert set(files) == {"model", "best", "ema", "ema-best"}

    columns = "epoch train_loss val_error val_accuracy ema_accuracy learning_rate images_per_second loader_wait"
    lines = read_metrics(folder)
    assert [list(line) for line in lines] == 2 * [columns.split()]
    measured = ("images_per_second", "loader_wait")
    for line, undisturbed in zip(lines, read_metrics(whole), strict=True):
        assert {**line, **dict.fromkeys(measured)} == {**undisturbed, **dict.fromkeys(measured)}
    assert lines[1]["train_loss"] < lines[0]["train_loss"]

    best = max(lines, key=lambda line: line["val_accuracy"])
    config = json.loads((folder / "best" / "config.json").read_text())
    assert config["score"] == {"weights": "best", "epoch": best["epoch"], "accuracy": best["val_accuracy"]}
    assert "label_names" not in config
    assert s3a.SSViT.from_pretrained(folder / "best").num_classes == 1
    card = (folder / "best" / "README.md").read_text()
    assert f"| **best epoch: these weights** | {best['epoch']} | {best['val_accuracy']:.4f} |" in card
    assert "| image_size | 32 |" in card
    assert "classif" not in card
    assert (folder / "curves.png").is_file()
    assert f"val_error {lines[1]['val_error']:.4f}, val_accuracy {lines[1]['val_accuracy']:.4f}" in said
    assert "recipes/evaluate.py" not in said, "which is for classifiers"


def test_what_a_task_scores_is_what_plain_code_scores(recipe, images, tmp_path):
    """Of plain weights and their average, without the image that cannot be read."""
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "val" / "dark" / "000.png").write_bytes(b"")
    changes = {"data": "imagefolder", "data_dir": folder, "batch_size": 12, "max_bad_val_images": 0.1}
    run = train_changed(recipe, task=Brightness, **changes)
    paths = sorted(path for path in (folder / "val").rglob("*.*") if path.stat().st_size)
    assert len(paths) == 17
    for name, column in (("model", "val_accuracy"), ("ema", "ema_accuracy")):
        model = s3a.SSViT.from_pretrained(run / name)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        errors = []
        for path in paths:
            with Image.open(path) as image, torch.no_grad():
                pixels = transform(image.convert("RGB"))[None]
                errors.append((model(pixels)[0, 0] - pixels.mean()).square().item())
        assert read_metrics(run)[-1][column] == pytest.approx(1 / (1 + sum(errors) / 17), rel=1e-5)


def test_a_score_that_is_not_finite_stops_the_run(recipe, monkeypatch):
    monkeypatch.setattr(Brightness, "compute_scores", lambda *_: {"error": 0.1, "accuracy": float("nan")})
    with pytest.raises(NonFiniteLossError, match="the validation accuracy is nan"):
        train_changed(recipe, task=Brightness)


def test_a_run_is_not_taken_over_by_another_task(recipe):
    """Even one with the same scores, and even after its end."""
    folder = train_changed(recipe, task=Brightness)
    before = (folder / "model" / "model.safetensors").read_bytes()
    other = type("Darkness", (Brightness,), {})
    with pytest.raises(ValueError, match=r"holds a run of the task Brightness, and this one is Darkness: .*--output"):
        train_changed(recipe, task=other)
    assert (folder / "model" / "model.safetensors").read_bytes() == before


def test_a_checkpoint_that_names_no_task_is_of_classification(recipe, monkeypatch, capsys):
    """They were written before there was another one; their runs go on, and are no other task's."""
    folder = train_changed(recipe)
    read = trainer.read_state
    monkeypatch.setattr(
        trainer, "read_state", lambda *where: {key: part for key, part in read(*where).items() if key != "task"}
    )
    train_changed(recipe)
    assert f"{folder} is finished: 2 epochs" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds a run of the task Classification, and this one is Brightness"):
        train_changed(recipe, task=Brightness)


def test_a_best_score_that_is_none_is_named(recipe):
    misspelt = type("Misspelt", (Brightness,), {"best": "acuracy"})
    with pytest.raises(ValueError, match=r"Misspelt\.best is 'acuracy': .* which are error, accuracy"):
        train_changed(recipe, task=misspelt)


def test_the_base_of_tasks_can_not_be_trained(recipe):
    with pytest.raises(TypeError, match="abstract"):
        train_changed(recipe, task=Task)
    assert not recipe.output_dir.exists()
