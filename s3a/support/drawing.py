"""Label maps and objects, painted over an image."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes

GOLDEN = 0.618034  # of the circle of hues: neighbours in a list get hues that are far apart
LEGIBLE_SIDE, FONT_SIZE = 480, 14  # pixels of the shorter side of a picture with captions, and of these

Color = tuple[int, int, int]


def pick_colors(count: int) -> list[Color]:
    """So many colours; those near each other in the list differ most."""
    colors = []
    for index in range(count):
        red, green, blue = colorsys.hsv_to_rgb(index * GOLDEN % 1, 0.85 if index % 2 else 0.6, 0.95)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colors


def paint_label_map(image: Image.Image, label_map: np.ndarray, colors: Sequence[Color], opacity: float) -> Image.Image:
    """The image under the colours of a label map [height, width]; numbers without a colour leave it as it is."""
    table = np.zeros((256, 3), np.float32)
    table[: len(colors)] = colors
    covered = opacity * (label_map < len(colors))[:, :, None]
    mixed = (1 - covered) * np.asarray(image.convert("RGB"), np.float32) + covered * table[label_map]
    return Image.fromarray(mixed.round().astype(np.uint8))


def paint_objects(
    image: Image.Image, boxes: Tensor, captions: Sequence[str], colors: Sequence[Color], masks: Tensor | None = None
) -> Image.Image:
    """The image with masks, boxes, and a caption on each; small images are enlarged, so that captions can be read.

    Args:
        boxes: [n, 4], left, top, right, bottom in pixels; the first ones are on top.
        colors: of each.
        masks: [n, height, width] bool; where several cover a pixel, their colours mix.
    """
    import matplotlib  # noqa: PLC0415  slow to import; it brings a font

    painted = image.convert("RGB")
    for mask, color in zip([] if masks is None else masks.cpu().numpy(), colors, strict=False):
        painted = paint_label_map(painted, np.where(mask, np.uint8(0), np.uint8(255)), [color], opacity=0.5)
    factor = max(1, -(-LEGIBLE_SIDE // min(painted.size)))
    pixels = F.pil_to_tensor(painted.resize((factor * painted.width, factor * painted.height)))
    if len(boxes):
        low, high = (factor * boxes.cpu().float()).split(2, dim=1)
        corners = torch.cat([low, torch.maximum(low, high)], dim=1)  # torchvision refuses what rounding turned around
        pixels = draw_bounding_boxes(
            pixels,
            corners.flip(0),
            list(captions)[::-1],
            list(colors)[::-1],
            width=2,
            font=str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"),
            font_size=FONT_SIZE,
            label_colors="black",
            fill_labels=True,
        )
    return F.to_pil_image(pixels)
