"""Small sets in the shape of ImageNet's, and a model of its 1,000 classes that tells their images apart."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn

import s3a  # noqa: F401  registers the models

WORDNET_IDS = ImageNetInfo().label_names()


def write_image(path: Path, seed: int, side: int = 72) -> Path:
    """An image of coarse noise, of its own for each seed, which JPEG changes little."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((side + 8, side), Image.Resampling.BILINEAR).save(path, quality=95)
    return path


def write_classes(folder: Path, names: Iterable[str], per_class: int = 2, seed: int = 0) -> list[Path]:
    """So many images in a folder for each class of these names; their paths, in order."""
    return [
        write_image(folder / name / f"{name}_{index}.jpg", seed + 1000 * row + index)
        for row, name in enumerate(names)
        for index in range(per_class)
    ]


def make_classifier(name: str = "ssvit_nano") -> nn.Module:
    """A model with random weights whose predictions differ from image to image: its head has no common answer."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000).eval()
    with torch.inference_mode():
        noise = torch.nn.functional.interpolate(torch.randn(64, 3, 6, 6), size=(64, 64), mode="bilinear")
        features = model.forward_head(model.forward_features(noise), pre_logits=True)
    head = model.get_classifier()
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape) / features.std(0))
        head.bias.copy_(-head.weight @ features.mean(0))
    return model
