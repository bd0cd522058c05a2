"""Classification: mixed and smoothed targets, and timm's augmentation with a posterization that Pillow takes."""

import dataclasses
import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import auto_augment
from timm.loss import SoftTargetCrossEntropy
from torch import nn

from s3a.data import load_data
from s3a.training.build import build_run
from s3a.training.processes import seed_step
from s3a.training.run_folder import EpochMetrics
from s3a.training.tasks import classification
from s3a.training.tasks.classification import (
    Classification,
    count_correct,
    list_operations,
    make_augmentation,
    posterize,
)


def test_mixed_targets_are_smoothed_and_their_loss_is_soft(recipe):
    task = Classification(load_data(recipe.data, recipe.data_dir))
    loss = task.make_loss(dataclasses.replace(recipe, mixup=0.8, cutmix=1.0, label_smoothing=0.1))
    assert isinstance(loss.criterion, SoftTargetCrossEntropy)
    images, targets = loss.mixup(torch.rand(16, 3, 32, 32), torch.randint(2, (16,)))
    assert images.shape == (16, 3, 32, 32)
    torch.testing.assert_close(targets.sum(1), torch.ones(16))
    assert targets.min() == pytest.approx(0.05)
    plain = task.make_loss(recipe)
    assert plain.mixup is None
    assert isinstance(plain.criterion, nn.CrossEntropyLoss)
    assert plain.criterion.label_smoothing == recipe.label_smoothing


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"label_smoothing": 0.1}, "training, with label smoothing 0.1,\naugmentation"),
        ({"label_smoothing": 0.0}, "training, with augmentation"),
        ({"mixup": 0.8, "cutmix": 1.0}, "training, with mixup, cutmix, label\nsmoothing 0.1, augmentation"),
    ],
)
def test_the_legend_says_why_the_training_loss_is_larger(recipe, changes, label):
    task = Classification(load_data(recipe.data, recipe.data_dir))
    line = {"epoch": 1, "train_loss": 2.5, "val_loss": 1.5, "val_top1": 0.5, "learning_rate": 1.0}
    metrics = EpochMetrics.from_line(line | {"images_per_second": 1.0, "loader_wait": 0.0})
    loss, _ = task.list_panels(dataclasses.replace(recipe, **changes), [metrics])
    assert loss.curves == {label: [2.5], "validation, plain": [1.5]}


def test_every_option_of_the_mixing_reaches_timm(recipe):
    """A run has no other place where they show: it trains with swapped ones too."""
    task = Classification(load_data(recipe.data, recipe.data_dir))
    fields = {"mixup": 0.3, "cutmix": 0.7, "mixup_switch": 0.2, "label_smoothing": 0.15}
    mixup = task.make_loss(dataclasses.replace(recipe, **fields)).mixup
    found = {name: getattr(mixup, name) for name in ("mixup_alpha", "cutmix_alpha", "switch_prob", "label_smoothing")}
    assert found == {"mixup_alpha": 0.3, "cutmix_alpha": 0.7, "switch_prob": 0.2, "label_smoothing": 0.15}
    assert (mixup.num_classes, mixup.mix_prob, mixup.mode) == (2, 1.0, "batch")


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_one_kind_of_mixing_alone_mixes(recipe, mixup, cutmix):
    task = Classification(load_data(recipe.data, recipe.data_dir))
    recipe = dataclasses.replace(recipe, mixup=mixup, cutmix=cutmix)
    assert (task.make_loss(recipe).mixup is not None) == (mixup + cutmix > 0)


def test_a_head_is_new_where_the_classes_are_others(recipe):
    """Also of a model of timm's with two heads, for which timm makes a new tuple of them whenever it is asked."""
    task = Classification(load_data("imagefolder", recipe.data_dir))
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=2)
    model.pretrained_cfg["label_names"] = task.data.label_names
    head = model.head
    assert not task.fit_head(model)
    assert model.head is head
    model.pretrained_cfg["label_names"] = ["cat", "dog"]
    assert task.fit_head(model)
    assert model.head is not head


def test_scores_are_counts_by_hand():
    """Six classes, so that the first five leave one out: the label is the highest logit, the fifth, the sixth."""
    logits = torch.tensor([6.0, 5, 4, 3, 2, 1]).repeat(4, 1)
    labels = torch.tensor([0, 4, 5, -1])  # the last is no image
    right, among_five, loss = count_correct(logits, labels).tolist()
    assert (right, among_five) == (1, 2)
    assert loss == pytest.approx(sum(logits[0].logsumexp(0).item() - score for score in (6, 2, 1)), rel=1e-6)
    scores = Classification.compute_scores(None, [1.0, 2.0, 6.0], 3, [])
    assert scores == {"loss": 2.0, "top1": 1 / 3, "top5": 2 / 3}


def test_every_option_of_the_augmentation_reaches_timm(recipe, monkeypatch):
    given = {}
    create = classification.create_transform
    monkeypatch.setattr(
        classification, "create_transform", lambda **options: given.update(options) or create(**options)
    )
    fields = {
        "crop_scale": (0.3, 0.6),
        "crop_ratio": (0.8, 1.1),
        "horizontal_flip": 0.25,
        "color_jitter": 0.35,
        "auto_augment": "rand-m7",
    }
    make_augmentation(dataclasses.replace(recipe, **fields), DATA_CONFIG)
    assert given == {
        "is_training": True,
        "scale": (0.3, 0.6),
        "ratio": (0.8, 1.1),
        "hflip": 0.25,
        "color_jitter": 0.35,
        "auto_augment": "rand-m7",
        "normalize": False,
        **DATA_CONFIG,
    }


DATA_CONFIG = {"input_size": (3, 8, 8), "interpolation": "bicubic", "mean": (0, 0, 0)}


def seed_all(seed: int) -> None:
    """Seeds the global generators as a draw of the loaders is documented to."""
    state = int(np.random.SeedSequence([3, seed]).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


@pytest.mark.parametrize(("erasing", "num_workers"), [(0.25, 0), (0.25, 2), (1.0, 0)])
def test_the_images_of_a_run_are_those_of_timms_whole_transform(recipe, monkeypatch, erasing, num_workers):
    """Normalised by timm, and erased by it: every pixel of every image, and the noise in its place."""
    fields = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": erasing, "repeats": 3, "seed": 3}
    run = build_run(dataclasses.replace(recipe, num_workers=num_workers, **fields))
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        monkeypatch.setitem(auto_augment.NAME_TO_OP, name, posterize)
    whole = timm.data.create_transform(
        input_size=(3, 32, 32),
        is_training=True,
        scale=recipe.crop_scale,
        ratio=recipe.crop_ratio,
        hflip=recipe.horizontal_flip,
        color_jitter=recipe.color_jitter,
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=erasing,
        re_mode="pixel",
        interpolation=run.data_config["interpolation"],
        mean=run.data_config["mean"],
        std=run.data_config["std"],
    )
    position, num_erased = 0, 0
    for (batch,) in run.train_loader.epoch(1):
        assert batch.images.dtype == torch.uint8
        num_erased += len(batch.erasure.rectangles)
        for image, index in zip(run.train_loader.normalizer(batch).images, batch.indices.tolist(), strict=True):
            with Image.open(run.data.train.name_of(index)) as file:
                seed_all((1 * 3 + position % 3) * 48 + index)
                torch.testing.assert_close(image, whole(file.convert("RGB")), atol=1e-6, rtol=0)
            position += 1
    assert position == 48
    assert num_erased == 48 if erasing == 1 else 0 < num_erased < 48


def test_validation_images_of_a_run_are_those_of_timms_whole_transform(recipe):
    run = build_run(dataclasses.replace(recipe, crop_pct=0.8))
    whole = timm.data.create_transform(**run.data_config, is_training=False)
    for batch in run.val_loader:
        assert batch.images.dtype == torch.uint8
        ready = run.val_loader.normalizer(batch).images
        for image, index in zip(ready, batch.indices.tolist(), strict=True):
            path = run.data.val.name_of(index) if index >= 0 else None
            with Image.open(path) if path else Image.new("RGB", (32, 32)) as file:
                torch.testing.assert_close(image, whole(file.convert("RGB")), atol=1e-6, rtol=0)


def test_erasing_is_the_recipes(recipe):
    task = Classification(load_data(recipe.data, recipe.data_dir))
    erasing = task.make_erasing(dataclasses.replace(recipe, random_erasing=0.45))
    assert (erasing.probability, erasing.per_pixel, erasing.max_count) == (0.45, True, 1)
    assert task.make_erasing(recipe) is None


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-mstd2-inc1-n4", "rand-m10", "v0", "original"])
def test_policies_take_every_image(recipe, policy):
    """Over as many draws as show each operation at its strongest; Pillow refuses to keep no bits at all."""
    augment = make_augmentation(dataclasses.replace(recipe, auto_augment=policy), DATA_CONFIG)
    image = Image.effect_noise((12, 12), 64).convert("RGB")
    random.seed(0)
    for _ in range(3000):
        assert augment(image).dtype == torch.uint8


def test_posterizing_keeps_the_upper_bits():
    image = Image.linear_gradient("L")
    for bits in range(9):
        expected = np.asarray(image) >> (8 - bits) << (8 - bits)
        assert np.array_equal(np.asarray(posterize(image, bits)), expected)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-mstd2", "v0", "original", "augmix-m5-w4-d2"])
def test_the_augmentation_is_that_of_a_changed_table_of_timms(recipe, policy, monkeypatch):
    """The same pixels and the same draws as if timm's own table held our posterization; and the table is timm's."""
    names = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")
    assert all(auto_augment.NAME_TO_OP[name] is auto_augment.posterize for name in names)
    recipe = dataclasses.replace(recipe, auto_augment=policy)
    ours = make_augmentation(recipe, DATA_CONFIG)
    monkeypatch.setattr(auto_augment, "NAME_TO_OP", auto_augment.NAME_TO_OP | dict.fromkeys(names, posterize))
    changed = make_augmentation(recipe, DATA_CONFIG)
    posterizing = [operation for operation in list_operations(ours) if operation.name.startswith("Posterize")]
    assert posterizing
    assert all(operation.aug_fn is posterize for operation in posterizing)
    image = Image.effect_noise((12, 12), 64).convert("RGB")
    for seed in range(200):
        seen = []
        for augment in (ours, changed):
            seed_step(seed, step=0, process=0)
            seen.append((augment(image).tolist(), random.random(), np.random.rand(), torch.rand(()).item()))
        assert seen[0] == seen[1]
