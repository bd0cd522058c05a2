"""A token order and the block mask in it: what the flex backend runs.

A *block* is a run of `BLOCK_SIZE` tokens of the order. Which blocks touch which follows from the windows of the two
axes (`geometry.AxisWindows`), in time and memory that grow with the tokens touched.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from s3a.geometry import AxisWindows, Neighborhood
from s3a.support.tensors import to_device

BLOCK_SIZE = 128  # what FlexAttention's kernels are tuned for


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
    """

    order: Tensor
    inverse: Tensor
    block_mask: BlockMask
    num_touched: int
    num_full: int
    num_blocks: int


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


def layouts(neighborhood: Neighborhood, height: int, width: int, block_size: int = BLOCK_SIZE) -> list[BlockLayout]:
    """The candidate token orders, the one that touches the fewest blocks first; of equals, the nearest to row-major."""
    rows, columns = neighborhood.axes(height, width)
    candidates = [block_layout(rows, columns, tile, block_size) for tile in candidate_tiles(rows, columns, block_size)]
    return sorted(candidates, key=lambda layout: len(layout.pairs))


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
    layout = layouts(neighborhood, height, width, block_size)[0]
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
    )
