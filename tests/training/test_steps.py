"""Single optimizer steps and checkpoints of a run, held against what they must be, not against another run."""

import dataclasses
import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.small_runs import load_weights

from s3a.data import TrainLoader, load_data
from s3a.training import build, checkpoints, trainer
from s3a.training.build import Run, build_run
from s3a.training.evaluation import Evaluation, NonFiniteLossError
from s3a.training.recipe import ClassificationRecipe


def build_again(recipe: ClassificationRecipe, **changes: object) -> Run:
    """The run of a changed recipe, as in a new process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return build_run(dataclasses.replace(recipe, **changes))


def take_steps(run: Run, count: int = 1) -> trainer.Progress:
    """Takes the first steps of a run."""
    progress = trainer.Progress()
    trainer.prepare_epoch(run, progress)
    for batches in itertools.islice(run.train_loader.epoch(0), count):
        trainer.train_step(run, progress, batches)
    trainer.settle_step(run, progress)
    return progress


# --------------------------------------------------------------------------------------------------------
# Gradients
# --------------------------------------------------------------------------------------------------------


def measure_norms(run: Run) -> list[float]:
    """The norms of the gradients that the optimizer of a run is given in its first two steps."""
    norms = []

    def measure(optimizer, *arguments):
        gradients = [each.grad for group in optimizer.param_groups for each in group["params"]]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())

    run.optimizer.optimizer.register_step_pre_hook(measure)
    take_steps(run, 2)
    return norms


def test_the_optimizer_gets_gradients_of_the_norm_allowed(recipe):
    free, clipped = measure_norms(build_again(recipe)), measure_norms(build_again(recipe, clip_grad=1e-3))
    assert min(free) > 1e-2
    assert clipped == pytest.approx([1e-3, 1e-3], rel=1e-2)


def spoil_gradients(run: Run) -> None:
    """Makes the gradient of the head infinite, whatever the loss is."""
    run.bare_model.head.weight.register_hook(lambda gradient: torch.full_like(gradient, math.inf))


def test_an_infinite_gradient_stops_a_run_whose_loss_is_finite(recipe):
    run = build_again(recipe)
    spoil_gradients(run)
    with pytest.raises(NonFiniteLossError, match=r"the loss is \d\.\d+ and the gradient's norm (inf|nan) at step 1"):
        take_steps(run)


def test_an_infinite_gradient_is_skipped_where_that_is_asked_for(recipe):
    run = build_again(recipe, on_non_finite="skip")
    spoil_gradients(run)
    before = {key: value.clone() for key, value in run.bare_model.state_dict().items()}
    assert take_steps(run).skipped == 1
    assert all(torch.equal(before[key], value) for key, value in run.bare_model.state_dict().items())


# --------------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------------


def test_the_order_of_the_images_is_that_of_the_seed(recipe):
    run = build_again(recipe, seed=3, repeats=2)
    alone = TrainLoader(run.data.train, lambda image: torch.zeros(1), channels=3, batch_size=16, repeats=2, seed=3)
    for epoch in (0, 1):
        ours, right = ([batch.indices.tolist() for (batch,) in each.epoch(epoch)] for each in (run.train_loader, alone))
        assert ours == right


# --------------------------------------------------------------------------------------------------------
# Epochs
# --------------------------------------------------------------------------------------------------------


def train_hollow(
    monkeypatch: pytest.MonkeyPatch, recipe: ClassificationRecipe, plain: list[float], averaged: list[float]
) -> dict:
    """Trains a recipe with steps that compute nothing, and validations that score what is given, epoch by epoch.

    A step sets the head's bias to 2 times the epoch, and in the average to 1 more.

    Returns:
        indices: of the images of each step. rates: the learning rate of each step.
    """
    seen = {"indices": [], "rates": []}

    def step(run, progress, batches):
        seen["indices"].append([index for batch in batches for index in batch.indices.tolist()])
        seen["rates"].append(run.optimizer.param_groups[0]["lr"])
        with torch.no_grad():
            run.bare_model.head.bias.fill_(2 * progress.epoch)
            run.ema.module.head.bias.fill_(2 * progress.epoch + 1)
        progress.step += 1

    def score(run, progress, model):
        top1 = (plain if model is run.bare_model else averaged)[progress.epoch]
        return Evaluation(scores={"loss": 1.0, "top1": top1, "top5": 1.0}, images=18, images_per_second=1.0)

    monkeypatch.setattr(trainer, "train_step", step)
    monkeypatch.setattr(trainer, "validate", score)
    for name in ("save", "draw_curves"):  # takes long, and is of no interest here
        monkeypatch.setattr(trainer, name, lambda *_: None)
    trainer.train(recipe)
    return seen


def test_each_weights_folder_holds_the_weights_of_its_epoch(recipe, monkeypatch):
    """The plain weights are best in the first epoch, the average in the second; the better of both is published."""
    recipe = dataclasses.replace(recipe, epochs=3, ema_decay=0.9, push_to_hub="lizards/best")
    published = []
    monkeypatch.setattr(build, "create_repository", lambda repo: None)
    monkeypatch.setattr(trainer, "push_folder", lambda folder, repo: published.append(folder.name))
    train_hollow(monkeypatch, recipe, plain=[0.9, 0.5, 0.7], averaged=[0.6, 0.8, 0.5])
    folders = ("model", "best", "ema", "ema-best")
    biases = {name: load_weights(recipe.output_dir / name)["head.bias"].tolist() for name in folders}
    assert biases == {"model": [4, 4], "best": [0, 0], "ema": [5, 5], "ema-best": [3, 3]}
    assert published == ["best"]


def test_every_epoch_and_step_has_images_and_a_learning_rate_of_its_own(recipe, monkeypatch):
    recipe = dataclasses.replace(recipe, epochs=2, warmup_epochs=1, schedule="step", ema_decay=0.9, seed=3)
    monkeypatch.setattr(trainer, "write_weights", lambda *_: None)
    seen = train_hollow(monkeypatch, recipe, plain=[0.5, 0.6], averaged=[0.5, 0.6])
    images = load_data(recipe.data, recipe.data_dir).train
    alone = TrainLoader(images, lambda image: torch.zeros(1), channels=3, batch_size=16, seed=3)
    assert seen["indices"] == [batch.indices.tolist() for epoch in (0, 1) for (batch,) in alone.epoch(epoch)]
    peak, lowest = recipe.peak_learning_rate, recipe.min_learning_rate
    warmup = [1e-6 + (peak - 1e-6) * step / 3 for step in (1, 2)]
    cosine = [lowest + (peak - lowest) * (1 + math.cos(math.pi * step / 6)) / 2 for step in (3, 4, 5, 6)]
    assert seen["rates"] == pytest.approx([*warmup, *cosine], rel=1e-6)


def test_a_schedule_of_epochs_has_one_learning_rate_in_each(recipe, monkeypatch):
    """The first is where the warm-up begins; the cosine goes on as if there had been none."""
    recipe = dataclasses.replace(recipe, epochs=3, warmup_epochs=1, schedule="epoch", ema_decay=0.9)
    monkeypatch.setattr(trainer, "write_weights", lambda *_: None)
    seen = train_hollow(monkeypatch, recipe, plain=[0.5] * 3, averaged=[0.5] * 3)
    peak, lowest = recipe.peak_learning_rate, recipe.min_learning_rate
    cosine = [lowest + (peak - lowest) * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in (1, 2)]
    assert seen["rates"] == pytest.approx([rate for rate in (1e-6, *cosine) for _ in range(3)], rel=1e-6)


# --------------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------------


def list_state(run: Run) -> dict[str, torch.Tensor]:
    """All tensors of a run that its steps change, by a name of each."""
    parameters = dict(run.bare_model.named_parameters())
    moments = {
        f"{kind} of {name}": value
        for name, parameter in parameters.items()
        for kind, value in run.optimizer.optimizer.state[parameter].items()
    }
    averages = {f"average of {key}": value for key, value in run.ema.module.state_dict().items()}
    return {**run.bare_model.state_dict(), **averages, **moments}


def test_a_run_resumes_with_all_that_it_saved(recipe):
    recipe = dataclasses.replace(recipe, ema_decay=0.9)
    run = build_again(recipe)
    with run.lock:
        saved = take_steps(run, 2)
        saved.unreadable = ["somewhere/torn.png"]
        trainer.save(run, saved)
    again = build_again(recipe)
    assert trainer.resume(again) == saved
    before, after = list_state(run), list_state(again)
    assert before.keys() == after.keys()
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
    assert sum(key.startswith("exp_avg_sq of") for key in after) == len(list(run.model.parameters()))


def test_an_older_checkpoint_leaves_the_optimizer_fused(recipe):
    """Optimizers were not, and said so in their state."""
    run = build_again(recipe)
    with run.lock:
        progress = take_steps(run, 2)
        for group in run.optimizer.param_groups:
            group["fused"] = group["foreach"] = None
        trainer.save(run, progress)
    (checkpoint,) = (recipe.output_dir / "checkpoints").iterdir()
    assert "pending" not in checkpoints.read_state(checkpoint)["progress"]
    again = build_again(recipe)
    trainer.resume(again)
    assert {(group["fused"], group["foreach"]) for group in again.optimizer.param_groups} == {(True, None)}
    spoil_gradients(again)
    before = list_weights(again)
    (batches,) = itertools.islice(again.train_loader.epoch(0, first_step=2), 1)
    trainer.train_step(again, progress, batches)
    assert all(torch.equal(value, before[key]) for key, value in again.bare_model.named_parameters())


def list_weights(run: Run) -> dict[str, torch.Tensor]:
    """Copies of a run's weights."""
    return {key: value.detach().clone() for key, value in run.bare_model.named_parameters()}


def test_a_resumed_epoch_goes_on_with_the_images_that_are_left(recipe, monkeypatch):
    recipe = dataclasses.replace(recipe, epochs=2, ema_decay=0.9)
    run = build_again(recipe)
    with run.lock:
        trainer.save(run, trainer.Progress(step=1))
    monkeypatch.setattr(trainer, "write_weights", lambda *_: None)
    AcceleratorState._reset_state(reset_partial_state=True)
    seen = train_hollow(monkeypatch, recipe, plain=[0.5, 0.6], averaged=[0.5, 0.6])
    epochs = run.train_loader.epoch(0, first_step=1), run.train_loader.epoch(1)
    assert seen["indices"] == [batch.indices.tolist() for (batch,) in itertools.chain(*epochs)]


def test_every_checkpoint_begins_the_minutes_anew(recipe, monkeypatch):
    now = 0.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    run, due = build_again(recipe, checkpoint_every="10m"), []
    for now in (599.0, 601.0, 1199.0, 1202.0):  # noqa: B007  read by the clock
        due.append(run.clock.is_due(step=1))
        if due[-1]:
            trainer.save(run, trainer.Progress(step=1))
    assert due == [False, True, False, True]


def test_other_pixels_in_the_same_files_are_not_the_data_of_the_run(recipe, tmp_path):
    """As many images of the same names and classes: only the fingerprint tells."""
    folder = Path(shutil.copytree(recipe.data_dir, tmp_path / "images"))
    trainer.save(build_again(recipe, data_dir=folder), trainer.Progress())
    assert trainer.resume(build_again(recipe, data_dir=folder)).epoch == 0
    shutil.copy(folder / "train" / "dark" / "001.png", folder / "train" / "dark" / "000.png")
    with pytest.raises(ValueError, match=r"the data is not that of the run in .*had 48 and 18 images \(fingerprint"):
        trainer.resume(build_again(recipe, data_dir=folder))
