"""How this library compiles: own code for every kind of call, no silent fallback, failures that say why."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from types import FunctionType
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.exc import TorchDynamoException

NUMBERS = count()


class CompilationError(RuntimeError):
    """torch.compile failed on this machine; says why, and what runs without it."""


def compile_own(function: Callable[..., Any], name: str, *, any_batch: bool = False) -> Callable[..., Any]:
    """Compiles a copy of a function, as one graph, under a code object and a name of its own.

    Dynamo counts recompilations per code object and gives up after eight, and makes dynamic by name what it sees
    vary. With a copy for each kind of call, what varies under one is little and known.

    Args:
        function: one without a closure.
        name: for logs; a number is added.
        any_batch: code with an open batch size serves all of them. For functions of which only the batch size
            varies, on a CPU.
    """
    name = f"{name}_{next(NUMBERS)}"
    copy = FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    options = {"guard_filter_fn": without_shape_conditions} if any_batch else None
    return torch.compile(copy, fullgraph=True, options=options)


def without_shape_conditions(guards: Sequence[Any]) -> list[bool]:
    """Keeps every guard but the conditions on open sizes.

    On a CPU these are two: at least 2, since sizes of 1 broadcast, which images never do; and up to 15 or from 16
    on, by which PyTorch foresees the layout that a convolution returns, channels-last here in either case.
    """
    return [guard.guard_type != "SHAPE_ENV" for guard in guards]


@contextmanager
def compiling(instead: str) -> Iterator[None]:
    """Around calls of compiled code: past its limit of recompilations dynamo raises, and failures are worded for users.

    Left alone, dynamo would run eager (and flex_attention dense) from there on and say little; importing timm.optim
    raises the limit for all.

    Args:
        instead: what the user can do that needs no compiler.

    Raises:
        CompilationError: with the cause and the remedy.
    """
    try:
        with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
            yield
    except RuntimeError as error:
        reason = diagnosis(error)
        if reason is None:
            raise
        raise CompilationError(f"torch.compile failed here: {reason}; or {instead}") from error


def diagnosis(error: RuntimeError) -> str | None:
    """Cause and remedy of a failed compilation; None for an error of another kind."""
    story = f"{type(error).__name__}: {error}"  # names the errors inside it too
    first_line = str(error).strip().partition("\n")[0]
    if "InvalidCxxCompiler" in story:
        return "there is no working C++ compiler; install g++ or clang, or set CXX to one"
    if "CppCompileError" in story:
        return "the C++ compiler refused the generated code; install a current g++ or clang, or set CXX to one"
    if "out of resource" in story:
        return f"the GPU has too little shared memory for a kernel ({first_line}); use a smaller head dim"
    return first_line if isinstance(error, TorchDynamoException) else None
