"""The backends: how each lays out a pass, how it attends, and what it cannot run."""

from s3a.attention.backends.backend import Backend, KernelOptions, Operands
from s3a.attention.backends.table import BACKENDS

__all__ = ["BACKENDS", "Backend", "KernelOptions", "Operands"]
