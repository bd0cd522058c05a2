"""The rotary embedding, held against rotations of complex numbers."""

import pytest
import torch
from helpers.golden import error
from helpers.layers import rotate_as_complex

from s3a.nn.rotary import build_rotary_tables, rotate

CPU = torch.device("cpu")


@pytest.mark.parametrize("head_dim", [4, 8, 16, 32])
def test_rotation(head_dim: int):
    """Pairs of neighboring channels, rows first; as complex numbers on an oblong map."""
    x = torch.randn(2, 5, 9, 3, head_dim, dtype=torch.float64)
    tables = (table.squeeze(1) for table in build_rotary_tables(5, 9, head_dim, CPU, torch.float64))
    rotated = rotate(x.flatten(1, 2), *tables).unflatten(1, (5, 9))
    assert error(rotated, rotate_as_complex(x)) <= 1e-6


def test_rotation_by_hand():
    """Head dim 8 has frequencies 1 and 1 / 10000; at row 2 and column 3 they turn by 2, 0.0002, 3 and 0.0003."""
    cosine, sine = build_rotary_tables(3, 4, 8, CPU, torch.float32)
    assert cosine.shape == sine.shape == (12, 1, 1, 4)
    angles = torch.tensor([2.0, 2e-4, 3.0, 3e-4])
    torch.testing.assert_close(cosine[2 * 4 + 3, 0, 0], angles.cos())
    torch.testing.assert_close(sine[2 * 4 + 3, 0, 0], angles.sin())
    quarter = torch.tensor([torch.pi / 2])
    torch.testing.assert_close(rotate(torch.tensor([1.0, 0.0]), quarter.cos(), quarter.sin()), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rotation_does_not_depend_on_the_default_dtype(dtype: torch.dtype):
    """Tables are cached for the process, so a coarse default would spoil them for everyone."""
    right = build_rotary_tables(30, 40, 16, CPU, torch.float64)
    torch.set_default_dtype(dtype)
    try:
        tables = build_rotary_tables(30, 40, 16, CPU, torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, tables, right))


def test_rotation_keeps_the_dtype():
    ones = torch.ones(4, 1, 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert rotate(torch.ones(1, 4, 2, 4, dtype=dtype), ones, ones).dtype == dtype
