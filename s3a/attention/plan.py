"""Geometry laid out for a machine: what a backend needs to run a scan on one map size.

A plan is built once per (scan, map size, device, backend), outside the compiled graph, and cached. No plan ever
looks at all tokens against all tokens.

Words: a *place* is an index along an axis in group order, a *position* the index of a token in the map (row-major).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import torch

from s3a.attention.backends.blocks import BlockPass, block_pass
from s3a.attention.backends.key_lists import GatherPass, gather_pass
from s3a.attention.backends.tiles import TiledPass, tiled_pass
from s3a.geometry import Scan
from s3a.support.tensors import plain_tensors

Backend: TypeAlias = Literal["flex", "tiled", "reference"]
BACKENDS = ("flex", "tiled", "reference")
LAYOUTS = {"reference": gather_pass, "tiled": tiled_pass, "flex": block_pass}


@dataclass(frozen=True, eq=False)
class ScanPlan:
    """A scan on one map size, laid out for one backend and device.

    Attributes:
        scan: the neighborhoods, in the order in which they are attended.
        height, width: the map, in tokens.
        backend: which backend runs it.
        passes: one layout per neighborhood.
    """

    scan: Scan
    height: int
    width: int
    backend: Backend
    passes: tuple[GatherPass, ...] | tuple[TiledPass, ...] | tuple[BlockPass, ...]


@lru_cache(maxsize=256)
def plan_scan(scan: Scan, height: int, width: int, device: torch.device, backend: Backend) -> ScanPlan:
    """The plan of a scan; built at the first call, looked up at the next.

    Args:
        scan: neighborhoods, attended one after the other.
        height, width: the map, in tokens.
        device: where the tensors of the plan live.
        backend: who runs it.
    """
    with plain_tensors():
        passes = tuple(LAYOUTS[backend](neighborhood, height, width, device) for neighborhood in scan)
    return ScanPlan(scan=scan, height=height, width=width, backend=backend, passes=passes)
