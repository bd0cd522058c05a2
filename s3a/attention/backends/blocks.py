"""The layout of the flex backend: a token order, and the block mask of a pass in it.

A *block* is a run of tokens of the order, 64 or 128. Which blocks touch which follows from the windows of the two
axes (`geometry.AxisWindows`), in time and memory that grow with the tokens touched.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from s3a.attention.backends.costs import DeviceCosts, PassCost, find_costs
from s3a.geometry import AxisWindows, Neighborhood
from s3a.support.compiler import to_device

BLOCK_SIZES = (64, 128)  # tokens; FlexAttention's kernels are tuned for 128


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """One pass as a FlexAttention block mask over reordered tokens.

    Attributes:
        order: [padded tokens] int64, the position that stands at each index of the sequence. The sequence is
            padded to whole blocks with copies of its last token, whose queries see what that token sees (so
            no softmax is empty) and whose keys nobody sees.
        inverse: [tokens] int64, the index at which each position stands.
        block_mask: the mask of the sequence.
        rows, columns: [padded tokens] int32, the places of the token at each index; -1 for padding.
        row_window, column_window: [2, padded tokens] int32, first place and last place + 1 of its window.
        block_size: (query, key) tokens of a block.
        num_touched, num_full, num_blocks: touched and full (query block, key block) pairs, and all there are.
        kernel_options: (name, value) pairs, sorted, for `flex_attention`.
    """

    order: Tensor
    inverse: Tensor
    block_mask: BlockMask
    rows: Tensor
    columns: Tensor
    row_window: Tensor
    column_window: Tensor
    block_size: tuple[int, int]
    num_touched: int
    num_full: int
    num_blocks: int
    kernel_options: tuple[tuple[str, Hashable], ...]


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """A token order, and the blocks that a pass touches in it.

    Attributes:
        rows, columns: [tokens] int64, the row and column place at each index of the sequence.
        pairs: [touched, 2] int64, the touched (query block, key block) pairs, sorted.
        full: [touched] bool, whether every query of the block sees every key of it.
        tile: (row, column) tokens of the tiles that the order walks inside a dilation group.
        block_size: tokens of a block.
    """

    rows: np.ndarray
    columns: np.ndarray
    pairs: np.ndarray
    full: np.ndarray
    tile: tuple[int, int]
    block_size: int

    @property
    def num_blocks(self) -> int:
        """How many blocks the tokens fill."""
        return -(-len(self.rows) // self.block_size)

    def estimate_cost(self, costs: DeviceCosts) -> PassCost:
        """What attending in this order costs."""
        in_block = self.block_size**2
        num_full = int(self.full.sum())
        weighted = num_full + costs.partial_block * (len(self.pairs) - num_full)
        tokens = self.num_blocks * self.block_size
        pair = costs.block_pair.get(self.block_size, costs.block_pair[min(costs.block_pair)])
        total = pair * in_block * weighted + costs.reorder * tokens
        return PassCost(pairs=in_block * len(self.pairs), total=round(total + costs.moves + costs.call))


def walk_tiles(rows: AxisWindows, columns: AxisWindows, tile: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens group by group, inside a group tile by tile, inside a tile row by row; as row and column places."""
    row_tile, column_tile = (
        np.concatenate([np.arange(last - first) // size for first, last in windows.bounds])
        for windows, size in zip((rows, columns), tile, strict=True)
    )
    row, column = (places.reshape(-1) for places in np.indices((len(row_tile), len(column_tile))))
    keys = (column, row, column_tile[column], row_tile[row], columns.group[column], rows.group[row])
    order = np.lexsort(keys)
    return row[order], column[order]


def concatenate_ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The ranges `first[i] .. first[i] + count[i] - 1`, one after the other: ([2, 7], [3, 1]) gives [2, 3, 4, 7]."""
    return np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())


def find_touched_blocks(rows: AxisWindows, columns: AxisWindows, block: np.ndarray) -> np.ndarray:
    """Which key blocks each query block touches, exactly, from runs of tokens rather than from tokens.

    Along a row of places, a *run* is a stretch of one block and one dilation group. The queries of a run see
    a rectangle of places, which is again a few runs per row.

    Example: 4 x 4 tokens in row-major order, a kernel of 3, blocks of 4. Each row of the map is a block and a run:

        block 0 0 0 0      run 0      Rows 0 and 1 see rows 0 to 2, rows 2 and 3 see rows 1 to 3. Queries of a run
              1 1 1 1      run 1      together see all columns of these. So block 0 touches blocks 0, 1 and 2, and so
              2 2 2 2      run 2      on: 12 of 16 pairs of blocks. Four runs with three rows each were looked at,
              3 3 3 3      run 3      instead of 16 queries with nine keys each.

    Args:
        block: [height, width] int64, the block of the token at each (row, column) place.

    Returns:
        [touched, 2] int64: the pairs of (query block, key block), sorted.
    """
    height, width = block.shape
    starts_run = np.ones((height, width), dtype=bool)
    starts_run[:, 1:] = (np.diff(block, axis=1) != 0) | (np.diff(columns.group) != 0)
    run_of = np.cumsum(starts_run).reshape(height, width) - 1
    row, first = np.nonzero(starts_run)
    run_block = block[row, first]
    last = np.append(first[1:], 0) - 1
    last[last < 0] = width - 1

    num_rows = (rows.stop - rows.start)[row]  # rows that each run sees
    seen_row = concatenate_ranges(rows.start[row], num_rows)
    first_run = run_of[seen_row, np.repeat(columns.start[first], num_rows)]
    last_run = run_of[seen_row, np.repeat(columns.stop[last] - 1, num_rows)]

    # The queries of a block see mostly the same stretches of runs: keep each once before listing its runs.
    query_block = np.repeat(run_block, num_rows)
    stretch = np.unique((query_block * len(row) + first_run) * (width + 1) + last_run - first_run)
    stretch, more_runs = np.divmod(stretch, width + 1)
    query_block, first_run = np.divmod(stretch, len(row))

    seen_run = concatenate_ranges(first_run, more_runs + 1)
    query_block = np.repeat(query_block, more_runs + 1)
    num_blocks = int(block.max()) + 1
    touched = np.unique(query_block * num_blocks + run_block[seen_run])
    return np.stack([touched // num_blocks, touched % num_blocks], axis=1)


def order_tokens(rows: AxisWindows, columns: AxisWindows, tile: tuple[int, int], block_size: int) -> TokenOrder:
    """The order that walks the given tiles, with the blocks that it touches, and which of them are full."""
    row, column = walk_tiles(rows, columns, tile)
    index = np.arange(len(row))
    block = np.empty((len(rows.position), len(columns.position)), dtype=np.int64)
    block[row, column] = index // block_size
    pairs = find_touched_blocks(rows, columns, block)

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
    return TokenOrder(rows=row, columns=column, pairs=pairs, full=full, tile=tile, block_size=block_size)


def list_tiles(rows: AxisWindows, columns: AxisWindows, block_size: int) -> list[tuple[int, int]]:
    """The tiles that orders are tried with: whole groups, and tiles of one block's tokens at four shapes."""
    height, width = (max(last - first for first, last in windows.bounds) for windows in (rows, columns))
    tiles = [(tile_height, block_size // tile_height) for tile_height in (4, 8, 16, 32)]
    return [(height, width), *(tile for tile in tiles if tile[0] < height and tile[1] < width)]


def rank_orders(
    neighborhood: Neighborhood,
    height: int,
    width: int,
    costs: DeviceCosts,
    block_sizes: Sequence[int] = BLOCK_SIZES,
) -> list[TokenOrder]:
    """The candidate token orders, the cheapest first; of equals, the nearest to row-major."""
    rows, columns = neighborhood.windows(height, width)
    orders = [
        order_tokens(rows, columns, tile, block_size)
        for block_size in block_sizes
        for tile in list_tiles(rows, columns, block_size)
    ]
    return sorted(orders, key=lambda order: order.estimate_cost(costs).total)


def estimate(neighborhood: Neighborhood, height: int, width: int, costs: DeviceCosts) -> PassCost:
    """What the cheapest order costs."""
    block_sizes = list_block_sizes(height * width)
    return rank_orders(neighborhood, height, width, costs, block_sizes)[0].estimate_cost(costs)


def list_block_sizes(num_tokens: int) -> tuple[int, ...]:
    """The block sizes for a map: blocks of 64 for two and more of them.

    Below 128 queries FlexAttention takes a kernel for decoding, on CUDA.
    """
    return tuple(size for size in BLOCK_SIZES if size == max(BLOCK_SIZES) or num_tokens > size)


def join_query_blocks(pairs: np.ndarray, full: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Touched block pairs, and which are full, where `factor` query blocks after one another are one.

    Example: with a factor of 2 and three blocks, (0, 0) full, (1, 0) full, (0, 1) partial and (2, 1) full become
    (0, 0) full, (0, 1) partial, since block 1 does not touch it, and (1, 1) full: block 2 has no neighbour.
    """
    num_query_blocks, num_key_blocks = pairs.max(axis=0) + 1
    joined = pairs[:, 0] // factor * num_key_blocks + pairs[:, 1]
    touched, index = np.unique(joined, return_inverse=True)
    num_full = np.bincount(index, weights=full)
    query_block, key_block = np.divmod(touched, num_key_blocks)
    num_joined = np.minimum(factor, num_query_blocks - factor * query_block)
    return np.stack([query_block, key_block], axis=1), num_full == num_joined


def index_blocks(pairs: np.ndarray, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sorted (query block, key block) pairs as a BlockMask takes them: per query block, how many key blocks, and which.

    Args:
        shape: how many query blocks there are, and how many key blocks.

    Example: the pairs (0, 0), (0, 2), (1, 1) of three blocks give the counts [2, 1, 0] and, as indices, the rows
    [0, 2, -], [1, -, -] and [-, -, -], where "-" is never read.
    """
    query_block, key_block = pairs.T
    count = np.bincount(query_block, minlength=shape[0])
    rank = concatenate_ranges(np.zeros_like(count), count)
    indices = np.zeros(shape, dtype=np.int32)
    indices[query_block, rank] = key_block
    return (
        to_device(count.astype(np.int32)[None, None], device),
        to_device(indices[None, None], device),
    )


def make_mask(rows: Tensor, columns: Tensor, row_window: Tensor, column_window: Tensor) -> Callable[..., Tensor]:
    """The mask function of a FlexAttention sequence: a key is seen if it is in the query's window on both axes.

    Args:
        rows, columns: [tokens] int32, the places of the token at each index; -1 for padding.
        row_window, column_window: [2, tokens] int32, first place and last place + 1 of its window.
    """

    def neighborhood_mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column = rows[key], columns[key]
        in_rows = (row_window[0, query] <= row) & (row < row_window[1, query])
        return in_rows & (column_window[0, query] <= column) & (column < column_window[1, query])

    return neighborhood_mask


def lay_out_blocks(
    neighborhood: Neighborhood,
    height: int,
    width: int,
    device: torch.device,
    *,
    block_sizes: Sequence[int] | None = None,
    query_blocks: int = 1,
    kernel_options: tuple[tuple[str, Hashable], ...] = (),
) -> BlockLayout:
    """Builds the block mask from the geometry, in the token order and with the blocks that cost least.

    Args:
        block_sizes: the sizes to choose from; None is `list_block_sizes`.
        query_blocks: how many of these make one block of queries; the keys' stay as they are.
        kernel_options: for `flex_attention`; handed on.
    """
    rows, columns = neighborhood.windows(height, width)
    num_tokens = height * width
    block_sizes = list_block_sizes(num_tokens) if block_sizes is None else block_sizes
    best = rank_orders(neighborhood, height, width, find_costs(device), block_sizes)[0]
    pairs, is_full = join_query_blocks(best.pairs, best.full, query_blocks)
    block_size = best.block_size * query_blocks, best.block_size
    num_query_blocks = -(-num_tokens // block_size[0])
    shape = num_query_blocks, num_query_blocks * query_blocks
    padding = num_query_blocks * block_size[0] - num_tokens
    query_row, query_column = (np.pad(place, (0, padding), mode="edge") for place in (best.rows, best.columns))
    key_row, key_column = (np.pad(place, (0, padding), constant_values=-1) for place in (best.rows, best.columns))
    order = rows.position[query_row] * width + columns.position[query_column]

    def int32(array: np.ndarray) -> Tensor:
        return to_device(array.astype(np.int32), device)

    places = {
        "rows": int32(key_row),
        "columns": int32(key_column),
        "row_window": int32(np.stack([rows.start[query_row], rows.stop[query_row]])),
        "column_window": int32(np.stack([columns.start[query_column], columns.stop[query_column]])),
    }
    partial, full = pairs[~is_full], pairs[is_full]
    block_mask = BlockMask.from_kv_blocks(
        *index_blocks(partial, shape, device),
        *index_blocks(full, shape, device),
        BLOCK_SIZE=block_size,
        mask_mod=make_mask(**places),
        seq_lengths=(len(order), len(order)),
    )
    return BlockLayout(
        order=to_device(order, device),
        inverse=to_device(np.argsort(order[:num_tokens]), device),
        block_mask=block_mask,
        **places,
        block_size=block_size,
        num_touched=len(pairs),
        num_full=len(full),
        num_blocks=shape[0] * shape[1],
        kernel_options=kernel_options,
    )
