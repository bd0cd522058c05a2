"""Labels of ticks: none meets another, at the size in which the pictures are drawn."""

from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from s3a.support.figures import describe_machine_briefly, label_sides


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(
    ("sides", "shown"),
    [
        ([56, 84, 112, 160, 224, 256], [56, 84, 112, 160, 224, 256]),
        ([56, 224, 250, 256], [56, 224, 256]),
        ([224, 230, 235, 384, 1000, 1024], [224, 384, 1024]),
        ([224, 225, 226], [224, 225, 226]),
        ([56], [56]),
    ],
)
def test_labels_do_not_meet(sides: list[int], shown: list[int], power: int):
    figure = Figure(figsize=(5.5, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot([side**power for side in sides], sides)
    axes.set_xscale("log")
    label_sides(axes, sides, power)
    figure.draw_without_rendering()
    assert axes.get_xticks().tolist() == [side**power for side in sides]
    labels = [label for label in axes.get_xticklabels() if label.get_text()]
    assert [label.get_text() for label in labels] == [f"{side}{'²' if power == 2 else ''}" for side in shown]
    for left, right in pairwise(label.get_window_extent() for label in labels):
        assert left.x1 < right.x0


def test_a_machine_in_a_few_words():
    machine = {"processor": "Abacus", "threads": 2, "accelerator": None, "packages": {"torch": "2.15.0+cpu"}}
    assert describe_machine_briefly(machine) == "Abacus, 2 threads, torch 2.15.0"
    assert describe_machine_briefly({**machine, "accelerator": "H100"}) == "H100, torch 2.15.0"
