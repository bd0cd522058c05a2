"""The picture of a scan: what one token sees, against dense masks."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import golden
from helpers.command_line import TOOLS, Command, check_refused
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from s3a.geometry import FIXED, sparse_scan

visualise = SimpleNamespace(**runpy.run_path(str(TOOLS / "visualise.py")))


@pytest.mark.parametrize("fixed", FIXED)
@pytest.mark.parametrize(
    ("height", "width", "row", "column"), [(56, 56, 21, 35), (30, 23, 0, 22), (9, 20, 8, 3), (7, 5, 6, 1)]
)
def test_sight_equals_the_dense_masks(fixed: str, height: int, width: int, row: int, column: int) -> None:
    sight = visualise.find_sight(sparse_scan(height, width, 7, fixed), row, column, height, width)
    passes = [*golden.scan_table(height, width, fixed), (1, 1), (1, 1)][:2]
    local, anchor = (golden.dense_mask(height, width, *step) for step in passes)
    anchors = anchor[row * width + column]
    assert sorted(map(tuple, sight.anchors.tolist())) == list(
        map(tuple, anchors.view(height, width).nonzero().tolist())
    )
    assert np.array_equal(sight.anchor_counts, local[anchors].sum(0).view(height, width))
    window = torch.zeros(height, width, dtype=torch.bool)
    window[np.ix_(*sight.window)] = True
    assert torch.equal(window.flatten(), local[row * width + column])


@pytest.mark.parametrize(
    ("side", "lines"),
    [
        (56, ["kernel 7, dilation 1, then kernel 9, dilation 6", "kernel 9, dilation 1, then kernel 7, dilation 8"]),
        (14, ["kernel 7, dilation 1, then kernel 3, dilation 4", "kernel 3, dilation 1, then kernel 7, dilation 2"]),
        (7, ["kernel 7, dilation 1", "kernel 7, dilation 1"]),
    ],
)
def test_picture_names_the_passes(side: int, lines: list[str]) -> None:
    figure = visualise.draw_scans(visualise.Options(output=Path("scan.png"), height=side, width=side))
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert [text for text in texts if text.startswith("kernel")] == lines
    assert texts.count('fixed="window"') == texts.count('fixed="anchors"') == 1


def test_picture_shows_the_query_in_its_place(command: Command, tmp_path: Path) -> None:
    """On a map that is not square, so that rows and columns cannot be mistaken for each other."""
    options = visualise.Options(output=tmp_path / "new" / "scan.png", height=30, width=40, row=25, column=3)
    arguments = [word for name, value in vars(options).items() for word in (f"--{name}", value)]
    status, out, err = command("visualise", *arguments)
    assert (status, out, err) == (0, f"wrote {options.output}\n", "")

    picture = np.asarray(Image.open(options.output).convert("RGB")) / 255
    for axes in visualise.draw_scans(options).axes:
        column, row = axes.transData.transform((3.5, 25.5)).round().astype(int)
        assert np.allclose(picture[picture.shape[0] - 1 - row, column], to_rgb(visualise.QUERY), atol=0.02)
    assert np.allclose(picture[0, 0], 1)


def test_the_legend_has_the_tints_of_the_map() -> None:
    """Tokens that windows of several anchors share are darker, and the legend says so."""
    height, width, size = 20, 23, 5
    options = visualise.Options(output=Path("scan.png"), height=height, width=width, size=size)
    figure = visualise.draw_scans(options)
    (legend,) = figure.legends
    tints = {
        text.get_text(): to_rgb(handle.get_facecolor())
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
        if hasattr(handle, "get_facecolor")
    }
    counts = visualise.find_sight(
        sparse_scan(height, width, size, FIXED[0]), *visualise.find_query(options), height, width
    ).anchor_counts
    colors = figure.axes[0].images[0].get_array()
    for count, label in ((1, "seen by one anchor"), (2, "by two or more")):
        row, column = np.argwhere(counts == count)[0]
        assert np.allclose(colors[row, column], tints[label])
    assert sum(tints["seen by one anchor"]) > sum(tints["by two or more"])


def test_picture_suits_a_readme(command: Command, tmp_path: Path) -> None:
    command("visualise", "--output", tmp_path / "scan.png")
    for path in (tmp_path / "scan.png", TOOLS.parent / "docs" / "scan.png"):
        assert Image.open(path).width == 1800
        assert path.stat().st_size < 200_000


def test_picture_refuses(command: Command, tmp_path: Path) -> None:
    picture = tmp_path / "scan.png"
    check_refused(command("visualise", "--output", picture, "--row", 56), "row is 56", "0 to 55")
    check_refused(command("visualise", "--output", picture, "--width", 20, "--column", -1), "column is -1", "0 to 19")
    check_refused(command("visualise", "--output", picture, "--height", 0), "0 x 56")
    check_refused(command("visualise", "--output", picture, "--size", 0), "size is 0")
    check_refused(command("visualise", "--output", tmp_path / "scan.jpg"), "scan.jpg", ".png")
    check_refused(command("visualise"), "--output")
    assert not picture.exists()
