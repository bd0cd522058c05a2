"""Detectors in two steps: Mask R-CNN (arXiv 1703.06870) and Cascade Mask R-CNN (arXiv 1906.09756) over any backbone.

A network proposes boxes, whatever their class; regions of the maps under them are then classified, their boxes refined,
and their masks drawn. The settings are those of the authors' configurations for RMT, on which they build SSViT.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, box_iou, clip_boxes_to_image, generalized_box_iou_loss
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from s3a.models.dense import create_dense, init_output, make_dense_cfg
from s3a.models.detection import RATIOS, Detector, Target
from s3a.models.regions import (
    AnchorGrid,
    RegionPool,
    average_losses,
    crop_masks,
    ignore_padding,
    match_boxes,
    sample_boxes,
    suppress,
)

BOX_PLACES, MASK_PLACES = 7, 14  # of a region a side; masks have twice as many
Sums = dict[str, tuple[Tensor, int]]  # sums of losses, and how many each is a sum over


class ProposalNetwork(nn.Module):
    """Proposes boxes: a convolution over every level of a pyramid says which anchors are objects, and moves them.

    Args:
        dim, strides: of the levels.
        anchor_scale, ratios: of the anchors, see `AnchorGrid`.
        beta: below which an error of a delta counts by its square; 0 for none.
    """

    KEPT: ClassVar = {True: 2000, False: 1000}  # anchors of a level in training, and else
    SAMPLES, FRACTION = 256, 0.5
    OVERLAP = 0.7  # above which a proposal suppresses another one of its level

    def __init__(
        self, dim: int, strides: Sequence[int], *, anchor_scale: float, ratios: Sequence[float], beta: float
    ) -> None:
        super().__init__()
        self.anchors = AnchorGrid(strides, [anchor_scale], ratios)
        self.head = RPNHead(dim, len(ratios))
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.beta = beta

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """For each level [batch, anchors] logits of being an object, and [batch, anchors, 4] deltas; float32."""
        logits, deltas = self.head(maps)
        flat = [each.permute(0, 2, 3, 1).reshape(len(each), -1).float() for each in logits]
        return flat, [each.permute(0, 2, 3, 1).reshape(len(each), -1, 4).float() for each in deltas]

    @torch.no_grad()
    def propose(
        self,
        outputs: tuple[list[Tensor], list[Tensor]],
        anchors: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        most: int,
        *,
        training: bool,
    ) -> list[Tensor]:
        """The `most` best boxes of each image, [boxes, 4]; those with the best logits first."""
        logits, boxes, levels = [], [], []
        for level, (own_logits, own_deltas, own_anchors) in enumerate(zip(*outputs, anchors, strict=True)):
            best, chosen = own_logits.topk(min(self.KEPT[training], own_logits.shape[1]))
            deltas = own_deltas.gather(1, chosen[..., None].expand(-1, -1, 4))
            boxes.append(
                self.coder.decode_single(deltas.flatten(0, 1), own_anchors[chosen].flatten(0, 1)).view_as(deltas)
            )
            logits.append(best)
            levels.append(torch.full_like(chosen, level))
        proposals = []
        stacked = zip(torch.cat(boxes, dim=1), torch.cat(logits, dim=1), torch.cat(levels, dim=1), sizes, strict=True)
        for own_boxes, scores, groups, size in stacked:
            clipped, kept = suppress(own_boxes, scores, groups, size=size, threshold=self.OVERLAP, most=most)
            proposals.append(clipped[kept])
        return proposals

    def find_losses(
        self,
        outputs: tuple[list[Tensor], list[Tensor]],
        anchors: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Target],
        generators: Sequence[torch.Generator],
    ) -> Sums:
        """Losses of 256 anchors of each image, half of them objects' at most, and none of its padding."""
        logits, deltas, anchor = torch.cat(outputs[0], dim=1), torch.cat(outputs[1], dim=1), torch.cat(list(anchors))
        class_loss, box_loss, number = logits.new_zeros(()), deltas.new_zeros(()), 0
        images = zip(logits, deltas, sizes, targets, generators, strict=True)
        for own_logits, own_deltas, size, target, generator in images:
            objects = target["boxes"].float()
            matches = match_boxes(box_iou(objects, anchor), positive=0.7, negative=0.3, lowest=0.3)
            matches = ignore_padding(matches, anchor, size)
            found, empty = sample_boxes(matches, self.SAMPLES, self.FRACTION, generator)
            chosen = own_logits[torch.cat([found, empty])]
            wanted = (torch.arange(len(chosen), device=chosen.device) < len(found)).to(chosen.dtype)
            class_loss = class_loss + F.binary_cross_entropy_with_logits(chosen, wanted, reduction="sum")
            moves = self.coder.encode_single(objects[matches[found]], anchor[found])
            box_loss = box_loss + F.smooth_l1_loss(own_deltas[found], moves, beta=self.beta, reduction="sum")
            number += len(chosen)
        return {"proposal_class": (class_loss, number), "proposal_box": (box_loss, number)}


class BoxStage(nn.Module):
    """Classifies regions, and moves their boxes for each class.

    Args:
        body: from regions [boxes, dim, 7, 7] to features [boxes, width].
        overlap: intersection over union with an object from which on a box is its own.
        weight: of its losses.
        deviations: by which deltas of boxes are divided, of places and of sides.
    """

    def __init__(
        self, body: nn.Module, width: int, *, overlap: float, weight: float, deviations: tuple[float, float]
    ) -> None:
        super().__init__()
        self.overlap, self.weight, self.width = overlap, weight, width
        place, side = 1 / deviations[0], 1 / deviations[1]
        self.coder = BoxCoder((place, place, side, side))
        self.body = body
        self.classifier: nn.Module = nn.Identity()
        self.mover: nn.Module = nn.Identity()

    def build_outputs(self, num_classes: int) -> dict[str, nn.Module]:
        """Fresh last layers for so many classes and, as the last class, background."""
        return {
            "classifier": init_output(nn.Linear(self.width, num_classes + 1)),
            "mover": init_output(nn.Linear(self.width, 4 * num_classes), std=0.001),
        }

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [boxes, classes + 1], the last of background, and deltas [boxes, classes, 4]; float32."""
        features = self.body(regions)
        return self.classifier(features).float(), self.mover(features).float().unflatten(1, (-1, 4))

    def decode(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Boxes [boxes, 4] moved by deltas [boxes, ..., 4]."""
        return self.coder.decode_single(deltas.flatten(1), boxes).view_as(deltas)


class MaskHead(nn.Module):
    """Regions [boxes, dim, 14, 14] to logits of masks [boxes, classes, 28, 28] float32."""

    def __init__(self, dim: int, convs: int) -> None:
        super().__init__()
        self.convs = MaskRCNNHeads(dim, [dim] * convs, 1)
        self.enlarge = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        assert self.enlarge.bias is not None
        nn.init.kaiming_normal_(self.enlarge.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.enlarge.bias)
        self.classifier: nn.Module = nn.Identity()

    def forward(self, regions: Tensor) -> Tensor:
        return self.classifier(F.relu(self.enlarge(self.convs(regions)))).float()


@dataclass(frozen=True)
class Samples:
    """Boxes of an image that a stage learns from.

    Attributes:
        boxes: [boxes, 4], those of objects first.
        objects: [boxes] int64, the object of each; -1 for background.
        labels: [boxes] int64, the class of each; the number of classes for background.
        given: [boxes] bool, whether it is the box of an object itself.
    """

    boxes: Tensor
    objects: Tensor
    labels: Tensor
    given: Tensor

    @property
    def found(self) -> Tensor:
        """The objects of the boxes that have one."""
        return self.objects[self.objects >= 0]


class RegionDetector(Detector):
    """What Mask R-CNN and its cascade share: proposals, and stages that refine them one after the other.

    Subclasses make the stages; each has a mask head of its own.
    """

    needs_masks = True
    FRACTION = 0.25  # of samples that are objects'
    OVERLAP = 0.5  # above which a prediction suppresses another one of its class

    def __init__(
        self,
        *,
        backbone: str,
        backbone_args: Mapping[str, Any] | None,
        in_chans: int,
        pyramid_dim: int,
        anchor_scale: float,
        ratios: Sequence[float],
        proposal_beta: float,
        num_proposals: int,
        num_training_proposals: int,
        num_samples: int,
        score_threshold: float,
        num_detections: int,
    ) -> None:
        super().__init__(backbone=backbone, backbone_args=backbone_args, in_chans=in_chans)
        self.num_features = pyramid_dim
        self.num_proposals = {True: num_training_proposals, False: num_proposals}
        self.num_samples, self.score_threshold, self.num_detections = num_samples, score_threshold, num_detections
        self.pyramid = FeaturePyramidNetwork(list(self.dims), pyramid_dim, LastLevelMaxPool())
        strides = (*self.strides, 2 * self.strides[-1])
        self.proposal_network = ProposalNetwork(
            pyramid_dim, strides, anchor_scale=anchor_scale, ratios=ratios, beta=proposal_beta
        )
        self.box_pool = RegionPool(BOX_PLACES, self.strides)
        self.mask_pool = RegionPool(MASK_PLACES, self.strides)

    def add_stages(self, stages: Sequence[BoxStage], mask_convs: int) -> None:
        """Takes the stages, and makes their mask heads."""
        self.stages = cast("Sequence[BoxStage]", nn.ModuleList(stages))
        self.mask_heads = cast(
            "Sequence[MaskHead]", nn.ModuleList(MaskHead(self.num_features, mask_convs) for _ in stages)
        )

    def build_outputs(self, num_classes: int) -> dict[str, nn.Module]:
        outputs: dict[str, nn.Module] = {}
        for index, stage in enumerate(self.stages):
            outputs |= {f"stages.{index}.{name}": layer for name, layer in stage.build_outputs(num_classes).items()}
        for index in range(len(self.mask_heads)):
            layer = nn.Conv2d(self.num_features, num_classes, 1)
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            outputs[f"mask_heads.{index}.classifier"] = layer
        return outputs

    def extract_maps(self, images: Tensor) -> list[Tensor]:
        """The levels of the pyramid, that of stride 4 first; regions are read from all but the last."""
        maps = super().extract_maps(images)
        return list(self.pyramid({str(index): each for index, each in enumerate(maps)}).values())

    def count_forward(self, images: Tensor) -> None:
        maps = self.extract_maps(images)
        self.proposal_network(maps)
        dim = self.num_features
        regions = maps[0].new_zeros(self.num_proposals[False] * len(images), dim, BOX_PLACES, BOX_PLACES)
        masks = maps[0].new_zeros(self.num_detections * len(images), dim, MASK_PLACES, MASK_PLACES)
        for stage, mask_head in zip(self.stages, self.mask_heads, strict=True):
            stage(regions)
            mask_head(masks)

    # ----------------------------------------------------------------------------------------------------
    # Training
    # ----------------------------------------------------------------------------------------------------

    def find_losses(
        self,
        maps: list[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Target],
        generators: Sequence[torch.Generator],
    ) -> dict[str, Tensor]:
        outputs, anchors = self.proposal_network(maps), self.proposal_network.anchors(maps)
        sums = self.proposal_network.find_losses(outputs, anchors, sizes, targets, generators)
        boxes = self.proposal_network.propose(outputs, anchors, sizes, self.num_proposals[True], training=True)
        for index, (stage, mask_head) in enumerate(zip(self.stages, self.mask_heads, strict=True)):
            samples = [self.sample(stage, *each) for each in zip(boxes, targets, generators, strict=True)]
            logits, deltas = stage(self.box_pool(maps[:-1], [each.boxes for each in samples]))
            losses = self.find_box_losses(stage, samples, targets, logits, deltas)
            losses |= self.find_mask_loss(mask_head, maps, samples, targets)
            name = f"_{index + 1}" if len(self.stages) > 1 else ""
            sums |= {f"{kind}{name}": (stage.weight * total, number) for kind, (total, number) in losses.items()}
            if index + 1 < len(self.stages):
                boxes = self.refine_samples(stage, samples, logits, deltas, sizes)
        return average_losses(
            {name: total for name, (total, _) in sums.items()}, {name: number for name, (_, number) in sums.items()}
        )

    @torch.no_grad()
    def sample(self, stage: BoxStage, proposals: Tensor, target: Target, generator: torch.Generator) -> Samples:
        """What a stage learns from in an image: some of the proposals, and of the boxes of the objects themselves."""
        objects = target["boxes"].float()
        boxes = torch.cat([objects, proposals])
        matches = match_boxes(box_iou(objects, boxes), positive=stage.overlap, negative=stage.overlap)
        chosen = torch.cat(sample_boxes(matches, self.num_samples, self.FRACTION, generator))
        labels = torch.cat([target["labels"], target["labels"].new_tensor([self.num_classes])])
        matched = matches[chosen]  # -1 for background, and so the last of the labels
        return Samples(boxes[chosen], matched, labels[matched], chosen < len(objects))

    def find_box_losses(
        self, stage: BoxStage, samples: Sequence[Samples], targets: Sequence[Target], logits: Tensor, deltas: Tensor
    ) -> Sums:
        """Sums of the losses of classes and boxes, both over all samples."""
        labels = torch.cat([each.labels for each in samples])
        chosen = (labels < self.num_classes).nonzero()[:, 0]
        boxes = torch.cat([each.boxes for each in samples])[chosen]
        pairs = zip(samples, targets, strict=True)
        wanted = torch.cat([target["boxes"].float()[each.found] for each, target in pairs])
        box_loss = self.compare_boxes(stage, deltas[chosen, labels[chosen]], boxes, wanted)
        return {
            "class": (F.cross_entropy(logits, labels, reduction="sum"), len(labels)),
            "box": (box_loss, len(labels)),
        }

    def compare_boxes(self, stage: BoxStage, deltas: Tensor, boxes: Tensor, wanted: Tensor) -> Tensor:
        """The sum of the losses of boxes [boxes, 4] that are moved by deltas; `wanted` are the objects' boxes."""
        raise NotImplementedError

    def find_mask_loss(
        self, head: nn.Module, maps: list[Tensor], samples: Sequence[Samples], targets: Sequence[Target]
    ) -> Sums:
        """The sum of the losses of masks, each a mean over its pixels, over all boxes of objects."""
        boxes = [each.boxes[each.objects >= 0] for each in samples]
        labels = torch.cat([each.labels[each.objects >= 0] for each in samples])
        logits = head(self.mask_pool(maps[:-1], boxes))
        logits = logits[torch.arange(len(labels), device=labels.device), labels]
        size = logits.shape[-1]
        wanted = torch.cat(
            [
                crop_masks(target["masks"], each.found, own, size)
                for target, each, own in zip(targets, samples, boxes, strict=True)
            ]
        )
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / size**2
        return {"mask": (loss, len(labels))}

    @torch.no_grad()
    def refine_samples(
        self,
        stage: BoxStage,
        samples: Sequence[Samples],
        logits: Tensor,
        deltas: Tensor,
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """The proposals for the next stage: moved by the deltas of their own class, background by its likeliest."""
        labels = torch.cat([each.labels for each in samples])
        labels = torch.where(labels < self.num_classes, labels, logits[:, :-1].argmax(1))
        moved = self.refine(stage, [each.boxes for each in samples], labels, deltas, sizes)
        return [own[~each.given] for own, each in zip(moved, samples, strict=True)]

    def refine(
        self,
        stage: BoxStage,
        boxes: Sequence[Tensor],
        labels: Tensor,
        deltas: Tensor,
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Boxes of each image, moved by the deltas of a class each, and clipped to the content."""
        chosen = deltas[torch.arange(len(labels), device=labels.device), labels]
        moved = stage.decode(chosen, torch.cat(list(boxes))).split([len(each) for each in boxes])
        return [clip_boxes_to_image(each, size) for each, size in zip(moved, sizes, strict=True)]

    # ----------------------------------------------------------------------------------------------------
    # Prediction
    # ----------------------------------------------------------------------------------------------------

    def predict(self, maps: list[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        outputs, anchors = self.proposal_network(maps), self.proposal_network.anchors(maps)
        boxes = self.proposal_network.propose(outputs, anchors, sizes, self.num_proposals[False], training=False)
        votes: list[Tensor] = []
        for index, stage in enumerate(self.stages):
            logits, deltas = stage(self.box_pool(maps[:-1], boxes))
            votes.append(logits)
            if index + 1 < len(self.stages):
                boxes = self.refine(stage, boxes, logits[:, :-1].argmax(1), deltas, sizes)
        numbers = [len(each) for each in boxes]
        scores = torch.stack(votes).mean(0).softmax(1)[:, :-1].split(numbers)
        moved = self.stages[-1].decode(deltas, torch.cat(boxes)).split(numbers)
        predictions = [self.choose(*each) for each in zip(moved, scores, sizes, strict=True)]
        for prediction, masks in zip(predictions, self.draw_masks(maps, predictions), strict=True):
            prediction["masks"] = masks
        return predictions

    def choose(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """The predictions of an image among boxes [boxes, classes, 4] with scores [boxes, classes]."""
        chosen, labels = (scores > self.score_threshold).nonzero().unbind(1)
        found, scores = boxes[chosen, labels], scores[chosen, labels]
        found, kept = suppress(found, scores, labels, size=size, threshold=self.OVERLAP, most=self.num_detections)
        return {"boxes": found[kept], "labels": labels[kept], "scores": scores[kept]}

    def draw_masks(self, maps: list[Tensor], predictions: Sequence[Mapping[str, Tensor]]) -> Sequence[Tensor]:
        """Probabilities [found, 28, 28] of the masks of each image's predictions: means over all mask heads."""
        regions = self.mask_pool(maps[:-1], [each["boxes"] for each in predictions])
        labels = torch.cat([each["labels"] for each in predictions])
        chosen = torch.arange(len(labels), device=labels.device), labels
        drawn = torch.stack([head(regions)[chosen].sigmoid() for head in self.mask_heads]).mean(0)
        return drawn.split([len(each["labels"]) for each in predictions])


class MaskRCNN(RegionDetector):
    """Mask R-CNN: proposals are classified, moved once, and get a mask.

    The pyramid has strides 4 to 64 over a backbone with four maps, and 4 to 32 over one with three.

    Args:
        num_classes: classes of objects.
        backbone, backbone_args, in_chans: see `DenseModel`.
        pyramid_dim: channels of the pyramid, and of the mask head.
        box_dim: width of the two linear layers that read a region.
        mask_convs: convolutions of the mask head.
        anchor_scale: side of the square anchors, as a multiple of the stride; smaller for small objects.
        ratios: height / width of anchors.
        num_proposals: proposals of an image, in prediction.
        num_training_proposals: the same in training, of which `num_samples` are learned from.
        score_threshold: what a prediction's score must be above.
        num_detections: predictions of an image at most.
    """

    def __init__(
        self,
        *,
        num_classes: int = 80,
        backbone: str = "ssvit_tiny",
        backbone_args: Mapping[str, Any] | None = None,
        in_chans: int = 3,
        pyramid_dim: int = 256,
        box_dim: int = 1024,
        mask_convs: int = 4,
        anchor_scale: float = 8.0,
        ratios: Sequence[float] = RATIOS,
        num_proposals: int = 1000,
        num_training_proposals: int = 1000,
        num_samples: int = 512,
        score_threshold: float = 0.05,
        num_detections: int = 100,
    ) -> None:
        super().__init__(
            backbone=backbone,
            backbone_args=backbone_args,
            in_chans=in_chans,
            pyramid_dim=pyramid_dim,
            anchor_scale=anchor_scale,
            ratios=ratios,
            proposal_beta=0.0,
            num_proposals=num_proposals,
            num_training_proposals=num_training_proposals,
            num_samples=num_samples,
            score_threshold=score_threshold,
            num_detections=num_detections,
        )
        body = TwoMLPHead(pyramid_dim * BOX_PLACES**2, box_dim)
        self.add_stages([BoxStage(body, box_dim, overlap=0.5, weight=1.0, deviations=(0.1, 0.2))], mask_convs)
        self.reset_classifier(num_classes)

    def compare_boxes(self, stage: BoxStage, deltas: Tensor, boxes: Tensor, wanted: Tensor) -> Tensor:
        return F.l1_loss(deltas, stage.coder.encode_single(wanted, boxes), reduction="sum")


class CascadeMaskRCNN(RegionDetector):
    """Cascade Mask R-CNN: three stages, each of which refines the boxes of the one before it and is stricter with them.

    Predictions have the mean logits of the three stages, the boxes of the last one, and the mean of three masks. Its
    network for proposals learns by smooth L1.

    Args:
        box_convs: convolutions, each with batch norm, in front of the linear layer that reads a region.
        box_dim: width of that layer.
        num_classes, backbone, backbone_args, in_chans, pyramid_dim, mask_convs, anchor_scale, ratios, num_proposals,
            num_training_proposals, num_samples, score_threshold, num_detections: see `MaskRCNN`.
    """

    STAGES = ((0.5, 1.0, 1.0), (0.6, 0.5, 0.5), (0.7, 0.25, 1 / 3))  # overlap, weight, share of the first's deviations
    BOX_WEIGHT = 10.0

    def __init__(
        self,
        *,
        num_classes: int = 80,
        backbone: str = "ssvit_tiny",
        backbone_args: Mapping[str, Any] | None = None,
        in_chans: int = 3,
        pyramid_dim: int = 256,
        box_convs: int = 4,
        box_dim: int = 1024,
        mask_convs: int = 4,
        anchor_scale: float = 8.0,
        ratios: Sequence[float] = RATIOS,
        num_proposals: int = 1000,
        num_training_proposals: int = 2000,
        num_samples: int = 512,
        score_threshold: float = 0.05,
        num_detections: int = 100,
    ) -> None:
        super().__init__(
            backbone=backbone,
            backbone_args=backbone_args,
            in_chans=in_chans,
            pyramid_dim=pyramid_dim,
            anchor_scale=anchor_scale,
            ratios=ratios,
            proposal_beta=1 / 9,
            num_proposals=num_proposals,
            num_training_proposals=num_training_proposals,
            num_samples=num_samples,
            score_threshold=score_threshold,
            num_detections=num_detections,
        )
        shape = (pyramid_dim, BOX_PLACES, BOX_PLACES)
        stages = []
        for overlap, weight, share in self.STAGES:
            body = FastRCNNConvFCHead(shape, [pyramid_dim] * box_convs, [box_dim], norm_layer=nn.BatchNorm2d)
            deviations = (0.1 * share, 0.2 * share)
            stages.append(BoxStage(body, box_dim, overlap=overlap, weight=weight, deviations=deviations))
        self.add_stages(stages, mask_convs)
        self.reset_classifier(num_classes)

    def compare_boxes(self, stage: BoxStage, deltas: Tensor, boxes: Tensor, wanted: Tensor) -> Tensor:
        moved = stage.decode(deltas, boxes)
        return self.BOX_WEIGHT * generalized_box_iou_loss(moved, wanted, reduction="sum")


default_cfgs = generate_default_cfgs(
    {
        "mask_rcnn": make_dense_cfg(input_size=(3, 800, 1344), num_classes=80),
        "cascade_mask_rcnn": make_dense_cfg(input_size=(3, 800, 1344), num_classes=80),
    }
)


@register_model
def mask_rcnn(pretrained: bool = False, **model_args: Any) -> MaskRCNN:
    """Mask R-CNN over a backbone, for COCO unless told otherwise; arguments are those of `MaskRCNN`."""
    return create_dense(MaskRCNN, "mask_rcnn", pretrained, **model_args)


@register_model
def cascade_mask_rcnn(pretrained: bool = False, **model_args: Any) -> CascadeMaskRCNN:
    """Cascade Mask R-CNN over a backbone, for COCO unless told otherwise; arguments are those of `CascadeMaskRCNN`."""
    return create_dense(CascadeMaskRCNN, "cascade_mask_rcnn", pretrained, **model_args)
