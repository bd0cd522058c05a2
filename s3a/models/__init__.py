"""The models; importing this registers them with timm."""

from s3a.models.ssvit import SSViT

__all__ = ["SSViT"]
