"""The published figures are those of the models that are built here."""

import pytest
import timm
import torch
from helpers.own_models import list_classifiers

from s3a.published import PUBLISHED
from s3a.training.named_recipes import RECIPES


def test_every_published_model_is_in_the_table():
    """And no other: the nano sizes are in no paper."""
    assert PUBLISHED.keys() == {name for name in list_classifiers() if not name.endswith("_nano")}
    assert all(224 in published.top1 for published in PUBLISHED.values())


@pytest.mark.parametrize(("model", "side"), [(name, side) for name in PUBLISHED for side in PUBLISHED[name].top1])
def test_every_published_top1_has_a_recipe(model: str, side: int):
    """Of that model, for images of that side: fine-tuning where it is not that of the training from scratch."""
    recipe = RECIPES[f"{model}_imagenet" if side == 224 else f"{model}_{side}"]()
    assert (recipe.model, recipe.image_size, recipe.dataset) == (model, side, "ILSVRC/imagenet-1k")
    assert recipe.weights == (None if side == 224 else f"runs/{model}_imagenet/model")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name: str):
    """To the unit."""
    with torch.device("meta"):
        model = timm.create_model(name)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == PUBLISHED[name].parameters
