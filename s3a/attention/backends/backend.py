"""What a backend is, and what it is asked about."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from s3a.attention.backends.costs import DeviceCosts, PassCost
from s3a.geometry import Neighborhood

KernelOptions: TypeAlias = tuple[tuple[str, Hashable], ...]
"""Options of a backend's kernels as (name, value) pairs, sorted by name."""


@dataclass(frozen=True)
class Operands:
    """What matters of queries, keys and values for whether a backend can run them.

    Attributes:
        device, dtype: of all three.
        head_dim: their last axis.
        needs_grad: whether a backward pass will follow.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    needs_grad: bool


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to execute a pass; a row of `table.BACKENDS`.

    Attributes:
        name: what users pass as `backend=`.
        layout: lays a neighborhood out for a map: (neighborhood, height, width, device) to whatever `attend` needs.
            Called once per pass and map, outside of compiled code; the result is cached.
        attend: executes one pass: (query, key, value, layout, scale) to the attended values. Tensors and the result are
            [batch, tokens, heads, head_dim], the tokens in row-major order.
        why_not: why it cannot run such operands, or None if it can.
        estimate: what a pass costs: (neighborhood, height, width, prices of the device) to a `PassCost`; None for a
            backend that is only used where it is named.
        read_options: (kernel options, operands) to more arguments of `layout`, or ValueError; None if it takes none.
    """

    name: str
    layout: Callable[..., Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any, float], Tensor]
    why_not: Callable[[Operands], str | None]
    estimate: Callable[[Neighborhood, int, int, DeviceCosts], PassCost] | None = None
    read_options: Callable[[KernelOptions, Operands], Mapping[str, Any]] | None = None
