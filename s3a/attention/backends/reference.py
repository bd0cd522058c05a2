"""The oracle: gathers the keys of every query and takes the softmax. Slow, on any device, in any dtype.

Memory grows with (query, key) pairs times head dim; meant for tests and small maps.
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from s3a.attention.backends.costs import DeviceCosts, PassCost
from s3a.geometry import Neighborhood
from s3a.support.compiler import to_device


@dataclass(frozen=True, eq=False)
class AxisKeys:
    """The keys of every query, axis by axis: a query sees the product of its rows and its columns.

    Attributes:
        rows: [height, kernel] int64, the key rows of each query row; `row_seen` is False where the window
            has fewer keys. columns, column_seen: [width, kernel], the same for columns.
    """

    rows: Tensor
    row_seen: Tensor
    columns: Tensor
    column_seen: Tensor


def lay_out_keys(neighborhood: Neighborhood, height: int, width: int, device: torch.device) -> AxisKeys:
    """Lists the keys of every query row and of every query column."""
    tensors = []
    for windows in neighborhood.windows(height, width):
        token_order = np.argsort(windows.position)
        start, stop = windows.start[token_order], windows.stop[token_order]
        places = start[:, None] + np.arange((stop - start).max())
        seen = places < stop[:, None]
        keys = windows.position[np.where(seen, places, start[:, None])]
        tensors += [to_device(keys, device), to_device(seen, device)]
    return AxisKeys(*tensors)


def estimate(neighborhood: Neighborhood, height: int, width: int, costs: DeviceCosts) -> PassCost:
    """What gathering the keys of every query costs."""
    pairs = neighborhood.count_pairs(height, width)
    return PassCost(pairs=pairs, total=round((costs.gather + 1) * pairs + costs.moves + costs.call))


def attend(query: Tensor, key: Tensor, value: Tensor, layout: AxisKeys, scale: float) -> Tensor:
    """Executes one pass. Shapes: query, key, value and the result [batch, tokens, heads, head_dim]."""
    row, column = (
        layout.rows[:, None, :, None],
        layout.columns[None, :, None, :],
    )
    seen = rearrange(layout.row_seen[:, None, :, None] & layout.column_seen[None, :, None, :], "h w i j -> h w 1 (i j)")

    height = len(layout.rows)
    query, keys, values = (rearrange(tensor, "b (h w) n d -> b h w n d", h=height) for tensor in (query, key, value))
    keys, values = (rearrange(maps[:, row, column], "b h w i j n d -> b h w (i j) n d") for maps in (keys, values))
    scores = scale * torch.einsum("bhwnd,bhwknd->bhwnk", query, keys)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return rearrange(torch.einsum("bhwnk,bhwknd->bhwnd", weights, values), "b h w n d -> b (h w) n d")
