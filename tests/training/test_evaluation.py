"""Evaluation: the figures of a run again, against plain code, and what is refused."""

import dataclasses
import json
import re
import shutil

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from helpers.small_runs import call_command, fail_command, read_metrics
from PIL import Image

import s3a
from s3a.data import load_data
from s3a.training import evaluation, progress, trainer
from s3a.training.build import build_run
from s3a.training.evaluation import evaluate
from s3a.training.tasks.classification import Classification


def test_the_weights_evaluate_to_what_training_said(digits_recipe, capsys, images, monkeypatch):
    folder = trainer.train(digits_recipe)
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(progress, "FIRST_LINE", 0)
    call_command("evaluate.py", "--weights", folder / "model", "--data", "imagefolder", "--data-dir", images)
    printed = capsys.readouterr()
    assert re.fullmatch(r"evaluating, batch 1 of 1: \d+ images/s, 0 s left\n", printed.err)
    result = json.loads(printed.out)
    last = read_metrics(folder)[-1]
    assert set(result) == {"top1", "top5", "loss", "images", "images_per_second"}
    assert (result["top1"], result["images"]) == (last["val_top1"], 18)
    assert result["loss"] == pytest.approx(last["val_loss"], rel=1e-5)


def test_evaluation_counts_what_plain_code_counts(digits_recipe, images):
    folder = trainer.train(dataclasses.replace(digits_recipe, epochs=2))
    model = s3a.SSViT.from_pretrained(folder / "model")
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    right = 0
    for label, name in enumerate(["dark", "light"]):
        for path in sorted((images / "val" / name).iterdir()):
            with Image.open(path) as image, torch.no_grad():
                right += int(model(transform(image.convert("RGB"))[None]).argmax() == label)
    assert right / 18 == read_metrics(folder)[-1]["val_top1"]


def test_an_evaluation_alone_has_all_the_workers_that_it_is_given(images, monkeypatch):
    given, make = [], evaluation.EvalLoader

    def note(*split, **options):
        given.append(options["num_workers"])
        return make(*split, **options)

    monkeypatch.setattr(evaluation, "EvalLoader", note)
    model = timm.create_model("ssvit_nano", num_classes=2)
    data = load_data("imagefolder", images)
    found = evaluation.evaluate_weights(model, Classification(data), batch_size=8, num_workers=1)
    assert found == dataclasses.replace(
        evaluation.evaluate_weights(model, Classification(data), batch_size=8),
        images_per_second=found.images_per_second,
    )
    assert given == [1, 0]


@pytest.mark.parametrize(("training", "stopped"), [(True, False), (True, True), (False, False)])
def test_a_model_is_left_as_it_is(recipe, training, stopped):
    """In the mode that it was in, with the statistics that it had."""
    run = build_run(recipe)
    model = run.bare_model.train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = evaluate(model, run.task, run.val_loader, run.accelerator, stop=lambda: stopped)
    assert (found is None) == stopped
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_evaluation_refuses_data_of_other_classes(digits_recipe, capsys):
    folder = trainer.train(dataclasses.replace(digits_recipe, epochs=2)) / "model"
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    line = fail_command(capsys, "evaluate.py", "--weights", folder, "--data", "digits")
    assert "know 2 classes and the data has 10" in line


def test_evaluation_refuses_classes_of_other_names(digits_recipe, capsys, tmp_path):
    folder = trainer.train(dataclasses.replace(digits_recipe, epochs=2)) / "model"
    data = shutil.copytree(digits_recipe.data_dir, tmp_path / "renamed")
    for split in ("train", "val"):
        (data / split / "light").rename(data / split / "pale")
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ("--weights", folder, "--data", "imagefolder", "--data-dir", data)
    assert "know a class 'light' where the data has 'pale'" in fail_command(capsys, "evaluate.py", *arguments)
    call_command("evaluate.py", *arguments, "--other-label-names")
    assert json.loads(capsys.readouterr().out)["images"] == 18


def test_evaluation_refuses_damaged_weights(digits_recipe, capsys):
    folder = trainer.train(dataclasses.replace(digits_recipe, epochs=2)) / "model"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    capsys.readouterr()
    assert "no whole safetensors file" in fail_command(capsys, "evaluate.py", "--weights", folder, "--data", "digits")
    weights.unlink()
    assert "has no model.safetensors" in fail_command(capsys, "evaluate.py", "--weights", folder, "--data", "digits")
    shutil.rmtree(folder)
    assert "neither a local folder" in fail_command(capsys, "evaluate.py", "--weights", folder, "--data", "digits")
