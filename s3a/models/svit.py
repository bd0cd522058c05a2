"""SViT: "Vision Transformer with Super Token Sampling" (arXiv 2211.11167; official code: hhb072/STViT).

Shapes: images [batch, in_chans, height, width], tokens [batch, height, width, dim] channels-last inside. Super token
attention cuts the map into rows x columns cells of `pixels` tokens each, and every cell has one super token: a map of
4 x 4 tokens with cells of 2 x 2 has 2 x 2 super tokens, and 4 pixels in each cell.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from s3a.geometry import parse_pair
from s3a.models.backbone import (
    Backbone,
    ResidualBlock,
    Stage,
    check_arguments,
    create_backbone,
    make_default_cfg,
    spread_drop_path,
)
from s3a.nn.layers import ConvFFN, DepthwiseConv, Downsample, Pointwise, Stem
from s3a.weights.official import KeyTable, filter_official

# Stages whose layer scale is a number start it there. The drop path rates are the published ones.
SIZES: dict[str, dict[str, Any]] = {
    "svit_nano": {
        "dims": (32, 64, 128),
        "depths": (3, 3, 2),
        "num_heads": (2, 4, 8),
        "super_token_sizes": (4, 2, 1),
        "mlp_ratio": 3,
        "layer_scale": (None, None, None),
        "drop_path_rate": 0.0,
        "head_hidden_size": 256,
    },
    "svit_small": {
        "dims": (64, 128, 320, 512),
        "depths": (3, 5, 9, 3),
        "num_heads": (1, 2, 5, 8),
        "super_token_sizes": (8, 4, 1, 1),
        "layer_scale": (None, None, None, None),
        "drop_path_rate": 0.1,
    },
    "svit_base": {
        "dims": (96, 192, 384, 512),
        "depths": (4, 6, 14, 6),
        "num_heads": (2, 3, 6, 8),
        "super_token_sizes": (8, 4, 1, 1),
        "layer_scale": (None, None, 1e-6, 1e-6),
        "drop_path_rate": 0.4,
    },
    "svit_large": {
        "dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (2, 3, 7, 10),
        "super_token_sizes": (8, 4, 1, 1),
        "layer_scale": (None, None, 1e-6, 1e-6),
        "drop_path_rate": 0.4,
    },
}

CITATION = """\
@article{huang2022vision,
  title   = {Vision Transformer with Super Token Sampling},
  author  = {Huang, Huaibo and Zhou, Xiaoqiang and Cao, Jie and He, Ran and Tan, Tieniu},
  journal = {arXiv preprint arXiv:2211.11167},
  year    = {2022},
  url     = {https://arxiv.org/abs/2211.11167}
}"""

# From a cell to itself and its eight neighbours, whose super tokens its pixels see.
OFFSETS = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))


def shift(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Maps [batch, rows, columns, ...] moved down and right, with zeros in the places that become free."""
    return F.pad(maps, (0, 0, columns, -columns, rows, -rows))


def unfold(supers: Tensor) -> Tensor:
    """The super tokens of every cell and its neighbours, zeros outside of the map: [batch, rows, columns, 9, dim].

    On a map of 4 x 4 cells, cell (0, 0) gets five zeros and the super tokens of (0, 0), (0, 1), (1, 0) and (1, 1).
    """
    return torch.stack([shift(supers, -row, -column) for row, column in OFFSETS], dim=3)


def fold(parts: Tensor) -> Tensor:
    """The sum of what all cells hold for each super token, the transpose of `unfold`: [batch, rows, columns, dim]."""
    moved = [shift(part, row, column) for part, (row, column) in zip(parts.unbind(3), OFFSETS, strict=True)]
    return torch.stack(moved).sum(0)


def associate(cells: Tensor) -> tuple[Tensor, Tensor]:
    """How much of every pixel belongs to each of the nine super tokens that it sees, which start as means of cells.

    Args:
        cells: [batch, rows, columns, pixels, dim].

    Returns:
        affinity: [batch, rows, columns, pixels, 9], with a sum of 1 for every pixel.
        mass: [batch, rows, columns, 1], the sum of all affinities to every super token.
    """
    around = unfold(cells.mean(3))
    affinity = (cells @ around.mT * cells.shape[-1] ** -0.5).softmax(-1)
    return affinity, fold(affinity.sum(3).unsqueeze(-1))


class SuperTokenAttention(nn.Module):
    """Super token attention: pools pixels into super tokens, lets these attend to each other, and spreads the result.

    A pixel sees the super tokens of its cell and its neighbours alone, so the association is nine numbers a pixel.

    Args:
        dim: channels of a token.
        num_heads: attention heads between super tokens.
        super_token_size: tokens of a cell a side, an int or a (height, width) pair; 1 for attention between all tokens.

    Shape:
        [batch, height, width, dim] to the same.

    Raises:
        ValueError: for heads that do not divide the dim, or a cell size below 1.
    """

    def __init__(self, dim: int, num_heads: int, *, super_token_size: int | tuple[int, int]) -> None:
        super().__init__()
        if min(dim, num_heads) < 1 or dim % num_heads:
            raise ValueError(f"dim is {dim} and num_heads is {num_heads}: the heads must divide the dim")
        self.dim, self.num_heads = dim, num_heads
        self.super_token_size = parse_pair(super_token_size, "super_token_size")
        self.qkv = Pointwise(dim, 3 * dim)
        self.proj = Pointwise(dim, dim)

    def plan(self, x: Tensor) -> None:
        """None: super token attention needs to know nothing of the map."""

    def forward(self, x: Tensor, plan: None = None) -> Tensor:
        if self.super_token_size == (1, 1):
            return self.attend(x)
        h, w = self.super_token_size
        padded = F.pad(x, (0, 0, 0, -x.shape[2] % w, 0, -x.shape[1] % h))  # whole cells
        cells = rearrange(padded, "b (rows h) (columns w) d -> b rows columns (h w) d", h=h, w=w)
        affinity, mass = associate(cells.detach())
        supers = fold(affinity.mT @ cells) / (mass + 1e-12)  # [batch, rows, columns, dim]
        cells = affinity @ unfold(self.attend(supers))
        spread = rearrange(cells, "b rows columns (h w) d -> b (rows h) (columns w) d", h=h, w=w)
        return spread[:, : x.shape[1], : x.shape[2]]

    def attend(self, x: Tensor) -> Tensor:
        """Multi-head self-attention between all tokens of [batch, height, width, dim]."""
        heads = rearrange(self.qkv(x), "b h w (heads three d) -> three b heads (h w) d", three=3, heads=self.num_heads)
        attended = F.scaled_dot_product_attention(*heads.unbind())
        return self.proj(rearrange(attended, "b heads (h w) d -> b h w (heads d)", h=x.shape[1]))


class SuperTokenBlock(ResidualBlock):
    """A block of SViT: depthwise position encoding, super token attention, ConvFFN behind a BatchNorm; all residual."""

    def __init__(
        self, attn: SuperTokenAttention, mlp_ratio: float, drop_path: float, layer_scale: float | None
    ) -> None:
        dim = attn.dim
        super().__init__(
            pos_conv=DepthwiseConv(dim, 3),
            norm1=nn.LayerNorm(dim, eps=1e-6),
            attn=attn,
            norm2=nn.BatchNorm2d(dim),
            mlp=ConvFFN(dim, int(dim * mlp_ratio)),
            drop_path=drop_path,
            layer_scale=layer_scale,
        )

    def feed_forward(self, x: Tensor) -> Tensor:
        normed = self.norm2(rearrange(x, "b h w d -> b d h w"))
        return self.mlp(rearrange(normed, "b d h w -> b h w d"))


class SViT(Backbone):
    """The Super Token Vision Transformer, with timm's model contract.

    Takes images of any size from 32 x 32 pixels, square or not.

    Args:
        num_classes: classes of the head; 0 for no classifier.
        in_chans: channels of the images.
        global_pool: "avg", or "" to keep the map.
        dims, depths, num_heads: a number for each stage.
        super_token_sizes: for each stage, the tokens of a cell a side; see `SuperTokenAttention`.
        mlp_ratio: hidden width of the feed-forward networks, as a multiple of the dim.
        layer_scale: for each stage its initial value, or None for no layer scale.
        head_hidden_size: width of the pointwise layer in front of the classifier.
        drop_rate: dropout in front of the classifier.
        drop_path_rate: rate of stochastic depth of the last block; rises linearly from 0 at the first.

    Raises:
        ValueError: for sizes that make no network (see `SuperTokenAttention`), and in `forward` for images of less than
            32 pixels or with other channels.
    """

    citation = CITATION

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (3, 5, 9, 3),
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        super_token_sizes: tuple[int | tuple[int, int], ...] = (8, 4, 1, 1),
        mlp_ratio: float = 4,
        layer_scale: tuple[float | None, ...] = (None, None, None, None),
        head_hidden_size: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        tables = {
            "depths": depths,
            "num_heads": num_heads,
            "super_token_sizes": super_token_sizes,
            "layer_scale": layer_scale,
        }
        check_arguments(dims, tables, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        stages = []
        for index, (dim, rates) in enumerate(zip(dims, spread_drop_path(drop_path_rate, depths), strict=True)):
            blocks = [
                SuperTokenBlock(
                    SuperTokenAttention(dim, num_heads[index], super_token_size=super_token_sizes[index]),
                    mlp_ratio=mlp_ratio,
                    drop_path=rate,
                    layer_scale=layer_scale[index],
                )
                for rate in rates
            ]
            stages.append(Stage(Downsample(dims[index - 1], dim) if index else nn.Identity(), blocks))
        super().__init__(
            stem=Stem(in_chans, dims[0], norm_last=True),
            stages=stages,
            head_hidden_size=head_hidden_size,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )


# Keys of official checkpoints, and which keys of ours they become.
OFFICIAL_KEYS = KeyTable(
    renamed=(
        (r"patch_embed\.proj\.(\d+)\.(.+)", r"stem.\1.\2"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.pos_embed\.conv\.(.+)", r"stages.\1.blocks.\2.pos_conv.\3"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.norm1\.norm\.(.+)", r"stages.\1.blocks.\2.norm1.\3"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.norm2\.(.+)", r"stages.\1.blocks.\2.norm2.\3"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.stoken_refine\.(.+)", r"stages.\1.blocks.\2.attn.\3"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.mlp2\.(fc[12]\..+)", r"stages.\1.blocks.\2.mlp.\3"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.mlp2\.conv\.conv\.(.+)", r"stages.\1.blocks.\2.mlp.dwconv.\3"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.gamma_([12])", r"stages.\1.blocks.\2.ls\3.gamma"),
        (
            r"layers\.(\d+)\.downsample\.proj\.0\.(.+)",
            lambda match: f"stages.{int(match[1]) + 1}.downsample.reduction.{match[2]}",
        ),
        (
            r"layers\.(\d+)\.downsample\.proj\.1\.(.+)",
            lambda match: f"stages.{int(match[1]) + 1}.downsample.norm.{match[2]}",
        ),
        (r"((?:proj|norm|head)\..+)", r"\1"),
    ),
    dropped=(r"layers\.\d+\.blocks\.\d+\.attn\.(?:fold|unfold)\.weights",),  # constant one-hot kernels
)
checkpoint_filter_fn = partial(filter_official, table=OFFICIAL_KEYS)


def create_svit(name: str, pretrained: bool, **model_args: Any) -> SViT:
    """The SViT of a row of the table of sizes; arguments override the row."""
    return create_backbone(SViT, name, pretrained, checkpoint_filter_fn, **{**SIZES[name], **model_args})


default_cfgs = generate_default_cfgs(
    {
        "svit_nano": make_default_cfg(input_size=(3, 64, 64), pool_size=(4, 4), crop_pct=1.0),
        "svit_small": make_default_cfg(),
        "svit_base": make_default_cfg(),
        "svit_large": make_default_cfg(),
    }
)


@register_model
def svit_nano(pretrained: bool = False, **model_args: Any) -> SViT:
    """A small SViT for images of 32 to 96 pixels: three stages, at about the cost of `ssvit_nano`."""
    return create_svit("svit_nano", pretrained, **model_args)


@register_model
def svit_small(pretrained: bool = False, **model_args: Any) -> SViT:
    """SViT-S of the paper; `s3a.published` has its figures."""
    return create_svit("svit_small", pretrained, **model_args)


@register_model
def svit_base(pretrained: bool = False, **model_args: Any) -> SViT:
    """SViT-B of the paper; `s3a.published` has its figures."""
    return create_svit("svit_base", pretrained, **model_args)


@register_model
def svit_large(pretrained: bool = False, **model_args: Any) -> SViT:
    """SViT-L of the paper; `s3a.published` has its figures."""
    return create_svit("svit_large", pretrained, **model_args)
