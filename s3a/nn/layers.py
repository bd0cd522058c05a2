"""The building blocks, on channels-last tokens.

Shapes: [batch, height, width, dim] between layers; inside S3A [batch, tokens, heads, head_dim] with the
tokens in row-major order. Pointwise layers are linear ones; convolutions see the same memory as a
channels-last image and hand it back.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from s3a.quantization import int8


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

    Called with tokens or images, which have the map's size, and then whatever else its forward takes.
    """


class Stem(nn.Sequential, Region):
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

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)


class Downsample(Region):
    """Halves the map (rounded up) and changes the width of the tokens: strided convolution, BatchNorm."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
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
