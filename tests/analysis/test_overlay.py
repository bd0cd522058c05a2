"""The picture of where a model looked: its marks lie where the network saw what they mark."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image
from timm.data import create_transform

from s3a.analysis.attribution import Attribution, ScanRelevance
from s3a.analysis.overlay import Grid, View, Window, choose_framed, draw_overlay, find_marks, prepare_image
from s3a.geometry import Neighborhood
from s3a.support.palette import ANCHOR_ON_IMAGE, PAPER, WINDOW_ON_IMAGE

CONFIG = {"input_size": (3, 64, 96), "crop_pct": 0.8, "interpolation": "bicubic", "mean": (0.0,) * 3, "std": (1.0,) * 3}


def steps(**changes: object) -> list:
    return create_transform(**{**CONFIG, **changes}, is_training=False).transforms


# --------------------------------------------------------------------------------------------------------
# What the network sees
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("input_size", [(3, 64, 64), (3, 64, 96)])
@pytest.mark.parametrize("size", [(640, 427), (90, 300), (700, 60), (48, 36), (64, 64)])
def test_what_the_network_sees(size: tuple[int, int], input_size: tuple[int, int, int], crop_mode: str):
    """A bright square keeps its place: found in the network's picture, and led back into the image."""
    width, height = size
    side = max(4, min(size) // 6)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    top, left = round(0.45 * height), round(0.5 * width - 0.2 * min(size))
    pixels[top : top + side, left : left + side] = 255
    seen, view = prepare_image(Image.fromarray(pixels), steps(input_size=input_size, crop_mode=crop_mode))
    assert seen.shape == input_size
    assert view.height == pytest.approx(view.tall * input_size[1])
    assert view.width == pytest.approx(view.wide * input_size[2])
    for axis, start, pixel, corner in ((1, top, view.tall, view.top), (0, left, view.wide, view.left)):
        light = seen[0].clamp(0, 1).sum(axis).numpy()
        middle = float((light * (np.arange(len(light)) + 0.5)).sum() / light.sum())
        assert corner + middle * pixel == pytest.approx(start + side / 2, abs=0.6 * max(pixel, 1))


def test_the_whole_image_is_seen(tmp_path: Path):
    _, view = prepare_image(Image.new("RGB", (50, 50)), steps(input_size=(3, 32, 32), crop_pct=1.0))
    assert view == View(top=0, left=0, tall=50 / 32, wide=50 / 32, height=50, width=50)


# --------------------------------------------------------------------------------------------------------
# Marks
# --------------------------------------------------------------------------------------------------------


def attributed(
    anchors: dict[tuple[int, int], float], others: dict[tuple[int, int], float] | None = None
) -> Attribution:
    """An 8 x 12 map of stride 8 where these anchors have some relevance, through windows of 3, and others of 5."""
    scans = []
    for kernel, found in ((3, anchors), (5, others or {})):
        relevance = torch.full((8, 12), -0.1)
        for place, value in found.items():
            relevance[place] = value
        scans.append(ScanRelevance(Neighborhood(kernel), Neighborhood(3, 2), anchors=relevance, tokens=relevance))
    return Attribution(height=8, width=12, stride=8, scans=tuple(scans), logits=torch.zeros(2))


def test_marks_are_what_contributed_to_the_class():
    found = find_marks(attributed({(2, 3): 3.0, (7, 11): 1.0, (5, 5): 0.001}, {(0, 0): 4.0}))
    assert [(mark.row, mark.column) for mark in found] == [(0, 0), (2, 3), (7, 11)]
    assert [mark.share for mark in found] == pytest.approx([4 / 8, 3 / 8, 1 / 8], rel=1e-3)
    assert [mark.window for mark in found] == [(0, 4, 0, 4), (1, 3, 2, 4), (5, 7, 9, 11)]


def test_framed_windows_do_not_overlap_and_are_strong():
    found = find_marks(attributed({(2, 3): 3.0, (3, 5): 2.9, (3, 6): 2.8, (7, 11): 1.2, (7, 1): 0.9}))
    assert [(mark.row, mark.column) for mark in choose_framed(found)] == [(2, 3), (3, 6), (7, 11)]
    assert find_marks(attributed({})) == choose_framed([]) == []


def test_no_more_windows_than_one_can_tell_apart():
    corners = {(row, column): 1.0 for row in (1, 4, 7) for column in (1, 4, 7, 10)}
    assert len(find_marks(attributed(corners))) == 12
    assert len(choose_framed(find_marks(attributed(corners)))) == 5


# --------------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------------


def drawn(size: tuple[int, int] = (900, 600), title: str = "cat: 12.3 %", name: str = "a.jpg") -> tuple[Figure, View]:
    """One strong anchor at (2, 3), a weaker one at (6, 9)."""
    image = Image.new("RGB", size, (90, 120, 90))
    _, view = prepare_image(image, steps())
    return draw_overlay(image, view, attributed({(2, 3): 4.0, (6, 9): 1.0}), title, name), view


def find_cells(rows: slice, columns: slice, height: int, width: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of some tokens of the 8 x 12, as pixels of a picture: by painting them there."""
    tokens = np.zeros((8, 12))
    tokens[rows, columns] = 1
    painted = np.kron(tokens, np.ones((8, 8)))[:height, :width]
    down, across = np.nonzero(painted)
    return across.min(), down.min(), across.max() + 1, down.max() + 1


@pytest.mark.parametrize(("height", "width"), [(64, 96), (61, 91)])
@pytest.mark.parametrize(("row", "column"), [(2, 3), (0, 0), (7, 11), (0, 11)])
def test_marks_are_the_cells_of_their_tokens(row: int, column: int, height: int, width: int):
    """Anchors in the middle of their cell and windows of whole cells, cut where the picture ends in a cell."""
    image = Image.new("RGB", (900, 600))
    _, view = prepare_image(image, steps(input_size=(3, height, width)))
    found = attributed({(row, column): 4.0, (4, 6): 1.0})
    _, seen = draw_overlay(image, view, found, "cat: 12.3 %", "a.jpg").axes
    (dots,) = (artist for artist in seen.collections if isinstance(artist, PathCollection))
    assert dots.get_sizes()[0] == pytest.approx(4 * dots.get_sizes()[1])
    pixel, corner = np.array([view.wide, view.tall]), np.array([view.left, view.top])
    left, top, right, bottom = find_cells(slice(row, row + 1), slice(column, column + 1), height, width)
    assert np.allclose(dots.get_offsets()[0], corner + pixel * [(left + right) / 2, (top + bottom) / 2])
    first = [min(max(place - 1, 0), length - 3) for place, length in ((row, 8), (column, 12))]
    left, top, right, bottom = find_cells(*(slice(start, start + 3) for start in first), height, width)
    (window,) = (patch for patch in seen.patches if isinstance(patch, Rectangle))
    assert np.allclose(window.get_xy(), corner + pixel * [left, top])
    assert np.allclose([window.get_width(), window.get_height()], pixel * [right - left, bottom - top])
    assert left >= 0
    assert top >= 0
    assert right <= width
    assert bottom <= height


def test_only_a_part_of_the_image_is_framed():
    for crop_pct, frames, caption in ((0.8, 1, "the framed part"), (1.0, 0, "the same")):
        image = Image.new("RGB", (96, 64))
        _, view = prepare_image(image, steps(crop_pct=crop_pct))
        figure = draw_overlay(image, view, attributed({(0, 0): 1.0}), "cat", "a.jpg")
        assert len(figure.axes[0].patches) == frames
        assert figure.texts[2].get_text() == f"{caption}, as the network saw it: 8 x 12 tokens"


def test_the_legend_says_what_the_marks_mean():
    def read_legend(anchors: dict[tuple[int, int], float]) -> list[str]:
        image = Image.new("RGB", (96, 64))
        _, view = prepare_image(image, steps())
        (legend,) = draw_overlay(image, view, attributed(anchors), "cat", "a.jpg").legends
        return [text.get_text() for text in legend.get_texts()]

    dots, frames = read_legend({(2, 3): 3.0, (7, 11): 2.0, (3, 3): 5.0})
    assert dots == "anchors that contributed to the class: the larger the dot, the more"
    assert frames.endswith("looked: these 2 account for 70 % of all contributions")  # two of three windows overlap
    assert read_legend({(2, 3): 3.0})[1].endswith("this one accounts for 100 % of all contributions")
    assert read_legend({}) == ["anchors that contributed to the class: here there is none"]


def test_the_last_tokens_of_an_odd_picture_are_cut():
    """61 pixels have 16 tokens of 4, the last of one pixel only: two rows from pixel 56 on are five pixels tall."""
    attribution = SimpleNamespace(stride=4, height=16, width=16)
    grid = Grid(View(top=10, left=20, tall=1, wide=1, height=61, width=61), attribution)
    box = grid.find_box(Window(first_row=14, last_row=15, first_column=0, last_column=15))
    assert box == (20, 10 + 56, 61, 5)


def test_the_picture_shows_image_and_marks(tmp_path: Path):
    """Pixels of the file: a dot in its place, the image as it is on the left, darkened outside windows on the right."""
    figure, view = drawn()
    figure.savefig(tmp_path / "a.png")
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")) / 255
    whole, seen = figure.axes

    def pixel(axes, across: float, down: float) -> np.ndarray:
        column, row = axes.transData.transform((across, down)).round().astype(int)
        return picture[picture.shape[0] - 1 - row, column]

    ground = np.array([90, 120, 90]) / 255
    strong = view.left + 28 * view.wide, view.top + 20 * view.tall
    assert np.allclose(pixel(seen, *strong), to_rgb(ANCHOR_ON_IMAGE), atol=0.02)
    assert np.allclose(pixel(seen, strong[0] + 7 * view.wide, strong[1] + 7 * view.tall), ground, atol=0.02)
    assert np.allclose(pixel(seen, strong[0] + 12 * view.wide, strong[1]), to_rgb(WINDOW_ON_IMAGE), atol=0.1)
    assert np.allclose(pixel(seen, view.left + 52 * view.wide, strong[1]), ground / 2, atol=0.02)
    assert np.allclose(pixel(whole, *strong), ground, atol=0.02)
    assert np.allclose(pixel(whole, view.left, view.top + view.height / 2), to_rgb(PAPER), atol=0.1)


@pytest.mark.parametrize("size", [(8, 8), (3000, 40), (40, 3000), (1, 1)])
def test_legible_at_any_size(size: tuple[int, int], tmp_path: Path):
    """The part that the network saw is always as large, and no text leaves the paper or meets another."""
    long = "a " * 90
    figure, _ = drawn(size, title=f"{long}: 1.2 %", name="x" * 300 + ".jpg")
    figure.savefig(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (1432, 915)
    boxes = [text.get_window_extent() for text in figure.findobj(Text) if text.get_text()]
    assert len(boxes) == 5
    for box in boxes:
        assert 0 < box.x0 < box.x1 < 1432
        assert 0 < box.y0 < box.y1 < 915
        assert sum(box.overlaps(other) for other in boxes) == 1
    across, down = np.ptp(figure.axes[1].get_xlim()), np.ptp(figure.axes[1].get_ylim())
    assert across / down == pytest.approx(96 / 64, rel=0.1)


def test_names_are_no_formulas(tmp_path: Path):
    figure, _ = drawn(title="$5 and $6: 1.0 %", name="$a$.png")
    figure.savefig(tmp_path / "a.png")
    texts = [text for text in figure.findobj(Text) if "$" in text.get_text()]
    assert len(texts) == 2
    assert not any(text.get_parse_math() for text in texts)


def test_nothing_contributed_to_the_class(tmp_path: Path):
    image = Image.new("RGB", (80, 80))
    _, view = prepare_image(image, steps())
    draw_overlay(image, view, attributed({}), "cat", "a.jpg").savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0
