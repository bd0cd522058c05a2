"""Runs of segmentation and detection on images small enough for a test: in this process, in pairs, and as commands."""

import dataclasses
import json
import os
import signal
import subprocess
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor

from helpers.detections import draw_polygon
from helpers.fork_server import run_python
from helpers.ranks import take_place
from helpers.real_runs import DRIVER, ROOT
from s3a.data import scenes
from s3a.data.images import ImageData
from s3a.training.build import build_run
from s3a.training.dense_recipe import DenseRecipe, DetectionRecipe, SegmentationRecipe
from s3a.training.named_recipes import DETECTION_RECIPES, SEGMENTATION_RECIPES
from s3a.training.tasks.detection import Detection
from s3a.training.tasks.segmentation import Segmentation
from s3a.training.tasks.task import Task
from s3a.training.trainer import Progress, forward_backward, prepare_epoch, train

SCENES = scenes.SceneSettings(
    side=64, num_train=8, num_val=4, fewest=1, most=3, sides=(20, 28), visible=0.95, gap=None, brightness=1.0
)


def load_objects() -> ImageData:
    """The small scenes with their objects."""
    return scenes.make_object_data(SCENES, *scenes.load_digit_pictures())


def load_label_maps() -> ImageData:
    """The small scenes with label maps."""
    return scenes.make_label_map_data(SCENES, *scenes.load_digit_pictures())


LOADERS = {"load_object_scenes": load_objects, "load_label_map_scenes": load_label_maps}


def make_scenes_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `--data scenes` draw few scenes of 64 px."""
    for name, load in LOADERS.items():
        monkeypatch.setattr(scenes, name, load)


def make_detection_recipe(folder: Path, **changes: object) -> DetectionRecipe:
    """Two epochs of two steps of Mask R-CNN, with what could break a resume: drop path, mirroring, several sizes."""
    recipe = dataclasses.replace(
        DETECTION_RECIPES["mask_rcnn_scenes"](),
        epochs=2,
        steps=None,
        warmup_steps=2,
        short_sides=(48, 64),
        long_side=64,
        horizontal_flip=0.5,
        drop_path=0.2,
        pyramid_dim=16,
        box_dim=32,
        mask_convs=1,
        anchor_scale=4.0,
        num_proposals=20,
        num_samples=8,
        cpu_threads=1,
        output_dir=folder,
    )
    return dataclasses.replace(recipe, **changes)


def make_segmentation_recipe(folder: Path, **changes: object) -> SegmentationRecipe:
    """Two epochs of two steps of Semantic FPN, with what could break a resume."""
    recipe = dataclasses.replace(
        SEGMENTATION_RECIPES["semantic_fpn_scenes"](),
        epochs=2,
        warmup_steps=2,
        image_size=64,
        scale=(0.8, 1.25),
        largest_class=0.75,
        horizontal_flip=0.5,
        color_jitter=True,
        drop_path=0.2,
        pyramid_dim=16,
        head_dim=16,
        cpu_threads=1,
        output_dir=folder,
    )
    return dataclasses.replace(recipe, **changes)


def choose_task(recipe: DenseRecipe) -> type[Task]:
    """The task of a recipe."""
    return Detection if isinstance(recipe, DetectionRecipe) else Segmentation


def train_dense(recipe: DenseRecipe, folder: Path | None = None, **changes: object) -> Path:
    """Trains a changed recipe, with Accelerate as in a new process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = dataclasses.replace(recipe, output_dir=folder or recipe.output_dir, **changes)
    return train(recipe, choose_task(recipe))


def find_gradients(recipe: DenseRecipe) -> dict[str, Tensor]:
    """The gradients of the first step of a run on the small scenes, and its loss."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run = build_run(recipe, choose_task(recipe))
    with run.lock:
        prepare_epoch(run, Progress())
        loss = forward_backward(run, next(run.train_loader.epoch(0)), seed=3)
    gradients = {name: parameter.grad for name, parameter in run.bare_model.named_parameters()}
    return {"loss": run.accelerator.reduce(loss, reduction="mean"), **gradients}


def find_gradients_in_pair(rank: int, port: int, recipes: list[DenseRecipe], folder: Path) -> None:
    """Writes what each of two processes finds for each of some recipes."""
    take_place(rank, port)
    scenes.load_object_scenes, scenes.load_label_map_scenes = load_objects, load_label_maps
    for recipe in recipes:
        torch.save(find_gradients(recipe), folder / f"{recipe.name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def make_driver(command: str) -> str:
    """Code that runs recipes/COMMAND.py, and sends it a signal; see `helpers.real_runs`."""
    return DRIVER.replace("import train\n", f"import {command} as train\n")


def get_dense_signal(
    command: str, place: str, times: int, number: signal.Signals, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Runs recipes/COMMAND.py, which gets a signal when a function, named by its place, is called so often."""
    return run_python(
        ["-c", make_driver(command), place, str(times), str(int(number)), "0", *arguments], ROOT, dict(os.environ)
    )


# --------------------------------------------------------------------------------------------------------
# Data in the formats of COCO and ADE20K
# --------------------------------------------------------------------------------------------------------

NUM_TRAIN, NUM_VAL = 12, 4
HEIGHT, WIDTH = 96, 128
ADE20K_CLASSES, COCO_CLASSES = 150, 80


def draw_image(generator: np.random.Generator) -> Image.Image:
    """Noise, of the size that all images have."""
    return Image.fromarray(generator.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))


def write_ade20k(folder: Path) -> Path:
    """A folder as that of ADE20K: blocks of its classes, some of none."""
    generator = np.random.default_rng(0)
    for split, number_of_images in (("training", NUM_TRAIN), ("validation", NUM_VAL)):
        images, maps = folder / "images" / split, folder / "annotations" / split
        images.mkdir(parents=True)
        maps.mkdir(parents=True)
        for index in range(number_of_images):
            draw_image(generator).save(images / f"ADE_{index:08}.jpg")
            blocks = generator.integers(0, ADE20K_CLASSES + 1, (HEIGHT // 32, WIDTH // 32), np.uint8)
            Image.fromarray(blocks.repeat(32, 0).repeat(32, 1)).save(maps / f"ADE_{index:08}.png")
    rows = [f"{number}\t0.1\t10\t2\tclass {number}\n" for number in range(1, ADE20K_CLASSES + 1)]
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "".join(rows))
    return folder


def write_many_classes(folder: Path) -> Path:
    """A folder as that of COCO 2017, with 80 categories: one or two rectangles on each image."""
    generator, numbers = np.random.default_rng(1), count(1)
    (folder / "annotations").mkdir(parents=True)
    for split, number_of_images in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        (folder / f"{split}2017").mkdir()
        images, annotations = [], []
        for image_id in range(1, number_of_images + 1):
            draw_image(generator).save(folder / f"{split}2017" / f"{image_id:012}.jpg")
            images.append({"id": image_id, "file_name": f"{image_id:012}.jpg", "height": HEIGHT, "width": WIDTH})
            for _ in range(generator.integers(1, 3)):
                box = [int(each) for each in (*generator.integers(0, 40, 2), *generator.integers(20, 50, 2))]
                annotations.append(
                    {
                        "id": next(numbers),
                        "image_id": image_id,
                        "category_id": int(generator.integers(1, COCO_CLASSES + 1)),
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                        "segmentation": [draw_polygon(*box)],
                    }
                )
        categories = [{"id": id_, "name": f"class {id_}"} for id_ in range(1, COCO_CLASSES + 1)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return folder
