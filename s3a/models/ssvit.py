"""SSViT: the backbone of "Vision Transformer with Sparse Scan Prior" (arXiv 2405.13335).

Shapes: images [batch, in_chans, height, width], tokens [batch, height, width, dim] channels-last inside,
maps of `features_only` and `forward_intermediates` [batch, dim, height, width].
"""

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerScale, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s3a.errors import unknown
from s3a.layers import S3A, AttentionPlan, ConvFFN, DepthwiseConv, Downsample, Pointwise, Stem
from s3a.plan import Backend
from s3a.weights import KeyTable, PretrainedMixin, convert_state

# Layer scale starts at 1e-6 in the stages where it is a number. The published drop path rate is each size's default.
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

MIN_IMAGE_SIZE = 32

CITATION = """\
@article{fan2024vision,
  title   = {Vision Transformer with Sparse Scan Prior},
  author  = {Fan, Qihang and Huang, Huaibo and Chen, Mingrui and He, Ran},
  journal = {arXiv preprint arXiv:2405.13335},
  year    = {2024},
  url     = {https://arxiv.org/abs/2405.13335}
}"""


class Block(nn.Module):
    """Depthwise position encoding, S3A, ConvFFN; all residual."""

    def __init__(self, attn: S3A, mlp_ratio: float, drop_path: float, layer_scale: float | None) -> None:
        super().__init__()
        dim = attn.dim
        self.pos_conv = DepthwiseConv(dim, 3)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvFFN(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def draw_kept(self, x: Tensor) -> Tensor:
        """Stochastic depth for one forward: [2, batch, 1, 1, 1], the factor of either branch of every image."""
        return torch.stack([self.drop_path(x.new_ones(len(x), 1, 1, 1)) for _ in range(2)])

    def forward(self, x: Tensor, plan: AttentionPlan | None = None, kept: Tensor | None = None) -> Tensor:
        """Transforms tokens. `kept` is what `draw_kept` returns; None keeps both branches."""
        x = x + self.pos_conv(x)
        attended = self.ls1(self.attn(self.norm1(x), plan))
        x = x + (attended if kept is None else kept[0] * attended)
        fed = self.ls2(self.mlp(self.norm2(x)))
        return x + (fed if kept is None else kept[1] * fed)


@register_notrace_module  # plans depend on the map's size, which torch.fx does not know
class Stage(nn.Module):
    """Blocks of one width on one map; even blocks fix the window, odd ones the anchors.

    Plans and stochastic depth come from outside the blocks: so all blocks with the same scan run the same code.
    """

    def __init__(self, downsample: nn.Module, blocks: list[Block], drops: bool) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.drops = drops
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            plan = block.attn.plan(x)
            kept = block.draw_kept(x) if self.training and self.drops else None
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, plan, kept, use_reentrant=False)
            else:
                x = block(x, plan, kept)
        return x


class SSViT(PretrainedMixin, nn.Module):
    """The Sparse Scan Vision Transformer, with timm's model contract.

    Any input from 32 x 32 pixels up, square or not.

    Args:
        num_classes: classes of the head; 0 for none.
        in_chans: channels of the images.
        global_pool: "avg", or "" to keep the map.
        dims, depths, num_heads, mlp_ratios: per stage.
        layer_scale: per stage, the initial value, or None for no layer scale.
        size: of the scans (`geometry.sparse_scan`).
        head_hidden_size: width of the pointwise layer in front of the classifier.
        drop_rate: dropout in front of the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
        backend: of every attention; see `S3A`.

    Raises:
        ValueError: for anything a table of sizes cannot mean (see `S3A`), and in `forward` for images below
            32 pixels or with other channels.
    """

    output_fmt = "NHWC"
    citation = CITATION  # for model cards

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
        head_hidden_size: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        tables = {"depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios, "layer_scale": layer_scale}
        if in_chans < 1 or not 0 <= drop_rate <= 1 or not 0 <= drop_path_rate <= 1:
            raise ValueError(
                f"in_chans is {in_chans}, drop_rate {drop_rate}, drop_path_rate {drop_path_rate}: "
                "channels must be at least 1, and rates between 0 and 1"
            )
        for name, table in tables.items():
            if len(table) != len(dims):
                raise ValueError(f"{name} is {table} and dims is {dims}: each must have an entry for every stage")
        self.in_chans = in_chans
        self.num_features, self.head_hidden_size = dims[-1], head_hidden_size
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**index, "module": f"stages.{index}"} for index, dim in enumerate(dims)
        ]

        self.stem = Stem(in_chans, dims[0])
        rates = iter([drop_path_rate * index / max(sum(depths) - 1, 1) for index in range(sum(depths))])
        stages = []
        for index, dim in enumerate(dims):
            downsample = Downsample(dims[index - 1], dim) if index else nn.Identity()
            blocks = [
                Block(
                    S3A(dim, num_heads[index], size=size, fixed="anchors" if block % 2 else "window", backend=backend),
                    mlp_ratio=mlp_ratios[index],
                    drop_path=next(rates),
                    layer_scale=layer_scale[index],
                )
                for block in range(depths[index])
            ]
            stages.append(Stage(downsample, blocks, drops=drop_path_rate > 0))
        self.stages = nn.ModuleList(stages)

        self.proj = Pointwise(dims[-1], head_hidden_size)
        self.norm = nn.BatchNorm2d(head_hidden_size)
        self.act = nn.SiLU()
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Nothing beyond the biases and 1-d parameters that every optimizer factory leaves out."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates: the stem, then stages (coarse) or blocks."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades a second forward of every block for its activations, in training."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head with fresh weights (none for 0 classes), and another pooling if given."""
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise unknown("global_pool", global_pool, ("avg", ""))
            self.global_pool = global_pool
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}: it must be 0 (no classifier) or more")
        if isinstance(self.proj, nn.Identity):
            raise ValueError("the head was pruned: build the model anew for another classifier")
        self.num_classes = num_classes
        like = {"device": self.proj.weight.device, "dtype": self.proj.weight.dtype}
        self.head = nn.Linear(self.head_hidden_size, num_classes, **like) if num_classes else nn.Identity()
        self.head.apply(init_weights)

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
        """The maps that stages end with, before the next one halves them.

        Args:
            indices: which stages; an int for the last so many, None for all.
            norm: accepted for timm's sake; the backbone has no norm after its stages.
            stop_early: do not run the stages after the last index.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the maps alone, not (last tokens, maps).
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise unknown("output_fmt", output_fmt, ("NCHW", "NHWC"))
        check_images(x, self.in_chans)
        taken, last = feature_take_indices(len(self.stages), indices)
        maps = []
        x = self.stem(x)
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if index in taken:
                maps.append(x.permute(0, 3, 1, 2) if output_fmt == "NCHW" else x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages that `indices` do not need, and the head; returns the indices kept."""
        taken, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.proj = self.norm = self.act = nn.Identity()
            self.num_classes = 0
            self.head = nn.Identity()
        return taken


@register_notrace_function
def check_images(x: Tensor, in_chans: int) -> None:
    """Raises ValueError for images that the network cannot take."""
    if x.ndim != 4 or x.shape[1] != in_chans or not len(x):
        raise ValueError(
            f"images have shape {tuple(x.shape)}: they must be [batch, {in_chans}, height, width], one at least; "
            "build the model with in_chans= for other channels"
        )
    if min(x.shape[2:]) < MIN_IMAGE_SIZE:
        raise ValueError(
            f"images are {x.shape[2]} x {x.shape[3]} pixels: each side must be at least {MIN_IMAGE_SIZE}; "
            "resize or pad them"
        )


def init_weights(module: nn.Module) -> None:
    """Truncated normal weights of std 0.02, zero biases; norms and layer scales as they are built."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Official checkpoints: their key and ours.
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


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """For timm: converts official checkpoints, leaves our own as they are."""
    return convert_state(state, model, OFFICIAL_KEYS) if "patch_embed.proj.0.weight" in state else state


def create(name: str, pretrained: bool, **model_args: Any) -> SSViT:
    """timm's factory for one row of the table."""
    sizes = SIZES[name]
    out_indices = tuple(range(len(sizes["dims"])))
    return build_model_with_cfg(
        SSViT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**sizes, **model_args},
    )


def default_cfg(**changes: Any) -> dict[str, Any]:
    """timm's description of the published preprocessing; no weights are hosted."""
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


default_cfgs = generate_default_cfgs(
    {
        "ssvit_nano": default_cfg(input_size=(3, 64, 64), pool_size=(4, 4), crop_pct=1.0),
        "ssvit_tiny": default_cfg(),
        "ssvit_small": default_cfg(),
        "ssvit_base": default_cfg(),
        "ssvit_large": default_cfg(),
    }
)


@register_model
def ssvit_nano(pretrained: bool = False, **model_args: Any) -> SSViT:
    """For images of 32 to 96 pixels: three stages, size 3."""
    return create("ssvit_nano", pretrained, **model_args)


@register_model
def ssvit_tiny(pretrained: bool = False, **model_args: Any) -> SSViT:
    """15 M parameters; 83.0 % top-1 published."""
    return create("ssvit_tiny", pretrained, **model_args)


@register_model
def ssvit_small(pretrained: bool = False, **model_args: Any) -> SSViT:
    """27 M parameters; 84.4 % top-1 published."""
    return create("ssvit_small", pretrained, **model_args)


@register_model
def ssvit_base(pretrained: bool = False, **model_args: Any) -> SSViT:
    """57 M parameters; 85.3 % top-1 published."""
    return create("ssvit_base", pretrained, **model_args)


@register_model
def ssvit_large(pretrained: bool = False, **model_args: Any) -> SSViT:
    """100 M parameters; 85.7 % top-1 published."""
    return create("ssvit_large", pretrained, **model_args)
