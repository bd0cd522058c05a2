"""The recipes that have a name: the digits, and the papers' trainings on ImageNet."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from s3a.support.errors import unknown
from s3a.training.recipe import Recipe


def digits() -> Recipe:
    """scikit-learn's 1,797 handwritten digits at 64 px: 99 % top-1 in about two minutes on two CPU cores."""
    return Recipe(
        model="ssvit_nano",
        data="digits",
        image_size=64,
        epochs=28,
        batch_size=64,
        learning_rate=1.6e-2,
        warmup_epochs=1.5,
        schedule="step",
        drop_path=0.1,
        crop_scale=(0.8, 1.0),
        crop_ratio=(0.9, 1.1),
        horizontal_flip=0.0,
        crop_pct=1.0,
    )


def imagenet(model: str, **changes: Any) -> Recipe:
    """The paper's training on ImageNet-1k at 224 px: DeiT's recipe (arXiv 2012.12877), 300 epochs and 10 of cooldown.

    Args:
        changes: fields that differ, drop_path among them: the size's own.
    """
    fields = {
        "name": f"{model}_imagenet",
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
    return Recipe(model=model, **{**fields, **changes})


def imagenet_384(model: str, **changes: Any) -> Recipe:
    """Fine-tuning at 384 px, 30 epochs, from the weights of the 224 px run; no published recipe exists.

    Settings are DeiT's and Swin's for a higher resolution: a small learning rate, little weight decay, no
    repeated augmentation, a full-size evaluation crop.
    """
    fields = {
        "name": f"{model}_384",
        "weights": f"runs/{model}_imagenet/model",
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
    return imagenet(model, **{**fields, **changes})


# DeiT's recipe as the authors of SViT and VVT ran it: DeiT's batch, and no cooldown.
DEIT = {"batch_size": 1024, "cooldown_epochs": 0}
VVT = {**DEIT, "drop_path": 0.3, "clip_grad": 1.0, "ema_decay": None}

# What each model's own paper or code changes of `imagenet`: drop path above all.
IMAGENET: dict[str, dict[str, Any]] = {
    "ssvit_tiny": {"drop_path": 0.1},
    "ssvit_small": {"drop_path": 0.15},
    "ssvit_base": {"drop_path": 0.4},
    "ssvit_large": {"drop_path": 0.5},
    "svit_small": {**DEIT, "drop_path": 0.1},
    "svit_base": {**DEIT, "drop_path": 0.4},
    "svit_large": {**DEIT, "drop_path": 0.4, "late_drop_path": (0.6, 40)},
    "vvt_tiny": {**VVT, "drop_path": 0.1, "clip_grad": None},
    "vvt_small": VVT,
    "vvt_medium": VVT,
    "vvt_large": VVT,
}

RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits": digits,
    **{f"{model}_imagenet": partial(imagenet, model, **changes) for model, changes in IMAGENET.items()},
    **{
        f"{model}_384": partial(imagenet_384, model, **changes)
        for model, changes in IMAGENET.items()
        if model.startswith("ssvit_")
    },
}


def without_other_source(recipe: Recipe, named: Recipe) -> Recipe:
    """The recipe, without what tells where `named` has its images from where it takes them from another source."""
    if recipe.data == named.data:
        return recipe
    blank = {"dataset": None, "data_dir": None, "streaming": False}
    return dataclasses.replace(
        recipe, **{field: value for field, value in blank.items() if getattr(recipe, field) == getattr(named, field)}
    )


def named_recipe(name: str) -> Recipe:
    """The recipe of that name; ValueError with the nearest one if there is none."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()
