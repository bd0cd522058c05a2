"""Labels of columns, by hand; which columns they are stands in the tests of the sources."""

import numpy as np
import pyarrow as pa
import pytest

from s3a.data.columns import check_labels, convert_labels


def test_missing_labels_are_no_class():
    assert convert_labels(pa.chunked_array([[0, None], [2]]), "train").tolist() == [0, -1, 2]


@pytest.mark.parametrize("wrong", [-1, 3, 4])
def test_labels_that_are_no_class_are_refused(wrong):
    message = rf"1 images of train have no label of the 3 classes, the first is row 2 with {wrong}: .* 0 to 2$"
    with pytest.raises(ValueError, match=message):
        check_labels(np.array([0, 2, wrong, 1]), 3, "train")
    check_labels(np.array([0, 2, 1]), 3, "train")
