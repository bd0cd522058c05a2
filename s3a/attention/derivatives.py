"""Derivatives that fused attention does not have: refused with the remedy, instead of PyTorch's word for a kernel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from s3a.support.compiler import is_transformed

MISSING = (
    "fused attention has first derivatives by backward alone, none of higher order or in forward mode: use "
    'backend="reference", which has all'
)


@contextmanager
def explain_missing_derivatives(*tensors: Tensor) -> Iterator[None]:
    """Says what to do where attention of these tensors, called inside, is differentiated as its kernels cannot be.

    Args:
        tensors: which no one else has, since a hook stays on them.

    Raises:
        NotImplementedError: for derivatives in forward mode; and later, in a backward through a backward.
    """
    kernels = torch.backends.cuda  # of a CPU too; what is left where they are off has all derivatives
    fused = kernels.flash_sdp_enabled() or kernels.mem_efficient_sdp_enabled() or kernels.cudnn_sdp_enabled()
    for tensor in tensors:
        if fused and tensor.grad_fn is not None and not is_transformed():
            tensor.register_hook(refuse_second_order)
    try:
        yield
    except NotImplementedError as error:
        if "forward AD" not in str(error):
            raise
        raise NotImplementedError(MISSING) from error


def refuse_second_order(gradient: Tensor) -> Tensor | None:
    """A hook: lets the gradient pass, and refuses to differentiate it where create_graph=True asks for that."""
    return FirstOrder.apply(gradient) if torch.is_grad_enabled() else None


class FirstOrder(torch.autograd.Function):
    """What comes in, without a derivative."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(MISSING)
