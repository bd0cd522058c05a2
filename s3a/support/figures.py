"""What several pictures have in common: their palette is in `palette`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

CLOSEST = 0.075  # labels of ticks, as a part of the axis


def label_sides(axes: Axes, sides: Sequence[int], power: int = 1) -> None:
    """Sets a tick on a logarithmic axis for each side of an image or map, and a label where it meets no other.

    Of labels that would meet, those of the smallest and the largest side stay.

    Args:
        sides: rising.
        power: 2 where the axis has the tokens of a map, with a tick at 3136 for the side 56, called 56².
    """
    span = math.log(sides[-1] / sides[0]) or 1
    shown = [sides[0]]
    for side in sides[1:]:
        is_far = all(abs(math.log(side / other)) >= CLOSEST * span for other in (shown[-1], sides[-1]) if other != side)
        if is_far or side == sides[-1]:
            shown.append(side)
    suffix = "²" if power == 2 else ""
    axes.set_xticks([side**power for side in sides], [f"{side}{suffix}" if side in shown else "" for side in sides])
    axes.set_xticks([], minor=True)


def describe_machine_briefly(machine: Mapping[str, Any]) -> str:
    """A machine of `timing.describe_machine` in a few words, for a picture: `AMD EPYC, 2 threads, torch 2.15.0`."""
    torch_version = str(machine["packages"]["torch"]).partition("+")[0]
    threads = machine["threads"]
    where = machine["accelerator"] or f"{machine['processor']}, {threads} thread{'s' if threads != 1 else ''}"
    return f"{where}, torch {torch_version}"
