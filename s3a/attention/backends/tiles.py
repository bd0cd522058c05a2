"""The layout of the tiled backend: query tiles with key halos, or the keys of every query as a list.

A tile is a rectangle of queries of one dilation group; its halo is the rectangle of keys that any of them sees.
Tiles of equal shape and mask are one batch, so no tile is padded and a mask is stored once.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from s3a.attention.backends.reference import lay_out_keys
from s3a.geometry import Neighborhood
from s3a.support.caches import cache_results
from s3a.support.compiler import fix_size, to_device


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
class KeyList:
    """One pass as the keys of every query.

    Attributes:
        keys: [tokens, keys] int64, positions. seen: [tokens, keys] bool, False where a window has fewer keys;
            None if no window has.
    """

    keys: Tensor
    seen: Tensor | None


@dataclass(frozen=True, eq=False)
class TileLayout:
    """One pass as query tiles with key halos.

    Attributes:
        batches: the tiles, by shape and mask.
        whole: whether the one tile is the map in row-major order, so that nothing has to be gathered.
        key_list: the keys of every query, for a compiler to fuse their gathering with their products; None where
            tiles are cheaper even so.
    """

    batches: tuple[TileBatch, ...]
    whole: bool
    key_list: KeyList | None


@dataclass(frozen=True, eq=False)
class AxisTiles:
    """Tiles of one axis that share one shape and one mask.

    Attributes:
        queries: [tiles, tile] int64, token positions. keys: [tiles, halo]. mask: [tile, halo] bool.
    """

    queries: np.ndarray
    keys: np.ndarray
    mask: np.ndarray


@cache_results(maxsize=1024)
def cut_axis(length: int, kernel_size: int, dilation: int, tile: int) -> tuple[AxisTiles, ...]:
    """Cuts every dilation group of an axis into nearly equal tiles of at most `tile` queries.

    Example: 6 tokens, a kernel of 3, tiles of 2 queries. A tile's halo holds every key that one of its queries sees:

        queries 0 1   halo 0 1 2     mask 1 1 1        Windows move inwards at the ends, so both queries of an outer
                                          1 1 1        tile see the same keys. The outer tiles have one shape and
        queries 2 3   halo 1 2 3 4   mask 1 1 1 0      one mask, and make one batch; the inner one is a batch of
                                          0 1 1 1      its own.
        queries 4 5   halo 3 4 5     mask 1 1 1
                                          1 1 1
    """
    windows = Neighborhood((kernel_size, 1), (dilation, 1)).windows(length, 1)[0]
    shapes: dict[tuple[tuple[int, ...], bytes], list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
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
# In (query, key) pairs, measured on two CPU cores (LOG.md): gathering one key and its value, and one more call.
HALO_TOKEN_COST = 60
BATCH_COST = 4_000
# Likewise: one pair of compiled code that gathers every key for itself.
KEY_LIST_PAIR_COST = 4.5


@dataclass(frozen=True)
class TileCost:
    """What a choice of tiles costs, for one head of one image.

    Attributes:
        tile: (row, column) queries of a tile, at most.
        pairs: (query, key) products, masked ones included.
        halo_tokens: keys gathered. batches: calls of the attention kernel.
    """

    tile: tuple[int, int]
    pairs: int
    halo_tokens: int
    batches: int

    @property
    def total(self) -> int:
        """The cost in pairs."""
        return self.pairs + HALO_TOKEN_COST * self.halo_tokens + BATCH_COST * self.batches


def rank_tiles(neighborhood: Neighborhood, height: int, width: int) -> list[TileCost]:
    """What every choice of tiles costs, cheapest first."""
    rows, columns = (
        estimate_axis_costs(length, kernel_size, dilation)
        for length, kernel_size, dilation in zip(
            (height, width), neighborhood.kernel_size, neighborhood.dilation, strict=True
        )
    )
    costs = [
        TileCost(
            tile=(row.tile[0], column.tile[0]),
            pairs=row.pairs * column.pairs,
            halo_tokens=row.halo_tokens * column.halo_tokens,
            batches=row.batches * column.batches,
        )
        for row, column in product(rows, columns)
    ]
    return sorted(costs, key=lambda cost: cost.total)


def estimate_axis_costs(length: int, kernel_size: int, dilation: int) -> list[TileCost]:
    """What each size of tile costs along one axis; the costs on a map are products of these."""
    group_length = -(-length // dilation)
    costs = []
    for tile in (*(tile for tile in TILES if tile < group_length), group_length):
        batches = cut_axis(length, kernel_size, dilation, tile)
        pairs = sum(batch.queries.size * batch.keys.shape[1] for batch in batches)
        halo_tokens = sum(batch.keys.size for batch in batches)
        costs.append(TileCost(tile=(tile, 1), pairs=pairs, halo_tokens=halo_tokens, batches=len(batches)))
    return costs


def estimate_key_list_cost(neighborhood: Neighborhood, height: int, width: int) -> int:
    """What listing the keys of every query costs, in the same pairs as `TileCost.total`."""
    return round(KEY_LIST_PAIR_COST * neighborhood.count_pairs(height, width))


def prefers_key_list(neighborhood: Neighborhood, height: int, width: int, device: torch.device) -> bool:
    """Whether compiled code lists keys instead of cutting tiles; measured on CPUs, so only there."""
    tiles = rank_tiles(neighborhood, height, width)[0].total
    return device.type == "cpu" and estimate_key_list_cost(neighborhood, height, width) < tiles


def lay_out_tiles(neighborhood: Neighborhood, height: int, width: int, device: torch.device) -> TileLayout:
    """The tiles that cost least: products of row tiles and column tiles, as batches of equal shape and mask."""
    tile = rank_tiles(neighborhood, height, width)[0].tile
    row_batches, column_batches = (
        cut_axis(length, neighborhood.kernel_size[axis], neighborhood.dilation[axis], tile[axis])
        for axis, length in enumerate((height, width))
    )
    batches = [combine_axes(rows, columns, width, device) for rows, columns in product(row_batches, column_batches)]
    whole = all(
        len(each) == 1 and np.array_equal(each[0].queries, np.arange(length)[None])
        for each, length in ((row_batches, height), (column_batches, width))
    )
    lists_keys = prefers_key_list(neighborhood, height, width, device)
    key_list = list_keys(neighborhood, height, width, device) if lists_keys else None
    return TileLayout(batches=tuple(batches), whole=whole, key_list=key_list)


def combine_axes(rows: AxisTiles, columns: AxisTiles, width: int, device: torch.device) -> TileBatch:
    """The tiles of a map: every row tile with every column tile."""

    def combine(of_rows: np.ndarray, of_columns: np.ndarray) -> np.ndarray:  # each [tiles, tokens]
        return (of_rows[:, None, :, None] * width + of_columns[None, :, None, :]).reshape(-1)

    mask = rearrange(rows.mask[:, None, :, None] & columns.mask[None, :, None, :], "r c i j -> (r c) (i j)")
    return TileBatch(
        num_tiles=len(rows.queries) * len(columns.queries),
        queries=to_device(combine(rows.queries, columns.queries), device),
        keys=to_device(combine(rows.keys, columns.keys), device),
        mask=None if mask.all() else to_device(mask, device),
    )


def list_keys(neighborhood: Neighborhood, height: int, width: int, device: torch.device) -> KeyList:
    """The keys of every query as one list of positions."""
    axes = lay_out_keys(neighborhood, height, width, device)
    keys = axes.rows[:, None, :, None] * width + axes.columns[None, :, None, :]  # [height, width, kernel, kernel]
    seen = axes.row_seen[:, None, :, None] & axes.column_seen[None, :, None, :]
    keys, seen = (rearrange(each, "h w i j -> (h w) (i j)") for each in (keys, seen))
    return KeyList(keys=fix_size(keys), seen=None if seen.all() else fix_size(seen))
