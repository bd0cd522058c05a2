"""The recipes that have a name: the digits, and the papers' trainings on ImageNet."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from s3a.models import ssvit, svit, vvt
from s3a.support.errors import make_unknown_error
from s3a.training.recipe import Recipe

SIZES = {**ssvit.SIZES, **svit.SIZES, **vvt.SIZES}


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


def imagenet(model: str) -> Recipe:
    """SSViT's training on ImageNet-1k at 224 px: DeiT's recipe (arXiv 2012.12877), 300 epochs and 10 of cooldown.

    The stochastic depth is what the model's paper trains its size with.
    """
    return Recipe(
        name=f"{model}_imagenet",
        model=model,
        data="hub",
        dataset="ILSVRC/imagenet-1k",
        image_size=224,
        epochs=300,
        cooldown_epochs=10,
        batch_size=2048,
        learning_rate=5e-4,
        warmup_epochs=5,
        drop_path=SIZES[model]["drop_path_rate"],
        ema_decay=0.99996,
        auto_augment="rand-m9-mstd0.5-inc1",
        color_jitter=0.4,
        random_erasing=0.25,
        repeats=3,
        mixup=0.8,
        cutmix=1.0,
        precision="bf16",
        compile=True,
        num_workers=8,
        checkpoint_every="15m",
    )


def imagenet_384(model: str) -> Recipe:
    """Fine-tuning at 384 px, 30 epochs, from the weights of the 224 px run; no published recipe exists.

    Settings are DeiT's and Swin's for a higher resolution: a small learning rate, little weight decay, no
    repeated augmentation, a full-size evaluation crop.
    """
    return replace(
        imagenet(model),
        name=f"{model}_384",
        weights=f"runs/{model}_imagenet/model",
        image_size=384,
        crop_pct=1.0,
        epochs=30,
        cooldown_epochs=0,
        batch_size=512,
        learning_rate=1e-5,
        min_learning_rate=1e-6,
        warmup_epochs=0,
        weight_decay=1e-8,
        repeats=1,
    )


def svit_imagenet(model: str) -> Recipe:
    """`imagenet` as the authors of SViT ran it: DeiT's batch, no cooldown, and for the large size a late drop path."""
    late = (0.6, 40) if model == "svit_large" else None
    return replace(imagenet(model), batch_size=1024, cooldown_epochs=0, late_drop_path=late)


def vvt_imagenet(model: str) -> Recipe:
    """`imagenet` as the authors of VVT ran it: DeiT's batch, no cooldown, no average; the tiny size does not clip."""
    clip = None if model == "vvt_tiny" else 1.0
    return replace(imagenet(model), batch_size=1024, cooldown_epochs=0, ema_decay=None, clip_grad=clip)


SSVIT = ("ssvit_tiny", "ssvit_small", "ssvit_base", "ssvit_large")
SVIT = ("svit_small", "svit_base", "svit_large")
VVT = ("vvt_tiny", "vvt_small", "vvt_medium", "vvt_large")

RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits": digits,
    **{f"{model}_imagenet": partial(imagenet, model) for model in SSVIT},
    **{f"{model}_imagenet": partial(svit_imagenet, model) for model in SVIT},
    **{f"{model}_imagenet": partial(vvt_imagenet, model) for model in VVT},
    **{f"{model}_384": partial(imagenet_384, model) for model in SSVIT},
}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name; ValueError with the nearest one if there is none."""
    if name not in RECIPES:
        raise make_unknown_error("recipe", name, RECIPES)
    return RECIPES[name]()


def forget_other_source(recipe: Recipe, named: Recipe) -> Recipe:
    """The recipe, without the named recipe's data options where a user has changed its source of images.

    `ssvit_tiny_imagenet --data imagefolder --data-dir DIR` has no dataset of the Hub any more, although its named
    recipe has one; a dataset that the user gave stays, for `load_data` to refuse.
    """
    if recipe.data == named.data:
        return recipe
    return replace(
        recipe,
        data_dir=None if recipe.data_dir == named.data_dir else recipe.data_dir,
        dataset=None if recipe.dataset == named.dataset else recipe.dataset,
        streaming=False if recipe.streaming == named.streaming else recipe.streaming,
    )
