"""What `explain` says is what runs."""

import dataclasses

import pytest
import torch

import s3a
from s3a.attention.plan import lay_out_scan


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
        assert len(choice.orders[0].pairs) == blocks.num_touched <= len(choice.orders[-1].pairs)
        assert f"{blocks.num_touched} of {blocks.num_blocks} blocks" in str(choice)
        assert choice.tiles[0].batches == len(tiles.batches)
        assert (
            choice.lists_keys
            == (tiles.key_list is not None)
            == ("lists the keys of every query instead" in str(choice))
        )
        assert choice.tiles[0].halo_tokens == sum(len(batch.keys) for batch in tiles.batches)
        assert choice.tiles[0].pairs == sum(
            len(batch.queries) * len(batch.keys) // batch.num_tiles for batch in tiles.batches
        )


@pytest.mark.parametrize(
    ("options", "backend", "reason"),
    [
        ({"height": 56, "width": 56}, "tiled", "not flex: on cpu tiles are faster"),
        ({"height": 56, "width": 56, "training": True}, "tiled", "not flex: FlexAttention has no backward on the CPU"),
        ({"height": 56, "width": 56, "device": "cuda"}, "flex", "not tiled: on CUDA"),
        ({"height": 14, "width": 14, "device": "cuda"}, "tiled", "not flex: a map of 196 tokens"),
        ({"height": 56, "width": 56, "device": "cuda", "head_dim": 8}, "tiled", "head dims of 16 and more, not 8"),
        ({"height": 56, "width": 56, "device": "cuda", "dtype": torch.float64}, "tiled", "not float64"),
    ],
)
def test_the_backend_has_its_reasons(options, backend, reason):
    explanation = s3a.explain(**options)
    assert explanation.backend == backend
    assert f"backend {backend}" in str(explanation)
    assert reason in str(explanation)
    assert "not reference: it is the oracle" in str(explanation)
    assert {choice.backend for choice in explanation.passes} == {backend}


def test_mixed_backends_are_shown_pass_by_pass():
    explanation = s3a.explain(28, 28)
    first, *others = explanation.passes
    mixed = dataclasses.replace(
        explanation, passes=(dataclasses.replace(first, backend="flex", reasons={"tiled": "it is slower"}), *others)
    )
    assert mixed.backend is None
    blocks = str(mixed).split("\n\n")[1:]
    assert [block.splitlines()[4] for block in blocks] == ["backend flex", *["backend tiled"] * len(others)]
    assert "not tiled: it is slower" in blocks[0]


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
