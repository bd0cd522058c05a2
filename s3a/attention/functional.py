"""Neighborhood attention and Sparse Scan Self-Attention, as functions.

The way of a query: here it is checked and the plan of its map is looked up; the plan hands it to the backend of each
pass; the result comes back.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from s3a.attention.backends import KernelOptions, Operands
from s3a.attention.plan import ScanPlan, attend_plan, freeze_options, plan_scan
from s3a.geometry import Fixed, Neighborhood, Passes, Scan, sparse_scan


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    *,
    scale: float | None = None,
    backend: str | None = None,
    kernel_options: Mapping[str, Any] | None = None,
) -> Tensor:
    """Attention of every token over its (dilated) neighborhood, by NATTEN's rule.

    Args:
        query, key, value: [batch, height, width, heads, head_dim], one floating dtype, one device.
        kernel_size: keys per axis, odd; an int or a (row, column) pair. A kernel larger than a dilation
            group sees the group whole.
        dilation: distance between neighboring keys, in tokens; an int or a (row, column) pair.
        scale: factor of the scores; None is head_dim ** -0.5.
        backend: None chooses what costs least: tiled on a CPU, tiled or flex on CUDA (`s3a.explain` says why). Where
            flex was chosen and this machine cannot compile it, tiled takes its place, with a warning. "flex", "tiled"
            or "reference" is used exactly, or ValueError.
        kernel_options: for `flex_attention`, with backend="flex" alone; see
            `torch.nn.attention.flex_attention.FlexKernelOptions`. The mask gets the blocks that they ask for.

    Returns:
        The query's shape, dtype and device.

    Raises:
        ValueError: for tensors that do not match, an even or negative kernel, a dilation below 1, an unknown
            backend, one that cannot run these tensors, or kernel options that it does not have.
    """
    return attend_scan(query, key, value, build_single_pass, (kernel_size, dilation), scale, backend, kernel_options)


def sparse_scan_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    size: int = 7,
    fixed: Fixed = "window",
    passes: Passes = "both",
    scale: float | None = None,
    backend: str | None = None,
    kernel_options: Mapping[str, Any] | None = None,
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
        backend: None chooses for each pass what costs least: tiled on a CPU, tiled or flex on CUDA (`s3a.explain` says
            why). Where flex was chosen and this machine cannot compile it, tiled takes its place, with a warning. One
            that is named ("flex", "tiled", "reference") is used exactly, or ValueError.
        kernel_options: for `flex_attention`, with backend="flex" alone; see `neighborhood_attention`.

    Returns:
        The query's shape, dtype and device.

    Raises:
        ValueError: for tensors that do not match, a size below 1, an unknown `fixed`, `passes` or backend, a backend
            that cannot run these tensors, or kernel options that it does not have.
    """
    return attend_scan(query, key, value, sparse_scan, (size, fixed, passes), scale, backend, kernel_options)


def attend_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    build_scan: Callable[..., Scan],
    arguments: tuple[Any, ...],
    scale: float | None,
    backend: str | None,
    kernel_options: Mapping[str, Any] | None,
) -> Tensor:
    """Executes the scan `build_scan(height, width, *arguments)` on [batch, height, width, heads, head_dim]."""
    check_tensors(query, key, value)
    # a plan belongs to one map size, also where a tracer would vary it
    height, width, head_dim = (operator.index(query.shape[axis]) for axis in (1, 2, 4))
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    plan = plan_call(
        build_scan,
        arguments,
        height,
        width,
        query.device,
        query.dtype,
        head_dim,
        needs_grad,
        backend,
        freeze_options(kernel_options),
    )
    query, key, value = (tensor.flatten(1, 2) for tensor in (query, key, value))  # [batch, tokens, heads, head_dim]
    return attend_plan(query, key, value, plan, scale).unflatten(1, (height, width))


@torch.compiler.assume_constant_result
def plan_call(
    build_scan: Callable[..., Scan],
    arguments: tuple[Any, ...],
    height: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    needs_grad: bool,
    backend: str | None,
    kernel_options: KernelOptions,
) -> ScanPlan:
    """`plan_scan` for a call, whose result torch.compile takes as a constant: a plan is never built inside a graph."""
    operands = Operands(device, dtype, head_dim, needs_grad)
    return plan_scan(build_scan(height, width, *arguments), height, width, operands, backend, kernel_options)


def build_single_pass(
    height: int, width: int, kernel_size: int | tuple[int, int], dilation: int | tuple[int, int]
) -> Scan:
    """A scan of one neighborhood, the same on every map."""
    return (Neighborhood(kernel_size, dilation),)


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
