"""SViT: "Vision Transformer with Super Token Sampling" (arXiv 2211.11167; official code: hhb072/STViT).

Shapes: images [batch, in_chans, height, width], tokens [batch, height, width, dim] channels-last inside. In super
token attention the map is cut into rows x columns cells of `pixels` tokens, with one super token each.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from s3a.geometry import parse_pair
from s3a.models.backbone import Backbone, ResidualBlock, Stage, check_arguments, create, default_cfg, drop_path_rates
from s3a.nn.layers import ConvFFN, DepthwiseConv, Downsample, Pointwise, Stem
from s3a.weights.official import KeyTable, filter_official

# Layer scale starts at 1e-6 in the stages where it is a number. The published drop path rate is each size's default.
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

# From a pixel's cell to the nine super tokens that it sees.
OFFSETS = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))


def to_cells(x: Tensor, height: int, width: int) -> Tensor:
    """Cells of height x width tokens: [batch, rows, columns, pixels, dim]; zeros fill the last row and column."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % width, 0, -x.shape[1] % height))
    return x.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3).flatten(3, 4)


def from_cells(cells: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `to_cells`, but for the zeros: [batch, rows * height, columns * width, dim]."""
    return cells.unflatten(3, (height, width)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def shift(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Moves [batch, rows, columns, ...] down and right; what leaves the map is lost, and zeros enter."""
    return F.pad(maps, (0, 0, columns, -columns, rows, -rows))


def unfold(supers: Tensor) -> Tensor:
    """The nine super tokens around every cell, zeros outside of the map: [batch, rows, columns, 9, dim]."""
    return torch.stack([shift(supers, -row, -column) for row, column in OFFSETS], dim=3)


def fold(parts: Tensor) -> Tensor:
    """Adds up what the cells hold for each super token, the transpose of `unfold`: [batch, rows, columns, dim]."""
    moved = [shift(part, row, column) for part, (row, column) in zip(parts.unbind(3), OFFSETS, strict=True)]
    return torch.stack(moved).sum(0)


def associate(cells: Tensor) -> tuple[Tensor, Tensor]:
    """How much of every pixel belongs to each of its nine super tokens, which start as the means of the cells.

    Returns:
        affinity: [batch, rows, columns, pixels, 9]; adds up to 1 for every pixel.
        mass: [batch, rows, columns, 1], the affinities that every super token collects.
    """
    around = unfold(cells.mean(3))
    affinity = (cells @ around.mT * cells.shape[-1] ** -0.5).softmax(-1)
    return affinity, fold(affinity.sum(3).unsqueeze(-1))


class SuperTokenAttention(nn.Module):
    """Super token attention: pixels are pooled to super tokens, these attend to each other, and are spread again.

    A pixel only knows the 3 x 3 super tokens around its cell, so the association is sparse: nine numbers a pixel.

    Args:
        dim: channels of a token.
        num_heads: attention heads between super tokens.
        super_token_size: tokens of a cell, an int or a (row, column) pair; 1 for attention between all tokens.

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
        """Nothing needs to be known of the map beforehand."""

    def forward(self, x: Tensor, plan: None = None) -> Tensor:
        if self.super_token_size == (1, 1):
            return self.attend(x)
        cells = to_cells(x, *self.super_token_size)
        affinity, mass = associate(cells.detach())
        supers = fold(affinity.mT @ cells) / (mass + 1e-12)  # [batch, rows, columns, dim]
        cells = affinity @ unfold(self.attend(supers))
        return from_cells(cells, *self.super_token_size)[:, : x.shape[1], : x.shape[2]]

    def attend(self, x: Tensor) -> Tensor:
        """Multi-head self-attention between all tokens of [batch, height, width, dim]."""
        heads = self.qkv(x).flatten(1, 2).unflatten(2, (self.num_heads, 3, -1))  # [batch, tokens, heads, 3, head_dim]
        query, key, value = heads.transpose(1, 2).unbind(3)  # [batch, heads, tokens, head_dim]
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(x.shape))


class SuperTokenBlock(ResidualBlock):
    """Depthwise position encoding, super token attention, ConvFFN behind a BatchNorm; all residual."""

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

    def feed(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class SViT(Backbone):
    """The Super Token Vision Transformer, with timm's model contract.

    Any input from 32 x 32 pixels up, square or not.

    Args:
        num_classes: classes of the head; 0 for none.
        in_chans: channels of the images.
        global_pool: "avg", or "" to keep the map.
        dims, depths, num_heads: per stage.
        super_token_sizes: per stage, the tokens of a super token's cell; see `SuperTokenAttention`.
        mlp_ratio: hidden width of the feed-forward networks, in dims.
        layer_scale: per stage, the initial value, or None for no layer scale.
        head_hidden_size: width of the pointwise layer in front of the classifier.
        drop_rate: dropout in front of the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.

    Raises:
        ValueError: for anything a table of sizes cannot mean (see `SuperTokenAttention`), and in `forward` for
            images below 32 pixels or with other channels.
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
        for index, (dim, rates) in enumerate(zip(dims, drop_path_rates(drop_path_rate, depths), strict=True)):
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


# Official checkpoints: their key and ours.
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


def svit(name: str, pretrained: bool, **model_args: Any) -> SViT:
    """One row of the table."""
    return create(SViT, name, pretrained, checkpoint_filter_fn, **{**SIZES[name], **model_args})


default_cfgs = generate_default_cfgs(
    {
        "svit_nano": default_cfg(input_size=(3, 64, 64), pool_size=(4, 4), crop_pct=1.0),
        "svit_small": default_cfg(),
        "svit_base": default_cfg(),
        "svit_large": default_cfg(),
    }
)


@register_model
def svit_nano(pretrained: bool = False, **model_args: Any) -> SViT:
    """For images of 32 to 96 pixels: three stages; parameters and cost near `ssvit_nano`'s."""
    return svit("svit_nano", pretrained, **model_args)


@register_model
def svit_small(pretrained: bool = False, **model_args: Any) -> SViT:
    """25 M parameters; 83.6 % top-1 published."""
    return svit("svit_small", pretrained, **model_args)


@register_model
def svit_base(pretrained: bool = False, **model_args: Any) -> SViT:
    """52 M parameters; 84.8 % top-1 published."""
    return svit("svit_base", pretrained, **model_args)


@register_model
def svit_large(pretrained: bool = False, **model_args: Any) -> SViT:
    """95 M parameters; 85.3 % top-1 published."""
    return svit("svit_large", pretrained, **model_args)
