"""VVT: "Vicinity Vision Transformer" (arXiv 2206.10552; official code: OpenNLPLab/Vicinity-Vision-Transformer).

Shapes: images [batch, in_chans, height, width], tokens [batch, height, width, dim] channels-last inside, in
attention [batch, heads, tokens, head_dim] with the tokens in row-major order.
"""

import operator
import re
from collections.abc import Callable
from functools import partial
from math import pi
from typing import Any

import torch
from einops import rearrange
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from s3a.models.backbone import (
    Backbone,
    ResidualBlock,
    Stage,
    check_arguments,
    create_backbone,
    init_linear,
    make_default_cfg,
    spread_drop_path,
)
from s3a.nn.layers import DepthwiseConv, Pointwise, Region, lay_channels_last
from s3a.support.caches import cache_results
from s3a.support.compiler import make_plain_tensors
from s3a.weights.official import KeyTable, filter_official

# The drop path rates are the published ones.
SIZES: dict[str, dict[str, Any]] = {
    "vvt_nano": {
        "dims": (32, 64, 160),
        "depths": (2, 3, 1),
        "num_heads": (1, 2, 5),
        "mlp_ratios": (8, 4, 4),
        "drop_path_rate": 0.0,
    },
    "vvt_tiny": {
        "dims": (96, 160, 320, 512),
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 5, 8),
        "mlp_ratios": (8, 8, 4, 4),
        "drop_path_rate": 0.1,
    },
    "vvt_small": {
        "dims": (96, 160, 320, 512),
        "depths": (3, 3, 9, 3),
        "num_heads": (1, 2, 5, 8),
        "mlp_ratios": (8, 8, 4, 4),
        "drop_path_rate": 0.3,
    },
    "vvt_medium": {
        "dims": (96, 160, 320, 512),
        "depths": (3, 3, 27, 3),
        "num_heads": (1, 2, 5, 8),
        "mlp_ratios": (8, 8, 4, 4),
        "drop_path_rate": 0.3,
    },
    "vvt_large": {
        "dims": (96, 160, 320, 512),
        "depths": (4, 4, 36, 4),
        "num_heads": (1, 2, 5, 8),
        "mlp_ratios": (4, 4, 4, 4),
        "drop_path_rate": 0.3,
    },
}

CITATION = """\
@article{sun2022vicinity,
  title   = {Vicinity Vision Transformer},
  author  = {Sun, Weixuan and Qin, Zhen and Deng, Hui and Wang, Jianyuan and Zhang, Yi and Zhang, Kaihao and
             Barnes, Nick and Birchfield, Stan and Kong, Lingpeng and Zhong, Yiran},
  journal = {arXiv preprint arXiv:2206.10552},
  year    = {2022},
  url     = {https://arxiv.org/abs/2206.10552}
}"""

SMALLEST, LARGEST = 1e-4, 1e4  # magnitudes that attention clamps its numbers to


@cache_results(maxsize=256)
def build_vicinity(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weights of every token's place: [tokens, 4, 1], the cosine and sine of its row angle and its column angle.

    The row angle is pi / 2 * row / height, the column angle pi / 2 * column / width. The dot product of two tokens'
    weights is then cos(da) + cos(db) of the differences of their angles: 2 for the same place, less the farther apart.
    On a map of 4 x 4, one row apart gives cos(pi / 8) + 1 = 1.92, three rows and three columns 2 cos(3 pi / 8) = 0.77.
    Built at the first call for its arguments, and cached.
    """
    with make_plain_tensors():
        rows = torch.arange(height, dtype=torch.float64)[:, None].expand(-1, width) / height
        columns = torch.arange(width, dtype=torch.float64).expand(height, -1) / width
        angles = pi / 2 * torch.stack([rows, columns], dim=-1)  # [height, width, 2]
        weights = torch.stack([angles.cos(), angles.sin()], dim=-1)  # [height, width, 2, 2]
        weights = rearrange(weights, "h w angle part -> (h w) (angle part) 1")
        return weights.to(device=device, dtype=dtype)


@torch.compiler.assume_constant_result
def look_up_vicinity(*arguments: Any) -> Tensor:
    """The result of `build_vicinity`, which tracers treat as a constant."""
    return build_vicinity(*arguments)


def clamp_magnitude(x: Tensor) -> Tensor:
    """The numbers with their absolute values clamped to [1e-4, 1e4]; signs stay, and zeros stay zero."""
    return x.sign() * x.abs().clamp(SMALLEST, LARGEST)


class VicinityAttention(nn.Module):
    """Linear attention that weighs keys by cos(da) + cos(db), so that near keys count more than distant ones.

    Time and memory grow with the number of tokens, not with its square: the weight of a pair is a product of the
    weights of both tokens (`build_vicinity`), so one sum over keys and values serves all queries.

    Args:
        dim: channels of a token.
        num_heads: attention heads, which split the reduced channels.
        reduction: of the channels of queries, keys and values.

    Shape:
        [batch, height, width, dim] to the same.

    Raises:
        ValueError: for a reduction and heads that do not divide the dim.
    """

    def __init__(self, dim: int, num_heads: int, *, reduction: int = 2) -> None:
        super().__init__()
        if min(dim, num_heads, reduction) < 1 or dim % (reduction * num_heads):
            raise ValueError(
                f"dim is {dim}, num_heads is {num_heads} and reduction is {reduction}: "
                "reduction * num_heads must divide the dim"
            )
        self.dim, self.num_heads = dim, num_heads
        self.q_proj = Pointwise(dim, dim // reduction)
        self.k_proj = Pointwise(dim, dim // reduction)
        self.v_proj = Pointwise(dim, dim // reduction)
        self.out_proj = Pointwise(dim // reduction, dim)
        # the feature-preserving connection
        self.gate = nn.Sequential(
            nn.Linear(dim, dim, bias=False), nn.ReLU(), nn.Linear(dim, dim, bias=False), nn.Sigmoid()
        )

    def plan(self, x: Tensor) -> Tensor:
        """The weights of all places on x's map; cached for the process."""
        # as plain integers, so that a tracer cannot leave the size of the map open
        height, width = operator.index(x.shape[1]), operator.index(x.shape[2])
        return look_up_vicinity(height, width, x.device, torch.promote_types(x.dtype, torch.float32))

    def forward(self, x: Tensor, plan: Tensor | None = None) -> Tensor:
        """Attends between all tokens.

        Args:
            plan: what `self.plan(x)` returned; None looks it up.
        """
        plan = self.plan(x) if plan is None else plan
        query, key, value = (
            rearrange(projected, "b h w (heads d) -> b heads (h w) d", heads=self.num_heads)
            for projected in (self.q_proj(x).relu(), self.k_proj(x).relu(), self.v_proj(x))
        )
        query, key = weigh_by_place(query, plan), weigh_by_place(key, plan)
        context = clamp_magnitude(key.mT @ value)  # [batch, heads, 4 * head_dim, head_dim]
        # the total is positive, so clamping it clamps its reciprocal, also where half precision overflows
        total = (query @ key.sum(2).unsqueeze(3) + 1e-4).clamp(SMALLEST, LARGEST)  # [batch, heads, tokens, 1]
        attended = clamp_magnitude(clamp_magnitude(query @ context) / total)  # [batch, heads, tokens, head_dim]
        attended = rearrange(attended, "b heads (h w) d -> b h w (heads d)", h=x.shape[1])
        out = clamp_magnitude(self.out_proj(attended))
        return clamp_magnitude(out + out * self.gate(x.mean((1, 2)))[:, None, None])


def weigh_by_place(x: Tensor, weights: Tensor) -> Tensor:
    """Four copies of each head's features, weighed by place: [batch, heads, tokens, 4 * head_dim]."""
    return (x.unsqueeze(3) * weights).flatten(3).to(x.dtype)


class DepthwiseFFN(nn.Module):
    """A feed-forward network: pointwise expansion, depthwise convolution, GELU, pointwise projection."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Pointwise(dim, hidden_dim)
        self.dwconv = DepthwiseConv(hidden_dim, 3)
        self.act = nn.GELU()
        self.fc2 = Pointwise(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class VicinityBlock(ResidualBlock):
    """A block of VVT: vicinity attention, DepthwiseFFN; both residual."""

    def __init__(self, attn: VicinityAttention, mlp_ratio: float, drop_path: float) -> None:
        dim = attn.dim
        super().__init__(
            norm1=nn.LayerNorm(dim, eps=1e-6),
            attn=attn,
            norm2=nn.LayerNorm(dim, eps=1e-6),
            mlp=DepthwiseFFN(dim, int(dim * mlp_ratio)),
            drop_path=drop_path,
        )


class PatchEmbed(Region):
    """Turns overlapping patches of images [batch, channels, height, width] into normed tokens; sizes are rounded up."""

    def __init__(self, in_chans: int, dim: int, *, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(dim)

    def transform(self, x: Tensor) -> Tensor:
        x = self.proj(lay_channels_last(x))
        return self.norm(x.permute(0, 2, 3, 1))


class PatchMerging(PatchEmbed):
    """The same for tokens: halves their map and changes their width."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(dim, out_dim, kernel_size=3, stride=2)

    def transform(self, x: Tensor) -> Tensor:
        return super().transform(x.permute(0, 3, 1, 2))


class VVT(Backbone):
    """The Vicinity Vision Transformer, with timm's model contract.

    Takes images of any size from 32 x 32 pixels, square or not. Every stage ends with a LayerNorm, so its map is
    normalised.

    Args:
        num_classes: classes of the head; 0 for no classifier.
        in_chans: channels of the images.
        global_pool: "avg", or "" to keep the map.
        dims, depths, num_heads, mlp_ratios: a number for each stage.
        reduction: of the channels of queries, keys and values.
        drop_rate: dropout in front of the classifier.
        drop_path_rate: rate of stochastic depth of the last block; rises linearly from 0 at the first.

    Raises:
        ValueError: for sizes that make no network (see `VicinityAttention`), and in `forward` for images of less than
            32 pixels or with other channels.
    """

    citation = CITATION

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (96, 160, 320, 512),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        mlp_ratios: tuple[float, ...] = (8, 8, 4, 4),
        reduction: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        tables = {"depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios}
        check_arguments(dims, tables, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        stages = []
        for index, (dim, rates) in enumerate(zip(dims, spread_drop_path(drop_path_rate, depths), strict=True)):
            blocks = [
                VicinityBlock(
                    VicinityAttention(dim, num_heads[index], reduction=reduction),
                    mlp_ratio=mlp_ratios[index],
                    drop_path=rate,
                )
                for rate in rates
            ]
            downsample = PatchMerging(dims[index - 1], dim) if index else nn.Identity()
            stages.append(Stage(downsample, blocks, norm=nn.LayerNorm(dim, eps=1e-6)))
        super().__init__(
            stem=PatchEmbed(in_chans, dims[0], kernel_size=7, stride=4),
            stages=stages,
            head_hidden_size=None,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.initialise(init_weights)


def init_weights(module: nn.Module) -> None:
    """Initialises a linear layer by a truncated normal of std 0.02, a convolution by its fan-out; zero biases."""
    init_linear(module)
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=(2 * module.groups / module.weight[:, 0].numel()) ** 0.5)
        assert module.bias is not None
        nn.init.zeros_(module.bias)


def rename_stage(ours: str) -> Callable[[re.Match[str]], str]:
    """A function from the match of an official key to ours, for `re.sub`; official stages are counted from 1."""
    return lambda match: match.expand(ours.replace("STAGE", str(int(match[1]) - 1)))


# Keys of official checkpoints, and which keys of ours they become.
OFFICIAL_KEYS = KeyTable(
    renamed=(
        (r"patch_embed1\.(.+)", r"stem.\1"),
        (r"patch_embed(\d+)\.(.+)", rename_stage(r"stages.STAGE.downsample.\2")),
        (r"block(\d+)\.(\d+)\.(norm[12]\..+)", rename_stage(r"stages.STAGE.blocks.\2.\3")),
        (r"block(\d+)\.(\d+)\.attn\.([qkv]_proj|out_proj)\.(.+)", rename_stage(r"stages.STAGE.blocks.\2.attn.\3.\4")),
        (r"block(\d+)\.(\d+)\.attn\.se_fc\.(.+)", rename_stage(r"stages.STAGE.blocks.\2.attn.gate.\3")),
        (r"block(\d+)\.(\d+)\.mlp\.(fc[12]\..+)", rename_stage(r"stages.STAGE.blocks.\2.mlp.\3")),
        (r"block(\d+)\.(\d+)\.mlp\.dwconv\.dwconv\.(.+)", rename_stage(r"stages.STAGE.blocks.\2.mlp.dwconv.\3")),
        (r"norm(\d+)\.(.+)", rename_stage(r"stages.STAGE.norm.\2")),
        (r"(head\..+)", r"\1"),
    ),
)
checkpoint_filter_fn = partial(filter_official, table=OFFICIAL_KEYS)


def create_vvt(name: str, pretrained: bool, **model_args: Any) -> VVT:
    """The VVT of a row of the table of sizes; arguments override the row."""
    return create_backbone(VVT, name, pretrained, checkpoint_filter_fn, **{**SIZES[name], **model_args})


make_vvt_cfg = partial(make_default_cfg, first_conv="stem.proj", license="apache-2.0")
default_cfgs = generate_default_cfgs(
    {
        "vvt_nano": make_vvt_cfg(input_size=(3, 64, 64), pool_size=(4, 4), crop_pct=1.0),
        "vvt_tiny": make_vvt_cfg(),
        "vvt_small": make_vvt_cfg(),
        "vvt_medium": make_vvt_cfg(),
        "vvt_large": make_vvt_cfg(),
    }
)


@register_model
def vvt_nano(pretrained: bool = False, **model_args: Any) -> VVT:
    """A small VVT for images of 32 to 96 pixels: three stages, at about the cost of `ssvit_nano`."""
    return create_vvt("vvt_nano", pretrained, **model_args)


@register_model
def vvt_tiny(pretrained: bool = False, **model_args: Any) -> VVT:
    """VVT-T of the paper; `s3a.published` has its figures."""
    return create_vvt("vvt_tiny", pretrained, **model_args)


@register_model
def vvt_small(pretrained: bool = False, **model_args: Any) -> VVT:
    """VVT-S of the paper; `s3a.published` has its figures."""
    return create_vvt("vvt_small", pretrained, **model_args)


@register_model
def vvt_medium(pretrained: bool = False, **model_args: Any) -> VVT:
    """VVT-M of the paper; `s3a.published` has its figures."""
    return create_vvt("vvt_medium", pretrained, **model_args)


@register_model
def vvt_large(pretrained: bool = False, **model_args: Any) -> VVT:
    """VVT-L of the paper; `s3a.published` has its figures."""
    return create_vvt("vvt_large", pretrained, **model_args)
