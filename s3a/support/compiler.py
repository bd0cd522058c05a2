"""What this library asks of torch.compile, and of PyTorch's private side.

Own code for every kind of call, no silent fallback, failures that say why; and tensors that outlive the call, the mode
and the trace in which they were made.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from types import FunctionType
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.utils._python_dispatch import _disable_current_modes

NUMBERS = count()
MOST_VARIANTS = 8  # of compiled code for one code object, torch's own limit


class CompilationError(RuntimeError):
    """torch.compile failed on this machine; says why, and what runs without it."""


# --------------------------------------------------------------------------------------------------------
# Compiled code
# --------------------------------------------------------------------------------------------------------


def compile_copy(function: Callable[..., Any], name: str, *, any_batch: bool = False) -> Callable[..., Any]:
    """Compiles a copy of a function, as one graph, under a code object and a name of its own.

    Dynamo counts recompilations per code object and gives up after eight, and makes dynamic by name what it sees
    vary. With a copy for each kind of call, what varies under one is little and known.

    Args:
        function: one without a closure.
        name: for logs; a number is added.
        any_batch: whether code with an open batch size serves all batch sizes. For functions of which only the batch
            size varies, on a CPU.
    """
    name = f"{name}_{next(NUMBERS)}"
    copy = FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    if any_batch:
        return torch.compile(copy, fullgraph=True, options={"guard_filter_fn": drop_shape_conditions})
    return torch.compile(copy, fullgraph=True)


def drop_shape_conditions(guards: Sequence[Any]) -> list[bool]:
    """Which guards to keep: all but the conditions on open sizes.

    On a CPU these are two: at least 2, since sizes of 1 broadcast, which images never do; and up to 15 or from 16
    on, by which PyTorch foresees the layout that a convolution returns, channels-last here in either case.
    """
    return [guard.guard_type != "SHAPE_ENV" for guard in guards]


@contextmanager
def raise_compilation_errors(instead: str) -> Iterator[None]:
    """Turns failures of compiled code that is called inside into a `CompilationError`.

    Past its limit of recompilations dynamo raises here. Left alone, it would run eager (and flex_attention dense) from
    there on and say little; importing timm.optim raises the limit for all.

    Args:
        instead: what the user can do that needs no compiler.

    Raises:
        CompilationError: with the cause and the remedy.
    """
    try:
        with torch._dynamo.config.patch(recompile_limit=MOST_VARIANTS, fail_on_recompile_limit_hit=True):
            yield
    except (RuntimeError, FailOnRecompileLimitHit) as error:
        reason = diagnose(error)
        if reason is None:
            raise
        raise CompilationError(f"torch.compile failed here: {reason}; or {instead}") from error


def diagnose(error: Exception) -> str | None:
    """Cause and remedy of a failed compilation; None for an error of another kind."""
    story = f"{type(error).__name__}: {error}"  # names the errors inside it too
    first_line = str(error).strip().partition("\n")[0]
    if isinstance(error, FailOnRecompileLimitHit):
        return f"one function met more than {MOST_VARIANTS} kinds of input; s3a.clear_caches() lets it begin anew"
    if "InvalidCxxCompiler" in story:
        return "there is no working C++ compiler; install g++ or clang, or set CXX to one"
    if "CppCompileError" in story:
        return "the C++ compiler refused the generated code; install a current g++ or clang, or set CXX to one"
    if "out of resource" in story:
        return f"the GPU has too little shared memory for a kernel ({first_line}); use a smaller head dim"
    return first_line if isinstance(error, TorchDynamoException) else None


# --------------------------------------------------------------------------------------------------------
# Tensors of plans
# --------------------------------------------------------------------------------------------------------


@contextmanager
def make_plain_tensors() -> Iterator[None]:
    """Tensors made inside are real ones, whatever mode the caller is in, so that they can be cached.

    An inference-mode tensor could not be saved for a later backward, and a fake or traced one is gone when
    its trace is.
    """
    with torch.inference_mode(False), _disable_current_modes():
        yield


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device; compiled code takes its size as a constant."""
    return fix_size(torch.from_numpy(np.ascontiguousarray(array)).to(device))


def fix_size(tensor: Tensor) -> Tensor:
    """The same tensor, whose size compiled code takes as a constant."""
    torch._dynamo.mark_static(tensor)
    return tensor
