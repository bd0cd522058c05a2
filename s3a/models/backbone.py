"""The base of all model families: stages of residual blocks, and timm's model contract around them.

Shapes: images [batch, in_chans, height, width], tokens [batch, height, width, dim] channels-last inside,
maps of `features_only` and `forward_intermediates` [batch, dim, height, width].
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol, TypeVar, cast

import torch
from einops import rearrange
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerScale, trunc_normal_
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s3a.nn.layers import Pointwise, Region
from s3a.nn.stochastic_depth import draw_branch_scales
from s3a.support.errors import UnknownArgumentError, make_unknown_error
from s3a.weights.folder import forget_other_labels
from s3a.weights.pretrained import PretrainedMixin

MIN_IMAGE_SIZE = 32
POOLINGS = ("avg", "")

# Arguments with which timm's models of a fixed image size are built.
INPUT_SIZES = ("img_size", "input_size", "dynamic_img_size", "strict_img_size")
# What timm's factory takes beside the arguments of a model.
BUILDER_ARGUMENTS = frozenset(inspect.signature(build_model_with_cfg).parameters) | {
    "features_only",
    "out_indices",
    "feature_cls",
    "pruned",
}

BackboneT = TypeVar("BackboneT", bound="Backbone")


class Attention(Protocol):
    """What a block needs of its attention, a module on tokens [batch, height, width, dim]."""

    dim: int

    def plan(self, x: Tensor) -> Any:
        """Everything that it needs to know of the map of tokens x; None if that is nothing."""

    def __call__(self, x: Tensor, plan: Any) -> Tensor:
        """Attends between the tokens x, by what `plan(x)` returned."""


class ResidualBlock(Region):
    """Attention and a feed-forward network, both residual; a residual position encoding may come first.

    Args:
        attn: the attention, a module.
        mlp: the feed-forward network.
        norm1, norm2: the norms in front of attn and mlp.
        drop_path: rate of stochastic depth of both branches.
        pos_conv: the position encoding.
        layer_scale: the initial value of both layer scales; None for no layer scale.
    """

    def __init__(
        self,
        *,
        attn: Attention,
        mlp: nn.Module,
        norm1: nn.Module,
        norm2: nn.Module,
        drop_path: float,
        pos_conv: nn.Module | None = None,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.pos_conv = pos_conv
        self.norm1 = norm1
        self.attn = attn
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(attn.dim, layer_scale)
        self.norm2 = norm2
        self.mlp = mlp
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(attn.dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def transform(self, x: Tensor, plan: Any = None, branch_scales: Tensor | None = None) -> Tensor:
        """Transforms tokens.

        Args:
            plan: what `attn.plan` returned.
            branch_scales: [2, batch, 1, 1, 1], see `draw_branch_scales`; None drops nothing.
        """
        if self.pos_conv is not None:
            x = x + self.pos_conv(x)
        attended = self.ls1(self.attn(self.norm1(x), plan))
        x = x + (attended if branch_scales is None else branch_scales[0] * attended)
        fed = self.ls2(self.feed_forward(x))
        return x + (fed if branch_scales is None else branch_scales[1] * fed)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The feed-forward network behind its norm."""
        return self.mlp(self.norm2(x))


@register_notrace_module  # plans depend on the map's size, which torch.fx does not know
class Stage(nn.Module):
    """A sequence of blocks of one width on one map.

    Blocks get their plans and the factors of stochastic depth as arguments: so equal blocks share compiled code.

    Args:
        downsample: in front of the blocks; an identity in the first stage, whose map comes from the stem.
        blocks: of one width, one at least.
        norm: behind the blocks.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[ResidualBlock], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = cast("Sequence[ResidualBlock]", nn.ModuleList(blocks))
        self.norm = nn.Identity() if norm is None else norm
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        rates = tuple(float(block.drop_path.drop_prob or 0) for block in self.blocks)
        drops = self.training and any(rates)
        scales = draw_branch_scales(rates, x) if drops else [None] * len(rates)
        for block, branch_scales in zip(self.blocks, scales, strict=True):
            plan = block.attn.plan(x)
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, plan, branch_scales, use_reentrant=False)
            else:
                x = block(x, plan, branch_scales)
        return self.norm(x)


class Backbone(PretrainedMixin):
    """A network of a stem, stages and a classifier, with timm's model contract.

    Takes images of any size from 32 x 32 pixels, square or not. A family's constructor builds the stem and the stages
    by its table of sizes, and initialises all weights.

    Args:
        stem: turns images into tokens, a quarter as many a side (rounded up).
        stages: each but the first halves the map.
        head_hidden_size: width of a pointwise layer in front of the pooling; None for no such layer.
        num_classes: classes of the head; 0 for no classifier.
        in_chans: channels of the images.
        global_pool: "avg", or "" to keep the map.
        drop_rate: dropout in front of the classifier.
    """

    output_fmt = "NHWC"
    citation = ""  # of the paper, in BibTeX

    def __init__(
        self,
        *,
        stem: nn.Module,
        stages: Sequence[Stage],
        head_hidden_size: int | None,
        num_classes: int,
        in_chans: int,
        global_pool: str,
        drop_rate: float,
    ) -> None:
        super().__init__()
        dims = [stage.blocks[0].attn.dim for stage in stages]
        self.in_chans, self.num_features = in_chans, dims[-1]
        self.head_hidden_size = head_hidden_size or self.num_features
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**index, "module": f"stages.{index}"} for index, dim in enumerate(dims)
        ]
        self.stem = stem
        self.stages = cast("Sequence[Stage]", nn.ModuleList(stages))
        self._no_split_modules = [type(stages[0].blocks[0]).__name__]  # for Accelerate: FSDP shards each one apart

        self.proj: nn.Module = Pointwise(dims[-1], head_hidden_size) if head_hidden_size else nn.Identity()
        self.norm: nn.Module = nn.BatchNorm2d(head_hidden_size) if head_hidden_size else nn.Identity()
        self.act: nn.Module = nn.SiLU() if head_hidden_size else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head_pruned = False
        self.reset_classifier(num_classes, global_pool)

    def initialise(self, init_module: Callable[[nn.Module], None]) -> None:
        """Initialises each module by a function; not on the meta device, where that would take most of the time."""
        if not next(self.parameters()).is_meta:
            self.apply(init_module)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: none beside 1-d ones, which optimizer factories exempt anyway."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into groups for layer-wise learning rates: the stem, then stages or blocks."""
        norms = [(rf"^stages\.({index})\.norm", (len(stage.blocks) - 1,)) for index, stage in enumerate(self.stages)]
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), *norms]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training computes the activations of blocks again for the backward, instead of keeping them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def set_drop_path(self, rate: float) -> None:
        """Sets the rate of stochastic depth of the last block, and those of the others in proportion."""
        blocks = list(chain.from_iterable(stage.blocks for stage in self.stages))
        for block, own_rate in zip(blocks, spread_drop_path(rate, (len(blocks),))[0], strict=True):
            block.drop_path.drop_prob = own_rate

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by one with fresh weights (none for 0 classes), and the pooling if one is given."""
        if global_pool is not None:
            if global_pool not in POOLINGS:
                raise make_unknown_error("global_pool", global_pool, POOLINGS)
            self.global_pool = global_pool
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}: it must be 0 (no classifier) or more")
        if self.head_pruned:
            raise ValueError("the head was pruned: build the model anew for another classifier")
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes:
            weight = next(self.stages[0].parameters())
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)
        self.head.apply(init_linear)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's tokens: [batch, height, width, num_features], 1/32 of the image a side (nano: 1/16)."""
        check_images(x, self.in_chans)
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [batch, num_classes] of last-stage tokens, or the pooled [batch, head_hidden_size] before them."""
        x = self.act(self.norm(self.proj(x).permute(0, 3, 1, 2)))  # [batch, head_hidden_size, height, width]
        if self.global_pool == "avg":
            x = self.head_drop(x.mean((2, 3)))
            return x if pre_logits else self.head(x)
        x = self.head_drop(x.permute(0, 2, 3, 1))  # [batch, height, width, head_hidden_size]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps at the end of stages, as [batch, dim, height, width] and with the last tokens in front.

        Args:
            indices: of the stages; an int for that many of the last ones, None for all.
            norm: without effect, for timm's sake: no norm follows the stages, and a norm inside of one always runs.
            stop_early: whether to leave out the stages after the last index.
            output_fmt: "NCHW", or "NHWC" for [batch, height, width, dim].
            intermediates_only: whether to return the maps alone, not (last tokens, maps).
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise make_unknown_error("output_fmt", output_fmt, ("NCHW", "NHWC"))
        check_images(x, self.in_chans)
        taken, last = feature_take_indices(len(self.stages), indices)
        maps = []
        x = self.stem(x)
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if index in taken:
                maps.append(rearrange(x, "b h w d -> b d h w") if output_fmt == "NCHW" else x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last index, and the head; returns the indices as timm resolves them."""
        taken, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.proj = self.norm = self.act = nn.Identity()
            self.head = nn.Identity()
            self.num_classes, self.head_pruned = 0, True
        return taken


@register_notrace_function
def check_images(x: Tensor, in_chans: int) -> None:
    """Raises ValueError for images with a shape that the network cannot take."""
    if x.ndim != 4 or x.shape[1] != in_chans or x.shape[0] == 0:
        raise ValueError(
            f"images have shape {tuple(x.shape)}: they must be [batch, {in_chans}, height, width], one at least; "
            "build the model with in_chans= for other channels"
        )
    if min(x.shape[2:]) < MIN_IMAGE_SIZE:
        raise ValueError(
            f"images are {x.shape[2]} x {x.shape[3]} pixels: each side must be at least {MIN_IMAGE_SIZE}; "
            "resize or pad them"
        )


def check_arguments(
    dims: tuple[int, ...], tables: dict[str, tuple[Any, ...]], *, in_chans: int, drop_rate: float, drop_path_rate: float
) -> None:
    """Raises ValueError if a table of sizes lacks an entry for a stage, or a number is out of its range."""
    if in_chans < 1 or not 0 <= drop_rate <= 1 or not 0 <= drop_path_rate <= 1:
        raise ValueError(
            f"in_chans is {in_chans}, drop_rate {drop_rate}, drop_path_rate {drop_path_rate}: "
            "channels must be at least 1, and rates between 0 and 1"
        )
    for name, table in tables.items():
        if len(table) != len(dims):
            raise ValueError(f"{name} is {table} and dims is {dims}: each must have an entry for every stage")
    if not dims or min(tables["depths"]) < 1:
        raise ValueError(
            f"dims is {dims} and depths is {tables['depths']}: one stage at least, each of one block or more"
        )


def spread_drop_path(last: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates of stochastic depth, stage by stage: linear over all blocks, from 0 at the first one to `last`.

    `spread_drop_path(0.4, (2, 3))` is `[[0, 0.1], [0.2, 0.3, 0.4]]`, up to rounding.
    """
    total = sum(depths)
    rates = iter([last * index / max(total - 1, 1) for index in range(total)])
    return [[next(rates) for _ in range(depth)] for depth in depths]


def init_linear(module: nn.Module) -> None:
    """Initialises a linear layer: truncated normal weights of std 0.02, zero biases."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def create_backbone(
    family: type[BackboneT],
    name: str,
    pretrained: bool,
    checkpoint_filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
    **model_args: Any,
) -> BackboneT:
    """A model of a family, made by timm's factory; its arguments say how many stages it has.

    Raises:
        UnknownArgumentError: for an argument that neither the family nor the factory knows.
        RuntimeError: for pretrained=True where no weights are known, as timm raises it, and with what helps.
    """
    check_names(family, name, model_args)
    try:
        model = build_model_with_cfg(
            family,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": tuple(range(len(model_args["dims"]))), "feature_cls": "getter"},
            **model_args,
        )
    except RuntimeError as error:
        if str(error).startswith("No pretrained weights exist"):
            raise RuntimeError(
                f"No pretrained weights exist for {name} yet: use pretrained=False and train it with recipes/train.py, "
                "or convert its authors' checkpoint with tools/convert_official.py and load that folder"
            ) from error
        raise
    forget_other_labels(model)
    return model


def check_names(family: type[Backbone], name: str, model_args: Mapping[str, Any]) -> None:
    """Raises UnknownArgumentError for an argument of a model that is none; it names the nearest that is."""
    own = [*inspect.signature(family.__init__).parameters][1:]  # without self
    for given in model_args:
        if given in INPUT_SIZES:
            raise UnknownArgumentError(
                f"{name} has no argument {given!r}: it takes images of any size from {MIN_IMAGE_SIZE} x "
                f"{MIN_IMAGE_SIZE} pixels, square or not; leave {given} out"
            )
        if given not in own and given not in BUILDER_ARGUMENTS:
            raise UnknownArgumentError(str(make_unknown_error(f"argument of {name}", given, own)))


def make_default_cfg(**changes: Any) -> dict[str, Any]:
    """timm's description of a model: its preprocessing as published, but for the changes; without hosted weights."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head",
        "license": "mit",
        **changes,
    }
