"""The recipes that have a name, against what the papers and their authors' code have."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import timm

from s3a.training.named_recipes import RECIPES, get_recipe


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
