"""tools/cost.py: costs as JSON and as a table, beside what the papers print."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
from helpers.command_line import Command, check_refused

from s3a.analysis.cost import count_cost
from s3a.published import PUBLISHED

README = Path(__file__).parents[2] / "README.md"


def test_cost_command(command: Command) -> None:
    status, out, err = command("cost", "ssvit_tiny", "ssvit_base", "--height", 256, "--width", 320, "--json")
    tiny, base = json.loads(out)
    assert (status, err) == (0, "")
    with torch.device("meta"):
        cost = count_cost(timm.create_model("ssvit_tiny"), 256, 320)
    assert cost.parameters == 15_095_688
    assert tiny == {"model": "ssvit_tiny", "height": 256, "width": 320, **asdict(cost)}
    assert base["gmacs"] > base["published_gmacs"] > tiny["gmacs"]


def rows_of_readme() -> list[list[str]]:
    """The README's table of models: name, parameters, both costs, top-1."""
    _, _, section = README.read_text(encoding="utf-8").partition("| model | parameters | GMACs, layers alone |")
    lines = section.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `%") for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.slow
def test_cost_command_for_people(command: Command) -> None:
    """And the README prints the same of every published model."""
    published = [[name] for name in PUBLISHED]
    status, out, _ = command("cost")
    rows = [line.split() for line in out.splitlines()]
    assert status == 0
    assert ["ssvit_tiny", "15,095,688", "2.42", "2.79", "2.4", "83.0"] in rows
    assert ["ssvit_large", "100,234,112", "18.21", "20.44", "18.2", "85.7"] in rows
    assert ["svit_small", "25,495,624", "3.80", "4.34", "4.4", "83.6"] in rows
    assert ["vvt_tiny", "12,882,440", "2.61", "2.99", "-", "79.2"] in rows
    assert ["vvt_large", "61,848,520", "9.47", "10.79", "10.8", "84.1"] in rows
    assert "2^30" in out
    assert "10^9" in out
    assert rows_of_readme() == [[row[0], row[1], row[2], row[3], row[5]] for row in rows if row[:1] in published]


def test_papers_figures_are_those_of_the_size(command: Command) -> None:
    rows = [line.split() for side in (384, 256) for line in cost_lines(command, side)]
    assert [row[-2:] for row in rows] == [["14.1", "85.0"], ["-", "-"], ["-", "-"], ["-", "-"]]


def cost_lines(command: Command, side: int) -> list[str]:
    """The rows of a published model and of another one for square images."""
    status, out, _ = command("cost", "svit_small", "resnet18", "--height", side, "--width", side)
    assert status == 0
    return [line for line in out.splitlines() if line.startswith(("svit_small", "resnet18"))]


def test_dense_models_over_a_backbone(command: Command) -> None:
    """A head costs the same on top of another backbone of the same widths; detectors count what every image takes."""
    given = ("semantic_fpn", "mask_rcnn", "--height", 64, "--width", 96, "--json")
    status, out, _ = command("cost", *given, "--backbone", "ssvit_nano")
    segmenter, detector = json.loads(out)
    assert status == 0
    with torch.device("meta"):
        for row in (segmenter, detector):
            model = timm.create_model(row["model"], backbone="ssvit_nano")
            assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
            features = count_cost(model.backbone, 64, 96)
            assert row["published_gmacs"] > features.published_gmacs > 0
    check_refused(command("cost", "ssvit_tiny", "--backbone", "ssvit_nano"), "ssvit_tiny has none", "semantic_fpn")
    check_refused(command("cost", "upernet", "--backbone", "ssvit_nanno"), "did you mean 'ssvit_nano'?")


def test_cost_command_refuses(command: Command) -> None:
    check_refused(command("cost", "ssvit_tini"), "'ssvit_tini'", "did you mean 'ssvit_tiny'?")
    check_refused(command("cost", "resnet5"), "did you mean 'resnet50'?")
    check_refused(command("cost", "ssvit_tiny", "--height", 31), "31 x 224")
    check_refused(command("cost", "ssvit_tiny", "--width", -1), "224 x -1")
    check_refused(command("cost", "vit_tiny_patch16_224", "--width", 100), "VisionTransformer", "224 x 100")
    check_refused(command("cost", "ssvit_tiny", "--hight", 224), "--hight")
