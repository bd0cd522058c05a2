"""What `explain` says is what runs."""

import pytest
import torch

import s3a
from s3a.attention.backends import Operands
from s3a.attention.plan import choose_backend, lay_out_scan, plan_scan


@pytest.mark.parametrize(("height", "width", "size"), [(56, 56, 7), (28, 28, 7), (13, 22, 3)])
def test_passes_are_those_of_the_plans(height, width, size):
    explanation = s3a.explain(height, width, size=size)
    scans = [s3a.sparse_scan(height, width, size, fixed) for fixed in ("window", "anchors")]
    assert [choice.neighborhood for choice in explanation.passes] == [*scans[0], *scans[1]]
    device = torch.device("cpu")
    flex, tiled = (
        [each.layout for scan in scans for each in lay_out_scan(scan, height, width, device, 2 * (backend,)).passes]
        for backend in ("flex", "tiled")
    )
    for choice, blocks, tiles in zip(explanation.passes, flex, tiled, strict=True):
        order, cost = choice.orders[0], choice.tiles[0]
        assert (len(order.pairs), (order.block_size, order.block_size)) == (blocks.num_touched, blocks.block_size)
        assert f"{blocks.num_touched} of {blocks.num_blocks} blocks of {order.block_size}" in str(choice)
        assert (cost.batches, cost.groups) == (len(tiles.batches), tiles.groups)
        assert (
            choice.lists_keys
            == (tiles.key_list is not None)
            == ("lists the keys of every query instead" in str(choice))
        )
        assert cost.halo_tokens == sum(len(batch.keys) for batch in tiles.batches)
        assert cost.pairs == sum(len(batch.queries) * len(batch.keys) // batch.num_tiles for batch in tiles.batches)
        assert ("keys gathered" in str(choice)) == (tiles.groups is None)
        done = {"tiled": cost.pairs, "flex": blocks.num_touched * order.block_size**2, "reference": choice.num_pairs}
        assert {name: each.pairs for name, each in choice.choice.costs.items()} == done


@pytest.mark.parametrize(
    ("options", "backends", "reason"),
    [
        ({"height": 56, "width": 56}, {"tiled"}, "not flex: on cpu it is used only where it is named"),
        (
            {"height": 56, "width": 56, "training": True},
            {"tiled"},
            "not flex: FlexAttention has no backward on the CPU",
        ),
        ({"height": 56, "width": 56, "device": "cuda"}, {"flex", "tiled"}, "not tiled: it costs"),
        ({"height": 7, "width": 7, "device": "cuda"}, {"tiled"}, "not flex: it costs"),
        ({"height": 56, "width": 56, "device": "cuda", "head_dim": 8}, {"tiled"}, "head dims of 16 and more, not 8"),
        ({"height": 56, "width": 56, "device": "cuda", "dtype": torch.float64}, {"tiled"}, "not float64"),
    ],
)
def test_the_backend_has_its_reasons(options, backends, reason):
    explanation = s3a.explain(**options)
    assert {choice.backend for choice in explanation.passes} == backends
    assert explanation.backend == (backends.pop() if len(backends) == 1 else None)
    assert reason in str(explanation)
    assert "not reference: it is the oracle" in str(explanation)
    operands = Operands(
        explanation.device, explanation.dtype, options.get("head_dim", 32), options.get("training", False)
    )
    for choice in explanation.passes:
        assert choice.backend == choose_backend(choice.neighborhood, *list(options.values())[:2], operands)
        assert f"backend {choice.backend}: {choice.choice.costs[choice.backend].pairs:,} pairs done" in str(choice)


@pytest.mark.parametrize(("device", "size"), [("cpu", 7), ("cuda", 7), ("cuda", 5)])
def test_what_is_explained_is_what_is_planned(device: str, size: int, monkeypatch: pytest.MonkeyPatch):
    """Layouts are on the CPU here, whatever the device."""
    monkeypatch.setattr(
        "s3a.attention.plan.lay_out_scan", lambda scan, height, width, device, backends, **more: list(backends)
    )
    plan_scan.cache_clear()
    explanation = s3a.explain(56, 48, device=device, size=size, training=True)
    operands = Operands(explanation.device, explanation.dtype, 32, needs_grad=True)
    planned = [
        name
        for fixed in ("window", "anchors")
        for name in plan_scan(s3a.sparse_scan(56, 48, size, fixed), 56, 48, operands)
    ]
    assert [choice.backend for choice in explanation.passes] == planned
    plan_scan.cache_clear()


def test_the_exact_groups_of_the_published_network_are_batched_attention_on_cuda():
    """(7, 8) at 56 x 56: 64 groups of 49 tokens, where blocks touch many times the pairs."""
    choice = s3a.explain(56, 56, device="cuda", training=True).passes[-1]
    assert (choice.neighborhood, choice.backend) == (s3a.Neighborhood(7, 8), "tiled")
    assert choice.choice.costs["tiled"].pairs == choice.num_pairs == 64 * 49**2
    assert choice.choice.costs["flex"].pairs > 3 * choice.num_pairs
    assert "7 x 7 in 1 call" in str(choice)
    assert "whole dilation groups, nothing gathered" in str(choice)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", "one image: estimated, not measured on a GPU"),
        ("cpu", "one image: measured on two cores"),
        ("mps", "one image: those of a CPU, measured on two cores"),
    ],
)
def test_costs_say_where_they_come_from(device: str, words: str):
    assert words in str(s3a.explain(14, 14, device=device))


def test_a_map_whose_scans_have_no_pass():
    explanation = s3a.explain(1, 1, size=1)
    assert (explanation.backend, explanation.passes) == (None, ())
    assert "no pass is left" in str(explanation)


def test_a_map_without_tokens_is_refused():
    with pytest.raises(ValueError, match="0 x 7 tokens"):
        s3a.explain(0, 7)


def test_scans_of_an_ablation():
    explanation = s3a.explain(14, 20, scan="dense")
    assert [(choice.name, choice.num_pairs) for choice in explanation.passes] == [("dense", 280**2)]
    assert "dense pass: kernel 21, dilation 1; 78,400 pairs, 100.0 % of dense" in str(explanation)
    local, anchor = (s3a.explain(28, 28, scan=scan).passes for scan in ("local-only", "anchor-only"))
    assert [(choice.fixed, choice.name) for choice in local] == [("window", "local"), ("anchors", "local")]
    assert [(choice.fixed, choice.name) for choice in anchor] == [("window", "anchor"), ("anchors", "anchor")]
    with pytest.raises(ValueError, match="did you mean 'dense'"):
        s3a.explain(14, 14, scan="dence")
