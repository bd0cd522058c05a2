"""Compilation in place, region by region: blocks that do the same share one piece of code."""

import warnings
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from s3a.nn.layers import Region
from s3a.nn.s3a import AttentionPlan
from s3a.support.caches import cache_results
from s3a.support.compiler import (
    TooManyVariantsError,
    carries_hooks,
    compile_copy,
    fix_size,
    has_global_hooks,
    is_replica,
    is_transformed,
    raise_compilation_errors,
)

ModelT = TypeVar("ModelT", bound=nn.Module)


def compile_model(model: ModelT) -> ModelT:
    """Compiles a model of this library in place, and returns it. State-dict keys stay as they are; copies are compiled.

    Nothing is compiled yet when this returns: a region is compiled at its first call for a map size. Blocks of one
    class with the same scan on the same map share their code. On a CPU a second batch size compiles once more, with the
    batch size left open, and later ones never. On other devices code is compiled anew where a batch size breaks an
    assumption of the code before it, as that there are at least 16 images.

    Hooks of a region run outside of its code. A region runs uncompiled under `torch.func`, forward-mode derivatives and
    tracers, on the meta device, as a replica of DataParallel, in training on a single image of a few tokens; and, with
    a warning, while a module inside of it has hooks, and where it meets more kinds of input than are compiled for.

    Raises:
        ValueError: for a model without blocks of this library.
        CompilationError: at the first call, where the machine cannot compile; says why.
    """
    regions = [module for module in model.modules() if isinstance(module, Region)]
    if not regions:
        raise ValueError(f"{type(model).__name__} has no blocks of this library: compile it with torch.compile")
    for module in regions:
        module.run_compiled = run_compiled
    return model


def run_compiled(module: Region, x: Tensor, *rest: Any) -> Tensor:
    """Runs a region's compiled code; compiles it at the first call for a map, scan and mode."""
    if torch.compiler.is_compiling() or must_run_eagerly(module, x):  # the first: as part of a larger graph
        return module.transform(x, *rest)
    if any(map(carries_hooks, module.children())):
        words = f"a {type(module).__name__} runs uncompiled while modules inside of it have hooks"
        warnings.warn(words, RuntimeWarning, stacklevel=2)
        return module.transform(x, *rest)
    compiled = compile_region(describe_call(module, x, rest), any_batch=x.device.type == "cpu")
    fix_size(x, first=1)
    try:
        with raise_compilation_errors(instead="leave s3a.compile_model out: the model runs without it too"):
            y = compiled(module, x, *rest)
    except TooManyVariantsError as error:
        module.run_compiled = None
        warnings.warn(f"a {type(module).__name__} runs uncompiled from here on: {error}", RuntimeWarning, stacklevel=2)
        return module.transform(x, *rest)
    if y.requires_grad:
        y.register_hook(refuse_second_order)
    return y


def refuse_second_order(gradient: Tensor) -> None:
    """A hook of compiled code's results: RuntimeError where its backward would itself be differentiated."""
    if torch.is_grad_enabled():  # in a backward: with create_graph=True
        raise RuntimeError(
            "create_graph=True differentiates twice, for which compiled code has no derivative: leave "
            's3a.compile_model out, and build the model with backend="reference"'
        )


def must_run_eagerly(module: Region, x: Tensor) -> bool:
    """Whether compiled code would leave something out, or cannot be: see `compile_model`."""
    # The third: batch norm refuses to train on a single value, by a guard that code for any batch size has not.
    return (
        not isinstance(x, Tensor)  # a proxy of torch.fx
        or torch.jit.is_tracing()
        or (module.training and x.shape[0] == 1 and max(x.shape[1:3]) <= 2)
        or x.device.type == "meta"
        or is_replica(module)
        or is_transformed()
        or has_global_hooks()
    )


def describe_call(module: Region, x: Tensor, rest: tuple[Any, ...]) -> Hashable:
    """What a call has code of its own for: the class, shapes without the batch, plan, and mode."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    plan = rest[0].scan.number if rest and isinstance(rest[0], AttentionPlan) else None
    processes = torch.distributed.group.WORLD if torch.distributed.is_available() else None  # of batch norms
    mode = module.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast
    return type(module), tuple(x.shape)[1:], plan, x.device, x.dtype, mode, processes


@cache_results(maxsize=1024)
def compile_region(call: tuple[Any, ...], any_batch: bool) -> Callable[..., Tensor]:
    """The compiled code of a kind of region on one map in one mode; only the batch size varies under it.

    Args:
        call: what `describe_call` returned.
        any_batch: see `compile_copy`.
    """
    kind, shape, *_ = call
    return compile_copy(transform, f"{kind.__name__.lower()}_{'x'.join(map(str, shape))}", any_batch=any_batch)


def transform(module: Region, *arguments: Any) -> Tensor:
    """What is compiled: what the region does, without its hooks."""
    return module.transform(*arguments)
