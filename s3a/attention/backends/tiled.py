"""Query tiles with key halos through scaled_dot_product_attention: any device, trains everywhere, exports.

Compiled inference on a CPU has two shorter ways. Where the keys of a query are few beside those of a tile, they are
listed: the compiler fuses their gathering with scores, softmax and sums, and nothing is masked. And bf16 tiles
are two matrix products with a softmax fused between, faster there than scaled_dot_product_attention (LOG.md).
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from s3a.attention.backends.tiles import KeyList, TileBatch, TileLayout


def attend(query: Tensor, key: Tensor, value: Tensor, layout: TileLayout, scale: float) -> Tensor:
    """Executes one pass. Shapes: query, key, value and the result [batch, tokens, heads, head_dim]."""
    if layout.key_list is not None and is_compiled_inference(query, key, value):
        return attend_key_list(query, key, value, layout.key_list, scale)
    if layout.whole:
        # [batch, heads, tokens, head_dim]
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        mask = layout.batches[0].mask
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)
    return attend_tiles(query, key, value, layout.batches, scale)


def attend_tiles(query: Tensor, key: Tensor, value: Tensor, batches: tuple[TileBatch, ...], scale: float) -> Tensor:
    """Every tile as an image of its own.

    All tiles are gathered at once, tile batch after tile batch, so that each of them is a slice; a gather or a call
    less is a synchronization of the cores less. With two images and two batches: first the tiles of batch 0 of image 0,
    then those of image 1, then the tiles of batch 1 of image 0, then those of image 1.
    """
    num_images, num_tokens = query.shape[:2]
    query_rows = find_rows([batch.queries for batch in batches], num_images, num_tokens)
    key_rows = find_rows([batch.keys for batch in batches], num_images, num_tokens)
    queries = query.flatten(0, 1).index_select(0, query_rows)
    keys, values = (tensor.flatten(0, 1).index_select(0, key_rows) for tensor in (key, value))
    query_sizes = [num_images * len(batch.queries) for batch in batches]
    key_sizes = [num_images * len(batch.keys) for batch in batches]
    parts = zip(queries.split(query_sizes), keys.split(key_sizes), values.split(key_sizes), batches, strict=True)
    attended = concatenate(
        [attend_tile_batch(q, k, v, num_images * batch.num_tiles, batch.mask, scale) for q, k, v, batch in parts]
    )
    return torch.empty_like(attended).index_copy_(0, query_rows, attended).unflatten(0, (num_images, -1))


def find_rows(positions: list[Tensor], num_images: int, num_tokens: int) -> Tensor:
    """Positions as rows of [num_images * num_tokens, ...]: list after list, and in each of them image after image.

    Example: the lists [0, 2] and [1, 3], two images of 4 tokens: 0 2, 4 6, 1 3, 5 7.
    """
    first = num_tokens * torch.arange(num_images, device=positions[0].device)[:, None]
    return concatenate([(first + each).flatten() for each in positions])


def concatenate(parts: list[Tensor]) -> Tensor:
    """The parts after one another; a single one without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_tile_batch(
    query: Tensor, key: Tensor, value: Tensor, num_tiles: int, mask: Tensor | None, scale: float
) -> Tensor:
    """Tiles of one shape and mask, as one call. Shapes: tensors and the result [tiles * tokens, heads, head_dim]."""
    fuses = query.dtype == torch.bfloat16 and is_compiled_inference(query, key, value)
    # [tiles, heads, tokens, head_dim]
    query, key, value = (tensor.unflatten(0, (num_tiles, -1)).transpose(1, 2) for tensor in (query, key, value))
    if fuses:
        attended = multiply(query, key, value, mask, scale)
    else:
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return attended.transpose(1, 2).flatten(0, 1)


def is_compiled_inference(*tensors: Tensor) -> bool:
    """Whether torch.compile traces this for a CPU and no gradient; an exported program may run uncompiled."""
    compiled = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return compiled and not needs_grad and tensors[0].device.type == "cpu"


def attend_key_list(query: Tensor, key: Tensor, value: Tensor, layout: KeyList, scale: float) -> Tensor:
    """One pass, every query with keys of its own; uncompiled it would hold all of them at once."""
    exact = torch.promote_types(query.dtype, torch.float32)
    products = query.to(exact)[:, :, None] * key[:, layout.keys].to(exact)
    scores = scale * products.sum(-1)  # [batch, tokens, keys, heads]
    if layout.seen is not None:
        scores = scores.masked_fill(~layout.seen[:, :, None], -torch.inf)
    # over the last axis, so that the compiler vectorizes it
    weights = scores.transpose(2, 3).softmax(dim=-1).transpose(2, 3)
    return (weights[..., None] * value[:, layout.keys].to(exact)).sum(2).to(value.dtype)


def multiply(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """scaled_dot_product_attention on [tiles, heads, tokens, head_dim], its softmax in float32."""
    scores = ((scale * query) @ key.mT).float()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights.to(value.dtype) @ value / weights.sum(-1, keepdim=True)).to(value.dtype)
