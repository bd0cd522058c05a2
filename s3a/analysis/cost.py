"""What a model costs: its parameters, and the multiply-accumulates of one image by two conventions.

Counted on the meta device: nothing is computed, so a large model costs no more to count than a small one.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from s3a.nn.s3a import S3A
from s3a.support.compiler import TorchDispatchMode


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Parameters of a model, and multiply-accumulates of one image.

    Attributes:
        parameters: how many there are.
        published_gmacs: what the SSViT paper prints as "FLOPs": multiply-accumulates of the convolutions and
            pointwise layers alone, without the products of attention, in units of 2^30.
        gmacs: the whole count, in units of 10^9: the layers, and the scores and values of every attention. For
            S3A these are the (query, key) pairs of its scans; for other attentions the matrix products that run,
            with those of the association for super tokens. The SViT and VVT papers print this count, up to 1 % higher,
            because they count norms as well.
    """

    parameters: int
    published_gmacs: float
    gmacs: float


def count_cost(model: nn.Module, height: int, width: int) -> Cost:
    """The cost of one image of height x width pixels; the model itself is not changed or moved.

    Raises:
        ValueError: for a size that the model does not take.
    """
    if min(height, width) < 1:
        raise ValueError(f"the size is {height} x {width} pixels: height and width must be positive")
    model = copy_to_meta(model)
    counter = MacCounter(model)
    images = torch.empty(1, count_channels(model), height, width, device="meta")
    try:
        with torch.no_grad(), counter:
            getattr(model, "count_forward", model)(images)  # detectors ask what they found how to go on
    except (AssertionError, RuntimeError) as error:  # how timm's models refuse a size
        name, reason = type(model).__name__, str(error).partition("\n")[0]
        raise ValueError(f"{name} does not take images of {height} x {width} pixels: {reason}") from error
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        published_gmacs=counter.macs["layers"] / 2**30,
        gmacs=sum(counter.macs.values()) / 1e9,
    )


def copy_to_meta(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose tensors have shapes but no memory; of quantized ones, plain tensors."""
    copies: dict[int, Tensor] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        copies[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, copies).eval()


def count_channels(model: nn.Module) -> int:
    """The channels of the model's images: those that its first convolution reads."""
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)


def count_scan_macs(attention: S3A, tokens: Tensor) -> int:
    """Multiply-accumulates of the scores and values of all (query, key) pairs of the scan on the tokens' map."""
    _, height, width, dim = tokens.shape
    return 2 * dim * sum(each.count_pairs(height, width) for each in attention.scan(height, width))


class MacCounter(TorchDispatchMode):
    """Counts the multiply-accumulates of everything that is computed inside its `with` block.

    Attributes:
        macs: counts by kind. "layers" are convolutions and products with parameters, "scans" the pairs of S3A,
            "products" all other matrix products. What a backend of S3A gathers and masks besides its pairs
            is not the model's cost, and is not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()
        self.inside_scan = False
        self.weights = {identify_storage(parameter) for parameter in model.parameters()}
        for module in model.modules():
            if isinstance(module, S3A):
                module.backend, module.kernel_options = None, ()  # one that takes the meta device
                module.register_forward_pre_hook(self.enter_scan)
                module.register_forward_hook(self.leave_scan)

    def enter_scan(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A hook: leaves out what a backend runs, from here on."""
        self.inside_scan = True

    def leave_scan(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """A hook: counts the scan's pairs instead."""
        assert isinstance(module, S3A)
        self.inside_scan = False
        self.macs["scans"] += count_scan_macs(module, output)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        operator = func.overloadpacket
        if operator in flop_registry:
            weighted = any(identify_storage(tensor) in self.weights for tensor in args if isinstance(tensor, Tensor))
            is_layer = weighted or operator is torch.ops.aten.convolution
            if is_layer or not self.inside_scan:
                flops = flop_registry[operator](*args, **(kwargs or {}), out_val=output)
                self.macs["layers" if is_layer else "products"] += flops // 2
        return output


def identify_storage(tensor: Tensor) -> int:
    """A number that a tensor shares with its views alone; the meta device has no addresses."""
    return tensor.untyped_storage()._cdata
