"""Models as training leaves them, for quantization."""

import timm
import torch
from torch import nn

ON_CPUS = ["int8-weight-only", "int8-dynamic", "int8-activations-int4-weights", "float8-weight-only"]
SHAPE = (3, 3, 40, 56)  # of images


def make_trained(name: str = "ssvit_nano", **options: object) -> nn.Module:
    """A model whose statistics and weights differ from a fresh one's."""
    model = timm.create_model(name, num_classes=5, **options)
    for key, tensor in model.state_dict().items():
        if key.endswith(("running_var", "norm1.weight", "norm2.weight")):
            tensor.uniform_(0.5, 1.5)
        elif key.endswith(("running_mean", "bias")):
            tensor.normal_(std=0.1)
    nn.init.normal_(model.get_classifier().weight, std=1)
    return model.eval()


def compute_logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(images)
