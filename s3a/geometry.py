"""Which keys a query sees: plain integers, computed once per map size.

Three ideas, each on top of the one before:

- an *axis* of tokens falls into dilation groups, and every token has a window in its group (`AxisWindows`);
- a *pass* is a `Neighborhood`: such a window on the rows times one on the columns;
- a *scan* is a tuple of passes, attended one after the other (`sparse_scan` returns the two of S3A, or what an ablation
  leaves of them).

Everything is numpy on purpose: geometry must not depend on torch's device, dtype or mode (inference, tracing).
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np

from s3a.support.caches import cache_results
from s3a.support.errors import make_unknown_error

Fixed: TypeAlias = Literal["window", "anchors"]
FIXED: tuple[Fixed, ...] = ("window", "anchors")
Passes: TypeAlias = Literal["both", "local", "anchor", "dense"]
PASSES: tuple[Passes, ...] = ("both", "local", "anchor", "dense")


def parse_pair(value: int | tuple[int, int], name: str, rule: str = "a positive integer") -> tuple[int, int]:
    """An int for both axes, or a (row, column) pair, as a (row, column) pair of positive ints.

    Raises:
        ValueError: where it is neither, or an entry is below 1.
    """
    both = value if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or not all(is_positive_integer(entry) for entry in both):
        raise ValueError(f"{name} is {value!r}: it must be {rule}, or a (row, column) pair of them")
    return int(both[0]), int(both[1])


def is_positive_integer(value: object) -> bool:
    """Whether the value is a whole number above 0, of Python's or numpy's; True is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) > 0


def make_odd(number: int) -> int:
    """The number, or the next one if it is even."""
    return number if number % 2 else number + 1


def check_size(size: int) -> int:
    """The size of a scan; ValueError unless it is a positive int (a pair has no meaning, both axes are alike)."""
    if not is_positive_integer(size):
        raise ValueError(f"size is {size!r}: it must be one positive integer, for both axes")
    return int(size)


@dataclass(frozen=True, eq=False)
class AxisWindows:
    """One axis of `length` tokens in *group order*: dilation group after dilation group.

    In this order every window is a contiguous range of places that stays inside its group, so a dilated
    neighborhood is a dense one on a permuted axis.

    Example: 8 tokens, dilation 2, a kernel of 3. The groups are the even and the odd tokens:

        place       0 1 2 3 4 5 6 7
        position    0 2 4 6 1 3 5 7
        group       0 0 0 0 1 1 1 1
        start       0 0 1 1 4 4 5 5     The windows of a group's first and last token are moved inwards.
        stop        3 3 4 4 7 7 8 8

    Attributes (all int64):
        position: [length] the token at each place.
        group: [length] the dilation group (the residue of the position) of each place.
        start, stop: [length] the window of the token at each place, as places `start .. stop - 1`.
    """

    position: np.ndarray
    group: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """The places `first .. last + 1` of every group."""
        edges = np.flatnonzero(np.diff(self.group, prepend=-1, append=-1))
        return [(int(first), int(last)) for first, last in pairwise(edges)]


@cache_results(maxsize=256)
def find_axis_windows(length: int, kernel_size: int, dilation: int) -> AxisWindows:
    """The windows of an axis, by NATTEN's rule: full size, shifted inwards at the borders, never cut.

    A window only holds tokens with the same residue modulo the dilation. In a group with fewer tokens than the
    kernel, every token sees the whole group.
    """
    token = np.arange(length)
    position = token[np.lexsort((token, token % dilation))]
    group = position % dilation
    index = position // dilation  # within the group
    group_length = -(-(length - group) // dilation)
    group_start = np.arange(length) - index
    start = group_start + np.clip(index - kernel_size // 2, 0, np.maximum(group_length - kernel_size, 0))
    stop = start + np.minimum(kernel_size, group_length)
    return AxisWindows(position=position, group=group, start=start, stop=stop)


@dataclass(frozen=True, init=False)
class Neighborhood:
    """A (dilated) window of keys around every query of a map.

    Args:
        kernel_size: keys per axis, odd; an int or a (row, column) pair.
        dilation: distance between neighboring keys, in tokens; an int or a (row, column) pair.

    Raises:
        ValueError: for a kernel that is even or below 1, or a dilation below 1.
    """

    kernel_size: tuple[int, int]
    dilation: tuple[int, int]

    def __init__(self, kernel_size: int | tuple[int, int], dilation: int | tuple[int, int] = 1) -> None:
        rule = "a positive odd integer"
        rows, columns = parse_pair(kernel_size, "kernel_size", rule)
        if rows % 2 == 0 or columns % 2 == 0:
            odd = make_odd(rows), make_odd(columns)
            raise ValueError(
                f"kernel_size is {kernel_size!r}: it must be {rule}, or a (row, column) pair of them; use {odd}"
            )
        object.__setattr__(self, "kernel_size", (rows, columns))
        object.__setattr__(self, "dilation", parse_pair(dilation, "dilation"))

    def windows(self, height: int, width: int) -> tuple[AxisWindows, AxisWindows]:
        """The windows of the rows and of the columns of a map."""
        rows = find_axis_windows(height, self.kernel_size[0], self.dilation[0])
        columns = find_axis_windows(width, self.kernel_size[1], self.dilation[1])
        return rows, columns

    def keys(self, row: int, column: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows and the columns that the query at (row, column) sees; it sees their product."""
        seen = []
        for windows, token in zip(self.windows(height, width), (row, column), strict=True):
            place = int(np.flatnonzero(windows.position == token)[0])
            seen.append(windows.position[windows.start[place] : windows.stop[place]])
        return seen[0], seen[1]

    def count_pairs(self, height: int, width: int) -> int:
        """How many (query, key) pairs the neighborhood has on a map: the cost of one pass."""
        rows, columns = self.windows(height, width)
        return int((rows.stop - rows.start).sum() * (columns.stop - columns.start).sum())


Scan: TypeAlias = tuple[Neighborhood, ...]


def sparse_scan(height: int, width: int, size: int = 7, fixed: Fixed = "window", passes: Passes = "both") -> Scan:
    """The chained passes of S3A on a map (arXiv 2405.13335; kernels and dilations as in the official code).

    The local pass comes first and the anchor pass second; a pass of a single token is left out. Where the
    map is smaller than the window, the kernel covers it whole.

    Args:
        height, width: the map, in tokens.
        size: what is fixed, in tokens per axis.
        fixed: "window" fixes the reference window and lets the number of anchors follow the map;
            "anchors" fixes the number of anchors and lets the window follow.
        passes: "both" as published; "local" or "anchor" leaves the other one out; "dense" puts one pass over all
            tokens in their place.

    Raises:
        ValueError: for a size below 1, or an unknown `fixed` or `passes`.
    """
    return tuple(one for one in find_passes(height, width, size, fixed, passes) if one is not None)


def find_passes(
    height: int, width: int, size: int, fixed: Fixed, passes: Passes = "both"
) -> tuple[Neighborhood | None, Neighborhood | None]:
    """The local and the anchor pass of `sparse_scan`, None for one that is left out.

    With passes="dense" the one pass stands in the anchor pass' place: every token is an anchor.
    """
    if passes not in PASSES:
        raise make_unknown_error("passes", passes, PASSES)
    if fixed not in FIXED:
        raise make_unknown_error("fixed", fixed, FIXED)
    size = check_size(size)
    if passes == "dense":
        return None, Neighborhood(make_odd(max(height, width)))
    shorter = min(height, width)
    window, anchors = (size, shorter // size) if fixed == "window" else (shorter // size, size)
    dilation = max(1, min(window, shorter // make_odd(anchors)))
    has_local, has_anchor = window > 1 and passes != "anchor", anchors > 1 and passes != "local"
    return (
        Neighborhood(make_odd(window)) if has_local else None,
        Neighborhood(make_odd(anchors), dilation) if has_anchor else None,
    )


@dataclass(frozen=True)
class ScanPattern:
    """Which scan each block of a network runs.

    Attributes:
        fixed: `fixed` of the first blocks of a stage; repeated over the others.
        passes: `passes` of every block.
    """

    fixed: tuple[Fixed, ...]
    passes: Passes

    def fixed_of(self, block: int) -> Fixed:
        """`fixed` of a stage's block, by its index in the stage."""
        return self.fixed[block % len(self.fixed)]


# The published alternation, and its ablations: one kind of scan alone, one pass alone, no sparsity.
SCAN_PATTERNS = {
    "alternate": ScanPattern(FIXED, "both"),
    "window-first": ScanPattern(("window",), "both"),
    "anchors-first": ScanPattern(("anchors",), "both"),
    "local-only": ScanPattern(FIXED, "local"),
    "anchor-only": ScanPattern(FIXED, "anchor"),
    "dense": ScanPattern(("window",), "dense"),
}


def find_scan_pattern(name: str) -> ScanPattern:
    """The pattern of that name in SCAN_PATTERNS; ValueError with the nearest name if there is none."""
    if name not in SCAN_PATTERNS:
        raise make_unknown_error("scan", name, SCAN_PATTERNS)
    return SCAN_PATTERNS[name]
