"""Layers written the official way: channels first, step by step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate_as_complex(tensor: Tensor) -> Tensor:
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


def randomize(module: nn.Module) -> nn.Module:
    """The module in float64, with parameters and statistics that leave no term out."""
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return module
