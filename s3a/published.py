"""The figures that the papers print of their models, in one table.

All are of ImageNet-1k and of training from scratch; each top-1 has its recipe, `MODEL_imagenet` or `MODEL_384`. SSViT's
robustness is a transcription of its paper's table (igm503/heedless-backbones). README.md's table of models,
`tools/cost.py` and the tests of the models are checked against this one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a paper prints of one model.

    Attributes:
        parameters: trainable ones, to the unit as the official code counts them.
        top1: side of the images in pixels -> top-1 accuracy in percent. 384 is fine-tuned from 224.
        gmacs: side of the images in pixels -> the cost that the paper calls FLOPs, in its own count. SSViT's paper
            counts the layers alone, in units of 2^30; the others count everything, in units of 10^9.
        robustness: set, by its name in `s3a.data.imagenet` -> top-1 accuracy in percent at 224 px.
        source: the paper.
    """

    parameters: int
    top1: Mapping[int, float]
    gmacs: Mapping[int, float] = field(default_factory=dict)
    robustness: Mapping[str, float] = field(default_factory=dict)
    source: str


SSVIT = "Vision Transformer with Sparse Scan Prior, arXiv 2405.13335"
SVIT = "Vision Transformer with Super Token Sampling, arXiv 2211.11167"
VVT = "Vicinity Vision Transformer, arXiv 2206.10552"

PUBLISHED: dict[str, Published] = {
    "ssvit_tiny": Published(
        parameters=15_095_688,
        top1={224: 83.0},
        gmacs={224: 2.4},
        robustness={"imagenet-v2": 72.3, "imagenet-a": 32.6, "imagenet-r": 45.6},
        source=SSVIT,
    ),
    "ssvit_small": Published(
        parameters=27_175_240,
        top1={224: 84.4},
        gmacs={224: 4.4},
        robustness={"imagenet-v2": 74.1, "imagenet-a": 41.6, "imagenet-r": 51.0},
        source=SSVIT,
    ),
    "ssvit_base": Published(
        parameters=57_138_736,
        top1={224: 85.3},
        gmacs={224: 9.6},
        robustness={"imagenet-v2": 75.7, "imagenet-a": 49.4, "imagenet-r": 55.6},
        source=SSVIT,
    ),
    # the official README's table has 85.6
    "ssvit_large": Published(
        parameters=100_234_112,
        top1={224: 85.7},
        gmacs={224: 18.2},
        robustness={"imagenet-v2": 76.1, "imagenet-a": 55.0, "imagenet-r": 59.2},
        source=SSVIT,
    ),
    "svit_small": Published(
        parameters=25_495_624, top1={224: 83.6, 384: 85.0}, gmacs={224: 4.4, 384: 14.1}, source=SVIT
    ),
    "svit_base": Published(
        parameters=51_691_288, top1={224: 84.8, 384: 86.0}, gmacs={224: 9.9, 384: 32.5}, source=SVIT
    ),
    "svit_large": Published(
        parameters=94_971_096, top1={224: 85.3, 384: 86.4}, gmacs={224: 15.6, 384: 49.7}, source=SVIT
    ),
    "vvt_tiny": Published(parameters=12_882_440, top1={224: 79.2, 384: 80.3}, source=VVT),
    "vvt_small": Published(parameters=25_492_264, top1={224: 82.6, 384: 83.4}, source=VVT),
    "vvt_medium": Published(parameters=47_907_304, top1={224: 83.8, 384: 84.5}, source=VVT),
    "vvt_large": Published(
        parameters=61_848_520, top1={224: 84.1, 384: 84.7}, gmacs={224: 10.8, 384: 31.8}, source=VVT
    ),
}
