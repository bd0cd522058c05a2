"""How the library words a wrong name: the value, what it could be, and the nearest of those."""

from collections.abc import Iterable
from difflib import get_close_matches

MOST_SHOWN = 16


def unknown(kind: str, value: object, known: Iterable[str]) -> ValueError:
    """The error for a `value` that is none of the `known` names of its `kind`."""
    names = sorted(name or "''" for name in known)
    near = get_close_matches(str(value), names, n=3, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    shown = names if len(names) <= MOST_SHOWN else [*near, f"{len(names) - len(near)} more"]
    return ValueError(f"{kind} {value!r} is unknown: it must be one of {', '.join(shown)}{hint}")
