"""The model of a recipe, made by timm's factory: with fresh weights, or with those to fine-tune."""

from collections.abc import Callable
from typing import Any, Protocol, cast, get_args

import timm
from timm.models import get_pretrained_cfg
from torch import nn

from s3a.analysis.cost import Cost, count_cost
from s3a.models.backbone import Backbone
from s3a.models.dense import DenseModel
from s3a.nn.s3a import S3A
from s3a.quantization.schemes import check_float
from s3a.training.dense_recipe import DenseRecipe, DetectionHead, SegmentationHead
from s3a.training.recipe import ClassificationRecipe, Recipe
from s3a.weights.pretrained import load_pretrained, read_model_name


class TimmModel(Protocol):
    """What every model of timm's registry has beyond a module of torch."""

    pretrained_cfg: dict[str, Any]
    num_classes: int

    def get_classifier(self) -> nn.Module:
        """The head."""

    def reset_classifier(self, num_classes: int) -> None:
        """Gives the model a new head."""

    def set_grad_checkpointing(self) -> None:
        """Trades a second forward of every block for its activations."""


DENSE_MODELS = (*get_args(SegmentationHead), *get_args(DetectionHead))
NOT_TAKEN = {
    "drop_path_rate": "--model {model} has no drop path: use --drop-path None",
    "scan": "--model {model} has no sparse scans: leave --scan out, or use an SSViT",
    "size": "--model {model} has no sparse scans to give a size: leave --size out, or use an SSViT",
    "backend": "--model {model} has no sparse scans to run by a backend: leave --backend out, or use an SSViT",
}


def build_model(recipe: ClassificationRecipe, num_outputs: int) -> nn.Module:
    """The recipe's model with fresh weights and so many outputs; or with those to fine-tune, which have their own head.

    Raises:
        ValueError, FileNotFoundError: for weights that cannot be loaded or are another model's, and for arguments that
            the model does not take.
    """
    given = list_backbone_args(recipe)
    if recipe.weights is not None:
        check_architecture(recipe, recipe.weights)
        model = call_factory(recipe, lambda: load_pretrained(str(recipe.weights), **given))
        check_float(model)
    else:
        config = get_pretrained_cfg(recipe.model)
        if config is not None and config.fixed_input_size:
            given["img_size"] = recipe.image_size
        model = call_factory(recipe, lambda: timm.create_model(recipe.model, num_classes=num_outputs, **given))
    check_arguments(recipe, model)
    if recipe.grad_checkpointing:
        cast(TimmModel, model).set_grad_checkpointing()
    return model


def build_dense_model(recipe: DenseRecipe, num_classes: int, say: Callable[[str], object]) -> DenseModel:
    """The recipe's backbone, with fresh weights or those of a classification model, under a new head.

    Args:
        say: is given a line about what was taken of the weights.

    Raises:
        ValueError, FileNotFoundError: see `build_model`.
    """
    model = call_factory(
        recipe,
        lambda: timm.create_model(
            recipe.head,
            num_classes=num_classes,
            backbone=recipe.model,
            backbone_args=list_backbone_args(recipe),
            **recipe.head_args,
        ),
    )
    assert isinstance(model, DenseModel)
    check_arguments(recipe, model)
    if recipe.weights is not None:
        check_architecture(recipe, recipe.weights)
        classifier = load_pretrained(recipe.weights)
        check_float(classifier)
        taken = model.take_weights(classifier)
        left = ", ".join(sorted({key.partition(".")[0] for key in taken.left})) or "nothing"
        new = ", ".join(sorted({key.partition(".")[0] for key in taken.new}))
        say(f"{len(taken.taken)} tensors of {recipe.weights} are taken into the backbone; left: {left}; new: {new}")
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def list_backbone_args(recipe: Recipe) -> dict[str, Any]:
    """The arguments of the recipe for its model, as far as they are given."""
    given = {field: getattr(recipe, field) for field in ("scan", "size", "backend")}
    return {name: value for name, value in {"drop_path_rate": recipe.drop_path, **given}.items() if value is not None}


def call_factory(recipe: Recipe, make: Callable[[], nn.Module]) -> nn.Module:
    """A model that timm makes; ValueError for an argument of the recipe that the model does not take."""
    try:
        return make()
    except TypeError as error:
        refused = next((name for name in NOT_TAKEN if f"'{name}'" in str(error)), None)
        if refused not in list_backbone_args(recipe):
            raise
        raise ValueError(NOT_TAKEN[refused].format(model=recipe.model)) from error


def check_architecture(recipe: Recipe, weights: str) -> None:
    """Raises ValueError for weights of another model than the recipe's, before anything is built of them."""
    name = read_model_name(weights)
    if name != recipe.model:
        advice = "give those of a classification model" if name in DENSE_MODELS else f"use --model {name}"
        raise ValueError(f"--weights {weights} holds a {name}: {advice}, or other weights")


def check_arguments(recipe: Recipe, model: nn.Module) -> None:
    """Raises ValueError for fields that this model leaves unheeded, as some of timm's do with arguments."""
    for field in ("scan", "size"):
        if getattr(recipe, field) is not None and not any(isinstance(module, S3A) for module in model.modules()):
            raise ValueError(NOT_TAKEN[field].format(model=recipe.model))
    if (
        isinstance(recipe, ClassificationRecipe)
        and recipe.late_drop_path is not None
        and not isinstance(model, Backbone)
    ):
        raise ValueError(f"--model {recipe.model} cannot change its drop path: use --late-drop-path None")


def count_image_cost(model: nn.Module, height: int, width: int) -> Cost:
    """The cost of an image of that size; ValueError where the model does not take so many pixels."""
    try:
        return count_cost(model, height, width)
    except ValueError as error:
        size = height if height == width else f"{height} {width}"
        raise ValueError(f"--image-size is {size}: {error}") from error
