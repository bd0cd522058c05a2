"""Recipes of the dense tasks: the named ones against the authors' settings, schedules against torch's, and commands."""

import dataclasses
import json
import re
from typing import Any

import pytest
import timm
import torch
from helpers.small_runs import call_command, fail_command
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR, PolynomialLR

from s3a.training.dense_recipe import DenseRecipe, DetectionRecipe, SegmentationRecipe
from s3a.training.model import build_dense_model
from s3a.training.named_recipes import DETECTION_RECIPES, SEGMENTATION_RECIPES, Command, get_recipe
from s3a.training.tasks.segmentation import Segmentation

SEGMENT = Command(name="segment", purpose="", recipes=SEGMENTATION_RECIPES, default="semantic_fpn_scenes")
DETECT = Command(name="detect", purpose="", recipes=DETECTION_RECIPES, default="mask_rcnn_scenes")

# --------------------------------------------------------------------------------------------------------
# Named recipes: all that they set, transcribed from RMT's configuration files and the papers' drop paths
# --------------------------------------------------------------------------------------------------------

DROP_PATHS = {
    "ssvit_tiny": 0.1,
    "ssvit_small": 0.15,
    "ssvit_base": 0.4,
    "ssvit_large": 0.5,
    "svit_small": 0.1,
    "svit_base": 0.4,
    "svit_large": 0.4,
    "vvt_tiny": 0.1,
    "vvt_small": 0.3,
    "vvt_medium": 0.3,
    "vvt_large": 0.3,
}
ON_GPUS = {"batch_size": 16, "precision": "bf16", "num_workers": 8, "checkpoint_every": "15m"}  # 8 GPUs x 2 images
SEMANTIC_FPN = {
    "data": "ade20k",
    "epochs": 64,  # 80,000 steps of 1,263 an epoch: 63.3
    "steps": 80_000,
    "learning_rate": 1e-4,
    "weight_decay": 1e-4,
    "decay": "poly",
    "decay_power": 0.9,
}
UPERNET = {
    "data": "ade20k",
    "head": "upernet",
    "epochs": 127,  # 126.7
    "steps": 160_000,
    "learning_rate": 6e-5,
    "weight_decay": 0.01,
    "warmup_steps": 1500,
    "warmup_start": 1e-6,
    "decay": "poly",
}
COCO = {"data": "coco", "warmup_steps": 500, "decay": "steps"}
ONE_TIME = {**COCO, "epochs": 12, "decay_epochs": (8, 11)}
THREE_TIMES = {
    **COCO,
    "weight_decay": 0.05,
    "epochs": 36,
    "decay_epochs": (27, 33),
    "short_sides": (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
    "crop": True,
}
RETINANET = {**ONE_TIME, "head": "retinanet", "learning_rate": 4e-4, "weight_decay": 1e-4}
MASK_RCNN = {**ONE_TIME, "head": "mask_rcnn", "weight_decay": 0.05}
MASK_RCNN_3X = {**THREE_TIMES, "head": "mask_rcnn"}
CASCADE_3X = {**THREE_TIMES, "head": "cascade_mask_rcnn"}

NAMED: dict[str, dict[str, Any]] = {
    **{f"{model}_semantic_fpn_ade20k": SEMANTIC_FPN for model in DROP_PATHS},
    **{f"{model}_upernet_ade20k": UPERNET for model in list(DROP_PATHS)[1:7]},
    **{f"ssvit_{size}_retinanet_1x_coco": RETINANET for size in ("tiny", "small", "base", "large")},
    "ssvit_tiny_mask_rcnn_1x_coco": {**MASK_RCNN, "learning_rate": 4e-4},
    "ssvit_small_mask_rcnn_1x_coco": {**MASK_RCNN, "learning_rate": 4e-4},
    "ssvit_base_mask_rcnn_1x_coco": {**MASK_RCNN, "learning_rate": 4e-4},
    "ssvit_large_mask_rcnn_1x_coco": {**MASK_RCNN, "learning_rate": 2e-4},
    "svit_small_mask_rcnn_1x_coco": {**MASK_RCNN, "learning_rate": 4e-4},
    "svit_base_mask_rcnn_1x_coco": {**MASK_RCNN, "learning_rate": 4e-4},
    "svit_large_mask_rcnn_1x_coco": {**MASK_RCNN, "learning_rate": 2e-4},
    "ssvit_small_mask_rcnn_3x_coco": {**MASK_RCNN_3X, "learning_rate": 4e-4},
    "ssvit_base_mask_rcnn_3x_coco": {**MASK_RCNN_3X, "learning_rate": 2e-4},
    "svit_small_mask_rcnn_3x_coco": {**MASK_RCNN_3X, "learning_rate": 4e-4},
    "svit_base_mask_rcnn_3x_coco": {**MASK_RCNN_3X, "learning_rate": 2e-4},
    "svit_large_mask_rcnn_3x_coco": {**MASK_RCNN_3X, "learning_rate": 2e-4},
    "ssvit_small_cascade_mask_rcnn_3x_coco": {**CASCADE_3X, "learning_rate": 4e-4},
    "ssvit_base_cascade_mask_rcnn_3x_coco": {**CASCADE_3X, "learning_rate": 2e-4},
    "svit_base_cascade_mask_rcnn_3x_coco": {**CASCADE_3X, "learning_rate": 2e-4},
}


@pytest.mark.parametrize("name", NAMED)
def test_every_field_of_a_named_recipe_is_as_written_or_the_default(name):
    model = next(model for model in DROP_PATHS if name.startswith(f"{model}_"))
    kind, table = (
        (SegmentationRecipe, SEGMENTATION_RECIPES) if name.endswith("ade20k") else (DetectionRecipe, DETECTION_RECIPES)
    )
    own = {"name": name, "model": model, "weights": f"runs/{model}_imagenet/model", "drop_path": DROP_PATHS[model]}
    assert get_recipe(name, table) == kind(**own, **ON_GPUS, **NAMED[name])


def test_these_are_all_named_recipes():
    scenes = {"semantic_fpn_scenes", "mask_rcnn_scenes"}
    assert {*SEGMENTATION_RECIPES, *DETECTION_RECIPES} == {*NAMED} | scenes


SEGMENTATION_DEFAULTS = {
    "head": "semantic_fpn",
    "head_dim": None,
    "pyramid_dim": 256,
    "drop_rate": 0.1,
    "auxiliary_weight": 0.4,
    "image_size": 512,
    "scale": (0.5, 2.0),
    "largest_class": 0.75,
    "horizontal_flip": 0.5,
    "color_jitter": True,
    "decay_power": 1.0,
    "warmup_steps": 0,
    "clip_grad": None,
    "sync_batch_norm": True,
}
DETECTION_DEFAULTS = {
    "head": "mask_rcnn",
    "pyramid_dim": 256,
    "short_sides": (800,),
    "long_side": 1333,
    "crop": False,
    "horizontal_flip": 0.5,
    "anchor_scale": 8.0,
    "box_dim": 1024,
    "mask_convs": 4,
    "num_proposals": None,
    "num_samples": 512,
    "warmup_start": 0.001,
    "clip_grad": None,
    "sync_batch_norm": True,
}


@pytest.mark.parametrize(
    ("kind", "written"), [(SegmentationRecipe, SEGMENTATION_DEFAULTS), (DetectionRecipe, DETECTION_DEFAULTS)]
)
def test_defaults_are_the_authors(kind, written):
    recipe = kind(model="ssvit_tiny", data="scenes", epochs=1, batch_size=16, learning_rate=1e-4, decay="poly")
    assert {field: getattr(recipe, field) for field in written} == written


def build(recipe: DenseRecipe) -> nn.Module:
    """The recipe's model, on a small backbone and without memory."""
    recipe = dataclasses.replace(recipe, model="ssvit_nano", weights=None)
    with torch.device("meta"):
        return build_dense_model(recipe, 7, print)


def test_recipes_build_the_authors_heads():
    recipe = get_recipe("ssvit_small_semantic_fpn_ade20k", SEGMENTATION_RECIPES)
    fpn, upernet = build(recipe), build(get_recipe("ssvit_small_upernet_ade20k", SEGMENTATION_RECIPES))
    assert fpn.pyramid.layer_blocks[0][0].out_channels == 256
    assert (fpn.head.classifier.in_channels, fpn.head.dropout.rate, fpn.head.classifier.out_channels) == (128, 0.1, 7)
    assert (upernet.head.classifier.in_channels, upernet.head.dropout.rate) == (512, 0.1)
    assert (upernet.auxiliary_head.classifier.in_channels, upernet.auxiliary_head.dropout.rate) == (256, 0.1)
    assert [pool[0].output_size for pool in upernet.head.pools] == [1, 2, 3, 6]
    small = build(dataclasses.replace(recipe, pyramid_dim=24, head_dim=40, drop_rate=0.3))
    assert small.pyramid.layer_blocks[0][0].out_channels == 24
    assert (small.head.classifier.in_channels, small.head.dropout.rate) == (40, 0.3)


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn", "cascade_mask_rcnn"])
def test_options_reach_the_heads_of_detectors(head, monkeypatch):
    seen = {}
    create = timm.create_model

    def watched(name, **arguments):
        if not seen:  # the head is built first, and builds its backbone
            seen.update(arguments, name=name)
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", watched)
    recipe = dataclasses.replace(get_recipe("mask_rcnn_scenes", DETECTION_RECIPES), head=head, drop_path=0.2)
    build(recipe)
    box = {"anchor_scale": 8.0, "box_dim": 256, "mask_convs": 2, "num_samples": 32}
    proposals = {"num_proposals": 50, "num_training_proposals": 50}
    common = {"name": head, "num_classes": 7, "backbone": "ssvit_nano", "pyramid_dim": 64}
    expected = common | ({} if head == "retinanet" else {**box, **proposals})
    assert {name: seen[name] for name in expected} == expected
    assert seen["backbone_args"] == {"drop_path_rate": 0.2}
    if head != "retinanet":
        seen.clear()
        build(dataclasses.replace(recipe, num_proposals=None))
        assert not {*proposals} & {*seen}


# --------------------------------------------------------------------------------------------------------
# Schedules
# --------------------------------------------------------------------------------------------------------

PLAIN = SegmentationRecipe(
    model="ssvit_nano", data="scenes", epochs=12, batch_size=4, learning_rate=0.2, decay="poly", decay_power=0.9
)


def make_optimizer() -> Optimizer:
    return SGD([nn.Parameter(torch.zeros(1))], lr=0.2)


def list_rates(recipe: DenseRecipe, steps_per_epoch: int, count: int) -> list[float]:
    """The learning rate that each step has, where the scheduler is called as the trainer does."""
    optimizer = make_optimizer()
    scheduler = recipe.make_scheduler(optimizer, steps_per_epoch)
    rates = []
    for number in range(1, count + 1):
        scheduler.step_update(number)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def list_torch_rates(scheduler: LRScheduler, count: int) -> list[float]:
    rates = []
    for _ in range(count):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("steps", "total"), [(None, 60), (47, 47)])
def test_poly_is_torchs(steps, total):
    expected = list_torch_rates(PolynomialLR(make_optimizer(), total_iters=total, power=0.9), total)
    rates = list_rates(dataclasses.replace(PLAIN, steps=steps), 5, total)
    assert rates == pytest.approx(expected)
    assert rates[0] == 0.2
    assert rates[-1] == pytest.approx(0.2 * (1 / total) ** 0.9)  # the last step learns too


def test_steps_are_torchs():
    recipe = dataclasses.replace(PLAIN, decay="steps", decay_epochs=(8, 11))
    optimizer = make_optimizer()
    by_epoch = list_torch_rates(MultiStepLR(optimizer, [8, 11], gamma=0.1), 12)
    assert by_epoch == pytest.approx([0.2] * 8 + [0.02] * 3 + [0.002])
    assert list_rates(recipe, 5, 60) == pytest.approx([rate for rate in by_epoch for _ in range(5)])


@pytest.mark.parametrize("decay", [{"decay": "poly"}, {"decay": "steps", "decay_epochs": (1, 11)}])
def test_the_warm_up_multiplies_what_the_step_would_have(decay):
    """mmcv's: regular_lr * (1 - (1 - step / warm-up) * (1 - start)), of a regular_lr that falls meanwhile."""
    recipe = dataclasses.replace(PLAIN, **decay)
    without = list_rates(recipe, 5, 60)
    rates = list_rates(dataclasses.replace(recipe, warmup_steps=8, warmup_start=0.001), 5, 60)
    warmed = [rate * (1 - (1 - step / 8) * (1 - 0.001)) for step, rate in enumerate(without[:8])]
    assert rates == pytest.approx([*warmed, *without[8:]])
    assert rates[0] == pytest.approx(0.2 * 0.001)
    linear = LambdaLR(make_optimizer(), lambda step: 0.001 + 0.999 * step / 8)
    shares = [rate / other for rate, other in zip(rates, without, strict=True)][:8]
    assert [0.2 * share for share in shares] == pytest.approx(list_torch_rates(linear, 8))


def test_the_peak_does_not_follow_the_batch_size():
    assert {dataclasses.replace(PLAIN, batch_size=size).peak_learning_rate for size in (1, 16, 512)} == {0.2}


def test_upernet_by_hand():
    """Half of the warm-up is at half of the rate; at 80,000 of 160,000 steps half of it is left."""
    recipe = get_recipe("ssvit_small_upernet_ade20k", SEGMENTATION_RECIPES)
    assert recipe.count_steps(1263) == 160_000
    assert recipe.find_rate(0, 1263) == 1e-6
    assert recipe.find_rate(750, 1263) == pytest.approx(0.5 * (1 - 750 / 160_000), rel=1e-5)
    assert recipe.find_rate(1500, 1263) == pytest.approx(1 - 1500 / 160_000)
    assert recipe.find_rate(80_000, 1263) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "epochs", "expected"),
    [
        ("ssvit_small_upernet_ade20k", 12, {"steps": None, "warmup_steps": 142, "decay_epochs": ()}),
        ("ssvit_small_semantic_fpn_ade20k", 1, {"steps": None, "warmup_steps": 0}),
        ("ssvit_tiny_mask_rcnn_1x_coco", 6, {"steps": None, "warmup_steps": 250, "decay_epochs": (4, 5)}),
        ("ssvit_tiny_mask_rcnn_1x_coco", 3, {"steps": None, "warmup_steps": 125, "decay_epochs": (2,)}),
        ("ssvit_tiny_mask_rcnn_1x_coco", 1, {"steps": None, "warmup_steps": 42, "decay_epochs": (1,)}),
        ("ssvit_base_mask_rcnn_3x_coco", 12, {"steps": None, "warmup_steps": 167, "decay_epochs": (9, 11)}),
        ("semantic_fpn_scenes", 1, {"warmup_steps": 33, "decay_epochs": ()}),
    ],
)
def test_fewer_epochs_shorten_the_phases_of_a_named_recipe(name, epochs, expected):
    command = SEGMENT if name in SEGMENTATION_RECIPES else DETECT
    recipe, named = command.parse([name, "--epochs", str(epochs)])
    assert named
    assert {field: getattr(recipe, field) for field in ("epochs", *expected)} == {"epochs": epochs, **expected}
    assert recipe == command.recipes[name]().change_epochs(epochs)


def test_a_warm_up_as_long_as_the_run_is_refused():
    recipe = dataclasses.replace(PLAIN, steps=20, warmup_steps=20)
    with pytest.raises(ValueError, match=r"--warmup-steps is 20 and the run has 20 steps: .* use --warmup-steps 2"):
        list_rates(recipe, 5, 1)
    assert len(list_rates(dataclasses.replace(recipe, warmup_steps=19), 5, 1)) == 1


def test_more_epochs_and_given_phases_stay_as_they_are():
    recipe, _ = DETECT.parse(["ssvit_tiny_retinanet_1x_coco", "--epochs", "24"])
    assert (recipe.warmup_steps, recipe.decay_epochs) == (500, (8, 11))
    recipe, _ = SEGMENT.parse(["ssvit_tiny_semantic_fpn_ade20k", "--epochs", "100"])
    assert (recipe.epochs, recipe.steps, recipe.count_steps(30)) == (100, None, 3000)
    recipe, _ = DETECT.parse(["ssvit_tiny_retinanet_1x_coco", "--epochs", "6", "--decay-epochs", "3", "5"])
    assert (recipe.warmup_steps, recipe.decay_epochs) == (250, (3, 5))
    recipe, _ = SEGMENT.parse(["ssvit_tiny_semantic_fpn_ade20k", "--steps", "100"])
    assert (recipe.epochs, recipe.count_steps(1263)) == (64, 100)
    recipe, named = SEGMENT.parse(["--epochs", "7"])
    assert (named, recipe.name, recipe.warmup_steps) == (False, "semantic_fpn_scenes", 100)


# --------------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SEGMENTATION_RECIPES, *DETECTION_RECIPES])
def test_every_named_recipe_is_printed(name, capsys):
    segments = name in SEGMENTATION_RECIPES
    script, table = ("segment.py", SEGMENTATION_RECIPES) if segments else ("detect.py", DETECTION_RECIPES)
    call_command(script, name, "--print-recipe", "--seed", "3")
    printed = json.loads(capsys.readouterr().out)
    expected = json.loads(dataclasses.replace(table[name](), seed=3).to_json())
    assert printed == expected
    assert printed["name"] == name


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("segment.py", ["mask_rcnn_scenes"], "recipe of another command: use recipes/detect.py mask_rcnn_scenes$"),
        ("segment.py", ["digits"], "digits is a recipe of another command: use recipes/train.py digits$"),
        ("detect.py", ["semantic_fpn_scenes"], "use recipes/segment.py semantic_fpn_scenes$"),
        ("train.py", ["mask_rcnn_scenes"], "use recipes/detect.py mask_rcnn_scenes$"),
        ("segment.py", ["semantic_fpn_scene"], "recipe 'semantic_fpn_scene' is unknown.*'semantic_fpn_scenes'"),
        ("segment.py", ["--epochs", "3", "semantic_fpn_scenes"], "segment.py semantic_fpn_scenes --epochs 3$"),
        ("detect.py", ["--epochs", "3", "mask_rcnn_scenes"], "detect.py mask_rcnn_scenes --epochs 3$"),
        ("segment.py", ["--steps", "0"], "--steps is 0: it must be above 0"),
        ("segment.py", ["--pyramid-dim", "0"], "--pyramid-dim is 0: it must be above 0"),
        ("segment.py", ["--head-dim", "-4"], "--head-dim is -4: it must be above 0"),
        ("segment.py", ["--image-size", "0"], "--image-size is 0: it must be above 0"),
        ("segment.py", ["--decay-power", "0"], "--decay-power is 0.0: it must be above 0"),
        ("segment.py", ["--largest-class", "0"], "--largest-class is 0.0: it must be above 0"),
        ("segment.py", ["--warmup-steps", "-1"], "--warmup-steps is -1: it must be 0 or more"),
        ("segment.py", ["--warmup-start", "2"], "--warmup-start is 2.0: it must be between 0 and 1"),
        ("segment.py", ["--auxiliary-weight", "-1"], "--auxiliary-weight is -1.0: it must be 0 or more"),
        ("segment.py", ["--drop-rate", "1"], "--drop-rate is 1.0: it must be 0 or more and below 1"),
        ("segment.py", ["--scale", "2", "1"], "--scale is 2.0 1.0: it must be a smaller and a larger number above 0"),
        ("segment.py", ["--scale", "0", "1"], "--scale is 0.0 1.0: it must be a smaller and a larger number above 0"),
        ("segment.py", ["--head", "unet"], "'unet' for argument '--head'. Expected one of"),
        ("segment.py", ["--decay", "steps"], "--decay is steps, without --decay-epochs: name the epochs, or use"),
        ("detect.py", ["--decay", "steps", "--decay-epochs", "8", "8"], "--decay-epochs is 8 8: they must be above 0"),
        ("detect.py", ["--decay-epochs", "9", "8"], "--decay-epochs is 9 8: they must be above 0, and rise"),
        ("detect.py", ["--decay-epochs", "0", "8"], "--decay-epochs is 0 8: they must be above 0, and rise"),
        ("detect.py", ["--short-sides", "16", "64"], "--short-sides is '16 64': give one or more, each at least 32"),
        ("detect.py", ["--num-proposals", "0"], "--num-proposals is 0: it must be above 0"),
        ("detect.py", ["--long-side", "0"], "--long-side is 0: it must be above 0"),
        ("detect.py", ["--crop-pct", "1"], "--crop-pct"),  # of classification
        ("detect.py", ["--ignore-zero"], "--ignore-zero"),  # of segmentation
    ],
)
def test_bad_options_are_one_line(capsys, script, arguments, expected):
    line = fail_command(capsys, script, *arguments, "--print-recipe")
    assert re.search(expected, line), line


def test_images_without_objects_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fail_command(capsys, "detect.py", "--data", "digits")
    assert "--data digits has no boxes and masks of objects for each image: use" in line
    assert list(tmp_path.iterdir()) == []


def test_compiled_runs_pad_to_few_sizes():
    recipe = dataclasses.replace(PLAIN, compile=True)
    model = build(recipe)
    task = object.__new__(Segmentation)
    assert task.configure_data(recipe, model)["multiple"] == 256
    config = task.configure_data(PLAIN, model)
    assert (config["multiple"], config["input_size"], config["crop_pct"]) == (1, (3, 512, 512), 1.0)
