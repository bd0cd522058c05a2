"""Lays the curves of several runs over each other: python tools/plot_runs.py RUN ... --output runs.png."""

import itertools
import json
import math
import signal
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below shows no traceback

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from s3a.support.command_line import run_command
from s3a.support.palette import SERIES, SOFT_INK
from s3a.training.run_folder import METRICS_NAME

LOG_NAME = "log.txt"
PANELS = {
    "train_loss": "training loss",
    "val_loss": "validation loss",
    "top1": "top-1 (%)",
    "learning_rate": "learning rate",
}
# Why the loss in validation is often below that in training.
NOTES = {"train_loss": "augmented images, smoothed labels", "val_loss": "plain images and labels"}
ACCURACIES = ("top1", "ema_top1")
FIGURE_WIDTH, PANELS_HEIGHT, ROW_HEIGHT, DPI = 11.0, 6.8, 0.22, 150  # inches; a row is one of the legend
LONGEST_NAME = 48  # characters in the legend


@dataclass(frozen=True, kw_only=True)
class Options:
    """Lays the curves of several runs over each other, and prints what each of them reached."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")]
    """Run folders, metrics.jsonl files, or logs in the format of DeiT's trainer, which SSViT's authors publish."""
    output: Path
    """The PNG to write."""
    labels: tuple[str, ...] = ()
    """A name for each run; none for those of their folders."""
    from_epoch: int = 1
    """The first epoch to draw; a late one shows the ends of long runs."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a kind of log writes the quantities that are drawn.

    Attributes:
        keys: the names that each quantity has.
        first_epoch: the number of a run's first epoch.
        whole: how an accuracy of 100 % is written.
    """

    keys: dict[str, tuple[str, ...]]
    first_epoch: int
    whole: float


OURS = Format(
    keys={
        "train_loss": ("train_loss",),
        "val_loss": ("val_loss",),
        "top1": ("val_top1",),
        "ema_top1": ("ema_top1",),
        "learning_rate": ("learning_rate",),
        "images_per_second": ("images_per_second",),
    },
    first_epoch=1,
    whole=1.0,
)
DEIT = Format(
    keys={
        "train_loss": ("train_loss",),
        "val_loss": ("test_loss",),
        "top1": ("test_acc1",),
        "ema_top1": ("test_ema_acc1", "test_acc1_ema", "ema_test_acc1", "ema_acc1"),  # each trainer has its own
        "learning_rate": ("train_lr",),
    },
    first_epoch=0,
    whole=100.0,
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The curves of a training run.

    Attributes:
        label: its name.
        epochs: the quantities after each epoch, in order and counted from 1; accuracies in percent.
    """

    label: str
    epochs: dict[int, dict[str, float]]

    def find_curve(self, quantity: str) -> dict[int, float]:
        """A quantity after each epoch that logged it."""
        return {epoch: values[quantity] for epoch, values in self.epochs.items() if quantity in values}

    def find_best(self, quantity: str) -> tuple[int, float] | None:
        """The first epoch with the highest value, and that value; None where no epoch logged it."""
        return max(self.find_curve(quantity).items(), key=lambda point: point[1], default=None)


def main(options: Options) -> None:
    """Reads, draws, writes, and prints the table."""
    if options.output.suffix != ".png":
        raise ValueError(f"--output is {str(options.output)!r}: its name must end in .png")
    runs = read_runs(options)
    figure = draw_runs(runs, options.from_epoch)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=DPI)
    print(format_table(runs))
    for line in list_gaps(runs):
        print(line)
    print(f"wrote {options.output}")


# --------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------


def read_runs(options: Options) -> list[Run]:
    """The runs with their names; ValueError for more than one picture can show."""
    paths, labels = options.runs, options.labels or name_runs(options.runs)
    if not 1 <= len(paths) <= len(SERIES):
        raise ValueError(f"{len(paths)} runs given: a picture shows 1 to {len(SERIES)} of them")
    if len(labels) != len(paths):
        raise ValueError(f"{len(labels)} --labels for {len(paths)} runs: give one for each, in the order of the runs")
    return [Run(label=label, epochs=read_epochs(find_log(path))) for label, path in zip(labels, paths, strict=True)]


def name_runs(paths: tuple[Path, ...]) -> list[str]:
    """A name for each run: its folder's or its log's own; the whole path where two are alike."""
    short = []
    for path in map(Path.resolve, paths):
        anonymous = path.is_file() and path.name in (METRICS_NAME, LOG_NAME)
        short.append(path.parent.name if anonymous else path.stem if path.is_file() else path.name)
    return [str(path) if short.count(name) > 1 else name for name, path in zip(short, paths, strict=True)]


def find_log(path: Path) -> Path:
    """The file that holds a run's epochs; FileNotFoundError where there is none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"run {path} does not exist: give a run folder, its {METRICS_NAME}, or a log")
    for name in (METRICS_NAME, LOG_NAME):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path} holds no {METRICS_NAME} and no {LOG_NAME}: give the folder of a run")


def read_epochs(path: Path) -> dict[int, dict[str, float]]:
    """Reads the epochs of a metrics file or a log, as `Run` has them.

    Of an epoch that was logged twice, as trainers do after a resume, the last line counts.

    Raises:
        ValueError: for a line that is broken, with the file and its number; for a file without epochs.
    """
    epochs = {}
    for where, entry in read_entries(path):
        log_format = next((each for each in (OURS, DEIT) if entry.get(each.keys["top1"][0]) is not None), None)
        if log_format is not None:
            epoch, values = read_entry(where, entry, log_format)
            epochs[epoch] = values
        elif path.suffix == ".jsonl":
            raise ValueError(f"{where} has no val_top1: every line of {path.name} must hold an epoch's metrics")
    if not epochs:
        raise ValueError(f"{path} holds no epoch: give a run that has finished one, or a log with a JSON line for each")
    return dict(sorted(epochs.items()))


def read_entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, each with its place. Other text is left out, but not of a .jsonl file."""
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        text, where = line.strip(), f"{path}, line {number}"
        if not text or (path.suffix != ".jsonl" and not text.startswith('{"')):
            continue
        try:
            entry = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error.msg}): mend or delete that line") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is no JSON object: mend or delete that line")
        yield where, entry


def read_entry(where: str, entry: dict[str, Any], log_format: Format) -> tuple[int, dict[str, float]]:
    """The epoch that a line is about, counted from 1, and its quantities."""
    epoch = entry.get("epoch")
    if type(epoch) is not int or epoch < log_format.first_epoch:
        raise ValueError(f"{where} has epoch {epoch!r}: it must be an integer from {log_format.first_epoch} on")
    values = {}
    for quantity, keys in log_format.keys.items():
        key = next((key for key in keys if entry.get(key) is not None), None)
        if key is not None:
            whole = log_format.whole if quantity in ACCURACIES else None
            values[quantity] = read_number(f"{where} has {key} {entry[key]!r}", entry[key], whole)
    return epoch + 1 - log_format.first_epoch, values


def read_number(what: str, value: Any, whole: float | None) -> float:
    """A number of a line; one with a `whole` is an accuracy, and comes in percent."""
    if type(value) not in (int, float):
        raise ValueError(f"{what}: it must be a number")
    if whole is None:
        return float(value)
    if not 0 <= value <= whole * (1 + 1e-6):  # means of float32 accuracies are a little off
        raise ValueError(f"{what}: it must be from 0 to {whole:g}")
    return 100 * value / whole


# --------------------------------------------------------------------------------------------------------
# The picture and the table
# --------------------------------------------------------------------------------------------------------


def draw_runs(runs: list[Run], from_epoch: int = 1) -> Figure:
    """A panel for each quantity, and one legend for all of them below.

    Raises:
        ValueError: where no run is as long as `from_epoch`.
    """
    last = max(max(run.epochs) for run in runs)
    if not 1 <= from_epoch <= last:
        raise ValueError(f"--from-epoch is {from_epoch}: it must be from 1 to {last}, the last epoch of these runs")
    figure = Figure(figsize=(FIGURE_WIDTH, PANELS_HEIGHT), layout="constrained")
    panels = dict(zip(PANELS, figure.subplots(2, 2, sharex=True).flat, strict=True))
    for run, (color, marker) in zip(runs, SERIES, strict=False):
        for quantity, axes in panels.items():
            draw_curve(axes, run.find_curve(quantity), from_epoch, color=color)
        draw_curve(panels["top1"], run.find_curve("ema_top1"), from_epoch, color=color, linestyle="--")
        mark_best(panels["top1"], run.find_best("top1"), from_epoch, color=color, marker=marker)
        mark_best(
            panels["top1"], run.find_best("ema_top1"), from_epoch, color=color, marker=marker, markerfacecolor="white"
        )
    finish_panels(panels, with_ema=any(run.find_curve("ema_top1") for run in runs))
    margin = max(0.5, 0.02 * (last - from_epoch))
    panels["top1"].set_xlim(from_epoch - margin, last + margin)
    add_legend(figure, [describe_best(run) for run in runs])
    return figure


def draw_curve(axes: Axes, curve: dict[int, float], from_epoch: int, **style: Any) -> None:
    """A curve from an epoch on; a single point is a dot, since it has no line."""
    points = [(epoch, value) for epoch, value in curve.items() if epoch >= from_epoch]
    if points:
        axes.plot(*zip(*points, strict=True), linewidth=1.4, marker="." if len(points) == 1 else "", **style)


def mark_best(axes: Axes, point: tuple[int, float] | None, from_epoch: int, **style: Any) -> None:
    """Marks the best epoch, where there is one and it is drawn."""
    if point is not None and point[0] >= from_epoch:
        axes.plot(*point, linestyle="", markersize=7, zorder=3, **style)


def finish_panels(panels: dict[str, Axes], with_ema: bool) -> None:
    """Adds titles and grids, and whole epochs on the horizontal axes."""
    for quantity, axes in panels.items():
        how = ": EMA dashed, best epochs marked" if with_ema else ": best epochs marked"
        axes.set_title(PANELS[quantity] + (how if quantity == "top1" else ""), fontsize=11)
        axes.set_ylabel(NOTES.get(quantity, ""), fontsize=9, color=SOFT_INK)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels["learning_rate"].ticklabel_format(axis="y", scilimits=(-2, 2))
    for quantity in ("top1", "learning_rate"):
        panels[quantity].set_xlabel("epoch")


def describe_best(run: Run) -> str:
    """A run's name and the best it reached."""
    half = LONGEST_NAME // 2
    name = run.label if len(run.label) <= LONGEST_NAME else f"{run.label[:half]}…{run.label[-half:]}"
    best = [(kind, run.find_best(quantity)) for kind, quantity in (("", "top1"), ("EMA ", "ema_top1"))]
    shown = [f"{kind}{point[1]:.2f} % at epoch {point[0]}" for kind, point in best if point is not None]
    return f"{name}: {', '.join(shown)}"


def add_legend(figure: Figure, texts: list[str]) -> None:
    """Adds a line for each run below the panels, in two columns where they fit; the figure grows by its height."""
    handles = [Line2D([], [], color=color, marker=marker) for color, marker in SERIES[: len(texts)]]
    for columns in (2, 1):
        legend = figure.legend(
            handles,
            list(map(str, range(len(texts)))),
            ncols=columns,
            loc="outside lower center",
            frameon=False,
            title="best top-1",
            fontsize=10,
        )
        for written, text in zip(legend.get_texts(), texts, strict=True):
            written.set(text=text, parse_math=False)  # a name may hold $, or begin with the _ that hides a label
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(PANELS_HEIGHT + ROW_HEIGHT * math.ceil(len(texts) / columns))


def format_table(runs: list[Run]) -> str:
    """A table of what each run reached."""
    longest = max(len(label) for label in ["run", *(run.label for run in runs)])
    heads = ("epochs", "best top-1", "at epoch", "last top-1", "best EMA", "at epoch", "images/s")
    lines = [f"{'run':{longest}}  {'  '.join(heads)}"]
    for run in runs:
        top1, speeds = run.find_curve("top1"), run.find_curve("images_per_second").values()
        cells = [f"{len(run.epochs)}", *format_best(run, "top1"), f"{list(top1.values())[-1]:.2f} %"]
        cells += [*format_best(run, "ema_top1"), f"{statistics.median(speeds):,.0f}" if speeds else "-"]
        padded = [f"{cell:>{len(head)}}" for cell, head in zip(cells, heads, strict=True)]
        lines.append(f"{run.label:{longest}}  {'  '.join(padded)}")
    return "\n".join(lines)


def format_best(run: Run, quantity: str) -> tuple[str, str]:
    """The highest value and its epoch."""
    point = run.find_best(quantity)
    return ("-", "-") if point is None else (f"{point[1]:.2f} %", str(point[0]))


def list_gaps(runs: list[Run]) -> list[str]:
    """A line for each curve with values that are not finite, which the picture cannot show."""
    lines = []
    for run, quantity in itertools.product(runs, PANELS):
        epochs = [epoch for epoch, value in run.find_curve(quantity).items() if not math.isfinite(value)]
        if epochs:
            lines.append(f"{run.label}: {PANELS[quantity]} not finite in {len(epochs)} epochs, first in {epochs[0]}")
    return lines


if __name__ == "__main__":
    run_command(Options, main)
