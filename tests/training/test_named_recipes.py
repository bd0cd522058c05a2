"""The recipes that have a name, against what the papers and their authors' code have."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import timm

from s3a.training.named_recipes import RECIPES, get_recipe
from s3a.training.recipe import Recipe


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


# What every training on ImageNet has, and what the fine-tunings at 384 px change of it.
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
    assert get_recipe(f"{model}_imagenet") == Recipe(name=f"{model}_imagenet", model=model, **fields)
    if model.startswith("ssvit"):
        fields |= {**AT_384, "weights": f"runs/{model}_imagenet/model"}
        assert get_recipe(f"{model}_384") == Recipe(name=f"{model}_384", model=model, **fields)


def test_these_are_all_named_recipes():
    sizes = [f"{model}_imagenet" for model in TRAININGS]
    finer = [f"{model}_384" for model in TRAININGS if model.startswith("ssvit")]
    assert list(RECIPES) == ["digits", *sizes, *finer]


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


def test_another_source_takes_the_place_of_the_recipes(tmp_path, monkeypatch, capsys):
    def printed(*options: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["train.py", *options, "--print-recipe"])
        runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "train.py"), run_name="__main__")
        return json.loads(capsys.readouterr().out)

    hub = printed("ssvit_tiny_imagenet")
    assert (hub["data"], hub["dataset"]) == ("hub", "ILSVRC/imagenet-1k")
    assert hub == json.loads(get_recipe("ssvit_tiny_imagenet").to_json())
    folder = printed("ssvit_tiny_imagenet", "--data", "imagefolder", "--data-dir", str(tmp_path))
    assert folder == {**hub, "data": "imagefolder", "dataset": None, "data_dir": str(tmp_path)}
    kept = printed("ssvit_tiny_imagenet", "--data", "imagefolder", "--data-dir", "x", "--dataset", "me/mine")
    assert kept["dataset"] == "me/mine", "what a user asks for is refused, not dropped"
