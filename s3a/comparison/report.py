"""A comparison for people: its table, as text and as markdown, and its picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from s3a.comparison.results import Results

# Okabe and Ito's colours, with Tol's wine for their yellow, which is pale on white. The markers differ as well.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH, ROW_HEIGHT, GROWTH_HEIGHT, DPI = 11.0, 0.5, 4.0, 150  # inches
LEGEND_COLUMNS = 3

Row = dict[str, Any]
Cell = Callable[[Row], str]

# --------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------


def mean_and(kind: str, spread: Row | None, unit: float, digits: int) -> str:
    """A mean and its deviation or error, in a unit; a dash where there is none."""
    if spread is None:
        return "-"
    mean, around = (
        None if value is None else round(value / unit, digits) + 0.0 for value in (spread["mean"], spread[kind])
    )
    sign = "+" if kind == "error" else ""
    return f"{mean:{sign}.{digits}f}" + ("" if around is None else f" ± {around:.{digits}f}")


PERCENT = 0.01
SCORES: dict[str, Cell] = {
    "model": lambda row: row["label"],
    "parameters": lambda row: f"{row['parameters']:,}",
    "GMACs, layers": lambda row: f"{row['published_gmacs']:.4f}",
    "GMACs, whole": lambda row: f"{row['gmacs']:.4f}",
    "epochs": lambda row: f"{row['epochs']}",
    "top-1 (%)": lambda row: mean_and("deviation", row["top1"], PERCENT, 2),
    "difference": lambda row: mean_and("error", row.get("top1_difference"), PERCENT, 2),
    "loss": lambda row: mean_and("deviation", row["val_loss"], 1, 4),
    "loss, difference": lambda row: mean_and("error", row.get("val_loss_difference"), 1, 4),
    "each seed's top-1 (%)": lambda row: " ".join(f"{100 * top1:.2f}" for top1 in row["top1"]["seeds"]),
}
SPEEDS: dict[str, Cell] = {
    "model": lambda row: row["label"],
    "inference, images/s": lambda row: f"{row['inference_images_per_second']:,.0f}",
    "MiB at peak": lambda row: f"{row['inference_mib']:,.0f}",
    "training, images/s": lambda row: f"{row['training_images_per_second']:,.0f}",
    "MiB at peak, training": lambda row: f"{row['training_mib']:,.0f}",
}


def tables(results: Results) -> list[list[list[str]]]:
    """Scores, speeds and growth, each as lines of cells with the heads first; those not measured are left out."""
    made = [lines(SCORES, results.rows)]
    if results.speed:
        made.append(lines(SPEEDS, results.rows))
    if results.growth:
        made.append(growth_lines(results))
    return made


def lines(cells: dict[str, Cell], rows: list[Row]) -> list[list[str]]:
    """A table whose cells are functions of the row."""
    return [list(cells), *([cell(row) for cell in cells.values()] for row in rows)]


def growth_lines(results: Results) -> list[list[str]]:
    """A line for each candidate, a column for each side: milliseconds and MiB of one image."""
    sides = results.sides
    table = [["one image", *(f"{side} px" for side in sides)]]
    for row in results.rows:
        at = {each["image_size"]: each for each in results.growth if each["label"] == row["label"]}
        table.append([row["label"], *(growth_cell(at[side]) for side in sides)])
    return table


def growth_cell(row: Row) -> str:
    """Time and memory at one side."""
    return "skipped" if "skipped" in row else f"{row['ms']:,.1f} ms, {row['mib']:,.0f} MiB"


def skipped(results: Results) -> list[str]:
    """A line for each measurement that was left out, and why."""
    rows = [row for row in results.growth if "skipped" in row]
    return [f"{row['label']} at {row['image_size']} px skipped: {row['skipped']}" for row in rows]


def as_text(table: list[list[str]]) -> str:
    """A table for a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in table]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def as_markdown(table: list[list[str]]) -> str:
    """A table for a README."""
    rule = ["---", *["---:"] * (len(table[0]) - 1)]
    names = [[f"`{line[0]}`", *line[1:]] for line in table[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in [table[0], rule, *names])


# --------------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------------


def draw(results: Results, path: Path) -> None:
    """Draws scores and throughput, a line for each candidate, and below them the growth, where it was measured."""
    heights = [1.3 + ROW_HEIGHT * len(results.rows), GROWTH_HEIGHT if results.growth else 0]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(2 if results.growth else 1, 2, height_ratios=[height for height in heights if height])
    scores = figure.add_subplot(grid[0, 0])
    draw_scores(scores, results.rows)
    draw_throughput(figure.add_subplot(grid[0, 1], sharey=scores), results.rows)
    if results.growth:
        time, memory = (figure.add_subplot(grid[1, column]) for column in (0, 1))
        draw_growth(time, results, "ms", "milliseconds for one image")
        draw_growth(memory, results, "mib", "MiB at the peak, for one image")
        columns = min(len(results.rows), LEGEND_COLUMNS)
        figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def style(index: int) -> dict[str, str]:
    """The colour and marker of a candidate; they begin again after the last."""
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}


def draw_scores(axes: Axes, rows: list[Row]) -> None:
    """Every seed's top-1 as a hollow mark, their mean as a full one with the deviation as a bar."""
    for index, row in enumerate(rows):
        top1, look = row["top1"], style(index)
        seeds = [100 * each for each in top1["seeds"]]
        places = [index + 0.1 + 0.3 * (seed + 1) / (len(seeds) + 1) for seed in range(len(seeds))]  # equal ones too
        axes.plot(seeds, places, linestyle="", markersize=5, markerfacecolor="none", alpha=0.8, **look)
        deviation = None if top1["deviation"] is None else 100 * top1["deviation"]
        axes.errorbar(100 * top1["mean"], index - 0.12, xerr=deviation, capsize=4, markersize=7, **look)
    axes.set_yticks(range(len(rows)), [with_cost(row) for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    num_seeds = len(rows[0]["top1"]["seeds"])
    finish(axes, f"top-1 (%): mean and deviation of {num_seeds} seeds" if num_seeds > 1 else "top-1 (%), one seed")


def with_cost(row: Row) -> str:
    """A candidate's name, and below it what it costs."""
    return f"{row['label']}\n{row['parameters'] / 1e6:,.2f} M, {row['gmacs']:,.3g} GMACs"


def draw_throughput(axes: Axes, rows: list[Row]) -> None:
    """Images per second in inference and in training, as bars."""
    for index, row in enumerate(rows):
        for place, phase, alpha in ((-0.19, "inference", 1.0), (0.19, "training", 0.45)):
            speed = row.get(f"{phase}_images_per_second", 0)
            axes.barh(index + place, speed, height=0.34, color=style(index)["color"], alpha=alpha)
            axes.annotate(f" {speed:,.0f}", (speed, index + place), va="center", fontsize=8)
    axes.tick_params(labelleft=False)
    axes.margins(x=0.14)
    finish(axes, "images per second: inference full, training pale")


def draw_growth(axes: Axes, results: Results, key: str, title: str) -> None:
    """A quantity against the side of the images, both logarithmic."""
    for index, row in enumerate(results.rows):
        mine = [each for each in results.growth if each["label"] == row["label"] and key in each]
        points = sorted((each["image_size"], each[key]) for each in mine)
        axes.plot(
            *(zip(*points, strict=True) if points else ([], [])), label=row["label"], markersize=5, **style(index)
        )
    sides = results.sides
    axes.set(xscale="log", yscale="log", xlabel="side of the image (px)")
    axes.set_xticks(sides, [str(side) for side in sides])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    finish(axes, title)


def finish(axes: Axes, title: str) -> None:
    """Title, grid and frame."""
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
