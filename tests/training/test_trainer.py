"""Training and evaluation as a user runs them, on images small enough for a test."""

import dataclasses
import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from helpers.image_folder import make_image_folder
from PIL import Image
from safetensors.torch import load_file

import s3a
from s3a.training import trainer as engine
from s3a.training.build import build
from s3a.training.evaluation import NonFiniteLossError
from s3a.training.named_recipes import RECIPES, named_recipe
from s3a.training.recipe import Recipe

RECIPES_FOLDER = Path(__file__).parents[2] / "recipes"


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def recipe(images, tmp_path):
    return dataclasses.replace(
        named_recipe("digits"),
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


def command(name: str, *arguments: object) -> None:
    """Runs a command of recipes/ in this process."""
    before = sys.argv
    sys.argv = [str(RECIPES_FOLDER / name), *map(str, arguments)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before


def fails(capsys, name: str, *arguments: object) -> str:
    """Runs a command that must fail as the commands do; returns its one line."""
    with pytest.raises(SystemExit) as stop:
        command(name, *arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_all_that_it_promises(recipe, capsys):
    folder = engine.train(recipe)
    lines = metrics_of(folder)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    keys = "epoch train_loss val_loss val_top1 val_top5 learning_rate images_per_second loader_wait"
    assert all(set(line) == set(keys.split()) for line in lines)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert lines[-1]["val_top5"] == 1
    assert json.loads((folder / "recipe.json").read_text())["epochs"] == 3
    with Image.open(folder / "curves.png") as picture:
        assert picture.width > 600
    assert {path.name for path in (folder / "model").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert len(list((folder / "checkpoints").iterdir())) == recipe.keep_checkpoints
    said = capsys.readouterr().err
    assert f"{folder / 'model'}" in said
    assert "recipes/evaluate.py" in said


def test_the_weights_evaluate_to_what_training_said(recipe, capsys, images):
    folder = engine.train(recipe)
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    command("evaluate.py", "--weights", folder / "model", "--data", "imagefolder", "--data-dir", images)
    result = json.loads(capsys.readouterr().out)
    last = metrics_of(folder)[-1]
    assert set(result) == {"top1", "top5", "loss", "images", "images_per_second"}
    assert (result["top1"], result["images"]) == (last["val_top1"], 18)
    assert result["loss"] == pytest.approx(last["val_loss"], rel=1e-5)


def test_evaluation_counts_what_plain_code_counts(recipe, images):
    folder = engine.train(dataclasses.replace(recipe, epochs=2))
    model = s3a.SSViT.from_pretrained(folder / "model")
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    right = 0
    for label, name in enumerate(["dark", "light"]):
        for path in sorted((images / "val" / name).iterdir()):
            with Image.open(path) as image, torch.no_grad():
                right += int(model(transform(image.convert("RGB"))[None]).argmax() == label)
    assert right / 18 == metrics_of(folder)[-1]["val_top1"]


def test_the_weights_folder_carries_preprocessing_and_labels(recipe):
    folder = engine.train(dataclasses.replace(recipe, epochs=2)) / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == ["dark", "light"]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["crop_pct"] == recipe.crop_pct
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert "| validation images | 18 |" in card
    assert str(recipe.data_dir) not in card


class Killed(BaseException):
    """Stands for the end of the process."""


def train_until(recipe: Recipe, epoch: int, monkeypatch) -> None:
    """Trains until the middle of an epoch, where the process ends."""
    step = engine.train_step

    def dying_step(run, *arguments):
        if run.progress.epoch == epoch:
            raise Killed
        return step(run, *arguments)

    monkeypatch.setattr(engine, "train_step", dying_step)
    with pytest.raises(Killed):
        engine.train(recipe)
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_that_was_killed_ends_with_the_same_bytes(recipe, tmp_path, monkeypatch, capsys):
    undisturbed = engine.train(recipe)
    killed = dataclasses.replace(recipe, output_dir=tmp_path / "killed")
    for epoch in (1, 2):
        AcceleratorState._reset_state(reset_partial_state=True)
        train_until(killed, epoch, monkeypatch)
    capsys.readouterr()
    engine.train(killed)
    assert f"resuming {killed.output_dir} after epoch 2 of 3" in capsys.readouterr().err
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (undisturbed, killed.output_dir)]
    assert weights[0] == weights[1]
    assert [line["epoch"] for line in metrics_of(killed.output_dir)] == [1, 2, 3]


def test_a_late_drop_path_holds_for_the_last_epochs(recipe, tmp_path, monkeypatch):
    """Of all blocks in proportion, and also for a run that resumes in the middle of them."""
    late = dataclasses.replace(recipe, late_drop_path=(0.9, 2))
    rates: dict[int, list[float]] = {}
    step = engine.train_step

    def noted_step(run, batches):
        blocks = [block for stage in run.bare_model.stages for block in stage.blocks]
        rates[run.progress.epoch] = [block.drop_path.drop_prob for block in blocks]
        return step(run, batches)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", noted_step)
        undisturbed = engine.train(late)
    for epoch, last in enumerate((0.2, 0.9, 0.9)):
        assert rates[epoch] == pytest.approx([last * block / 5 for block in range(6)])
    killed = dataclasses.replace(late, output_dir=tmp_path / "killed")
    AcceleratorState._reset_state(reset_partial_state=True)
    train_until(killed, 2, monkeypatch)
    engine.train(killed)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (undisturbed, killed.output_dir)]
    assert weights[0] == weights[1]


def test_a_late_drop_path_of_a_model_that_cannot_change_it_is_refused(recipe):
    with pytest.raises(ValueError, match="--model test_resnet cannot change its drop path: use --late-drop-path None"):
        build(dataclasses.replace(recipe, model="test_resnet", drop_path=None, late_drop_path=(0.3, 1)))


def test_scan_and_size_reach_the_model_and_its_weights_folder(recipe):
    folder = engine.train(dataclasses.replace(recipe, scan="local-only", size=5, epochs=2)) / "model"
    model = s3a.SSViT.from_pretrained(folder)
    scans = [module for module in model.modules() if isinstance(module, s3a.S3A)]
    assert {(module.passes, module.size) for module in scans} == {("local", 5)}
    arguments = json.loads((folder / "config.json").read_text())["model_args"]
    assert (arguments["scan"], arguments["size"]) == ("local-only", 5)


@pytest.mark.parametrize("model", ["svit_nano", "vvt_nano", "resnet18", "test_vit"])
@pytest.mark.parametrize(("option", "value"), [("scan", "dense"), ("scan", "alternate"), ("size", 5)])
def test_scans_of_a_model_without_them_are_refused(recipe, model, option, value):
    with pytest.raises(ValueError, match=f"--model {model} has no sparse scans.*leave --{option} out") as raised:
        build(dataclasses.replace(recipe, model=model, drop_path=None, **{option: value}))
    assert "\n" not in str(raised.value)


def test_an_argument_that_a_model_swallows_is_not_one_that_it_heeds(recipe, monkeypatch):
    """As some of timm's models do."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, scan=None, **rest: create(name, **rest))
    with pytest.raises(ValueError, match="--model resnet18 has no sparse scans: leave --scan out"):
        build(dataclasses.replace(recipe, model="resnet18", drop_path=None, scan="dense"))


@pytest.mark.parametrize("side", [32, 48])
def test_a_model_of_one_fixed_size_is_built_for_the_recipes(recipe, side):
    model = build(dataclasses.replace(recipe, model="deit_tiny_patch16_224", image_size=side))["model"]
    assert model(torch.randn(1, 3, side, side)).shape == (1, 2)


def test_a_finished_run_says_so_and_trains_no_more(recipe, monkeypatch, capsys):
    folder = engine.train(recipe)
    before = metrics_of(folder)
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(engine, "train_epoch", None)
    engine.train(recipe)
    assert f"{folder} is finished: 3 epochs" in capsys.readouterr().err
    assert metrics_of(folder) == before


def test_a_folder_of_another_recipe_is_left_alone(recipe):
    folder = engine.train(dataclasses.replace(recipe, epochs=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=r"--epochs 2 \(now 3\).*--output-dir"):
        engine.train(recipe)
    assert len(metrics_of(folder)) == 2


def test_how_the_work_is_spread_is_not_another_recipe(recipe):
    folder = engine.train(dataclasses.replace(recipe, epochs=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert engine.train(dataclasses.replace(recipe, epochs=2, keep_checkpoints=1)) == folder


def test_a_run_without_a_checkpoint_gives_way_to_another_recipe(recipe, monkeypatch):
    train_until(dataclasses.replace(recipe, epochs=2), 0, monkeypatch)
    folder = engine.train(recipe)
    assert json.loads((folder / "recipe.json").read_text())["epochs"] == 3


def test_a_model_without_drop_path_is_named(recipe):
    with pytest.raises(ValueError, match="--model vgg11 has no drop path: use --drop-path None"):
        build(dataclasses.replace(recipe, model="vgg11"))


def test_other_files_are_left_alone(recipe):
    recipe.output_dir.mkdir()
    (recipe.output_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis\.tex and no run"):
        engine.train(recipe)
    assert [path.name for path in recipe.output_dir.iterdir()] == ["thesis.tex"]


def test_an_output_folder_that_is_a_file_is_refused(recipe):
    recipe.output_dir.write_text("a file")
    with pytest.raises(ValueError, match=r"--output-dir .* cannot be written \(File exists\)"):
        engine.train(recipe)


def test_a_recipe_that_cannot_run_leaves_no_trace(recipe):
    with pytest.raises(ValueError, match="--batch-size is 1000"):
        engine.train(dataclasses.replace(recipe, batch_size=1000))
    assert not recipe.output_dir.exists()


def test_other_data_under_the_same_folder_is_refused(recipe, tmp_path):
    folder = shutil.copytree(recipe.data_dir, tmp_path / "images")
    recipe = dataclasses.replace(recipe, data_dir=folder, epochs=2)
    engine.train(recipe)
    for split in ("train", "val"):
        (folder / split / "light").rename(folder / split / "bright")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="the data is not that of the run"):
        engine.train(recipe)


def test_a_torn_image_is_named(recipe, tmp_path):
    folder = shutil.copytree(recipe.data_dir, tmp_path / "images")
    torn = folder / "train" / "light" / "003.jpg"
    torn.write_bytes(torn.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"1 training images cannot be read, 0 are allowed.*light/003\.jpg"):
        engine.train(dataclasses.replace(recipe, data_dir=folder))


def test_a_model_of_timm_trains_too(recipe):
    folder = engine.train(dataclasses.replace(recipe, model="test_resnet", drop_path=None, epochs=2)) / "model"
    assert "timm.create_model" in (folder / "README.md").read_text()
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 2


def test_a_non_finite_loss_stops_the_run_and_names_the_last_checkpoint(recipe, monkeypatch):
    step = engine.train_step

    def poisoned_step(run, batches):
        factor = float("nan") if run.steps_done == 4 else 1
        return step(run, [batch._replace(images=batch.images * factor) for batch in batches])

    monkeypatch.setattr(engine, "train_step", poisoned_step)
    with pytest.raises(NonFiniteLossError, match=r"loss is nan .* at step 5 \(epoch 2,.*epoch-00001"):
        engine.train(recipe)
    assert len(metrics_of(recipe.output_dir)) == 1


def test_a_learning_rate_that_explodes_is_a_non_finite_loss(recipe):
    with pytest.raises(NonFiniteLossError, match="last good checkpoint: none yet"):
        engine.train(dataclasses.replace(recipe, learning_rate=1e25))


def test_the_learning_rate_follows_batch_size_warm_up_and_cosine(recipe):
    lines = metrics_of(engine.train(dataclasses.replace(recipe, epochs=4, warmup_epochs=2)))
    peak, lowest = recipe.learning_rate * 16 / 512, recipe.min_learning_rate
    cosine = [lowest + (peak - lowest) * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in (1, 2, 3, 4)]
    expected = [1e-6 + (peak - 1e-6) / 2, *cosine[1:]]
    assert [line["learning_rate"] for line in lines] == pytest.approx(expected, rel=1e-6)


def test_weight_decay_spares_biases_and_vectors(recipe):
    built = build(dataclasses.replace(recipe, weight_decay=0.3))
    groups = built["optimizer"].param_groups
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.3 if parameter.ndim > 1 else 0)
    assert sum(len(group["params"]) for group in groups) == len(list(built["model"].parameters()))


def test_drop_path_reaches_the_model(recipe):
    assert build(recipe)["model"].stages[-1].blocks[-1].drop_path.drop_prob == recipe.drop_path


def test_bf16_trains(recipe):
    lines = metrics_of(engine.train(dataclasses.replace(recipe, epochs=2, precision="bf16")))
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


def test_the_command_line_overrides_a_named_recipe(images, tmp_path):
    folder = tmp_path / "run"
    small = (
        "--image-size",
        32,
        "--batch-size",
        16,
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        "--seed",
        3,
        "--cpu-threads",
        1,
    )
    source = ("--data", "imagefolder", "--data-dir", images)
    command("train.py", "digits", *source, *small, "--output-dir", folder)
    written = json.loads((folder / "recipe.json").read_text())
    assert (written["data"], written["seed"], written["epochs"]) == ("imagefolder", 3, 1)
    assert load_file(folder / "model" / "model.safetensors")["head.weight"].shape[0] == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["digts"], "recipe 'digts' is unknown.*did you mean 'digits'"),
        (["--epoch", "3"], "--epoch.*did you mean --epochs"),
        (["--data", "imagefoldr"], "imagefoldr.*imagefolder"),
        (["--model", "ssvit_tny"], "model 'ssvit_tny' is unknown.*did you mean 'ssvit_tiny'"),
        (["--epochs", "0"], "--epochs is 0: it must be above 0"),
        (["--epochs", "many"], "--epochs.*'many'"),
        (["--warmup-epochs", "99"], "--warmup-epochs is 99"),
        (["--crop-scale", "1", "0.1"], "--crop-scale is 1.0 0.1: it must be a smaller and a larger"),
        (["--learning-rate", "nan"], "--learning-rate is nan: it must be above 0"),
        (["--auto-augment", "foo"], "--auto-augment is 'foo': it must be a policy of timm's"),
        (["--label-smoothing", "2"], "--label-smoothing is 2.0: it must be between 0 and 1"),
        (["--scan", "densee"], "scan 'densee' is unknown.*did you mean 'dense'"),
        (["--size", "0"], "--size is 0: it must be above 0"),
        (["--late-drop-path", "0.6", "29"], "--late-drop-path is 0.6 29: .*how many of the 28 epochs"),
        (["--late-drop-path", "1.6", "2"], "--late-drop-path is 1.6 2: it must be a rate between 0 and 1"),
        (["--image-size", "16"], "16 x 16 pixels: each side must be at least 32"),
        (["--data", "imagefolder"], "--data-dir DIR"),
        (["--data", "imagefolder", "--data-dir", "nowhere"], "'nowhere' does not exist"),
    ],
)
def test_bad_options_are_one_line(capsys, tmp_path, arguments, expected):
    line = fails(capsys, "train.py", *arguments, "--output-dir", tmp_path / "run")
    assert re.search(expected, line), line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_evaluation_refuses_data_of_other_classes(recipe, capsys):
    folder = engine.train(dataclasses.replace(recipe, epochs=2)) / "model"
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    line = fails(capsys, "evaluate.py", "--weights", folder, "--data", "digits")
    assert "know 2 classes and the data has 10" in line


def test_evaluation_refuses_classes_of_other_names(recipe, capsys, tmp_path):
    folder = engine.train(dataclasses.replace(recipe, epochs=2)) / "model"
    data = shutil.copytree(recipe.data_dir, tmp_path / "renamed")
    for split in ("train", "val"):
        (data / split / "light").rename(data / split / "pale")
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ("--weights", folder, "--data", "imagefolder", "--data-dir", data)
    assert "know a class 'light' where the data has 'pale'" in fails(capsys, "evaluate.py", *arguments)
    command("evaluate.py", *arguments, "--other-label-names")
    assert json.loads(capsys.readouterr().out)["images"] == 18


def test_evaluation_refuses_damaged_weights(recipe, capsys):
    folder = engine.train(dataclasses.replace(recipe, epochs=2)) / "model"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    capsys.readouterr()
    assert "no whole safetensors file" in fails(capsys, "evaluate.py", "--weights", folder, "--data", "digits")
    weights.unlink()
    assert "has no model.safetensors" in fails(capsys, "evaluate.py", "--weights", folder, "--data", "digits")
    shutil.rmtree(folder)
    assert "neither a local folder" in fails(capsys, "evaluate.py", "--weights", folder, "--data", "digits")


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_name_models_that_exist(name):
    recipe = named_recipe(name)
    assert recipe.run_name == name
    assert timm.is_model(recipe.model)


# As the papers and their authors' code have them.
NEIGHBORS = {
    "svit_small": (0.1, None, None),
    "svit_base": (0.4, None, None),
    "svit_large": (0.4, (0.6, 40), None),
    "vvt_tiny": (0.1, None, None),
    "vvt_small": (0.3, None, 1.0),
    "vvt_medium": (0.3, None, 1.0),
    "vvt_large": (0.3, None, 1.0),
}


@pytest.mark.parametrize("model", NEIGHBORS)
def test_recipes_of_the_neighbors_are_deits_with_their_own_drop_path_and_clipping(model):
    recipe = named_recipe(f"{model}_imagenet")
    assert (recipe.drop_path, recipe.late_drop_path, recipe.clip_grad) == NEIGHBORS[model]
    assert (recipe.total_epochs, recipe.warmup_epochs, recipe.batch_size, recipe.peak_learning_rate) == (
        300,
        5,
        1024,
        1e-3,
    )
    assert [recipe.drop_path_at(epoch) for epoch in (0, 259)] == 2 * [recipe.drop_path]
    assert [recipe.drop_path_at(epoch) for epoch in (260, 299)] == 2 * [
        0.6 if model == "svit_large" else recipe.drop_path
    ]


@pytest.mark.slow
def test_the_default_recipe_reads_digits(tmp_path, capsys):
    command("train.py", "--output-dir", tmp_path)
    assert metrics_of(tmp_path)[-1]["val_top1"] >= 0.99
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    command("evaluate.py", "--weights", tmp_path / "model", "--data", "digits")
    assert json.loads(capsys.readouterr().out)["top1"] == metrics_of(tmp_path)[-1]["val_top1"]
