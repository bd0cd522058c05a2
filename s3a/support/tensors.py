"""How the arrays of a plan become tensors that outlive the call that made them."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch._dynamo
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of the array on the device; compiled code takes its size as a constant."""
    return static(torch.from_numpy(np.ascontiguousarray(array)).to(device))


def static(tensor: Tensor) -> Tensor:
    """The tensor, whose size compiled code takes as a constant."""
    torch._dynamo.mark_static(tensor)
    return tensor


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Cached tensors must be real ones, whatever mode the first caller happens to be in.

    An inference-mode tensor could not be saved for a later backward, and a fake or traced one is gone when
    its trace is.
    """
    with torch.inference_mode(False), _disable_current_modes():
        yield
