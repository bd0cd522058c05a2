"""Where a model looked: against dense attention with explicit softmax, and on images where the answer is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from helpers import golden
from torch import Tensor, nn

import s3a.attention.plan
import s3a.nn.s3a
from s3a import S3A, Neighborhood, SSViT
from s3a.analysis.attribution import attribute
from s3a.attention.backends import BACKENDS
from s3a.geometry import FIXED


def make_model(size: int = 3, **options: object) -> SSViT:
    """Three stages in float64, with attention that is far from uniform."""
    model = timm.create_model("ssvit_nano", size=size, num_classes=4, depths=(3, 2, 1), **options).double().eval()
    for module in model.modules():
        if isinstance(module, S3A):
            nn.init.normal_(module.qkv.weight, std=0.4)
    return model


# --------------------------------------------------------------------------------------------------------
# The definition
# --------------------------------------------------------------------------------------------------------


def attention_weights(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """[heads, queries, keys], softmax over all tokens under a dense mask."""
    query, key = (tensor[0].transpose(0, 1) for tensor in (query, key))
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


class DensePasses:
    """Stands for `attend_plan`: keeps every block's dense weights, and its values on the way."""

    def __init__(self, fixed: list[str], size: int) -> None:
        self.fixed, self.size, self.blocks = iter(fixed), size, []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: s3a.attention.plan.ScanPlan) -> Tensor:
        height, width = plan.height, plan.width
        fixed = next(self.fixed)
        window, anchors = (self.size, min(height, width) // self.size)[:: 1 if fixed == "window" else -1]
        steps = iter(golden.scan_table(height, width, fixed, self.size))
        passes = [next(steps) if number > 1 else (1, 1) for number in (window, anchors)]
        local, anchor = (attention_weights(query, key, golden.dense_mask(height, width, *step)) for step in passes)
        seen = torch.einsum("hjk,bkhd->bjhd", local, value)
        attended = torch.einsum("hij,bjhd->bihd", anchor, seen)
        attended.retain_grad()
        self.blocks.append((passes, (height, width), local, anchor, value, seen, attended))
        return attended


def expected(blocks: list, map_size: tuple[int, int]) -> dict[tuple, tuple[Tensor, Tensor]]:
    """By scan: r_j of the anchors and the sum of r_jk over j, as the module's docstring has them."""
    found: dict[tuple, tuple[Tensor, Tensor]] = {}
    for passes, size, local, anchor, value, seen, attended in blocks:
        if size != map_size:
            continue
        local, anchor, value, seen, attended, gradient = (
            tensor.detach() for tensor in (local, anchor, value, seen, attended, attended.grad[0])
        )
        by_pair = anchor * torch.einsum("ihd,jhd->hij", gradient, seen[0])
        anchors = by_pair.sum((0, 1))
        to_seen = torch.einsum("hij,ihd->jhd", anchor, gradient)
        by_key = local * torch.einsum("jhd,khd->hjk", to_seen, value[0])
        assert torch.allclose(by_key.sum((0, 2)), anchors), "a window adds up to its anchor"
        assert torch.allclose(anchors.sum(), (gradient * attended[0]).sum()), "anchors add up to gradient x attention"
        before = found.get(tuple(passes), (0, 0))
        found[tuple(passes)] = (before[0] + anchors.view(size), before[1] + by_key.sum((0, 1)).view(size))
    return found


@pytest.mark.parametrize(
    ("size", "image", "map_size", "stride"),
    [
        (3, (56, 72), (7, 9), 8),  # two blocks with the same scan
        (3, (96, 64), (12, 8), 8),
        (7, (64, 92), (16, 23), 4),  # three blocks with two scans
        (3, (80, 120), (10, 15), 8),
        (7, (40, 33), (10, 9), 4),  # no map has both passes: the finest, with one of them
        (1, (32, 40), (8, 10), 4),  # anchors without windows, and windows without anchors
    ],
)
def test_equals_dense_attention(
    size: int, image: tuple[int, int], map_size: tuple[int, int], stride: int, monkeypatch: pytest.MonkeyPatch
):
    model = make_model(size)
    x = torch.randn(1, 3, *image, dtype=torch.float64)
    result = attribute(model, x, label=2)
    assert (result.height, result.width, result.stride) == (*map_size, stride)

    dense = DensePasses([FIXED[block % 2] for depth in (3, 2, 1) for block in range(depth)], size)
    monkeypatch.setattr(s3a.nn.s3a, "attend_plan", dense)
    logits = model(x)[0]
    logits[2].backward()
    assert torch.allclose(result.logits, logits)
    right = expected(dense.blocks, map_size)
    assert len(right) == len(result.scans)
    for scan in result.scans:
        steps = tuple((step.kernel_size[0], step.dilation[0]) for step in (scan.local, scan.anchor))
        for ours, theirs in zip((scan.anchors, scan.tokens), right[steps], strict=True):
            assert ours.shape == map_size
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("name", "image", "map_size"),
    [
        ("ssvit_nano", (64, 64), (8, 8)),
        ("ssvit_nano", (32, 32), (8, 8)),
        ("ssvit_tiny", (224, 224), (14, 14)),
        ("ssvit_tiny", (160, 448), (20, 56)),  # at 1/16 there are 10 // 7 anchors a side, which is none
        ("ssvit_tiny", (32, 32), (8, 8)),
    ],
)
def test_the_deepest_map_with_both_passes(name: str, image: tuple[int, int], map_size: tuple[int, int]):
    result = attribute(timm.create_model(name, num_classes=3).eval(), torch.randn(1, 3, *image))
    assert (result.height, result.width) == map_size
    assert result.stride == math.ceil(image[0] / map_size[0])


# --------------------------------------------------------------------------------------------------------
# Known answers
# --------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A token per pixel; the only thing that an image holds is a bright pixel, and values are the pixels."""

    num_classes = 2
    feature_info = ({"reduction": 1},)

    def __init__(self) -> None:
        super().__init__()
        self.attention = S3A(4, 1, size=3)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.attention.qkv.weight.data[8:] = torch.eye(4)
        self.attention.proj.weight.data = torch.eye(4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.attention(x.permute(0, 2, 3, 1))
        return torch.stack([tokens[..., 0].sum((1, 2)), -tokens[..., 0].sum((1, 2))], dim=1)


@pytest.mark.parametrize(("row", "column"), [(4, 9), (0, 0), (9, 2)])
def test_points_at_what_the_class_is_made_of(row: int, column: int):
    """Only the bright pixel is relevant, through the anchors that saw it in their windows; against class 1."""
    image = torch.zeros(1, 4, 10, 13)
    image[0, 0, row, column] = 5
    (scan,) = attribute(Toy(), image).scans
    assert scan.tokens.nonzero().tolist() == [[row, column]]
    windows = golden.dense_mask(10, 13, 3).view(10, 13, 10, 13)
    assert torch.equal(scan.anchors > 0, windows[:, :, row, column])
    (against,) = attribute(Toy(), image, label=1).scans
    assert torch.allclose(against.anchors, -scan.anchors)


def test_a_token_is_centred_on_its_pixel():
    """The reach of the convolutions up to a token is symmetric about (row * stride, column * stride)."""
    model = timm.create_model("ssvit_nano")
    convolutions = [model.stem, *(stage.downsample for stage in model.stages)]
    for parameter in (parameter for module in convolutions for parameter in module.parameters()):
        nn.init.ones_(parameter)
    image = torch.ones(1, 3, 96, 128, requires_grad=True)
    x = model.eval().stem(image)
    for stage, info in zip(model.stages, model.feature_info, strict=True):
        x, stride = stage.downsample(x), info["reduction"]
        row, column = x.shape[1] // 2, x.shape[2] // 2 - 1
        (gradient,) = torch.autograd.grad(x[0, row, column].sum(), image, retain_graph=True)
        for reached, token in zip(np.nonzero(gradient[0].sum(0).numpy()), (row, column), strict=True):
            assert (reached.min() + reached.max()) / 2 == token * stride


# --------------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_is():
    model = make_model(drop_path_rate=0.5).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    first = attribute(model, x)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not x.requires_grad
    assert torch.equal(first.scans[0].anchors, attribute(model, x).scans[0].anchors), "evaluation mode draws nothing"


def test_compiled_and_frozen_models(graphs):
    """Compiled code has no hooks, and frozen weights no gradient; both give the same."""
    model = timm.create_model("ssvit_nano", num_classes=4).eval()
    x = torch.randn(1, 3, 64, 64)
    right = attribute(model, x).scans[0].anchors
    for block in model.stages[1].blocks:
        block.compile()
    model(x)
    runs = graphs["runs"]
    with torch.no_grad():
        assert torch.equal(attribute(model.requires_grad_(False), x).scans[0].anchors, right)
    assert graphs["runs"] == runs > 0


@pytest.mark.parametrize("backend", [None, "flex"])
def test_nothing_is_attended_by_flex(backend: str | None, monkeypatch: pytest.MonkeyPatch):
    """It must not compile here, and uncompiled it would hold the scores of all tokens against all."""

    def fail(*_: object) -> Tensor:
        raise AssertionError("flex attended uncompiled")

    model, image = make_model(), torch.randn(1, 3, 48, 64, dtype=torch.float64)
    expected = attribute(model, image)
    monkeypatch.setattr(s3a.attention.plan, "choose_backend", lambda *_: "flex")
    monkeypatch.setitem(BACKENDS, "flex", replace(BACKENDS["flex"], attend=fail, why_not=lambda _: None))
    s3a.clear_caches()
    attentions = [module for module in model.modules() if isinstance(module, S3A)]
    for module in attentions:
        module.backend, module.kernel_options = backend, (("BLOCK_M", 64),) if backend else ()
    found = attribute(model, image)
    s3a.clear_caches()
    for ours, right in zip(found.scans, expected.scans, strict=True):
        assert torch.equal(ours.anchors, right.anchors)
    assert {(each.backend, bool(each.kernel_options)) for each in attentions} == {(backend, backend is not None)}


def test_the_class_is_the_most_probable_one():
    model, x = make_model(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        model.head.bias[2] += 100
    ours = [attribute(model, x, label).scans[0].anchors for label in (None, 2, 0)]
    assert torch.equal(ours[0], ours[1])
    assert not torch.allclose(ours[0], ours[2])


@pytest.mark.parametrize(
    ("model", "label", "words"),
    [
        ("resnet10t", None, "ResNet has no sparse scans, so no anchors to show"),
        ("vit_tiny_patch16_224", None, "VisionTransformer has no sparse scans"),
        ("ssvit_nano", 10, "label is 10: it must be from 0 to 9"),
        ("ssvit_nano", -1, "label is -1: it must be from 0 to 9"),
    ],
)
def test_refusals(model: str, label: int | None, words: str):
    with pytest.raises(ValueError, match=words):
        attribute(timm.create_model(model, num_classes=10), torch.randn(1, 3, 224, 224), label)


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"global_pool": ""}])
def test_models_without_a_logit_per_class(options: dict):
    with pytest.raises(ValueError, match="gives no logit per class"):
        attribute(timm.create_model("ssvit_nano", **options), torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("layer", ["stages.1.blocks.1.attn.proj", "head"])
def test_weights_that_pass_no_gradients(layer: str):
    model = make_model()
    model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(ValueError, match=r"pass no gradients on.*use the float weights"):
        attribute(model, torch.randn(1, 3, 64, 64, dtype=torch.float64))


def test_a_network_that_does_not_tell_its_strides():
    model = Toy()
    model.feature_info = ({"reduction": 4},)
    with pytest.raises(ValueError, match=r"Toy\.feature_info is of a map of 10 x 13 tokens"):
        attribute(model, torch.randn(1, 4, 10, 13))


def test_windows_are_those_of_the_geometry():
    """What a caller draws: the local pass of the scan, around every anchor."""
    (scan,) = attribute(make_model(), torch.randn(1, 3, 64, 64, dtype=torch.float64)).scans
    assert (scan.local, scan.anchor) == (Neighborhood(3), Neighborhood(3, 2))


@pytest.mark.parametrize(("scan", "passes"), [("local-only", "local"), ("anchor-only", "anchor"), ("dense", "dense")])
def test_scans_of_an_ablation(scan: str, passes: str):
    """A pass that is left out shows every token to itself; to dense attention all tokens are anchors."""
    model = timm.create_model("ssvit_nano", scan=scan, num_classes=3).double().eval()
    result = attribute(model, torch.randn(1, 3, 64, 64, dtype=torch.float64), label=1)
    assert (result.height, result.width) == (16, 16)
    for found in result.scans:
        kernels = {"local": found.local.kernel_size, "anchor": found.anchor.kernel_size}
        assert (kernels["local"] == (1, 1)) == (passes != "local")
        assert (kernels["anchor"] == (1, 1)) == (passes == "local")
        assert torch.allclose(found.anchors.sum(), found.tokens.sum()), "relevance is neither lost nor made"
