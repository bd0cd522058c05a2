"""Compiled inference of int8 weights on a CPU: oneDNN's product of int8 matrices, behind an operator of our own.

torchao's product returns 32-bit integers, which the compiler has to scale. It generates scalar code for that where the
result is bfloat16, and repeats it, and the rounding before it, wherever the result is read. oneDNN's product returns
bfloat16 directly (LOG.md). The operator hides it from the compiler, which would want constant weights.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from s3a.support.compiler import MULTIPLIES_BYTES

if TYPE_CHECKING:  # slow to import, and most models are not quantized
    from torchao.quantization import Int8Tensor

PACKED_WEIGHTS = WeakTensorKeyDictionary()  # weight -> its version counter, and oneDNN's layout of it at that version
ZERO = 128  # the code of activations of 0: oneDNN's fast product takes unsigned codes
LEAST_SCALE = 1e-12


def can_run(x: Tensor, weight: Tensor) -> bool:
    """Whether `int8_linear` can take them: weights of torchao's int8-dynamic, compiled by torch.compile for a CPU."""
    if not MULTIPLIES_BYTES or torch.compiler.is_exporting() or not torch.compiler.is_dynamo_compiling():
        return False
    dynamic = type(weight).__name__ == "Int8Tensor" and getattr(weight, "act_quant_kwargs", None) is not None
    return dynamic and x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.is_grad_enabled()


@torch.library.custom_op("s3a::multiply_bytes", mutates_args=())
def multiply_bytes(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The matrix product of codes [tokens, inputs], minus 128, and a scaled int8 weight [outputs, inputs]: bfloat16."""
    zeros = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
    return torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, ZERO, pack_weight(weight), scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
    )


def pack_weight(weight: Tensor) -> Tensor:
    """oneDNN's layout of a weight; kept until the weight changes, unless its changes are not counted."""
    if weight.is_inference():  # its changes are not counted
        return torch.ops.onednn.qlinear_prepack(weight, None)
    found = PACKED_WEIGHTS.get(weight)
    if found is None or found[0] != weight._version:
        found = PACKED_WEIGHTS[weight] = (weight._version, torch.ops.onednn.qlinear_prepack(weight, None))
    return found[1]


@multiply_bytes.register_fake
def multiply_bytes_fake(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=torch.bfloat16)


def int8_linear(x: Tensor, weight: "Int8Tensor", bias: Tensor | None) -> Tensor:
    """A linear layer with int8 weights on tokens [..., inputs], each of which is rounded by a scale of its own."""
    rows = x.flatten(0, -2)
    # as_strided makes the compiler compute its input once, instead of again wherever it is read
    rows = rows.as_strided(rows.shape, rows.stride())
    scale = (rows.abs().amax(-1, keepdim=True).float() / 127).clamp(min=LEAST_SCALE)
    codes = ((rows * (1 / scale)).round() + ZERO).to(torch.uint8)
    y = multiply_bytes(codes, weight.qdata, weight.scale.flatten()).float() * scale
    y = y if bias is None else y + bias
    y = y.to(x.dtype)
    return y.as_strided(y.shape, y.stride()).unflatten(0, x.shape[:-1])
