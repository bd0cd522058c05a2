"""The recipes of segmentation and detection that have a name.

No settings of these tasks were published for SSViT, SViT or VVT. Those here are of RMT, by the same first author, whose
sizes have the same widths and drop path (github qhfan/RMT).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from s3a.models import ssvit, svit, vvt
from s3a.training.dense_recipe import DetectionHead, DetectionRecipe, SegmentationRecipe

SIZES = {**ssvit.SIZES, **svit.SIZES, **vvt.SIZES}
ADE20K_IMAGES = 20_210
COCO_MULTI_SCALE = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)

# --------------------------------------------------------------------------------------------------------
# Segmentation
# --------------------------------------------------------------------------------------------------------


def segmentation_scenes() -> SegmentationRecipe:
    """Scenes of handwritten digits over photographs, at 128 px: what trains on a processor."""
    return SegmentationRecipe(
        name="semantic_fpn_scenes",
        model="ssvit_nano",
        data="scenes",
        image_size=128,
        scale=(1.0, 1.0),
        largest_class=1.0,
        color_jitter=False,
        horizontal_flip=0.0,
        epochs=3,
        batch_size=4,
        learning_rate=2e-3,
        weight_decay=0.05,
        warmup_steps=100,
        decay="poly",
        decay_power=0.9,
        cpu_threads=1,
        pyramid_dim=64,
        head_dim=64,
        drop_rate=0.0,
    )


def semantic_fpn_ade20k(model: str) -> SegmentationRecipe:
    """Semantic FPN on ADE20K: 80,000 steps of 16 crops of 512 px."""
    return SegmentationRecipe(
        name=f"{model}_semantic_fpn_ade20k",
        model=model,
        weights=f"runs/{model}_imagenet/model",
        data="ade20k",
        epochs=count_ade20k_epochs(80_000),
        steps=80_000,
        batch_size=16,
        learning_rate=1e-4,
        weight_decay=1e-4,
        decay="poly",
        decay_power=0.9,
        drop_path=SIZES[model]["drop_path_rate"],
        precision="bf16",
        num_workers=8,
        checkpoint_every="15m",
    )


def upernet_ade20k(model: str) -> SegmentationRecipe:
    """UperNet on ADE20K: 160,000 steps of 16 crops of 512 px."""
    return SegmentationRecipe(
        name=f"{model}_upernet_ade20k",
        model=model,
        weights=f"runs/{model}_imagenet/model",
        data="ade20k",
        head="upernet",
        epochs=count_ade20k_epochs(160_000),
        steps=160_000,
        batch_size=16,
        learning_rate=6e-5,
        weight_decay=0.01,
        warmup_steps=1500,
        warmup_start=1e-6,
        decay="poly",
        drop_path=SIZES[model]["drop_path_rate"],
        precision="bf16",
        num_workers=8,
        checkpoint_every="15m",
    )


def count_ade20k_epochs(steps: int) -> int:
    """Epochs over the training images of ADE20K, in batches of 16, that so many steps begin."""
    return -(-steps // (ADE20K_IMAGES // 16))


# --------------------------------------------------------------------------------------------------------
# Detection
# --------------------------------------------------------------------------------------------------------


def detection_scenes() -> DetectionRecipe:
    """Scenes of handwritten digits over photographs, at 128 px: what trains on a processor."""
    return DetectionRecipe(
        name="mask_rcnn_scenes",
        model="ssvit_nano",
        data="scenes",
        short_sides=(128,),
        long_side=128,
        horizontal_flip=0.0,
        epochs=2,
        batch_size=4,
        learning_rate=1e-3,
        weight_decay=0.05,
        warmup_steps=100,
        decay="poly",
        decay_power=0.9,
        cpu_threads=1,
        pyramid_dim=64,
        box_dim=256,
        mask_convs=2,
        num_proposals=50,
        num_samples=32,
    )


def coco(model: str, head: DetectionHead, learning_rate: float) -> DetectionRecipe:
    """1x on COCO: 12 epochs at one size."""
    return DetectionRecipe(
        name=f"{model}_{head}_1x_coco",
        model=model,
        weights=f"runs/{model}_imagenet/model",
        data="coco",
        head=head,
        epochs=12,
        batch_size=16,
        learning_rate=learning_rate,
        weight_decay=1e-4 if head == "retinanet" else 0.05,
        warmup_steps=500,
        decay="steps",
        decay_epochs=(8, 11),
        drop_path=SIZES[model]["drop_path_rate"],
        precision="bf16",
        num_workers=8,
        checkpoint_every="15m",
    )


def coco_multi_scale(model: str, head: DetectionHead, learning_rate: float) -> DetectionRecipe:
    """3x on COCO: 36 epochs at many sizes, half of them of a crop."""
    recipe = coco(model, head, learning_rate)
    return replace(
        recipe,
        name=f"{model}_{head}_3x_coco",
        epochs=36,
        decay_epochs=(27, 33),
        short_sides=COCO_MULTI_SCALE,
        crop=True,
    )


SSVIT = ("ssvit_tiny", "ssvit_small", "ssvit_base", "ssvit_large")
SVIT = ("svit_small", "svit_base", "svit_large")
VVT = ("vvt_tiny", "vvt_small", "vvt_medium", "vvt_large")

SEGMENTATION_RECIPES: dict[str, Callable[[], SegmentationRecipe]] = {
    "semantic_fpn_scenes": segmentation_scenes,
    **{f"{model}_semantic_fpn_ade20k": partial(semantic_fpn_ade20k, model) for model in (*SSVIT, *SVIT, *VVT)},
    **{f"{model}_upernet_ade20k": partial(upernet_ade20k, model) for model in (*SSVIT[1:], *SVIT)},
}

# The learning rates are RMT's for the sizes of the same widths; large sizes halve the common one.
ONE_SCALE: dict[str, float] = {model: 2e-4 if model.endswith("large") else 4e-4 for model in (*SSVIT, *SVIT)}
MULTI_SCALE: dict[str, float] = {model: 4e-4 if model.endswith("small") else 2e-4 for model in (*SSVIT[1:], *SVIT)}

DETECTION_RECIPES: dict[str, Callable[[], DetectionRecipe]] = {
    "mask_rcnn_scenes": detection_scenes,
    **{f"{model}_retinanet_1x_coco": partial(coco, model, "retinanet", 4e-4) for model in SSVIT},
    **{f"{model}_mask_rcnn_1x_coco": partial(coco, model, "mask_rcnn", rate) for model, rate in ONE_SCALE.items()},
    **{
        f"{model}_mask_rcnn_3x_coco": partial(coco_multi_scale, model, "mask_rcnn", MULTI_SCALE[model])
        for model in ("ssvit_small", "ssvit_base", "svit_small", "svit_base", "svit_large")
    },
    **{
        f"{model}_cascade_mask_rcnn_3x_coco": partial(coco_multi_scale, model, "cascade_mask_rcnn", MULTI_SCALE[model])
        for model in ("ssvit_small", "ssvit_base", "svit_base")
    },
}
