"""Errors that several rooms raise or catch."""

import errno
from collections.abc import Iterable
from difflib import get_close_matches

MOST_SHOWN = 16


class DiskFullError(OSError):
    """There is no room for a file; what was there before it is whole."""


def is_disk_full(error: Exception) -> bool:
    """Whether a write failed for want of room; safetensors puts the number into its message."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"os error {number})" in str(error) for number in full)


def unknown(kind: str, value: object, known: Iterable[str]) -> ValueError:
    """The error for a `value` that is none of the `known` names of its `kind`."""
    names = sorted(name or "''" for name in known)
    near = get_close_matches(str(value), names, n=3, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    first = near or names[:3]
    shown = names if len(names) <= MOST_SHOWN else [*first, f"{len(names) - len(first)} more"]
    return ValueError(f"{kind} {value!r} is unknown: it must be one of {', '.join(shown)}{hint}")


RESUME_STATUS = 75  # EX_TEMPFAIL of sysexits.h: not done, run the same command again


class Interrupted(Exception):  # noqa: N818  an outcome, not an error
    """The run was asked to stop; its checkpoint is written."""
