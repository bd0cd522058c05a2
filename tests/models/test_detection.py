"""RetinaNet, Mask R-CNN and its cascade: torchvision's losses and predictions where the settings are the same."""

import math
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet as OtherRetinaNet
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou

import s3a
from s3a.models import rcnn
from s3a.models.detection import Detector, pad_images
from s3a.nn.stochastic_depth import place_in_batch

CPU = torch.device("cpu")
BACKBONE = {"dims": (16, 24, 32), "depths": (1, 2, 1), "num_heads": (1, 2, 2)}
FOUR_MAPS = {
    "dims": (8, 12, 16, 24),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 2, 2),
    "mlp_ratios": (2, 2, 2, 2),
    "layer_scale": (None,) * 4,
}
REGIONS = {"box_dim": 16, "mask_convs": 1, "num_proposals": 50, "num_training_proposals": 60, "num_samples": 16}
HEADS = {
    "retinanet": {"head_convs": 1, "anchor_scale": 3.0},
    "mask_rcnn": {**REGIONS, "anchor_scale": 4.0},
    "cascade_mask_rcnn": {**REGIONS, "anchor_scale": 4.0, "box_convs": 1},
}


def build(name: str, **model_args: object) -> Detector:
    """A small model in training, but for its batch norms."""
    defaults = {"backbone": "ssvit_nano", "backbone_args": BACKBONE, "num_classes": 3, "pyramid_dim": 8}
    model = timm.create_model(name, **{**defaults, **HEADS[name], **model_args}).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def draw_target(number: int, height: int = 96, width: int = 128) -> dict[str, Tensor]:
    """Rectangles, and the masks that fill them."""
    corners = torch.rand(number, 2) * torch.tensor([width - 40.0, height - 40.0])
    boxes = torch.cat([corners, corners + 10 + 30 * torch.rand(number, 2)], dim=1).round()
    masks = torch.zeros(number, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return {"boxes": boxes, "labels": torch.randint(3, (number,)), "masks": masks}


def draw_batch(*numbers: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images with so many objects each."""
    return torch.randn(len(numbers), 3, 96, 128), [draw_target(number) for number in numbers]


# --------------------------------------------------------------------------------------------------------
# All detectors
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_gradients_reach_every_parameter(name: str):
    """Losses are float32 scalars, and more than 0."""
    model = build(name)
    images, targets = draw_batch(3, 2)
    losses = model(images, [(96, 128), (90, 100)], targets)
    assert all(loss.dtype == torch.float32 and loss.ndim == 0 and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", HEADS)
def test_images_without_objects(name: str):
    """They teach what background is, and every parameter has a gradient, as DDP needs; then nothing is found."""
    model = build(name)
    images, targets = draw_batch(0, 0)
    losses = model(images, None, targets)
    assert all(loss.isfinite() for loss in losses.values())
    assert {key.partition("_")[0] for key, loss in losses.items() if loss > 0} <= {"class", "proposal"}
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.score_threshold = 1.0
    with torch.no_grad():
        for found in model.eval()(images):
            assert found["boxes"].shape == (0, 4)
            assert found["labels"].shape == found["scores"].shape == (0,)
            assert found.get("masks", torch.zeros(0, 28, 28)).shape == (0, 28, 28)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HEADS)
def test_losses_in_half_precision(name: str, dtype: torch.dtype):
    """They are float32, finite, and about the same; so are predictions."""
    model = build(name)
    images, targets = draw_batch(2, 0)
    with place_in_batch(0, 0, 2, CPU):
        expected = model(images, None, targets)
    with torch.autocast("cpu", dtype):
        with place_in_batch(0, 0, 2, CPU):
            losses = model(images, None, targets)
        found = model.eval()(images)[0]
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(loss.isfinite() for loss in losses.values())
    name = "class" if "class" in losses else "class_1"
    assert losses[name].item() == pytest.approx(expected[name].item(), rel=0.1)
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32


@pytest.mark.parametrize("name", HEADS)
def test_predictions_lie_in_the_content(name: str):
    """Sorted by score, of known classes, and not of the padding."""
    model = build(name, score_threshold=0.001).eval()
    with torch.no_grad():
        found = model(torch.randn(2, 3, 96, 128), [(96, 128), (50, 70)])
    for own, (height, width) in zip(found, [(96, 128), (50, 70)], strict=True):
        assert 0 < len(own["boxes"]) <= 100
        assert (own["boxes"] >= 0).all()
        assert (own["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert (own["boxes"][:, 2:] > own["boxes"][:, :2]).all()
        assert (own["scores"].diff() <= 0).all() and (own["scores"] > 0.001).all()
        assert set(own["labels"].tolist()) <= {0, 1, 2}
        if name != "retinanet":
            assert own["masks"].shape == (len(own["boxes"]), 28, 28)
            assert ((own["masks"] >= 0) & (own["masks"] <= 1)).all()


@pytest.mark.parametrize("name", HEADS)
def test_inputs_that_cannot_be(name: str):
    model = build(name)
    images, targets = draw_batch(1)
    with pytest.raises(ValueError, match=r"images are 96 x 100 pixels: both must be multiples of 32; use pad_images"):
        model(images[..., :100])
    with pytest.raises(ValueError, match=r"sizes are \[\(97, 128\)\] for 1 images of 96 x 128"):
        model(images, [(97, 128)], targets)
    with pytest.raises(ValueError, match=r"sizes are targets: .* give targets by targets="):
        model(images, targets)
    with pytest.raises(ValueError, match="2 targets for 1 images"):
        model(images, None, targets * 2)
    with pytest.raises(ValueError, match=r"target of image 0 lacks labels"):
        model(images, None, [{key: value for key, value in targets[0].items() if key != "labels"}])
    with pytest.raises(ValueError, match=r"boxes of image 0 have shape \(2, 4\): with 1 labels it must be \(1, 4\)"):
        model(images, None, [{**targets[0], "boxes": torch.rand(2, 4)}])
    for wrong in ({"boxes": torch.tensor([[5.0, 5, 5, 9]])}, {"labels": torch.tensor([3])}):
        with pytest.raises(ValueError, match=r"a box is empty, or a label is not one of 0 to 2"):
            model(images, None, [{**targets[0], **wrong}])


def test_padding():
    """Right and below, to multiples; a batch stays what it is."""
    first, second = torch.rand(3, 40, 70) + 1, torch.rand(3, 64, 30) + 1
    images, sizes = pad_images([first, second])
    assert images.shape == (2, 3, 64, 96)
    assert sizes == [(40, 70), (64, 30)]
    assert torch.equal(images[0, :, :40, :70], first)
    assert images.count_nonzero() == first.numel() + second.numel()
    assert pad_images(images)[0].shape == images.shape
    assert pad_images([first], multiple=50)[0].shape == (1, 3, 50, 100)


@pytest.mark.parametrize(
    ("name", "backbone_args", "strides"),
    [
        ("retinanet", FOUR_MAPS, (8, 16, 32, 64, 128)),
        ("retinanet", BACKBONE, (8, 16, 32, 64)),
        ("mask_rcnn", FOUR_MAPS, (4, 8, 16, 32, 64)),
        ("mask_rcnn", BACKBONE, (4, 8, 16, 32)),
    ],
)
def test_pyramids(name: str, backbone_args: dict[str, object], strides: tuple[int, ...]):
    """Levels as many as strides, of sizes that are rounded up, and an anchor at every place."""
    model = build(name, backbone_args=backbone_args)
    maps = model.extract_maps(torch.randn(1, 3, 96, 160))
    assert [tuple(each.shape[2:]) for each in maps] == [(math.ceil(96 / s), math.ceil(160 / s)) for s in strides]
    grid = model.anchors if name == "retinanet" else model.proposal_network.anchors
    assert grid.strides == strides
    per_place = 9 if name == "retinanet" else 3
    assert [len(each) for each in grid(maps)] == [per_place * each.shape[2] * each.shape[3] for each in maps]


def test_anchors_are_the_published_ones():
    """Areas 32^2 to 512^2 in two steps; RetinaNet has three an octave on each level, from 32^2 to 813^2."""
    with torch.device("meta"):
        retina, mask = timm.create_model("retinanet"), timm.create_model("mask_rcnn")
    sides = {
        round((height * width) ** 0.5 * stride, 2)
        for grid in (mask.proposal_network.anchors,)
        for stride in grid.strides
        for height, width in grid.shapes
    }
    assert sides == {32, 64, 128, 256, 512}
    assert mask.proposal_network.anchors.strides == (4, 8, 16, 32, 64)
    assert retina.anchors.strides == (8, 16, 32, 64, 128)
    sides = {round((height * width) ** 0.5 * 8, 2) for height, width in retina.anchors.shapes}
    assert sides == {32, 40.32, 50.8}


# --------------------------------------------------------------------------------------------------------
# RetinaNet
# --------------------------------------------------------------------------------------------------------


def run_heads(model: s3a.RetinaNet, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, deltas, and anchors of each level."""
    maps = model.extract_maps(images)
    logits = torch.cat([model.class_head(each, 3) for each in maps], dim=1)
    return logits, torch.cat([model.box_head(each, 4) for each in maps], dim=1), model.anchors(maps)


@torch.no_grad()
def test_retinanet_losses_are_those_of_torchvision():
    """Focal loss and L1 of each image; but divided by the objects' anchors of all images."""
    model = build("retinanet")
    nn.init.normal_(model.class_head.classifier.weight, std=4)
    images, targets = draw_batch(3, 1)
    logits, deltas, anchors = run_heads(model, images)
    other = RetinaNetHead(8, 9, 3)
    sums, positives = {"class": 0, "box": 0}, 0
    for index, target in enumerate(targets):
        matches = Matcher(0.5, 0.4, allow_low_quality_matches=True)(box_iou(target["boxes"], torch.cat(anchors)))
        outputs = {"cls_logits": logits[index : index + 1], "bbox_regression": deltas[index : index + 1]}
        expected = other.compute_loss([target], outputs, [torch.cat(anchors)], [matches])
        own = model(images[index : index + 1], None, [target])
        assert own["class"] == pytest.approx(expected["classification"].item(), rel=1e-4)
        assert own["box"] == pytest.approx(expected["bbox_regression"].item(), rel=1e-4)
        number = int((matches >= 0).sum())
        positives += number
        sums = {key: total + own[key] * number for key, total in sums.items()}
    for key, loss in model(images, None, targets).items():
        assert loss == pytest.approx((sums[key] / positives).item(), rel=1e-4)


@torch.no_grad()
def test_retinanet_predictions_are_those_of_torchvision():
    """But for boxes that are empty once they are clipped, which torchvision keeps."""
    model = build("retinanet", num_detections=10**4).eval()
    nn.init.normal_(model.class_head.classifier.weight, std=4)
    nn.init.normal_(model.box_head.classifier.weight, std=0.5)
    images, sizes = torch.randn(2, 3, 96, 128), [(96, 128), (70, 100)]
    logits, deltas, anchors = run_heads(model, images)
    lengths = [len(each) for each in anchors]
    settings = SimpleNamespace(
        score_thresh=0.05,
        topk_candidates=1000,
        nms_thresh=0.5,
        detections_per_img=10**4,
        box_coder=BoxCoder((1, 1, 1, 1)),
    )
    outputs = {"cls_logits": logits.split(lengths, 1), "bbox_regression": deltas.split(lengths, 1)}
    expected = OtherRetinaNet.postprocess_detections(settings, outputs, [anchors, anchors], sizes)
    for own, other in zip(model(images, sizes), expected, strict=True):
        assert 100 < len(own["boxes"]) < 3 * 1000
        whole = (other["boxes"][:, 2:] > other["boxes"][:, :2]).all(1)
        for key in own:
            torch.testing.assert_close(own[key], other[key][whole], rtol=1e-4, atol=1e-3)


def test_retinanet_begins_with_rare_objects():
    """Every score is about 0.01, also after other classes."""
    model = build("retinanet")
    model.reset_classifier(7)
    for each in model.extract_maps(torch.randn(1, 3, 64, 64)):
        scores = model.class_head(each, 7).sigmoid()
        torch.testing.assert_close(scores, torch.full_like(scores, 0.01), rtol=0, atol=0.005)


# --------------------------------------------------------------------------------------------------------
# Proposals
# --------------------------------------------------------------------------------------------------------


def make_other_network(network: rcnn.ProposalNetwork, samples: int, before: int, after: int) -> RegionProposalNetwork:
    """torchvision's network for proposals."""
    counts = [{"training": number, "testing": number} for number in (before, after)]
    return RegionProposalNetwork(None, network.head, 0.7, 0.3, samples, 0.5, *counts, 0.7)


@torch.no_grad()
def test_anchors_of_the_padding_are_not_learned_from():
    """Whatever the network makes of them, and however many there are."""
    network, targets = build("mask_rcnn").proposal_network, [{"boxes": torch.tensor([[8.0, 8, 40, 40]])}]
    maps = [torch.randn(1, 8, 24, 32), torch.randn(1, 8, 12, 16), torch.randn(1, 8, 6, 8), torch.randn(1, 8, 3, 4)]
    (logits, deltas), anchors = network(maps), network.anchors(maps)
    sums = []
    for made_up in (0.0, 50.0):
        for level, places in zip(logits, anchors, strict=True):
            level[0, (places[:, 1] + places[:, 3]) / 2 >= 60] = made_up
        generators = [torch.Generator().manual_seed(0)]
        sums.append(network.find_losses((logits, deltas), anchors, [(60, 128)], targets, generators))
    assert sums[0] == sums[1]


@torch.no_grad()
def test_proposal_losses_are_those_of_torchvision(monkeypatch: pytest.MonkeyPatch):
    """Smooth L1 as in the cascade, with so many samples that nothing is drawn."""
    network = build("cascade_mask_rcnn").proposal_network
    assert network.beta == 1 / 9
    assert build("mask_rcnn").proposal_network.beta == 0
    monkeypatch.setattr(rcnn.ProposalNetwork, "SAMPLES", 10**6)
    maps = [torch.randn(2, 8, 24, 32), torch.randn(2, 8, 12, 16), torch.randn(2, 8, 6, 8), torch.randn(2, 8, 3, 4)]
    outputs, anchors = network(maps), network.anchors(maps)
    targets = [{"boxes": anchors[0][[700, 1400]] + 1.5}, {"boxes": anchors[1][[200]] - 2}]
    generators = [torch.Generator(), torch.Generator()]
    sums = network.find_losses(outputs, anchors, [(96, 128)] * 2, targets, generators)
    other = make_other_network(network, 10**6, 0, 0)
    assert isinstance(other.fg_bg_sampler, BalancedPositiveNegativeSampler)
    everything = [torch.cat(anchors)] * 2
    labels, matched = other.assign_targets_to_anchors(everything, targets)
    logits, deltas = torch.cat(outputs[0], 1), torch.cat(outputs[1], 1)
    regressions = other.box_coder.encode(matched, everything)
    expected = other.compute_loss(logits.flatten()[:, None], deltas.flatten(0, 1), labels, regressions)
    own = [total / number for total, number in (sums["proposal_class"], sums["proposal_box"])]
    torch.testing.assert_close(own, list(expected), rtol=1e-4, atol=1e-6)
    assert expected[1] > 0


@torch.no_grad()
def test_proposals_are_those_of_torchvision(monkeypatch: pytest.MonkeyPatch):
    """The 20 best of each level, clipped, then 30 of an image; a training batch begins with more."""
    monkeypatch.setattr(rcnn.ProposalNetwork, "KEPT", {True: 40, False: 20})
    network = build("mask_rcnn").proposal_network
    for layer in (network.head.cls_logits, network.head.bbox_pred):
        nn.init.normal_(layer.weight, std=2)
    maps = [torch.randn(2, 8, 24, 32), torch.randn(2, 8, 12, 16), torch.randn(2, 8, 6, 8), torch.randn(2, 8, 3, 4)]
    outputs, anchors, sizes = network(maps), network.anchors(maps), [(96, 128), (60, 70)]
    decoded = network.coder.decode(torch.cat(outputs[1], 1).flatten(0, 1), [torch.cat(anchors)] * 2)
    for training, before in ((True, 40), (False, 20)):
        other = make_other_network(network, 256, before, 30)
        expected, _ = other.filter_proposals(
            decoded.view(2, -1, 4), torch.cat(outputs[0], 1), sizes, [len(each) for each in anchors]
        )
        own = network.propose(outputs, anchors, sizes, 30, training=training)
        for each, wanted in zip(own, expected, strict=True):
            torch.testing.assert_close(each, wanted, rtol=1e-5, atol=1e-4)


# --------------------------------------------------------------------------------------------------------
# Regions
# --------------------------------------------------------------------------------------------------------


def gather_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has models return the sums of losses, and what they are divided by, in place of the quotients."""

    def keep(sums: dict[str, Tensor], counts: dict[str, int]) -> dict[str, Tensor]:
        return sums | {f"{name} count": torch.tensor(float(count)) for name, count in counts.items()}

    monkeypatch.setattr(rcnn, "average_losses", keep)


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn"])
@torch.no_grad()
def test_images_have_the_same_samples_however_the_batch_is_cut(name: str, monkeypatch: pytest.MonkeyPatch):
    """Sums over two parts are those over the batch; another seed, and another place, draw others."""
    gather_sums(monkeypatch)
    monkeypatch.setattr(rcnn.ProposalNetwork, "SAMPLES", 16)
    model = build(name)
    images, targets = draw_batch(3, 0, 2, 4)

    def run(seed: int, *sizes: int, shift: int = 0) -> dict[str, float]:
        totals, first = {}, 0
        for size in sizes:
            torch.rand(first)
            with place_in_batch(seed, first + shift, 4 + shift, CPU):
                losses = model(images[first : first + size], None, targets[first : first + size])
            totals = {key: totals.get(key, 0) + loss.item() for key, loss in losses.items()}
            first += size
        return totals

    whole = run(1, 4)
    assert whole["proposal_class count"] == 4 * 16
    for cut in ((2, 2), (1, 3), (1, 1, 1, 1)):
        assert run(1, *cut) == pytest.approx(whole, rel=1e-3)
    for other in (run(2, 4), run(1, 4, shift=1)):
        assert abs(other["proposal_class"] - whole["proposal_class"]) > 1e-3


def make_samples(model: rcnn.RegionDetector) -> tuple[list[rcnn.Samples], list[dict[str, Tensor]]]:
    """Samples of two images, of which the second has no objects."""
    targets = [draw_target(3), draw_target(0)]
    proposals = [torch.cat([target["boxes"] + 2, draw_target(9)["boxes"]]) for target in targets]
    generators = [torch.Generator(), torch.Generator()]
    samples = [model.sample(model.stages[0], *each) for each in zip(proposals, targets, generators, strict=True)]
    return samples, targets


def test_what_a_stage_learns_from():
    """Objects' boxes are among the samples, every sample has its object's class, and a quarter are objects' at most."""
    model = build("mask_rcnn")
    (own, empty), targets = make_samples(model)
    number = int((own.objects >= 0).sum())
    assert number == 4
    overlaps = box_iou(own.boxes, targets[0]["boxes"])
    best, nearest = overlaps.max(1)
    assert (best[:number] >= 0.5).all() and (best[number:] < 0.5).all()
    assert torch.equal(own.objects[:number], nearest[:number])
    assert torch.equal(own.labels[:number], targets[0]["labels"][nearest[:number]])
    assert (own.labels[number:] == 3).all() and (own.objects[number:] == -1).all()
    assert torch.equal(own.given, (best > 0.999))
    assert (empty.labels == 3).all() and not empty.given.any() and len(empty.boxes) == 9


@torch.no_grad()
def test_losses_of_regions():
    """The classes' are torchvision's, whose background comes first; the boxes' are L1 of the deltas."""
    model = build("mask_rcnn")
    samples, targets = make_samples(model)
    labels = torch.cat([each.labels for each in samples])
    logits, deltas = torch.randn(len(labels), 4), torch.randn(len(labels), 3, 4)
    losses = model.find_box_losses(model.stages[0], samples, targets, logits, deltas)
    moved = torch.where(labels == 3, 0, labels + 1)
    regressions = torch.zeros(len(labels), 4)
    expected, _ = fastrcnn_loss(logits.roll(1, dims=1), torch.zeros(len(labels), 16), [moved], [regressions])
    assert losses["class"][0] / losses["class"][1] == pytest.approx(expected.item(), rel=1e-5)
    own = samples[0]
    wanted, total = BoxCoder((10, 10, 5, 5)).encode_single(targets[0]["boxes"][own.found], own.boxes[:4]), 0.0
    for index, (label, delta) in enumerate(zip(own.labels[:4], wanted, strict=True)):
        total += (deltas[index, label] - delta).abs().sum().item()
    assert losses["box"][0] == pytest.approx(total, rel=1e-5)
    assert losses["box"][1] == losses["class"][1] == len(labels)


@torch.no_grad()
def test_losses_of_masks():
    """Of the object's class: log 2 where nothing is known, nearly 0 where it is right."""
    model = build("mask_rcnn")
    targets = [draw_target(3), draw_target(0)]
    samples = [
        rcnn.Samples(each["boxes"], torch.arange(len(each["boxes"])), each["labels"], torch.ones(0)) for each in targets
    ]
    maps = model.extract_maps(torch.randn(2, 3, 96, 128))
    for logit, expected in ((0.0, math.log(2)), (20.0, 0.0), (-20.0, 20.0)):
        masks = torch.full((3, 3, 28, 28), -7.0)
        masks[torch.arange(3), samples[0].labels] = logit

        def head(regions: Tensor, masks: Tensor = masks) -> Tensor:
            assert regions.shape == (3, 8, 14, 14)
            return masks

        total, number = model.find_mask_loss(head, maps, samples, targets)["mask"]
        assert number == 3
        assert total / number == pytest.approx(expected, abs=1e-4)


def test_stages_of_the_cascade():
    """They are ever stricter, count ever less, and move boxes ever less by the same deltas."""
    model = build("cascade_mask_rcnn")
    boxes = torch.tensor([[10.0, 20, 30, 60]])
    for stage, overlap, weight, share in zip(
        model.stages, (0.5, 0.6, 0.7), (1, 0.5, 0.25), (1, 1 / 2, 1 / 3), strict=True
    ):
        assert (stage.overlap, stage.weight) == (overlap, weight)
        moved = stage.decode(torch.tensor([[[1.0, -1.0, 0.0, math.log(2) / (0.2 * share)]]]), boxes)[0, 0]
        centre = torch.tensor([20 + 0.1 * share * 20, 40 - 0.1 * share * 40])
        torch.testing.assert_close(moved, torch.cat([centre - torch.tensor([10, 40]), centre + torch.tensor([10, 40])]))


def test_boxes_of_the_cascade_learn_by_giou():
    """A third of overlap and no hull beyond the union: 10 * (1 - 1/3); twice as far, the hull has a gap of a fifth."""
    model = build("cascade_mask_rcnn")
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    wanted = torch.tensor([[5.0, 0, 15, 10], [15, 0, 25, 10]])
    loss = model.compare_boxes(model.stages[1], torch.zeros(2, 4), boxes, wanted)
    assert loss == pytest.approx(10 * (1 - 1 / 3) + 10 * (1 + 1 / 5), rel=1e-5)


@torch.no_grad()
def test_refined_proposals():
    """Objects' by the deltas of their class, others by those of their likeliest; given boxes are left out."""
    model = build("cascade_mask_rcnn")
    boxes = torch.tensor([[10.0, 10, 30, 30], [10, 10, 30, 30], [100, 60, 120, 80]])
    samples = rcnn.Samples(boxes, torch.tensor([0, 0, -1]), torch.tensor([1, 1, 3]), torch.tensor([True, False, False]))
    deltas = torch.zeros(3, 3, 4)
    deltas[:, :, 0] = torch.tensor([1.0, 2.0, 20.0])  # by 0.1 * 20 pixels to the right
    logits = torch.tensor([[9.0, 0, 0, 0], [9, 0, 0, 0], [0, 0, 5, 9]])
    (refined,) = model.refine_samples(model.stages[0], [samples], logits, deltas, [(96, 128)])
    assert refined.tolist() == [[14, 10, 34, 30], [128, 60, 128, 80]]


@torch.no_grad()
def test_predictions_of_the_cascade_are_means():
    """Of the stages' logits and of their masks, with boxes moved by every stage in turn."""
    model = build("cascade_mask_rcnn", score_threshold=0.3).eval()
    start = torch.tensor([[20.0, 20, 40, 40]])
    model.proposal_network.propose = lambda *arguments, **options: [start]
    seen = []
    for index, (stage, head) in enumerate(zip(model.stages, model.mask_heads, strict=True)):
        logits = torch.tensor([[0.0, 3 * index, 0, 0]])
        deltas = torch.zeros(1, 3, 4)
        deltas[0, 1 if index else 0, 0] = 1.0 / (0.1 * (1, 1 / 2, 1 / 3)[index])  # by the width to the right

        stage.forward = lambda regions, logits=logits, deltas=deltas: (logits, deltas)
        head.forward = lambda regions, index=index: torch.full((len(regions), 3, 28, 28), float(index))
    pool = model.box_pool.forward
    model.box_pool.forward = lambda maps, boxes: (seen.append(boxes[0]), pool(maps, boxes))[1]
    (found,) = model(torch.randn(1, 3, 96, 128))
    assert torch.cat(seen)[:, 0].tolist() == pytest.approx([20, 40, 60])
    assert found["labels"].tolist() == [1]
    assert found["boxes"][0].tolist() == pytest.approx([80, 20, 100, 40])
    assert found["scores"].item() == pytest.approx(math.exp(3) / (math.exp(3) + 3))
    expected = sum(1 / (1 + math.exp(-index)) for index in range(3)) / 3
    torch.testing.assert_close(found["masks"], torch.full((1, 28, 28), expected))


@pytest.mark.slow
def test_mask_rcnn_learns_an_image():
    """Two rectangles of two classes: boxes, masks and nothing else."""
    heads = {"pyramid_dim": 48, "box_dim": 128, "mask_convs": 1, "num_samples": 48, "anchor_scale": 4.0}
    rest = {"num_proposals": 50, "num_training_proposals": 100, "backbone_args": {"depths": (1, 1, 1)}}
    model = timm.create_model("mask_rcnn", backbone="ssvit_nano", num_classes=2, **heads, **rest).train()
    image, masks = torch.zeros(1, 3, 128, 128), torch.zeros(2, 128, 128, dtype=torch.uint8)
    boxes = torch.tensor([[16.0, 20, 48, 60], [60, 70, 116, 110]])
    for channel, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        image[:, channel, top:bottom, left:right] = 2
        masks[channel, top:bottom, left:right] = 1
    target = {"boxes": boxes, "labels": torch.tensor([0, 1]), "masks": masks}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        losses = model(image, None, [target])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    with torch.no_grad():
        (found,) = model(image)
    pasted = s3a.paste_masks(found["masks"], found["boxes"], 128, 128)
    for label in range(2):
        best = int((found["labels"] == label).nonzero()[0])
        assert found["scores"][best] > 0.8
        assert box_iou(found["boxes"][[best]], boxes[[label]]) > 0.7
        assert F.cosine_similarity(pasted[best].flatten().float(), masks[label].flatten().float(), dim=0) > 0.8
