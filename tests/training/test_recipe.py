"""What a recipe says and refuses, as a dataclass and on the command line."""

import dataclasses
import json
import re

import pytest
from helpers.small_runs import call_command, fail_command
from safetensors.torch import load_file


def test_the_command_line_overrides_a_named_recipe(images, tmp_path):
    folder = tmp_path / "run"
    small = (
        "--image-size",
        32,
        "--batch-size",
        16,
        "--epochs",
        1,
        "--seed",
        3,
        "--cpu-threads",
        1,
    )
    source = ("--data", "imagefolder", "--data-dir", images)
    call_command("train.py", "digits", *source, *small, "--output-dir", folder)
    written = json.loads((folder / "recipe.json").read_text())
    assert (written["data"], written["seed"], written["epochs"]) == ("imagefolder", 3, 1)
    assert written["warmup_epochs"] == pytest.approx(1 / 18), "digits' own, shortened"
    assert load_file(folder / "model" / "model.safetensors")["head.weight"].shape[0] == 2


def test_fine_tuning_on_photographs_needs_weights_and_a_folder_alone(images, pretrained, tmp_path):
    small = ("--image-size", 32, "--batch-size", 16, "--epochs", 1, "--num-workers", 0, "--cpu-threads", 1)
    places = ("--weights", pretrained, "--data-dir", images, "--output-dir", tmp_path / "run")
    call_command("train.py", "photos_finetune", *places, *small)
    written = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (written["model"], written["name"], written["warmup_epochs"]) == ("ssvit_nano", "photos_finetune", 1 / 20)
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")["head.weight"].shape[0] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], None),
        (["digits", "--data", "imagefolder"], None),
        (["photos"], None),
        (
            ["--data", "imagefolder"],
            "those of digits, for small drawings that are not mirrored; .*recipes/train.py photos",
        ),
        (["--data", "hub", "--dataset", "org/birds"], "those of digits"),
    ],
)
def test_other_images_without_a_recipes_name_are_told_of_photos(monkeypatch, arguments, words):
    notes = []
    monkeypatch.setattr("s3a.training.trainer.train", lambda recipe, *, note: notes.append(note))
    call_command("train.py", *arguments)
    assert notes == [None] if words is None else re.search(words, notes[0])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["digts"], "recipe 'digts' is unknown.*did you mean 'digits'"),
        (["--epoch", "3"], "--epoch.*did you mean --epochs"),
        (["--data", "imagefoldr"], "imagefoldr.*imagefolder"),
        (["--model", "ssvit_tny"], "model 'ssvit_tny' is unknown.*did you mean 'ssvit_tiny'"),
        (["--epochs", "0"], "--epochs is 0: it must be above 0"),
        (["--epochs", "many"], "--epochs.*'many'"),
        (["--warmup-epochs", "99"], "--warmup-epochs is 99"),
        (["--crop-scale", "1", "0.1"], "--crop-scale is 1.0 0.1: it must be a smaller and a larger"),
        (["--learning-rate", "nan"], "--learning-rate is nan: it must be above 0"),
        (["--auto-augment", "foo"], "--auto-augment is 'foo': it must be a policy of timm's"),
        (["--label-smoothing", "2"], "--label-smoothing is 2.0: it must be between 0 and 1"),
        (["--scan", "densee"], "scan 'densee' is unknown.*did you mean 'dense'"),
        (["--size", "0"], "--size is 0: it must be above 0"),
        (["--late-drop-path", "0.6", "19"], "--late-drop-path is 0.6 19: .*how many of the 18 epochs"),
        (["--late-drop-path", "1.6", "2"], "--late-drop-path is 1.6 2: it must be a rate between 0 and 1"),
        (["--image-size", "16"], "16 x 16 pixels: each side must be at least 32"),
        (["--data", "imagefolder"], "--data-dir DIR"),
        (["photos"], "--data-dir DIR, a folder with train/CLASS"),
        (["photos_finetune"], "photos_finetune needs --weights"),
        (["--epochs", "3", "photos"], "comes before its options: recipes/train.py photos --epochs 3 "),
        (["--lr", "3"], "--lr, 3; did you mean --learning-rate?"),
        (["--device", "cpu"], "Accelerate chooses the device"),
        (["--epochs", "1.5"], "--epochs is '1.5': it must be a whole number"),
        (["--late-drop-path", "0.5"], "--late-drop-path is '0.5': it must be None or FLOAT INT"),
        (["--data", "imagefolder", "--data-dir", "nowhere"], "'nowhere' does not exist"),
    ],
)
def test_bad_options_are_one_line(capsys, tmp_path, arguments, expected):
    line = fail_command(capsys, "train.py", *arguments, "--output-dir", tmp_path / "run")
    assert re.search(expected, line), line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_scale", (1.0, 0.1)),
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.5, 1.5)),
        ("crop_ratio", (2.0, 1.0)),
        ("clip_grad", 0.0),
        ("accumulate", 0),
        ("seed", -1),
        ("min_learning_rate", float("inf")),
        ("mixup_switch", 1.5),
        ("random_erasing", -0.1),
        ("drop_path", 1.0),
        ("ema_decay", 1.0),
        ("crop_pct", 0.0),
        ("checkpoint_every", "0m"),
        ("warmup_epochs", 2),
    ],
)
def test_numbers_out_of_their_range_are_refused(recipe, field, value):
    """By the name of their option, before anything else is looked at."""
    with pytest.raises(ValueError, match=rf"^--{field.replace('_', '-')} is .*must be"):
        dataclasses.replace(recipe, **{field: value})


def test_the_learning_rate_follows_the_global_batch(recipe):
    assert recipe.peak_learning_rate == pytest.approx(4e-3 * 16 / 512)
    assert dataclasses.replace(recipe, batch_size=1024, accumulate=4).peak_learning_rate == pytest.approx(8e-3)


def test_late_drop_path_counts_the_cooldown(recipe):
    recipe = dataclasses.replace(recipe, epochs=5, cooldown_epochs=2, drop_path=0.1, late_drop_path=(0.5, 3))
    assert [recipe.drop_path_at(epoch) for epoch in range(7)] == [0.1] * 4 + [0.5] * 3
