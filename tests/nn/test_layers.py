"""The layers, held against the same mathematics written the official way: channels first, step by step."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers.golden import dense_mask, error, masked_attention, scan_table
from torch import Tensor, nn

from s3a import S3A
from s3a.attention.plan import plan_scan
from s3a.nn.layers import ConvFFN, DepthwiseConv, Downsample, Stem
from s3a.nn.rotary import rotary_angles, rotate
from s3a.nn.s3a import build_attention_plan

# --------------------------------------------------------------------------------------------------------
# The official mathematics
# --------------------------------------------------------------------------------------------------------


def turned(tensor: Tensor) -> Tensor:
    """The rotary embedding of [batch, height, width, heads, head_dim], pairs as complex numbers."""
    _, height, width, _, head_dim = tensor.shape
    count = head_dim // 4
    frequencies = [10000.0 ** -(t / (count - 1) if count > 1 else 0.0) for t in range(count)]
    angles = torch.tensor(
        [
            [[row * f for f in frequencies] + [column * f for f in frequencies] for column in range(width)]
            for row in range(height)
        ],
        dtype=torch.float64,
    )
    pairs = torch.view_as_complex(tensor.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.exp(1j * angles)[:, :, None]).flatten(-2)


def conv(layer: nn.Module, x: Tensor, **options: int) -> Tensor:
    """A layer as a convolution on [batch, channels, height, width]; pointwise layers have 2-d weights."""
    weight = layer.weight[..., None, None] if layer.weight.ndim == 2 else layer.weight
    return F.conv2d(x, weight, layer.bias, **options)


def official_s3a(module: S3A, x: Tensor) -> Tensor:
    """Sparse Scan Self-Attention in the five steps of its description, on [batch, height, width, dim]."""
    heads, height, width = module.num_heads, x.shape[1], x.shape[2]
    query, key, value = conv(module.qkv, x.permute(0, 3, 1, 2)).chunk(3, dim=1)
    lepe = conv(module.lepe, value, padding=2, groups=value.shape[1])
    query, key, value = (t.unflatten(1, (heads, -1)).permute(0, 3, 4, 1, 2) for t in (query, key, value))
    query, key = turned(query), turned(key) * query.shape[-1] ** -0.5
    for kernel_size, dilation in scan_table(height, width, module.fixed, module.size):
        value = masked_attention(query, key, value, dense_mask(height, width, kernel_size, dilation), scale=1.0)
    attended = value.flatten(3).permute(0, 3, 1, 2)
    return conv(module.proj, attended + lepe).permute(0, 2, 3, 1)


def randomized(module: nn.Module) -> nn.Module:
    """The module in float64, with parameters and statistics that leave no term out."""
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return module


# --------------------------------------------------------------------------------------------------------
# S3A
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("fixed", ["window", "anchors"])
@pytest.mark.parametrize(
    ("height", "width", "dim", "num_heads", "size"), [(14, 19, 32, 2, 7), (8, 15, 48, 3, 3), (4, 6, 8, 2, 7)]
)
def test_s3a_is_the_official_mathematics(height, width, dim, num_heads, size, fixed: str, backend: str):
    """Oblong maps, one below the window, head dims 16 and 4; output and every gradient."""
    module = randomized(S3A(dim, num_heads, size=size, fixed=fixed, backend=backend))
    x = torch.randn(2, height, width, dim, dtype=torch.float64, requires_grad=True)
    ours, right = module(x), official_s3a(module, x)
    assert ours.shape == x.shape
    assert error(ours, right) <= 1e-10
    names, parameters = zip(*module.named_parameters(), strict=True)
    weight = torch.randn_like(right)
    ours, right = (torch.autograd.grad((out * weight).sum(), (x, *parameters)) for out in (ours, right))
    for name, mine, its in zip(("x", *names), ours, right, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_s3a_on_flex(graphs: Counter):
    """The module through the block masks, without gradients."""
    module = S3A(32, 2, backend="flex").eval()
    x = torch.randn(2, 14, 19, 32)
    with torch.no_grad():
        ours = module(x)
        right = official_s3a(copy.deepcopy(module).double(), x.double())
    assert error(ours, right) <= 1e-5
    assert graphs["runs"] == 2


def test_s3a_refuses_to_train_on_flex_without_cuda():
    """It must say so rather than fall back."""
    with pytest.raises(ValueError, match=r'no backward on the CPU.*"tiled"'):
        S3A(32, 2, backend="flex")(torch.randn(1, 8, 8, 32))


def test_s3a_in_bfloat16_and_autocast():
    exact = randomized(S3A(32, 2))
    x = torch.randn(2, 14, 15, 32)
    with torch.no_grad():
        right = official_s3a(exact, x.double())
        half = copy.deepcopy(exact).bfloat16()(x.bfloat16())
        single = copy.deepcopy(exact).float()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = single(x)
    assert (half.dtype, mixed.dtype) == (torch.bfloat16, torch.bfloat16)
    assert error(single(x), right) <= 1e-5
    assert error(half, right) <= 5e-2
    assert error(mixed, right) <= 5e-2


def test_s3a_trains_under_autocast():
    module = S3A(32, 2)
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(1, 9, 10, 32)).float().square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_s3a_builds_a_plan_once():
    """The second forward, also in another mode and through another module, finds all it needs."""
    module, x = S3A(32, 2, fixed="anchors"), torch.randn(1, 17, 23, 32)
    module(x)
    before = build_attention_plan.cache_info().misses, plan_scan.cache_info().misses
    module(x)
    with torch.inference_mode():
        S3A(32, 2, fixed="anchors")(x)
    assert (build_attention_plan.cache_info().misses, plan_scan.cache_info().misses) == before


def test_s3a_takes_a_plan():
    module, x = S3A(32, 2), torch.randn(1, 14, 16, 32)
    assert torch.equal(module(x, module.plan(x)), module(x))


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_s3a_trains_on_plans_built_while_evaluating(first):
    build_attention_plan.cache_clear()
    plan_scan.cache_clear()
    module, x = S3A(32, 2), torch.randn(1, 13, 14, 32)
    with first():
        evaluated = module(x)
    trained = module(x)
    trained.sum().backward()
    assert torch.equal(trained, evaluated)
    assert module.qkv.weight.grad.abs().sum() > 0


def test_s3a_keeps_nothing_but_its_parameters():
    """Plans and rotary tables belong to the process, not to checkpoints; copies work."""
    module = S3A(32, 2)
    module(torch.randn(1, 8, 9, 32))
    names = {f"{layer}.{kind}" for layer in ("qkv", "lepe", "proj") for kind in ("weight", "bias")}
    assert set(module.state_dict()) == names
    x = torch.randn(1, 8, 9, 32)
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_s3a_compiles_to_one_graph():
    """Forward and backward of the compiled module are those of the eager one."""
    module = S3A(32, 2)
    x = torch.randn(2, 8, 9, 32, requires_grad=True)
    weight = torch.randn_like(x)
    leaves = (x, *module.parameters())
    right = torch.autograd.grad((module(x) * weight).sum(), leaves)
    output = torch.compile(module, fullgraph=True)(x)
    assert error(output, module(x)) <= 1e-5
    for mine, its in zip(torch.autograd.grad((output * weight).sum(), leaves), right, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dim", "num_heads"), [(32, 3), (32, 0), (32, -2), (24, 4), (32, 16), (0, 1), (-32, 2), (32.0, 2), (32, 2.0)]
)
def test_s3a_refuses_sizes_without_meaning(dim, num_heads):
    """Heads must divide the dim into positive multiples of 4."""
    with pytest.raises(ValueError, match=r"dim.*num_heads|num_heads.*dim"):
        S3A(dim, num_heads)


@pytest.mark.parametrize("size", [0, -1, 7.0, True, (7, 3)])
def test_s3a_refuses_wrong_sizes_of_scans(size):
    with pytest.raises(ValueError, match="size"):
        S3A(32, 2, size=size)


def test_s3a_refuses_unknown_words():
    with pytest.raises(ValueError, match=r"fixed 'windows'.*'window'"):
        S3A(32, 2, fixed="windows")
    with pytest.raises(ValueError, match=r"backend 'tile'.*'tiled'"):
        S3A(32, 2, backend="tile")


@pytest.mark.parametrize("shape", [(1, 49, 32), (1, 7, 7, 31), (1, 0, 7, 32), (7, 32)])
def test_s3a_refuses_other_shapes(shape: tuple[int, ...]):
    """The module is for any network, so it says what it takes."""
    with pytest.raises(ValueError, match=r"height, width"):
        S3A(32, 2)(torch.randn(shape))


# --------------------------------------------------------------------------------------------------------
# Rotary embedding
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [4, 8, 16, 32])
def test_rotation(head_dim: int):
    """Pairs of neighboring channels, rows first; as complex numbers on an oblong map."""
    x = torch.randn(2, 5, 9, 3, head_dim, dtype=torch.float64)
    angles = rotary_angles(5, 9, head_dim).double()[:, None]
    rotated = rotate(x.flatten(1, 2), angles.cos(), angles.sin()).unflatten(1, (5, 9))
    assert error(rotated, turned(x)) <= 1e-6


def test_rotation_by_hand():
    """Head dim 8 has frequencies 1 and 1 / 10000; at row 2 and column 3 they turn by 2, 0.0002, 3 and 0.0003."""
    angles = rotary_angles(3, 4, 8).float()
    assert angles.shape == (12, 4)
    torch.testing.assert_close(angles[2 * 4 + 3], torch.tensor([2.0, 2e-4, 3.0, 3e-4]))
    quarter = torch.tensor([torch.pi / 2])
    torch.testing.assert_close(rotate(torch.tensor([1.0, 0.0]), quarter.cos(), quarter.sin()), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rotation_does_not_depend_on_the_default_dtype(dtype: torch.dtype):
    """Tables are cached for the process, so a coarse default would spoil them for everyone."""
    right = rotary_angles(30, 40, 16).double()
    torch.set_default_dtype(dtype)
    try:
        angles = rotary_angles(30, 40, 16).double()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(angles, right, rtol=1e-6, atol=1e-6)


def test_rotation_keeps_the_dtype():
    ones = torch.ones(4, 1, 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert rotate(torch.ones(1, 4, 2, 4, dtype=dtype), ones, ones).dtype == dtype


# --------------------------------------------------------------------------------------------------------
# The other layers
# --------------------------------------------------------------------------------------------------------


def batch_norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """In evaluation, by its definition."""
    mean, variance, weight, bias = (
        t[:, None, None] for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return (x - mean) / (variance + layer.eps).sqrt() * weight + bias


def gelu(x: Tensor) -> Tensor:
    """The exact one."""
    return x * (1 + torch.erf(x / 2**0.5)) / 2


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_depthwise_conv(kernel_size: int):
    layer, x = randomized(DepthwiseConv(6, kernel_size)), torch.randn(2, 7, 9, 6, dtype=torch.float64)
    right = conv(layer, x.permute(0, 3, 1, 2), padding=kernel_size // 2, groups=6).permute(0, 2, 3, 1)
    assert error(layer(x), right) <= 1e-12


def test_conv_ffn():
    layer, x = randomized(ConvFFN(6, 18)), torch.randn(2, 7, 9, 6, dtype=torch.float64)
    hidden = gelu(conv(layer.fc1, x.permute(0, 3, 1, 2)))
    right = conv(layer.fc2, hidden + conv(layer.dwconv, hidden, padding=1, groups=18))
    assert error(layer(x), right.permute(0, 2, 3, 1)) <= 1e-12


def test_downsample():
    layer, x = randomized(Downsample(6, 10)).eval(), torch.randn(2, 7, 10, 6, dtype=torch.float64)
    right = batch_norm(layer.norm, conv(layer.reduction, x.permute(0, 3, 1, 2), stride=2, padding=1))
    assert error(layer(x), right.permute(0, 2, 3, 1)) <= 1e-12
    assert layer(x).shape == (2, 4, 5, 10)


def test_stem():
    layer, x = randomized(Stem(3, 8)).eval(), torch.randn(2, 3, 33, 46, dtype=torch.float64)
    right = x
    for index, stride in zip((0, 3, 6, 9), (2, 1, 2, 1), strict=True):
        right = batch_norm(layer[index + 1], conv(layer[index], right, stride=stride, padding=1))
        right = gelu(right) if index < 9 else right
    assert error(layer(x), right.permute(0, 2, 3, 1)) <= 1e-12
    assert layer(x).shape == (2, 9, 12, 8)
    assert [layer[index].out_channels for index in (0, 3, 6, 9)] == [4, 4, 8, 8]
