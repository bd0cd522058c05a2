"""What a recipe is built into, and what is refused before anything is built."""

import dataclasses
import json
import multiprocessing
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from helpers.hub_server import Hub
from helpers.small_runs import load_weights, train_changed

import s3a
from s3a.training import build, trainer
from s3a.training.build import build_run
from s3a.training.evaluation import evaluate
from s3a.training.named_recipes import SEGMENTATION_RECIPES, get_recipe
from s3a.training.tasks import task

# --------------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------------


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
        train_changed(recipe, **changes)
    assert not recipe.output_dir.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "ssvit_nanno"}, "did you mean"),
        ({"data": "imagefolder", "data_dir": Path("nowhere")}, "does not exist"),
        ({"precision": "fp16"}, "needs a GPU"),
        ({"mixup": 0.8, "batch_size": 15}, "an even number"),
        ({"weights": "nowhere"}, "neither a local folder"),
        ({"model": "vgg11"}, "has no drop path"),
        ({"model": "resnet18", "drop_path": None, "scan": "dense"}, "has no sparse scans"),
        ({"model": "resnet18", "drop_path": None, "backend": "tiled"}, "has no sparse scans .* leave --backend out"),
        ({"model": "vvt_nano", "backend": "tiled"}, "has no sparse scans .* leave --backend out"),
        ({"backend": "tilde"}, "backend 'tilde' is unknown: .*did you mean 'tiled'"),
        ({"backend": "flex"}, "--backend is flex: FlexAttention has no backward on the CPU; use tiled"),
        ({"image_size": 16}, "--image-size is 16"),
        ({"batch_size": 6, "accumulate": 4}, "must be a multiple of 4"),
        ({"batch_size": 49}, "there are 48 training images: use a smaller one, such as 32"),
        ({"batch_size": 96, "accumulate": 3}, "there are 48 training images: use a smaller one, such as 48"),
        ({"auto_augment": "nonsense"}, "must be a policy of timm's"),
        ({"quantize": "float8-weight-only"}, "cannot be trained for"),
    ],
)
def test_all_checks_come_before_all_construction(recipe, monkeypatch, changes, message):
    """The seed of the weights is where construction begins; it takes no weights in memory to refuse."""

    def begin(*arguments: object, **options: object) -> None:
        raise AssertionError("construction has begun")

    monkeypatch.setattr(build, "seed_step", begin)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_run(dataclasses.replace(recipe, **changes))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(AssertionError, match="construction has begun"):
        build_run(recipe)


def test_a_folder_of_another_run_is_refused_before_anything_is_built(recipe, monkeypatch):
    train_changed(recipe, epochs=1)
    monkeypatch.setattr(task, "load_data", None)
    with pytest.raises(ValueError, match=r"--epochs 1 \(now 2\)"):
        build_run(recipe)


@pytest.mark.parametrize("weights", [False, True])
def test_the_shell_is_the_model_without_memory(recipe, pretrained, weights):
    run = build_run(dataclasses.replace(recipe, weights=str(pretrained) if weights else None))
    shell, model = run.shell.state_dict(), run.bare_model.state_dict()
    assert {key: (value.shape, value.dtype) for key, value in shell.items()} == {
        key: (value.shape, value.dtype) for key, value in model.items()
    }
    assert all(value.is_meta for value in shell.values())
    assert not run.shell.training


def test_a_recipe_that_cannot_run_leaves_no_trace(digits_recipe):
    with pytest.raises(ValueError, match="--batch-size is 1000"):
        trainer.train(dataclasses.replace(digits_recipe, batch_size=1000))
    assert not digits_recipe.output_dir.exists()


def test_a_tracker_that_is_not_installed_is_named(recipe, monkeypatch):
    monkeypatch.setattr(build, "is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match="--track is wandb, which is not installed: pip install wandb"):
        train_changed(recipe, track="wandb")


def test_no_right_to_publish_shows_before_the_first_epoch(recipe, hub: Hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match="lizards/trained"):
        train_changed(recipe, push_to_hub="lizards/trained")
    assert not (recipe.output_dir / "metrics.jsonl").exists()


def test_a_model_without_drop_path_is_named(digits_recipe):
    with pytest.raises(ValueError, match="--model vgg11 has no drop path: use --drop-path None"):
        build_run(dataclasses.replace(digits_recipe, model="vgg11"))


def test_a_late_drop_path_of_a_model_that_cannot_change_it_is_refused(digits_recipe):
    with pytest.raises(ValueError, match="--model test_resnet cannot change its drop path: use --late-drop-path None"):
        build_run(dataclasses.replace(digits_recipe, model="test_resnet", drop_path=None, late_drop_path=(0.3, 1)))


@pytest.mark.parametrize("model", ["svit_nano", "vvt_nano", "resnet18", "test_vit"])
@pytest.mark.parametrize(("option", "value"), [("scan", "dense"), ("scan", "alternate"), ("size", 5)])
def test_scans_of_a_model_without_them_are_refused(digits_recipe, model, option, value):
    with pytest.raises(ValueError, match=f"--model {model} has no sparse scans.*leave --{option} out") as raised:
        build_run(dataclasses.replace(digits_recipe, model=model, drop_path=None, **{option: value}))
    assert "\n" not in str(raised.value)


def test_an_argument_that_a_model_swallows_is_not_one_that_it_heeds(digits_recipe, monkeypatch):
    """As some of timm's models do."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, scan=None, **rest: create(name, **rest))
    with pytest.raises(ValueError, match="--model resnet18 has no sparse scans: leave --scan out"):
        build_run(dataclasses.replace(digits_recipe, model="resnet18", drop_path=None, scan="dense"))


# --------------------------------------------------------------------------------------------------------
# The model and its optimizer
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [32, 48])
def test_a_model_of_one_fixed_size_is_built_for_the_recipes(digits_recipe, side):
    model = build_run(dataclasses.replace(digits_recipe, model="deit_tiny_patch16_224", image_size=side)).model
    assert model(torch.randn(1, 3, side, side)).shape == (1, 2)


def test_what_a_recipe_asks_of_model_and_loader_is_built(recipe):
    """Fields that change neither weights nor scores by more than rounding: no run shows whether they are heeded."""
    fields = {"grad_checkpointing": True, "accumulate": 2, "precision": "bf16", "crop_pct": 0.8}
    run = build_run(dataclasses.replace(recipe, **fields))
    assert all(stage.grad_checkpointing for stage in run.bare_model.stages)
    assert run.train_loader.accumulate == 2
    assert run.accelerator.mixed_precision == "bf16"
    assert (run.data_config["crop_pct"], run.data_config["input_size"]) == (0.8, (3, 32, 32))


@pytest.mark.parametrize(("num_workers", "expected"), [(0, 0), (1, 1), (3, 2)])
def test_half_of_the_workers_decode_validation_images(recipe, num_workers, expected):
    """Rounded up, and none of them lives when the evaluation is over."""
    run = build_run(dataclasses.replace(recipe, num_workers=num_workers))
    before, counts = len(multiprocessing.active_children()), []

    def count() -> bool:
        counts.append(len(multiprocessing.active_children()) - before)
        return False

    evaluate(run.bare_model, run.task, run.val_loader, run.accelerator, stop=count)
    assert counts[0] == expected
    assert len(multiprocessing.active_children()) == before


def test_validation_batches_are_as_large_as_the_passes_of_training(recipe):
    """So that --accumulate, which makes a step fit into memory, makes an evaluation fit too."""
    run = build_run(dataclasses.replace(recipe, accumulate=4))
    (train, *_) = next(run.train_loader.epoch(0))
    assert max(len(batch.images) for batch in run.val_loader) == len(train.images) == 4


def test_a_run_for_a_quantization_scheme_rounds_as_it_trains(recipe):
    model = build_run(dataclasses.replace(recipe, quantize="int8-weight-only")).bare_model.eval()
    plain = timm.create_model("ssvit_nano", num_classes=2).eval()
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    rounded, exact = (each.forward_features(images) for each in (model, plain))
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("weights", [False, True])
def test_the_backend_is_that_of_the_run_and_not_of_its_weights(recipe, pretrained, weights):
    """Whoever loads them has another machine."""
    recipe = dataclasses.replace(recipe, backend="reference", weights=str(pretrained) if weights else None)
    run = build_run(recipe)
    for model, backend in ((run.bare_model, "reference"), (run.shell, None)):
        assert {module.backend for module in model.modules() if isinstance(module, s3a.S3A)} == {backend}
    folder = train_changed(recipe, "trained", epochs=1)
    assert "backend" not in json.loads((folder / "model" / "config.json").read_text())["model_args"]


def test_the_first_weights_are_those_of_the_seed(recipe):
    weights = []
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = build_run(dataclasses.replace(recipe, seed=seed, output_dir=recipe.output_dir / name))
        weights.append(run.bare_model.head.weight.tolist())
    assert weights[0] == weights[1] != weights[2]


def test_drop_path_reaches_the_model(digits_recipe):
    assert build_run(digits_recipe).model.stages[-1].blocks[-1].drop_path.drop_prob == digits_recipe.drop_path


@pytest.mark.parametrize(("model", "compiler"), [("ssvit_nano", "compile_model"), ("test_resnet", "nn.Module.compile")])
def test_the_average_is_compiled_like_the_model(recipe, monkeypatch, model, compiler):
    """It is evaluated as often."""
    compiled = []

    def compile_nothing(module: torch.nn.Module) -> None:
        compiled.append(module)

    monkeypatch.setattr(f"s3a.training.build.{compiler}", compile_nothing)
    run = build_run(dataclasses.replace(recipe, model=model, drop_path=None, compile=True, ema_decay=0.9))
    assert compiled == [run.ema.module, run.bare_model]


def test_weight_decay_spares_biases_and_vectors(digits_recipe):
    built = build_run(dataclasses.replace(digits_recipe, weight_decay=0.3))
    groups = built.optimizer.param_groups
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.3 if parameter.ndim > 1 else 0)
    assert sum(len(group["params"]) for group in groups) == len(list(built.model.parameters()))


# --------------------------------------------------------------------------------------------------------
# Fine-tuning
# --------------------------------------------------------------------------------------------------------


def test_fine_tuning_keeps_the_body_and_the_head_of_the_same_classes(recipe, pretrained, capfd):
    state = load_weights(pretrained)
    model = build_run(dataclasses.replace(recipe, weights=str(pretrained), image_size=48)).model
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert "new head" not in capfd.readouterr().err


def test_fine_tuning_on_other_classes_and_another_size(recipe, pretrained, tmp_path, monkeypatch, capfd):
    folder = shutil.copytree(recipe.data_dir, tmp_path / "images")
    for split in ("train", "val"):
        shutil.copytree(folder / split / "dark", folder / split / "shadow")
    seen, step = [], trainer.train_step

    def watched(run, progress, batches):
        seen.append((batches[0].images.shape, all(module.training for module in run.model.modules())))
        if len(seen) == 1:
            state = load_weights(pretrained)
            body = {key: value for key, value in run.bare_model.state_dict().items() if not key.startswith("head")}
            assert all(torch.equal(value, state[key]) for key, value in body.items())
        step(run, progress, batches)

    monkeypatch.setattr(trainer, "train_step", watched)
    run = train_changed(recipe, weights=str(pretrained), data_dir=folder, image_size=48)
    assert capfd.readouterr().err.count(f"a new head of 3 classes: {pretrained} knows 2; all else is kept\n") == 1
    assert set(seen) == {((16, 3, 48, 48), True)}
    tuned = s3a.SSViT.from_pretrained(run / "model")
    assert (tuned.num_classes, tuned.pretrained_cfg["label_names"]) == (3, ["dark", "light", "shadow"])


def test_weights_of_another_model_are_refused(recipe, pretrained):
    with pytest.raises(ValueError, match="holds a ssvit_nano: use --model ssvit_nano"):
        train_changed(recipe, model="svit_nano", weights=str(pretrained))


def test_a_single_class_is_refused(recipe, tmp_path):
    folder = shutil.copytree(recipe.data_dir, tmp_path / "one")
    for split in ("train", "val"):
        shutil.rmtree(folder / split / "light")
    with pytest.raises(ValueError, match=r"--data imagefolder have 1 class \('dark'\): a classifier needs two or more"):
        build_run(dataclasses.replace(recipe, data_dir=folder))


@pytest.mark.parametrize(
    ("is_second", "device", "changes", "words"),
    [
        (False, "cuda", {}, "first version of FSDP.*--fsdp_version 2"),
        (True, "cpu", {}, "FSDP needs CUDA"),
        (True, "cuda", {"ema_decay": 0.9}, "--ema-decay is 0.9: no average .* sharded weights"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(recipe, is_second: bool, device: str, changes: dict, words: str):
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP, is_fsdp2=is_second, device=torch.device(device)
    )
    with pytest.raises(ValueError, match=words):
        build.check_processes(dataclasses.replace(recipe, **changes), accelerator)


def test_fsdp_trains_no_dense_task():
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True, device=torch.device("cuda"))
    with pytest.raises(ValueError, match="FSDP is for classification"):
        build.check_processes(get_recipe("semantic_fpn_scenes", SEGMENTATION_RECIPES), accelerator)
