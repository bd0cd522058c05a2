"""Boxes, against torchvision where it computes the same, and against calculations by hand."""

import json
from pathlib import Path

import pytest
import torch
from helpers.ranks import start_pair, take_place
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from s3a.models.regions import (
    IGNORED,
    NEGATIVE,
    AnchorGrid,
    RegionPool,
    average_losses,
    crop_masks,
    find_levels,
    ignore_padding,
    match_boxes,
    paste_masks,
    sample_boxes,
    suppress,
)


def draw_boxes(number: int, side: float = 100) -> Tensor:
    corners = torch.rand(number, 2) * side
    return torch.cat([corners, corners + 5 + torch.rand(number, 2) * side / 2], dim=1)


def test_square_anchors_are_those_of_torchvision():
    """Of two scales, at the same places in the same order."""
    maps = [torch.zeros(2, 1, 6, 10), torch.zeros(2, 1, 3, 5)]
    other = AnchorGenerator(sizes=((32, 64), (64, 128)), aspect_ratios=((1.0,), (1.0,)))
    expected = other(ImageList(torch.zeros(2, 3, 24, 40), [(24, 40)] * 2), maps)[0]
    own = AnchorGrid((4, 8), scales=(8, 16), ratios=(1.0,))(maps)
    assert [len(each) for each in own] == [120, 30]
    torch.testing.assert_close(torch.cat(own), expected)


def test_other_anchors_keep_their_area():
    """Ratios are height / width, nothing is rounded, and the stride is what it is, not the quotient of sizes."""
    flat, square, tall = AnchorGrid((64,), scales=(8,))([torch.zeros(1, 1, 2, 3)])[0].view(6, 3, 4)[4]
    centre = torch.tensor([64.0, 64.0])
    for anchor, ratio in ((flat, 0.5), (square, 1.0), (tall, 2.0)):
        width, height = (anchor[2:] - anchor[:2]).tolist()
        assert (width * height, height / width) == pytest.approx((512**2, ratio))
        torch.testing.assert_close((anchor[2:] + anchor[:2]) / 2, centre)


def test_matches_are_those_of_torchvision():
    for _ in range(5):
        overlaps = box_iou(draw_boxes(6), draw_boxes(300))
        assert torch.equal(match_boxes(overlaps, positive=0.5, negative=0.3), Matcher(0.5, 0.3)(overlaps))


@pytest.mark.parametrize("lowest", [0.0, 0.3])
def test_objects_take_what_overlaps_them_most(lowest: float):
    """The last object where several want a box, and none of the boxes that do not touch it."""
    ignored = 0
    for _ in range(20):
        overlaps = box_iou(torch.cat([draw_boxes(6), torch.tensor([[900.0, 900, 950, 950]])]), draw_boxes(40))
        expected = Matcher(0.7, 0.3)(overlaps)
        for index, own in enumerate(overlaps):
            if own.max() > 0 and own.max() >= lowest:
                expected[own == own.max()] = index
        matches = match_boxes(overlaps, positive=0.7, negative=0.3, lowest=lowest)
        assert torch.equal(matches, expected)
        assert 6 not in matches
        ignored += (matches == IGNORED).sum()
    assert ignored > 0


def test_without_objects_all_is_background():
    assert match_boxes(torch.zeros(0, 4), positive=0.7, negative=0.3, lowest=0.3).tolist() == [NEGATIVE] * 4


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"), [(10, 100, (4, 12)), (2, 100, (2, 14)), (10, 3, (4, 3)), (0, 0, (0, 0))]
)
def test_samples(positives: int, negatives: int, expected: tuple[int, int]):
    """A quarter of 16 are objects' at most, background fills the rest, and every box has the same chance."""
    matches = torch.cat([torch.arange(positives), torch.full((negatives,), NEGATIVE), torch.full((20,), IGNORED)])[
        torch.randperm(positives + negatives + 20)
    ]
    counts = torch.zeros(len(matches))
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        chosen = sample_boxes(matches, 16, 0.25, generator)
        assert tuple(map(len, chosen)) == expected
        assert (matches[chosen[0]] >= 0).all() and (matches[chosen[1]] == NEGATIVE).all()
        counts[torch.cat(chosen)] += 1
        assert len(torch.cat(chosen).unique()) == sum(expected)
    for mask, number in zip((matches >= 0, matches == NEGATIVE), expected, strict=True):
        wanted = number / max(1, mask.sum())
        torch.testing.assert_close(counts[mask] / 400, torch.full_like(counts[mask], wanted), rtol=0, atol=0.15)


def test_levels():
    """Side 112 is the first on the map of stride 8, 224 on that of 16, 448 on that of 32."""
    sides = torch.tensor([0.0, 1, 111, 112, 223, 224, 447, 448, 5000])
    boxes = torch.stack([sides * 0 + 7, sides * 0, 7 + sides / 2, sides * 2], dim=1)
    assert find_levels(boxes, 4).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert find_levels(boxes, 3).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_regions_are_aligned():
    """On maps that hold the coordinates of their pixels' centres, a region reads the centres of its places."""
    maps = []
    for stride in (4, 8):
        centres = (torch.arange(400 // stride) + 0.5) * stride
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        maps.append(torch.stack([torch.stack([x, y]), torch.stack([x, y]) + 1000]))
    boxes = [torch.tensor([[20.0, 30, 90, 65]]), torch.tensor([[31.0, 17, 311, 297], [50, 60, 57, 67]])]
    squares = RegionPool(7, (4, 8))(maps, boxes)
    assert find_levels(torch.cat(boxes), 2).tolist() == [0, 1, 0]
    for square, (left, top, right, bottom), offset in zip(squares, torch.cat(boxes), (0, 1000, 1000), strict=True):
        x = left + (right - left) * (torch.arange(7) + 0.5) / 7
        y = top + (bottom - top) * (torch.arange(7) + 0.5) / 7
        torch.testing.assert_close(square[0], offset + x.expand(7, 7), rtol=0, atol=1e-3)
        torch.testing.assert_close(square[1], offset + y[:, None].expand(7, 7), rtol=0, atol=1e-3)


def test_regions_of_half_precision_keep_their_coordinates():
    maps, boxes = [torch.rand(1, 4, 100, 100)], [torch.tensor([[301.3, 200.7, 330.1, 250.9]])]
    pool = RegionPool(7, (4,))
    torch.testing.assert_close(pool([maps[0].bfloat16()], boxes).float(), pool(maps, boxes), rtol=0.02, atol=0.02)
    assert pool(maps, [torch.zeros(0, 4)]).shape == (0, 4, 7, 7)


def test_suppression():
    """Clipped, without what lies outside, the best of each group first."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [5, 5, 40, 40], [50, 0, 60, 10]])
    scores, groups = torch.tensor([0.5, 0.9, 0.8, 0.7, 1.0]), torch.tensor([0, 0, 1, 0, 0])
    clipped, kept = suppress(boxes, scores, groups, size=(20, 30), threshold=0.5, most=3)
    assert kept.tolist() == [1, 2, 3]
    assert clipped[3].tolist() == [5, 5, 30, 20]
    assert suppress(boxes, scores, groups, size=(20, 30), threshold=0.5, most=1)[1].tolist() == [1]


# --------------------------------------------------------------------------------------------------------
# Losses of several processes
# --------------------------------------------------------------------------------------------------------


def test_losses_are_means():
    losses = average_losses({"a": torch.tensor(6.0), "b": torch.tensor(0.0)}, {"a": 4, "b": 0})
    assert losses == {"a": 1.5, "b": 0.0}


def average_apart(rank: int, port: int, report: Path) -> None:
    """The losses of the process of that rank, and their gradient."""
    take_place(rank, port)
    torch.distributed.init_process_group("gloo")
    weight = torch.tensor(2.0, requires_grad=True)
    losses = average_losses({"a": weight * (3 + 4 * rank), "b": weight * 5 * rank}, {"a": 1 + 2 * rank, "b": 3 * rank})
    sum(losses.values()).backward()
    seen = {name: each.item() for name, each in losses.items()} | {"gradient": weight.grad.item()}
    report.with_suffix(f".{rank}").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


def test_processes_share_what_losses_are_divided_by(tmp_path: Path):
    """The mean over processes is the whole sum over the whole count, for losses and gradients."""
    report = tmp_path / "report"
    assert start_pair(average_apart, report) == [0, 0]
    seen = [json.loads(report.with_suffix(f".{rank}").read_text()) for rank in range(2)]
    means = {name: (seen[0][name] + seen[1][name]) / 2 for name in seen[0]}
    assert means == pytest.approx({"a": 2 * (3 + 7) / 4, "b": 2 * 5 / 3, "gradient": 10 / 4 + 5 / 3})
    assert seen[0]["b"] == 0


# --------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------


def test_masks_in_boxes():
    """Half a box on whole pixels, in the mask of its own object."""
    masks = torch.zeros(2, 40, 40, dtype=torch.uint8)
    masks[1, 10:38, :20] = 1
    crop = crop_masks(masks, torch.tensor([1, 0]), torch.tensor([[6.0, 10, 34, 38]] * 2), 28)
    assert crop.dtype == torch.float32
    assert torch.equal(crop[0], (torch.arange(28) < 14).float().expand(28, 28))
    assert not crop[1].any()
    crop = crop_masks(masks, torch.tensor([1]), torch.tensor([[6.7, 10, 34.7, 38]]), 28)  # the place 13 shows 0.3 of it
    assert torch.equal(crop[0], (torch.arange(28) < 13).float().expand(28, 28))


def test_a_full_mask_covers_the_pixels_whose_centres_lie_in_its_box():
    """Also where the box lies outside of the image in part, or is empty."""
    boxes = torch.tensor([[2.6, 1.2, 9.4, 5.5], [-3, -3, 4.2, 2], [5, 5, 5, 5]])
    pasted = paste_masks(torch.ones(3, 28, 28), boxes, 8, 12)
    y, x = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(12) + 0.5, indexing="ij")
    for own, (left, top, right, bottom) in zip(pasted[:2], boxes[:2], strict=True):
        inside = (x > left) & (x < right) & (y > top) & (y < bottom)
        # the zeros around a mask count for half of a place at its border
        border = (x < left + 0.2) | (x > right - 0.2) | (y < top + 0.2) | (y > bottom - 0.2)
        assert torch.equal(own & ~border, inside & ~border)
        assert not (own & ~inside).any()
    assert pasted[2].sum() <= 1
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 8, 12).shape == (0, 8, 12)


def test_masks_are_read_between_the_centres_of_their_places():
    """Those of four places in a box of eight pixels lie at 1, 3, 5 and 7: half of the first is left at 2."""
    mask = torch.tensor([1.0, 0, 0, 0]).expand(1, 4, 4)
    pasted = paste_masks(mask, torch.tensor([[0.0, 0, 8, 8]]), 8, 8)[0]
    assert torch.equal(pasted, (torch.arange(8) < 2).expand(8, 8))


def test_a_mask_returns_to_its_place():
    """What is cut out of a disc by a box and pasted again is the disc, but for its edge."""
    y, x = torch.meshgrid(torch.arange(80) + 0.5, torch.arange(100) + 0.5, indexing="ij")
    disc = ((x - 47.3) ** 2 + (y - 41.8) ** 2).sqrt() < 25
    box = torch.tensor([[22.3, 16.8, 72.3, 66.8]])
    pasted = paste_masks(crop_masks(disc[None], torch.tensor([0]), box, 28), box, 80, 100)[0]
    assert (pasted & disc).sum() / (pasted | disc).sum() > 0.96


def test_background_of_the_padding_is_ignored():
    """Where an anchor is for an object it stays; else its centre decides."""
    anchors = torch.tensor([[0.0, 0, 20, 20], [30, 0, 50, 20], [0, 30, 20, 50], [30, 0, 50, 20], [25, 0, 34, 20]])
    matches = torch.tensor([NEGATIVE, NEGATIVE, NEGATIVE, 0, NEGATIVE])
    found = ignore_padding(matches, anchors, (32, 32))
    ignored = IGNORED
    assert found.tolist() == [NEGATIVE, ignored, ignored, 0, NEGATIVE]
    assert ignore_padding(matches, anchors, (64, 64)).tolist() == matches.tolist()
