"""Plans are the geometry, laid out: every layout is unfolded into a dense mask and held against the rule."""

import json
import os
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.backends import list_backends
from helpers.fork_server import run_python
from helpers.golden import chained_attention, dense_mask, error, seen_keys
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from s3a import Neighborhood, neighborhood_attention, sparse_scan, sparse_scan_attention
from s3a.attention.backends import BACKENDS, Operands
from s3a.attention.backends.blocks import BlockLayout, lay_out_blocks, walk_tiles
from s3a.attention.backends.reference import lay_out_keys
from s3a.attention.backends.tiles import TileLayout, lay_out_tiles
from s3a.attention.plan import attend_plan, lay_out_scan, plan_scan
from s3a.nn.s3a import build_attention_plan
from s3a.support.caches import CACHES, clear_caches

CPU = torch.device("cpu")

# kernel size, dilation, height, width
CASES = [
    (7, 1, 14, 14),  # dense
    (3, 4, 14, 14),  # ragged groups
    (7, 2, 14, 14),  # groups of exactly the kernel
    (5, 2, 13, 22),  # oblong, ragged
    (3, 5, 20, 17),
    ((3, 7), (4, 2), 16, 19),  # different axes
    ((7, 1), (1, 3), 9, 30),
    (7, 3, 5, 4),  # smaller than the window
    (3, 9, 6, 8),  # dilation beyond the map
    (1, 1, 5, 30),  # every token alone
    (5, 1, 1, 40),  # one row
    (5, 1, 1, 1),
    (29, 1, 1, 64),  # blocks of 16 that lack a single key to be full
]


def unfolded(layout: TileLayout, num_tokens: int) -> tuple[Tensor, Tensor]:
    """How often each query meets each key in the tiles, and the queries in the order of the tiles."""
    counts = torch.zeros(num_tokens, num_tokens, dtype=torch.int64)
    order = []
    for batch in layout.batches:
        queries, keys = (tensor.unflatten(0, (batch.num_tiles, -1)) for tensor in (batch.queries, batch.keys))
        mask = torch.ones(queries.shape[1], keys.shape[1]) if batch.mask is None else batch.mask
        assert mask.shape == (queries.shape[1], keys.shape[1])
        for tile_queries, tile_keys in zip(queries, keys, strict=True):
            pairs = tuple(torch.broadcast_tensors(tile_queries[:, None], tile_keys[None]))
            counts.index_put_(pairs, mask.long(), accumulate=True)
        order.append(batch.queries)
    return counts, torch.cat(order)


def listed_blocks(count: Tensor, indices: Tensor) -> Tensor:
    """[blocks, other blocks] bool: the block pairs that a (count, indices) list names."""
    blocks = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for block, named in enumerate(count[0, 0].tolist()):
        blocks[block, indices[0, 0, block, :named].long()] = True
        assert blocks[block].sum() == named, "a block is listed twice"
    return blocks


def padded_mask(layout: BlockLayout, mask: Tensor) -> Tensor:
    """What the padded sequence must see: copies of the last query, and no padding keys."""
    expected = mask[layout.order][:, layout.order]
    expected[:, len(mask) :] = False
    return expected


def blocked(mask: Tensor, block_size: int, query_blocks: int = 1) -> Tensor:
    """[query block, key block, query, key] of a dense mask."""
    return mask.unflatten(1, (-1, block_size)).unflatten(0, (-1, block_size * query_blocks)).transpose(1, 2)


# --------------------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block_size", "query_blocks"), [(16, 1), (64, 1), (128, 1), (16, 2), (128, 2)])
@pytest.mark.parametrize(("kernel_size", "dilation", "height", "width"), CASES)
def test_block_mask_is_the_rule(kernel_size, dilation, height, width, block_size: int, query_blocks: int):
    """The mask function pair by pair, the lists of partial and full blocks, forwards and backwards."""
    layout = lay_out_blocks(
        Neighborhood(kernel_size, dilation),
        height,
        width,
        CPU,
        block_sizes=(block_size,),
        query_blocks=query_blocks,
    )
    assert layout.block_size == layout.block_mask.BLOCK_SIZE == (query_blocks * block_size, block_size)
    expected = padded_mask(layout, dense_mask(height, width, kernel_size, dilation))
    mask = layout.block_mask
    index = torch.arange(len(layout.order))
    assert torch.equal(mask.mask_mod(0, 0, index[:, None], index[None]), expected)

    blocks = blocked(expected, block_size, query_blocks)
    touched, full = blocks.any((2, 3)), blocks.all((2, 3))
    assert torch.equal(mask.to_dense()[0, 0].bool(), touched)
    assert torch.equal(listed_blocks(mask.kv_num_blocks, mask.kv_indices), touched & ~full)
    assert torch.equal(listed_blocks(mask.full_kv_num_blocks, mask.full_kv_indices), full)
    assert torch.equal(listed_blocks(mask.q_num_blocks, mask.q_indices), (touched & ~full).T)
    assert torch.equal(listed_blocks(mask.full_q_num_blocks, mask.full_q_indices), full.T)
    assert (layout.num_touched, layout.num_full, layout.num_blocks) == (touched.sum(), full.sum(), touched.numel())


@pytest.mark.parametrize(("kernel_size", "dilation", "height", "width"), CASES)
def test_order_pads_to_whole_blocks(kernel_size, dilation, height: int, width: int):
    """Every position once, then copies that are queries with keys of their own and keys of nobody."""
    layout = lay_out_blocks(Neighborhood(kernel_size, dilation), height, width, CPU)
    num_tokens = height * width
    assert sorted(layout.order[:num_tokens].tolist()) == list(range(num_tokens))
    assert torch.equal(layout.order[layout.inverse], torch.arange(num_tokens))
    assert len(layout.order) % layout.block_size[0] == 0
    assert 0 <= len(layout.order) - num_tokens < layout.block_size[0]

    index = torch.arange(len(layout.order))
    seen = layout.block_mask.mask_mod(0, 0, index[:, None], index[None])
    assert seen.any(1).all(), "a query without keys has no softmax"
    assert not seen[:, num_tokens:].any(), "a padding key is seen"


def test_tokens_are_walked_group_by_group_and_inside_a_group_tile_by_tile():
    """Four rows of one group, four columns of two (their places 0 1 and 2 3), in tiles of 2 x 1."""
    tile = [(0, 0), (1, 0)]
    group = [*tile, *((row, 1) for row, _ in tile), *((row + 2, column) for column in (0, 1) for row, _ in tile)]
    rows, columns = walk_tiles(*Neighborhood(3, (1, 2)).windows(4, 4), (2, 1))
    walked = list(zip(rows.tolist(), columns.tolist(), strict=True))
    assert walked == [*group, *((row, column + 2) for row, column in group)]


def test_some_blocks_are_full():
    """Partial and full blocks both occur above; a map of one full block, and one with some of each."""
    whole = lay_out_blocks(Neighborhood(7), 4, 4, CPU, block_sizes=(16,))
    assert (whole.num_full, whole.num_touched) == (1, 1)
    mixed = lay_out_blocks(Neighborhood(15), 24, 24, CPU, block_sizes=(16,))
    assert 0 < mixed.num_full < mixed.num_touched


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "block_size", "most"),
    [(9, 6, 128, 0.13), (7, 8, 128, 0.13), (7, 1, 128, 0.25), (9, 6, 64, 0.07), (7, 8, 64, 0.07), (7, 1, 64, 0.15)],
)
def test_touched_blocks_at_56_by_56(kernel_size: int, dilation: int, block_size: int, most: float):
    """The promised sparsity, counted on the dense mask in the plan's own order."""
    layout = lay_out_blocks(Neighborhood(kernel_size, dilation), 56, 56, CPU, block_sizes=(block_size,))
    expected = padded_mask(layout, dense_mask(56, 56, kernel_size, dilation))
    touched = blocked(expected, block_size).any((2, 3))
    assert torch.equal(layout.block_mask.to_dense()[0, 0].bool(), touched)
    assert touched.float().mean() <= most
    assert layout.num_touched / layout.num_blocks == pytest.approx(touched.double().mean().item())


# --------------------------------------------------------------------------------------------------------
# Tiles and gathers
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel_size", "dilation", "height", "width"), [*CASES, (9, 6, 56, 56), (5, 5, 28, 28)])
def test_tiles_are_the_rule(kernel_size, dilation, height: int, width: int):
    """Every query meets each of its keys once and no other; no query is in two tiles."""
    layout = lay_out_tiles(Neighborhood(kernel_size, dilation), height, width, CPU)
    num_tokens = height * width
    counts, order = unfolded(layout, num_tokens)
    assert torch.equal(counts, dense_mask(height, width, kernel_size, dilation).long())
    assert sorted(order.tolist()) == list(range(num_tokens))
    before, size, index = layout.places
    sizes = [len(batch.queries) for batch in layout.batches]
    assert torch.equal(order[before + index], torch.arange(num_tokens))
    assert sorted(set(size.tolist())) == sorted(set(sizes))
    assert set(before.tolist()) == {sum(sizes[:number]) for number in range(len(sizes))}


@pytest.mark.parametrize(("kernel_size", "dilation"), [(9, 6), (7, 8), (7, 1), (9, 1)])
def test_tiles_stay_sparse(kernel_size: int, dilation: int):
    """Halos may hold keys that a query does not see, but a tile must not grow into the map."""
    layout = lay_out_tiles(Neighborhood(kernel_size, dilation), 56, 56, CPU)
    paired = sum(len(batch.queries) * len(batch.keys) // batch.num_tiles for batch in layout.batches)
    assert paired <= 0.25 * (56 * 56) ** 2


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "height", "width", "device", "listed"),
    [
        (7, 1, 16, 16, "cpu", True),
        (3, 4, 13, 22, "cpu", True),
        (7, 4, 28, 28, "cpu", False),
        (7, 1, 16, 16, "meta", False),
    ],
)
def test_keys_are_listed_where_that_is_cheaper(kernel_size, dilation, height: int, width: int, device: str, listed):
    """By costs that were measured, on CPUs alone."""
    layout = lay_out_tiles(Neighborhood(kernel_size, dilation), height, width, torch.device(device))
    assert (layout.key_list is not None) == listed


@pytest.mark.parametrize(("kernel_size", "dilation", "height", "width"), CASES)
def test_gathers_are_the_rule(kernel_size, dilation, height: int, width: int):
    layout = lay_out_keys(Neighborhood(kernel_size, dilation), height, width, CPU)
    axes = []
    for keys, seen in ((layout.rows, layout.row_seen), (layout.columns, layout.column_seen)):
        axes.append(torch.zeros(len(keys), len(keys), dtype=torch.int64).scatter_add_(1, keys, seen.long()))
    counts = (axes[0][:, None, :, None] * axes[1][None, :, None, :]).reshape(height * width, -1)
    assert torch.equal(counts, dense_mask(height, width, kernel_size, dilation).long())


# --------------------------------------------------------------------------------------------------------
# The cache, and the modes a plan may be built in
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_plans_are_built_once(backend):
    plan = plan_scan(sparse_scan(14, 21), 14, 21, Operands(CPU, torch.float32, 32, needs_grad=False), backend)
    again = Operands(torch.device("cpu"), torch.bfloat16, 16, needs_grad=False)  # no layout depends on these
    assert plan_scan(sparse_scan(14, 21), 14, 21, again, backend) is plan
    assert lay_out_scan(sparse_scan(14, 21), 14, 21, torch.device("cpu"), (backend, backend)) is plan
    assert (plan.height, plan.width, plan.backends, plan.scan) == (14, 21, (backend, backend), sparse_scan(14, 21))
    assert tuple(each.neighborhood for each in plan.passes) == plan.scan


def test_a_plan_is_looked_up_by_all_that_matters(monkeypatch):
    """Each of these may change which backend is chosen, or forbid the one that is named."""
    asked = []
    monkeypatch.setattr("s3a.attention.plan.choose_backend", lambda *what: asked.append(what) or "tiled")
    clear_caches()
    scan, base = sparse_scan(9, 12, 3), Operands(CPU, torch.float32, 16, needs_grad=False)
    others = [
        replace(base, **change)
        for change in (
            {"device": torch.device("meta")},
            {"dtype": torch.bfloat16},
            {"head_dim": 32},
            {"needs_grad": True},
        )
    ]
    plans = [plan_scan(scan, 9, 12, operands) for operands in (base, *others, base)]
    assert asked == [(each, 9, 12, operands) for operands in (base, *others) for each in scan]
    assert [plan.passes[0].layout.batches[0].keys.device.type for plan in plans[:2]] == ["cpu", "meta"]
    plan_scan(scan, 9, 12, base, "flex")
    with pytest.raises(ValueError, match="no backward on the CPU"):
        plan_scan(scan, 9, 12, replace(base, needs_grad=True), "flex")
    clear_caches()


def test_plans_of_different_things_differ():
    scan, other = sparse_scan(14, 21, fixed="window"), sparse_scan(14, 21, fixed="anchors")
    calls = [
        (scan, 14, 21, CPU, ("tiled", "tiled")),
        (scan, 21, 14, CPU, ("tiled", "tiled")),
        (other, 14, 21, CPU, ("tiled", "tiled")),
        (scan, 14, 21, CPU, ("reference", "reference")),
        (scan, 14, 21, CPU, ("tiled", "reference")),
        (scan, 14, 21, torch.device("meta"), ("tiled", "tiled")),
    ]
    plans = [lay_out_scan(*call) for call in calls]
    assert len({id(plan) for plan in plans}) == len(calls)
    assert plans[-1].passes[0].layout.batches[0].keys.device.type == "meta"
    assert plans[0].passes[0].layout.batches[0].keys.device.type == "cpu"


@pytest.mark.parametrize("backends", [("tiled", "reference"), ("reference", "tiled"), ("flex", "tiled")])
def test_the_passes_of_a_scan_mix_backends(backends):
    """Each pass is attended by its own backend, and the chain is the same function."""
    plan = lay_out_scan(sparse_scan(12, 15, 3, "anchors"), 12, 15, CPU, backends)
    assert plan.backends == backends
    query, key, value = torch.randn(3, 2, 12, 15, 2, 16)
    with torch.no_grad():
        attended = attend_plan(*(tensor.flatten(1, 2) for tensor in (query, key, value)), plan).unflatten(1, (12, 15))
    assert error(attended, chained_attention(query.double(), key.double(), value.double(), "anchors", 3)) <= 1e-5


def test_one_forward_builds_what_the_next_one_uses():
    """Through the public operator: the second call misses no cache."""
    query, key, value = torch.randn(3, 2, 11, 15, 2, 8)
    sparse_scan_attention(query, key, value, backend="tiled")
    before = plan_scan.cache_info()
    sparse_scan_attention(query, key, value, backend="tiled")
    after = plan_scan.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 1)


def test_cleared_caches_build_anew():
    """Nothing of a plan is left: its tensors go with it."""
    query, key, value = torch.randn(3, 1, 10, 13, 2, 8)
    attended = sparse_scan_attention(query, key, value)
    operands = Operands(CPU, torch.float32, 8, needs_grad=False)
    keys = weakref.ref(plan_scan(sparse_scan(10, 13), 10, 13, operands).passes[0].layout.batches[0].keys)
    assert keys() is not None
    clear_caches()
    assert all(cached.cache_info().currsize == 0 for cached in CACHES)
    assert keys() is None
    assert torch.equal(sparse_scan_attention(query, key, value), attended)


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode, torch.no_grad])
@pytest.mark.parametrize("backend", list_backends(torch.float64))
def test_plans_survive_the_mode_they_are_built_in(backend, mode):
    """An inference or fake tensor in the cache would break the training step that finds it there."""
    clear_caches()
    with mode():
        plan = lay_out_scan(sparse_scan(12, 15, 3), 12, 15, CPU, (backend, backend))
    query, key, value = torch.randn(3, 1, 12, 15, 2, 8, dtype=torch.float64, requires_grad=True)
    flat = (tensor.flatten(1, 2) for tensor in (query, key, value))
    attended = attend_plan(*flat, plan).unflatten(1, (12, 15))
    expected = chained_attention(query, key, value, "window", 3)
    assert error(attended, expected) < 1e-10
    weight = torch.randn_like(expected)
    ours, right = (torch.autograd.grad((out * weight).sum(), (query, key, value)) for out in (attended, expected))
    assert max(error(*gradients) for gradients in zip(ours, right, strict=True)) < 1e-10


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode])
def test_block_masks_survive_the_mode_they_are_built_in(mode):
    clear_caches()
    with mode():
        layout = lay_out_scan((Neighborhood(3, 2),), 9, 10, CPU, ("flex",)).passes[0].layout
    tensors = [layout.order, layout.inverse, layout.block_mask.kv_indices, layout.block_mask.q_indices]
    assert {type(tensor) for tensor in tensors} == {Tensor}
    assert not any(tensor.is_inference() for tensor in tensors)
    index = torch.arange(len(layout.order))
    seen = layout.block_mask.mask_mod(0, 0, index[:, None], index[None])
    assert torch.equal(seen, padded_mask(layout, dense_mask(9, 10, 3, 2)))


def test_rotary_tables_survive_the_mode_they_are_built_in():
    clear_caches()
    operands = Operands(CPU, torch.bfloat16, 16, needs_grad=False)
    with torch.inference_mode(), FakeTensorMode():
        plan = build_attention_plan(6, 9, 7, "window", "both", operands, "tiled")
    assert plan.cosine.dtype == torch.float32
    assert {type(plan.cosine), type(plan.sine)} == {Tensor}
    assert not plan.cosine.is_inference()
    assert torch.allclose(plan.cosine**2 + plan.sine**2, torch.ones(54, 1, 8))


def test_plans_of_a_default_device_context():
    """Building a model under `torch.device("meta")` must not leave meta tensors in plans for the CPU."""
    clear_caches()
    with torch.device("meta"):
        layout = lay_out_scan(sparse_scan(10, 13, 3), 10, 13, CPU, ("flex", "flex")).passes[0].layout
    assert {tensor.device.type for tensor in (layout.order, layout.block_mask.q_indices)} == {"cpu"}


# --------------------------------------------------------------------------------------------------------
# Large maps
# --------------------------------------------------------------------------------------------------------

BUILD_LARGE = """
import json, sys, time
from resource import RUSAGE_SELF, getrusage
from pathlib import Path
import torch
from s3a import sparse_scan
from s3a.attention.plan import lay_out_scan

def peak():  # Linux hands ru_maxrss of the parent down to its children, so it would hide the growth there
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    marks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return 1024 * marks[0] if marks else getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

backend, fixed = sys.argv[1:]
lay_out_scan(sparse_scan(16, 16, 7, fixed), 16, 16, torch.device("cpu"), (backend, backend))  # lazy imports
before, start = peak(), time.process_time()
plan = lay_out_scan(sparse_scan(256, 256, 7, fixed), 256, 256, torch.device("cpu"), (backend, backend))
print(json.dumps({"seconds": time.process_time() - start, "bytes": peak() - before, "passes": len(plan.passes)}))
"""


@pytest.mark.parametrize("fixed", ["window", "anchors"])
@pytest.mark.parametrize("backend", [pytest.param("flex", marks=pytest.mark.slow), "tiled"])
def test_plans_of_65536_tokens_are_quick_and_small(backend: str, fixed: str):
    """Cost grows with the touched tokens: a mask of all against all would take 4 GiB as booleans.

    Limits: 1 GB more than a warm process, and 2 s of processor time, so that other work on the machine does not count.
    """
    finished = run_python(["-c", BUILD_LARGE, backend, fixed], Path.cwd(), dict(os.environ))
    assert finished.returncode == 0, finished.stderr
    measured = json.loads(finished.stdout.splitlines()[-1])
    assert measured["passes"] == 2
    assert measured["bytes"] < 1e9
    assert measured["seconds"] < 2


@pytest.mark.parametrize(("row", "column"), [(0, 229), (151, 187), (199, 0)])
def test_queries_of_a_large_map(row: int, column: int):
    """No index goes astray on 200 x 230 tokens: single queries, with their keys by the rule."""
    query, key, value = torch.randn(3, 1, 200, 230, 1, 4, dtype=torch.float64)
    attended = neighborhood_attention(query, key, value, 9, 21, backend="tiled")
    rows, columns = seen_keys(row, 200, 9, 21), seen_keys(column, 230, 9, 21)
    keys, values = (tensor[0, rows][:, columns].reshape(-1, 4) for tensor in (key, value))
    expected = (keys @ query[0, row, column, 0] * 4**-0.5).softmax(0) @ values
    assert torch.allclose(attended[0, row, column, 0], expected, rtol=0, atol=1e-12)
