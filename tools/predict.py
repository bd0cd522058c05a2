"""Predicts the classes of images: python tools/predict.py --weights FOLDER_OR_REPO IMAGE... [--overlay DIR]."""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

# Read when torch loads. Threads that spin while they wait starve each other where anything else runs (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below shows no traceback

import torch
import tyro
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from s3a.analysis.attribution import attribute, check_explicable
from s3a.analysis.overlay import draw_overlay, prepare_image
from s3a.data.decode import choose_mode, read_image
from s3a.support.command_line import print_error, run_command
from s3a.weights.pretrained import load_pretrained


@dataclass(frozen=True, kw_only=True)
class Options:
    """Prints the most probable classes of image files, and draws where the model looked."""

    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE [IMAGE ...]")]
    """Image files, and folders of them; a folder means the images that lie in it, but not those in its subfolders."""
    weights: str
    """A weights folder, or ORG/NAME on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repository."""
    top: int = 5
    """How many classes to print."""
    overlay: Path | None = None
    """A folder for a picture per image: the anchors and reference windows that contributed most to its class."""
    json: bool = False
    """Print JSON instead of text."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("no IMAGE is given: name one image file, or a folder of them")
        if self.top < 1:
            raise ValueError(f"--top is {self.top}: it must be at least 1")


@dataclass(frozen=True)
class Prediction:
    """A class and its probability."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """The most probable classes of an image file, the first one first, and the picture drawn of it, if any."""

    image: Path
    predictions: list[Prediction]
    overlay: Path | None


def main(options: Options) -> None:
    """Predicts image by image. One that cannot be read is an error of its own, and the others are predicted."""
    images = list_images(options.images)
    model = load_pretrained(options.weights, options.revision)
    names = find_label_names(model)
    config = resolve_model_data_config(model)
    mode, steps = choose_mode(config["input_size"][0]), create_transform(**config, is_training=False).transforms
    pictures = name_pictures(images, options.overlay) if options.overlay else [None] * len(images)
    if options.overlay:
        check_explicable(model)
        make_folder(options.overlay)

    results, has_unreadable = [], False
    for path, picture in zip(images, pictures, strict=True):
        try:
            image = read_image(path, mode)
        except (ValueError, OSError) as error:
            print_error(error)
            has_unreadable = True
            continue
        logits = predict_logits(model, image, steps, names, path.name, picture)
        results.append(Result(image=path, predictions=rank_classes(logits, names, options.top), overlay=picture))
        if not options.json:
            print(format_result(results[-1]))
    if options.json:
        rows = [{key: value for key, value in asdict(each).items() if value is not None} for each in results]
        print(json.dumps(rows, indent=2, default=str))
    if has_unreadable:
        sys.exit(2)


def list_images(paths: Sequence[Path]) -> list[Path]:
    """The files among the paths, and the images in the folders among them, sorted by name; says how many these are.

    Raises:
        ValueError: for a folder without images.
    """
    images: list[Path] = []
    for path in paths:
        found = [path]
        if path.is_dir():
            found = sorted(each for each in path.iterdir() if each.suffix.lower() in IMG_EXTENSIONS)
            if not found:
                inner = sum(each.is_dir() for each in path.iterdir())
                hint = f"its {inner} subfolders are not searched; name one of them" if inner else "give another"
                raise ValueError(f"folder {path} has no image in it ({', '.join(IMG_EXTENSIONS)}): {hint}")
            print(f"{path}: {len(found)} image{'s' if len(found) > 1 else ''}", file=sys.stderr)
        images += found
    return images


def make_folder(folder: Path) -> None:
    """Makes the folder of the pictures; ValueError where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--overlay {folder} cannot be made ({error.strerror}): give another folder") from error


def find_label_names(model: nn.Module) -> list[str]:
    """The names of the classes, from the weights' config.json; "class 7" where it has none.

    Raises:
        ValueError: for a model without classes, or where there are fewer or more names.
    """
    if model.num_classes < 1:
        raise ValueError("the weights have no classes (num_classes is 0): use those of a classifier")
    names = model.pretrained_cfg.get("label_names") or [f"class {index}" for index in range(model.num_classes)]
    if isinstance(names, dict):  # timm also has index -> name
        names = [names.get(str(index), f"class {index}") for index in range(model.num_classes)]
    if len(names) != model.num_classes:
        raise ValueError(
            f"config.json has {len(names)} label_names for {model.num_classes} classes: it must name each class once"
        )
    return [str(name) for name in names]


def name_pictures(images: Sequence[Path], folder: Path) -> list[Path]:
    """A PNG for each image, numbered where several have one name; ValueError where one would replace an image."""
    paths: list[Path] = []
    for image in images:
        path, number = folder / f"{image.stem}.png", 1
        while path in paths:
            number += 1
            path = folder / f"{image.stem}-{number}.png"
        paths.append(path)
    replaced = {image.resolve() for image in images} & {path.resolve() for path in paths}
    if replaced:
        raise ValueError(f"--overlay {folder} would replace the image {min(replaced)}: give another folder")
    return paths


def predict_logits(
    model: nn.Module,
    image: Image.Image,
    steps: Sequence[Callable[[Any], Any]],
    names: list[str],
    name: str,
    picture: Path | None,
) -> Tensor:
    """The logits of an image, [classes]; draws into the file `picture`, if one is given, where the model looked."""
    prepared, view = prepare_image(image, steps)
    if picture is None:
        with torch.inference_mode():
            return model(prepared[None])[0]
    attribution = attribute(model, prepared[None])
    (best,) = rank_classes(attribution.logits, names, 1)
    title = f"Prediction: {best.label} ({100 * best.probability:.1f} %)"
    draw_overlay(image, view, attribution, title, name).savefig(picture)
    return attribution.logits


def rank_classes(logits: Tensor, names: list[str], most: int) -> list[Prediction]:
    """The most probable classes, the first one first."""
    top = logits.double().softmax(-1).topk(min(most, len(names)))
    indices, probabilities = top.indices.tolist(), top.values.tolist()
    return [Prediction(names[index], index, value) for index, value in zip(indices, probabilities, strict=True)]


def format_result(result: Result) -> str:
    """A result as lines of text."""
    lines = [f"{100 * each.probability:7.2f} %  {each.label}" for each in result.predictions]
    where = [f"   drawn in {result.overlay}"] if result.overlay else []
    return "\n".join([str(result.image), *lines, *where])


if __name__ == "__main__":
    run_command(Options, main)
