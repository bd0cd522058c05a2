"""Batch normalisation over the images of all processes, which torch.compile can trace.

torch's own SyncBatchNorm runs on GPUs alone, waits for them in every layer, and cannot be traced.
"""

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics in training are those of the images of all processes of the default group.

    What comes out, the gradients and the running statistics are those of one process that has all images, however
    many of them each process has. In evaluation, and where there is one process, it is `nn.BatchNorm2d`.

    Shape:
        [batch, num_features, height, width] to the same; every process has one image at least.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or count_processes() == 1:
            return super().forward(x)
        normalised, mean, variance, count = NormaliseTogether.apply(x, self.weight, self.bias, self.eps)
        if self.running_mean is not None:
            self.update_statistics(mean, variance, count)
        return normalised

    @torch.no_grad()
    def update_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Moves the running statistics towards those of a batch of so many values per channel."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # without a momentum they are plain means over all batches
        momentum = 1 / self.num_batches_tracked if self.momentum is None else torch.full_like(count, self.momentum)
        unbiased = variance * (count / (count - 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(new.to(running.dtype), momentum.to(running.dtype))


class SyncBatchNormAct2d(SyncBatchNorm2d):
    """The same, followed by dropout and activation, for timm's `BatchNormAct2d`."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class NormaliseTogether(torch.autograd.Function):
    """Normalises channels by the mean and variance over all processes: one gathering forward, one sum backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns what is normalised, in x's dtype; mean and (biased) variance [channels]; and how many values [1]."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(exact, dim=(0, 2, 3), correction=0)
        count = torch.full_like(mean[:1], x.numel() / x.shape[1])
        own = torch.cat([mean, variance, count])
        everyone = own.new_empty(count_processes(), len(own))
        dist.all_gather_into_tensor(everyone, own[None])
        means, variances, counts = everyone.split([len(mean), len(mean), 1], dim=1)
        # Chan, Golub and LeVeque, 1983: sums of squares would cancel where the mean is far from 0
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count
        variance = (counts * (variances + (means - mean).square())).sum(0) / count
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.has_bias = eps, bias is not None
        normalised = (exact - spread(mean)) * spread((variance + eps).rsqrt())
        if weight is not None:
            normalised = normalised * spread(weight)
        if bias is not None:
            normalised = normalised + spread(bias)
        ctx.mark_non_differentiable(mean, variance, count)
        return normalised.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        """The gradients of x, of all processes' loss, and of weight and bias, of this process' alone."""
        x, weight, mean, variance, count = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        gradient = gradient.to(mean.dtype)
        normalised = (x.to(mean.dtype) - spread(mean)) * spread(scale)
        of_bias, of_weight = gradient.sum((0, 2, 3)), (gradient * normalised).sum((0, 2, 3))
        sums = torch.cat([of_bias, of_weight])
        dist.all_reduce(sums)
        all_of_bias, all_of_weight = sums.chunk(2)
        of_x = gradient - spread(all_of_bias / count) - normalised * spread(all_of_weight / count)
        of_x = of_x * spread(scale if weight is None else scale * weight)
        return (
            of_x.to(x.dtype),
            None if weight is None else of_weight.to(weight.dtype),
            of_bias.to(mean.dtype) if ctx.has_bias else None,
            None,
        )


def count_processes() -> int:
    """How many processes there are in the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def spread(channels: Tensor) -> Tensor:
    """[channels] as [channels, 1, 1], to stand beside [batch, channels, height, width]."""
    return channels[:, None, None]


SYNCHRONISED: dict[type[nn.Module], type[SyncBatchNorm2d]] = {
    nn.BatchNorm2d: SyncBatchNorm2d,
    BatchNormAct2d: SyncBatchNormAct2d,
}


def synchronise_batch_norm(model: nn.Module) -> None:
    """Makes the batch norms of a model share their statistics among all processes, in place; keys stay as they are.

    Raises:
        ValueError: for a kind of batch norm that cannot, and would go on with statistics of its own.
    """
    for name, module in model.named_modules():
        if type(module) in SYNCHRONISED:
            module.__class__ = SYNCHRONISED[type(module)]
        elif not isinstance(module, SyncBatchNorm2d) and isinstance(
            module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
        ):
            kind = type(module).__name__
            raise ValueError(
                f"{name} is a {kind}: only nn.BatchNorm2d and timm's BatchNormAct2d share statistics among processes; "
                "use --no-sync-batch-norm"
            )
