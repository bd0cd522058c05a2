"""Which backends a test is for: by what each says that it cannot run, so that a new row of the table is tested too."""

import torch

from s3a.attention.backends import BACKENDS, Operands


def list_backends(dtype: torch.dtype, *, head_dim: int = 16, needs_grad: bool = True) -> list[str]:
    """The names of the backends that run such tensors on a CPU."""
    operands = Operands(torch.device("cpu"), dtype, head_dim, needs_grad)
    return [name for name, backend in BACKENDS.items() if backend.why_not(operands) is None]
