"""The models; importing this registers them with timm."""

from s3a.models.ssvit import SSViT
from s3a.models.svit import SViT
from s3a.models.vvt import VVT

__all__ = ["VVT", "SSViT", "SViT"]
