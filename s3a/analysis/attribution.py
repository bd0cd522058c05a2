"""Where a model with sparse scans looked: the anchors, and their reference windows, that contributed to a class.

In each head of a block of S3A, let B be the attention weights of the local pass and A those of the anchor pass, v the
values, and y the class's logit:

    u_j = sum_k B_jk v_k        what anchor j saw in its reference window
    o_i = sum_j A_ij u_j        what query i saw through its anchors

Relevance is attention weighted with the gradient: the share of the logit's first-order change that comes this way.

    of anchor j and its window:         r_j  = sum_heads sum_i A_ij <dy/do_i, u_j>
    of token k inside that window:      r_jk = sum_heads B_jk <dy/du_j, v_k>,   where dy/du_j = sum_i A_ij dy/do_i

So it adds up: sum_k r_jk = r_j, and sum_j r_j = sum_i <dy/do_i, o_i> over the heads. It is positive where what was seen
speaks for the class, negative where it speaks against. dy/do is the whole gradient of what comes after, while the
block's own weights A and B count as constants: activations times gradients, as in Grad-CAM (arXiv 1610.02391), and
attention times gradients (arXiv 2103.15679). Blocks with the same scan on the same map are added.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from s3a.attention.backends import tiled
from s3a.attention.plan import lay_out_scan
from s3a.geometry import Neighborhood, find_passes
from s3a.nn.s3a import S3A

ITSELF = Neighborhood((1, 1))  # stands for a pass that a scan leaves out


@dataclass(frozen=True, eq=False)
class ScanRelevance:
    """The relevance of anchors and tokens, summed over all blocks with one scan.

    Attributes:
        local, anchor: the scan's passes.
        anchors: [height, width], r_j of every token as an anchor, with its window.
        tokens: [height, width], sum_j r_jk of every token as a part of windows.
    """

    local: Neighborhood
    anchor: Neighborhood
    anchors: Tensor
    tokens: Tensor


@dataclass(frozen=True, eq=False)
class Attribution:
    """Where a model looked for a class, on one of its maps.

    Attributes:
        height, width: the map, in tokens.
        stride: pixels of the network's image from token to token. Token (row, column) stands for the square that
            begins at the pixel (row * stride, column * stride); its convolutions also read around it.
        scans: one for each scan that runs on this map.
        logits: [classes].
    """

    height: int
    width: int
    stride: int
    scans: tuple[ScanRelevance, ...]
    logits: Tensor


@dataclass(frozen=True, eq=False)
class BlockCall:
    """What one S3A computed.

    Attributes:
        qkv: [1, height, width, 3 * dim], what its first layer returned.
        mixed: [1, height, width, dim], what its last layer was given.
    """

    attention: S3A
    qkv: Tensor
    mixed: Tensor

    @property
    def map_size(self) -> tuple[int, int]:
        """Height and width, in tokens."""
        return self.mixed.shape[1], self.mixed.shape[2]

    @property
    def passes(self) -> tuple[Neighborhood | None, Neighborhood | None]:
        """The local and the anchor pass; None for one that is left out."""
        attention = self.attention
        return find_passes(*self.map_size, attention.size, attention.fixed, attention.passes)


@torch.enable_grad()
def attribute(model: nn.Module, image: Tensor, label: int | None = None) -> Attribution:
    """The relevance of anchors and tokens for a class, on the deepest map on which all scans have both passes.

    Deeper maps know more of the class; but where windows or anchors shrink to a single token, nothing is left to
    choose. For an image so small that no map has both, the finest is taken. The model is left as it is.

    Args:
        model: a classifier with S3A in it, such as SSViT; compiled or not.
        image: [1, channels, height, width], prepared as the model wants it.
        label: the class; None is the one with the highest logit.

    Raises:
        ValueError: for a model without sparse scans, classes or gradients, or a class that it does not know.
    """
    check_explicable(model)
    with record_calls(model) as calls:
        logits = model(image.detach().requires_grad_())[0]  # a gradient also where the weights are frozen
        label = int(logits.argmax()) if label is None else label
        if not 0 <= label < len(logits):
            raise ValueError(f"label is {label}: it must be from 0 to {len(logits) - 1}, the classes of this model")
        height, width = choose_map(calls)
        chosen = [call for call in calls if call.map_size == (height, width)]
        return Attribution(
            height=height,
            width=width,
            stride=find_stride(model, image, height, width),
            scans=tuple(sum_by_scan(chosen, find_gradients(logits[label], chosen))),
            logits=logits.detach(),
        )


def check_explicable(model: nn.Module) -> None:
    """Raises ValueError for a model without anchors, or without a logit per class."""
    name = type(model).__name__
    if not any(isinstance(module, S3A) for module in model.modules()):
        raise ValueError(f"{name} has no sparse scans, so no anchors to show: use a model with S3A, such as SSViT")
    if getattr(model, "num_classes", 0) < 1 or getattr(model, "global_pool", "avg") == "":
        raise ValueError(f"this {name} gives no logit per class: build it with num_classes and pooling")


@contextmanager
def record_calls(model: nn.Module) -> Iterator[list[BlockCall]]:
    """Inside, the model is in evaluation mode, and what every S3A computes is added to a list as it runs.

    Compiled code would run without the hooks, so nothing is compiled; and flex_attention uncompiled would hold the
    scores of all tokens against all, so every S3A attends by tiles, whatever its backend.
    """
    calls: list[BlockCall] = []
    projected: dict[nn.Module, Tensor] = {}

    def add_hooks(attention: S3A) -> list[RemovableHandle]:
        def after_first_layer(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            projected[attention.proj] = output

        def before_last_layer(module: nn.Module, inputs: tuple[Tensor]) -> None:
            calls.append(BlockCall(attention, projected.pop(module), *inputs))

        return [
            attention.qkv.register_forward_hook(after_first_layer),
            attention.proj.register_forward_pre_hook(before_last_layer),
        ]

    was_training = model.training
    attentions = [module for module in model.modules() if isinstance(module, S3A)]
    backends = [(each.backend, each.kernel_options) for each in attentions]
    hooks = [hook for each in attentions for hook in add_hooks(each)]
    try:
        with torch.compiler.set_stance("force_eager"):
            model.eval()
            for each in attentions:
                each.backend, each.kernel_options = "tiled", ()
            yield calls
    finally:
        model.train(was_training)
        for each, (backend, kernel_options) in zip(attentions, backends, strict=True):
            each.backend, each.kernel_options = backend, kernel_options
        for hook in hooks:
            hook.remove()


def choose_map(calls: list[BlockCall]) -> tuple[int, int]:
    """The deepest map on which every scan has both passes; the finest where there is none."""
    has_both: dict[tuple[int, int], bool] = {}
    for call in calls:
        has_both[call.map_size] = has_both.get(call.map_size, True) and None not in call.passes
    return next((size for size in reversed(has_both) if has_both[size]), next(iter(has_both)))


def find_gradients(logit: Tensor, calls: list[BlockCall]) -> list[Tensor]:
    """The logit's gradients, with respect to what the last layer of each S3A was given.

    Raises:
        ValueError: where something in the model passes no gradients on.
    """
    mixed = [call.mixed for call in calls]
    found = torch.autograd.grad(logit, mixed, allow_unused=True) if logit.requires_grad else ()
    gradients = [gradient for gradient in found if gradient is not None]
    if len(gradients) < len(calls):
        raise ValueError("these weights pass no gradients on, as some quantized ones do: use the float weights")
    return gradients


def find_stride(model: nn.Module, image: Tensor, height: int, width: int) -> int:
    """Pixels from token to token, by the model's own description of its maps (timm's feature_info)."""
    feature_info: Sequence[dict[str, Any]] = getattr(model, "feature_info", ())
    for stride in (int(entry["reduction"]) for entry in feature_info):
        if (height, width) == tuple(math.ceil(side / stride) for side in image.shape[-2:]):
            return stride
    raise ValueError(f"no entry of {type(model).__name__}.feature_info is of a map of {height} x {width} tokens")


def sum_by_scan(calls: list[BlockCall], gradients: list[Tensor]) -> Iterator[ScanRelevance]:
    """The relevance of each scan among the blocks on one map, summed over the blocks that have it."""
    by_scan: dict[tuple[Neighborhood, Neighborhood], list[tuple[Tensor, Tensor]]] = {}
    for call, gradient in zip(calls, gradients, strict=True):
        local, anchor = call.passes
        passes = (local or ITSELF, anchor or ITSELF)
        by_scan.setdefault(passes, []).append(attribute_block(call, gradient, passes))
    for (local, anchor), parts in by_scan.items():
        anchors, tokens = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        yield ScanRelevance(local=local, anchor=anchor, anchors=anchors, tokens=tokens)


def attribute_block(
    call: BlockCall, gradient: Tensor, passes: tuple[Neighborhood, Neighborhood]
) -> tuple[Tensor, Tensor]:
    """The relevance of a block's anchors and of its tokens, each [height, width].

    Args:
        gradient: of the logit, with respect to what S3A's last layer was given; attention is one of its two summands,
            so it is dy/do too. [1, height, width, dim].
    """
    attention, (height, width) = call.attention, call.map_size
    query, key, value = (part.detach() for part in attention.split_heads(call.qkv, attention.plan(call.mixed)))
    plan = lay_out_scan(passes, height, width, value.device, ("tiled", "tiled"))
    scale = attention.head_dim**-0.5
    value.requires_grad_()
    seen = tiled.attend(query, key, value, plan.passes[0].layout, scale)  # u, [1, tokens, heads, head_dim]
    attended = tiled.attend(query, key, seen, plan.passes[1].layout, scale)  # o
    to_seen, to_value = torch.autograd.grad(attended, (seen, value), gradient.reshape(attended.shape))
    anchors, tokens = (to_seen * seen).sum((0, 2, 3)), (to_value * value).sum((0, 2, 3))
    return anchors.detach().view(height, width), tokens.detach().view(height, width)
