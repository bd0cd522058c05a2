"""Weights and images for tests of corruptions, and corrupted images by hand."""

from pathlib import Path

import imagecorruptions
import numpy as np
import timm
import torch
from PIL import Image

import s3a  # noqa: F401  registers its models

DIGITS = [str(digit) for digit in range(10)]


def write_weights(folder: Path, seed: int, label_names: list[str] = DIGITS, side: int = 32, channels: int = 3) -> Path:
    """A weights folder of a small network that has learnt nothing, and whose logits differ from image to image."""
    torch.manual_seed(seed)
    model = timm.create_model("ssvit_nano", num_classes=len(label_names), in_chans=channels)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    mean, std = ((0.5,) * channels, (0.25,) * channels)
    data_config = {"input_size": (channels, side, side), "crop_pct": 0.9, "mean": mean, "std": std}
    model.save_pretrained(folder, data_config=data_config, config={"label_names": label_names})
    return folder


def prepare_by_hand(image: Image.Image, side: int, mode: str = "RGB", crop_pct: float = 0.9) -> Image.Image:
    """What a model of that input size sees: the shorter side bicubic to side / crop_pct, and the centre of that."""
    image = image.convert(mode)
    shorter = int(side / crop_pct)
    ratio = shorter / min(image.size)
    width, height = (shorter if length == min(image.size) else int(length * ratio) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def corrupt_by_hand(image: Image.Image, name: str, severity: int, seed: int, row: int) -> Image.Image:
    """The library's own result, in RGB, from the seed that follows from the three numbers."""
    number = imagecorruptions.get_corruption_names("all").index(name)
    state = int(np.random.SeedSequence((seed, number, row)).generate_state(1)[0])
    np.random.seed(state)
    own = {"seed": state} if name in ("glass_blur", "impulse_noise") else {}
    pixels = imagecorruptions.corrupt(np.array(image.convert("RGB")), severity, name, **own)
    return Image.fromarray(pixels)
