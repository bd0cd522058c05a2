"""The folder of a run: whose it is, and what stands in it."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from helpers.fork_server import run_python
from helpers.small_runs import read_metrics, train_changed
from matplotlib.figure import Figure
from PIL import Image

from s3a.support.palette import BLUE, VERMILLION
from s3a.training import trainer
from s3a.training.run_folder import EpochMetrics, Panel, draw_curves, list_origins, write_metrics
from s3a.training.tasks import task


def test_a_folder_of_another_recipe_is_left_alone(digits_recipe):
    folder = trainer.train(dataclasses.replace(digits_recipe, epochs=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=r"--epochs 2 \(now 3\).*--output-dir"):
        trainer.train(digits_recipe)
    assert len(read_metrics(folder)) == 2


def test_a_run_goes_on_that_is_older_than_an_option(recipe):
    """It had what the option is by default, and nothing else."""
    folder = train_changed(recipe, epochs=1)
    path = folder / "recipe.json"
    written = json.loads(path.read_text())
    for field in ("tf32", "backend", "crop_scale"):
        del written[field]
    path.write_text(json.dumps(written))
    assert train_changed(recipe, epochs=1) == folder
    with pytest.raises(ValueError, match=r"a run with --crop-scale \[0.08, 1.0\] \(now \[0.5, 1.0\]\)"):
        train_changed(recipe, epochs=1, crop_scale=(0.5, 1.0))


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
            other = "from s3a.training.run_folder import *; from s3a.training.recipe import ClassificationRecipe; "
            other += "claim_folder(ClassificationRecipe(model='ssvit_nano', data='digits', image_size=32, epochs=1, "
            other += f"batch_size=8, learning_rate=1.0, output_dir=Path({str(recipe.output_dir)!r})))"
            tried.append(run_python(["-c", other], Path.cwd(), dict(os.environ)))
        step(run, progress, batches)

    monkeypatch.setattr(trainer, "train_step", intruded)
    folder = train_changed(recipe)
    assert f"ValueError: {folder} is being trained by another process" in tried[0].stderr
    assert json.loads((folder / "recipe.json").read_text())["batch_size"] == 16
    assert len(read_metrics(train_changed(recipe))) == 2, "the lock ends with the run"


def test_a_run_that_came_and_went_while_data_was_loaded_is_left_alone(recipe, monkeypatch):
    load = task.load_data

    def load_slowly(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(task, "load_data", load)
            train_changed(recipe, epochs=1)
        AcceleratorState._reset_state(reset_partial_state=True)
        return load(*arguments, **options)

    monkeypatch.setattr(task, "load_data", load_slowly)
    with pytest.raises(ValueError, match=r"--epochs 1 \(now 2\)"):
        train_changed(recipe)
    assert len(read_metrics(recipe.output_dir)) == 1


# --------------------------------------------------------------------------------------------------------
# Metrics, curves and weights folders
# --------------------------------------------------------------------------------------------------------


def make_metrics(epoch: int, top1: float, ema_top1: float | None = None, **changes: int) -> EpochMetrics:
    scores = {"val_loss": 1.5, "val_top1": top1, **({} if ema_top1 is None else {"ema_top1": ema_top1})}
    return EpochMetrics(
        epoch=epoch,
        train_loss=2.5,
        scores=scores,
        learning_rate=1e-3,
        images_per_second=100.0,
        loader_wait=0.125,
        **changes,
    )


def test_a_line_of_metrics_has_its_columns_in_order_and_comes_back(tmp_path):
    plain = make_metrics(1, top1=0.5)
    full = make_metrics(2, top1=0.75, ema_top1=0.7, skipped_steps=3, unreadable_val=4)
    write_metrics(tmp_path, [plain, full])
    lines = read_metrics(tmp_path)
    assert [" ".join(line) for line in lines] == [
        "epoch train_loss val_loss val_top1 learning_rate images_per_second loader_wait",
        "epoch train_loss val_loss val_top1 ema_top1 learning_rate images_per_second loader_wait "
        "skipped_steps unreadable_val",
    ]
    assert list(lines[1].values()) == [2, 2.5, 1.5, 0.75, 0.7, 1e-3, 100.0, 0.125, 3, 4]
    assert [EpochMetrics.from_line(line) for line in lines] == [plain, full]


def test_each_weights_folder_knows_its_epoch():
    """Of equal epochs the first is the best; plain weights and their average each have their own."""
    tops, averages = (0.5, 0.75, 0.75, 0.6), (0.1, 0.2, 0.3, 0.4)
    history = [make_metrics(epoch, *pair) for epoch, pair in enumerate(zip(tops, averages, strict=True), start=1)]
    origins = list_origins(history, "top1")
    assert {name: (origin.metrics.epoch, origin.prefix, origin.score) for name, origin in origins.items()} == {
        "model": (4, "val", 0.6),
        "best": (2, "val", 0.75),
        "ema": (4, "ema", 0.4),
        "ema-best": (4, "ema", 0.4),
    }
    assert set(list_origins([make_metrics(1, top1=0.5)], "top1")) == {"model", "best"}


def test_curves_have_the_colours_of_all_pictures_and_whole_epochs():
    axes = Figure().subplots()
    Panel(title="loss", curves={"training": [2.0], "validation": [3.0]}).draw(axes, [1])
    assert [line.get_color() for line in axes.lines] == [BLUE, VERMILLION]
    assert [line.get_marker() for line in axes.lines] == [".", "."]  # a line of one epoch could not be seen
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "validation"]
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


@pytest.mark.parametrize("count", [1, 3])
def test_curves_are_as_wide_as_their_panels(tmp_path, count):
    draw_curves(tmp_path, [1, 2], [Panel(title="loss", curves={"training": [2, 1], "validation": [3, 2]})] * count)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (440 * count, 374)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
