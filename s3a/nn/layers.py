"""The building blocks, on channels-last tokens.

Shapes: [batch, height, width, dim] between layers; inside S3A [batch, tokens, heads, head_dim] with the
tokens in row-major order. Pointwise layers are linear ones; convolutions see the same memory as a
channels-last image and hand it back.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from s3a.quantization import int8
from s3a.support.compiler import is_transformed


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution with bias that keeps the map's size, on [batch, height, width, dim]."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Pointwise(nn.Linear):
    """A linear layer on [batch, height, width, dim].

    In float32 on a CPU it runs as the 1x1 convolution that it is: PyTorch hands that to oneDNN and a matrix product
    to MKL, which on AMD processors has half the speed (LOG.md). Weights of another kind, such as quantized ones,
    bring their own product, but for int8-dynamic ones in compiled inference on a CPU (`int8`).
    """

    def forward(self, x: Tensor) -> Tensor:
        plain = type(self.weight) is nn.Parameter and x.dtype == self.weight.dtype == torch.float32
        if int8.can_run(x, self.weight):
            return int8.int8_linear(x, self.weight, self.bias)
        if not (plain and x.device.type == "cpu"):
            return super().forward(x)
        return conv2d(x.permute(0, 3, 1, 2), self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1)


class Region(nn.Module):
    """What `s3a.compile_model` compiles in one piece; instances of one class share their code where they can.

    A subclass writes `transform`, which takes tokens or images, that have the map's size, and then whatever else it
    needs. Hooks of the region itself stay outside of the compiled code.

    Attributes:
        run_compiled: takes the region and the arguments of `transform`; None where the region is not compiled.
    """

    run_compiled: Callable[..., Tensor] | None = None

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """`transform`, compiled where `s3a.compile_model` was called."""
        return self.transform(x, *rest) if self.run_compiled is None else self.run_compiled(self, x, *rest)

    def transform(self, x: Tensor, *rest: Any) -> Tensor:
        """What the region does, uncompiled."""
        raise NotImplementedError


def lay_channels_last(images: Tensor) -> Tensor:
    """Images [batch, channels, height, width] in channels-last memory; as they are under torch.vmap, which has none."""
    return images if is_transformed() else images.contiguous(memory_format=torch.channels_last)


class Stem(Region, nn.Sequential):
    """Images [batch, channels, height, width] to tokens [batch, height / 4, width / 4, dim], sizes rounded up.

    Four 3x3 convolutions, each followed by BatchNorm and, but for the last, GELU; or with `norm_last`, all of them
    by GELU and then BatchNorm.
    """

    def __init__(self, in_chans: int, dim: int, *, norm_last: bool = False) -> None:
        widths = (in_chans, dim // 2, dim // 2, dim, dim)
        layers: list[nn.Module] = []
        for index, stride in enumerate((2, 1, 2, 1)):
            norm, act = nn.BatchNorm2d(widths[index + 1]), nn.GELU()
            layers += [nn.Conv2d(widths[index], widths[index + 1], 3, stride=stride, padding=1)]
            layers += [act, norm] if norm_last else [norm, act]
        super().__init__(*(layers if norm_last else layers[:-1]))

    def transform(self, x: Tensor) -> Tensor:
        return nn.Sequential.forward(self, lay_channels_last(x)).permute(0, 2, 3, 1)


class Downsample(Region):
    """Halves the map (rounded up) and changes the width of the tokens: strided convolution, BatchNorm."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out_dim)

    def transform(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class ConvFFN(nn.Module):
    """A pointwise expansion, a residual depthwise convolution, a pointwise projection."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Pointwise(dim, hidden_dim)
        self.act = nn.GELU()
        self.dwconv = DepthwiseConv(hidden_dim, 3)
        self.fc2 = Pointwise(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))  # [batch, height, width, hidden_dim]
        return self.fc2(x + self.dwconv(x))
