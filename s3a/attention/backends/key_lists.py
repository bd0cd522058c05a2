"""The keys of every query, listed: what the reference runs, and compiled code where it is cheaper than tiles."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s3a.geometry import Neighborhood
from s3a.support.tensors import static, to_device


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


@dataclass(frozen=True, eq=False)
class KeyList:
    """One pass as the keys of every query.

    Attributes:
        keys: [tokens, keys] int64, positions. seen: [tokens, keys] bool, False where a window has fewer keys;
            None if no window has.
    """

    keys: Tensor
    seen: Tensor | None


def key_list(neighborhood: Neighborhood, height: int, width: int, device: torch.device) -> KeyList:
    """The keys of every query as one list of positions."""
    axes = gather_pass(neighborhood, height, width, device)
    keys = axes.rows[:, None, :, None] * width + axes.columns[None, :, None, :]  # [height, width, kernel, kernel]
    seen = axes.row_seen[:, None, :, None] & axes.column_seen[None, :, None, :]
    keys, seen = (each.reshape(height * width, -1) for each in (keys, seen))
    return KeyList(keys=static(keys), seen=None if seen.all() else static(seen))
