"""What this library asks of torch.compile, and all that it uses of PyTorch's private side.

Own code for every kind of call, no silent fallback, failures that say why; and tensors that outlive the call, the mode
and the trace in which they were made.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from types import FunctionType
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = ["TorchDispatchMode"]  # for the rest of the library, which takes it from here as it is

NUMBERS = count()
# Without these instructions of the processor, oneDNN's product of bytes would overflow, or be slow.
MULTIPLIES_BYTES = torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
MOST_VARIANTS = 64  # of compiled code for one code object, where torch.compile takes a limit; its own is 8
TAKES_LIMIT = "recompile_limit" in inspect.signature(torch.compile).parameters


class CompilationError(RuntimeError):
    """torch.compile failed on this machine; says why, and what runs without it."""


class TooManyVariantsError(CompilationError):
    """A function met more kinds of input than are compiled for."""


class NoCompilerError(CompilationError):
    """This machine lacks what torch.compile needs, whatever it is to compile."""


# --------------------------------------------------------------------------------------------------------
# Compiled code
# --------------------------------------------------------------------------------------------------------


def compile_copy(function: Callable[..., Any], name: str, *, any_batch: bool = False) -> Callable[..., Any]:
    """Compiles a copy of a function, as one graph, under a code object and a name of its own.

    Dynamo counts recompilations per code object and gives up after some, and makes dynamic by name what it sees
    vary. With a copy for each kind of call, what varies under one is little and known.

    Args:
        function: one without a closure.
        name: for logs; a number is added.
        any_batch: whether code with an open batch size serves all batch sizes. For functions of which only the batch
            size varies, on a CPU.
    """
    name = f"{name}_{next(NUMBERS)}"
    copy = FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    settings: dict[str, Any] = {"recompile_limit": MOST_VARIANTS} if TAKES_LIMIT else {}
    if any_batch:
        settings["options"] = {"guard_filter_fn": drop_shape_conditions}
    return torch.compile(copy, fullgraph=True, **settings)


def drop_shape_conditions(guards: Sequence[Any]) -> list[bool]:
    """Which guards to keep: all but the conditions on open sizes.

    On a CPU these are two: at least 2, since sizes of 1 broadcast, which images never do, and since batch norm refuses
    to train on one value (`nn.compilation` sees to that); and up to 15 or from 16 on, by which PyTorch foresees the
    layout that a convolution returns, channels-last here in either case.
    """
    return [guard.guard_type != "SHAPE_ENV" for guard in guards]


@contextmanager
def compile_whole_regions() -> Iterator[None]:
    """Inside, what is compiled in the forward of DistributedDataParallel is one graph, as everywhere else.

    By itself dynamo cuts a graph wherever a MiB of its parameters is together, for gradients to be sent meanwhile.
    Regions are small enough for that as they are.
    """
    with torch._dynamo.config.patch(optimize_ddp=False):
        yield


@contextmanager
def raise_compilation_errors(instead: str) -> Iterator[None]:
    """Turns failures of compiled code that is called inside into a `CompilationError`.

    Args:
        instead: what the user can do that needs no compiler.

    Raises:
        TooManyVariantsError: past the limit of recompilations, where dynamo raises what says little.
        NoCompilerError: where the machine cannot compile anything.
        CompilationError: for another failure; with the cause and the remedy.
    """
    try:
        yield
    except FailOnRecompileLimitHit as error:
        raise TooManyVariantsError(
            "one function met more kinds of input than torch.compile makes code for; s3a.clear_caches() lets it begin "
            f"anew, or {instead}"
        ) from error
    except RuntimeError as error:
        lack, reason = find_lack(error), diagnose(error)
        if lack is not None:
            raise NoCompilerError(f"torch.compile failed here: {lack}; or {instead}") from error
        if reason is None:
            raise
        raise CompilationError(f"torch.compile failed here: {reason}; or {instead}") from error


def find_lack(error: Exception) -> str | None:
    """What the machine lacks for compiling anything, and the remedy; None for an error of another kind."""
    story = f"{type(error).__name__}: {error}"  # names the errors inside it too
    lacks = {
        "InvalidCxxCompiler": "there is no working C++ compiler; install g++ or clang, or set CXX to one",
        "Failed to find C compiler": "Triton finds no C compiler; install gcc or clang, or set CC to one",
        "TritonMissing": "there is no working Triton; install the one that this version of PyTorch names",
        "GPUTooOldForTriton": "the GPU is too old for Triton",
    }
    return next((remedy for name, remedy in lacks.items() if name in story), None)


def diagnose(error: Exception) -> str | None:
    """Cause and remedy of a failed compilation; None for an error of another kind."""
    story = f"{type(error).__name__}: {error}"  # names the errors inside it too
    first_line = str(error).strip().partition("\n")[0]
    if "CppCompileError" in story:
        return "the C++ compiler refused the generated code; install a current g++ or clang, or set CXX to one"
    if "out of resource" in story:
        return f"the GPU has too little shared memory for a kernel ({first_line}); use a smaller head dim"
    return first_line if isinstance(error, TorchDynamoException) else None


# --------------------------------------------------------------------------------------------------------
# What compiled code does not see
# --------------------------------------------------------------------------------------------------------


def is_transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) or a level of forward-mode derivatives is around.

    In a trace too: dynamo takes the depth of the stack as a constant.
    """
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0 or torch.autograd.forward_ad._current_level >= 0


def has_global_hooks() -> bool:
    """Whether hooks are registered that every module calls, as by `register_module_forward_hook`."""
    return bool(torch_module._has_any_global_hook())


def carries_hooks(module: nn.Module) -> bool:
    """Whether a module or one inside of it has hooks, which dynamo neither runs in shared code nor guards."""
    own = module.__dict__  # attribute access of modules takes most of the time of this
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    return any(child is not None and carries_hooks(child) for child in own["_modules"].values())


def is_replica(module: nn.Module) -> bool:
    """Whether a module was made by `nn.DataParallel` for another device; it runs in a thread of its own."""
    return "_is_replica" in module.__dict__


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


def fix_size(tensor: Tensor, first: int = 0) -> Tensor:
    """The same tensor, whose size from an axis on compiled code takes as a constant.

    That of a tensor that is made while dynamo traces, as a plan may be, too: there `torch._dynamo.mark_static` would
    look for it in the graph. So this sets what that sets elsewhere.
    """
    tensor._dynamo_static_indices = set(range(first, tensor.ndim))  # type: ignore[attr-defined]
    tensor._has_dynamo_dim_marking = True  # type: ignore[attr-defined]
    return tensor
