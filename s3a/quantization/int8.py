"""Compiled inference of int8 weights on a CPU: oneDNN's product of bytes, behind an operator of our own.

torchao's product leaves 32-bit integers for the compiler to scale. It does so without vectors where the outcome is
bfloat16, and it repeats that for every reader, as it repeats what comes before the rounding; oneDNN's product
gives bfloat16 right away (LOG.md). The operator hides it from the compiler, which would want constant weights.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

PACKED = WeakTensorKeyDictionary()  # weight -> its version, and oneDNN's layout of that
ZERO = 128  # codes of activations lie around it, for oneDNN's fast product takes unsigned ones
LEAST_SCALE = 1e-12


# Machines without these instructions would overflow, or be slow.
CAN_MULTIPLY = torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def runs_here(x: Tensor, weight: Tensor) -> bool:
    """Whether `int8_linear` is for them: torchao's int8-dynamic, traced by torch.compile for a CPU."""
    if not CAN_MULTIPLY or torch.compiler.is_exporting() or not torch.compiler.is_dynamo_compiling():
        return False
    dynamic = type(weight).__name__ == "Int8Tensor" and weight.act_quant_kwargs is not None
    return dynamic and x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.is_grad_enabled()


@torch.library.custom_op("s3a::multiply_bytes", mutates_args=())
def multiply_bytes(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Codes [tokens, inputs] around 128 times an int8 weight [outputs, inputs] and its scales: bfloat16."""
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, ZERO, packed(weight), scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
    )


def packed(weight: Tensor) -> Tensor:
    """oneDNN's layout of a weight as it is now; kept until the weight changes, where that can be seen."""
    if weight.is_inference():  # counts no changes
        return torch.ops.onednn.qlinear_prepack(weight, None)
    found = PACKED.get(weight)
    if found is None or found[0] != weight._version:
        found = PACKED[weight] = (weight._version, torch.ops.onednn.qlinear_prepack(weight, None))
    return found[1]


@multiply_bytes.register_fake
def multiply_bytes_fake(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=torch.bfloat16)


def int8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of int8 weights on tokens [..., inputs], which are rounded to bytes by a scale of their own."""
    rows = x.flatten(0, -2)
    # as_strided makes the compiler compute what it is given, once, instead of again for every reader
    rows = rows.as_strided(rows.shape, rows.stride())
    scale = (rows.abs().amax(-1, keepdim=True).float() / 127).clamp(min=LEAST_SCALE)
    codes = ((rows * (1 / scale)).round() + ZERO).to(torch.uint8)
    y = multiply_bytes(codes, weight.qdata, weight.scale.flatten()).float() * scale
    y = y if bias is None else y + bias
    y = y.to(x.dtype)
    return y.as_strided(y.shape, y.stride()).unflatten(0, x.shape[:-1])
