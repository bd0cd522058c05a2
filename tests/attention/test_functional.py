"""Every backend is the same function: held against recorded outputs, and against softmax under a dense mask."""

import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers.backends import list_backends
from helpers.golden import (
    NEIGHBORHOODS,
    ablated_attention,
    chained_attention,
    dense_mask,
    error,
    masked_attention,
    neighborhood_case,
    normal,
    scan_table,
)
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import s3a.attention.plan
from s3a import S3A, CompilationError, Neighborhood, SSViT, neighborhood_attention, sparse_scan, sparse_scan_attention
from s3a.attention.backends import BACKENDS, Operands, flex, tiled
from s3a.attention.backends.blocks import BlockLayout
from s3a.attention.backends.costs import CPU as CPU_COSTS
from s3a.attention.backends.costs import PassCost
from s3a.attention.backends.flex import compile_pass
from s3a.attention.backends.permute import permute_tokens
from s3a.attention.backends.reference import AxisKeys
from s3a.attention.backends.tiled import attend_key_list, is_compiled_inference, multiply
from s3a.attention.backends.tiles import TileLayout, list_keys
from s3a.attention.plan import (
    attend_plan,
    choose_backend,
    explain_choice,
    freeze_options,
    lay_out_scan,
    plan_scan,
)
from s3a.support.compiler import NoCompilerError

EAGER = list_backends(torch.float64)

# kernel size, dilation, batch, height, width
CASES = [
    (7, 1, 1, 14, 14),
    (3, 4, 3, 14, 14),  # ragged groups
    (7, 2, 1, 14, 14),  # dense groups
    (5, 2, 3, 13, 22),  # oblong
    ((3, 7), 1, 1, 12, 17),
    ((5, 3), (1, 4), 3, 9, 19),
    (7, 3, 1, 5, 4),  # smaller than the window
    (5, 2, 1, 5, 7),  # groups of 3 and 2 rows, of 4 and 3 columns
    (3, 9, 2, 6, 8),  # dilation beyond the map
    (5, 1, 1, 1, 23),  # one row
]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value of a shape."""
    return [tensor.to(dtype) for tensor in normal(sum(shape), *3 * [shape])]


def in_double(tensors: list[Tensor]) -> list[Tensor]:
    """The same values in float64."""
    return [tensor.detach().double() for tensor in tensors]


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a fixed random projection of the output."""
    (weight,) = normal(7, output.shape)
    return torch.autograd.grad((output * weight.to(output.dtype)).sum(), inputs)


def assert_near(ours: tuple[Tensor, ...], right: tuple[Tensor, ...], tolerance: float) -> None:
    """Each of ours within the tolerance of what is right, which may be zero throughout."""
    for mine, its in zip(ours, right, strict=True):
        torch.testing.assert_close(mine.double(), its, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------------------
# Forward
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize("index", range(len(NEIGHBORHOODS)))
def test_official_outputs(index: int, backend: str):
    inputs, output = neighborhood_case(index)
    kernel_size, dilation = NEIGHBORHOODS[index][2:]
    assert error(neighborhood_attention(*inputs, kernel_size, dilation, backend=backend), output) <= 1e-5


@pytest.mark.parametrize("index", range(len(NEIGHBORHOODS)))
def test_the_dense_oracle_itself(index: int):
    """The masks that the other tests lean on give the official outputs too."""
    inputs, output = neighborhood_case(index)
    height, width, kernel_size, dilation = NEIGHBORHOODS[index]
    dense = masked_attention(*in_double(inputs), dense_mask(height, width, kernel_size, dilation))
    assert error(dense, output) <= 1e-5


@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize(("kernel_size", "dilation", "batch", "height", "width"), CASES)
def test_dense_mask(kernel_size, dilation, batch: int, height: int, width: int, backend: str):
    """float32 at 1e-5, float64 at its own precision."""
    inputs = draw(batch, height, width, 2, 8)
    expected = masked_attention(*in_double(inputs), dense_mask(height, width, kernel_size, dilation))
    attended = neighborhood_attention(*inputs, kernel_size, dilation, backend=backend)
    assert (attended.shape, attended.dtype) == (inputs[0].shape, torch.float32)
    assert error(attended, expected) <= 1e-5
    attended = neighborhood_attention(*in_double(inputs), kernel_size, dilation, backend=backend)
    assert attended.dtype == torch.float64
    assert error(attended, expected) <= 1e-12


@pytest.mark.parametrize("backend", [name for name in EAGER if name in list_backends(torch.bfloat16)])
def test_bfloat16(backend: str):
    inputs = draw(2, 13, 22, 2, 16, dtype=torch.bfloat16)
    attended = neighborhood_attention(*inputs, 5, 2, backend=backend)
    assert attended.dtype == torch.bfloat16
    expected = masked_attention(*in_double(inputs), dense_mask(13, 22, 5, 2))
    assert (attended.double() - expected).abs().max() <= 2e-2


@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize("scale", [0.0, 0.05, 1, 3.0])
def test_scale(scale: float, backend: str):
    inputs = draw(1, 7, 9, 2, 8, dtype=torch.float64)
    expected = masked_attention(*inputs, dense_mask(7, 9, 3, 2), scale)
    assert error(neighborhood_attention(*inputs, 3, 2, scale=scale, backend=backend), expected) <= 1e-12


def strided_inputs(kind: str) -> list[Tensor]:
    """[2, 9, 11, 3, 4] tensors that are no plain memory."""
    if kind == "chunks":
        (qkv,) = normal(1, (2, 9, 11, 3 * 12))
        return [part.unflatten(-1, (3, 4)) for part in qkv.chunk(3, dim=-1)]
    if kind == "heads first":
        return [tensor.permute(0, 2, 3, 1, 4) for tensor in draw(2, 3, 9, 11, 4)]
    if kind == "transposed map":
        return [tensor.transpose(1, 2) for tensor in draw(2, 11, 9, 3, 4)]
    return [tensor.expand(2, -1, -1, -1, -1) for tensor in draw(1, 9, 11, 3, 4)]


@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize("kind", ["chunks", "heads first", "transposed map", "expanded"])
def test_memory_layouts(kind: str, backend: str):
    inputs = strided_inputs(kind)
    assert not inputs[0].is_contiguous()
    expected = masked_attention(*in_double(inputs), dense_mask(9, 11, 5, 2))
    assert error(neighborhood_attention(*inputs, 5, 2, backend=backend), expected) <= 1e-5


# --------------------------------------------------------------------------------------------------------
# Gradients
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize(("kernel_size", "dilation", "batch", "height", "width"), CASES)
def test_gradients_of_the_dense_mask(kernel_size, dilation, batch: int, height: int, width: int, backend: str):
    """float32 gradients of query, key and value within 1e-5 of the oracle's in float64."""
    inputs = [tensor.requires_grad_() for tensor in draw(batch, height, width, 2, 8)]
    ours = gradients(neighborhood_attention(*inputs, kernel_size, dilation, backend=backend), inputs)
    exact = [tensor.requires_grad_() for tensor in in_double(inputs)]
    right = gradients(masked_attention(*exact, dense_mask(height, width, kernel_size, dilation)), exact)
    assert_near(ours, right, 1e-5)


@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize(
    ("kernel_size", "dilation", "height", "width"), [(3, 1, 4, 5), (3, 2, 5, 4), ((1, 3), 1, 2, 6)]
)
def test_gradcheck(kernel_size, dilation, height: int, width: int, backend: str):
    inputs = [tensor.requires_grad_() for tensor in draw(1, height, width, 1, 2, dtype=torch.float64)]
    attend = partial(neighborhood_attention, kernel_size=kernel_size, dilation=dilation, backend=backend)
    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize("fixed", ["window", "anchors"])
def test_gradients_through_both_passes(fixed: str, backend: str):
    inputs = [tensor.requires_grad_() for tensor in draw(1, 14, 17, 2, 8)]
    ours = gradients(sparse_scan_attention(*inputs, fixed=fixed, backend=backend), inputs)
    exact = [tensor.requires_grad_() for tensor in in_double(inputs)]
    right = gradients(chained_attention(*exact, fixed), exact)
    assert_near(ours, right, 1e-5)


# --------------------------------------------------------------------------------------------------------
# Sparse scan
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize("fixed", ["window", "anchors"])
@pytest.mark.parametrize(("height", "width", "size"), [(14, 14, 7), (15, 22, 7), (28, 21, 7), (4, 6, 7), (9, 8, 3)])
def test_sparse_scan_is_two_chained_passes(height: int, width: int, size: int, fixed: str, backend: str):
    inputs = draw(2, height, width, 2, 8)
    expected = chained_attention(*in_double(inputs), fixed, size)
    assert error(sparse_scan_attention(*inputs, size=size, fixed=fixed, backend=backend), expected) <= 1e-5


@pytest.mark.parametrize("backend", EAGER)
def test_sparse_scan_is_not_one_softmax_over_the_union(backend: str):
    query, key, value = draw(1, 14, 14, 2, 8, dtype=torch.float64)
    attended = sparse_scan_attention(query, key, value, backend=backend)
    masks = [dense_mask(14, 14, *neighborhood) for neighborhood in scan_table(14, 14, "window")]
    assert error(attended, masked_attention(query, key, value, masks[0] | masks[1])) > 0.1
    local = masked_attention(query, key, value, masks[0])
    assert error(attended, masked_attention(query, key, local, masks[1])) <= 1e-12


@pytest.mark.parametrize("backend", EAGER)
def test_sparse_scan_of_one_token_is_its_value(backend: str):
    """Size 1 leaves no pass at all on a map of one token."""
    query, key, value = draw(2, 1, 1, 3, 4)
    assert torch.equal(sparse_scan_attention(query, key, value, size=1, backend=backend), value)


def test_sparse_scan_scale():
    query, key, value = draw(1, 14, 15, 2, 8, dtype=torch.float64)
    expected = chained_attention(query * 2, key, value, "anchors")
    scaled = sparse_scan_attention(query, key, value, fixed="anchors", scale=2 * 8**-0.5, backend="tiled")
    assert error(scaled, expected) <= 1e-12


# --------------------------------------------------------------------------------------------------------
# Flex, through the real compiler
# --------------------------------------------------------------------------------------------------------

FLEX_CASES = [  # each compiles its own kernel, about four seconds
    ((3, 7), (4, 1), [(2, 13, 22, 2, 16), (3, 13, 22, 2, 16)], torch.float32, 1e-5),
    pytest.param(3, 4, [(1, 14, 14, 1, 32)], torch.float32, 1e-5, marks=pytest.mark.slow),
    pytest.param(7, 3, [(1, 5, 4, 1, 64)], torch.float32, 1e-5, marks=pytest.mark.slow),
    (5, 2, [(1, 13, 22, 1, 32)], torch.bfloat16, 2e-2),
]


@pytest.mark.parametrize(("kernel_size", "dilation", "shapes", "dtype", "tolerance"), FLEX_CASES)
def test_flex_is_the_dense_mask(kernel_size, dilation, shapes, dtype: torch.dtype, tolerance: float):
    """Compiled for the CPU: head dims 16, 32 and 64, several batch sizes, ragged and oblong maps."""
    for shape in shapes:
        inputs = draw(*shape, dtype=dtype)
        attended = neighborhood_attention(*inputs, kernel_size, dilation, backend="flex")
        expected = masked_attention(*in_double(inputs), dense_mask(*shape[1:3], kernel_size, dilation))
        assert (attended.shape, attended.dtype) == (shape, dtype)
        assert (attended.double() - expected).abs().max() <= tolerance


def test_flex_sparse_scan():
    inputs = draw(2, 15, 17, 2, 16)
    expected = chained_attention(*in_double(inputs), "window")
    assert error(sparse_scan_attention(*inputs, backend="flex"), expected) <= 1e-5


@pytest.mark.parametrize("scales", [[0.3], pytest.param([0.3, 1, 2], marks=pytest.mark.slow)])
def test_flex_scales(scales):
    """Whole numbers too: a scale that dynamo turned into a symbol gives code that does not build."""
    inputs = draw(1, 6, 7, 1, 16)
    for scale in scales:
        expected = masked_attention(*in_double(inputs), dense_mask(6, 7, 3), scale)
        assert error(neighborhood_attention(*inputs, 3, scale=scale, backend="flex"), expected) <= 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: flex has no backward on the CPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("head_dim", "height", "width"), [(16, 13, 22), (32, 28, 28), (64, 5, 4)])
def test_flex_forward_and_backward_on_cuda(head_dim: int, height: int, width: int, dtype, tolerance: float):
    inputs = [tensor.cuda().requires_grad_() for tensor in draw(2, height, width, 2, head_dim, dtype=dtype)]
    attended = sparse_scan_attention(*inputs, backend="flex")
    exact = [tensor.cpu().requires_grad_() for tensor in in_double(inputs)]
    expected = chained_attention(*exact, "window")
    ours = (attended, *gradients(attended.cpu(), inputs))
    assert_near(tuple(tensor.cpu() for tensor in ours), (expected, *gradients(expected, exact)), tolerance)


# --------------------------------------------------------------------------------------------------------
# Flex, how often it compiles
# --------------------------------------------------------------------------------------------------------


def test_flex_stays_compiled_over_many_maps(graphs: Counter):
    """Ten maps: dynamo gives up on a function that varied more than eight times, in silence."""
    maps = [(side, side + offset) for side in range(8, 13) for offset in (0, 3)]
    for height, width in maps:
        inputs = draw(2, height, width, 2, 16)
        attended = neighborhood_attention(*inputs, 3, 2, backend="flex")
        assert error(attended, masked_attention(*in_double(inputs), dense_mask(height, width, 3, 2))) <= 1e-5
    assert graphs == {"compiled": len(maps), "runs": len(maps)}


def test_flex_stays_compiled_over_many_batch_sizes(graphs: Counter):
    """One graph for a batch of one, one for the first other size, one for all others."""
    mask = dense_mask(6, 7, 3, 1)
    for batch in (1, 2, 3, 4, 5, 6, 8, 9, 16, 17, 31, 64, 1, 2):
        inputs = draw(batch, 6, 7, 1, 16)
        assert error(neighborhood_attention(*inputs, 3, backend="flex"), masked_attention(*inputs, mask)) <= 1e-5
    assert graphs["runs"] == 14
    assert graphs["compiled"] <= 3


def test_flex_stays_compiled_over_many_scales(graphs: Counter):
    """A scale is a number of the call like any other."""
    inputs = draw(2, 6, 7, 1, 16)
    mask = dense_mask(6, 7, 3, 1)
    scales = [0.05 * step for step in range(1, 11)] + [1, 2]
    for scale in scales:
        attended = neighborhood_attention(*inputs, 3, scale=scale, backend="flex")
        assert error(attended, masked_attention(*inputs, mask, scale)) <= 1e-5
    assert graphs["runs"] == len(scales)
    assert compile_pass.cache_info().currsize == len(scales), "code of its own for each"


def test_flex_stays_compiled_over_modes(graphs: Counter):
    """One process evaluates in every mode, with and without autocast; the last batch is smaller."""
    modes = [torch.enable_grad, torch.no_grad, torch.inference_mode]
    settings = list(itertools.product(modes, (False, True), (4, 3, 1)))
    mask = dense_mask(6, 7, 3, 1)
    for mode, autocast, batch in settings:
        inputs = draw(batch, 6, 7, 1, 16)
        with mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            attended = neighborhood_attention(*inputs, 3, backend="flex")
        expected = masked_attention(*in_double(inputs), mask)
        assert (attended - expected).abs().max() <= (3e-2 if autocast else 1e-5)
    assert graphs["runs"] == len(settings)
    assert compile_pass.cache_info().currsize == len(modes), "code of its own for each"


# --------------------------------------------------------------------------------------------------------
# Backends and errors
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "needs_grad", "neighborhood", "side", "chosen"),
    [
        ("cpu", torch.float32, 32, True, (7, 1), 56, "tiled"),
        ("cpu", torch.float32, 32, False, (7, 1), 56, "tiled"),
        ("cuda", torch.float32, 32, True, (7, 1), 56, "flex"),
        ("cuda", torch.bfloat16, 16, False, (7, 1), 28, "flex"),
        ("cuda", torch.bfloat16, 16, True, (7, 8), 56, "tiled"),  # exact dilation groups
        ("cuda", torch.bfloat16, 16, True, (7, 4), 28, "tiled"),
        ("cuda", torch.bfloat16, 16, True, (7, 1), 7, "tiled"),  # small maps
        ("cuda", torch.bfloat16, 16, True, (7, 1), 14, "tiled"),
        ("cuda", torch.bfloat16, 16, True, (55, 1), 28, "tiled"),  # dense
        ("cuda", torch.float64, 32, False, (7, 1), 56, "tiled"),
        ("cuda", torch.float32, 8, False, (7, 1), 56, "tiled"),
        ("mps", torch.float32, 32, False, (7, 1), 56, "tiled"),
    ],
)
def test_automatic_choice(device: str, dtype: torch.dtype, head_dim, needs_grad: bool, neighborhood, side, chosen: str):
    """Pass by pass: on CUDA what costs least of what can run, tiles elsewhere."""
    operands = Operands(torch.device(device), dtype, head_dim, needs_grad)
    assert choose_backend(Neighborhood(*neighborhood), side, side, operands) == chosen


def test_the_automatic_choice_is_what_costs_least(monkeypatch: pytest.MonkeyPatch):
    """Of the candidates of the device's table that can run; not of the others."""
    totals = {"flex": 30, "tiled": 20, "reference": 10}

    def price(name: str) -> Callable[..., PassCost]:
        return lambda neighborhood, height, width, costs: PassCost(pairs=1, total=totals[name])

    for name, row in list(BACKENDS.items()):
        monkeypatch.setitem(BACKENDS, name, replace(row, estimate=price(name)))
    operands = Operands(torch.device("cuda"), torch.bfloat16, 32, needs_grad=True)
    arguments = Neighborhood(7), 56, 56, operands
    assert choose_backend(*arguments) == "tiled"
    totals["flex"] = 19
    assert choose_backend(*arguments) == "flex"
    assert choose_backend(*arguments[:3], replace(operands, head_dim=8)) == "tiled", "flex cannot run it"
    assert choose_backend(*arguments[:3], replace(operands, device=torch.device("cpu"), needs_grad=False)) == "tiled"


def test_one_scan_takes_different_backends_on_cuda():
    """The choice belongs to the pass: a local pass by block mask, its anchors as exact groups."""
    operands = Operands(torch.device("cuda"), torch.bfloat16, 32, needs_grad=True)
    chosen = [choose_backend(each, 56, 56, operands) for each in sparse_scan(56, 56, fixed="anchors")]
    assert chosen == ["flex", "tiled"]


@pytest.mark.parametrize("backend", list_backends(torch.bfloat16, needs_grad=False))
@pytest.mark.parametrize("side", [2, 56])
def test_explicit_choice_is_kept(backend: str, side: int):
    """Where the automatic choice is another: tiled on the small map, and on this device."""
    scan, operands = sparse_scan(side, side, 2), Operands(torch.device("cpu"), torch.bfloat16, 32, needs_grad=False)
    plan = plan_scan(scan, side, side, operands, backend)
    assert plan.backends == (backend,) * len(scan) != ()


@pytest.mark.parametrize(("backend", "layout"), [("flex", BlockLayout), ("tiled", TileLayout), ("reference", AxisKeys)])
def test_the_backend_that_is_named_attends(backend: str, layout: type, monkeypatch: pytest.MonkeyPatch):
    """Through every door, by its own layout, and no other backend does."""
    attended = []

    def watch(name: str) -> Callable[..., Tensor]:
        return lambda query, key, value, plan, scale: attended.append((name, type(plan))) or value

    for name, row in list(BACKENDS.items()):
        monkeypatch.setitem(BACKENDS, name, replace(row, attend=watch(name)))
    inputs = draw(1, 6, 7, 2, 16)
    with torch.no_grad():
        neighborhood_attention(*inputs, 3, backend=backend)
        sparse_scan_attention(*inputs, size=3, backend=backend)
        S3A(32, 2, size=3, backend=backend)(torch.zeros(1, 6, 7, 32))
    assert attended == (1 + 2 * len(sparse_scan(6, 7, 3))) * [(backend, layout)]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "needs_grad", "reason"),
    [
        (torch.float64, 32, False, "float64"),
        (torch.float32, 8, False, r"head dim.*8"),
        (torch.float32, 32, True, "no backward on the CPU"),
    ],
)
def test_flex_refuses_what_it_cannot_run(dtype: torch.dtype, head_dim: int, needs_grad: bool, reason: str):
    """An explicit backend never falls back; the message says why and what can run it."""
    inputs = [tensor.requires_grad_(needs_grad) for tensor in draw(1, 6, 7, 1, head_dim, dtype=dtype)]
    for attend in (partial(neighborhood_attention, kernel_size=3), sparse_scan_attention):
        with pytest.raises(ValueError, match=f'(?s){reason}.*backend="tiled"'):
            attend(*inputs, backend="flex")


def test_flex_runs_trainable_inputs_without_a_graph(graphs: Counter):
    """Evaluation of a model whose parameters require gradients."""
    inputs = [tensor.requires_grad_() for tensor in draw(1, 6, 7, 1, 16)]
    with torch.no_grad():
        neighborhood_attention(*inputs, 3, backend="flex")
    assert graphs["runs"] == 1


@pytest.mark.parametrize("attend", [partial(neighborhood_attention, kernel_size=3, dilation=2), sparse_scan_attention])
def test_functions_compile_as_one_graph(attend):
    """Inside a caller's torch.compile: plans are constants of the graph, and every map has its own."""
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for height, width in ((13, 16), (9, 22), (13, 16)):
        inputs = draw(2, height, width, 2, 16)
        assert error(compiled(*inputs), attend(*in_double(inputs))) <= 1e-5


def test_flex_is_part_of_a_callers_graph(graphs: Counter):
    """Plans are constants there, of which dynamo takes tensors but no functions."""
    attention, tokens = S3A(32, 2, size=3, backend="flex"), torch.randn(1, 9, 11, 32)
    with torch.no_grad():
        expected = attention(tokens)
        assert error(torch.compile(attention, fullgraph=True)(tokens), expected) <= 1e-6
    assert graphs["compiled"] == 3, "each pass alone, and the whole"


@pytest.mark.parametrize(("wrong", "meant"), [("tilde", "tiled"), ("flexx", "flex"), ("refrence", "reference")])
def test_unknown_backend_names_the_nearest(wrong: str, meant: str):
    inputs = draw(1, 6, 7, 1, 16)
    for attend in (partial(neighborhood_attention, kernel_size=3), sparse_scan_attention):
        with pytest.raises(ValueError, match=f"'{wrong}'.*{', '.join(sorted(BACKENDS))}.*'{meant}'"):
            attend(*inputs, backend=wrong)
    with pytest.raises(ValueError, match=f"'{wrong}'"):  # also where the scan has no pass
        sparse_scan_attention(*draw(1, 1, 1, 1, 16), backend=wrong)


# --------------------------------------------------------------------------------------------------------
# Machines that cannot compile
# --------------------------------------------------------------------------------------------------------


@pytest.fixture
def uncompilable_flex(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Flex is chosen everywhere, and fails to compile; the list grows with its attempts."""
    attempts = []

    def attend(*_: object) -> Tensor:
        attempts.append(1)
        raise NoCompilerError("torch.compile failed here: no compiler")

    monkeypatch.setattr(s3a.attention.plan, "UNCOMPILED", {})
    monkeypatch.setattr(s3a.attention.plan, "find_costs", lambda device: replace(CPU_COSTS, candidates=("flex",)))
    monkeypatch.setitem(BACKENDS, "flex", replace(BACKENDS["flex"], attend=attend, why_not=lambda operands: None))
    s3a.clear_caches()
    yield attempts
    s3a.clear_caches()


def test_an_automatic_choice_that_does_not_compile_gives_way_to_tiles_with_one_warning(uncompilable_flex):
    """Also for plans that were made before, and in training."""
    maps = [tensor.requires_grad_() for tensor in draw(1, 9, 11, 2, 16)]
    s3a_layer = S3A(32, 2, size=3)
    plan = s3a_layer.plan(torch.zeros(1, 9, 11, 32))
    assert set(plan.scan.backends) == {"flex"}
    with pytest.warns(UserWarning, match=r'no compiler.*"flex" was the automatic choice.*"tiled" on cpu') as warned:
        attended = sparse_scan_attention(*maps, size=3)
        again = sparse_scan_attention(*maps, size=3)
        x = torch.randn(1, 9, 11, 32)
        by_plan = s3a_layer(x, plan)
    assert len(warned) == 1
    assert uncompilable_flex == [1], "it was tried once"
    assert torch.equal(attended, again)
    assert error(attended, chained_attention(*in_double(maps), "window", 3)) <= 1e-5
    s3a_layer.backend = "reference"
    assert error(by_plan, s3a_layer(x)) <= 1e-5
    ours = gradients(attended, maps)
    exact = [tensor.requires_grad_() for tensor in in_double(maps)]
    assert_near(ours, gradients(chained_attention(*exact, "window", 3), exact), 1e-5)


def test_after_that_tiles_are_chosen_and_explained(uncompilable_flex, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        s3a.attention.plan, "find_costs", lambda device: replace(CPU_COSTS, candidates=("flex", "tiled"))
    )
    monkeypatch.setattr(s3a.attention.plan, "UNCOMPILED", {"cpu": "there is no compiler"})
    operands = Operands(torch.device("cpu"), torch.float32, 16, needs_grad=False)
    choice = explain_choice(Neighborhood(3), 9, 11, operands)
    assert (choice.name, choice.reasons["flex"]) == ("tiled", "there is no compiler")


def test_a_named_backend_that_does_not_compile_is_an_error(uncompilable_flex):
    with pytest.raises(CompilationError, match="no compiler"):
        sparse_scan_attention(*draw(1, 9, 11, 2, 16), size=3, backend="flex")
    assert s3a.attention.plan.UNCOMPILED == {}


WITHOUT_COMPILER = """
import warnings, torch, s3a
from dataclasses import replace
from s3a.attention import plan
from s3a.attention.backends.costs import CPU
plan.find_costs = lambda device: replace(CPU, candidates=("flex",))
query, key, value = torch.randn(3, 1, 9, 11, 2, 16)
with warnings.catch_warnings(record=True) as caught, torch.no_grad():
    warnings.simplefilter("always")
    attended = [s3a.sparse_scan_attention(query, key, value, size=3) for _ in range(2)][-1]
warned = [each for each in caught if "automatic choice" in str(each.message)]
expected = s3a.sparse_scan_attention(query, key, value, size=3, backend="reference")
same = bool(torch.allclose(attended, expected, atol=1e-5))
print(len(warned), "no working C++ compiler" in str(warned[0].message), same)
"""


@pytest.mark.slow
def test_without_a_compiler_the_automatic_choice_attends(tmp_path):
    """In a process of its own, through the real compiler's failure."""
    environment = os.environ | {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    run = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert run.stdout.split() == ["1", "True", "True"]


# --------------------------------------------------------------------------------------------------------
# Kernel options
# --------------------------------------------------------------------------------------------------------


def test_kernel_options_reach_flex_attention(monkeypatch: pytest.MonkeyPatch):
    """Through every door, in whatever order they are given; and code of its own for each set of them."""
    seen = []

    def flex_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append(options["kernel_options"])
        return query

    monkeypatch.setattr(flex, "flex_attention", flex_attention)
    monkeypatch.setattr(flex, "compile_copy", lambda function, name: function)
    flex.compile_pass.cache_clear()
    options = {"BLOCK_N": 32, "BLOCK_M": 64}
    inputs = draw(1, 6, 7, 2, 16)
    with torch.no_grad():
        neighborhood_attention(*inputs, 3, backend="flex", kernel_options=options)
        neighborhood_attention(*inputs, 3, backend="flex", kernel_options=dict(reversed(options.items())))
        sparse_scan_attention(*inputs, size=3, passes="local", backend="flex", kernel_options=options)
        S3A(32, 2, size=3, passes="local", backend="flex", kernel_options=options)(torch.zeros(1, 6, 7, 32))
        assert seen == 4 * [options]
        neighborhood_attention(*inputs, 3, backend="flex")
    assert seen[4:] == [{}]
    flex.compile_pass.cache_clear()


def test_kernel_options_of_any_order_are_one_plan():
    operands = Operands(torch.device("cpu"), torch.float32, 16, needs_grad=False)
    given = [{"BLOCK_M": 64, "BLOCK_N": 32}, {"BLOCK_N": 32, "BLOCK_M": 64}]
    plans = [plan_scan((Neighborhood(3),), 6, 7, operands, "flex", freeze_options(options)) for options in given]
    assert plans[0] is plans[1]


def test_a_network_hands_its_kernel_options_to_every_attention():
    options = {"PRESCALE_QK": True}
    model = SSViT(dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), layer_scale=(None, None),
                  backend="flex", kernel_options=options)  # fmt: skip
    attentions = [module for module in model.modules() if isinstance(module, S3A)]
    assert [dict(each.kernel_options) for each in attentions] == 2 * [options]


def test_kernel_options_are_part_of_a_compiled_graph(graphs: Counter):
    """A caller's graph takes them as constants."""
    torch._dynamo.reset()
    compiled = torch.compile(partial(neighborhood_attention, kernel_size=3, backend="flex"), fullgraph=True)
    inputs = draw(1, 6, 7, 2, 16)
    with torch.no_grad():
        attended = compiled(*inputs, kernel_options={"PRESCALE_QK": True})
    assert error(attended, masked_attention(*in_double(inputs), dense_mask(6, 7, 3, 1))) <= 1e-5
    assert graphs["runs"] == 1


@pytest.mark.parametrize("backend", [None, "tiled", "reference"])
def test_kernel_options_need_flex(backend: str | None):
    """Named: the automatic choice may be another one on the next map."""
    inputs, options = draw(1, 6, 7, 2, 16), {"BLOCK_M": 64}
    words = r"kernel_options is \{'BLOCK_M': 64\} with backend=.*name backend=\"flex\""
    for attend in (partial(neighborhood_attention, kernel_size=3), sparse_scan_attention):
        with pytest.raises(ValueError, match=words):
            attend(*inputs, backend=backend, kernel_options=options)
    with pytest.raises(ValueError, match=words):
        S3A(32, 2, backend=backend, kernel_options=options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"BLOCK_P": 64}, "kernel option 'BLOCK_P' is unknown.*did you mean 'BLOCK_"),
        ({"BLOCK_M": 48}, "BLOCK_M is 48.*power of two, of 128 at most"),
        ({"bwd_BLOCK_M1": 256}, "bwd_BLOCK_M1 is 256.*of 128 at most"),
        ({"BLOCK_M": 0}, "BLOCK_M is 0"),
        ({"BACKEND": "FLASH"}, 'BACKEND is "FLASH" on cpu.*leave it out'),
        ({"num_warps": [4]}, "kernel_options is .*plain values"),
        ([("num_warps", 4)], "kernel_options is .*must be a dict"),
    ],
)
def test_wrong_kernel_options(options: Any, words: str):
    with pytest.raises(ValueError, match=words):
        neighborhood_attention(*draw(1, 6, 7, 2, 16), 3, backend="flex", kernel_options=options)


@pytest.mark.parametrize(("options", "block_size"), [({}, 64), ({"BLOCK_M": 64}, 64), ({"fwd_BLOCK_N": 128}, 128)])
def test_blocks_fit_the_tiles_that_kernel_options_ask_for(options: dict[str, int], block_size: int):
    operands = Operands(torch.device("cpu"), torch.float32, 16, needs_grad=False)
    plan = plan_scan((Neighborhood(7, 8),), 56, 56, operands, "flex", freeze_options(options))
    layout = plan.passes[0].layout
    assert layout.block_size == layout.block_mask.BLOCK_SIZE == (block_size, block_size)
    assert dict(layout.kernel_options) == options


HALF = Operands(torch.device("cuda"), torch.bfloat16, 32, needs_grad=True)


@pytest.mark.parametrize(
    ("capability", "query_tokens"), [((9, 0), 128), ((10, 0), 256), ((10, 3), 256), ((11, 0), 256)]
)
def test_flash_kernels_have_the_blocks_that_they_ask_for(capability, query_tokens, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(flex, "find_spec", lambda name: name)
    arguments = flex.choose_blocks((("BACKEND", "FLASH"),), HALF)
    layout = BACKENDS["flex"].layout(Neighborhood(7), 20, 20, torch.device("cpu"), **arguments)
    assert (query_tokens, 128) == layout.block_mask.BLOCK_SIZE
    assert layout.kernel_options == (("BACKEND", "FLASH"),)


@pytest.mark.parametrize(
    ("capability", "change", "words"),
    [
        ((8, 0), {}, r"on compute capability 8\.0.*9\.x to 11\.x"),
        ((8, 9), {}, r"on compute capability 8\.9"),
        ((7, 5), {}, r"on compute capability 7\.5"),
        ((12, 0), {}, r"on compute capability 12\.0"),
        (None, {"device": torch.device("cpu")}, "on cpu"),
        ((9, 0), {"dtype": torch.float32}, "for float32 .*bfloat16"),
        ((9, 0), {"head_dim": 192}, "for bfloat16 and a head dim of 192.*up to 128"),
        ((9, 0), {"head_dim": 20}, "for bfloat16 and a head dim of 20.*multiple of 8"),
    ],
)
def test_flash_kernels_are_refused_where_they_would_be_dense_or_missing(capability, change: dict, words: str):
    with pytest.raises(ValueError, match=rf'BACKEND is "FLASH" {words}.*leave it out'):
        flex.find_flash_blocks(capability, replace(HALF, **change))


def test_flash_kernels_are_a_package_of_their_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flex, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package flash-attn-4: install it"):
        flex.choose_blocks((("BACKEND", "FLASH"),), HALF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_older_versions_fit_into_small_blocks(dtype: torch.dtype):
    options = dict(flex.fit_kernels(64, dtype))
    assert all(64 % tokens == 0 for tokens in options.values())
    assert options["bwd_BLOCK_N1"] % options["bwd_BLOCK_M1"] == options["bwd_BLOCK_M2"] % options["bwd_BLOCK_N2"] == 0
    assert flex.fit_kernels(128, dtype) == ()


# --------------------------------------------------------------------------------------------------------
# Reordered tokens
# --------------------------------------------------------------------------------------------------------

ACCUMULATING = re.compile(r"index_add|index_put|scatter|index_copy|embedding_dense_backward")


def trace_training(attend: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[list[str], tuple[Tensor, ...]]:
    """The operators of the backward graph, and the gradients, of a caller's graph that attends."""
    targets: list[str] = []

    def compile_backward(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=compile_backward)
    attended = torch.compile(lambda *maps: attend(*maps).tanh(), backend=backend, fullgraph=True)(*inputs)
    return targets, gradients(attended, inputs)


@pytest.mark.parametrize("side", [12, 23])
def test_the_gradient_of_flex_scatters_nothing(side: int, monkeypatch: pytest.MonkeyPatch):
    """Reordering is what this looks at: between, dense attention under flex's own mask stands for its kernel."""

    def attend_blocks(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, scale: float, _: object) -> Tensor:
        index = torch.arange(query.shape[2])
        mask = block_mask.mask_mod(0, 0, index[:, None], index[None])
        return (scale * query @ key.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ value

    monkeypatch.setattr(flex, "attend_blocks", attend_blocks)
    neighborhood = Neighborhood(5, 3)
    plans = {
        name: lay_out_scan((neighborhood, neighborhood), side, side, torch.device("cpu"), (name, name))
        for name in ("flex", "reference")
    }
    assert len(plans["flex"].passes[0].layout.order) > side**2, "there is padding"
    inputs = [tensor.requires_grad_() for tensor in draw(2, side * side, 2, 16, dtype=torch.float64)]
    targets, ours = trace_training(partial(attend_plan, plan=plans["flex"]), inputs)
    assert any("index_select" in target for target in targets)
    assert [target for target in targets if ACCUMULATING.search(target)] == []
    right = gradients(attend_plan(*inputs, plans["reference"]).tanh(), inputs)
    assert_near(ours, right, 1e-10)


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "side", "accumulating"),
    [
        (7, 2, 14, 0),  # whole groups: nothing is gathered
        (3, 2, 12, 0),  # with a mask
        (7, 1, 30, 2),  # halos overlap, so gradients of keys and values are added up; those of queries never
    ],
)
def test_the_gradient_of_tiles_adds_up_halos_alone(kernel_size: int, dilation: int, side: int, accumulating: int):
    arguments = {"kernel_size": kernel_size, "dilation": dilation}
    inputs = [tensor.requires_grad_() for tensor in draw(2, side, side, 2, 16, dtype=torch.float64)]
    targets, ours = trace_training(partial(neighborhood_attention, **arguments, backend="tiled"), inputs)
    assert sum(bool(ACCUMULATING.search(target)) for target in targets) == accumulating
    right = gradients(neighborhood_attention(*inputs, **arguments, backend="reference").tanh(), inputs)
    assert_near(ours, right, 1e-10)


def test_what_padding_is_given_is_left_out():
    """Tokens 1 0 2 2, the last one padding: its gradient, 8, is nobody's; on the way back its own is 0."""
    order, inverse = torch.tensor([1, 0, 2, 2]), torch.tensor([1, 0, 2])
    tokens = torch.tensor([[3.0, 4.0, 5.0]], requires_grad=True)
    permuted = permute_tokens(tokens, order, inverse, axis=1)
    assert permuted.tolist() == [[4, 3, 5, 5]]
    (gradient,) = torch.autograd.grad(permuted, tokens, torch.tensor([[1.0, 2.0, 4.0, 8.0]]))
    assert gradient.tolist() == [[2, 1, 4]]
    sequence = permuted.detach()[..., None].requires_grad_()
    back = permute_tokens(sequence, inverse, order[:3], axis=1, padding=1)
    assert back.flatten().tolist() == [3, 4, 5]
    (gradient,) = torch.autograd.grad(back, sequence, torch.tensor([[[1.0], [2.0], [4.0]]]))
    assert gradient.flatten().tolist() == [2, 1, 4, 0]


# --------------------------------------------------------------------------------------------------------
# Wrong arguments
# --------------------------------------------------------------------------------------------------------

WRONG_INPUTS = {
    "key shape": ((1, 6, 7, 2, 8), (1, 6, 8, 2, 8), (1, 6, 7, 2, 8), "1, 6, 8"),
    "value head dim": ((1, 6, 7, 2, 8), (1, 6, 7, 2, 8), (1, 6, 7, 2, 4), "2, 4"),
    "heads": ((1, 6, 7, 2, 8), (1, 6, 7, 1, 8), (1, 6, 7, 1, 8), "1, 8"),
    "four dimensions": (*3 * [(1, 42, 2, 8)], "1, 42, 2, 8"),
    "six dimensions": (*3 * [(1, 1, 6, 7, 2, 8)], "1, 1, 6, 7, 2, 8"),
    "no batch": (*3 * [(0, 6, 7, 2, 8)], "0, 6, 7"),
    "no rows": (*3 * [(1, 0, 7, 2, 8)], "1, 0, 7"),
    "no channels": (*3 * [(1, 6, 7, 2, 0)], "2, 0"),
}


@pytest.mark.parametrize("kind", WRONG_INPUTS)
def test_wrong_shapes(kind: str):
    """The message shows the shape that is wrong."""
    *shapes, shown = WRONG_INPUTS[kind]
    inputs = [torch.zeros(shape) for shape in shapes]
    for attend in (partial(neighborhood_attention, kernel_size=3), sparse_scan_attention):
        with pytest.raises(ValueError, match=rf"shape.*\({shown}|shape.*{shown}\)"):
            attend(*inputs)


def test_wrong_dtypes_and_devices():
    query, key, value = draw(1, 6, 7, 2, 8)
    with pytest.raises(ValueError, match=r"dtype.*torch\.float64"):
        neighborhood_attention(query, key.double(), value, 3)
    with pytest.raises(ValueError, match=r"device.*cpu, meta, cpu"):
        neighborhood_attention(query, key.to("meta"), value, 3)
    with pytest.raises(ValueError, match=r"torch\.int64.*floating"):
        sparse_scan_attention(query.long(), key.long(), value.long())


@pytest.mark.parametrize("kernel_size", [4, -1, 0, (3, 2), 3.0])
def test_wrong_kernels(kernel_size):
    with pytest.raises(ValueError, match=r"kernel_size is .*odd"):
        neighborhood_attention(*draw(1, 6, 7, 2, 8), kernel_size)


def test_wrong_scans():
    inputs = draw(1, 6, 7, 2, 8)
    with pytest.raises(ValueError, match=r"dilation is \(1, 0\)"):
        neighborhood_attention(*inputs, 3, (1, 0))
    with pytest.raises(ValueError, match="size is 0"):
        sparse_scan_attention(*inputs, size=0)
    with pytest.raises(ValueError, match=r"fixed.*'anchor'.*anchors"):
        sparse_scan_attention(*inputs, fixed="anchor")


def test_inputs_are_left_alone():
    inputs = draw(1, 9, 9, 2, 8)
    before = [tensor.clone() for tensor in inputs]
    for backend in EAGER:
        sparse_scan_attention(*inputs, backend=backend)
    assert all(map(torch.equal, inputs, before))


MAPS = [
    (16, 16, 7, "window", [True, True]),
    (13, 22, 3, "anchors", [True, True]),
    (28, 28, 7, "anchors", [True, False]),
    (5, 23, 7, "window", [True]),
]


@pytest.mark.parametrize(
    ("height", "width", "size", "fixed", "listed", "dtype"),
    [
        *((*each, torch.float32) for each in MAPS),
        *((*MAPS[2], dtype) for dtype in (torch.bfloat16, torch.float64)),
        *(
            pytest.param(*each, dtype, marks=pytest.mark.slow)
            for each in (*MAPS[:2], MAPS[3])
            for dtype in (torch.bfloat16, torch.float64)
        ),
    ],
)
def test_compiled_inference_is_the_oracle(height, width, size, fixed, listed, dtype):
    """Lists of keys and tiles, as the plan has them; borders and windows with fewer keys included."""
    scan = sparse_scan(height, width, size, fixed)
    plan = lay_out_scan(scan, height, width, torch.device("cpu"), ("tiled",) * len(scan))
    assert [each.layout.key_list is not None for each in plan.passes] == listed
    tensors = [torch.randn(2, height * width, 2, 16, dtype=dtype) for _ in range(3)]
    oracle = lay_out_scan(scan, height, width, torch.device("cpu"), ("reference",) * len(scan))
    expected = attend_plan(*(tensor.double() for tensor in tensors), oracle)
    torch._dynamo.reset()
    compiled = torch.compile(lambda query, key, value: attend_plan(query, key, value, plan), fullgraph=True)
    with torch.no_grad():
        attended = compiled(*tensors)
    assert attended.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(attended.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kernel_size", "dilation", "batch", "height", "width"), CASES)
def test_what_is_compiled_is_the_dense_mask(kernel_size, dilation, batch: int, height: int, width: int):
    """The functions that compiled inference takes in place of tiles, here uncompiled: with windows cut short too."""
    inputs, scale = draw(batch, height, width, 2, 8, dtype=torch.float64), 0.3
    mask = dense_mask(height, width, kernel_size, dilation)
    expected = masked_attention(*inputs, mask, scale).flatten(1, 2)
    key_list = list_keys(Neighborhood(kernel_size, dilation), height, width, torch.device("cpu"))
    flat = [tensor.flatten(1, 2) for tensor in inputs]
    assert error(attend_key_list(*flat, key_list, scale), expected) <= 1e-12
    heads_first = [tensor.transpose(1, 2).contiguous() for tensor in flat]
    assert error(multiply(*heads_first, mask, scale).transpose(1, 2), expected) <= 1e-5, "its softmax is in float32"


@pytest.mark.parametrize(
    ("compiling", "exporting", "needs_grad", "device", "expected"),
    [
        (True, False, False, "cpu", True),
        (False, False, False, "cpu", False),  # eager code would hold what is gathered
        (True, True, False, "cpu", False),  # so may an exported program
        (True, False, True, "cpu", False),  # and a backward
        (True, False, False, "meta", False),  # measured on CPUs
    ],
)
def test_what_is_fused_is_compiled_inference_on_a_cpu(compiling, exporting, needs_grad, device, expected, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: compiling)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: exporting)
    tensors = [torch.zeros(1, device=device), torch.zeros(1, device=device, requires_grad=needs_grad)]
    assert is_compiled_inference(*tensors) == expected
    with torch.no_grad():
        assert is_compiled_inference(*tensors) == (expected or (needs_grad and compiling))


LARGE_MAP = """
import pathlib, re, sys, torch
from s3a.attention.plan import attend_plan, lay_out_scan
from s3a.geometry import Neighborhood
plan = lay_out_scan((Neighborhood(7, 1),), 256, 256, torch.device("cpu"), ("tiled",))
tensors = [torch.randn(1, 65536, 2, 32) for _ in range(3)]
attend = torch.compile(attend_plan, fullgraph=True) if sys.argv[1] == "compiled" else attend_plan
with torch.no_grad():
    assert attend(*tensors, plan).isfinite().all()
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process as Linux gives it")
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_memory_grows_with_the_touched_tokens(mode):
    """A dense score matrix of 65,536 tokens alone would take 16 GiB a head. Peak of the whole process, in GiB."""
    command = [sys.executable, "-c", LARGE_MAP, mode]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(run.stdout) < 2.0


# --------------------------------------------------------------------------------------------------------
# Scans of an ablation
# --------------------------------------------------------------------------------------------------------

ABLATIONS = list(itertools.product(["window", "anchors"], ["both", "local", "anchor", "dense"]))


@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize(("fixed", "passes"), ABLATIONS)
@pytest.mark.parametrize(("height", "width", "size"), [(16, 16, 3), (13, 22, 4), (5, 4, 7)])
def test_ablated_scans(height: int, width: int, size: int, fixed: str, passes: str, backend: str):
    """Forward and gradient; on the small map some scans are without a pass, and hand the values on."""
    inputs = [tensor.requires_grad_() for tensor in draw(2, height, width, 2, 8, dtype=torch.float64)]
    ours = sparse_scan_attention(*inputs, size=size, fixed=fixed, passes=passes, backend=backend)
    right = ablated_attention(*inputs, fixed, size, passes)
    assert error(ours, right) <= 1e-12
    ours, right = (torch.autograd.grad(out.square().sum(), inputs, allow_unused=True) for out in (ours, right))
    for mine, its in zip(ours, right, strict=True):
        assert (mine is None) == (its is None)
        if its is not None:
            torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("fixed", "passes"), [("window", "dense"), ("window", "anchor"), ("anchors", "local")])
def test_ablated_scans_on_flex(fixed: str, passes: str, graphs: Counter):
    inputs = draw(2, 13, 22, 2, 16)
    ours = sparse_scan_attention(*inputs, size=3, fixed=fixed, passes=passes, backend="flex")
    assert error(ours, ablated_attention(*in_double(inputs), fixed, 3, passes)) <= 1e-5
    assert graphs["runs"] == 1


# --------------------------------------------------------------------------------------------------------
# Derivatives of higher order, and in forward mode
# --------------------------------------------------------------------------------------------------------


def attend_for_derivatives(query: torch.Tensor, backend: str | None) -> torch.Tensor:
    return s3a.sparse_scan_attention(query, query, query, size=3, backend=backend).square().sum()


def test_reference_is_differentiated_in_every_way():
    """Against differences of its values and of its gradients."""
    query = torch.randn(1, 5, 4, 1, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: attend_for_derivatives(x, "reference"), query, check_forward_ad=True)
    torch.autograd.gradgradcheck(lambda x: attend_for_derivatives(x, "reference"), query)


@pytest.mark.parametrize("size", [(8, 8), (4, 4)])
def test_fused_attention_says_what_has_the_derivatives_that_it_lacks(size: tuple[int, int]):
    """In tiles and on a whole map, for the function and the module."""
    leaf = torch.randn(1, *size, 1, 16, requires_grad=True)
    module = s3a.S3A(16, 1, size=3)
    for call in (lambda x: attend_for_derivatives(x, None), lambda x: module(x[..., 0, :]).square().sum()):
        (gradient,) = torch.autograd.grad(call(leaf), leaf, create_graph=True)
        torch.testing.assert_close(gradient, torch.autograd.grad(call(leaf), leaf)[0])
        with pytest.raises(NotImplementedError, match=r'^fused attention .* backend="reference", which has all$'):
            gradient.square().sum().backward()
        with pytest.raises(NotImplementedError, match=r'^fused attention .* backend="reference", which has all$'):
            torch.func.jvp(call, (leaf.detach(),), (torch.ones_like(leaf),))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaf, torch.ones_like(leaf))
            with pytest.raises(NotImplementedError, match=r'^fused attention .* backend="reference", which has all$'):
                call(dual)
        with sdpa_kernel(SDPBackend.MATH):  # which has all, too
            (gradient,) = torch.autograd.grad(call(leaf), leaf, create_graph=True)
            assert torch.autograd.grad(gradient.square().sum(), leaf)[0].isfinite().all()
    assert not leaf._backward_hooks, "a caller's tensors are left alone"


@pytest.mark.parametrize("dilation", [1, 4])
def test_many_tiles_are_attended_in_several_calls(dilation: int, monkeypatch: pytest.MonkeyPatch):
    """CUDA's kernels take 65,535 at once."""
    maps = draw(3, 12, 12, 1, 16)
    expected = neighborhood_attention(*maps, 3, dilation, backend="tiled")
    calls = []

    def count(query: Tensor, *arguments: Any, **options: Any) -> Tensor:
        calls.append(len(query))
        return torch.nn.functional.scaled_dot_product_attention(query, *arguments, **options)

    monkeypatch.setattr(tiled, "MOST_TILES", {"cpu": 2})
    monkeypatch.setattr(tiled, "scaled_dot_product_attention", count)
    torch.testing.assert_close(neighborhood_attention(*maps, 3, dilation, backend="tiled"), expected)
    assert max(calls) == 2
    assert len(calls) > 4
