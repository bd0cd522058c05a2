"""Labels of columns, by hand; which columns they are stands also in the tests of the sources."""

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from s3a.data.columns import check_labels, convert_labels, find_columns


def test_missing_labels_are_no_class():
    assert convert_labels(pa.chunked_array([[0, None], [2]]), "train").tolist() == [0, -1, 2]


@pytest.mark.parametrize("wrong", [-1, 3, 4])
def test_labels_that_are_no_class_are_refused(wrong):
    message = rf"1 images of train have no label of the 3 classes, the first is row 2 with {wrong}: .* 0 to 2$"
    with pytest.raises(ValueError, match=message):
        check_labels(np.array([0, 2, wrong, 1]), 3, "train")
    check_labels(np.array([0, 2, 1]), 3, "train")


def make_rows(**labels: tuple[int, list[int]]) -> Dataset:
    """Six rows with an image and columns of labels: (how many classes are named, the labels)."""
    features = Features(
        img=datasets.Image(), **{name: ClassLabel(num_classes=num) for name, (num, _) in labels.items()}
    )
    images = [{"bytes": b"", "path": None}] * 6
    return Dataset.from_dict({"img": images, **{name: values for name, (_, values) in labels.items()}}, features)


FINE, COARSE = (5, [0, 1, 2, 3, 4, 0]), (2, [0, 0, 1, 1, 1, 0])


@pytest.mark.parametrize(
    ("labels", "chosen"),
    [
        ({"fine": FINE, "coarse": COARSE}, "fine"),
        ({"coarse": COARSE, "fine": FINE}, "fine"),
        ({"kingdom": (1, [0] * 6), "species": FINE, "genus": COARSE}, "species"),
        ({"species": FINE, "label": COARSE}, "label"),
        ({"species": (5, [0, 2, 0, 2, 2, 0]), "genus": (2, [0, 1, 0, 1, 1, 0])}, "species"),  # few images show few
    ],
)
def test_the_finest_of_several_labels_is_taken(labels, chosen):
    rows = make_rows(**labels)
    assert find_columns(rows.features, "birds", rows) == ("img", chosen)


@pytest.mark.parametrize(
    ("labels", "finest", "other"),
    [
        ({"camera": (9, [0, 1, 0, 1, 0, 1]), "species": FINE}, "camera", "species"),
        ({"species": FINE, "german": FINE}, "species", "german"),
        ({"species": FINE, "genus": COARSE, "camera": (3, [0, 1, 2, 0, 1, 2])}, "species", "camera"),
    ],
)
def test_labels_of_which_none_is_the_finest_are_refused(labels, finest, other):
    rows = make_rows(**labels)
    message = rf"birds has \d label columns \(.*\), and the classes of '{finest}' are no parts of those of '{other}': "
    with pytest.raises(ValueError, match=message):
        find_columns(rows.features, "birds", rows)


def test_whole_numbers_and_streams_have_no_finest_label():
    """A column of numbers may count the images, which no classes are finer than."""
    rows = make_rows(fine=FINE, coarse=COARSE)
    with pytest.raises(ValueError, match=r"2 label columns \(fine, coarse\): .* without --streaming finds out"):
        find_columns(rows.features, "birds")
    numbers = rows.cast_column("fine", Value("int64")).cast_column("coarse", Value("int64"))
    with pytest.raises(ValueError, match=r"has 2 label columns \(fine, coarse\): it must have one"):
        find_columns(numbers.features, "birds", numbers)
