"""The folder of a run: whose it is, and what stands in it."""

import dataclasses
import json
import subprocess
import sys

import pytest
from accelerate.state import AcceleratorState
from helpers.small_runs import read_metrics, train_changed

from s3a.training import trainer


def test_a_folder_of_another_recipe_is_left_alone(digits_recipe):
    folder = trainer.train(dataclasses.replace(digits_recipe, epochs=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=r"--epochs 2 \(now 3\).*--output-dir"):
        trainer.train(digits_recipe)
    assert len(read_metrics(folder)) == 2


def test_how_the_work_is_spread_is_not_another_recipe(digits_recipe):
    folder = trainer.train(dataclasses.replace(digits_recipe, epochs=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert trainer.train(dataclasses.replace(digits_recipe, epochs=2, keep_checkpoints=1)) == folder


def test_other_files_are_left_alone(digits_recipe):
    digits_recipe.output_dir.mkdir()
    (digits_recipe.output_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis\.tex and no run"):
        trainer.train(digits_recipe)
    assert [path.name for path in digits_recipe.output_dir.iterdir()] == ["thesis.tex"]


def test_an_output_folder_that_is_a_file_is_refused(digits_recipe):
    digits_recipe.output_dir.write_text("a file")
    with pytest.raises(ValueError, match=r"--output-dir .* cannot be written \(File exists\)"):
        trainer.train(digits_recipe)


def test_a_run_has_one_process_at_a_time(recipe, monkeypatch):
    step, tried = trainer.train_step, []

    def intruded(run, progress, batches):
        if not tried:
            other = "from s3a.training.run_folder import *; from s3a.training.recipe import Recipe; import sys, json; "
            other += "claim_folder(Recipe(model='ssvit_nano', data='digits', image_size=32, epochs=1, batch_size=8, "
            other += f"learning_rate=1.0, output_dir=Path({str(recipe.output_dir)!r})))"
            tried.append(subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False))
        step(run, progress, batches)

    monkeypatch.setattr(trainer, "train_step", intruded)
    folder = train_changed(recipe)
    assert f"ValueError: {folder} is being trained by another process" in tried[0].stderr
    assert json.loads((folder / "recipe.json").read_text())["batch_size"] == 16
    assert len(read_metrics(train_changed(recipe))) == 2, "the lock ends with the run"
