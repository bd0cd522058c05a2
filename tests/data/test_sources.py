"""Sources by name: the options they take, and their fingerprints."""

import re
from typing import get_args

import pytest
from helpers.image_folder import make_image_folder
from helpers.numbered_images import make_images

from s3a.data import Source, load_data
from s3a.data.sources import SOURCES


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("image-folder", {}, "did you mean 'imagefolder'"),
        ("imagefolder", {}, "--data imagefolder needs --data-dir DIR, a folder with train/CLASS"),
        ("webdataset", {}, r"needs --data-dir DIR, a folder with train\*.tar"),
        ("digits", {"data_dir": "pictures"}, "--data-dir is 'pictures' but the digits .* --data imagefolder"),
        ("hub", {"data_dir": "pictures", "dataset": "a/b"}, "--data-dir is 'pictures' but"),
        ("hub", {}, "needs --dataset ORG/NAME"),
        ("digits", {"dataset": "org/birds"}, "--dataset is 'org/birds' but --data is digits: use --data hub"),
        ("digits", {"streaming": True}, "--streaming is for --data hub, parquet, webdataset"),
    ],
)
def test_options_that_do_not_fit_the_source_are_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        load_data(source, **options)


def test_every_source_can_be_named_in_a_recipe():
    assert set(get_args(Source)) == set(SOURCES)


def test_fingerprints_are_stable(tmp_path):
    assert load_data("digits").fingerprint == load_data("digits").fingerprint
    assert re.fullmatch("[0-9a-f]{64}", load_data("digits").fingerprint)
    folder = make_image_folder(tmp_path / "images")
    before = load_data("imagefolder", folder).fingerprint
    assert load_data("imagefolder", folder.rename(tmp_path / "elsewhere")).fingerprint == before


def test_what_is_named_by_row_says_the_split():
    assert make_images(4, split="val").name_of(3) == "row 3 of val"
