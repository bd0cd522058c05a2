"""VVT is the published network, and vicinity attention its quadratic definition in linear time."""

from functools import cache
from math import cos, pi, sin

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.golden import count_largest, error, images, official_state, recorded
from torch import Tensor, nn

from s3a import VVT
from s3a.analysis.cost import count_cost
from s3a.models.vvt import VicinityAttention, build_vicinity, checkpoint_filter_fn, clamp_magnitude
from s3a.published import PUBLISHED


@cache
def official(size: str) -> VVT:
    """A published size with the recorded weights."""
    model = timm.create_model(f"vvt_{size}").eval()
    model.load_state_dict(checkpoint_filter_fn(official_state(size, "vvt"), model))
    return model


# --------------------------------------------------------------------------------------------------------
# The same function as the official one
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "height", "width"), [("tiny", 224, 224), ("small", 256, 320)])
def test_official_logits(size: str, height: int, width: int):
    with torch.inference_mode():
        logits = official(size)(images(0, (2, 3, height, width)))
    assert error(logits, recorded("baselines_logits")[f"vvt_{size}_{height}x{width}"]) <= 1e-5


def test_initialisation():
    """Linear layers of std 0.02, convolutions normal by their fan-out, no biases; two epsilons of norms."""
    model = timm.create_model("vvt_tiny")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.detach()
            fan_out = weight[:, 0].numel() // getattr(module, "groups", 1)
            std = 0.02 if isinstance(module, nn.Linear) else (2 / fan_out) ** 0.5
            assert abs(weight.std().item() - std) < 5 * std / (2 * weight.numel()) ** 0.5, name
            assert module.bias is None or not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-5 if "stem" in name or "downsample" in name else 1e-6), name


def test_maps_are_normalised():
    """Every stage ends with a LayerNorm, so its tokens have mean 0 and variance 1 before training."""
    with torch.inference_mode():
        maps = (
            timm.create_model("vvt_nano")
            .eval()
            .forward_intermediates(torch.randn(2, 3, 64, 96), intermediates_only=True, output_fmt="NHWC")
        )
    for map in maps:
        torch.testing.assert_close(map.mean(-1), torch.zeros(map.shape[:3]), rtol=0, atol=1e-5)
        torch.testing.assert_close(map.var(-1, correction=0), torch.ones(map.shape[:3]), rtol=1e-3, atol=0)


# --------------------------------------------------------------------------------------------------------
# Vicinity attention
# --------------------------------------------------------------------------------------------------------


STEPS = ("context", "reciprocal", "product", "normalised", "projected", "final")  # those that are clamped


def clamped(x: Tensor, step: str = "", skipped: str | None = None) -> Tensor:
    """Magnitudes below 1e-4 and above 1e4 set to these; no gradient for what is set, nor at zero."""
    if step == skipped:
        return x
    small, large = (x.abs() < 1e-4) & (x != 0), x.abs() > 1e4
    kept = torch.where(small | large | (x == 0), 0, x)
    return kept + x.detach().sign() * (1e-4 * small.to(x.dtype) + 1e4 * large.to(x.dtype))


def vicinity_weights(height: int, width: int) -> Tensor:
    """[tokens, tokens]: cos(da) + cos(db), pair by pair."""
    places = [(row, column) for row in range(height) for column in range(width)]
    return torch.tensor(
        [
            [cos(pi / 2 * (r - row) / height) + cos(pi / 2 * (c - column) / width) for row, column in places]
            for r, c in places
        ],
        dtype=torch.float64,
    )


def split_heads(module: VicinityAttention, x: Tensor) -> tuple[list[Tensor], ...]:
    """Queries, keys and values of every head, [batch, tokens, head_dim] each, of [batch, tokens, dim]."""
    query, key, value = (
        F.linear(x, layer.weight, layer.bias) for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    return tuple(tensor.chunk(module.num_heads, dim=-1) for tensor in (query.relu(), key.relu(), value))


def finish(module: VicinityAttention, x: Tensor, heads: list[Tensor], skipped: str | None = None) -> Tensor:
    """What follows the heads: projection, the feature-preserving connection, their clamps."""
    out = F.linear(torch.cat(heads, dim=-1), module.out_proj.weight, module.out_proj.bias)
    out = clamped(out, "projected", skipped)
    gate = torch.sigmoid(F.linear(F.linear(x.mean(1), module.gate[0].weight).relu(), module.gate[2].weight))
    return clamped(out + out * gate.unsqueeze(1), "final", skipped)


def quadratic_vicinity(module: VicinityAttention, x: Tensor) -> Tensor:
    """By its definition over all pairs of tokens; the sums over keys, and so their clamp, never come about."""
    weights, tokens = vicinity_weights(*x.shape[1:3]), x.flatten(1, 2)
    heads = []
    for query, key, value in zip(*split_heads(module, tokens), strict=True):
        scores = query @ key.transpose(1, 2) * weights
        share = clamped(1 / (scores.sum(-1, keepdim=True) + 1e-4))
        heads.append(clamped(clamped(scores @ value) * share))
    return finish(module, tokens, heads).reshape(x.shape)


def linear_vicinity(module: VicinityAttention, x: Tensor, skipped: str | None = None) -> Tensor:
    """In the official order of steps, so with every clamp, but one that is skipped."""
    height, width = x.shape[1:3]
    tokens = x.flatten(1, 2)
    angles = [(pi / 2 * row / height, pi / 2 * column / width) for row in range(height) for column in range(width)]
    factors = torch.tensor([[cos(a), sin(a), cos(b), sin(b)] for a, b in angles], dtype=torch.float64)
    heads = []
    for query, key, value in zip(*split_heads(module, tokens), strict=True):
        query, key = (torch.cat([t * f[:, None] for f in factors.unbind(1)], dim=-1) for t in (query, key))
        context = clamped(torch.einsum("bnd,bne->bde", key, value), "context", skipped)
        share = clamped(1 / (torch.einsum("bnd,bd->bn", query, key.sum(1)) + 1e-4), "reciprocal", skipped)
        product = clamped(torch.einsum("bnd,bde->bne", query, context), "product", skipped)
        heads.append(clamped(product * share.unsqueeze(-1), "normalised", skipped))
    return finish(module, tokens, heads, skipped).reshape(x.shape)


def drawn(dim: int, num_heads: int, std: float = 0.5, **options: int) -> VicinityAttention:
    """The module in float64, with weights that leave no term out."""
    module = VicinityAttention(dim, num_heads, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def assert_same(module: VicinityAttention, x: Tensor, right: Tensor) -> None:
    """Output and every gradient."""
    ours = module(x)
    assert error(ours, right) <= 1e-10
    names, parameters = zip(*module.named_parameters(), strict=True)
    weight = torch.randn_like(right)
    ours, right = (torch.autograd.grad((out * weight).sum(), (x, *parameters)) for out in (ours, right))
    for name, mine, its in zip(("x", *names), ours, right, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("height", "width"), [(6, 6), (5, 9), (8, 3), (1, 7), (1, 1)])
@pytest.mark.parametrize(("dim", "num_heads", "reduction"), [(16, 2, 2), (12, 3, 1), (16, 1, 4)])
def test_vicinity_attention_is_the_quadratic_one(height, width, dim: int, num_heads: int, reduction: int):
    module = drawn(dim, num_heads, reduction=reduction)
    x = torch.randn(2, height, width, dim, dtype=torch.float64, requires_grad=True)
    assert_same(module, x, quadratic_vicinity(module, x))


# Of tokens, and of the projected output: numbers below, within and above what the clamps leave alone.
SCALES = ((1e-3, 1.0), (1e-2, 1.0), (1.0, 1.0), (30.0, 1.0), (3e3, 1.0), (1.0, 3e4))


def scaled(scale: float, out_scale: float) -> tuple[VicinityAttention, Tensor]:
    """A module without biases, and tokens."""
    torch.manual_seed(0)
    module = drawn(16, 2)
    for layer in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        module.out_proj.weight *= out_scale
    return module, (scale * torch.randn(2, 7, 6, 16, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize("scale", SCALES)
def test_clamps(scale: tuple[float, float]):
    module, x = scaled(*scale)
    assert_same(module, x, linear_vicinity(module, x))


@pytest.mark.parametrize("step", STEPS)
def test_the_scales_need_every_clamp(step: str):
    """Without any one of them, the numbers above would be others."""
    needed = [
        not torch.allclose(linear_vicinity(*scaled(*scale), step), linear_vicinity(*scaled(*scale))) for scale in SCALES
    ]
    assert any(needed)


def test_clamp_keeps_signs_and_zeros():
    x = torch.tensor([0.0, -0.0, 1e-9, -1e-9, 1e-4, 0.5, -0.5, 1e4, 1e9, -1e9, torch.inf, -torch.inf])
    right = [0, 0, 1e-4, -1e-4, 1e-4, 0.5, -0.5, 1e4, 1e4, -1e4, 1e4, -1e4]
    assert clamp_magnitude(x).tolist() == pytest.approx(right, rel=1e-6)
    assert clamp_magnitude(torch.tensor(torch.nan)).isnan()


def test_weights_of_places():
    """Their products are cos(da) + cos(db), also where the map is not square."""
    factors = build_vicinity(4, 7, torch.device("cpu"), torch.float64).squeeze(-1)
    torch.testing.assert_close(factors @ factors.T, vicinity_weights(4, 7), rtol=1e-12, atol=1e-12)


def test_weights_of_places_are_built_once():
    module, x = VicinityAttention(16, 2), torch.randn(1, 11, 13, 16)
    with torch.inference_mode():
        module(x)
    before = build_vicinity.cache_info().misses
    module(x).sum().backward()  # of tensors made in inference mode there would be no backward
    VicinityAttention(16, 4)(x)
    assert build_vicinity.cache_info().misses == before
    assert torch.equal(module(x, module.plan(x)), module(x))


def test_vicinity_attention_is_linear_in_tokens():
    """Four times the tokens: four times the cost, and no tensor grows faster."""
    with torch.device("meta"):
        module, model = VicinityAttention(16, 2), timm.create_model("vvt_nano", num_classes=0)
        maps = [torch.empty(1, side, side, 16, requires_grad=True) for side in (64, 128, 256)]
    largest = [count_largest(lambda map=map: module(map).sum().backward()) for map in maps]
    assert largest[2] == 4 * largest[1] == 16 * largest[0]
    costs = [count_cost(model, side, side).gmacs for side in (256, 512, 1024)]
    assert costs[2] / costs[1] == pytest.approx(4, rel=0.01)
    assert costs[1] / costs[0] == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(
    ("dim", "num_heads", "reduction"), [(16, 3, 2), (16, 16, 2), (16, 0, 2), (0, 1, 2), (16, 2, 0)]
)
def test_sizes_without_meaning_are_refused(dim: int, num_heads: int, reduction: int):
    with pytest.raises(ValueError, match="must divide the dim"):
        VicinityAttention(dim, num_heads, reduction=reduction)


@pytest.mark.slow
def test_vicinity_attention_compiles_to_one_graph():
    """Generated code, forward and backward, is the eager function."""
    module, x = VicinityAttention(16, 2), torch.randn(2, 9, 10, 16, requires_grad=True)
    leaves, weight = (x, *module.parameters()), torch.randn(2, 9, 10, 16)
    eager, compiled = (call(x) for call in (module, torch.compile(module, fullgraph=True)))
    assert error(compiled, eager) <= 1e-5
    eager, compiled = (torch.autograd.grad((output * weight).sum(), leaves) for output in (eager, compiled))
    for mine, its in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


def test_built_by_hand():
    """Without timm's factory, with the table's defaults: the tiny one."""
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in VVT().parameters()) == PUBLISHED["vvt_tiny"].parameters
