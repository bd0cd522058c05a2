"""What holds for the models of every family: stochastic depth, any size of image, heads, gradients."""

import importlib

import pytest
import timm
import torch
from helpers.golden import error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from s3a.models.backbone import Backbone
from s3a.nn.layers import Pointwise

NANOS = ("ssvit_nano", "svit_nano", "vvt_nano")
LAST_RATES = {
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


def blocks_of(model: Backbone) -> list[nn.Module]:
    return [block for stage in model.stages for block in stage.blocks]


def depths_of(name: str) -> tuple[int, ...]:
    return importlib.import_module(f"s3a.models.{name.partition('_')[0]}").SIZES[name]["depths"]


def randomized(model: nn.Module) -> nn.Module:
    """Weights that keep numbers of order one, so that no term is lost among others."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


# --------------------------------------------------------------------------------------------------------
# Stochastic depth
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAST_RATES)
def test_published_drop_path_rates(name: str):
    """Linear over all blocks, from 0 to the size's rate."""
    with torch.device("meta"):
        model = timm.create_model(name)
    rates = [block.drop_path.drop_prob for block in blocks_of(model)]
    expected = torch.linspace(0, LAST_RATES[name], sum(depths_of(name)), dtype=torch.float64)
    assert rates == pytest.approx(expected.tolist(), abs=1e-12)


@pytest.mark.parametrize("name", NANOS)
def test_drop_path_rate_reaches_the_model(name: str):
    depth = sum(depths_of(name))
    rates = [block.drop_path.drop_prob for block in blocks_of(timm.create_model(name, drop_path_rate=0.5))]
    assert rates == pytest.approx([0.5 * index / (depth - 1) for index in range(depth)])
    assert {block.drop_path.drop_prob for block in blocks_of(timm.create_model(name))} == {0.0}


@pytest.mark.parametrize("name", NANOS)
def test_stochastic_depth(name: str):
    """At rate 0.5 every image keeps each branch doubled or drops it, apart from the others; evaluation keeps all."""
    model = timm.create_model(name, depths=(1, 1, 1), drop_path_rate=1.0)
    stage = randomized(model.stages[1]).train()
    (block,) = stage.blocks
    for norm in (module for module in stage.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eval()  # the statistics of a batch would mix its images

    def outcome(tokens: torch.Tensor, attn_factor: float, mlp_factor: float) -> torch.Tensor:
        if block.pos_conv is not None:
            tokens = tokens + block.pos_conv(tokens)
        tokens = tokens + attn_factor * block.attn(block.norm1(tokens))
        return stage.norm(tokens + mlp_factor * block.feed_forward(tokens))

    x = torch.randn(1, 8, 8, 32).expand(64, -1, -1, -1)
    with torch.no_grad():
        tokens = stage.downsample(x)
        outcomes = torch.stack([outcome(tokens, *factors) for factors in ((0, 0), (0, 2), (2, 0), (2, 2))])
        distance = (outcomes - stage(x)).abs().amax((2, 3, 4))  # [outcomes, images]
        assert (distance.amin(0) < 1e-4).all()
        assert set(distance.argmin(0).tolist()) == {0, 1, 2, 3}
        stage.eval()
        assert torch.allclose(stage(x), outcome(stage.downsample(x), 1, 1), atol=1e-5)


class RandomCalls(TorchDispatchMode):
    """Counts the calls that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        drawing = torch.ops.aten.rand, torch.ops.aten.bernoulli, torch.ops.aten.bernoulli_
        self.count += function.overloadpacket in drawing
        return function(*arguments, **keywords or {})


def test_a_stage_draws_once():
    """And a stage without rates draws nothing."""
    model = timm.create_model("ssvit_nano", depths=(1, 2, 3), drop_path_rate=0.5).train()
    with RandomCalls() as drawn:
        model(torch.randn(8, 3, 32, 32))
    assert drawn.count == 2


@pytest.mark.parametrize("name", NANOS)
def test_certain_drops(name: str):
    """At rate 1 the last block only adds its position encoding, if it has one."""
    stage = timm.create_model(name, depths=(1, 1, 1), drop_path_rate=1.0).stages[2].train()
    (block,) = stage.blocks
    x = torch.randn(4, 8, 8, 64)
    tokens = stage.downsample(x)
    left = tokens if block.pos_conv is None else tokens + block.pos_conv(tokens)
    assert torch.equal(stage(x), stage.norm(left))


def test_drop_path_may_change_between_forwards():
    """As recipes do that raise it for the last epochs."""
    model = timm.create_model("svit_nano").train()
    (last,) = model.stages[-1].blocks[-1:]
    last.drop_path.drop_prob = 1.0
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert not last.mlp.fc2.weight.grad.any()


# --------------------------------------------------------------------------------------------------------
# Inputs and outputs
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NANOS, "ssvit_tiny", "svit_small", "vvt_tiny"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (64, 32), (96, 160)])
def test_any_size_of_image(name: str, height: int, width: int):
    """Finite logits and a map of a 32nd (16th in three stages) of the size, rounded up."""
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, height, width)
    with torch.inference_mode():
        tokens, logits = model.forward_features(x), model(x)
    stride = 2 ** (len(model.stages) + 1)
    assert tokens.shape == (2, -(-height // stride), -(-width // stride), model.num_features)
    assert logits.shape == (2, 1000)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", NANOS)
def test_images_of_a_batch_are_apart(name: str):
    model, x = randomized(timm.create_model(name)).double().eval(), torch.randn(3, 3, 48, 64, dtype=torch.float64)
    with torch.inference_mode():
        together, alone = model(x), torch.cat([model(image[None]) for image in x])
    assert error(together, alone) <= 1e-10


@pytest.mark.parametrize("name", NANOS)
def test_other_channels_and_classes(name: str):
    x = torch.randn(2, 5, 40, 64)
    assert timm.create_model(name, in_chans=5, num_classes=7).eval()(x).shape == (2, 7)
    headless = timm.create_model(name, in_chans=5, num_classes=0).eval()
    assert headless(x).shape == (2, headless.head_hidden_size)
    unpooled = timm.create_model(name, in_chans=5, num_classes=0, global_pool="").eval()
    assert unpooled(x).shape == (2, 3, 4, unpooled.head_hidden_size)


@pytest.mark.parametrize("name", NANOS)
def test_pooling_is_the_mean_of_the_map(name: str):
    model = timm.create_model(name, num_classes=0).eval()
    with torch.inference_mode():
        tokens = model.forward_features(torch.randn(2, 3, 48, 64))
        pooled = model.forward_head(tokens)
        model.reset_classifier(0, "")
        torch.testing.assert_close(model.forward_head(tokens).mean((1, 2)), pooled)


@pytest.mark.parametrize("name", NANOS)
@pytest.mark.parametrize(("height", "width"), [(31, 64), (64, 31), (8, 8)])
@pytest.mark.parametrize("call", ["forward", "forward_intermediates"])
def test_small_images_are_refused(name: str, call: str, height: int, width: int):
    with pytest.raises(ValueError, match=f"{height} x {width} pixels.*at least 32"):
        getattr(timm.create_model(name), call)(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("name", NANOS)
@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 64, 64, 3), (3, 64, 64), (0, 3, 64, 64)])
def test_wrong_images_are_refused(name: str, shape: tuple[int, ...]):
    shown = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"\({shown}\).*\[batch, 3, height, width\]"):
        timm.create_model(name)(torch.zeros(shape))


@pytest.mark.parametrize("name", NANOS)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_heads": (3, 4, 8)}, "num_heads"),
        ({"num_heads": (2, 4, 8, 16)}, "num_heads"),
        ({"depths": (2, 2)}, "depths"),
        ({"depths": (2, 0, 2)}, "depths"),
        ({"dims": (), "depths": (), "num_heads": ()}, "dims"),
        ({"global_pool": "max"}, "global_pool"),
        ({"in_chans": 0}, "in_chans"),
        ({"drop_path_rate": 1.5}, "drop_path_rate"),
        ({"drop_rate": -0.1}, "drop_rate"),
        ({"num_classes": -1}, "num_classes"),
    ],
)
def test_tables_without_meaning_are_refused(name: str, changes: dict, named: str):
    with pytest.raises(ValueError, match=named):
        timm.create_model(name, **changes)


@pytest.mark.parametrize("name", NANOS)
def test_arguments_of_other_models_are_refused(name: str):
    """As Python's TypeError and as a ValueError for users, with the nearest argument that there is."""
    for kind in (TypeError, ValueError):
        with pytest.raises(kind, match=f"argument of {name} 'drop_path_rates' is unknown.*mean 'drop_path_rate'"):
            timm.create_model(name, drop_path_rates=0.1)
        with pytest.raises(kind, match=f"{name} has no argument 'img_size': it takes images of any size.*leave .* out"):
            timm.create_model(name, img_size=384)
    factory = {"pretrained_cfg_overlay": {"crop_pct": 0.7}, "features_only": True, "out_indices": (0, 1)}
    assert timm.create_model(name, **factory).feature_info.out_indices == (0, 1)


def test_weights_that_nobody_published_are_refused_with_a_remedy():
    with pytest.raises(RuntimeError, match=r"No pretrained weights exist for ssvit_nano yet.*convert_official\.py"):
        timm.create_model("ssvit_nano", pretrained=True)


# --------------------------------------------------------------------------------------------------------
# Gradients and precision
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NANOS, "ssvit_tiny"])
def test_gradients_reach_every_parameter(name: str):
    """In evaluation mode, since a batch norm in training takes the biases in front of it out again."""
    model = timm.create_model(name, num_classes=5).eval()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", NANOS)
def test_training_changes_every_statistic(name: str):
    """A training forward and backward is finite; all batch norms see it."""
    model = timm.create_model(name, drop_path_rate=0.2).train()
    model(torch.randn(4, 3, 48, 64)).logsumexp(1).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            assert buffer.any(), key


@pytest.mark.parametrize("name", NANOS)
def test_grad_checkpointing_gives_the_same_gradients(name: str):
    """And it does recompute: every block runs twice in a training step, once in evaluation."""
    model, x = timm.create_model(name, drop_path_rate=0.3).train(), torch.randn(2, 3, 48, 64)
    calls = []
    blocks_of(model)[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def step(checkpointing: bool) -> tuple[list[torch.Tensor], int]:
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)  # the same paths are dropped
        calls.clear()
        gradients = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        return list(gradients), len(calls)

    (plain, once), (recomputed, twice) = step(False), step(True)
    assert (once, twice) == (1, 2)
    assert all(map(torch.equal, plain, recomputed))
    model.eval()(x)
    assert len(calls) == 3


@pytest.mark.parametrize("name", NANOS)
def test_half_precision(name: str):
    """bfloat16 weights, and autocast: logits near those in float32."""
    model, x = randomized(timm.create_model(name)).eval(), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        right = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert error(model(x), right) <= 0.1
        half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert error(half, right) <= 0.1


@pytest.mark.parametrize("name", NANOS)
def test_training_under_autocast(name: str):
    model = timm.create_model(name, drop_path_rate=0.2).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 48, 64)).float().logsumexp(1).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", NANOS)
def test_pointwise_layers_are_linear(name: str):
    """What quantization takes: no convolution of kernel size 1, and pointwise layers wherever tokens are mapped."""
    model = timm.create_model(name)
    assert not [key for key, module in model.named_modules() if getattr(module, "kernel_size", None) == (1, 1)]
    for block in blocks_of(model):
        assert isinstance(block.mlp.fc1, Pointwise) and isinstance(block.mlp.fc2, Pointwise)
        assert [module for module in block.attn.modules() if isinstance(module, Pointwise)]
