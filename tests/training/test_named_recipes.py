"""The recipes that have a name, against what the papers and their authors' code have."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.hub_server import Hub
from helpers.small_runs import call_command

from s3a.training import named_recipes
from s3a.training.named_recipes import RECIPES, find_late_name, get_recipe, parse_recipe
from s3a.training.recipe import ClassificationRecipe


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_name_models_that_exist(name):
    recipe = get_recipe(name)
    assert recipe.run_name == name
    assert timm.is_model(recipe.model)


@pytest.mark.parametrize(("size", "drop_path"), [("tiny", 0.1), ("small", 0.15), ("base", 0.4), ("large", 0.5)])
def test_the_papers_recipe(size, drop_path):
    recipe = get_recipe(f"ssvit_{size}_imagenet")
    written = {
        "drop_path": drop_path,
        "image_size": 224,
        "epochs": 300,
        "warmup_epochs": 5,
        "cooldown_epochs": 10,
        "schedule": "epoch",
        "learning_rate": 5e-4,
        "min_learning_rate": 1e-5,
        "weight_decay": 0.05,
        "label_smoothing": 0.1,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "random_erasing": 0.25,
        "repeats": 3,
        "mixup": 0.8,
        "cutmix": 1.0,
        "crop_pct": 0.875,
    }
    assert {key: getattr(recipe, key) for key in written} == written


# What every training on ImageNet has, and what the fine-tunings at 384 px and on CIFAR-100 change of it.
IMAGENET = {
    "data": "hub",
    "dataset": "ILSVRC/imagenet-1k",
    "image_size": 224,
    "epochs": 300,
    "cooldown_epochs": 10,
    "batch_size": 2048,
    "learning_rate": 5e-4,
    "warmup_epochs": 5,
    "ema_decay": 0.99996,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.4,
    "random_erasing": 0.25,
    "repeats": 3,
    "mixup": 0.8,
    "cutmix": 1.0,
    "precision": "bf16",
    "compile": True,
    "num_workers": 8,
    "checkpoint_every": "15m",
}
AT_384 = {
    "image_size": 384,
    "crop_pct": 1.0,
    "epochs": 30,
    "cooldown_epochs": 0,
    "batch_size": 512,
    "learning_rate": 1e-5,
    "min_learning_rate": 1e-6,
    "warmup_epochs": 0,
    "weight_decay": 1e-8,
    "repeats": 1,
}
DEIT_AT_384 = {
    "image_size": 384,
    "epochs": 30,
    "cooldown_epochs": 0,
    "batch_size": 512,
    "learning_rate": 5e-6,
    "min_learning_rate": 5e-6,
    "weight_decay": 1e-8,
    "drop_path": 0.0,
    "late_drop_path": None,
    "freeze_batch_norm": True,
}
SVIT_AT_384 = {**DEIT_AT_384, "warmup_epochs": 0, "crop_pct": 1.0}
ON_CIFAR = {
    "dataset": "uoft-cs/cifar100",
    "epochs": 1000,
    "cooldown_epochs": 0,
    "batch_size": 768,
    "learning_rate": 5e-6,
    "min_learning_rate": 1e-5,
    "weight_decay": 0.05,
    "drop_path": 0.1,
    "late_drop_path": None,
    "random_erasing": 0.0,
}
SVIT = {"batch_size": 1024, "cooldown_epochs": 0}
VVT = {**SVIT, "ema_decay": None, "clip_grad": 1.0}
TRAININGS = {
    "ssvit_tiny": {"drop_path": 0.1},
    "ssvit_small": {"drop_path": 0.15},
    "ssvit_base": {"drop_path": 0.4},
    "ssvit_large": {"drop_path": 0.5},
    "svit_small": {**SVIT, "drop_path": 0.1},
    "svit_base": {**SVIT, "drop_path": 0.4},
    "svit_large": {**SVIT, "drop_path": 0.4, "late_drop_path": (0.6, 40)},
    "vvt_tiny": {**VVT, "drop_path": 0.1, "clip_grad": None},
    "vvt_small": {**VVT, "drop_path": 0.3},
    "vvt_medium": {**VVT, "drop_path": 0.3},
    "vvt_large": {**VVT, "drop_path": 0.3},
}


@pytest.mark.parametrize("model", TRAININGS)
def test_every_field_of_a_named_recipe_is_as_written_or_the_default(model):
    """A drop path is that of the model's own table of sizes; the figures stand here once more, from the papers."""
    fields = {**IMAGENET, **TRAININGS[model]}
    assert get_recipe(f"{model}_imagenet") == ClassificationRecipe(name=f"{model}_imagenet", model=model, **fields)
    fields["weights"] = f"runs/{model}_imagenet/model"
    finer = {"ssvit": AT_384, "svit": SVIT_AT_384, "vvt": DEIT_AT_384}[model.partition("_")[0]]
    for suffix, changes in (("384", finer), ("cifar100", ON_CIFAR)):
        name = f"{model}_{suffix}"
        assert get_recipe(name) == ClassificationRecipe(name=name, model=model, **fields | changes)


def test_these_are_all_named_recipes():
    small = ["digits", "fashion_mnist", "photos", "photos_finetune"]
    assert list(RECIPES) == small + [f"{model}_{of}" for of in ("imagenet", "384", "cifar100") for model in TRAININGS]


def test_fine_tuning_at_384_keeps_its_learning_rate():
    """DeiT's 5e-6 for its batch of 512, which SViT's script has from the first step on; nothing decays."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    for name, rates in (("svit_base_384", [5e-6] * 30), ("vvt_large_384", [*np.linspace(1e-6, 5e-6, 6), *[5e-6] * 24])):
        recipe = get_recipe(name)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = recipe.peak_learning_rate
        scheduler = recipe.make_scheduler(optimizer, steps_per_epoch=2502)
        assert [scheduler._get_lr(epoch)[0] for epoch in range(recipe.epochs)] == pytest.approx(rates)


PHOTOS = {
    "model": "ssvit_tiny",
    "data": "imagefolder",
    "image_size": 224,
    "epochs": 100,
    "batch_size": 64,
    "accumulate": 4,
    "learning_rate": 4e-3,
    "warmup_epochs": 10,
    "schedule": "step",
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "checkpoint_every": "15m",
}
FINE_TUNING = {
    "epochs": 20,
    "batch_size": 32,
    "accumulate": 2,
    "learning_rate": 1.6e-3,
    "min_learning_rate": 1e-6,
    "warmup_epochs": 1,
    "random_erasing": 0.0,
}


def test_photographs_have_recipes_of_their_own(monkeypatch):
    """The defaults that are not named here mirror images and cut them as DeiT does; workers follow the machine."""
    for cores, workers in ((2, 2), (64, 8)):
        monkeypatch.setattr(named_recipes, "count_own_cores", lambda cores=cores: cores)
        assert get_recipe("photos") == ClassificationRecipe(name="photos", num_workers=workers, **PHOTOS)
        fields = {**PHOTOS, **FINE_TUNING}
        assert get_recipe("photos_finetune") == ClassificationRecipe(
            name="photos_finetune", num_workers=workers, **fields
        )
    assert (get_recipe("photos").horizontal_flip, get_recipe("photos").crop_scale) == (0.5, (0.08, 1.0))


# --------------------------------------------------------------------------------------------------------
# On the command line
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "epochs", "warmup", "cooldown", "late"),
    [
        ("digits", 1, 1 / 18, 0, None),
        ("digits", 9, 0.5, 0, None),
        ("photos", 3, 0.3, 0, None),
        ("ssvit_tiny_imagenet", 1, 1 / 60, 0, None),
        ("ssvit_tiny_imagenet", 29, 29 / 60, 1, None),
        ("ssvit_tiny_imagenet", 60, 1, 2, None),
        ("svit_large_imagenet", 30, 0.5, 0, (0.6, 4)),
        ("svit_large_imagenet", 1, 1 / 60, 0, (0.6, 1)),
        ("ssvit_tiny_imagenet", 600, 5, 10, None),
    ],
)
def test_fewer_epochs_shorten_the_phases_of_a_named_recipe(name, epochs, warmup, cooldown, late):
    """A warm-up of less than an epoch makes the learning rate move with every step; a longer run changes nothing."""
    recipe = parse_recipe(name, [f"--epochs={epochs}"])
    assert recipe.epochs == epochs
    assert recipe.warmup_epochs == pytest.approx(warmup)
    assert (recipe.cooldown_epochs, recipe.late_drop_path) == (cooldown, late)
    assert recipe == dataclasses.replace(
        get_recipe(name),
        epochs=epochs,
        schedule="epoch" if float(warmup).is_integer() else "step",
        warmup_epochs=recipe.warmup_epochs,
        cooldown_epochs=cooldown,
        late_drop_path=late,
    )


def test_phases_that_are_given_stay_and_are_refused_where_they_do_not_fit():
    assert parse_recipe("digits", ["--epochs", "2", "--warmup-epochs", "1.5"]).warmup_epochs == 1.5
    assert parse_recipe("ssvit_tiny_imagenet", ["--epochs", "3", "--cooldown-epochs", "10"]).total_epochs == 13
    with pytest.raises(ValueError, match=r"--warmup-epochs is 1\.5 and --epochs is 1"):  # although digits has it too
        parse_recipe("digits", ["--epochs", "1", "--warmup-epochs", "1.5"])
    assert parse_recipe("photos", ["--epochs", "5", "--schedule", "epoch"]).warmup_epochs == 0, "and not half of one"
    with pytest.raises(ValueError, match=r"--late-drop-path is 0\.6 40: .* of the 3 epochs"):
        parse_recipe("svit_large_imagenet", ["--epochs", "3", "--late-drop-path", "0.6", "40"])


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["--epochs", "3", "photos"], "photos --epochs 3"),
        (["--data", "digits", "digits", "--seed=1"], "digits --data digits --seed=1"),
        (["--data-dir", "my photos", "photo"], "photos --data-dir 'my photos'"),
    ],
)
def test_a_recipe_behind_options_is_shown_in_front_of_them(arguments, command):
    with pytest.raises(ValueError) as refusal:
        parse_recipe("digits", arguments)
    assert find_late_name(arguments, str(refusal.value)) == command


def test_a_value_that_is_a_recipes_name_is_no_recipe():
    assert parse_recipe("digits", ["--data", "digits", "--name", "photos"]).name == "photos"
    with pytest.raises(ValueError, match="Unrecognized options: --dropout, photos") as refusal:
        parse_recipe("digits", ["--dropout", "photos"])
    assert find_late_name(["--dropout", "photos"], str(refusal.value)) is None


def test_fine_tuning_takes_the_model_of_its_weights(tmp_path, hub: Hub):
    """From config.json alone: no weights lie beside it."""
    config = json.dumps({"architecture": "svit_nano", "num_classes": 3, "pretrained_cfg": {}}).encode()
    (tmp_path / "config.json").write_bytes(config)
    hub.publish("lizards/nano", {"config.json": config, "model.safetensors": b""})
    for weights in (str(tmp_path), "lizards/nano"):
        recipe = parse_recipe("photos_finetune", ["--weights", weights])
        assert (recipe.model, recipe.weights) == ("svit_nano", weights)
    given = parse_recipe("photos_finetune", ["--weights", str(tmp_path), "--model", "ssvit_tiny"])
    assert given.model == "ssvit_tiny", "what does not fit is refused when the weights are loaded"
    with pytest.raises(FileNotFoundError, match=r"'.*empty' has no config\.json"):
        (tmp_path / "empty").mkdir()
        parse_recipe("photos_finetune", ["--weights", str(tmp_path / "empty")])


def test_fine_tuning_without_weights_says_where_they_come_from():
    with pytest.raises(ValueError, match=r"needs --weights .*tools/convert_official\.py .*ORG/NAME on the Hub"):
        parse_recipe("photos_finetune", ["--data-dir", "photos"])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "digits"),
        ({"data": "imagefolder", "data_dir": Path("/home/me/flowers/data")}, "flowers-data"),
        ({"data": "parquet", "data_dir": Path("/data")}, "data"),
        ({"data": "hub", "dataset": "uoft-cs/cifar10:plain_text"}, "uoft-cs-cifar10-plain_text"),
        ({"data": "fashion-mnist", "data_dir": Path("/mnt/files")}, "fashion-mnist"),
    ],
)
def test_a_run_without_a_name_is_called_after_its_images(changes, name):
    recipe = dataclasses.replace(get_recipe("digits"), **changes)
    assert (recipe.run_name, recipe.folder) == (name, Path("runs") / name)
    assert dataclasses.replace(get_recipe("photos"), **changes).folder == Path("runs/photos")


# As the papers and their authors' code have them.
NEIGHBORS = {
    "svit_small": (0.1, None, None),
    "svit_base": (0.4, None, None),
    "svit_large": (0.4, (0.6, 40), None),
    "vvt_tiny": (0.1, None, None),
    "vvt_small": (0.3, None, 1.0),
    "vvt_medium": (0.3, None, 1.0),
    "vvt_large": (0.3, None, 1.0),
}


@pytest.mark.parametrize("model", NEIGHBORS)
def test_recipes_of_the_neighbors_are_deits_with_their_own_drop_path_and_clipping(model):
    recipe = get_recipe(f"{model}_imagenet")
    assert (recipe.drop_path, recipe.late_drop_path, recipe.clip_grad) == NEIGHBORS[model]
    assert (recipe.total_epochs, recipe.warmup_epochs, recipe.batch_size, recipe.peak_learning_rate) == (
        300,
        5,
        1024,
        1e-3,
    )
    assert [recipe.drop_path_at(epoch) for epoch in (0, 259)] == 2 * [recipe.drop_path]
    assert [recipe.drop_path_at(epoch) for epoch in (260, 299)] == 2 * [
        0.6 if model == "svit_large" else recipe.drop_path
    ]


def test_another_source_takes_the_place_of_the_recipes(tmp_path, capsys):
    def printed(*options: str) -> dict:
        call_command("train.py", *options, "--print-recipe")
        return json.loads(capsys.readouterr().out)

    hub = printed("ssvit_tiny_imagenet")
    assert (hub["data"], hub["dataset"]) == ("hub", "ILSVRC/imagenet-1k")
    assert hub == json.loads(get_recipe("ssvit_tiny_imagenet").to_json())
    folder = printed("ssvit_tiny_imagenet", "--data", "imagefolder", "--data-dir", str(tmp_path))
    assert folder == {**hub, "data": "imagefolder", "dataset": None, "data_dir": str(tmp_path)}
    kept = printed("ssvit_tiny_imagenet", "--data", "imagefolder", "--data-dir", "x", "--dataset", "me/mine")
    assert kept["dataset"] == "me/mine", "what a user asks for is refused, not dropped"
