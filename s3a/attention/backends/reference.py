"""The oracle: gather the keys of every query and take the softmax. Slow, any device, any dtype.

Memory grows with (query, key) pairs times head dim; meant for tests and small maps.
"""

import torch
from torch import Tensor

from s3a.attention.backends.key_lists import GatherPass


def attend(query: Tensor, key: Tensor, value: Tensor, layout: GatherPass, scale: float) -> Tensor:
    """One pass. Shapes: query, key, value and the result [batch, tokens, heads, head_dim]."""
    height, width = len(layout.rows), len(layout.columns)
    row, column = layout.rows[:, None, :, None], layout.columns[None, :, None, :]
    seen = (layout.row_seen[:, None, :, None] & layout.column_seen[None, :, None, :]).flatten(2)  # [h, w, keys]

    query = query.unflatten(1, (height, width))  # [batch, h, w, heads, head_dim]
    keys, values = (
        tensor.unflatten(1, (height, width))[:, row, column].flatten(3, 4) for tensor in (key, value)
    )  # [batch, h, w, keys, heads, head_dim]
    scores = scale * torch.einsum("bhwnd,bhwknd->bhwnk", query, keys)
    weights = scores.masked_fill(~seen[:, :, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bhwnk,bhwknd->bhwnd", weights, values).flatten(1, 2)
