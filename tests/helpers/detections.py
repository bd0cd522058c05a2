"""A few images in COCO's format, and a detector that knows what is on them."""

import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from helpers.ranks import take_place
from s3a.data.coco import load_coco
from s3a.models.detection import Detector
from s3a.training.evaluation import Evaluation, evaluate, make_eval_loader
from s3a.training.tasks.detection import Detection

# Ids, heights and widths: two of one size behind each other, and one that its longer side limits, which has another
# aspect when it is resized, since sides are rounded.
IMAGES = {70: (40, 50), 7: (40, 50), 12: (120, 80), 33: (50, 40), 1: (33, 203)}
CATEGORIES = {90: "toothbrush", 3: "car"}
# Image, category, and left, top, width, height. Image 33 has none.
OBJECTS = [
    (70, 90, (10, 5, 20, 10)),
    (70, 3, (2, 20, 30, 15)),
    (7, 3, (0, 0, 9, 7)),
    (12, 90, (30, 20, 40, 90)),
    (1, 3, (100, 10, 60, 20)),
]
LARGEST = 64, 100  # shorter and longer side in an evaluation
MEAN, STD = (0.5, 0.25, 0.125), (0.25, 0.5, 0.25)
STEP = 40  # of the red that tells images apart
SHOWN = 28  # places of a mask a side


def make_coco_content() -> dict:
    """The annotations of both splits; all objects are rectangles."""
    return {
        "images": [
            {"id": id_, "file_name": f"{index}.png", "height": height, "width": width}
            for index, (id_, (height, width)) in enumerate(IMAGES.items())
        ],
        "categories": [{"id": id_, "name": name} for id_, name in CATEGORIES.items()],
        "annotations": [
            {
                "id": 100 - number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": [draw_polygon(*box)],
            }
            for number, (image_id, category_id, box) in enumerate(OBJECTS)
        ],
    }


def draw_polygon(left: float, top: float, width: float, height: float) -> list[float]:
    """The corners of a rectangle."""
    right, bottom = left + width, top + height
    return [left, top, right, top, right, bottom, left, bottom]


def write_coco(folder: Path, train: dict | None = None, val: dict | None = None) -> Path:
    """A folder with both splits; an image has a red that tells its place in the split, and noise in green and blue."""
    (folder / "annotations").mkdir(parents=True)
    for split, content in (("train", train), ("val", val)):
        content = content or make_coco_content()
        (folder / split).mkdir()
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        for index, image in enumerate(content["images"]):
            pixels = np.random.default_rng(index).integers(0, 256, (image["height"], image["width"], 3), np.uint8)
            pixels[..., 0] = STEP * index
            Image.fromarray(pixels).save(folder / split / image["file_name"])
    return folder


class TruthDetector(Detector):
    """Finds the objects of OBJECTS, and nothing else, by the images' red; scores fall.

    Args:
        shift: of boxes and masks to the right, in pixels of the image as it was.
        confused: whether one object is of a wrong class, and one is found where none is.
        finds: whether anything is found.
        draws: whether objects have masks.

    Attributes:
        seen: by an image's place in the split, what was seen of it, and the size of the content.
    """

    def __init__(self, shift: float = 0.0, *, confused: bool = False, finds: bool = True, draws: bool = True) -> None:
        nn.Module.__init__(self)
        self.place = nn.Parameter(torch.zeros(()))  # which tells the device
        self.shift, self.confused, self.finds, self.draws = shift, confused, finds, draws
        self.seen: dict[int, tuple[Tensor, tuple[int, int]]] = {}

    def forward(self, images: Tensor, sizes=None, targets=None) -> list[dict[str, Tensor]]:
        return [self.find(image, size) for image, size in zip(images, sizes, strict=True)]

    def find(self, image: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """What is on an image, in pixels of the image as it is seen."""
        index = round((image[0, 0, 0].item() * STD[0] + MEAN[0]) * 255 / STEP)
        assert index not in self.seen
        self.seen[index] = image, size
        image_id, (height, width) = [*IMAGES.items()][index]
        objects = [(category, box) for own_id, category, box in OBJECTS if own_id == image_id]
        if self.confused and image_id == 12:
            objects = [(3, box) for _, box in objects]
        if self.confused and image_id == 33:
            objects = [(3, (1, 1, 9, 9))]
        objects = objects if self.finds else []
        corners = [(x + self.shift, y, x + self.shift + w, y + h) for _, (x, y, w, h) in objects]
        scales = torch.tensor([size[1] / width, size[0] / height] * 2)
        found = {
            "boxes": torch.tensor(corners, dtype=torch.float32).view(-1, 4) * scales,
            "labels": torch.tensor([sorted(CATEGORIES).index(each) for each, _ in objects], dtype=torch.int64),
            "scores": torch.linspace(0.9, 0.4, len(objects)),
        }
        return {**found, "masks": torch.ones(len(objects), SHOWN, SHOWN)} if self.draws else found


def evaluate_truth(task: Detection, model: Detector, batch_size: int) -> Evaluation:
    """The evaluation of such a detector on the images of the task."""
    accelerator = Accelerator(cpu=True)
    config = {"input_size": (3, *LARGEST), "mean": MEAN, "std": STD, "interpolation": "bilinear"}
    transform = task.make_eval_transform(config)
    loader = make_eval_loader(
        task.data, transform, accelerator, data_config=config, batch_size=batch_size, num_workers=0
    )
    found = evaluate(model, task, loader, accelerator)
    assert found is not None
    return found


def evaluate_in_pair(rank: int, port: int, folder: Path, shift: float, report: Path) -> None:
    """Evaluates as one of two processes, and writes what it was told, and what it has of the records."""
    take_place(rank, port)
    found = evaluate_truth(Detection(load_coco(folder)), TruthDetector(shift, confused=True), 2)
    told = {"scores": found.scores, "images": found.images, "ids": [record.image_id for record in found.records]}
    report.with_suffix(f".{rank}").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


def score_with_oracle(content: dict, predictions: Path, kind: str, image_ids: list[int] | None = None) -> list[float]:
    """AP and AP50 that COCO's own evaluation finds in a file of predictions."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        found = json.loads(predictions.read_text())
        left_out = "bbox" if kind == "segm" else "segmentation"
        kept = [{key: value for key, value in each.items() if key != left_out} for each in found]
        evaluation = COCOeval(truth, truth.loadRes(kept), kind)
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:2].tolist()
