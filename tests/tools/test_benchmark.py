"""The benchmarks' command: what it measures, writes, draws, compares and refuses. Speed itself is not tested."""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from helpers import golden
from helpers.command_line import TOOLS, Command, check_refused
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from timm.data.loader import PrefetchLoader

from s3a.analysis.cost import count_cost
from s3a.attention.backends import BACKENDS
from s3a.comparison.candidates import Candidate
from s3a.data import TrainLoader
from s3a.data.batches import Transform
from s3a.data.images import Images
from s3a.data.pixels import PixelNormalizer
from s3a.geometry import FIXED, Neighborhood, sparse_scan
from s3a.training.tasks.classification import list_operations

SWIN = "swin_tiny_patch4_window7_224"
SMALL = ("--batch-size", 1, "--num-heads", 1, "--head-dim", 16)
Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first timed call takes 1 ms, the second 2, and so on; the calls are made."""
    ticks = itertools.count(1)

    def time_call(call: Callable[[], object]) -> float:
        call()
        return float(next(ticks))

    monkeypatch.setattr("s3a.support.timing.time_call", time_call)


@pytest.fixture
def measure(command: Command, tmp_path: Path) -> Measure:
    """Runs a benchmark in three turns on the CPU and returns its JSON."""

    def run(benchmark: str, *arguments: object) -> dict[str, Any]:
        output = tmp_path / "new" / "result.json"
        options = ("--turns", 3, "--device", "cpu", "--output", output)
        status, out, err = command("benchmark", benchmark, *options, *arguments)
        assert (status, err) == (0, "")
        assert f"wrote {output}" in out.splitlines()
        result = json.loads(output.read_text())
        assert result["benchmark"] == benchmark
        assert {"turns": 3, "device": "cpu"}.items() <= result["settings"].items()
        return result

    return run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of the pictures that are saved."""
    saved, save = [], Figure.savefig

    def savefig(figure: Figure, *arguments: object, **options: object) -> None:
        saved.extend(figure.axes)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


@pytest.fixture
def count_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str], list]:
    """Makes a method note its calls in a list."""

    def watch(owner: type, name: str) -> list:
        calls, method = [], getattr(owner, name)

        def noted(*arguments: object, **options: object) -> object:
            calls.append(arguments[0])
            return method(*arguments, **options)

        monkeypatch.setattr(owner, name, noted)
        return calls

    return watch


def points(axes: Axes, label: str) -> list[tuple[float, float]]:
    """Of the line that the legend calls so."""
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def pass_names(side: int, fixed: str) -> list[str]:
    return [f"({kernel_size}, {dilation})" for kernel_size, dilation in golden.scan_table(side, side, fixed)]


def scripted(first: int, number: int) -> dict[str, float]:
    """What the clock gives a candidate in three turns of `number` candidates, the first of which started at `first`."""
    return {"median_ms": first + number, "fastest_ms": first, "slowest_ms": first + 2 * number, "turns": 3}


# --------------------------------------------------------------------------------------------------------
# The operator
# --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clock")
def test_operator_rows_are_the_passes_beside_dense_attention(measure: Measure):
    expected, first = [], 1
    for side in (9, 15):
        candidates = list(dict.fromkeys(["dense", *pass_names(side, "window"), *pass_names(side, "anchors")]))
        for index, name in enumerate(candidates):
            times = scripted(first + index, len(candidates))
            ratio = (first + len(candidates)) / times["median_ms"]
            row = {"side": side, "tokens": side**2, "candidate": name, "times_dense": pytest.approx(ratio)}
            expected.append(row | times)
        first += 3 * len(candidates)
    assert measure("operator", "--sides", 9, 15, *SMALL)["rows"] == expected


@pytest.mark.parametrize(
    "arguments", [(), ("--backward",), ("--dtype", "bfloat16"), ("--backend", "flex"), ("--backward", "--compiled")]
)
def test_figures_of_one_result_agree(measure: Measure, graphs, arguments):
    rows = measure("operator", "--sides", 15, *SMALL, *arguments)["rows"]
    (dense,) = [row for row in rows if row["candidate"] == "dense"]
    for row in rows:
        assert 0 < row["fastest_ms"] <= row["median_ms"] <= row["slowest_ms"]
        assert row["times_dense"] == pytest.approx(dense["median_ms"] / row["median_ms"])
        assert row["turns"] == 3


def test_backward_is_run_where_it_is_timed(measure: Measure, count_calls):
    calls = count_calls(torch.Tensor, "backward")
    rows = measure("operator", "--sides", 15, *SMALL)["rows"]
    assert calls == []
    measure("operator", "--sides", 15, *SMALL, "--backward")
    assert len(calls) == (2 + 3) * len(rows)  # two rounds warm up


def test_dense_attention_is_left_out_of_large_maps(measure: Measure, drawn, tmp_path):
    picture = tmp_path / "operator.png"
    rows = measure("operator", "--sides", 7, 8, *SMALL, "--most-dense-tokens", 49, "--plot", picture)["rows"]
    assert [(row["side"], row["candidate"], "times_dense" in row) for row in rows] == [
        *[(7, "dense", True), (7, "(7, 1)", True)],
        (8, "(7, 1)", False),
    ]
    (axes,) = drawn
    assert [tokens for tokens, _ in points(axes, "dense attention")] == [49]


@pytest.mark.usefixtures("clock")
def test_operator_picture_adds_the_passes_of_a_scan(measure: Measure, drawn, tmp_path):
    picture = tmp_path / "pictures" / "operator.png"
    rows = measure("operator", "--sides", 15, 9, *SMALL, "--plot", picture)["rows"]
    times = {(row["side"], row["candidate"]): row["median_ms"] for row in rows}
    (axes,) = drawn
    assert sorted(points(axes, "dense attention")) == [(81, times[9, "dense"]), (225, times[15, "dense"])]
    for fixed in FIXED:
        sums = [(side**2, sum(times[side, name] for name in pass_names(side, fixed))) for side in (9, 15)]
        assert points(axes, f'S3A, both passes, fixed="{fixed}"') == sums
    with Image.open(picture) as image:
        assert (image.format, *image.size) == ("PNG", 1050, 630)
        assert len(image.convert("RGB").getcolors(10**6)) > 100
    assert picture.stat().st_size < 200_000


def test_the_table_is_printed_once(command: Command, tmp_path):
    options = ("--turns", 1, "--device", "cpu", "--output", tmp_path / "result.json")
    _, out, _ = command("benchmark", "operator", "--sides", 7, 9, *SMALL, *options)
    rows = [line for line in out.splitlines() if "dense" in line and "times" not in line]
    assert [line.split()[0] for line in rows] == ["7", "9"]


def read_captions(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts if "torch" in text.get_text()]


# --------------------------------------------------------------------------------------------------------
# Models, plans, compilation
# --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clock")
def test_model_rows_are_against_the_last_swin(measure: Measure, drawn, tmp_path):
    names, picture = ["ssvit_tiny", SWIN, "test_resnet"], tmp_path / "models.png"
    result = measure("model", "--models", *names, "--batch-size", 2, "--eager", "--plot", picture)
    assert result["rows"] == [
        {
            "model": name,
            "images_per_second": pytest.approx(2 / (scripted(first, 3)["median_ms"] / 1000)),
            "times_peer": pytest.approx(scripted(2, 3)["median_ms"] / scripted(first, 3)["median_ms"]),
            **scripted(first, 3),
        }
        for first, name in enumerate(names, start=1)
    ]
    (axes,) = drawn
    shown = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]
    assert shown == [(pytest.approx(500), 83.0), (pytest.approx(400), 81.3)]  # of published top-1 alone
    assert [text.get_text() for text in axes.texts[:-1]] == ["ssvit_tiny", "swin_tiny"]
    (caption,) = read_captions(axes)
    assert caption.startswith("batch 2, 224 px, float32, inference, not compiled; ")
    with Image.open(picture) as image:
        assert (image.format, *image.size) == ("PNG", 1050, 630)


@pytest.mark.parametrize("arguments", [("--eager",), ()])
def test_without_a_swin_the_last_model_is_the_peer(measure: Measure, graphs, arguments):
    small = ("--image-size", 32, "--batch-size", 3)
    rows = measure("model", "--models", "ssvit_nano", "test_resnet", *small, *arguments)["rows"]
    assert [row["model"] for row in rows] == ["ssvit_nano", "test_resnet"]
    for row in rows:
        assert row["times_peer"] == pytest.approx(rows[-1]["median_ms"] / row["median_ms"])
        assert row["images_per_second"] == pytest.approx(3000 / row["median_ms"])
    assert (graphs["compiled"] == 0) == ("--eager" in arguments)


@pytest.mark.parametrize(
    ("arguments", "weights", "logits"),
    [
        ((), torch.float32, torch.float32),
        (("--dtype", "bfloat16"), torch.bfloat16, torch.bfloat16),
        (("--dtype", "bfloat16", "--autocast"), torch.float32, torch.bfloat16),
    ],
)
def test_models_run_in_the_dtype_that_is_asked_for(measure: Measure, monkeypatch, arguments, weights, logits):
    seen, create_model = set(), timm.create_model

    def watched(name: str) -> torch.nn.Module:
        model = create_model(name)
        model.register_forward_hook(lambda model, _, output: seen.add((model.head.weight.dtype, output.dtype)))
        return model

    monkeypatch.setattr(timm, "create_model", watched)
    measure("model", "--models", "ssvit_nano", "--image-size", 32, "--eager", *arguments)
    assert seen == {(weights, logits)}


def test_training_takes_steps(measure: Measure, count_calls):
    steps = count_calls(torch.optim.AdamW, "step")
    measure("model", "--models", "ssvit_nano", "--image-size", 32, "--eager", "--training")
    assert len(steps) == 3 + 3  # three rounds warm up


@pytest.mark.usefixtures("clock")
def test_plan_rows_are_the_backends(measure: Measure):
    rows = measure("plan", "--sides", 7, 15)["rows"]
    labels = [
        {"side": side, "tokens": side**2, "backend": backend} for side in (7, 15) for backend in ("tiled", "flex")
    ]
    assert rows == [label | scripted(1 + 3 * index, 1) for index, label in enumerate(labels)]


def test_plans_are_built_anew_in_every_turn(measure: Measure, monkeypatch):
    built = []

    def noted(layout: Callable[..., object], neighborhood: Neighborhood, *arguments: object) -> object:
        built.append(neighborhood)
        return layout(neighborhood, *arguments)

    for name, backend in BACKENDS.items():
        noting = dataclasses.replace(backend, layout=partial(noted, backend.layout))
        monkeypatch.setitem(BACKENDS, name, noting)
    measure("plan", "--sides", 15)
    passes = [neighborhood for fixed in FIXED for neighborhood in sparse_scan(15, 15, 7, fixed)]
    assert built == 2 * (1 + 3) * passes  # backends; a warm-up and three turns


def test_compilation_rows_are_first_forwards_in_turns(measure: Measure, monkeypatch):
    caches, models, seconds = [], [], iter([3.0, 30.0, 1.0, 20.0, 2.0, 10.0])

    def first_forward(command: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        models.append(command[3])
        caches.append(env["TORCHINDUCTOR_CACHE_DIR"])
        assert not list(Path(caches[-1]).iterdir())
        return SimpleNamespace(stdout="a warning\n" + json.dumps({"seconds": next(seconds), "graphs": 4}))

    monkeypatch.setattr("subprocess.run", first_forward)
    rows = measure("compile", "--models", "ssvit_nano", "ssvit_tiny")["rows"]
    assert models == 3 * ["ssvit_nano", "ssvit_tiny"]
    assert len(set(caches)) == 6
    nano = {"model": "ssvit_nano", "median_s": 2.0, "fastest_s": 1.0, "slowest_s": 3.0, "times_first": 1.0}
    tiny = {"model": "ssvit_tiny", "median_s": 20.0, "fastest_s": 10.0, "slowest_s": 30.0, "times_first": 10.0}
    assert rows == [row | {"graphs": 4, "turns": 3} for row in (nano, tiny)]


@pytest.mark.slow
def test_compilation_is_timed_in_a_fresh_process(command: Command, tmp_path):
    options = ("--models", "ssvit_nano", "--image-size", 32, "--batch-size", 1, "--turns", 1, "--device", "cpu")
    before = time.monotonic()
    status, _, _ = command("benchmark", "compile", *options, "--output", tmp_path / "result.json")
    assert status == 0
    (row,) = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert 0 < row["median_s"] < time.monotonic() - before
    assert row["graphs"] > 0


# --------------------------------------------------------------------------------------------------------
# Loaders
# --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clock")
def test_loader_rows_are_epochs_beside_timms(measure: Measure):
    """Of whole batches."""
    rows = measure("loader", "--num-images", 5, "--batch-size", 2, "--num-workers", 0, 2)["rows"]
    expected = []
    for workers, first in ((0, 1), (2, 13)):
        for turn, (product, loader) in enumerate(itertools.product(("pixels", "input"), ("s3a", "timm")), start=first):
            times = scripted(turn, 4)
            speed = 4 / (times["median_ms"] / 1000)
            timm_ms = scripted(turn + (loader == "s3a"), 4)["median_ms"]
            row = {"workers": workers, "product": product, "loader": loader, "images_per_second": pytest.approx(speed)}
            ratios = {"per_worker": speed / max(workers, 1), "times_timm": timm_ms / times["median_ms"]}
            expected.append(row | times | {name: pytest.approx(ratio) for name, ratio in ratios.items()})
    assert rows == expected


def test_loaders_augment_the_same_photographs_alike(measure: Measure, monkeypatch):
    made, threads, create_loader = [], [], timm.data.create_loader
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    class Noted(TrainLoader):
        def __init__(self, images: Images, transform: Transform, **options: object) -> None:
            super().__init__(images, transform, **options)
            made.append((transform, options["erasing"]))

    def noted(
        dataset: timm.data.ImageDataset, *arguments: object, **options: object
    ) -> timm.data.loader.PrefetchLoader:
        assert threads == [1]
        paths = sorted(Path(path) for path in dataset.filenames(absolute=True))
        assert len({path.read_bytes() for path in paths}) == len(paths) == 4
        assert all(60_000 < path.stat().st_size < 140_000 for path in paths)
        with Image.open(paths[0]) as image:
            assert (image.format, *image.size) == ("JPEG", 500, 375)
        loader = create_loader(dataset, *arguments, **options)
        made.append((loader.dataset.transform, loader.random_erasing))
        return loader

    monkeypatch.setattr("s3a.data.TrainLoader", Noted)
    monkeypatch.setattr("timm.data.create_loader", noted)
    measure("loader", "--num-images", 4, "--batch-size", 2, "--num-workers", 0)
    (ours, erasing), (timms, timms_erasing) = made
    assert repr(ours) == repr(timms)
    assert {operation.aug_fn for operation in list_operations(timms)} == {
        operation.aug_fn for operation in list_operations(ours)
    }
    assert vars(erasing) == vars(timms_erasing) | {"device": erasing.device}
    assert threads == [1, torch.get_num_threads()]


def test_input_is_what_devices_make_of_pixels(measure: Measure, count_calls):
    """Of the pixels alone nothing is normalised, by neither loader."""
    ours, timms = count_calls(PixelNormalizer, "__call__"), count_calls(PrefetchLoader, "__iter__")
    measure("loader", "--num-images", 4, "--batch-size", 2, "--num-workers", 0)
    assert (len(ours), len(timms)) == (4 * 2, 4)  # batches and epochs of three turns; one round warms up


# --------------------------------------------------------------------------------------------------------
# Growth
# --------------------------------------------------------------------------------------------------------

COUNTS = ("first_stage_pairs_per_token", "pairs_per_token", "gmacs")


def make_counts(name: str, side: int, **model_args: object) -> dict[str, float]:
    """What tests/analysis/test_cost.py checks."""
    with torch.device("meta"):
        cost = count_cost(timm.create_model(name, **model_args), side, side)
    return {count: getattr(cost, count) for count in COUNTS}


@pytest.mark.usefixtures("clock")
def test_growth_rows_are_sides_and_models_beside_swin(measure: Measure, drawn, tmp_path):
    """The smallest side first; S3A with each of its sizes, where the model's own is the plain model."""
    picture = tmp_path / "growth.png"
    options = ("--sizes", 3, 5, "--image-sizes", 96, 64, "--plot", picture)
    rows = measure("growth", "--models", "ssvit_nano", "vvt_tiny", SWIN, *options)["rows"]
    expected, memory = [], [row.pop("mib") for row in rows]
    for first, side in ((1, 64), (13, 96)):
        for place, (label, name, model_args) in enumerate(
            [
                ("ssvit_nano", "ssvit_nano", {}),
                ("ssvit_nano size 5", "ssvit_nano", {"size": 5}),
                ("vvt_tiny", "vvt_tiny", {}),
                (SWIN, SWIN, {"img_size": side}),
            ]
        ):
            times = scripted(first + place, 4)
            peer = scripted(first + 3, 4)["median_ms"]
            ratio = {"times_peer": pytest.approx(peer / times["median_ms"])} if name.split("_")[1] == "tiny" else {}
            labels = {"model": label, "image_size": side}
            expected.append(labels | times | ratio | make_counts(name, side, **model_args))
    assert rows == expected
    weights = 4 * sum(parameter.numel() for parameter in timm.create_model("vvt_tiny").parameters()) / 2**20
    image = 4 * 3 * 64**2 / 2**20
    assert weights + image < memory[2] < memory[6] < 1.5 * weights
    assert len(drawn) == 4
    for axes, figure in zip(drawn, ("median_ms", None, *COUNTS[:2]), strict=True):
        if figure is not None:
            assert points(axes, "ssvit_nano size 5") == [(side, rows[row][figure]) for side, row in ((64, 1), (96, 5))]
        assert [line.get_label() for line in axes.lines] == ["ssvit_nano", "ssvit_nano size 5", "vvt_tiny", "swin_tiny"]
    with Image.open(picture) as drawing:
        assert (drawing.format, *drawing.size) == ("PNG", 1425, 1200)


def test_growth_says_what_would_not_fit_or_is_not_taken(measure: Measure, monkeypatch, drawn, tmp_path):
    """And goes on with what does."""
    monkeypatch.setattr("s3a.comparison.speed.find_free_memory", lambda device: 5.0)
    options = ("--image-sizes", 16, 64, 128, 192, "--plot", tmp_path / "growth.png")
    rows = measure("growth", "--models", "ssvit_nano", "--sizes", 3, *options)["rows"]
    assert ["median_ms" in row for row in rows] == [False, True, True, False]
    assert rows[0].keys() == rows[3].keys() == {"model", "image_size", "skipped"}
    assert "each side must be at least 32" in rows[0]["skipped"]
    assert "MiB would be needed, 5 are free" in rows[3]["skipped"]
    assert [side for side, _ in points(drawn[1], "ssvit_nano")] == [64, 128]


def write_growth(path: Path, times: dict[str, list[float]]) -> Path:
    """A result of growth at 100, 200, ... pixels; 0 ms is a side that was skipped."""
    rows = [
        {"model": label, "image_size": 100 * place, "skipped": "too large"}
        if ms == 0
        else {
            "model": label,
            "image_size": 100 * place,
            "median_ms": ms,
            **({"times_peer": 1.234} if label == "a" else {}),
            "mib": 1000.4,
            "first_stage_pairs_per_token": 130.0,
            "pairs_per_token": 86.7,
        }
        for label, own in times.items()
        for place, ms in enumerate(own, start=1)
    ]
    path.write_text(json.dumps({"benchmark": "growth", "command": "", "machine": {}, "rows": rows}))
    return path


def test_growth_is_shown_as_the_page_has_it(command: Command, tmp_path):
    path = write_growth(tmp_path / "growth.json", {"a": [12.3, 1234.5], "b": [0.6, 0]})
    status, out, err = command("benchmark", "compare", path)
    assert (status, err) == (0, "")
    assert out.endswith(
        """
| ms (times faster than Swin) | 100 px | 200 px |
| --- | ---: | ---: |
| `a` | 12 (1.23) | 1,234 (1.23) |
| `b` | 1 | skipped |

| MiB at the peak | 100 px | 200 px |
| --- | ---: | ---: |
| `a` | 1,000 | 1,000 |
| `b` | 1,000 | skipped |

| pairs per token: first stage / all | 100 px | 200 px |
| --- | ---: | ---: |
| `a` | 130 / 87 | 130 / 87 |
| `b` | 130 / 87 | skipped |
"""
    )


NANOS = ("ssvit_nano", "svit_nano", "vvt_nano", "vvt_tiny")


def test_a_crossing_is_where_all_larger_images_cost_more(command: Command, monkeypatch, tmp_path):
    """By costs that one can see through: those of S3A follow the image and its size, those of a peer are the same."""

    def count(candidate: Candidate, side: int) -> SimpleNamespace:
        size = candidate.size or 3
        if candidate.model != "ssvit_nano":
            return SimpleNamespace(first_stage_pairs_per_token=100, pairs_per_token=128, gmacs=1000)
        wave = 200 if side == 64 else side  # above the peer's once
        return SimpleNamespace(first_stage_pairs_per_token=wave, pairs_per_token=side, gmacs=size * side)

    monkeypatch.setattr("s3a.comparison.growth.count_for_side", count)
    times = {
        "ssvit_nano": [2, 1, 1, 3, 4],
        "svit_nano": [1, 1, 2, 2, 2],
        "ssvit_nano size 5": [0, 1, 1, 1, 0],
        "vvt_tiny": [9, 9, 9, 9, 9],
    }
    timed = write_growth(tmp_path / "growth.json", times)
    output = tmp_path / "crossing.json"
    options = ("--sizes", 3, 5, "--largest", 256, "--step", 32, "--timed", timed, "--output", output)
    status, out, err = command("benchmark", "crossing", "--models", *NANOS, *options)
    assert (status, err) == (0, "")
    figures = {"first_stage_pairs_per_token": 128, "pairs_per_token": 160}
    small, large = figures | {"gmacs": None}, figures | {"gmacs": 224}
    result = json.loads(output.read_text())
    assert result["benchmark"] == "crossing"
    assert result["rows"] == [
        {"model": "ssvit_nano", "peer": "svit_nano", **small, "median_ms": 400},
        {"model": "ssvit_nano", "peer": "vvt_nano", **small},
        {"model": "ssvit_nano size 5", "peer": "svit_nano", **large, "median_ms": None},
        {"model": "ssvit_nano size 5", "peer": "vvt_nano", **large},
    ]
    assert [line for line in out.splitlines() if line.startswith("| `")] == [
        "| `ssvit_nano` | `svit_nano` | 128 px | 160 px | never | 400 px |",
        "| `ssvit_nano` | `vvt_nano` | 128 px | 160 px | never | - |",
        "| `ssvit_nano size 5` | `svit_nano` | 128 px | 160 px | 224 px | never |",
        "| `ssvit_nano size 5` | `vvt_nano` | 128 px | 160 px | 224 px | - |",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--models", "ssvit_nano", "vvt_tiny"), ["--models has no such pair", "a peer of its size"]),
        (("--models", *NANOS, "--largest", 31), ["--largest is 31", "32 pixels at least"]),
        (("--models", *NANOS, "--largest", 63, "--step", 64), ["--largest is 63 and --step 64"]),
        (("--models", *NANOS, "--step", 0), ["--step is 0", "positive"]),
        (("--models", "vvt_nano", "vvt_nano"), ["vvt_nano is given twice"]),
        (("--models", *NANOS, "--timed", "nothing.json"), ["nothing.json", "does not exist"]),
        (
            ("--models", *NANOS, "--timed", TOOLS.parent / "docs" / "benchmarks" / "plan_cpu.json"),
            ["plan_cpu.json", "no result of growth"],
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(command: Command, tmp_path, arguments, words):
    check_refused(command("benchmark", "crossing", *arguments, "--output", tmp_path / "result.json"), *words)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------------


def test_a_result_says_where_and_how_it_was_measured(measure: Measure):
    result = measure("plan", "--sides", 7)
    assert result["command"].startswith("python ")
    assert result["command"].endswith(" --sides 7")
    assert result["settings"]["sides"] == [7]
    machine = result["machine"]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["accelerator"] is None
    versions = {"torch": torch.__version__.partition("+")[0], "timm": timm.__version__}
    assert (
        versions.items() <= {name: version.partition("+")[0] for name, version in machine["packages"].items()}.items()
    )
    assert machine["processor"]
    assert machine["cores"] >= 1


def written(path: Path, median: float, **machine: object) -> Path:
    """A result as it was before, or on another machine."""
    result = {"command": f"python {path.stem}", "machine": {"processor": "A", "threads": 2, **machine}}
    path.write_text(json.dumps(result | {"rows": [{"candidate": "dense", "median_ms": median}]}))
    return path


def test_results_are_laid_beside_each_other(command: Command, tmp_path):
    first, second = written(tmp_path / "before.json", 1234.5), written(tmp_path / "after.json", 1.0)
    status, out, err = command("benchmark", "compare", first, second)
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if line]
    table = [["candidate", "median_ms"], ["dense", "1,234.50"]]
    assert lines == [["python", "before"], *table, ["python", "after"], table[0], ["dense", "1.00"]]


def test_a_result_is_drawn_again(command: Command, drawn, tmp_path):
    """From the file alone; the picture says what was measured and where."""
    docs = TOOLS.parent / "docs" / "benchmarks"
    for name, words in (
        ("operator_sides_cpu", "batch 1, 2 heads of 32, float32, forward, not compiled; AMD EPYC, 2 threads, torch 2."),
        ("model_cpu", "batch 4, 224 px, float32, inference, compiled; AMD EPYC, 2 threads, torch 2."),
    ):
        picture = tmp_path / "new" / f"{name}.png"
        status, out, err = command("benchmark", "plot", docs / f"{name}.json", "--output", picture)
        assert (status, out, err) == (0, f"wrote {picture}\n", "")
        (caption,) = read_captions(drawn[-1])
        assert caption.startswith(words)
        assert Image.open(picture).size == (1050, 630)
    refused = command("benchmark", "plot", docs / "plan_cpu.json", "--output", tmp_path / "plan.png")
    check_refused(refused, "plan_cpu.json has no picture: give a result of one of operator, model")


def test_results_of_different_machines_are_not(command: Command, tmp_path):
    first, third = written(tmp_path / "first.json", 1.0), written(tmp_path / "third.json", 1.0)
    second = written(tmp_path / "second.json", 1.0, processor="B", threads=4)
    check_refused(command("benchmark", "compare", first, third, second), "second.json", "differ in processor, threads")


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b'{"rows": []}', b"\x89PNG\r\n"])
def test_files_that_are_no_results_are_refused(command: Command, tmp_path, content):
    (tmp_path / "other.json").write_bytes(content)
    check_refused(command("benchmark", "compare", tmp_path / "other.json"), "other.json", "tools/benchmark.py wrote")


def test_comparing_nothing_is_refused(command: Command, tmp_path):
    check_refused(command("benchmark", "compare"), "no FILE given")
    check_refused(command("benchmark", "compare", tmp_path / "nothing.json"), "nothing.json", "does not exist")


# --------------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("model", "--models", SWIN, "ssvit_tini"), ["'ssvit_tini'", "did you mean 'ssvit_tiny'?"]),
        (("model", "--models", "convnext_tinny"), ["did you mean 'convnext_tiny'?"]),
        (("model", "--models"), ["--models"]),
        (("operator", "--sides", 56, 0), ["--sides is 56 0", "positive"]),
        (("operator", "--turns", 0), ["--turns is 0", "positive"]),
        (("model", "--batch-size", -1), ["--batch-size is -1", "positive"]),
        (("operator", "--side", 56), ["--side", "did you mean --sides?"]),
        (("operator", "--dtype", "float8"), ["float8", "bfloat16"]),
        (("plan", "--device", "tpu"), ["--device is tpu", "cpu"]),
        (("plan", "--device", "cuda:first"), ["--device is cuda:first", "cuda:N"]),
        (
            ("loader", "--num-images", 8, "--batch-size", 9),
            ["--num-images is 8", "at least --batch-size (9)"],
        ),
        (("loader", "--num-images", 0), ["--num-images is 0", "positive"]),
        (("loader", "--num-workers", 2, -1), ["--num-workers is 2 -1", "0 or more"]),
        (("plan", "--plot", "plans.png"), ["--plot is plans.png", "no picture"]),
        (("growth", "--models", "ssvit_tini"), ["'ssvit_tini'", "did you mean 'ssvit_tiny'?"]),
        (("growth", "--sizes", 0), ["--sizes is 0", "positive"]),
        (("growth", "--image-sizes"), ["--image-sizes"]),
        (("compile", "--plot", "first.png"), ["--plot is first.png", "no picture"]),
    ],
)
def test_what_cannot_be_measured_is_refused(command: Command, tmp_path, arguments, words):
    check_refused(command("benchmark", *arguments, "--output", tmp_path / "result.json"), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("benchmark", ["operator", "model", "compile", "plan", "loader", "growth"])
def test_a_missing_gpu_is_said(command: Command, monkeypatch, tmp_path, benchmark):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = command("benchmark", benchmark, "--device", "cuda", "--output", tmp_path / "result.json")
    check_refused(result, "--device is cuda", "there is no GPU")
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_said(command: Command, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    result = command("benchmark", "plan", "--device", "cuda:2", "--output", tmp_path / "result.json")
    check_refused(result, "--device is cuda:2", "2 GPUs")
