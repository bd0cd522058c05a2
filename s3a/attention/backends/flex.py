"""The plan's BlockMask through flex_attention: the CUDA path, and CPU inference."""

from collections.abc import Callable, Hashable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from s3a.attention.backends.blocks import BlockPass
from s3a.support.compiler import compile_own, compiling


def run(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float) -> Tensor:
    """flex_attention on [batch, heads, padded tokens, head_dim]."""
    return flex_attention(query, key, value, block_mask=block_mask, scale=scale)


@lru_cache(maxsize=1024)
def compiled(
    layout: BlockPass, num_heads: int, head_dim: int, dtype: torch.dtype, scale: float, mode: Hashable
) -> Callable[..., Tensor]:
    """The compiled `run` for one pass, kind of tensors and mode.

    Only the batch size varies under it, and only that may: code for other dynamic sizes does not build on CPUs.
    """
    return compile_own(run, "run_flex")


def attend(query: Tensor, key: Tensor, value: Tensor, layout: BlockPass, scale: float) -> Tensor:
    """One pass. Shapes: query, key, value and the result [batch, tokens, heads, head_dim]."""
    ordered = [tensor.index_select(1, layout.order).transpose(1, 2) for tensor in (query, key, value)]
    if torch.compiler.is_compiling():  # inside someone's graph, which fuses it
        attended = run(*ordered, layout.block_mask, scale)
    else:
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        own = compiled(layout, *query.shape[2:], query.dtype, scale, mode)
        with compiling(instead='use backend="tiled"'), torch.autocast(query.device.type, enabled=False):
            attended = own(*ordered, layout.block_mask, scale)
    return attended.transpose(1, 2).index_select(1, layout.inverse)  # [batch, tokens, heads, head_dim]


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str | None:
    """Why flex_attention cannot run such tensors, or None if it can."""
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"FlexAttention has no kernels for {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim < 16:
        return f"FlexAttention takes head dims of 16 and more, not {head_dim}"
    if device.type == "cpu" and needs_grad:
        return "FlexAttention has no backward on the CPU"
    return None
