"""A scan laid out for a machine: which backend executes each of its passes, and what that backend knows of the map.

A plan is built once per (scan, map size, device, backends), outside the compiled graph, and cached. No plan ever
looks at all tokens against all tokens.

Words: a *place* is an index along an axis in group order, a *position* the index of a token in the map (row-major).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s3a.attention.backends import BACKENDS, Operands
from s3a.attention.backends.blocks import BLOCK_SIZE
from s3a.geometry import Neighborhood, Scan
from s3a.support.caches import cache_results
from s3a.support.compiler import make_plain_tensors
from s3a.support.errors import make_unknown_error

SMALL_MAP = 2 * BLOCK_SIZE  # tokens


@dataclass(frozen=True, eq=False)
class PassPlan:
    """One pass, laid out for the backend that executes it.

    Attributes:
        neighborhood: which keys a query sees.
        backend: its name in `backends.BACKENDS`. layout: what that backend's `layout` returned.
    """

    neighborhood: Neighborhood
    backend: str
    layout: Any


@dataclass(frozen=True, eq=False)
class ScanPlan:
    """A scan on one map, laid out pass by pass.

    Attributes:
        scan: the neighborhoods, in the order in which they are attended.
        height, width: the map, in tokens.
        passes: one plan per neighborhood; each has a backend of its own.
    """

    scan: Scan
    height: int
    width: int
    passes: tuple[PassPlan, ...]

    @property
    def backends(self) -> tuple[str, ...]:
        """The name of each pass' backend."""
        return tuple(each.backend for each in self.passes)


def attend_plan(query: Tensor, key: Tensor, value: Tensor, plan: ScanPlan, scale: float | None = None) -> Tensor:
    """Executes a plan: each pass attends with the same queries and keys, to the values that the last one left.

    Args:
        query, key, value: [batch, tokens, heads, head_dim], the tokens of the plan's map in row-major order.
        scale: factor of the scores; None is head_dim ** -0.5.

    Returns:
        [batch, tokens, heads, head_dim].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    for each in plan.passes:
        value = BACKENDS[each.backend].attend(query, key, value, each.layout, scale)
    return value


@cache_results(maxsize=1024)
def plan_scan(scan: Scan, height: int, width: int, operands: Operands, backend: str | None = None) -> ScanPlan:
    """The plan of a scan; built at the first call, looked up at the next.

    Args:
        scan: neighborhoods, attended one after the other.
        height, width: the map, in tokens.
        operands: what will be attended; the tensors of the plan live on their device.
        backend: of every pass; None chooses for each.

    Raises:
        ValueError: for an unknown backend, or one that cannot run the operands.
    """
    if backend is not None:
        check_backend(backend, operands)
    backends = tuple(backend or choose_backend(height * width, operands) for _ in scan)
    return lay_out_scan(scan, height, width, operands.device, backends)


@cache_results(maxsize=256)
def lay_out_scan(scan: Scan, height: int, width: int, device: torch.device, backends: tuple[str, ...]) -> ScanPlan:
    """The plan of a scan whose passes are executed by the backends of these names, one each."""
    with make_plain_tensors():
        passes = tuple(
            PassPlan(neighborhood, name, BACKENDS[name].layout(neighborhood, height, width, device))
            for neighborhood, name in zip(scan, backends, strict=True)
        )
    return ScanPlan(scan=scan, height=height, width=width, passes=passes)


def check_backend(name: str, operands: Operands) -> None:
    """Raises ValueError for an unknown backend, or one that cannot run the operands (says why, and what would)."""
    if name not in BACKENDS:
        raise make_unknown_error("backend", name, BACKENDS)
    reason = BACKENDS[name].why_not(operands)
    if reason is not None:
        raise ValueError(f'backend "{name}" cannot run this: {reason}; use backend="tiled", which can')


def choose_backend(num_tokens: int, operands: Operands) -> str:
    """The automatic choice for a pass on a map of so many tokens: flex on CUDA where it pays, tiled elsewhere."""
    return "tiled" if object_to_flex(num_tokens, operands) else "flex"


def object_to_flex(num_tokens: int, operands: Operands) -> str | None:
    """Why the automatic choice for a pass is not flex, or None if it is."""
    if operands.device.type != "cuda":
        return f"on {operands.device.type} tiles are faster"
    if num_tokens <= SMALL_MAP:
        return f"a map of {num_tokens} tokens has so few blocks that a mask skips none"
    return BACKENDS["flex"].why_not(operands)


def explain_choice(num_tokens: int, operands: Operands) -> tuple[str, dict[str, str]]:
    """The automatic choice for a pass, and for each other backend why it was not chosen."""
    chosen = choose_backend(num_tokens, operands)
    reasons = {
        "flex": str(object_to_flex(num_tokens, operands)),
        "tiled": "on CUDA the block mask runs in one kernel",
        "reference": "it is the oracle; its memory grows with pairs times head dim",
    }
    return chosen, {
        name: backend.why_not(operands) or reasons.get(name, "it is used only where it is named")
        for name, backend in BACKENDS.items()
        if name != chosen
    }
