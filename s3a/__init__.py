"""Sparse Scan Self-Attention and the vision transformers built on it.

Importing this registers the models with timm: `timm.create_model("ssvit_tiny")`.
"""

from s3a.analysis.explain import explain
from s3a.attention.functional import neighborhood_attention, sparse_scan_attention
from s3a.geometry import Neighborhood, sparse_scan
from s3a.models import (
    VVT,
    CascadeMaskRCNN,
    MaskRCNN,
    RetinaNet,
    SemanticFPN,
    SSViT,
    SViT,
    UperNet,
    pad_images,
    paste_masks,
)
from s3a.nn.compilation import compile_model
from s3a.nn.s3a import S3A
from s3a.support.caches import clear_caches
from s3a.support.compiler import CompilationError

__all__ = [
    "S3A",
    "VVT",
    "CascadeMaskRCNN",
    "CompilationError",
    "MaskRCNN",
    "Neighborhood",
    "RetinaNet",
    "SSViT",
    "SViT",
    "SemanticFPN",
    "UperNet",
    "clear_caches",
    "compile_model",
    "explain",
    "neighborhood_attention",
    "pad_images",
    "paste_masks",
    "sparse_scan",
    "sparse_scan_attention",
]
