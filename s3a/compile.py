"""Compilation in place, region by region: blocks that do the same share one piece of code."""

from collections.abc import Callable
from functools import lru_cache, partial
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch._dynamo
from torch import Tensor, nn

from s3a.layers import AttentionPlan, Downsample, Stem

ModelT = TypeVar("ModelT", bound=nn.Module)
REGIONS = (Stem, Downsample)


def compile_model(model: ModelT) -> ModelT:
    """Compiles a model of this library in place, and returns it. State-dict keys stay as they are.

    Nothing is compiled yet when this returns: a region is at its first call for a map size. Blocks of one class
    with the same scan on the same map share their code. A second batch size compiles once more, with the batch
    size left open, and later ones never; except that on a CPU PyTorch chooses convolutions anew from 16 images on.
    """
    for module in model.modules():
        if isinstance(module, REGIONS) or hasattr(module, "draw_kept"):
            module._compiled_call_impl = partial(run_region, module)
    return model


def run_region(module: nn.Module, x: Tensor, plan: AttentionPlan | None = None, *rest: Any) -> Tensor:
    """Calls a region's compiled code."""
    if torch.compiler.is_compiling():  # part of a larger graph
        return module._call_impl(x, plan, *rest) if plan is not None else module._call_impl(x, *rest)
    torch._dynamo.mark_static(x, list(range(1, x.ndim)))
    arguments = (x, *rest) if plan is None else (x, plan, *rest)
    code = region_code(type(module), tuple(x.shape[1:]), None if plan is None else plan.scan.scan)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # dynamo's own way is eager and silent
        return code(module, *arguments)


@lru_cache(maxsize=1024)
def region_code(kind: type[nn.Module], shape: tuple[int, ...], scan: Any) -> Callable[..., Tensor]:
    """The compiled code of a kind of region on one map, under a code object of its own.

    Dynamo counts recompilations per code object and gives up after eight; with one a (kind, map, scan), only the
    batch size, the dtype and the mode vary under it.
    """
    own = FunctionType(
        call.__code__.replace(co_name=f"{kind.__name__.lower()}_{'x'.join(map(str, shape))}"), call.__globals__
    )
    return torch.compile(own, fullgraph=True)


def call(module: nn.Module, *arguments: Any) -> Tensor:
    """What is compiled: the module's forward, with its hooks."""
    return module._call_impl(*arguments)
