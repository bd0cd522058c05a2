"""Runs of segmentation and detection keep what runs of classification promise; on small scenes."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from helpers.dense_runs import (
    find_gradients,
    find_gradients_in_pair,
    load_objects,
    make_detection_recipe,
    make_scenes_small,
    make_segmentation_recipe,
    train_dense,
)
from helpers.detections import make_coco_content, score_with_oracle, write_coco
from helpers.hub_server import TOKEN, Hub
from helpers.ranks import start_pair
from helpers.real_runs import read_metrics, read_weights
from helpers.small_runs import call_command, fail_command
from PIL import Image

import s3a
from s3a.support.errors import Interrupted
from s3a.training import trainer
from s3a.training.dense_recipe import DenseRecipe
from s3a.training.tasks.detection import Detection

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools


@pytest.fixture(autouse=True)
def small_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--data scenes` has few scenes of 64 px."""
    make_scenes_small(monkeypatch)


@pytest.fixture(scope="module")
def detected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of Mask R-CNN, with an average of its weights."""
    with pytest.MonkeyPatch.context() as patch:
        make_scenes_small(patch)
        return train_dense(make_detection_recipe(tmp_path_factory.mktemp("whole") / "run", ema_decay=0.9))


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of Semantic FPN, with an average of its weights."""
    with pytest.MonkeyPatch.context() as patch:
        make_scenes_small(patch)
        return train_dense(make_segmentation_recipe(tmp_path_factory.mktemp("whole") / "run", ema_decay=0.9))


# --------------------------------------------------------------------------------------------------------
# What a run leaves
# --------------------------------------------------------------------------------------------------------


def test_a_run_leaves_all_its_files(detected, segmented):
    common = {"recipe.json", "metrics.jsonl", "curves.png", "examples.png", "checkpoints"}
    common |= {"model", "best", "ema", "ema-best"}
    for folder, own in ((detected, {"predictions.json"}), (segmented, set())):
        assert {path.name for path in folder.iterdir() if path.name != ".lock"} == common | own
        for name in ("model", "best", "ema", "ema-best"):
            kept = {path.name for path in (folder / name).iterdir()}
            assert kept == {"README.md", "config.json", "model.safetensors"}
        for name in ("curves.png", "examples.png"):
            with Image.open(folder / name) as picture:
                assert min(picture.size) > 300
    recipe = json.loads((detected / "recipe.json").read_text())
    assert (recipe["head"], recipe["short_sides"], recipe["num_samples"]) == ("mask_rcnn", [48, 64], 8)
    scores = [f"{kind}_{name}" for kind in ("box", "mask") for name in ("ap", "ap50", "ap75", "ap_small")]
    first, second = read_metrics(detected)
    assert set(first) == {"epoch", "train_loss", "learning_rate", "ema_box_ap", *(f"val_{name}" for name in scores)}
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert {"val_loss", "val_miou", "val_pixel_accuracy", "ema_miou"} < set(read_metrics(segmented)[1])


def test_predictions_score_what_the_run_says(detected):
    """Those of the last epoch, by COCO's own evaluation."""
    last = read_metrics(detected)[-1]
    truth = load_objects().val.build_ground_truth()
    for prefix, kind in (("box", "bbox"), ("mask", "segm")):
        scores = [last[f"val_{prefix}_ap"], last[f"val_{prefix}_ap50"]]
        assert scores == pytest.approx(score_with_oracle(truth, detected / "predictions.json", kind), abs=1e-9)
    assert last["val_box_ap"] > 0


@pytest.mark.parametrize(("name", "batch_size"), [("model", 4), ("model", 3), ("ema", 4)])
def test_the_weights_evaluate_to_what_the_run_says(detected, capsys, name, batch_size):
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    arguments = ("--weights", detected / name, "--data", "scenes", "--batch-size", batch_size)
    call_command("evaluate.py", *arguments)
    result = json.loads(capsys.readouterr().out)
    last = read_metrics(detected)[-1]
    assert result.pop("images") == 4
    del result["images_per_second"]
    if name == "ema":
        assert result["box_ap"] == pytest.approx(last["ema_box_ap"], abs=1e-6)
    else:
        assert result == pytest.approx({column: last[f"val_{column}"] for column in result}, abs=1e-6)
        assert set(result) == {column.removeprefix("val_") for column in last if column.startswith("val_")}


def test_segmentation_weights_evaluate_to_what_the_run_says(segmented, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    call_command("evaluate.py", "--weights", segmented / "model", "--data", "scenes", "--batch-size", 3)
    result, last = json.loads(capsys.readouterr().out), read_metrics(segmented)[-1]
    assert [result[name] for name in ("miou", "loss")] == pytest.approx([last["val_miou"], last["val_loss"]], rel=1e-4)


CARDS = {
    "detected": ("An object detector", "MaskRCNN"),
    "segmented": ("A model for semantic segmentation", "SemanticFPN"),
}


@pytest.mark.parametrize("run", CARDS)
def test_the_card_says_what_the_model_is_and_its_code_loads_it(run, request):
    folder = request.getfixturevalue(run)
    description, family = CARDS[run]
    card = (folder / "best" / "README.md").read_text()
    assert f"\n{description} of timm's registry" in card
    assert "| data | scenes |" in card and "| backbone | ssvit_nano |" in card
    assert str(folder) not in card.partition("## Use")[0]
    (code,) = [part.partition("```")[0] for part in card.split("```python\n")[1:]]
    assert f's3a.{family}.from_pretrained("{folder}/best")' in code
    assert f'timm.create_model("local-dir:{folder}/best", pretrained=True)' in code
    assert "pipeline" not in code and "transformers" not in card
    names: dict[str, object] = {}
    exec(code, names)
    model = names["model"]
    assert type(model) is getattr(s3a, family)
    stored = timm.models.load_state_dict(folder / "best" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("run", CARDS)
def test_a_model_that_is_published_by_itself_is_no_classifier(run, request, hub: Hub, monkeypatch):
    """Its card is made from the model alone."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    description, family = CARDS[run]
    model = getattr(s3a, family).from_pretrained(request.getfixturevalue(run) / "model")
    model.push_to_hub("lizards/alone")
    card = hub.files("lizards/alone")["README.md"].decode()
    assert f"\n{description} of timm's registry" in card
    assert "| backbone | ssvit_nano |" in card
    assert f's3a.{family}.from_pretrained("lizards/alone")' in card
    assert not [word for word in ("classification", "transformers", "classify") if word in card]


def test_the_card_prints_the_scores_of_the_run(detected):
    card = (detected / "model" / "README.md").read_text()
    last = read_metrics(detected)[-1]
    values = [last[f"val_{name}"] for name in ("box_ap", "box_ap50", "mask_ap", "mask_ap50")]
    assert "| weights | epoch | box AP | box AP50 | mask AP | mask AP50 |" in card
    cells = " | ".join(f"{100 * value:.2f} %" for value in values)
    assert f"| **last epoch: these weights** | 2 | {cells} |" in card
    assert "pipeline_tag: object-detection" in card
    assert "| classes | 10 |" in card
    assert "| image | 64 x 64 pixels, 3 channels |" in card


def test_a_finished_run_says_so(detected, capsys):
    before = read_weights(detected)
    train_dense(make_detection_recipe(detected, ema_decay=0.9))
    said = capsys.readouterr().err
    assert f"{detected} is finished: 2 epochs, nothing left to train" in said
    assert f"python recipes/evaluate.py --weights {detected}/model --data scenes" in said
    assert f"examples:  {detected}/examples.png" in said
    assert read_weights(detected) == before


def test_the_best_epoch_is_that_of_box_ap(tmp_path, monkeypatch, capsys):
    """Whatever the masks score; and of the average apart."""
    scores = iter([(0.3, 0.1), (0.2, 0.0), (0.25, 0.9), (0.4, 0.9)])  # after each epoch of weights, then of the average

    def compute_scores(*arguments: object) -> dict[str, float]:
        box_ap, mask_ap = next(scores)
        return {"box_ap": box_ap, "box_ap50": 0.5, "mask_ap": mask_ap}

    monkeypatch.setattr(Detection, "compute_scores", compute_scores)
    folder = train_dense(make_detection_recipe(tmp_path / "run", ema_decay=0.9))
    chosen = {name: json.loads((folder / name / "config.json").read_text())["score"] for name in ("best", "ema-best")}
    assert chosen["best"] == {"weights": "best", "epoch": 1, "box_ap": 0.3}
    assert chosen["ema-best"] == {"weights": "ema-best", "epoch": 2, "box_ap": 0.4}
    said = capsys.readouterr().err
    assert (
        "box AP 25.0 %, box AP50 50.0 %, mask AP 90.0 %, with EMA box AP 40.0 %; best epoch 2 with 40.0 % (EMA)" in said
    )


def test_published_and_loaded_again(detected, tmp_path, hub: Hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = shutil.copytree(detected, tmp_path / "run")
    train_dense(make_detection_recipe(folder, ema_decay=0.9, push_to_hub="lizards/digits"))
    pushed = hub.files("lizards/digits")
    assert pushed["model.safetensors"] == (folder / "best" / "model.safetensors").read_bytes()
    assert b's3a.MaskRCNN.from_pretrained("lizards/digits")' in pushed["README.md"]
    assert b'timm.create_model("hf-hub:lizards/digits", pretrained=True)' in pushed["README.md"]
    assert str(tmp_path).encode() not in pushed["README.md"]
    expected = s3a.MaskRCNN.from_pretrained(folder / "best").eval()
    image = torch.rand(1, 3, 64, 64)
    for model in (
        s3a.MaskRCNN.from_pretrained("lizards/digits"),
        timm.create_model("hf-hub:lizards/digits", pretrained=True),
    ):
        with torch.no_grad():
            (found,), (wanted,) = model.eval()(image), expected(image)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# --------------------------------------------------------------------------------------------------------
# Nothing lost
# --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


def kill(place: str) -> None:
    raise Killed(place)


def interrupt(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, times: int, end: Callable[[str], object]
) -> None:
    """Has something happen when a function is called for the so-manieth time, before it does anything."""
    original, calls = getattr(owner, name), [0]

    def interrupted(*arguments: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] == times:
            end(name)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)


def send_sigterm(place: str) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("kind", ["detected", pytest.param("segmented", marks=pytest.mark.slow)])
def test_stopped_and_killed_a_run_ends_with_the_same_bytes(kind, request, tmp_path, monkeypatch, capsys):
    """Stopped in its second step; killed in its fourth, behind a checkpoint; killed while it evaluates the average."""
    whole = request.getfixturevalue(kind)
    make = make_detection_recipe if kind == "detected" else make_segmentation_recipe
    recipe = make(tmp_path / "run", ema_decay=0.9, checkpoint_every="3")
    with monkeypatch.context() as patch:
        interrupt(patch, trainer, "forward_backward", 2, send_sigterm)
        with pytest.raises(Interrupted, match="stopped by SIGTERM at epoch 1, step 2 of 2"):
            train_dense(recipe)
    with monkeypatch.context() as patch:
        interrupt(patch, trainer, "forward_backward", 2, kill)
        with pytest.raises(Killed):
            train_dense(recipe)
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} >= {"step-000000003-epoch-00001"}
    with monkeypatch.context() as patch:
        interrupt(patch, trainer, "validate", 2, kill)
        with pytest.raises(Killed):
            train_dense(recipe)
    capsys.readouterr()
    folder = train_dense(recipe)
    assert f"resuming {folder} after epoch 1 of 2, at step 1 of 2" in capsys.readouterr().err
    assert set(read_weights(whole)) == {"model", "best", "ema", "ema-best"}
    assert read_weights(folder) == read_weights(whole)
    assert read_metrics(folder) == read_metrics(whole)
    if kind == "detected":
        assert (folder / "predictions.json").read_bytes() == (whole / "predictions.json").read_bytes()


# --------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------


def test_images_that_cannot_be_read_are_named_and_counted(tmp_path):
    data = write_coco(tmp_path / "coco")
    broken = [data / split / "2.png" for split in ("train", "val")]
    for path in broken:
        path.write_bytes(b"")
    recipe = make_detection_recipe(
        tmp_path / "run",
        data="coco",
        data_dir=data,
        head="retinanet",
        batch_size=2,
        max_bad_images=0.3,
        max_bad_val_images=0.2,
    )
    folder = train_dense(recipe)
    for split, path in zip(("train", "val"), broken, strict=True):
        assert (folder / f"unreadable_{split}.txt").read_text() == f"{path}\n"
    assert [line["unreadable_val"] for line in read_metrics(folder)] == [1, 1]
    written = json.loads((folder / "predictions.json").read_text())
    assert {each["image_id"] for each in written} <= {70, 7, 33, 1}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def drop_categories(path: Path) -> None:
    path.write_text(json.dumps({**make_coco_content(), "categories": []}))


def name_other_image(path: Path) -> None:
    content = make_coco_content()
    content["annotations"][2]["image_id"] = 8
    path.write_text(json.dumps(content))


def drop_masks(path: Path) -> None:
    content = make_coco_content()
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    for split in ("train", "val"):
        path.with_name(f"instances_{split}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "instances_val.json does not exist"),
        (cut, "instances_val.json is no JSON"),
        (drop_categories, "has no list 'categories'"),
        (name_other_image, "1 records are of images that are not listed, the first is annotation 98 of image 8"),
        (drop_masks, "--head is mask_rcnn, and the objects of --data coco have no masks: use retinanet"),
    ],
)
def test_broken_annotations_end_in_one_line(tmp_path, capsys, change, message):
    data = write_coco(tmp_path / "coco")
    change(data / "annotations" / "instances_val.json")
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ("--data", "coco", "--data-dir", data, "--output-dir", tmp_path / "run")
    assert message in fail_command(capsys, "detect.py", *arguments)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------
# Gradients
# --------------------------------------------------------------------------------------------------------


def list_recipes(folder: Path) -> list[DenseRecipe]:
    """A recipe for each head, whose batches have images of one size."""
    detectors = [
        make_detection_recipe(folder / head, name=head, head=head, short_sides=(64,))
        for head in ("mask_rcnn", "cascade_mask_rcnn", "retinanet")
    ]
    segmenters = [
        make_segmentation_recipe(folder / head, name=head, head=head, drop_rate=0.1)
        for head in ("semantic_fpn", "upernet")
    ]
    return [*detectors, *segmenters]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes find in the first step of each recipe."""
    folder = tmp_path_factory.mktemp("pair")
    assert start_pair(find_gradients_in_pair, list_recipes(folder), folder) == [0, 0]
    return folder


@pytest.mark.parametrize("head", ["mask_rcnn", "cascade_mask_rcnn", "retinanet", "semantic_fpn", "upernet"])
def test_two_processes_have_the_gradient_of_one(pair, tmp_path, head):
    """With drop path, dropout, sampling and batch norms: an image is drawn for by its place in the whole batch."""
    (recipe,) = [each for each in list_recipes(tmp_path) if each.name == head]
    alone = find_gradients(recipe)
    assert len(alone) > 50
    tolerance = 1e-2 if head == "cascade_mask_rcnn" else 1e-3  # moved boxes decide which pixels of a mask are theirs
    for rank in range(2):
        found = torch.load(pair / f"{head}-{rank}.pt")
        assert list(found) == list(alone)
        for name, gradient in alone.items():
            # some are 0 but for rounding: those of a bias in front of a batch norm
            part = torch.stack([each.norm() for other, each in alone.items() if is_of_one_part(name, other)]).norm()
            limit = tolerance * gradient.norm() + 1e-5 * part
            assert (found[name] - gradient).norm() < limit, name


def test_segmentation_has_one_gradient_however_a_batch_is_cut(tmp_path):
    """But for batch norms. Detectors average over the objects of each forward, as mmdetection does."""
    recipe = make_segmentation_recipe(tmp_path / "run", freeze_batch_norm=True, drop_rate=0.1)
    whole, cut = find_gradients(recipe), find_gradients(dataclasses.replace(recipe, accumulate=2))
    for name, gradient in whole.items():
        assert (cut[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-9, name


def is_of_one_part(name: str, other: str) -> bool:
    """Whether two parameters are of the same part of a model, such as its backbone."""
    return name.partition(".")[0] == other.partition(".")[0]
