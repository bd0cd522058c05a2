"""oneDNN's product of int8 matrices, and the compiled models that use it."""

from pathlib import Path

import pytest
import torch
from helpers.quantized import SHAPE, compute_logits, make_trained
from torch import nn

import s3a
from s3a import SSViT
from s3a.nn.compilation import compile_region
from s3a.quantization import convert, int8
from s3a.quantization.convert import quantize
from s3a.quantization.schemes import SCHEMES
from s3a.support.compiler import MULTIPLIES_BYTES


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-activations-int4-weights"])
def test_compiled(tmp_path: Path, graphs, scheme: str):
    """One graph per region; attention sums in another order there, and a code may fall to its neighbor."""
    quantize(make_trained(), scheme).save_pretrained(tmp_path)
    model, images = SSViT.from_pretrained(tmp_path), torch.randn(SHAPE)
    right = compute_logits(model, images)
    compile_region.cache_clear()
    int8.PACKED_WEIGHTS.clear()
    assert (compute_logits(s3a.compile_model(model), images) - right).norm() < 0.03 * right.norm()
    assert graphs["compiled"] > 0
    of_blocks = 24
    assert len(int8.PACKED_WEIGHTS) == (of_blocks if scheme == "int8-dynamic" and MULTIPLIES_BYTES else 0)


def test_products_of_bytes():
    """oneDNN's product equals one in whole numbers."""
    codes = torch.randint(0, 256, (5, 16), dtype=torch.uint8)
    weight, scale = torch.randint(-127, 128, (7, 16), dtype=torch.int8), torch.rand(7)
    right = (codes.long() - 128) @ weight.long().T * scale.double()
    torch.testing.assert_close(int8.multiply_bytes(codes, weight, scale).double(), right, rtol=1 / 128, atol=0)


def test_a_linear_layer_is_exact_where_rounding_is():
    """Against whole numbers: tokens whose scale is 1 and that are rounded up, and weights that do not cancel out.

    A zero that is off by one adds the sum of a weight's row, which cancels out in weights of both signs.
    """
    layer = nn.Sequential(nn.Linear(32, 8, bias=False))
    layer[0].weight.data = torch.randint(1, 128, (8, 32)).float()
    layer[0].weight.data[:, 0] = 127  # so that the scale of every row is 1
    convert.quantize_(layer.bfloat16(), convert.CONFIGS["int8-dynamic"](SCHEMES["int8-dynamic"]))
    weight = layer[0].weight.detach()
    tokens = torch.randint(-31, 31, (1, 2, 3, 32)) + 0.75
    tokens[..., 0], tokens[..., 1] = 127, -127
    right = tokens.round().long() @ weight.qdata.long().T * weight.scale.flatten().double()
    found = int8.int8_linear(tokens.bfloat16(), weight, None)
    torch.testing.assert_close(found.double(), right, rtol=1 / 128, atol=0)
    assert weight.qdata.min() > 0


def test_products_of_bytes_follow_their_weight():
    """The layout of a weight is kept as long as the weight stays the same, and no longer."""
    codes, scale = torch.randint(0, 256, (5, 16), dtype=torch.uint8), torch.rand(7)
    weight, other = (torch.randint(-127, 128, (7, 16), dtype=torch.int8) for _ in range(2))
    before = int8.multiply_bytes(codes, weight, scale)
    assert int8.pack_weight(weight) is int8.pack_weight(weight)
    weight.copy_(other)
    after = int8.multiply_bytes(codes, weight, scale)
    assert not torch.equal(after, before)
    assert torch.equal(after, int8.multiply_bytes(codes, other, scale))
    with torch.inference_mode():
        weight = other.clone()
        int8.multiply_bytes(codes, weight, scale)
        weight.zero_()
        assert not int8.multiply_bytes(codes, weight, scale).any()


def test_compiled_linear_layers():
    """Tokens of very different sizes have scales of their own; one of zeros gives the bias."""
    layer = nn.Sequential(nn.Linear(32, 8)).bfloat16()
    convert.quantize_(layer, convert.CONFIGS["int8-dynamic"](SCHEMES["int8-dynamic"]))
    weight, bias = layer[0].weight.detach(), layer[0].bias.detach()
    x = (torch.randn(2, 3, 4, 32) * 10.0 ** torch.arange(-3, 1)[:, None]).bfloat16()
    x[0, 0, 0] = 0
    found, right = int8.int8_linear(x, weight, bias), nn.functional.linear(x.float(), weight.dequantize().float())
    assert torch.equal(found[0, 0, 0], bias)
    error = (found.float() - bias - right).abs().amax(-1)
    assert (error <= 0.02 * x.float().norm(dim=-1) + 2**-9).all()
