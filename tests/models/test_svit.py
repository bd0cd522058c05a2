"""SViT is the published network, and super token attention the mathematics of its paper."""

from functools import cache
from itertools import product
from math import ceil

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.golden import count_largest, error, images, official_state, recorded
from torch import Tensor, nn

from s3a import SViT
from s3a.models.svit import SuperTokenAttention, checkpoint_filter_fn
from s3a.published import PUBLISHED


@cache
def official(size: str) -> SViT:
    """A published size with the recorded weights."""
    model = timm.create_model(f"svit_{size}").eval()
    model.load_state_dict(checkpoint_filter_fn(official_state(size, "svit"), model))
    return model


# --------------------------------------------------------------------------------------------------------
# The same function as the official one
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "height", "width"), [("small", 224, 224), ("base", 256, 320)])
def test_official_logits(size: str, height: int, width: int):
    with torch.inference_mode():
        logits = official(size)(images(0, (2, 3, height, width)))
    assert error(logits, recorded("baselines_logits")[f"svit_{size}_{height}x{width}"]) <= 1e-5


@pytest.mark.parametrize("name", ["svit_base", "svit_large"])
def test_layer_scale_stands_in_the_last_two_stages(name: str):
    model = timm.create_model(name, depths=(1, 1, 1, 1))
    blocks = [stage.blocks[0] for stage in model.stages]
    scales = [[type(scale).__name__ for scale in (block.ls1, block.ls2)] for block in blocks]
    assert scales == 2 * [["Identity", "Identity"]] + 2 * [["LayerScale", "LayerScale"]]
    assert all((scale.gamma == 1e-6).all() for block in blocks[2:] for scale in (block.ls1, block.ls2))


def test_stem():
    """Convolution, GELU and BatchNorm four times, in this order."""
    stem = timm.create_model("svit_nano").stem
    assert [type(layer) for layer in stem] == 4 * [nn.Conv2d, nn.GELU, nn.BatchNorm2d]
    assert [layer.stride for layer in list(stem)[::3]] == [(2, 2), (1, 1), (2, 2), (1, 1)]


def test_initialisation():
    """The classifier truncated normal of std 0.02, all else uniform by its fan-in, as the official code leaves it."""
    model = timm.create_model("svit_small")
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not model.head.bias.any()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name != "head":
            bound = module.weight[0].numel() ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound, name
            assert 0.5 * bound < module.bias.abs().max() <= bound, name
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6, name


# --------------------------------------------------------------------------------------------------------
# Super token attention
# --------------------------------------------------------------------------------------------------------


def dense_association(x: Tensor, cell: tuple[int, int]) -> Tensor:
    """[batch, pixels, super tokens] of a map of whole cells, pixel by pixel; most of it is zero."""
    batch, height, width, dim = x.shape
    rows, columns = height // cell[0], width // cell[1]
    means = x.unflatten(2, (columns, cell[1])).unflatten(1, (rows, cell[0])).mean((2, 4))
    association = x.new_zeros(batch, height, width, rows, columns)
    for row, column in product(range(height), range(width)):
        around = [(row // cell[0] + down, column // cell[1] + right) for down, right in product((-1, 0, 1), repeat=2)]
        inside = [0 <= r < rows and 0 <= c < columns for r, c in around]
        seen = [means[:, r, c] if there else 0 * means[:, 0, 0] for (r, c), there in zip(around, inside, strict=True)]
        scores = torch.stack([(x[:, row, column] * token).sum(-1) for token in seen], dim=-1) / dim**0.5
        for share, (r, c), there in zip(scores.softmax(-1).unbind(-1), around, inside, strict=True):
            if there:
                association[:, row, column, r, c] = share
    return association.flatten(3).flatten(1, 2)


def self_attention(module: SuperTokenAttention, tokens: Tensor) -> Tensor:
    """Multi-head attention over [batch, tokens, dim], head by head; a head's channels are query, key, value."""
    heads = []
    for channels in F.linear(tokens, module.qkv.weight, module.qkv.bias).chunk(module.num_heads, dim=-1):
        query, key, value = channels.chunk(3, dim=-1)
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        heads.append(scores.softmax(-1) @ value)
    return F.linear(torch.cat(heads, dim=-1), module.proj.weight, module.proj.bias)


def dense_super_token_attention(module: SuperTokenAttention, x: Tensor, cell: tuple[int, int]) -> Tensor:
    """The five steps of the paper by a dense association matrix, on [batch, height, width, dim]."""
    height, width = x.shape[1:3]
    padded = x.new_zeros(len(x), ceil(height / cell[0]) * cell[0], ceil(width / cell[1]) * cell[1], x.shape[3])
    padded[:, :height, :width] = x
    association = dense_association(padded.detach(), cell)
    supers = association.transpose(1, 2) @ padded.flatten(1, 2)
    supers = supers / (association.sum(1).unsqueeze(-1) + 1e-12)
    spread = association @ self_attention(module, supers)
    return spread.reshape(padded.shape)[:, :height, :width]


def drawn(dim: int, num_heads: int, super_token_size: int | tuple[int, int]) -> SuperTokenAttention:
    """The module in float64, with weights that leave no term out."""
    module = SuperTokenAttention(dim, num_heads, super_token_size=super_token_size).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


CASES = [
    (4, 8, 12),  # whole cells
    (4, 7, 13),  # ragged
    (2, 5, 9),
    (3, 3, 10),  # one row of cells
    (8, 5, 6),  # a single cell, smaller than its size
    ((2, 3), 7, 8),  # oblong cells
    ((1, 4), 3, 9),
]


@pytest.mark.parametrize(("super_token_size", "height", "width"), CASES)
def test_super_token_attention_is_the_dense_mathematics(super_token_size, height: int, width: int):
    """Output and every gradient; the association has none."""
    module = drawn(12, 3, super_token_size)
    cell = super_token_size if isinstance(super_token_size, tuple) else (super_token_size, super_token_size)
    x = torch.randn(2, height, width, 12, dtype=torch.float64, requires_grad=True)
    ours, right = module(x), dense_super_token_attention(module, x, cell)
    assert error(ours, right) <= 1e-10
    names, parameters = zip(*module.named_parameters(), strict=True)
    weight = torch.randn_like(right)
    ours, right = (torch.autograd.grad((out * weight).sum(), (x, *parameters)) for out in (ours, right))
    for name, mine, its in zip(("x", *names), ours, right, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("super_token_size", [1, (1, 1)])
def test_cells_of_one_token_are_plain_attention(super_token_size):
    module, x = drawn(12, 3, super_token_size), torch.randn(2, 5, 7, 12, dtype=torch.float64)
    assert error(module(x), self_attention(module, x.flatten(1, 2)).reshape(x.shape)) <= 1e-10


def test_equal_tokens_stay_finite():
    """Super tokens that hardly any pixel belongs to are divided by next to nothing."""
    module = SuperTokenAttention(8, 2, super_token_size=2)
    for x in (torch.zeros(1, 6, 6, 8), 1e3 * torch.randn(1, 7, 5, 8)):
        x.requires_grad_()
        output = module(x)
        output.sum().backward()
        assert output.isfinite().all() and x.grad.isfinite().all()


def test_the_association_is_sparse():
    """No tensor has pixels times super tokens; nine numbers a pixel are the most besides its channels."""
    with torch.device("meta"):
        module, x = SuperTokenAttention(8, 2, super_token_size=8), torch.empty(1, 256, 256, 8)
    pixels, supers = 256**2, 32**2
    assert count_largest(lambda: module(x).sum().backward()) <= max(2 * 3 * 8 * pixels, 2 * supers**2) < pixels * supers


@pytest.mark.parametrize(
    ("dim", "num_heads", "super_token_size"), [(12, 5, 2), (12, 0, 2), (0, 1, 2), (12, 3, 0), (12, 3, 2.5)]
)
def test_sizes_without_meaning_are_refused(dim, num_heads, super_token_size):
    with pytest.raises(ValueError, match=r"heads must divide|super_token_size"):
        SuperTokenAttention(dim, num_heads, super_token_size=super_token_size)


@pytest.mark.parametrize(
    "changes", [{"super_token_sizes": (4, 2)}, {"super_token_sizes": (4, 2, 0)}, {"layer_scale": (None, None)}]
)
def test_tables_without_meaning_are_refused(changes: dict):
    with pytest.raises(ValueError, match="|".join({"super_token_size", *changes})):
        timm.create_model("svit_nano", **changes)


@pytest.mark.slow
def test_super_token_attention_compiles_to_one_graph():
    """Generated code, forward and backward, is the eager function."""
    module, x = SuperTokenAttention(16, 2, super_token_size=4), torch.randn(2, 9, 10, 16, requires_grad=True)
    leaves, weight = (x, *module.parameters()), torch.randn(2, 9, 10, 16)
    eager, compiled = (call(x) for call in (module, torch.compile(module, fullgraph=True)))
    assert error(compiled, eager) <= 1e-5
    eager, compiled = (torch.autograd.grad((output * weight).sum(), leaves) for output in (eager, compiled))
    for mine, its in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


def test_built_by_hand():
    """Without timm's factory, with the table's defaults: the small one."""
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in SViT().parameters()) == PUBLISHED["svit_small"].parameters
