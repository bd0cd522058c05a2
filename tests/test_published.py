"""The published figures are those of the models that are built here."""

import pytest
import timm
import torch
from helpers.own_models import list_classifiers

from s3a.published import PUBLISHED


def test_every_published_model_is_in_the_table():
    """And no other: the nano sizes are in no paper."""
    assert PUBLISHED.keys() == {name for name in list_classifiers() if not name.endswith("_nano")}
    assert all(224 in published.top1 for published in PUBLISHED.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name: str):
    """To the unit."""
    with torch.device("meta"):
        model = timm.create_model(name)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == PUBLISHED[name].parameters
