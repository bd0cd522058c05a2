"""The block mask of a pass through flex_attention: the CUDA path, and CPU inference."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from s3a.attention.backends.backend import Operands
from s3a.attention.backends.blocks import BlockLayout
from s3a.support.caches import cache_results
from s3a.support.compiler import compile_copy, raise_compilation_errors


def attend(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float) -> Tensor:
    """Executes one pass. Shapes: query, key, value and the result [batch, tokens, heads, head_dim]."""
    query, key, value = (tensor.index_select(1, layout.order).transpose(1, 2) for tensor in (query, key, value))
    if torch.compiler.is_compiling():  # inside someone's graph, which fuses it
        attended = attend_blocks(query, key, value, layout.block_mask, scale)
    else:
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        compiled = compile_pass(layout, query.shape[1], query.shape[3], query.dtype, scale, mode)
        with raise_compilation_errors('use backend="tiled"'), torch.autocast(query.device.type, enabled=False):
            attended = compiled(query, key, value, layout.block_mask, scale)
    return attended.transpose(1, 2).index_select(1, layout.inverse)  # [batch, tokens, heads, head_dim]


@cache_results(maxsize=1024)
def compile_pass(
    layout: BlockLayout, num_heads: int, head_dim: int, dtype: torch.dtype, scale: float, mode: Hashable
) -> Callable[..., Tensor]:
    """The compiled `attend_blocks` for one pass, kind of tensors and mode.

    Only the batch size varies under it, and only that may: code for other dynamic sizes does not build on CPUs.
    """
    return compile_copy(attend_blocks, "attend_blocks")


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float) -> Tensor:
    """What is compiled: flex_attention on [batch, heads, padded tokens, head_dim]."""
    return flex_attention(query, key, value, block_mask=block_mask, scale=scale)


def why_not(operands: Operands) -> str | None:
    """Why flex_attention cannot run such operands, or None if it can."""
    device = operands.device.type
    if device not in ("cpu", "cuda", "xpu"):
        return f"FlexAttention has no kernels for {device}"
    if operands.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention takes float32, bfloat16 and float16, not {str(operands.dtype).removeprefix('torch.')}"
    if operands.head_dim < 16:
        return f"FlexAttention takes head dims of 16 and more, not {operands.head_dim}"
    if device == "cpu" and operands.needs_grad:
        return "FlexAttention has no backward on the CPU"
    return None
