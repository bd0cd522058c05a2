"""timm's augmentation of training images, as a recipe has it."""

from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform

from s3a.training.recipe import Recipe


def train_transform(recipe: Recipe, data_config: dict[str, Any]) -> Any:
    """timm's augmentation as the recipe has it.

    Args:
        data_config: timm's preprocessing keys: input_size, interpolation, mean, std.

    Raises:
        ValueError: for a policy that timm does not know.
    """
    try:
        return create_transform(
            input_size=data_config["input_size"],
            is_training=True,
            scale=recipe.crop_scale,
            ratio=recipe.crop_ratio,
            hflip=recipe.horizontal_flip,
            color_jitter=recipe.color_jitter,
            auto_augment=recipe.auto_augment,
            re_prob=recipe.random_erasing,
            re_mode="pixel",
            interpolation=data_config["interpolation"],
            mean=data_config["mean"],
            std=data_config["std"],
        )
    except AssertionError as error:
        raise ValueError(
            f"--auto-augment is {recipe.auto_augment!r}: it must be a policy of timm's, such as rand-m9-mstd0.5-inc1"
        ) from error


def posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's, and black where no bits are kept: so was it when the recipes were written, and Pillow now refuses it."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)


auto_augment.NAME_TO_OP |= dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), posterize)
