"""Which keys a query sees, held against the rule written out with loops."""

import numpy as np
import pytest
from helpers.golden import dense_mask, scan_table, seen_keys

from s3a import Neighborhood, sparse_scan
from s3a.geometry import SCAN_PATTERNS, find_scan_pattern

KERNELS = (1, 3, 5, 7, 9, 11)
DILATIONS = (1, 2, 3, 4, 5, 8)
LENGTHS = (1, 2, 3, 4, 6, 7, 8, 13, 14, 17, 23, 30)

# ssvit.md's table: map, then (kernel, dilation) of the passes with fixed = "window" and with fixed = "anchors".
AT_224 = {
    56: ([(7, 1), (9, 6)], [(9, 1), (7, 8)]),
    28: ([(7, 1), (5, 5)], [(5, 1), (7, 4)]),
    14: ([(7, 1), (3, 4)], [(3, 1), (7, 2)]),
    7: ([(7, 1)], [(7, 1)]),
}


def passes(height: int, width: int, fixed: str, size: int = 7) -> list[tuple[int, int]]:
    """The scan as (kernel, dilation) pairs; both axes must be alike."""
    scan = sparse_scan(height, width, size, fixed)
    for neighborhood in scan:
        assert neighborhood.kernel_size[0] == neighborhood.kernel_size[1]
        assert neighborhood.dilation[0] == neighborhood.dilation[1]
    return [(neighborhood.kernel_size[0], neighborhood.dilation[0]) for neighborhood in scan]


# --------------------------------------------------------------------------------------------------------
# Neighborhoods
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dilation", DILATIONS)
@pytest.mark.parametrize("kernel_size", KERNELS)
def test_keys_of_every_query_on_one_axis(kernel_size: int, dilation: int):
    """Every length, so groups of all raggedness, and kernels larger than the group."""
    neighborhood = Neighborhood((kernel_size, 1), (dilation, 1))
    for length in LENGTHS:
        for position in range(length):
            rows, columns = neighborhood.keys(position, 0, length, 1)
            assert rows.tolist() == seen_keys(position, length, kernel_size, dilation)
            assert columns.tolist() == [0]


def test_rows_and_columns_are_not_mixed_up():
    """Different kernels, dilations and lengths per axis."""
    neighborhood = Neighborhood((3, 7), (4, 2))
    for row in range(13):
        for column in range(22):
            rows, columns = neighborhood.keys(row, column, 13, 22)
            assert rows.tolist() == seen_keys(row, 13, 3, 4)
            assert columns.tolist() == seen_keys(column, 22, 7, 2)


def test_windows_shift_inwards_at_borders():
    """Worked by hand: five tokens, kernel 3; nine tokens of which every second counts."""
    keys = [Neighborhood(3).keys(0, column, 1, 5)[1].tolist() for column in range(5)]
    assert keys == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    keys = [Neighborhood(3, 2).keys(0, column, 1, 9)[1].tolist() for column in (0, 1, 4, 7, 8)]
    assert keys == [[0, 2, 4], [1, 3, 5], [2, 4, 6], [3, 5, 7], [4, 6, 8]]


@pytest.mark.parametrize(("kernel_size", "dilation", "length"), [(7, 1, 5), (9, 3, 14), (101, 2, 31)])
def test_a_kernel_larger_than_the_group_sees_the_group(kernel_size: int, dilation: int, length: int):
    for position in range(length):
        rows, _ = Neighborhood(kernel_size, dilation).keys(position, 0, length, 4)
        assert rows.tolist() == list(range(position % dilation, length, dilation))


def test_a_dilation_larger_than_the_map_sees_the_token_alone():
    rows, columns = Neighborhood(3, 50).keys(4, 6, 8, 9)
    assert (rows.tolist(), columns.tolist()) == ([4], [6])


@pytest.mark.parametrize("dilation", [1, 2, (3, 1), 6])
@pytest.mark.parametrize("kernel_size", [3, (5, 3), 7])
@pytest.mark.parametrize(("height", "width"), [(9, 9), (13, 22), (4, 5)])
def test_count_pairs(kernel_size, dilation, height: int, width: int):
    counted = int(dense_mask(height, width, kernel_size, dilation).sum())
    assert Neighborhood(kernel_size, dilation).count_pairs(height, width) == counted


@pytest.mark.parametrize("given", [(7, 3), [7, 3], (np.int64(7), np.int64(3))])
def test_equal_neighborhoods_are_one_key(given):
    """Plans are cached by neighborhood, so every spelling must be equal and hash alike."""
    assert {Neighborhood(given, given): "plan"}[Neighborhood((7, 3), (7, 3))] == "plan"
    assert Neighborhood(np.int32(5), 2) == Neighborhood((5, 5), (2, 2))


@pytest.mark.parametrize(
    ("kernel_size", "shown"),
    [
        (4, r"4.*use \(5, 5\)"),
        ((7, 2), r"\(7, 2\).*use \(7, 3\)"),
        (0, "0"),
        (-3, "-3"),
        (True, "True"),
        (3.0, r"3\.0"),
        ("7", "'7'"),
        ((7,), r"\(7,\)"),
        ((7, 7, 7), r"\(7, 7, 7\)"),
        (None, "None"),
    ],
)
def test_wrong_kernels_are_refused(kernel_size, shown: str):
    """The message shows the value and the rule; for an even kernel also what to use."""
    with pytest.raises(ValueError, match=f"kernel_size is {shown}") as raised:
        Neighborhood(kernel_size)
    assert "positive odd integer" in str(raised.value)


@pytest.mark.parametrize("dilation", [0, -1, (1, 0), True, 1.5, "2", (1, 2, 3)])
def test_wrong_dilations_are_refused(dilation):
    with pytest.raises(ValueError, match=r"dilation is .*positive integer"):
        Neighborhood(3, dilation)


# --------------------------------------------------------------------------------------------------------
# The scans of S3A
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", AT_224)
def test_scans_at_224_pixels(side: int):
    window, anchors = AT_224[side]
    assert passes(side, side, "window") == window
    assert passes(side, side, "anchors") == anchors


@pytest.mark.parametrize("fixed", ["window", "anchors"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8])
def test_scans_of_every_map(size: int, fixed: str):
    """All square maps to 80 tokens, among them maps below the window and even windows and anchors."""
    for side in range(1, 81):
        assert passes(side, side, fixed, size) == scan_table(side, side, fixed, size), side


@pytest.mark.parametrize("fixed", ["window", "anchors"])
@pytest.mark.parametrize(("height", "width"), [(56, 80), (80, 56), (7, 40), (40, 7), (3, 90), (16, 20), (1, 9)])
def test_scans_of_oblong_maps_follow_the_shorter_side(height: int, width: int, fixed: str):
    assert passes(height, width, fixed) == scan_table(height, width, fixed)
    assert passes(height, width, fixed) == passes(width, height, fixed)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (3, 5), (6, 6), (7, 7)])
@pytest.mark.parametrize("fixed", ["window", "anchors"])
def test_maps_up_to_the_window_are_seen_whole(height: int, width: int, fixed: str):
    (neighborhood,) = sparse_scan(height, width, 7, fixed)
    assert neighborhood.count_pairs(height, width) == (height * width) ** 2


@pytest.mark.parametrize("size", [0, -7, 7.0, True, "7", (7, 3)])
def test_wrong_sizes_are_refused(size):
    """A pair too: both axes have the same window, so half of it would be dropped in silence."""
    with pytest.raises(ValueError, match="size is "):
        sparse_scan(56, 56, size)


@pytest.mark.parametrize("fixed", ["windows", "", None, "Anchors"])
def test_unknown_fixed_is_refused(fixed):
    with pytest.raises(ValueError, match=r'fixed .*"?window"?.*anchors|fixed .*anchors.*window'):
        sparse_scan(56, 56, 7, fixed)


# --------------------------------------------------------------------------------------------------------
# Scans of an ablation
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 7), (8, 16), (13, 22), (30, 5)])
@pytest.mark.parametrize("fixed", ["window", "anchors"])
def test_a_dense_scan_is_one_pass_over_all_tokens(height: int, width: int, fixed: str):
    (neighborhood,) = sparse_scan(height, width, 3, fixed, "dense")
    for row in range(height):
        for column in range(width):
            rows, columns = neighborhood.keys(row, column, height, width)
            assert (rows.tolist(), columns.tolist()) == (list(range(height)), list(range(width)))


def test_one_pass_leaves_the_other_out():
    """At 56 x 56, and at 7 x 7, where a scan has only one of them: see AT_224."""
    for fixed, (local, anchor) in (("window", (7, 9)), ("anchors", (9, 7))):
        kept = {name: sparse_scan(56, 56, 7, fixed, name) for name in ("local", "anchor")}
        assert [step.kernel_size[0] for step in kept["local"]] == [local]
        assert [step.kernel_size[0] for step in kept["anchor"]] == [anchor]
        assert kept["local"] + kept["anchor"] == sparse_scan(56, 56, 7, fixed)
    assert sparse_scan(7, 7, 7, "window", "anchor") == sparse_scan(7, 7, 7, "anchors", "local") == ()


def test_rules_say_what_each_block_runs():
    """Of a stage of five blocks: what is fixed, and which passes there are."""
    alternating = ["window", "anchors", "window", "anchors", "window"]
    expected = {
        "alternate": (alternating, "both"),
        "window-first": (5 * ["window"], "both"),
        "anchors-first": (5 * ["anchors"], "both"),
        "local-only": (alternating, "local"),
        "anchor-only": (alternating, "anchor"),
    }
    rules = {name: find_scan_pattern(name) for name in SCAN_PATTERNS}
    found = {name: ([rule.fixed_of(block) for block in range(5)], rule.passes) for name, rule in rules.items()}
    assert found.pop("dense")[1] == "dense"
    assert found == expected


@pytest.mark.parametrize(
    ("name", "near"), [("densee", "dense"), ("local", "local-only"), ("Window-First", "window-first")]
)
def test_unknown_scans_are_refused(name: str, near: str):
    with pytest.raises(ValueError, match=f"scan '{name}' is unknown.*did you mean '{near}'"):
        find_scan_pattern(name)


@pytest.mark.parametrize("passes", ["dens", "", None, "Both"])
def test_unknown_passes_are_refused(passes):
    with pytest.raises(ValueError, match=r"passes .* is unknown: it must be one of anchor, both, dense, local"):
        sparse_scan(56, 56, 7, "window", passes)
