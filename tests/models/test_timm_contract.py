"""What timm's tools expect of a model, over every one that this library registers; large ones on the meta device."""

import copy
import sys

import pytest
import timm
import torch
from helpers.own_models import list_classifiers
from timm.data import create_transform, resolve_model_data_config
from timm.models import group_parameters, model_parameters
from timm.models._features_fx import create_feature_extractor
from timm.models._manipulate import group_with_matcher
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor, nn

import s3a

NAMES = list_classifiers()
NANOS = [name for name in NAMES if name.endswith("_nano")]
RUN = [*NANOS, "ssvit_tiny"]  # those that the tests compute with
SIZES = {name: sys.modules[timm.model_entrypoint(name).__module__].SIZES[name] for name in NAMES}


def build(name: str, **options: object) -> nn.Module:
    """A model in evaluation mode; only small ones hold numbers, and large ones have few blocks unless told."""
    if name in RUN:
        return timm.create_model(name, **options).eval()
    few = tuple(min(depth, 2) for depth in SIZES[name]["depths"])
    with torch.device("meta"):
        return timm.create_model(name, **{"depths": few, **options}).eval()


def draw(name: str, height: int = 64, width: int = 96) -> Tensor:
    """Images for the model, where its numbers are."""
    return torch.randn(2, 3, height, width, device="cpu" if name in RUN else "meta")


def map_shapes(name: str, height: int = 64, width: int = 96) -> list[tuple[int, ...]]:
    """What every stage's map must be for `draw`: strides 4, 8, 16, 32."""
    return [
        (2, dim, height // stride, width // stride)
        for dim, stride in zip(SIZES[name]["dims"], (4, 8, 16, 32), strict=False)
    ]


def test_every_model_is_registered():
    """Those of the papers, and a nano of each family; no weights are hosted."""
    published = {
        "ssvit": ("tiny", "small", "base", "large"),
        "svit": ("small", "base", "large"),
        "vvt": ("tiny", "small", "medium", "large"),
    }
    assert set(NAMES) == {f"{family}_{size}" for family, sizes in published.items() for size in ("nano", *sizes)}
    assert not set(NAMES) & set(timm.list_pretrained())


@pytest.mark.parametrize("name", NAMES)
def test_families(name: str):
    """Each has a class of its own at the top of the library."""
    family = {"ssvit": s3a.SSViT, "svit": s3a.SViT, "vvt": s3a.VVT}[name.partition("_")[0]]
    assert type(build(name)) is family


# --------------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name: str):
    model = build(name, features_only=True)
    shapes = map_shapes(name)
    assert model.feature_info.channels() == list(SIZES[name]["dims"])
    assert model.feature_info.reduction() == [4, 8, 16, 32][: len(shapes)]
    assert [tuple(map.shape) for map in model(draw(name))] == shapes


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("out_indices", [(0,), (1, 2), (-1,), (0, 2)])
def test_features_of_some_stages(name: str, out_indices: tuple[int, ...]):
    model = build(name, features_only=True, out_indices=out_indices)
    expected = [map_shapes(name)[index] for index in out_indices]
    assert [tuple(map.shape) for map in model(draw(name))] == expected
    assert model.feature_info.channels() == [shape[1] for shape in expected]
    assert model.feature_info.reduction() == [64 // shape[2] for shape in expected]


@pytest.mark.parametrize("name", NANOS)
def test_features_are_those_of_the_whole_model(name: str):
    torch.manual_seed(0)
    whole = build(name)
    torch.manual_seed(0)
    backbone = build(name, features_only=True, out_indices=(0, 1, 2))
    backbone.load_state_dict({f"model.{key}": tensor for key, tensor in whole.state_dict().items()}, strict=False)
    x = draw(name)
    with torch.inference_mode():
        tokens, maps = whole.forward_features(x), backbone(x)
    assert torch.equal(maps[-1], tokens.permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", NANOS)
def test_features_of_odd_sizes(name: str):
    """Sizes round up; the reduction holds to a pixel."""
    maps = build(name, features_only=True)(draw(name, 45, 70))
    assert [tuple(map.shape[2:]) for map in maps] == [(12, 18), (6, 9), (3, 5)]


@pytest.mark.parametrize("name", NAMES)
def test_forward_intermediates(name: str):
    """All maps, and the last tokens as `forward_features` gives them."""
    model, x = build(name), draw(name)
    with torch.no_grad():
        tokens, maps = model.forward_intermediates(x)
        expected = model.forward_features(x)
    assert [tuple(map.shape) for map in maps] == map_shapes(name)
    assert tokens.shape == expected.shape
    assert name not in RUN or torch.equal(tokens, expected)


@pytest.mark.parametrize("name", NANOS)
@pytest.mark.parametrize(
    ("indices", "taken"), [(None, [0, 1, 2]), (1, [2]), (2, [1, 2]), ([0], [0]), ([0, 2], [0, 2]), ([-2], [1])]
)
def test_intermediates_of_indices(name: str, indices, taken: list[int]):
    model, x = build(name), draw(name)
    with torch.inference_mode():
        every = model.forward_intermediates(x, intermediates_only=True)
        some = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    assert len(some) == len(taken)
    assert all(torch.equal(map, every[index]) for map, index in zip(some, taken, strict=True))


@pytest.mark.parametrize("name", NANOS)
def test_intermediates_channels_last(name: str):
    model, x = build(name), draw(name)
    with torch.inference_mode():
        first = model.forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)
        last = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(map, other.permute(0, 3, 1, 2)) for map, other in zip(first, last, strict=True))
    with pytest.raises(ValueError, match=r"output_fmt 'NLC'.*NCHW, NHWC"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("name", NANOS)
@pytest.mark.parametrize("stop_early", [False, True])
def test_intermediates_stop_early(name: str, stop_early: bool):
    """The stages after the last index run only if they must."""
    model, ran = build(name), []
    for index, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda *_, index=index: ran.append(index))
    tokens, maps = model.forward_intermediates(draw(name), indices=[0], stop_early=stop_early)
    assert ran == ([0] if stop_early else [0, 1, 2])
    assert tuple(maps[0].shape) == map_shapes(name)[0]
    assert tokens.shape[-1] == SIZES[name]["dims"][ran[-1]]


@pytest.mark.parametrize("name", NANOS)
@pytest.mark.parametrize("indices", [[3], [-4], 4])
def test_intermediates_out_of_range(name: str, indices):
    with pytest.raises((AssertionError, ValueError), match="out of range"):
        build(name).forward_intermediates(draw(name), indices=indices)


@pytest.mark.parametrize("name", NANOS)
@pytest.mark.parametrize(("indices", "kept"), [([0], [0]), ([0, 1], [0, 1]), (1, [2]), ([-1], [2])])
def test_prune_intermediate_layers(name: str, indices, kept: list[int]):
    """What is not needed is gone, and the maps are the same."""
    model, x = build(name), draw(name)
    with torch.inference_mode():
        before = model.forward_intermediates(x, indices=kept, intermediates_only=True)
        assert model.prune_intermediate_layers(indices) == kept
        after = model.forward_intermediates(x, indices=kept, intermediates_only=True)
    assert all(map(torch.equal, before, after))
    left = {key.split(".")[0] for key in model.state_dict()}
    assert left == {"stem", "stages"}
    assert len(model.stages) == kept[-1] + 1


@pytest.mark.parametrize("name", NANOS)
def test_pruning_may_keep_the_head(name: str):
    model, x = build(name), draw(name)
    with torch.inference_mode():
        before = model(x)
        model.prune_intermediate_layers(1, prune_head=False)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", NANOS)
def test_fx_tracing(name: str):
    """timm and torchvision cut features out of a symbolic trace by the names of modules."""
    model, x = build(name), draw(name)
    traced = create_feature_extractor(model, {"stages.0": "map", "head": "logits"})
    with torch.inference_mode():
        parts, logits = traced(x), model(x)
        (map,) = model.forward_intermediates(x, indices=[0], output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(parts["logits"], logits)
    assert torch.equal(parts["map"], map)


# --------------------------------------------------------------------------------------------------------
# Heads
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_head_sizes(name: str):
    """`num_features` in front of the head, `head_hidden_size` in front of the classifier."""
    model = build(name)
    assert model.num_features == SIZES[name]["dims"][-1]
    tokens = model.forward_features(draw(name))
    assert tokens.shape[-1] == model.num_features
    assert model.forward_head(tokens, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.forward_head(tokens).shape == (2, 1000)


@pytest.mark.parametrize("name", NAMES)
def test_reset_classifier(name: str):
    model, x = build(name), draw(name)
    model.reset_classifier(7)
    assert (model.num_classes, model(x).shape) == (7, (2, 7))
    assert model.get_classifier().weight.shape == (7, model.head_hidden_size)
    model.reset_classifier(0)
    assert (model.num_classes, model(x).shape) == (0, (2, model.head_hidden_size))
    model.reset_classifier(3, "")
    assert model(x).shape == (2, *map_shapes(name)[-1][2:], 3)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)
    with pytest.raises(ValueError, match=r"global_pool 'max'"):
        model.reset_classifier(3, "max")


@pytest.mark.parametrize("name", NANOS)
def test_a_new_classifier_is_fresh_and_the_body_is_kept(name: str):
    model, x = build(name), draw(name)
    before = copy.deepcopy(model)
    model.reset_classifier(1000)
    with torch.inference_mode():
        pooled, kept = (net.forward_head(net.forward_features(x), pre_logits=True) for net in (model, before))
    assert torch.equal(pooled, kept)
    assert not torch.equal(model.head.weight, before.head.weight)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.head.bias.any()


@pytest.mark.parametrize("name", NANOS)
def test_a_new_classifier_follows_device_and_dtype(name: str):
    """A head for a model on a device, or in another dtype, must take its outputs."""
    model = build(name).bfloat16()
    model.reset_classifier(4)
    assert model.head.weight.dtype == torch.bfloat16
    assert model(draw(name).bfloat16()).shape == (2, 4)
    large = build("ssvit_large")
    large.reset_classifier(4)
    assert large.head.weight.device.type == "meta"


@pytest.mark.parametrize("name", NANOS)
@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
def test_drop_rate_acts_in_training_only(name: str, drop_rate: float):
    model = build(name, drop_rate=drop_rate)
    tokens = torch.randn(2, 4, 6, model.num_features)
    model.forward_head(tokens)
    pooled = model.forward_head(tokens, pre_logits=True)
    assert not (pooled == 0).any()
    model.head_drop.train()
    assert (model.forward_head(tokens, pre_logits=True) == 0).any().item() == (drop_rate > 0)


# --------------------------------------------------------------------------------------------------------
# Training helpers
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_layer_groups(name: str):
    """The stem first, then block by block, then the head; every parameter in one group."""
    depths = SIZES[name]["depths"]
    model = build(name, depths=depths)
    groups = group_parameters(model, model.group_matcher())
    assert len(groups) == 1 + sum(depths) + 1
    names = [key for group in groups.values() for key in group]
    assert sorted(names) == sorted(key for key, _ in model.named_parameters())
    prefixes = [{tuple(key.split(".")[:4]) for key in groups[index] if ".blocks." in key} for index in sorted(groups)]
    expected = [("stages", str(s), "blocks", str(b)) for s, depth in enumerate(depths) for b in range(depth)]
    assert prefixes == [set(), *({prefix} for prefix in expected), set()]
    assert {key.split(".")[0] for key in groups[0]} == {"stem"}
    body = {"stem", "stages"}
    assert {key.split(".")[0] for key in groups[max(groups)]} == {key.split(".")[0] for key in names} - body


def test_a_stages_norm_learns_with_its_last_block():
    groups = group_with_matcher(build("vvt_nano").named_parameters(), build("vvt_nano").group_matcher(), reverse=True)
    for stage, depth in enumerate(SIZES["vvt_nano"]["depths"]):
        assert groups[f"stages.{stage}.norm.weight"] == groups[f"stages.{stage}.blocks.{depth - 1}.norm1.weight"]


@pytest.mark.parametrize("name", NAMES)
def test_coarse_layer_groups(name: str):
    """Stages, each with the downsampling in front of it."""
    model = build(name)
    groups = group_with_matcher(model.named_parameters(), model.group_matcher(coarse=True), reverse=True)
    stages = len(SIZES[name]["dims"])
    assert set(groups.values()) == set(range(stages + 2))
    for key, group in groups.items():
        first, second = key.split(".")[:2]
        assert group == {"stem": 0, "stages": 1 + int(second) if first == "stages" else None}.get(first, stages + 1)


def test_layer_decay_and_weight_decay():
    """timm's optimizer factory: earlier layers learn slower; biases, norms and gammas do not decay."""
    model = timm.create_model("ssvit_base", depths=(1, 1, 1, 1))
    assert model.no_weight_decay() == set()
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    for group in groups:
        assert {parameter.ndim <= 1 for parameter in group["params"]} == {group["weight_decay"] == 0}
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scales) == len(list(model.parameters()))
    assert scales[id(model.head.weight)] == 1
    in_order = [model.stem[0].weight, *(stage.blocks[0].attn.qkv.weight for stage in model.stages), model.proj.weight]
    assert [scales[id(weight)] for weight in in_order] == [0.5**power for power in (5, 4, 3, 2, 1, 0)]
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    decayed = [parameter for group in optimizer.param_groups if group["weight_decay"] for parameter in group["params"]]
    assert len(decayed) == sum(parameter.ndim > 1 for parameter in model.parameters())


@pytest.mark.parametrize("name", NANOS)
def test_set_grad_checkpointing(name: str):
    """On, off, and no change in what is computed."""
    model, x = build(name), draw(name)
    with torch.inference_mode():
        before = model(x)
        model.set_grad_checkpointing()
        assert torch.equal(model(x), before)
    model.train().set_grad_checkpointing(enable=True)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------------
# Configuration and state
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_cfg(name: str):
    """The names in it are those of parameters, its sizes those of the network."""
    model = build(name)
    cfg = model.default_cfg
    assert model.pretrained_cfg["architecture"] == name
    state = model.state_dict()
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0] == 3
    assert state[f"{cfg['classifier']}.weight"].shape[0] == cfg["num_classes"] == 1000
    tokens = model.forward_features(draw(name, *cfg["input_size"][1:]))
    assert tuple(tokens.shape[1:3]) == cfg["pool_size"]


def test_published_preprocessing():
    """Resize to 256, crop 224, bicubic, ImageNet's mean and standard deviation."""
    config = resolve_model_data_config(build("ssvit_tiny"))
    assert config["input_size"] == (3, 224, 224)
    assert config["crop_pct"] == 224 / 256
    assert config["interpolation"] == "bicubic"
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["std"] == (0.229, 0.224, 0.225)
    steps = create_transform(**config).transforms
    assert (steps[0].size, tuple(steps[1].size)) == (256, (224, 224))


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_holds_what_is_learned(name: str):
    """Parameters and batch norm statistics; running the model adds no plan and no rotary table."""
    model = build(name)
    before = set(model.state_dict())
    model(draw(name))
    assert set(model.state_dict()) == before
    buffers = {key.rsplit(".", 1)[-1] for key, _ in model.named_buffers()}
    has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert buffers == ({"running_mean", "running_var", "num_batches_tracked"} if has_batch_norm else set())
    assert before == {key for key, _ in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("name", NANOS)
def test_deep_copies_are_apart(name: str):
    """As EMA needs them, also after a forward; the copy computes the same and shares nothing."""
    model, x = build(name), draw(name)
    with torch.no_grad():
        before = model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), before)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(model(x), before)
    assert timm.utils.ModelEmaV3(model).module(x).shape == (2, 1000)


@pytest.mark.parametrize("name", NANOS)
def test_the_classifier_comes_last(name: str):
    """timm's adaptive gradient clipping leaves out the last two parameters as the classifier's."""
    model = build(name)
    kept = {id(parameter) for parameter in model_parameters(model, exclude_head=True)}
    assert [key for key, parameter in model.named_parameters() if id(parameter) not in kept] == [
        "head.weight",
        "head.bias",
    ]
