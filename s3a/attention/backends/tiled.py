"""Query tiles with key halos through scaled_dot_product_attention: any device, trains everywhere, exports.

Compiled inference on a CPU has two shorter ways. Where the keys of a query are few beside those of a tile, they are
listed: the compiler fuses their gathering with scores, softmax and sums, and nothing is masked. And bf16 tiles
are two matrix products with a softmax fused between, faster there than scaled_dot_product_attention (LOG.md).
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from s3a.attention.backends.permute import permute_tokens
from s3a.attention.backends.tiles import KeyList, TileLayout, WholeGroups

# Tiles of one call: they are an axis of the grid of CUDA's kernels, which has so many places (pytorch#142228).
MOST_TILES = {"cuda": 65_535}


def attend(query: Tensor, key: Tensor, value: Tensor, layout: TileLayout, scale: float) -> Tensor:
    """Executes one pass. Shapes: query, key, value and the result [batch, tokens, heads, head_dim]."""
    if layout.key_list is not None and is_compiled_inference(query, key, value):
        return attend_key_list(query, key, value, layout.key_list, scale)
    if layout.groups is not None:
        return attend_groups(query, key, value, layout.groups, layout.batches[0].mask, scale)
    return attend_tiles(query, key, value, layout, scale)


def attend_groups(
    query: Tensor, key: Tensor, value: Tensor, groups: WholeGroups, mask: Tensor | None, scale: float
) -> Tensor:
    """Every dilation group as an image of its own: copied in order, so that gradients are copied too."""
    if groups.is_map:
        # [batch, heads, tokens, head_dim]
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)
    lengths = {"i": groups.rows, "r": groups.row_dilation, "j": groups.columns, "c": groups.column_dilation}
    queries, keys, values = (
        rearrange(tensor, "b (i r j c) n d -> (b r c) (i j) n d", **lengths) for tensor in (query, key, value)
    )
    attended = attend_tile_batch(queries, keys, values, mask, scale)
    return rearrange(attended, "(b r c) (i j) n d -> b (i r j c) n d", **lengths)


def attend_tiles(query: Tensor, key: Tensor, value: Tensor, layout: TileLayout, scale: float) -> Tensor:
    """Every tile as an image of its own.

    All tiles are gathered at once, tile batch after tile batch, so that each of them is a slice; a gather or a call
    less is a synchronization of the cores less. With two images and two batches: first the tiles of batch 0 of image 0,
    then those of image 1, then the tiles of batch 1 of image 0, then those of image 1.
    """
    num_images, num_tokens = query.shape[:2]
    batches = layout.batches
    query_rows = find_rows([batch.queries for batch in batches], num_images, num_tokens)
    key_rows = find_rows([batch.keys for batch in batches], num_images, num_tokens)
    before, size, index = layout.places
    image = torch.arange(num_images, device=query.device)[:, None]
    place_rows = (num_images * before + image * size + index).flatten()  # where the query of each token is gathered to
    queries = permute_tokens(query.flatten(0, 1), query_rows, place_rows, axis=0)
    keys, values = (tensor.flatten(0, 1).index_select(0, key_rows) for tensor in (key, value))
    query_sizes = [num_images * len(batch.queries) for batch in batches]
    key_sizes = [num_images * len(batch.keys) for batch in batches]
    parts = zip(queries.split(query_sizes), keys.split(key_sizes), values.split(key_sizes), batches, strict=True)
    attended = []
    for *tensors, batch in parts:
        q, k, v = (tensor.unflatten(0, (num_images * batch.num_tiles, -1)) for tensor in tensors)
        attended.append(attend_tile_batch(q, k, v, batch.mask, scale).flatten(0, 1))
    return permute_tokens(concatenate(attended), place_rows, query_rows, axis=0).unflatten(0, (num_images, -1))


def find_rows(positions: list[Tensor], num_images: int, num_tokens: int) -> Tensor:
    """Positions as rows of [num_images * num_tokens, ...]: list after list, and in each of them image after image.

    Example: the lists [0, 2] and [1, 3], two images of 4 tokens: 0 2, 4 6, 1 3, 5 7.
    """
    first = num_tokens * torch.arange(num_images, device=positions[0].device)[:, None]
    return concatenate([(first + each).flatten() for each in positions])


def concatenate(parts: list[Tensor]) -> Tensor:
    """The parts after one another; a single one without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_tile_batch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Tiles of one shape and mask, as one call. Shapes: tensors and the result [tiles, tokens, heads, head_dim]."""
    fuses = query.dtype == torch.bfloat16 and is_compiled_inference(query, key, value)
    # [tiles, heads, tokens, head_dim]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if fuses:
        return multiply(query, key, value, mask, scale).transpose(1, 2)
    most = MOST_TILES.get(query.device.type)
    if most is None or torch.compiler.is_exporting() or len(query) <= most:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)
    parts = zip(query.split(most), key.split(most), value.split(most), strict=True)
    attended = [scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale) for q, k, v in parts]
    return torch.cat(attended).transpose(1, 2)


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
