"""Semantic FPN against a plain rewrite of its paper, UperNet against transformers' head with the same weights."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead as OtherFCNHead
from transformers.models.upernet.modeling_upernet import UperNetHead as OtherHead

from s3a.models.dense import DenseModel
from s3a.models.segmentation import SegmentationModel
from s3a.nn.stochastic_depth import place_in_batch

FOUR_MAPS = {"dims": (8, 12, 16, 24), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "mlp_ratios": (2, 2, 2, 2)}
THREE_MAPS = {"dims": (8, 12, 16), "depths": (1, 1, 1), "num_heads": (1, 1, 2)}


def build(name: str, **model_args: object) -> SegmentationModel:
    """A small model whose batch norms have seen something."""
    model = timm.create_model(
        name, **{"backbone": "ssvit_nano", "backbone_args": THREE_MAPS, "num_classes": 5, "head_dim": 8, **model_args}
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("maps", [THREE_MAPS, {**FOUR_MAPS, "layer_scale": (None,) * 4}], ids=["three", "four"])
@pytest.mark.parametrize("size", [(64, 96), (45, 70)])
@torch.no_grad()
def test_semantic_fpn_is_that_of_its_paper(maps: dict[str, object], size: tuple[int, int]):
    """Laterals, top-down additions, a smoothing convolution; then i steps of convolution and upsampling, and a sum."""
    model = build("semantic_fpn", backbone_args=maps, pyramid_dim=16)
    images = torch.randn(2, 3, *size)
    features = DenseModel.extract_maps(model, images)
    pyramid = model.pyramid
    tops: list[Tensor] = []
    for lateral, x in zip(reversed(pyramid.inner_blocks), reversed(features), strict=True):
        top = F.conv2d(x, lateral[0].weight, lateral[0].bias)
        tops.insert(0, top + F.interpolate(tops[0], size=x.shape[2:], mode="nearest") if tops else top)
    total = 0
    for index, (top, smooth, steps) in enumerate(zip(tops, pyramid.layer_blocks, model.head.levels, strict=True)):
        x = F.conv2d(top, smooth[0].weight, smooth[0].bias, padding=1)
        assert len(steps) == max(1, index)
        for conv, norm, _ in steps:
            x = F.conv2d(x, conv.weight, None, padding=1)
            x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
            x = (x * norm.weight[:, None, None] + norm.bias[:, None, None]).relu()
            if index:
                x = enlarge(x, (2 * x.shape[2], 2 * x.shape[3]))
        total = total + enlarge(x, tops[0].shape[2:])
    last = model.head.classifier
    expected = enlarge(F.conv2d(total, last.weight, last.bias), size)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def copy_conv(own: nn.Sequential, other: nn.Module) -> None:
    """The weights of a convolution and its batch norm."""
    other.conv.load_state_dict(own[0].state_dict())
    other.batch_norm.load_state_dict(own[1].state_dict())


@pytest.mark.parametrize("size", [(64, 96), (45, 70)])
@torch.no_grad()
def test_upernet_is_that_of_transformers(size: tuple[int, int]):
    """The head and the auxiliary head, with the same weights on the same maps."""
    model = build("upernet", auxiliary_dim=6)
    config = UperNetConfig(hidden_size=8, num_labels=5, auxiliary_channels=6, auxiliary_in_channels=16)
    other, auxiliary = OtherHead(config, list(model.dims)).eval(), OtherFCNHead(config, list(model.dims)).eval()
    head = model.head
    for pool, block in zip(head.pools, other.psp_modules.blocks, strict=True):
        copy_conv(pool[1], block.layers[1])
    pairs = [(head.pooled, other.bottleneck), (head.fuse, other.fpn_bottleneck)]
    pairs += [*zip(head.laterals, other.lateral_convs, strict=True), *zip(head.smooth, other.fpn_convs, strict=True)]
    pairs += [(model.auxiliary_head.conv, auxiliary.convs[0])]
    for own, wanted in pairs:
        copy_conv(own, wanted)
    other.classifier.load_state_dict(head.classifier.state_dict())
    auxiliary.classifier.load_state_dict(model.auxiliary_head.classifier.state_dict())
    images = torch.randn(2, 3, *size)
    maps = model.extract_maps(images)
    logits, auxiliary_logits = model(images, auxiliary=True)
    torch.testing.assert_close(logits, enlarge(other(maps), size), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(auxiliary_logits, enlarge(auxiliary(maps), size), rtol=1e-4, atol=1e-5)
    assert torch.equal(model(images), logits)


def test_the_auxiliary_head_reads_stride_16_and_may_be_left_out():
    model = build("upernet", backbone_args={**FOUR_MAPS, "layer_scale": (None,) * 4})
    assert model.auxiliary_head.conv[0].in_channels == 16
    images = torch.randn(1, 3, 64, 64)
    assert model.eval()(images, auxiliary=True)[1].shape == (1, 5, 64, 64)
    assert build("upernet", auxiliary_dim=0)(images, auxiliary=True)[1] is None
    assert build("semantic_fpn")(images, auxiliary=True)[1] is None
    two = {"dims": (8, 12), "depths": (1, 1), "num_heads": (1, 1), "mlp_ratios": (2, 2), "layer_scale": (None, None)}
    with pytest.raises(ValueError, match=r"strides \(4, 8\).*auxiliary_dim=0"):
        build("upernet", backbone_args=two)
    assert build("upernet", backbone_args=two, auxiliary_dim=0)(images).shape == (1, 5, 64, 64)


@pytest.mark.parametrize("name", ["semantic_fpn", "upernet"])
def test_gradients_reach_every_parameter(name: str):
    model = build(name).train()
    logits, auxiliary = model(torch.randn(2, 3, 64, 64), auxiliary=True)
    (logits.square().mean() + (0 if auxiliary is None else auxiliary.square().mean())).backward()
    assert [
        key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ] == []


@pytest.mark.parametrize("name", ["semantic_fpn", "upernet"])
def test_an_image_keeps_its_dropout_however_the_batch_is_cut(name: str):
    """With batch norms that do not look at the batch."""
    model = build(name, drop_rate=0.5)
    for module in model.modules():
        if not isinstance(module, nn.BatchNorm2d):
            module.training = True
    images = torch.randn(4, 3, 32, 32)

    @torch.no_grad()
    def run(*sizes: int) -> list[Tensor]:
        parts, first = [], 0
        for part in images.split(sizes):
            with place_in_batch(5, first, 4, torch.device("cpu")):
                parts.append(model(part, auxiliary=True))
            first += len(part)
        return [torch.cat(each) for each in zip(*parts, strict=True) if each[0] is not None]

    whole = run(4)
    for own, wanted in zip(run(1, 3), whole, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(images), whole[0], rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["semantic_fpn", "upernet"])
def test_autocast(name: str, dtype: torch.dtype):
    model, images = build(name), torch.randn(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        logits = model(images)
    torch.testing.assert_close(logits.float(), model(images), rtol=0.1, atol=0.1)


def test_widths_are_the_published_ones():
    """At the default arguments, over a backbone with four maps."""
    with torch.device("meta"):
        fpn, uper = timm.create_model("semantic_fpn"), timm.create_model("upernet")
    assert [level[0][0].in_channels for level in fpn.head.levels] == [256] * 4
    assert fpn.head.classifier.weight.shape == (150, 128, 1, 1)
    assert [pool[0].output_size for pool in uper.head.pools] == [1, 2, 3, 6]
    assert uper.head.fuse[0].weight.shape == (512, 2048, 3, 3)
    assert uper.auxiliary_head.conv[0].weight.shape[:2] == (256, 256)
    assert {fpn.head.dropout.rate, uper.head.dropout.rate, uper.auxiliary_head.dropout.rate} == {0.1}
