"""Quantized models do nearly the same as float ones, and training can simulate the rounding."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from helpers.exported import make_dense
from helpers.image_folder import make_image_folder
from helpers.quantized import ON_CPUS, SHAPE, compute_logits, make_trained
from huggingface_hub import ModelCard
from torch import nn

from s3a import SemanticFPN, SSViT
from s3a.analysis.cost import count_cost
from s3a.data import load_data
from s3a.quantization import convert
from s3a.quantization.convert import choose_layers, fake_quantize, quantize
from s3a.quantization.schemes import SCHEMES
from s3a.training.checkpoints import list_checkpoints, read_state
from s3a.training.evaluation import evaluate_weights
from s3a.training.named_recipes import get_recipe
from s3a.training.recipe import ClassificationRecipe
from s3a.training.tasks.classification import Classification
from s3a.training.trainer import train
from s3a.weights.card import build_card


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A nano in int8-dynamic."""
    quantize(make_trained(), "int8-dynamic").save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


@pytest.mark.parametrize(("scheme", "most"), [*zip(ON_CPUS, (0.03, 0.04, 0.3, 0.1), strict=True)])
def test_quantized_models_do_nearly_the_same(scheme: str, most: float):
    model, images = make_trained(), torch.randn(SHAPE)
    found = quantize(model, scheme)
    right, got = compute_logits(model, images), compute_logits(found, images)
    assert got.dtype == torch.float32
    assert 0 < (got - right).norm() / right.norm() < most
    kinds = {type(module.weight).__name__ for module in found.modules() if isinstance(module, nn.Linear)}
    assert kinds <= {"Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"}
    assert type(model.head.weight) is nn.Parameter  # the model itself stays


@pytest.mark.parametrize(("scheme", "most"), [*zip(ON_CPUS, (0.03, 0.04, 0.3, 0.1), strict=True)])
def test_the_backbone_of_a_dense_model_is_quantized(scheme: str, most: float, tmp_path: Path):
    """Its linear layers and nothing else; the head computes in float32."""
    model, images = make_dense(pyramid_dim=16), torch.randn(2, 3, 64, 96)
    model.take_weights(make_trained())
    found = quantize(model, scheme)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(found.quantization.layers) == linear  # Semantic FPN's head is of convolutions
    right, got = compute_logits(model, images), compute_logits(found, images)
    assert got.dtype == torch.float32
    assert 0 < (got - right).norm() / right.norm() < most
    assert {tensor.dtype for tensor in (*found.head.parameters(), *found.norms.parameters())} == {torch.float32}
    found.save_pretrained(tmp_path)
    assert torch.equal(compute_logits(SemanticFPN.from_pretrained(tmp_path), images), got)
    assert count_cost(SemanticFPN.from_pretrained(tmp_path), 64, 96) == count_cost(model, 64, 96)


def test_the_boxes_of_a_detector_stay_in_float32():
    """Its box heads have linear layers too, which are left."""
    model = make_dense("mask_rcnn", pyramid_dim=16)
    chosen, _ = choose_layers(model, "int8-dynamic")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name in linear if name.startswith("backbone.")} == set(chosen) != linear
    with pytest.raises(ValueError, match=r"layer pattern 'stages.0.classifier' is unknown"):
        choose_layers(model, "int8-dynamic", layers=("stages.0.classifier",))
    images = torch.randn(1, 3, 64, 96)
    found = quantize(model, "int8-weight-only")
    right, got = (each.extract_maps(images) for each in (model, found))
    assert all((a - b).norm() / b.norm() < 0.05 for a, b in zip(got, right, strict=True))
    (objects,) = compute_logits(found, images)
    assert {name: each.dtype for name, each in objects.items() if name != "labels"} == dict.fromkeys(
        ("boxes", "scores", "masks"), torch.float32
    )


def test_costs_and_card_are_of_the_model(folder: Path):
    model = SSViT.from_pretrained(folder)
    assert count_cost(model, 64, 64) == count_cost(make_trained(), 64, 64)
    text = build_card(model)
    parameters = sum(parameter.numel() for parameter in make_trained().parameters())
    assert f"| parameters | {parameters:,} |" in text
    assert "| quantization | int8-dynamic, 26 linear layers; the rest bfloat16 |" in text
    assert "SSViT.from_pretrained" in text
    assert "timm.create_model" not in text
    assert ModelCard(text).data.library_name == "s3a"


def test_layers_are_chosen_by_name(tmp_path: Path):
    model = make_trained()
    chosen, left = choose_layers(model, "int8-dynamic", layers=("stages.2.*", "head"), skip=("*.fc2",))
    assert left == []
    assert {name.split(".")[0] for name in chosen} == {"stages", "head"}
    assert len(chosen) == 2 * 3 + 1
    found = quantize(model, "int8-dynamic", chosen)
    kinds = {name: type(m.weight).__name__ for name, m in found.named_modules() if isinstance(m, nn.Linear)}
    assert {name for name, kind in kinds.items() if kind == "Int8Tensor"} == set(chosen)
    found.save_pretrained(tmp_path)
    images = torch.randn(SHAPE)
    assert torch.equal(compute_logits(SSViT.from_pretrained(tmp_path), images), compute_logits(found, images))


def test_layers_without_whole_groups_are_left():
    with torch.device("meta"):
        model = timm.create_model("ssvit_base")
    chosen, left = choose_layers(model, "int8-activations-int4-weights")
    widths = {name: model.get_submodule(name).in_features % 32 for name in chosen + left}
    assert {name for name, rest in widths.items() if rest} == set(left) != set()
    assert choose_layers(model, "int8-dynamic")[1] == []
    with pytest.raises(ValueError, match=r"no linear layer.*groups of 32"):
        choose_layers(model, "int8-activations-int4-weights", layers=("stages.0.blocks.0.attn.qkv",))


def test_layers_that_are_not_there():
    model = make_trained()
    for options in ({"layers": ("stages.7.*",)}, {"skip": ("haed",)}):
        with pytest.raises(ValueError, match=r"layer pattern '(stages.7.\*|haed)' is unknown: it must be one of"):
            choose_layers(model, "int8-dynamic", **options)
    with pytest.raises(ValueError, match="the patterns leave none"):
        choose_layers(model, "int8-dynamic", skip=("*",))
    with pytest.raises(ValueError, match=r"layer of scheme 'int8-dynamic' 'stages.0.blocks.0.attn.lepe' is unknown"):
        quantize(model, "int8-dynamic", ["stages.0.blocks.0.attn.lepe"])


def test_quantized_models_stay_as_they_are(folder: Path):
    model = SSViT.from_pretrained(folder)
    with pytest.raises(ValueError, match="quantized already, by 'int8-dynamic'"):
        quantize(model, "int8-weight-only")
    with pytest.raises(ValueError, match=r"num_classes is 7: .* is quantized with 5 classes"):
        SSViT.from_pretrained(folder, num_classes=7)
    with pytest.raises(ValueError, match=r"not for timm: load them with SSViT\.from_pretrained"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    model.reset_classifier(7)
    with pytest.raises(ValueError, match="layer 'head' was replaced"):
        model.save_pretrained(folder)


def test_every_scheme_has_a_config():
    assert SCHEMES.keys() == convert.CONFIGS.keys()


def test_fake_quantization_rounds_and_passes_gradients():
    layer = nn.Sequential(nn.Linear(64, 8))
    layer[0].weight.data[:, 0] = 0.2  # the largest: it is cut at 127
    weight, x = layer[0].weight.detach().clone(), torch.randn(3, 4, 4, 64)
    fake_quantize(layer, "int8-weight-only")
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    rounded = (weight / scale).round().clamp(-128, 127) * scale
    found = layer(x)
    torch.testing.assert_close(found, nn.functional.linear(x, rounded, layer[0].bias))
    found.sum().backward()
    inside = (weight / scale).abs() < 127  # beyond it the gradient is cut
    expected = x.sum((0, 1, 2)).expand(8, 64)
    torch.testing.assert_close(layer[0].weight.grad[inside], expected[inside], rtol=1e-4, atol=1e-4)
    assert list(layer.state_dict()) == ["0.weight", "0.bias"]


@pytest.fixture
def recipe(tmp_path: Path) -> ClassificationRecipe:
    AcceleratorState._reset_state(reset_partial_state=True)
    return dataclasses.replace(
        get_recipe("digits"),
        data="imagefolder",
        data_dir=make_image_folder(tmp_path / "images"),
        image_size=32,
        batch_size=16,
        epochs=2,
        warmup_epochs=0,
        cpu_threads=1,
        ema_decay=0.5,
        quantize="int8-dynamic",
        output_dir=tmp_path / "run",
    )


def test_a_run_leaves_quantized_weights(recipe: ClassificationRecipe):
    """All of its folders are quantized, its checkpoints float. Resumed an epoch earlier, it writes the same bytes."""
    run = train(recipe)
    for name in ("model", "best", "ema", "ema-best"):
        assert SSViT.from_pretrained(run / name).quantization.scheme == "int8-dynamic"
    state = read_state(list_checkpoints(run / "checkpoints")[0])["model"]
    plain = timm.create_model("ssvit_nano", num_classes=2).eval()
    plain.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    right = compute_logits(quantize(plain, "int8-dynamic"), images)
    assert torch.equal(compute_logits(SSViT.from_pretrained(run / "model"), images), right)

    written = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(next((run / "checkpoints").glob("*epoch-00002")))
    shutil.rmtree(run / "model")
    AcceleratorState._reset_state(reset_partial_state=True)
    train(recipe)
    assert (run / "model" / "model.safetensors").read_bytes() == written


def test_runs_that_cannot_be_trained_for_a_scheme(recipe: ClassificationRecipe, folder: Path):
    with pytest.raises(ValueError, match="'float8-weight-only' cannot be trained for"):
        train(dataclasses.replace(recipe, quantize="float8-weight-only"))
    with pytest.raises(ValueError, match="quantized already, by 'int8-dynamic'"):
        train(dataclasses.replace(recipe, quantize=None, weights=str(folder)))
    assert not recipe.folder.exists()


@pytest.mark.slow
def test_digits_lose_next_to_nothing(trained_digits: Path):
    """At most one image of 360 in int8, and four in int4."""
    model, data = SSViT.from_pretrained(trained_digits / "model"), load_data("digits", None)
    right = round(360 * evaluate_weights(model, Classification(data), batch_size=64).scores["top1"])
    for scheme, most in (("int8-weight-only", 1), ("int8-dynamic", 1), ("int8-activations-int4-weights", 4)):
        found = evaluate_weights(quantize(model, scheme), Classification(data), batch_size=64).scores["top1"]
        assert right - round(360 * found) <= most, scheme
