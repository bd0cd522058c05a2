"""What the tests of sources share."""

import datasets
import pytest
from helpers.image_folder import make_image_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Datasets' copies do not outlive a test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def image_folder(tmp_path):
    return make_image_folder(tmp_path / "images")
