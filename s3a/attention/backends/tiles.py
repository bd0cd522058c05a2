"""The layout of the tiled backend: query tiles with key halos, or the keys of every query as a list.

A tile is a rectangle of queries of one dilation group; its halo is the rectangle of keys that any of them sees.
Tiles of equal shape and mask are one batch, so no tile is padded and a mask is stored once. Where every dilation group
is one tile, and all are of one size, the tiles are a rearrangement of the map and nothing is gathered.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from s3a.attention.backends.costs import DeviceCosts, PassCost, find_costs
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


@dataclass(frozen=True)
class WholeGroups:
    """Dilation groups of one size, each of them a tile.

    The token (row, column) of the group (row_group, column_group) stands in the map at the row
    `row * row_dilation + row_group` and at the column `column * column_dilation + column_group`.

    Attributes:
        rows, columns: of a group.
        row_dilation, column_dilation: how many groups there are along the rows and along the columns.
        is_map: whether there is one group, the map.
    """

    rows: int
    columns: int
    row_dilation: int
    column_dilation: int
    is_map: bool


@dataclass(frozen=True, eq=False)
class TileLayout:
    """One pass as query tiles with key halos.

    Attributes:
        batches: the tiles, by shape and mask.
        places: [3, tokens] int64, where each position is found among the queries of the batches: the number of queries
            in the batches before its own, the number in its own, and its index there.
        groups: the dilation groups, where each is a tile and `batches` is one batch of all; else None.
        key_list: the keys of every query, for a compiler to fuse their gathering with their products; None where
            tiles are cheaper even so.
    """

    batches: tuple[TileBatch, ...]
    places: Tensor
    groups: WholeGroups | None
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


@dataclass(frozen=True, kw_only=True)
class TileCost(PassCost):
    """What a choice of tiles costs, for one head of one image.

    Attributes:
        tile: (row, column) queries of a tile, at most.
        halo_tokens: keys of all tiles. batches: calls of the attention kernel.
        groups: the dilation groups, where each is a tile and nothing is gathered; else None.
    """

    tile: tuple[int, int]
    halo_tokens: int
    batches: int
    groups: WholeGroups | None


@dataclass(frozen=True, eq=False)
class AxisShapes:
    """The tiles of one axis, by batch.

    Attributes:
        tile: queries of a tile, at most.
        num_tiles, queries, keys: [batches] int64, how many tiles, and how many queries and keys in each.
        masked: [batches] bool.
        group: tokens of a dilation group, where each is a tile and all have one size; else None.
    """

    tile: int
    num_tiles: np.ndarray
    queries: np.ndarray
    keys: np.ndarray
    masked: np.ndarray
    group: int | None


def rank_tiles(neighborhood: Neighborhood, height: int, width: int, costs: DeviceCosts) -> list[TileCost]:
    """What every choice of tiles costs, cheapest first."""
    rows, columns = (
        list_axis_shapes(length, kernel_size, dilation)
        for length, kernel_size, dilation in zip(
            (height, width), neighborhood.kernel_size, neighborhood.dilation, strict=True
        )
    )
    ranked = [price_tiles(row, column, height, width, costs) for row, column in product(rows, columns)]
    return sorted(ranked, key=lambda cost: cost.total)


@cache_results(maxsize=256)
def list_axis_shapes(length: int, kernel_size: int, dilation: int) -> tuple[AxisShapes, ...]:
    """The tiles of an axis for each size of tile."""
    group_length = -(-length // dilation)
    shapes = []
    for tile in (*(tile for tile in TILES if tile < group_length), group_length):
        batches = cut_axis(length, kernel_size, dilation, tile)
        shapes.append(
            AxisShapes(
                tile=tile,
                num_tiles=np.array([len(batch.queries) for batch in batches]),
                queries=np.array([batch.queries.shape[1] for batch in batches]),
                keys=np.array([batch.keys.shape[1] for batch in batches]),
                masked=np.array([not batch.mask.all() for batch in batches]),
                group=group_length if length % min(length, dilation) == 0 and tile == group_length else None,
            )
        )
    return tuple(shapes)


def price_tiles(rows: AxisShapes, columns: AxisShapes, height: int, width: int, costs: DeviceCosts) -> TileCost:
    """What the tiles of a map cost: every row tile with every column tile."""
    num_tiles, queries, keys = (
        np.multiply.outer(of_rows, of_columns)
        for of_rows, of_columns in (
            (rows.num_tiles, columns.num_tiles),
            (rows.queries, columns.queries),
            (rows.keys, columns.keys),
        )
    )
    rounded = (-(-each // costs.granule) * costs.granule for each in (queries, keys))
    pair = np.where(np.logical_or.outer(rows.masked, columns.masked), costs.masked_pair, 1)
    halo_tokens = int((num_tiles * keys).sum())
    groups = None
    if rows.group is not None and columns.group is not None:
        dilation = height // rows.group, width // columns.group
        groups = WholeGroups(rows.group, columns.group, *dilation, is_map=dilation == (1, 1))
    total = (pair * num_tiles * np.multiply(*rounded)).sum() + costs.call * num_tiles.size
    total += halo_tokens * (costs.copy if groups else costs.gather)
    total += 0 if groups and groups.is_map else costs.moves
    return TileCost(
        pairs=int((num_tiles * queries * keys).sum()),
        total=round(total),
        tile=(rows.tile, columns.tile),
        halo_tokens=halo_tokens,
        batches=num_tiles.size,
        groups=groups,
    )


def estimate(neighborhood: Neighborhood, height: int, width: int, costs: DeviceCosts) -> PassCost:
    """What the cheapest tiles cost."""
    return rank_tiles(neighborhood, height, width, costs)[0]


def estimate_key_list(neighborhood: Neighborhood, height: int, width: int, costs: DeviceCosts) -> int | None:
    """What listing the keys of every query costs in compiled inference; None on a device that does not list them."""
    return None if costs.listed_pair is None else round(costs.listed_pair * neighborhood.count_pairs(height, width))


def prefers_key_list(neighborhood: Neighborhood, height: int, width: int, device: torch.device) -> bool:
    """Whether compiled code lists keys instead of cutting tiles."""
    costs = find_costs(device)
    listed = estimate_key_list(neighborhood, height, width, costs)
    tiles = rank_tiles(neighborhood, height, width, costs)[0].total
    return listed is not None and listed < tiles


def lay_out_tiles(neighborhood: Neighborhood, height: int, width: int, device: torch.device) -> TileLayout:
    """The tiles that cost least: products of row tiles and column tiles, as batches of equal shape and mask."""
    best = rank_tiles(neighborhood, height, width, find_costs(device))[0]
    row_batches, column_batches = (
        cut_axis(length, neighborhood.kernel_size[axis], neighborhood.dilation[axis], best.tile[axis])
        for axis, length in enumerate((height, width))
    )
    shapes = list(product(row_batches, column_batches))
    lists_keys = prefers_key_list(neighborhood, height, width, device)
    return TileLayout(
        batches=tuple(combine_axes(rows, columns, width, device) for rows, columns in shapes),
        places=to_device(
            find_places([find_positions(row.queries, column.queries, width) for row, column in shapes]), device
        ),
        groups=best.groups,
        key_list=list_keys(neighborhood, height, width, device) if lists_keys else None,
    )


def combine_axes(rows: AxisTiles, columns: AxisTiles, width: int, device: torch.device) -> TileBatch:
    """A batch of the tiles of a map: every row tile with every column tile."""
    mask = rearrange(rows.mask[:, None, :, None] & columns.mask[None, :, None, :], "r c i j -> (r c) (i j)")
    return TileBatch(
        num_tiles=len(rows.queries) * len(columns.queries),
        queries=to_device(find_positions(rows.queries, columns.queries, width), device),
        keys=to_device(find_positions(rows.keys, columns.keys, width), device),
        mask=None if mask.all() else to_device(mask, device),
    )


def find_positions(of_rows: np.ndarray, of_columns: np.ndarray, width: int) -> np.ndarray:
    """The positions of tiles, tile after tile, from those of row tiles and column tiles, each [tiles, tokens]."""
    return (of_rows[:, None, :, None] * width + of_columns[None, :, None, :]).reshape(-1)


def find_places(positions: list[np.ndarray]) -> np.ndarray:
    """`TileLayout.places` of batches whose queries stand at these positions.

    Example: batches of the positions 0 2 1 and 3 begin after 0 and 3 queries:

        position                     0 1 2 3
        queries before its batch     0 0 0 3
        queries in its batch         3 3 3 1
        index there                  0 2 1 0
    """
    sizes = np.array([len(each) for each in positions])
    before = np.repeat(np.cumsum(sizes) - sizes, sizes)
    places = np.stack([before, np.repeat(sizes, sizes), np.arange(sizes.sum()) - before])
    return places[:, np.argsort(np.concatenate(positions))]


def list_keys(neighborhood: Neighborhood, height: int, width: int, device: torch.device) -> KeyList:
    """The keys of every query as one list of positions."""
    axes = lay_out_keys(neighborhood, height, width, device)
    keys = axes.rows[:, None, :, None] * width + axes.columns[None, :, None, :]  # [height, width, kernel, kernel]
    seen = axes.row_seen[:, None, :, None] & axes.column_seen[None, :, None, :]
    keys, seen = (rearrange(each, "h w i j -> (h w) (i j)") for each in (keys, seen))
    return KeyList(keys=fix_size(keys), seen=None if seen.all() else fix_size(seen))
