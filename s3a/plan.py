"""Geometry laid out for a machine: what a backend needs to run a scan on one map size.

A plan is built once per (scan, map size, device, backend), outside the compiled graph, and cached. All of
it follows from the windows of the two axes (`geometry.AxisWindows`), in time and memory that grow with the
tokens touched; no plan ever looks at all tokens against all tokens.

Words: a *place* is an index along an axis in group order, a *position* the index of a token in the map
(row-major), a *block* a run of `BLOCK_SIZE` tokens of the order that a FlexAttention mask works on.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import _disable_current_modes

from s3a.geometry import AxisWindows, Neighborhood, Scan

Backend: TypeAlias = Literal["flex", "tiled", "reference"]
BACKENDS = ("flex", "tiled", "reference")
BLOCK_SIZE = 128  # what FlexAttention's kernels are tuned for


# --------------------------------------------------------------------------------------------------------
# What the three backends run
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GatherPass:
    """One pass for the reference: the keys of every query, axis by axis.

    Attributes:
        rows: [height, kernel] int64, the key rows of each query row; `row_seen` is False where the window
            has fewer keys. columns, column_seen: [width, kernel], the same for columns.
    """

    rows: Tensor
    row_seen: Tensor
    columns: Tensor
    column_seen: Tensor


@dataclass(frozen=True, eq=False)
class TileBatch:
    """Tiles of queries that share one shape and one mask.

    Attributes:
        queries: [num_tiles * tile] int64, positions of the queries, tile after tile.
        keys: [num_tiles * halo] int64, positions of the keys that any query of the tile sees.
        mask: [tile, halo] bool, which keys of the halo a query sees; None if it sees them all.
    """

    num_tiles: int
    queries: Tensor
    keys: Tensor
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class TiledPass:
    """One pass as query tiles with key halos.

    Attributes:
        batches: the tiles, by shape and mask.
        inverse: [tokens] int64, where each position's query stands among the tiles' queries; None where the
            one tile is the whole map in row-major order, so nothing has to be gathered.
    """

    batches: tuple[TileBatch, ...]
    inverse: Tensor | None


@dataclass(frozen=True, eq=False)
class BlockPass:
    """One pass as a FlexAttention block mask over reordered tokens.

    Attributes:
        order: [padded tokens] int64, the position that stands at each index of the sequence. The sequence is
            padded to whole blocks with copies of its last token, whose queries see what that token sees (so
            no softmax is empty) and whose keys nobody sees.
        inverse: [tokens] int64, the index at which each position stands.
        block_mask: the mask of the sequence.
        num_touched, num_full, num_blocks: touched and full (query block, key block) pairs, and all there are.
        tile: (row, column) tokens of the tiles that the order walks inside a dilation group.
    """

    order: Tensor
    inverse: Tensor
    block_mask: BlockMask
    num_touched: int
    num_full: int
    num_blocks: int
    tile: tuple[int, int]


@dataclass(frozen=True, eq=False)
class ScanPlan:
    """A scan on one map size, laid out for one backend and device.

    Attributes:
        scan: the neighborhoods, in the order in which they are attended.
        height, width: the map, in tokens.
        backend: which backend runs it.
        passes: one layout per neighborhood.
    """

    scan: Scan
    height: int
    width: int
    backend: Backend
    passes: tuple[GatherPass, ...] | tuple[TiledPass, ...] | tuple[BlockPass, ...]


# --------------------------------------------------------------------------------------------------------
# Gathers (reference)
# --------------------------------------------------------------------------------------------------------


def gather_pass(neighborhood: Neighborhood, height: int, width: int, device: torch.device) -> GatherPass:
    """The keys of every query, listed."""
    tensors = []
    for windows in neighborhood.axes(height, width):
        token_order = np.argsort(windows.position)
        start, stop = windows.start[token_order], windows.stop[token_order]
        places = start[:, None] + np.arange((stop - start).max())
        seen = places < stop[:, None]
        tensors += [to_device(windows.position[np.where(seen, places, start[:, None])], device)]
        tensors += [to_device(seen, device)]
    return GatherPass(*tensors)


# --------------------------------------------------------------------------------------------------------
# Tiles
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AxisTiles:
    """Tiles of one axis that share one shape and one mask.

    Attributes:
        queries: [tiles, tile] int64, token positions. keys: [tiles, halo]. mask: [tile, halo] bool.
    """

    queries: np.ndarray
    keys: np.ndarray
    mask: np.ndarray


@lru_cache(maxsize=1024)
def axis_tiles(length: int, kernel_size: int, dilation: int, tile: int) -> tuple[AxisTiles, ...]:
    """Cuts every dilation group of an axis into nearly equal tiles of at most `tile` queries."""
    windows = Neighborhood((kernel_size, 1), (dilation, 1)).axes(length, 1)[0]
    shapes: dict[tuple, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    masks = {}
    for first, last in windows.bounds:
        num_tiles = -(-(last - first) // tile)
        cuts = np.linspace(first, last, num_tiles + 1).round().astype(int)
        for begin, end in pairwise(cuts):
            halo = np.arange(windows.start[begin], windows.stop[end - 1])
            start, stop = windows.start[begin:end, None], windows.stop[begin:end, None]
            mask = (start <= halo) & (halo < stop)
            shape = (mask.shape, mask.tobytes())
            masks[shape] = mask
            shapes[shape].append((windows.position[begin:end], windows.position[halo]))
    return tuple(
        AxisTiles(
            queries=np.stack([queries for queries, _ in tiles]),
            keys=np.stack([keys for _, keys in tiles]),
            mask=masks[shape],
        )
        for shape, tiles in shapes.items()
    )


TILES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
HALO_TOKEN_COST = 24  # gathering one key and its value, in (query, key) pairs; measured on two CPU cores
BATCH_COST = 40_000  # one more call of the attention kernel, in (query, key) pairs


def choose_tiles(neighborhood: Neighborhood, height: int, width: int) -> tuple[int, int]:
    """The (row, column) tile that costs least: masked pairs, plus halos gathered, plus kernel calls."""

    def candidates(axis: int, length: int) -> list[tuple[int, int, int, int]]:
        kernel_size, dilation = neighborhood.kernel_size[axis], neighborhood.dilation[axis]
        group_length = -(-length // dilation)
        costs = []
        for tile in (*(tile for tile in TILES if tile < group_length), group_length):
            batches = axis_tiles(length, kernel_size, dilation, tile)
            pairs = sum(batch.queries.size * batch.keys.shape[1] for batch in batches)
            costs.append((tile, pairs, sum(batch.keys.size for batch in batches), len(batches)))
        return costs

    def cost(rows: tuple[int, int, int, int], columns: tuple[int, int, int, int]) -> float:
        _, row_pairs, row_halo, row_batches = rows
        _, column_pairs, column_halo, column_batches = columns
        pairs, halo = row_pairs * column_pairs, row_halo * column_halo
        return pairs + HALO_TOKEN_COST * halo + BATCH_COST * row_batches * column_batches

    options = [(rows, columns) for rows in candidates(0, height) for columns in candidates(1, width)]
    rows, columns = min(options, key=lambda option: cost(*option))
    return rows[0], columns[0]


def tiled_pass(neighborhood: Neighborhood, height: int, width: int, device: torch.device) -> TiledPass:
    """The products of row tiles and column tiles, as batches of equal shape and mask."""
    tile = choose_tiles(neighborhood, height, width)
    row_batches, column_batches = (
        axis_tiles(length, neighborhood.kernel_size[axis], neighborhood.dilation[axis], tile[axis])
        for axis, length in enumerate((height, width))
    )

    def positions(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return (rows[:, None, :, None] * width + columns[None, :, None, :]).reshape(-1)

    batches, order = [], []
    for rows in row_batches:
        for columns in column_batches:
            mask = (rows.mask[:, None, :, None] & columns.mask[None, :, None, :]).reshape(
                rows.mask.shape[0] * columns.mask.shape[0], -1
            )
            queries = positions(rows.queries, columns.queries)
            order.append(queries)
            batches.append(
                TileBatch(
                    num_tiles=len(rows.queries) * len(columns.queries),
                    queries=to_device(queries, device),
                    keys=to_device(positions(rows.keys, columns.keys), device),
                    mask=None if mask.all() else to_device(mask, device),
                )
            )
    order = np.concatenate(order)
    row_major = len(batches) == 1 and batches[0].num_tiles == 1 and bool((np.diff(order) == 1).all())
    return TiledPass(batches=tuple(batches), inverse=None if row_major else to_device(np.argsort(order), device))


# --------------------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """A token order and the blocks that it touches.

    Attributes:
        rows, columns: [tokens] int64, the row and column place at each index of the sequence.
        pairs: [touched, 2] int64, the touched (query block, key block) pairs, sorted.
        full: [touched] bool, whether every query of the block sees every key of it.
        tile: (row, column) tokens of the tiles that the order walks inside a dilation group.
    """

    rows: np.ndarray
    columns: np.ndarray
    pairs: np.ndarray
    full: np.ndarray
    tile: tuple[int, int]


def tile_order(rows: AxisWindows, columns: AxisWindows, tile: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens group by group, inside a group tile by tile, inside a tile row by row; as row and column places."""
    row_tile, column_tile = (
        np.concatenate([np.arange(last - first) // size for first, last in windows.bounds])
        for windows, size in zip((rows, columns), tile, strict=True)
    )
    row, column = (places.reshape(-1) for places in np.indices((len(row_tile), len(column_tile))))
    keys = (column, row, column_tile[column], row_tile[row], columns.group[column], rows.group[row])
    order = np.lexsort(keys)
    return row[order], column[order]


def counted_up(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The ranges `first[i] .. first[i] + count[i] - 1`, one after the other."""
    return np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())


def touched_blocks(rows: AxisWindows, columns: AxisWindows, block: np.ndarray) -> np.ndarray:
    """Which key blocks each query block touches, exactly, from runs of tokens rather than from tokens.

    Along a row of places, a *run* is a stretch of one block and one dilation group. The queries of a run see
    a rectangle of places, which is again a few runs per row.

    Args:
        block: [height, width] int64, the block of the token at each (row, column) place.

    Returns:
        [touched, 2] int64: the pairs of (query block, key block), sorted.
    """
    height, width = block.shape
    new_run = np.ones((height, width), dtype=bool)
    new_run[:, 1:] = (np.diff(block, axis=1) != 0) | (np.diff(columns.group) != 0)
    run_of = np.cumsum(new_run).reshape(height, width) - 1
    row, first = np.nonzero(new_run)
    run_block = block[row, first]
    last = np.append(first[1:], 0) - 1
    last[last < 0] = width - 1

    num_rows = (rows.stop - rows.start)[row]  # rows that each run sees
    seen_row = counted_up(rows.start[row], num_rows)
    first_run = run_of[seen_row, np.repeat(columns.start[first], num_rows)]
    last_run = run_of[seen_row, np.repeat(columns.stop[last] - 1, num_rows)]

    # The queries of a block see mostly the same stretches of runs: keep each once before listing its runs.
    query_block = np.repeat(run_block, num_rows)
    stretch = np.unique((query_block * len(row) + first_run) * (width + 1) + last_run - first_run)
    stretch, more_runs = np.divmod(stretch, width + 1)
    query_block, first_run = np.divmod(stretch, len(row))

    seen_run = counted_up(first_run, more_runs + 1)
    query_block = np.repeat(query_block, more_runs + 1)
    num_blocks = int(block.max()) + 1
    touched = np.unique(query_block * num_blocks + run_block[seen_run])
    return np.stack([touched // num_blocks, touched % num_blocks], axis=1)


def block_layout(rows: AxisWindows, columns: AxisWindows, tile: tuple[int, int], block_size: int) -> BlockLayout:
    """The order that walks the given tiles, with the blocks it touches and which of them are full."""
    row, column = tile_order(rows, columns, tile)
    index = np.arange(len(row))
    block = np.empty((len(rows.position), len(columns.position)), dtype=np.int64)
    block[row, column] = index // block_size
    pairs = touched_blocks(rows, columns, block)

    # Windows are rectangles, so a block is full where the bounding box of its keys lies in the rectangle
    # that all its queries see. Padding keeps the last key block from ever being full.
    starts = np.arange(0, len(row), block_size)
    query, key = pairs.T
    full = (key + 1) * block_size <= len(row)
    for windows, place in ((rows, row), (columns, column)):
        common_start = np.maximum.reduceat(windows.start[place], starts)[query]
        common_stop = np.minimum.reduceat(windows.stop[place], starts)[query]
        lowest, highest = np.minimum.reduceat(place, starts)[key], np.maximum.reduceat(place, starts)[key]
        full &= (common_start <= lowest) & (highest < common_stop)
    return BlockLayout(rows=row, columns=column, pairs=pairs, full=full, tile=tile)


def candidate_tiles(rows: AxisWindows, columns: AxisWindows, block_size: int) -> list[tuple[int, int]]:
    """Whole groups row by row, and tiles of one block's tokens at four shapes."""
    height, width = (max(last - first for first, last in windows.bounds) for windows in (rows, columns))
    tiles = [(tile_height, block_size // tile_height) for tile_height in (4, 8, 16, 32)]
    return [(height, width), *(tile for tile in tiles if tile[0] < height and tile[1] < width)]


def choose_layout(neighborhood: Neighborhood, height: int, width: int, block_size: int = BLOCK_SIZE) -> BlockLayout:
    """The token order that touches the fewest blocks; of equals, the one nearest to row-major."""
    rows, columns = neighborhood.axes(height, width)
    layouts = (block_layout(rows, columns, tile, block_size) for tile in candidate_tiles(rows, columns, block_size))
    return min(layouts, key=lambda layout: len(layout.pairs))


def listed(pairs: np.ndarray, num_blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sorted (row, column) pairs as a BlockMask wants them: per row, how many and which."""
    row, column = pairs.T
    count = np.bincount(row, minlength=num_blocks)
    rank = counted_up(np.zeros_like(count), count)
    indices = np.zeros((num_blocks, num_blocks), dtype=np.int32)
    indices[row, rank] = column
    return (
        to_device(count.astype(np.int32)[None, None], device),
        to_device(indices[None, None], device),
    )


def window_mask(rows: Tensor, columns: Tensor, row_window: Tensor, column_window: Tensor) -> Callable[..., Tensor]:
    """The mask of a FlexAttention sequence: a key is seen if it is in the query's window on both axes.

    Args:
        rows, columns: [tokens] int32, the places of the token at each index; -1 for padding.
        row_window, column_window: [2, tokens] int32, first place and last place + 1 of its window.
    """

    def neighborhood_mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column = rows[key], columns[key]
        in_rows = (row_window[0, query] <= row) & (row < row_window[1, query])
        return in_rows & (column_window[0, query] <= column) & (column < column_window[1, query])

    return neighborhood_mask


def block_pass(
    neighborhood: Neighborhood, height: int, width: int, device: torch.device, block_size: int = BLOCK_SIZE
) -> BlockPass:
    """The block mask in the chosen token order, built from the geometry."""
    rows, columns = neighborhood.axes(height, width)
    layout = choose_layout(neighborhood, height, width, block_size)
    num_tokens = height * width
    num_blocks = -(-num_tokens // block_size)
    padding = num_blocks * block_size - num_tokens
    query_row, query_column = (np.pad(place, (0, padding), mode="edge") for place in (layout.rows, layout.columns))
    key_row, key_column = (np.pad(place, (0, padding), constant_values=-1) for place in (layout.rows, layout.columns))
    order = rows.position[query_row] * width + columns.position[query_column]

    def int32(array: np.ndarray) -> Tensor:
        return to_device(array.astype(np.int32), device)

    mask = window_mask(
        int32(key_row),
        int32(key_column),
        int32(np.stack([rows.start[query_row], rows.stop[query_row]])),
        int32(np.stack([columns.start[query_column], columns.stop[query_column]])),
    )
    partial, full = layout.pairs[~layout.full], layout.pairs[layout.full]
    block_mask = BlockMask.from_kv_blocks(
        *listed(partial, num_blocks, device),
        *listed(full, num_blocks, device),
        BLOCK_SIZE=block_size,
        mask_mod=mask,
        seq_lengths=(len(order), len(order)),
    )
    return BlockPass(
        order=to_device(order, device),
        inverse=to_device(np.argsort(order[:num_tokens]), device),
        block_mask=block_mask,
        num_touched=len(layout.pairs),
        num_full=len(full),
        num_blocks=num_blocks**2,
        tile=layout.tile,
    )


# --------------------------------------------------------------------------------------------------------
# Plans
# --------------------------------------------------------------------------------------------------------

LAYOUTS = {"reference": gather_pass, "tiled": tiled_pass, "flex": block_pass}


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of the array on the device; compiled code takes its size as a constant."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device)
    torch._dynamo.mark_static(tensor)
    return tensor


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Cached tensors must be real ones, whatever mode the first caller happens to be in.

    An inference-mode tensor could not be saved for a later backward, and a fake or traced one is gone when
    its trace is.
    """
    with torch.inference_mode(False), _disable_current_modes():
        yield


@lru_cache(maxsize=256)
def plan_scan(scan: Scan, height: int, width: int, device: torch.device, backend: Backend) -> ScanPlan:
    """The plan of a scan; built at the first call, looked up at the next.

    Args:
        scan: neighborhoods, attended one after the other.
        height, width: the map, in tokens.
        device: where the tensors of the plan live.
        backend: who runs it.
    """
    with plain_tensors():
        passes = tuple(LAYOUTS[backend](neighborhood, height, width, device) for neighborhood in scan)
    return ScanPlan(scan=scan, height=height, width=width, backend=backend, passes=passes)
