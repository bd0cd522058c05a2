"""Draws what one token sees in both kinds of sparse scan: python tools/visualise.py --output docs/scan.png."""

import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below shows no traceback

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from s3a.geometry import FIXED, Neighborhood, Scan, sparse_scan
from s3a.support.command_line import run_command
from s3a.support.palette import ANCHOR, INK, PAPER, QUERY, SEEN_BY_ANCHORS, SEEN_BY_QUERY, SOFT_INK, TOKEN

FIGURE_WIDTH, DPI = 9.0, 200  # inches, and pixels per inch: twice the width of a README
ABOVE, BELOW, MARGIN, GAP, HIGHEST = 1.5, 0.85, 0.25, 0.34, 6.0  # inches around and between panels, and of a panel
STORY = "First every token looks at its window. Then it looks at its anchors, which pass on what they saw."


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draws what one token sees in both kinds of sparse scan."""

    output: Path
    """The PNG to write, such as docs/scan.png."""
    height: int = 56
    """Of the map, in tokens."""
    width: int = 56
    """Of the map, in tokens."""
    size: int = 7
    """Tokens per axis of what is fixed."""
    row: int | None = None
    """Of the query; none for a little above the middle."""
    column: int | None = None
    """Of the query; none for a little right of the middle."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sight:
    """What one query of a scan sees on a map.

    Attributes:
        query: its (row, column).
        anchors: [anchors, 2] int64, the (row, column) tokens that it sees in the anchor pass.
        anchor_counts: [height, width] int64, how many of the anchors see each token in the local pass.
        window: the rows and the columns that the query itself sees in the local pass.
    """

    query: tuple[int, int]
    anchors: np.ndarray
    anchor_counts: np.ndarray
    window: tuple[np.ndarray, np.ndarray]


def main(options: Options) -> None:
    """Draws and writes."""
    if options.output.suffix != ".png":
        raise ValueError(f"output is {str(options.output)!r}: its name must end in .png")
    figure = draw_scans(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_small(figure, options.output)
    print(f"wrote {options.output}")


def find_query(options: Options) -> tuple[int, int]:
    """The query's row and column; ValueError for an empty map, or a query outside it."""
    if min(options.height, options.width) < 1:
        raise ValueError(f"the map is {options.height} x {options.width} tokens: height and width must be positive")
    row = options.height * 3 // 8 if options.row is None else options.row
    column = options.width * 5 // 8 if options.column is None else options.column
    for name, value, length in (("row", row, options.height), ("column", column, options.width)):
        if not 0 <= value < length:
            raise ValueError(f"{name} is {value}: it must be from 0 to {length - 1} on this map")
    return row, column


def find_sight(scan: Scan, row: int, column: int, height: int, width: int) -> Sight:
    """What the query at (row, column) sees. Where a scan has no anchor pass, the query is its only anchor."""
    itself = Neighborhood((1, 1))
    local, anchor = (*scan, itself, itself)[:2]
    rows, columns = anchor.keys(row, column, height, width)
    row_counts, column_counts = np.zeros(height, dtype=np.int64), np.zeros(width, dtype=np.int64)
    for anchor_row in rows:
        row_counts[local.keys(anchor_row, column, height, width)[0]] += 1
    for anchor_column in columns:
        column_counts[local.keys(row, anchor_column, height, width)[1]] += 1
    return Sight(
        query=(row, column),
        anchors=np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2),
        anchor_counts=np.outer(row_counts, column_counts),
        window=local.keys(row, column, height, width),
    )


# --------------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------------


def draw_scans(options: Options) -> Figure:
    """A panel for each kind of scan, side by side."""
    height, width, query = options.height, options.width, find_query(options)
    slot = (FIGURE_WIDTH - 2 * MARGIN - GAP) / 2
    token = min(slot / width, HIGHEST / height)  # inches
    paper = np.array([FIGURE_WIDTH, ABOVE + height * token + BELOW])
    figure = Figure(figsize=tuple(paper), dpi=DPI, facecolor=PAPER)

    for index, fixed in enumerate(FIXED):
        scan = sparse_scan(height, width, options.size, fixed)
        corner, extent = (MARGIN + index * (slot + GAP), BELOW), (width * token, height * token)
        axes = figure.add_axes((*(corner / paper), *(extent / paper)), xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        sight = find_sight(scan, *query, height, width)
        draw_map(axes, sight, 72 * token)
        write_panel(axes, f'fixed="{fixed}"', scan, sight)

    left = MARGIN / FIGURE_WIDTH
    heights = {"title": 1 - 0.34 / paper[1], "story": 1 - 0.68 / paper[1], "legend": 0.13 / paper[1]}
    figure.text(left, heights["title"], "What one token sees", size=17, weight="bold", color=INK, va="center")
    figure.text(left, heights["story"], STORY, size=11.5, color=SOFT_INK, va="center")
    figure.legend(
        handles=make_legend_handles(),
        loc="lower left",
        bbox_to_anchor=(left, heights["legend"]),
        ncol=5,
        frameon=False,
        fontsize=11,
        labelcolor=INK,
        borderpad=0,
        handlelength=1.4,
        handletextpad=0.5,
        columnspacing=1.8,
    )
    return figure


def draw_map(axes: Axes, sight: Sight, token: float) -> None:
    """Draws the tokens, tinted by what saw them, and rays from the query to its anchors.

    Args:
        token: the side of a token, in points.
    """
    height, width = sight.anchor_counts.shape
    colors = tint_token(SEEN_BY_ANCHORS, shade_overlap(sight.anchor_counts[..., None]))
    colors[np.ix_(*sight.window)] = tint_token(SEEN_BY_QUERY, 0.6)
    axes.imshow(colors, extent=(0, width, height, 0), aspect="auto", interpolation="nearest")
    across = [[(0, row), (width, row)] for row in range(height + 1)]
    down = [[(column, 0), (column, height)] for column in range(width + 1)]
    axes.add_collection(LineCollection([*across, *down], colors=PAPER, linewidths=min(0.14 * token, 1.5)))

    rows_seen, columns_seen = sight.window
    corner = (columns_seen[0], rows_seen[0])
    axes.add_patch(
        Rectangle(
            corner, len(columns_seen), len(rows_seen), fill=False, edgecolor=SEEN_BY_QUERY, linewidth=1.8, zorder=2
        )
    )
    query, anchors = np.array(sight.query)[::-1] + 0.5, sight.anchors[:, ::-1] + 0.5
    rays = [(query, anchor) for anchor in anchors]
    alpha = min(0.25, 20 / len(rays))
    axes.add_collection(LineCollection(rays, colors=ANCHOR, linewidths=0.6, alpha=alpha, zorder=3))
    apart = token * min(height, width) / len(rays) ** 0.5
    axes.scatter(
        anchors[:, 0],
        anchors[:, 1],
        s=min(4.5, 0.3 * apart) ** 2,
        color=ANCHOR,
        edgecolor=PAPER,
        linewidth=0.5,
        zorder=4,
    )
    axes.scatter(query[0], query[1], s=100, color=QUERY, edgecolor=PAPER, linewidth=1.3, zorder=5)


def write_panel(axes: Axes, title: str, scan: Scan, sight: Sight) -> None:
    """Writes the scan's name and passes above its map, and what it costs and sees below."""
    height, width = sight.anchor_counts.shape
    passes = ", then ".join(f"kernel {step.kernel_size[0]}, dilation {step.dilation[0]}" for step in scan)
    keys = " + ".join(f"{step.count_pairs(height, width) / (height * width):,.0f}" for step in scan)
    seen = np.count_nonzero(sight.anchor_counts) / sight.anchor_counts.size
    write = partial(axes.annotate, xycoords="axes fraction", textcoords="offset points")
    write(title, (0, 1), (0, 24), va="bottom", family="monospace", weight="bold", size=13, color=INK)
    write(passes, (0, 1), (0, 5), va="bottom", size=11, color=SOFT_INK)
    summary = f"{keys} of {height * width:,} keys reach {seen:.0%} of the map"
    write(summary, (0, 0), (0, -6), va="top", size=11, color=INK)


def make_legend_handles() -> list[Line2D | Patch]:
    """A handle with its meaning for each kind of mark."""
    return [
        Line2D([], [], marker="o", linestyle="", color=QUERY, markersize=9, label="query"),
        Line2D([], [], marker="o", linestyle="", color=ANCHOR, markersize=5.5, label="its anchors of interest"),
        Patch(facecolor=tuple(tint_token(SEEN_BY_ANCHORS, shade_overlap(1))), label="seen by one anchor"),
        Patch(facecolor=tuple(tint_token(SEEN_BY_ANCHORS, shade_overlap(2))), label="by two or more"),
        Patch(
            facecolor=tuple(tint_token(SEEN_BY_QUERY, 0.6)),
            edgecolor=SEEN_BY_QUERY,
            linewidth=1.5,
            label="by the query",
        ),
    ]


def shade_overlap(counts: int | np.ndarray) -> float | np.ndarray:
    """How deep the tint of a token is that so many anchors see; none for 0, and more where their windows overlap."""
    return 1 - 0.62**counts


def tint_token(color: str, share: float | np.ndarray) -> np.ndarray:
    """The colour of a token with a share of another colour in it."""
    return share * np.array(to_rgb(color)) + (1 - share) * np.array(to_rgb(TOKEN))


def save_small(figure: Figure, output: Path) -> None:
    """Writes the figure as a PNG of at most 256 colours, a third of the size of all of them."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    indexed = picture.quantize(colors=256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    indexed.save(output, optimize=True)


if __name__ == "__main__":
    run_command(Options, main)
