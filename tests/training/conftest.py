"""The images and the recipes that most tests of training start from."""

import dataclasses
from pathlib import Path

import pytest
import timm
from accelerate.state import AcceleratorState
from helpers.image_folder import make_image_folder

from s3a.training.named_recipes import get_recipe
from s3a.training.recipe import ClassificationRecipe


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    """Accelerate as in a new process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 48 images for training and 18 for validation, of two classes."""
    return make_image_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def recipe(images: Path, tmp_path: Path) -> ClassificationRecipe:
    """A run of two epochs without any randomness but the order of the images and the crops."""
    return ClassificationRecipe(
        model="ssvit_nano",
        data="imagefolder",
        data_dir=images,
        image_size=32,
        batch_size=16,
        epochs=2,
        learning_rate=4e-3,
        drop_path=0.0,
        cpu_threads=1,
        output_dir=tmp_path / "run",
    )


@pytest.fixture
def digits_recipe(images: Path, tmp_path: Path) -> ClassificationRecipe:
    """The recipe of the digits, made short, on the image folder."""
    return dataclasses.replace(
        get_recipe("digits"),
        data="imagefolder",
        data_dir=images,
        image_size=32,
        batch_size=16,
        epochs=3,
        warmup_epochs=1,
        drop_path=0.2,
        cpu_threads=1,
        output_dir=tmp_path / "run",
    )


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A weights folder of the two classes of `images`."""
    model = timm.create_model("ssvit_nano", num_classes=2)
    model.save_pretrained(tmp_path / "pretrained", config={"label_names": ["dark", "light"]})
    return tmp_path / "pretrained"
