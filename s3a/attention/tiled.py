"""Query tiles with key halos through scaled_dot_product_attention: any device, trains everywhere, exports."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from s3a.plan import TileBatch, TiledPass


def attend(query: Tensor, key: Tensor, value: Tensor, layout: TiledPass, scale: float) -> Tensor:
    """One pass. Shapes: query, key, value and the result [batch, tokens, heads, head_dim]."""
    if layout.inverse is None:
        whole = [tensor.transpose(1, 2) for tensor in (query, key, value)]  # [batch, heads, tokens, head_dim]
        return scaled_dot_product_attention(*whole, attn_mask=layout.batches[0].mask, scale=scale).transpose(1, 2)
    tiles = [attend_tiles(query, key, value, batch, scale) for batch in layout.batches]
    return torch.cat(tiles, dim=1).index_select(1, layout.inverse)


def attend_tiles(query: Tensor, key: Tensor, value: Tensor, tiles: TileBatch, scale: float) -> Tensor:
    """The tiles of one shape, as one call; the result is [batch, tiles * tile, heads, head_dim]."""

    def gather(tensor: Tensor, positions: Tensor) -> Tensor:
        gathered = tensor.index_select(1, positions).unflatten(1, (tiles.num_tiles, -1))
        return gathered.flatten(0, 1).transpose(1, 2)  # [batch * tiles, heads, tile or halo, head_dim]

    attended = scaled_dot_product_attention(
        gather(query, tiles.queries),
        gather(key, tiles.keys),
        gather(value, tiles.keys),
        attn_mask=tiles.mask,
        scale=scale,
    )
    return attended.transpose(1, 2).unflatten(0, (-1, tiles.num_tiles)).flatten(1, 2)
