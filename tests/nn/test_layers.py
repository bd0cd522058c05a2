"""The layers, held against the same mathematics written the official way: channels first, step by step."""

import pytest
import torch
from helpers.golden import error
from helpers.layers import conv, randomize
from torch import Tensor, nn

from s3a.nn.layers import ConvFFN, DepthwiseConv, Downsample, Stem


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
    layer, x = randomize(DepthwiseConv(6, kernel_size)), torch.randn(2, 7, 9, 6, dtype=torch.float64)
    right = conv(layer, x.permute(0, 3, 1, 2), padding=kernel_size // 2, groups=6).permute(0, 2, 3, 1)
    assert error(layer(x), right) <= 1e-12


def test_conv_ffn():
    layer, x = randomize(ConvFFN(6, 18)), torch.randn(2, 7, 9, 6, dtype=torch.float64)
    hidden = gelu(conv(layer.fc1, x.permute(0, 3, 1, 2)))
    right = conv(layer.fc2, hidden + conv(layer.dwconv, hidden, padding=1, groups=18))
    assert error(layer(x), right.permute(0, 2, 3, 1)) <= 1e-12


def test_downsample():
    layer, x = randomize(Downsample(6, 10)).eval(), torch.randn(2, 7, 10, 6, dtype=torch.float64)
    right = batch_norm(layer.norm, conv(layer.reduction, x.permute(0, 3, 1, 2), stride=2, padding=1))
    assert error(layer(x), right.permute(0, 2, 3, 1)) <= 1e-12
    assert layer(x).shape == (2, 4, 5, 10)


def test_stem():
    layer, x = randomize(Stem(3, 8)).eval(), torch.randn(2, 3, 33, 46, dtype=torch.float64)
    right = x
    for index, stride in zip((0, 3, 6, 9), (2, 1, 2, 1), strict=True):
        right = batch_norm(layer[index + 1], conv(layer[index], right, stride=stride, padding=1))
        right = gelu(right) if index < 9 else right
    assert error(layer(x), right.permute(0, 2, 3, 1)) <= 1e-12
    assert layer(x).shape == (2, 9, 12, 8)
    assert [layer[index].out_channels for index in (0, 3, 6, 9)] == [4, 4, 8, 8]
