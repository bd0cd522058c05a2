"""Slices: the examples of the module, and that every position belongs to one process and micro-batch."""

import numpy as np
import pytest

from s3a.data.slices import EvalSlices, Slices


def test_training_is_cut_as_the_example_says():
    slices = [Slices(17, 8, 2, process_index, 2) for process_index in range(2)]
    assert [each.num_batches for each in slices] == [4, 4]
    positions = [[each.list_positions(number).tolist() for number in range(4)] for each in slices]
    assert positions == [[[0, 1], [2, 3], [8, 9], [10, 11]], [[4, 5], [6, 7], [12, 13], [14, 15]]]


def test_evaluation_is_cut_as_the_example_says():
    slices = [EvalSlices(11, 4, process_index, 2) for process_index in range(2)]
    positions = [[each.list_positions(number).tolist() for number in range(each.num_batches)] for each in slices]
    assert positions == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10]]]
    assert [slices[0].count_rows(number) for number in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("num_processes", [1, 3, 5])
@pytest.mark.parametrize("num_images", [1, 12, 29, 30])
def test_every_position_is_in_one_slice(num_images, num_processes):
    cuts = [EvalSlices(num_images, 7, index, num_processes) for index in range(num_processes)]
    if num_images >= 15:
        cuts_of_training = [Slices(num_images, 15, 1, index, num_processes) for index in range(num_processes)]
        positions = [each.list_positions(number) for each in cuts_of_training for number in range(each.num_batches)]
        assert np.array_equal(np.sort(np.concatenate(positions)), np.arange(num_images // 15 * 15))
    positions = [each.list_positions(number) for each in cuts for number in range(each.num_batches)]
    assert np.array_equal(np.sort(np.concatenate(positions)), np.arange(num_images))
