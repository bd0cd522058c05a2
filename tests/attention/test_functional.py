"""Every backend is the same function: held against recorded outputs, and against softmax under a dense mask."""

import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

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

from s3a import S3A, Neighborhood, neighborhood_attention, sparse_scan, sparse_scan_attention
from s3a.attention.backends import BACKENDS, Operands
from s3a.attention.backends.blocks import BlockLayout
from s3a.attention.backends.flex import compile_pass
from s3a.attention.backends.reference import AxisKeys
from s3a.attention.backends.tiled import attend_key_list, is_compiled_inference, multiply
from s3a.attention.backends.tiles import TileLayout, list_keys
from s3a.attention.plan import attend_plan, choose_backend, lay_out_scan, plan_scan

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
    ("device", "dtype", "head_dim", "needs_grad", "num_tokens", "chosen"),
    [
        ("cpu", torch.float32, 32, True, 3136, "tiled"),
        ("cpu", torch.float32, 32, False, 3136, "tiled"),
        ("cuda", torch.float32, 32, True, 3136, "flex"),
        ("cuda", torch.bfloat16, 16, False, 784, "flex"),
        ("cuda", torch.bfloat16, 16, True, 49, "tiled"),
        ("cuda", torch.bfloat16, 16, True, 256, "tiled"),
        ("cuda", torch.bfloat16, 16, True, 257, "flex"),
        ("cuda", torch.float64, 32, False, 3136, "tiled"),
        ("cuda", torch.float32, 8, False, 3136, "tiled"),
        ("mps", torch.float32, 32, False, 3136, "tiled"),
    ],
)
def test_automatic_choice(device: str, dtype: torch.dtype, head_dim, needs_grad: bool, num_tokens: int, chosen: str):
    """Flex on CUDA where it can run and has blocks to skip, tiled elsewhere."""
    assert choose_backend(num_tokens, Operands(torch.device(device), dtype, head_dim, needs_grad)) == chosen


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


@pytest.mark.parametrize(("wrong", "meant"), [("tilde", "tiled"), ("flexx", "flex"), ("refrence", "reference")])
def test_unknown_backend_names_the_nearest(wrong: str, meant: str):
    inputs = draw(1, 6, 7, 1, 16)
    for attend in (partial(neighborhood_attention, kernel_size=3), sparse_scan_attention):
        with pytest.raises(ValueError, match=f"'{wrong}'.*{', '.join(sorted(BACKENDS))}.*'{meant}'"):
            attend(*inputs, backend=wrong)
    with pytest.raises(ValueError, match=f"'{wrong}'"):  # also where the scan has no pass
        sparse_scan_attention(*draw(1, 1, 1, 1, 16), backend=wrong)


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
@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
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
