"""Neighborhood attention and Sparse Scan Self-Attention, on any of the backends.

`query, key, value` are [batch, height, width, heads, head_dim] at this surface, as in `natten.na2d`.
"""

import torch
from torch import Tensor

from s3a.attention.backends import flex, reference, tiled
from s3a.attention.backends.blocks import BLOCK_SIZE
from s3a.attention.plan import BACKENDS, Backend, ScanPlan, plan_scan
from s3a.geometry import Fixed, Neighborhood, Passes, Scan, sparse_scan
from s3a.support.errors import unknown

__all__ = ["attend_plan", "choose_backend", "neighborhood_attention", "sparse_scan_attention"]

ATTEND = {"flex": flex.attend, "tiled": tiled.attend, "reference": reference.attend}
SMALL_MAP = 2 * BLOCK_SIZE  # tokens


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    *,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attention of every token over its (dilated) neighborhood, by NATTEN's rule.

    Args:
        query, key, value: [batch, height, width, heads, head_dim], one floating dtype, one device.
        kernel_size: keys per axis, odd; an int or a (row, column) pair. A kernel larger than a dilation
            group sees the group whole.
        dilation: distance between neighboring keys, in tokens; an int or a (row, column) pair.
        scale: factor of the scores; None is head_dim ** -0.5.
        backend: None chooses (flex on CUDA, tiled elsewhere); "flex", "tiled" or "reference" is run as
            said or refused.

    Returns:
        The query's shape, dtype and device.

    Raises:
        ValueError: for tensors that do not match, an even or negative kernel, a dilation below 1, an unknown
            backend, or one that cannot run these tensors.
    """
    check_tensors(query, key, value)
    return attend_scan(query, key, value, (Neighborhood(kernel_size, dilation),), scale, backend)


def sparse_scan_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    size: int = 7,
    fixed: Fixed = "window",
    passes: Passes = "both",
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Sparse Scan Self-Attention (arXiv 2405.13335): two chained passes with the same queries and keys.

    The local pass lets every token look at its reference window; the anchor pass lets it look at its anchors
    of interest, whose values are what they saw themselves. Kernels and dilations follow from the map's size
    (`geometry.sparse_scan`).

    Args:
        query, key, value: [batch, height, width, heads, head_dim], one floating dtype, one device.
        size: tokens per axis of what is fixed.
        fixed: "window" fixes the reference window, "anchors" the number of anchors per axis.
        passes: "both", or for ablations "local" or "anchor" alone, or "dense" attention in their place.
        scale: factor of the scores; None is head_dim ** -0.5.
        backend: None chooses (flex on CUDA, tiled elsewhere); "flex", "tiled" or "reference" is run as
            said or refused.

    Returns:
        The query's shape, dtype and device.

    Raises:
        ValueError: for tensors that do not match, a size below 1, another word for `fixed` or `passes`, an unknown
            backend, or one that cannot run these tensors.
    """
    check_tensors(query, key, value)
    scan = sparse_scan(query.shape[1], query.shape[2], size, fixed, passes)
    return attend_scan(query, key, value, scan, scale, backend)


def attend_scan(
    query: Tensor, key: Tensor, value: Tensor, scan: Scan, scale: float | None, backend: Backend | None
) -> Tensor:
    """Runs any scan on [batch, height, width, heads, head_dim]."""
    _, height, width, _, head_dim = query.shape
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    backend = choose_backend(backend, query.device, query.dtype, head_dim, needs_grad, height * width)
    plan = plan_scan(scan, height, width, query.device, backend)
    flat = (tensor.flatten(1, 2) for tensor in (query, key, value))
    return attend_plan(*flat, plan, scale).unflatten(1, (height, width))


def attend_plan(query: Tensor, key: Tensor, value: Tensor, plan: ScanPlan, scale: float | None = None) -> Tensor:
    """Executes a plan: each pass attends with the same queries and keys, to the values the last one left.

    Args:
        query, key, value: [batch, tokens, heads, head_dim], the tokens of the plan's map in row-major order.
        plan: from `plan.plan_scan`, for the tensors' device.
        scale: factor of the scores; None is head_dim ** -0.5.

    Returns:
        [batch, tokens, heads, head_dim].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    attend = ATTEND[plan.backend]
    for layout in plan.passes:
        value = attend(query, key, value, layout, scale)
    return value


def choose_backend(
    backend: str | None, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool, num_tokens: int
) -> Backend:
    """The backend asked for, if it can run; for None, flex on CUDA where it pays, and tiled elsewhere.

    Raises:
        ValueError: for an unknown backend, or one that cannot run such tensors (it says why and what would).
    """
    if backend is None:
        return "tiled" if objection_to_flex(device, dtype, head_dim, needs_grad, num_tokens) else "flex"
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    reason = flex.why_not(device, dtype, head_dim, needs_grad) if backend == "flex" else None
    if reason is not None:
        raise ValueError(f'backend "flex" cannot run this: {reason}; use backend="tiled", which can')
    return backend


def objection_to_flex(
    device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool, num_tokens: int
) -> str | None:
    """Why the automatic choice is not flex, or None if it is."""
    if device.type != "cuda":
        return f"on {device.type} tiles are faster"
    if num_tokens <= SMALL_MAP:
        return f"a map of {num_tokens} tokens has so few blocks that a mask skips none"
    return flex.why_not(device, dtype, head_dim, needs_grad)


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises ValueError unless the three have one 5-dimensional shape, one floating dtype and one device."""
    if not all(isinstance(tensor, Tensor) for tensor in (query, key, value)):
        raise ValueError(
            f"query, key and value are {', '.join(type(each).__name__ for each in (query, key, value))}: "
            "they must be tensors"
        )
    for quality in ("shape", "dtype", "device"):
        values = [getattr(tensor, quality) for tensor in (query, key, value)]
        if values[1:] != values[:-1]:
            shown = ", ".join(str(tuple(value) if quality == "shape" else value) for value in values)
            raise ValueError(f"query, key and value have {quality}s {shown}: they must have the same {quality}")
    if query.ndim != 5 or 0 in query.shape:
        raise ValueError(
            f"query has shape {tuple(query.shape)}: it must be [batch, height, width, heads, head_dim], none of them 0"
        )
    if not query.is_floating_point():
        raise ValueError(f"query has dtype {query.dtype}: it must be a floating one; cast it first")
