"""A small image folder for tests: two classes that a network can tell apart, in a file type each."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = {"dark": (40, ".png"), "light": (200, ".jpg")}


def make_image_folder(folder: Path, num_train: int = 24, num_val: int = 9) -> Path:
    """Writes train/CLASS/* and val/CLASS/* with so many noisy images a class; returns the folder."""
    generator = np.random.default_rng(0)
    for split, count in (("train", num_train), ("val", num_val)):
        for name, (level, ending) in CLASSES.items():
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(generator.normal(level, 30, size=(36, 44, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index:03d}{ending}")
    return folder
