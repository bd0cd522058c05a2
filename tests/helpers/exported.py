"""Models that are quick to export, and whose logits tell them apart."""

import timm
import torch
from torch import nn

# One block, for formats that compile.
TINY = {"dims": (16,), "depths": (1,), "num_heads": (2,), "mlp_ratios": (2,), "layer_scale": (None,)}
# The same in three stages, for backbones.
TINY_BACKBONE = {name: value * 3 for name, value in TINY.items()}


def make_confident(name: str = "ssvit_nano", **options: object) -> nn.Module:
    """A model whose logits are far apart."""
    model = timm.create_model(name, num_classes=5, **options).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith("bias"):
            tensor.normal_(std=0.1)
        elif key.endswith("weight") and tensor.ndim == 2:
            tensor.normal_(std=tensor.shape[1] ** -0.5)
    return model


def make_dense(name: str = "semantic_fpn", **options: object) -> nn.Module:
    """A dense model whose outputs differ from place to place."""
    torch.manual_seed(1)
    model = timm.create_model(name, backbone="ssvit_nano", num_classes=5, **options)
    nn.init.normal_(model.get_classifier().weight, std=1)
    return model.eval()
