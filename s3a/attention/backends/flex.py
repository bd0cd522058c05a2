"""The block mask of a pass through flex_attention: the CUDA path, and CPU inference."""

from collections.abc import Callable, Hashable
from importlib.util import find_spec
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention

from s3a.attention.backends.backend import KernelOptions, Operands
from s3a.attention.backends.blocks import BLOCK_SIZES, BlockLayout, make_mask
from s3a.attention.backends.permute import permute_tokens
from s3a.support.caches import cache_results
from s3a.support.compiler import compile_copy, raise_compilation_errors
from s3a.support.errors import make_unknown_error

# Options that say how many tokens a kernel takes at once: they must divide the blocks of the mask.
KERNEL_TILES = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
KERNEL_OPTIONS = frozenset(
    f"{prefix}{name}" for prefix in ("", "fwd_", "bwd_") for name in FlexKernelOptions.__annotations__
)
# Query blocks of 128 tokens that FLASH takes as one, by the major number of the device's compute capability. On others
# its kernels do not read block masks: those for 8.x compute densely and say nothing, those for 12.x refuse.
FLASH_QUERY_BLOCKS = {9: 1, 10: 2, 11: 2}
# Before 2.15, PyTorch did not fit its kernels' tiles into blocks of fewer than 128 tokens, and raised.
NEEDS_KERNEL_TILES = Version(torch.__version__) < Version("2.15.0.dev0")


def attend(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float) -> Tensor:
    """Executes one pass. Shapes: query, key, value and the result [batch, tokens, heads, head_dim]."""
    order, inverse = layout.order, layout.inverse
    padding = len(order) - len(inverse)
    query, key, value = (  # [batch, heads, padded tokens, head_dim]
        permute_tokens(tensor, order, inverse, axis=1).transpose(1, 2) for tensor in (query, key, value)
    )
    options = layout.kernel_options
    if query.device.type == "cuda" and NEEDS_KERNEL_TILES:
        options = (*fit_kernels(layout.block_size[1], query.dtype, options), *options)
    if torch.compiler.is_compiling():  # inside someone's graph, which fuses it
        attended = attend_blocks(query, key, value, rebuild_mask(layout), scale, options)
    else:
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        compiled = compile_pass(layout, query.shape[1], query.shape[3], query.dtype, scale, mode)
        with raise_compilation_errors('use backend="tiled"'), torch.autocast(query.device.type, enabled=False):
            attended = compiled(query, key, value, layout.block_mask, scale, options)
    # [batch, tokens, heads, head_dim]
    return permute_tokens(attended.transpose(1, 2), inverse, order[: len(inverse)], axis=1, padding=padding)


def rebuild_mask(layout: BlockLayout) -> BlockMask:
    """The same block mask with a mask function made here: dynamo takes no function out of a plan that is a constant."""
    mask = layout.block_mask
    return BlockMask(
        seq_lengths=mask.seq_lengths,
        kv_num_blocks=mask.kv_num_blocks,
        kv_indices=mask.kv_indices,
        full_kv_num_blocks=mask.full_kv_num_blocks,
        full_kv_indices=mask.full_kv_indices,
        q_num_blocks=mask.q_num_blocks,
        q_indices=mask.q_indices,
        full_q_num_blocks=mask.full_q_num_blocks,
        full_q_indices=mask.full_q_indices,
        BLOCK_SIZE=layout.block_size,
        mask_mod=make_mask(layout.rows, layout.columns, layout.row_window, layout.column_window),
    )


@cache_results(maxsize=1024)
def compile_pass(
    layout: BlockLayout, num_heads: int, head_dim: int, dtype: torch.dtype, scale: float, mode: Hashable
) -> Callable[..., Tensor]:
    """The compiled `attend_blocks` for one pass, kind of tensors and mode.

    Only the batch size varies under it, and only that may: code for other dynamic sizes does not build on CPUs.
    """
    return compile_copy(attend_blocks, "attend_blocks")


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float, kernel_options: KernelOptions
) -> Tensor:
    """What is compiled: flex_attention on [batch, heads, padded tokens, head_dim]."""
    options: Any = dict(kernel_options)
    return flex_attention(query, key, value, block_mask=block_mask, scale=scale, kernel_options=options)


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


def fit_kernels(block_size: int, dtype: torch.dtype, given: KernelOptions = ()) -> KernelOptions:
    """Kernel options that fit into blocks of fewer than 128 tokens, but for what is given, with a prefix or without."""
    if block_size >= 128:
        return ()
    forward, backward = ((64, 32), (16, 16)) if dtype == torch.float32 else ((64, 64), (32, 64))
    fitting = (
        *zip(("fwd_BLOCK_M", "fwd_BLOCK_N"), forward, strict=True),
        *zip(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), backward + backward[::-1], strict=True),
    )
    names = {name for name, _ in given}
    return tuple((name, size) for name, size in fitting if not names & {name, name.partition("_")[2]})


def choose_blocks(kernel_options: KernelOptions, operands: Operands) -> dict[str, Any]:
    """What `blocks.lay_out_blocks` must know of kernel options, as its arguments.

    Raises:
        ValueError: for an option that FlexAttention does not have, one that no block of ours fits, and kernels that
            this device does not have.
    """
    options = dict(kernel_options)
    for name in options:
        if name not in KERNEL_OPTIONS:
            raise make_unknown_error("kernel option", name, KERNEL_OPTIONS)
    tiles = {
        name: value for name, value in options.items() if name.removeprefix("fwd_").removeprefix("bwd_") in KERNEL_TILES
    }
    sizes = tuple(size for size in BLOCK_SIZES if all(is_divisor(value, size) for value in tiles.values()))
    if not sizes:
        shown = ", ".join(f"{name} is {value!r}" for name, value in tiles.items())
        raise ValueError(f"{shown}: each must be a power of two, of {max(BLOCK_SIZES)} at most")
    if options.get("BACKEND") != "FLASH":
        return {"block_sizes": sizes, "kernel_options": kernel_options} if tiles else {"kernel_options": kernel_options}
    capability = torch.cuda.get_device_capability(operands.device) if operands.device.type == "cuda" else None
    query_blocks = find_flash_blocks(capability, operands)
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        raise ValueError(
            'kernel option BACKEND is "FLASH", which needs the package flash-attn-4: install it, or leave it out'
        )
    return {"block_sizes": (128,), "query_blocks": query_blocks, "kernel_options": kernel_options}


def is_divisor(value: object, size: int) -> bool:
    """Whether the value is a positive int that divides the size."""
    return isinstance(value, int) and value > 0 and size % value == 0


def find_flash_blocks(capability: tuple[int, int] | None, operands: Operands) -> int:
    """How many query blocks of 128 tokens are one block of FlexAttention's FLASH kernels.

    They take blocks of (128, 128) (query, key) tokens on Hopper and of (256, 128) on Blackwell.

    Args:
        capability: the compute capability of the device; None where it is not CUDA's.

    Raises:
        ValueError: where they would attend densely, or cannot run.
    """
    remedy = 'leave it out, or use BACKEND="TRITON"'
    if capability is None or capability[0] not in FLASH_QUERY_BLOCKS:
        where = operands.device.type if capability is None else "compute capability {}.{}".format(*capability)
        raise ValueError(
            f'kernel option BACKEND is "FLASH" on {where}: it reads block masks on compute capability 9.x to 11.x '
            f"alone (Hopper, Blackwell); {remedy}"
        )
    if operands.dtype not in (torch.bfloat16, torch.float16) or operands.head_dim > 128 or operands.head_dim % 8:
        dtype = str(operands.dtype).removeprefix("torch.")
        raise ValueError(
            f'kernel option BACKEND is "FLASH" for {dtype} and a head dim of {operands.head_dim}: it must be bfloat16 '
            f"or float16, and a multiple of 8 up to 128; {remedy}"
        )
    return FLASH_QUERY_BLOCKS[capability[0]]
