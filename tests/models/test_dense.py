"""Dense models in general: any backbone, weights taken from classification models, and timm's contract."""

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import s3a
from s3a.models.dense import DenseModel
from s3a.quantization.convert import choose_layers, quantize
from s3a.quantization.schemes import get_quantization
from s3a.support.errors import UnknownArgumentError
from s3a.weights.pretrained import load_pretrained

SMALL = {"dims": (16, 24, 32), "depths": (1, 2, 1), "num_heads": (1, 2, 2)}
HEADS = {
    "semantic_fpn": {"pyramid_dim": 16, "head_dim": 8},
    "upernet": {"head_dim": 8, "auxiliary_dim": 4},
    "retinanet": {"pyramid_dim": 8, "head_convs": 1},
    "mask_rcnn": {"pyramid_dim": 8, "box_dim": 16, "mask_convs": 1, "num_proposals": 20},
    "cascade_mask_rcnn": {"pyramid_dim": 8, "box_dim": 16, "box_convs": 1, "mask_convs": 1, "num_proposals": 20},
}
CLASSES = {
    "semantic_fpn": s3a.SemanticFPN,
    "upernet": s3a.UperNet,
    "retinanet": s3a.RetinaNet,
    "mask_rcnn": s3a.MaskRCNN,
    "cascade_mask_rcnn": s3a.CascadeMaskRCNN,
}


def build(name: str, **model_args: object) -> DenseModel:
    """A small model in evaluation mode."""
    return timm.create_model(
        name, **{"backbone": "ssvit_nano", "backbone_args": SMALL, "num_classes": 5, **HEADS[name], **model_args}
    ).eval()


def run(model: nn.Module, images: Tensor) -> list[Tensor]:
    """All that a model returns, as tensors."""
    with torch.no_grad():
        outputs = model(images)
    return [outputs] if isinstance(outputs, Tensor) else [each for output in outputs for each in output.values()]


# --------------------------------------------------------------------------------------------------------
# Backbones
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "backbone_args"),
    [
        ("svit_nano", {}),
        ("vvt_nano", {}),
        ("convnext_atto", {}),
        ("resnet18", {}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)}),
        ("swinv2_cr_tiny_224", {"embed_dim": 24, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)}),
    ],
)
def test_maps_of_any_backbone(backbone: str, backbone_args: dict[str, object]):
    """Strides 4, 8, 16 and 32, channels first, normalised; and weights of its classification model are taken."""
    model = build("semantic_fpn", backbone=backbone, backbone_args=backbone_args)
    assert model.strides == (4, 8, 16, 32)[: len(model.strides)]
    maps = DenseModel.extract_maps(model, torch.randn(1, 3, 96, 64))
    assert [tuple(each.shape) for each in maps] == [
        (1, dim, 96 // stride, 64 // stride) for dim, stride in zip(model.dims, model.strides, strict=True)
    ]
    for each in maps:
        torch.testing.assert_close(each.mean(1), torch.zeros_like(each.mean(1)), rtol=0, atol=1e-4)
    assert model(torch.randn(1, 3, 45, 70)).shape == (1, 5, 45, 70)
    classifier = timm.create_model(backbone, **backbone_args)
    conv = timm.get_pretrained_cfg(backbone).first_conv
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).weight.shape[1] == 3, conv
    taken = model.take_weights(classifier)
    assert {key.split(".")[0] for key in taken.left} <= {"head", "fc", "norm", "proj"}
    assert len(taken.taken) + len(taken.left) == len(classifier.state_dict())


def test_maps_are_those_of_the_classification_model():
    """Behind the LayerNorm, with the weights taken from it."""
    classifier = timm.create_model("ssvit_nano", **SMALL).eval()
    model = build("semantic_fpn")
    model.take_weights(classifier)
    images = torch.randn(2, 3, 64, 48)
    expected = classifier.forward_intermediates(images, intermediates_only=True)
    for own, other in zip(DenseModel.extract_maps(model, images), expected, strict=True):
        normalised = nn.functional.layer_norm(other.permute(0, 2, 3, 1), other.shape[1:2], eps=1e-6)
        torch.testing.assert_close(own, normalised.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)


def test_backbones_that_cannot_be():
    with pytest.raises(ValueError, match=r"backbone 'ssvit_nono' is unknown.*did you mean 'ssvit_nano'"):
        build("semantic_fpn", backbone="ssvit_nono")
    with pytest.raises(ValueError, match=r"strides \[16, 16, 16\]: they must be 4, 8 and so on; choose a hierarchical"):
        build("semantic_fpn", backbone="vit_tiny_patch16_224", backbone_args={"depth": 3})
    with pytest.raises(ValueError, match=r"backbone_args holds checkpoint_path.*take_weights"):
        build("semantic_fpn", backbone_args={"checkpoint_path": "weights.pth"})


@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 4, 64, 64), (3, 64, 64)])
def test_images_that_cannot_be(shape: tuple[int, ...]):
    for name in ("semantic_fpn", "retinanet"):
        with pytest.raises(ValueError, match=r"must be \[batch, 3, height, width\] with sides of 32"):
            build(name)(torch.zeros(shape))


# --------------------------------------------------------------------------------------------------------
# Weights of a classification model
# --------------------------------------------------------------------------------------------------------


def test_what_is_taken():
    """Everything but the classifier; norms and the head are new; and no other weights change."""
    classifier, model = timm.create_model("ssvit_nano", **SMALL), build("upernet")
    before = copy.deepcopy(model.state_dict())
    report = model.take_weights(classifier)
    state = classifier.state_dict()
    assert set(report.left) == {key for key in state if key.split(".")[0] in ("proj", "norm", "head")}
    assert set(report.taken) == {f"backbone.model.{key}" for key in state if key not in report.left}
    assert {*report.taken, *report.new} == model.state_dict().keys()
    assert {key.split(".")[0] for key in report.new} == {"norms", "head", "auxiliary_head"}
    for key, tensor in model.state_dict().items():
        expected = state[key.removeprefix("backbone.model.")] if key in report.taken else before[key]
        assert torch.equal(tensor, expected), key
    assert build("upernet").take_weights(state) == report


@pytest.mark.parametrize(
    "other",
    [
        {"dims": (16, 24, 40)},
        {"depths": (1, 3, 1)},
        {"depths": (1, 1, 1)},
    ],
    ids=["wider", "deeper", "shallower"],
)
def test_weights_of_another_architecture(other: dict[str, object]):
    model = build("semantic_fpn")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"not those of ssvit_nano: stages.*take those of timm\.create_model"):
        model.take_weights({**timm.create_model("ssvit_nano", **{**SMALL, **other}).state_dict()})
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


# --------------------------------------------------------------------------------------------------------
# timm's contract
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_folders_hold_every_argument(name: str, tmp_path: Path):
    """Read by the library, by its class and by timm; and with other classes."""
    model = build(name, backbone_args={**SMALL, "drop_path_rate": 0.2})
    assert type(model) is CLASSES[name]
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architecture"] == name
    assert saved["num_classes"] == 5
    arguments = {"backbone": "ssvit_nano", **HEADS[name]}
    assert arguments.items() <= saved["model_args"].items()
    assert saved["model_args"]["backbone_args"]["drop_path_rate"] == 0.2
    images = torch.randn(1, 3, 64, 64)
    expected = run(model, images)
    loaded = [
        load_pretrained(tmp_path),
        type(model).from_pretrained(tmp_path),
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(),
        copy.deepcopy(model),
    ]
    for other in loaded:
        assert type(other) is type(model)
        for own, wanted in zip(run(other, images), expected, strict=True):
            assert torch.equal(own, wanted)
    other = load_pretrained(tmp_path, num_classes=3)
    assert other.num_classes == 3
    run(other, images)
    same = other.state_dict()
    changed = {key.rpartition(".")[0] for key, tensor in model.state_dict().items() if tensor.shape != same[key].shape}
    assert changed == set(model.classifiers)


@pytest.mark.parametrize("name", CLASSES)
def test_models_on_the_meta_device(name: str):
    """Built, copied and counted without memory."""
    with torch.device("meta"):
        model = copy.deepcopy(timm.create_model(name, backbone="ssvit_tiny"))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.eval().count_forward(torch.empty(1, 3, 128, 160, device="meta"))


@pytest.mark.parametrize("name", CLASSES)
def test_contract(name: str):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.input_size == ((3, 512, 512) if name in ("semantic_fpn", "upernet") else (3, 800, 1344))
    assert cfg.num_classes == (150 if name in ("semantic_fpn", "upernet") else 80)
    model = build(name)
    assert model.default_cfg is model.pretrained_cfg
    assert isinstance(model.get_classifier(), nn.Module)
    names = model.pretrained_cfg["classifier"]
    assert model.get_classifier() is model.get_submodule(names if isinstance(names, str) else names[0])
    assert model.get_submodule(model.pretrained_cfg["first_conv"]) is model.backbone.model.stem[0]
    model.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in model.backbone.model.stages)
    assert model.no_weight_decay() == set()
    with pytest.raises(ValueError, match=r"num_classes is 0: a dense model needs one"):
        model.reset_classifier(0)
    with pytest.raises(UnknownArgumentError, match=r"argument of .* 'pyramid_din' is unknown|'pyramid_din'"):
        build(name, pyramid_din=3)
    with pytest.raises(ValueError, match="features_only"):
        build(name, features_only=True)
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name} yet"):
        build(name, pretrained=True)


def test_preprocessing_is_the_backbones():
    """Until a folder or its user says otherwise."""
    backbone_args = {"embed_dim": 24, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)}
    model = build("semantic_fpn", backbone="swinv2_cr_tiny_224", backbone_args=backbone_args)
    own = timm.get_pretrained_cfg("swinv2_cr_tiny_224")
    assert resolve_model_data_config(model)["mean"] == own.mean
    cfg = timm.get_pretrained_cfg("inception_next_tiny").to_dict()
    assert build("semantic_fpn", pretrained_cfg={**cfg, "mean": (0.1, 0.2, 0.3)}).pretrained_cfg["mean"] == (
        0.1,
        0.2,
        0.3,
    )


def test_names_without_weight_decay_are_parameters():
    backbone_args = {"embed_dim": 24, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)}
    model = build("semantic_fpn", backbone="swin_tiny_patch4_window7_224", backbone_args=backbone_args)
    names = model.no_weight_decay()
    assert len(names) == 4
    assert all(name.endswith("relative_position_bias_table") for name in names)
    assert names <= dict(model.named_parameters()).keys()


# --------------------------------------------------------------------------------------------------------
# What else is done to models
# --------------------------------------------------------------------------------------------------------


def test_backbones_compile_and_heads_stay(monkeypatch: pytest.MonkeyPatch, graphs):
    model = build("semantic_fpn")
    images = torch.randn(2, 3, 48, 40)
    expected = run(model, images)
    s3a.compile_model(model)
    for own, wanted in zip(run(model, images), expected, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)
    assert graphs["runs"] == 1 + 2 + 4  # stem, downsamplings and blocks


def test_the_backbone_quantizes():
    """Its linear layers; convolutions of the head compute in bfloat16."""
    model = build("semantic_fpn")
    images = torch.randn(1, 3, 64, 64)
    layers, _ = choose_layers(model, "int8-weight-only", layers=["backbone.*"])
    small = quantize(model, "int8-weight-only", layers)
    assert set(get_quantization(small).layers) == set(layers)
    expected, own = run(model, images)[0], run(small, images.bfloat16())[0].float()
    assert torch.nn.functional.cosine_similarity(expected.flatten(), own.flatten(), dim=0) > 0.99
