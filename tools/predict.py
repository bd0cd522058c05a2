"""Says what is in images: python tools/predict.py --weights FOLDER_OR_REPO IMAGE... [--overlay DIR].

Weights of a classifier give the most probable classes of each image, those of segmentation the classes of its pixels,
and those of detection the objects on it.
"""

import json
import os
import signal
import sys
from abc import ABC, abstractmethod
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
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from s3a.analysis.attribution import attribute, check_explicable
from s3a.analysis.overlay import draw_overlay, prepare_image
from s3a.data.decode import choose_mode, read_image
from s3a.models.detection import Detector
from s3a.models.segmentation import SegmentationModel
from s3a.support.command_line import print_error, run_command
from s3a.support.drawing import paint_label_map, paint_objects, pick_colors
from s3a.training.average_precision import encode_masks
from s3a.training.tasks.detection import SHOWN_SCORE, DetectionPredictor
from s3a.training.tasks.segmentation import OPACITY, SegmentationPredictor
from s3a.weights.pretrained import load_pretrained

MOST_CLASSES = 5  # of a classifier that are printed, unless told otherwise
LEGEND_ROWS = 24


@dataclass(frozen=True, kw_only=True)
class Options:
    """Prints what is in image files, and draws it or where a classifier looked."""

    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE [IMAGE ...]")]
    """Image files, and folders of them; a folder means the images that lie in it, but not those in its subfolders."""
    weights: str
    """A weights folder, or ORG/NAME on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repository."""
    top: int | None = None
    """How many classes or objects to print; None takes 5 of a classifier, and of other models all that there are."""
    min_score: float = SHOWN_SCORE
    """Of detection: the score that an object has at least."""
    overlay: Path | None = None
    """A folder for a picture per image: of a classifier the anchors and reference windows that contributed most to its
    class, of segmentation the label map, of detection the boxes and masks."""
    json: bool = False
    """Print JSON instead of text."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("no IMAGE is given: name one image file, or a folder of them")
        if self.top is not None and self.top < 1:
            raise ValueError(f"--top is {self.top}: it must be at least 1")
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"--min-score is {self.min_score}: it must be between 0 and 1")


@dataclass(frozen=True)
class Prediction:
    """A class and its probability."""

    label: str
    index: int
    probability: float

    def __str__(self) -> str:
        return f"{100 * self.probability:7.2f} %  {self.label}"


@dataclass(frozen=True)
class ClassShare:
    """A class and its share of the pixels of an image."""

    label: str
    index: int
    share: float

    def __str__(self) -> str:
        return f"{100 * self.share:7.2f} %  {self.label}"


@dataclass(frozen=True)
class FoundObject:
    """An object on an image: its box in pixels, and its mask in COCO's run lengths where the detector has masks."""

    label: str
    index: int
    score: float
    left: float
    top: float
    right: float
    bottom: float
    segmentation: dict[str, Any] | None = None

    def __str__(self) -> str:
        place = f"left {self.left:.1f}, top {self.top:.1f}, right {self.right:.1f}, bottom {self.bottom:.1f}"
        return f"{100 * self.score:7.2f} %  {self.label}  ({place})"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was predicted of an image file, the most of it first, and the picture drawn of it, if any."""

    image: Path
    predictions: Sequence[Prediction | ClassShare | FoundObject]
    overlay: Path | None

    def to_json(self) -> dict[str, Any]:
        """Its fields; those that it has not are left out."""
        rows = [{key: value for key, value in asdict(each).items() if value is not None} for each in self.predictions]
        overlay = {"overlay": str(self.overlay)} if self.overlay else {}
        return {"image": str(self.image), "predictions": rows, **overlay}

    def __str__(self) -> str:
        lines = [str(each) for each in self.predictions] or ["   nothing found"]
        return "\n".join([str(self.image), *lines, *([f"   drawn in {self.overlay}"] if self.overlay else [])])


def main(options: Options) -> None:
    """Predicts image by image. One that cannot be read is an error of its own, and the others are predicted."""
    images = list_images(options.images)
    model = load_pretrained(options.weights, options.revision)
    predictor = choose_predictor(model)(model, options)
    pictures = name_pictures(images, options.overlay) if options.overlay else [None] * len(images)
    if options.overlay:
        predictor.check_drawable()
        make_folder(options.overlay)

    results, has_unreadable = [], False
    for path, picture in zip(images, pictures, strict=True):
        try:
            image = read_image(path, predictor.mode)
        except (ValueError, OSError) as error:
            print_error(error)
            has_unreadable = True
            continue
        results.append(Result(image=path, predictions=predictor.predict(image, path.name, picture), overlay=picture))
        if not options.json:
            print(results[-1])
    if options.json:
        print(json.dumps([each.to_json() for each in results], indent=2))
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
        raise ValueError("the weights have no classes (num_classes is 0): use those of a model with a head")
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


# --------------------------------------------------------------------------------------------------------
# What models of each task predict
# --------------------------------------------------------------------------------------------------------


class Predictor(ABC):
    """A model with loaded weights, and what it says of an image."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model, self.options = model, options
        self.names = find_label_names(model)
        self.data_config: dict[str, Any] = resolve_model_data_config(model)
        self.mode = choose_mode(self.data_config["input_size"][0])

    def check_drawable(self) -> None:  # noqa: B027  most models can
        """Raises ValueError for a model of which no picture can be drawn."""

    @abstractmethod
    def predict(
        self, image: Image.Image, name: str, picture: Path | None
    ) -> Sequence[Prediction | ClassShare | FoundObject]:
        """What is in the image, of so many as the options ask for; draws it into the file `picture`, if one is given.

        Args:
            name: of the image, for the picture.
        """


class ClassPredictor(Predictor):
    """The most probable classes of an image, and where the model looked."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.steps: Sequence[Callable[[Any], Any]] = create_transform(**self.data_config, is_training=False).transforms

    def check_drawable(self) -> None:
        check_explicable(self.model)

    def predict(self, image: Image.Image, name: str, picture: Path | None) -> list[Prediction]:
        prepared, view = prepare_image(image, self.steps)
        top = self.options.top or MOST_CLASSES
        if picture is None:
            with torch.inference_mode():
                return rank_classes(self.model(prepared[None])[0], self.names, top)
        attribution = attribute(self.model, prepared[None])
        found = rank_classes(attribution.logits, self.names, top)
        title = f"Prediction: {found[0].label} ({100 * found[0].probability:.1f} %)"
        draw_overlay(image, view, attribution, title, name).savefig(picture)
        return found


class LabelMapPredictor(Predictor):
    """The classes of an image's pixels, that of the largest part first, and its label map."""

    def predict(self, image: Image.Image, name: str, picture: Path | None) -> list[ClassShare]:
        with torch.inference_mode():
            probabilities = SegmentationPredictor().predict_image(self.model, image, self.data_config)
        label_map = probabilities.argmax(0)  # [height, width]
        counts = label_map.flatten().bincount(minlength=len(self.names))
        found = [
            ClassShare(self.names[index], index, counts[index].item() / label_map.numel())
            for index in counts.argsort(descending=True, stable=True).tolist()
            if counts[index]
        ]
        if picture is not None:
            draw_label_map(image, label_map, found, len(self.names)).savefig(picture)
        return found[: self.options.top]


class ObjectPredictor(Predictor):
    """The objects on an image, that of the best score first, with their boxes and masks."""

    def predict(self, image: Image.Image, name: str, picture: Path | None) -> list[FoundObject]:
        assert isinstance(self.model, Detector)
        with torch.inference_mode():
            found = DetectionPredictor().predict_image(self.model, image, self.data_config)
        kept = (found["scores"] >= self.options.min_score).nonzero()[: self.options.top, 0]
        found = {kind: each[kept] for kind, each in found.items()}
        if picture is not None:
            draw_objects(image, found, self.names).save(picture)
        masks: Sequence[Any] = encode_masks(found["masks"]) if "masks" in found else [None] * len(kept)
        columns = (found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), masks)
        return [
            FoundObject(self.names[label], label, score, *box, segmentation=mask)
            for label, score, box, mask in zip(*columns, strict=True)
        ]


def choose_predictor(model: nn.Module) -> type[Predictor]:
    """What a model with loaded weights says of images."""
    if isinstance(model, Detector):
        return ObjectPredictor
    return LabelMapPredictor if isinstance(model, SegmentationModel) else ClassPredictor


def rank_classes(logits: Tensor, names: list[str], most: int) -> list[Prediction]:
    """The most probable classes, the first one first."""
    top = logits.double().softmax(-1).topk(min(most, len(names)))
    indices, probabilities = top.indices.tolist(), top.values.tolist()
    return [Prediction(names[index], index, value) for index, value in zip(indices, probabilities, strict=True)]


# --------------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------------


def draw_label_map(image: Image.Image, label_map: Tensor, found: Sequence[ClassShare], num_classes: int) -> Figure:
    """The image beside the same under the colours of a label map, with a legend of its classes."""
    colors = pick_colors(num_classes)
    painted = paint_label_map(image, label_map.cpu().numpy(), colors, OPACITY)
    columns = -(-len(found) // LEGEND_ROWS)
    height = 5.0
    width = min(max(height * image.width / image.height, 2.0), 12.0)
    figure = Figure(figsize=(2 * width + 2.2 * columns, height), layout="constrained", dpi=110)
    for axes, shown in zip(figure.subplots(1, 2), (image.convert("RGB"), painted), strict=True):
        axes.imshow(shown)
        axes.set_axis_off()
    patches = [
        Patch(color=[value / 255 for value in colors[each.index]], label=f"{each.label}  {100 * each.share:.1f} %")
        for each in found
    ]
    figure.legend(handles=patches, loc="outside right upper", ncols=columns, frameon=False)
    return figure


def draw_objects(image: Image.Image, found: dict[str, Tensor], names: Sequence[str]) -> Image.Image:
    """The image with boxes, captions and masks of objects."""
    colors, labels = pick_colors(len(names)), found["labels"].tolist()
    captions = [f"{names[label]} {score:.2f}" for label, score in zip(labels, found["scores"].tolist(), strict=True)]
    return paint_objects(image, found["boxes"], captions, [colors[label] for label in labels], found.get("masks"))


if __name__ == "__main__":
    run_command(Options, main)
