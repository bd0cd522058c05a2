"""A scan laid out for a machine: which backend executes each of its passes, and what that backend knows of the map.

A plan is built once per (scan, map size, device, backends), outside the compiled graph, and cached. No plan ever
looks at all tokens against all tokens.

Words: a *place* is an index along an axis in group order, a *position* the index of a token in the map (row-major).
"""

import warnings
from collections.abc import Hashable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s3a.attention.backends import BACKENDS, KernelOptions, Operands
from s3a.attention.backends.costs import PassCost, find_costs
from s3a.attention.derivatives import explain_missing_derivatives
from s3a.geometry import Neighborhood, Scan
from s3a.support.caches import cache_results
from s3a.support.compiler import NoCompilerError, make_plain_tensors
from s3a.support.errors import make_unknown_error

FALLBACK = "tiled"  # runs everywhere, and compiles nothing
# Types of devices for which a backend of the automatic choice could not be compiled in this process, and why.
UNCOMPILED: dict[str, str] = {}
# Of plans that are laid out alike; a few bytes each, while the plans themselves are forgotten in time.
NUMBERS: dict[Hashable, int] = {}


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
        automatic: whether these backends were chosen, and not named.
        number: the same for all plans that are laid out alike, as one that was forgotten and made again.
    """

    scan: Scan
    height: int
    width: int
    passes: tuple[PassPlan, ...]
    automatic: bool
    number: int

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

    Raises:
        NotImplementedError: for derivatives of higher order or in forward mode, but for backend="reference".
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    has_all = torch.compiler.is_compiling() or set(plan.backends) <= {"reference"}  # a graph brings its own
    with nullcontext() if has_all else explain_missing_derivatives(query, key, value):
        for each in plan.passes:
            value = attend_pass(query, key, value, each, plan, scale)
    return value


def attend_pass(query: Tensor, key: Tensor, value: Tensor, each: PassPlan, plan: ScanPlan, scale: float) -> Tensor:
    """Executes a pass by its backend or, where that was chosen and cannot be compiled on this machine, by tiles.

    The first time in a process, a warning says so; later passes do not try again.
    """
    device = query.device
    can_fall_back = plan.automatic and not torch.compiler.is_compiling()
    if not can_fall_back or each.backend == FALLBACK:
        return BACKENDS[each.backend].attend(query, key, value, each.layout, scale)
    if device.type not in UNCOMPILED:
        try:
            return BACKENDS[each.backend].attend(query, key, value, each.layout, scale)
        except NoCompilerError as error:
            UNCOMPILED[device.type] = str(error)
            warnings.warn(
                f'{error}. backend "{each.backend}" was the automatic choice; this process uses "{FALLBACK}" on '
                f"{device.type} from here on, which computes the same",
                stacklevel=3,
            )
    plan = lay_out_scan((each.neighborhood,), plan.height, plan.width, device, (FALLBACK,))
    return BACKENDS[FALLBACK].attend(query, key, value, plan.passes[0].layout, scale)


@cache_results(maxsize=1024)
def plan_scan(
    scan: Scan,
    height: int,
    width: int,
    operands: Operands,
    backend: str | None = None,
    kernel_options: KernelOptions = (),
) -> ScanPlan:
    """The plan of a scan; built at the first call, looked up at the next.

    Args:
        scan: neighborhoods, attended one after the other.
        height, width: the map, in tokens.
        operands: what will be attended; the tensors of the plan live on their device.
        backend: of every pass; None chooses for each.
        kernel_options: of that backend's kernels, as `freeze_options` returns them.

    Raises:
        ValueError: for an unknown backend, one that cannot run the operands, and kernel options that the backend does
            not have.
    """
    check_options(kernel_options, backend)
    if backend is None:
        backends = tuple(choose_backend(each, height, width, operands) for each in scan)
        may_fall_back = {"automatic": True} if set(backends) - {FALLBACK} else {}
        return lay_out_scan(scan, height, width, operands.device, backends, **may_fall_back)
    check_backend(backend, operands)
    read_options = BACKENDS[backend].read_options
    more = {}
    if read_options is not None and kernel_options:
        more["arguments"] = tuple(read_options(kernel_options, operands).items())
    return lay_out_scan(scan, height, width, operands.device, (backend,) * len(scan), **more)


@cache_results(maxsize=256)
def lay_out_scan(
    scan: Scan,
    height: int,
    width: int,
    device: torch.device,
    backends: tuple[str, ...],
    arguments: tuple[tuple[str, Hashable], ...] = (),
    automatic: bool = False,
) -> ScanPlan:
    """The plan of a scan whose passes are executed by the backends of these names, one each.

    Args:
        arguments: more arguments of the backends' `layout`, by name.
        automatic: whether the backends were chosen, and not named.
    """
    with make_plain_tensors():
        passes = tuple(
            PassPlan(neighborhood, name, BACKENDS[name].layout(neighborhood, height, width, device, **dict(arguments)))
            for neighborhood, name in zip(scan, backends, strict=True)
        )
    kind = scan, height, width, backends, arguments, automatic
    number = NUMBERS.setdefault(kind, len(NUMBERS))
    return ScanPlan(scan=scan, height=height, width=width, passes=passes, automatic=automatic, number=number)


def check_backend(name: str, operands: Operands) -> None:
    """Raises ValueError for an unknown backend, or one that cannot run the operands (says why, and what would)."""
    if name not in BACKENDS:
        raise make_unknown_error("backend", name, BACKENDS)
    reason = BACKENDS[name].why_not(operands)
    if reason is not None:
        raise ValueError(f'backend "{name}" cannot run this: {reason}; use backend="tiled", which can')


def freeze_options(kernel_options: Mapping[str, Any] | None) -> KernelOptions:
    """Kernel options as plans keep them: hashable, and the same whatever the order they were given in.

    Raises:
        ValueError: for what is no mapping of names to plain values.
    """
    options = {} if kernel_options is None else kernel_options
    if not isinstance(options, Mapping) or not all(
        isinstance(name, str) and isinstance(value, (str, int, float)) for name, value in options.items()
    ):
        raise ValueError(
            f"kernel_options is {options!r}: it must be a dict of names and plain values, such as "
            '{"BACKEND": "TRITON"}'
        )
    return tuple(sorted(options.items()))


def check_options(kernel_options: KernelOptions, backend: str | None) -> None:
    """Raises ValueError for kernel options without a backend that takes them, which must be named."""
    if kernel_options and (backend is None or (backend in BACKENDS and BACKENDS[backend].read_options is None)):
        able = ", ".join(f'backend="{name}"' for name, each in BACKENDS.items() if each.read_options)
        raise ValueError(
            f"kernel_options is {dict(kernel_options)!r} with backend={backend!r}: name {able} to use them"
        )


def choose_backend(neighborhood: Neighborhood, height: int, width: int, operands: Operands) -> str:
    """The automatic choice for a pass: what costs least of what can run."""
    able = [name for name in BACKENDS if object_to(name, operands) is None]
    if len(able) == 1:
        return able[0]
    costs = estimate_costs(able, neighborhood, height, width, operands)
    return min(costs, key=lambda name: costs[name].total)


def object_to(name: str, operands: Operands) -> str | None:
    """Why a backend is out of the question for the automatic choice, or None if it is not."""
    costs, device = find_costs(operands.device), operands.device.type
    reason = BACKENDS[name].why_not(operands)
    if reason is None and name not in costs.candidates:
        reasons = {
            "flex": f"on {device} it is used only where it is named: it compiles for every map",
            "reference": "it is the oracle; its memory grows with pairs times head dim",
        }
        reason = reasons.get(name, f"on {device} it is used only where it is named")
    if reason is None and name != FALLBACK:
        reason = UNCOMPILED.get(device)
    return reason


def estimate_costs(
    names: Iterable[str], neighborhood: Neighborhood, height: int, width: int, operands: Operands
) -> dict[str, PassCost]:
    """What a pass costs by each backend of these names that has an estimate, on the device of the operands."""
    prices = find_costs(operands.device)
    estimates = {name: BACKENDS[name].estimate for name in names}
    return {
        name: estimate(neighborhood, height, width, prices)
        for name, estimate in estimates.items()
        if estimate is not None
    }


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """Which backend executes a pass where none is named, and why.

    Attributes:
        name: of the chosen one.
        costs: what each backend that can run would cost, by name, where it can say so.
        reasons: for each other backend, why it was not chosen.
    """

    name: str
    costs: dict[str, PassCost]
    reasons: dict[str, str]


def explain_choice(neighborhood: Neighborhood, height: int, width: int, operands: Operands) -> BackendChoice:
    """The automatic choice for a pass, what each backend would cost, and why each other one was not chosen."""
    chosen = choose_backend(neighborhood, height, width, operands)
    able = [name for name, backend in BACKENDS.items() if backend.why_not(operands) is None]
    costs = estimate_costs(able, neighborhood, height, width, operands)
    reasons = {
        name: object_to(name, operands) or f"it costs {100 * (costs[name].total / costs[chosen].total - 1):.0f} % more"
        for name in BACKENDS
        if name != chosen
    }
    return BackendChoice(name=chosen, costs=costs, reasons=reasons)
