"""Sparse Scan Self-Attention and the vision transformers built on it.

Importing this registers the models with timm: `timm.create_model("ssvit_tiny")`.
"""

from s3a.attention import neighborhood_attention, sparse_scan_attention
from s3a.compile import compile_model
from s3a.dynamo import CompilationError
from s3a.explain import explain
from s3a.geometry import Neighborhood, sparse_scan
from s3a.layers import S3A
from s3a.models import VVT, SSViT, SViT

__all__ = [
    "S3A",
    "VVT",
    "CompilationError",
    "Neighborhood",
    "SSViT",
    "SViT",
    "compile_model",
    "explain",
    "neighborhood_attention",
    "sparse_scan",
    "sparse_scan_attention",
]
