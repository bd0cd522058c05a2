"""A picture of where a model looked: anchors and reference windows over the image, by their relevance."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor
from torchvision.transforms import Resize

from s3a.analysis.attribution import Attribution
from s3a.geometry import Neighborhood

# Okabe and Ito's colours, which every kind of colour vision tells apart.
ANCHOR, WINDOW, INK, SOFT_INK, PAPER = "#D55E00", "#F0E442", "#1F2328", "#59636E", "#FFFFFF"
PANEL, MARGIN, GAP, ABOVE, BELOW, DPI = 4.4, 0.25, 0.25, 0.95, 0.75, 150  # inches, and pixels per inch
MOST_WINDOWS = 5
SMALLEST_SHARE = 0.005  # of an anchor that is drawn
SHADE = 512  # cells a side of what darkens the rest
OUTLINE = [withStroke(linewidth=3.5, foreground=INK)]


# --------------------------------------------------------------------------------------------------------
# What the network sees of an image
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """Where the network's picture lies in an image; all in pixels of the image.

    Attributes:
        top, left: of the picture; below 0 where it has a border.
        tall, wide: of one of its pixels.
        height, width: of the picture.
    """

    top: float
    left: float
    tall: float
    wide: float
    height: float
    width: float


def prepare(image: Image.Image, steps: Sequence[Any]) -> tuple[Tensor, View]:
    """Runs the steps of timm's preprocessing; returns the network's picture, and what part of the image it is.

    Resizing stretches the whole picture, and cropping keeps its middle: timm prepares images for inference with
    nothing else.
    """
    view = View(0, 0, 1, 1, image.height, image.width)
    picture: Any = image
    for step in steps:
        before, picture = picture, step(picture)
        if isinstance(picture, Image.Image):
            change = stretched if isinstance(step, (Resize, ResizeKeepRatio)) else cropped
            view = change(view, before, picture)
    return picture, view


def stretched(view: View, before: Image.Image, after: Image.Image) -> View:
    """The same part of the image, of other pixels."""
    return replace(view, tall=view.tall * before.height / after.height, wide=view.wide * before.width / after.width)


def cropped(view: View, before: Image.Image, after: Image.Image) -> View:
    """The middle part."""
    return replace(
        view,
        top=view.top + (before.height - after.height) / 2 * view.tall,
        left=view.left + (before.width - after.width) / 2 * view.wide,
        height=after.height * view.tall,
        width=after.width * view.wide,
    )


# --------------------------------------------------------------------------------------------------------
# Which anchors and windows
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """An anchor, its reference window in tokens (first and last row and column), and its share of all that spoke."""

    row: int
    column: int
    window: tuple[int, int, int, int]
    share: float


def marks(attribution: Attribution) -> list[Mark]:
    """The anchors that spoke for the class, strongest first; shares add up to 1, those too small to see included."""
    height, width = attribution.height, attribution.width
    positive = [scan.anchors.clamp(min=0) for scan in attribution.scans]
    total = sum(float(anchors.sum()) for anchors in positive)
    found = []
    for scan, anchors in zip(attribution.scans, positive, strict=True):
        for row, column in (anchors > SMALLEST_SHARE * total).nonzero().tolist():
            window = find_window(scan.local, row, column, height, width)
            found.append(Mark(row, column, window, float(anchors[row, column]) / total))
    return sorted(found, key=lambda mark: -mark.share)


def find_window(local: Neighborhood, row: int, column: int, height: int, width: int) -> tuple[int, int, int, int]:
    """The reference window of an anchor: first row, last row, first column, last column."""
    rows, columns = local.keys(row, column, height, width)
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


def framed(strongest: list[Mark]) -> list[Mark]:
    """The marks whose windows are drawn: those of the strongest anchors that do not overlap."""
    chosen: list[Mark] = []
    for mark in strongest:
        alone = not any(overlap(mark.window, other.window) for other in chosen)
        if alone and len(chosen) < MOST_WINDOWS and mark.share > strongest[0].share / 3:
            chosen.append(mark)
    return chosen


def overlap(window: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    """Whether two windows share a token."""
    top, bottom, left, right = window
    return top <= other[1] and other[0] <= bottom and left <= other[3] and other[2] <= right


# --------------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------------


def draw(image: Image.Image, view: View, attribution: Attribution, title: str, name: str) -> Figure:
    """The whole image, and beside it what the network saw, with its anchors and windows.

    Args:
        title: the class and its probability.
        name: of the image.
    """
    paper = np.array([2 * PANEL + 2 * MARGIN + GAP, ABOVE + PANEL + BELOW])  # inches
    figure = Figure(figsize=tuple(paper), dpi=DPI, facecolor=PAPER)
    corners = [(MARGIN, BELOW), (MARGIN + PANEL + GAP, BELOW)]
    whole, seen = (figure.add_axes((*(corner / paper), *(PANEL / paper)), anchor="NW") for corner in corners)
    for axes in (whole, seen):
        axes.imshow(image.convert("RGB"), extent=(0, image.width, image.height, 0), interpolation="antialiased")
        axes.autoscale(False)
        axes.set_axis_off()
    whole.add_patch(frame(view.left, view.top, view.width, view.height, PAPER))
    seen.set(xlim=(view.left, view.left + view.width), ylim=(view.top + view.height, view.top))
    strongest = marks(attribution)
    draw_marks(seen, Grid(view, attribution), strongest, framed(strongest))
    write(figure, title, name, image, attribution, strongest)
    return figure


class Grid:
    """The tokens of a map in the pixels of the image."""

    def __init__(self, view: View, attribution: Attribution) -> None:
        self.view = view
        self.tall, self.wide = attribution.stride * view.tall, attribution.stride * view.wide

    def centre(self, row: int, column: int) -> tuple[float, float]:
        """Of a token, across and down: the middle of the pixel on which it is centred."""
        across = self.view.left + column * self.wide + self.view.wide / 2
        return across, self.view.top + row * self.tall + self.view.tall / 2

    def box(self, window: tuple[int, int, int, int]) -> tuple[float, float, float, float]:
        """Of a window, within what the network saw: left, top, width, height."""
        first, last = self.centre(window[0], window[2]), self.centre(window[1], window[3])
        left, top = max(first[0] - self.wide / 2, self.view.left), max(first[1] - self.tall / 2, self.view.top)
        right = min(last[0] + self.wide / 2, self.view.left + self.view.width)
        return left, top, right - left, min(last[1] + self.tall / 2, self.view.top + self.view.height) - top


def draw_marks(axes: Axes, grid: Grid, strongest: list[Mark], windows: list[Mark]) -> None:
    """Darkens what lies outside the windows, frames them, and sets a dot on every anchor, its area by its share."""
    view = grid.view
    boxes = [grid.box(mark.window) for mark in windows]
    across = view.left + (np.arange(SHADE) + 0.5) / SHADE * view.width
    down = view.top + (np.arange(SHADE) + 0.5) / SHADE * view.height
    shade = np.zeros((SHADE, SHADE, 4))
    shade[..., 3] = 0.5
    for left, top, width, height in boxes:
        shade[np.ix_((down >= top) & (down <= top + height), (across >= left) & (across <= left + width))] = 0
    axes.imshow(shade, extent=(view.left, view.left + view.width, view.top + view.height, view.top), aspect="equal")
    for box in boxes:
        axes.add_patch(frame(*box, WINDOW))
    if strongest:
        token = 72 * PANEL * max(grid.wide / view.width, grid.tall / view.height)  # points
        largest = min(0.7 * token, 22) ** 2 / strongest[0].share
        centres = np.array([grid.centre(mark.row, mark.column) for mark in strongest])
        areas = [largest * mark.share for mark in strongest]
        axes.scatter(*centres.T, s=areas, color=ANCHOR, edgecolor=PAPER, linewidth=0.8, zorder=3, clip_on=False)


def frame(left: float, top: float, width: float, height: float, color: str) -> Rectangle:
    """A rectangle that is seen on any ground."""
    style = {"edgecolor": color, "linewidth": 1.8, "path_effects": OUTLINE, "clip_on": False}
    return Rectangle((left, top), width, height, fill=False, **style)


def write(
    figure: Figure, title: str, name: str, image: Image.Image, attribution: Attribution, strongest: list[Mark]
) -> None:
    """The title, what the panels are, and what the marks mean."""
    width, height = figure.get_size_inches()
    left, middle = MARGIN / width, (MARGIN + PANEL + GAP) / width
    about = f"{shorten(name, 36)}, {image.width} x {image.height} pixels"
    seen = f"the framed part, which the network saw as {attribution.height} x {attribution.width} tokens"
    figure.text(left, 1 - 0.32 / height, shorten(title, 60), size=15, weight="bold", color=INK, parse_math=False)
    for place, text in ((left, about), (middle, seen)):
        figure.text(place, 1 - 0.76 / height, text, size=9.5, color=SOFT_INK, parse_math=False)

    windows = framed(strongest)
    carried = round(100 * sum(mark.share for mark in windows))
    meanings = {
        "anchors that spoke for the class, by their share": {"marker": "o", "color": ANCHOR, "mec": PAPER},
        f"their strongest reference windows side by side: {len(windows)}, {carried} %": {
            **{"marker": "s", "color": "none", "mec": WINDOW},
            **{"mew": 2, "path_effects": OUTLINE},
        },
    }
    handles = [Line2D([], [], linestyle="", markersize=11, **mark) for mark in meanings.values()]
    place = {"loc": "lower left", "bbox_to_anchor": (left, 0.22 / height), "ncol": 2, "borderpad": 0}
    style = {"frameon": False, "fontsize": 9.5, "labelcolor": INK, "handletextpad": 0.4, "columnspacing": 1.8}
    figure.legend(handles, list(meanings), **place, **style)


def shorten(text: str, most: int) -> str:
    """A text that fits on its line."""
    return textwrap.shorten(text, most, placeholder=" ...") if " " in text else text[:most]
