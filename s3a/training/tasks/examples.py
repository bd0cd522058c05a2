"""`examples.png`: validation images with what is true and what a model predicts, beside each other."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from s3a.data import Batch, ImageData
from s3a.data.batches import Decoded, JointTransform, decode_row, stack_batch
from s3a.data.decode import UnreadableImageError, choose_mode
from s3a.data.images import MapImages
from s3a.data.pixels import PixelNormalizer

NUM_EXAMPLES = 6
TITLES = ("image", "truth", "prediction")


def list_examples(data: ImageData, channels: int) -> Iterator[Decoded]:
    """Validation images that can be read, from the first on, with their targets."""
    assert isinstance(data.val, MapImages)
    for index in range(data.val.num_images):
        (row,) = data.val.read_rows([index])
        try:
            yield decode_row(row, choose_mode(channels))
        except UnreadableImageError:  # the evaluation has named it
            continue


def make_batch(example: Decoded, transform: JointTransform, data_config: dict[str, Any], device: torch.device) -> Batch:
    """The batch of one image, on a device."""
    batch = stack_batch([example.transform(transform)], [0], [0], {})
    assert batch.targets is not None
    flat = {name: each.to(device) for name, each in batch.targets["flat"].items()}
    batch = batch._replace(images=batch.images.to(device), targets={**batch.targets, "flat": flat})
    return PixelNormalizer(data_config["mean"], data_config["std"])(batch)


def save_examples(path: Path, examples: Iterator[Decoded], draw: Callable[[Decoded], Sequence[Image.Image]]) -> None:
    """Writes a picture with a column for each of the first examples, and a row for each of the pictures drawn of it."""
    columns = [draw(example) for example, _ in zip(examples, range(NUM_EXAMPLES), strict=False)]
    if not columns:
        return
    figure = Figure(figsize=(2 * len(columns) + 0.4, 2.1 * len(TITLES)), layout="constrained")
    grid = figure.subplots(len(TITLES), len(columns), squeeze=False)
    for column, pictures in enumerate(columns):
        for axes, title, picture in zip(grid[:, column], TITLES, pictures, strict=True):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if column == 0:
                axes.set_ylabel(title)
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(path)
