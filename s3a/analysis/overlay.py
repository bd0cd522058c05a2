"""A picture of where a model looked: its most relevant anchors and reference windows over the image."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor
from torchvision.transforms import Resize

from s3a.analysis.attribution import Attribution
from s3a.support.palette import ANCHOR_ON_IMAGE, INK, LINE_ON_IMAGE, PAPER, SOFT_INK, WINDOW_ON_IMAGE

PANEL, MARGIN, GAP, ABOVE, BELOW, DPI = 4.4, 0.25, 0.25, 0.95, 0.75, 150  # inches, and pixels per inch
MOST_WINDOWS = 5
SMALLEST_SHARE = 0.005  # of an anchor that is drawn
SMALLEST_CELL = 12  # points; lines between smaller ones would hide the image
SHADE = 512  # squares a side of what darkens the rest
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


def prepare_image(image: Image.Image, steps: Sequence[Callable[[Any], Any]]) -> tuple[Tensor, View]:
    """Runs the steps of timm's preprocessing; returns the network's picture, and what part of the image it is.

    Resizing stretches the whole picture, and cropping keeps its middle: timm prepares images for inference with
    nothing else. Of 100 x 200 pixels, a side of 50 and a crop of 40: resized to 50 x 100, where a pixel is 2 x 2 of the
    image; the crop of 40 x 40 begins 5 pixels from the top and 30 from the left, which are 10 and 60 of the image.
    """
    view = View(0, 0, 1, 1, image.height, image.width)
    picture: Any = image
    for step in steps:
        before, picture = picture, step(picture)
        if isinstance(picture, Image.Image):
            change = stretch_view if isinstance(step, (Resize, ResizeKeepRatio)) else crop_view
            view = change(view, before, picture)
    return picture, view


def stretch_view(view: View, before: Image.Image, after: Image.Image) -> View:
    """The same part of the image, in pixels of another size."""
    return replace(view, tall=view.tall * before.height / after.height, wide=view.wide * before.width / after.width)


def crop_view(view: View, before: Image.Image, after: Image.Image) -> View:
    """The middle of that part, in pixels of the same size."""
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


class Window(NamedTuple):
    """The tokens that an anchor sees in the local pass."""

    first_row: int
    last_row: int
    first_column: int
    last_column: int


@dataclass(frozen=True)
class Mark:
    """An anchor, its reference window, and its share of what all anchors contributed to the class."""

    row: int
    column: int
    window: Window
    share: float


def find_marks(attribution: Attribution) -> list[Mark]:
    """The anchors that contributed to the class, strongest first; shares add up to 1 with those too small to see."""
    height, width = attribution.height, attribution.width
    positive = [scan.anchors.clamp(min=0) for scan in attribution.scans]
    total = sum(float(anchors.sum()) for anchors in positive)
    found = []
    for scan, anchors in zip(attribution.scans, positive, strict=True):
        for row, column in (anchors > SMALLEST_SHARE * total).nonzero().tolist():
            rows, columns = scan.local.keys(row, column, height, width)
            window = Window(int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1]))
            found.append(Mark(row, column, window, float(anchors[row, column]) / total))
    return sorted(found, key=lambda mark: -mark.share)


def choose_framed(strongest: list[Mark]) -> list[Mark]:
    """The marks whose windows are drawn: those of the strongest anchors that do not overlap."""
    chosen: list[Mark] = []
    for mark in strongest:
        alone = not any(do_overlap(mark.window, other.window) for other in chosen)
        if alone and len(chosen) < MOST_WINDOWS and mark.share > strongest[0].share / 3:
            chosen.append(mark)
    return chosen


def do_overlap(window: Window, other: Window) -> bool:
    """Whether two windows share a token."""
    rows = window.first_row <= other.last_row and other.first_row <= window.last_row
    return rows and window.first_column <= other.last_column and other.first_column <= window.last_column


# --------------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------------


def draw_overlay(image: Image.Image, view: View, attribution: Attribution, title: str, name: str) -> Figure:
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
    if is_cropped(view, image):
        whole.add_patch(make_frame(Box(view.left, view.top, view.width, view.height), PAPER))
    seen.set(xlim=(view.left, view.left + view.width), ylim=(view.top + view.height, view.top))
    strongest = find_marks(attribution)
    windows = choose_framed(strongest)
    grid = Grid(view, attribution)
    draw_marks(seen, grid, strongest, windows)
    write_texts(figure, title, name, image, grid, strongest, windows)
    return figure


class Box(NamedTuple):
    """A rectangle in pixels of the image."""

    left: float
    top: float
    width: float
    height: float


class Grid:
    """Where the tokens of a map lie in the image: each is a cell, and all cells together are what the network saw.

    Token (row, column) is the square of `stride` pixels of the network's picture that begins at the pixel
    (row * stride, column * stride). The last cells are cut where the stride does not divide the picture's side.
    """

    def __init__(self, view: View, attribution: Attribution) -> None:
        self.view, self.height, self.width = view, attribution.height, attribution.width
        self.tall, self.wide = attribution.stride * view.tall, attribution.stride * view.wide

    def find_box(self, window: Window) -> Box:
        """The cells of a window."""
        left, top = self.view.left + window.first_column * self.wide, self.view.top + window.first_row * self.tall
        right = min(self.view.left + (window.last_column + 1) * self.wide, self.view.left + self.view.width)
        bottom = min(self.view.top + (window.last_row + 1) * self.tall, self.view.top + self.view.height)
        return Box(left, top, right - left, bottom - top)

    def find_centre(self, row: int, column: int) -> tuple[float, float]:
        """The centre of a token's cell, across and down."""
        cell = self.find_box(Window(row, row, column, column))
        return cell.left + cell.width / 2, cell.top + cell.height / 2

    def list_lines(self) -> list[list[tuple[float, float]]]:
        """The lines between the cells."""
        view = self.view
        columns = [view.left + column * self.wide for column in range(1, self.width)]
        rows = [view.top + row * self.tall for row in range(1, self.height)]
        down = [[(across, view.top), (across, view.top + view.height)] for across in columns]
        return down + [[(view.left, row), (view.left + view.width, row)] for row in rows]


def draw_marks(axes: Axes, grid: Grid, strongest: list[Mark], windows: list[Mark]) -> None:
    """Darkens what lies outside the windows, frames them, and sets a dot on every anchor, its area by its share."""
    view = grid.view
    token = 72 * PANEL * max(grid.wide / view.width, grid.tall / view.height)  # points
    boxes = [grid.find_box(mark.window) for mark in windows]
    columns = view.left + (np.arange(SHADE) + 0.5) / SHADE * view.width
    rows = view.top + (np.arange(SHADE) + 0.5) / SHADE * view.height
    shade = np.zeros((SHADE, SHADE, 4))
    shade[..., 3] = 0.5
    for left, top, width, height in boxes:
        shade[np.ix_((rows >= top) & (rows <= top + height), (columns >= left) & (columns <= left + width))] = 0
    axes.imshow(shade, extent=(view.left, view.left + view.width, view.top + view.height, view.top), aspect="equal")
    if token >= SMALLEST_CELL:
        axes.add_collection(LineCollection(grid.list_lines(), colors=LINE_ON_IMAGE, linewidths=0.6, alpha=0.45))
    for box in boxes:
        axes.add_patch(make_frame(box, WINDOW_ON_IMAGE))
    if strongest:
        largest = min(0.7 * token, 22) ** 2 / strongest[0].share
        centres = [grid.find_centre(mark.row, mark.column) for mark in strongest]
        across, down = zip(*centres, strict=True)
        areas = [largest * mark.share for mark in strongest]
        axes.scatter(across, down, s=areas, color=ANCHOR_ON_IMAGE, edgecolor=PAPER, linewidth=0.8, zorder=3)


def make_frame(box: Box, color: str) -> Rectangle:
    """A rectangle that is seen on any ground."""
    corner = (box.left, box.top)
    return Rectangle(
        corner,
        box.width,
        box.height,
        fill=False,
        edgecolor=color,
        linewidth=1.8,
        path_effects=OUTLINE,
        clip_on=False,
        zorder=2.5,  # above the lines between the cells, below the anchors
    )


def write_texts(
    figure: Figure, title: str, name: str, image: Image.Image, grid: Grid, strongest: list[Mark], windows: list[Mark]
) -> None:
    """Writes the title, what the panels are, and what the marks mean."""
    width, height = figure.get_size_inches()
    left, middle = MARGIN / width, (MARGIN + PANEL + GAP) / width
    about = f"{shorten(name, 36)}, {image.width} x {image.height} pixels"
    part = "the framed part" if is_cropped(grid.view, image) else "the same"
    seen = f"{part}, as the network saw it: {grid.height} x {grid.width} tokens"
    figure.text(left, 1 - 0.32 / height, shorten(title, 60), size=15, weight="bold", color=INK, parse_math=False)
    for place, text in ((left, about), (middle, seen)):
        figure.text(place, 1 - 0.76 / height, text, size=9.5, color=SOFT_INK, parse_math=False)

    anchors = Line2D([], [], linestyle="", marker="o", markersize=10, color=ANCHOR_ON_IMAGE, markeredgecolor=PAPER)
    frames = Line2D([], [], linestyle="", marker="s", markersize=9, color="none", markeredgecolor=WINDOW_ON_IMAGE)
    frames.set(markeredgewidth=2, path_effects=OUTLINE)
    meanings = dict(zip(describe_marks(strongest, windows), (anchors, frames), strict=False))
    figure.legend(
        list(meanings.values()),
        list(meanings),
        loc="lower left",
        bbox_to_anchor=(left, 0.12 / height),
        borderpad=0,
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        handletextpad=0.4,
        labelspacing=0.55,
    )


def describe_marks(strongest: list[Mark], windows: list[Mark]) -> list[str]:
    """What a dot means, and what a frame: a sentence each."""
    if not strongest:
        return ["anchors that contributed to the class: here there is none"]
    these = "this one accounts" if len(windows) == 1 else f"these {len(windows)} account"
    share = round(100 * sum(mark.share for mark in windows))
    return [
        "anchors that contributed to the class: the larger the dot, the more",
        f"reference windows, where strong anchors looked: {these} for {share} % of all contributions",
    ]


def is_cropped(view: View, image: Image.Image) -> bool:
    """Whether the network saw a part of the image alone, or a border around it."""
    seen, whole = (view.left, view.top, view.width, view.height), (0, 0, image.width, image.height)
    return not np.allclose(seen, whole, atol=0.5)


def shorten(text: str, most: int) -> str:
    """The text, cut to a number of characters: at a space where it has any."""
    return textwrap.shorten(text, most, placeholder=" ...") if " " in text else text[:most]
