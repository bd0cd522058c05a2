"""Curves of several runs in one picture: what is read, drawn, printed and refused."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.command_line import TOOLS, Command, check_refused
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from s3a.support.palette import SERIES
from s3a.training.run_folder import EpochMetrics, write_metrics

plot_runs = SimpleNamespace(**runpy.run_path(str(TOOLS / "plot_runs.py")))


def loss(epoch: int, divisor: float) -> float:
    return 1 + 6 / (epoch + divisor)


def our_run(folder: Path, top1: list[float], ema_top1: list[float] | None = None) -> Path:
    """A run's folder as training leaves it; top-1 in percent, as everywhere in these tests."""
    history = []
    for epoch, value in enumerate(top1, start=1):
        line = {"epoch": epoch, "train_loss": loss(epoch, 1), "val_loss": loss(epoch, 2), "val_top1": value / 100}
        line |= {"val_top5": 1.0, "learning_rate": 1e-3 / epoch, "images_per_second": 1000.0 + epoch}
        line |= {"loader_wait": 0.1} | ({"ema_top1": ema_top1[epoch - 1] / 100} if ema_top1 else {})
        history.append(EpochMetrics.from_line(line))
    folder.mkdir(parents=True)
    write_metrics(folder, history)
    return folder


def deit_lines(top1: list[float], ema_top1: list[float] | None = None, ema_key: str = "test_ema_acc1") -> list[str]:
    """The same as DeiT's trainer logs it."""
    lines = []
    for epoch, value in enumerate(top1):
        entry = {"epoch": epoch, "n_parameters": 15095688, "train_lr": 1e-3 / (epoch + 1)}
        entry |= {"train_loss": loss(epoch + 1, 1), "test_loss": loss(epoch + 1, 2), "test_acc1": value}
        entry |= {"test_acc5": 100.0} | ({ema_key: ema_top1[epoch]} if ema_top1 else {})
        lines.append(json.dumps(entry))
    return lines


def write_lines(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def read(*paths: Path, labels: tuple[str, ...] = ()) -> list:
    return plot_runs.read_runs(plot_runs.Options(runs=paths, output=Path("runs.png"), labels=labels))


def panel(figure: Figure, title: str) -> Axes:
    (axes,) = [axes for axes in figure.axes if axes.get_title().startswith(title)]
    return axes


def curves(axes: Axes, linestyle: str = "-") -> list[Line2D]:
    return [line for line in axes.lines if line.get_linestyle() == linestyle]


def marks(axes: Axes) -> list[tuple[int, float, bool]]:
    """Epoch and value of each marked point, and whether it is filled."""
    lines = curves(axes, "None")
    return [(*line.get_xdata(), *line.get_ydata(), line.get_markerfacecolor() == line.get_color()) for line in lines]


# --------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------


def test_both_formats_say_the_same(tmp_path):
    top1, ema_top1 = [10.0, 62.5, 50.0], [0.5, 40.0, 75.0]
    ours = our_run(tmp_path / "ours", top1, ema_top1)
    theirs = write_lines(tmp_path / "theirs.txt", deit_lines(top1, ema_top1))
    first, second = read(ours, theirs)
    for run in (first, second):
        assert list(run.find_curve("top1").items()) == [(1, 10.0), (2, 62.5), (3, 50.0)]
        assert list(run.find_curve("ema_top1").items()) == [(1, 0.5), (2, 40.0), (3, 75.0)]
        assert list(run.find_curve("train_loss").values()) == [4, 3, 2.5]
        assert list(run.find_curve("val_loss").values()) == [3, 2.5, 2.2]
        assert list(run.find_curve("learning_rate").values()) == [1e-3, 5e-4, 1e-3 / 3]
    assert list(first.find_curve("images_per_second").values()) == [1001, 1002, 1003]
    assert second.find_curve("images_per_second") == {}


@pytest.mark.parametrize("key", ["test_ema_acc1", "ema_acc1", "test_acc1_ema", "ema_test_acc1"])
def test_ema_goes_by_many_names(tmp_path, key):
    (run,) = read(write_lines(tmp_path / "log.txt", deit_lines([1.0, 2.0], [3.0, 4.0], key)))
    assert run.find_curve("ema_top1") == {1: 3.0, 2: 4.0}


def test_a_log_may_hold_other_text(tmp_path):
    first, second = deit_lines([10.0, 20.0])
    noise = [
        "Not using distributed mode",
        "* Acc@1 83.036 Acc@5 96.4 loss 0.7",
        "{'lr': 0.1}",
        '{"lr": 0.1}',
        "",
        "{",
        "}",
    ]
    path = write_lines(tmp_path / "log.txt", [*noise, first, *noise, f"  {second}", *noise])
    (run,) = read(path)
    assert run.find_curve("top1") == {1: 10.0, 2: 20.0}


def test_what_was_logged_again_after_a_resume_counts(tmp_path):
    before, again = deit_lines([10.0, 20.0, 30.0]), deit_lines([0.0, 25.0, 35.0, 45.0])
    (run,) = read(write_lines(tmp_path / "log.txt", [before[0], before[2], *again[1:]]))
    assert list(run.find_curve("top1").items()) == [(1, 10.0), (2, 25.0), (3, 35.0), (4, 45.0)]


def test_epochs_without_a_validation_loss_are_left_out_of_its_curve(tmp_path):
    entries = [json.loads(line) for line in deit_lines([10.0, 20.0, 30.0])]
    del entries[1]["test_loss"]
    entries[2]["test_loss"] = None
    (run,) = read(write_lines(tmp_path / "log.txt", list(map(json.dumps, entries))))
    assert list(run.find_curve("val_loss")) == [1]
    assert list(run.find_curve("top1")) == [1, 2, 3]


def test_means_of_float32_may_exceed_the_whole(tmp_path):
    """As the authors' logs have them: 0.10000000230789184 % of 50,000 images."""
    (run,) = read(write_lines(tmp_path / "log.txt", deit_lines([100.00000230789184])))
    assert run.find_curve("top1")[1] == pytest.approx(100)


def test_runs_are_named_by_their_folders(tmp_path, monkeypatch):
    lines = deit_lines([1.0])
    our_run(tmp_path / "runs" / "tiny.v2", [1.0])
    write_lines(tmp_path / "deit_small" / "log.txt", lines)
    write_lines(tmp_path / "SSViT-T.txt", lines)
    monkeypatch.chdir(tmp_path / "runs" / "tiny.v2")
    paths = [Path(), Path("metrics.jsonl"), tmp_path / "deit_small", tmp_path / "deit_small" / "log.txt"]
    assert [run.label for path in [*paths, tmp_path / "SSViT-T.txt"] for run in read(path)] == [
        *("tiny.v2", "tiny.v2", "deit_small", "deit_small", "SSViT-T")
    ]


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    for folder in ("a/digits", "b/digits", "other"):
        our_run(tmp_path / folder, [1.0])
    monkeypatch.chdir(tmp_path)
    paths = (Path("a/digits"), Path("other"), Path("b/digits"))
    assert [run.label for run in read(*paths)] == ["a/digits", "other", "b/digits"]
    assert [run.label for run in read(*paths, labels=("x", "y", "x"))] == ["x", "y", "x"]


# --------------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------------


def test_panels_show_the_curves(tmp_path):
    long = our_run(tmp_path / "long", [10.0, 50.0, 40.0, 50.0], [5.0, 20.0, 60.0, 30.0])
    short = write_lines(tmp_path / "short.txt", deit_lines([20.0, 30.0]))
    figure = plot_runs.draw_runs(read(long, short))
    values = {
        "training loss": [[4, 3, 2.5, 2.2], [4, 3]],
        "validation loss": [[3, 2.5, 2.2, 2], [3, 2.5]],
        "top-1": [[10, 50, 40, 50], [20, 30]],
        "learning rate": [[1e-3, 5e-4, 1e-3 / 3, 2.5e-4], [1e-3, 5e-4]],
    }
    assert len(figure.axes) == len(values)
    for title, expected in values.items():
        plain = curves(panel(figure, title))
        assert [list(line.get_xdata()) for line in plain] == [[1, 2, 3, 4], [1, 2]]
        for line, curve in zip(plain, expected, strict=True):
            assert list(line.get_ydata()) == pytest.approx(curve)
    top1 = panel(figure, "top-1")
    (ema,) = curves(top1, "--")
    assert (list(ema.get_xdata()), list(ema.get_ydata())) == ([1, 2, 3, 4], [5, 20, 60, 30])
    assert "EMA dashed" in top1.get_title()
    assert marks(top1) == [(2, 50, True), (3, 60, False), (2, 30, True)]  # the first of equals
    first, second = curves(top1)
    assert first.get_color() == ema.get_color() != second.get_color()


def test_the_legend_names_the_best_epochs(tmp_path):
    our_run(tmp_path / "with_ema", [10.0, 50.125, 40.0], [5.0, 20.0, 60.5])
    our_run(tmp_path / "_plain$x^$", [99.5])
    figure = plot_runs.draw_runs(read(tmp_path / "with_ema", tmp_path / "_plain$x^$"))
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["with_ema: 50.12 % at epoch 2, EMA 60.50 % at epoch 3", "_plain$x^$: 99.50 % at epoch 1"]
    assert not any(axes.get_legend() for axes in figure.axes)
    drawn = [line.get_color() for line in curves(panel(figure, "learning rate"))]
    assert [handle.get_color() for handle in legend.legend_handles] == drawn
    FigureCanvasAgg(figure).draw()  # would fail on names that are taken for formulas


@pytest.mark.parametrize(
    ("name", "columns"),
    [("run {}", 2), ("{}_" + 28 * "W", 1), ("a_name_of_{}_that_goes_on_and_on_" + 6 * "with_every_option_", 1)],
)
@pytest.mark.parametrize("with_ema", [False, True])
def test_eight_runs_leave_room_for_each_other(tmp_path, name, columns, with_ema):
    for index in range(8):
        top1 = [50.0 + index + epoch for epoch in range(1 + 3 * index)]
        our_run(tmp_path / name.format(index), top1, top1 if with_ema else None)
    figure = plot_runs.draw_runs(read(*sorted(tmp_path.iterdir())))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    (legend,) = figure.legends
    texts = [text.get_window_extent(renderer) for text in legend.get_texts()]
    assert len({round(box.x0) for box in texts}) == columns
    boxes = [*(axes.get_tightbbox(renderer) for axes in figure.axes), *texts]
    for index, box in enumerate(boxes):
        assert box.x0 >= 0 <= box.y0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:index])
    assert min(axes.get_position().height for axes in figure.axes) * figure.get_figheight() > 2  # inches
    assert panel(figure, "training loss").get_ylabel() == "augmented images, smoothed labels"
    lines = curves(panel(figure, "training loss"))
    assert len({line.get_color() for line in lines}) == 8
    assert len({handle.get_marker() for handle in legend.legend_handles}) == 8


def test_a_single_epoch_is_seen(tmp_path):
    figure = plot_runs.draw_runs(read(our_run(tmp_path / "run", [10.0], [20.0])))
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        assert all(line.get_marker() not in ("", "None") for line in axes.lines)
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]
    assert marks(panel(figure, "top-1")) == [(1, 10, True), (1, 20, False)]


def test_late_epochs_alone(tmp_path):
    long = our_run(tmp_path / "long", [90.0, 50.0, 60.0, 55.0])
    short = our_run(tmp_path / "short", [10.0, 20.0])
    figure = plot_runs.draw_runs(read(long, short), from_epoch=3)
    for axes in figure.axes:
        (line,) = curves(axes)
        assert list(line.get_xdata()) == [3, 4]
        assert axes.get_xlim()[0] > 2
    assert marks(panel(figure, "top-1")) == []  # the best epochs are earlier; the legend names them all the same
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("long: 90.00 % at epoch 1", "short: 20.00 % at epoch 2")
    ]


# --------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------


def test_the_command_draws_and_says_what_each_run_reached(command: Command, tmp_path):
    ours = our_run(tmp_path / "digits", [10.0, 98.5, 97.25], [5.0, 60.0, 99.0])
    theirs = write_lines(tmp_path / "SSViT-T.txt", deit_lines([20.0, 82.63]))
    picture = tmp_path / "new" / "runs.png"
    status, out, err = command("plot_runs", ours, theirs, "--output", picture)
    assert (status, err) == (0, "")
    head, *rows, wrote = out.splitlines()
    assert " ".join(head.split()) == "run epochs best top-1 at epoch last top-1 best EMA at epoch images/s"
    assert [row.replace(" %", "").split() for row in rows] == [
        ["digits", "3", "98.50", "2", "97.25", "99.00", "3", "1,002"],
        ["SSViT-T", "2", "82.63", "2", "82.63", "-", "-", "-"],
    ]
    assert wrote == f"wrote {picture}"

    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape[1] == 1650
    assert 900 < pixels.shape[0] < 1300
    for color, _ in SERIES[:2]:
        assert (np.abs(pixels - 255 * np.array(to_rgb(color))).max(-1) < 2).sum() > 1000
    assert picture.stat().st_size < 300_000


def test_labels_replace_the_names(command: Command, tmp_path):
    run = our_run(tmp_path / "digits", [10.0])
    status, out, _ = command("plot_runs", run, run, "--output", tmp_path / "runs.png", "--labels", "seed 0", "seed 1")
    assert status == 0
    assert "seed 0" in out
    assert "seed 1" in out
    assert "digits" not in out


def test_what_is_not_finite_is_said(command: Command, tmp_path):
    entries = [json.loads(line) for line in deit_lines([1.0, 2.0, 0.1, 0.1])]
    entries[2]["test_loss"], entries[3]["test_loss"] = float("nan"), float("inf")
    path = write_lines(tmp_path / "diverged.txt", list(map(json.dumps, entries)))
    status, out, _ = command("plot_runs", path, "--output", tmp_path / "runs.png")
    assert status == 0
    assert "diverged: validation loss not finite in 2 epochs, first in 3" in out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"epoch": 2, "train_lo', ["not JSON"]),
        ("epoch 2", ["not JSON"]),
        ("[1, 2]", ["no JSON object"]),
        ('{"epoch": 2}', ["no val_top1"]),
        ('{"epoch": 2, "val_top1": null}', ["no val_top1"]),
        ('{"epoch": 2, "val_top1": 83.04}', ["val_top1 83.04", "from 0 to 1"]),
        ('{"epoch": 2, "val_top1": NaN}', ["val_top1 nan", "from 0 to 1"]),
        ('{"epoch": 2, "val_top1": 0.5, "ema_top1": -0.5}', ["ema_top1 -0.5", "from 0 to 1"]),
        ('{"epoch": 2, "val_top1": 0.5, "train_loss": "0.3"}', ["train_loss '0.3'", "a number"]),
        ('{"epoch": 0, "val_top1": 0.5}', ["epoch 0", "from 1 on"]),
        ('{"epoch": "2", "val_top1": 0.5}', ["epoch '2'", "integer"]),
        ('{"val_top1": 0.5}', ["epoch None"]),
    ],
)
def test_a_broken_line_is_said(command: Command, tmp_path, line, words):
    metrics = our_run(tmp_path / "run", [10.0]) / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + line)
    result = command("plot_runs", tmp_path / "run", "--output", tmp_path / "runs.png")
    check_refused(result, f"{metrics}, line 2", *words)
    assert not (tmp_path / "runs.png").exists()


def test_a_torn_line_of_a_log_is_said(command: Command, tmp_path):
    first, second = deit_lines([10.0, 20.0])
    path = write_lines(tmp_path / "log.txt", ["Start training", first, second[:60]])
    check_refused(command("plot_runs", path, "--output", tmp_path / "runs.png"), f"{path}, line 3", "not JSON")
    write_lines(path, [first.replace('"test_acc1": 10.0', '"test_acc1": 100.5')])
    check_refused(
        command("plot_runs", path, "--output", tmp_path / "runs.png"), "line 1", "test_acc1 100.5", "0 to 100"
    )


@pytest.mark.parametrize("content", [b"", b"\n\n", b"Start training\n", b'{"epoch": 0}\n', bytes(range(256))])
def test_a_file_without_epochs_is_said(command: Command, tmp_path, content):
    (tmp_path / "log.txt").write_bytes(content)
    check_refused(command("plot_runs", tmp_path, "--output", tmp_path / "runs.png"), "log.txt", "holds no epoch")


def test_bytes_that_are_no_text_are_said(command: Command, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe")
    check_refused(
        command("plot_runs", tmp_path, "--output", tmp_path / "runs.png"), "metrics.jsonl, line 1", "not JSON"
    )


def test_other_things_are_refused(command: Command, tmp_path):
    run, picture = our_run(tmp_path / "run", [10.0, 20.0]), tmp_path / "runs.png"
    (tmp_path / "empty").mkdir()

    def refused(*arguments: object, words: list[str]) -> None:
        check_refused(command("plot_runs", *arguments), *words)
        assert not picture.exists()

    refused(tmp_path / "nothing", "--output", picture, words=["nothing", "does not exist"])
    refused(tmp_path / "empty", "--output", picture, words=["empty", "no metrics.jsonl"])
    refused("--output", picture, words=["0 runs", "1 to 8"])
    refused(*[run] * 9, "--output", picture, words=["9 runs", "1 to 8"])
    refused(run, run, "--output", picture, "--labels", "one", words=["1 --labels", "2 runs"])
    refused(run, "--output", tmp_path / "runs.jpg", words=["runs.jpg", ".png"])
    refused(run, "--output", picture, "--from-epoch", 3, words=["--from-epoch is 3", "1 to 2"])
    refused(run, "--output", picture, "--from-epoch", 0, words=["--from-epoch is 0", "1 to 2"])
    refused(run, "--output", run / "metrics.jsonl" / "runs.png", words=["metrics.jsonl"])
    refused(run, words=["--output"])
