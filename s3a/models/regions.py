"""Boxes and the regions of maps under them: anchors, assignment, sampling, RoIAlign, losses and masks.

Boxes are [..., 4] float32, (left, top, right, bottom) in pixels of the padded image. As in mmdetection, on which the
authors trained, and unlike in torchvision, anchors are not rounded, and regions are aligned to the centres of pixels.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes, roi_align

from s3a.nn.batch_norm import count_processes

NEGATIVE = -1  # of `match_boxes`: background
IGNORED = -2  # neither an object nor background
CANONICAL_SIDE = 224  # of boxes on the map of stride 16 (arXiv 1612.03144)
SMALLEST_SIDE = 1e-3


class AnchorGrid(nn.Module):
    """Anchors around the places of maps, which are the multiples of their strides.

    Args:
        strides: of the maps.
        scales: sides of the square anchors, as multiples of the stride.
        ratios: height / width of anchors; all of one scale have the same area.
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float], ratios: Sequence[float] = (0.5, 1, 2)) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.shapes = [(scale * ratio**0.5, scale * ratio**-0.5) for ratio in ratios for scale in scales]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Anchors [height * width * anchors, 4] of maps [batch, dim, height, width]: row by row, a place's together."""
        return [self.lay(each, stride) for each, stride in zip(maps, self.strides, strict=True)]

    def lay(self, x: Tensor, stride: int) -> Tensor:
        """The anchors of one map."""
        (rows, columns), device = x.shape[2:], x.device
        half = torch.tensor(self.shapes, device=device) * (stride / 2)  # [anchors, 2], heights and widths
        base = torch.cat([-half.flip(1), half.flip(1)], dim=1)
        y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
        places = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4) * float(stride)
        return (places + base).reshape(-1, 4)


def match_boxes(overlaps: Tensor, *, positive: float, negative: float, lowest: float | None = None) -> Tensor:
    """Which object every box is for: [boxes] int64, an object's index, `NEGATIVE` or `IGNORED`.

    Args:
        overlaps: [objects, boxes], the intersection over union of each pair.
        positive: boxes that overlap their nearest object by this much are its own.
        negative: boxes that overlap all objects by less are background; those between are ignored.
        lowest: an object takes the boxes that overlap it the most, if that is at least so much; None for none.
    """
    if len(overlaps) == 0:
        return torch.full(overlaps.shape[1:], NEGATIVE, dtype=torch.int64, device=overlaps.device)
    best, nearest = overlaps.max(0)
    matches = torch.where(best >= positive, nearest, torch.where(best < negative, NEGATIVE, IGNORED))
    if lowest is None:
        return matches
    most = overlaps.max(1, keepdim=True).values
    taken = (overlaps == most) & (most >= max(lowest, torch.finfo(overlaps.dtype).tiny))
    # of several objects the last one, as mmdetection has it
    last = (taken * torch.arange(1, len(overlaps) + 1, device=overlaps.device)[:, None]).max(0).values
    return torch.where(last > 0, last - 1, matches)


def ignore_padding(matches: Tensor, anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """The matches, with `IGNORED` for background anchors whose centre lies outside of an image's content.

    Else what a batch is padded to would decide what is drawn of the background.

    Args:
        size: height and width of the content.
    """
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    outside = (centres[:, 0] >= size[1]) | (centres[:, 1] >= size[0])
    return torch.where(outside & (matches == NEGATIVE), IGNORED, matches)


def sample_boxes(matches: Tensor, number: int, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of boxes that are for an object, and of background, drawn without replacement.

    Args:
        matches: what `match_boxes` returned.
        number: how many at most, of which at most `fraction` are for an object; background fills the rest.
    """
    chosen: list[Tensor] = []
    for mask, most in ((matches >= 0, int(number * fraction)), (matches == NEGATIVE, number)):
        found = mask.nonzero()[:, 0]
        most -= len(chosen[0]) if chosen else 0
        if len(found) > most:
            found = found[torch.randperm(len(found), generator=generator, device=found.device)[:most]]
        chosen.append(found)
    return chosen[0], chosen[1]


def find_levels(boxes: Tensor, levels: int) -> Tensor:
    """The map that each box is read from, [boxes] int64: 4 + log2(side / 224), rounded down, less 2; `levels` at most.

    The first map is that of stride 4.
    """
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
    found = torch.floor(2 + torch.log2(sides / CANONICAL_SIDE + 1e-6))
    return found.clamp(0, levels - 1).long()


class RegionPool(nn.Module):
    """Reads a square of features for every box by RoIAlign, from the map that suits its size.

    Regions are aligned to the centres of pixels, with as many samples as they have pixels.

    Args:
        size: places of a square a side.
        strides: of the maps; the first is 4.
    """

    def __init__(self, size: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.size, self.strides = size, tuple(strides)

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Squares [all boxes, dim, size, size] of maps [batch, dim, height, width] and the boxes of each image."""
        images = [each.new_full((len(each), 1), index, dtype=torch.float32) for index, each in enumerate(boxes)]
        regions = torch.cat([torch.cat(images), torch.cat(list(boxes)).float()], dim=1)
        levels = find_levels(regions[:, 1:], len(self.strides))
        squares = maps[0].new_zeros(len(regions), maps[0].shape[1], self.size, self.size)
        for level, (features, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = (levels == level).nonzero()[:, 0]
            # in float32: half precision has no place for coordinates
            read = roi_align(features.float(), regions[chosen], self.size, 1 / stride, sampling_ratio=0, aligned=True)
            squares = squares.index_put((chosen,), read.to(squares.dtype))
        return squares


def suppress(
    boxes: Tensor, scores: Tensor, groups: Tensor, *, size: tuple[int, int], threshold: float, most: int
) -> tuple[Tensor, Tensor]:
    """Boxes clipped to an image, and the indices of those to keep, by falling score.

    Args:
        groups: [boxes] int64; boxes of different groups, such as classes, do not suppress each other.
        size: height and width of the image's content.
        threshold: a box that overlaps a better one by more is suppressed.
        most: how many to keep at most.
    """
    boxes = clip_boxes_to_image(boxes, size)
    whole = remove_small_boxes(boxes, SMALLEST_SIDE)
    kept = batched_nms(boxes[whole], scores[whole], groups[whole], threshold)[:most]
    return boxes, whole[kept]


def average_losses(sums: Mapping[str, Tensor], counts: Mapping[str, Tensor | int]) -> dict[str, Tensor]:
    """Sums of losses over what all processes have, as shares whose mean over processes is the loss of the whole batch.

    DDP takes that mean of gradients. With one process they are sums / counts. All processes must call it.

    Args:
        counts: for each sum, how many this process has of what it is divided by; 1 in all at least is taken.
    """
    device = next(iter(sums.values())).device
    totals = torch.stack([torch.as_tensor(counts[name], dtype=torch.float32, device=device) for name in sums])
    processes = count_processes()
    if processes > 1:
        dist.all_reduce(totals)
    shares = processes / totals.clamp(min=1)
    return {name: each * share for (name, each), share in zip(sums.items(), shares, strict=True)}


def crop_masks(masks: Tensor, objects: Tensor, boxes: Tensor, size: int) -> Tensor:
    """What masks show inside of boxes: [boxes, size, size] float32 of zeros and ones.

    Args:
        masks: [objects, height, width].
        objects: [boxes] int64, the mask of each box.
    """
    regions = torch.cat([objects[:, None].to(boxes.dtype), boxes], dim=1)
    read = roi_align(masks[:, None].to(boxes.dtype), regions, size, 1.0, sampling_ratio=0, aligned=True)
    return (read[:, 0] >= 0.5).to(boxes.dtype)


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int, *, threshold: float = 0.5) -> Tensor:
    """Masks of boxes in an image of height x width pixels: [masks, height, width] bool.

    A pixel's probability is read bilinearly at its centre, and is 0 outside of the box: unlike torchvision's
    `paste_masks_in_image`, which rounds boxes to whole pixels.

    Args:
        masks: [masks, places, places], probabilities.
        boxes: [masks, 4], in pixels of the image.
        threshold: what a pixel's probability must be at least.
    """
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    rows = torch.arange(height, device=masks.device) + 0.5
    columns = torch.arange(width, device=masks.device) + 0.5
    for index, (mask, box) in enumerate(zip(masks.float(), boxes.float(), strict=True)):  # one: all take much memory
        left, top, right, bottom = box
        y = (rows - top) / (bottom - top).clamp(min=SMALLEST_SIDE) * 2 - 1
        x = (columns - left) / (right - left).clamp(min=SMALLEST_SIDE) * 2 - 1
        grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
        read = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
        inside = (x >= -1) & (x < 1) & ((y >= -1) & (y < 1))[:, None]
        pasted[index] = (read >= threshold) & inside
    return pasted
