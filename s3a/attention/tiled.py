"""Query tiles with key halos through scaled_dot_product_attention: any device, trains everywhere, exports."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from s3a.plan.tiles import TiledPass


def attend(query: Tensor, key: Tensor, value: Tensor, layout: TiledPass, scale: float) -> Tensor:
    """One pass. Shapes: query, key, value and the result [batch, tokens, heads, head_dim]."""
    if layout.whole:
        whole = [tensor.transpose(1, 2) for tensor in (query, key, value)]  # [batch, heads, tokens, head_dim]
        return scaled_dot_product_attention(*whole, attn_mask=layout.batches[0].mask, scale=scale).transpose(1, 2)

    # A tile is treated as an image of its own. All tiles are gathered at once, tile batch after tile batch, so
    # that each of them is a slice; a gather or a call less is a synchronization of the cores less.
    images = len(query)
    query_rows = rows_of([batch.queries for batch in layout.batches], images, query.shape[1])
    key_rows = rows_of([batch.keys for batch in layout.batches], images, query.shape[1])
    queries = query.flatten(0, 1).index_select(0, query_rows)
    keys, values = (tensor.flatten(0, 1).index_select(0, key_rows) for tensor in (key, value))
    parts = zip(
        queries.split([images * len(batch.queries) for batch in layout.batches]),
        keys.split([images * len(batch.keys) for batch in layout.batches]),
        values.split([images * len(batch.keys) for batch in layout.batches]),
        layout.batches,
        strict=True,
    )
    attended = joined([attend_tiles(*part, images * batch.num_tiles, batch.mask, scale) for *part, batch in parts])
    return torch.empty_like(attended).index_copy_(0, query_rows, attended).unflatten(0, (images, -1))


def rows_of(positions: list[Tensor], images: int, num_tokens: int) -> Tensor:
    """Positions as rows of [images * num_tokens, ...]: list after list, and in each of them image after image."""
    first = num_tokens * torch.arange(images, device=positions[0].device)[:, None]
    return joined([(first + each).flatten() for each in positions])


def joined(parts: list[Tensor]) -> Tensor:
    """The parts after one another; a single one without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_tiles(
    query: Tensor, key: Tensor, value: Tensor, num_tiles: int, mask: Tensor | None, scale: float
) -> Tensor:
    """Tiles of one shape and mask, as one call. Shapes: tensors and the result [tiles * tokens, heads, head_dim]."""
    tiles = [tensor.unflatten(0, (num_tiles, -1)).transpose(1, 2) for tensor in (query, key, value)]
    return scaled_dot_product_attention(*tiles, attn_mask=mask, scale=scale).transpose(1, 2).flatten(0, 1)
