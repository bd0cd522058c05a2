"""Reordering of tokens whose gradient is a reordering too.

The gradient of `index_select` is added up index by index, in case one was taken twice: by atomics on CUDA, in an order
that differs from run to run. A permutation takes every token once, so its gradient is the gather by the inverse order.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from s3a.support.compiler import is_transformed


def permute_tokens(tensor: Tensor, order: Tensor, inverse: Tensor, axis: int, padding: int = 0) -> Tensor:
    """`tensor.index_select(axis, order)`; the gradient is gathered by `inverse`, and scatters nothing.

    Args:
        order: [new tokens] int64, the index at which each token of the result stands in the tensor. Further copies of
            a token may follow the permutation, as padding; what they would add to its gradient is left out.
        inverse: [tokens but for padding] int64, the index at which each token of the tensor stands in the result.
        padding: tokens at the end of the tensor that the result leaves out; their gradient is 0.
    """
    trains = torch.is_grad_enabled() and tensor.requires_grad and not torch.compiler.is_exporting()
    if trains and not is_transformed():  # transforms derive for themselves, from operators alone
        permuted: Tensor = Permutation.apply(tensor, order, inverse, axis, padding)
        return permuted
    return tensor.index_select(axis, order)


class Permutation(torch.autograd.Function):
    """`permute_tokens` where a gradient is asked for."""

    @staticmethod
    def forward(tensor: Tensor, order: Tensor, inverse: Tensor, axis: int, padding: int) -> Tensor:
        return tensor.index_select(axis, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, int], output: Tensor) -> None:
        _, _, inverse, ctx.axis, ctx.padding = inputs
        ctx.save_for_backward(inverse)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        gathered = gradient.index_select(ctx.axis, inverse)
        if ctx.padding:
            behind = gradient.ndim - 1 - ctx.axis
            gathered = pad(gathered, (*(0, 0) * behind, 0, ctx.padding))
        return gathered, None, None, None, None
