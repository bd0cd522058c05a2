"""Semantic segmentation: Semantic FPN (arXiv 1901.02446) and UperNet (arXiv 1807.10221) over any backbone.

The widths are those of the authors' configurations for RMT, on which they build SSViT; both papers name the heads.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork

from s3a.models.dense import DenseModel, create_dense, make_dense_cfg
from s3a.nn.stochastic_depth import PlacedDropout2d
from s3a.weights.card import SEGMENTER

AUXILIARY_STRIDE = 16


class SegmentationModel(DenseModel):
    """What both heads share: logits for every pixel.

    Subclasses have `head`, from maps to the logits of the first map's places, and may have `auxiliary_head`.
    """

    purpose = SEGMENTER
    head: nn.Module
    auxiliary_head: nn.Module | None

    def forward(self, images: Tensor, auxiliary: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        """Logits [batch, num_classes, height, width] of images, whose sides are 32 pixels at least.

        Args:
            auxiliary: whether to return a pair, of the logits and of those of the auxiliary head, None without one.
        """
        maps = self.extract_maps(images)
        logits = self.enlarge(self.head(maps), images)
        if not auxiliary:
            return logits
        if self.auxiliary_head is None:
            return logits, None
        return logits, self.enlarge(self.auxiliary_head(maps[self.strides.index(AUXILIARY_STRIDE)]), images)

    def enlarge(self, logits: Tensor, images: Tensor) -> Tensor:
        """Logits of places as those of the images' pixels, without those of padding."""
        height, width = images.shape[2:]
        size = (height + -height % self.image_multiple, width + -width % self.image_multiple)
        return resize(logits, size)[:, :, :height, :width]

    def count_forward(self, images: Tensor) -> None:
        self(images)


class SemanticFPN(SegmentationModel):
    """Semantic FPN: a feature pyramid whose levels are brought to stride 4 step by step, and summed.

    Args:
        num_classes: classes of a pixel.
        backbone, backbone_args, in_chans: see `DenseModel`.
        pyramid_dim: channels of the pyramid.
        head_dim: channels of the head.
        drop_rate: how often a channel is dropped in front of the classifier, in training.
    """

    def __init__(
        self,
        *,
        num_classes: int = 150,
        backbone: str = "ssvit_tiny",
        backbone_args: Mapping[str, Any] | None = None,
        in_chans: int = 3,
        pyramid_dim: int = 256,
        head_dim: int = 128,
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__(backbone=backbone, backbone_args=backbone_args, in_chans=in_chans)
        self.num_features, self.auxiliary_head = head_dim, None
        self.pyramid = FeaturePyramidNetwork(list(self.dims), pyramid_dim)
        reset_convolutions(self.pyramid)
        self.head = SemanticFPNHead(pyramid_dim, head_dim, levels=len(self.dims), drop_rate=drop_rate)
        self.reset_classifier(num_classes)

    def extract_maps(self, images: Tensor) -> list[Tensor]:
        """The levels of the pyramid, that of stride 4 first."""
        maps = super().extract_maps(images)
        return list(self.pyramid({str(index): each for index, each in enumerate(maps)}).values())

    def build_outputs(self, num_classes: int) -> dict[str, nn.Module]:
        return {"head.classifier": nn.Conv2d(self.num_features, num_classes, 1)}


class SemanticFPNHead(nn.Module):
    """Sums the levels of a pyramid at the size of the first.

    Level i has i steps of a convolution and bilinear upsampling by 2, level 0 has a convolution alone.

    Shape:
        levels [batch, in_dim, height / 2^i, width / 2^i] to [batch, classes, height, width].
    """

    def __init__(self, in_dim: int, dim: int, *, levels: int, drop_rate: float) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for level in range(levels):
            steps = nn.ModuleList(make_conv(in_dim if step == 0 else dim, dim, 3) for step in range(max(level, 1)))
            self.levels.append(steps)
        self.dropout = PlacedDropout2d(drop_rate)
        self.classifier: nn.Module = nn.Identity()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        total: Tensor | None = None
        for level, (steps, x) in enumerate(zip(self.levels, maps, strict=True)):
            for step in cast("nn.ModuleList", steps):
                x = step(x)
                if level:
                    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            total = x if total is None else total + resize(x, total.shape[2:])
        return self.classifier(self.dropout(total))


class UperNet(SegmentationModel):
    """UperNet: pyramid pooling of the last map, a feature pyramid, and all its levels side by side.

    In training the pooling to a single place needs two images at least (over all processes), for its batch norm.

    Args:
        num_classes: classes of a pixel.
        backbone, backbone_args, in_chans: see `DenseModel`.
        head_dim: channels of the head.
        pool_scales: places a side to which the last map is pooled.
        drop_rate: how often a channel is dropped in front of the classifiers, in training.
        auxiliary_dim: channels of the auxiliary head on the map of stride 16, which only training needs; 0 for none.
    """

    def __init__(
        self,
        *,
        num_classes: int = 150,
        backbone: str = "ssvit_tiny",
        backbone_args: Mapping[str, Any] | None = None,
        in_chans: int = 3,
        head_dim: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        drop_rate: float = 0.1,
        auxiliary_dim: int = 256,
    ) -> None:
        super().__init__(backbone=backbone, backbone_args=backbone_args, in_chans=in_chans)
        if auxiliary_dim and AUXILIARY_STRIDE not in self.strides:
            raise ValueError(
                f"the maps of {backbone} have strides {self.strides}, and the auxiliary head reads that of "
                f"{AUXILIARY_STRIDE}: leave it out with auxiliary_dim=0"
            )
        self.num_features, self.auxiliary_dim = head_dim, auxiliary_dim
        self.head = UperNetHead(self.dims, head_dim, pool_scales=pool_scales, drop_rate=drop_rate)
        self.auxiliary_head = None
        if auxiliary_dim:
            dim = self.dims[self.strides.index(AUXILIARY_STRIDE)]
            self.auxiliary_head = FCNHead(dim, auxiliary_dim, drop_rate=drop_rate)
        self.reset_classifier(num_classes)

    def build_outputs(self, num_classes: int) -> dict[str, nn.Module]:
        outputs: dict[str, nn.Module] = {"head.classifier": nn.Conv2d(self.num_features, num_classes, 1)}
        if self.auxiliary_dim:
            outputs["auxiliary_head.classifier"] = nn.Conv2d(self.auxiliary_dim, num_classes, 1)
        return outputs


class UperNetHead(nn.Module):
    """The head of UperNet.

    Shape:
        maps [batch, dims[i], height / 2^i, width / 2^i] to [batch, classes, height, width].
    """

    def __init__(self, dims: Sequence[int], dim: int, *, pool_scales: Sequence[int], drop_rate: float) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), make_conv(dims[-1], dim, 1)) for scale in pool_scales
        )
        self.pooled = make_conv(dims[-1] + len(pool_scales) * dim, dim, 3)
        self.laterals = nn.ModuleList(make_conv(each, dim, 1) for each in dims[:-1])
        self.smooth = nn.ModuleList(make_conv(dim, dim, 3) for _ in dims[:-1])
        self.fuse = make_conv(len(dims) * dim, dim, 3)
        self.dropout = PlacedDropout2d(drop_rate)
        self.classifier: nn.Module = nn.Identity()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        last = maps[-1]
        top = self.pooled(torch.cat([last, *(resize(pool(last), last.shape[2:]) for pool in self.pools)], dim=1))
        levels = [top]
        for lateral, smooth, x in reversed(list(zip(self.laterals, self.smooth, maps[:-1], strict=True))):
            top = lateral(x) + resize(top, x.shape[2:])
            levels.insert(0, smooth(top))
        fused = self.fuse(torch.cat([resize(level, maps[0].shape[2:]) for level in levels], dim=1))
        return self.classifier(self.dropout(fused))


class FCNHead(nn.Module):
    """A convolution and a classifier, [batch, in_dim, height, width] to [batch, classes, height, width]."""

    def __init__(self, in_dim: int, dim: int, *, drop_rate: float) -> None:
        super().__init__()
        self.conv = make_conv(in_dim, dim, 3)
        self.dropout = PlacedDropout2d(drop_rate)
        self.classifier: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.conv(x)))


def make_conv(in_dim: int, dim: int, kernel_size: int) -> nn.Module:
    """A convolution that keeps the size, batch norm and ReLU."""
    return Conv2dNormActivation(in_dim, dim, kernel_size, inplace=False)


def reset_convolutions(module: nn.Module) -> None:
    """Gives convolutions torch's own initial weights, which are smaller than torchvision's and mmsegmentation's.

    In front of batch norms that only makes steps larger, and short runs learn several times as fast (LOG.md).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Maps resized bilinearly to (height, width)."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


default_cfgs = generate_default_cfgs(
    {
        "semantic_fpn": make_dense_cfg(input_size=(3, 512, 512), num_classes=150),
        "upernet": make_dense_cfg(input_size=(3, 512, 512), num_classes=150),
    }
)


@register_model
def semantic_fpn(pretrained: bool = False, **model_args: Any) -> SemanticFPN:
    """Semantic FPN over a backbone, for ADE20K unless told otherwise; arguments are those of `SemanticFPN`."""
    return create_dense(SemanticFPN, "semantic_fpn", pretrained, **model_args)


@register_model
def upernet(pretrained: bool = False, **model_args: Any) -> UperNet:
    """UperNet over a backbone, for ADE20K unless told otherwise; arguments are those of `UperNet`."""
    return create_dense(UperNet, "upernet", pretrained, **model_args)
