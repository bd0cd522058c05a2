"""The recipes that have a name: small sets, one's own photographs, and the papers' trainings on ImageNet and CIFAR-100.

Those of the dense tasks are in `dense_recipes`; every table of names is here.
"""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Generic

from s3a.models import ssvit, svit, vvt
from s3a.support.command_line import parse_known_options, parse_options
from s3a.support.errors import make_unknown_error
from s3a.training.dense_recipes import DETECTION_RECIPES, SEGMENTATION_RECIPES
from s3a.training.processes import count_own_cores
from s3a.training.recipe import ClassificationRecipe, Given, Recipe, RecipeT
from s3a.weights.pretrained import read_model_name

SIZES = {**ssvit.SIZES, **svit.SIZES, **vvt.SIZES}


def digits() -> ClassificationRecipe:
    """scikit-learn's 1,797 handwritten digits, of 8 x 8 pixels, at 48 px: at least 99 % top-1 in 18 epochs."""
    return ClassificationRecipe(
        model="ssvit_nano",
        data="digits",
        image_size=48,
        epochs=18,
        batch_size=64,
        learning_rate=1.6e-2,
        warmup_epochs=1,
        schedule="step",
        drop_path=0.1,
        crop_scale=(0.8, 1.0),
        crop_ratio=(0.9, 1.1),
        horizontal_flip=0.0,
        crop_pct=1.0,
    )


def fashion_mnist() -> ClassificationRecipe:
    """Fashion-MNIST's 60,000 pictures of clothes, of 28 x 28 pixels, at 32 px: above 91 % top-1 in 8 epochs.

    The learning rate is that of the digits. Unlike digits, clothes may be mirrored. Batches are of 128 images: with 256
    two epochs more are needed (LOG.md). On one thread, which gives the same bytes for any number of cores.
    """
    return ClassificationRecipe(
        name="fashion_mnist",
        model="ssvit_nano",
        data="fashion-mnist",
        image_size=32,
        epochs=8,
        batch_size=128,
        learning_rate=1.6e-2,
        warmup_epochs=0.5,
        schedule="step",
        drop_path=0.0,
        crop_scale=(0.8, 1.0),
        crop_ratio=(0.9, 1.1),
        crop_pct=1.0,
        cpu_threads=1,
    )


def photos() -> ClassificationRecipe:
    """One's own photographs, some thousand in a few classes, from scratch: `ssvit_tiny` at 224 px.

    Crops, mirroring, RandAugment, random erasing and label smoothing are DeiT's (arXiv 2012.12877). The rest is fitted
    to the small set:

    - 100 epochs of whole batches of 64: 4,600 steps for 3,000 images. DeiT's batch of 1024 would leave two an epoch.
    - The peak learning rate is 5e-4. DeiT's 1e-3 for 1024 images gives 2.5e-4 for 64 by the square root that AdamW is
      usually scaled by; from scratch in few steps twice that is common.
    - A tenth of the run is warm-up, in steps, since an epoch has few.
    - No mixup, cutmix or repeats, which want longer runs, and no average of the weights: DeiT's remembers 25,000 steps
      of its batch, more than there are.
    - A step is cut into forwards of 16 images, 2.6 GB of activations in float32.
    """
    return ClassificationRecipe(
        name="photos",
        model="ssvit_tiny",
        data="imagefolder",
        image_size=224,
        epochs=100,
        batch_size=64,
        accumulate=4,
        learning_rate=4e-3,
        warmup_epochs=10,
        schedule="step",
        auto_augment="rand-m9-mstd0.5-inc1",
        random_erasing=0.25,
        num_workers=min(8, count_own_cores()),
        checkpoint_every="15m",
    )


def photos_finetune() -> ClassificationRecipe:
    """`photos` from weights that have seen more images, with a new head: 20 epochs at a fifth of the learning rate.

    That is timm's practice for AdamW on small sets: 1e-4 for 32 images, little enough to keep what the weights know
    and enough for the head to learn. Nothing is erased, since the run is too short to need it. Without --model the
    model is that of the weights.
    """
    return replace(
        photos(),
        name="photos_finetune",
        epochs=20,
        batch_size=32,
        accumulate=2,
        learning_rate=1.6e-3,
        min_learning_rate=1e-6,
        warmup_epochs=1,
        random_erasing=0.0,
    )


def imagenet(model: str) -> ClassificationRecipe:
    """SSViT's training on ImageNet-1k at 224 px: DeiT's recipe (arXiv 2012.12877), 300 epochs and 10 of cooldown.

    The stochastic depth is what the model's paper trains its size with.
    """
    return ClassificationRecipe(
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


def svit_imagenet(model: str) -> ClassificationRecipe:
    """`imagenet` as the authors of SViT ran it: DeiT's batch, no cooldown, and for the large size a late drop path."""
    late = (0.6, 40) if model == "svit_large" else None
    return replace(imagenet(model), batch_size=1024, cooldown_epochs=0, late_drop_path=late)


def vvt_imagenet(model: str) -> ClassificationRecipe:
    """`imagenet` as the authors of VVT ran it: DeiT's batch, no cooldown, no average; the tiny size does not clip."""
    clip = None if model == "vvt_tiny" else 1.0
    return replace(imagenet(model), batch_size=1024, cooldown_epochs=0, ema_decay=None, clip_grad=clip)


def ssvit_384(model: str) -> ClassificationRecipe:
    """Fine-tuning at 384 px, 30 epochs, from the weights of the 224 px run.

    SSViT's paper has no result at this size and no settings. Epochs and batch are DeiT's; the learning rate, the weight
    decay, and an epoch without repeated augmentation are Swin's (arXiv 2103.14030). Evaluation sees whole images.
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


def deit_384(train: Callable[[str], ClassificationRecipe], model: str) -> ClassificationRecipe:
    """Fine-tuning at 384 px, from the weights of the run at 224 px, as DeiT does it (facebookresearch/deit).

    - 30 epochs of 512 images a step, a learning rate of 5e-6 that stays, and weight decay of 1e-8: so DeiT's README.
    - No drop path, and BatchNorm's statistics as they are, since the code keeps the model in evaluation mode while it
      fine-tunes, whatever its options say.
    - All else is the default of its options, as in the training: five epochs of warm-up, the augmentation, and a centre
      crop of 87.5 % for evaluation.

    VVT's authors give no settings for their results at 384 px. Their code (OpenNLPLab/Vicinity-Vision-Transformer) is
    DeiT's, with its way to fine-tune, so DeiT's settings stand in for them. The clipping is that of each size's
    configuration, which holds for every run of theirs.

    Args:
        train: the family's recipe for ImageNet.
        model: its name.
    """
    return replace(
        train(model),
        name=f"{model}_384",
        weights=f"runs/{model}_imagenet/model",
        image_size=384,
        epochs=30,
        batch_size=512,
        learning_rate=5e-6,
        min_learning_rate=5e-6,
        weight_decay=1e-8,
        drop_path=0.0,
        late_drop_path=None,
        freeze_batch_norm=True,
    )


def svit_384(model: str) -> ClassificationRecipe:
    """`deit_384` as SViT's authors ran it: without warm-up, and evaluated on whole images (README of hhb072/STViT).

    Its README has a command for each size, of 30 epochs; its `finetune.sh`, for one size, has 50. Their drop paths have
    no effect, since its code, too, fine-tunes in evaluation mode. Its code resizes images above 224 px to the network's
    size, and cuts nothing off.
    """
    return replace(deit_384(svit_imagenet, model), warmup_epochs=0, crop_pct=1.0)


def cifar100(train: Callable[[str], ClassificationRecipe], model: str) -> ClassificationRecipe:
    """Fine-tuning on CIFAR-100 at 224 px, from the weights of the run on ImageNet.

    VVT's paper has results on CIFAR-100 and no settings; SViT's and SSViT's have neither. These are the settings with
    AdamW that DeiT's first author gives for CIFAR-100 (facebookresearch/deit, number 117; facebookresearch/dino,
    number 144), the same for all three families:

    - 1000 epochs of 768 images a step, weight decay of 0.05, label smoothing, repeated augmentation, RandAugment, mixup
      and cutmix as on ImageNet, drop path of 0.1.
    - A learning rate of 5e-6 for 512 images, so 7.5e-6 for a step, after five epochs of warm-up. The cosine ends at
      DeiT's default of 1e-5, as it does there: the learning rate rises a little.
    - Nothing is erased (facebookresearch/deit, number 45). The evaluation crop is that of 224 px on ImageNet.

    The average of the weights and the clipping of gradients are those of the family's training. DeiT's paper (arXiv
    2012.12877) transfers with SGD, which these recipes do not have: a learning rate of 0.01 and weight decay of 1e-4,
    with as many epochs and images a step.

    Args:
        train: the family's recipe for ImageNet.
        model: its name.
    """
    return replace(
        train(model),
        name=f"{model}_cifar100",
        weights=f"runs/{model}_imagenet/model",
        dataset="uoft-cs/cifar100",
        epochs=1000,
        cooldown_epochs=0,
        batch_size=768,
        learning_rate=5e-6,
        drop_path=0.1,
        late_drop_path=None,
        random_erasing=0.0,
    )


SSVIT = ("ssvit_tiny", "ssvit_small", "ssvit_base", "ssvit_large")
SVIT = ("svit_small", "svit_base", "svit_large")
VVT = ("vvt_tiny", "vvt_small", "vvt_medium", "vvt_large")

RECIPES: dict[str, Callable[[], ClassificationRecipe]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "photos": photos,
    "photos_finetune": photos_finetune,
    **{f"{model}_imagenet": partial(imagenet, model) for model in SSVIT},
    **{f"{model}_imagenet": partial(svit_imagenet, model) for model in SVIT},
    **{f"{model}_imagenet": partial(vvt_imagenet, model) for model in VVT},
    **{f"{model}_384": partial(ssvit_384, model) for model in SSVIT},
    **{f"{model}_384": partial(svit_384, model) for model in SVIT},
    **{f"{model}_384": partial(deit_384, vvt_imagenet, model) for model in VVT},
    **{f"{model}_cifar100": partial(cifar100, imagenet, model) for model in SSVIT},
    **{f"{model}_cifar100": partial(cifar100, svit_imagenet, model) for model in SVIT},
    **{f"{model}_cifar100": partial(cifar100, vvt_imagenet, model) for model in VVT},
}


TABLES: dict[str, Mapping[str, Callable[[], Recipe]]] = {
    "train": RECIPES,
    "segment": SEGMENTATION_RECIPES,
    "detect": DETECTION_RECIPES,
}
"""The recipes of each command."""


def get_recipe(name: str, recipes: Mapping[str, Callable[[], RecipeT]] = RECIPES) -> RecipeT:  # type: ignore[assignment]
    """The recipe of that name; ValueError with the nearest one, or with its command, if the table has none."""
    if name in recipes:
        return recipes[name]()
    for command, table in TABLES.items():
        if name in table:
            raise ValueError(f"{name} is a recipe of another command: use recipes/{command}.py {name}")
    raise make_unknown_error("recipe", name, recipes)


# --------------------------------------------------------------------------------------------------------
# On the command line
# --------------------------------------------------------------------------------------------------------

FINE_TUNING = ("photos_finetune",)  # those without a model of their own
HINTS = {
    "--device": "Accelerate chooses the device: ACCELERATE_USE_CPU=true takes the CPU, CUDA_VISIBLE_DEVICES=0 one GPU",
    "--resume": "the same command goes on with a run by itself",
}


def parse_recipe(
    name: str,
    arguments: Sequence[str],
    description: str | None = None,
    recipes: Mapping[str, Callable[[], RecipeT]] = RECIPES,  # type: ignore[assignment]
) -> RecipeT:
    """The named recipe with the options of a command line. A recipe for fine-tuning takes the model of its weights.

    Args:
        description: what --help says first.
        recipes: the table that has it.

    Raises:
        ValueError, FileNotFoundError: for an unknown recipe, wrong options, and weights that are missing.
    """
    named = get_recipe(name, recipes)
    recipe = apply_options(named, arguments, description)
    if name in FINE_TUNING:
        recipe = take_model_of_weights(recipe, arguments)
    return forget_other_source(recipe, named)


def apply_options(named: RecipeT, arguments: Sequence[str], description: str | None = None) -> RecipeT:
    """The recipe with these options, adapted to those that decide others."""
    default = named.adapt(find_given(named, arguments))
    return parse_options(type(named), arguments, default=default, description=description, hints=HINTS)


def find_given(named: Recipe, arguments: Sequence[str]) -> Given:
    """Those options among the arguments, or what the recipe has."""
    return parse_known_options(Given, arguments, default=Given(epochs=named.epochs))


def find_late_name(
    arguments: Sequence[str], message: str, recipes: Mapping[str, Callable[[], Recipe]] = RECIPES
) -> str | None:
    """The arguments with the recipe first whose name stands behind options, as in `--epochs 3 photos`; None if none is.

    Args:
        message: why the arguments are refused.
        recipes: the table with the names.
    """
    for index, word in enumerate(arguments):
        near = get_close_matches(word, recipes, n=1, cutoff=0.8)
        others = [*arguments[:index], *arguments[index + 1 :]]
        if near and word in message:
            with suppress(ValueError):  # then there is more that is wrong, and another message
                apply_options(get_recipe(near[0], recipes), others)
                return shlex.join([near[0], *others])
    return None


def take_model_of_weights(recipe: RecipeT, arguments: Sequence[str]) -> RecipeT:
    """The recipe for fine-tuning with the model of its weights, if none is given; ValueError without weights."""
    if recipe.weights is None:
        raise ValueError(
            f"{recipe.name} needs --weights FOLDER_OR_REPO to start from: the folder of a run such as "
            "runs/ssvit_tiny_imagenet/model, one that tools/convert_official.py wrote from an official checkpoint, or "
            "ORG/NAME on the Hub; without any, the recipe photos trains from scratch"
        )
    if find_given(recipe, arguments).model is not None:
        return recipe
    return replace(recipe, model=read_model_name(recipe.weights))


def forget_other_source(recipe: RecipeT, named: Recipe) -> RecipeT:
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


@dataclass(frozen=True, kw_only=True)
class Command(Generic[RecipeT]):
    """A command that trains recipes: recipes/NAME.py.

    Attributes:
        name: of its file.
        purpose: what it does, in the words of its help.
        recipes: those that it trains, by name.
        default: the one that it trains without arguments.
    """

    name: str
    purpose: str
    recipes: Mapping[str, Callable[[], RecipeT]]
    default: str

    def run(self, train: Callable[[RecipeT, bool], object]) -> None:
        """Calls `train` with what `parse` makes of the command line; with --print-recipe it prints the recipe."""
        arguments = [argument for argument in sys.argv[1:] if argument != "--print-recipe"]
        recipe, named = self.parse(arguments)
        if "--print-recipe" in sys.argv:
            print(recipe.to_json(), end="")
        else:
            train(recipe, named)

    def parse(self, arguments: Sequence[str]) -> tuple[RecipeT, bool]:
        """The recipe of a command line, and whether the line names one.

        Raises:
            ValueError: for wrong options, and for a name that stands behind options; see `parse_recipe`.
        """
        named = bool(arguments) and not arguments[0].startswith("-")
        name, options = (arguments[0], arguments[1:]) if named else (self.default, arguments)
        script = f"recipes/{self.name}.py"
        help_text = (
            f"{self.purpose}: {script} [RECIPE] [--print-recipe] [--option value ...]. The recipe comes first, and is "
            f"one of {', '.join(self.recipes)}; without one it is {self.default}. --print-recipe shows what would run, "
            "and trains nothing."
        )
        try:
            return parse_recipe(name, options, help_text, self.recipes), named
        except ValueError as error:
            in_order = find_late_name(options, str(error), self.recipes)
            if in_order is None:
                raise
            raise ValueError(f"the name of a recipe comes before its options: {script} {in_order}") from None
