"""Query tiles with key halos: what the tiled backend runs.

A tile is a rectangle of queries of one dilation group; its halo is the rectangle of keys that any of them sees.
Tiles of equal shape and mask are one batch, so no tile is padded and a mask is stored once.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor

from s3a.attention.backends.key_lists import KeyList, key_list
from s3a.geometry import Neighborhood
from s3a.support.tensors import to_device


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
        whole: the one tile is the map in row-major order, so nothing has to be gathered.
        listed: the keys of every query, for a compiler to fuse their gathering with their products; None where
            tiles are cheaper even so.
    """

    batches: tuple[TileBatch, ...]
    whole: bool
    listed: KeyList | None


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
# In (query, key) pairs, measured on two CPU cores (LOG.md): gathering one key and its value, and one more call.
HALO_TOKEN_COST = 60
BATCH_COST = 4_000
# Likewise: one pair of compiled code that gathers every key for itself.
LISTED_PAIR_COST = 4.5


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


def tile_costs(neighborhood: Neighborhood, height: int, width: int) -> list[TileCost]:
    """Every choice of tiles, cheapest first."""
    rows, columns = (
        axis_costs(length, kernel_size, dilation)
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


def axis_costs(length: int, kernel_size: int, dilation: int) -> list[TileCost]:
    """What tiles cost along one axis; costs of a map are products of these."""
    group_length = -(-length // dilation)
    costs = []
    for tile in (*(tile for tile in TILES if tile < group_length), group_length):
        batches = axis_tiles(length, kernel_size, dilation, tile)
        pairs = sum(batch.queries.size * batch.keys.shape[1] for batch in batches)
        halo_tokens = sum(batch.keys.size for batch in batches)
        costs.append(TileCost(tile=(tile, 1), pairs=pairs, halo_tokens=halo_tokens, batches=len(batches)))
    return costs


def listed_cost(neighborhood: Neighborhood, height: int, width: int) -> int:
    """What listing the keys of every query costs, in the same pairs as `TileCost.total`."""
    return round(LISTED_PAIR_COST * neighborhood.count_pairs(height, width))


def prefers_list(neighborhood: Neighborhood, height: int, width: int, device: torch.device) -> bool:
    """Whether compiled code lists keys instead of cutting tiles; measured on CPUs, so only there."""
    tiles = tile_costs(neighborhood, height, width)[0].total
    return device.type == "cpu" and listed_cost(neighborhood, height, width) < tiles


def choose_tiles(neighborhood: Neighborhood, height: int, width: int) -> tuple[int, int]:
    """The (row, column) tile that costs least."""
    return tile_costs(neighborhood, height, width)[0].tile


def tiled_pass(neighborhood: Neighborhood, height: int, width: int, device: torch.device) -> TiledPass:
    """The products of row tiles and column tiles, as batches of equal shape and mask."""
    tile = choose_tiles(neighborhood, height, width)
    row_batches, column_batches = (
        axis_tiles(length, neighborhood.kernel_size[axis], neighborhood.dilation[axis], tile[axis])
        for axis, length in enumerate((height, width))
    )

    def positions(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return (rows[:, None, :, None] * width + columns[None, :, None, :]).reshape(-1)

    batches = []
    for rows, columns in product(row_batches, column_batches):
        queries, keys = positions(rows.queries, columns.queries), positions(rows.keys, columns.keys)
        mask = (rows.mask[:, None, :, None] & columns.mask[None, :, None, :]).reshape(
            rows.mask.shape[0] * columns.mask.shape[0], -1
        )
        batches.append(
            TileBatch(
                num_tiles=len(rows.queries) * len(columns.queries),
                queries=to_device(queries, device),
                keys=to_device(keys, device),
                mask=None if mask.all() else to_device(mask, device),
            )
        )
    whole = len(batches) == 1 and batches[0].num_tiles == 1 and bool((np.diff(queries) == 1).all())
    as_list = prefers_list(neighborhood, height, width, device)
    listed = key_list(neighborhood, height, width, device) if as_list else None
    return TiledPass(batches=tuple(batches), whole=whole, listed=listed)
