"""A comparison for people: its tables, as text and as markdown, and its picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from s3a.comparison.results import Difference, Growth, Results, Score, Spread
from s3a.support.figures import describe_machine_briefly, label_sides
from s3a.support.palette import SERIES, SOFT_INK

WIDTH, ROW_HEIGHT, GROWTH_HEIGHT, DPI = 11.0, 0.5, 4.0, 150  # inches
LEGEND_COLUMNS = 3
PERCENT = 0.01

Table = list[list[str]]
"""Lines of cells, the heads first."""

# --------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------


def format_spread(spread: Spread, unit: float, digits: int) -> str:
    """A mean and its deviation, in a unit."""
    return format_around(spread["mean"], spread["deviation"], unit, digits)


def format_difference(difference: Difference | None, unit: float, digits: int) -> str:
    """A mean with its sign, and its standard error, in a unit; a dash for the reference itself."""
    if difference is None:
        return "-"
    return format_around(difference["mean"], difference["error"], unit, digits, sign="+")


def format_around(mean: float, around: float | None, unit: float, digits: int, sign: str = "") -> str:
    """A mean and what it varies by, in a unit; None where there is only one run."""
    shown = f"{round(mean / unit, digits) + 0.0:{sign}.{digits}f}"  # -0.0 + 0.0 is 0.0
    return shown if around is None else f"{shown} ± {around / unit:.{digits}f}"


SCORES: dict[str, Callable[[Score], str]] = {
    "model": lambda score: score["label"],
    "parameters": lambda score: f"{score['parameters']:,}",
    "GMACs, layers": lambda score: f"{score['published_gmacs']:.4f}",
    "GMACs, whole": lambda score: f"{score['gmacs']:.4f}",
    "epochs": lambda score: f"{score['epochs']}",
    "top-1 (%)": lambda score: format_spread(score["top1"], PERCENT, 2),
    "difference": lambda score: format_difference(score.get("top1_difference"), PERCENT, 2),
    "loss": lambda score: format_spread(score["val_loss"], 1, 4),
    "loss, difference": lambda score: format_difference(score.get("val_loss_difference"), 1, 4),
    "each seed's top-1 (%)": lambda score: " ".join(f"{100 * top1:.2f}" for top1 in score["top1"]["seeds"]),
}
SPEEDS = {
    "inference, images/s": "inference_images_per_second",
    "MiB at peak": "inference_mib",
    "training, images/s": "training_images_per_second",
    "MiB at peak, training": "training_mib",
}


def make_tables(results: Results) -> list[Table]:
    """Scores, speeds and growth; those not measured are left out."""
    tables = [[list(SCORES), *([cell(score) for cell in SCORES.values()] for score in results.scores)]]
    if results.speed:
        labels = [score["label"] for score in results.scores]
        lines = ([label, *(f"{results.speed[label][key]:,.0f}" for key in SPEEDS.values())] for label in labels)
        tables.append([["model", *SPEEDS], *lines])
    if results.growth:
        tables.append(make_growth_table(results))
    return tables


def make_growth_table(results: Results) -> Table:
    """A line for each candidate, a column for each side: milliseconds and MiB of one image."""
    sides = results.sides
    table = [["one image", *(f"{side} px" for side in sides)]]
    for score in results.scores:
        at = {each["image_size"]: each for each in results.growth if each["label"] == score["label"]}
        table.append([score["label"], *(format_growth(at[side]) for side in sides)])
    return table


def format_growth(growth: Growth) -> str:
    """Time and memory at one side."""
    return "skipped" if "skipped" in growth else f"{growth['ms']:,.1f} ms, {growth['mib']:,.0f} MiB"


def list_cautions(results: Results) -> list[str]:
    """A line where the differences of the table may be chance, because each is of one seed."""
    if len(results.scores) < 2 or len(results.scores[0]["top1"]["seeds"]) > 1:
        return []
    return ["One seed gives no spread: these differences may be chance. Compare with --seeds 3 or more."]


def list_skipped(results: Results) -> list[str]:
    """A line for each measurement that was left out, and why."""
    rows = [row for row in results.growth if "skipped" in row]
    return [f"{row['label']} at {row['image_size']} px skipped: {row['skipped']}" for row in rows]


def format_text(table: Table) -> str:
    """A table for a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in table]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def format_markdown(table: Table) -> str:
    """A table for a README."""
    rule = ["---", *["---:"] * (len(table[0]) - 1)]
    names = [[f"`{line[0]}`", *line[1:]] for line in table[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in [table[0], rule, *names])


# --------------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------------


def draw_comparison(results: Results, path: Path) -> None:
    """Draws scores and throughput, a line for each candidate, and below them the growth, where it was measured."""
    heights = [1.3 + ROW_HEIGHT * len(results.scores), GROWTH_HEIGHT if results.growth else 0]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(2 if results.growth else 1, 2, height_ratios=[height for height in heights if height])
    scores = figure.add_subplot(grid[0, 0])
    draw_scores(scores, results.scores)
    draw_throughput(figure.add_subplot(grid[0, 1], sharey=scores), results)
    if results.growth:
        time, memory = (figure.add_subplot(grid[1, column]) for column in (0, 1))
        draw_growth(time, results, "ms", "milliseconds for one image")
        draw_growth(memory, results, "mib", "MiB at the peak, for one image")
        columns = min(len(results.scores), LEGEND_COLUMNS)
        figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    if results.timing:
        figure.suptitle(describe_conditions(results), fontsize=9.5, color=SOFT_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def describe_conditions(results: Results) -> str:
    """What was trained on, and what times and memory are of: a line for the picture."""
    recipe, timing = results.settings.get("recipe", {}), results.timing
    trained = [f"trained on {recipe['dataset'] or recipe['data']}"] if recipe else []
    dtype = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[timing["precision"]]
    speed = f"images per second in batches of {timing['batch_size']} at {timing['image_size']} px"
    return "; ".join([*trained, speed, f"times in {dtype} on {describe_machine_briefly(results.machine)}"])


def choose_style(index: int) -> tuple[str, str]:
    """The colour and marker of a candidate; they begin again after the last."""
    return SERIES[index % len(SERIES)]


def draw_scores(axes: Axes, scores: list[Score]) -> None:
    """Every seed's top-1 as a hollow mark, their mean as a full one with the deviation as a bar."""
    for index, score in enumerate(scores):
        top1, (color, marker) = score["top1"], choose_style(index)
        seeds = [100 * each for each in top1["seeds"]]
        places = [index + 0.1 + 0.3 * (seed + 1) / (len(seeds) + 1) for seed in range(len(seeds))]  # equal ones too
        axes.plot(
            seeds, places, linestyle="", color=color, marker=marker, markersize=5, markerfacecolor="none", alpha=0.8
        )
        deviation = None if top1["deviation"] is None else 100 * top1["deviation"]
        mean = 100 * top1["mean"]
        axes.errorbar(mean, index - 0.12, xerr=deviation, capsize=4, color=color, marker=marker, markersize=7)
    names = [f"{each['label']}\n{each['parameters'] / 1e6:,.2f} M, {each['gmacs']:,.3g} GMACs" for each in scores]
    axes.set_yticks(range(len(scores)), names, fontsize=9)
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    num_seeds = len(scores[0]["top1"]["seeds"])
    spread = f"mean and standard deviation of {num_seeds} seeds" if num_seeds > 1 else "one seed, so no spread is known"
    finish_axes(axes, f"top-1 (%): {spread}")


def draw_throughput(axes: Axes, results: Results) -> None:
    """Images per second in inference and in training, as bars."""
    for index, score in enumerate(results.scores):
        color, _ = choose_style(index)
        for place, phase, alpha in ((-0.19, "inference", 1.0), (0.19, "training", 0.45)):
            speed = results.speed.get(score["label"], {}).get(f"{phase}_images_per_second", 0)
            axes.barh(index + place, speed, height=0.34, color=color, alpha=alpha)
            axes.annotate(f" {speed:,.0f}", (speed, index + place), va="center", fontsize=8)
    axes.tick_params(labelleft=False)
    axes.margins(x=0.14)
    finish_axes(axes, "images per second: inference full, training pale")


def draw_growth(axes: Axes, results: Results, figure: Literal["ms", "mib"], title: str) -> None:
    """A figure against the side of the images, both logarithmic."""
    for index, score in enumerate(results.scores):
        own = [each for each in results.growth if each["label"] == score["label"] and figure in each]
        points = sorted((each["image_size"], each[figure]) for each in own)
        color, marker = choose_style(index)
        sides, values = [side for side, _ in points], [value for _, value in points]
        size = 7.5 - 2.5 * index / max(len(results.scores) - 1, 1)  # so that equal curves show below each other
        axes.plot(sides, values, label=score["label"], color=color, marker=marker, markersize=size)
    axes.set(xscale="log", yscale="log", xlabel="side of the image (px)")
    label_sides(axes, results.sides)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    finish_axes(axes, title)


def finish_axes(axes: Axes, title: str) -> None:
    """Adds title and grid, and takes two sides of the frame away."""
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
