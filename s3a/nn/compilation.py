"""Compilation in place, region by region: blocks that do the same share one piece of code."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar

import torch
import torch._dynamo
from torch import Tensor, nn

from s3a.nn.layers import Region
from s3a.nn.s3a import AttentionPlan
from s3a.support.caches import cache_results
from s3a.support.compiler import compile_copy, raise_compilation_errors

ModelT = TypeVar("ModelT", bound=nn.Module)


def compile_model(model: ModelT) -> ModelT:
    """Compiles a model of this library in place, and returns it. State-dict keys stay as they are; a copy is eager.

    Nothing is compiled yet when this returns: a region is compiled at its first call for a map size. Blocks of one
    class with the same scan on the same map share their code. A second batch size compiles once more, with the batch
    size left open, and later ones never.

    Raises:
        ValueError: for a model without blocks of this library.
        CompilationError: at the first call, where the machine cannot compile; says why.
    """
    regions = [module for module in model.modules() if isinstance(module, Region)]
    if not regions:
        raise ValueError(f"{type(model).__name__} has no blocks of this library: compile it with torch.compile")
    for module in regions:
        module._compiled_call_impl = partial(call_region, module)
    return model


def call_region(module: Region, x: Tensor, *rest: Any) -> Tensor:
    """Calls a region's compiled code; compiles it at the first call for a map, scan and mode."""
    if torch.compiler.is_compiling():  # part of a larger graph
        return module._call_impl(x, *rest)
    torch._dynamo.mark_static(x, list(range(1, x.ndim)))
    scans = tuple((plan.scan.scan, plan.scan.backends) for plan in rest if isinstance(plan, AttentionPlan))
    variant = type(module), tuple(x.shape[1:]), scans, describe_mode(module, x)
    compiled = compile_region(variant, any_batch=x.device.type == "cpu")
    with raise_compilation_errors(instead="leave s3a.compile_model out: the model runs without it too"):
        return compiled(module, x, *rest)


def describe_mode(module: nn.Module, x: Tensor) -> Hashable:
    """All that dynamo compiles anew for, besides shapes."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return module.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), x.device, x.dtype, autocast


@cache_results(maxsize=4096)
def compile_region(variant: tuple[Any, ...], any_batch: bool) -> Callable[..., Tensor]:
    """The compiled code of a kind of region on one map in one mode; only the batch size varies under it.

    Args:
        variant: class, shape without the batch, scans with their backends, and mode: code of its own for each.
        any_batch: see `compile_copy`.
    """
    kind, shape, *_ = variant
    name = f"{kind.__name__.lower()}_{'x'.join(map(str, shape))}"
    return compile_copy(call_module, name, any_batch=any_batch)


def call_module(module: nn.Module, *arguments: Any) -> Tensor:
    """What is compiled: the module's forward, with its hooks."""
    return module._call_impl(*arguments)
