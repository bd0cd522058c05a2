"""SSViT: the backbone of "Vision Transformer with Sparse Scan Prior" (arXiv 2405.13335).

Shapes: images [batch, in_chans, height, width], tokens [batch, height, width, dim] channels-last inside.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import nn

from s3a.geometry import find_scan_pattern
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
from s3a.nn.layers import ConvFFN, DepthwiseConv, Downsample, Stem
from s3a.nn.s3a import S3A
from s3a.weights.official import KeyTable, filter_official

# Stages whose layer scale is a number start it there. The drop path rates are the published ones.
SIZES: dict[str, dict[str, Any]] = {
    "ssvit_nano": {
        "dims": (32, 64, 128),
        "depths": (2, 2, 2),
        "num_heads": (2, 4, 8),
        "mlp_ratios": (3, 3, 3),
        "layer_scale": (None, None, None),
        "drop_path_rate": 0.0,
        "size": 3,
        "head_hidden_size": 256,
    },
    "ssvit_tiny": {
        "dims": (64, 128, 256, 512),
        "depths": (2, 2, 9, 2),
        "num_heads": (2, 4, 8, 16),
        "mlp_ratios": (4, 4, 3, 3),
        "layer_scale": (None, None, None, None),
        "drop_path_rate": 0.1,
    },
    "ssvit_small": {
        "dims": (64, 128, 256, 512),
        "depths": (3, 5, 18, 4),
        "num_heads": (2, 4, 8, 16),
        "mlp_ratios": (4, 4, 3, 3),
        "layer_scale": (None, None, None, None),
        "drop_path_rate": 0.15,
    },
    "ssvit_base": {
        "dims": (80, 160, 320, 512),
        "depths": (4, 9, 25, 9),
        "num_heads": (5, 5, 10, 16),
        "mlp_ratios": (4, 4, 3, 3),
        "layer_scale": (None, None, 1e-6, 1e-6),
        "drop_path_rate": 0.4,
    },
    "ssvit_large": {
        "dims": (112, 224, 448, 640),
        "depths": (4, 9, 25, 9),
        "num_heads": (7, 7, 14, 20),
        "mlp_ratios": (4, 4, 3, 3),
        "layer_scale": (None, None, 1e-6, 1e-6),
        "drop_path_rate": 0.5,
    },
}

CITATION = """\
@article{fan2024vision,
  title   = {Vision Transformer with Sparse Scan Prior},
  author  = {Fan, Qihang and Huang, Huaibo and Chen, Mingrui and He, Ran},
  journal = {arXiv preprint arXiv:2405.13335},
  year    = {2024},
  url     = {https://arxiv.org/abs/2405.13335}
}"""


class ScanBlock(ResidualBlock):
    """A block of SSViT: depthwise position encoding, S3A, ConvFFN; all residual."""

    def __init__(self, attn: S3A, mlp_ratio: float, drop_path: float, layer_scale: float | None) -> None:
        dim = attn.dim
        super().__init__(
            pos_conv=DepthwiseConv(dim, 3),
            norm1=nn.LayerNorm(dim, eps=1e-6),
            attn=attn,
            norm2=nn.LayerNorm(dim, eps=1e-6),
            mlp=ConvFFN(dim, int(dim * mlp_ratio)),
            drop_path=drop_path,
            layer_scale=layer_scale,
        )


class SSViT(Backbone):
    """The Sparse Scan Vision Transformer, with timm's model contract.

    Takes images of any size from 32 x 32 pixels, square or not. As published, even blocks of every stage fix the window
    and odd ones the anchors; other scans are for ablations, and have the same parameters.

    Args:
        num_classes: classes of the head; 0 for no classifier.
        in_chans: channels of the images.
        global_pool: "avg", or "" to keep the map.
        dims, depths, num_heads, mlp_ratios: a number for each stage.
        layer_scale: for each stage its initial value, or None for no layer scale.
        size: of the scans (`geometry.sparse_scan`).
        scan: which block runs which scan, a key of `geometry.SCAN_PATTERNS`.
        head_hidden_size: width of the pointwise layer in front of the classifier.
        drop_rate: dropout in front of the classifier.
        drop_path_rate: rate of stochastic depth of the last block; rises linearly from 0 at the first.
        backend, kernel_options: of every attention; see `S3A`.

    Raises:
        ValueError: for sizes that make no network (see `S3A`), and in `forward` for images of less than 32 pixels or
            with other channels.
    """

    citation = CITATION

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 9, 2),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        mlp_ratios: tuple[float, ...] = (4, 4, 3, 3),
        layer_scale: tuple[float | None, ...] = (None, None, None, None),
        size: int = 7,
        scan: str = "alternate",
        head_hidden_size: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str | None = None,
        kernel_options: Mapping[str, Any] | None = None,
    ) -> None:
        tables = {"depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios, "layer_scale": layer_scale}
        check_arguments(dims, tables, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        rule = find_scan_pattern(scan)
        stages = []
        for index, (dim, rates) in enumerate(zip(dims, spread_drop_path(drop_path_rate, depths), strict=True)):
            blocks = [
                ScanBlock(
                    S3A(
                        dim,
                        num_heads[index],
                        size=size,
                        fixed=rule.fixed_of(block),
                        passes=rule.passes,
                        backend=backend,
                        kernel_options=kernel_options,
                    ),
                    mlp_ratio=mlp_ratios[index],
                    drop_path=rate,
                    layer_scale=layer_scale[index],
                )
                for block, rate in enumerate(rates)
            ]
            stages.append(Stage(Downsample(dims[index - 1], dim) if index else nn.Identity(), blocks))
        super().__init__(
            stem=Stem(in_chans, dims[0]),
            stages=stages,
            head_hidden_size=head_hidden_size,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.initialise(init_weights)


def init_weights(module: nn.Module) -> None:
    """Initialises a linear layer or convolution: truncated normal weights of std 0.02, zero biases."""
    init_linear(module)
    if isinstance(module, nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        assert module.bias is not None
        nn.init.zeros_(module.bias)


# Keys of official checkpoints, and which keys of ours they become.
OFFICIAL_KEYS = KeyTable(
    renamed=(
        (r"patch_embed\.proj\.(\d+)\.(.+)", r"stem.\1.\2"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.pos\.(.+)", r"stages.\1.blocks.\2.pos_conv.\3"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.norm([12])\.norm\.(.+)", r"stages.\1.blocks.\2.norm\3.\4"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.(qkv|lepe)\.(.+)", r"stages.\1.blocks.\2.attn.\3.\4"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.out_proj\.(.+)", r"stages.\1.blocks.\2.attn.proj.\3"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.ffn\.(.+)", r"stages.\1.blocks.\2.mlp.\3"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.gamma_([12])", r"stages.\1.blocks.\2.ls\3.gamma"),
        (r"layers\.(\d+)\.downsample\.(.+)", lambda match: f"stages.{int(match[1]) + 1}.downsample.{match[2]}"),
        (r"((?:proj|norm|head)\..+)", r"\1"),
    ),
    dropped=(r"layers\.\d+\.RoPE\.angle",),  # the rotary frequencies follow from the head dim
)
checkpoint_filter_fn = partial(filter_official, table=OFFICIAL_KEYS)


def create_ssvit(name: str, pretrained: bool, **model_args: Any) -> SSViT:
    """The SSViT of a row of the table of sizes; arguments override the row."""
    return create_backbone(SSViT, name, pretrained, checkpoint_filter_fn, **{**SIZES[name], **model_args})


default_cfgs = generate_default_cfgs(
    {
        "ssvit_nano": make_default_cfg(input_size=(3, 64, 64), pool_size=(4, 4), crop_pct=1.0),
        "ssvit_tiny": make_default_cfg(),
        "ssvit_small": make_default_cfg(),
        "ssvit_base": make_default_cfg(),
        "ssvit_large": make_default_cfg(),
    }
)


@register_model
def ssvit_nano(pretrained: bool = False, **model_args: Any) -> SSViT:
    """A small SSViT for images of 32 to 96 pixels: three stages, scans of size 3."""
    return create_ssvit("ssvit_nano", pretrained, **model_args)


@register_model
def ssvit_tiny(pretrained: bool = False, **model_args: Any) -> SSViT:
    """SSViT-T of the paper; `s3a.published` has its figures."""
    return create_ssvit("ssvit_tiny", pretrained, **model_args)


@register_model
def ssvit_small(pretrained: bool = False, **model_args: Any) -> SSViT:
    """SSViT-S of the paper; `s3a.published` has its figures."""
    return create_ssvit("ssvit_small", pretrained, **model_args)


@register_model
def ssvit_base(pretrained: bool = False, **model_args: Any) -> SSViT:
    """SSViT-B of the paper; `s3a.published` has its figures."""
    return create_ssvit("ssvit_base", pretrained, **model_args)


@register_model
def ssvit_large(pretrained: bool = False, **model_args: Any) -> SSViT:
    """SSViT-L of the paper; `s3a.published` has its figures."""
    return create_ssvit("ssvit_large", pretrained, **model_args)
