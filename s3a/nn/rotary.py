"""The 2-D rotary position embedding, on [batch, tokens, ..., head_dim] with the tokens in row-major order."""

import torch
from torch import Tensor


def rotary_angles(height: int, width: int, head_dim: int) -> Tensor:
    """The 2-D rotary embedding's angles (official code: RoPE): [tokens, head_dim / 2], float64.

    The first half of the pairs turns with the row index, the second half with the column index; frequencies
    fall geometrically from 1 to 1 / 10000, both included.
    """
    frequencies = 10000.0 ** -torch.linspace(0, 1, head_dim // 4, dtype=torch.float64)
    rows = torch.arange(height)[:, None, None] * frequencies  # [height, 1, head_dim / 4]
    columns = torch.arange(width)[None, :, None] * frequencies  # [1, width, head_dim / 4]
    return torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], dim=-1).flatten(0, 1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates neighboring pairs of channels of [batch, tokens, ..., head_dim]; keeps the dtype."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1)
    return turned.flatten(-2).to(x.dtype)
