"""Labels, tables and picture of results: against calculations by hand."""

import re
import statistics
from pathlib import Path

import pytest
from PIL import Image

from s3a.robustness.corruptions import ALEXNET_ERRORS, ALL, COMMON, GROUPS
from s3a.robustness.lines import make_lines
from s3a.robustness.report import describe_origin, draw_report, format_report, make_report, make_tables
from s3a.robustness.results import Results

# --------------------------------------------------------------------------------------------------------
# Labels
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (
            [f"runs/{name}/seed-{seed}/model" for name in ("ssvit_nano", "ssvit_nano-dense") for seed in (1, 0)],
            {"ssvit_nano": [0, 1], "ssvit_nano-dense": [0, 1]},
        ),
        (["runs/digits/model"], {"digits": None}),
        (["runs/digits/best/"], {"digits": None}),
        (["ORG/NAME"], {"NAME": None}),
        (["runs/a/model", "runs/a/best"], {"model": None, "best": None}),
        (["runs/a/model", "runs/b/best"], {"a": None, "b": None}),
        (["runs/a/model", "runs/a/best", "runs/b/best"], {"a/model": None, "a/best": None, "b/best": None}),
        (["ORG/first", "/home/me/runs/second/model"], {"ORG": None, "second": None}),
        (["runs/a/seed-0/model", "runs/a/model"], {"a": None}),
        (["runs/seed-10/model", "runs/seed-9/model"], {"runs": [9, 10]}),
    ],
)
def test_labels_are_what_tells_lines_apart(paths, labels):
    lines = make_lines(paths)
    assert [line.label for line in lines] == list(labels)
    assert sorted(path for line in lines for path in line.paths) == sorted(paths)
    for line in lines:
        if labels[line.label]:
            assert [int(re.search(r"seed-(\d+)", path)[1]) for path in line.paths] == labels[line.label]


def test_paths_without_a_common_shape_are_whole_labels():
    lines = make_lines(["a/x/m", "b/x/m", "a/y/m", "c/m"])
    assert len({line.label for line in lines}) == 4


def test_weights_given_twice_are_refused():
    with pytest.raises(ValueError, match="--weights a/b is given twice"):
        make_lines(["a/b", "c/d", "a/b"])


# --------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------


def score(path: str, name: str, severity: int) -> float:
    """Top-1 of these results, different for each."""
    line, seed = path.split("/")[1:3]
    level = {"first": 0.8, "second": 0.7}[line] - 0.01 * severity**2 - 0.01 * ALL.index(name)
    return level + 0.003 * int(seed[-1]) ** 2 * (severity if line == "second" else 1)


def make_results(seeds=(3, 3), corruptions=ALL, severities=(1, 2, 3, 4, 5), knows_imagenet=False) -> Results:
    conditions = {"data": "digits", "images": 360, "seed": 0, "library": "imagecorruptions-imaug"}
    conditions |= {"library_version": "9.8.7", "knows_imagenet": knows_imagenet}
    results = Results(conditions=conditions, corruptions=list(corruptions), severities=list(severities))
    for line, count in zip(("first", "second"), seeds, strict=True):
        for seed in range(count):
            path = f"runs/{line}/seed-{seed}/model"
            results.weights[path] = path
            results.top1[path] = {
                name: {str(severity): score(path, name, severity) for severity in severities} for name in corruptions
            } | {"clean": {"0": 0.9 + 0.01 * seed}}
    return results


def list_scores(line: str, names, severities=(1, 2, 3, 4, 5)) -> list[float]:
    """Each seed's mean in percent, by hand."""
    paths = [f"runs/{line}/seed-{seed}/model" for seed in range(3)]
    return [
        100
        * sum(score(path, name, severity) for name in names for severity in severities)
        / len(names)
        / len(severities)
        for path in paths
    ]


def test_tables_have_means_over_seeds_corruptions_and_severities():
    main, difference, by_severity, by_corruption = make_tables(make_report(make_results())).values()
    assert main[0] == ["weights", "clean", "19 corruptions", *GROUPS]
    for row, line in zip(main[1:], ("first", "second"), strict=True):
        assert row[:2] == [line, "91.00 ± 1.00"]
        for cell, names in zip(row[2:], (ALL, *GROUPS.values()), strict=True):
            seeds = list_scores(line, names)
            assert cell == f"{statistics.mean(seeds):.2f} ± {statistics.stdev(seeds):.2f}"
    for column, severity in enumerate((1, 2, 3, 4, 5), start=2):
        seeds = list_scores("second", ALL, [severity])
        assert by_severity[2][column] == f"{statistics.mean(seeds):.2f} ± {statistics.stdev(seeds):.2f}"
    assert [row[0] for row in by_corruption] == ["corruption", *ALL]
    seeds = list_scores("second", ["fog"])
    assert by_corruption[1 + ALL.index("fog")][2] == f"{statistics.mean(seeds):.2f} ± {statistics.stdev(seeds):.2f}"
    pairs = zip(list_scores("second", ALL), list_scores("first", ALL), strict=True)
    apart = [own - its for own, its in pairs]
    error = statistics.stdev(apart) / 3**0.5
    assert difference[1][:3] == ["second", "+0.00 ± 0.00", f"{statistics.mean(apart):+.2f} ± {error:.2f}"]
    assert len(difference) == 2


def test_other_numbers_of_seeds_are_not_paired():
    tables = make_tables(make_report(make_results(seeds=(3, 2))))
    assert list(tables.values())[1][1][:2] == ["second", "-0.50"]  # clean: 90.5 and 91, without an error


def test_corruptions_that_are_not_measured_are_in_no_mean():
    results = make_results(corruptions=("fog", "frost", "snow"))
    del results.top1["runs/second/seed-1/model"]["frost"]["4"]
    report = make_report(results)
    assert (report.corruptions, report.missing) == (["fog", "snow"], ["frost"])
    assert next(iter(make_tables(report).values()))[0] == ["weights", "clean", "2 corruptions"]
    assert "Not measured yet, and in no mean: frost." in format_report(report)
    for name in ("fog", "snow"):
        results.top1["runs/first/seed-0/model"].pop(name)
    with pytest.raises(ValueError, match="no corruption is measured at all severities yet"):
        make_report(results)


def test_the_mean_corruption_error_is_of_imagenet_alone():
    (*_, table) = make_tables(make_report(make_results(corruptions=COMMON, knows_imagenet=True))).values()
    assert table[0] == ["weights", "mCE"]
    seeds = []
    for seed in range(3):
        path = f"runs/first/seed-{seed}/model"
        errors = {name: sum(1 - score(path, name, severity) for severity in range(1, 6)) / 5 for name in COMMON}
        seeds.append(100 * sum(100 * errors[name] / ALEXNET_ERRORS[name] for name in COMMON) / 15)
    assert table[1] == ["first", f"{statistics.mean(seeds):.2f} ± {statistics.stdev(seeds):.2f}"]
    for others in (
        {"corruptions": COMMON},
        {"corruptions": COMMON[1:], "knows_imagenet": True},
        {"severities": (1, 2, 3, 4), "knows_imagenet": True},
    ):
        assert "mCE" not in format_report(make_report(make_results(**others)))


def test_every_report_says_where_the_images_come_from():
    results = make_results(seeds=(1, 1), corruptions=("fog",))
    text = format_report(make_report(results))
    assert "corrupted on the fly by imagecorruptions-imaug 9.8.7; not the official ImageNet-C files" in text
    assert describe_origin(results) in text
    assert "One seed gives no spread" in text


def test_the_picture_has_a_panel_for_each_group(tmp_path, monkeypatch):
    from matplotlib.figure import Figure  # noqa: PLC0415

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    draw_report(make_report(make_results()), Path(tmp_path / "new" / "robustness.png"))
    with Image.open(tmp_path / "new" / "robustness.png") as image:
        assert image.width > 1000
    panels = [axes for axes in drawn[0].axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [
        "mean over 19 corruptions",
        *(f"{name} ({len(names)})" for name, names in GROUPS.items()),
    ]
    first, second = panels[0].get_lines()[:2]
    assert first.get_xdata().tolist() == [0, 1, 2, 3, 4, 5]
    assert first.get_ydata()[0] == pytest.approx(91)
    assert second.get_ydata()[3] == pytest.approx(statistics.mean(list_scores("second", ALL, [3])))
    assert len(panels[0].collections) == 2  # bands
