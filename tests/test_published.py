"""The published figures are those of the models that are built here, and the README prints no others."""

from pathlib import Path

import pytest
import timm
import torch

from s3a.analysis.cost import count_cost
from s3a.published import PUBLISHED

README = Path(__file__).parents[1] / "README.md"


def test_every_published_model_is_in_the_table():
    """And no other: the nano sizes are in no paper."""
    own = {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("s3a.")}
    assert PUBLISHED.keys() == {name for name in own if not name.endswith("_nano")}
    assert all(224 in published.top1 for published in PUBLISHED.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name: str):
    """To the unit."""
    with torch.device("meta"):
        model = timm.create_model(name)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == PUBLISHED[name].parameters


def test_the_readme_prints_the_same_figures():
    """Its table of models, row by row: parameters, both costs counted here, top-1."""
    expected = []
    for name, published in PUBLISHED.items():
        with torch.device("meta"):
            cost = count_cost(timm.create_model(name), 224, 224)
        expected.append(
            f"| `{name}` | {published.parameters:,} | {cost.published_gmacs:.2f} | {cost.gmacs:.2f} "
            f"| {published.top1[224]:.1f} % |"
        )
    _, _, section = README.read_text(encoding="utf-8").partition("| model | parameters | GMACs, layers alone |")
    table, _, _ = section.partition("\n\n")
    assert table.splitlines()[2:] == expected
