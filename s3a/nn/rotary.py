"""The 2-D rotary position embedding, on [batch, tokens, ..., head_dim] with the tokens in row-major order."""

import torch
from torch import Tensor

from s3a.support.compiler import fix_size, make_plain_tensors


def build_rotary_tables(
    height: int, width: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The cosine and sine of every token's angles (official code: RoPE), each [tokens, 1, 1, head_dim / 2].

    The first half of the pairs of channels turns with the row index, the second half with the column index; frequencies
    fall geometrically from 1 to 1 / 10000, both included. Angles are computed in float64.
    """
    with make_plain_tensors():
        frequencies = 10000.0 ** -torch.linspace(0, 1, head_dim // 4, dtype=torch.float64, device="cpu")
        rows = torch.arange(height, device="cpu")[:, None, None] * frequencies  # [height, 1, head_dim / 4]
        columns = torch.arange(width, device="cpu")[None, :, None] * frequencies  # [1, width, head_dim / 4]
        angles = torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], dim=-1)
        angles = angles.flatten(0, 1)[:, None, None]  # [tokens, 1, 1, head_dim / 2]
        cosine, sine = (table.to(device=device, dtype=dtype) for table in (angles.cos(), angles.sin()))
        return fix_size(cosine), fix_size(sine)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates neighboring pairs of channels of [batch, tokens, ..., head_dim]; keeps the dtype."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1)
    return turned.flatten(-2).to(x.dtype)
