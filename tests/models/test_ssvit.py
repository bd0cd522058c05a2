"""SSViT is the published network: parameter counts, recorded outputs, initialisation."""

import itertools
from functools import cache

import pytest
import timm
import torch
from helpers.golden import ablated_attention, dense_mask, error, images, official_state, recorded
from torch import Tensor, nn

import s3a
from s3a import SSViT, sparse_scan
from s3a.analysis.cost import count_cost
from s3a.attention.plan import ScanPlan
from s3a.geometry import SCAN_PATTERNS
from s3a.models.ssvit import checkpoint_filter_fn
from s3a.published import PUBLISHED


@cache
def official(size: str, backend: str | None = None) -> SSViT:
    """A published size with the recorded weights."""
    model = timm.create_model(f"ssvit_{size}", backend=backend).eval()
    model.load_state_dict(checkpoint_filter_fn(official_state(size), model))
    return model


def blocks_of(model: SSViT) -> list[nn.Module]:
    return [block for stage in model.stages for block in stage.blocks]


# --------------------------------------------------------------------------------------------------------
# The same function as the official one
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_tiny_logits(backend: str):
    with torch.inference_mode():
        logits = official("tiny", backend)(images(0, (2, 3, 224, 224)))
    assert error(logits, recorded("ssvit_logits")["tiny_224x224"]) <= 1e-5


def test_small_logits_of_oblong_images():
    with torch.inference_mode():
        logits = official("small")(images(0, (2, 3, 256, 320)))
    assert error(logits, recorded("ssvit_logits")["small_256x320"]) <= 1e-5


def test_tiny_stages():
    """Every stage's map before the next one halves it, so that a deviation is found where it begins."""
    with torch.inference_mode():
        maps = official("tiny").forward_intermediates(images(0, (2, 3, 224, 224)), intermediates_only=True)
    stages = recorded("ssvit_tiny_224_stages")
    assert len(maps) == 4
    for index, map in enumerate(maps, start=1):
        assert error(map.mean((2, 3)), stages[f"stage{index}_mean"]) <= 1e-5
        assert error(map[:, :8, :7, :7], stages[f"stage{index}_crop"]) <= 1e-5


def test_blocks_alternate_between_window_and_anchors():
    for stage in timm.create_model("ssvit_nano", depths=(3, 1, 2)).stages:
        assert [block.attn.fixed for block in stage.blocks] == (3 * ["window", "anchors"])[: len(stage.blocks)]


@pytest.mark.parametrize("name", ["ssvit_base", "ssvit_large"])
def test_layer_scale_stands_in_the_last_two_stages(name: str):
    model = timm.create_model(name, depths=(1, 1, 1, 1))
    scales = [[type(scale).__name__ for scale in (block.ls1, block.ls2)] for block in blocks_of(model)]
    assert scales == 2 * [["Identity", "Identity"]] + 2 * [["LayerScale", "LayerScale"]]
    gammas = [parameter for name, parameter in model.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 4
    assert all(torch.equal(gamma, torch.full_like(gamma, 1e-6)) for gamma in gammas)


# --------------------------------------------------------------------------------------------------------
# Initialisation
# --------------------------------------------------------------------------------------------------------


def test_initialisation():
    """Weights of std 0.02, none far out; biases 0; norms start as the identity."""
    model = timm.create_model("ssvit_tiny")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.detach()
            spread = 5 * 0.02 / (2 * weight.numel()) ** 0.5  # five standard deviations of the estimate
            assert abs(weight.std().item() - 0.02) < spread, name
            assert abs(weight.mean().item()) < 5 * 0.02 / weight.numel() ** 0.5, name
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight)), name
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6, name


# --------------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_heads": (3, 4, 8)}, "num_heads"),
        ({"size": 0}, "size"),
        ({"backend": "tilde"}, "tiled"),
        ({"layer_scale": (None, None)}, "layer_scale"),
    ],
)
def test_tables_without_meaning_are_refused(changes: dict, named: str):
    with pytest.raises(ValueError, match=named):
        timm.create_model("ssvit_nano", **changes)


def test_built_by_hand():
    """Without timm's factory, with the table's defaults: the tiny one."""
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in s3a.SSViT().parameters()) == PUBLISHED["ssvit_tiny"].parameters


# --------------------------------------------------------------------------------------------------------
# Ablations
# --------------------------------------------------------------------------------------------------------


def by_dense_masks(
    query: Tensor, key: Tensor, value: Tensor, plan: ScanPlan, fixed: str, size: int, passes: str
) -> Tensor:
    """What `attend_plan` should give, on [batch, tokens, heads, head_dim]."""
    maps = (tensor.unflatten(1, (plan.height, plan.width)) for tensor in (query, key, value))
    return ablated_attention(*maps, fixed, size, passes).flatten(1, 2)


@pytest.mark.parametrize(
    ("scan", "fixed", "passes"),
    [
        ("alternate", ("window", "anchors"), "both"),
        ("window-first", ("window", "window"), "both"),
        ("anchors-first", ("anchors", "anchors"), "both"),
        ("local-only", ("window", "anchors"), "local"),
        ("anchor-only", ("window", "anchors"), "anchor"),
        ("dense", ("window", "window"), "dense"),
    ],
)
@pytest.mark.parametrize("size", [3, 5])
def test_scans_of_an_ablation(scan: str, fixed: tuple[str, str], passes: str, size: int, monkeypatch, tmp_path):
    """The whole network in float64 against dense masks; it comes back from a weights folder as the same function."""
    model = timm.create_model("ssvit_nano", scan=scan, size=size, num_classes=3).double().eval()
    x = torch.randn(1, 3, 52, 84, dtype=torch.float64)
    with torch.no_grad():
        ours = model(x)
        calls = itertools.count()  # every stage has two blocks
        monkeypatch.setattr(
            "s3a.nn.s3a.attend_plan",
            lambda query, key, value, plan: by_dense_masks(
                query, key, value, plan, fixed[next(calls) % 2], size, passes
            ),
        )
        right = model(x)
        monkeypatch.undo()
        assert next(calls) == 6
        assert error(ours, right) <= 1e-10
        model.float().save_pretrained(tmp_path)
        again = SSViT.from_pretrained(tmp_path).double()
        torch.testing.assert_close(again(x), ours, rtol=1e-4, atol=1e-5)
    assert {(block.attn.passes, block.attn.size) for block in blocks_of(again)} == {(passes, size)}


def test_scans_have_the_same_parameters_and_their_own_cost():
    """On 16 x 16, 8 x 8 and 4 x 4 tokens, two blocks each: pairs of the dense masks, times two products of a dim."""
    plain = timm.create_model("ssvit_nano")
    layers = count_cost(plain, 64, 64).published_gmacs
    for scan, rule in SCAN_PATTERNS.items():
        model = timm.create_model("ssvit_nano", scan=scan)
        assert model.state_dict().keys() == plain.state_dict().keys()
        cost = count_cost(model, 64, 64)
        macs = 0
        for side, dim in ((16, 32), (8, 64), (4, 128)):
            for block in range(2):
                steps = sparse_scan(side, side, 3, rule.fixed_of(block), rule.passes)
                masks = [dense_mask(side, side, step.kernel_size, step.dilation) for step in steps]
                macs += 2 * dim * sum(int(mask.sum()) for mask in masks)
        assert cost.published_gmacs == layers
        assert round(cost.gmacs * 1e9) == round(layers * 2**30) + macs, scan
    assert macs == 4 * (32 * 256**2 + 64 * 64**2 + 128 * 16**2), "dense comes last"


def test_every_scan_has_maps_and_gradients():
    for scan in SCAN_PATTERNS:
        model = timm.create_model("ssvit_nano", scan=scan, num_classes=3)
        model(torch.randn(2, 3, 32, 40)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters()), scan
        maps = timm.create_model("ssvit_nano", scan=scan, features_only=True)(torch.randn(1, 3, 32, 40))
        assert [tuple(each.shape[2:]) for each in maps] == [(8, 10), (4, 5), (2, 3)], scan


def test_unknown_scans_of_a_model_are_refused():
    with pytest.raises(ValueError, match=r"scan 'alternating' is unknown.*did you mean 'alternate'"):
        timm.create_model("ssvit_nano", scan="alternating")
