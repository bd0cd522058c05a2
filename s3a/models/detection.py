"""Object detection: what all detectors share, and RetinaNet (arXiv 1708.02002) over any backbone.

The settings are those of the authors' configurations for RMT, on which they build SSViT.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import FeaturePyramidNetwork, box_iou, sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from s3a.models.dense import DenseModel, create_dense, init_output, make_dense_cfg
from s3a.models.regions import NEGATIVE, AnchorGrid, average_losses, ignore_padding, match_boxes, suppress
from s3a.nn.stochastic_depth import make_image_generators
from s3a.weights.card import DETECTOR

SIDE_MULTIPLE = 32
RATIOS = (0.5, 1.0, 2.0)

Target = Mapping[str, Tensor]


def pad_images(
    images: Sequence[Tensor] | Tensor, multiple: int = SIDE_MULTIPLE
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Images of several sizes as a batch, padded with zeros right and below; and the height and width of each.

    Args:
        images: [channels, height, width] each, normalised.
        multiple: of which the batch's height and width are multiples.
    """
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height = max(size[0] for size in sizes)
    width = max(size[1] for size in sizes)
    height, width = height + -height % multiple, width + -width % multiple
    padded = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    return torch.stack(padded), sizes


class Detector(DenseModel):
    """What all detectors share: losses of images with targets, and predictions of images without.

    Subclasses write `find_losses` and `predict`, on maps in the order of their strides.
    """

    purpose = DETECTOR
    needs_masks = False

    def forward(
        self, images: Tensor, sizes: Sequence[tuple[int, int]] | None = None, targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses, whose sum is to be minimised; or without targets a dict of predictions for each image.

        Args:
            images: [batch, in_chans, height, width], normalised, padded right and below to multiples of 32.
            sizes: height and width of each image's content; None for whole images.
            targets: for each image "boxes" [objects, 4] float32 (left, top, right, bottom) in pixels of the padded
                image, "labels" [objects] int64 from 0 to num_classes - 1, and for detectors of masks "masks"
                [objects, height, width] uint8. An image may have no objects.

        Returns:
            Losses of the whole batch, or of this process' share of it (see `average_losses`). Predictions are "boxes"
            [found, 4] float32, clipped to the content, "labels" [found] int64, "scores" [found] float32, the best
            first, and "masks" [found, 28, 28] float32, probabilities inside of the boxes: see `paste_masks`.

        Raises:
            ValueError: for images, sizes or targets of other shapes or values.
        """
        self.check_images(images)
        height, width = images.shape[2:]
        if sizes is not None and any(isinstance(size, Mapping) for size in sizes):
            raise ValueError("sizes are targets: they must be height and width of each image; give targets by targets=")
        sizes = [(height, width)] * len(images) if sizes is None else [(size[0], size[1]) for size in sizes]
        self.check_sizes(images, sizes)
        if targets is not None:
            self.check_targets(images, targets)
        maps = self.extract_maps(images)
        if targets is None:
            return self.predict(maps, sizes)
        return self.find_losses(maps, sizes, targets, make_image_generators(len(images), images.device))

    def find_losses(
        self,
        maps: list[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Target],
        generators: Sequence[torch.Generator],
    ) -> dict[str, Tensor]:
        """The losses; all that is drawn for an image comes from its generator."""
        raise NotImplementedError

    def predict(self, maps: list[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """What is found in each image."""
        raise NotImplementedError

    def check_sizes(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
        """Raises ValueError unless images are padded, and every content lies inside of them."""
        height, width = images.shape[2:]
        if height % SIDE_MULTIPLE or width % SIDE_MULTIPLE:
            raise ValueError(
                f"images are {height} x {width} pixels: both must be multiples of {SIDE_MULTIPLE}; use pad_images"
            )
        if len(sizes) != len(images) or any(not (0 < h <= height and 0 < w <= width) for h, w in sizes):
            raise ValueError(
                f"sizes are {list(sizes)} for {len(images)} images of {height} x {width} pixels: each image must have "
                "one, height and width of its content"
            )

    def check_targets(self, images: Tensor, targets: Sequence[Target]) -> None:
        """Raises ValueError for targets of other shapes, empty boxes, or labels of unknown classes."""
        if len(targets) != len(images):
            raise ValueError(f"there are {len(targets)} targets for {len(images)} images: give one for each")
        kinds = ("boxes", "labels", "masks") if self.needs_masks else ("boxes", "labels")
        for index, target in enumerate(targets):
            if missing := [kind for kind in kinds if kind not in target]:
                raise ValueError(f"the target of image {index} lacks {', '.join(missing)}: it must have {kinds}")
            number = len(target["labels"])
            shapes = {"boxes": (number, 4), "labels": (number,), "masks": (number, *images.shape[2:])}
            for kind in kinds:
                if tuple(target[kind].shape) != shapes[kind]:
                    raise ValueError(
                        f"{kind} of image {index} have shape {tuple(target[kind].shape)}: with {number} labels it "
                        f"must be {shapes[kind]}"
                    )
        boxes, labels = torch.cat([each["boxes"] for each in targets]), torch.cat([each["labels"] for each in targets])
        whole = (boxes[:, 2:] > boxes[:, :2]).all() & ((labels >= 0) & (labels < self.num_classes)).all()
        if not whole:
            raise ValueError(
                f"a box is empty, or a label is not one of 0 to {self.num_classes - 1}: leave such objects out"
            )


class LastMaps(ExtraFPNBlock):
    """P6 and P7 of RetinaNet: the backbone's last map halved by a convolution, and again by another.

    There is no ReLU between them, as in the authors' configuration.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(dim, dim, 3, stride=2, padding=1)
        for conv in (self.p6, self.p7):
            assert conv.bias is not None
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(x[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


class RetinaNet(Detector):
    """RetinaNet: every anchor of a pyramid is classified, with a loss for which easy anchors count little.

    The pyramid has strides 8 to 128 over a backbone with four maps, and 8 to 64 over one with three.

    Args:
        num_classes: classes of objects.
        backbone, backbone_args, in_chans: see `DenseModel`.
        pyramid_dim: channels of the pyramid and the heads.
        head_convs: convolutions of each head in front of its last.
        anchor_scale: side of the smallest square anchor, as a multiple of the stride; smaller for small objects.
        scales_per_octave: anchors of one ratio at a place, each larger than the last by 2^(1 / scales_per_octave).
        ratios: height / width of anchors.
        score_threshold: what a prediction's score must be above.
        num_detections: predictions of an image at most.
    """

    COUNTED = 1000  # (anchor, class) pairs of a map with the best scores, before suppression

    def __init__(
        self,
        *,
        num_classes: int = 80,
        backbone: str = "ssvit_tiny",
        backbone_args: Mapping[str, Any] | None = None,
        in_chans: int = 3,
        pyramid_dim: int = 256,
        head_convs: int = 4,
        anchor_scale: float = 4.0,
        scales_per_octave: int = 3,
        ratios: Sequence[float] = RATIOS,
        score_threshold: float = 0.05,
        num_detections: int = 100,
    ) -> None:
        super().__init__(backbone=backbone, backbone_args=backbone_args, in_chans=in_chans, first_stride=8)
        self.num_features = pyramid_dim
        self.score_threshold, self.num_detections = score_threshold, num_detections
        self.pyramid = FeaturePyramidNetwork(list(self.dims), pyramid_dim, LastMaps(self.dims[-1], pyramid_dim))
        scales = [anchor_scale * 2 ** (index / scales_per_octave) for index in range(scales_per_octave)]
        last = self.strides[-1]
        self.anchors = AnchorGrid((*self.strides, 2 * last, 4 * last), scales, ratios)
        self.num_anchors = len(scales) * len(ratios)
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.class_head = AnchorHead(pyramid_dim, head_convs)
        self.box_head = AnchorHead(pyramid_dim, head_convs)
        self.box_head.classifier = init_output(nn.Conv2d(pyramid_dim, 4 * self.num_anchors, 3, padding=1))
        self.reset_classifier(num_classes)

    def build_outputs(self, num_classes: int) -> dict[str, nn.Module]:
        conv = nn.Conv2d(self.num_features, num_classes * self.num_anchors, 3, padding=1)
        return {"class_head.classifier": init_output(conv, bias=-4.595)}  # at first every score is 0.01

    def extract_maps(self, images: Tensor) -> list[Tensor]:
        """The levels of the pyramid, that of stride 8 first."""
        maps = super().extract_maps(images)
        return list(self.pyramid({str(index): each for index, each in enumerate(maps)}).values())

    def count_forward(self, images: Tensor) -> None:
        for each in self.extract_maps(images):
            self.class_head(each, self.num_classes)
            self.box_head(each, 4)

    def find_losses(
        self,
        maps: list[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Target],
        generators: Sequence[torch.Generator],
    ) -> dict[str, Tensor]:
        logits = torch.cat([self.class_head(each, self.num_classes) for each in maps], dim=1)
        deltas = torch.cat([self.box_head(each, 4) for each in maps], dim=1)
        anchors = torch.cat(self.anchors(maps))
        class_loss, box_loss, positives = logits.new_zeros(()), deltas.new_zeros(()), 0
        for own_logits, own_deltas, size, target in zip(logits, deltas, sizes, targets, strict=True):
            matches = match_boxes(box_iou(target["boxes"].float(), anchors), positive=0.5, negative=0.4, lowest=0.0)
            matches = ignore_padding(matches, anchors, size)
            chosen = (matches >= 0).nonzero()[:, 0]
            objects = matches[chosen]
            wanted = torch.zeros_like(own_logits)
            wanted[chosen, target["labels"][objects]] = 1
            counted = ((matches >= 0) | (matches == NEGATIVE))[:, None]
            class_loss = class_loss + (sigmoid_focal_loss(own_logits, wanted) * counted).sum()
            wanted_deltas = self.coder.encode_single(target["boxes"].float()[objects], anchors[chosen])
            box_loss = box_loss + F.l1_loss(own_deltas[chosen], wanted_deltas, reduction="sum")
            positives += len(chosen)
        return average_losses({"class": class_loss, "box": box_loss}, {"class": positives, "box": positives})

    def predict(self, maps: list[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        levels: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in sizes]
        for each, anchors in zip(maps, self.anchors(maps), strict=True):
            logits, deltas = self.class_head(each, self.num_classes), self.box_head(each, 4)
            scores, pairs = logits.sigmoid().flatten(1).topk(min(self.COUNTED, logits[0].numel()))
            for found, own_scores, own_pairs, own_deltas in zip(levels, scores, pairs, deltas, strict=True):
                own_scores, own_pairs = (x[own_scores > self.score_threshold] for x in (own_scores, own_pairs))
                chosen = own_pairs // self.num_classes
                boxes = self.coder.decode_single(own_deltas[chosen], anchors[chosen])
                found.append((boxes, own_pairs % self.num_classes, own_scores))
        predictions = []
        for found, size in zip(levels, sizes, strict=True):
            boxes, labels, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
            boxes, kept = suppress(boxes, scores, labels, size=size, threshold=0.5, most=self.num_detections)
            predictions.append({"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept]})
        return predictions


class AnchorHead(nn.Module):
    """Convolutions over a level of a pyramid, and a last one with outputs for every anchor of a place."""

    def __init__(self, dim: int, convs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(convs):
            layers += [init_output(nn.Conv2d(dim, dim, 3, padding=1)), nn.ReLU()]
        self.convs = nn.Sequential(*layers)
        self.classifier: nn.Module = nn.Identity()

    def forward(self, x: Tensor, outputs: int) -> Tensor:
        """[batch, dim, height, width] to [batch, height * width * anchors, outputs] float32, row by row."""
        y = self.classifier(self.convs(x)).permute(0, 2, 3, 1)
        return y.reshape(len(y), -1, outputs).float()


default_cfgs = generate_default_cfgs({"retinanet": make_dense_cfg(input_size=(3, 800, 1344), num_classes=80)})


@register_model
def retinanet(pretrained: bool = False, **model_args: Any) -> RetinaNet:
    """RetinaNet over a backbone, for COCO unless told otherwise; arguments are those of `RetinaNet`."""
    return create_dense(RetinaNet, "retinanet", pretrained, **model_args)
