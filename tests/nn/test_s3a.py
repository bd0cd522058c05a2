"""S3A, held against the same mathematics written the official way: channels first, step by step."""

import copy
from collections import Counter

import pytest
import torch
from helpers.backends import list_backends
from helpers.golden import dense_mask, error, masked_attention, scan_table
from helpers.layers import conv, randomize, rotate_as_complex
from torch import Tensor

from s3a import S3A
from s3a.attention.plan import lay_out_scan
from s3a.nn.s3a import build_attention_plan, join_plan
from s3a.support.caches import clear_caches


def official_s3a(module: S3A, x: Tensor) -> Tensor:
    """Sparse Scan Self-Attention in the five steps of its description, on [batch, height, width, dim]."""
    heads, height, width = module.num_heads, x.shape[1], x.shape[2]
    query, key, value = conv(module.qkv, x.permute(0, 3, 1, 2)).chunk(3, dim=1)
    lepe = conv(module.lepe, value, padding=2, groups=value.shape[1])
    query, key, value = (t.unflatten(1, (heads, -1)).permute(0, 3, 4, 1, 2) for t in (query, key, value))
    query, key = rotate_as_complex(query), rotate_as_complex(key) * query.shape[-1] ** -0.5
    for kernel_size, dilation in scan_table(height, width, module.fixed, module.size):
        value = masked_attention(query, key, value, dense_mask(height, width, kernel_size, dilation), scale=1.0)
    attended = value.flatten(3).permute(0, 3, 1, 2)
    return conv(module.proj, attended + lepe).permute(0, 2, 3, 1)


@pytest.mark.parametrize("backend", list_backends(torch.float64))
@pytest.mark.parametrize("fixed", ["window", "anchors"])
@pytest.mark.parametrize(
    ("height", "width", "dim", "num_heads", "size"), [(14, 19, 32, 2, 7), (8, 15, 48, 3, 3), (4, 6, 8, 2, 7)]
)
def test_s3a_is_the_official_mathematics(height, width, dim, num_heads, size, fixed: str, backend: str):
    """Oblong maps, one below the window, head dims 16 and 4; output and every gradient."""
    module = randomize(S3A(dim, num_heads, size=size, fixed=fixed, backend=backend))
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
    exact = randomize(S3A(32, 2))
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
    before = [cached.cache_info().misses for cached in (build_attention_plan, join_plan, lay_out_scan)]
    module(x)
    with torch.inference_mode():
        S3A(32, 2, fixed="anchors")(x)
    after = [cached.cache_info().misses for cached in (build_attention_plan, join_plan, lay_out_scan)]
    # without a gradient backends are chosen anew, and here come to the same plan
    assert after == [before[0] + 1, *before[1:]]


def test_s3a_takes_a_plan():
    module, x = S3A(32, 2), torch.randn(1, 14, 16, 32)
    assert torch.equal(module(x, module.plan(x)), module(x))
    other = S3A(32, 2, fixed="anchors")
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x, other.plan(x)), other(x)), "it is used, whatever the module would look up"
    assert not torch.equal(other(x), module(x))


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_s3a_trains_on_plans_built_while_evaluating(first):
    clear_caches()
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


def test_s3a_refuses_a_plan_of_another_map():
    attention, x = S3A(16, 1, size=3), torch.randn(1, 6, 8, 16)
    with pytest.raises(
        ValueError, match=r"^the plan is of 8 x 6 tokens on cpu, and x has 6 x 8 on cpu: .* or no plan$"
    ):
        attention(x, attention.plan(x.transpose(1, 2)))
    with torch.device("meta"):
        other = S3A(16, 1, size=3)
    with pytest.raises(ValueError, match=r"on meta, and x has 6 x 8 on cpu"):
        attention(x, other.plan(x.to("meta")))
