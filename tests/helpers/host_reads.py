"""What a program asks of tensors that makes the host wait for a device, seen on a CPU."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from s3a.training import trainer

ATEN = torch.ops.aten
# Their results have a size or a value that only the device knows.
WAITING_OPERATORS = {
    ATEN._local_scalar_dense.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN.equal.default,
    ATEN._unique2.default,
    ATEN.repeat_interleave.Tensor,
}
# Methods that read a tensor; on a CPU some of them call no operator.
WAITING_METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.__array__}


class OperatorWatch(TorchDispatchMode):
    """Notes the operators that the host would wait for."""

    def __init__(self, noted: list[str]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in WAITING_OPERATORS:
            self.noted.append(str(operator))
        return operator(*args, **(kwargs or {}))


class MethodWatch(TorchFunctionMode):
    """Notes the methods that the host would wait for."""

    def __init__(self, noted: list[str]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in WAITING_METHODS:
            self.noted.append(function.__name__)
        return function(*args, **(kwargs or {}))


def watch_steps(patch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the host would wait for in each optimizer step that follows, from its forward to the end of the update."""
    steps: list[list[str]] = []
    watching = ExitStack()
    forward_backward: Callable[..., Any] = trainer.forward_backward
    build_run: Callable[..., Any] = trainer.build_run

    def begin(*arguments: Any) -> Any:
        steps.append([])
        watching.enter_context(MethodWatch(steps[-1]))
        watching.enter_context(OperatorWatch(steps[-1]))
        return forward_backward(*arguments)

    def build(*arguments: Any) -> Any:
        run = build_run(*arguments)
        run.optimizer.optimizer.register_step_post_hook(lambda *_: watching.close())
        return run

    patch.setattr(trainer, "forward_backward", begin)
    patch.setattr(trainer, "build_run", build)
    return steps
