"""What a model costs: its parameters, the multiply-accumulates of one image by two conventions, and pairs per token.

Counted on the meta device: nothing is computed, so a large model costs no more to count than a small one.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from s3a.geometry import Fixed, Passes, sparse_scan
from s3a.nn.s3a import S3A
from s3a.support.compiler import TorchDispatchMode


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Parameters of a model, multiply-accumulates of one image, and (query, key) pairs per token.

    Pairs are counted alike in all families: the multiply-accumulates of the products of attention, divided by the
    2 * channels that scores and values take for one key of a query. For softmax attention this is the number of keys
    that a query is compared with, for linear attention the number of keys at the same cost. Products of padding and of
    association are among them, channels are those of the block's tokens.

    Attributes:
        parameters: how many there are.
        published_gmacs: what the SSViT paper prints as "FLOPs": multiply-accumulates of the convolutions and
            pointwise layers alone, without the products of attention, in units of 2^30.
        gmacs: the whole count, in units of 10^9: the layers, and the scores and values of every attention. For
            S3A these are the (query, key) pairs of its scans; for other attentions the matrix products that run,
            with those of the association for super tokens. The SViT and VVT papers print this count, up to 1 % higher,
            because they count norms as well.
        pairs_per_token: the mean over the blocks with attention, weighed by their tokens times channels; 0 for a model
            without attention.
        first_stage_pairs_per_token: that of the blocks whose tokens have the shape of the first one's.
    """

    parameters: int
    published_gmacs: float
    gmacs: float
    pairs_per_token: float
    first_stage_pairs_per_token: float


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
        pairs_per_token=find_pairs_per_token(counter.blocks),
        first_stage_pairs_per_token=find_pairs_per_token(
            [each for each in counter.blocks if each.shape == counter.blocks[0].shape]
        ),
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


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """A block with attention.

    Attributes:
        shape: of its tokens, [1, height, width, channels] or however the model lays out one image.
        macs: multiply-accumulates of the products of its attention.
    """

    shape: torch.Size
    macs: int


def find_pairs_per_token(blocks: list[BlockCost]) -> float:
    """The mean number of keys of a query by the products of these blocks; 0 for no blocks."""
    return sum(each.macs for each in blocks) / max(1, sum(2 * each.shape.numel() for each in blocks))


def count_scan_macs(tokens: Tensor, size: int, fixed: Fixed, passes: Passes) -> int:
    """Multiply-accumulates of the scores and values of all (query, key) pairs of a scan on the tokens' map."""
    _, height, width, dim = tokens.shape
    return 2 * dim * sum(each.count_pairs(height, width) for each in sparse_scan(height, width, size, fixed, passes))


class MacCounter(TorchDispatchMode):
    """Counts the multiply-accumulates of everything that is computed inside its `with` block.

    Args:
        model: a copy, whose S3A will attend by no pass at all: its pairs follow from the geometry, and what a backend
            gathers and masks besides them is not the model's cost.

    Attributes:
        macs: counts by kind. "layers" are convolutions and products with parameters, "scans" the pairs of S3A,
            "products" all other matrix products.
        blocks: the blocks with attention that ran, which are modules whose attention is called `attn`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()
        self.blocks: list[BlockCost] = []
        self.products_before: list[int] = []  # of the blocks that run, the innermost last
        self.weights = {identify_storage(parameter) for parameter in model.parameters()}
        for module in model.modules():
            if isinstance(module, S3A):
                module.register_forward_hook(partial(self.count_scan, (module.size, module.fixed, module.passes)))
                module.size, module.fixed, module.passes = 1, "window", "local"  # a window of one token: no pass
                module.backend, module.kernel_options = None, ()  # one that takes the meta device
            if isinstance(getattr(module, "attn", None), nn.Module):
                module.register_forward_pre_hook(self.enter_block)
                module.register_forward_hook(self.leave_block)

    def count_scan(self, scan: tuple[int, Fixed, Passes], module: nn.Module, args: Any, output: Tensor) -> None:
        """A hook: counts the pairs of a scan that was left out."""
        self.macs["scans"] += count_scan_macs(output, *scan)

    def enter_block(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A hook: remembers which products came before the block."""
        self.products_before.append(self.macs["scans"] + self.macs["products"])

    def leave_block(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A hook: notes the block's own products."""
        macs = self.macs["scans"] + self.macs["products"] - self.products_before.pop()
        self.blocks.append(BlockCost(shape=args[0].shape, macs=macs))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        operator = func.overloadpacket
        if operator in flop_registry:
            weighted = any(identify_storage(tensor) in self.weights for tensor in args if isinstance(tensor, Tensor))
            is_layer = weighted or operator is torch.ops.aten.convolution
            flops = flop_registry[operator](*args, **(kwargs or {}), out_val=output)
            self.macs["layers" if is_layer else "products"] += flops // 2
        return output


def identify_storage(tensor: Tensor) -> int:
    """A number that a tensor shares with its views alone; the meta device has no addresses."""
    return tensor.untyped_storage()._cdata
