"""The models; importing this registers them with timm."""

from s3a.models.dense import DenseModel, TakenWeights
from s3a.models.detection import Detector, RetinaNet, pad_images
from s3a.models.rcnn import CascadeMaskRCNN, MaskRCNN
from s3a.models.regions import paste_masks
from s3a.models.segmentation import SegmentationModel, SemanticFPN, UperNet
from s3a.models.ssvit import SSViT
from s3a.models.svit import SViT
from s3a.models.vvt import VVT

__all__ = [
    "VVT",
    "CascadeMaskRCNN",
    "DenseModel",
    "Detector",
    "MaskRCNN",
    "RetinaNet",
    "SSViT",
    "SViT",
    "SegmentationModel",
    "SemanticFPN",
    "TakenWeights",
    "UperNet",
    "pad_images",
    "paste_masks",
]
