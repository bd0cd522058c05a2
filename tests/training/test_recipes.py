"""What the fields of a recipe do to a run, each against a plain computation or what is written down."""

import dataclasses
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from helpers.hub_server import TOKEN, Hub
from helpers.image_folder import make_image_folder
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.loss import SoftTargetCrossEntropy
from torch import nn

import s3a
from s3a.training import build
from s3a.training import signals as interrupts
from s3a.training import trainer as engine
from s3a.training.augmentation import posterize, train_transform
from s3a.training.checkpoints import CheckpointClock
from s3a.training.evaluation import UnreadableImagesError
from s3a.training.named_recipes import named_recipe
from s3a.training.recipe import Recipe
from s3a.weights.pretrained import load_pretrained


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def recipe(images: Path, tmp_path: Path) -> Recipe:
    return Recipe(
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


def train(recipe: Recipe, name: str | None = None, **changes: object) -> Path:
    """Trains a changed recipe, into a folder of that name beside the recipe's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = recipe.output_dir.with_name(name) if name else recipe.output_dir
    return engine.train(dataclasses.replace(recipe, output_dir=folder, **changes))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scores(folder: Path) -> list[float]:
    return [line[key] for line in metrics(folder) for key in ("train_loss", "val_loss", "val_top1")]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(str(folder)).state_dict()


# --------------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------------


def test_accumulated_passes_are_one_step(recipe):
    whole = train(recipe, "whole", freeze_batch_norm=True)
    parts = train(recipe, "parts", freeze_batch_norm=True, accumulate=4)
    assert scores(parts) == pytest.approx(scores(whole), rel=1e-4)


def test_checkpointed_gradients_are_the_same(recipe):
    """Drop path and BatchNorm's statistics included: the second forward must draw and count as the first."""
    plain = train(recipe, "plain", drop_path=0.3)
    spared = train(recipe, "spared", drop_path=0.3, grad_checkpointing=True)
    assert scores(spared) == pytest.approx(scores(plain), rel=1e-5)


def test_a_compiled_run_learns_and_saves_ordinary_weights(recipe, graphs):
    eager = train(recipe, "eager")
    compiled = train(recipe, "compiled", compile=True)
    assert graphs["runs"] > 0
    assert weights_of(compiled / "model").keys() == weights_of(eager / "model").keys()
    assert scores(compiled) == pytest.approx(scores(eager), rel=1e-3)


def test_the_average_is_that_of_the_steps(recipe, monkeypatch):
    """By its definition, with the decay of 512 images taken to this batch size."""
    decay, expected, step = 0.9 ** (16 / 512), {}, engine.train_step

    def watched(run, batches):
        if not expected:
            expected.update({key: value.clone().double() for key, value in run.bare_model.named_parameters()})
        step(run, batches)
        for key, value in run.bare_model.named_parameters():
            expected[key].mul_(decay).add_((1 - decay) * value.detach().double())

    monkeypatch.setattr(engine, "train_step", watched)
    state = weights_of(train(recipe, ema_decay=0.9) / "ema")
    for key, value in expected.items():
        torch.testing.assert_close(state[key].double(), value, rtol=1e-5, atol=1e-6)


def test_the_headline_is_the_better_of_plain_and_average(recipe, capsys):
    folder = train(recipe, epochs=3, ema_decay=0.9)
    lines = metrics(folder)
    plain, averaged = (max(line[key] for line in lines) for key in ("val_top1", "ema_top1"))
    name = "ema-best" if averaged > plain else "best"
    assert f"{folder / name} (best)" in capsys.readouterr().err
    assert json.loads((folder / name / "config.json").read_text())["score"]["top1"] == max(plain, averaged)


def test_mixed_targets_are_smoothed_and_their_loss_is_soft(recipe):
    built = build.build(dataclasses.replace(recipe, mixup=0.8, cutmix=1.0, label_smoothing=0.1))
    assert isinstance(built["criterion"], SoftTargetCrossEntropy)
    images, targets = built["mixup"](torch.rand(16, 3, 32, 32), torch.randint(2, (16,)))
    assert images.shape == (16, 3, 32, 32)
    torch.testing.assert_close(targets.sum(1), torch.ones(16))
    assert targets.min() == pytest.approx(0.05)
    plain = build.build(dataclasses.replace(recipe, output_dir=recipe.output_dir.with_name("plain")))
    assert isinstance(plain["criterion"], nn.CrossEntropyLoss)


def test_drawing_does_not_depend_on_the_steps_before():
    """What makes a resumed run equal to an undisturbed one."""
    draws = []
    for burnt in (0, 100):
        build.seed_step(3, step=7, process=0)
        draws.append((torch.rand(4).tolist(), np.random.rand(4).tolist()))
        torch.rand(burnt), np.random.rand(burnt)
    assert draws[0] == draws[1]
    others = [(3, 8, 0), (3, 7, 1), (4, 7, 0)]
    for seed, step, process in others:
        build.seed_step(seed, step=step, process=process)
        assert torch.rand(4).tolist() != draws[0][0]


def test_steps_that_are_not_finite_are_skipped_and_counted(recipe, monkeypatch, capsys):
    step, losses = engine.train_step, []

    def poisoned(run, batches):
        factor = float("nan") if run.steps_done in (1, 4) else 1
        before = {key: value.clone() for key, value in run.bare_model.state_dict().items()}
        step(run, [batch._replace(images=batch.images * factor) for batch in batches])
        if run.progress.epoch == 0 and factor == 1:
            losses.append(run.progress.loss_sum - sum(losses))
        same = all(torch.equal(before[key], value) for key, value in run.bare_model.state_dict().items())
        assert same == (run.steps_done - 1 in (1, 4)), "parameters and statistics stay, or go on"

    monkeypatch.setattr(engine, "train_step", poisoned)
    folder = train(recipe, on_non_finite="skip", learning_rate=1e-2, clip_grad=1.0)
    assert [line["skipped_steps"] for line in metrics(folder)] == [1, 1]
    assert metrics(folder)[0]["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert all(value.isfinite().all() for value in weights_of(folder / "model").values())
    assert "skipped step 5: the loss is nan" in capsys.readouterr().err


def test_a_checkpoint_before_the_first_step_leaves_the_optimizer_alone(recipe, monkeypatch):
    """torch would take a step to have a state; whoever skips the first step would count one more from there on."""
    step = engine.train_step

    def poisoned(run, batches):
        factor = float("nan") if run.steps_done == 0 else 1
        step(run, [batch._replace(images=batch.images * factor) for batch in batches])

    monkeypatch.setattr(engine, "train_step", poisoned)
    skipping = dataclasses.replace(recipe, on_non_finite="skip", learning_rate=1e-2, clip_grad=1.0)
    often, seldom = train(skipping, "often", checkpoint_every="1"), train(skipping, "seldom")
    before, after = weights_of(seldom / "model"), weights_of(often / "model")
    assert all(torch.equal(value, after[key]) for key, value in before.items())


# --------------------------------------------------------------------------------------------------------
# Images that cannot be read
# --------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(images: Path, tmp_path: Path) -> Path:
    """A copy of the images, of which two of 48 for training cannot be read."""
    folder = shutil.copytree(images, tmp_path / "images")
    for name in ("dark/001.png", "light/002.jpg"):
        path = folder / "train" / name
        path.write_bytes(path.read_bytes()[:300])
    return folder


def test_unreadable_images_are_listed_up_to_the_limit(recipe, broken):
    folder = train(recipe, data_dir=broken, max_bad_images=2 / 48)
    listed = (folder / "unreadable_train.txt").read_text().splitlines()
    assert [Path(line).relative_to(broken / "train").as_posix() for line in listed] == ["dark/001.png", "light/002.jpg"]
    assert len(metrics(folder)) == 2


def test_more_unreadable_images_stop_the_run_with_their_names(recipe, broken):
    with pytest.raises(UnreadableImagesError, match=r"2 training images cannot be read, 1 are allowed.*dark/001\.png"):
        train(recipe, data_dir=broken, max_bad_images=1.5 / 48)


def test_of_validation_images_none_may_be_unreadable_unless_allowed(recipe, broken):
    (broken / "val" / "dark" / "000.png").write_bytes(b"")
    recipe = dataclasses.replace(recipe, data_dir=broken, max_bad_images=0.5)
    with pytest.raises(UnreadableImagesError, match=r"1 validation images .*, 0 are allowed.*val/dark/000\.png"):
        train(recipe)
    [checkpoint] = (recipe.output_dir / "checkpoints").iterdir()
    assert checkpoint.name == "step-000000003-epoch-00000", "the epoch's steps are not lost"
    folder = train(recipe, max_bad_val_images=1 / 18)
    assert [line["unreadable_val"] for line in metrics(folder)] == [1, 1]
    right = [line["val_top1"] * 17 for line in metrics(folder)]
    assert right == pytest.approx([round(count) for count in right])
    assert (folder / "unreadable_val.txt").read_text() == f"{broken / 'val' / 'dark' / '000.png'}\n"


def test_images_of_every_kind_are_trained_on(recipe, images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    color, into = Image.fromarray(pixels), folder / "train" / "dark"
    color.convert("CMYK").save(into / "cmyk.jpg")
    color.convert("L").save(into / "gray.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(into / "deep.png")
    color.resize((1, 1)).save(into / "dot.png")
    color.convert("RGBA").save(into / "alpha.png")
    run = train(recipe, data_dir=folder, batch_size=53, num_workers=1, max_bad_images=0.0)
    assert not (run / "unreadable_train.txt").exists()


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-mstd2-inc1-n4", "rand-m10", "v0", "original"])
def test_policies_take_every_image(recipe, policy):
    """Over as many draws as show each operation at its strongest; Pillow refuses to keep no bits at all."""
    data_config = {"input_size": (3, 8, 8), "interpolation": "bicubic", "mean": (0, 0, 0), "std": (1, 1, 1)}
    augment = train_transform(dataclasses.replace(recipe, auto_augment=policy), data_config)
    image = Image.effect_noise((12, 12), 64).convert("RGB")
    random.seed(0)
    for _ in range(3000):
        assert augment(image).isfinite().all()


def test_posterizing_keeps_the_upper_bits():
    image = Image.linear_gradient("L")
    for bits in range(9):
        expected = np.asarray(image) >> (8 - bits) << (8 - bits)
        assert np.array_equal(np.asarray(posterize(image, bits)), expected)


# --------------------------------------------------------------------------------------------------------
# Fine-tuning
# --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    model = timm.create_model("ssvit_nano", num_classes=2)
    model.save_pretrained(tmp_path / "pretrained", config={"label_names": ["dark", "light"]})
    return tmp_path / "pretrained"


def test_fine_tuning_keeps_the_body_and_the_head_of_the_same_classes(recipe, pretrained):
    state = weights_of(pretrained)
    model = build.build(dataclasses.replace(recipe, weights=str(pretrained), image_size=48))["model"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_fine_tuning_on_other_classes_and_another_size(recipe, pretrained, tmp_path, monkeypatch):
    folder = shutil.copytree(recipe.data_dir, tmp_path / "images")
    for split in ("train", "val"):
        shutil.copytree(folder / split / "dark", folder / split / "shadow")
    seen, step = [], engine.train_step

    def watched(run, batches):
        seen.append((batches[0].images.shape, all(module.training for module in run.model.modules())))
        if len(seen) == 1:
            state = weights_of(pretrained)
            body = {key: value for key, value in run.bare_model.state_dict().items() if not key.startswith("head")}
            assert all(torch.equal(value, state[key]) for key, value in body.items())
        step(run, batches)

    monkeypatch.setattr(engine, "train_step", watched)
    run = train(recipe, weights=str(pretrained), data_dir=folder, image_size=48)
    assert set(seen) == {((16, 3, 48, 48), True)}
    tuned = s3a.SSViT.from_pretrained(run / "model")
    assert (tuned.num_classes, tuned.pretrained_cfg["label_names"]) == (3, ["dark", "light", "shadow"])


def test_weights_of_another_model_are_refused(recipe, pretrained):
    with pytest.raises(ValueError, match="holds a ssvit_nano: use --model ssvit_nano"):
        train(recipe, model="svit_nano", weights=str(pretrained))


# --------------------------------------------------------------------------------------------------------
# Around the run
# --------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_metrics(recipe):
    folder = train(recipe, track="tensorboard")
    logs = [EventAccumulator(str(path)).Reload() for path in (folder / "tracking").rglob("*tfevents*")]
    [log] = [log for log in logs if "val_top1" in log.Tags()["scalars"]]  # the others hold the recipe
    logged = [(event.step, event.value) for event in log.Scalars("val_top1")]
    assert logged == [(3 * line["epoch"], pytest.approx(line["val_top1"])) for line in metrics(folder)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "--precision is fp16, which needs a GPU: use bf16 or no"),
        ({"batch_size": 15, "mixup": 0.8}, "--batch-size is 15, 15 images a forward: .* an even number"),
        ({"image_size": 16}, "--image-size is 16: .*32"),
        ({"auto_augment": "nonsense"}, "--auto-augment is 'nonsense'"),
        ({"model": "ssvit_nanno"}, "did you mean 'ssvit_nano'"),
    ],
)
def test_what_cannot_run_here_is_refused_without_a_trace(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        train(recipe, **changes)
    assert not recipe.output_dir.exists()


def test_a_tracker_that_is_not_installed_is_named(recipe, monkeypatch):
    monkeypatch.setattr(build, "is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match="--track is wandb, which is not installed: pip install wandb"):
        train(recipe, track="wandb")


def test_a_clock_of_minutes(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = CheckpointClock("2m")
    due = []
    for now in (100.0, 219.0, 221.0):  # noqa: B007  read by the clock
        due.append(clock.due(step=1))
    clock.restart()
    assert [*due, clock.due(step=2)] == [False, False, True, False]
    steps = CheckpointClock("3")
    assert [steps.due(step) for step in range(1, 8)] == [False, False, True, False, False, True, False]
    assert not CheckpointClock(None).due(step=1)


def test_a_run_has_one_process_at_a_time(recipe, monkeypatch):
    step, tried = engine.train_step, []

    def intruded(run, batches):
        if not tried:
            other = "from s3a.training.run_folder import *; from s3a.training.recipe import Recipe; import sys, json; "
            other += "claim_folder(Recipe(model='ssvit_nano', data='digits', image_size=32, epochs=1, batch_size=8, "
            other += f"learning_rate=1.0, output_dir=Path({str(recipe.output_dir)!r})))"
            tried.append(subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False))
        step(run, batches)

    monkeypatch.setattr(engine, "train_step", intruded)
    folder = train(recipe)
    assert f"ValueError: {folder} is being trained by another process" in tried[0].stderr
    assert json.loads((folder / "recipe.json").read_text())["batch_size"] == 16
    assert len(metrics(train(recipe))) == 2, "the lock ends with the run"


def test_the_end_of_a_launcher_asks_to_stop(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    requests = interrupts.StopRequests()
    assert requests.received is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert requests.received == "the end of its launcher"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert interrupts.StopRequests().received is None
    monkeypatch.undo()
    assert interrupts.StopRequests().received is None, "without a launcher a parent may go, as a shell does under nohup"


def test_published_at_the_end(recipe, hub: Hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = train(recipe, push_to_hub="lizards/trained")
    pushed = hub.files("lizards/trained")
    assert pushed["model.safetensors"] == (folder / "best" / "model.safetensors").read_bytes()
    assert b'from_pretrained("lizards/trained")' in pushed["README.md"]
    assert s3a.SSViT.from_pretrained("lizards/trained").num_classes == 2
    train(recipe, push_to_hub="lizards/again")  # a finished run is published without training
    assert hub.files("lizards/again")["model.safetensors"] == pushed["model.safetensors"]


def test_no_right_to_publish_shows_before_the_first_epoch(recipe, hub: Hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match="lizards/trained"):
        train(recipe, push_to_hub="lizards/trained")
    assert not (recipe.output_dir / "metrics.jsonl").exists()


# --------------------------------------------------------------------------------------------------------
# The paper's recipes
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "drop_path"), [("tiny", 0.1), ("small", 0.15), ("base", 0.4), ("large", 0.5)])
def test_the_papers_recipe(size, drop_path):
    recipe = named_recipe(f"ssvit_{size}_imagenet")
    written = {
        "drop_path": drop_path,
        "image_size": 224,
        "epochs": 300,
        "warmup_epochs": 5,
        "cooldown_epochs": 10,
        "schedule": "epoch",
        "learning_rate": 5e-4,
        "min_learning_rate": 1e-5,
        "weight_decay": 0.05,
        "label_smoothing": 0.1,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "random_erasing": 0.25,
        "repeats": 3,
        "mixup": 0.8,
        "cutmix": 1.0,
        "crop_pct": 0.875,
    }
    assert {key: getattr(recipe, key) for key in written} == written


def test_another_source_takes_the_place_of_the_recipes(tmp_path, monkeypatch, capsys):
    def printed(*options: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["train.py", *options, "--print-recipe"])
        runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "train.py"), run_name="__main__")
        return json.loads(capsys.readouterr().out)

    hub = printed("ssvit_tiny_imagenet")
    assert (hub["data"], hub["dataset"]) == ("hub", "ILSVRC/imagenet-1k")
    assert hub == json.loads(named_recipe("ssvit_tiny_imagenet").to_json())
    folder = printed("ssvit_tiny_imagenet", "--data", "imagefolder", "--data-dir", str(tmp_path))
    assert folder == {**hub, "data": "imagefolder", "dataset": None, "data_dir": str(tmp_path)}
    kept = printed("ssvit_tiny_imagenet", "--data", "imagefolder", "--data-dir", "x", "--dataset", "me/mine")
    assert kept["dataset"] == "me/mine", "what a user asks for is refused, not dropped"


def test_the_learning_rate_follows_the_global_batch(recipe):
    assert recipe.peak_learning_rate == pytest.approx(4e-3 * 16 / 512)
    assert dataclasses.replace(recipe, batch_size=1024, accumulate=4).peak_learning_rate == pytest.approx(8e-3)
