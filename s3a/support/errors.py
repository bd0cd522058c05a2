"""Errors that several rooms raise or catch."""

import errno
from collections.abc import Iterable
from difflib import get_close_matches

MAX_LISTED = 16  # names in a message


class DiskFullError(OSError):
    """The disk is full; what was written before is intact."""


def is_disk_full(error: Exception) -> bool:
    """Whether a write failed because the disk is full; safetensors has the error number in its message only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"os error {number})" in str(error) for number in full)


def make_unknown_error(kind: str, value: object, known: Iterable[str]) -> ValueError:
    """A ValueError for a name that is none of the known ones: it lists them, and suggests the nearest.

    Args:
        kind: what the name should name, such as "backend".
        value: the name given.
    """
    names = sorted(name or "''" for name in known)
    near = get_close_matches(str(value), names, n=3, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    first = near or names[:3]
    listed = names if len(names) <= MAX_LISTED else [*first, f"{len(names) - len(first)} more"]
    return ValueError(f"{kind} {value!r} is unknown: it must be one of {', '.join(listed)}{hint}")


class UnknownArgumentError(ValueError, TypeError):
    """An argument that a model does not have: Python's own kind of error, and that of all errors for users."""


RESUME_STATUS = 75  # EX_TEMPFAIL of sysexits.h: not done, run the same command again


class Interrupted(Exception):  # noqa: N818  an outcome, not an error
    """The run was asked to stop; its checkpoint is written."""
