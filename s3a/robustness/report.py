"""Top-1 under corruption for people: tables as text and as markdown, and the picture."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from s3a.comparison.report import (
    PERCENT,
    Table,
    finish_axes,
    format_difference,
    format_markdown,
    format_spread,
    format_text,
)
from s3a.comparison.results import Spread
from s3a.comparison.scores import summarise_seeds
from s3a.data.imagenet import SEVERITIES
from s3a.robustness.corruptions import COMMON, GROUPS, compute_mce
from s3a.robustness.images import CLEAN, Part
from s3a.robustness.lines import Line, make_lines, subtract_lines
from s3a.robustness.results import Results
from s3a.support.palette import SERIES, SOFT_INK

PANEL_WIDTH, PANEL_HEIGHT, LEGEND_ROW, DPI = 3.9, 3.1, 0.24, 150  # inches
PANEL_COLUMNS, LEGEND_COLUMNS = 3, 4
STYLES = ("-", "--", ":")  # of lines beyond as many as there are colours
DIGITS = 2


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is shown of a result: the corruptions that are measured at all severities for all weights.

    Attributes:
        missing: corruptions that are not, and are left out.
    """

    results: Results
    lines: list[Line]
    corruptions: list[str]
    missing: list[str]

    @property
    def groups(self) -> dict[str, list[str]]:
        """The corruptions shown, by name of what they are averaged over: all, and each group of some."""
        shown = {name: [each for each in names if each in self.corruptions] for name, names in GROUPS.items()}
        count = len(self.corruptions)
        mean = f"{count} corruptions" if count > 1 else self.corruptions[0]
        return {mean: self.corruptions, **{name: names for name, names in shown.items() if 0 < len(names) < count}}

    def list_parts(self, corruptions: Sequence[str], severities: Sequence[int] = ()) -> list[Part]:
        """The parts of corruptions at severities; none is all severities."""
        return [Part(name, severity) for name in corruptions for severity in severities or self.results.severities]


def make_report(results: Results) -> Report:
    """What can be shown of a result.

    Raises:
        ValueError: where clean images, or all corruptions, are not measured yet.
    """
    digests = results.weights.values()

    def is_measured(part: Part) -> bool:
        return all(results.get(digest, part) is not None for digest in digests)

    whole = [
        name
        for name in results.corruptions
        if all(is_measured(Part(name, severity)) for severity in results.severities)
    ]
    if not whole or not results.weights or not is_measured(CLEAN):
        raise ValueError("no corruption is measured at all severities yet: run the command without --report-only first")
    missing = [name for name in results.corruptions if name not in whole]
    return Report(results=results, lines=make_lines(list(results.weights)), corruptions=whole, missing=missing)


# --------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------


def make_tables(report: Report) -> dict[str, Table]:
    """The tables by caption: top-1 by group, differences from the first line, by severity, and by corruption."""
    severities = report.results.severities
    of_groups = {"clean": [CLEAN]} | {name: report.list_parts(names) for name, names in report.groups.items()}
    of_severities = {"clean": [CLEAN]} | {
        f"severity {each}": report.list_parts(report.corruptions, [each]) for each in severities
    }
    spread = "mean ± standard deviation over seeds, " if any(len(line.paths) > 1 for line in report.lines) else ""
    over = f"mean over severit{'ies' if len(severities) > 1 else 'y'} {' '.join(map(str, severities))}"
    tables = {f"Top-1 (%), {spread}{over}": make_table(report, of_groups)}
    if len(report.lines) > 1:
        caption = f"Top-1, difference from {report.lines[0].label} in points, mean ± standard error"
        tables[caption] = make_difference_table(report, of_groups)
    tables[f"Top-1 (%) by severity, mean over {next(iter(report.groups))}"] = make_table(report, of_severities)
    tables[f"Top-1 (%) by corruption, {over}"] = make_corruption_table(report)
    if mces := compute_line_mces(report):
        caption = "mCE (%) on ImageNet, lower is better; of images corrupted on the fly, not ImageNet-C's own files"
        tables[caption] = [["weights", "mCE"], *([label, show(mce)] for label, mce in mces.items())]
    return tables


def show(spread: Spread) -> str:
    """Percent, with the deviation where there are several seeds."""
    return format_spread(spread, PERCENT, DIGITS)


def make_table(report: Report, columns: Mapping[str, Sequence[Part]]) -> Table:
    """A line for the weights of each label, a column for each list of parts."""
    rows = [
        [line.label, *(show(line.score(report.results, parts)) for parts in columns.values())] for line in report.lines
    ]
    return [["weights", *columns], *rows]


def make_difference_table(report: Report, columns: Mapping[str, Sequence[Part]]) -> Table:
    """How far each other line lies above the first one."""
    first, *others = report.lines
    table = [["weights", *columns]]
    for line in others:
        scores = [(line.score(report.results, parts), first.score(report.results, parts)) for parts in columns.values()]
        table.append([line.label, *(format_difference(subtract_lines(*pair), PERCENT, DIGITS) for pair in scores)])
    return table


def make_corruption_table(report: Report) -> Table:
    """A line for each corruption, a column for the weights of each label."""
    rows = [
        [name, *(show(line.score(report.results, report.list_parts([name]))) for line in report.lines)]
        for name in report.corruptions
    ]
    return [["corruption", *(line.label for line in report.lines)], *rows]


def compute_line_mces(report: Report) -> dict[str, Spread]:
    """The mean corruption error of each line; none where the classes are not ImageNet's, or some parts are missing."""
    results = report.results
    complete = set(COMMON) <= set(report.corruptions) and tuple(results.severities) == SEVERITIES
    if not (results.conditions["knows_imagenet"] and complete):
        return {}

    def measure(path: str) -> float:
        top1 = results.top1[results.weights[path]]
        return compute_mce({name: [1 - top1[name][str(severity)] for severity in SEVERITIES] for name in COMMON})

    return {line.label: summarise_seeds([measure(path) for path in line.paths]) for line in report.lines}


def describe_origin(results: Results) -> str:
    """Where the corrupted images come from."""
    conditions = results.conditions
    return (
        f"corrupted on the fly by {conditions['library']} {conditions['library_version']}; "
        "not the official ImageNet-C files"
    )


def list_notes(report: Report) -> list[str]:
    """What a reader must know beside the tables, a line each."""
    results = report.results
    conditions = results.conditions
    notes = [
        f"{conditions['images']:,} validation images of {conditions['data']}, {describe_origin(results)}. "
        f"Seed {conditions['seed']}."
    ]
    if results.unreadable:
        count = len(results.unreadable)
        notes.append(f"{count} of them could not be read and {'is' if count == 1 else 'are'} left out.")
    if report.missing:
        notes.append(f"Not measured yet, and in no mean: {', '.join(report.missing)}.")
    if len(report.lines) > 1 and any(len(line.paths) == 1 for line in report.lines):
        notes.append("One seed gives no spread: differences without one may be chance. Compare several seeds.")
    return notes


def format_report(report: Report, format_table: Callable[[Table], str] = format_text) -> str:
    """Tables with their captions, and notes; by `format_text` for a terminal, by `format_markdown` for a page."""
    tables = [f"{caption}\n\n{format_table(table)}" for caption, table in make_tables(report).items()]
    command = [f"`{report.results.command}`"] if format_table is format_markdown else []
    return "\n\n".join([*command, *tables, *list_notes(report)])


# --------------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------------


def draw_report(report: Report, path: Path) -> None:
    """Draws top-1 against the severity: a panel for the mean over all corruptions, and one for each group."""
    groups = report.groups
    columns = min(len(groups), PANEL_COLUMNS)
    rows = math.ceil(len(groups) / columns)
    longest = max(len(line.label) for line in report.lines)
    in_a_row = max(1, min(LEGEND_COLUMNS, len(report.lines), round(columns * 38 / (longest + 8))))
    legend_height = LEGEND_ROW * math.ceil(len(report.lines) / in_a_row)
    size = (max(PANEL_WIDTH * columns, 6.5), PANEL_HEIGHT * rows + legend_height + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for panel, (name, corruptions) in zip(panels, groups.items(), strict=False):
        draw_panel(panel, report, name, corruptions)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    for panel in panels[::columns]:
        panel.set_ylabel("top-1 (%)")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=in_a_row, frameon=False, fontsize=9, handlelength=3)
    conditions = report.results.conditions
    is_spread = any(len(line.paths) > 1 for line in report.lines)
    spread = "; bands are the standard deviation over seeds" if is_spread else ""
    title = f"{conditions['images']:,} validation images of {conditions['data']}{spread}"
    figure.suptitle(f"{title}\n{describe_origin(report.results)}", fontsize=9.5, color=SOFT_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def draw_panel(axes: Axes, report: Report, name: str, corruptions: Sequence[str]) -> None:
    """A curve for each line, from clean images on, with a band where it has several seeds."""
    severities = [0, *report.results.severities]
    width = 1.5 if len(report.lines) <= len(SERIES) else 1.0
    for index, line in enumerate(report.lines):
        color, marker = SERIES[index % len(SERIES)]
        style = STYLES[index // len(SERIES) % len(STYLES)]
        parts = [[CLEAN], *(report.list_parts(corruptions, [severity]) for severity in severities[1:])]
        spreads = [line.score(report.results, each) for each in parts]
        means = [100 * each["mean"] for each in spreads]
        size = 6.5 - 3 * index / max(len(report.lines) - 1, 1)  # so that equal curves show below each other
        axes.plot(severities, means, label=line.label, color=color, marker=marker, markersize=size, ls=style, lw=width)
        deviations = [100 * (each["deviation"] or 0) for each in spreads]
        if any(deviations):
            below, above = (
                [mean + sign * around for mean, around in zip(means, deviations, strict=True)] for sign in (-1, 1)
            )
            axes.fill_between(severities, below, above, color=color, alpha=0.13, linewidth=0)
    axes.set_xticks(severities, ["clean", *map(str, severities[1:])])
    axes.set_xlabel("severity", fontsize=9)
    axes.tick_params(labelsize=9, labelleft=True)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    count = f" ({len(corruptions)})" if name in GROUPS else ""
    finish_axes(axes, f"{name}{count}" if name in GROUPS else f"mean over {name}" if len(corruptions) > 1 else name)
