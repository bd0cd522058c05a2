"""SSViT is the published network: parameter counts, recorded outputs, initialisation, gradients, any size of image."""

from functools import cache

import pytest
import timm
import torch
from golden import error, images, official_state, recorded
from torch import nn

import s3a
from s3a import SSViT
from s3a.models.ssvit import SIZES, checkpoint_filter_fn

PARAMETERS = {
    "ssvit_tiny": 15_095_688,
    "ssvit_small": 27_175_240,
    "ssvit_base": 57_138_736,
    "ssvit_large": 100_234_112,
}
DROP_PATH = {"ssvit_tiny": 0.1, "ssvit_small": 0.15, "ssvit_base": 0.4, "ssvit_large": 0.5}


@cache
def official(size: str, backend: str | None = None) -> SSViT:
    """A published size with the recorded weights."""
    model = timm.create_model(f"ssvit_{size}", backend=backend).eval()
    model.load_state_dict(checkpoint_filter_fn(official_state(size), model))
    return model


def blocks_of(model: SSViT) -> list[nn.Module]:
    return [block for stage in model.stages for block in stage.blocks]


# --------------------------------------------------------------------------------------------------------
# The same function as the official one
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str):
    """To the unit, as the authors' training logs print them."""
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == PARAMETERS[name]


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_tiny_logits(backend: str):
    with torch.inference_mode():
        logits = official("tiny", backend)(images(0, (2, 3, 224, 224)))
    assert error(logits, recorded("ssvit_logits")["tiny_224x224"]) <= 1e-5


def test_small_logits_of_oblong_images():
    with torch.inference_mode():
        logits = official("small")(images(0, (2, 3, 256, 320)))
    assert error(logits, recorded("ssvit_logits")["small_256x320"]) <= 1e-5


def test_tiny_stages():
    """Every stage's map before the next one halves it, so that a deviation is found where it begins."""
    with torch.inference_mode():
        maps = official("tiny").forward_intermediates(images(0, (2, 3, 224, 224)), intermediates_only=True)
    stages = recorded("ssvit_tiny_224_stages")
    assert len(maps) == 4
    for index, map in enumerate(maps, start=1):
        assert error(map.mean((2, 3)), stages[f"stage{index}_mean"]) <= 1e-5
        assert error(map[:, :8, :7, :7], stages[f"stage{index}_crop"]) <= 1e-5


def test_blocks_alternate_between_window_and_anchors():
    for stage in timm.create_model("ssvit_nano", depths=(3, 1, 2)).stages:
        assert [block.attn.fixed for block in stage.blocks] == (3 * ["window", "anchors"])[: len(stage.blocks)]


@pytest.mark.parametrize("name", ["ssvit_base", "ssvit_large"])
def test_layer_scale_stands_in_the_last_two_stages(name: str):
    model = timm.create_model(name, depths=(1, 1, 1, 1))
    scales = [[type(scale).__name__ for scale in (block.ls1, block.ls2)] for block in blocks_of(model)]
    assert scales == 2 * [["Identity", "Identity"]] + 2 * [["LayerScale", "LayerScale"]]
    gammas = [parameter for name, parameter in model.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 4
    assert all(torch.equal(gamma, torch.full_like(gamma, 1e-6)) for gamma in gammas)


# --------------------------------------------------------------------------------------------------------
# Initialisation and stochastic depth
# --------------------------------------------------------------------------------------------------------


def test_initialisation():
    """Weights of std 0.02, none far out; biases 0; norms start as the identity."""
    model = timm.create_model("ssvit_tiny")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.detach()
            spread = 5 * 0.02 / (2 * weight.numel()) ** 0.5  # five standard deviations of the estimate
            assert abs(weight.std().item() - 0.02) < spread, name
            assert abs(weight.mean().item()) < 5 * 0.02 / weight.numel() ** 0.5, name
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight)), name
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6, name


@pytest.mark.parametrize("name", DROP_PATH)
def test_published_drop_path_rates(name: str):
    """Linear over all blocks, from 0 to the size's rate."""
    with torch.device("meta"):
        model = timm.create_model(name)
    rates = [block.drop_path.drop_prob for block in blocks_of(model)]
    expected = torch.linspace(0, DROP_PATH[name], sum(SIZES[name]["depths"]), dtype=torch.float64)
    assert rates == pytest.approx(expected.tolist(), abs=1e-12)


def test_drop_path_rate_reaches_the_model():
    rates = [block.drop_path.drop_prob for block in blocks_of(timm.create_model("ssvit_nano", drop_path_rate=0.5))]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert {block.drop_path.drop_prob for block in blocks_of(timm.create_model("ssvit_nano"))} == {0.0}


def test_stochastic_depth():
    """At rate 0.5 every image keeps each branch doubled or drops it, apart from the others; evaluation keeps all."""
    stage = timm.create_model("ssvit_nano", depths=(1, 1, 1), drop_path_rate=1.0).stages[1].train()
    (block,) = stage.blocks
    nn.init.normal_(block.attn.proj.weight, std=0.5)
    nn.init.normal_(block.mlp.fc2.weight, std=0.5)

    def outcome(tokens: torch.Tensor, attn_factor: float, mlp_factor: float) -> torch.Tensor:
        tokens = tokens + block.pos_conv(tokens)
        tokens = tokens + attn_factor * block.attn(block.norm1(tokens))
        return tokens + mlp_factor * block.mlp(block.norm2(tokens))

    x = torch.randn(1, 8, 8, 32).expand(64, -1, -1, -1)
    with torch.no_grad():
        tokens = stage.downsample(x)
        outcomes = torch.stack([outcome(tokens, *factors) for factors in ((0, 0), (0, 2), (2, 0), (2, 2))])
        distance = (outcomes - stage(x)).abs().amax((2, 3, 4))  # [outcomes, images]
        assert (distance.amin(0) < 1e-5).all()
        assert set(distance.argmin(0).tolist()) == {0, 1, 2, 3}
        stage.eval()
        assert torch.allclose(stage(x), outcome(stage.downsample(x), 1, 1), atol=1e-6)


def test_certain_drops():
    """At rate 1 the last block only adds its position encoding."""
    stage = timm.create_model("ssvit_nano", depths=(1, 1, 1), drop_path_rate=1.0).stages[2].train()
    x = torch.randn(4, 8, 8, 64)
    tokens = stage.downsample(x)
    assert torch.equal(stage(x), tokens + stage.blocks[0].pos_conv(tokens))


# --------------------------------------------------------------------------------------------------------
# Inputs and outputs
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ssvit_nano", "ssvit_tiny"])
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


def test_images_of_a_batch_are_apart():
    model, x = timm.create_model("ssvit_nano").eval(), torch.randn(3, 3, 48, 64)
    with torch.inference_mode():
        together, alone = model(x), torch.cat([model(image[None]) for image in x])
    assert error(together, alone) <= 1e-5


def test_other_channels_and_classes():
    x = torch.randn(2, 5, 40, 64)
    assert timm.create_model("ssvit_nano", in_chans=5, num_classes=7).eval()(x).shape == (2, 7)
    assert timm.create_model("ssvit_nano", in_chans=5, num_classes=0).eval()(x).shape == (2, 256)
    unpooled = timm.create_model("ssvit_nano", in_chans=5, num_classes=0, global_pool="").eval()
    assert unpooled(x).shape == (2, 3, 4, 256)


def test_pooling_is_the_mean_of_the_map():
    model = timm.create_model("ssvit_nano", num_classes=0).eval()
    with torch.inference_mode():
        tokens = model.forward_features(torch.randn(2, 3, 48, 64))
        pooled = model.forward_head(tokens)
        model.reset_classifier(0, "")
        torch.testing.assert_close(model.forward_head(tokens).mean((1, 2)), pooled)


@pytest.mark.parametrize(("height", "width"), [(31, 64), (64, 31), (8, 8)])
@pytest.mark.parametrize("call", ["forward", "forward_intermediates"])
def test_small_images_are_refused(call: str, height: int, width: int):
    with pytest.raises(ValueError, match=f"{height} x {width} pixels.*at least 32"):
        getattr(timm.create_model("ssvit_nano"), call)(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 64, 64, 3), (3, 64, 64)])
def test_wrong_images_are_refused(shape: tuple[int, ...]):
    shown = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"\({shown}\).*\[batch, 3, height, width\]"):
        timm.create_model("ssvit_nano")(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_heads": (3, 4, 8)}, "num_heads"),
        ({"size": 0}, "size"),
        ({"backend": "tilde"}, "tiled"),
        ({"global_pool": "max"}, "global_pool"),
        ({"depths": (2, 2)}, "depths"),
        ({"num_heads": (2, 4, 8, 16)}, "num_heads"),
        ({"layer_scale": (None, None)}, "layer_scale"),
    ],
)
def test_tables_without_meaning_are_refused(changes: dict, named: str):
    with pytest.raises(ValueError, match=named):
        timm.create_model("ssvit_nano", **changes)


def test_misspelt_arguments_are_refused():
    with pytest.raises(TypeError, match="drop_path_rates"):
        timm.create_model("ssvit_nano", drop_path_rates=0.1)


def test_built_by_hand():
    """Without timm's factory, with the table's defaults: the tiny one."""
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in s3a.SSViT().parameters()) == PARAMETERS["ssvit_tiny"]


# --------------------------------------------------------------------------------------------------------
# Gradients
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ssvit_nano", "ssvit_tiny"])
def test_gradients_reach_every_parameter(name: str):
    """In evaluation mode, since a batch norm in training takes the biases in front of it out again."""
    model = timm.create_model(name, num_classes=5).eval()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


def test_training_changes_every_statistic():
    """A training forward and backward is finite; all batch norms see it."""
    model = timm.create_model("ssvit_nano", drop_path_rate=0.2).train()
    model(torch.randn(4, 3, 48, 64)).logsumexp(1).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            assert buffer.any(), key


def test_grad_checkpointing_gives_the_same_gradients():
    """And it does recompute: every block runs twice in a training step, once in evaluation."""
    model, x = timm.create_model("ssvit_nano", drop_path_rate=0.3).train(), torch.randn(2, 3, 48, 64)
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


def test_half_precision():
    """bfloat16 weights, and autocast: logits near those in float32."""
    model, x = timm.create_model("ssvit_nano").eval(), torch.randn(2, 3, 64, 64)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    with torch.inference_mode():
        right = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert error(model(x), right) <= 0.1
        half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert error(half, right) <= 0.1
