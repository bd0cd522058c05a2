"""Comparisons: what is trained and how long, what the figures are, and that nothing is done twice."""

import dataclasses
import json
import os
import shutil
import signal
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from helpers.command_line import check_refused
from helpers.image_folder import make_image_folder
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from s3a.analysis.cost import count_cost
from s3a.comparison import scores, speed
from s3a.comparison.candidates import Candidate, list_candidates, list_equal_scans, make_contenders
from s3a.comparison.report import (
    draw_comparison,
    format_difference,
    format_markdown,
    format_text,
    list_cautions,
    list_skipped,
    make_tables,
)
from s3a.comparison.results import Results
from s3a.comparison.scores import add_differences, make_score, subtract_seeds, summarise_seeds
from s3a.comparison.speed import convert_to_throughput, extrapolate_memory, measure_growth, measure_peak_memory
from s3a.data import load_data
from s3a.support.timing import Sample
from s3a.training.named_recipes import get_recipe

NAMES = ["dark", "light"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.mark.parametrize("side", [32, 64])
def test_scans_that_come_down_to_the_same_are_said_to(side):
    """Those whose models give the same logits with the same weights."""
    scans = ("alternate", "window-first", "local-only", "anchors-first", "dense")
    candidates = list_candidates(["ssvit_nano", "vvt_nano"], scans, ())[: len(scans)]
    contenders = make_contenders(candidates, small_recipe(image_size=side), NAMES)
    images = torch.randn(1, 3, side, side)
    logits = {}
    for candidate in candidates:
        torch.manual_seed(0)
        with torch.inference_mode():
            logits[candidate.label] = timm.create_model(candidate.model, scan=candidate.scan).eval()(images)
    labels = list(logits)
    equal = {
        label: next(each for each in labels if torch.allclose(logits[each], logits[label], atol=1e-5))
        for label in labels
    }
    found = {line.partition(" runs ")[0]: line for line in list_equal_scans(contenders)}
    assert {*found} == {label for label, other in equal.items() if other != label}
    assert bool(found) == (side == 32)
    assert all(f"the same passes as {equal[label]} at {side} px" in line for label, line in found.items())


@pytest.fixture
def arguments(images, tmp_path) -> list[object]:
    """Of a comparison small enough for a test."""
    return [
        *("ssvit_nano", "test_resnet", "--drop-path", "None", "--seeds", 2, "--epochs", 2, "--warmup-epochs", 0.5),
        *("--data", "imagefolder", "--data-dir", images, "--image-size", 32, "--batch-size", 16, "--cpu-threads", 1),
        *("--growth", 32, 48, "--turns", 2, "--speed-batch-size", 2, "--output-dir", tmp_path / "out"),
    ]


def small_recipe(**changes: object):
    return dataclasses.replace(get_recipe("digits"), **{"image_size": 32, "drop_path": None, **changes})


def found_in(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# --------------------------------------------------------------------------------------------------------
# What is compared
# --------------------------------------------------------------------------------------------------------


def test_candidates_are_all_combinations():
    found = list_candidates(["ssvit_nano"], ["alternate", "dense"], [3, 5])
    assert [each.label for each in found] == [
        f"ssvit_nano {scan} size {size}" for scan in ("alternate", "dense") for size in (3, 5)
    ]


@pytest.mark.parametrize(
    ("models", "scans", "sizes", "words"),
    [
        ([], [], [], "no model is given"),
        (["ssvit_nan"], [], [], "model 'ssvit_nan' is unknown.*did you mean 'ssvit_nano'"),
        (["vvt_nano", "vvt_nano"], [], [], "model vvt_nano is given twice"),
        (["ssvit_nano"], ["dense", "denser"], [], "scan 'denser' is unknown.*did you mean 'dense'"),
        (["ssvit_nano"], ["dense", "dense"], [], "--scan dense is given twice"),
        (["ssvit_nano"], [], [5, 5], "--size 5 is given twice"),
    ],
)
def test_wrong_candidates_are_refused(models, scans, sizes, words):
    with pytest.raises(ValueError, match=words):
        list_candidates(models, scans, sizes)


@pytest.mark.parametrize("scan", ["alternate", "dense"])
@pytest.mark.parametrize("model", ["svit_nano", "resnet18"])
def test_a_scan_of_a_model_without_scans_is_refused(model, scan):
    """The published one too, which is the plain model of those that have scans."""
    with pytest.raises(ValueError, match=f"--model {model} has no sparse scans: leave --scan out"):
        make_contenders([Candidate(model=model, scan=scan)], small_recipe(), NAMES)


def test_what_is_the_models_own_is_the_plain_model():
    """Its runs serve all comparisons; others lie in folders of their own."""
    models = ({}, {"scan": "alternate"}, {"size": 3}, {"scan": "alternate", "size": 3})
    plain, *same = make_contenders(
        [Candidate(model="ssvit_nano", **changes) for changes in models], small_recipe(), NAMES
    )
    assert plain.make_recipe(Path("runs"), 3).output_dir == Path("runs/ssvit_nano/seed-3")
    assert plain.make_recipe(Path("runs"), 3).seed == 3
    assert all(each.make_recipe(Path("runs"), 3) == plain.make_recipe(Path("runs"), 3) for each in same)
    (other,) = make_contenders([Candidate(model="ssvit_nano", scan="dense", size=5)], small_recipe(), NAMES)
    assert other.make_recipe(Path("runs"), 0).output_dir == Path("runs/ssvit_nano-dense-size-5/seed-0")
    assert (other.recipe.scan, other.recipe.size) == ("dense", 5)


def test_costs_are_those_of_the_recipes_images():
    (contender,) = make_contenders(
        [Candidate(model="ssvit_nano", scan="dense", size=2)], small_recipe(image_size=48), NAMES
    )
    assert contender.cost == count_cost(timm.create_model("ssvit_nano", scan="dense", num_classes=2), 48, 48)


@pytest.mark.parametrize("reference", [None, "resnet18"])
def test_equal_compute(reference):
    """All get the reference's GMACs as nearly as whole epochs allow, and its shares of warm-up and cooldown."""
    names = ["ssvit_nano", "svit_nano", "resnet18", "deit_tiny_patch16_224"]
    recipe = small_recipe(epochs=30, cooldown_epochs=10, warmup_epochs=6, image_size=64)
    contenders = make_contenders(
        [Candidate(model=name) for name in names], recipe, NAMES, equal="compute", reference=reference
    )
    by_name = dict(zip(names, contenders, strict=True))
    base = by_name[reference or "ssvit_nano"]
    assert (base.recipe.epochs, base.recipe.cooldown_epochs, base.recipe.warmup_epochs) == (30, 10, 6)
    for contender in contenders:
        epoch = contender.count_training_gmacs(100) / contender.recipe.total_epochs
        assert epoch == pytest.approx(100 * contender.cost.gmacs)
        assert (
            abs(contender.count_training_gmacs(100) - base.count_training_gmacs(100)) <= epoch / 2
            or contender.recipe.total_epochs == 1
        )
        assert contender.recipe.warmup_epochs == pytest.approx(contender.recipe.epochs / 5)
        assert abs(contender.recipe.cooldown_epochs - contender.recipe.total_epochs / 4) <= 0.5
    assert len({contender.recipe.total_epochs for contender in contenders}) >= 3


def test_an_unknown_reference_is_refused():
    with pytest.raises(ValueError, match=r"reference 'svit_nano' is unknown.*did you mean 'ssvit_nano'"):
        make_contenders([Candidate(model="ssvit_nano")], small_recipe(), NAMES, reference="svit_nano")


# --------------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------------


def test_spreads():
    figures = [0.91, 0.94, 0.97, 0.95]
    found = summarise_seeds(figures)
    assert found["mean"] == pytest.approx(np.mean(figures))
    assert found["deviation"] == pytest.approx(np.std(figures, ddof=1))
    above_zero = subtract_seeds(found, summarise_seeds([0.0] * 4))
    assert above_zero["error"] == pytest.approx(np.std(figures, ddof=1) / 2)
    single = {"mean": 0.5, "deviation": None, "seeds": [0.5]}
    assert summarise_seeds([0.5]) == single
    assert subtract_seeds(single, summarise_seeds([0.0])) == {**single, "error": None}


def test_a_row_has_the_last_epoch_and_the_best_one_apart():
    """Of two runs whose last epoch is worse than their best."""
    (contender,) = make_contenders([Candidate(model="ssvit_nano")], small_recipe(), NAMES)
    top1 = ((0.5, 0.9, 0.7), (0.8, 0.6, 0.5))
    histories = [[{"val_top1": score, "val_loss": 1 - score} for score in run] for run in top1]
    row = make_score(contender, histories, num_images=100)
    found = {name: row[name]["seeds"] for name in ("top1", "best_top1", "val_loss")}
    assert found == {"top1": [0.7, 0.5], "best_top1": [0.9, 0.8], "val_loss": [1 - 0.7, 1 - 0.5]}


@pytest.mark.parametrize("reference", [None, "b"])
def test_differences_are_paired_by_seed(reference):
    """Two models that move together with the seed differ by more than their deviations let on."""
    top1 = {"a": [0.90, 0.95, 0.97], "b": [0.92, 0.97, 0.99]}
    rows = [
        {"label": label, "top1": summarise_seeds(seeds), "val_loss": summarise_seeds(seeds[::-1])}
        for label, seeds in top1.items()
    ]
    add_differences(rows, reference)
    other, base = (rows[1], rows[0]) if reference is None else (rows[0], rows[1])
    assert "top1_difference" not in base
    for figure in ("top1_difference", "val_loss_difference"):
        assert other[figure]["mean"] == pytest.approx(0.02 if reference is None else -0.02)
        assert other[figure]["error"] == pytest.approx(0, abs=1e-12)


class Hungry(nn.Module):
    """1 MiB of weights, and at the peak tensors of 2, 8 and again 2 MiB, the last being what it hands out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2**18))

    def forward(self) -> torch.Tensor:
        small = self.weight.repeat(2)
        large = small.repeat(4)
        return small + large.sum()


def test_throughput_is_of_images():
    """Batches of 8 that take 10 ms, at best 5 and at worst 20."""
    sample = Sample(median=10.0, fastest=5.0, slowest=20.0, turns=3)
    assert convert_to_throughput("training", sample, batch_size=8) == {
        "training_images_per_second": 800.0,
        "training_images_per_second_fastest": 1600.0,
        "training_images_per_second_slowest": 400.0,
    }


def test_peak_memory():
    model = Hungry()
    with torch.no_grad():
        assert measure_peak_memory(model, (model,)) == pytest.approx(1 + 2 + 8 + 2, abs=0.01)
        unused = torch.zeros(2**20)  # of 4 MiB, there all the same
        assert measure_peak_memory(model, (model, unused)) == pytest.approx(1 + 2 + 8 + 2 + 4, abs=0.01)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_memory_is_extrapolated_and_what_would_not_fit_is_said(monkeypatch):
    rows = [{"label": "a", "image_size": side, "mib": side**4 / 1e6} for side in (100, 200)]
    assert extrapolate_memory(rows, 400) == pytest.approx(400**4 / 1e6)
    assert extrapolate_memory(rows[:1], 400) == 0

    (contender,) = make_contenders([Candidate(model="ssvit_nano")], small_recipe(), NAMES)
    monkeypatch.setattr(speed, "find_free_memory", lambda device: 5.0)
    grown: list[dict] = []
    for side in (64, 128, 256, 512):
        grown += measure_growth([contender], NAMES, CPU, side, grown, turns=1)
    assert ["mib" in row for row in grown] == [True, True, False, False]
    assert all(row["mib"] > 0 < row["ms"] for row in grown[:2])
    assert "MiB would be needed, 5 are free" in grown[2]["skipped"]


def test_a_size_that_a_model_does_not_take_is_said():
    """A model of one fixed size is built for each."""
    contenders = make_contenders(
        [Candidate(model=name) for name in ("deit_tiny_patch16_224", "vvt_nano")], small_recipe(), NAMES
    )
    taken, refused = measure_growth(contenders, NAMES, CPU, 16, [], turns=1)
    assert taken["ms"] > 0
    assert refused["skipped"].startswith("--image-size is 16: images are 16 x 16 pixels: each side must be at least 32")


# --------------------------------------------------------------------------------------------------------
# Tables and pictures
# --------------------------------------------------------------------------------------------------------


MACHINE = {"processor": "Abacus", "threads": 1, "accelerator": None, "packages": {"torch": "2.15.0+cpu"}}
TIMING = {"batch_size": 16, "image_size": 32, "precision": "bf16"}


def made_up(num_seeds: int, growth: bool) -> Results:
    cost = {"parameters": 1234, "published_gmacs": 0.5, "gmacs": 0.6}
    rows = [
        {
            **{"label": label, "epochs": 3, **cost},
            **{name: summarise_seeds([top1] * num_seeds) for name in ("top1", "val_loss")},
        }
        for label, top1 in (("a $_", 0.9), ("b", 0.8))
    ]
    add_differences(rows, None)
    phases = {f"{phase}_{kind}": 100.0 for phase in ("inference", "training") for kind in ("mib", "images_per_second")}
    grown = [
        {"label": label, "image_size": side, "ms": 1.0 * side, "mib": 2.0 * side}
        for side in (32, 64)
        for label in ("a $_", "b")
    ]
    grown[-1] = {"label": "b", "image_size": 64, "skipped": "about 9 MiB would be needed, 5 are free"}
    results = Results(machine=MACHINE, timing=TIMING, scores=rows, speed={row["label"]: phases for row in rows})
    results.growth = grown if growth else []
    return results


def test_the_command_of_a_result_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/compare.py", "--output-dir", "my runs"])
    made_up(1, growth=False).write(tmp_path)
    assert found_in(tmp_path)["command"] == "python tools/compare.py --output-dir 'my runs'"


def test_tables():
    results = made_up(2, growth=True)
    score_table, speed_table, growth_table = make_tables(results)
    assert score_table[1][-5:] == ["90.00 ± 0.00", "-", "0.9000 ± 0.0000", "-", "90.00 90.00"]
    assert score_table[2][-4:-1] == ["-10.00 ± 0.00", "0.8000 ± 0.0000", "-0.1000 ± 0.0000"]
    nothing = {"mean": -1e-17, "error": 0.0}
    assert format_difference(nothing, 1, 2) == "+0.00 ± 0.00"
    assert speed_table[1] == ["a $_", "100", "100", "100", "100"]
    assert growth_table == [
        ["one image", "32 px", "64 px"],
        ["a $_", "32.0 ms, 64 MiB", "64.0 ms, 128 MiB"],
        ["b", "32.0 ms, 64 MiB", "skipped"],
    ]
    assert list_skipped(results) == ["b at 64 px skipped: about 9 MiB would be needed, 5 are free"]
    assert format_text([["x", "y"], ["long", "1"]]) == "x     y\nlong  1"
    assert format_markdown([["x", "y"], ["long", "1"]]) == "| x | y |\n| --- | ---: |\n| `long` | 1 |"


def test_differences_of_one_seed_come_with_a_caution():
    """Several seeds have their spread, and a single model has no differences."""
    (caution,) = list_cautions(made_up(1, growth=False))
    assert caution == "One seed gives no spread: these differences may be chance. Compare with --seeds 3 or more."
    assert list_cautions(made_up(2, growth=False)) == []
    alone = made_up(1, growth=False)
    alone.scores = alone.scores[:1]
    assert list_cautions(alone) == []


@pytest.mark.parametrize(("num_seeds", "growth"), [(1, False), (5, True)])
def test_pictures(num_seeds, growth, tmp_path, monkeypatch):
    saved, save = [], Figure.savefig

    def savefig(figure, *arguments, **options):
        saved.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    draw_comparison(made_up(num_seeds, growth), tmp_path / "new" / "picture.png")
    assert saved[0].get_suptitle() == (
        "images per second in batches of 16 at 32 px; times in bfloat16 on Abacus, 1 thread, torch 2.15.0"
    )
    with Image.open(tmp_path / "new" / "picture.png") as picture:
        assert picture.width > 1000


# --------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------


def test_a_comparison_and_what_goes_on_from_it(command, arguments, images, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    status, first, _ = command("compare", *arguments)
    assert status == 0
    found = found_in(folder)
    assert [row["label"] for row in found["scores"]] == ["ssvit_nano", "test_resnet"]
    for row in found["scores"]:
        model = timm.create_model(row["model"], num_classes=2)
        assert row["gmacs"] == count_cost(model, 32, 32).gmacs
        assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert row["training_gmacs"] == round(2 * 48 * row["gmacs"])
        histories = [
            [json.loads(line) for line in (folder / f"runs/{row['model']}/seed-{seed}/metrics.jsonl").open()]
            for seed in (0, 1)
        ]
        last = [history[-1]["val_top1"] for history in histories]
        assert row["top1"] == {"mean": statistics.mean(last), "deviation": statistics.stdev(last), "seeds": last}
        assert row["best_top1"]["seeds"] == [max(line["val_top1"] for line in history) for history in histories]
        assert f"{100 * statistics.mean(last):.2f} ± " in first
        assert found["speed"][row["label"]]["training_mib"] > found["speed"][row["label"]]["inference_mib"] > 0
    assert [(row["label"], row["image_size"]) for row in found["growth"]] == [
        (label, side) for side in (32, 48) for label in ("ssvit_nano", "test_resnet")
    ]
    assert found["settings"]["recipe"]["epochs"] == 2
    assert "tools/compare.py ssvit_nano test_resnet --drop-path None" in found["command"]
    assert (folder / "comparison.png").exists()
    assert "| `ssvit_nano` |" in (folder / "results.md").read_text()

    # the same again does nothing
    monkeypatch.setattr(scores, "train", None)
    monkeypatch.setattr(speed, "take_turns", None)
    status, again, _ = command("compare", *arguments)
    assert (status, again) == (0, first)
    monkeypatch.undo()

    # the tables and the picture come from the results alone
    (folder / "comparison.png").unlink()
    shutil.move(folder / "runs", tmp_path / "moved")
    status, again, _ = command("compare", "--report-only", "--output-dir", folder)
    assert (status, again.splitlines()[:4]) == (0, first.splitlines()[:4])
    assert (folder / "comparison.png").exists()
    check_refused(command("compare", "--report-only", "--output-dir", tmp_path / "none"), "results.json does not exist")
    shutil.move(tmp_path / "moved", folder / "runs")

    # a run is taken as it is only by its own recipe, on its own images
    data = load_data("imagefolder", images)
    run = {"epochs": 2, "warmup_epochs": 0.5, "batch_size": 16, "data": "imagefolder", "data_dir": images}
    recipe = small_recipe(**run, output_dir=folder / "runs" / "ssvit_nano" / "seed-0")
    assert scores.is_finished(recipe, data)
    assert not scores.is_finished(recipe, dataclasses.replace(data, fingerprint="other"))
    with pytest.raises(ValueError, match=r"holds a run with --learning-rate 0\.016 \(now 1\)"):
        scores.is_finished(dataclasses.replace(recipe, learning_rate=1), data)

    # times of another machine are not mixed in, nor is the file touched
    path = folder / "results.json"
    path.write_text(path.read_text().replace('"cores": ', '"cores": 1'))
    before = path.read_bytes()
    check_refused(command("compare", *arguments), "another cores", "--output-dir", "--runs-dir")
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_signal_ends_with_75_and_the_same_command_goes_on(command, arguments, tmp_path, monkeypatch):
    """After the first run, and then while measuring; finished parts stay. Here all get the same compute."""
    arguments += ["--equal", "compute"]
    with monkeypatch.context() as patch:
        calls = []

        def stopping_train(recipe):
            calls.append(recipe)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return train(recipe)

        train = scores.train
        patch.setattr(scores, "train", stopping_train)
        status, out, err = command("compare", *arguments)
    assert (status, out) == (75, "")
    assert "stopped by SIGTERM" in err
    assert not (tmp_path / "out" / "results.json").exists(), "a part is no result"
    finished = tmp_path / "out" / "runs" / "ssvit_nano" / "seed-0" / "model" / "model.safetensors"
    before = finished.stat().st_mtime_ns

    with monkeypatch.context() as patch:
        grow = speed.measure_growth
        patch.setattr(
            speed,
            "measure_growth",
            lambda *args, **kwargs: [os.kill(os.getpid(), signal.SIGTERM), *grow(*args, **kwargs)][1:],
        )
        status, out, _ = command("compare", *arguments)
    assert (status, out) == (75, "")
    assert [row["image_size"] for row in found_in(tmp_path / "out")["growth"]] == [32, 32]

    status, out, _ = command("compare", *arguments)
    assert status == 0
    assert finished.stat().st_mtime_ns == before
    found = found_in(tmp_path / "out")
    assert len(found["growth"]) == 4
    ours, peer = found["scores"]
    assert (ours["epochs"], peer["epochs"]) == (2, round(2 * ours["gmacs"] / peer["gmacs"]))
    assert peer["epochs"] != 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--seeds", 0], ["--seeds is 0", "at least 1"]),
        (["--seed", 3], ["--seed is for a single run", "--seeds"]),
        (["--model", "vvt_nano"], ["--model is for a single run", "MODEL"]),
        (["--equal", "time"], ["--equal"]),
        (["--recipe", "digit"], ["recipe 'digit' is unknown", "'digits'"]),
        (["--recipe", "photos_finetune"], ["--recipe photos_finetune starts from weights", "such as photos"]),
        (["--recipe", "svit_small_384"], ["--recipe svit_small_384 starts from weights"]),
        (["--recipe", "vvt_tiny_cifar100"], ["--recipe vvt_tiny_cifar100 starts from weights"]),
        (["--epoch", 3], ["--epoch", "--epochs"]),
        (["--growth", -5], ["--growth is -5"]),
        (["--image-size", 8], ["--image-size is 8", "at least 32"]),
        (["--device", "tpu"], ["--device is tpu"]),
        (["--data", "fashion-mnist", "--data-dir", "nowhere"], ["apt install dataset-fashion-mnist"]),
    ],
)
def test_bad_options_are_one_line(command, arguments, tmp_path, changes, words):
    check_refused(command("compare", *arguments, *changes), *words)
    assert not (tmp_path / "out").exists()
