"""Segmentation: scores against scikit-learn, predictions against plain code, and runs as a user starts them."""

import dataclasses
import json
import os
import re
import shlex
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from helpers.small_runs import call_command, fail_command, load_weights, read_metrics, train_changed
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, log_loss
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, log_softmax
from torchvision.transforms.v2 import functional as F

from s3a.data import Batch, EvalLoader, ImageData, TrainLoader, scenes
from s3a.data.decode import UnreadableImageError
from s3a.data.images import MapImages, Row
from s3a.data.pixels import PixelNormalizer
from s3a.data.targets import IGNORED, LabelMap, Target, join_targets, split_targets
from s3a.support.drawing import pick_colors
from s3a.support.errors import Interrupted
from s3a.training import trainer
from s3a.training.dense_recipe import SegmentationRecipe
from s3a.training.tasks import segmentation
from s3a.training.tasks.classification import Classification
from s3a.training.tasks.segmentation import Segmentation, SegmentationLoss
from s3a.weights.pretrained import load_pretrained

NUM_CLASSES = 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 48
CONFIG = {"input_size": (3, SIDE, SIDE), "interpolation": "bicubic", "mean": MEAN, "std": STD}
SIZES = ((40, 40), (40, 40), (30, 44), (64, 33), (48, 48), (30, 44), (33, 64))  # of the images


class Broken(Target):
    """A target that is damaged."""

    def decode(self, height, width):
        raise UnreadableImageError("it is damaged")


class Views(MapImages):
    """Smooth images of these sizes, with noisy label maps in which class 4 never is and some pixels are ignored."""

    split, blank = "val", LabelMap()

    def __init__(self, sizes: Sequence[tuple[int, int]] = SIZES, order: Sequence[int] = (), broken: int = -1) -> None:
        self.sizes, self.order, self.broken = sizes, order or range(len(sizes)), broken
        self.num_images = len(sizes)

    def name_of(self, index: int) -> str:
        return f"view {index}"

    def draw(self, number: int) -> tuple[Image.Image, np.ndarray]:
        """The image and label map of that number, whatever the order."""
        generator = np.random.default_rng(number)
        height, width = self.sizes[number]
        small = Image.fromarray(generator.integers(0, 256, (4, 5, 3), np.uint8))
        labels = generator.integers(0, NUM_CLASSES, (height, width)).astype(np.uint8)
        return small.resize((width, height), Image.Resampling.BICUBIC), np.where(labels == 4, IGNORED, labels)

    def read_rows(self, indices: list[int]) -> list[Row]:
        rows = []
        for index in indices:
            image, labels = self.draw(self.order[index])
            target = Broken() if self.order[index] == self.broken else LabelMap(labels)
            rows.append(Row(index, image, target=target))
        return rows


class Judge(nn.Module):
    """Logits of the places of stride 2, which depend on each pixel's neighbours and on the mean of the whole image.

    Of class 3 it never thinks, so that class 4 is the one that is in neither.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.near, self.whole = nn.Conv2d(3, NUM_CLASSES, 5, stride=2, padding=2), nn.Linear(3, NUM_CLASSES)
        self.requires_grad_(False)
        self.whole.bias[3:] = -5  # which logits triple

    def forward(self, images: Tensor) -> Tensor:
        logits = 3 * self.near(images) + 3 * self.whole(images.mean((2, 3)))[:, :, None, None]
        return interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)


def make_task(images: MapImages) -> Segmentation:
    return Segmentation(ImageData(images, images, [*"abcde"], "none"))


def measure(images: MapImages, batch_size: int, model: nn.Module, **options: bool) -> list[float]:
    """The sums of all batches of a loader."""
    task = make_task(images)
    if options:
        task.configure_evaluation(**options)
    transform = task.make_eval_transform(CONFIG)
    loader = EvalLoader(
        images, transform, normalizer=PixelNormalizer(MEAN, STD), channels=3, batch_size=batch_size, num_workers=0
    )
    return sum(task.measure(model, loader.normalizer(batch)).sums for batch in loader).tolist()


def normalise(image: Image.Image, short: int) -> Tensor:
    """[1, 3, height, width] of an image whose shorter side is resized to this length."""
    factor = short / min(image.size)
    image = image.resize([round(factor * side) for side in image.size], Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return ((pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[None]


def predict_alone(images: Views, model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """True classes [pixels] and probabilities [pixels, classes] of all known pixels, each image by itself."""
    true, probabilities = [], []
    for number in range(images.num_images):
        image, labels = images.draw(number)
        logits = interpolate(model(normalise(image, SIDE)), labels.shape, mode="bilinear", align_corners=False)
        known = labels != IGNORED
        true.append(labels[known])
        probabilities.append(logits.softmax(1)[0].permute(1, 2, 0).numpy()[known])
    return np.concatenate(true), np.concatenate(probabilities)


# --------------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------------


def test_scores_are_scikit_learns():
    """Over the known pixels of all images together; class 4 is neither in the maps nor predicted, and has no IoU."""
    images, model = Views(), Judge()
    true, probabilities = predict_alone(images, model)
    chosen = probabilities.argmax(1)
    assert set(np.unique(true)) == {0, 1, 2, 3}
    assert set(np.unique(chosen)) == {0, 1, 2}
    *confusion, _ = sums = measure(images, 3, model)
    expected = confusion_matrix(true, chosen, labels=range(NUM_CLASSES))
    assert np.array_equal(np.reshape(confusion, (NUM_CLASSES, NUM_CLASSES)), expected)
    scores = make_task(images).compute_scores(sums, images.num_images, [])
    assert scores["miou"] == pytest.approx(jaccard_score(true, chosen, labels=[0, 1, 2, 3], average="macro"))
    assert scores["pixel_accuracy"] == pytest.approx(accuracy_score(true, chosen))
    rows = probabilities.astype(np.float64)
    rows /= rows.sum(1, keepdims=True)
    assert scores["loss"] == pytest.approx(log_loss(true, rows, labels=range(NUM_CLASSES)), rel=1e-5)


def test_miou_by_hand():
    """Of class 0, 3 of 6 pixels are in both; of class 1, 4 of 7; class 2 is predicted once and never true."""
    confusion = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.float64)
    confusion[0, 0], confusion[0, 1], confusion[0, 2], confusion[1, 0], confusion[1, 1] = 3, 1, 1, 1, 4
    sums = [*confusion.flatten().tolist(), 5.0]
    scores = make_task(Views()).compute_scores(sums, 1, [])
    assert scores["miou"] == pytest.approx((3 / 6 + 4 / 6 + 0) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(7 / 10)
    assert scores["loss"] == pytest.approx(0.5)


def test_images_without_a_known_pixel_score_nothing():
    assert make_task(Views()).compute_scores([0.0] * 26, 3, []) == {"loss": 0, "miou": 0, "pixel_accuracy": 0}


@pytest.mark.parametrize("options", [{}, {"multi_scale": True, "flip": True}])
def test_neighbours_in_a_batch_do_not_matter(options):
    """Neither how many there are, nor in which order, nor of which sizes, nor what pads the last batch."""
    model = Judge()
    expected = measure(Views(), 1, model, **options)
    assert sum(expected[:-1]) == sum(np.count_nonzero(Views().draw(number)[1] != IGNORED) for number in range(7))
    for order, batch_size in (((), 7), ((), 4), ((6, 4, 2, 0, 5, 3, 1), 3), ((3, 1, 0, 5, 2, 6, 4), 5)):
        seen = measure(Views(order=order), batch_size, model, **options)
        assert seen[:-1] == expected[:-1]
        assert seen[-1] == pytest.approx(expected[-1], rel=1e-5)


def test_images_that_cannot_be_read_add_nothing():
    others = tuple(range(6))
    seen, expected = measure(Views(broken=6), 3, Judge()), measure(Views(SIZES[:6], others), 3, Judge())
    assert seen == pytest.approx(expected, rel=1e-6)


# --------------------------------------------------------------------------------------------------------
# Several views of an image
# --------------------------------------------------------------------------------------------------------


def predict_views(images: Views, multi_scale: bool, flip: bool) -> list[tuple[Tensor, np.ndarray]]:
    """What the task predicts of each image, and its number's label map."""
    task = make_task(images)
    task.configure_evaluation(multi_scale=multi_scale, flip=flip)
    loader = EvalLoader(images, task.make_eval_transform(CONFIG), channels=3, batch_size=1)
    normalizer, seen = PixelNormalizer(MEAN, STD), []
    for number, batch in enumerate(loader):
        [(_, probabilities)] = task.predict_groups(Judge(), normalizer(batch))
        seen.append((probabilities[0], images.draw(number)))
    return seen


@pytest.mark.parametrize("flip", [False, True])
def test_multi_scale_is_the_mean_over_resized_images(flip):
    """In which each size is resized from the image itself; the task makes the smaller ones of the largest."""
    model = Judge()
    for seen, (image, labels) in predict_views(Views(((64, 48), (40, 60))), True, flip):
        total = torch.zeros(NUM_CLASSES, *labels.shape)
        for scale in (0.5, 0.75, 1, 1.25, 1.5, 1.75):
            resized = normalise(image, round(scale * SIDE))
            for mirrored in (False, True) if flip else (False,):
                logits = F.horizontal_flip(model(F.horizontal_flip(resized))) if mirrored else model(resized)
                total += F.resize(logits, labels.shape, antialias=False).softmax(1)[0]
        assert seen.sum(0).allclose(torch.ones(()))
        difference = (seen - total / (12 if flip else 6)).abs()
        assert difference.mean() < 0.004
        alone = interpolate(model(normalise(image, SIDE)), labels.shape, mode="bilinear").softmax(1)[0]
        assert (alone - total / (12 if flip else 6)).abs().mean() > 3 * difference.mean()


def test_flip_is_the_mean_of_an_image_and_its_mirror_image():
    model = Judge()
    for seen, (image, labels) in predict_views(Views(), False, True):
        pixels = normalise(image, SIDE)
        both = [model(pixels), model(pixels.flip(3)).flip(3)]
        expected = sum(F.resize(each, labels.shape, antialias=False).softmax(1)[0] for each in both) / 2
        assert seen.allclose(expected, atol=1e-5)
        assert not seen.allclose(F.resize(both[0], labels.shape, antialias=False).softmax(1)[0], atol=1e-2)


def test_padding_for_compiled_code_is_cut_off():
    """Images are seen at padded sizes, and what is predicted of the padding is left out."""
    task = make_task(Views())
    transform = task.make_eval_transform({**CONFIG, "multiple": 32})
    [batch, *_] = EvalLoader(Views(), transform, channels=3, batch_size=3)
    batch = PixelNormalizer(MEAN, STD)(batch)
    assert batch.images.shape == (3, 3, 64, 96)
    model, seen = Judge(), list(task.predict_groups(Judge(), batch))
    assert [rows for rows, _ in seen] == [[0, 1], [2]]
    for row, probabilities in zip((0, 1, 2), [*seen[0][1], *seen[1][1]], strict=True):
        image, labels = Views().draw(row)
        width = round(SIDE * image.width / image.height)
        padded = model(batch.images[row, :, :, : 64 if row < 2 else 96][None])[:, :, :SIDE, :width]
        assert probabilities.allclose(F.resize(padded, labels.shape, antialias=False).softmax(1)[0], atol=1e-5)


# --------------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------------


def make_batch(labels: Tensor, images: Tensor) -> Batch:
    """A batch with these label maps, [n, height, width]."""
    targets = join_targets([{"label_map": each.to(torch.uint8)} for each in labels])
    return Batch(images, torch.zeros(len(labels)), torch.arange(len(labels)), {}, targets=targets)


def average_plainly(logits: Tensor, labels: Tensor) -> float:
    """The mean over all pixels, one after the other, of which ignored ones count with 0."""
    rows = log_softmax(logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]).double(), dim=1)
    flat = labels.flatten().tolist()
    return -sum(row[label].item() for row, label in zip(rows, flat, strict=True) if label != IGNORED) / len(flat)


def test_the_loss_is_the_mean_over_all_pixels():
    labels = torch.from_numpy(np.stack([Views().draw(number)[1] for number in (0, 1)]))
    logits, auxiliary = torch.randn(2, 2, NUM_CLASSES, 40, 40)
    batch = make_batch(labels, torch.zeros(2, 3, 40, 40))
    assert 0.1 < (labels == IGNORED).float().mean() < 0.3
    main, other = average_plainly(logits, labels), average_plainly(auxiliary, labels)
    answers = {(): (logits, None), (0.4,): (logits, auxiliary)}
    for weights, answer in answers.items():
        loss = SegmentationLoss(*(weights or (0.4,)))(lambda images, auxiliary, answer=answer: answer, batch)
        assert loss.item() == pytest.approx(main + sum(weight * other for weight in weights), rel=1e-5)
    known = cross_entropy(logits, labels.long(), ignore_index=IGNORED).item()
    assert known > 1.1 * main  # the mean over known pixels is another


@pytest.mark.parametrize("head", ["semantic_fpn", "upernet"])
def test_the_loss_of_a_head_and_of_its_auxiliary_head(head):
    small = {"pyramid_dim": 16} if head == "semantic_fpn" else {"auxiliary_dim": 8}
    model = timm.create_model(head, num_classes=NUM_CLASSES, backbone="ssvit_nano", head_dim=16, **small).eval()
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, NUM_CLASSES, (2, 64, 64))
    labels[:, :20] = IGNORED
    with torch.no_grad():
        loss = SegmentationLoss(0.4)(model, make_batch(labels, images)).item()
        logits, auxiliary = model(images, auxiliary=True)
    expected = average_plainly(logits, labels)
    assert (auxiliary is None) == (head == "semantic_fpn")
    if auxiliary is not None:
        expected += 0.4 * average_plainly(auxiliary, labels)
    assert loss == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------

FEW = scenes.SceneSettings(side=64, num_train=8, num_val=4, sides=(20, 32), most=2)


@pytest.fixture(scope="module", autouse=True)
def small_scenes() -> Iterator[None]:
    """Scenes of 64 pixels, eight for training and four for validation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "load_label_map_scenes", partial(scenes.load_label_map_scenes, FEW))
        yield


RECIPE = SegmentationRecipe(
    model="ssvit_nano",
    data="scenes",
    image_size=64,
    epochs=2,
    batch_size=4,
    learning_rate=1e-3,
    decay="poly",
    drop_path=0.1,
    pyramid_dim=16,
    head_dim=16,
    cpu_threads=1,
)


@pytest.fixture
def recipe(tmp_path: Path) -> SegmentationRecipe:
    return dataclasses.replace(RECIPE, output_dir=tmp_path / "run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of RECIPE, which no test may change."""
    recipe = dataclasses.replace(RECIPE, output_dir=tmp_path_factory.mktemp("runs") / "run")
    return train_changed(recipe, task=Segmentation)


def read_bytes(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the step of that number, counted from 0, get a signal."""
    original = trainer.train_step

    def get_signal(run, progress, batches):
        if trainer.count_steps(run, progress) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(run, progress, batches)

    monkeypatch.setattr(trainer, "train_step", get_signal)


def evaluate(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> dict:
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    call_command("evaluate.py", "--weights", folder / "model", "--data", "scenes", "--batch-size", "3", *options)
    return json.loads(capsys.readouterr().out)


def test_evaluate_prints_what_training_said(finished, capsys):
    last = read_metrics(finished)[-1]
    evaluation = evaluate(capsys, finished)
    assert evaluation["images"] == 4
    for name in ("miou", "pixel_accuracy", "loss"):
        assert evaluation[name] == pytest.approx(last[f"val_{name}"], rel=1e-6)
    losses = {evaluate(capsys, finished, *options)["loss"] for options in (["--flip"], ["--multi-scale"])}
    losses.add(evaluate(capsys, finished, "--multi-scale", "--flip")["loss"])
    assert len(losses | {evaluation["loss"]}) == 4


def test_evaluation_is_that_of_plain_code(finished):
    """mIoU of the weights, from scenes that are drawn, normalised, predicted and counted here."""
    model = load_pretrained(str(finished / "model")).eval()
    true, chosen = [], []
    for row in scenes.load_label_map_scenes().val.read_rows([0, 1, 2, 3]):
        with torch.no_grad():
            logits = model(normalise(row.encoded, 64))
        chosen.append(logits.argmax(1).flatten())
        true.append(row.target.decode(64, 64)["label_map"].flatten())
    true, chosen = torch.cat(true).numpy(), torch.cat(chosen).numpy()
    expected = jaccard_score(true, chosen, labels=np.union1d(true, chosen), average="macro", zero_division=0)
    assert read_metrics(finished)[-1]["val_miou"] == pytest.approx(expected)


def test_weights_of_a_classifier_are_taken(recipe, tmp_path, capsys):
    classifier = timm.create_model("ssvit_nano", num_classes=7)
    classifier.save_pretrained(tmp_path / "classifier", config={"label_names": [*"abcdefg"]})
    recipe = dataclasses.replace(recipe, weights=str(tmp_path / "classifier"), learning_rate=1e-12, epochs=1)
    folder = train_changed(recipe, task=Segmentation)
    assert f"of {tmp_path / 'classifier'} are taken into the backbone; left: head" in capsys.readouterr().err
    trained, weights = load_weights(folder / "model"), classifier.named_parameters()
    kept = {name: value for name, value in weights if not name.startswith(("head", "norm", "proj"))}
    assert len(kept) > 50
    for name, value in kept.items():
        assert torch.allclose(trained[f"backbone.model.{name}"], value, atol=1e-6), name


def test_a_number_of_steps_ends_in_the_middle_of_an_epoch(recipe, monkeypatch, capsys):
    """Three steps of two an epoch; poly falls by a third of the rate each, and the last epoch is evaluated too."""
    recipe = dataclasses.replace(recipe, steps=3, epochs=9)
    taken, step = [], trainer.train_step

    def counted(run, progress, batches):
        taken.append((progress.epoch, progress.step, run.optimizer.param_groups[0]["lr"]))
        step(run, progress, batches)

    monkeypatch.setattr(trainer, "train_step", counted)
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Interrupted):
            train_changed(recipe, task=Segmentation)
    folder = train_changed(recipe, task=Segmentation)
    assert [place[:2] for place in taken] == [(0, 0), (0, 1), (1, 0)]
    assert [rate for *_, rate in taken] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    lines = read_metrics(folder)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[-1]["learning_rate"] == pytest.approx(1e-3 / 3)
    evaluation = evaluate(capsys, folder)
    assert evaluation["loss"] == pytest.approx(lines[-1]["val_loss"], rel=1e-6)
    train_changed(recipe, task=Segmentation)
    assert "is finished: 2 epochs" in capsys.readouterr().err
    assert len(taken) == 3


def write_folder(folder: Path) -> Path:
    """A folder of label maps as people have them: 0 is no class, and no two images have the same size."""
    for split in ("train", "val"):
        images, maps = folder / "images" / split, folder / "label-maps" / split
        images.mkdir(parents=True)
        maps.mkdir(parents=True)
        for number in range(4):
            labels = np.random.default_rng(number).integers(0, 4, (70 + 9 * number, 90 - 5 * number), np.uint8)
            Image.fromarray(labels).save(maps / f"{number}.png")
            Image.fromarray(np.stack([60 * labels] * 3, -1)).save(images / f"{number}.png")
    (folder / "classes.txt").write_text("wall\nfloor\nsky\n")
    return folder


def test_a_folder_of_label_maps_is_trained_and_evaluated_by_the_commands(tmp_path, capsys):
    """By recipes/segment.py, and by the command that it prints at its end."""
    small = ["--image-size", "64", "--epochs", "1", "--warmup-steps", "0", "--batch-size", "2"]
    small += ["--pyramid-dim", "16", "--head-dim", "16"]
    data = ["--data", "label-maps", "--data-dir", write_folder(tmp_path / "data"), "--ignore-zero"]
    call_command("segment.py", *small, *data, "--cpu-threads", "1", "--output-dir", tmp_path / "run")
    [command] = re.findall(r"evaluate: +python recipes/evaluate.py (.*)", capsys.readouterr().err)
    assert shlex.split(command) == ["--weights", str(tmp_path / "run" / "model"), *map(str, data)]
    AcceleratorState._reset_state(reset_partial_state=True)
    call_command("evaluate.py", *shlex.split(command))
    evaluation, [line] = json.loads(capsys.readouterr().out), read_metrics(tmp_path / "run")
    assert evaluation["loss"] == pytest.approx(line["val_loss"], rel=1e-5)
    assert evaluation["miou"] == pytest.approx(line["val_miou"], rel=1e-5)
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["label_names"] == ["wall", "floor", "sky"]


def test_several_views_are_for_segmentation_alone():
    images = Views()
    task = Classification(ImageData(images, images, [*"ab"], "none"))
    task.configure_evaluation(multi_scale=False, flip=False)
    for option in ("multi_scale", "flip"):
        with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} is for segmentation: leave it out for"):
            task.configure_evaluation(**{"multi_scale": False, "flip": False, option: True})


def test_what_is_of_another_task_is_refused(finished, capsys, tmp_path):
    line = fail_command(capsys, "segment.py", "--data", "digits", "--output-dir", tmp_path)
    assert "--data digits has no label map for each image: use " in line
    line = fail_command(capsys, "segment.py", "--streaming", "--output-dir", tmp_path)
    assert "--streaming is for" in line
    line = fail_command(capsys, "segment.py", "--ignore-zero", "--output-dir", tmp_path)
    assert "--ignore-zero is for label maps of one's own" in line
    AcceleratorState._reset_state(reset_partial_state=True)
    for command in ("train.py", "segment.py"):
        options = ["--model", "ssvit_nano", "--weights", finished / "model", "--output-dir", tmp_path / "new"]
        line = fail_command(capsys, command, *options)
        assert f"--weights {finished / 'model'} holds a semantic_fpn: give those of a classification model" in line


def test_examples_show_the_truth_and_the_prediction(tmp_path, monkeypatch):
    """Beside each image its classes in their colours, whose opacity is 0.65; what is ignored shows the image."""
    images, task = Views(broken=0), make_task(Views(broken=0))
    seen = []
    monkeypatch.setattr(segmentation, "save_examples", lambda path, examples, draw: seen.extend(map(draw, examples)))
    assert task.draw_examples(Judge(), CONFIG, tmp_path / "examples.png")
    assert len(seen) == 6  # without the one that cannot be read
    colors = np.array(pick_colors(NUM_CLASSES))
    for number, (shown, truth, prediction) in enumerate(seen, start=1):
        image, labels = images.draw(number)
        pixels, known = np.asarray(image, np.float64), labels != IGNORED
        assert np.array_equal(shown, image)
        assert np.array_equal(np.asarray(truth)[~known], pixels[~known])
        mixed = 0.35 * pixels + 0.65 * colors[labels.clip(max=4)]
        assert np.abs(np.asarray(truth) - mixed)[known].max() < 0.6
        logits = interpolate(Judge()(normalise(image, SIDE)), labels.shape, mode="bilinear", align_corners=False)
        mixed = 0.35 * pixels + 0.65 * colors[logits[0].argmax(0).numpy()]
        assert (np.abs(np.asarray(prediction) - mixed).max(-1) < 0.6).mean() > 0.999


def test_the_words_of_an_epoch():
    task = make_task(Views())
    scores = {"val_loss": 1.5, "val_miou": 0.41239, "val_pixel_accuracy": 0.9, "ema_miou": 0.5}
    assert task.describe_epoch(scores) == "val loss 1.5000, mIoU 41.24 %, pixel accuracy 90.00 %, with EMA 50.00 %"


def test_training_crops_reach_the_loss_with_their_maps(recipe):
    """A batch of a training loader has crops of the scenes, each beside its own map."""
    data = scenes.load_label_map_scenes()
    transform = Segmentation(data).make_train_transform(
        dataclasses.replace(recipe, color_jitter=False, horizontal_flip=0.0, scale=(1.0, 1.0)), CONFIG
    )
    [[batch], _] = TrainLoader(data.train, transform, channels=3, batch_size=4, seed=0).epoch(0)
    assert batch.images.shape == (4, 3, 64, 64)
    rows = data.train.read_rows(batch.indices.tolist())
    for image, target, row in zip(batch.images, split_targets(batch.targets), rows, strict=True):
        assert np.array_equal(image.permute(1, 2, 0), row.encoded)
        assert torch.equal(target["label_map"], row.target.decode(64, 64)["label_map"])
