"""Runs as a user starts them, on images small enough for a test: what each leaves, and what recipe fields do to it."""

import dataclasses
import errno
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from helpers.hub_server import TOKEN, Hub
from helpers.small_runs import call_command, list_scores, load_weights, read_metrics, train_changed
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import s3a
from s3a.support.errors import Interrupted
from s3a.training import progress, trainer
from s3a.training.evaluation import NonFiniteLossError, UnreadableImagesError
from s3a.training.recipe import ClassificationRecipe


def test_a_run_learns_and_leaves_all_that_it_promises(digits_recipe, capsys):
    folder = trainer.train(digits_recipe, note="a note: of the caller")
    lines = read_metrics(folder)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    keys = "epoch train_loss val_loss val_top1 val_top5 learning_rate images_per_second loader_wait"
    assert all(set(line) == set(keys.split()) for line in lines)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert lines[-1]["val_top5"] == 1
    assert json.loads((folder / "recipe.json").read_text())["epochs"] == 3
    with Image.open(folder / "curves.png") as picture:
        assert picture.width > 600
    assert {path.name for path in (folder / "model").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert len(list((folder / "checkpoints").iterdir())) == digits_recipe.keep_checkpoints
    said = capsys.readouterr().err
    assert f"{folder / 'model'}" in said
    assert "recipes/evaluate.py" in said
    assert [line.split(":")[0] for line in said.splitlines()[:5]] == [
        f"beginning {folder}",
        "a note",
        *(f"epoch {n:>3}" for n in (1, 2, 3)),
    ]
    assert "\r" not in said, "bars are for terminals"
    assert len(said) < 1500


def test_the_weights_folder_carries_preprocessing_and_labels(digits_recipe):
    folder = trainer.train(dataclasses.replace(digits_recipe, epochs=2)) / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == ["dark", "light"]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["crop_pct"] == digits_recipe.crop_pct
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert "| validation images | 18 |" in card
    assert str(digits_recipe.data_dir) not in card


def test_scan_and_size_reach_the_model_and_its_weights_folder(digits_recipe):
    folder = trainer.train(dataclasses.replace(digits_recipe, scan="local-only", size=5, epochs=2)) / "model"
    model = s3a.SSViT.from_pretrained(folder)
    scans = [module for module in model.modules() if isinstance(module, s3a.S3A)]
    assert {(module.passes, module.size) for module in scans} == {("local", 5)}
    arguments = json.loads((folder / "config.json").read_text())["model_args"]
    assert (arguments["scan"], arguments["size"]) == ("local-only", 5)


def test_a_model_of_timm_trains_too(digits_recipe):
    folder = trainer.train(dataclasses.replace(digits_recipe, model="test_resnet", drop_path=None, epochs=2)) / "model"
    assert "timm.create_model" in (folder / "README.md").read_text()
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 2


def test_bf16_trains(digits_recipe):
    lines = read_metrics(trainer.train(dataclasses.replace(digits_recipe, epochs=2, precision="bf16")))
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


def test_the_learning_rate_follows_batch_size_warm_up_and_cosine(digits_recipe):
    lines = read_metrics(trainer.train(dataclasses.replace(digits_recipe, epochs=4, warmup_epochs=2)))
    peak, lowest = digits_recipe.learning_rate * 16 / 512, digits_recipe.min_learning_rate
    cosine = [lowest + (peak - lowest) * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in (1, 2, 3, 4)]
    expected = [1e-6 + (peak - 1e-6) / 2, *cosine[1:]]
    assert [line["learning_rate"] for line in lines] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_the_default_recipe_reads_digits(trained_digits, capsys):
    top1 = read_metrics(trained_digits)[-1]["val_top1"]
    assert top1 >= 0.99
    call_command("evaluate.py", "--weights", trained_digits / "model", "--data", "digits")
    assert json.loads(capsys.readouterr().out)["top1"] == top1


# --------------------------------------------------------------------------------------------------------
# Stopping and resuming
# --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


def train_until(recipe: ClassificationRecipe, epoch: int, monkeypatch) -> None:
    """Trains until the middle of an epoch, where the process ends."""
    step = trainer.train_step

    def dying_step(run, progress, *arguments):
        if progress.epoch == epoch:
            raise Killed
        return step(run, progress, *arguments)

    monkeypatch.setattr(trainer, "train_step", dying_step)
    with pytest.raises(Killed):
        trainer.train(recipe)
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_that_was_killed_ends_with_the_same_bytes(digits_recipe, tmp_path, monkeypatch, capsys):
    undisturbed = trainer.train(digits_recipe)
    killed = dataclasses.replace(digits_recipe, output_dir=tmp_path / "killed")
    for epoch in (1, 2):
        AcceleratorState._reset_state(reset_partial_state=True)
        train_until(killed, epoch, monkeypatch)
    capsys.readouterr()
    trainer.train(killed)
    assert f"resuming {killed.output_dir} after epoch 2 of 3" in capsys.readouterr().err
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (undisturbed, killed.output_dir)]
    assert weights[0] == weights[1]
    assert [line["epoch"] for line in read_metrics(killed.output_dir)] == [1, 2, 3]


def test_a_run_whose_output_nobody_reads_writes_a_checkpoint(digits_recipe, monkeypatch):
    """As before `head -2`: the reader ends after the line of the first epoch."""

    class Head(io.StringIO):
        def write(self, text: str) -> int:
            if "epoch   1: train loss" in self.getvalue():
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Head())
    with pytest.raises(Interrupted, match=r"stopped by the end of the reader of its output at epoch 2, step 1 of 3"):
        trainer.train(digits_recipe)
    assert (digits_recipe.output_dir / "checkpoints" / "step-000000004-epoch-00001").is_dir()


def test_progress_names_the_last_score_and_the_time_left(digits_recipe, monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST_LINE", 0)
    monkeypatch.setattr(progress, "NEXT_LINES", 0)
    trainer.train(dataclasses.replace(digits_recipe, epochs=2))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ") and "step" in line]
    assert re.fullmatch(r"epoch 1/2, step 1 of 6: \d+ images/s, \d+ s left", lines[0]), "its loss is not known yet"
    assert re.fullmatch(r"epoch 1/2, step 2 of 6: loss \d\.\d{4}, \d+ images/s, \d+ s left", lines[1])
    assert re.fullmatch(r"epoch 2/2, step 6 of 6: loss \d\.\d{4}, last top-1 \S+ %, \d+ images/s, 0 s left", lines[5])


def test_a_late_drop_path_holds_for_the_last_epochs(digits_recipe, tmp_path, monkeypatch):
    """Of all blocks in proportion, and also for a run that resumes in the middle of them."""
    late = dataclasses.replace(digits_recipe, late_drop_path=(0.9, 2))
    rates: dict[int, list[float]] = {}
    step = trainer.train_step

    def noted_step(run, progress, batches):
        blocks = [block for stage in run.bare_model.stages for block in stage.blocks]
        rates[progress.epoch] = [block.drop_path.drop_prob for block in blocks]
        return step(run, progress, batches)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", noted_step)
        undisturbed = trainer.train(late)
    for epoch, last in enumerate((0.2, 0.9, 0.9)):
        assert rates[epoch] == pytest.approx([last * block / 5 for block in range(6)])
    killed = dataclasses.replace(late, output_dir=tmp_path / "killed")
    AcceleratorState._reset_state(reset_partial_state=True)
    train_until(killed, 2, monkeypatch)
    trainer.train(killed)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (undisturbed, killed.output_dir)]
    assert weights[0] == weights[1]


def test_a_finished_run_says_so_and_trains_no_more(digits_recipe, monkeypatch, capsys):
    folder = trainer.train(digits_recipe)
    before = read_metrics(folder)
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(trainer, "train_epoch", None)
    trainer.train(digits_recipe)
    assert f"{folder} is finished: 3 epochs" in capsys.readouterr().err
    assert read_metrics(folder) == before


def test_a_run_without_a_checkpoint_gives_way_to_another_recipe(digits_recipe, monkeypatch):
    train_until(dataclasses.replace(digits_recipe, epochs=2), 0, monkeypatch)
    folder = trainer.train(digits_recipe)
    assert json.loads((folder / "recipe.json").read_text())["epochs"] == 3


def test_other_data_under_the_same_folder_is_refused(digits_recipe, tmp_path):
    folder = shutil.copytree(digits_recipe.data_dir, tmp_path / "images")
    digits_recipe = dataclasses.replace(digits_recipe, data_dir=folder, epochs=2)
    trainer.train(digits_recipe)
    for split in ("train", "val"):
        (folder / split / "light").rename(folder / split / "bright")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="the data is not that of the run"):
        trainer.train(digits_recipe)


# --------------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------------


def test_accumulated_passes_are_one_step(recipe):
    whole = train_changed(recipe, "whole", freeze_batch_norm=True)
    parts = train_changed(recipe, "parts", freeze_batch_norm=True, accumulate=4)
    assert list_scores(parts) == pytest.approx(list_scores(whole), rel=1e-4)


def test_checkpointed_gradients_are_the_same(recipe):
    """Drop path and BatchNorm's statistics included: the second forward must draw and count as the first."""
    plain = train_changed(recipe, "plain", drop_path=0.3)
    spared = train_changed(recipe, "spared", drop_path=0.3, grad_checkpointing=True)
    assert list_scores(spared) == pytest.approx(list_scores(plain), rel=1e-5)


def test_a_compiled_run_learns_and_saves_ordinary_weights(recipe, graphs):
    eager = train_changed(recipe, "eager")
    compiled = train_changed(recipe, "compiled", compile=True)
    assert graphs["runs"] > 0
    assert load_weights(compiled / "model").keys() == load_weights(eager / "model").keys()
    assert list_scores(compiled) == pytest.approx(list_scores(eager), rel=1e-3)


def test_a_deterministic_run_ends_with_the_same_bytes_twice(digits_recipe, monkeypatch):
    """Its settings hold in the run and not after it. On a CPU the bytes are the same without them, too."""
    step, seen = trainer.train_step, []

    def noted(*arguments):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        return step(*arguments)

    monkeypatch.setattr(trainer, "train_step", noted)
    changes = {"deterministic": True, "mixup": 0.8, "cutmix": 1.0, "ema_decay": 0.9}
    folders = [train_changed(digits_recipe, name, epochs=2, **changes) for name in ("one", "two")]
    assert set(seen) == {(True, False)}
    assert not torch.are_deterministic_algorithms_enabled()
    for name in ("model", "ema"):
        one, two = ((folder / name / "model.safetensors").read_bytes() for folder in folders)
        assert one == two


def test_the_average_is_that_of_the_steps(recipe, monkeypatch):
    """By its definition, with the decay of 512 images taken to this batch size."""
    decay, expected, step = 0.9 ** (16 / 512), {}, trainer.train_step

    def watched(run, progress, batches):
        if not expected:
            expected.update({key: value.clone().double() for key, value in run.bare_model.named_parameters()})
        step(run, progress, batches)
        for key, value in run.bare_model.named_parameters():
            expected[key].mul_(decay).add_((1 - decay) * value.detach().double())

    monkeypatch.setattr(trainer, "train_step", watched)
    state = load_weights(train_changed(recipe, ema_decay=0.9) / "ema")
    for key, value in expected.items():
        torch.testing.assert_close(state[key].double(), value, rtol=1e-5, atol=1e-6)


def test_the_headline_is_the_better_of_plain_and_average(recipe, capsys):
    folder = train_changed(recipe, epochs=3, ema_decay=0.9)
    lines = read_metrics(folder)
    plain, averaged = (max(line[key] for line in lines) for key in ("val_top1", "ema_top1"))
    name = "ema-best" if averaged > plain else "best"
    assert f"{folder / name} (best)" in capsys.readouterr().err
    assert json.loads((folder / name / "config.json").read_text())["score"]["top1"] == max(plain, averaged)


def test_a_non_finite_loss_stops_the_run_and_names_the_last_checkpoint(digits_recipe, monkeypatch):
    step = trainer.train_step

    def poisoned_step(run, progress, batches):
        factor = float("nan") if trainer.count_steps(run, progress) == 4 else 1
        return step(run, progress, [batch._replace(images=batch.images * factor) for batch in batches])

    monkeypatch.setattr(trainer, "train_step", poisoned_step)
    with pytest.raises(NonFiniteLossError, match=r"loss is nan .* at step 5 \(epoch 2,.*epoch-00001"):
        trainer.train(digits_recipe)
    assert len(read_metrics(digits_recipe.output_dir)) == 1


def test_a_learning_rate_that_explodes_is_a_non_finite_loss(digits_recipe):
    with pytest.raises(NonFiniteLossError, match="last good checkpoint: none yet"):
        trainer.train(dataclasses.replace(digits_recipe, learning_rate=1e25))


def test_steps_that_are_not_finite_are_skipped_and_counted(recipe, monkeypatch, capsys):
    step, losses = trainer.train_step, []

    def poisoned(run, progress, batches):
        factor = float("nan") if trainer.count_steps(run, progress) in (1, 4) else 1
        before = {key: value.clone() for key, value in run.bare_model.state_dict().items()}
        step(run, progress, [batch._replace(images=batch.images * factor) for batch in batches])
        trainer.settle_step(run, progress)
        if progress.epoch == 0 and factor == 1:
            losses.append(progress.loss_sum - sum(losses))
        same = all(torch.equal(before[key], value) for key, value in run.bare_model.state_dict().items())
        assert same == (trainer.count_steps(run, progress) - 1 in (1, 4)), "parameters and statistics stay, or go on"

    monkeypatch.setattr(trainer, "train_step", poisoned)
    folder = train_changed(recipe, on_non_finite="skip", learning_rate=1e-2, clip_grad=1.0)
    assert [line["skipped_steps"] for line in read_metrics(folder)] == [1, 1]
    assert read_metrics(folder)[0]["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert all(value.isfinite().all() for value in load_weights(folder / "model").values())
    assert "skipped step 5: the loss is nan" in capsys.readouterr().err


def test_a_checkpoint_before_the_first_step_leaves_the_optimizer_alone(recipe, monkeypatch):
    """torch would take a step to have a state; whoever skips the first step would count one more from there on."""
    step = trainer.train_step

    def poisoned(run, progress, batches):
        factor = float("nan") if trainer.count_steps(run, progress) == 0 else 1
        step(run, progress, [batch._replace(images=batch.images * factor) for batch in batches])

    monkeypatch.setattr(trainer, "train_step", poisoned)
    skipping = dataclasses.replace(recipe, on_non_finite="skip", learning_rate=1e-2, clip_grad=1.0)
    often, seldom = train_changed(skipping, "often", checkpoint_every="1"), train_changed(skipping, "seldom")
    before, after = load_weights(seldom / "model"), load_weights(often / "model")
    assert all(torch.equal(value, after[key]) for key, value in before.items())


# --------------------------------------------------------------------------------------------------------
# Images that cannot be read
# --------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(images: Path, tmp_path: Path) -> Path:
    """A copy of the images, of which two of 48 for training cannot be read."""
    folder = shutil.copytree(images, tmp_path / "images")
    for name in ("dark/001.png", "light/002.jpg"):
        path = folder / "train" / name
        path.write_bytes(path.read_bytes()[:300])
    return folder


def test_a_torn_image_is_named(digits_recipe, tmp_path):
    folder = shutil.copytree(digits_recipe.data_dir, tmp_path / "images")
    torn = folder / "train" / "light" / "003.jpg"
    torn.write_bytes(torn.read_bytes()[:400])
    with pytest.raises(
        ValueError,
        match=r"^1 of the training images cannot .*, 0 are allowed.*light/003\.jpg, since Truncated",
    ):
        trainer.train(dataclasses.replace(digits_recipe, data_dir=folder))


def test_unreadable_images_are_listed_up_to_the_limit(recipe, broken):
    folder = train_changed(recipe, data_dir=broken, max_bad_images=2 / 48)
    listed = (folder / "unreadable_train.txt").read_text().splitlines()
    assert [Path(line).relative_to(broken / "train").as_posix() for line in listed] == ["dark/001.png", "light/002.jpg"]
    assert len(read_metrics(folder)) == 2


def test_more_unreadable_images_stop_the_run_with_their_names(recipe, broken):
    with pytest.raises(
        UnreadableImagesError, match=r"^2 of the training images cannot .*, 1 are allowed.*such as \S+, since "
    ):
        train_changed(recipe, data_dir=broken, max_bad_images=1.5 / 48)


def test_of_validation_images_none_may_be_unreadable_unless_allowed(recipe, broken):
    (broken / "val" / "dark" / "000.png").write_bytes(b"")
    recipe = dataclasses.replace(recipe, data_dir=broken, max_bad_images=0.5)
    with pytest.raises(UnreadableImagesError, match=r"1 of the validation images .*, 0 are allowed.*val/dark/000\.png"):
        train_changed(recipe)
    [checkpoint] = (recipe.output_dir / "checkpoints").iterdir()
    assert checkpoint.name == "step-000000003-epoch-00000", "the epoch's steps are not lost"
    folder = train_changed(recipe, max_bad_val_images=1 / 18)
    assert [line["unreadable_val"] for line in read_metrics(folder)] == [1, 1]
    right = [line["val_top1"] * 17 for line in read_metrics(folder)]
    assert right == pytest.approx([round(count) for count in right])
    assert (folder / "unreadable_val.txt").read_text() == f"{broken / 'val' / 'dark' / '000.png'}\n"


def test_images_of_every_kind_are_trained_on(recipe, images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    color, into = Image.fromarray(pixels), folder / "train" / "dark"
    color.convert("CMYK").save(into / "cmyk.jpg")
    color.convert("L").save(into / "gray.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(into / "deep.png")
    color.resize((1, 1)).save(into / "dot.png")
    color.convert("RGBA").save(into / "alpha.png")
    run = train_changed(recipe, data_dir=folder, batch_size=53, num_workers=1, max_bad_images=0.0)
    assert not (run / "unreadable_train.txt").exists()


# --------------------------------------------------------------------------------------------------------
# Around the run
# --------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_metrics(recipe):
    folder = train_changed(recipe, track="tensorboard")
    logs = [EventAccumulator(str(path)).Reload() for path in (folder / "tracking").rglob("*tfevents*")]
    [log] = [log for log in logs if "val_top1" in log.Tags()["scalars"]]  # the others hold the recipe
    logged = [(event.step, event.value) for event in log.Scalars("val_top1")]
    assert logged == [(3 * line["epoch"], pytest.approx(line["val_top1"])) for line in read_metrics(folder)]


def test_published_at_the_end(recipe, hub: Hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = train_changed(recipe, push_to_hub="lizards/trained")
    pushed = hub.files("lizards/trained")
    assert pushed["model.safetensors"] == (folder / "best" / "model.safetensors").read_bytes()
    assert b'from_pretrained("lizards/trained")' in pushed["README.md"]
    assert s3a.SSViT.from_pretrained("lizards/trained").num_classes == 2
    train_changed(recipe, push_to_hub="lizards/again")  # a finished run is published without training
    assert hub.files("lizards/again")["model.safetensors"] == pushed["model.safetensors"]
